"""What a plan says of memory and tunables, done: on machines that merge, break and unmerge, with those tunables."""

from __future__ import annotations

import numpy as np
import pytest

import ksm
from ksm import Fingerprints, HostSpec, Machine, Plan, Policy, Process, VMClass
from ksm.constants import MADV_MERGEABLE
from ksm.estimate import STABLE_NODE_BYTES
from ksm.sysfs import profile

PAGE = 4096
COMMON, OWN, AGAIN = 400, 150, 50
EACH = COMMON + OWN + AGAIN  # pages of a VM


def guest(number: int) -> Fingerprints:
    """Contents that all have, some of them twice, and its own."""
    random = np.random.default_rng(7)
    common = random.integers(1, 1 << 62, (COMMON, 2), dtype=np.uint64)
    own = np.random.default_rng(1000 + number).integers(1, 1 << 62, (OWN, 2), dtype=np.uint64)
    return Fingerprints(np.concatenate((common, common[:AGAIN], own)))


def plan(host: HostSpec, **policy: float) -> Plan:
    """From three samples that are as alike as can be, so that there is no doubt about the VMs to come."""
    return ksm.plan(VMClass("web", [guest(n) for n in range(3)]), host, Policy(headroom=0, **policy), simulate=False)


def settled(vms: int, ram: int | None = None) -> tuple[Machine, list[tuple[Process, int]]]:
    """So many VMs that have booted and merged one after the other, in no more memory than that, and where they are."""
    machine = Machine(ram=ram)
    machine.ksm.pages_to_scan = 1 << 20
    machine.ksm.run = 1
    there = []
    for number in range(vms):
        process = machine.spawn()
        there.append((process, process.mmap(guest(number))))
        process.madvise(there[-1][1], EACH * PAGE, MADV_MERGEABLE)
        for _ in range(3):
            machine.ksmd.scan()
    return machine, there


def kept(machine: Machine) -> int:
    """Bytes that the kernel keeps about what it merges."""
    counters = machine.ksm.snapshot()
    assert counters.general_profit is not None
    items = counters.pages_sharing * PAGE - counters.general_profit
    return items + counters.pages_shared * STABLE_NODE_BYTES


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_vms_that_survive_breaking(share: float) -> None:
    """A share of the merged pages is written at once; the memory that takes is what the plan says, VM by VM."""
    host = HostSpec(ram=20 * EACH * PAGE)
    answer = plan(host, broken=share).hosts[0]
    for vms in (2, 3, 10, answer.fits.broken, answer.fits.broken + 1):
        machine, there = settled(vms)
        assert machine.frames == COMMON + vms * OWN
        bookkeeping = kept(machine)
        at = int(np.flatnonzero(answer.curve.vms == vms)[0])
        assert answer.curve.frames[at] == pytest.approx(machine.frames)
        assert answer.curve.bookkeeping[at] == pytest.approx(bookkeeping)
        random = np.random.default_rng(vms)
        for process, start in there:
            for page in random.permutation(COMMON + AGAIN)[: round(share * (COMMON + AGAIN))]:
                process.write(
                    start + int(page) * PAGE, Fingerprints(random.integers(1, 1 << 62, (1, 2), dtype=np.uint64))
                )
        needed = machine.frames * PAGE + bookkeeping
        # of few VMs some KSM frames lose all that map them, and go, which the plan does not count on
        assert needed <= answer.curve.broken[at] * 1.0001 <= needed * (1.01 if vms >= 10 else 1.04)
        assert (vms <= answer.fits.broken) == (needed <= host.usable)


def test_vms_that_survive_unmerging() -> None:
    host = HostSpec(ram=20 * EACH * PAGE, swap=0)
    fits = plan(host).hosts[0].fits
    assert fits.unmerged == 20 and fits.mean is not None and fits.mean > 40
    machine, _ = settled(fits.unmerged, host.usable + PAGE)  # the last copy is made while its KSM frame is still there
    machine.ksm.run = 2
    assert machine.frames == 20 * EACH and machine.ksm.pages_sharing == 0
    machine, _ = settled(fits.unmerged + 1, host.usable + EACH * PAGE // 2)  # half a VM more is not enough for one more
    with pytest.raises(OSError, match="frame"):
        machine.ksm.run = 2


def test_swap_serves_what_breaks_only() -> None:
    without, with_swap = (
        plan(HostSpec(ram=20 * EACH * PAGE, swap=swap), broken=1.0).hosts[0].fits for swap in (0, 20 * EACH * PAGE)
    )
    assert with_swap.unmerged == 40 and with_swap.broken > 1.8 * without.broken
    assert with_swap.confident == without.confident


# ---- tunables ------------------------------------------------------------------------------------

ALWAYS = {"pages_to_scan", "sleep_millisecs", "max_page_sharing", "merge_across_nodes", "use_zero_pages"}
ADVISOR = [
    "advisor_mode",
    "advisor_target_scan_time",
    "advisor_max_cpu",
    "advisor_min_pages_to_scan",
    "advisor_max_pages_to_scan",
]


@pytest.mark.parametrize("kernel", ["5.15", "6.1", "6.6", "6.7", "6.8", "6.18"])
def test_a_kernel_takes_the_tunables_it_is_told(kernel: str) -> None:
    answer = plan(HostSpec(ram=64 * EACH * PAGE, kernel=kernel, nodes=2)).hosts[0]
    known = profile(kernel)
    names = [each.name for each in answer.tunables]
    assert len(set(names)) == len(names) and set(names) == ALWAYS | ({"smart_scan"} if known.smart_scan else set())
    assert [each.name for each in answer.advisor] == (ADVISOR if known.advisor else [])
    assert all(each.name in known.attributes and len(each.why) > 10 for each in (*answer.tunables, *answer.advisor))
    machine = Machine(kernel=kernel, nodes=2)
    for each in (*answer.tunables, *answer.advisor):
        machine.ksm.write(each.name, str(each.value))
        assert str(each.value) in machine.ksm.read(each.name)


def why(answer: Plan, name: str) -> tuple[int | str, str]:
    return next((each.value, each.why) for each in answer.hosts[0].tunables if each.name == name)


def repeated(number: int, copies: int) -> Fingerprints:
    """The same content over and over, and some of its own."""
    words = np.concatenate((np.tile(np.array([[5, 6]], np.uint64), (copies, 1)), guest(number).words[-20:]))
    return Fingerprints(words)


def test_max_page_sharing_is_raised_where_that_saves() -> None:
    """5,000 equal pages in each VM take 20 frames a VM by default, and that is half of the host."""
    images = [repeated(n, 5000) for n in range(3)]
    answer = ksm.plan(VMClass("web", images), HostSpec(ram=400 * 5020 * PAGE // 100), Policy(), simulate=False)
    limit, reason = why(answer, "max_page_sharing")
    assert isinstance(limit, int) and limit > 256 and "more frames" in reason
    frames = {each: (found := ksm.estimate(images, each)).pages - found.pages_sharing for each in (256, limit, 4096)}
    assert frames[limit] <= 1.02 * frames[4096] < frames[256]
    assert why(plan(HostSpec(ram=64 * EACH * PAGE)), "max_page_sharing")[0] == 256


def test_zero_pages_and_nodes_are_weighed() -> None:
    zeros = [
        Fingerprints(np.concatenate((guest(n).words, np.tile(ksm.fingerprint(bytes(PAGE)).words, (100, 1)))))
        for n in range(3)
    ]
    host = HostSpec(ram=40 * 700 * PAGE, nodes=2)
    answer = ksm.plan(VMClass("web", zeros), host, Policy(), simulate=False)
    assert why(answer, "use_zero_pages")[0] == 1 and "14.3%" in why(answer, "use_zero_pages")[1]
    assert why(answer, "merge_across_nodes")[0] == 1 and "2 nodes apart" in why(answer, "merge_across_nodes")[1]
    none = plan(HostSpec(ram=40 * 700 * PAGE))
    assert (
        why(none, "use_zero_pages")[0] == 0 and why(none, "merge_across_nodes")[1] == "the default: there is one node"
    )
    # what both nodes have apart costs as many frames as a machine with as many nodes takes
    asked = ksm.plan(VMClass("web", zeros), host, Policy(merge_across_nodes=False), simulate=False).hosts[0]
    vms = 6
    at = int(np.flatnonzero(asked.curve.vms == vms)[0])
    machine = Machine(nodes=2)
    machine.ksm.merge_across_nodes = 0
    machine.ksm.use_zero_pages = True
    machine.ksm.pages_to_scan = 1 << 20
    machine.ksm.run = 1
    for number in range(vms):
        image = Fingerprints(np.concatenate((guest(number).words, zeros[0].words[-100:])))
        process = machine.spawn()
        process.madvise(process.mmap(image, node=number % 2), len(image) * PAGE, MADV_MERGEABLE)
    for _ in range(4):
        machine.ksmd.scan()
    assert asked.curve.frames[at] == pytest.approx(machine.frames, abs=1)

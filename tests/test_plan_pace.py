"""The closed form of time and CPU against simulated machines, on plans of many shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ksm
from ksm import Fingerprints, HostSpec, Machine, Policy, VMClass
from ksm.constants import MADV_MERGEABLE
from ksm.plan.confirm import _load
from ksm.plan.growth import Rules
from ksm.plan.pace import Pace, levels
from ksm.plan.result import HostPlan
from ksm.sysfs import profile

PAGE = 4096


def guests(number: int, common: int, some: int, own: int, within: int, zero: int, seed: int = 0) -> list[Fingerprints]:
    """Guests of contents that all have, half have, one alone has, one has four times; and zero pages; shuffled."""
    random = np.random.default_rng(seed)

    def contents(n: int) -> np.ndarray:
        return random.integers(1, 1 << 62, (n, 2), dtype=np.uint64)

    everyone, half = contents(common), contents(some)
    made = []
    for _ in range(number):
        mine = half[random.random(some) < 0.5]
        zeros = np.tile(ksm.fingerprint(bytes(PAGE)).words, (zero, 1))
        words = np.concatenate((everyone, mine, contents(own), np.repeat(contents(within), 4, axis=0), zeros))
        made.append(Fingerprints(random.permutation(words)))
    return made


def planned(images: list[Fingerprints], host: HostSpec, policy: Policy) -> HostPlan:
    answer = ksm.plan(VMClass("web", images), host, policy).hosts[0]
    assert answer.check is not None
    return answer


CASES = [
    # guests, common, some, own, within, zero; VMs' worth of RAM; NUMA nodes; kernel; policy
    ((4, 2000, 0, 1000, 0, 200), 20, 1, "6.18", {}),
    ((4, 2000, 0, 1000, 0, 200), 20, 1, "6.1", {}),
    ((4, 5000, 2000, 500, 250, 1000), 8, 1, "6.18", {"use_zero_pages": True}),
    ((4, 5000, 2000, 500, 250, 1000), 8, 1, "6.6", {"use_zero_pages": False}),
    ((6, 6000, 4000, 200, 0, 0), 6, 2, "6.12", {"merge_across_nodes": False}),
    ((6, 6000, 4000, 200, 0, 0), 6, 4, "6.12", {"merge_across_nodes": True}),
    ((3, 9000, 100, 6000, 50, 0), 12, 2, "6.8", {"merge_across_nodes": False}),
    ((3, 30000, 1000, 3000, 0, 500), 12, 1, "6.18", {"settle": 20.0}),
]


@pytest.mark.parametrize(("shape", "vms", "nodes", "kernel", "policy"), CASES)
def test_the_closed_form_is_what_the_simulation_takes(
    shape: tuple[int, ...], vms: int, nodes: int, kernel: str, policy: dict[str, float]
) -> None:
    images = guests(*shape)
    host = HostSpec(ram=vms * len(images[0]) * PAGE, nodes=nodes, kernel=kernel)
    answer = planned(images, host, Policy(**{"headroom": 0, "settle": 60.0, **policy}))
    check = answer.check
    assert check is not None and check.vms > 4
    for closed, simulated in (check.seconds_50, check.seconds_90, check.seconds_99):
        assert closed == pytest.approx(simulated, rel=0.04)
    assert check.cpu_seconds[0] == pytest.approx(check.cpu_seconds[1], rel=0.05)
    assert check.pages_sharing[1] == pytest.approx(check.pages_sharing[0], rel=0.001)
    for closed, simulated in check.one_more.values():
        assert closed == pytest.approx(simulated, rel=0.08) or (math.isinf(closed) and closed == simulated)
    assert answer.settle.cold[99] <= 60 or "not enough" in answer.tunables[0].why
    apart = policy.get("merge_across_nodes") is False
    tunables = {each.name: each.value for each in answer.tunables}
    assert tunables["merge_across_nodes"] == int(not apart)


@pytest.mark.parametrize("kernel", ["6.1", "6.8", "6.18"])
@pytest.mark.parametrize("zero", [False, True])
def test_settled_passes_cost_what_they_cost_in_a_simulation(kernel: str, zero: bool) -> None:
    images = guests(5, 4000, 1000, 2000, 100, 500)
    known = profile(kernel)
    pace = Pace(500, 20, known.smart_scan, gate_first=known.gate_first)
    load = _load(images, Rules(use_zero_pages=zero), PAGE)
    machine = Machine(kernel=kernel)
    machine.ksm.pages_to_scan = pace.pages_to_scan
    machine.ksm.use_zero_pages = zero
    for number, image in enumerate(images):
        process = machine.spawn(str(number))
        process.madvise(process.mmap(image), len(image) * PAGE, MADV_MERGEABLE)
    machine.ksm.run = 1

    def at_pass(number: int) -> tuple[float, float]:
        while machine.ksm.full_scans < number:
            machine.run_for(0.004)
        return machine.now, machine.ksmd.cpu_seconds

    (began, cpu_before), (ended, cpu_after) = at_pass(22), at_pass(22 + 9)
    seconds, cpu = pace.steady(load)
    assert seconds == pytest.approx((ended - began) / 9, rel=0.02)
    assert cpu == pytest.approx((cpu_after - cpu_before) / 9, rel=0.03)


def test_what_two_pages_need_to_meet_may_never_come() -> None:
    """Half of what the second VM shares had no partner: smart scan tries those pages in other passes."""
    first, second = guests(2, 1000, 0, 500, 0, 0)
    doubled = Fingerprints(np.concatenate((first.words, first.words[:500])))
    answer = planned([doubled, second], HostSpec(ram=2600 * PAGE), Policy(headroom=0, broken=0))
    assert answer.check is not None and answer.fits.recommended == 2
    closed, simulated = answer.check.one_more[99]
    assert math.isinf(closed) and math.isinf(simulated)
    assert answer.check.to_dict()["one_more"]["99"] == [None, None]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3000), st.integers(1, 3000), st.integers(0, 10))
def test_levels_are_the_mean_of_binary_digits(first: int, more: int, beyond: int) -> None:
    every = [max(n.bit_length() - beyond, 0) for n in range(first, first + more)]
    assert levels(np.array([first, first + more], float), beyond)[0] == pytest.approx(np.mean(every))


@pytest.mark.parametrize("zero_merged", [True, False])
def test_zero_pages_are_thinned_out_too(zero_merged: bool) -> None:
    """The zero page is one content of a third of all pages: the simulation keeps its share, whether its hash falls in
    what is kept or not, and so takes as long as the headline says for as many VMs."""
    images = guests(4, 20000, 0, 6000, 0, 13000)
    host = HostSpec(ram=10 * len(images[0]) * PAGE)
    answer = planned(images, host, Policy(headroom=0, settle=120.0, use_zero_pages=zero_merged))
    check = answer.check
    assert check is not None and check.thinning > 4
    assert check.seconds_99[1] * answer.fits.recommended / check.vms == pytest.approx(answer.settle.cold[99], rel=0.1)

"""The planner: its statistics against enumeration, its answers against the estimate, and bad input."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ksm
from ksm import HostSpec, Plan, PlanError, Policy, VMClass
from ksm.constants import MADV_MERGEABLE
from ksm.plan.contents import Table
from ksm.plan.growth import Growth, Rules, Samples
from ksm.sources import Snapshot

PAGE = 4096
GIB = 1 << 30


def image(*values: int) -> ksm.Fingerprints:
    """A page for each value: equal values are equal pages; 0 is the zero page."""
    factors = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)  # spread over all bits, as a hash is
    words = np.array(values, np.uint64).reshape(-1, 1) * factors
    words[words[:, 1] == 0] = ksm.fingerprint(bytes(PAGE)).words[0]
    return ksm.Fingerprints(words)


def frames(images: list[ksm.Fingerprints], **tunables: Any) -> int:
    answer = ksm.estimate(images, **tunables)
    return answer.pages - answer.pages_sharing - answer.ksm_zero_pages


contents = st.lists(st.integers(0, 8), min_size=1, max_size=20)


@settings(max_examples=60)
@given(
    images=st.lists(contents, min_size=2, max_size=5),
    limit=st.integers(2, 5),
    zero=st.booleans(),
)
def test_rarefaction_is_the_mean_over_all_subsets(images: list[list[int]], limit: int, zero: bool) -> None:
    prints = [image(*each) for each in images]
    table = Table.of([Snapshot("", PAGE, True, True, ((0, each),)) for each in prints], [0] * len(prints))
    growth = Growth(Samples(table), Rules(1 << 20, zero), [len(prints)])
    for n in range(1, len(prints) + 1):
        every = [
            frames(list(some), max_page_sharing=1 << 20, use_zero_pages=zero)
            for some in itertools.combinations(prints, n)
        ]
        assert growth.frames(np.array([[n]]))[0][0] == pytest.approx(np.mean(every))
    limited = Growth(Samples(table), Rules(limit, True), [len(prints)])
    everything = frames(prints, max_page_sharing=limit, use_zero_pages=True)
    assert limited.frames(np.array([[len(prints)]]))[0][0] == pytest.approx(everything)


def splits(items: list[Any], sizes: list[int]) -> Iterator[list[list[Any]]]:
    """All ways to deal out some of the items to places, so many to each."""
    if not sizes:
        yield []
        return
    for some in itertools.combinations(range(len(items)), sizes[0]):
        rest = [item for i, item in enumerate(items) if i not in some]
        for more in splits(rest, sizes[1:]):
            yield [[items[i] for i in some], *more]


@settings(max_examples=25, deadline=None)
@given(
    first=st.lists(contents, min_size=2, max_size=3),
    second=st.lists(contents, min_size=1, max_size=3),
    limit=st.sampled_from([2, 3, 5, 256]),
    zero=st.booleans(),
    nodes=st.sampled_from([1, 2]),
    data=st.data(),
)
def test_classes_nodes_and_limits_against_every_way_to_draw_and_place(
    first: list[list[int]], second: list[list[int]], limit: int, zero: bool, nodes: int, data: st.DataObject
) -> None:
    """Of two classes, so many each, dealt out to nodes that do not merge with each other: the mean over all ways."""
    prints = [image(*each) for each in first + second]
    class_of = [0] * len(first) + [1] * len(second)
    table = Table.of([Snapshot("", PAGE, True, True, ((0, each),)) for each in prints], class_of)
    counts = [data.draw(st.integers(0, len(each)), "VMs") for each in (first, second)]
    dealt = [[n // nodes + (node < n % nodes) for node in range(nodes)] for n in counts]
    growth = Growth(Samples(table), Rules(limit, zero, nodes), counts)
    found, unshared = growth.frames(np.array([counts]))
    every, alone = [], []
    for ours in splits(prints[: len(first)], dealt[0]):
        for theirs in splits(prints[len(first) :], dealt[1]):
            places = [mine + others for mine, others in zip(ours, theirs, strict=True) if mine + others]
            every.append(sum(frames(each, max_page_sharing=limit, use_zero_pages=zero) for each in places))
            alone.append(sum(ksm.estimate(each, use_zero_pages=True).pages_unshared for each in places))
    assert found[0] == pytest.approx(np.mean(every))
    assert unshared[0] <= np.mean(alone) + 1e-9
    copies = [{each.count(value) for each in first + second if value in each} for value in range(1, 9)]
    if not any(len(each) > 1 and 1 in each for each in copies):  # such contents are taken for shared
        assert unshared[0] == pytest.approx(np.mean(alone))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("limit", [2, 5, 256])
def test_frames_are_those_of_a_machine(limit: int, zero: bool) -> None:
    """The samples themselves, on a machine of two nodes with those tunables, and what the kernel says of them."""
    random = np.random.default_rng(limit)
    prints = [image(*random.integers(0, 30, 40)) for _ in range(4)]
    table = Table.of([Snapshot("", PAGE, True, True, ((0, each),)) for each in prints], [0] * 4)
    every = []
    for chosen in itertools.combinations(range(4), 2):
        machine = ksm.Machine(nodes=2)
        machine.ksm.merge_across_nodes = 0
        machine.ksm.max_page_sharing = limit
        machine.ksm.use_zero_pages = zero
        machine.ksm.smart_scan = 0
        machine.ksm.pages_to_scan = 1 << 20
        machine.ksm.run = 1
        for number, each in enumerate(prints):
            process = machine.spawn()
            process.madvise(process.mmap(each, node=int(number in chosen)), len(each) * PAGE, MADV_MERGEABLE)
        for _ in range(6):
            machine.ksmd.scan()
        every.append(machine.frames)
    planned = Growth(Samples(table), Rules(limit, zero, 2), [4]).frames(np.array([[4]]))[0][0]
    assert planned == pytest.approx(np.mean(every))


def test_a_plan_answers() -> None:
    vms = [image(*range(100), *range(1000 * n, 1000 * n + 50)) for n in range(1, 5)]
    answer = ksm.plan(VMClass("web", vms), HostSpec(ram=1000 * PAGE), Policy(headroom=0, broken=0), simulate=False)
    assert isinstance(answer, Plan)
    assert answer.hosts[0].fits.without_ksm == 6
    assert answer.hosts[0].fits.mean == 17  # 100 + 50 n frames, and some for rmap items
    assert json.loads(json.dumps(answer.to_dict()))["fits"] == answer.fits
    assert "VMs fit" in answer.verdict()[0]


def test_one_sample_gives_bounds() -> None:
    answer = ksm.plan(VMClass("web", [image(*range(1, 101))]), HostSpec(ram=1000 * PAGE), Policy(headroom=0))
    fits, curve = answer.hosts[0].fits, answer.hosts[0].curve
    assert fits.mean is None and fits.low == fits.without_ksm - 1 == 9 and fits.high > 500
    assert np.isnan(curve.need[2]) and curve.need_low[2] < curve.need_high[2]
    assert answer.to_dict()["hosts"][0]["curve"]["need"][2] is None
    assert "bounds" in " ".join(answer.verdict())


def vm(**changes: Any) -> VMClass:
    return VMClass(**{"name": "web", "samples": [image(1, 2)], **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vm(samples=[]), "no samples"),
        (lambda: vm(share=1.5), "share of the mix"),
        (lambda: vm(ram=0), "RAM"),
        (lambda: ksm.plan([], HostSpec(ram=GIB)), "no classes"),
        (lambda: ksm.plan(vm(), []), "no hosts"),
        (lambda: ksm.plan([vm(), vm()], HostSpec(ram=GIB)), "two classes"),
        (lambda: ksm.plan([vm(share=0.5), vm(name="db", share=0.3)], HostSpec(ram=GIB)), "sum to 1"),
        (lambda: ksm.plan([vm(share=0.5), vm(name="db")], HostSpec(ram=GIB)), "no share"),
        (lambda: ksm.plan(vm(ram=2 * GIB), HostSpec(ram=GIB)), "smaller than one VM"),
        (lambda: ksm.plan(vm(ram=PAGE), HostSpec(ram=GIB)), "a sample has 8,192 bytes"),
        (lambda: ksm.plan(vm(samples=[image()]), HostSpec(ram=GIB)), "no pages"),
        (lambda: HostSpec(ram=GIB, reserve=GIB), "leaves nothing"),
        (lambda: HostSpec(ram=float("nan")), "ram is nan; it must be a whole number"),  # type: ignore[arg-type]
        (lambda: HostSpec(ram=1 << 80), "no machine has that much"),
        (lambda: HostSpec(ram=GIB, count=True), "count is True"),
        (lambda: HostSpec(ram=GIB, swap=-1), "swap is -1 bytes"),
        (lambda: vm(ram="4G"), "ram is 4G; it must be a whole number"),
        (lambda: vm(samples="guest.raw"), "must be a list"),
        (lambda: ksm.plan(vm(samples=[image(1)] * 1025), HostSpec(ram=GIB)), "1,025 samples"),
        (lambda: HostSpec(ram=GIB, nodes=0), "nodes"),
        (lambda: Policy(confidence=1.0), "confidence"),
        (lambda: Policy(broken=float("nan")), "broken"),
        (lambda: Policy(settle=0), "settle"),
        (lambda: Policy(headroom="10%"), "headroom is '10%'; it must be a number"),  # type: ignore[arg-type]
        (lambda: Policy(settle=float("inf")), "settle is inf"),
        (lambda: Policy(max_page_sharing=2.5), "must be a whole number"),  # type: ignore[arg-type]
        (lambda: Policy(use_zero_pages="no"), "must be true or false"),  # type: ignore[arg-type]
        (lambda: Policy(merge_across_nodes=2), "must be true or false"),  # type: ignore[arg-type]
        (lambda: HostSpec(ram=GIB, name=""), "it must be a text"),
        (lambda: HostSpec(ram=GIB, kernel=6.12), "kernel is 6.12; it must be a text"),  # type: ignore[arg-type]
        (lambda: vm(name=5), "name is 5"),
        (lambda: vm(share="50%"), "share is '50%'; it must be a number"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


def test_samples_of_different_page_sizes() -> None:
    large: npt.NDArray[np.uint8] = np.zeros((1, 16384), np.uint8)
    with pytest.raises(ValueError, match="page sizes differ"):
        ksm.plan(vm(samples=[large, np.zeros((1, PAGE), np.uint8)]), HostSpec(ram=GIB))


def test_a_tight_cpu_budget_is_kept_and_said() -> None:
    vms = [image(*range(2000), *range(10_000 * n, 10_000 * n + 1000)) for n in range(1, 5)]
    policy = Policy(headroom=0, settle=0.5, ksmd_cpu=0.05)
    answer = ksm.plan(VMClass("web", vms), HostSpec(ram=100_000 * PAGE), policy, simulate=False).hosts[0]
    assert answer.settle.cpu_cold <= 0.05 and answer.settle.cold[99] > 0.5
    assert "not enough" in answer.tunables[0].why


def test_huge_numbers_of_vms_end_at_a_limit() -> None:
    """Room for 10**9 VMs: the answer comes soon, and says where it stopped looking."""
    vms = [image(*range(50), 1000 + n) for n in range(4)]
    began = time.monotonic()
    answer = ksm.plan(VMClass("web", vms), HostSpec(ram=1 << 48, count=10**6), Policy(headroom=0))
    assert time.monotonic() - began < 20
    assert answer.hosts[0].fits.recommended == 10_000 and answer.fits == 10**10
    assert any("looks beyond 10,000 VMs" in line for line in answer.warnings)

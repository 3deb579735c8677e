"""The planner: its statistics against enumeration, its answers against the estimate, and bad input."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ksm
from ksm import HostSpec, Plan, PlanError, Policy, VMClass
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

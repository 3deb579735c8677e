"""What holds of every plan, whatever the samples and the host."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ksm
from ksm import Fingerprints, HostSpec, Policy, VMClass
from ksm.plan import HostPlan
from ksm.plan.mixture import fit

PAGE = 4096
ZERO = ksm.fingerprint(bytes(PAGE)).words


def image(values: list[int]) -> Fingerprints:
    """A page for each value; 0 is the zero page."""
    words = np.stack((np.array(values, np.uint64) + 7, np.array(values, np.uint64) * 0x9E3779B97F4A7C15), axis=1)
    words[np.array(values) == 0] = ZERO
    return Fingerprints(words)


images = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=25).map(image), min_size=2, max_size=5)
hosts = st.builds(
    HostSpec,
    ram=st.integers(60, 150).map(lambda pages: pages * PAGE),
    reserve=st.integers(0, 20).map(lambda pages: pages * PAGE),
    vm_overhead=st.integers(0, 5).map(lambda pages: pages * PAGE),
    swap=st.integers(0, 100).map(lambda pages: pages * PAGE),
    nodes=st.sampled_from([1, 2]),
    kernel=st.sampled_from(["6.1", "6.18"]),
)
policies = st.builds(
    Policy,
    headroom=st.floats(0, 0.5),
    broken=st.floats(0, 1),
    confidence=st.floats(0.5, 0.99),
    use_zero_pages=st.booleans(),
    merge_across_nodes=st.booleans(),
    max_page_sharing=st.sampled_from([2, 5, 256]),
)


def planned(samples: list[Fingerprints], host: HostSpec, policy: Policy) -> HostPlan:
    return ksm.plan(VMClass("vm", samples), host, policy, simulate=False).hosts[0]


def numbers(answer: HostPlan) -> dict[str, Any]:
    found = {field.name: getattr(answer.fits, field.name) for field in fields(answer.fits)}
    return {name: value for name, value in found.items() if isinstance(value, int)}


@settings(max_examples=10, deadline=None)
@given(images, hosts, policies)
def test_curves_rise_and_bands_hold_their_middle(samples: list[Fingerprints], host: HostSpec, policy: Policy) -> None:
    answer = planned(samples, host, policy)
    curve, fits = answer.curve, answer.fits
    for what in ("pages", "frames", "without", "need", "bookkeeping"):
        values = getattr(curve, what)
        assert (np.diff(values) >= -1e-6 * values[1:]).all(), what
    for what in ("frames", "need", "saved"):
        low, middle, high = (getattr(curve, what + end) for end in ("_low", "", "_high"))
        assert (low <= middle + 1e-6).all() and (middle <= high + 1e-6).all(), what
    assert (curve.frames <= curve.pages + 1e-6).all() and curve.frames[0] == curve.need[0] == 0
    assert (curve.unshared <= curve.frames + 1e-6).all()
    assert (curve.broken[1:] >= curve.need[1:] - 1e-6).all()
    assert fits.low <= (fits.mean or 0) <= fits.high
    assert fits.recommended == min(fits.confident, fits.broken)
    assert fits.without_ksm <= fits.unmerged and fits.committed <= fits.unmerged
    assert np.interp(fits.mean or 0, curve.vms, curve.need) <= host.usable * (1 - policy.headroom) + 1e-6


@settings(max_examples=5, deadline=None)
@given(images, hosts, policies, st.randoms(use_true_random=False))
def test_the_order_of_samples_says_nothing(
    samples: list[Fingerprints], host: HostSpec, policy: Policy, random: Any
) -> None:
    """But where contents have more copies than a KSM frame, whose means over subsets may be of drawn ones."""
    shuffled = [Fingerprints(np.array(random.sample(each.words.tolist(), len(each)), np.uint64)) for each in samples]
    random.shuffle(shuffled)
    one, other = planned(samples, host, policy), planned(shuffled, host, policy)
    assert numbers(one) == numbers(other)
    assert one.curve.need == pytest.approx(other.curve.need)
    assert one.curve.need_high == pytest.approx(other.curve.need_high)


@settings(max_examples=4, deadline=None)
@given(images, images, hosts, policies)
def test_the_order_of_classes_says_nothing(
    some: list[Fingerprints], others: list[Fingerprints], host: HostSpec, policy: Policy
) -> None:
    classes = [VMClass("a", some, share=0.7), VMClass("b", others, share=0.3)]
    one, other = (ksm.plan(each, host, policy, simulate=False).hosts[0] for each in (classes, classes[::-1]))
    for name, value in numbers(one).items():
        assert abs(numbers(other)[name] - value) <= 1, name  # of two classes that lack as much, the first is next


@settings(max_examples=6, deadline=None)
@given(images, hosts, policies, st.integers(1, 100), st.sampled_from(["ram", "swap", "reserve", "vm_overhead"]))
def test_more_memory_never_fits_less(
    samples: list[Fingerprints], host: HostSpec, policy: Policy, pages: int, what: str
) -> None:
    scarcer = what in ("reserve", "vm_overhead")
    pages = min(pages, 10) if scarcer else pages
    changed = replace(host, **{what: getattr(host, what) + pages * PAGE})
    more, less = (planned(samples, each, policy) for each in ((host, changed) if scarcer else (changed, host)))
    for name, value in numbers(less).items():
        assert numbers(more)[name] >= value, name


@settings(max_examples=5, deadline=None)
@given(images, hosts, policies)
def test_asking_for_more_never_fits_more(samples: list[Fingerprints], host: HostSpec, policy: Policy) -> None:
    base = numbers(planned(samples, host, policy))
    surer = replace(policy, confidence=min(0.995, policy.confidence + 0.2))
    emptier = replace(policy, headroom=min(0.9, policy.headroom + 0.1))
    safer = replace(policy, broken=min(1.0, policy.broken + 0.2))
    for changed in (surer, emptier, safer):
        assert numbers(planned(samples, host, changed))["recommended"] <= base["recommended"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=8).filter(any))
def test_growth_beyond_the_samples_is_between_nothing_and_the_straight_line(counts: list[int]) -> None:
    """It rises, ever more slowly, and never faster than contents seen once come."""
    incidence = np.array(counts, float)
    more = fit(incidence).more(np.arange(40))
    steps = np.diff(more)
    assert (
        more[0] == pytest.approx(0, abs=1e-6)
        and (steps >= -1e-6).all()
        and (np.diff(steps) <= 1e-6 * (1 + steps[0])).all()
    )

"""Plans against what is there: many VMs predicted from few, over draws of real workers and of made-up populations."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import ksm
from ksm.plan.mixture import fit
from ksm.sources import Snapshot

plan = pytest.importorskip("bench.plan", reason="an installed package is tested, without bench/")


@pytest.mark.skipif(sys.platform != "linux", reason="the pages of live processes are read on Linux only")
def test_real_workers() -> None:
    found = plan.run(plan.Case("mixed", (3, 3), (3, 3)), plan.read_workers(12), draws=20)
    assert found["mean error"] < 0.03
    assert found["coverage"] >= 0.6  # 20 draws of 12 workers: bench.plan has the long run


def population(number: int, seed: int) -> list[Snapshot]:
    """VMs of contents that all have, half have, and that only one has, the last in varying numbers."""
    random = np.random.default_rng(seed)
    made = []
    for vm in range(number):
        some = 10_000 + np.flatnonzero(random.random(2000) < 0.5)
        own = np.arange(1_000_000 * (vm + 1), 1_000_000 * (vm + 1) + random.integers(800, 1200))
        low = np.concatenate((np.arange(1, 4001), some, own)).astype(np.uint64)
        words = np.stack((np.full_like(low, 9), low), axis=1)
        made.append(Snapshot(str(vm), 4096, True, True, ((0, ksm.Fingerprints(words)),)))
    return made


def test_intervals_hold_the_truth() -> None:
    found = plan.run(plan.Case("24 from 6", (6,), (24,)), [population(60, 1)], draws=60)
    assert found["mean error"] < 0.05 and found["mean error"] < found["Chao2"]  # harder than real memory
    assert found["coverage"] > 0.8 and found["half width"] < 0.1


def test_a_bootstrap_takes_what_is_drawn_twice_for_shared() -> None:
    """Why intervals come from leaving samples out: images drawn twice seem to share all they have."""
    found = plan.run(plan.Case("8 from 3", (3,), (8,)), [population(11, 1)], draws=4, rounds=20)
    assert found["boot. width"] > 5 * found["half width"] > 0


def test_contents_of_their_own_grow_in_proportion_and_common_ones_do_not() -> None:
    """What an estimator made for pools of species cannot tell apart."""
    ways = (6, 15, 20, 15, 6, 1)
    common = 50_000 * np.array([0.9**k * 0.1 ** (6 - k) * n for k, n in enumerate(ways, 1)])
    counts = common + np.array([6 * 1000.0, 0, 0, 0, 0, 0])
    more = float(fit(counts).more(np.array([18]))[0])
    assert more == pytest.approx(18 * 1000, rel=0.01)

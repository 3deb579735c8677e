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
    found = plan.run(plan.Case("mixed", (3, 3), (3, 3)), [plan.pool(each) for each in plan.read_workers(12)], draws=20)
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
    found = plan.run(plan.Case("24 from 6", (6,), (24,)), [plan.pool(population(60, 1))], draws=60)
    assert found["mean error"] < 0.05 and found["mean error"] < found["Chao2"]  # harder than real memory
    assert found["coverage"] > 0.8 and found["half width"] < 0.1


def test_a_bootstrap_takes_what_is_drawn_twice_for_shared() -> None:
    """Why intervals come from leaving samples out: images drawn twice seem to share all they have."""
    found = plan.run(plan.Case("8 from 3", (3,), (8,)), [plan.pool(population(11, 1))], draws=4, rounds=20)
    assert found["boot. width"] > 4 * found["half width"] > 0


def test_contents_of_their_own_grow_in_proportion_and_common_ones_do_not() -> None:
    """What an estimator made for pools of species cannot tell apart."""
    ways = (6, 15, 20, 15, 6, 1)
    common = 50_000 * np.array([0.9**k * 0.1 ** (6 - k) * n for k, n in enumerate(ways, 1)])
    counts = common + np.array([6 * 1000.0, 0, 0, 0, 0, 0])
    more = float(fit(counts).more(np.array([18]))[0])
    assert more == pytest.approx(18 * 1000, rel=0.01)


def test_the_size_of_a_plan_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    size = pytest.importorskip("bench.plan_size")
    monkeypatch.setattr(sys, "argv", ["plan_size", "--images", "3", "--mebibytes", "4"])
    size.main()
    printed = capsys.readouterr().out
    assert "3 images of 4 MiB, 3,069 pages" in printed
    # the host has room for eight times as many VMs as there are samples, without KSM
    assert int(printed.split("answer")[1].split()[0]) > 24


@pytest.mark.parametrize(("kind", "samples", "come"), [("rare", 12, 48), ("halves", 2, 8), ("spectrum", 3, 8)])
def test_intervals_hold_the_truth_of_hard_populations(kind: str, samples: int, come: int) -> None:
    """Contents that few VMs have, or every other: without the doubt below the estimate these intervals miss."""
    made_up = pytest.importorskip("bench.made_up")
    found = plan.run(plan.Case(kind, (samples,), (come,)), [lambda n, random: made_up.vms(kind, n, random)], draws=12)
    assert found["coverage"] > (0.95 if samples == 2 else 0.7) and found["one side"] > 0.7
    assert abs(found["bias"]) < (0.3 if samples == 2 else 0.05)

"""The tuner's rules: ksmtuned's as documented, and the target's promises kept on simulated machines."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import ksm
from ksm.policies import Decision, Policy, Pressure, Target, View, parse_conf
from ksm.stats import Stats

GIB = 1 << 30
PAGE = 4096


def view(available: int, total: int = 16 * GIB, committed: int = 0) -> View:
    return View(seconds=0.0, stats=Stats(), mem_total=total, mem_available=available, committed=committed)


# ---- pressure -------------------------------------------------------------------------------------------------


def test_pressure_over_time() -> None:
    """Short, shorter, relief, plenty: what the documented rule gives with the documented defaults."""
    policy = Pressure()
    assert policy.interval == 60
    threshold = 16 * GIB * 20 // 100
    seen = [policy.decide(view(available)) for available in [threshold - 1] * 6 + [threshold] * 30]
    assert [d.pages_to_scan for d in seen[:6]] == [300, 600, 900, 1200, 1250, 1250]
    assert [d.pages_to_scan for d in seen[6:9]] == [1200, 1150, 1100]
    assert seen[-1].pages_to_scan == 64
    assert [d.run for d in seen] == [True] * 6 + [False] * 30
    assert {d.sleep_millisecs for d in seen} == {10}
    assert "threshold 3,276 MiB" in seen[0].why


def test_pressure_of_promises() -> None:
    policy = Pressure()
    enough = policy.decide(view(12 * GIB, committed=13 * GIB))
    assert enough.run and enough.pages_to_scan == 64 and "13,312 MiB of 16,384 MiB promised" in enough.why
    assert not policy.decide(view(12 * GIB, committed=12 * GIB)).run


def test_pressure_on_other_hosts() -> None:
    small = Pressure(thres_const=1 << 20).decide(view(900 << 20, total=2 * GIB))
    assert small.run  # 20 % are 410 MiB, and the constant is 1 GiB
    assert small.sleep_millisecs == 80
    assert Pressure(sleep_msec=100).decide(view(60 * GIB, total=64 * GIB)).sleep_millisecs == 25
    assert Pressure().decide(view(600 * GIB, total=1024 * GIB)).sleep_millisecs == 10


def test_settings_of_ksmtuned() -> None:
    text = """
    # How long to sleep between adjustments
    KSM_MONITOR_INTERVAL=5
    KSM_SLEEP_MSEC="20"   # quoted
    export KSM_NPAGES_BOOST=100
    KSM_NPAGES_DECAY=-10
    KSM_NPAGES_MIN=50
    KSM_NPAGES_MAX=1000
    KSM_THRES_COEF=50
    KSM_THRES_CONST=4096
    LOGFILE='/var/log/ksmtuned'
    DEBUG=1
    """
    settings = parse_conf(text)
    assert settings["LOGFILE"] == "/var/log/ksmtuned" and settings["DEBUG"] == "1" and len(settings) == 10
    policy = Pressure.of(settings)
    assert policy.interval == 5
    found = [policy.decide(view(7 * GIB)), policy.decide(view(9 * GIB))]
    assert [(d.run, d.pages_to_scan, d.sleep_millisecs) for d in found] == [(True, 100, 20), (False, 90, 20)]
    assert [policy.decide(view(7 * GIB)).pages_to_scan for _ in range(12)][-1] == 1000
    assert [policy.decide(view(9 * GIB)).pages_to_scan for _ in range(99)][-1] == 50


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("KSM_NPAGES_MAX=$(nproc)", "line 1: .* is not NAME=VALUE with a plain value"),
        ("\nif true", "line 2: 'if'"),
        ("KSM_NPAGES=5", "is not one of KSM_MONITOR_INTERVAL"),
        ("LOGFILE='x", "line 1: No closing quotation"),
        ("KSM_NPAGES_MAX=many", "KSM_NPAGES_MAX=many: it must be a whole number"),
        ("KSM_NPAGES_MAX=", "KSM_NPAGES_MAX=: it must be a whole number"),
        ("KSM_NPAGES_MIN=2000", "KSM_NPAGES_MIN=2000: from 1 to KSM_NPAGES_MAX"),
        ("KSM_NPAGES_MAX=999999999", "KSM_NPAGES_MAX=999999999: at most"),
        ("KSM_NPAGES_DECAY=50", "it is added, so it must not be positive"),
        ("KSM_NPAGES_BOOST=-1", "KSM_NPAGES_BOOST=-1"),
        ("KSM_MONITOR_INTERVAL=0", "seconds, above 0"),
        ("KSM_THRES_COEF=101", "0 to 100"),
        ("KSM_THRES_CONST=-1", "KiB, not negative"),
        ("KSM_SLEEP_MSEC=-5", "milliseconds, not negative"),
    ],
)
def test_bad_settings(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Pressure.of(parse_conf(text))


# ---- target ----------------------------------------------------------------------------------------------------


def pages(n: int, seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (n, PAGE), dtype=np.uint8)


class Simulation:
    """A machine under a policy: time passes in its intervals."""

    def __init__(self, policy: Policy, kernel: str = "6.18") -> None:
        self.machine = ksm.Machine(kernel=kernel)
        self.policy = policy
        self.decisions: list[Decision] = []

    def add(self, name: str, image: Any) -> None:
        process = self.machine.spawn(name)
        process.madvise(process.mmap(image), image.nbytes, ksm.MADV_MERGEABLE)

    def run_for(self, seconds: float) -> None:
        machine = self.machine
        end = machine.now + seconds
        while machine.now < end - 1e-6:
            every = machine.processes.values()
            now = View(
                seconds=machine.now,
                stats=machine.ksm.snapshot(),
                mem_total=16 * GIB,
                mem_available=8 * GIB,
                ksmd_cpu=machine.ksmd.cpu_seconds,
                candidates=sum(vma.end - vma.start for process in every for vma in process.vmas),
            )
            decision = self.policy.decide(now)
            self.decisions.append(decision)
            for name, value in decision.settings().items():
                if name in machine.ksm.names():
                    machine.ksm.write(name, value)
            machine.run_for(min(self.policy.interval, end - machine.now))

    @property
    def sharing(self) -> int:
        return self.machine.ksm.pages_sharing


@pytest.mark.parametrize("kernel", ["5.15", "6.6", "6.18"])
def test_target_settles_in_time(kernel: str) -> None:
    """Guests arrive; each time all that is equal is merged within the time asked for, within the budget."""
    rng = pages(40_000, 1)
    simulation = Simulation(Target(settle=60, cpu=20), kernel)
    arrivals = ((0.0, 40_000, 0), (60.0, 20_000, 20_000), (17.0, 10_000, 30_000), (300.0, 40_000, 70_000))
    for number, (after, count, goal) in enumerate(arrivals):
        simulation.run_for(after)
        simulation.add(f"vm{number}", rng[:count])
        if number == 2:
            continue  # and the next comes while this one settles, 17 s after the one before it
        start, cpu = simulation.machine.now, simulation.machine.ksmd.cpu_seconds
        simulation.run_for(60.0)
        assert simulation.sharing >= 0.99 * goal, (number, simulation.sharing, goal, simulation.decisions[-1])
        share = (simulation.machine.ksmd.cpu_seconds - cpu) / (simulation.machine.now - start)
        assert share < 0.20


def test_target_is_not_faster_than_it_must_be() -> None:
    simulation = Simulation(Target(settle=300, cpu=50))
    simulation.add("vm1", pages(30_000, 2))
    simulation.add("vm2", pages(30_000, 2))
    simulation.run_for(600)
    cpu, passes = simulation.machine.ksmd.cpu_seconds, simulation.machine.ksm.full_scans
    simulation.run_for(600)
    assert 5 <= simulation.machine.ksm.full_scans - passes <= 8  # one every 100 s
    assert (simulation.machine.ksmd.cpu_seconds - cpu) / 600 < 0.001  # all is merged: next to nothing


def test_target_keeps_the_budget() -> None:
    """Too much memory for the time asked for: the budget holds, also when pages suddenly cost much more."""
    simulation = Simulation(Target(settle=10, cpu=2))
    simulation.add("vm1", pages(60_000, 3))
    simulation.run_for(120)
    assert "the budget of 2 % of a CPU; settling takes" in simulation.decisions[0].why
    assert simulation.machine.ksmd.cpu_seconds / 120 < 0.02 * 1.15
    assert simulation.machine.ksmd.cpu_seconds / 120 > 0.02 * 0.5
    simulation.run_for(480)
    assert simulation.machine.ksmd.cpu_seconds / 600 < 0.02 * 1.05


def test_target_sleeps_longer_for_little_memory() -> None:
    policy = Target(settle=600, cpu=10)
    few = policy.decide(View(seconds=0, stats=Stats(), mem_total=1, mem_available=1, candidates=5000))
    assert few.sleep_millisecs == 1000 and few.pages_to_scan <= 100
    none = Target(settle=600, cpu=10).decide(View(seconds=0, stats=Stats(), mem_total=1, mem_available=1))
    assert none.run and none.why == "nothing is registered"


def test_target_learns_what_a_page_costs() -> None:
    """Where ksmd is ten times as slow as the model has it, the budget still holds."""
    policy = Target(settle=60, cpu=10)
    first = View(
        seconds=0, stats=Stats(pages_scanned=0), mem_total=1, mem_available=1, ksmd_cpu=0.0, candidates=1_000_000
    )
    told = policy.decide(first)
    rate = told.pages_to_scan / (told.sleep_millisecs / 1000 + 0.004)
    slow = View(
        seconds=10,
        stats=Stats(pages_scanned=round(rate * 10), pages_unshared=1_000_000),
        mem_total=1,
        mem_available=1,
        ksmd_cpu=rate * 10 * 60e-6,
        candidates=1_000_000,
    )
    then = policy.decide(slow)
    assert "at 60.00 us" in then.why
    assert then.pages_to_scan / then.sleep_millisecs < told.pages_to_scan / told.sleep_millisecs / 9


def test_target_saves_again_what_it_overspent() -> None:
    """30 % of a CPU for ten seconds, with a budget of 10 %: two seconds too many, saved within a minute."""
    policy = Target(settle=1, cpu=10)

    def seen(second: float, cpu: float) -> float:
        scanned = round(cpu / 10e-6)  # each page takes 10 us
        stats = Stats(pages_scanned=scanned, pages_unshared=1_000_000)
        told = policy.decide(View(seconds=second, stats=stats, mem_total=1, mem_available=1, ksmd_cpu=cpu))
        rate = re.search(r"([\d,]+) a second at 10.00 us", told.why)
        return int(rate[1].replace(",", "")) * 10e-6 if rate else 0.0

    seen(0, 0.0)
    assert seen(10, 3.0) == pytest.approx(0.10 - 2 / 60, rel=0.01)
    assert seen(20, 3.5) == pytest.approx(0.10 - 1.5 / 60, rel=0.01)
    assert seen(60, 3.6) == pytest.approx(0.10, rel=0.01)
    assert seen(70, 60.0) == pytest.approx(0.01, rel=0.01)  # never less than a tenth


def test_target_without_sight_of_ksmd() -> None:
    policy = Target(settle=60, cpu=10)
    for second in (0, 10):
        blind = View(seconds=second, stats=Stats(), mem_total=1, mem_available=1, candidates=100_000)
        assert policy.decide(blind).pages_to_scan > 50


@pytest.mark.parametrize(("settle", "cpu"), [(0.5, 10), (float("inf"), 10), (float("nan"), 10), (60, 0), (60, 101)])
def test_targets_that_make_no_sense(settle: float, cpu: float) -> None:
    with pytest.raises(ValueError, match="it can be"):
        Target(settle, cpu)

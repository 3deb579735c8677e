"""`run_for` against the same batches made one by one, on random programs: every counter, the clock, ksmd's CPU time."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

import ksm

PAGE = 4096
NS = 1_000_000_000

Act = Callable[[ksm.Machine], None]


class ByHand:
    """A ksmd whose batches, sleeps and costs are worked out here, in whole nanoseconds."""

    def __init__(self, machine: ksm.Machine) -> None:
        self.machine = machine
        self.now = self.wake = 0
        self.parked = True
        self.sleep = machine.ksm.sleep_millisecs

    def run_for(self, ns: int) -> None:
        m, end = self.machine, self.now + ns
        if m.ksm.sleep_millisecs != self.sleep:  # a new value wakes ksmd
            self.sleep, self.wake = m.ksm.sleep_millisecs, self.now
        while m.ksm.run == 1 and m.ksmd._engine.any_registered:
            if self.parked:
                self.parked, self.wake = False, self.now
            if self.wake >= end:
                break
            self.at(max(self.now, self.wake))
            before, work = m.ksmd.cpu_seconds * 1e9, m.ksmd.work
            m.ksmd.scan_pages(m.ksm.pages_to_scan)
            cost = m.ksmd.cost.of(m.ksmd.work - work)
            assert m.ksmd.cpu_seconds * 1e9 == pytest.approx(before + cost, rel=1e-12)
            ends, hz = self.now + max(1, round(m.ksmd.cpu_seconds * 1e9 - before)), m.ksmd.cost.hz
            ticks = -(-m.ksm.sleep_millisecs * hz // 1000)
            self.wake = -(-(ends * hz // NS + ticks + 1) * NS // hz) if ticks else ends
        else:
            self.parked = True
        self.at(end)

    def at(self, now: int) -> None:
        """Let the machine's clock go on while its ksmd does nothing."""
        scanning = self.machine.ksm.run == 1
        if scanning:
            self.machine.ksm.run = 0
        self.machine.run_for((now - self.now) / NS)
        if scanning:
            self.machine.ksm.run = 1
        self.now = now


def one_of(m: ksm.Machine, which: int) -> ksm.Process:
    return list(m.processes.values())[which % len(m.processes)]


def program(seed: int) -> tuple[dict[str, int | str], list[tuple[Act, int]]]:
    """Tunables, and what happens: an act, then nanoseconds."""
    chance = random.Random(seed)
    tunables: dict[str, int | str] = {
        "pages_to_scan": chance.choice([1, 7, 30, 100, 1000]),
        "sleep_millisecs": chance.choice([0, 1, 20, 33]) if seed % 5 else 20,
        "max_page_sharing": chance.choice([2, 3, 256]),
        "use_zero_pages": chance.randrange(2),
        "smart_scan": chance.randrange(2),
        "stable_node_chains_prune_millisecs": chance.choice([0, 100, 2000]),
    }
    if seed % 4 == 3:
        tunables["advisor_mode"] = "scan-time"
    contents, acts = chance.choice([3, 20, 1000]), []

    def pages(count: int) -> bytes:
        return b"".join(chance.randrange(contents).to_bytes(4, "big") * (PAGE // 4) for _ in range(count))

    def spawn(image: bytes) -> Act:
        def act(m: ksm.Machine) -> None:
            p = m.spawn()
            p.madvise(p.mmap(image, addr=1 << 32), len(image), ksm.MADV_MERGEABLE)

        return act

    def write(which: int, at: int, data: bytes) -> Act:
        return lambda m: one_of(m, which).write((1 << 32) + at * PAGE, data)

    def fork(which: int) -> Act:
        return lambda m: one_of(m, which).fork() and None

    def leave(which: int) -> Act:
        return lambda m: one_of(m, which).exit() if len(m.processes) > 1 else None

    def tune(name: str, value: int) -> Act:
        return lambda m: setattr(m.ksm, name, value)

    acts.append(spawn(pages(chance.randrange(20, 300))))
    for _ in range(chance.randrange(2, 12)):
        kind = chance.randrange(7)
        which = chance.randrange(9)
        if kind == 0:
            acts.append(spawn(pages(chance.randrange(20, 200))))
        elif kind < 3:
            acts.append(write(which, chance.randrange(20), pages(1)))
        elif kind == 3:
            acts.append(fork(which))
        elif kind == 4:
            acts.append(leave(which))
        elif kind == 5:
            acts.append(tune("sleep_millisecs", chance.choice([1, 20, 50])))
        else:
            acts.append(tune("run", chance.choice([0, 1, 1, 2])))
    short = seed % 5 == 0 or tunables["sleep_millisecs"] == 0
    return tunables, [(act, chance.randrange(1, NS // 20 if short else 2 * NS)) for act in acts]


def observed(m: ksm.Machine) -> dict[str, object]:
    stats = m.ksm.snapshot().to_dict()
    return stats | {"now": m.now, "cpu": m.ksmd.cpu_seconds, "work": m.ksmd.work, "vmstat": dict(m.vmstat)}


@pytest.mark.parametrize("block", range(5))
def test_the_same_as_batch_by_batch(block: int) -> None:
    for seed in range(block * 12, block * 12 + 12):
        tunables, acts = program(seed)
        one, other = ksm.Machine(), ksm.Machine()
        for m in (one, other):
            for name, value in tunables.items():
                if name != "pages_to_scan" or "advisor_mode" not in tunables:
                    m.ksm.write(name, str(value))
            m.ksm.run = 1
        by_hand = ByHand(other)
        for number, (act, ns) in enumerate(acts):
            for m in (one, other):
                act(m)
            one.run_for(ns / NS)
            by_hand.run_for(round(ns / NS * NS))
            assert observed(one) == observed(other), f"seed {seed}, after act {number}"
        one.check()


def test_hours_of_quiet_memory_cut_into_any_pieces() -> None:
    machines = []
    for pieces in ([36_000.0], [1.0, 0.25, 3_598.75, 32_400.0]):
        m = ksm.Machine()
        p = m.spawn()
        p.madvise(p.mmap(b"".join((n % 90).to_bytes(4, "big") * (PAGE // 4) for n in range(120))), 120 * PAGE, 12)
        m.ksm.run = 1
        for seconds in pieces:
            m.run_for(seconds)
        machines.append(observed(m))
    assert machines[0] == machines[1]
    assert machines[0]["full_scans"] == 1_349_995
    assert machines[0]["pages_sharing"] == 30


def test_costs_that_make_no_sense() -> None:
    m = ksm.Machine()
    for change in ({"hash_ns": -1.0}, {"merge_ns": float("nan")}, {"skip_ns": float("inf")}, {"hz": 0}, {"hz": 10**10}):
        with pytest.raises(ValueError, match="costs are finite numbers"):
            m.ksmd.cost = replace(ksm.CostModel(), **change)
    assert m.ksmd.cost == ksm.CostModel()
    with pytest.raises(ValueError, match="beyond"):
        m.run_for(1e12)

"""Virtual time, the cost model, the advisor's arithmetic, and what ksmd answers to sysfs."""

from __future__ import annotations

import time

import pytest

import ksm
from ksm.ksmd import ScanTimeAdvisor

PAGE = 4096


def machine(pages: int, contents: int) -> ksm.Machine:
    m = ksm.Machine()
    p = m.spawn()
    a = p.mmap(b"".join((n % contents).to_bytes(4, "big") * (PAGE // 4) for n in range(pages)))
    p.madvise(a, pages * PAGE, ksm.MADV_MERGEABLE)
    return m


def test_cost_model_adds_up() -> None:
    cost = ksm.CostModel(hash_ns=10, level_ns=3, merge_ns=5, merged_ns=2)
    assert cost.nanoseconds(1, 2, 3, 4) == 10 + 6 + 15 + 8
    assert cost.nanoseconds(1, 0, 0, 0, page_size=16384) == 40


def test_batches_keep_to_pages_to_scan_and_sleep() -> None:
    m = machine(1000, 1000)
    m.ksm.run = 1
    m.ksmd.cost = ksm.CostModel(hash_ns=0, level_ns=0, merge_ns=0, merged_ns=0)
    m.ksm.pages_to_scan = 100
    m.ksm.sleep_millisecs = 20
    m.run_for(0.0239)
    assert m.ksm.pages_scanned == 100  # the next batch starts after 20 ms, on the tick that follows: at 24 ms
    m.run_for(0.0002)
    assert m.ksm.pages_scanned == 200


def test_no_sleep_no_ticks() -> None:
    m = machine(100, 100)
    m.ksm.run = 1
    m.ksm.sleep_millisecs = 0
    m.ksmd.cost = ksm.CostModel(hash_ns=1e6, level_ns=0, merge_ns=0, merged_ns=0)
    m.ksm.pages_to_scan = 10
    m.run_for(0.0251)
    assert m.ksm.pages_scanned == 30
    assert m.ksmd.cpu_seconds == pytest.approx(0.03)


def test_a_parked_ksmd_wakes_at_once() -> None:
    m = machine(10, 10)
    m.run_for(10.0)
    assert m.ksm.pages_scanned == 0
    m.ksm.run = 1
    m.run_for(0.001)
    assert m.ksm.pages_scanned == 10


def test_a_change_of_sleep_millisecs_wakes_ksmd() -> None:
    m = machine(1000, 10)
    m.ksm.run = 1
    m.ksm.sleep_millisecs = 1_000_000
    m.run_for(10.0)
    assert m.ksm.pages_scanned == 100
    m.ksm.sleep_millisecs = 1_000_001
    m.run_for(0.01)
    assert m.ksm.pages_scanned == 200


def test_cost_is_the_same_for_both_indexes() -> None:
    cpu = []
    for index in ("hash", "tree"):
        m = ksm.Machine(index=index)
        p = m.spawn()
        a = p.mmap(b"".join((n % 50).to_bytes(4, "big") * (PAGE // 4) for n in range(400)))
        p.madvise(a, 400 * PAGE, ksm.MADV_MERGEABLE)
        m.ksm.run = 1
        for _ in range(3):
            m.ksmd.scan()
        cpu.append(m.ksmd.cpu_seconds)
        assert (m._engine.comparisons > 0) == (index == "tree")
        assert (m._engine.bytes_compared > 0) == (index == "tree")
    assert cpu[0] == cpu[1] > 0


def test_run_wall_follows_the_clock() -> None:
    m = machine(10, 10)
    start = time.monotonic()
    m.ksmd.run_wall(0.05, speed=1000.0, step=0.01)
    assert time.monotonic() - start >= 0.05
    assert m.now == pytest.approx(50.0)
    with pytest.raises(ValueError, match="positive"):
        m.ksmd.run_wall(1.0, speed=0.0)


@pytest.mark.parametrize(
    ("seconds", "cpu_ms", "pages", "want"),
    [
        # factor = 200 * 100 / t; the change begins at 30 % of 100
        (200, 20_000, 1000, 1000),  # cost = 1000 / 10 = 100: at least 10 times that
        (400, 400, 1000, 10_000),  # 1 % of a CPU: cost = 1000, at least 10 times
        (1, 1000, 1000, 100),  # 100 % of a CPU: cost = 10
    ],
)
def test_advisor_arithmetic(seconds: int, cpu_ms: int, pages: int, want: int) -> None:
    values = {
        "pages_to_scan": pages,
        "advisor_target_scan_time": 200,
        "advisor_max_cpu": 70,
        "advisor_max_pages_to_scan": 30_000,
    }
    advisor = ScanTimeAdvisor()
    advisor.start(0, 0.0)
    assert advisor.stop(seconds * 10**9, cpu_ms * 1e6, values) == want


def test_read_only_files_are_refused() -> None:
    with pytest.raises(ksm.SyscallError, match="read-only"):
        ksm.Machine().ksmd.set("pages_shared", 1)


def test_busy_tunables() -> None:
    m = machine(10, 2)
    m.ksm.run = 1
    m.ksmd.scan()
    m.ksmd.scan()
    for name in ("max_page_sharing", "merge_across_nodes"):
        with pytest.raises(ksm.SyscallError, match="Device or resource busy"):
            m.ksm.write(name, "0" if name == "merge_across_nodes" else "3")
    m.ksm.run = 2
    m.ksm.max_page_sharing = 3
    m.ksm.merge_across_nodes = False
    assert (m.ksm.max_page_sharing, m.ksm.merge_across_nodes) == (3, False)

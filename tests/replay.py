"""Replay against the running kernel: processes dirty their memory while the real ksmd scans it and a trace is recorded.

`python -m tests.replay` records at several intervals at once, replays each trace under the tunables that ksmd had, and
prints how far the counters are apart over time. It needs root, takes the lock on the host's KSM for as long as it
records, and puts every tunable back.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

import ksm
from ksm.linux import Host
from ksm.stepper import restore
from ksm.sysfs import ATTRIBUTES
from ksm.trace import Trace, record
from tests.kernel.host import require_unused

COUNTERS = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile")
TUNABLES: dict[str, int | str] = {"advisor_mode": "none", "pages_to_scan": 500, "sleep_millisecs": 20}

# Half of a worker's memory is what all workers have, a quarter its own. The rest changes: one part becomes, in large
# steps, another content that all workers get in the end; one part is its own and never twice the same.
WORKER = """
import ctypes, mmap, sys, time
import numpy as np
number, pages, period = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
area = mmap.mmap(-1, pages * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory = np.frombuffer(area, np.uint64).reshape(pages, 512)
common, own = np.random.default_rng(0), np.random.default_rng(number + 1)
half, still, slow = pages // 2, pages * 3 // 4, pages * 9 // 10
memory[:half] = common.integers(1, 1 << 63, (half, 512), dtype=np.uint64)
memory[half:] = own.integers(1, 1 << 63, (pages - half, 512), dtype=np.uint64)
area.madvise(12)  # MADV_MERGEABLE
print("ready", flush=True)
sys.stdin.readline()
begun, generation = time.monotonic(), 0
while True:
    gone = time.monotonic() - begun
    if int(gone / period + number / 8) > generation:
        generation += 1
        memory[still:slow] = np.random.default_rng(1000 + generation).integers(
            1, 1 << 63, (slow - still, 512), dtype=np.uint64)
        memory[generation * 64 % half] += 1  # and a page that was shared is not any more
    memory[slow:, 0] = own.integers(1, 1 << 63, pages - slow, dtype=np.uint64)
    time.sleep(0.1)
"""


@dataclass(frozen=True)
class Reading:
    """The kernel's counters at one moment of the recording."""

    seconds: float
    counters: dict[str, int]
    cow_ksm: int


@dataclass(frozen=True)
class Comparison:
    """How far a replay is from the kernel, over all readings after ksmd's first two passes or so."""

    every: float
    """Seconds between the recording's steps."""
    steps: int
    off: dict[str, float]
    """Counter -> mean distance, in percent of the kernel's largest `pages_sharing`."""
    most: dict[str, float]
    """The largest distance, so."""
    ends: dict[str, tuple[int, int]]
    """Counter -> (kernel, replay) at the end, and so on."""
    trace_bytes: int


@contextlib.contextmanager
def workers(number: int, pages: int, period: float) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that have filled and marked their memory, and wait to be told to go on; at the end they are dead."""
    running: list[subprocess.Popen[str]] = []
    try:
        for index in range(number):
            command = [sys.executable, "-c", WORKER, str(index), str(pages), str(period)]
            running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            assert running[-1].stdout is not None
            running[-1].stdout.readline()  # one after the other, so that ksmd comes to them in this order
        yield running
    finally:
        for process in running:
            with process:
                process.kill()


def observe(
    seconds: float,
    intervals: Sequence[float],
    pages: int,
    period: float,
    where: Path,
    tunables: Mapping[str, int | str],
) -> tuple[list[Trace], list[Reading], dict[float, float]]:
    """Run it all: the traces, the kernel's counters, and of each interval when ksmd was started in its seconds."""
    host = Host()
    with contextlib.ExitStack() as stack:
        stack.enter_context(host.lock(timeout=300))
        require_unused()
        saved = {name: host.ksm.read(name) for name in host.ksm.names() if ATTRIBUTES[name].writable}
        stack.callback(restore, host.ksm, saved, unmerge=True)
        for name in ("run", *tunables):
            host.ksm.write(name, str(tunables.get(name, 0)))
        running = stack.enter_context(workers(3, pages, period))
        sources = [f"pid:{process.pid}" for process in running]
        threads = [
            threading.Thread(target=_record, args=(sources, where / str(every), every, seconds)) for every in intervals
        ]
        for thread in threads:
            thread.start()
        while any(not ksm.trace.is_trace(where / str(every)) for every in intervals):
            time.sleep(0.02)  # all have seen memory before ksmd does
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        before = host.vmstat["cow_ksm"]
        started = time.time()
        host.ksm.write("run", "1")
        readings: list[Reading] = []
        while (gone := time.time() - started) < seconds:
            if gone > seconds * 2 / 3 and running[0].poll() is None:
                running[0].kill()
                running[0].wait()
            now = host.ksm.snapshot()
            counters = {name: int(getattr(now, name)) for name in (*COUNTERS, "full_scans")}
            readings.append(Reading(time.time(), counters, host.vmstat["cow_ksm"] - before))
            time.sleep(0.2)
        host.ksm.write("run", "0")
        for process in running:
            process.kill()
            process.wait()
        for thread in threads:
            thread.join()
    traces = [Trace(where / str(every)) for every in intervals]
    starts = {every: started - _began(trace) for every, trace in zip(intervals, traces, strict=True)}
    return traces, [Reading(r.seconds - started, r.counters, r.cow_ksm) for r in readings], starts


def _record(sources: Sequence[str], where: Path, every: float, seconds: float) -> None:
    record(sources, where, every=every, seconds=seconds + 30, marked_only=True, threads=1)


def _began(trace: Trace) -> float:
    return datetime.fromisoformat(trace.metadata.started).timestamp()


def compare(
    trace: Trace, readings: Sequence[Reading], start: float, settle: float, tunables: Mapping[str, int | str]
) -> Comparison:
    """Replay one trace with ksmd started `start` seconds into it, and measure the distance at each reading."""
    replay = trace.replay(ksm.Machine(kernel=Host().kernel.version))
    for name, value in tunables.items():
        replay.ksm.write(name, str(value))
    replay.run_for(start)
    replay.ksm.run = 1
    largest = max(reading.counters["pages_sharing"] for reading in readings)
    apart: dict[str, list[float]] = {name: [] for name in COUNTERS}
    last: dict[str, tuple[int, int]] = {}
    for reading in readings:
        replay.run_for(max(0.0, start + reading.seconds - replay.now))
        for name in (*COUNTERS, "full_scans"):
            last[name] = reading.counters[name], int(getattr(replay.ksm, name))
            if name in apart and reading.seconds >= settle:
                apart[name].append(100 * abs(last[name][0] - last[name][1]) / largest)
        last["cow_ksm"] = reading.cow_ksm, replay.machine.vmstat["cow_ksm"]
    size = sum(path.stat().st_size for path in trace.path.rglob("*.parquet"))
    off = {name: float(np.mean(values)) for name, values in apart.items()}
    return Comparison(
        trace.metadata.every, len(trace.steps), off, {name: max(values) for name, values in apart.items()}, last, size
    )


def measure(
    seconds: float,
    intervals: Sequence[float],
    pages: int = 8192,
    period: float = 4.0,
    settle: float = 6.0,
    smart_scan: bool = True,
) -> tuple[list[Comparison], list[Reading]]:
    """Observe and compare; the readings are those of the kernel."""
    tunables = TUNABLES | {"smart_scan": int(smart_scan)}
    with tempfile.TemporaryDirectory() as place:
        traces, readings, starts = observe(seconds, intervals, pages, period, Path(place), tunables)
        found = [
            compare(trace, readings, starts[every], settle, tunables)
            for every, trace in zip(intervals, traces, strict=True)
        ]
    return found, readings


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--every", type=float, nargs="+", default=[0.5, 1.0, 2.0, 5.0])
    parser.add_argument("--pages", type=int, default=8192, help="of each of the three workers")
    parser.add_argument("--no-smart-scan", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found, readings = measure(options.seconds, options.every, options.pages, smart_scan=not options.no_smart_scan)
    if options.json:
        print(json.dumps([vars(comparison) for comparison in found], indent=2))
        return
    most = max(reading.counters["pages_sharing"] for reading in readings)
    print(f"{len(readings)} readings over {options.seconds:g} s; pages_sharing was {most:,} at most.")
    print("Distance from the kernel, mean (largest), in percent of that:")
    print(f"{'every':>7} {'steps':>6}" + "".join(f"{name:>22}" for name in COUNTERS))
    for one in found:
        cells = "".join(f"{f'{one.off[name]:.1f} ({one.most[name]:.1f})':>22}" for name in COUNTERS)
        print(f"{one.every:>5g} s {one.steps:>6}" + cells)
    print("At the end, kernel / replay:")
    for one in found:
        ends = ", ".join(f"{name} {kernel:,} / {ours:,}" for name, (kernel, ours) in one.ends.items())
        print(f"{one.every:>5g} s  {ends}")


if __name__ == "__main__":
    main()

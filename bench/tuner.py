"""`python -m bench.tuner`: what `ksm tune auto` does while memory gets short and is given back, on the running kernel.

Guests with a common half and a half of their own arrive one after the other, work (a part of their own pages changes
all the time), and leave. The tuner is shown a host of the size of that load: what is available there is what the
guests take, less what KSM really saves, off its memory. So nothing else that runs here shows in it; all the rest,
ksmd, the writes and the savings, is the running kernel's. The lock on the kernel's KSM is held all the time, and
everything is put back.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from bench.host import description
from ksm.linux import Host
from ksm.policies import Policy, Pressure, Target, View
from ksm.stepper import restore
from ksm.tuner import Lookout, Step, Tuner
from ksm.units import binary, clock

HOST = 4.2  # guests' worth of memory
# When each guest comes and goes, in parts of the whole time.
STAY = ((0.10, 0.70), (0.20, 0.70), (0.30, 0.85), (0.40, 0.85))

GUEST = """
import ctypes, mmap, signal, sys, time
import numpy as np
pages, number = int(sys.argv[1]), int(sys.argv[2])
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # not without its parent
area = mmap.mmap(-1, pages * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(15)  # MADV_NOHUGEPAGE
area.madvise(12)  # MADV_MERGEABLE
view = np.frombuffer(area, np.uint64).reshape(pages, -1)
own, common = np.random.default_rng(number), np.random.default_rng(0)
half = pages // 2
for start in range(0, half, 4096):
    end = min(start + 4096, half)
    view[start:end] = common.integers(0, 1 << 63, (end - start, view.shape[1]))
    view[half + start : half + end] = own.integers(0, 1 << 63, (end - start, view.shape[1]))
print("ready", flush=True)
while True:  # a hundredth of its own half changes every second
    time.sleep(0.1)
    view[half + own.integers(0, half, max(1, half // 1000)), 0] += 1
"""


class Guests:
    """The load: processes that come and go by the clock."""

    def __init__(self, pages: int, seconds: float) -> None:
        self._pages = pages
        self._seconds = seconds
        self._start = time.monotonic()
        self._running: dict[int, subprocess.Popen[str]] = {}

    def follow(self) -> list[str]:
        """Start and end those whose time has come; what happened."""
        gone = (time.monotonic() - self._start) / self._seconds
        told = []
        for number, (comes, goes) in enumerate(STAY):
            if number not in self._running and comes <= gone < goes:
                arguments = [sys.executable, "-c", GUEST, str(self._pages), str(number + 1)]
                self._running[number] = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
                told.append(f"guest {number + 1} comes")
            if number in self._running and gone >= goes:
                self.end(number)
                told.append(f"guest {number + 1} goes")
        return told

    def touched(self) -> int:
        """Bytes of anonymous memory that they have present, merged or not."""
        found = 0
        for guest in self._running.values():
            with contextlib.suppress(OSError):
                match = re.search(r"^RssAnon:\s*(\d+) kB", Path(f"/proc/{guest.pid}/status").read_text(), re.M)
                found += int(match[1]) * 1024 if match else 0
        return found

    def promised(self) -> int:
        """Bytes that they may touch."""
        return len(self._running) * self._pages * mmap.PAGESIZE

    def end(self, number: int) -> None:
        """Kill one, and wait for it."""
        guest = self._running.pop(number)
        guest.kill()
        guest.communicate()

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """None of them is left afterwards."""
        try:
            yield
        finally:
            for number in list(self._running):
                self.end(number)


class Record:
    """What happened, printed as it does; CPU time of the tuner apart from that of this script."""

    def __init__(self, guests: Guests, host: Host) -> None:
        self.rows: list[dict[str, Any]] = []
        self._guests = guests
        self._cpu = host.ksmd_cpu_seconds()

    def step(self, step: Step) -> None:
        """A row."""
        view, decision = step.view, step.decision
        events = self._guests.follow()
        if view is None or decision is None or view.ksmd_cpu is None:
            print(f"{step.seconds:6.0f} s  {step.note}", flush=True)
            return
        row = step.to_dict() | {"events": events, "ksmd_cpu_seconds": view.ksmd_cpu - self._cpu}
        self.rows.append(row)
        print(
            f"{step.seconds:6.0f} s  {binary(view.mem_available):>9} available  run {int(decision.run)}  "
            f"{decision.pages_to_scan:6,} pages every {decision.sleep_millisecs:4} ms  "
            f"{view.stats.pages_sharing:8,} sharing  "
            f"ksmd {row['ksmd_cpu_seconds']:6.2f} s  {', '.join(events)}",
            flush=True,
        )


class SmallHost:
    """What the tuner is shown: a host of `total` bytes on which nothing but the guests runs."""

    def __init__(self, host: Host, guests: Guests, total: int) -> None:
        self._lookout = Lookout(host)
        self._guests = guests
        self._total = total

    def look(self) -> View:
        """The host, with the memory that the guests and KSM leave of it."""
        now = self._lookout.look()
        free = self._total - self._guests.touched() + now.stats.saved_bytes
        return replace(
            now,
            mem_total=self._total,
            mem_available=max(0, min(self._total, free)),
            committed=self._guests.promised(),
        )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--policy", type=click.Choice(["pressure", "target"]), default="pressure", show_default=True)
@click.option("--minutes", type=click.FloatRange(0.1), default=10.0, show_default=True)
@click.option("--guest-mib", type=click.IntRange(4), default=450, show_default=True, help="Of each of the four guests.")
@click.option("--settle", type=float, default=60.0, show_default=True, help="Of target: seconds.")
@click.option("--cpu", type=float, default=20.0, show_default=True, help="Of target: percent.")
@click.option("--json", "json_file", metavar="FILE", help="Write all decisions as JSON.")
def main(policy: str, minutes: float, guest_mib: int, settle: float, cpu: float, json_file: str | None) -> None:
    """Run the tuner under a load that comes and goes."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unwinds
    host = Host()
    seconds = minutes * 60
    with host.lock():
        saved = {name: host.ksm.read(name) for name in host.ksm.tunables()}
        guests = Guests((guest_mib << 20) // host.page_size, seconds)
        try:
            with guests.ended():
                record = Record(guests, host)
                interval = max(1.0, seconds / 60)
                rule: Policy = Target(settle, cpu, interval) if policy == "target" else Pressure(interval=interval)
                small = SmallHost(host, guests, round(HOST * (guest_mib << 20)))
                before = time.process_time()
                with Tuner(host, rule, record.step, look=small.look) as tuner:
                    tuner.run(seconds)
                spent = time.process_time() - before
                put_back = {name: host.ksm.read(name) for name in saved} == saved
        finally:
            restore(host.ksm, saved, unmerge=True)
    rows = record.rows
    best = max(rows, key=lambda row: row["saved_bytes"])
    ksmd = rows[-1]["ksmd_cpu_seconds"]
    print(
        f"{clock(seconds)} of {policy}: {tuner.steps} decisions, {sum(bool(row['changed']) for row in rows)} of them "
        f"changes; at most {binary(best['saved_bytes'])} saved, after {best['seconds']:.0f} s; ksmd {ksmd:.2f} s "
        f"({100 * ksmd / seconds:.2f} % of a CPU), tuner {spent:.2f} s ({100 * spent / seconds:.3f} %); "
        f"tunables put back: {'yes' if put_back else 'NO'}"
    )
    if json_file is not None:
        Path(json_file).write_text(json.dumps({"host": description(), "policy": policy, "rows": rows}, indent=1) + "\n")
    if not put_back:
        sys.exit(1)


if __name__ == "__main__":
    main()

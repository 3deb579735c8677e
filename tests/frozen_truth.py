"""What the kernel makes of real guests, beside `ksm estimate` and `ksm simulate` on the same memory.

Frozen guests come up with their memory marked mergeable, the kernel's ksmd scans them pass by pass, and its counters
are compared after each. `python -m tests.frozen_truth` prints the table of docs/formats.md.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import ksm
from ksm.estimate import Estimate, estimate, snapshots
from ksm.linux import Host
from ksm.simulation import load
from ksm.sources import QemuImage
from ksm.sources.pagemap import _scan
from tests.frozen import Guest, booted
from tests.kernel.host import khugepaged_asleep, require_unused

PAGE = 4096
HUGE = 512  # pages
COUNTERS = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "stable_node_chains",
    "stable_node_dups",
)
_PASSES = 4
_IS_HUGE = 1 << 6


@dataclass(frozen=True)
class Outcome:
    """What came of it: counters after each pass, and frames."""

    kernel: list[dict[str, int]]
    simulated: list[dict[str, int]]
    estimate: Estimate
    frames_before: int
    frames_after: int
    huge_pages: int
    zero_pages_given_back: int
    """Slots that mapped a frame of zeros of a huge page and map the zero page now."""

    @property
    def frames_saved(self) -> int:
        return self.frames_before - self.frames_after


def judged(states: Sequence[Path], folder: Path, huge: bool) -> Outcome:
    """Bring guests up from their states, and let the kernel merge them."""
    host = Host()
    with host.lock(), ExitStack() as stack:
        stack.enter_context(khugepaged_asleep())
        stack.enter_context(_fresh(host))
        names = [f"ksm-truth-{number}-{os.getpid()}" for number in range(len(states))]
        guests = [
            stack.enter_context(Guest(name, folder, merge=True, state=state, huge=huge))
            for name, state in zip(names, states, strict=True)
        ]
        taken = snapshots([f"qemu:{name}" for name in names])
        ram = [_ram(name) for name in names]
        before = [_frames(guest.pid, areas) for guest, areas in zip(guests, ram, strict=True)]
        ranges = [_huge_ranges(guest.pid, areas) for guest, areas in zip(guests, ram, strict=True)]
        machine = _machine_of_pages(names, ranges) if huge else ksm.Machine()
        if not huge:
            load(machine, taken)
        machine.ksm.smart_scan = False
        machine.ksm.run = 1
        kernel, simulated = [], []
        with host.single_step(unmerge=True) as ksmd:
            host.ksm.smart_scan = False
            host.ksm.use_zero_pages = False
            host.ksm.max_page_sharing = 256
            host.ksm.stable_node_chains_prune_millisecs = machine.ksm.stable_node_chains_prune_millisecs = 10**8
            for _ in range(_PASSES):
                ksmd.scan()
                machine.ksmd.scan()
                kernel.append({name: getattr(host.ksm, name) for name in COUNTERS})
                simulated.append({name: getattr(machine.ksm, name) for name in COUNTERS})
            after = [_frames(guest.pid, areas) for guest, areas in zip(guests, ram, strict=True)]
        zero = _zero_frames()
    given_back = sum(
        int(np.count_nonzero(np.isin(late, zero) & ~np.isin(early, zero)))
        for early, late in zip(before, after, strict=True)
    )
    return Outcome(
        kernel,
        simulated,
        estimate(taken),
        _distinct(before, zero),
        _distinct(after, zero),
        sum(len(starts) for starts in ranges),
        given_back,
    )


@contextmanager
def _fresh(host: Host) -> Iterator[None]:
    """ksmd stands still, at the start of a pass, and nobody else's memory is registered."""
    running = host.ksm.run
    host.ksm.run = 0
    try:
        require_unused()
        host.ksm.run = 2  # sets the place in the pass back
        host.ksm.run = 0
        yield
    finally:
        host.ksm.run = running


def _ram(name: str) -> list[tuple[int, int]]:
    with QemuImage(name) as image:
        return [(segment.address, segment.address + segment.length) for segment in image.segments]


def _frames(pid: int, areas: Sequence[tuple[int, int]]) -> np.ndarray:
    """The frame number of each slot; 0: none."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        parts = [
            np.frombuffer(os.pread(file.fileno(), (b - a) // PAGE * 8, a // PAGE * 8), np.uint64) for a, b in areas
        ]
    entries = np.concatenate(parts)
    return np.where(entries >> np.uint64(63) == 1, entries & np.uint64((1 << 55) - 1), np.uint64(0))


def _zero_frames() -> np.ndarray:
    from ksm.sources.pagemap import zero_page_frames

    return np.array(sorted(zero_page_frames()), np.uint64)


def _distinct(frames: Sequence[np.ndarray], zero: np.ndarray) -> int:
    every = np.unique(np.concatenate(frames))
    return int(np.count_nonzero((every != 0) & ~np.isin(every, zero)))


def _huge_ranges(pid: int, areas: Sequence[tuple[int, int]]) -> list[int]:
    """The addresses of the huge pages in these areas."""
    found = np.empty(512, [("start", "u8"), ("end", "u8"), ("categories", "u8")])
    starts: list[int] = []
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        for start, end in areas:
            at = start
            while at < end:
                count, at = _scan(file.fileno(), at, end, _IS_HUGE, found)
                for region in found[:count]:
                    starts += range(int(region["start"]), int(region["end"]), HUGE * PAGE)
    return starts


def _machine_of_pages(names: Sequence[str], ranges: Sequence[list[int]]) -> ksm.Machine:
    """The same memory in a simulated machine: its huge pages are huge pages, and what was not touched is not."""
    machine = ksm.Machine(transparent_hugepage="madvise")
    for name, starts in zip(names, ranges, strict=True):
        process = machine.spawn(name)
        with QemuImage(name) as image:
            for segment in image.segments:
                process.mmap(segment.length, addr=segment.address)
                process.madvise(segment.address, segment.length, ksm.MADV_MERGEABLE)
            for start in starts:
                process.madvise(start, HUGE * PAGE, ksm.MADV_HUGEPAGE)
            for address, pages, present in image.blocks():
                for index in np.flatnonzero(present) if present is not None else range(len(pages)):
                    process.write(address + int(index) * PAGE, pages[index].tobytes())
    return machine


def differences(outcome: Outcome) -> list[str]:
    """Where kernel and simulation do not agree."""
    pairs = enumerate(zip(outcome.kernel, outcome.simulated, strict=True), 1)
    return [f"pass {number}: kernel {real}, simulated {made}" for number, (real, made) in pairs if real != made]


def two_states(guest: Guest, folder: Path) -> list[Path]:
    """The guest's state now, and after it has gone on for a while."""
    states = [folder / "state-1", folder / "state-2"]
    guest.migrate(states[0])
    guest.run(1.5)
    guest.migrate(states[1])
    return states


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="ksm-truth-") as scratch:
        folder = Path(scratch)
        with booted("ksm-truth", folder) as guest:
            states = two_states(guest, folder)
        wrong = 0
        for huge in (False, True):
            outcome = judged([states[0], states[1], states[1]], folder, huge)
            print(f"\ntransparent huge pages {'on' if huge else 'off'}: {outcome.huge_pages} huge pages\n")
            print("| counter | kernel | ksm simulate | ksm estimate |\n| --- | --- | --- | --- |")
            for name in COUNTERS:
                guess = getattr(outcome.estimate, name, 0)
                print(f"| {name} | {outcome.kernel[-1][name]:,} | {outcome.simulated[-1][name]:,} | {guess:,} |")
            print(f"| frames saved | {outcome.frames_saved:,} | | |")
            print(f"| zero pages given back | {outcome.zero_pages_given_back:,} | | |")
            for line in differences(outcome):
                print(line)
                wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())

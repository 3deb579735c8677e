"""A machine whose pages change as a trace recorded it, while its ksmd scans on the virtual clock."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ksm.constants import MADV_DONTNEED, MADV_MERGEABLE
from ksm.cost import NEAR_LEVELS, CostModel
from ksm.errors import UnsupportedError
from ksm.machine import Machine, Process
from ksm.pages import Fingerprints
from ksm.sysfs import Sysfs
from ksm.trace.reader import Change, Moment, Trace

_UNIT = 512  # pages mapped at a time: 2 MiB of 4 KiB pages
_GAP = 64  # pages that do not change do not end a write
_FEWEST = 8  # pages a batch: fewer cannot stand for a whole machine's batch any more


class Replay:
    """A trace that happens again to the processes of a `Machine`.

    Processes start, change their pages and end when the trace saw it; all that they have is mergeable. After the
    trace's end memory stands still. Set the tunables of `machine.ksm`, `run` among them, and let time pass by
    `run_for`, not by `machine.run_for`.

    Of a sampled trace the machine holds the sample only: `set_pages_to_scan` and the cost model are scaled so that
    passes take as long as over the whole; its counters are to be multiplied by `scale`.

    Args:
        trace: the recording.
        machine: a new one, of the trace's page size; None: one of the default profile.
        zeros: what all-zero pages of dumps are: pages that "merge", or "absent", never touched.

    Raises:
        ValueError: a machine of another page size, or that has processes.

    >>> from ksm.trace import example
    >>> replay = example().replay()
    >>> replay.machine.ksm.run = 1
    >>> replay.run_for(5)
    >>> replay.machine.ksm.pages_sharing
    3
    >>> replay.run_for(20)
    >>> replay.machine.ksm.pages_sharing, replay.machine.vmstat["cow_ksm"]
    (2, 1)
    """

    def __init__(self, trace: Trace, machine: Machine | None = None, *, zeros: str = "merge") -> None:
        self.trace = trace
        self.machine = Machine(page_size=trace.page_size) if machine is None else machine
        if self.machine.page_size != trace.page_size:
            raise ValueError(f"pages of {trace.page_size} bytes do not fit a machine of {self.machine.page_size}")
        if self.machine.processes:
            raise ValueError("a replay needs a machine of its own, without processes")
        if zeros not in ("merge", "absent"):
            raise ValueError(f"zeros is {zeros!r}; it can be 'merge' or 'absent'")
        self.scale = trace.sample.of
        self.moment = Moment(trace.page_size)
        """Memory as it is now, whatever ksmd has merged: what `ksm.estimate` would be asked about."""
        self.changes = 0
        """How many changes have happened to processes so far; the moment is another whenever this is."""
        if self.scale > 1:
            self.machine.ksmd.cost = _cost_of_sample(self.machine.ksmd.cost, trace)
        self._zeros = zeros
        self._known: dict[str, bool] = {}
        self._mapped: dict[str, npt.NDArray[np.uint64]] = {}
        self._feed = trace.changes()
        self._next = next(self._feed, None)

    @property
    def ksm(self) -> Sysfs:
        """The machine's files.

        >>> from ksm.trace import example
        >>> example().replay().ksm.pages_sharing
        0
        """
        return self.machine.ksm

    def set_pages_to_scan(self, pages: int) -> None:
        """Set the tunable to what it is on the whole machine: of a sample, so much less.

        Raises:
            UnsupportedError: a sample so thin that its batch would be less than 8 pages.

        >>> from ksm.trace import example
        >>> example().replay().set_pages_to_scan(1000)
        """
        if self.scale > 1 and pages < _FEWEST * self.scale:
            raise UnsupportedError(
                f"pages_to_scan {pages:,} cannot be replayed on a sample of {self.trace.sample}: it takes at least "
                f"{_FEWEST * self.scale:,}, or a trace of more pages"
            )
        self.machine.ksm.pages_to_scan = round(pages / self.scale)

    @property
    def now(self) -> float:
        """Simulated seconds, which are seconds of the recording.

        >>> from ksm.trace import example
        >>> example().replay().now
        0.0
        """
        return self.machine.now

    def run_for(self, seconds: float) -> None:
        """Let time pass: ksmd scans, and what the trace saw happens meanwhile.

        >>> from ksm.trace import example
        >>> replay = example().replay()
        >>> replay.run_for(1)
        >>> sorted(replay.machine.processes)
        ['vm1', 'vm2']
        """
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"cannot run for {seconds} seconds")
        end = self.now + seconds
        while self._next is not None and self._next.seconds <= end:
            self.machine.run_for(max(0.0, self._next.seconds - self.now))
            self._apply(self._next)
            self._next = next(self._feed, None)
        self.machine.run_for(max(0.0, end - self.now))

    # ---- changes -------------------------------------------------------------------------------

    def _apply(self, change: Change) -> None:
        if not len(change.pages):
            self._known[change.process] = change.anonymous_known
        elif self._zeros == "absent":
            change = self._without_zeros(change)
        self.moment.apply(change)
        self.changes += bool(len(change.pages)) or not change.alive
        process = self.machine.processes.get(change.process)
        if not change.alive:
            self._mapped.pop(change.process, None)
            if process is not None:
                process.exit()
            return
        if process is None:
            process = self.machine.spawn(change.process)
            self._mapped[change.process] = np.empty(0, np.uint64)
        if len(change.pages):
            self._change_pages(process, change)

    def _without_zeros(self, change: Change) -> Change:
        if self._known.get(change.process, True):
            return change
        zeros = change.prints.zeros(self.trace.page_size)
        there = change.prints.present
        present = ~zeros if there is None else there & ~zeros
        return replace(change, prints=Fingerprints(change.prints.words, present), gone=change.gone | zeros)

    def _change_pages(self, process: Process, change: Change) -> None:
        size = self.trace.page_size
        prints, gone = change.prints, change.gone
        there = np.ones(len(prints), np.bool_) if prints.present is None else prints.present
        outside = ~there & ~gone
        self._map(process, change.pages[there])
        words = prints.words.copy()
        if outside.any():  # overwritten, and out of sight then: whatever they hold, it merges with nothing
            words[outside] = _unlike_any(change.pages[outside])
        written = there | (outside & self._is_mapped(process, change.pages))
        for first, last in _runs(change.pages[written]):
            some = slice(first, last)
            pages = change.pages[written][some]
            span = int(pages[-1] - pages[0]) + 1
            present = np.zeros(span, np.bool_)
            present[(pages - pages[0]).astype(np.int64)] = True
            row = np.zeros((span, 2), np.uint64)
            row[present] = words[written][some]
            process.write(int(pages[0]) * size, Fingerprints(row, present))
        for first, last in _consecutive(change.pages[~there]):
            pages = change.pages[~there][first:last]
            self._discard(process, int(pages[0]), len(pages))

    def _map(self, process: Process, pages: npt.NDArray[np.uint64]) -> None:
        """Mappings for pages that are new, marked mergeable."""
        have = self._mapped[process.name]
        new = np.setdiff1d(pages // np.uint64(_UNIT), have)
        for first, last in _consecutive(new):
            size = (last - first) * _UNIT * self.trace.page_size
            address = int(new[first]) * _UNIT * self.trace.page_size
            process.mmap(size, addr=address)
            process.madvise(address, size, MADV_MERGEABLE)
        if len(new):
            self._mapped[process.name] = np.union1d(have, new)

    def _is_mapped(self, process: Process, pages: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        return np.isin(pages // np.uint64(_UNIT), self._mapped[process.name])

    def _discard(self, process: Process, page: int, n: int) -> None:
        for vma in process.vmas:
            low, high = max(vma.start, page), min(vma.end, page + n)
            if low < high:
                process.madvise(low * self.trace.page_size, (high - low) * self.trace.page_size, MADV_DONTNEED)


def _cost_of_sample(cost: CostModel, trace: Trace) -> CostModel:
    """Costs that make work on a sample as dear as work on the whole, whose trees are deeper by log2(of) levels."""
    of = trace.sample.of
    depth = math.log2(max([2.0, *(step.row["pages"] or 0 for step in trace.steps)]))
    less = max(depth - math.log2(of), 1.0)
    deep = (depth - NEAR_LEVELS) / (less - NEAR_LEVELS) if less > NEAR_LEVELS + 1 else 1.0
    level, stable = cost.level_ns * depth / less, cost.stable_level_ns * depth / less
    return replace(cost, level_ns=level, stable_level_ns=stable, deep_ns=cost.deep_ns * deep).scaled(of)


def _unlike_any(pages: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Contents that no page has: the high word is no fingerprint's, but by a chance of 2^-64."""
    return np.stack((np.full(len(pages), 0x6B73_6D20_6F75_7473, np.uint64), pages), axis=1)


def _runs(pages: npt.NDArray[np.uint64]) -> list[tuple[int, int]]:
    """[first, last) of runs without long gaps."""
    return _split(pages, _GAP)


def _consecutive(pages: npt.NDArray[np.uint64]) -> list[tuple[int, int]]:
    return _split(pages, 1)


def _split(pages: npt.NDArray[np.uint64], gap: int) -> list[tuple[int, int]]:
    if not len(pages):
        return []
    breaks = (np.flatnonzero(np.diff(pages) > gap) + 1).tolist()
    return list(zip([0, *breaks], [*breaks, len(pages)], strict=True))

"""How long a pass of ksmd takes, how much of this one is left, and when merging will have settled."""

from __future__ import annotations

from dataclasses import dataclass

from ksm.observe import Observation, Sample

# Merging takes two passes: the first remembers a page's checksum, the second finds its equals.
_PASSES_TO_MERGE = 2
_SETTLED = 0.001  # a pass that changes fewer of the merged pages than this share has settled


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where ksmd stands, in seconds; what cannot be told yet is None.

    >>> Progress(pass_seconds=10.0, left=4.0).left
    4.0
    """

    pass_seconds: float | None = None
    """A whole pass."""
    left: float | None = None
    """To the end of this pass; when its beginning was not seen, at most."""
    seen: bool = False
    """Whether the pass's beginning was seen, so that `left` is no upper bound."""
    settle: float | None = None
    """Until memory that stands still is merged: 0 once a whole pass has changed nothing."""


class PassClock:
    """Follows ksmd through samples taken one after the other.

    A pass is as long as the one before it, in visits; until one has been seen, as many visits as there are rmap
    items, which smart scan makes fewer. In the very first pass the anonymous memory of the processes that take part
    stands in for them: at most so much can be visited.

    >>> PassClock().update(Observation(sample=Sample())).left is None
    True
    """

    def __init__(self) -> None:
        self._last: Sample | None = None
        self._began: tuple[int | None, float] | None = None  # pages_scanned and clock when this pass began
        self._visits: int | None = None  # of the last whole pass
        self._seconds: float | None = None  # of the last whole pass
        self._merged: list[int] = []  # merged pages at the ends of the last two passes

    def update(self, observation: Observation) -> Progress:
        """Take in an observation; where ksmd stands now.

        >>> PassClock().update(Observation(sample=Sample(tunables={"run": 0}))).settle is None
        True
        """
        sample = observation.sample
        last, self._last = self._last, sample
        if last is not None and sample.stats.full_scans != last.stats.full_scans:
            self._pass_ended(last, sample)
        if not sample.running:
            return Progress()
        rate = observation.visits_per_second
        length = self._visits or _visits_of_a_pass(sample)
        whole = self._seconds
        if rate and length:
            whole = length / rate
        left = self._left(sample, rate, length, whole)
        return Progress(pass_seconds=whole, left=left, seen=self._began is not None, settle=self._settle(left, whole))

    def _pass_ended(self, last: Sample, sample: Sample) -> None:
        passes = sample.stats.full_scans - last.stats.full_scans
        scanned = sample.stats.pages_scanned
        if passes < 0:  # run=2 began anew
            self._merged.clear()
            self._began = self._visits = self._seconds = None
            return
        if self._began is not None:
            before, clock = self._began
            self._seconds = (sample.clock - clock) / passes
            if scanned is not None and before is not None:
                self._visits = (scanned - before) // passes
        self._began = (scanned, sample.clock)
        stats = sample.stats
        self._merged = [*self._merged[-1:], stats.pages_shared + stats.saved_pages]

    def _left(self, sample: Sample, rate: float | None, length: int | None, whole: float | None) -> float | None:
        if whole is None:
            return None
        if self._began is None:
            return whole
        before, clock = self._began
        scanned = sample.stats.pages_scanned
        if rate and length and scanned is not None and before is not None:
            return max(0, length - (scanned - before)) / rate
        return max(0.0, whole - (sample.clock - clock))

    def _settle(self, left: float | None, whole: float | None) -> float | None:
        if self._last is None or left is None or whole is None:
            return None
        missing = _PASSES_TO_MERGE - 1 - self._last.stats.full_scans
        if missing >= 0:
            return left + missing * whole
        if len(self._merged) < 2:
            return None
        before, after = self._merged
        return 0.0 if abs(after - before) <= _SETTLED * after else left + whole


def _visits_of_a_pass(sample: Sample) -> int | None:
    """How many visits a pass may take, before one was seen."""
    if sample.stats.full_scans and sample.stats.rmap_items:
        return sample.stats.rmap_items
    known = [process.anonymous for process in sample.processes if process.anonymous is not None]
    return sum(known) // sample.stats.page_size or None

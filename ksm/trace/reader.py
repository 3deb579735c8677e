"""A recorded trace: its steps, the changes in their order, and memory as it was at a moment."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ksm.errors import SourceError
from ksm.keyed import Key
from ksm.pages import Fingerprints
from ksm.sources.snapshot import Snapshot
from ksm.trace.format import PAGES, STEPS, errors_of, is_trace, parts, read, whole
from ksm.trace.memory import Flags, Memory, Numbers, Sample

if TYPE_CHECKING:
    from ksm.machine import Machine
    from ksm.trace.replay import Replay

_MOST_PAGE = 1 << 52


@dataclass(frozen=True, slots=True)
class Change:
    """What was seen of one process at one moment: the pages that differ from the last time it was seen.

    Attributes:
        step: the step's number.
        seconds: since the recording began.
        process: its name.
        alive: false: it had ended; there are no pages then.
        pages: (n,) uint64, virtual page numbers, ascending.
        prints: (n,) their new contents; not present are those that went, or whose content is outside the sample.
        gone: (n,) bool, which of them hold nothing any more.
        anonymous_known: as `Image.anonymous_known`; so `zero_page_known`.
        start_ticks: when it started, in clock ticks since the host's boot; None: no process, or in a change of pages.

    >>> Change.none(0, 0.0, "vm1").alive
    True
    """

    step: int
    seconds: float
    process: str
    alive: bool
    pages: Numbers
    prints: Fingerprints
    gone: Flags
    anonymous_known: bool = True
    zero_page_known: bool = True
    start_ticks: int | None = None

    @classmethod
    def none(
        cls,
        step: int,
        seconds: float,
        process: str,
        alive: bool = True,
        anonymous_known: bool = True,
        zero_page_known: bool = True,
        start_ticks: int | None = None,
    ) -> Change:
        """A process that is there, or has ended, with no page told.

        >>> len(Change.none(0, 0.0, "vm1", alive=False).pages)
        0
        """
        nothing = Memory.empty()
        no_flags = np.empty(0, np.bool_)
        return cls(
            step,
            seconds,
            process,
            alive,
            nothing.pages,
            Fingerprints(nothing.words, no_flags),
            no_flags,
            anonymous_known,
            zero_page_known,
            start_ticks,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a recording.

    Attributes:
        number: its number; steps of a recording that was resumed may have gaps.
        seconds: when it began.
        processes: those that were seen, in the order of reading.
        row: the step's own row of the `steps` table: `pages`, `changed`, the host's counters, ...

    >>> Step(0, 0.0, (), {}).number
    0
    """

    number: int
    seconds: float
    processes: tuple[Change, ...]
    row: dict[str, Any]


class Trace:
    """A recording on disk; made by `ksm.trace.open`. It reads part by part, never the whole into memory.

    >>> from ksm.trace import example
    >>> trace = example()
    >>> len(trace.steps), trace.duration, trace.processes
    (3, 20.0, ('vm1', 'vm2'))
    """

    def __init__(self, path: str | os.PathLike[str], key: Key | None = None) -> None:
        self.path = Path(path)
        if not is_trace(self.path):
            what = "no such trace" if not self.path.exists() else "not a trace: a directory that ksm record made"
            raise SourceError(f"{self.path}: {what}")
        first = parts(self.path, STEPS)[0]
        self.metadata, _ = read(first, STEPS)
        if key is not None and key.id != self.metadata.key_id:
            raise SourceError(
                f"{self.path}: its fingerprints are "
                + (f"of key {self.metadata.key_id}, not {key.id}" if self.metadata.key_id else "plain, without a key")
            )
        self.page_size = self.metadata.page_size
        self.sample = Sample(self.metadata.sample_of)
        self.steps: tuple[Step, ...] = tuple(self._read_steps())

    @property
    def duration(self) -> float:
        """Seconds from the first step to the last.

        >>> from ksm.trace import example
        >>> example().duration
        20.0
        """
        return self.steps[-1].seconds if self.steps else 0.0

    @property
    def processes(self) -> tuple[str, ...]:
        """The names of all processes, in the order in which they were first seen.

        >>> from ksm.trace import example
        >>> example().processes
        ('vm1', 'vm2')
        """
        return tuple(dict.fromkeys(seen.process for step in self.steps for seen in step.processes))

    def _read_steps(self) -> Iterator[Step]:
        number = -1
        at = 0.0
        seen: list[Change] = []
        for path in whole(self.path, STEPS):
            for batch in read(path, STEPS, self.metadata)[1]:
                with errors_of(path):  # dictionaries that are too short show when they are used
                    rows = batch.to_pylist()
                for row in rows:
                    step, seconds, process = row["step"], row["seconds"], row["process"]
                    if step <= number or not math.isfinite(seconds) or seconds < at:
                        raise SourceError(f"{path}: step {step} at {seconds} s comes after step {number} at {at} s")
                    if process is not None:
                        seen.append(self._seen(path, row))
                        continue
                    if any(change.step != step for change in seen):
                        raise SourceError(f"{path}: rows of other steps before that of step {step}")
                    yield Step(step, seconds, tuple(seen), row)
                    number, at, seen = step, seconds, []

    @staticmethod
    def _seen(path: Path, row: dict[str, Any]) -> Change:
        flags = row["alive"], row["anonymous_known"], row["zero_page_known"]
        if None in flags:
            raise SourceError(f"{path}: a process without alive, anonymous_known or zero_page_known")
        return Change.none(row["step"], row["seconds"], row["process"], *flags, row["start_ticks"])

    def changes(self, until: float = math.inf) -> Iterator[Change]:
        """Everything that was seen up to `until` seconds, in order: processes that start, change and end.

        Raises:
            SourceError: a damaged part, or rows that contradict each other.

        >>> from ksm.trace import example
        >>> [(change.seconds, change.process, len(change.pages)) for change in example().changes()][:4]
        [(0.0, 'vm1', 0), (0.0, 'vm2', 0), (0.0, 'vm1', 4), (0.0, 'vm2', 4)]
        """
        rows = self._page_rows()
        waiting = next(rows, None)
        for step in self.steps:
            found: list[Change] = []
            while waiting is not None and waiting.step <= step.number:
                if waiting.step == step.number:  # else of a step that a crash kept from being finished
                    found.append(waiting)
                waiting = next(rows, None)
            yield from self._ordered(step, found, until)
            if step.seconds > until:
                return

    def _ordered(self, step: Step, found: list[Change], until: float) -> Iterator[Change]:
        """The changes of a step by time, each process's start or end before its pages."""
        flags = {seen.process: seen for seen in step.processes if seen.alive}
        for change in found:
            if change.process not in flags:
                raise SourceError(f"{self.path}: step {step.number} has pages of {change.process}, which was not there")
        every = sorted([*step.processes, *found], key=lambda change: (change.seconds, bool(len(change.pages))))
        yield from (change for change in every if change.seconds <= until)

    def _page_rows(self) -> Iterator[Change]:
        """The rows of `pages`, those of one process at one moment together."""
        last = -1
        for path in whole(self.path, PAGES):
            held = list(read(path, PAGES, self.metadata)[1])
            for change in _grouped(path, held):
                if change.step < last:
                    raise SourceError(f"{path}: step {change.step} comes after step {last}")
                last = change.step
                yield change

    def at(self, seconds: float) -> list[Snapshot]:
        """Memory as it was at that moment, for `ksm.estimate`; of a sample, the pages in it. O(rows up to it).

        >>> import ksm
        >>> from ksm.trace import example
        >>> ksm.estimate(example().at(0)).pages_sharing
        3
        """
        moment = Moment(self.page_size)
        for change in self.changes(seconds):
            moment.apply(change)
        return moment.snapshots()

    def replay(self, machine: Machine | None = None, *, zeros: str = "merge") -> Replay:
        """A machine to which all of this happens again; arguments and errors as `Replay`.

        >>> from ksm.trace import example
        >>> example().replay().now
        0.0
        """
        from ksm.trace.replay import Replay

        return Replay(self, machine, zeros=zeros)

    def __repr__(self) -> str:
        return f"<ksm.Trace {str(self.path)!r}, {len(self.steps)} steps, {self.duration:g} s>"


class Moment:
    """The memory of all processes at one moment, brought forward change by change.

    >>> moment = Moment(4096)
    >>> moment.apply(Change.none(0, 0.0, "vm1"))
    >>> list(moment.memory())
    ['vm1']
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._memory: dict[str, Memory] = {}
        self._known: dict[str, tuple[bool, bool]] = {}
        self._pending: dict[str, list[Change]] = {}

    def apply(self, change: Change) -> None:
        """Bring one change in. O(its pages); what belongs to one step is put in order at once, later."""
        name = change.process
        if not change.alive:
            for kept in (self._memory, self._known, self._pending):
                kept.pop(name, None)
            return
        self._memory.setdefault(name, Memory.empty())
        if not len(change.pages):
            self._known[name] = (change.anonymous_known, change.zero_page_known)
            return
        waiting = self._pending.setdefault(name, [])
        if waiting and (waiting[-1].step != change.step or waiting[-1].pages[-1] >= change.pages[0]):
            self._settle(name)
        self._pending.setdefault(name, []).append(change)

    def _settle(self, name: str) -> None:
        waiting = self._pending.pop(name, [])
        if waiting:
            there = [change.prints.present for change in waiting]
            self._memory[name] = self._memory[name].updated(
                np.concatenate([change.pages for change in waiting]),
                np.concatenate([change.prints.words for change in waiting]),
                np.concatenate([flags for flags in there if flags is not None]),
            )

    def memory(self) -> dict[str, Memory]:
        """The pages of each process, by name, in the order in which the processes came. O(n)."""
        for name in list(self._pending):
            self._settle(name)
        return dict(self._memory)

    def snapshots(self) -> list[Snapshot]:
        """The same in the form that `ksm.estimate` takes.

        >>> Moment(4096).snapshots()
        []
        """
        return [self._snapshot(name, memory) for name, memory in self.memory().items()]

    def _snapshot(self, name: str, memory: Memory) -> Snapshot:
        breaks = np.flatnonzero(np.diff(memory.pages) != 1) + 1
        blocks = tuple(
            (int(run[0]) * self._page_size, Fingerprints(words))
            for run, words in zip(np.split(memory.pages, breaks), np.split(memory.words, breaks), strict=True)
            if len(run)
        )
        return Snapshot(name, self._page_size, *self._known.get(name, (True, True)), blocks)


def _grouped(path: Path, batches: list[Any]) -> Iterator[Change]:
    """The rows of one part in groups of equal step, time and process."""
    if not batches:
        return
    names: dict[str, int] = {}
    with errors_of(path):
        columns = {name: _column(batches, name) for name in ("step", "seconds", "page", "high", "low", "present")}
        process = np.concatenate([_codes(batch.column("process"), names) for batch in batches])
    listed = list(names)
    if not np.isfinite(columns["seconds"]).all() or (columns["page"] >= _MOST_PAGE).any():
        raise SourceError(f"{path}: rows without a time, or with page numbers that no process can have")
    known = np.concatenate([_known(batch) for batch in batches])
    keys = (columns["step"], columns["seconds"], process)
    breaks = np.flatnonzero(np.logical_or.reduce([key[1:] != key[:-1] for key in keys])) + 1
    edges = [0, *breaks.tolist(), len(process)]
    words = np.stack((columns["high"], columns["low"]), axis=1)
    for first, last in itertools.pairwise(edges):
        pages = columns["page"][first:last]
        if (pages[1:] <= pages[:-1]).any():
            raise SourceError(f"{path}: pages of {listed[process[first]]} are not in ascending order")
        there = known[first:last]
        yield Change(
            int(columns["step"][first]),
            float(columns["seconds"][first]),
            listed[process[first]],
            True,
            pages,
            Fingerprints(words[first:last], there),
            ~columns["present"][first:last],
        )


def _column(batches: list[Any], name: str) -> npt.NDArray[Any]:
    return np.concatenate([_filled(batch.column(name)) for batch in batches])


def _filled(column: Any) -> npt.NDArray[Any]:
    filled = column.fill_null(0) if column.null_count else column
    found: npt.NDArray[Any] = filled.to_numpy(zero_copy_only=False)
    return found


def _known(batch: Any) -> Flags:
    flags: Flags = batch.column("high").is_valid().to_numpy(zero_copy_only=False)
    both: Flags = flags & batch.column("low").is_valid().to_numpy(zero_copy_only=False)
    return both


def _codes(column: Any, names: dict[str, int]) -> npt.NDArray[np.int64]:
    """A dictionary column as numbers into `names`, which grows."""
    renumbered = np.array([names.setdefault(name, len(names)) for name in column.dictionary.to_pylist()], np.int64)
    indices = column.indices.to_numpy(zero_copy_only=False)
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(renumbered):
        raise SourceError("rows of processes that have no name")
    codes: npt.NDArray[np.int64] = renumbered[indices]
    return codes

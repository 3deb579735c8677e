"""Recordings as samples, and how fast merged pages are written in them."""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ksm.errors import PlanError
from ksm.pages import zero_words
from ksm.plan.result import Breaking
from ksm.sources import Snapshot

if TYPE_CHECKING:
    from ksm.trace import Change, Step, Trace
    from ksm.trace.memory import Memory

Words = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

MINUTE = 60.0
_EARLY = 1.0  # second by which a step may come early, and the minute still counts


def recording(source: object) -> Trace | None:
    """The recording that a source is, None if it is something else.

    Raises:
        SourceError: a recording that is damaged.

    >>> recording("guest.raw") is None
    True
    """
    from ksm.trace import Trace, is_trace

    if isinstance(source, Trace):
        return source
    return Trace(source) if isinstance(source, str | os.PathLike) and is_trace(source) else None


def samples_of(trace: Trace) -> list[Snapshot]:
    """The processes of a recording as samples: at the last of the steps at which the most of them were alive.

    Raises:
        PlanError: it holds a part of the contents only, or never a living process. SourceError: it is damaged.

    >>> from ksm.trace import example
    >>> [sample.name for sample in samples_of(example())]
    ['vm1', 'vm2']
    """
    if trace.sample.of > 1:
        raise PlanError(
            f"{trace.path} holds one content in {trace.sample.of}: it can tell the risk, but its VMs are no samples"
        )
    alive = [sum(seen.alive for seen in step.processes) for step in trace.steps]
    if not any(alive):
        raise PlanError(f"{trace.path}: no process was ever alive in it")
    last = max(range(len(alive)), key=lambda step: (alive[step], step))
    following = trace.steps[last + 1].seconds if last + 1 < len(alive) else math.inf
    return trace.at(math.nextafter(following, -math.inf))


def lasts(trace: Trace) -> bool:
    """Whether a recording covers a minute.

    >>> from ksm.trace import example
    >>> lasts(example())
    False
    """
    return trace.duration >= MINUTE - _EARLY


def breaking(
    trace: Trace, class_name: str, still: float = 0.0, partners: Words | None = None, zeros_absent: bool = False
) -> Breaking:
    """How fast merged pages of a recording's VMs are written.

    Taken to be merged is what has stood still for `still` seconds, as ksmd meets a page unchanged in two passes before
    it merges it, and has a copy that has, too, or one in another sample; or what the first step shows so. The
    recording is read twice; O(pages) for each step, 25 bytes a page.

    Args:
        trace: the recording.
        class_name: of the VMs that are in it.
        still: seconds: a pass of ksmd.
        partners: low words of the contents that other samples have, ascending.
        zeros_absent: zero pages of dumps that do not tell them from memory never touched do not take part.

    Raises:
        PlanError: the recording covers less than a minute. SourceError: it is damaged.

    >>> from ksm.trace import example
    >>> try:
    ...     breaking(example(), "web")
    ... except PlanError as error:
    ...     print(str(error).partition("covers ")[2])
    20 s: it takes a minute or more to tell how fast sharing breaks
    """
    if not lasts(trace):
        raise PlanError(
            f"{trace.path} covers {trace.duration:g} s: it takes a minute or more to tell how fast sharing breaks"
        )
    return _Walk(trace, still, partners, zeros_absent).answer(class_name)


@dataclass(slots=True)
class _VM:
    """A process; of its memory's words, the first is the step of a page's last change, the second its content."""

    memory: Memory
    merged: Flags = field(default_factory=lambda: np.empty(0, np.bool_))
    ever: Words = field(default_factory=lambda: np.empty(0, np.uint64))
    """Pages that were written while merged."""
    zeros_known: bool = True


@dataclass(slots=True)
class _Window:
    """From one step on: when, pages merged then, and since then written, by process."""

    seconds: float
    merged: int
    written: Counter[str] = field(default_factory=Counter)


class _Walk:
    """Goes through a recording step by step."""

    def __init__(self, trace: Trace, still: float, partners: Words | None, zeros_absent: bool) -> None:
        from ksm.trace.memory import Memory

        self._empty = Memory.empty()
        self._trace = trace
        self._still = still
        self._zeros_absent = zeros_absent
        self._contents = _contents(trace)
        self._elsewhere = np.isin(self._contents, partners if partners is not None else [])
        self._zero = self._contents == zero_words(trace.page_size)[1]
        self._times = np.array([step.seconds for step in trace.steps])
        self._vms: dict[str, _VM] = {}
        self._names: set[str] = set()
        self._ever: Counter[str] = Counter()
        self._merged_of_vm: list[float] = []  # at each step, the mean
        self._open: deque[_Window] = deque()
        self._done: list[tuple[float, float, int, int, int]] = []  # start, length, merged, written, most of one VM

    def answer(self, class_name: str) -> Breaking:
        """All of it."""
        changes = self._trace.changes()
        waiting = next(changes, None)
        for index, step in enumerate(self._trace.steps):
            here = []
            while waiting is not None and waiting.step == step.number:
                here.append(waiting)
                waiting = next(changes, None)
            self._windows(step, self._apply(index, here))
            self._merge(index)
            merged = {name: int(np.count_nonzero(vm.merged)) for name, vm in self._vms.items()}
            self._open.append(_Window(step.seconds, sum(merged.values())))
            if merged:
                self._merged_of_vm.append(sum(merged.values()) / len(merged))
        return self._summary(class_name)

    def _apply(self, index: int, changes: list[Change]) -> Counter[str]:
        """Bring a step's changes in; by process, the merged pages that they wrote."""
        written: Counter[str] = Counter()
        before = {name: (vm.memory, vm.merged) for name, vm in self._vms.items()}
        for change in changes:
            name = change.process
            if not change.alive:
                self._close(name)
                before.pop(name, None)
                continue
            vm = self._vms.setdefault(name, _VM(self._empty))
            self._names.add(name)
            if not len(change.pages):
                vm.zeros_known = change.anonymous_known
                continue
            if name in before:
                memory, merged = before[name]
                where, there = memory.find(change.pages)
                hit = there & ~change.gone
                hit[hit] = merged[where[hit]]
                written[name] += int(np.count_nonzero(hit))
                vm.ever = np.union1d(vm.ever, change.pages[hit])
            known = change.prints.present
            assert known is not None
            words = np.empty((len(change.pages), 2), np.uint64)
            words[:, 0] = index
            words[:, 1] = np.searchsorted(self._contents, change.prints.words[:, 1])
            vm.memory = vm.memory.updated(change.pages, words, known)
        return written

    def _close(self, name: str) -> None:
        if (vm := self._vms.pop(name, None)) is not None:
            self._ever[name] = max(self._ever[name], len(vm.ever))

    def _merge(self, index: int) -> None:
        """Which pages are merged from this step on."""
        settled = (self._times[: index + 1] <= self._times[index] - self._still) | (np.arange(index + 1) == 0)
        copies = self._elsewhere.astype(np.int64)
        for vm in self._vms.values():
            vm.merged = settled[vm.memory.words[:, 0]]
            if self._zeros_absent and not vm.zeros_known:
                vm.merged &= ~self._zero[vm.memory.words[:, 1]]
            copies += np.bincount(vm.memory.words[vm.merged, 1].astype(np.int64), minlength=len(copies))
        for vm in self._vms.values():
            vm.merged &= copies[vm.memory.words[:, 1]] >= 2

    def _windows(self, step: Step, written: Counter[str]) -> None:
        """What was written counts in all windows that are open; those that are a minute long now are done."""
        for window in self._open:
            window.written.update(written)
        while self._open and step.seconds - self._open[0].seconds >= MINUTE - _EARLY:
            one = self._open.popleft()
            most = max(one.written.values(), default=0)
            self._done.append((one.seconds, step.seconds - one.seconds, one.merged, one.written.total(), most))

    def _summary(self, class_name: str) -> Breaking:
        for name in list(self._vms):
            self._close(name)
        mean = float(np.mean(self._merged_of_vm)) if self._merged_of_vm else 0.0
        start, length, merged, written, most = (
            np.array(column, np.float64) for column in zip(*self._done, strict=True)
        )
        minute = MINUTE / np.maximum(length, MINUTE)
        of_all = np.minimum(np.divide(written, merged, out=np.zeros(len(start)), where=merged > 0), 1.0)
        of_one = np.minimum(most / mean, 1.0) if mean else np.zeros(len(start))
        worst = int(np.argmax(of_one))
        return Breaking(
            name=str(self._trace.path),
            class_name=class_name,
            processes=len(self._names),
            duration=self._trace.duration,
            step_seconds=float(np.diff(self._times).max()),
            merged=mean,
            seconds=start,
            share=of_all * minute,
            vm_share=of_one * minute,
            median=float(np.median(of_all * minute)),
            worst=float(of_one[worst]),
            worst_at=float(start[worst]),
            ever=min(1.0, max(self._ever.values(), default=0) / mean) if mean else 0.0,
        )


def _contents(trace: Trace) -> Words:
    """The low words of all contents of a recording, ascending."""
    found: Words = np.empty(0, np.uint64)
    parts: list[Words] = []
    for change in trace.changes():
        if change.prints.present is not None and len(change.pages):
            parts.append(np.unique(change.prints.words[change.prints.present, 1]))
        if sum(map(len, parts)) > max(len(found), 1 << 20):
            found, parts = np.unique(np.concatenate((found, *parts))), []
    return np.unique(np.concatenate((found, *parts)))

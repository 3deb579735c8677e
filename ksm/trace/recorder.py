"""Recording memory over time: step by step, changes only, within a budget of CPU time."""

from __future__ import annotations

import contextlib
import importlib.metadata
import mmap
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ksm.errors import SourceError, UnsupportedError, kernel_error
from ksm.keyed import Key, keyed
from ksm.linux import Host
from ksm.pages import Fingerprints, fingerprint
from ksm.sources import Image
from ksm.trace.format import CHUNK, COUNTERS, PAGES, STEPS, Metadata, Writer, arrow, clean, is_trace, parts, read
from ksm.trace.memory import Flags, Memory, Numbers, Sample
from ksm.trace.reader import Moment, Trace
from ksm.trace.watch import Sources, Watch, start_ticks, watches

_NAP = 0.5  # the longest sleep before looking whether to stop


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a recording is, after each step.

    Attributes:
        step: steps done by this recording, those before it was resumed not counted.
        seconds: since the recording began.
        processes: alive at this step.
        pages: that they have.
        rows: changes that this step stored.
        bytes_written: by this recording so far.
        read_seconds: that the step took.
        cpu_seconds: CPU time of the step.

    >>> Progress(1, 0.0, 0, 0, 0, 0, 0.0, 0.0).step
    1
    """

    step: int
    seconds: float
    processes: int
    pages: int
    rows: int
    bytes_written: int
    read_seconds: float
    cpu_seconds: float


def record(
    sources: Sources,
    path: str | os.PathLike[str],
    *,
    every: float = 10.0,
    seconds: float | None = None,
    key: Key | None = None,
    sample: int = 1,
    cpu: float | None = None,
    resume: bool = False,
    marked_only: bool = False,
    page_size: int = 4096,
    threads: int | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> Progress | None:
    """Record the fingerprints of all pages at each step into a new trace; what it was like after the last step.

    It ends after `seconds`, when everything it looks at has ended for good, or by an exception such as
    KeyboardInterrupt: each step is on disk when it is done, so that nothing has to be closed.

    Args:
        sources: what to look at (`ksm.trace.watch`), or series of dumps: a mapping of names to paths or images.
        path: the directory to make.
        every: seconds from one step to the next; of series, the nominal time between two dumps.
        seconds: to go on for; None: until everything has ended.
        key: a secret; the trace then holds keyed fingerprints.
        sample: keep one content in so many; all pages are read nevertheless.
        cpu: the share of one CPU that it may take (0.05 is 5 %): it pauses while it reads, and later steps wait.
        resume: go on with a trace that is there, with the same key, sample and sources.
        marked_only: of processes, only what is marked mergeable at that step.
        page_size: of raw images.
        threads: that hash; None: one a CPU, or one in all with a `cpu` budget.
        progress: called after each step.

    Raises:
        SourceError: a source cannot be read at the first step, or what is there is no trace, or is another's.
        ValueError: an option out of range; page sizes that differ.
        OSError: EEXIST, the trace is there already; EBUSY, another recording writes it; the disk is full.
        UnsupportedError: pyarrow is missing.

    >>> from ksm.sources import ArrayImage
    >>> image = ArrayImage(np.zeros((4, 4096), np.uint8), "vm1")
    >>> record({"vm1": [image, image]}, "vm1.trace").rows
    0
    """
    if not (0 < every < float("inf")) or (seconds is not None and not 0 <= seconds < float("inf")):
        raise ValueError("a recording needs a positive time between steps, and a length that is not negative")
    if cpu is not None and not 0 < cpu <= 1024:
        raise ValueError(f"a budget of {cpu:g} CPUs; it can be more than 0, up to 1024")
    threads = 1 if cpu is not None and threads is None else threads
    arrow()
    with _locked(Path(path), resume) as directory:
        recorder = _Recorder(directory, sources, every, key, sample, cpu, resume, marked_only, page_size, threads)
        return recorder.run(seconds, progress)


@contextlib.contextmanager
def _locked(path: Path, resume: bool) -> Iterator[Path]:
    """The trace's directory, made if need be, and no other recording's meanwhile."""
    if not resume:
        try:
            path.mkdir()
        except OSError as error:
            hint = "; resume (--resume) goes on with it" if is_trace(path) else ""
            raise kernel_error(error.errno or 0, f"{path}{hint}") from None
    elif not is_trace(path):
        raise SourceError(f"{path}: there is no trace to resume")
    fd = os.open(path, os.O_RDONLY)
    try:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise kernel_error(error.errno or 0, f"{path}: another recording writes it") from None
        yield path
    except BaseException:
        with contextlib.suppress(OSError):
            if not parts(path, STEPS) and not resume:  # nothing was recorded: leave nothing behind
                for kind in (PAGES, STEPS):
                    for part in parts(path, kind):
                        part.unlink()
                    if (path / kind).exists():
                        (path / kind).rmdir()
                path.rmdir()
        raise
    finally:
        os.close(fd)


@dataclass(slots=True)
class _Known:
    """What is remembered of a process between two steps."""

    started: int | None
    """In clock ticks since boot; None: no process."""
    plain: Memory | None
    """All its pages; None: it was recorded before the recording was resumed."""
    stored: Memory
    """The same as `plain`, as the trace would have it: under the key."""
    kept: Memory
    """What the trace has: the sample of `stored`."""


@dataclass(slots=True)
class _Rows:
    """Rows of `pages` that wait to be written, in columns."""

    columns: dict[str, list[npt.NDArray[Any]]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, name: str, **columns: npt.NDArray[Any]) -> None:
        n = len(columns["page"])
        self.names.append(name)
        columns["process"] = np.full(n, len(self.names) - 1, np.int32)
        for column, values in columns.items():
            self.columns.setdefault(column, []).append(values)
        self.count += n

    def write(self, writer: Writer, step: int) -> None:
        pa = arrow()
        if not self.count:
            return
        whole = {column: np.concatenate(values) for column, values in self.columns.items()}
        for at in range(0, self.count, CHUNK):
            some = {column: values[at : at + CHUNK] for column, values in whole.items()}
            hidden = ~some.pop("known")
            some["step"] = np.full(len(hidden), step, np.uint32)
            process = pa.DictionaryArray.from_arrays(some.pop("process"), pa.array(self.names, pa.string()))
            words = {word: pa.array(some.pop(word), mask=hidden) for word in ("high", "low")}
            writer.add({**some, **words, "process": process})
        self.columns, self.names, self.count = {}, [], 0


class _Budget:
    """Pauses so that this process takes no more than a share of a CPU, counted from the start of a step."""

    def __init__(self, share: float | None) -> None:
        self._share = share
        self.begin()

    def begin(self) -> None:
        self._cpu, self._wall = time.process_time(), time.monotonic()

    @property
    def cpu_seconds(self) -> float:
        return time.process_time() - self._cpu

    @property
    def read_seconds(self) -> float:
        return time.monotonic() - self._wall

    def pause(self) -> None:
        if self._share is not None:
            wait = self.cpu_seconds / self._share - self.read_seconds
            if wait > 0:
                time.sleep(wait)


class _Recorder:
    """The state of one recording."""

    def __init__(
        self,
        directory: Path,
        sources: Sources,
        every: float,
        key: Key | None,
        sample: int,
        cpu: float | None,
        resume: bool,
        marked_only: bool,
        page_size: int,
        threads: int | None,
    ) -> None:
        self._directory = directory
        self._every = every
        self._key = key
        self._sample = Sample(sample)
        self._threads = threads
        self._budget = _Budget(cpu)
        self._series = isinstance(sources, Mapping)
        self._known: dict[str, _Known] = {}
        self._step = 0
        self._start = time.monotonic()
        self._least = 0.0  # no time before that of the step before
        self._writers: dict[str, Writer] = {}
        self._rows = _Rows()
        self._row_count = 0
        self._kernel = _host()
        self._metadata = Metadata(
            page_size=0,
            started=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            sample_of=sample,
            key_id=None if key is None else key.id,
            every=every,
            sources=tuple(os.fspath(s) if not isinstance(s, Image) else s.name for s in sources),
            marked_only=marked_only,
            series=self._series,
            kernel=platform.release() if sys.platform == "linux" else "",
            tunables=_tunables(self._kernel),
            ksm=_version(),
        )
        if resume:
            self._resume()
        self._watches = watches(sources, self._step if self._series else 0, marked_only, page_size)
        if not self._watches:
            raise ValueError("no sources: there is nothing to record")

    def _resume(self) -> None:
        """Take up where the trace ends."""
        clean(self._directory)
        trace = Trace(self._directory)
        old, new = trace.metadata, self._metadata
        for name, what in (
            ("key_id", "the key"),
            ("sample_of", "the sample"),
            ("marked_only", "marked_only"),
            ("series", "what the sources are"),
        ):
            if getattr(old, name) != getattr(new, name):
                raise SourceError(
                    f"{trace.path}: {what} cannot change: {getattr(old, name)!r} there, {getattr(new, name)!r} here"
                )
        self._metadata = old
        moment = Moment(trace.page_size)
        for change in trace.changes():
            moment.apply(change)
        started = {seen.process: seen.start_ticks for step in trace.steps for seen in step.processes}
        for name, memory in moment.memory().items():
            self._known[name] = _Known(started[name], None, Memory.empty(), memory)
        self._step = trace.steps[-1].number + 1 if trace.steps else 0
        for path in parts(self._directory, PAGES)[-1:]:  # a step that was not finished keeps its number
            self._step = max(self._step, _last_step(path) + 1)
        self._least = trace.duration
        began = datetime.fromisoformat(old.started)
        gone = (datetime.now(timezone.utc) - began).total_seconds()
        self._start = time.monotonic() - max(gone, trace.duration)

    # ---- steps ---------------------------------------------------------------------------------

    def run(self, seconds: float | None, progress: Callable[[Progress], object] | None) -> Progress | None:
        last = None
        begun = time.monotonic()
        done = 0
        while seconds is None or done * self._every <= seconds:
            last = self._do_step(done + 1)
            done += 1
            if progress is not None:
                progress(last)
            if all(watch.finished for watch in self._watches):
                break
            if not self._series and not self._wait(begun, seconds):
                break
        return last

    def _wait(self, begun: float, seconds: float | None) -> bool:
        """Sleep to the next step, one that is due or later; whether there is one within `seconds`."""
        self._budget.pause()
        now = time.monotonic() - begun
        due = (now // self._every + 1) * self._every
        if seconds is not None and due > seconds * (1 + 1e-9):
            return False
        while (left := due - (time.monotonic() - begun)) > 0:
            time.sleep(min(left, _NAP))
        return True

    def _now(self) -> float:
        return self._step * self._every if self._series else time.monotonic() - self._start

    def _do_step(self, count: int) -> Progress:
        self._budget.begin()
        self._row_count = 0
        at = max(self._now(), self._least)
        rows: list[dict[str, Any]] = []
        seen: set[str] = set()
        for watch in self._watches:
            if not watch.finished:
                self._look(watch, seen, rows)
        ended = [name for name in self._known if name not in seen]
        for name in ended:
            rows.append(_ended(max(self._now(), at), name))
            del self._known[name]
        self._flush(PAGES)
        read_seconds, cpu_seconds = self._budget.read_seconds, self._budget.cpu_seconds
        own: dict[str, Any] = {"seconds": at, "read_seconds": read_seconds, "cpu_seconds": cpu_seconds}
        own |= _counters(self._kernel)
        alive = [row for row in rows if row["alive"]]
        for name in ("pages", "zero_pages", "changed", "appeared", "gone"):
            counts = [row[name] for row in alive if name in row]
            own[name] = sum(counts) if len(counts) == len(alive) else None
        self._writer(STEPS).add(_columns([*rows, own], self._step))
        self._step += 1
        self._least = at
        return Progress(
            count,
            at,
            len(alive),
            own["pages"] or 0,
            self._row_count,
            sum(writer.bytes_written for writer in self._writers.values()),
            read_seconds,
            cpu_seconds,
        )

    def _look(self, watch: Watch, seen: set[str], rows: list[dict[str, Any]]) -> None:
        first = self._step == 0 and not rows
        for name, image in watch.look():
            with image:
                if name in seen:
                    continue
                self._check_page_size(image)
                started = start_ticks(image)
                known = self._known.get(name)
                if known is not None and known.started != started:
                    rows.append(_ended(max(self._now(), self._least), name))
                    del self._known[name]
                try:
                    row = self._read(name, image, started)
                except (SourceError, PermissionError):
                    if first or self._series:
                        raise
                    continue  # it ended while it was read
                seen.add(name)
                rows.append(row)

    def _check_page_size(self, image: Image) -> None:
        if self._metadata.page_size == 0:
            self._metadata = _with_page_size(self._metadata, image.page_size)
        if image.page_size != self._metadata.page_size:
            raise ValueError(
                f"page sizes differ: {image.name} has pages of {image.page_size} bytes, the trace of "
                f"{self._metadata.page_size}"
            )

    # ---- one process ---------------------------------------------------------------------------

    def _read(self, name: str, image: Image, started: int | None) -> dict[str, Any]:
        began = max(self._now(), self._least)
        plain, firsts, times = self._fingerprints(image)
        known = self._known.get(name) or _Known(started, Memory.empty(), Memory.empty(), Memory.empty())
        row: dict[str, Any] = {
            "seconds": began,
            "process": name,
            "alive": True,
            "start_ticks": started,
            "anonymous_known": image.anonymous_known,
            "zero_page_known": image.zero_page_known,
            "pages": len(plain),
        }
        old = Memory.empty() if known.plain is None else known.plain
        _, there = old.find(plain.pages)
        same = plain.same(old)
        if known.plain is not None:
            row["changed"] = int(np.count_nonzero(there & ~same))
            row["appeared"] = len(plain) - int(np.count_nonzero(there))
            row["gone"] = len(old) - int(np.count_nonzero(there))
        size = self._metadata.page_size
        zeros = Fingerprints(plain.words).zeros(size)
        row["zero_pages"] = int(np.count_nonzero(zeros))
        stored = plain if self._key is None else self._hidden(plain, same, known.stored, self._key)
        kept = stored if self._sample.of == 1 else stored.keep(self._sample.keeps(stored, zeros))
        self._emit(name, known.kept, kept, stored, (firsts, times, began))
        self._known[name] = _Known(started, plain, stored, kept)
        row["read_seconds"] = max(self._now(), self._least) - began if not self._series else None
        return row

    def _fingerprints(self, image: Image) -> tuple[Memory, Numbers, npt.NDArray[np.float64]]:
        """All pages; and of each block its first page number and when it was read."""
        pages, words, firsts, times = [], [], [], []
        size = self._metadata.page_size
        for address, block, present in image.blocks():
            prints = fingerprint(block, self._threads).words
            numbers = np.arange(len(block), dtype=np.uint64) + np.uint64(address // size)
            pages.append(numbers if present is None else numbers[present])
            words.append(prints if present is None else prints[present])
            firsts.append(address // size)
            times.append(max(self._now(), self._least))
            self._budget.pause()
        if not pages:
            return Memory.empty(), np.empty(0, np.uint64), np.empty(0, np.float64)
        found = Memory(np.concatenate(pages), np.concatenate(words))
        return found, np.array(firsts, np.uint64), np.array(times, np.float64)

    def _hidden(self, plain: Memory, same: Flags, before: Memory, key: Key) -> Memory:
        """Fingerprints under the key: those of the pages that are as before are known."""
        words = np.empty_like(plain.words)
        where, _ = before.find(plain.pages)
        words[same] = before.words[where[same]]
        words[~same] = keyed(Fingerprints(plain.words[~same]), key, self._metadata.page_size).words
        return Memory(plain.pages, words)

    def _emit(self, name: str, old: Memory, new: Memory, everything: Memory, when: tuple[Any, Any, float]) -> None:
        """Rows for what the trace does not have yet."""
        renewed = new.keep(~new.same(old))
        _, there = new.find(old.pages)
        lost = old.pages[~there]
        _, outside = everything.find(lost)
        pages = np.concatenate((renewed.pages, lost))
        if not len(pages):
            return
        order = np.argsort(pages, kind="stable")
        nothing = np.zeros((len(lost), 2), np.uint64)
        words = np.concatenate((renewed.words, nothing))[order]
        firsts, times, began = when
        block = np.maximum(np.searchsorted(firsts, pages[order], "right") - 1, 0)
        self._rows.add(
            name,
            seconds=times[block] if len(times) else np.full(len(pages), began),
            page=pages[order],
            high=words[:, 0],
            low=words[:, 1],
            known=np.concatenate((np.ones(len(renewed), np.bool_), np.zeros(len(lost), np.bool_)))[order],
            present=np.concatenate((np.ones(len(renewed), np.bool_), outside))[order],
        )
        self._row_count += len(pages)
        if self._rows.count > CHUNK:
            self._flush(PAGES)

    # ---- files ---------------------------------------------------------------------------------

    def _writer(self, kind: str) -> Writer:
        if kind not in self._writers:
            if self._metadata.page_size == 0:
                self._metadata = _with_page_size(self._metadata, mmap.PAGESIZE)
            self._writers[kind] = Writer(self._directory, kind, self._metadata)
        return self._writers[kind]

    def _flush(self, kind: str) -> None:
        self._rows.write(self._writer(kind), self._step)


def _with_page_size(metadata: Metadata, size: int) -> Metadata:
    return replace(metadata, page_size=size)


def _ended(seconds: float, name: str) -> dict[str, Any]:
    return {"seconds": seconds, "process": name, "alive": False, "anonymous_known": True, "zero_page_known": True}


def _columns(rows: list[dict[str, Any]], step: int) -> dict[str, Any]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {"step": [step] * len(rows), **{name: [row.get(name) for row in rows] for name in names}}


def _last_step(path: Path) -> int:
    """The last step with rows in a part of `pages`."""
    batches = read(path, PAGES)[1]
    return max((batch.column("step")[len(batch) - 1].as_py() for batch in batches if len(batch)), default=-1)


def _host() -> Host | None:
    host = Host()
    try:
        host.ksm.names()
    except (UnsupportedError, OSError):
        return None
    return host


def _tunables(host: Host | None) -> dict[str, int | bool | str] | None:
    if host is None:
        return None
    try:
        return host.ksm.tunables()
    except (OSError, UnsupportedError, ValueError):
        return None


def _counters(host: Host | None) -> dict[str, int | None]:
    if host is None:
        return {}
    try:
        now = host.ksm.snapshot()
    except (OSError, UnsupportedError, ValueError):
        return {}
    return {name: getattr(now, name) for name in COUNTERS}


def _version() -> str:
    try:
        return importlib.metadata.version("ksm")
    except importlib.metadata.PackageNotFoundError:
        return ""

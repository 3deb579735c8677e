"""The host's processes that take part in KSM, read again and again at a bounded cost."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ksm.errors import kernel_error
from ksm.linux import Host
from ksm.stats import ProcessStats, parse_ksm_stat

_LARGEST = 1 << 16  # bytes of a file of procfs that are read; those here hold a few lines
_PARTS = ("ksm_rmap_items", "ksm_merging_pages", "ksm_zero_pages", "ksm_merge_any", "ksm_mergeable")


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """What a process has marked mergeable, in bytes, from /proc/PID/smaps.

    >>> Marked(size=8192, rss=4096).untouched
    4096
    """

    size: int = 0
    """Address space that is marked."""
    rss: int = 0
    """Of it, what is in memory: file pages and shared pages too."""
    anonymous: int = 0
    """Of that, the anonymous pages: what KSM can take. It includes merged pages and huge ones."""
    huge: int = 0
    """Anonymous memory in transparent huge pages."""
    swapped: int = 0

    @property
    def untouched(self) -> int:
        """Marked address space that has no page.

        >>> Marked(size=8192, rss=4096, swapped=4096).untouched
        0
        """
        return max(0, self.size - self.rss - self.swapped)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSample:
    """One process at one moment.

    >>> ProcessSample(pid=7, name="vm1", stats=ProcessStats(ksm_merging_pages=2)).stats.saved_bytes
    8192
    """

    pid: int
    name: str
    stats: ProcessStats
    anonymous: int | None = None
    """Bytes of anonymous memory it has, marked or not; merged pages count in full."""
    marked: Marked | None = None
    """Looked up only for those whose marked memory KSM does not track."""

    @property
    def takes_part(self) -> bool:
        """Whether KSM tracks any of its pages, or some of its memory is marked.

        >>> ProcessSample(pid=7, name="vm1", stats=ProcessStats(ksm_rmap_items=0)).takes_part
        False
        """
        return any(getattr(self.stats, name) for name in _PARTS)

    def to_dict(self) -> dict[str, Any]:
        """All of it under its names, for JSON.

        >>> ProcessSample(pid=7, name="vm1", stats=ProcessStats()).to_dict()["marked"] is None
        True
        """
        values = self.stats.to_dict()
        del values["page_size"]
        marked = None if self.marked is None else {f.name: getattr(self.marked, f.name) for f in fields(Marked)}
        return {"pid": self.pid, "name": self.name, **values, "anonymous": self.anonymous, "marked": marked}


@dataclass(slots=True)
class Census:
    """Reads the processes of a host, tick by tick: O(`budget`) files a tick, and one listing of /proc.

    The first call of `poll` reads every process. Later ones read new processes, those that take part, and some of the
    others in turn, so that one which marks its memory late is found after at most processes / (`budget` / 2) ticks.
    Processes that exit while they are read are left out; those of other users, without root, are counted.

    >>> Census(Host(proc="/nonexistent")).poll()
    []
    """

    host: Host
    budget: int = 1000
    total: int = 0
    """Processes in the last listing, kernel threads too."""
    unreadable: int = 0
    """Of those read last, how many belong to somebody else."""
    shown: bool = True
    """Whether this kernel shows a process's part in KSM (5.19 and later, with CONFIG_KSM)."""
    _part: dict[int, ProcessSample] = field(default_factory=dict)
    _rest: dict[int, bool] = field(default_factory=dict)
    """pid -> whether it was unreadable, the one read longest ago first."""
    _page_size: int = 4096
    _files: tuple[str, ...] | None = None

    def poll(self) -> list[ProcessSample]:
        """The processes that take part, by pid, as far as they were read in this tick or before.

        >>> all(p.takes_part for p in Census(Host()).poll())
        True
        """
        if self._files is None:
            self._files = self._which_files()
            self._page_size = self.host.page_size
        alive = dict.fromkeys(self._pids())
        self.total = len(alive)
        self.shown = bool(self._files)
        if not self.shown:
            return []
        for known in (self._part, self._rest):
            for pid in [pid for pid in known if pid not in alive]:
                del known[pid]
        first = not self._part and not self._rest
        new = [pid for pid in alive if pid not in self._part and pid not in self._rest]
        half = len(new) if first else max(1, self.budget // 2)
        for pid in (
            *new[: self.budget if not first else None],
            *self._turn(self._part, half),
            *self._turn(self._rest, half),
        ):
            self._visit(pid)
        self.unreadable = sum(self._rest.values())
        return sorted(self._part.values(), key=lambda sample: sample.pid)

    @staticmethod
    def _turn(known: dict[int, Any], count: int) -> list[int]:
        return [pid for pid, _ in zip(known, range(count), strict=False)]

    def _visit(self, pid: int) -> None:
        """Read one process and put it at the end of its line."""
        self._part.pop(pid, None)
        self._rest.pop(pid, None)
        try:
            sample = self._sample(pid)
        except (FileNotFoundError, ProcessLookupError):
            return
        except PermissionError:
            self._rest[pid] = True
            return
        if sample is None:
            self._rest[pid] = False
        else:
            self._part[pid] = sample

    def _sample(self, pid: int) -> ProcessSample | None:
        values: dict[str, int | bool] = {}
        for name in self._files or ():
            text = self._read(pid, name)
            if not text:
                return None  # a kernel thread, or a process whose memory has gone
            if name == "ksm_stat":
                values.update(parse_ksm_stat(text))
            else:
                values[name] = int(text)
        stats = ProcessStats.of(values, self._page_size)
        sample = ProcessSample(pid=pid, name="", stats=stats)
        if not sample.takes_part:
            return None
        words = self._read(pid, "statm").split()  # size, resident, shared ... in pages
        anonymous = (int(words[1]) - int(words[2])) * self._page_size
        name = self._read(pid, "comm").rstrip("\n")
        return ProcessSample(pid=pid, name=name, stats=stats, anonymous=max(0, anonymous))

    def _which_files(self) -> tuple[str, ...]:
        """The files that a process's part is in: asked of this process."""
        try:
            stat = self._read("self", "ksm_stat")
        except PermissionError:  # a process that changed its user may not even read its own
            return ("ksm_stat",)
        except (FileNotFoundError, ProcessLookupError):
            stat = ""
        files: tuple[str, ...] = ("ksm_stat",) if stat else ()
        if "ksm_merging_pages" not in stat:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                self._read("self", "ksm_merging_pages")
                files += ("ksm_merging_pages",)
        return files

    def _read(self, pid: int | str, name: str) -> str:
        """The text of a small file, by the shortest way: a host may have tens of thousands of processes."""
        descriptor = os.open(f"{self.host.proc}/{pid}/{name}", os.O_RDONLY)
        try:
            return os.read(descriptor, _LARGEST).decode("utf-8", "replace")
        finally:
            os.close(descriptor)

    def _pids(self) -> Iterator[int]:
        try:
            names = os.listdir(self.host.proc)
        except FileNotFoundError:
            return iter(())
        return (int(name) for name in names if name.isdecimal())


def marked(host: Host, pid: int) -> Marked:
    """What a process has marked mergeable. O(VMAs and pages), as the kernel counts them for smaps.

    Raises:
        OSError: ESRCH for no such process, EACCES for one of another user.

    >>> marked(Host(), os.getpid()).size  # doctest: +SKIP
    0
    """
    path = Path(host.proc, str(pid), "smaps")
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            return _sum_marked(lines)
    except (FileNotFoundError, ProcessLookupError):
        raise kernel_error(errno.ESRCH, f"process {pid}") from None
    except PermissionError as error:
        raise kernel_error(error.errno or errno.EACCES, f"reading {path} needs its owner or root") from error


_SUMS = {"Size": "size", "Rss": "rss", "Anonymous": "anonymous", "AnonHugePages": "huge", "Swap": "swapped"}


def _sum_marked(lines: Iterator[str]) -> Marked:
    total = dict.fromkeys(_SUMS.values(), 0)
    area = dict(total)
    for line in lines:
        name, _, rest = line.partition(":")
        if name in _SUMS:
            area[_SUMS[name]] = int(rest.split()[0]) * 1024
        elif name == "VmFlags" and "mg" in rest.split():
            for key, value in area.items():
                total[key] += value
    return Marked(**total)

"""What a recording looks at: processes that come and go, images that are read again and again, series of dumps."""

from __future__ import annotations

import fnmatch
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from ksm import sources
from ksm.errors import SourceError, UnsupportedError
from ksm.linux import Host
from ksm.sources import Image

Watched: TypeAlias = "str | os.PathLike[str] | Image"
Sources: TypeAlias = "Sequence[Watched] | Mapping[str, Sequence[Watched]]"


class Watch(ABC):
    """One thing to look at, at each step.

    >>> watch("guest.raw").finished
    False
    """

    finished = False
    """Whether there will never be anything to see again."""

    @abstractmethod
    def look(self) -> Iterator[tuple[str, Image]]:
        """(process name, its image) of what is there now; opened, to be closed by the caller."""


class _Repeated(Watch):
    """One source that is opened again at each step: a process, a guest by its name, a file that a guest writes to.

    A process that has ended is finished with: another one with its pid is another one.
    """

    def __init__(self, source: str | os.PathLike[str], marked_only: bool, page_size: int) -> None:
        self._source = source
        self._marked_only = marked_only
        self._page_size = page_size
        self._once = isinstance(source, str) and source.startswith("pid:")
        self._may_be_absent = isinstance(source, str) and source.startswith(("qemu:", "qemu-ram:"))
        self._started: int | None = None

    def look(self) -> Iterator[tuple[str, Image]]:
        try:
            image = sources.open(self._source, marked_only=self._marked_only, page_size=self._page_size)
        except (SourceError, PermissionError):
            if not self._may_be_absent:
                raise  # at first; it may go later
            self.finished = self._once
            return
        started = start_ticks(image)
        if self._once and self._may_be_absent and started != self._started:
            self.finished = True
            image.close()
            return
        self._may_be_absent, self._started = True, started
        yield os.fspath(self._source), image


class _Many(Watch):
    """All processes of a kind, by pid, whichever there are at a step."""

    def __init__(self, pattern: str | None, marked_only: bool) -> None:
        if sys.platform != "linux":
            raise UnsupportedError("live processes can be read on Linux only")
        self._pattern = pattern
        self._marked_only = marked_only
        self._host = Host()
        self._looked = False

    def look(self) -> Iterator[tuple[str, Image]]:
        for pid in self._pids():
            try:
                image = sources.open(f"pid:{pid}", marked_only=self._marked_only)
            except SourceError:
                continue  # it has ended meanwhile
            except PermissionError:
                if not self._looked:
                    raise
                continue  # somebody else's, that came later: no reason to end a recording
            yield f"pid:{pid}", image
        self._looked = True

    def _pids(self) -> list[int]:
        if self._pattern is None:
            there = self._host.processes(skip_unreadable=self._looked)
            return [process.pid for process in there if process.pid != os.getpid()]
        return [pid for pid, name in commands() if fnmatch.fnmatchcase(name, self._pattern) and pid != os.getpid()]


class _Series(Watch):
    """Dumps of one guest, one a step."""

    def __init__(self, name: str, dumps: Sequence[Watched], first: int, page_size: int) -> None:
        self._name = name
        self._dumps = list(dumps[first:])
        self._page_size = page_size

    def look(self) -> Iterator[tuple[str, Image]]:
        if self._dumps:
            dump = self._dumps.pop(0)
            yield self._name, dump if isinstance(dump, Image) else sources.open(dump, page_size=self._page_size)
        self.finished = not self._dumps


def watch(source: Watched, marked_only: bool = False, page_size: int = 4096) -> Watch:
    """What to look at for one source.

    Args:
        source: what `ksm.open` takes; "comm:PATTERN", all processes with such a name, as in /proc/PID/comm (at most 15
            letters), PATTERN with * and ?; or "mergeable", all processes that take part in KSM.
        marked_only: of processes, only what is marked mergeable at that step.
        page_size: of raw images.

    >>> watch("pid:123").finished
    False
    """
    if isinstance(source, Image):
        return _Series(source.name, [source], 0, page_size)
    if isinstance(source, str) and source.startswith("comm:"):
        return _Many(source[5:], marked_only)
    if source == "mergeable":
        return _Many(None, marked_only)
    return _Repeated(source, marked_only, page_size)


def watches(given: Sources, first: int, marked_only: bool, page_size: int) -> list[Watch]:
    """What to look at for all of them; series begin with the dump number `first`.

    >>> len(watches({"vm1": ["vm1-0.raw", "vm1-1.raw"]}, 0, False, 4096))
    1
    """
    if isinstance(given, Mapping):
        return [_Series(name, dumps, first, page_size) for name, dumps in given.items()]
    return [watch(source, marked_only, page_size) for source in given]


def series(directories: Sequence[str | os.PathLike[str]]) -> dict[str, list[str]]:
    """The dumps in each directory, in the order of their names, numbers in them by value: name -> paths.

    Raises:
        SourceError: no such directory, or nothing in it; two directories of one name.

    >>> os.mkdir("vm1")
    >>> for name in ("10.raw", "9.raw"):
    ...     open(os.path.join("vm1", name), "w").close()
    >>> series(["vm1"])
    {'vm1': ['vm1/9.raw', 'vm1/10.raw']}
    """
    found: dict[str, list[str]] = {}
    for directory in (os.fspath(given) for given in directories):
        try:
            names = [name for name in os.listdir(directory) if not name.startswith(".")]
        except OSError as error:
            raise SourceError(f"{directory}: {error.strerror}; a series is a directory of dumps") from None
        if not names:
            raise SourceError(f"{directory}: there are no dumps in it")
        name = os.path.basename(os.path.normpath(directory))
        if name in found:
            raise SourceError(f"{directory}: there is another series of the name {name}")
        found[name] = [os.path.join(directory, dump) for dump in sorted(names, key=_natural)]
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def start_ticks(image: Image) -> int | None:
    """When an image's process started, in clock ticks since boot: it tells it from later ones of its pid or name.

    None for what is no process, or one that has ended meanwhile.

    >>> start_ticks(sources.open("self")) is None
    True
    """
    pid = getattr(image, "pid", None)
    if not isinstance(pid, int):
        return None
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def commands() -> list[tuple[int, str]]:
    """(pid, name) of every process, by pid.

    >>> os.getpid() in dict(commands())  # doctest: +SKIP
    True
    """
    found = []
    for entry in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        try:
            with open(f"/proc/{entry}/comm", encoding="utf-8", errors="replace") as file:
                found.append((entry, file.read().rstrip("\n")))
        except OSError:
            continue
    return found

"""A live process of this host: the pages that KSM could take from it."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ksm.errors import SourceError, UnsupportedError, kernel_error
from ksm.sources.image import BLOCK_BYTES, Block, Image, Segment
from ksm.sources.pagemap import Pagemap

# VmFlags of /proc/PID/smaps (Documentation/filesystems/proc.rst) that keep KSM away: shared, may be shared, raw page
# frames, device memory, not to be expanded, hugetlb, mixed, droppable.
_NEVER = frozenset({"sh", "ms", "pf", "io", "de", "ht", "mm", "dp"})
_MARKED = "mg"
_NO_MEMORY = "has no memory of its own: a kernel thread, or it has exited"
_GAP = 64  # absent slots that end a block


@dataclass(frozen=True, slots=True)
class Area:
    """One VMA of a process.

    >>> Area(0x1000, 0x3000, frozenset({"rd", "wr", "mg"}), "[heap]").marked
    True
    """

    start: int
    end: int
    flags: frozenset[str]
    what: str

    @property
    def compatible(self) -> bool:
        """Whether KSM could ever take pages from it.

        >>> Area(0x1000, 0x3000, frozenset({"rd", "de", "io"}), "[vvar]").compatible
        False
        """
        return not self.flags & _NEVER

    @property
    def marked(self) -> bool:
        """Whether it is marked mergeable now.

        >>> Area(0x1000, 0x3000, frozenset({"rd", "wr"}), "").marked
        False
        """
        return _MARKED in self.flags


class ProcessImage(Image):
    """The present, anonymous, private pages of a live process, at their addresses.

    Left out are VMAs that KSM never takes, file pages, swapped pages and, where it can be told
    (`zero_page_known`), the shared zero page that reading untouched memory maps. Private copies in file
    mappings count: they are anonymous. Which pages there are is looked up once, when the image is opened; a page that
    goes away afterwards is reported as not present.

    Args:
        pid: the process, or "self".
        marked_only: only VMAs that are marked mergeable now, by madvise or prctl.

    Raises:
        SourceError: there is no such process, or it has no memory of its own.
        PermissionError: it belongs to somebody else.
        UnsupportedError: this is not Linux.

    >>> with ProcessImage("self") as image:
    ...     image.npages > 0, image.anonymous_known
    (True, True)
    """

    format = "process"

    def __init__(self, pid: int | str, marked_only: bool = False) -> None:
        if sys.platform != "linux":
            raise UnsupportedError("live processes can be read on Linux only")
        if pid != "self" and (isinstance(pid, str) or pid <= 0):
            raise SourceError(f"pid:{pid}: not a process id")
        self.pid = pid
        self.name = "self" if pid == "self" else f"pid:{pid}"
        self.page_size = mmap.PAGESIZE
        self.marked_only = marked_only
        self._mem = self._open("mem")
        try:
            self.pagemap = Pagemap(self._open("pagemap"))
        except BaseException:
            os.close(self._mem)
            raise
        self.zero_page_known = self.pagemap.zero_page_known
        self._closed = False
        try:
            self._survey()
        except BaseException:
            self.close()
            raise

    def _open(self, file: str) -> int:
        try:
            return os.open(f"/proc/{self.pid}/{file}", os.O_RDONLY)
        except OSError as error:
            raise self._explain(error) from None

    def _explain(self, error: OSError) -> Exception:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            if os.path.exists(f"/proc/{self.pid}/stat"):
                return SourceError(f"{self.name}: {_NO_MEMORY}")
            return SourceError(f"{self.name}: no such process")
        if error.errno in (errno.EACCES, errno.EPERM):
            if self._is_zombie():  # whose memory only root may open, to find none
                return SourceError(f"{self.name}: {_NO_MEMORY}")
            return kernel_error(error.errno, f"{self.name}: its memory can be read by its own user or by root")
        return SourceError(f"{self.name}: {error.strerror}")

    def _is_zombie(self) -> bool:
        try:
            with open(f"/proc/{self.pid}/stat", encoding="utf-8", errors="replace") as stat:
                return stat.read().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return False

    def _survey(self) -> None:
        """Find the pages: (address, present flags) of every block to come."""
        try:
            with open(f"/proc/{self.pid}/smaps", encoding="utf-8", errors="replace") as lines:
                areas = list(parse_smaps(lines))
        except OSError as error:
            raise self._explain(error) from None
        if not areas:
            raise SourceError(f"{self.name}: {_NO_MEMORY}")
        self.areas = tuple(areas)
        self._blocks: list[tuple[int, npt.NDArray[np.bool_]]] = []
        counts = dict.fromkeys(("file", "swapped", "zero page", "never mergeable", "not marked"), 0)
        self.npages = self.holes = 0
        segments = []
        for area in self.areas:
            if area.start >= 1 << 63:  # [vsyscall]
                continue
            slots = self.pagemap.slots(area.start, area.end)
            wanted = area.compatible and self._takes(area)
            if not wanted:
                why = "not marked" if area.compatible else "never mergeable"
                counts[why] += int(np.count_nonzero(slots.present))
                continue
            segments.append(Segment(area.start, area.end - area.start, area.what))
            mergeable = slots.mergeable
            counts["file"] += int(np.count_nonzero(slots.file))
            counts["swapped"] += int(np.count_nonzero(slots.swapped))
            counts["zero page"] += int(np.count_nonzero(slots.zero))
            self.holes += int(np.count_nonzero(~slots.present & ~slots.swapped))
            self.npages += int(np.count_nonzero(mergeable))
            for first, last in _runs(mergeable, BLOCK_BYTES // self.page_size):
                self._blocks.append((area.start + first * self.page_size, mergeable[first:last].copy()))
        self.segments = tuple(segments)
        self.excluded = {why: count for why, count in counts.items() if count}
        self.anonymous_known = True

    def _takes(self, area: Area) -> bool:
        """Whether an area that KSM could take pages from is wanted."""
        return area.marked or not self.marked_only

    def blocks(self) -> Iterator[Block]:
        """Read the pages, block by block."""
        for address, wanted in self._blocks:
            if self._closed:
                raise ValueError(f"{self.name}: the image is closed")
            pages = np.zeros((len(wanted), self.page_size), np.uint8)
            present = wanted.copy()
            edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False))
            for first, last in edges.reshape(-1, 2):
                self._read(address, pages, present, int(first), int(last))
            yield address, pages, None if present.all() else present

    def _read(
        self, address: int, pages: npt.NDArray[np.uint8], present: npt.NDArray[np.bool_], first: int, last: int
    ) -> None:
        """Read pages[first:last]; those that have gone lose their flag."""
        at = first
        while at < last:
            try:
                got = os.preadv(self._mem, [pages[at:last].data.cast("B")], address + at * self.page_size)
            except OSError as error:
                if error.errno not in (errno.EIO, errno.EFAULT):
                    raise self._explain(error) from None
                present[at] = False  # unmapped since
                at += 1
                continue
            if got == 0:
                raise SourceError(f"{self.name}: the process ended while it was read")
            at += got // self.page_size

    def close(self) -> None:
        """Close the files of /proc."""
        if not self._closed:
            self._closed = True
            os.close(self._mem)
            self.pagemap.close()

    def __del__(self) -> None:
        if getattr(self, "_closed", True) is False:
            self.close()


def parse_smaps(lines: Iterator[str]) -> Iterator[Area]:
    r"""The VMAs in the text of /proc/PID/smaps.

    >>> text = "1000-3000 rw-p 00000000 00:00 0    [heap]\nRss:  8 kB\nVmFlags: rd wr mg\n"
    >>> [area.what for area in parse_smaps(iter(text.splitlines()))]
    ['[heap]']
    """
    start = end = 0
    what = ""
    for line in lines:
        if line.startswith("VmFlags:"):
            yield Area(start, end, frozenset(line.split()[1:]), what)
        elif "-" in (head := line.partition(" ")[0]) and not head.endswith(":"):
            low, high = head.split("-")
            start, end = int(low, 16), int(high, 16)
            fields = line.split(maxsplit=5)
            what = fields[5].strip() if len(fields) > 5 else ""


def _runs(flags: npt.NDArray[np.bool_], longest: int) -> Iterator[tuple[int, int]]:
    """[first, last) ranges that cover all true flags, begin and end at one, and skip long gaps."""
    there = np.flatnonzero(flags)
    if not len(there):
        return
    breaks = np.flatnonzero(np.diff(there) > _GAP) + 1
    for part in np.split(there, breaks):
        first, last = int(part[0]), int(part[-1]) + 1
        for at in range(first, last, longest):
            yield at, min(last, at + longest)

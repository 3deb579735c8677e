"""/proc/PID/pagemap: which slots of a live process hold a page that KSM could take, and why the others do not."""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ksm.sources.image import Present

# Documentation/admin-guide/mm/pagemap.rst
_PRESENT = np.uint64(1 << 63)
_SWAPPED = np.uint64(1 << 62)
_FILE = np.uint64(1 << 61)  # file page or shared anonymous
_GUARD = np.uint64(1 << 58)  # of a guard region, which also has the swapped bit; since Linux 6.15
_PFN = np.uint64((1 << 55) - 1)

_PAGEMAP_SCAN = 0xC060_6610
_SCAN_ARGUMENT = struct.Struct("=12Q")
_REGION = np.dtype([("start", "u8"), ("end", "u8"), ("categories", "u8")])
_IS_PRESENT = 1 << 3
_IS_ZERO_PAGE = 1 << 5

_SLICE = 1 << 16  # slots looked up at a time


@dataclass(frozen=True, slots=True)
class Slots:
    """What the slots of a range hold, as flags.

    >>> Slots(*(np.array([flag]) for flag in (True, False, False, False))).mergeable
    array([ True])
    """

    present: Present
    swapped: Present
    file: Present
    zero: Present
    """Mapped to the shared zero page; all False where that cannot be known."""

    @property
    def mergeable(self) -> Present:
        """Present, anonymous, and not the shared zero page.

        >>> Slots(*(np.array([flag]) for flag in (True, False, True, False))).mergeable
        array([False])
        """
        return self.present & ~self.file & ~self.zero


class Pagemap:
    """The open pagemap of one process.

    Attributes:
        zero_page_known: whether the shared zero page can be told from a page of zeros: by the PAGEMAP_SCAN ioctl
            (Linux 6.7), or by its frame number, which only root can read.

    >>> import os
    >>> pagemap = Pagemap(os.open("/proc/self/pagemap", os.O_RDONLY))
    >>> pagemap.close()
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._page = mmap.PAGESIZE
        self._scans = _scan_works(fd)
        self._zero_frames = frozenset() if self._scans else zero_page_frames()
        self.zero_page_known = self._scans or bool(self._zero_frames)

    def close(self) -> None:
        """Close the file.

        >>> import os
        >>> Pagemap(os.open("/proc/self/pagemap", os.O_RDONLY)).close()
        """
        os.close(self._fd)

    def slots(self, start: int, end: int) -> Slots:
        """What the slots from address `start` up to `end` hold.

        >>> import os
        >>> area = mmap.mmap(-1, 2 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        >>> area[0] = 1
        >>> address = np.frombuffer(area, np.uint8).ctypes.data
        >>> pagemap = Pagemap(os.open("/proc/self/pagemap", os.O_RDONLY))
        >>> pagemap.slots(address, address + 2 * mmap.PAGESIZE).mergeable
        array([ True, False])
        """
        first, last = start // self._page, end // self._page
        parts = []
        for at in range(first, last, _SLICE):
            raw = os.pread(self._fd, 8 * min(_SLICE, last - at), 8 * at)
            parts.append(np.frombuffer(raw, np.uint64, len(raw) // 8))
            if len(raw) < 8 * min(_SLICE, last - at):
                break  # the address space has gone
        entries = np.zeros(last - first, np.uint64)
        known = np.concatenate(parts) if parts else entries[:0]
        entries[: len(known)] = known
        present = (entries & _PRESENT) != 0
        zero = np.zeros(len(entries), np.bool_)
        if self._scans:
            if present.any():
                self._scan_zero(start, end, zero)
        elif self._zero_frames:
            zero = present & np.isin(entries & _PFN, np.fromiter(self._zero_frames, np.uint64))
        file = present & ((entries & _FILE) != 0) & ~zero
        return Slots(present, (entries & (_SWAPPED | _GUARD)) == _SWAPPED, file, zero)

    def _scan_zero(self, start: int, end: int, zero: Present) -> None:
        found = np.empty(512, _REGION)
        at = start
        while at < end:
            count, at = _scan(self._fd, at, end, _IS_ZERO_PAGE | _IS_PRESENT, found)
            for region in found[:count]:
                zero[(int(region["start"]) - start) // self._page : (int(region["end"]) - start) // self._page] = True


def _scan(fd: int, start: int, end: int, mask: int, found: npt.NDArray[np.void]) -> tuple[int, int]:
    """One PAGEMAP_SCAN for regions with all of `mask`: how many were found, and where the walk ended."""
    argument = bytearray(
        _SCAN_ARGUMENT.pack(_SCAN_ARGUMENT.size, 0, start, end, 0, found.ctypes.data, len(found), 0, 0, mask, 0, mask)
    )
    count = fcntl.ioctl(fd, _PAGEMAP_SCAN, argument)
    return count, max(start + mmap.PAGESIZE, _SCAN_ARGUMENT.unpack(argument)[4])


def _scan_works(fd: int) -> bool:
    try:
        _scan(fd, 0, mmap.PAGESIZE, _IS_ZERO_PAGE | _IS_PRESENT, np.empty(1, _REGION))
    except OSError:
        return False
    return True


@functools.cache
def zero_page_frames() -> frozenset[int]:
    """Frame numbers of the shared zero page (some machines have several); empty without the right to see them.

    >>> isinstance(zero_page_frames(), frozenset)
    True
    """
    pages = 64
    area = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        if hasattr(area, "madvise") and hasattr(mmap, "MADV_NOHUGEPAGE"):
            area.madvise(mmap.MADV_NOHUGEPAGE)
        for page in range(pages):
            area[page * mmap.PAGESIZE]  # reading maps the zero page
        view = np.frombuffer(area, np.uint8)
        address = view.ctypes.data
        del view
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(address // mmap.PAGESIZE * 8)
            entries = np.frombuffer(pagemap.read(8 * pages), np.uint64)
    except OSError:
        return frozenset()
    finally:
        area.close()
    frames = {int(entry & _PFN) for entry in entries if entry & _PRESENT}
    return frozenset(frames - {0})

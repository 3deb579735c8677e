"""Raw images: page n at n * page size; holes of a sparse file are pages that were never touched."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import stat
from collections.abc import Iterator

import numpy as np

from ksm.errors import SourceError
from ksm.sources.image import Block, Image, Segment

# Mapped at a time: enough that starting the hashing threads does not show. Pages are faulted in by these threads:
# populating them beforehand (MAP_POPULATE) took 20 to 60 % longer, and all of it in one thread.
_BLOCK_BYTES = 128 << 20
_GAP = 16  # pages of a hole that do not end a block


class RawImage(Image):
    """A file of pages: QEMU pmemsave, Firecracker memory files, VMware .vmem, memory-backing files.

    The file is mapped block by block, never read as a whole, and must not shrink meanwhile. A file with holes tells
    never-touched pages from zeroed ones (`anonymous_known`); one without does not.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as f:
    ...     _ = f.write(bytes(8192)); f.flush()
    ...     RawImage(f.name).npages
    2
    """

    def __init__(self, path: str | os.PathLike[str], page_size: int = 4096) -> None:
        self.path = os.fspath(path)
        self.name = self.path
        self.page_size = page_size
        if page_size <= 0 or page_size & (page_size - 1):
            raise ValueError(f"page_size is {page_size}; it must be a power of two")
        self._fd = open_regular(self.path)
        try:
            self._size = os.fstat(self._fd).st_size
            if self._size == 0:
                raise SourceError(f"{self.path}: the file is empty")
            if self._size % page_size:
                raise SourceError(
                    f"{self.path}: ends at offset {self._size} inside a page of {page_size} bytes, "
                    f"{self._size % page_size} bytes after the last whole one: truncated, or not a raw image"
                )
            self._extents = _data_extents(self._fd, self._size, page_size)
        except BaseException:
            self.close()
            raise
        self.segments = (Segment(0, self._size),)
        self.npages = sum(end - start for start, end in self._extents) // page_size
        self.holes = self._size // page_size - self.npages
        self.anonymous_known = self.holes > 0

    def blocks(self) -> Iterator[Block]:
        """The file's data, mapped; long holes are between the blocks, pages of short ones are not present."""
        step, gap = max(_BLOCK_BYTES, self.page_size), _GAP * self.page_size
        waiting: list[tuple[int, int]] = []  # data of the block to come
        for start, end in self._extents:
            for at in range(start, end, step):
                part = (at, min(end, at + step))
                if waiting and (part[0] - waiting[-1][1] > gap or part[1] - waiting[0][0] > step):
                    yield self._block(waiting)
                    waiting = []
                waiting.append(part)
        if waiting:
            yield self._block(waiting)

    def _block(self, parts: list[tuple[int, int]]) -> Block:
        start, end, size = parts[0][0], parts[-1][1], self.page_size
        pages = self._map(start, end - start).reshape(-1, size)
        if all(before[1] == after[0] for before, after in itertools.pairwise(parts)):
            return start, pages, None
        present = np.zeros(len(pages), np.bool_)
        for first, last in parts:
            present[(first - start) // size : (last - start) // size] = True
        return start, pages, present

    def _map(self, offset: int, length: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        if self._fd < 0:
            raise ValueError(f"{self.path}: the image is closed")
        if os.fstat(self._fd).st_size < offset + length:
            raise SourceError(f"{self.path}: shrank below offset {offset + length} while it was read")
        lead = offset % mmap.ALLOCATIONGRANULARITY
        try:
            if hasattr(mmap, "MAP_PRIVATE"):
                area = mmap.mmap(
                    self._fd,
                    length + lead,
                    flags=mmap.MAP_PRIVATE,
                    prot=mmap.PROT_READ,
                    offset=offset - lead,
                )
            else:
                area = mmap.mmap(self._fd, length + lead, access=mmap.ACCESS_READ, offset=offset - lead)
        except OSError as error:
            raise SourceError(f"{self.path}: cannot map offset {offset}: {error.strerror}") from None
        return np.frombuffer(area, np.uint8, length, lead)

    def close(self) -> None:
        """Close the file; blocks handed out stay mapped as long as they are used."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


def open_regular(path: str) -> int:
    """Open a regular file for reading; `SourceError` in one line for anything else.

    >>> open_regular("/")
    Traceback (most recent call last):
    ksm.errors.SourceError: /: a directory; an image must be a regular file
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise SourceError(f"{path!r}: {error}") from None
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    kind = (
        "a directory"
        if stat.S_ISDIR(mode)
        else "a device"
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
        else "a pipe"
        if stat.S_ISFIFO(mode)
        else "not a regular file"
    )
    raise SourceError(f"{path}: {kind}; an image must be a regular file")


def _data_extents(fd: int, size: int, page_size: int) -> list[tuple[int, int]]:
    """[start, end) of the data in a file, in whole pages: a page with any data in it counts as data."""
    if not hasattr(os, "SEEK_DATA"):
        return [(0, size)]
    extents: list[tuple[int, int]] = []
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                break
            return [(0, size)]  # a file system that cannot tell
        start -= start % page_size
        end = min(size, end + -end % page_size)
        if extents and start <= extents[-1][1]:
            extents[-1] = (extents[-1][0], end)
        else:
            extents.append((start, end))
        at = end
    return extents

"""The bytes of a file, by offset: what every reader of a format reads through, and where its bounds are checked."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ksm.errors import SourceError

Bytes: TypeAlias = npt.NDArray[np.uint8]
Offsets: TypeAlias = npt.NDArray[np.int64]

_MAP_FROM = 1 << 18  # shorter pieces are read: mapping costs more than copying them
_TOGETHER = 1 << 20  # pieces no further apart than this are read at once
_AT_ONCE = 64 << 20


class Data(ABC):
    """Bytes by offset. Nothing is read beyond the end, and nothing is allocated before it is known to be there.

    Attributes:
        name: for messages.
        ordered: whether reading at lower offsets than before is costly, as in a compressed stream.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as f:
    ...     _ = f.write(b"abcdef"); f.flush()
    ...     data = FileData(f.name)
    ...     data.read(1, 3, "letters")
    b'bcd'
    """

    name: str
    ordered: bool = False

    @abstractmethod
    def has(self, offset: int, length: int) -> bool:
        """Whether `length` bytes at `offset` are there."""

    @abstractmethod
    def head(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`, fewer at the end; for what is small."""

    @abstractmethod
    def view(self, offset: int, length: int) -> Bytes:
        """`length` bytes at `offset`, mapped if that pays; read-only or a copy. `SourceError` if they are not there."""

    @abstractmethod
    def size(self) -> int:
        """How many bytes there are; a compressed stream is read to its end for it."""

    def extents(self) -> list[tuple[int, int]] | None:
        """[start, end) of the bytes outside holes, ascending; None: no holes, or nobody can tell."""
        return None

    def in_any_order(self) -> Data:
        """These bytes so that going back costs nothing. What it is called on must not be used any more."""
        return self

    def close(self) -> None:  # noqa: B027 - some hold nothing open
        """Let go of the file; views handed out stay valid."""

    def read(self, offset: int, length: int, what: str) -> bytes:
        """Exactly `length` bytes; `what` they are is for the message if they are not there."""
        found = self.head(offset, length) if offset >= 0 and length >= 0 else b""
        if len(found) != length:
            raise self.error(offset, f"{what} is cut off: {length} bytes are needed, {len(found)} are there")
        return found

    def need(self, offset: int, length: int, what: str) -> None:
        """Raise `SourceError` unless `length` bytes are there."""
        if offset < 0 or length < 0 or not self.has(offset, length):
            raise self.error(offset, f"{what} of {length} bytes goes beyond the end of the file")

    def error(self, offset: int, message: str) -> SourceError:
        """What to raise about the byte at `offset`.

        >>> import os
        >>> FileData(os.__file__).error(16, "no magic").args[0].rpartition("os.py: ")[2]
        'offset 0x10: no magic'
        """
        return SourceError(f"{self.name}: offset {offset:#x}: {message}")

    def gather(self, offsets: Offsets, length: int) -> Bytes:
        """(n, length): the pieces of `length` bytes at each offset, in the order given. O(n log n + bytes)."""
        found = np.empty((len(offsets), length), np.uint8)
        for which, start, end in together(offsets, np.full(len(offsets), length, np.int64)):
            view = self.view(start, end - start)
            found[which] = np.lib.stride_tricks.sliding_window_view(view, length)[offsets[which] - start]
        return found


def together(offsets: Offsets, lengths: Offsets) -> Iterator[tuple[npt.NDArray[np.intp], int, int]]:
    """Pieces that lie close to each other: (their indexes by ascending offset, start, end) of each group.

    >>> [(which.tolist(), start, end) for which, start, end in together(np.array([90, 10, 1 << 30]), np.array([5] * 3))]
    [([1, 0], 10, 95), ([2], 1073741824, 1073741829)]
    """
    order = np.argsort(offsets, kind="stable")
    begin, ends = offsets[order], offsets[order] + lengths[order]
    first = 0
    breaks = np.flatnonzero(begin[1:] - ends[:-1] > _TOGETHER) + 1
    for last in [*breaks.tolist(), len(order)]:
        while first < last:
            stop = max(first + 1, int(np.searchsorted(begin[:last], begin[first] + _AT_ONCE)))
            yield order[first:stop], int(begin[first]), int(ends[first:stop].max())
            first = stop


class FileData(Data):
    """A regular file; a part of it from `start` on, if wanted. It must not shrink meanwhile.

    >>> import os
    >>> with open(os.__file__, "rb") as f:
    ...     FileData(os.__file__).head(0, 10) == f.read(10)
    True
    """

    def __init__(self, path: str, start: int = 0, fd: int | None = None) -> None:
        self.name = path
        self._start = start
        self._fd = open_regular(path) if fd is None else fd
        self._size = os.fstat(self._fd).st_size

    def has(self, offset: int, length: int) -> bool:
        return offset + length <= self.size()

    def size(self) -> int:
        return max(0, self._size - self._start)

    def head(self, offset: int, length: int) -> bytes:
        self._check_open()
        wanted = min(length, self.size() - offset)
        return os.pread(self._fd, wanted, self._start + offset) if wanted > 0 else b""

    def view(self, offset: int, length: int) -> Bytes:
        self._check_open()
        self.need(offset, length, "a piece")
        offset += self._start
        small = os.pread(self._fd, length, offset) if length < _MAP_FROM else None
        if os.fstat(self._fd).st_size < offset + length or (small is not None and len(small) < length):
            raise SourceError(f"{self.name}: shrank below offset {offset + length} while it was read")
        if small is not None:
            return np.frombuffer(small, np.uint8)
        lead = offset % mmap.ALLOCATIONGRANULARITY
        options: dict[str, int] = (
            {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ}
            if hasattr(mmap, "MAP_PRIVATE")
            else {"access": mmap.ACCESS_READ}
        )
        try:
            area = mmap.mmap(self._fd, length + lead, offset=offset - lead, **options)
        except OSError as error:
            raise SourceError(f"{self.name}: cannot map offset {offset}: {error.strerror}") from None
        return np.frombuffer(area, np.uint8, length, lead)

    def extents(self) -> list[tuple[int, int]] | None:
        self._check_open()
        if not hasattr(os, "SEEK_DATA"):
            return None
        found: list[tuple[int, int]] = []
        at = self._start
        while at < self._size:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
                at = os.lseek(self._fd, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole is left
                    break
                return None  # a file system that cannot tell
            found.append((start - self._start, at - self._start))
        return None if found == [(0, self.size())] else found

    def rest(self, start: int) -> FileData:
        """The same file from `start` on, open on its own."""
        self._check_open()
        return FileData(self.name, self._start + start, os.dup(self._fd))

    def fileno(self) -> int:
        """The open file's descriptor."""
        self._check_open()
        return self._fd

    def _check_open(self) -> None:
        if self._fd < 0:
            raise ValueError(f"{self.name}: the image is closed")

    def close(self) -> None:
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

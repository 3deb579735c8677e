"""Compressed files (.gz, .bz2, .xz, .zst) as a stream of what they hold, or unpacked to a file without a name."""

from __future__ import annotations

import bz2
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from ksm.errors import SourceError
from ksm.sources.data import Bytes, Data, FileData
from ksm.sources.extras import load

_INPUT = 1 << 18
_OUTPUT = 1 << 20
_MOST_WINDOW = 256 << 20  # what a decompressor may take: a file can ask for gigabytes
_SIGNATURE = 8  # bytes that tell whether another member follows


class Decompressor(Protocol):
    """What the standard library's decompressors of one stream have in common.

    >>> bz2.BZ2Decompressor().needs_input
    True
    """

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Some output, at most max_length bytes."""


class _Gzip:
    """zlib's decompressor with the interface of the others."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.eof = False
        self.needs_input = True
        self.unused_data = b""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        found = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.eof = self._inner.eof
        self.needs_input = len(found) < max_length and not self._inner.unconsumed_tail
        self.unused_data = self._inner.unused_data
        return found


def _zstd() -> Any:
    module = load("zstd")
    options = {module.DecompressionParameter.window_log_max: _MOST_WINDOW.bit_length() - 1}
    return module.ZstdDecompressor(options=options)


class Compression(NamedTuple):
    """A way of compressing: its name, the bytes it begins with, and how it is undone.

    >>> COMPRESSIONS["gzip"].signature
    b'\\x1f\\x8b\\x08'
    """

    name: str
    signature: bytes
    decompressor: Callable[[], Any]


COMPRESSIONS: Mapping[str, Compression] = MappingProxyType(
    {
        "gzip": Compression("gzip", b"\x1f\x8b\x08", _Gzip),
        "bzip2": Compression("bzip2", b"BZh", bz2.BZ2Decompressor),
        "xz": Compression("xz", b"\xfd7zXZ\0", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MOST_WINDOW)),
        "zstd": Compression("zstd", b"\x28\xb5\x2f\xfd", _zstd),
    }
)


def compression_of(head: bytes) -> Compression | None:
    """How a file that begins so is compressed, if it is.

    >>> compression_of(b"\\x1f\\x8b\\x08\\0").name, compression_of(b"page")
    ('gzip', None)
    """
    for compression in COMPRESSIONS.values():
        if head.startswith(compression.signature):
            return compression
    if head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F:  # a zstd file may begin with a skippable frame
        return COMPRESSIONS["zstd"]
    return None


class _Unpacker:
    """What a compressed file holds, from its start to its end, one member after another."""

    def __init__(self, packed: FileData, compression: Compression) -> None:
        self._packed = packed
        self._compression = compression
        self._inner: Decompressor | None = compression.decompressor()
        self._at = 0  # in the packed file
        self._input = b""

    def read(self, length: int) -> bytes:
        """Up to `length` bytes; none only at the end."""
        while self._inner is not None:
            if self._inner.needs_input and not self._input:
                self._input = self._packed.head(self._at, _INPUT)
                self._at += len(self._input)
                if not self._input:
                    raise self._packed.error(self._at, f"the {self._compression.name} data are cut off")
            data, self._input = self._input, b""
            try:
                found = self._inner.decompress(data, length)
            except Exception as error:  # each library has its own, and a hostile file may find any of them
                raise self._packed.error(self._at, f"broken {self._compression.name} data: {error}") from None
            if self._inner.eof:
                self._next_member(self._inner.unused_data)
            if found:
                return found
        return b""

    def _next_member(self, rest: bytes) -> None:
        """After a member: padding, another one, or the end."""
        rest = rest.lstrip(b"\0")
        while len(rest) < _SIGNATURE:
            more = self._packed.head(self._at, _INPUT)
            self._at += len(more)
            rest = (rest + more).lstrip(b"\0")
            if not more:
                break
        if not rest:
            self._inner = None
            return
        if compression_of(rest) is not self._compression:
            at = self._at - len(rest)
            raise self._packed.error(at, f"what follows the {self._compression.name} data is something else")
        self._inner = self._compression.decompressor()
        self._input = rest


class StreamData(Data):
    """What a compressed file holds, unpacked as it is read; going back means starting again.

    >>> import gzip, tempfile
    >>> with tempfile.NamedTemporaryFile() as f:
    ...     _ = f.write(gzip.compress(b"abcdef")); f.flush()
    ...     data = StreamData(FileData(f.name), COMPRESSIONS["gzip"])
    ...     data.read(1, 3, "letters"), data.size()
    (b'bcd', 6)
    """

    ordered = True

    def __init__(self, packed: FileData, compression: Compression) -> None:
        self.name = packed.name
        self.compression = compression
        self._packed = packed
        self._size: int | None = None
        self._start = b""  # the first bytes, which everybody wants to see
        self._restart()
        self._start = self.head(0, _INPUT)

    def _restart(self) -> None:
        self._unpacker = _Unpacker(self._packed, self.compression)
        self._at = 0
        self._ahead = b""  # unpacked, from self._at on

    def _seek(self, offset: int) -> bool:
        """Go to `offset`; False if the data end before it."""
        if offset < self._at:
            self._restart()
        while self._at + len(self._ahead) < offset:
            self._at += len(self._ahead)
            self._ahead = self._unpacker.read(_OUTPUT)
            if not self._ahead:
                self._size = self._at
                return False
        self._ahead = self._ahead[offset - self._at :]
        self._at = offset
        return True

    def has(self, offset: int, length: int) -> bool:
        end = offset + length
        if self._size is None and (end < self._at or self._seek(end)):
            return True
        return self._size is None or end <= self._size

    def size(self) -> int:
        if self._size is None:
            self._seek(1 << 62)
        assert self._size is not None
        return self._size

    def head(self, offset: int, length: int) -> bytes:
        if offset + length <= len(self._start):
            return self._start[offset : offset + length]
        if not self._seek(offset):
            return b""
        while len(self._ahead) < length:
            more = self._unpacker.read(_OUTPUT)
            if not more:
                break
            self._ahead += more
        return self._ahead[:length]

    def view(self, offset: int, length: int) -> Bytes:
        found = np.empty(length, np.uint8)
        if not self._seek(offset):
            raise self.error(offset, "the unpacked data end before it")
        done = 0
        while done < length:
            part = self._ahead[: length - done] or self._unpacker.read(min(_OUTPUT, length - done))
            if not part:
                raise self.error(offset + done, "the unpacked data end here")
            found[done : done + len(part)] = np.frombuffer(part, np.uint8)
            self._ahead = self._ahead[len(part) :]
            done += len(part)
        self._at = offset + length
        return found

    def in_any_order(self) -> FileData:
        """All of it in a temporary file, for formats that are not read from start to end."""
        try:
            with tempfile.TemporaryFile(prefix="ksm-") as file:
                self._restart()
                while part := self._unpacker.read(_OUTPUT):
                    file.write(part)
                file.flush()
                return FileData(self.name, 0, os.dup(file.fileno()))
        except OSError as error:
            where = tempfile.gettempdir()
            raise SourceError(f"{self.name}: unpacking it into {where} (TMPDIR): {error.strerror}") from None
        finally:
            self.close()

    def close(self) -> None:
        self._packed.close()

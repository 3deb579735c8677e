"""LiME and AVML dumps: ranges of physical memory, each behind a header of 32 bytes; AVML's version 2 is compressed."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ksm.sources.data import Data
from ksm.sources.extras import load
from ksm.sources.image import BLOCK_BYTES, Block, Image, Segment
from ksm.sources.stored import Extent, StoredImage, check_page_size

LIME = b"EMiL"
AVML = b"AVML"

_HEADER = struct.Struct("<4sIQQ8x")
_TRAILER = struct.Struct("<Q")
_HIGH = 1 << 63


def _next_range(data: Data, at: int, signature: bytes, version: int) -> tuple[int, int] | None:
    """(address, length) of the range whose header is at `at`; None at the end of the file."""
    head = data.head(at, _HEADER.size)
    if not head and at > 0:
        return None
    if len(head) < _HEADER.size:
        raise data.error(at, f"a range's header is cut off: {_HEADER.size} bytes are needed, {len(head)} are there")
    magic, number, start, last = _HEADER.unpack(head)
    if magic != signature or number != version:
        raise data.error(at, f"no header of a range ({signature.decode()}, version {version}), but {head[:8].hex()}")
    if last < start or last >= _HIGH:
        raise data.error(at, f"a range from {start:#x} to {last:#x} cannot be")
    return start, last + 1 - start


class LimeImage(StoredImage):
    """A LiME dump, or what AVML writes without compression.

    Raises:
        SourceError: a header is broken or a range goes beyond the file; names the offset.

    >>> LimeImage.format
    'LiME'
    """

    format = "LiME"

    def __init__(self, data: Data, page_size: int = 4096) -> None:
        extents = []
        at = 0
        while found := _next_range(data, at, LIME, 1):
            address, length = found
            at += _HEADER.size
            data.need(at, length, f"the range of address {address:#x}")
            extents.append(Extent(address, at, length))
            at += length
        super().__init__([data], extents, page_size)


# The snappy framing format: chunks of a type, a length of 3 bytes, and that many bytes; https://github.com/google/snappy
_STREAM = b"\xff\x06\x00\x00sNaPpY"
_COMPRESSED, _PLAIN, _SKIPPABLE, _IDENTIFIER = 0x00, 0x01, 0x80, 0xFF
_MOST_IN_CHUNK = 65536
_CHECKSUM = 4


@dataclass(slots=True)
class _Range:
    """One range of an AVML dump: where its chunks are, and how many bytes each holds."""

    address: int
    length: int
    offsets: array[int] = field(default_factory=lambda: array("q"))
    """Of the chunks' headers, and at the end of the last one's end."""
    holds: array[int] = field(default_factory=lambda: array("q"))


class AvmlImage(Image):
    """What AVML writes with --compress: ranges of memory in the snappy framing format. Needs cramjam.

    When it is opened only the chunks' headers are read. Every chunk's checksum is verified when its pages are.

    Raises:
        SourceError: a header is broken or something goes beyond the file; names the offset.

    >>> AvmlImage.format
    'AVML, compressed'
    """

    format = "AVML, compressed"

    def __init__(self, data: Data, page_size: int = 4096) -> None:
        check_page_size(page_size)
        self._snappy: Any = load("snappy").snappy
        self.name = data.name
        self.page_size = page_size
        self._ranges = list(_indexed(data))
        if any(one.address > other.address for one, other in zip(self._ranges, self._ranges[1:], strict=False)):
            data = data.in_any_order()
            self._ranges.sort(key=lambda range: range.address)
        self._data = data
        end = 0
        for range in self._ranges:
            if range.address % page_size or range.length % page_size:
                raise data.error(range.offsets[0], f"{range.length} bytes at {range.address:#x}: parts of a page")
            if range.address < end:
                raise data.error(range.offsets[0], f"the range at {range.address:#x} overlaps another")
            end = range.address + range.length
        self.segments = tuple(Segment(range.address, range.length) for range in self._ranges)
        self.npages = sum(range.length for range in self._ranges) // page_size

    def blocks(self) -> Iterator[Block]:
        """The ranges' pages, unpacked some chunks at a time."""
        for range in self._ranges:
            address, first, rest = range.address, 0, np.empty(0, np.uint8)
            while first < len(range.holds):
                last, size = first, len(rest)
                while last < len(range.holds) and (last == first or size + range.holds[last] <= BLOCK_BYTES):
                    size += range.holds[last]
                    last += 1
                found = np.empty(size, np.uint8)
                found[: len(rest)] = rest
                self._unpack(range, first, last, found[len(rest) :])
                whole = size - size % self.page_size
                if whole:
                    yield address, found[:whole].reshape(-1, self.page_size), None
                address, first, rest = address + whole, last, found[whole:]

    def _unpack(self, range: _Range, first: int, last: int, found: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        start, end = range.offsets[first], range.offsets[last]
        packed = np.concatenate([np.frombuffer(_STREAM, np.uint8), self._data.view(start, end - start)])
        try:
            count = self._snappy.decompress_into(packed, found) if len(found) else 0
        except Exception as error:  # of the library's own kind
            raise self._data.error(start, f"broken snappy data: {error}") from None
        if count != len(found):
            raise self._data.error(start, f"snappy data of {count} bytes, not {len(found)} as their headers say")

    def close(self) -> None:
        """Close the file."""
        self._data.close()


def _indexed(data: Data) -> Iterator[_Range]:
    at = 0
    while found := _next_range(data, at, AVML, 2):
        range = _Range(*found)
        start = at + _HEADER.size
        end = _index(data, start, range)
        (told,) = _TRAILER.unpack(data.read(end, _TRAILER.size, "the length after a range"))
        if told != end - start:
            raise data.error(end, f"the range before it takes {end - start} bytes, and not {told}")
        yield range
        at = end + _TRAILER.size


def _index(data: Data, at: int, range: _Range) -> int:
    """Find the chunks of a range; the offset where they end."""
    left = range.length
    while left > 0:
        head = data.read(at, 4, "a snappy chunk")
        kind, size = head[0], int.from_bytes(head[1:], "little")
        data.need(at + 4, size, "a snappy chunk")
        if kind in (_COMPRESSED, _PLAIN):
            if size < _CHECKSUM:
                raise data.error(at, f"a snappy chunk of {size} bytes")
            holds = size - _CHECKSUM if kind == _PLAIN else _varint(data, at + 4 + _CHECKSUM, at + 4 + size)
            if holds > min(left, _MOST_IN_CHUNK):
                raise data.error(at, f"a snappy chunk of {holds} bytes, where {left} of the range are left")
            left -= holds
        elif kind == _IDENTIFIER or kind >= _SKIPPABLE:
            holds = 0
        else:
            raise data.error(at, f"a snappy chunk of the unknown type {kind:#x}")
        range.offsets.append(at)
        range.holds.append(holds)
        at += 4 + size
    range.offsets.append(at)
    return at


def _varint(data: Data, start: int, end: int) -> int:
    """The length that compressed data begin with."""
    value = 0
    for index, byte in enumerate(data.head(start, min(5, end - start))):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value
    raise data.error(start, "snappy data without their length")

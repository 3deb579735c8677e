"""kdump-compressed dumps: a bitmap of the pages that are there, and each page compressed on its own."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ksm.sources.data import Data, together
from ksm.sources.extras import load
from ksm.sources.image import BLOCK_BYTES, Block, Image, Numbers, Segment, spans

SIGNATURE = b"KDUMP   "

# Little-endian, 64 bits: status, block_size, sub_hdr_size, bitmap_blocks, max_mapnr
_VERSION = struct.Struct("<8sI")
_HEADER = struct.Struct("<424x5I")
_SUB_HEADER = struct.Struct(
    "<8xiiQQ48x3Q"
)  # dump_level, split, start_pfn, end_pfn; the last two and max_mapnr in 64 bits
_WIDE = 6  # the version since which page numbers have 64 bits
_INCOMPLETE = 8

_DESCRIPTOR = np.dtype([("offset", "<i8"), ("size", "<u4"), ("flags", "<u4"), ("page_flags", "<u8")])
_ZLIB, _LZO, _SNAPPY, _ZSTD = 1, 2, 4, 32
_COMPRESSED = _ZLIB | _LZO | _SNAPPY | _ZSTD

_BITMAP_STEP = 1 << 16
_MOST_SEGMENTS = 4096

Descriptors = npt.NDArray[np.void]


class _Header(NamedTuple):
    block_size: int
    bitmap: int
    half: int
    """Bytes of each of the two bitmaps."""
    descriptors: int
    first: int
    end: int
    """The page numbers that this file has: all, or its part of a split dump."""


class KdumpImage(Image):
    """A kdump-compressed dump: zlib, LZO, snappy and zstd pages, and plain ones.

    What the writer filtered out (makedumpfile -d) is counted in `excluded`. Addresses are physical.

    Raises:
        SourceError: something in it is broken or goes beyond the file; names the offset.
        UnsupportedError: the package for its compression is not installed.

    >>> KdumpImage.format
    'kdump-compressed'
    """

    format = "kdump-compressed"

    def __init__(self, data: Data, page_size: int = 4096) -> None:
        data = data.in_any_order()
        self._data = data
        self.name = data.name
        header = _header(data)
        self.page_size = header.block_size
        self._descriptors = header.descriptors
        self._numbers, self.segments, filtered = _pages(data, header)
        self.npages = len(self._numbers)
        self.excluded = {"filtered out": filtered} if filtered else {}
        self._unpackers: dict[int, Callable[[memoryview], Any]] = {}

    def blocks(self) -> Iterator[Block]:
        """The pages, unpacked block by block."""
        for first, last in spans(self._numbers, BLOCK_BYTES // self.page_size):
            numbers = self._numbers[first:last]
            where = self._descriptors + first * _DESCRIPTOR.itemsize
            descriptors = self._data.view(where, (last - first) * _DESCRIPTOR.itemsize).view(_DESCRIPTOR)
            rows = numbers - numbers[0]
            pages = self._unpack(descriptors, where)
            present = None
            if rows[-1] + 1 != len(rows):
                spread = np.zeros((int(rows[-1]) + 1, self.page_size), np.uint8)
                spread[rows] = pages
                pages, present = spread, np.zeros(len(spread), np.bool_)
                present[rows] = True
            yield int(numbers[0]) * self.page_size, pages, present

    def _unpack(self, descriptors: Descriptors, where: int) -> npt.NDArray[np.uint8]:
        """The pages that descriptors tell of; zero pages, and whatever shares its stored page, are unpacked once."""
        found, first, inverse = np.unique(descriptors["offset"], return_index=True, return_inverse=True)
        chosen = descriptors[first]
        sizes, flags = chosen["size"].astype(np.int64), chosen["flags"] & _COMPRESSED
        wrong = (sizes == 0) | (sizes > self.page_size) | ((flags == 0) & (sizes != self.page_size)) | (found < 0)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise self._data.error(
                where + int(first[at]) * _DESCRIPTOR.itemsize,
                f"a page of {sizes[at]} bytes at {found[at]:#x}, flags {chosen['flags'][at]:#x}, cannot be",
            )
        pages = np.empty((len(found), self.page_size), np.uint8)
        plain = np.flatnonzero(flags == 0)
        if len(plain):
            pages[plain] = self._data.gather(found[plain], self.page_size)
        packed = np.flatnonzero(flags)
        for which, start, end in together(found[packed], sizes[packed]):
            view = self._data.view(start, end - start).data
            for index in packed[which].tolist():
                offset = int(found[index])
                part = view[offset - start : offset - start + int(sizes[index])]
                pages[index] = self._page(int(flags[index]), part, offset)
        return pages if len(pages) == len(descriptors) and (first[:-1] < first[1:]).all() else pages[inverse]

    def _page(self, flags: int, packed: memoryview, offset: int) -> npt.NDArray[np.uint8]:
        unpack = self._unpackers.get(flags)
        if unpack is None:
            unpack = self._unpackers[flags] = _unpacker(flags, self.page_size)
            if unpack is None:
                raise self._data.error(offset, f"a page compressed in an unknown way, flags {flags:#x}")
        try:
            page = np.frombuffer(unpack(packed), np.uint8)
        except Exception as error:  # each library has its own, and a hostile file may find any of them
            raise self._data.error(offset, f"a broken page: {error}") from None
        if len(page) != self.page_size:
            raise self._data.error(offset, f"a page of {len(page)} bytes; pages have {self.page_size}")
        return page

    def close(self) -> None:
        """Close the file."""
        self._data.close()


def _unpacker(flags: int, page_size: int) -> Any:
    """What unpacks a page; never much more than a page comes out, whatever the input claims."""
    if flags == _ZLIB:  # at most 1,032 times the input, which is no larger than a page
        return lambda packed: zlib.decompress(packed, bufsize=page_size)
    if flags == _LZO:  # at most 255 times
        lzo = load("lzo").LZOCompressor
        return lambda packed: lzo.decompress(bytes(packed), output_size_hint=page_size)
    if flags == _SNAPPY:
        snappy = load("snappy").snappy

        def unpack(packed: memoryview) -> Any:
            length = snappy.decompress_raw_len(packed)
            if length != page_size:
                raise ValueError(f"it claims {length} bytes")
            return snappy.decompress_raw(packed)

        return unpack
    if flags == _ZSTD:
        zstd = load("zstd")
        return lambda packed: zstd.ZstdDecompressor().decompress(packed, max_length=page_size + 1)
    return None


def _header(data: Data) -> _Header:
    """What the header and the sub-header say, as far as it is needed."""
    _, version = _VERSION.unpack(data.read(0, _VERSION.size, "the kdump header"))
    status, block, sub_blocks, bitmap_blocks, max_mapnr = _HEADER.unpack(data.read(0, _HEADER.size, "the kdump header"))
    if block & (block - 1) or not 512 <= block <= 1 << 20:
        raise data.error(428, f"blocks of {block} bytes; a dump of another architecture?")
    if status & _INCOMPLETE:
        raise data.error(424, "an incomplete dump: the disk was full when it was written")
    _, split, start, end, start64, end64, mapnr64 = _SUB_HEADER.unpack(
        data.read(block, _SUB_HEADER.size, "the kdump sub-header")
    )
    if version >= _WIDE:
        max_mapnr, start, end = mapnr64, start64, end64
    bitmap = block * (1 + sub_blocks)
    data.need(bitmap, bitmap_blocks * block, "the bitmaps")
    half = bitmap_blocks * block // 2
    if max_mapnr > half * 8:
        raise data.error(bitmap, f"bitmaps of {half * 8} pages each, for {max_mapnr} pages of memory")
    first, last = (start, min(end, max_mapnr)) if split else (0, max_mapnr)
    return _Header(block, bitmap, half, bitmap + bitmap_blocks * block, first, last)


def _pages(data: Data, header: _Header) -> tuple[Numbers, tuple[Segment, ...], int]:
    """The numbers of the pages in the file, the memory there was, and how many of its pages were filtered out."""
    found: list[Numbers] = []
    edges: list[Numbers] = []
    count = filtered = 0
    known = data.extents()
    for at in range(header.first // 8, -(-header.end // 8), _BITMAP_STEP):
        length = min(_BITMAP_STEP, -(-header.end // 8) - at)
        if known is not None and not any(
            start < header.bitmap + at + half + length and header.bitmap + at + half < end
            for start, end in known
            for half in (0, header.half)
        ):
            continue  # a hole in both
        bits = np.arange(at * 8, (at + length) * 8, dtype=np.int64)
        here = (bits >= header.first) & (bits < header.end)
        memory = _bits(data, header.bitmap + at, length) & here
        dumped = _bits(data, header.bitmap + header.half + at, length) & here
        count += int(np.count_nonzero(dumped))
        data.need(header.descriptors, count * _DESCRIPTOR.itemsize, f"the descriptors of {count} pages or more")
        filtered += int(np.count_nonzero(memory & ~dumped))
        found.append(bits[dumped])
        edges.append(bits[np.flatnonzero(np.diff(memory | dumped, prepend=False))])
        if (memory | dumped)[-1]:
            edges.append(np.array([bits[-1] + 1], np.int64))
    numbers = np.concatenate(found) if found else np.empty(0, np.int64)
    return numbers, _segments(edges, header.block_size), filtered


def _bits(data: Data, offset: int, length: int) -> npt.NDArray[np.bool_]:
    return np.unpackbits(data.view(offset, length), bitorder="little").view(np.bool_)


def _segments(edges: list[Numbers], page_size: int) -> tuple[Segment, ...]:
    """From where memory begins and ends; ranges that only the reading cut are joined again."""
    numbers = np.concatenate(edges) if edges else np.empty(0, np.int64)
    values, counts = np.unique(numbers, return_counts=True)
    ranges = (values[counts % 2 == 1] * page_size).reshape(-1, 2)
    if len(ranges) > _MOST_SEGMENTS:
        ranges = np.array([[ranges[0, 0], ranges[-1, 1]]])
    return tuple(Segment(int(start), int(end - start)) for start, end in ranges)

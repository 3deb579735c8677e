"""CRIU images: pagemap-PID.img says which pages of a process are in pages-N.img, or in an earlier dump."""

from __future__ import annotations

import bisect
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from ksm.errors import SourceError
from ksm.sources.data import Data, FileData
from ksm.sources.image import Segment
from ksm.sources.stored import Extent, StoredImage, disjoint

_COMMON, _PAGEMAP, _MM = 0x54564319, 0x56084025, 0x57492820
_MAGICS = struct.Struct("<II")
_LENGTH = struct.Struct("<I")

SIGNATURE = _MAGICS.pack(_COMMON, _PAGEMAP)

_MOST_MESSAGE = 64 << 20  # bytes; an mm has some 50 for each VMA
_MOST_PARENTS = 100
_HIGH = 1 << 63
_VMAS = 14  # the field of an mm

# Of a pagemap entry's flags, and of a VMA's status.
_IN_PARENT, _PRESENT = 1, 4
_KERNELS = 1 << 2 | 1 << 3 | 1 << 12  # [vsyscall], [vdso], [vvar]: KSM takes nothing of them


class CriuImage(StoredImage):
    """A process in CRIU's images: the pages that are its own, at their addresses.

    CRIU writes no page that was never touched or that only maps the zero page, so zero pages here were written
    (`anonymous_known`). Pages of an incremental dump are looked for in its `parent` directories.

    Args:
        data: the pagemap-PID.img; the other files lie beside it.
        page_size: bytes a page.

    Raises:
        SourceError: a file is broken, cut off or missing; names the offset.

    >>> CriuImage.format
    'CRIU image'
    """

    format = "CRIU image"

    def __init__(self, data: Data, page_size: int = 4096) -> None:
        if not isinstance(data, FileData):
            raise SourceError(f"{data.name}: CRIU's other images lie beside it: unpack them all")
        datas: list[FileData] = []
        try:
            extents, missing = _resolve(data, page_size, datas, 0)
            areas = list(_areas(data))
            kernels = [Extent(area.start, 0, area.end - area.start) for area in areas if area.status & _KERNELS]
            special = _inside(extents, kernels)
            extents = _inside(extents, _between(kernels))
            excluded = {"not in the dump": missing, "never mergeable": _total(special) // page_size}
            own = [area for area in areas if not area.status & _KERNELS]
            segments = [Segment(area.start, area.end - area.start) for area in own] or None
            super().__init__(datas, extents, page_size, segments=segments, excluded=excluded, holes=False)
        except BaseException:
            for other in datas:
                other.close()
            raise
        self.name = data.name
        self.anonymous_known = True
        data.close()


def directory_pagemap(path: str) -> str:
    """The pagemap-PID.img of a directory that CRIU filled, if it holds one process.

    Raises:
        SourceError: it holds none, or several, which are as many sources.

    >>> directory_pagemap("/")
    Traceback (most recent call last):
    ksm.errors.SourceError: /: a directory; an image must be a regular file, or a directory of CRIU's images
    """
    try:
        names = sorted(name for name in os.listdir(path) if name.startswith("pagemap-") and name.endswith(".img"))
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}") from None
    found = [os.path.join(path, name) for name in names if name[8:-4].isdigit()]
    if not found:
        raise SourceError(f"{path}: a directory; an image must be a regular file, or a directory of CRIU's images")
    if len(found) > 1:
        raise SourceError(f"{path}: {len(found)} processes, each a source of its own: {' '.join(found[:9])}")
    return found[0]


# ---- pagemaps ------------------------------------------------------------------------------------------


def _resolve(pagemap: FileData, page_size: int, datas: list[FileData], depth: int) -> tuple[list[Extent], int]:
    """Where the pages of a pagemap are, in which of `datas` (the files are added), and how many are nowhere."""
    number, entries = _entries(pagemap)
    folder = os.path.dirname(pagemap.name)
    pages = FileData(os.path.join(folder, f"pages-{number}.img"))
    mine = len(datas)
    datas.append(pages)
    extents: list[Extent] = []
    elsewhere: list[Extent] = []
    missing = offset = 0
    for at, entry in entries:
        length = entry.pages * page_size
        if entry.address % page_size or entry.address + length > _HIGH:
            raise pagemap.error(at, f"{entry.pages} pages at {entry.address:#x} cannot be")
        if entry.flags & _PRESENT:
            pages.need(offset, length, f"the pages of {entry.address:#x}, by {pagemap.name},")
            extents.append(Extent(entry.address, offset, length, mine))
            offset += length
        elif entry.flags & _IN_PARENT:
            elsewhere.append(Extent(entry.address, 0, length))
        else:
            missing += entry.pages
    if not elsewhere:
        return extents, missing
    if depth >= _MOST_PARENTS:
        raise SourceError(f"{pagemap.name}: more than {_MOST_PARENTS} parents behind each other")
    parent = FileData(os.path.join(folder, "parent", os.path.basename(pagemap.name)))
    try:
        older, _ = _resolve(parent, page_size, datas, depth + 1)
    finally:
        parent.close()
    found = _inside(older, elsewhere)
    return [*extents, *found], missing + (_total(disjoint(elsewhere)) - _total(found)) // page_size


def _total(extents: list[Extent]) -> int:
    return sum(extent.length for extent in extents)


def _inside(extents: list[Extent], ranges: list[Extent]) -> list[Extent]:
    """The parts of extents that lie in ranges."""
    wanted = disjoint(ranges)
    ends = [one.end for one in wanted]
    found = []
    for extent in disjoint(extents):
        for index in range(bisect.bisect_right(ends, extent.address), len(wanted)):
            if wanted[index].address >= extent.end:
                break
            found.append(extent.cut(max(extent.address, wanted[index].address), min(extent.end, wanted[index].end)))
    return found


def _between(ranges: list[Extent]) -> list[Extent]:
    """All addresses outside the ranges."""
    edges = [0, *(edge for one in disjoint(ranges) for edge in (one.address, one.end)), _HIGH]
    return [Extent(start, 0, end - start) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


class _Entry(NamedTuple):
    address: int
    pages: int
    flags: int


def _entries(pagemap: FileData) -> tuple[int, Iterator[tuple[int, _Entry]]]:
    """The number of the pages file, and (offset, entry) of all entries."""
    messages = _messages(pagemap, _PAGEMAP)
    _, head = next(messages, (0, _Message({}, [])))
    number = head.numbers.get(1, 1 << 32)
    if number >= 1 << 32:
        raise pagemap.error(_MAGICS.size, "no number of a pages file")

    def entries() -> Iterator[tuple[int, _Entry]]:
        for at, (fields, _) in messages:
            address, count = fields.get(1), fields.get(5, fields.get(2))  # 5: the count in 64 bits, of newer versions
            if address is None or count is None:
                raise pagemap.error(at, "an entry without its address or count")
            flags = fields.get(4)
            if flags is None:  # of older versions
                flags = _IN_PARENT if fields.get(3) else _PRESENT
            yield at, _Entry(address, count, flags)

    return number, entries()


# ---- VMAs ----------------------------------------------------------------------------------------------


class _Area(NamedTuple):
    start: int
    end: int
    status: int


def _areas(pagemap: FileData) -> Iterator[_Area]:
    """The process's VMAs, by the mm-PID.img beside the pagemap; none if it is not there."""
    folder, name = os.path.split(pagemap.name)
    path = os.path.join(folder, name.replace("pagemap-", "mm-", 1))
    if not name.startswith("pagemap-") or not os.path.exists(path):
        return
    data = FileData(path)
    try:
        for at, message in _messages(data, _MM, repeated=_VMAS):
            for content in message.inner:
                area = _fields(data, at, content).numbers
                start, end = area.get(1, 0), area.get(2, 0)
                if not start < end:
                    raise data.error(at, f"a VMA from {start:#x} to {end:#x} cannot be")
                if start < _HIGH:
                    yield _Area(start, min(end, _HIGH), area.get(7, 0))
    finally:
        data.close()


# ---- protobuf, as far as it is needed: https://protobuf.dev/programming-guides/encoding ------------------------------


class _Message(NamedTuple):
    numbers: dict[int, int]
    inner: list[memoryview]
    """The messages in the one field that was asked for."""


def _messages(data: FileData, magic: int, repeated: int = -1) -> Iterator[tuple[int, _Message]]:
    """(offset, fields) of each message of an image."""
    if _MAGICS.unpack(data.read(0, _MAGICS.size, "the magic numbers")) != (_COMMON, magic):
        raise data.error(0, f"no CRIU image of the kind {magic:#x}")
    at = _MAGICS.size
    while data.has(at, 1):
        (length,) = _LENGTH.unpack(data.read(at, _LENGTH.size, "a message's length"))
        if length > _MOST_MESSAGE:
            raise data.error(at, f"a message of {length} bytes")
        message = memoryview(data.read(at + _LENGTH.size, length, "a message"))
        yield at, _fields(data, at + _LENGTH.size, message, repeated)
        at += _LENGTH.size + length


def _fields(data: FileData, at: int, message: memoryview, repeated: int = -1) -> _Message:
    """The numbers in a message by field, and the messages in the field `repeated`; other fields are skipped."""
    fields: dict[int, int] = {}
    inner: list[memoryview] = []
    place = 0
    while place < len(message):
        tag, place = _varint(data, at, message, place)
        field, kind = tag >> 3, tag & 7
        if kind == 0:
            fields[field], place = _varint(data, at, message, place)
            continue
        if kind == 2:
            size, place = _varint(data, at, message, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise data.error(at + place, f"a field of the unknown kind {kind}")
        if place + size > len(message):
            raise data.error(at + place, f"a field of {size} bytes goes beyond its message")
        if field == repeated:
            inner.append(message[place : place + size])
        place += size
    return _Message(fields, inner)


def _varint(data: FileData, at: int, message: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(message[place : place + 10]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, place + index + 1
    raise data.error(at + place, "a number that does not end")

"""Images whose pages lie in a file as they were: readers register where, and one reader resolves addresses."""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ksm.sources.data import Data
from ksm.sources.image import BLOCK_BYTES, Block, Image, Segment

# Mapped at a time: enough that starting the hashing threads does not show. Pages are faulted in by these threads:
# populating them beforehand (MAP_POPULATE) took 20 to 60 % longer, and all of it in one thread.
_BLOCK_BYTES = 128 << 20
_GAP = 16  # absent pages that do not end a block
_COPIED = 4 << 20  # pages from here and there are copied together, to make few blocks

PARTIAL = "part of a page"
TWICE = "described twice"


class Extent(NamedTuple):
    """`length` bytes of memory at `address`, stored at `offset` of data number `data`.

    >>> Extent(0x100000, 0x508, 8192).address
    1048576
    """

    address: int
    offset: int
    length: int
    data: int = 0

    def cut(self, start: int, end: int) -> Extent:
        """Its part from address `start` up to `end`.

        >>> Extent(0x1000, 0, 0x3000).cut(0x2000, 0x3000)
        Extent(address=8192, offset=4096, length=4096, data=0)
        """
        return Extent(start, self.offset + start - self.address, end - start, self.data)

    @property
    def end(self) -> int:
        """The address after its last byte.

        >>> Extent(0x1000, 0, 0x3000).end
        16384
        """
        return self.address + self.length


class StoredImage(Image):
    """Pages that lie in one or more files, uncompressed.

    Of bytes that several extents describe the first extent counts. Pages at the edges of an extent that are not whole
    are left out. A page is a hole if all of it is one in a sparse file: then it was never touched.

    Args:
        datas: the files; they are closed with the image.
        extents: what lies where, in any order; their bounds have been checked.
        page_size: bytes a page.
        segments: None: the extents.
        excluded: pages left out by the reader, and why.
        holes: whether holes of the files mean pages never touched; False: they are zeros like others.

    >>> import tempfile
    >>> from ksm.sources.data import FileData
    >>> with tempfile.NamedTemporaryFile() as f:
    ...     _ = f.write(bytes(10000)); f.flush()
    ...     image = StoredImage([FileData(f.name)], [Extent(0x1000, 500, 8192)], 4096)
    ...     image.npages, image.segments
    (2, (Segment(address=4096, length=8192, name=''),))
    """

    def __init__(
        self,
        datas: Sequence[Data],
        extents: Iterable[Extent],
        page_size: int,
        *,
        segments: Sequence[Segment] | None = None,
        excluded: dict[str, int] | None = None,
        holes: bool = True,
    ) -> None:
        check_page_size(page_size)
        self.name = datas[0].name
        self.page_size = page_size
        self.datas = tuple(datas)
        left_out = dict(excluded or {})
        whole = list(_whole_pages(extents, page_size, left_out))
        wanted = disjoint(whole)
        total = sum(extent.length for extent in wanted)
        again = (sum(extent.length for extent in whole) - total) // page_size
        if again:
            left_out[TWICE] = left_out.get(TWICE, 0) + again
        known = [data.extents() if holes else None for data in datas]
        self._extents = [part for extent in wanted for part in _without_holes(extent, known[extent.data], page_size)]
        if segments is None:
            segments = [Segment(extent.address, extent.length) for extent in wanted]
        self.segments = tuple(sorted(segments))
        self.npages = sum(extent.length for extent in self._extents) // page_size
        self.holes = total // page_size - self.npages
        self.anonymous_known = self.holes > 0
        self.excluded = {why: count for why, count in left_out.items() if count}
        if not self.in_order:
            self.datas = tuple(data.in_any_order() for data in self.datas)

    @property
    def in_order(self) -> bool:
        """Whether reading the pages by address reads each file from its start to its end.

        >>> import os
        >>> from ksm.sources.data import FileData
        >>> StoredImage([FileData(os.__file__)], [Extent(0, 4096, 4096), Extent(4096, 0, 4096)], 4096).in_order
        False
        """
        ends: dict[int, int] = {}
        for extent in self._extents:
            if extent.offset < ends.get(extent.data, 0):
                return False
            ends[extent.data] = extent.offset + extent.length
        return True

    def blocks(self) -> Iterator[Block]:
        """What is stored, mapped if it lies together; long gaps are between the blocks."""
        step = BLOCK_BYTES if any(data.ordered for data in self.datas) else _BLOCK_BYTES
        step, gap = max(step, self.page_size), _GAP * self.page_size
        waiting: list[Extent] = []  # data of the block to come
        for extent in self._extents:
            for at in range(extent.address, extent.end, step):
                part = extent.cut(at, min(extent.end, at + step))
                if waiting and not (
                    part.address - waiting[-1].end <= gap
                    and part.end - waiting[0].address <= (step if _moved_alike(part, waiting[0]) else _COPIED)
                ):
                    yield self._block(waiting)
                    waiting = []
                waiting.append(part)
        if waiting:
            yield self._block(waiting)

    def _block(self, parts: list[Extent]) -> Block:
        start, end, size = parts[0].address, parts[-1].end, self.page_size
        present = None
        if any(before.end != after.address for before, after in itertools.pairwise(parts)):
            present = np.zeros((end - start) // size, np.bool_)
            for part in parts:
                present[(part.address - start) // size : (part.end - start) // size] = True
        if all(_moved_alike(part, parts[0]) for part in parts):
            return start, self.datas[parts[0].data].view(parts[0].offset, end - start).reshape(-1, size), present
        pages = np.zeros(end - start, np.uint8)
        for part in parts:
            view = self.datas[part.data].view(part.offset, part.length)
            pages[part.address - start : part.end - start] = view
        return start, pages.reshape(-1, size), present

    def close(self) -> None:
        """Close the files; blocks handed out stay valid."""
        for data in self.datas:
            data.close()


def check_page_size(page_size: int) -> None:
    """Raise `ValueError` unless it is a power of two from 512 bytes to 1 GiB.

    >>> check_page_size(4097)
    Traceback (most recent call last):
    ValueError: page_size is 4097; it must be a power of two
    """
    if page_size <= 0 or page_size & (page_size - 1):
        raise ValueError(f"page_size is {page_size}; it must be a power of two")


def _moved_alike(one: Extent, other: Extent) -> bool:
    """Whether both lie in the file as far from each other as in memory."""
    return one.data == other.data and one.address - one.offset == other.address - other.offset


def _whole_pages(extents: Iterable[Extent], page_size: int, left_out: dict[str, int]) -> Iterator[Extent]:
    for extent in extents:
        start, end = extent.address + -extent.address % page_size, extent.end - extent.end % page_size
        edges = (extent.address != start) + (extent.end != end)
        if extent.address // page_size == extent.end // page_size:
            edges = min(edges, 1)
        if edges:
            left_out[PARTIAL] = left_out.get(PARTIAL, 0) + edges
        if start < end:
            yield extent.cut(start, end)


def disjoint(extents: list[Extent]) -> list[Extent]:
    """By ascending address, without overlap; of what several have, the first one's. O(n log n).

    >>> disjoint([Extent(8, 0, 8), Extent(0, 100, 12)])
    [Extent(address=0, offset=100, length=8, data=0), Extent(address=8, offset=0, length=8, data=0)]
    """
    ranked = sorted(enumerate(extents), key=lambda pair: pair[1].address)
    if all(before[1].end <= after[1].address for before, after in itertools.pairwise(ranked)):
        return [extent for _, extent in ranked]
    edges = sorted({edge for extent in extents for edge in (extent.address, extent.end)})
    found: list[Extent] = []
    live: list[tuple[int, Extent]] = []  # those that have begun, the first one on top
    waiting = iter(ranked)
    following = next(waiting, None)
    for start, end in itertools.pairwise(edges):
        while following is not None and following[1].address <= start:
            heapq.heappush(live, following)
            following = next(waiting, None)
        while live and live[0][1].end <= start:
            heapq.heappop(live)
        if not live:
            continue
        part = live[0][1].cut(start, end)
        if found and found[-1].end == start and _moved_alike(found[-1], part):
            found[-1] = found[-1]._replace(length=found[-1].length + part.length)
        else:
            found.append(part)
    return found


def _without_holes(extent: Extent, known: list[tuple[int, int]] | None, page_size: int) -> Iterator[Extent]:
    """The parts of an extent that are data in the file, in whole pages: a page with any data in it counts as data."""
    if known is None:
        yield extent
        return
    done = extent.address
    for index in range(bisect.bisect_right(known, extent.offset, key=lambda pair: pair[1]), len(known)):
        start, end = known[index]
        if start >= extent.offset + extent.length:
            break
        first = max(0, start - extent.offset) // page_size * page_size
        last = min(extent.length, -((extent.offset - end) // page_size) * page_size)
        low, high = max(done, extent.address + first), extent.address + last
        if low < high:
            yield extent.cut(low, high)
            done = high

"""Image: what every source of pages looks like from outside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from typing_extensions import Self

Pages: TypeAlias = npt.NDArray[np.uint8]
Present: TypeAlias = npt.NDArray[np.bool_]
Block: TypeAlias = tuple[int, Pages, Present | None]

Numbers: TypeAlias = npt.NDArray[np.int64]

BLOCK_BYTES = 32 << 20  # of pages in one block: enough for the hashing threads, little beside the image


class Segment(NamedTuple):
    """A range of addresses that a source describes: a file, a VMA, a section of a dump. Pages of it may be missing.

    >>> Segment(0x1000, 0x3000, "[heap]").length
    12288
    """

    address: int
    length: int
    name: str = ""


class Image(ABC):
    """Pages of one guest or process, in blocks by ascending address. A context manager.

    Attributes:
        name: what to call it in answers, usually what was opened.
        format: what kind of source it is, as `ksm formats` calls it.
        page_size: bytes a page.
        segments: the ranges of addresses that `blocks` takes its pages from, ascending.
        npages: pages that `blocks` yields as present.
        holes: slots known to have been never touched; no block has them as present.
        anonymous_known: whether the source can tell a never-touched page from a zeroed one. A plain dump cannot:
            its zero pages may be either.
        zero_page_known: whether slots that only map the shared zero page are known to be left out.
        excluded: why further slots are left out, and how many: swapped, file pages, the zero page, ...

    >>> from ksm.sources import ArrayImage
    >>> with ArrayImage(np.zeros((2, 4096), np.uint8), name="two pages") as image:
    ...     [(hex(address), len(pages)) for address, pages, present in image.blocks()]
    [('0x0', 2)]
    """

    name: str
    format: str = "array"
    page_size: int
    segments: tuple[Segment, ...]
    npages: int
    holes: int = 0
    anonymous_known: bool = False
    zero_page_known: bool = True
    excluded: Mapping[str, int] = MappingProxyType({})

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """(address, pages, present) by ascending address, without overlap.

        `pages` is (k, page_size) uint8 at consecutive addresses. `present` says which of them are there (None: all);
        what a row holds that is not there means nothing. May be called again.

        >>> from ksm.sources import ArrayImage
        >>> next(ArrayImage(np.zeros((2, 4096), np.uint8)).blocks())[1].shape
        (2, 4096)
        """

    def close(self) -> None:  # noqa: B027 - most sources hold nothing open
        """Let go of what the source holds open; blocks handed out stay valid.

        >>> from ksm.sources import ArrayImage
        >>> ArrayImage(np.zeros((2, 4096), np.uint8)).close()
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ksm.{type(self).__name__} {self.name!r}, {self.npages:,} pages>"


def spans(numbers: Numbers, longest: int, gap: int = 16) -> Iterator[tuple[int, int]]:
    """Parts [first, last) of ascending page numbers that make a block each: without a long gap, and not too long.

    >>> list(spans(np.array([1, 2, 5, 100, 101, 102]), longest=2))
    [(0, 2), (2, 3), (3, 5), (5, 6)]
    """
    first = 0
    for last in [*(np.flatnonzero(np.diff(numbers) > gap) + 1).tolist(), len(numbers)]:
        while first < last:
            stop = first + int(np.searchsorted(numbers[first:last], numbers[first] + longest))
            yield first, stop
            first = stop


class ArrayImage(Image):
    """Pages that are in memory already.

    Args:
        pages: (n, page_size) uint8.
        name: what to call it.
        present: which of them are there; None: all.
        address: of the first page.
        anonymous_known: whether zero pages among them are known to have been touched.

    >>> ArrayImage(np.zeros((3, 4096), np.uint8), present=np.array([True, False, True])).npages
    2
    """

    def __init__(
        self,
        pages: Pages,
        name: str = "array",
        present: Present | None = None,
        address: int = 0,
        anonymous_known: bool = True,
    ) -> None:
        if pages.ndim != 2 or pages.dtype != np.uint8:
            raise ValueError(f"{name}: pages must be a (n, page_size) uint8 array, not {pages.shape} {pages.dtype}")
        if present is not None and present.shape != (len(pages),):
            raise ValueError(f"{name}: present has shape {present.shape}, there are {len(pages)} pages")
        self.name = name
        self.page_size = pages.shape[1]
        self.segments = (Segment(address, pages.nbytes),)
        self.npages = len(pages) if present is None else int(np.count_nonzero(present))
        self.holes = len(pages) - self.npages
        self.anonymous_known = anonymous_known
        self._block: Block = (address, pages, present)

    def blocks(self) -> Iterator[Block]:
        """The one block."""
        yield self._block

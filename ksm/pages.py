"""Page bytes from any buffer without a copy, and their fingerprints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from ksm._core import fingerprint_pages
from ksm.threads import threads_for

if TYPE_CHECKING:
    from typing_extensions import Buffer

    BytesLike: TypeAlias = Buffer | npt.NDArray[Any]

PAGE_SIZE = 4096

_BLOCK = 4096  # pages a thread hashes at a time: below that the hand-over shows
_MOST_BLOCKS = 1024


def as_pages(buffer: BytesLike, page_size: int | None = None) -> npt.NDArray[np.uint8]:
    """The bytes of `buffer` as an (n, page_size) array that shares its memory.

    Args:
        buffer: an array of any dtype with one dimension, or with two and a page a row; a memmap, bytes, bytearray,
            memoryview, mmap or anything else with the buffer protocol. It must be C-contiguous.
        page_size: bytes, a power of two of at least 256; None: a row of a two-dimensional array, or 4096.

    Raises:
        TypeError: `buffer` is no buffer, or holds Python objects.
        ValueError: not contiguous, not whole pages, a bad page size, or the wrong number of dimensions.

    >>> as_pages(bytes(8192)).shape
    (2, 4096)
    >>> as_pages(np.zeros((3, 2048), np.uint64)).shape
    (3, 16384)
    >>> as_pages(b"abc")
    Traceback (most recent call last):
    ValueError: 3 bytes are not whole pages of 4096
    """
    if not isinstance(buffer, np.ndarray):
        try:
            view = memoryview(buffer)
        except TypeError:
            raise TypeError(f"pages must be an array or a buffer of bytes, not {type(buffer).__name__}") from None
        if view.format.endswith("O"):
            raise TypeError("pages must be bytes: this buffer holds Python objects")
        if not view.c_contiguous:
            raise ValueError("pages must be contiguous: this buffer has gaps")
        array = np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)
    else:
        if buffer.dtype.hasobject:
            raise TypeError(f"pages must be bytes: an array of {buffer.dtype} holds Python objects")
        if buffer.ndim not in (1, 2):
            raise ValueError(f"pages must be an array of one or two dimensions, not {buffer.ndim}")
        if not buffer.flags.c_contiguous:
            raise ValueError("pages must be contiguous: this array has gaps or another order (np.ascontiguousarray)")
        if buffer.ndim == 2:
            row = buffer.shape[1] * buffer.itemsize
            if page_size is None:
                page_size = row
            elif row != page_size:
                raise ValueError(f"rows of {row} bytes are not pages of {page_size}")
        array = np.asarray(buffer).reshape(-1).view(np.uint8) if buffer.size else np.empty(0, np.uint8)
    size = _checked_page_size(PAGE_SIZE if page_size is None else page_size)
    if array.size % size:
        raise ValueError(f"{array.size} bytes are not whole pages of {size}")
    return array.reshape(array.size // size, size)


def _checked_page_size(size: int) -> int:
    if size < 256 or size & (size - 1):
        raise ValueError(f"a page of {size} bytes: must be a power of two of at least 256")
    return size


@dataclass(frozen=True, eq=False, slots=True)
class Fingerprints:
    """XXH3-128 of pages, in their order: 16 bytes stand for a page.

    Attributes:
        words: (n, 2) uint64, the high and the low 64 bits; read-only, shared with the array given.
        present: (n,) bool, the slots that have a page (the words of the others mean nothing); None: all have.

    Raises:
        TypeError: another dtype. ValueError: another shape.

    >>> two = fingerprint(bytes(8192))
    >>> len(two), two[0] == two[1], f"{two[0]:032x}"
    (2, True, '3ee8dc4f9e7ee49593d76fe148c689ba')
    """

    words: npt.NDArray[np.uint64]
    present: npt.NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", _frozen(self.words, np.dtype(np.uint64), "words"))
        if self.words.ndim != 2 or self.words.shape[1] != 2:
            raise ValueError(f"words must be (n, 2): the high and the low 64 bits of a page, not {self.words.shape}")
        if self.present is None:
            return
        object.__setattr__(self, "present", _frozen(self.present, np.dtype(np.bool_), "present"))
        if self.present.shape != (len(self.words),):
            raise ValueError(f"present must be ({len(self.words)},), one for each page, not {self.present.shape}")

    def __len__(self) -> int:
        return len(self.words)

    @overload
    def __getitem__(self, index: int) -> int | None: ...
    @overload
    def __getitem__(self, index: slice | npt.NDArray[Any]) -> Fingerprints: ...
    def __getitem__(self, index: int | slice | npt.NDArray[Any]) -> int | Fingerprints | None:
        """One page's fingerprint as a number, None where there is no page; or some pages', by slice, mask or indexes.

        >>> len(fingerprint(bytes(8192))[1:])
        1
        """
        if isinstance(index, slice | np.ndarray):
            return Fingerprints(self.words[index], None if self.present is None else self.present[index])
        high, low = self.words[index]
        if self.present is not None and not self.present[index]:
            return None
        return int(high) << 64 | int(low)

    def __eq__(self, other: object) -> bool:
        """Whether the same slots have pages, with the same fingerprints.

        >>> fingerprint(bytes(4096)) == fingerprint(b"x" * 4096)
        False
        """
        if not isinstance(other, Fingerprints):
            return NotImplemented
        if len(self) != len(other):
            return False
        mine, its = self._there(), other._there()
        return bool(np.array_equal(mine, its) and np.array_equal(self.words[mine], other.words[its]))

    def __repr__(self) -> str:
        there = "" if self.present is None else f", {self.pages} present"
        return f"<Fingerprints: {len(self)} pages{there}>"

    def _there(self) -> npt.NDArray[np.bool_]:
        return np.ones(len(self), np.bool_) if self.present is None else self.present

    @property
    def pages(self) -> int:
        """How many slots have a page.

        >>> Fingerprints(np.zeros((3, 2), np.uint64), np.array([True, False, True])).pages
        2
        """
        return len(self) if self.present is None else int(np.count_nonzero(self.present))

    def zeros(self, page_size: int = PAGE_SIZE) -> npt.NDArray[np.bool_]:
        """Which slots have a page of zeros, pages being of `page_size` bytes.

        >>> fingerprint(bytes(4096) + b"x" * 4096).zeros()
        array([ True, False])
        """
        zero: npt.NDArray[np.bool_] = (self.words == zero_words(page_size)).all(axis=1)
        return zero if self.present is None else zero & self.present

    def unique(self) -> tuple[Fingerprints, npt.NDArray[np.int64]]:
        """The different contents, ascending by low then high word, and how many pages have each. O(n log n).

        >>> contents, copies = fingerprint(bytes(4096) + b"x" * 4096 + bytes(4096)).unique()
        >>> len(contents), sorted(copies.tolist())
        (2, [1, 2])
        """
        words = self.words if self.present is None else self.words[self.present]
        ordered = words[np.argsort(words[:, 1])]
        changes = ordered[1:] != ordered[:-1]
        if (changes[:, 0] & ~changes[:, 1]).any():  # low words that collide: sort by both
            ordered = words[np.lexsort((words[:, 0], words[:, 1]))]
            changes = ordered[1:] != ordered[:-1]
        starts = np.flatnonzero(np.concatenate(([len(words) > 0], changes.any(axis=1))))
        return Fingerprints(ordered[starts]), np.diff(starts, append=len(words)).astype(np.int64)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: each page's 32 hexadecimal digits, None for a slot without a page.

        >>> fingerprint(bytes(4096)).to_dict()
        {'fingerprints': ['3ee8dc4f9e7ee49593d76fe148c689ba']}
        """
        rows = zip(self.words.tolist(), self._there().tolist(), strict=True)
        return {"fingerprints": [f"{high:016x}{low:016x}" if there else None for (high, low), there in rows]}


def _frozen(array: npt.NDArray[Any], dtype: np.dtype[Any], name: str) -> npt.NDArray[Any]:
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        what = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{name} must be an array of {dtype}, not {what}")
    view: npt.NDArray[Any] = np.asarray(array).view()
    view.flags.writeable = False
    return view


@functools.cache
def zero_words(page_size: int = PAGE_SIZE) -> tuple[np.uint64, np.uint64]:
    """The fingerprint of a page of zeros: the high and the low 64 bits.

    >>> print(*map(hex, zero_words(4096)))
    0x3ee8dc4f9e7ee495 0x93d76fe148c689ba
    """
    high, low = fingerprint(bytes(_checked_page_size(page_size)), threads=1, page_size=page_size).words[0]
    return high, low


def fingerprint(
    pages: BytesLike,
    threads: int | None = None,
    *,
    page_size: int | None = None,
    progress: Callable[[int], object] | None = None,
    variant: str | None = None,
) -> Fingerprints:
    """XXH3-128 of every page. O(bytes), at the speed of memory; the GIL is released.

    Args:
        pages: what `as_pages` takes.
        threads: how many hash; None: one for each CPU that the process may use.
        page_size: as for `as_pages`.
        progress: called now and then, in the caller's thread, with the number of pages done.
        variant: a form of the hash by name (`ksm._core.fingerprint_forms`); None: the best. All give the same bits.

    Raises:
        TypeError, ValueError: as `as_pages`; fewer threads than one; a variant that this build has not.

    An interrupt (Ctrl-C) ends it soon, whatever is still to be done.

    >>> fingerprint(np.zeros((2, 4096), np.uint8))
    <Fingerprints: 2 pages>
    """
    array = as_pages(pages, page_size)
    threads = threads_for(threads)
    words = np.empty((len(array), 2), np.uint64)
    step = max(_BLOCK, -(-len(array) // _MOST_BLOCKS))
    starts = range(0, len(array), step)

    def block(at: int) -> int:
        some = array[at : at + step]
        fingerprint_pages(some, words[at : at + step], np.empty(len(some), np.uint8), variant)
        return len(some)

    threads = min(threads, max(len(starts), 1))
    done = 0
    if threads == 1:
        for at in starts:
            done += block(at)
            if progress is not None:
                progress(done)
        return Fingerprints(words)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ksm-fingerprint")
    try:
        for future in [pool.submit(block, at) for at in starts]:
            done += future.result()
            if progress is not None:
                progress(done)
    finally:
        pool.shutdown(cancel_futures=True)
    return Fingerprints(words)

"""Pages of known content, to measure ksmd and ksm with: how many are alike, and where, is known beforehand."""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ksm.constants import MADV_HUGEPAGE, MADV_NOHUGEPAGE
from ksm.linux import madvise

_CHUNK = 4096  # pages made at a time
_ODD = np.uint64(0x9E3779B97F4A7C15)  # a multiplication by an odd number is a permutation

_ZERO = np.uint64(2**64 - 1)  # stands for a page of zeros

Numbers = npt.NDArray[np.uint64]
Pages = npt.NDArray[np.uint8]


def _unique(number: Numbers, n: int) -> Numbers:
    return number


def _copies(copies: int) -> Callable[[Numbers, int], Numbers]:
    def numbers(number: Numbers, n: int) -> Numbers:
        found: Numbers = number % np.uint64(max(1, n // copies))
        return found

    return numbers


def _few(number: Numbers, n: int) -> Numbers:
    return np.where(number % np.uint64(2) == 0, number % np.uint64(1024), number)


def _guest(number: Numbers, n: int) -> Numbers:
    content = np.where(number % np.uint64(3) == 0, number % np.uint64(12288), number)
    return np.where(number % np.uint64(17) == 1, _ZERO, content)


def _zeros(number: Numbers, n: int) -> Numbers:
    return np.where(number % np.uint64(7) < 3, _ZERO, number)


# Numbers of zero pages that are no multiples of max_page_sharing: chains of which every dup is full are rare, and dear.
_CONTENTS: Mapping[str, tuple[str, Callable[[Numbers, int], Numbers]]] = MappingProxyType(
    {
        "unique": ("no two pages are equal", _unique),
        "copies": ("16 copies of each content, far apart", _copies(16)),
        "pairs": ("2 copies of each content, far apart", _copies(2)),
        "few": ("every second page is a copy of one of 512 contents, the others unique", _few),
        "guest": ("a third of the pages copies of 4,096 contents, one in 17 zeros, the others unique", _guest),
        "zeros": ("three of seven pages zero, the others unique", _zeros),
    }
)

KINDS: Mapping[str, str] = MappingProxyType({name: what for name, (what, _) in _CONTENTS.items()})
"""What the pages of each kind hold."""


def contents(kind: str, n: int) -> Numbers:
    """(n,) which content each of n pages has; 2**64 - 1 is a page of zeros. O(n).

    Raises:
        ValueError: there is no such kind.

    >>> contents("pairs", 6)
    array([0, 1, 2, 0, 1, 2], dtype=uint64)
    """
    if kind not in _CONTENTS:
        raise ValueError(f"there are no {kind!r} pages; there are {', '.join(_CONTENTS)}")
    return _CONTENTS[kind][1](np.arange(n, dtype=np.uint64), n)


def chunks(kind: str, n: int, page_size: int = 4096) -> Iterator[Pages]:
    """n pages of a kind, 4,096 at a time, always the same.

    Different contents differ from their first bytes on, and in no order.

    >>> [len(pages) for pages in chunks("unique", 5000)]
    [4096, 904]
    """
    base = np.random.default_rng(1).integers(0, 2**64, (_CHUNK, page_size // 8), dtype=np.uint64)
    content = contents(kind, n)
    for at in range(0, n, _CHUNK):
        some = content[at : at + _CHUNK]
        pages = base[some % np.uint64(_CHUNK)]
        pages ^= ((some + np.uint64(1)) * _ODD)[:, None]
        pages[some == _ZERO] = 0
        yield pages.view(np.uint8)


def filled(kind: str, n: int, huge: bool = False, page_size: int = 4096) -> Pages:
    """(n, page_size) pages of a kind in private memory of their own, which ksmd can merge; `huge`: in huge pages.

    >>> filled("pairs", 2).shape
    (2, 4096)
    """
    flags = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    pages = np.frombuffer(mmap.mmap(-1, n * page_size, **flags), np.uint8).reshape(n, page_size)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without huge pages: all pages are small
            madvise(pages, MADV_HUGEPAGE if huge else MADV_NOHUGEPAGE)
    at = 0
    for chunk in chunks(kind, n, page_size):
        pages[at : at + len(chunk)] = chunk
        at += len(chunk)
    return pages

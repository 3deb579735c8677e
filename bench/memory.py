"""Pages to measure with: what they hold, and how they lie in memory."""

from __future__ import annotations

import contextlib
import mmap
import sys
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ksm.constants import MADV_HUGEPAGE, MADV_NOHUGEPAGE
from ksm.linux import madvise

PAGE = 4096
_CHUNK = 4096  # pages made at a time

Pages = npt.NDArray[np.uint8]

KINDS = {
    "guest": "a third of the pages are copies of 4,096 contents, a sixteenth zeros, the others unique",
    "unique": "no two pages are equal",
    "copies": "16 copies of each content, far apart",
}


def chunks(kind: str, n: int, seed: int = 1) -> Iterator[Pages]:
    """n pages of a kind, some thousand at a time; equal for equal seeds."""
    random = np.random.default_rng(seed)
    common = random.integers(0, 2**64, (_CHUNK, PAGE // 8), dtype=np.uint64)
    base = random.integers(0, 2**64, (_CHUNK, PAGE // 8), dtype=np.uint64)
    for at in range(0, n, _CHUNK):
        number = np.arange(at, at + _CHUNK, dtype=np.uint64)
        if kind == "copies":
            number %= np.uint64(max(1, n // 16))
        # Unlike others from its first bytes on, in no order, as contents are: an odd factor is a permutation.
        pages = base[number % np.uint64(_CHUNK)] ^ (number * np.uint64(0x9E3779B97F4A7C15))[:, None]
        if kind == "guest":
            pages[::3] = common[::3]
            pages[1::16] = 0
        elif kind not in KINDS:
            raise ValueError(f"no kind of pages is named {kind!r}")
        yield pages.view(np.uint8)[: n - at]


def _private(size: int) -> mmap.mmap:
    """Anonymous memory that KSM can merge: Python's default is shared memory."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def filled(kind: str, n: int, small: bool = False) -> Pages:
    """n pages of a kind in memory of their own, written; `small` keeps huge pages out, as KSM's merged memory has."""
    memory = _private(n * PAGE)
    pages = np.frombuffer(memory, np.uint8).reshape(n, PAGE)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without huge pages: all pages are small
            madvise(memory, MADV_NOHUGEPAGE if small else MADV_HUGEPAGE)
    at = 0
    for chunk in chunks(kind, n):
        pages[at : at + len(chunk)] = chunk
        at += len(chunk)
    return pages

"""What a process's slots hold at one moment, and how two moments differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ksm.pages import Fingerprints
from ksm.sources.snapshot import Snapshot

Flags = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Memory:
    """Fingerprints by page number.

    Attributes:
        pages: (n,) uint64, virtual page numbers, strictly ascending.
        words: (n, 2) uint64, the fingerprint's high and low 64 bits.

    >>> len(Memory.empty())
    0
    """

    pages: Numbers
    words: Numbers

    @classmethod
    def empty(cls) -> Memory:
        """No page at all.

        >>> Memory.empty().words.shape
        (0, 2)
        """
        return cls(np.empty(0, np.uint64), np.empty((0, 2), np.uint64))

    def __len__(self) -> int:
        return len(self.pages)

    def find(self, pages: Numbers) -> tuple[npt.NDArray[np.int64], Flags]:
        """Where each of `pages` (ascending) is, and whether it is there at all. O(n log n).

        >>> Memory(np.array([2, 5], np.uint64), np.zeros((2, 2), np.uint64)).find(np.array([5, 6], np.uint64))
        (array([1, 0]), array([ True, False]))
        """
        if len(pages) == len(self.pages) and np.array_equal(pages, self.pages):
            return np.arange(len(pages)), np.ones(len(pages), np.bool_)
        if not len(self.pages):
            return np.zeros(len(pages), np.int64), np.zeros(len(pages), np.bool_)
        where = np.searchsorted(self.pages, pages)
        where[where == len(self.pages)] = 0
        return where, self.pages[where] == pages

    def same(self, other: Memory) -> Flags:
        """Which of the own pages `other` has with the same content. O(n log n).

        >>> one = Memory(np.array([1, 2], np.uint64), np.array([[0, 7], [0, 8]], np.uint64))
        >>> one.same(Memory(np.array([2, 3], np.uint64), np.array([[0, 8], [0, 9]], np.uint64)))
        array([False,  True])
        """
        where, there = other.find(self.pages)
        if not len(other):
            return there
        equal: Flags = there & (other.words[where] == self.words).all(axis=1)
        return equal

    def keep(self, flags: Flags) -> Memory:
        """The pages with a true flag.

        >>> len(Memory(np.array([1], np.uint64), np.zeros((1, 2), np.uint64)).keep(np.array([False])))
        0
        """
        return Memory(self.pages[flags], self.words[flags])

    def updated(self, pages: Numbers, words: Numbers, there: Flags) -> Memory:
        """The same after `pages` (ascending) got new words, or went where `there` is false. O(n log n).

        >>> one = Memory(np.array([1, 2], np.uint64), np.array([[0, 7], [0, 8]], np.uint64))
        >>> news = np.array([2, 3], np.uint64), np.array([[0, 0], [0, 9]], np.uint64), np.array([False, True])
        >>> one.updated(*news).pages
        array([1, 3], dtype=uint64)
        """
        if not len(self):
            return Memory(pages, words).keep(there)
        where, known = self.find(pages)
        if known.all() and there.all():
            renewed = self.words.copy()
            renewed[where] = words
            return Memory(self.pages, renewed)
        stay = np.ones(len(self), np.bool_)
        stay[where[known]] = False
        all_pages = np.concatenate((self.pages[stay], pages[there]))
        order = np.argsort(all_pages, kind="stable")
        return Memory(all_pages[order], np.concatenate((self.words[stay], words[there]))[order])


@dataclass(frozen=True, slots=True)
class Sample:
    """Which pages a trace keeps: one content in `of`, with all its copies; of pages of zeros one page in `of`.

    Choosing by content keeps or drops all copies of a content, so that sharing among the kept ones, times `of`,
    estimates the sharing of all without bias. Pages of zeros, the one content that everybody has many of, are
    chosen by their page number instead.

    >>> Sample(1).keeps(Memory.empty(), np.empty(0, np.bool_))
    array([], dtype=bool)
    """

    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.of <= 1 << 20:
            raise ValueError(f"a sample of one in {self.of}; it can be one in 1 to {1 << 20}")

    def keeps(self, memory: Memory, zeros: Flags) -> Flags:
        """Which pages belong to the sample; `zeros` says which are zeros.

        >>> Sample(2).keeps(Memory(np.array([1], np.uint64), np.array([[0, 6]], np.uint64)), np.array([False]))
        array([ True])
        """
        if self.of == 1:
            return np.ones(len(memory), np.bool_)
        scattered = (memory.pages * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
        chosen: Flags = np.where(zeros, scattered, memory.words[:, 1]) % np.uint64(self.of) == 0
        return chosen

    def error(self, snapshots: Sequence[Snapshot], max_page_sharing: int = 256) -> float:
        """One standard error, in pages, of the sample's settled saving times `of` as that of the whole. O(n log n).

        A content with x pages to save is in the sample, with all of them, by a chance of p = 1/of: the variance of the
        extrapolated sum is estimated without bias by the sum of x^2 (1 - p) / p^2 over the contents in the sample
        (Horvitz and Thompson, 1952, for independent draws), where each page of zeros counts as one by itself.

        >>> Sample(1).error([])
        0.0
        """
        p = 1 / self.of
        total = 0.0
        words = [snapshot.words() for snapshot in snapshots]
        if self.of > 1 and words:
            prints = Fingerprints(np.concatenate(words))
            zeros = prints.zeros(snapshots[0].page_size)
            _, copies = prints[~zeros].unique()
            left = copies % max_page_sharing
            saved = copies - copies // max_page_sharing - (left >= 1)
            total = float((saved.astype(np.float64) ** 2).sum()) + float(np.count_nonzero(zeros))
        return math.sqrt(total * (1 - p)) / p

    def __str__(self) -> str:
        return f"1/{self.of}"

"""Which sample has which content how often: the table that all statistics of a plan are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ksm.pages import Fingerprints, zero_words
from ksm.sources import Snapshot

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_CHUNK = 1 << 24  # numbers in the dense rows that are made at a time


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Contents of sample images, the zero page apart; sparse, by content and then by image.

    Attributes:
        class_of: (images,) the class of each.
        pages, zeros: (images,) pages that take part, and the all-zero ones among them.
        starts: (contents + 1,) where each content's entries start.
        image, copies: (entries,) in which image, and how often there.
        words: (contents, 2) their fingerprints.

    >>> words = np.array([[1, 1], [1, 2], [1, 3]], np.uint64)
    >>> two = [Snapshot("", 4096, True, True, ((0, Fingerprints(words[[0, n]])),)) for n in (1, 2)]
    >>> table = Table.of(two, [0, 0])
    >>> table.contents, table.incidence()[:, 0].tolist()
    (3, [2, 1, 1])
    """

    class_of: Ints
    pages: Ints
    zeros: Ints
    starts: Ints
    image: npt.NDArray[np.uint16]
    copies: npt.NDArray[np.uint32]
    words: npt.NDArray[np.uint64]

    @classmethod
    def of(cls, images: Sequence[Snapshot], class_of: Sequence[int], zeros_absent: bool = False) -> Table:
        """Count the contents of images. O(n log n) time, about 60 bytes a page at the most.

        `zeros_absent`: zero pages of images that cannot tell them from memory never touched do not take part.
        """
        zero = np.array(zero_words(images[0].page_size), np.uint64)
        pages, zeros, words, copies = [], [], [], []
        for snapshot in images:
            distinct, count = Fingerprints(snapshot.words()).unique()
            is_zero = (distinct.words == zero).all(axis=1)
            n_zero = int(count[is_zero].sum())
            if zeros_absent and not snapshot.anonymous_known:
                pages.append(int(count.sum()) - n_zero)
                zeros.append(0)
            else:
                pages.append(int(count.sum()))
                zeros.append(n_zero)
            words.append(distinct.words[~is_zero])
            copies.append(count[~is_zero].astype(np.uint32))
        image = np.repeat(np.arange(len(images), dtype=np.uint16), [len(part) for part in words])
        return cls(
            np.asarray(class_of, np.int64),
            np.array(pages, np.int64),
            np.array(zeros, np.int64),
            *_by_content(np.concatenate(words), image, np.concatenate(copies)),
        )

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.pages)

    @property
    def contents(self) -> int:
        """How many different ones there are."""
        return len(self.starts) - 1

    @property
    def classes(self) -> int:
        """How many there are."""
        return int(self.class_of.max()) + 1

    def content_of(self) -> Ints:
        """(entries,) which content each entry is of."""
        return np.repeat(np.arange(self.contents), np.diff(self.starts))

    def incidence(self) -> Ints:
        """(contents, classes): in how many images of each class a content occurs."""
        content = self.content_of()
        of_class = self.class_of[self.image]
        columns = [np.bincount(content[of_class == c], minlength=self.contents) for c in range(self.classes)]
        return np.stack(columns, axis=1)

    def dense(self, which: Ints) -> Ints:
        """(len(which), images): the copies of some contents."""
        lengths = np.diff(self.starts)[which]
        rows = np.repeat(np.arange(len(which)), lengths)
        first = np.cumsum(lengths) - lengths
        entries = np.arange(lengths.sum()) - np.repeat(first - self.starts[which], lengths)
        found = np.zeros((len(which), self.images), np.int64)
        found[rows, self.image[entries]] = self.copies[entries]
        return found

    def totals(self) -> Ints:
        """(contents,) copies over all images."""
        if not self.contents:
            return np.zeros(0, np.int64)
        return np.add.reduceat(self.copies.astype(np.int64), self.starts[:-1])

    def composition(self) -> tuple[Ints, Ints, Ints]:
        """Of each image, zero pages apart: further copies of contents, contents that others have too, its own."""
        alone = np.diff(self.starts) == 1
        own = np.bincount(self.image[self.starts[:-1][alone]], minlength=self.images)
        every = np.bincount(self.image, minlength=self.images)
        return self.pages - self.zeros - every, every - own, own

    def held_by(self, images: npt.NDArray[np.bool_], least: int, page_size: int) -> npt.NDArray[np.uint64]:
        """Low words of the contents that at least so many of some images have, the zero page among them."""
        some = np.zeros(0, np.bool_)
        if self.contents:
            some = np.add.reduceat(images[self.image].astype(np.int64), self.starts[:-1]) >= least
        zero = [zero_words(page_size)[1]] if np.count_nonzero(self.zeros[images]) >= least else []
        return np.append(self.words[some, 1], np.array(zero, np.uint64))

    def overlap(self) -> Ints:
        """(images, images) pages of the row's image whose content the column's has; zero pages apart."""
        shared = np.flatnonzero(np.diff(self.starts) > 1)
        found = np.zeros((self.images, self.images))
        rows = max(1, _CHUNK // self.images)
        for at in range(0, len(shared), rows):
            copies = self.dense(shared[at : at + rows]).astype(np.float64)
            found += copies.T @ (copies > 0)
        np.fill_diagonal(found, self.pages - self.zeros)
        return np.rint(found).astype(np.int64)


def _by_content(
    words: npt.NDArray[np.uint64], image: npt.NDArray[np.uint16], copies: npt.NDArray[np.uint32]
) -> tuple[Ints, npt.NDArray[np.uint16], npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
    """Sort entries by content: starts, image, copies, words of the contents."""
    order = np.argsort(words[:, 1], kind="stable")
    changes = words[order[1:]] != words[order[:-1]]
    if (changes[:, 0] & ~changes[:, 1]).any():  # low words that collide: sort by both
        order = np.lexsort((words[:, 0], words[:, 1]))
        changes = words[order[1:]] != words[order[:-1]]
    first = np.flatnonzero(np.concatenate(([len(words) > 0], changes.any(axis=1))))
    starts = np.append(first, len(words)).astype(np.int64)
    return starts, image[order], copies[order], words[order[first]]

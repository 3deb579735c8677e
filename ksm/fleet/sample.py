"""The contents of VMs as sets of numbers: a sample that all VMs have in common, or all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ksm.fleet.sketch import retained

# How many (VM, content) pairs are kept at most. 340 contents a VM tell whom it shares with in a fleet of 100,000, which
# takes a gigabyte while they are numbered; small fleets have time for more.
CELLS, CELLS_EACH = 2_000_000, 320


@dataclass(frozen=True, slots=True)
class Sample:
    """Which contents each VM has, of those that two VMs or more have; and how many it has alone.

    >>> from ksm.fleet.sketch import sketch
    >>> one = sketch(np.array([[1, 0], [2, 0]], np.uint64)); two = sketch(np.array([[2, 0], [3, 0]], np.uint64))
    >>> found = Sample.of([one, two])
    >>> found.weight, [row.tolist() for row in found.rows], found.alone.tolist()
    (1.0, [[0], [0]], [1, 1])
    """

    row: npt.NDArray[np.uint32]
    """The numbers of contents, those of one VM after the other, ascending in each."""
    starts: npt.NDArray[np.int64]
    """(VMs + 1,) where each one's begin in `row`."""
    alone: npt.NDArray[np.int64]
    """Of each VM, how many sampled contents no other has."""
    weight: float
    """How many contents a sampled one stands for."""

    @property
    def rows(self) -> list[npt.NDArray[np.uint32]]:
        """Of each VM, the numbers of its contents, ascending."""
        return np.split(self.row, self.starts[1:-1]) if len(self.starts) > 1 else []

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Of each VM, how many sampled contents it has, alone or not."""
        return np.diff(self.starts) + self.alone

    @classmethod
    def of(cls, sketches: Sequence[bytes]) -> Sample:
        """The contents whose hash lies below the lowest threshold of all sketches. O(n log n).

        Raises:
            SourceError: not a sketch.

        >>> Sample.of([]).weight
        1.0
        """
        kept = [retained(data, f"sketch {index}") for index, data in enumerate(sketches)]
        fraction = min((share for _, share in kept), default=1.0)
        many = sum(len(hashes) * fraction / share for hashes, share in kept)
        fraction = min(fraction, fraction * (CELLS + CELLS_EACH * len(kept)) / max(many, 1.0))
        limit = np.uint64(min(fraction * float(1 << 63), float((1 << 63) - 1)))
        sets = [hashes[: np.searchsorted(hashes, limit)] if fraction < 1 else hashes for hashes, _ in kept]
        return cls._numbered(sets, 1.0 / fraction)

    @classmethod
    def exact(cls, sets: Sequence[npt.NDArray[np.uint64]]) -> Sample:
        """All contents, from the high words of each VM's fingerprints, each once.

        >>> Sample.exact([np.array([5, 6], np.uint64), np.array([6], np.uint64)]).alone.tolist()
        [1, 0]
        """
        return cls._numbered(sets, 1.0)

    @classmethod
    def _numbered(cls, sets: Sequence[npt.NDArray[np.uint64]], weight: float) -> Sample:
        lengths = np.array([len(part) for part in sets], np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        if not starts[-1]:
            return cls(np.zeros(0, np.uint32), np.zeros_like(starts), lengths, weight)
        _, number, many = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
        shared = many > 1
        having = shared[number]
        code = (np.cumsum(shared) - 1).astype(np.uint32)
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(having)])
        ascending = np.lexsort((number, np.repeat(np.arange(len(sets)), lengths))) if _unsorted(sets) else slice(None)
        row = code[number[ascending]][having[ascending]]
        return cls(row, before[starts], lengths - np.diff(before[starts]), weight)


def _unsorted(sets: Sequence[npt.NDArray[np.uint64]]) -> bool:
    return any(len(part) > 1 and bool((part[1:] < part[:-1]).any()) for part in sets)

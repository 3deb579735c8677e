"""The contents of VMs as sets of numbers: a sample that all VMs have in common, or all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ksm.fleet.sketch import retained

CELLS = 64_000_000  # (VM, content) pairs that are kept at most: half a gigabyte while they are numbered


@dataclass(frozen=True, slots=True)
class Sample:
    """Which contents each VM has, of those that two VMs or more have; and how many it has alone.

    >>> from ksm.fleet.sketch import sketch
    >>> one = sketch(np.array([[1, 0], [2, 0]], np.uint64)); two = sketch(np.array([[2, 0], [3, 0]], np.uint64))
    >>> found = Sample.of([one, two])
    >>> found.weight, [row.tolist() for row in found.rows], found.alone.tolist()
    (1.0, [[0], [0]], [1, 1])
    """

    rows: tuple[npt.NDArray[np.int64], ...]
    """Of each VM, the numbers of its contents, ascending."""
    alone: npt.NDArray[np.int64]
    """Of each VM, how many sampled contents no other has."""
    weight: float
    """How many contents a sampled one stands for."""

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
        fraction = min(fraction, fraction * CELLS / max(many, 1.0))
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
        if not sets:
            return cls((), np.zeros(0, np.int64), weight)
        lengths = [len(part) for part in sets]
        _, number, many = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
        shared = many > 1
        code = np.cumsum(shared) - 1
        rows, alone = [], []
        for part in np.split(number, np.cumsum(lengths)[:-1]):
            having = shared[part]
            rows.append(np.sort(code[part[having]]).astype(np.int64))
            alone.append(len(part) - len(rows[-1]))
        return cls(tuple(rows), np.array(alone, np.int64), weight)

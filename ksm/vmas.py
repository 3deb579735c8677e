"""The mapped ranges of one address space: split, joined and changed as the kernel's VMAs are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ksm.constants import PROT_READ, PROT_WRITE

_families = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Vma:
    """One mapped range of an address space, in page numbers: [start, end).

    >>> Vma(0, 4).end
    4
    """

    start: int
    end: int
    prot: int = PROT_READ | PROT_WRITE
    mergeable: bool = False
    huge: bool | None = None
    """MADV_HUGEPAGE or MADV_NOHUGEPAGE; None: neither."""
    node: int = 0
    moved: int = 0
    """How far mremap moved it since it was first written; ranges moved differently stay apart."""
    family: int = 0
    """The anon_vma that its pages belong to, 0 before the first write. Ranges of two families stay apart."""
    inherited: bool = False
    """Whether it was written before the fork that made this process: it joins nothing of no family."""

    def joins(self, other: Vma) -> bool:
        """Whether the range that follows at once is of the same mapping.

        >>> Vma(0, 4).joins(Vma(4, 8)), Vma(0, 4).joins(Vma(5, 8))
        (True, False)
        """
        if self.end != other.start or self != replace(
            other, start=self.start, end=self.end, family=self.family, inherited=self.inherited
        ):
            return False
        if self.family and other.family:
            return self.family == other.family
        return not self.inherited and not other.inherited

    def shares_family(self, other: Vma) -> bool:
        """Whether a first write here takes the family of `other`, a neighbour; protection does not matter.

        >>> Vma(0, 4).shares_family(Vma(4, 8, family=7))
        True
        """
        near = self.end == other.start or other.end == self.start
        return (
            near
            and other.family != 0
            and not other.inherited
            and (self.mergeable, self.huge, self.node, self.moved)
            == (other.mergeable, other.huge, other.node, other.moved)
        )


class VmaList:
    """Disjoint ranges by ascending address.

    >>> vmas = VmaList()
    >>> vmas.insert(Vma(0, 8))
    >>> vmas.change(2, 4, prot=1)
    >>> [(v.start, v.end) for v in vmas]
    [(0, 2), (2, 4), (4, 8)]
    """

    def __init__(self) -> None:
        self._vmas: list[Vma] = []

    def __iter__(self) -> Iterator[Vma]:
        return iter(self._vmas)

    def __len__(self) -> int:
        return len(self._vmas)

    @property
    def end(self) -> int:
        """The end of the last range; 0 without any.

        >>> VmaList().end
        0
        """
        return self._vmas[-1].end if self._vmas else 0

    @property
    def any_mergeable(self) -> bool:
        """Whether a range is marked mergeable.

        >>> VmaList().any_mergeable
        False
        """
        return any(vma.mergeable for vma in self._vmas)

    def at(self, vpn: int) -> Vma | None:
        """The range that holds a page. O(log n).

        >>> VmaList().at(0) is None
        True
        """
        at = self._position(vpn)
        return self._vmas[at] if at < len(self._vmas) and self._vmas[at].start <= vpn else None

    def overlapping(self, start: int, end: int) -> list[Vma]:
        """The ranges with a page in [start, end), whole. O(log n + found).

        >>> VmaList().overlapping(0, 10)
        []
        """
        first = last = self._position(start)
        while last < len(self._vmas) and self._vmas[last].start < end:
            last += 1
        return self._vmas[first:last]

    def gap(self, low: int, high: int, n: int) -> int | None:
        """The lowest free range of n pages within [low, high). O(n).

        >>> VmaList().gap(16, 100, 4)
        16
        """
        for vma in self._vmas:
            if vma.start - low >= n:
                break
            low = max(low, vma.end)
        return low if low + n <= high else None

    def insert(self, vma: Vma) -> None:
        """Put a range in place of whatever was there, joined with its neighbours where they are alike.

        >>> vmas = VmaList()
        >>> vmas.insert(Vma(0, 4)); vmas.insert(Vma(4, 8))
        >>> len(vmas)
        1
        """
        self._replace(vma.start, vma.end, [vma])

    def remove(self, start: int, end: int) -> None:
        """Unmap [start, end).

        >>> vmas = VmaList()
        >>> vmas.insert(Vma(0, 8)); vmas.remove(2, 4)
        >>> len(vmas)
        2
        """
        self._replace(start, end, [])

    def change(self, start: int, end: int, **what: Any) -> None:
        """Change attributes of the mapped parts of [start, end); what is so already stays as it is.

        >>> vmas = VmaList()
        >>> vmas.insert(Vma(0, 8)); vmas.change(0, 8, mergeable=True)
        >>> vmas.any_mergeable
        True
        """
        for vma in self.overlapping(start, end):
            if replace(vma, **what) != vma:
                low, high = max(start, vma.start), min(end, vma.end)
                self._replace(low, high, [replace(vma, start=low, end=high, **what)])

    def change_all(self, **what: Any) -> None:
        """Change attributes of every range, joining none: what prctl does.

        >>> vmas = VmaList()
        >>> vmas.insert(Vma(0, 8)); vmas.change_all(mergeable=True)
        >>> vmas.any_mergeable
        True
        """
        self._vmas = [replace(vma, **what) for vma in self._vmas]

    def found_family(self, vma: Vma) -> None:
        """Note the first write to a range: it takes a neighbour's family (the next one's first), or a new one.

        >>> vmas = VmaList()
        >>> vmas.insert(Vma(0, 8)); vmas.found_family(Vma(0, 8))
        >>> vmas.at(0).family > 0
        True
        """
        at = self._position(vma.start)
        near = [self._vmas[i] for i in (at + 1, at - 1) if 0 <= i < len(self._vmas)]
        family = next((other.family for other in near if vma.shares_family(other)), 0) or next(_families)
        self._vmas[at] = replace(vma, family=family)

    def forked(self) -> VmaList:
        """The child's ranges: each that was written gets a family of its own.

        >>> len(VmaList().forked())
        0
        """
        child = VmaList()
        child._vmas = [replace(v, family=next(_families), inherited=True) if v.family else v for v in self._vmas]
        return child

    def _position(self, vpn: int) -> int:
        """Index of the first range that ends after vpn."""
        low, high = 0, len(self._vmas)
        while low < high:
            middle = (low + high) // 2
            if self._vmas[middle].end <= vpn:
                low = middle + 1
            else:
                high = middle
        return low

    def _replace(self, start: int, end: int, new: list[Vma]) -> None:
        """Put `new` in place of everything in [start, end), joined with a neighbour where they are alike.

        Neighbours that prctl made alike stay apart until one of them changes.
        """
        first = max(0, self._position(start) - 1)
        last = first
        while last < len(self._vmas) and self._vmas[last].start <= end:
            last += 1
        old = self._vmas[first:last]
        before = [replace(vma, end=min(vma.end, start)) for vma in old if vma.start < start]
        after = [replace(vma, start=max(vma.start, end)) for vma in old if vma.end > end]
        if new and before and before[-1].joins(new[0]):
            new = [_joined(before.pop(), new[0]), *new[1:]]
        if new and after and new[-1].joins(after[0]):
            new = [*new[:-1], _joined(new[-1], after.pop(0))]
        self._vmas[first:last] = [*before, *new, *after]


def _joined(left: Vma, right: Vma) -> Vma:
    return replace(left, end=right.end, family=left.family or right.family)

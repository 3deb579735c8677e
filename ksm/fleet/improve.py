"""Moves and swaps that make any placement better, one VM or two at a time: a local search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from ksm.fleet.kin import Neighbours
from ksm.fleet.packing import Packing

Places = npt.NDArray[np.int64]

SWEEPS = 8  # over all VMs, at most
_BINS = 16  # that a VM is tried on, of those which have most of its kin
_PARTNERS = 8  # VMs that a VM is tried to change places with, where there is no room for it
_WORTH = 1e-4  # of all contents: a sweep that frees less is the last


def improve(
    packing: Packing, home: Places, most: int | None = None, progress: Callable[[int], object] | None = None
) -> None:
    """Move VMs, alone or two for each other, as long as that saves contents, or empties a host at no cost.

    O(SWEEPS * VMs * _BINS * sample of one). Constraints that hold before hold after.

    Args:
        packing: every VM is somewhere.
        home: the bins that VMs are away from when they count towards `most`.
        most: at most so many VMs are away from home in the end; None: any number.
        progress: called with the number of VMs looked at, over all sweeps.

    >>> from ksm.fleet import Host, Vm
    >>> from ksm.fleet.sample import Sample
    >>> sets = [np.array([1, 2], np.uint64)] * 2
    >>> packing = Packing([Vm(name=name, ram=4096) for name in "ab"], [Host(name=n, ram=8192) for n in "xy"],
    ...                   Sample.exact(sets))
    >>> packing.put(0, 0); packing.put(1, 1); improve(packing, np.array([0, 1])); packing.used()
    1
    """
    search = _Search(packing, home, most)
    for sweep in range(SWEEPS):
        before = packing.contents()
        hosts = packing.used()
        search.sweep(shifted(progress, sweep * len(packing.vms)))
        if before - packing.contents() <= _WORTH * before and hosts == packing.used():
            return


def shifted(progress: Callable[[int], object] | None, before: int) -> Callable[[int], object]:
    """Progress of a part of the work, told as that of all of it.

    >>> shifted(print, 10)(1)
    11
    """

    def show(done: int) -> None:
        if progress is not None:
            progress(before + done)

    return show


class _Search:
    def __init__(self, packing: Packing, home: Places, most: int | None) -> None:
        self.packing, self.home, self.most = packing, home, most
        self.near = Neighbours(packing)
        self.away = int(((packing.at != home) & (home >= 0)).sum())
        self.free = [vm for vm, about in enumerate(packing.vms) if not about.pinned]

    def sweep(self, progress: Callable[[int], object]) -> None:
        """Find each VM's best move as things are, then make them, those first that free most."""
        gains = []
        for done, vm in enumerate(self.free):
            gain = max((gain for gain, _ in self.wishes(vm)), default=0.0)
            if gain > 0:
                gains.append((-gain, vm))
            progress(done)
        for _, vm in sorted(gains):
            self.better(vm)

    def wishes(self, vm: int) -> Iterator[tuple[float, int]]:
        """What a VM frees by going to a bin where its kin is, in sampled contents, whether there is room or not."""
        packing = self.packing
        here = packing.bins[int(packing.at[vm])]
        freed = packing.freed(vm)
        leaves_empty = 0.5 * (len(packing.members[here.host]) == 1)
        for where in self.likely(vm):
            bin = packing.bins[where]
            if bin.group != here.group and packing.members[bin.host]:  # an empty host shares nothing
                yield freed - packing.new(vm, where) + leaves_empty, where

    def likely(self, vm: int) -> Iterable[int]:
        """Bins that may be worth a try."""
        if len(self.packing.bins) <= _BINS:
            return range(len(self.packing.bins))
        return (int(where) for where in self.near.bins(vm, _BINS))

    def better(self, vm: int) -> bool:
        """Make a VM's best move, or the best change of places where there is no room."""
        wishes = sorted((wish for wish in self.wishes(vm) if wish[0] > 0), reverse=True)
        for _, where in wishes:
            if not self.packing.why_not(vm, where):
                if not self.allowed((vm, where)):
                    continue
                self.move(vm, where)
                return True
            if self.swap(vm, where):
                return True
        return False

    def swap(self, vm: int, where: int) -> bool:
        """Let a VM change places with one of a bin's that is worth least there, if that frees contents."""
        packing = self.packing
        here = int(packing.at[vm])
        others = [
            other
            for other in packing.members[packing.bins[where].host]
            if int(packing.at[other]) == where and not packing.vms[other].pinned
        ]
        others.sort(key=lambda other: packing.new(other, here) - packing.freed(other))
        for other in others[:_PARTNERS]:
            if not self.allowed((vm, where), (other, here)):
                continue
            before = packing.pairs
            packing.take(vm)
            packing.take(other)
            fits = not packing.why_not(vm, where)
            if fits:
                packing.put(vm, where)
                if not packing.why_not(other, here):
                    packing.put(other, here)
                    if packing.pairs < before:
                        self.count((vm, here), (other, where))
                        return True
                    packing.take(other)
                packing.take(vm)
            packing.put(other, where)
            packing.put(vm, here)
        return False

    def move(self, vm: int, where: int) -> None:
        """Do it."""
        here = self.packing.take(vm)
        self.packing.put(vm, where)
        self.count((vm, here))

    def allowed(self, *moves: tuple[int, int]) -> bool:
        """Whether so many may be away from home."""
        return self.most is None or self.away + self.more(moves, self.packing.at) <= self.most

    def count(self, *moved: tuple[int, int]) -> None:
        """Note who is away from home, of VMs and the bins they were on before."""
        self.away -= self.more(moved, self.packing.at)

    def more(self, moves: Iterable[tuple[int, int]], at: Places) -> int:
        """How many more VMs would be away from home, were these on those bins."""
        has = [(vm, where) for vm, where in moves if self.home[vm] >= 0]  # a VM that is nowhere today does not migrate
        return sum(int(where != self.home[vm]) - int(at[vm] != self.home[vm]) for vm, where in has)

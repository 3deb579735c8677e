"""Orders in which VMs that share stand next to each other.

By MinHash (Broder, "On the resemblance and containment of documents", 1997): two sets have the same least element of a
random order as often as they overlap, for their union.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from ksm.fleet.packing import Packing

_LEAST = 4  # random orders whose least elements sort one order of VMs
_COMMON = 0.5  # contents that more than this part of all VMs have tell nothing of who is kin to whom

Ints = npt.NDArray[np.int64]


def kin(packing: Packing, seed: int = 1) -> Ints:
    """(VMs,) all VMs, domain by domain, those of the same least contents together. O(sample + VMs log VMs).

    >>> from ksm.fleet import Vm
    >>> from ksm.fleet.sample import Sample
    >>> sets = [np.array(part, np.uint64) for part in ([1, 2], [8, 9], [1, 2], [8, 9])]
    >>> kin(Packing([Vm(name=name) for name in "abcd"], [], Sample.exact(sets))).tolist()
    [0, 2, 1, 3]
    """
    row, starts = _telling(packing)
    lengths = np.diff(starts)
    some = np.flatnonzero(lengths)
    size = int(row.max(initial=0)) + 1
    random = np.random.default_rng(seed)
    keys = []
    for _ in range(_LEAST):
        least = np.full(len(packing.vms), size)
        if len(some):
            least[some] = np.minimum.reduceat(random.permutation(size)[row], starts[some])
        keys.append(least)
    domains = sorted({vm.domain for vm in packing.vms})
    number = {domain: index for index, domain in enumerate(domains)}
    names = np.argsort(np.argsort([vm.name for vm in packing.vms])) if packing.vms else np.zeros(0, np.int64)
    ram = np.array([-vm.ram for vm in packing.vms], np.int64)
    found = np.lexsort((names, ram, *reversed(keys), np.array([number[vm.domain] for vm in packing.vms], np.int64)))
    return found.astype(np.int64)


def _telling(packing: Packing) -> tuple[npt.NDArray[np.uint32], Ints]:
    """The sample's contents without those that nearly all VMs have, and where each VM's begin."""
    row, starts = packing.sample.row, packing.sample.starts
    rare = (np.bincount(row) <= _COMMON * len(packing.vms))[row] if len(row) else np.zeros(0, bool)
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(rare)])
    return row[rare], before[starts]


class Neighbours:
    """Bins on which a VM's kin are, found by the places of VMs in a few orders.

    >>> from ksm.fleet import Host, Vm
    >>> from ksm.fleet.sample import Sample
    >>> sets = [np.array(part, np.uint64) for part in ([1, 2], [8, 9], [1, 2])]
    >>> packing = Packing([Vm(name=n) for n in "abc"], [Host(name="h", ram=4096, nodes=2)], Sample.exact(sets))
    >>> packing.put(2, 1)
    >>> Neighbours(packing).bins(0, 8).tolist()
    [1]
    """

    ORDERS, REACH = 3, 12

    def __init__(self, packing: Packing) -> None:
        self._packing = packing
        make = partial(kin, packing)
        self._orders = [make(seed) for seed in range(1, self.ORDERS + 1)]
        self._places = [np.argsort(order) for order in self._orders]

    def bins(self, vm: int, most: int) -> Ints:
        """At most so many, those first that hold most of its kin."""
        near = []
        for order, place in zip(self._orders, self._places, strict=True):
            at = int(place[vm])
            near.append(order[max(at - self.REACH, 0) : at + self.REACH + 1])
        kinship = np.concatenate(near)
        where, number = np.unique(self._packing.at[kinship[kinship != vm]], return_counts=True)
        where, number = where[where >= 0], number[where >= 0]
        return where[np.argsort(-number, kind="stable")[:most]]

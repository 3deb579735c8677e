"""Ways to place VMs: by what they share, and the baselines that know nothing of it.

By sharing: hosts are filled one after the other, each time with the VM that brings the fewest contents that are not
there yet for its size, of those that a MinHash order puts next to each other (`ksm.fleet.kin`). It builds on Memory
Buddies (Wood et al., VEE 2009), which places each VM where its fingerprint has most in common, and on the
sharing-aware greedy packing of Sindelar, Sitaraman and Shenoy (SPAA 2011).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from ksm.fleet.kin import kin
from ksm.fleet.packing import Packing, PlacementError

Places = npt.NDArray[np.int64]

CANDIDATES = 128  # VMs that are looked at for the next place on a host


def first_fit(packing: Packing, order: Iterable[int]) -> None:
    """Put each VM that is nowhere on the first bin that takes it. O(VMs * bins).

    Raises:
        PlacementError: none does; the message says which constraints stood against it.

    >>> from ksm.fleet import Host, Vm
    >>> from ksm.fleet.sample import Sample
    >>> packing = Packing([Vm(name="a", ram=4096)], [Host(name="h", ram=4096)], Sample.exact([np.zeros(0, np.uint64)]))
    >>> first_fit(packing, [0])
    >>> packing.at.tolist()
    [0]
    """
    for vm in order:
        if packing.at[vm] >= 0:
            continue
        fits = packing.bins_for(vm)
        where = int(fits.argmax())
        if not fits[where]:
            reasons = Counter(packing.why_not(vm, where) for where in range(len(packing.bins)))
            said = ", ".join(f"{why} ({number})" for why, number in sorted(reasons.items()))
            raise PlacementError(f"no NUMA node has room for {packing.vms[vm].name}; what stands against it: {said}")
        packing.put(vm, where)


def decreasing(packing: Packing) -> list[int]:
    """All VMs, the largest first: the order of first-fit decreasing.

    >>> from ksm.fleet import Vm
    >>> from ksm.fleet.sample import Sample
    >>> decreasing(Packing([Vm(name="a", ram=1), Vm(name="b", ram=2)], [], Sample.of([])))
    [1, 0]
    """
    return sorted(range(len(packing.vms)), key=lambda vm: (-packing.vms[vm].ram, packing.vms[vm].name))


def by_class(packing: Packing) -> list[int]:
    """All VMs, class by class, the largest first.

    >>> from ksm.fleet import Vm
    >>> from ksm.fleet.sample import Sample
    >>> by_class(Packing([Vm(name="a", kind="z"), Vm(name="b", kind="y")], [], Sample.of([])))
    [1, 0]
    """
    vms = packing.vms
    return sorted(range(len(vms)), key=lambda vm: (vms[vm].domain, vms[vm].kind, -vms[vm].ram, vms[vm].name))


def at_random(packing: Packing, seed: int = 0) -> None:
    """Put each VM that is nowhere, the largest first, on a bin by chance of those that take it. O(VMs * bins).

    Raises:
        PlacementError: none does.

    >>> from ksm.fleet import Host, Vm
    >>> from ksm.fleet.sample import Sample
    >>> packing = Packing([Vm(name="a", ram=4096)], [Host(name="h", ram=4096)], Sample.exact([np.zeros(0, np.uint64)]))
    >>> at_random(packing)
    >>> packing.at.tolist()
    [0]
    """
    chance = np.random.default_rng(seed)
    for vm in decreasing(packing):
        if packing.at[vm] >= 0:
            continue
        fitting = np.flatnonzero(packing.bins_for(vm))
        if len(fitting):
            packing.put(vm, int(chance.choice(fitting)))
        else:
            first_fit(packing, [vm])  # says why


def by_sharing(packing: Packing, today: Places, progress: Callable[[int], object] | None = None) -> None:
    """Fill bin after bin with the VMs that share most with what is there. O(VMs * CANDIDATES * sample of one).

    Args:
        packing: what is placed stays.
        today: bins, preferred where it makes no other difference.
        progress: called with the number of VMs placed.

    Raises:
        PlacementError: a VM fits nowhere in the end.

    >>> from ksm.fleet import Host, Vm
    >>> from ksm.fleet.sample import Sample
    >>> sets = [np.array(part, np.uint64) for part in ([1, 2], [8, 9], [1, 2], [8, 9])]
    >>> vms = [Vm(name=name, ram=4096) for name in "abcd"]
    >>> packing = Packing(vms, [Host(name=name, ram=8192) for name in "xy"], Sample.exact(sets))
    >>> by_sharing(packing, np.full(4, -1)); packing.at.tolist()
    [0, 1, 0, 1]
    """
    alone, sizes = packing.sample.alone, np.maximum(packing.sample.sizes, 1)
    left = kin(packing)
    left = left[packing.at[left] < 0]
    order = sorted(range(len(packing.bins)), key=lambda where: (-packing.ram[where], -packing.bins[where].ram, where))
    for where in order:
        while len(left):
            window = left[:CANDIDATES]
            fitting = np.flatnonzero(packing.vms_for(window, where))
            if not len(fitting) and len(left) > CANDIDATES:  # those further on may belong to another domain, or be less
                window = left
                fitting = np.flatnonzero(packing.vms_for(window, where))[:CANDIDATES]
            if not len(fitting):
                break
            vms = window[fitting]
            fresh = (packing.new_each(vms, where) + alone[vms]) / sizes[vms]
            best = int((fresh + 1e-6 * (today[vms] != where)).argmin())
            packing.put(int(vms[best]), where)
            left = np.delete(left, fitting[best])
            if progress is not None:
                progress(len(packing.vms) - len(left))
    first_fit(packing, left.tolist())

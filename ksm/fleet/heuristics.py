"""Ways to place VMs: by what they share, and the baselines that know nothing of it.

By sharing: hosts are filled one after the other, each time with the VM that brings the fewest contents that are not
there yet for its size; then VMs move, alone, as long as that saves. It builds on Memory Buddies (Wood et al., VEE
2009), which places each VM where its fingerprint has most in common, and on the sharing-aware greedy packing of
Sindelar, Sitaraman and Shenoy (SPAA 2011).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ksm.fleet.packing import Packing, PlacementError

Places = npt.NDArray[np.int64]

CANDIDATES = 256  # VMs that are looked at for the next place on a host
BINS = 16  # that a VM is tried on, of those which have most of its kin


def first_fit(packing: Packing, order: Iterable[int]) -> None:
    """Put each VM that is nowhere on the first bin that takes it.

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
        reasons: dict[str, int] = {}
        for where in range(len(packing.bins)):
            if not (why := packing.why_not(vm, where)):
                packing.put(vm, where)
                break
            reasons[why] = reasons.get(why, 0) + 1
        else:
            said = ", ".join(f"{why} ({number})" for why, number in sorted(reasons.items()))
            raise PlacementError(f"no NUMA node has room for {packing.vms[vm].name}; what stands against it: {said}")


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
    """Put each VM that is nowhere on a bin by chance that takes it; what then fits nowhere goes first-fit.

    >>> from ksm.fleet import Host, Vm
    >>> from ksm.fleet.sample import Sample
    >>> packing = Packing([Vm(name="a", ram=4096)], [Host(name="h", ram=4096)], Sample.exact([np.zeros(0, np.uint64)]))
    >>> at_random(packing)
    >>> packing.at.tolist()
    [0]
    """
    chance = random.Random(seed)
    order = [vm for vm in decreasing(packing) if packing.at[vm] < 0]
    for vm in order:
        for _ in range(4 * len(packing.bins)):
            where = chance.randrange(len(packing.bins))
            if not packing.why_not(vm, where):
                packing.put(vm, where)
                break
    first_fit(packing, order)


def by_sharing(packing: Packing, today: Places, progress: Callable[[int, int], object] | None = None) -> None:
    """Fill bin after bin with the VMs that share most with what is there. O(VMs * CANDIDATES * sample).

    >>> from ksm.fleet import Host, Vm
    >>> from ksm.fleet.sample import Sample
    >>> sets = [np.array(part, np.uint64) for part in ([1, 2], [8, 9], [1, 2], [8, 9])]
    >>> vms = [Vm(name=name, ram=4096) for name in "abcd"]
    >>> packing = Packing(vms, [Host(name=name, ram=8192) for name in "xy"], Sample.exact(sets))
    >>> by_sharing(packing, np.full(4, -1)); packing.at.tolist()
    [0, 1, 0, 1]
    """
    queue = kin(packing)
    left = [vm for vm in queue if packing.at[vm] < 0]
    order = sorted(range(len(packing.bins)), key=lambda where: (-packing.ram[where], -packing.bins[where].ram, where))
    for where in order:
        while left:
            best, score = -1, float("inf")
            for position, vm in enumerate(left[:CANDIDATES]):
                if packing.why_not(vm, where):
                    continue
                row = len(packing.sample.rows[vm]) + int(packing.sample.alone[vm])
                fresh = (packing.new(vm, where) + int(packing.sample.alone[vm])) / max(row, 1)
                stays = 1e-6 * (today[vm] != where)
                if fresh + stays < score:
                    best, score = position, fresh + stays
            if best < 0:
                break
            packing.put(left.pop(best), where)
            if progress is not None:
                progress(len(packing.vms) - len(left), len(packing.vms))
    first_fit(packing, left)


def kin(packing: Packing) -> list[int]:
    """All VMs so that those which share stand together: by domain, then by their lowest common contents (MinHash).

    >>> from ksm.fleet import Vm
    >>> from ksm.fleet.sample import Sample
    >>> sets = [np.array(part, np.uint64) for part in ([1, 2], [8, 9], [1, 2])]
    >>> kin(Packing([Vm(name=name) for name in "abc"], [], Sample.exact(sets)))
    [1, 0, 2]
    """
    rows = packing.sample.rows
    size = max((int(row[-1]) + 1 for row in rows if len(row)), default=1)
    mixed = np.random.default_rng(1).permutation(size)
    least = [tuple(np.sort(mixed[row])[:4].tolist()) for row in rows]
    vms = packing.vms
    return sorted(range(len(vms)), key=lambda vm: (vms[vm].domain, least[vm], -vms[vm].ram, vms[vm].name))


def improve(packing: Packing, home: Places, most: int | None = None, sweeps: int = 8) -> None:
    """Move single VMs as long as that saves contents, or empties a host at no cost; at most `most` away from `home`.

    >>> from ksm.fleet import Host, Vm
    >>> from ksm.fleet.sample import Sample
    >>> sets = [np.array([1, 2], np.uint64)] * 2
    >>> packing = Packing([Vm(name=name, ram=4096) for name in "ab"], [Host(name=n, ram=8192) for n in "xy"],
    ...                   Sample.exact(sets))
    >>> packing.put(0, 0); packing.put(1, 1); improve(packing, np.array([0, 1])); packing.used()
    1
    """
    for _ in range(sweeps):
        gains = []
        for vm in range(len(packing.vms)):
            if packing.vms[vm].pinned:
                continue
            gain, where = _best(packing, vm)
            if gain > 0:
                gains.append((gain, vm, where))
        moved = 0
        for _, vm, _ in sorted(gains, reverse=True):
            gain, where = _best(packing, vm)
            if gain <= 0:
                continue
            away = int((packing.at != home).sum()) - (packing.at[vm] != home[vm]) + (where != home[vm])
            if most is not None and away > most:
                continue
            packing.take(vm)
            packing.put(vm, where)
            moved += 1
        if not moved:
            return


def _best(packing: Packing, vm: int) -> tuple[float, int]:
    """What the best move of a VM frees, in sampled contents, and where to."""
    here = int(packing.at[vm])
    freed = packing.freed(vm)
    alone = len(packing.members[packing.bins[here].host]) == 1
    best = (0.0, here)
    for where in _likely(packing, vm):
        if where == here or packing.bins[where].group == packing.bins[here].group or packing.why_not(vm, where):
            continue
        if not packing.members[packing.bins[where].host]:
            continue  # an empty host shares nothing
        gain = freed - packing.new(vm, where) + 0.5 * alone
        best = max(best, (gain, where))
    return best


def _likely(packing: Packing, vm: int) -> Sequence[int]:
    if len(packing.bins) <= BINS:
        return range(len(packing.bins))
    some = packing.sample.rows[vm][:: max(len(packing.sample.rows[vm]) // 8, 1)].tolist()
    score = [(-sum(c in packing.counts[bin.group] for c in some), index) for index, bin in enumerate(packing.bins)]
    return [index for _, index in sorted(score)[:BINS]]

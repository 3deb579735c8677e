"""Hosts that are alike may stand in for each other: the choice among them that takes the fewest migrations."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ksm.fleet.packing import Packing

Places = npt.NDArray[np.int64]


def renamed(packing: Packing, today: Places) -> Places:
    """(VMs,) bins that save as much, on hosts where most of the VMs are today. O(VMs log VMs), greedy.

    >>> from ksm.fleet import Host, Vm
    >>> from ksm.fleet.sample import Sample
    >>> vms, hosts = [Vm(name="a"), Vm(name="b")], [Host(name="x", ram=1), Host(name="y", ram=1)]
    >>> packing = Packing(vms, hosts, Sample.exact([np.zeros(0, np.uint64)] * 2))
    >>> packing.put(0, 0); packing.put(1, 1)
    >>> renamed(packing, np.array([1, 0])).tolist()
    [1, 0]
    """
    first: dict[int, int] = {}  # the first bin of each host
    for where, bin in enumerate(packing.bins):
        first.setdefault(bin.host, where)
    fixed = {packing.bins[int(at)].host for vm, at in enumerate(packing.at) if packing.vms[vm].pinned}
    kinds = defaultdict(list)
    for host, about in enumerate(packing.hosts):
        if host not in fixed:
            kinds[replace(about, name="-")].append(host)
    kind = {host: members[0] for members in kinds.values() for host in members}
    stay = Counter(
        (packing.bins[int(at)].host, packing.bins[int(now)].host)
        for at, now in zip(packing.at, today, strict=True)
        if now >= 0
    )
    becomes: dict[int, int] = {}
    taken: set[int] = set()
    for (host, now), _ in sorted(stay.items(), key=lambda entry: (-entry[1], entry[0])):
        if host not in becomes and now not in taken and host in kind and kind[host] == kind.get(now):
            becomes[host] = now
            taken.add(now)
    for members in kinds.values():
        free = iter(host for host in members if host not in taken)
        for host in members:
            if host not in becomes:
                becomes[host] = next(free)
    shift = np.zeros(len(packing.bins), np.int64)
    for where, bin in enumerate(packing.bins):
        shift[where] = first[becomes.get(bin.host, bin.host)] - first[bin.host]
    return packing.at + shift[packing.at]

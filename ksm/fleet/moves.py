"""The migrations from one placement to another, in an order that can be carried out."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ksm.fleet.packing import Packing


@dataclass(frozen=True, slots=True)
class Move:
    """One migration.

    >>> Move("vm1", "h1", 0, "h2", 0, 4096, True).to_dict()["to"]
    'h2'
    """

    vm: str
    source: str
    source_node: int
    target: str
    target_node: int
    gain: int
    """Bytes that it frees, done after those before it; below 0 where it makes room for others."""
    fits: bool
    """Whether the target can take it at its turn. Where VMs change places and no host has room to spare, one of them
    has to wait elsewhere meanwhile, on a spare host for instance."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON.

        >>> Move("vm1", "h1", 0, "h2", 0, 4096, True).to_dict()["fits"]
        True
        """
        return {
            "vm": self.vm,
            "from": self.source,
            "from_node": self.source_node,
            "to": self.target,
            "to_node": self.target_node,
            "gain": self.gain,
            "fits": self.fits,
        }


def moves(packing: Packing, today: Any) -> Iterator[Move]:
    """The migrations to a packing, each time the one that frees most of those that fit then; gains are of the sample.

    Args:
        packing: where VMs are to be.
        today: (VMs,) their bins today; -1: nowhere, which is no migration.

    >>> import numpy as np
    >>> from ksm.fleet import Host, Vm
    >>> from ksm.fleet.sample import Sample
    >>> sets = [np.array([1, 2], np.uint64)] * 2
    >>> vms = [Vm(name="a", ram=8192, pages=2), Vm(name="b", ram=8192, pages=2)]
    >>> packing = Packing(vms, [Host(name=n, ram=16384) for n in "xy"], Sample.exact(sets))
    >>> packing.put(0, 0); packing.put(1, 0)
    >>> [(move.vm, move.source, move.target, move.gain) for move in moves(packing, np.array([0, 1]))]
    [('b', 'y', 'x', 8192)]
    """
    return _Order(packing, today).moves()


class _Order:
    def __init__(self, packing: Packing, today: Any) -> None:
        self.target = packing.at.tolist()
        self.now = Packing(packing.vms, packing.hosts, packing.sample, packing.overcommit)
        for vm, where in enumerate(today.tolist()):
            if where >= 0:
                self.now.put(vm, where)
        self.unit = packing.sample.weight * (packing.vms[0].page_size if packing.vms else 0)
        self.heap = [
            (-self.gain(vm), vm) for vm, where in enumerate(today.tolist()) if where >= 0 and where != self.target[vm]
        ]
        self.waiting: dict[int, list[tuple[int, int]]] = {}  # what did not fit, by the host that it waits for

    def gain(self, vm: int) -> int:
        """Sampled contents that the move of a VM frees now."""
        now, there = self.now, self.target[vm]
        same = now.bins[int(now.at[vm])].group == now.bins[there].group
        return 0 if same else now.freed(vm) - now.new(vm, there)

    def moves(self) -> Iterator[Move]:
        """All of them."""
        heapq.heapify(self.heap)
        while self.heap or self.waiting:
            if not self.heap:  # they wait for each other: the one that frees most goes all the same
                host = min(self.waiting, key=lambda host: min(self.waiting[host]))
                entry = min(self.waiting[host])
                self.waiting[host].remove(entry)
                if not self.waiting[host]:
                    del self.waiting[host]
                yield self.go(entry[1], self.gain(entry[1]), fits=False)
                continue
            old, vm = heapq.heappop(self.heap)
            gain = self.gain(vm)
            if self.heap and -gain > max(old, self.heap[0][0]):  # worth less than it was, and now another is worth more
                heapq.heappush(self.heap, (-gain, vm))
            elif self.room(vm):
                yield self.go(vm, gain, fits=True)
            else:
                self.waiting.setdefault(self.now.bins[self.target[vm]].host, []).append((-gain, vm))

    def room(self, vm: int) -> bool:
        """Whether a VM's target takes it now; on its own host its RAM is there twice only for a moment."""
        return not self.now.why_not(vm, self.target[vm])

    def go(self, vm: int, gain: int, fits: bool) -> Move:
        """Carry it out; those that waited for the host that it leaves are looked at again."""
        source = self.now.bins[self.now.take(vm)]
        self.now.put(vm, self.target[vm])
        for entry in self.waiting.pop(source.host, ()):
            heapq.heappush(self.heap, entry)
        goal = self.now.bins[self.target[vm]]
        hosts = self.now.hosts
        names = hosts[source.host].name, source.node, hosts[goal.host].name, goal.node
        return Move(self.now.vms[vm].name, *names, round(gain * self.unit), fits)

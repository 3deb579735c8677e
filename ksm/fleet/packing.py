"""VMs on hosts under constraints, and the memory that merging leaves: what every way of placing works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ksm.errors import KsmError
from ksm.fleet.hosts import Host
from ksm.fleet.sample import Sample
from ksm.fleet.vm import Vm


class PlacementError(KsmError):
    """The constraints cannot be met; the message says which.

    >>> PlacementError("no host has room for vm1").exit_code
    65
    """

    exit_code = 65


@dataclass(frozen=True, slots=True)
class Bin:
    """A NUMA node of a host: what a VM is placed on.

    >>> Bin(0, 1, 1, 64 << 30, 0).node
    1
    """

    host: int
    node: int
    group: int
    """Where its pages merge: one number a host, or a node where nodes merge apart."""
    ram: int
    vcpus: int


class Packing:
    """VMs on bins. Keeps what each bin holds and each group's contents as VMs come and go.

    >>> vms = [Vm(name="a", ram=1 << 20), Vm(name="b", ram=1 << 20)]
    >>> sample = Sample.exact([np.array([1, 2], np.uint64), np.array([2, 3], np.uint64)])
    >>> packing = Packing(vms, [Host(name="h", ram=4 << 20)], sample)
    >>> packing.put(0, 0); packing.put(1, 0)
    >>> packing.contents()
    3.0
    """

    def __init__(self, vms: Sequence[Vm], hosts: Sequence[Host], sample: Sample, overcommit: float = 1.0) -> None:
        self.vms, self.hosts, self.sample, self.overcommit = vms, hosts, sample, overcommit
        self.bins: list[Bin] = []
        for index, host in enumerate(hosts):
            for node in range(host.nodes):
                group = index if host.merge_across_nodes else len(hosts) + len(self.bins)
                self.bins.append(Bin(index, node, group, host.node_ram, host.node_vcpus))
        self.at = np.full(len(vms), -1, np.int64)
        self.ram = np.zeros(len(self.bins), np.int64)
        self.vcpus = np.zeros(len(self.bins), np.int64)
        self.counts: dict[int, dict[int, int]] = {bin.group: {} for bin in self.bins}
        self.members: list[set[int]] = [set() for _ in hosts]
        self.domains: dict[int, dict[str, int]] = {bin.group: {} for bin in self.bins}
        self.apart: list[dict[str, int]] = [{} for _ in hosts]
        self._rows = [row.tolist() for row in sample.rows]

    def need(self, vm: int, where: int) -> int:
        """Bytes that a VM may come to on a bin, were nothing shared."""
        return self.vms[vm].ram + self.hosts[self.bins[where].host].vm_overhead

    def why_not(self, vm: int, where: int) -> str:
        """Which constraint keeps a VM off a bin; "": none."""
        about, bin = self.vms[vm], self.bins[where]
        if self.ram[where] + self.need(vm, where) > bin.ram * self.overcommit:
            return "RAM"
        if bin.vcpus and self.vcpus[where] + about.vcpus > bin.vcpus:
            return "vCPUs"
        if any(domain != about.domain for domain in self.domains[bin.group]):
            return "security domain"
        if about.apart and self.apart[bin.host].get(about.apart):
            return f"anti-affinity {about.apart!r}"
        return ""

    def put(self, vm: int, where: int) -> None:
        """Place a VM that is nowhere; constraints are the caller's."""
        about, bin = self.vms[vm], self.bins[where]
        self.at[vm] = where
        self.ram[where] += self.need(vm, where)
        self.vcpus[where] += about.vcpus
        self.members[bin.host].add(vm)
        _more(self.domains[bin.group], about.domain, 1)
        if about.apart:
            _more(self.apart[bin.host], about.apart, 1)
        counts = self.counts[bin.group]
        for content in self._rows[vm]:
            counts[content] = counts.get(content, 0) + 1

    def take(self, vm: int) -> int:
        """Take a VM away; the bin that it was on."""
        where = int(self.at[vm])
        about, bin = self.vms[vm], self.bins[where]
        self.at[vm] = -1
        self.ram[where] -= self.need(vm, where)
        self.vcpus[where] -= about.vcpus
        self.members[bin.host].discard(vm)
        _more(self.domains[bin.group], about.domain, -1)
        if about.apart:
            _more(self.apart[bin.host], about.apart, -1)
        counts = self.counts[bin.group]
        for content in self._rows[vm]:
            if counts[content] == 1:
                del counts[content]
            else:
                counts[content] -= 1
        return where

    def new(self, vm: int, where: int) -> int:
        """Sampled contents that a VM would bring to a bin's group that are not there."""
        counts = self.counts[self.bins[where].group]
        return sum(content not in counts for content in self._rows[vm])

    def freed(self, vm: int) -> int:
        """Sampled contents that would leave a VM's group with it."""
        counts = self.counts[self.bins[int(self.at[vm])].group]
        return sum(counts[content] == 1 for content in self._rows[vm])

    def contents(self) -> float:
        """Contents over all groups: the frames that the VMs' pages take."""
        placed = self.at >= 0
        own = int(self.sample.alone[placed].sum())
        return self.sample.weight * (own + sum(len(counts) for counts in self.counts.values()))

    def used(self) -> int:
        """Hosts that hold a VM."""
        return sum(bool(members) for members in self.members)


def _more(counts: dict[str, int], name: str, by: int) -> None:
    counts[name] = counts.get(name, 0) + by
    if not counts[name]:
        del counts[name]


def start(
    vms: Sequence[Vm], hosts: Sequence[Host], sample: Sample, overcommit: float
) -> tuple[Packing, npt.NDArray[np.int64]]:
    """A packing with the pinned VMs alone, and the bin that each VM is on today (-1: none).

    Raises:
        PlacementError: a pinned VM's host is not there, or cannot hold what is pinned to it.

    >>> packing, today = start([Vm(name="a", host="h", ram=4096)], [Host(name="h", ram=8192)], Sample.of([]), 1.0)
    >>> today.tolist()
    [0]
    """
    packing = Packing(vms, hosts, sample, overcommit)
    number = {(hosts[bin.host].name, bin.node): index for index, bin in enumerate(packing.bins)}
    today = np.array([number.get((vm.host, vm.node), -1) for vm in vms], np.int64)
    for index, vm in enumerate(vms):
        if not vm.pinned:
            continue
        if today[index] < 0:
            raise PlacementError(
                f"{vm.name} is pinned to host {vm.host!r}, node {vm.node}, which is not among the hosts"
            )
        if why := packing.why_not(index, int(today[index])):
            raise PlacementError(f"{vm.name} is pinned to host {vm.host}, which its {why} does not allow")
        packing.put(index, int(today[index]))
    for index, vm in enumerate(vms):
        empty = [b for b, bin in enumerate(packing.bins) if packing.need(index, b) <= bin.ram * overcommit]
        if not empty:
            raise PlacementError(f"{vm.name} needs {vm.ram:,} bytes, more than any NUMA node of any host has")
    return packing, today

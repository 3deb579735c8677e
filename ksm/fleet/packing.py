"""VMs on hosts under constraints, and the memory that merging leaves: what every way of placing works on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ksm._core import Sharing
from ksm.errors import KsmError
from ksm.fleet.hosts import Host
from ksm.fleet.sample import Sample
from ksm.fleet.vm import Vm

_MANY = 1 << 62  # vCPUs: as many as wanted
_FREE, _MIXED = -1, -2  # in place of the one domain of a group's VMs: there is none; there are several


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
        self.members: list[set[int]] = [set() for _ in hosts]
        self.domains: dict[int, dict[int, int]] = {bin.group: {} for bin in self.bins}
        self.apart: list[dict[int, int]] = [{} for _ in hosts]
        self._sharing = Sharing(sample.row, sample.starts)
        # The same as numbers, for questions about many VMs or bins at once.
        self._host = np.array([bin.host for bin in self.bins], np.int64)
        self._group = np.array([bin.group for bin in self.bins], np.int64)
        self._room = np.array([int(bin.ram * overcommit) for bin in self.bins], np.int64)
        self._cpus = np.array([bin.vcpus or _MANY for bin in self.bins], np.int64)
        self._overhead = np.array([hosts[bin.host].vm_overhead for bin in self.bins], np.int64)
        self._vm_ram = np.array([vm.ram for vm in vms], np.int64)
        self._vm_cpus = np.array([vm.vcpus for vm in vms], np.int64)
        self._vm_domain = _numbers([vm.domain for vm in vms])
        self._vm_apart = _numbers([vm.apart for vm in vms], none="")
        self._domain = np.full(int(self._group.max(initial=0)) + 1, _FREE, np.int64)  # of each group's VMs
        self._apart_hosts: dict[int, set[int]] = {}

    def need(self, vm: int, where: int) -> int:
        """Bytes that a VM may come to on a bin, were nothing shared."""
        return int(self._vm_ram[vm] + self._overhead[where])

    def why_not(self, vm: int, where: int) -> str:
        """Which constraint keeps a VM off a bin; "": none."""
        if self.ram[where] + self._vm_ram[vm] + self._overhead[where] > self._room[where]:
            return "RAM"
        if self.vcpus[where] + self._vm_cpus[vm] > self._cpus[where]:
            return "vCPUs"
        if self._domain[self._group[where]] not in (_FREE, self._vm_domain[vm]):
            return "security domain"
        if self._vm_apart[vm] >= 0 and int(self._vm_apart[vm]) in self.apart[self._host[where]]:
            return f"anti-affinity {self.vms[vm].apart!r}"
        return ""

    def bins_for(self, vm: int) -> npt.NDArray[np.bool_]:
        """(bins,) which bins take a VM: `why_not` of all of them at once."""
        domain = self._domain[self._group]
        fits: npt.NDArray[np.bool_] = self.ram + self._vm_ram[vm] + self._overhead <= self._room
        fits &= self.vcpus + self._vm_cpus[vm] <= self._cpus
        fits &= (domain == _FREE) | (domain == self._vm_domain[vm])
        apart = int(self._vm_apart[vm])
        if self._apart_hosts.get(apart):
            fits &= ~np.isin(self._host, list(self._apart_hosts[apart]))
        return fits

    def vms_for(self, vms: npt.NDArray[np.int64], where: int) -> npt.NDArray[np.bool_]:
        """Which of these VMs a bin takes."""
        fits: npt.NDArray[np.bool_] = self._vm_ram[vms] <= self._room[where] - self.ram[where] - self._overhead[where]
        fits &= self._vm_cpus[vms] <= self._cpus[where] - self.vcpus[where]
        domain = self._domain[self._group[where]]
        if domain != _FREE:
            fits &= self._vm_domain[vms] == domain
        apart = self.apart[self._host[where]]
        if apart:
            fits &= ~np.isin(self._vm_apart[vms], list(apart))
        return fits

    def put(self, vm: int, where: int) -> None:
        """Place a VM that is nowhere; constraints are the caller's."""
        bin = self.bins[where]
        self.at[vm] = where
        self.ram[where] += self.need(vm, where)
        self.vcpus[where] += self._vm_cpus[vm]
        self.members[bin.host].add(vm)
        _more(self.domains[bin.group], int(self._vm_domain[vm]), 1)
        self._settle(bin.group)
        if (apart := int(self._vm_apart[vm])) >= 0:
            _more(self.apart[bin.host], apart, 1)
            self._apart_hosts.setdefault(apart, set()).add(bin.host)
        self._sharing.add(vm, bin.group)

    def take(self, vm: int) -> int:
        """Take a VM away; the bin that it was on."""
        where = int(self.at[vm])
        bin = self.bins[where]
        self.at[vm] = -1
        self.ram[where] -= self.need(vm, where)
        self.vcpus[where] -= self._vm_cpus[vm]
        self.members[bin.host].discard(vm)
        _more(self.domains[bin.group], int(self._vm_domain[vm]), -1)
        self._settle(bin.group)
        if (apart := int(self._vm_apart[vm])) >= 0:
            _more(self.apart[bin.host], apart, -1)
            if apart not in self.apart[bin.host]:
                self._apart_hosts[apart].discard(bin.host)
        self._sharing.remove(vm, bin.group)
        return where

    def _settle(self, group: int) -> None:
        """Note the one domain of a group's VMs."""
        found = self.domains[group]
        self._domain[group] = _FREE if not found else next(iter(found)) if len(found) == 1 else _MIXED

    def new(self, vm: int, where: int) -> int:
        """Sampled contents that a VM would bring to a bin's group that are not there."""
        return self._sharing.new(vm, self.bins[where].group)

    def new_each(self, vms: npt.NDArray[np.int64], where: int) -> npt.NDArray[np.int64]:
        """`new` of several VMs."""
        found = np.empty(len(vms), np.int64)
        self._sharing.new_each(vms, self.bins[where].group, found)
        return found

    def freed(self, vm: int) -> int:
        """Sampled contents that would leave a VM's group with it."""
        return self._sharing.freed(vm, self.bins[int(self.at[vm])].group)

    @property
    def pairs(self) -> int:
        """Sampled contents that more than one VM of the fleet has, over all groups."""
        return self._sharing.pairs

    def contents(self) -> float:
        """Contents over all groups: the frames that the VMs' pages take."""
        own = int(self.sample.alone[self.at >= 0].sum())
        return self.sample.weight * (own + self.pairs)

    def used(self) -> int:
        """Hosts that hold a VM."""
        return sum(bool(members) for members in self.members)


def _more(counts: dict[int, int], name: int, by: int) -> None:
    counts[name] = counts.get(name, 0) + by
    if not counts[name]:
        del counts[name]


def _numbers(names: Sequence[str], none: str | None = None) -> npt.NDArray[np.int64]:
    """A number for each name, the same for the same; -1 for `none`."""
    known: dict[str, int] = {}
    return np.array([-1 if name == none else known.setdefault(name, len(known)) for name in names], np.int64)


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
    _possible(packing)
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
    return packing, today


def _possible(packing: Packing) -> None:
    """Raise, if the constraints contradict each other in a way that can be counted, whatever goes where."""
    vms, bins, hosts = packing.vms, packing.bins, packing.hosts
    room = [int(bin.ram * packing.overcommit) for bin in bins]
    free = [ram - hosts[bin.host].vm_overhead for ram, bin in zip(room, bins, strict=True)]
    cpus = [bin.vcpus for bin in bins]
    _largest({vm.name: vm.ram for vm in vms}, max(free), "bytes")
    if all(cpus):
        _largest({vm.name: vm.vcpus for vm in vms}, max(cpus), "vCPUs")
    note = f" with an overcommit of {packing.overcommit:g}"
    least = min(host.vm_overhead for host in hosts)
    wanted = sum(vm.ram + least for vm in vms)
    if wanted > sum(room):
        raise PlacementError(
            f"the VMs need {wanted:,} bytes with their overhead, and the hosts have {sum(room):,}{note}"
        )
    if all(cpus) and sum(vm.vcpus for vm in vms) > sum(cpus):
        raise PlacementError(f"the VMs need {sum(vm.vcpus for vm in vms):,} vCPUs, and the hosts have {sum(cpus):,}")
    apart = Counter(vm.apart for vm in vms if vm.apart)
    for name, number in apart.most_common(1):
        if number > len(hosts):
            raise PlacementError(
                f"anti-affinity {name!r} keeps {number:,} VMs on hosts of their own, and there are {len(hosts):,}"
            )
    domains, groups = len({vm.domain for vm in vms}), len({bin.group for bin in bins})
    if domains > groups:
        raise PlacementError(
            f"{domains:,} security domains need as many places where pages merge apart, and the hosts have {groups:,}"
        )


def _largest(needs: dict[str, int], most: int, unit: str) -> None:
    name = max(needs, key=needs.__getitem__)
    if needs[name] > most:
        raise PlacementError(f"{name} needs {needs[name]:,} {unit}, more than any NUMA node of any host has ({most:,})")

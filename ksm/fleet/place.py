"""`place`: which VMs should live together, from their sketches alone."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ksm.errors import SourceError
from ksm.fleet import exact, files, heuristics
from ksm.fleet.hosts import Host
from ksm.fleet.packing import Packing, PlacementError, start
from ksm.fleet.sample import Sample
from ksm.fleet.sketch import Bounds, bounds, union
from ksm.fleet.vm import Vm

Method: TypeAlias = Literal["sharing", "exact", "today", "random", "decreasing", "class"]
METHODS: tuple[Method, ...] = ("sharing", "exact", "today", "random", "decreasing", "class")


@dataclass(frozen=True, slots=True)
class Move:
    """One migration.

    >>> Move("vm1", "h1", 0, "h2", 0, 4096).to_dict()["to"]
    'h2'
    """

    vm: str
    source: str
    source_node: int
    target: str
    target_node: int
    gain: int
    """Bytes that it frees, done after those before it; below 0 where it makes room for others."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "vm": self.vm,
            "from": self.source,
            "from_node": self.source_node,
            "to": self.target,
            "to_node": self.target_node,
            "gain": self.gain,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """VMs on hosts, and what KSM saves there.

    >>> placement = Placement(method="today", where={"a": ("h", 0)}, moves=(), saved=Bounds(1.0, 1.0, 1.0),
    ...                       hosts_used=1, hosts_freed=0, worst_host="h", worst_bytes=0, proven=None,
    ...                       best_contents=None, weight=1.0)
    >>> placement.to_dict()["hosts_used"]
    1
    """

    method: Method
    where: Mapping[str, tuple[str, int]]
    """The host and node of each VM."""
    moves: tuple[Move, ...]
    """From today's placement, in order of gain."""
    saved: Bounds
    """Bytes that merging saves, zero pages and `max_page_sharing` left out of account."""
    hosts_used: int
    hosts_freed: int
    """Hosts that hold VMs today, and then none."""
    worst_host: str
    worst_bytes: int
    """When all sharing breaks: what is missing on the host that is then worst off; 0 or less, none is short."""
    proven: bool | None
    """Of the exact method: whether nothing better exists."""
    best_contents: float | None
    """Of the exact method: no placement leaves fewer contents than this."""
    weight: float
    """How many contents a sampled one stood for while VMs were placed."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        names = (
            "method",
            "hosts_used",
            "hosts_freed",
            "worst_host",
            "worst_bytes",
            "proven",
            "best_contents",
            "weight",
        )
        return {name: getattr(self, name) for name in names} | {
            "saved": self.saved.to_dict(),
            "moves": [move.to_dict() for move in self.moves],
            "where": {vm: {"host": host, "node": node} for vm, (host, node) in self.where.items()},
        }


def read_fleet(given: Sequence[str]) -> tuple[list[Vm], list[bytes]]:
    """The VMs and sketches of directories and files of `ksm fingerprint`, each VM once, by name.

    Raises:
        SourceError: a file cannot be read; page sizes or keys differ; a VM is there twice.

    >>> from ksm.fleet import fingerprint_vm
    >>> _ = fingerprint_vm(b"x" * 8192, "one", Vm(name="a"))
    >>> [vm.name for vm in read_fleet(["one"])[0]]
    ['a']
    """
    rows = [row for path in files.find(given, files.SKETCH) for row in files.read_sketches(path)]
    rows.sort(key=lambda row: row[0].name)
    names = [vm.name for vm, _ in rows]
    for one, other in itertools.pairwise(names):
        if one == other:
            raise SourceError(f"{one} is there twice: name the files of one fingerprint of it")
    for what in ("page_size", "key_id"):
        values = sorted({str(getattr(vm, what)) for vm, _ in rows})
        if len(values) > 1:
            raise SourceError(f"{what} differs: {', '.join(value or 'none' for value in values)}; they never compare")
    return [vm for vm, _ in rows], [data for _, data in rows]


def place(
    vms: Sequence[Vm],
    sketches: Sequence[bytes],
    hosts: Iterable[Host],
    method: Method = "sharing",
    *,
    overcommit: float = 1.0,
    migrations: int | None = None,
    seconds: float = 30.0,
    seed: int = 0,
    sets: Sequence[Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Placement:
    """Place VMs on hosts.

    Args:
        vms: with host and node where they are today, RAM, vCPUs, domain, anti-affinity and pins, which are kept.
        sketches: theirs.
        hosts: with RAM.
        method: "sharing", the heuristic, which scales; "exact", for small fleets; or a baseline: "today", "random",
            "decreasing" (first-fit, largest first), "class" (first-fit, class by class).
        overcommit: RAM given to VMs may be so many times what hosts have. At 1 they fit even when all sharing breaks.
        migrations: at most so many VMs leave where they are; of "sharing" only.
        seconds: for "exact".
        seed: for "random".
        sets: the high words of all of each VM's contents, to place by these instead of by sketches.
        progress: called with (VMs placed, VMs).

    Raises:
        PlacementError: the constraints cannot be met; it says which. ValueError: a host without RAM.

    >>> import numpy as np
    >>> from ksm.fleet.sketch import sketch
    >>> sketches = [sketch(np.array(words, np.uint64)) for words in ([[1, 1], [2, 2]], [[9, 9]], [[1, 1], [2, 2]])]
    >>> today = (("a", "x", 2), ("b", "x", 1), ("c", "y", 2))
    >>> vms = [Vm(name=name, host=host, ram=8192, pages=pages) for name, host, pages in today]
    >>> found = place(vms, sketches, [Host(name=name, ram=16384) for name in "xy"])
    >>> found.where["a"] == found.where["c"], found.saved.estimate
    (True, 8192.0)
    """
    known = list(hosts)
    if method not in METHODS:
        raise ValueError(f"{method!r} is no method; these are: {', '.join(METHODS)}")
    if not vms or len(vms) != len(sketches):
        raise ValueError(f"{len(vms)} VMs and {len(sketches)} sketches")
    if not known or any(not host.ram for host in known):
        raise ValueError("placement needs hosts with RAM")
    if not 0 < overcommit <= 100:
        raise ValueError(f"overcommit is {overcommit}")
    sample = Sample.of(sketches) if sets is None else Sample.exact(sets)
    packing, today = start(vms, known, sample, overcommit)
    proven, best = None, None
    if method == "sharing":
        packing = _sharing(vms, known, sample, overcommit, today, migrations, progress)
    elif method == "exact":
        hint = _sharing(vms, known, sample, overcommit, today, None, None)
        at, best, proven = exact.solve(packing, seconds, hint.at)
        _fill(packing, at)
    elif method == "today":
        _stay(packing, today)
    elif method == "random":
        heuristics.at_random(packing, seed)
    else:
        order = heuristics.decreasing if method == "decreasing" else heuristics.by_class
        heuristics.first_fit(packing, order(packing))
    return _placement(method, packing, today, sketches, proven, best)


def _fill(packing: Packing, at: Iterable[int]) -> None:
    for vm, where in enumerate(at):
        if packing.at[vm] < 0 and where >= 0:
            packing.put(vm, int(where))


def _stay(packing: Packing, today: Any) -> None:
    """Where VMs are, whatever the constraints say of it; who is nowhere goes first-fit."""
    _fill(packing, today)
    heuristics.first_fit(packing, heuristics.decreasing(packing))


def _sharing(
    vms: Sequence[Vm],
    hosts: Sequence[Host],
    sample: Sample,
    overcommit: float,
    today: Any,
    migrations: int | None,
    progress: Callable[[int, int], object] | None,
) -> Packing:
    """The best of several beginnings, each improved."""
    tried: list[Packing] = []
    failed: PlacementError | None = None

    def fill(packing: Packing) -> None:
        heuristics.by_sharing(packing, today, progress)

    def classes(packing: Packing) -> None:
        heuristics.first_fit(packing, heuristics.by_class(packing))

    beginnings = [lambda packing: _stay(packing, today), *([] if migrations is not None else [fill, classes])]
    for begin in beginnings:
        packing, _ = start(vms, hosts, sample, overcommit)
        try:
            begin(packing)
        except PlacementError as error:
            failed = error
            continue
        heuristics.improve(packing, today, migrations)
        tried.append(packing)
    allowed = [packing for packing in tried if not _broken(packing)]
    if not allowed:
        raise failed or PlacementError(
            f"{_broken(tried[0])}: today's placement breaks this, and {migrations} migrations do not mend it"
        )
    return min(allowed, key=lambda packing: (packing.contents(), packing.used()))


def _broken(packing: Packing) -> str:
    """A constraint that a placement breaks; ""."""
    for where, bin in enumerate(packing.bins):
        name = packing.hosts[bin.host].name
        if packing.ram[where] > bin.ram * packing.overcommit:
            return f"RAM of host {name}"
        if bin.vcpus and packing.vcpus[where] > bin.vcpus:
            return f"vCPUs of host {name}"
        if len(packing.domains[bin.group]) > 1:
            return f"security domains on host {name}"
        for group, number in packing.apart[bin.host].items():
            if number > 1:
                return f"anti-affinity {group!r} on host {name}"
    return ""


def _placement(
    method: Method, packing: Packing, today: Any, sketches: Sequence[bytes], proven: bool | None, best: float | None
) -> Placement:
    vms, bins, hosts = packing.vms, packing.bins, packing.hosts
    size = vms[0].page_size
    pages = sum(vm.pages - vm.zero_pages for vm in vms)
    groups: dict[int, list[bytes]] = {}
    for vm in range(len(vms)):
        groups.setdefault(bins[int(packing.at[vm])].group, []).append(sketches[vm])
    frames = sum((bounds(union(members)) for members in groups.values()), Bounds(0.0, 0.0, 0.0))
    short = [
        (sum(packing.need(vm, int(packing.at[vm])) for vm in members) - (host.ram - host.reserve), host.name)
        for host, members in zip(hosts, packing.members, strict=True)
    ]
    worst, worst_host = max(short)
    before = {bins[int(where)].host for where in today if where >= 0}
    after = {bins[int(where)].host for where in packing.at}
    return Placement(
        method=method,
        where={
            vm.name: (hosts[bins[int(at)].host].name, bins[int(at)].node)
            for vm, at in zip(vms, packing.at, strict=True)
        },
        moves=tuple(_moves(packing, today)),
        saved=Bounds(*((pages - number) * size for number in (frames.estimate, frames.upper, frames.lower))),
        hosts_used=len(after),
        hosts_freed=len(before - after),
        worst_host=worst_host,
        worst_bytes=worst,
        proven=proven,
        best_contents=best,
        weight=packing.sample.weight,
    )


def _moves(packing: Packing, today: Any) -> Iterable[Move]:
    """The migrations, those first that free most at their turn; gains are of the sample."""
    target = packing.at.copy()
    now = Packing(packing.vms, packing.hosts, packing.sample, packing.overcommit)
    _fill(now, today)
    unit = packing.sample.weight * (packing.vms[0].page_size if packing.vms else 0)
    todo = [vm for vm in range(len(target)) if today[vm] >= 0 and today[vm] != target[vm]]

    def gain(vm: int) -> int:
        same = now.bins[int(now.at[vm])].group == now.bins[int(target[vm])].group
        return 0 if same else now.freed(vm) - now.new(vm, int(target[vm]))

    heap = [(-gain(vm), vm) for vm in todo]
    heapq.heapify(heap)
    while heap:
        old, vm = heapq.heappop(heap)
        freed = gain(vm)
        if heap and -freed > max(old, heap[0][0]):  # worth less than it was, and now another is worth more
            heapq.heappush(heap, (-freed, vm))
            continue
        source = now.bins[now.take(vm)]
        now.put(vm, int(target[vm]))
        goal = now.bins[int(target[vm])]
        names = (packing.hosts[source.host].name, source.node, packing.hosts[goal.host].name, goal.node)
        yield Move(packing.vms[vm].name, *names, round(freed * unit))

"""`place`: which VMs should live together, from their sketches alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from ksm.errors import SourceError, UnsupportedError
from ksm.fleet import exact, files, heuristics
from ksm.fleet.alike import renamed
from ksm.fleet.hosts import Host
from ksm.fleet.improve import SWEEPS, improve, shifted
from ksm.fleet.moves import Move, moves
from ksm.fleet.packing import Packing, PlacementError, start
from ksm.fleet.sample import Sample
from ksm.fleet.sketch import Bounds, bounds, check, union
from ksm.fleet.vm import Vm
from ksm.units import binary, many, more_or_less

Method: TypeAlias = Literal["sharing", "exact", "today", "random", "decreasing", "class"]
_HOPELESS = 1.1  # a beginning that leaves so many times the contents of the best is not worth improving
METHODS: tuple[Method, ...] = ("sharing", "exact", "today", "random", "decreasing", "class")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """VMs on hosts, and what KSM saves there.

    >>> placement = Placement(method="today", where={"a": ("h", 0)}, moves=(), newcomers=0, saved=Bounds(1.0, 1.0, 1.0),
    ...                       hosts_used=1, hosts_freed=0, worst_host="h", worst_bytes=0, proven=None,
    ...                       best_contents=None, weight=1.0)
    >>> placement.to_dict()["hosts_used"]
    1
    """

    method: Method
    where: Mapping[str, tuple[str, int]]
    """The host and node of each VM."""
    moves: tuple[Move, ...]
    """From today's placement, in an order that can be carried out, those that free most first."""
    newcomers: int
    """VMs that are on none of the hosts today: they are placed, and do not migrate."""
    saved: Bounds
    """Bytes that merging saves, zero pages included; what `max_page_sharing` may cost is in the lower bound alone."""
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

    def verdict(self) -> list[str]:
        """The answer in sentences.

        >>> Placement(method="today", where={"a": ("h", 0)}, moves=(), newcomers=0, saved=Bounds(1.0, 1.0, 1.0),
        ...           hosts_used=1, hosts_freed=0, worst_host="h", worst_bytes=4096, proven=None, best_contents=None,
        ...           weight=1.0).verdict()[-1]
        'When all sharing breaks, h lacks 4.0 KiB.'
        """
        saved, waiting = self.saved, sum(not move.fits for move in self.moves)
        least, most = (more_or_less(bound - saved.estimate) for bound in (saved.lower, saved.upper))
        found = [
            f"Merging then saves {binary(saved.estimate)} (95 %: {least} to {most}), zero pages included; "
            f"{many(len(self.moves), 'move')}, {many(self.hosts_freed, 'host')} freed."
        ]
        if self.newcomers:
            found.append(f"{many(self.newcomers, 'VM')} on none of these hosts today: placed, no move.")
        if waiting:
            found.append(
                f"{waiting:,} of the moves change places on full hosts: one of each ring waits on a spare host."
            )
        found.append(
            f"When all sharing breaks, {self.worst_host} lacks {binary(self.worst_bytes)}."
            if self.worst_bytes > 0
            else "When all sharing breaks, every host still has room for its VMs."
        )
        return found

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        names = (
            "method",
            "newcomers",
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
        SourceError: a file cannot be read, or a sketch is not one of its VM's contents; page sizes or keys differ; a
            VM is there twice.

    >>> from ksm.fleet import fingerprint_vm
    >>> _ = fingerprint_vm(b"x" * 8192, "one", Vm(name="a"))
    >>> [vm.name for vm in read_fleet(["one"])[0]]
    ['a']
    """
    found = [(path, row) for path in files.find(given, files.SKETCH) for row in files.read_sketches(path)]
    found.sort(key=lambda each: each[1][0].name)
    for (path, (one, _)), (again, (other, _)) in itertools.pairwise(found):
        if one.name == other.name:
            raise SourceError(f"{one.name} is there twice, in {path} and {again}: name one of them")
    for path, (vm, data) in found:
        check(data, vm.contents, f"{path}: {vm.name}")
    rows = [row for _, row in found]
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
        progress: called with (steps done, steps).

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
    if without := [host.name for host in known if not host.ram]:
        raise ValueError(f"placement needs hosts with RAM: {without[0]} has none")
    if not known:
        raise ValueError("placement needs hosts")
    if not 0 < overcommit <= 100:
        raise ValueError(f"overcommit is {overcommit}")
    if migrations is not None and migrations < 0:
        raise ValueError(f"migrations is {migrations}")
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds}")
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
    best: tuple[float, int, list[int]] | None = None
    failed = None
    beginnings = (_mended,) if migrations is not None else (_filled, _classes, _mended, _decreasing, _solved)
    each = len(vms) * (1 + SWEEPS)
    for turn, begin in enumerate(beginnings):
        if best and begin in (_decreasing, _solved):
            break  # they know nothing of sharing, and are there for hosts so full that the others find no room
        show = shifted(progress and partial(_of, progress, each * len(beginnings)), turn * each)
        packing, _ = start(vms, hosts, sample, overcommit)
        try:
            begin(packing, today, show)
            _within(packing, today, migrations)
        except PlacementError as error:
            failed = error
            continue
        if not best or packing.contents() < _HOPELESS * best[0]:
            improve(packing, today, migrations, shifted(show, len(vms)))
        found = packing.contents(), packing.used(), packing.at.tolist()
        best = min(best, found, key=lambda one: one[:2]) if best else found
    if best is None:
        raise failed or PlacementError("no placement was found")
    packing, _ = start(vms, hosts, sample, overcommit)  # only one is ever held: each counts the fleet's contents
    _fill(packing, best[2])
    if migrations is None:
        at = renamed(packing, today)
        packing, _ = start(vms, hosts, sample, overcommit)
        _fill(packing, at)
    return packing


def _of(progress: Callable[[int, int], object], steps: int, done: int) -> None:
    if done % max(steps // 1000, 1) == 0:  # a bar costs more to draw than a VM to place
        progress(done, steps)


def _within(packing: Packing, today: Any, migrations: int | None) -> None:
    """Raise, if more VMs had to move for the constraints' sake than may."""
    away = int(((packing.at != today) & (today >= 0)).sum())
    if migrations is not None and away > migrations:
        raise PlacementError(
            f"today's placement breaks constraints ({_broken(packing, today)}): {away} VMs have to move to mend that, "
            f"and {migrations} may"
        )


def _mended(packing: Packing, today: Any, progress: Callable[[int], object]) -> None:
    """Where VMs are, the largest first; those that a constraint keeps off their bin go first-fit."""
    order = heuristics.decreasing(packing)
    for vm in order:
        if packing.at[vm] < 0 <= today[vm] and not packing.why_not(vm, int(today[vm])):
            packing.put(vm, int(today[vm]))
    heuristics.first_fit(packing, order)


def _filled(packing: Packing, today: Any, progress: Callable[[int], object]) -> None:
    heuristics.by_sharing(packing, today, progress)


def _classes(packing: Packing, today: Any, progress: Callable[[int], object]) -> None:
    heuristics.first_fit(packing, heuristics.by_class(packing))


def _solved(packing: Packing, today: Any, progress: Callable[[int], object]) -> None:
    """What the exact model finds, or proves not to be there; first fit, if that cannot be asked."""
    try:
        _fill(packing, exact.feasible(packing))
    except (ValueError, UnsupportedError):
        heuristics.first_fit(packing, heuristics.decreasing(packing))


def _decreasing(packing: Packing, today: Any, progress: Callable[[int], object]) -> None:
    heuristics.first_fit(packing, heuristics.decreasing(packing))


def _broken(packing: Packing, at: Any) -> str:
    """What a placement breaks: the first VM that a constraint keeps off its bin."""
    tried, _ = start(packing.vms, packing.hosts, packing.sample, packing.overcommit)
    for vm in heuristics.decreasing(packing):
        if tried.at[vm] >= 0 or at[vm] < 0:
            continue
        if why := tried.why_not(vm, int(at[vm])):
            return f"{why} of {packing.hosts[packing.bins[int(at[vm])].host].name}, for {packing.vms[vm].name}"
        tried.put(vm, int(at[vm]))
    return ""


def _placement(
    method: Method, packing: Packing, today: Any, sketches: Sequence[bytes], proven: bool | None, best: float | None
) -> Placement:
    vms, bins, hosts = packing.vms, packing.bins, packing.hosts
    size = vms[0].page_size
    groups: dict[int, list[int]] = {}
    for vm in range(len(vms)):
        groups.setdefault(bins[int(packing.at[vm])].group, []).append(vm)
    saved = Bounds(0.0, 0.0, 0.0)
    for members in groups.values():
        host = hosts[bins[int(packing.at[members[0]])].host]
        saved += _saved([vms[vm] for vm in members], [sketches[vm] for vm in members], host)
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
        moves=tuple(moves(packing, today)),
        newcomers=int((today < 0).sum()),
        saved=Bounds(*(number * size for number in (saved.estimate, saved.lower, saved.upper))),
        hosts_used=len(after),
        hosts_freed=len(before - after),
        worst_host=worst_host,
        worst_bytes=worst,
        proven=proven,
        best_contents=best,
        weight=packing.sample.weight,
    )


def _saved(vms: Sequence[Vm], sketches: Sequence[bytes], host: Host) -> Bounds:
    """The pages that merging saves among VMs, zero pages included.

    n copies of a content take ceil(n / max_page_sharing) frames, at most 1 + (n - 1) / max_page_sharing: sketches do
    not tell the copies, so the lower bound takes all contents together to pay that.
    """
    most = host.max_page_sharing
    zeros = sum(vm.zero_pages for vm in vms)
    of_zeros = zeros if host.use_zero_pages else zeros - -(-zeros // most)
    frames = bounds(union(sketches))
    pages = sum(vm.pages - vm.zero_pages for vm in vms)
    chained = max(pages - frames.lower, 0.0) / most
    rest = pages + of_zeros
    return Bounds(rest - frames.estimate, rest - frames.upper - chained, rest - frames.lower)

"""The exact placement of small fleets, as a constraint program for OR-tools' CP-SAT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from ksm.fleet.extras import need
from ksm.fleet.packing import Packing, PlacementError

MOST_CELLS = 200_000  # (content class, group) pairs
MOST_CHOICES = 20_000  # (VM, bin) pairs of a mere question whether there is a placement
_ASK = 5.0  # seconds to find out which constraint is one too many


def solve(packing: Packing, seconds: float = 30.0, hint: Any = None) -> tuple[list[int], float, bool]:
    """The bins that leave the fewest contents, how few there could be at best, and whether these are proven the fewest.

    Contents that the same VMs have are one variable a group, so its size follows from who shares, not from how much.

    Args:
        packing: VMs, hosts and constraints; pinned VMs are placed in it.
        seconds: the solver may take.
        hint: bins to start from.

    Raises:
        ValueError: too large. PlacementError: the constraints contradict each other; or there is no answer in time.

    >>> import numpy as np
    >>> from ksm.fleet import Host, Vm
    >>> from ksm.fleet.sample import Sample
    >>> sets = [np.array(part, np.uint64) for part in ([1, 2], [8], [1, 2], [8])]
    >>> vms = [Vm(name=name, ram=4096) for name in "abcd"]
    >>> at, best, proven = solve(Packing(vms, [Host(name=name, ram=8192) for name in "xy"], Sample.exact(sets)))
    >>> at[0] == at[2], at[1] == at[3], best, proven
    (True, True, 3.0, True)
    """
    cp = need("ortools.sat.python.cp_model")
    vms, bins = packing.vms, packing.bins
    having: dict[int, list[int]] = {}
    for vm, row in enumerate(packing.sample.rows):
        for content in row.tolist():
            having.setdefault(content, []).append(vm)
    classes = Counter(tuple(members) for members in having.values())
    groups = sorted({bin.group for bin in bins})
    if len(classes) * len(groups) > MOST_CELLS:
        raise ValueError(f"{len(classes):,} kinds of content on {len(groups)} groups are too many for the exact model")
    model, x = _model(cp, packing)
    for vm in range(len(vms)) if hint is not None else ():
        for b in range(len(bins)):
            model.add_hint(x[vm][b], int(hint[vm]) == b)
    terms = []
    for members, weight in classes.items():
        for group in groups:
            y = model.new_bool_var("")
            inside = [b for b, bin in enumerate(bins) if bin.group == group]
            for vm in members:
                model.add(sum(x[vm][b] for b in inside) <= y)
            terms.append(weight * y)
    model.minimize(sum(terms))
    solver = _solver(cp, seconds)
    status = solver.solve(model)
    at = _answer(cp, packing, solver, status, x)
    own = int(packing.sample.alone.sum())
    return at, packing.sample.weight * (own + solver.best_objective_bound), status == cp.OPTIMAL


def feasible(packing: Packing, seconds: float = 10.0) -> list[int]:
    """Any bins that meet all constraints.

    Raises:
        ValueError: too large. PlacementError: there are none, and which constraints contradict each other; or there is
        no answer in time.

    >>> import numpy as np
    >>> from ksm.fleet import Host, Vm
    >>> from ksm.fleet.sample import Sample
    >>> packing = Packing([Vm(name="a", ram=4096, apart="x"), Vm(name="b", ram=4096, apart="x")],
    ...                   [Host(name="h", ram=8192)], Sample.exact([np.zeros(0, np.uint64)] * 2))
    >>> feasible(packing)
    Traceback (most recent call last):
    ksm.fleet.packing.PlacementError: no placement meets all constraints at once; there is one without anti-affinity
    """
    cp = need("ortools.sat.python.cp_model")
    if len(packing.vms) * len(packing.bins) > MOST_CHOICES:
        raise ValueError(
            f"{len(packing.vms):,} VMs on {len(packing.bins):,} NUMA nodes are too many for the exact model"
        )
    model, x = _model(cp, packing)
    solver = _solver(cp, seconds)
    return _answer(cp, packing, solver, solver.solve(model), x)


def _answer(cp: Any, packing: Packing, solver: Any, status: Any, x: Any) -> list[int]:
    if status == cp.INFEASIBLE:
        raise PlacementError(f"no placement meets all constraints at once{_contradiction(cp, packing)}")
    if status not in (cp.OPTIMAL, cp.FEASIBLE):
        raise PlacementError(f"no placement was found within {solver.parameters.max_time_in_seconds:g} s")
    return [next(b for b in range(len(packing.bins)) if solver.value(row[b])) for row in x]


def _solver(cp: Any, seconds: float) -> Any:
    solver = cp.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    return solver


def _model(cp: Any, packing: Packing, without: str = "") -> tuple[Any, Any]:
    """Every VM on a bin under the constraints, one kind of them left out; and the variables, by VM and bin."""
    model = cp.CpModel()
    x = [[model.new_bool_var(f"x{v}_{b}") for b in range(len(packing.bins))] for v in range(len(packing.vms))]
    for vm, at in enumerate(packing.at.tolist()):
        model.add_exactly_one(x[vm])
        if at >= 0 and without != "pins":
            model.add(x[vm][at] == 1)
    for name, add in _KINDS.items():
        if name != without:
            add(model, packing, x)
    return model, x


def _contradiction(cp: Any, packing: Packing) -> str:
    """Which kinds of constraint stand in the way: those without which there is a placement."""
    found = []
    for kind in (*_KINDS, "pins"):
        model, _ = _model(cp, packing, kind)
        if _solver(cp, _ASK).solve(model) in (cp.OPTIMAL, cp.FEASIBLE):
            found.append(kind)
    return f"; there is one without {' or without '.join(found)}" if found else ""


def _ram(model: Any, packing: Packing, x: Any) -> None:
    for b, bin in enumerate(packing.bins):
        needs = sum(packing.need(vm, b) * x[vm][b] for vm in range(len(packing.vms)))
        model.add(needs <= int(bin.ram * packing.overcommit))


def _vcpus(model: Any, packing: Packing, x: Any) -> None:
    for b, bin in enumerate(packing.bins):
        if bin.vcpus:
            model.add(sum(vm.vcpus * x[index][b] for index, vm in enumerate(packing.vms)) <= bin.vcpus)


def _domains(model: Any, packing: Packing, x: Any) -> None:
    domains = sorted({vm.domain for vm in packing.vms})
    for group in sorted({bin.group for bin in packing.bins}) if len(domains) > 1 else []:
        inside = [b for b, bin in enumerate(packing.bins) if bin.group == group]
        chosen = [model.new_bool_var("") for _ in domains]
        model.add_at_most_one(chosen)
        for vm, about in enumerate(packing.vms):
            model.add(sum(x[vm][b] for b in inside) <= chosen[domains.index(about.domain)])


def _apart(model: Any, packing: Packing, x: Any) -> None:
    vms, bins = packing.vms, packing.bins
    for name in sorted({vm.apart for vm in vms if vm.apart}):
        members = [vm for vm, about in enumerate(vms) if about.apart == name]
        for host in range(len(packing.hosts)):
            model.add_at_most_one(x[vm][b] for vm in members for b, bin in enumerate(bins) if bin.host == host)


_KINDS: dict[str, Callable[[Any, Packing, Any], None]] = {
    "RAM": _ram,
    "vCPUs": _vcpus,
    "security domains": _domains,
    "anti-affinity": _apart,
}

"""The exact placement of small fleets, as a constraint program for OR-tools' CP-SAT."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ksm.fleet.extras import need
from ksm.fleet.packing import Packing, PlacementError

MOST_CELLS = 200_000  # (content class, group) pairs


def solve(packing: Packing, seconds: float = 30.0, hint: Any = None) -> tuple[list[int], float, bool]:
    """The bins that leave the fewest contents, how few there could be at best, and whether these are proven the fewest.

    Contents that the same VMs have are one variable a group, so its size follows from who shares, not from how much.

    Args:
        packing: VMs, hosts and constraints; pinned VMs are placed in it.
        seconds: the solver may take.
        hint: bins to start from.

    Raises:
        ValueError: too large. PlacementError: the constraints contradict each other, or no answer in that time.

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
    model = cp.CpModel()
    x = [[model.new_bool_var(f"x{v}_{b}") for b in range(len(bins))] for v in range(len(vms))]
    for vm in range(len(vms)):
        model.add_exactly_one(x[vm])
        if packing.at[vm] >= 0:
            model.add(x[vm][int(packing.at[vm])] == 1)
        elif hint is not None:
            for b in range(len(bins)):
                model.add_hint(x[vm][b], int(hint[vm]) == b)
    _capacities(model, packing, x)
    _neighbours(model, packing, x)
    terms = []
    for members, weight in classes.items():
        for group in groups:
            y = model.new_bool_var("")
            inside = [b for b, bin in enumerate(bins) if bin.group == group]
            for vm in members:
                model.add(sum(x[vm][b] for b in inside) <= y)
            terms.append(weight * y)
    model.minimize(sum(terms))
    solver = cp.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    status = solver.solve(model)
    if status == cp.INFEASIBLE:
        raise PlacementError("no placement meets all constraints at once: RAM, vCPUs, domains, anti-affinity, pins")
    if status not in (cp.OPTIMAL, cp.FEASIBLE):
        raise PlacementError(f"no placement was found within {seconds:g} s")
    at = [next(b for b in range(len(bins)) if solver.value(x[vm][b])) for vm in range(len(vms))]
    own = int(packing.sample.alone.sum())
    return at, packing.sample.weight * (own + solver.best_objective_bound), status == cp.OPTIMAL


def _capacities(model: Any, packing: Packing, x: Any) -> None:
    for b, bin in enumerate(packing.bins):
        everyone = range(len(packing.vms))
        room = int(bin.ram * packing.overcommit)
        model.add(sum(packing.need(vm, b) * x[vm][b] for vm in everyone) <= room)
        if bin.vcpus:
            model.add(sum(packing.vms[vm].vcpus * x[vm][b] for vm in everyone) <= bin.vcpus)


def _neighbours(model: Any, packing: Packing, x: Any) -> None:
    vms, bins = packing.vms, packing.bins
    domains = sorted({vm.domain for vm in vms})
    for group in sorted({bin.group for bin in bins}) if len(domains) > 1 else []:
        inside = [b for b, bin in enumerate(bins) if bin.group == group]
        chosen = [model.new_bool_var("") for _ in domains]
        model.add_at_most_one(chosen)
        for vm, about in enumerate(vms):
            model.add(sum(x[vm][b] for b in inside) <= chosen[domains.index(about.domain)])
    for name in sorted({vm.apart for vm in vms if vm.apart}):
        members = [vm for vm, about in enumerate(vms) if about.apart == name]
        for host in range(len(packing.hosts)):
            model.add_at_most_one(x[vm][b] for vm in members for b, bin in enumerate(bins) if bin.host == host)

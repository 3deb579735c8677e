"""What if: other numbers of VMs, other RAM, another pace, more that breaks, from what a plan carries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ksm.cost import CostModel
from ksm.errors import PlanError
from ksm.plan.needs import Needs
from ksm.plan.pace import Pace, reached
from ksm.plan.result import Curve, HostPlan, Outlook, Plan, _Result
from ksm.plan.tuning import load_at

Floats = npt.NDArray[np.float64]

_SHARES = tuple(round(0.1 * step, 1) for step in range(11))


@dataclass(frozen=True, slots=True)
class WhatIf(_Result):
    """One host of a plan with other numbers. Bytes, seconds; CPU as a share of one CPU."""

    vms: int
    ram: int
    broken: float
    pages_to_scan: int
    need: float | None
    """With merging, on average; None where one sample gives only bounds."""
    need_low: float
    need_high: float
    confident: float
    """With merging, at the policy's confidence from one side."""
    after: float
    """The same just after the share broke."""
    without: float
    """Without merging."""
    fits: bool
    """`confident` leaves the headroom, and `after` is within usable memory and swap."""
    most: int
    """VMs that fit so."""
    at_least: bool
    """`most` is where the plan ends: more may fit."""
    settle: float
    """Until 99 % of the saving is there, from cold."""
    cpu_cold: float
    """ksmd until then."""
    cpu_steady: float
    """ksmd once all is settled."""


def look_out(needs: Needs, curve: Curve, pace: Pace) -> Outlook:
    """What `what_if` needs of a host, on the grid of its curve.

    >>> from ksm.plan.inputs import HostSpec
    >>> from ksm.plan.planning import needs_of
    >>> needs = needs_of([b"a" * 4096 + b"1" * 4096, b"a" * 4096 + b"2" * 4096], HostSpec(ram=1 << 16))
    >>> look_out(needs, needs.curve(needs.grid()), Pace(100, 20, True)).sharing[:3].tolist()
    [0.0, 0.0, 1.0]
    """
    shares = np.unique([*_SHARES, needs.policy.broken])
    load = load_at(needs, curve.vms)
    _, cpu = pace.merging(load)
    tried, skipped = (
        np.array([pace.settled_work(load[: n + 1], kind) for n in range(len(curve.vms))]) for kind in (True, False)
    )
    return Outlook(
        shares=shares,
        after=needs.after_each(curve.vms, shares.tolist()),
        pages=load.pages,
        sharing=load.sharing,
        merging_cpu=np.concatenate(([0.0], np.cumsum(cpu))),
        tried_visits=tried[:, 0],
        tried_cpu=tried[:, 1],
        skipped_visits=skipped[:, 0],
        skipped_cpu=skipped[:, 1],
        smart_scan=pace.smart_scan,
        hashing_cpu=pace.hashing(load),
        hz=pace.cost.hz,
    )


def what_if(
    answer: Plan,
    host: int = 0,
    *,
    vms: int | None = None,
    ram: int | None = None,
    broken: float | None = None,
    pages_to_scan: int | None = None,
) -> WhatIf:
    """One host of a plan with other numbers, without reading the samples again; the report page does the same.

    Linear between the points of the plan: exact for up to 128 VMs and for the policy's own share that breaks.

    Args:
        answer: the plan.
        host: which of its hosts, counted from 0.
        vms: on the host; None: the recommended number.
        ram: bytes of the host; reserve and swap stay; None: as planned.
        broken: share of the merged pages that breaks at once; None: the policy's.
        pages_to_scan: the tunable; None: the plan's.

    Raises:
        PlanError: no such host; more VMs than the plan looked at; a number out of range.

    >>> import ksm
    >>> vms = [b"kernel".ljust(8192, b".") + str(n).encode().ljust(4096) for n in range(4)]
    >>> answer = ksm.plan(ksm.VMClass("web", vms), ksm.HostSpec(ram=40 * 4096), simulate=False)
    >>> bool(what_if(answer, vms=10).need == answer.hosts[0].curve.need[10])
    True
    >>> what_if(answer, ram=80 * 4096).most > what_if(answer).most
    True
    """
    if not 0 <= host < len(answer.hosts):
        raise PlanError(f"host {host} of {len(answer.hosts)}: they are counted from 0")
    each = answer.hosts[host]
    outlook, grid, spec = each.outlook, each.curve.vms, each.host
    if outlook is None:
        raise PlanError("the plan has no outlook: it was not made by ksm.plan")
    vms = each.fits.recommended if vms is None else vms
    ram = spec.ram if ram is None else ram
    broken = answer.policy.broken if broken is None else broken
    pages_to_scan = each.settle.pages_to_scan if pages_to_scan is None else pages_to_scan
    if not 0 <= vms <= grid[-1]:
        raise PlanError(f"{vms} VMs: the plan looked at 0 to {grid[-1]}")
    if not spec.reserve < ram:
        raise PlanError(f"{ram} bytes of RAM: the reserve is {spec.reserve}")
    if not 0 <= broken <= 1:
        raise PlanError(f"broken is {broken:g}; it can be 0 to 1")
    if pages_to_scan < 1:
        raise PlanError(f"pages_to_scan is {pages_to_scan}; it must be 1 or more")
    usable = ram - spec.reserve
    usual, all_of_it = usable * (1 - answer.policy.headroom), usable + spec.swap
    breaks = _column(outlook, broken)

    def at(values: Floats) -> float:
        return float(np.interp(vms, grid, values))

    most = min(_most(grid, outlook.after[:, 0], usual), _most(grid, breaks, all_of_it))
    confident, after, middle = at(outlook.after[:, 0]), at(breaks), at(each.curve.need)
    settled, cpu_cold, cpu_steady = _paced(each, outlook, vms, pages_to_scan)
    return WhatIf(
        vms=vms,
        ram=ram,
        broken=broken,
        pages_to_scan=pages_to_scan,
        need=middle if np.isfinite(middle) else None,
        need_low=at(each.curve.need_low),
        need_high=at(each.curve.need_high),
        confident=confident,
        after=after,
        without=at(each.curve.without),
        fits=confident <= usual and after <= all_of_it,
        most=most,
        at_least=most == int(grid[-1]),
        settle=settled,
        cpu_cold=cpu_cold,
        cpu_steady=cpu_steady,
    )


def _column(outlook: Outlook, broken: float) -> Floats:
    """Bytes by number of VMs after that share broke."""
    right = min(max(int(np.searchsorted(outlook.shares, broken)), 1), len(outlook.shares) - 1)
    low, high = outlook.shares[right - 1], outlook.shares[right]
    part = (broken - low) / (high - low)
    return np.asarray(outlook.after[:, right - 1] * (1 - part) + outlook.after[:, right] * part)


def _most(grid: npt.NDArray[np.int64], values: Floats, limit: float) -> int:
    """The largest number of VMs up to which all stay within the limit, linear between the points."""
    over = np.flatnonzero(values > limit)
    if not len(over):
        return int(grid[-1])
    k = int(over[0])
    if k == 0:
        return 0
    step = (limit - values[k - 1]) / (values[k] - values[k - 1])
    return int(grid[k - 1] + np.floor(step * (grid[k] - grid[k - 1]) + 1e-9))


def _paced(each: HostPlan, outlook: Outlook, vms: int, pages_to_scan: int) -> tuple[float, float, float]:
    """(seconds until 99 % are merged, ksmd's share of a CPU until then, and afterwards)."""
    grid = each.curve.vms
    pace = Pace(pages_to_scan, each.settle.sleep_millisecs, outlook.smart_scan, CostModel(hz=outlook.hz))
    if vms == 0:
        return 0.0, 0.0, 0.0
    points = np.append(grid[grid < vms], vms)
    pages, sharing, merging = (
        np.interp(points, grid, values) for values in (outlook.pages, outlook.sharing, outlook.merging_cpu)
    )
    visits = np.maximum(np.diff(pages), 1e-9)
    seconds, sharing, busy = pace.timed(pages, sharing, visits, np.diff(merging), outlook.hashing_cpu)
    end = reached(seconds, sharing, 0.99) or float(seconds[-1])
    tried, visits_tried, skipped, visits_skipped = (
        float(np.interp(vms, grid, values))
        for values in (outlook.tried_cpu, outlook.tried_visits, outlook.skipped_cpu, outlook.skipped_visits)
    )
    passing, cpu = pace.settled((visits_tried, tried), (visits_skipped, skipped))
    return end, float(np.interp(end, seconds, busy)) / end, cpu / passing if passing > 0 else 0.0

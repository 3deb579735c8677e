"""The tunables that meet a policy's budget, with the reason for each, in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ksm.cost import CostModel
from ksm.plan.growth import Rules
from ksm.plan.inputs import HostSpec, Policy
from ksm.plan.needs import Needs
from ksm.plan.pace import SHARES, Load, Pace, least, reached, round_up
from ksm.plan.result import Settle, Timeline, Tunable
from ksm.sysfs import Profile, profile
from ksm.units import clock

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_DEFAULT_SHARING = 256
_LIMITS = (256, 512, 1024, 2048, 4096)
_WORTH = 0.01  # of the frames: what a tunable must save to be changed
_STEPS = 96  # points of a load, at the most


def load(needs: Needs, vms: int) -> Load:
    """What ksmd finds with so many VMs.

    >>> from ksm.plan.planning import needs_of
    >>> needs = needs_of([b"a" * 4096 + b"1" * 4096, b"a" * 4096 + b"2" * 4096], HostSpec(ram=1 << 16))
    >>> load(needs, 2).sharing.tolist()
    [0.0, 0.0, 1.0]
    """
    points = np.unique(np.linspace(0, vms, min(vms, _STEPS) + 1).astype(np.int64))
    return load_at(needs, np.union1d(points, [1, vms - 1]) if vms > 1 else points)


def load_at(needs: Needs, points: Ints) -> Load:
    """The same at chosen numbers of VMs, ascending from 0.

    >>> from ksm.plan.planning import needs_of
    >>> needs = needs_of([b"a" * 4096 + b"1" * 4096, b"a" * 4096 + b"2" * 4096], HostSpec(ram=1 << 16))
    >>> load_at(needs, np.array([0, 2])).sharing.tolist()
    [0.0, 1.0]
    """
    counts = needs.mix[points]
    growth = needs.growth
    pages = growth.pages(counts)
    frames, unshared = growth.frames(counts)
    zero = growth.zeros(counts) if growth.rules.use_zero_pages else np.zeros(len(points))
    sharing = np.maximum.accumulate(pages - frames)
    return Load(
        points.astype(np.float64),
        pages,
        sharing,
        np.minimum(unshared, frames),
        zero,
        needs.page,
        growth.rules.separate_nodes,
    )


def settle(found: Load, pace: Pace) -> Settle:
    """How soon, and at what cost.

    >>> grows = np.array([0.0, 1e6, 2e6])
    >>> found = Load(grows / 1e6, grows, np.array([0.0, 0.0, 8e5]), np.array([0.0, 1e6, 4e5]), np.zeros(3))
    >>> 90 < settle(found, Pace(1000, 20, True)).cold[99] < 130
    True
    """
    timed = pace.cold(found)
    _, cpu_cold = _merged(*timed)
    passing, cpu = pace.steady(found)
    return Settle(
        pages_to_scan=pace.pages_to_scan,
        sleep_millisecs=pace.sleep_millisecs,
        cold={share: reached(*timed[:2], share / 100) for share in SHARES},
        one_more={share: pace.one_more(found, share / 100) for share in SHARES},
        pass_seconds=passing,
        cpu_cold=cpu_cold,
        cpu_steady=cpu / passing if passing > 0 else 0.0,
    )


def _merged(seconds: Floats, sharing: Floats, busy: Floats) -> tuple[float, float]:
    """(seconds until nearly all is merged from cold, ksmd's share of a CPU until then)."""
    at = reached(seconds, sharing, SHARES[-1] / 100)
    end = at or float(seconds[-1])
    return at, float(np.interp(end, seconds, busy)) / end if end > 0 else 0.0


def timeline(label: str, found: Load, pace: Pace) -> Timeline:
    """Merging from a cold start by the closed form.

    >>> grows = np.array([0.0, 1e6, 2e6])
    >>> found = Load(grows / 1e6, grows, np.array([0.0, 0.0, 8e5]), np.array([0.0, 1e6, 4e5]), np.zeros(3))
    >>> timeline("default", found, Pace(100, 20, True)).pages_sharing.tolist()
    [0.0, 0.0, 0.0, 800000.0]
    """
    seconds, sharing, busy = pace.cold(found)
    return Timeline(label, seconds, sharing, busy)


def choose_rules(
    frames: Callable[[Rules], float], zero_share: float, host: HostSpec, policy: Policy
) -> tuple[Rules, tuple[Tunable, ...]]:
    """use_zero_pages, merge_across_nodes and max_page_sharing: what the policy says, or what is worth a change.

    `frames` gives the frames under some rules at about the number of VMs that fit; `zero_share` is that of the pages.

    >>> rules, tunables = choose_rules(lambda rules: 1000.0, 0.2, HostSpec(ram=1 << 30), Policy())
    >>> rules.use_zero_pages, rules.max_page_sharing, [each.name for each in tunables]
    (True, 256, ['use_zero_pages', 'merge_across_nodes', 'max_page_sharing'])
    """
    use_zero, zero = _zero_pages(zero_share, policy)
    separate, across = _nodes(frames, use_zero, host, policy)
    nodes = host.nodes if separate else 1
    if policy.max_page_sharing is not None:
        limit, why = policy.max_page_sharing, "as asked for"
    else:
        limit, why = _sharing_limit(lambda limit: frames(Rules(limit, use_zero, nodes)))
    return Rules(limit, use_zero, nodes), (zero, across, Tunable("max_page_sharing", limit, why))


def _zero_pages(share: float, policy: Policy) -> tuple[bool, Tunable]:
    use = share >= _WORTH if policy.use_zero_pages is None else policy.use_zero_pages
    if policy.use_zero_pages is not None:
        why = "as asked for"
    elif use:
        why = (
            f"{share:.1%} of the pages are zero: they then take no KSM frames, no rmap items (64 bytes each), "
            "and no visits once merged"
        )
    else:
        why = f"the default: only {share:.1%} of the pages are zero"
    return use, Tunable("use_zero_pages", int(use), why)


def _nodes(frames: Callable[[Rules], float], use_zero: bool, host: HostSpec, policy: Policy) -> tuple[bool, Tunable]:
    """Whether nodes are kept apart."""
    if host.nodes == 1:
        return False, Tunable("merge_across_nodes", 1, "the default: there is one node")
    apart, together = (frames(Rules(_DEFAULT_SHARING, use_zero, nodes)) for nodes in (host.nodes, 1))
    cost = apart / max(together, 1.0) - 1
    why = f"keeping the {host.nodes} nodes apart takes {cost:.1%} more frames"
    if policy.merge_across_nodes is not None:
        separate = not policy.merge_across_nodes
        why = f"as asked for; {why}"
    else:
        separate = cost < _WORTH
        why += ", which local memory is worth" if separate else "; merged pages are then remote to some of their VMs"
    return separate, Tunable("merge_across_nodes", int(not separate), why)


def _sharing_limit(frames: Callable[[int], float]) -> tuple[int, str]:
    best = frames(_LIMITS[-1])
    limit = next(each for each in _LIMITS if frames(each) <= best * (1 + _WORTH))
    cost = max(frames(_DEFAULT_SHARING) / max(best, 1.0) - 1, 0.0)
    if limit == _DEFAULT_SHARING:
        return limit, (
            f"the default: {_LIMITS[-1]} would save another {cost:.2%} of the frames, and make walks of a KSM frame's "
            "mappers (migration, compaction, reclaim) longer"
        )
    return limit, f"the default of {_DEFAULT_SHARING} would take {cost:.1%} more frames"


def choose_pace(found: Load, host: HostSpec, policy: Policy, cost: CostModel) -> tuple[Pace, tuple[Tunable, ...], bool]:
    """pages_to_scan for the time and CPU budget, with its reason, and whether both are met.

    >>> grows = np.array([0.0, 1e6, 2e6])
    >>> found = Load(grows / 1e6, grows, np.array([0.0, 0.0, 8e5]), np.array([0.0, 1e6, 4e5]), np.zeros(3))
    >>> choose_pace(found, HostSpec(ram=1 << 34), Policy(settle=600.0), CostModel())[0].pages_to_scan
    160
    """
    kernel = profile(host.kernel)
    defaults = {name: attribute.default for name, attribute in kernel.attributes.items()}
    sleep = defaults["sleep_millisecs"]

    any_pace = Pace(1, sleep, kernel.smart_scan, cost, kernel.gate_first)
    work = (*any_pace.merging(found), any_pace.hashing(found))  # the same at every pace

    def at(pages: int) -> tuple[float, float]:
        return _merged(*replace(any_pace, pages_to_scan=pages).timed(found.pages, found.sharing, *work))

    soon = least(lambda pages: at(pages)[0] <= policy.settle)
    dear = least(lambda pages: at(pages)[1] > policy.ksmd_cpu)
    budget = max(1, dear - 1) if dear is not None else None
    standard = defaults["pages_to_scan"]
    wanted = max(standard, round_up(soon)) if soon is not None else None
    met = True
    if wanted is not None and (budget is None or wanted <= budget):
        pages, reason = wanted, "the least for the time asked for"
    elif soon is not None and budget is not None and soon <= budget:
        pages, reason = budget, "as much as ksmd's CPU budget allows"
    else:
        pages, met, reason = budget or standard, False, "as much as ksmd's CPU budget allows, and not enough"
    seconds, share = at(pages)
    why = (
        f"{reason}: 99 % of the saving is there {clock(seconds)} after a cold start of all VMs "
        f"({clock(policy.settle)} allowed), with {share:.1%} of a CPU until then "
        f"({policy.ksmd_cpu:.0%} allowed)"
    )
    tunables = [
        Tunable("pages_to_scan", pages, why),
        Tunable("sleep_millisecs", sleep, "the default: pages_to_scan sets the pace"),
    ]
    if kernel.smart_scan:
        tunables.append(Tunable("smart_scan", 1, "the default: most visits to pages without a partner are saved"))
    return replace(any_pace, pages_to_scan=pages), tuple(tunables), met


def advisor(pace: Pace, policy: Policy, kernel: Profile) -> tuple[Tunable, ...]:
    """The scan-time advisor's settings for the same budget; () where there is none.

    >>> grows = np.array([0.0, 1e6])
    >>> advisor(Pace(200, 20, True), Policy(settle=600.0), profile("6.18"))[1].value
    300
    """
    if not kernel.advisor:
        return ()
    target = max(1, int(policy.settle / 2))
    return (
        Tunable("advisor_mode", "scan-time", "instead of a fixed pages_to_scan: it follows the number of VMs"),
        Tunable("advisor_target_scan_time", target, "seconds a pass: merging from cold takes two of them"),
        Tunable("advisor_max_cpu", max(1, int(policy.ksmd_cpu * 100)), "the budget, percent of a CPU"),
        Tunable("advisor_min_pages_to_scan", pace.pages_to_scan, "where it starts: what this plan needs from cold"),
        Tunable(
            "advisor_max_pages_to_scan",
            max(pace.pages_to_scan, kernel.attributes["advisor_max_pages_to_scan"].default),
            "the default, unless this plan needs more",
        ),
    )

"""`plan`: from samples, hosts and a policy to the answer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ksm.cost import CostModel
from ksm.errors import PlanError
from ksm.estimate import Source, snapshots
from ksm.plan.confirm import confirm
from ksm.plan.contents import Table
from ksm.plan.given import Given
from ksm.plan.growth import Rules, Samples
from ksm.plan.inputs import MAX_SAMPLES, MAX_VMS, HostSpec, Policy, VMClass, shares
from ksm.plan.needs import Needs, reach
from ksm.plan.outlook import look_out
from ksm.plan.pace import Pace
from ksm.plan.result import ClassSummary, Composition, Curve, HostPlan, Plan
from ksm.plan.risk import assess
from ksm.plan.tuning import advisor, choose_pace, choose_rules, load, settle, timeline
from ksm.sources import Snapshot
from ksm.sysfs import profile

Floats = npt.NDArray[np.float64]


def plan(
    classes: Sequence[VMClass] | VMClass,
    hosts: Sequence[HostSpec] | HostSpec,
    policy: Policy | None = None,
    *,
    simulate: bool = True,
    page_size: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Plan:
    """How many VMs fit on each host, how soon their memory is merged, at what cost and at what risk.

    Takes O(pages) time for the samples' pages and about 60 bytes for each of them; what follows hangs on the number of
    samples and classes, not on their size.

    Args:
        classes: of VMs, with samples of each.
        hosts: kinds of hosts.
        policy: what is asked; None: `Policy()`.
        simulate: confirm the time to merge on a simulated machine with the samples' own contents.
        page_size: bytes a page; None: what the samples say, or 4096.
        threads: that hash; None: one a CPU.
        progress: called with (pages done, pages in all).

    Raises:
        PlanError: what was given does not fit together. ValueError: page sizes that differ. SourceError: a sample
            that cannot be read.

    >>> from ksm import fingerprint
    >>> vms = [b"kernel".ljust(8192, b".") + str(n).encode().ljust(4096) for n in range(4)]
    >>> answer = plan(VMClass("web", vms), HostSpec(ram=40 * 4096), Policy(headroom=0, broken=0), simulate=False)
    >>> answer.hosts[0].fits.without_ksm, answer.hosts[0].fits.mean
    (13, 36)
    """
    classes = [classes] if isinstance(classes, VMClass) else list(classes)
    hosts = [hosts] if isinstance(hosts, HostSpec) else list(hosts)
    policy = policy or Policy()
    mix = shares(classes)
    if not hosts:
        raise PlanError("no hosts: there is nowhere to put the VMs")
    given = Given.of(classes)
    if len(given.sources) > MAX_SAMPLES:
        raise PlanError(
            f"{len(given.sources):,} samples; a plan takes {MAX_SAMPLES:,} at the most: draw some at random"
        )
    taken = snapshots(given.sources, page_size, False, threads, progress)
    page = taken[0].page_size
    for image, index in zip(taken, given.class_of, strict=True):
        if not image.pages:
            raise PlanError(f"class {classes[index].name}: sample {image.name} has no pages")
    table = Table.of(taken, given.class_of, policy.zeros == "absent")
    for index, each in enumerate(classes):
        if not table.pages[table.class_of == index].any():
            raise PlanError(f"class {each.name}: its samples have nothing but all-zero pages, taken for never touched")
    ram = _ram(classes, table, page)
    for host in hosts:
        for each, size in zip(classes, ram, strict=True):
            if size + host.vm_overhead > host.usable:
                raise PlanError(
                    f"{host.name} is smaller than one VM: it has {host.usable:,} usable bytes, and a VM of class "
                    f"{each.name} takes {int(size) + host.vm_overhead:,}"
                )
    compositions = _compositions(taken, table, classes)
    summaries = _summaries(classes, mix, ram, table, compositions)
    common = _Common(Samples(table), ram, mix, policy, page, summaries, given)
    answers = tuple(_host(common, host) for host in hosts)
    if simulate:
        answers = tuple(_confirmed(each, taken, table) for each in answers)
    return Plan(
        classes=summaries,
        policy=policy,
        page_size=page,
        hosts=answers,
        samples=compositions,
        overlap=table.overlap(),
        assumed=tuple(_assumed(taken, policy, hosts, summaries, given)),
        warnings=tuple(_warnings(summaries, answers, policy, given)),
    )


def needs_of(
    images: Sequence[Source], host: HostSpec, policy: Policy | None = None, rules: Rules | None = None
) -> Needs:
    """The memory that VMs like these images need on a host, by number: the heart of a plan, for one class.

    >>> needs = needs_of([b"a" * 4096 + b"1" * 4096, b"a" * 4096 + b"2" * 4096], HostSpec(ram=1 << 16))
    >>> needs.curve(np.array([1, 2])).frames
    array([2., 3.])
    """
    policy = policy or Policy()
    taken = snapshots(list(images))
    samples = Samples(Table.of(taken, [0] * len(taken), policy.zeros == "absent"))
    ram = np.array([samples.table.pages.max() * taken[0].page_size], np.float64)
    mix = reach(samples, ram, [1.0], host, policy, taken[0].page_size)
    return Needs(samples, ram, mix, host, policy, rules or Rules(), taken[0].page_size)


def _ram(classes: Sequence[VMClass], table: Table, page: int) -> Floats:
    ram = []
    for index, each in enumerate(classes):
        largest = int(table.pages[table.class_of == index].max()) * page
        if each.ram is not None and each.ram < largest:
            raise PlanError(
                f"class {each.name}: a sample has {largest:,} bytes of pages, a VM has {each.ram:,} bytes of RAM"
            )
        ram.append(each.ram or largest)
    return np.array(ram, np.float64)


@dataclass(frozen=True, slots=True)
class _Common:
    """What is the same for all hosts."""

    samples: Samples
    ram: Floats
    mix: Sequence[float]
    policy: Policy
    page: int
    classes: Sequence[ClassSummary]
    given: Given


def _host(common: _Common, host: HostSpec) -> HostPlan:
    samples, policy = common.samples, common.policy
    counts = reach(samples, common.ram, common.mix, host, policy, common.page)

    @functools.cache
    def needs(rules: Rules) -> Needs:
        return Needs(samples, common.ram, counts, host, policy, rules, common.page)

    first = needs(Rules(use_zero_pages=bool(policy.use_zero_pages)))
    at = counts[[max(1, first.fits(first.curve(first.grid())).recommended)]]
    zero_share = float((first.growth.zeros(at) / first.growth.pages(at))[0])
    rules, tunables = choose_rules(lambda rules: float(needs(rules).growth.frames(at)[0][0]), zero_share, host, policy)
    final = needs(rules)
    curve = final.curve(final.grid())
    fits = final.fits(curve)
    answers = [fits.mean or 0, fits.low, fits.high, fits.confident, fits.broken, fits.recommended]
    around = np.clip([*answers, fits.recommended + 1], 0, curve.vms[-1])
    if not np.isin(around, curve.vms).all():  # the answers themselves are to be on the curve
        curve = final.curve(np.union1d(curve.vms, around))
    found = load(final, max(1, fits.recommended))
    cost = CostModel()
    pace, pacing, _ = choose_pace(found, host, policy, cost)
    kernel = profile(host.kernel)
    default = replace(pace, pages_to_scan=kernel.attributes["pages_to_scan"].default)
    settled = settle(found, pace)
    seen = common.given.breaking(samples.table, common.page, settled.pass_seconds, policy.zeros == "absent")
    return HostPlan(
        host=host,
        fits=fits,
        mix={each.name: int(n) for each, n in zip(common.classes, counts[fits.recommended], strict=True)},
        curve=curve,
        tunables=pacing + tunables,
        advisor=advisor(pace, policy, kernel),
        settle=settled,
        default=settle(found, default),
        timelines=(timeline("recommended", found, pace), timeline("default", found, default)),
        check=None,
        frames=_figures(final.curve(np.array([fits.recommended], np.int64)), final),
        risk=assess(final, curve, fits.recommended, seen, common.classes),
        outlook=look_out(final, curve, pace),
    )


def _confirmed(each: HostPlan, taken: Sequence[Snapshot], table: Table) -> HostPlan:
    """With the simulation of its tunables."""
    counts = np.array(list(each.mix.values()), np.int64)
    if not counts.any():
        return each
    tunables = {one.name: int(one.value) for one in each.tunables}
    kernel = profile(each.host.kernel)
    pace = Pace(tunables["pages_to_scan"], tunables["sleep_millisecs"], kernel.smart_scan, gate_first=kernel.gate_first)
    nodes = each.host.nodes
    apart = 1 if tunables["merge_across_nodes"] else nodes
    rules = Rules(tunables["max_page_sharing"], bool(tunables["use_zero_pages"]), apart)
    check, simulated = confirm(taken, table.class_of.tolist(), counts, pace, rules, each.host.kernel, nodes)
    return replace(each, check=check, timelines=(*each.timelines, simulated))


def _figures(curve: Curve, needs: Needs) -> dict[str, float | None]:
    zero = float(needs.growth.zeros(curve.by_class)[0]) if needs.growth.rules.use_zero_pages else 0.0
    pages, frames, unshared = (float(array[0]) for array in (curve.pages, curve.frames, curve.unshared))
    found = {
        "pages": pages,
        "frames": frames,
        "low": float(curve.frames_low[0]),
        "high": float(curve.frames_high[0]),
        "pages_shared": frames - unshared,
        "pages_sharing": pages - zero - frames,
        "pages_unshared": unshared,
        "ksm_zero_pages": zero,
        "need": float(curve.need[0]),
        "without": float(curve.without[0]),
        "saved": float(curve.saved[0]),
        "bookkeeping": float(curve.bookkeeping[0]),
    }
    return {name: value if np.isfinite(value) else None for name, value in found.items()}


def _compositions(taken: Sequence[Snapshot], table: Table, classes: Sequence[VMClass]) -> tuple[Composition, ...]:
    columns = zip(table.pages, table.zeros, *table.composition(), strict=True)
    return tuple(
        Composition(snapshot.name, classes[index].name, *map(int, numbers))
        for snapshot, index, numbers in zip(taken, table.class_of, columns, strict=True)
    )


def _summaries(
    classes: Sequence[VMClass], mix: Sequence[float], ram: Floats, table: Table, samples: Sequence[Composition]
) -> tuple[ClassSummary, ...]:
    found = []
    for index, each in enumerate(classes):
        mine = [sample for sample, c in zip(samples, table.class_of, strict=True) if c == index]
        means = [
            float(np.mean([getattr(s, what) for s in mine]))
            for what in ("pages", "zero", "within", "between", "unique")
        ]
        found.append(ClassSummary(each.name, mix[index], len(mine), int(ram[index]), *means))
    return tuple(found)


def _assumed(
    taken: Sequence[Snapshot],
    policy: Policy,
    hosts: Sequence[HostSpec],
    classes: Sequence[ClassSummary],
    given: Given,
) -> list[str]:
    found = [
        "The samples were drawn at random from the VMs of their class; the VMs to come are like them.",
        "All memory of the VMs is mergeable, and stands still for long enough to merge.",
    ]
    if any(not each.anonymous_known for each in taken):
        what = "never touched" if policy.zeros == "absent" else "pages like others, which merge"
        found.append(f"All-zero pages of dumps, which may as well have never been touched, are {what}.")
    if not policy.growth:
        found.append("VMs will touch no more memory than the samples have.")
    if any(not host.reserve for host in hosts):
        found.append("Nothing is reserved for the host itself.")
    if any(not host.vm_overhead for host in hosts):
        found.append("A VM takes nothing besides its guest memory.")
    recorded = {name for _, name in given.recordings}
    if recorded:
        found.append("Merged in a recording is what stood still for a pass of ksmd and has a copy that did, too.")
        for each in classes:
            if each.name not in recorded:
                found.append(f"Class {each.name}, of which there is no recording, breaks like the worst that has one.")
    return found


def _warnings(classes: Sequence[ClassSummary], hosts: Sequence[HostPlan], policy: Policy, given: Given) -> list[str]:
    found = []
    for each in classes:
        if each.samples == 1:
            found.append(
                f"Class {each.name} has one sample: what its VMs share with each other is unknown, so these are bounds."
            )
        elif each.samples == 2:
            found.append(f"Class {each.name} has two samples: the intervals are wide; a third narrows them most.")
    found += [f"{path} is too short to tell how fast sharing breaks: it takes a minute." for path in given.too_short]
    for host in hosts:
        if int(host.curve.vms[-1]) == host.fits.recommended == MAX_VMS:
            found.append(f"{host.host.name}: more may fit: no plan looks beyond {MAX_VMS:,} VMs a host.")
        if host.risk is not None and host.risk.worst > policy.broken:
            found.append(
                f"{host.host.name}: in the worst minute recorded {host.risk.worst:.1%} of the merged pages were "
                f"written; the policy has room for {policy.broken:.1%} breaking at once."
            )
    return found

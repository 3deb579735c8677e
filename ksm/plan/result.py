"""What a plan answers: frozen results with units, for people (`verdict`), programs (`to_dict`) and charts (arrays)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ksm.errors import PlanError
from ksm.html import table
from ksm.plan.inputs import HostSpec, Policy
from ksm.units import binary, clock

if TYPE_CHECKING:
    import altair

    from ksm.plan.outlook import WhatIf

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def plain(value: Any) -> Any:
    """What JSON can hold: arrays as lists, NaN as None, results by their `to_dict`.

    >>> plain(np.array([1.0, np.nan]))
    [1.0, None]
    """
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return value


class _Result:
    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, eq=False)
class Curve(_Result):
    """Memory against the number of VMs on one host; arrays of equal length, a value for each of `vms`.

    Where a class is known by one sample only, the middle is unknown (NaN) and low and high are bounds: every further VM
    like the sample, and every further VM sharing nothing but zero pages. Otherwise low and high are the ends of the
    central interval at the policy's confidence, for the memory of that many VMs drawn at random.
    """

    vms: Ints
    by_class: Ints
    """(len(vms), classes): how many of each class."""
    pages: Floats
    """Pages that the guests have touched, all mergeable."""
    frames: Floats
    """Frames that hold them once merging has settled; with low and high."""
    frames_low: Floats
    frames_high: Floats
    unshared: Floats
    """`pages_unshared` on average."""
    without: Floats
    """Bytes taken without merging: guests, growth, overhead."""
    need: Floats
    """Bytes taken with merging, the kernel's bookkeeping included; with low and high."""
    need_low: Floats
    need_high: Floats
    saved: Floats
    """Bytes: `without` less `need`; with low and high."""
    saved_low: Floats
    saved_high: Floats
    broken: Floats
    """Bytes taken (at the confidence) just after the policy's share of the merged pages broke."""
    bookkeeping: Floats
    """Bytes of rmap items and stable nodes, part of `need`."""


@dataclass(frozen=True, slots=True)
class Fits(_Result):
    """How many VMs fit on one host, by question; None where one sample gives only bounds."""

    without_ksm: int
    """Touched memory as in the samples, no merging, headroom kept."""
    committed: int
    """Every VM uses all of its RAM, no merging, no headroom."""
    mean: int | None
    """Merging, on average, headroom kept."""
    low: int
    """Merging: the lower end for `mean` at the policy's confidence, or the lower bound."""
    high: int
    confident: int
    """Merging: so many fit with the policy's confidence, headroom kept."""
    broken: int
    """So many still fit, at the confidence and with swap, after the policy's share of the merged pages broke."""
    unmerged: int
    """So many survive run=2: all private, in all usable memory and swap."""
    recommended: int
    """The least of `confident` and `broken`."""
    limited_by: str
    """"memory", "broken pages" or "the plan's limit": what `recommended` ends at."""


@dataclass(frozen=True, slots=True)
class Tunable(_Result):
    """One file of /sys/kernel/mm/ksm, what to write to it, and why."""

    name: str
    value: int | str
    why: str


@dataclass(frozen=True, slots=True)
class Settle(_Result):
    """How soon merging is there with some tunables, and what ksmd takes. Seconds; CPU as a share of one CPU."""

    pages_to_scan: int
    sleep_millisecs: int
    cold: Mapping[int, float]
    """Share of the saving in percent (50, 90, 99) -> seconds after all VMs started at once."""
    one_more: Mapping[int, float]
    """The same share of what one more VM saves -> seconds after it booted, the others settled. Infinite: for some of it
    smart scan may never try both pages in one pass."""
    pass_seconds: float
    """A pass once all is settled."""
    cpu_cold: float
    """ksmd while it merges, from cold to 99 %."""
    cpu_steady: float
    """ksmd once all is settled."""


@dataclass(frozen=True, slots=True, eq=False)
class Timeline(_Result):
    """Merging from a cold start: arrays of equal length."""

    label: str
    """"recommended", "default" or "simulated"."""
    seconds: Floats
    pages_sharing: Floats
    """With `ksm_zero_pages`."""
    cpu_seconds: Floats
    """ksmd's CPU time so far."""


@dataclass(frozen=True, slots=True)
class Check(_Result):
    """The closed form against `ksm.Machine` on the samples' own fingerprints, thinned out."""

    vms: int
    pages: int
    """Pages in the simulated machine."""
    thinning: int
    """One content of so many was kept, with all its copies."""
    pages_sharing: tuple[float, int]
    """(closed form, simulation), as the following."""
    seconds_50: tuple[float, float]
    seconds_90: tuple[float, float]
    seconds_99: tuple[float, float]
    cpu_seconds: tuple[float, float]
    one_more: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """Share in percent of what one more VM saves -> seconds after it booted, infinite: not while it was looked at;
    empty if there is one VM."""

    @property
    def contents(self) -> str:
        """What is in its VMs, in words: all of the samples' contents, or one of so many."""
        if self.thinning == 1:
            return "the samples' own contents"
        return f"one content in {self.thinning} of the samples' own"


@dataclass(frozen=True, slots=True)
class Composition(_Result):
    """What a sample's pages are; the four add up to `pages`."""

    name: str
    class_name: str
    pages: int
    zero: int
    within: int
    """Further copies of contents that the same sample has already."""
    between: int
    """Contents that another sample has, too."""
    unique: int
    """Contents that only this sample has."""


@dataclass(frozen=True, slots=True, eq=False)
class Breaking(_Result):
    """How fast merged pages were written in one recording. Shares are 0 to 1, of the pages merged.

    A window is from a step to the first that is a minute later. Where steps are further apart, the arrays and the
    median are means over the window, and `worst` is all that it shows, as that may have been within one minute.
    """

    name: str
    class_name: str
    processes: int
    duration: float
    """Seconds from the first step to the last."""
    step_seconds: float
    """Between two steps, at the most."""
    merged: float
    """Pages merged of one VM, on average."""
    seconds: Floats
    """Where the windows start."""
    share: Floats
    """Of the merged pages of all its VMs, those written within that minute."""
    vm_share: Floats
    """Of a VM's merged pages, those written within that minute in the VM that wrote most."""
    median: float
    """Of `share`."""
    worst: float
    """The worst minute of any VM."""
    worst_at: float
    """Where its window starts, seconds."""
    ever: float
    """What one VM wrote of them in the whole recording, each page counted once, in the VM that wrote most."""


@dataclass(frozen=True, slots=True)
class Risk(_Result):
    """What breaking of merged pages means for one host with its recommended VMs. Bytes; shares of the merged pages."""

    breaking: tuple[Breaking, ...]
    vms: int
    median: float
    """Written in a minute, over the mix; a class without a recording is taken to be like the worst that has one."""
    worst: float
    """Written if all VMs have the worst minute of their class at once."""
    ever: float
    """Written if all that a VM ever wrote in a recording is written by all VMs at once."""
    need: float
    """Bytes taken at the policy's confidence, nothing broken."""
    need_worst: float
    need_ever: float
    limit: int
    """Bytes of usable memory and swap."""
    swap_worst: float
    """Bytes of it that would be in swap."""
    swap_ever: float
    survives_worst: bool
    survives_ever: bool
    fits_worst: int
    """VMs that would survive the worst minute everywhere at once."""
    fits_ever: int
    minutes_to_full: float | None
    """Until the limit is reached if merged pages are written as in the median minute and nothing merges again; None:
    never."""


@dataclass(frozen=True, slots=True, eq=False)
class Outlook(_Result):
    """What other numbers of VMs, shares that break and paces of ksmd come to: what `what_if` is worked out from.

    Arrays with a value for each of the curve's `vms`, but for `shares`; CPU in seconds.
    """

    shares: Floats
    """Shares of the merged pages that break, ascending from 0 to 1, the policy's among them."""
    after: Floats
    """(len(vms), len(shares)): bytes taken at the policy's confidence, from one side, just after that share broke."""
    pages: Floats
    """Pages that ksmd visits in the first pass after a cold start."""
    sharing: Floats
    """`pages_sharing` and `ksm_zero_pages`, settled."""
    merging_cpu: Floats
    """Of the second pass after a cold start, which merges, up to that VM."""
    tried_visits: Floats
    """Pages visited in a pass that tries the unshared pages, once all is settled."""
    tried_cpu: Floats
    """Of that pass."""
    skipped_visits: Floats
    """The same of a pass in which smart scan passes over them."""
    skipped_cpu: Floats
    smart_scan: bool
    """Eight of nine passes are of that kind."""
    hashing_cpu: float
    """To hash a page."""
    hz: int
    """Timer ticks a second: sleeps end on a tick."""


@dataclass(frozen=True, slots=True)
class HostPlan(_Result):
    """The plan for one kind of host. Numbers of VMs and bytes are for one host of the kind."""

    host: HostSpec
    fits: Fits
    mix: Mapping[str, int]
    """VMs of each class among the recommended."""
    curve: Curve
    tunables: tuple[Tunable, ...]
    advisor: tuple[Tunable, ...]
    """The scan-time advisor's settings for the same budget, to use instead of pages_to_scan; () before Linux 6.8."""
    settle: Settle
    """With these tunables, at the recommended number of VMs."""
    default: Settle
    """With the kernel's default tunables."""
    timelines: tuple[Timeline, ...]
    check: Check | None
    """None if simulation was not asked for."""
    frames: Mapping[str, float | None]
    """At the recommended number: "pages", "frames", "low", "high", "pages_shared", "pages_sharing", "pages_unshared",
    "ksm_zero_pages" (pages); "need", "without", "saved", "bookkeeping" (bytes)."""
    risk: Risk | None = None
    """None: there is no recording to tell it from."""
    outlook: Outlook | None = None
    """For `what_if`."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return _Result.to_dict(self) | {"host": asdict(self.host)}


@dataclass(frozen=True, slots=True)
class ClassSummary(_Result):
    """A class of VMs as its samples show it; pages are means over samples."""

    name: str
    share: float
    samples: int
    ram: int
    pages: float
    zero: float
    within: float
    between: float
    unique: float


@dataclass(frozen=True, slots=True, eq=False)
class Plan(_Result):
    """How many VMs fit, how soon, at what cost, at what risk; made by `ksm.plan`.

    >>> import ksm
    >>> answer = ksm.plan([ksm.VMClass("web", [b"a" * 4096 + b"1" * 4096, b"a" * 4096 + b"2" * 4096])],
    ...                   ksm.HostSpec(ram=32768), ksm.Policy(headroom=0), simulate=False)
    >>> answer.fits >= 1
    True
    """

    classes: tuple[ClassSummary, ...]
    policy: Policy
    page_size: int
    hosts: tuple[HostPlan, ...]
    samples: tuple[Composition, ...]
    overlap: Ints
    """(samples, samples) pages: of the row's sample, those whose content the column's sample has, zero pages apart."""
    assumed: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> int:
        """VMs that the plan recommends, over all hosts.

        >>> Plan.fits.__doc__ is not None
        True
        """
        return sum(each.fits.recommended * each.host.count for each in self.hosts)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {"fits": self.fits, "verdict": list(self.verdict())} | _Result.to_dict(self)

    def verdict(self) -> tuple[str, ...]:
        """The answer in sentences, the decision first."""
        return tuple(sentence for n in range(len(self.hosts)) for sentence in self.sentences(n))

    def sentences(self, host: int) -> tuple[str, ...]:
        """The part of `verdict` about one host, counted from 0."""
        return tuple(self._of_host(self.hosts[host]))

    def what_if(
        self,
        host: int = 0,
        *,
        vms: int | None = None,
        ram: int | None = None,
        broken: float | None = None,
        pages_to_scan: int | None = None,
    ) -> WhatIf:
        """One host with another number of VMs, RAM, share that breaks or pace: see `ksm.plan.outlook.what_if`."""
        from ksm.plan.outlook import what_if

        return what_if(self, host, vms=vms, ram=ram, broken=broken, pages_to_scan=pages_to_scan)

    def chart(self, kind: str = "fits", host: int = 0) -> altair.TopLevelMixin:
        """A chart of altair: for notebooks, and to be saved as PNG or SVG by its `save`.

        Args:
            kind: "fits", "saving", "frames", "pace", "cpu", "risk" (where there is a recording), "composition" or
                "matrix".
            host: which of the hosts, counted from 0.

        Raises:
            PlanError: no such kind or host. UnsupportedError: what `ksm[report]` has is not installed.
        """
        from ksm.charts import standing_alone
        from ksm.plan.charts import figures

        found = figures(self, host)
        if kind not in found:
            raise PlanError(f"no chart {kind!r} of this plan: there are {', '.join(found)}")
        return standing_alone(found[kind])

    def _repr_html_(self) -> str:
        from ksm.plan.rows import figures

        said = "".join(f"<p>{escape(sentence)}</p>" for sentence in self.verdict())
        return said + "".join(
            table((f"{each.host.name}, {binary(each.host.ram)}", ""), figures(self, each)) for each in self.hosts
        )

    def _of_host(self, each: HostPlan) -> list[str]:
        fits, policy, sure = each.fits, self.policy, f"{self.policy.confidence:.0%}"
        which = each.host.name if each.host.count == 1 else f"each of {each.host.count} {each.host.name}"
        mix = ", ".join(f"{n} {name}" for name, n in each.mix.items()) if len(each.mix) > 1 else ""
        more = fits.recommended - fits.without_ksm
        found = [
            f"{fits.recommended} VMs fit on {which}"
            + (f" ({mix})" if mix else "")
            + f": {fits.without_ksm} without KSM and {abs(more)} {'more' if more >= 0 else 'fewer'} with it."
        ]
        if fits.mean is None:
            found.append(
                f"One sample gives bounds only: between {fits.low} (nothing shared between VMs but zero pages) and "
                f"{fits.high} (VMs that are all alike)."
            )
        else:
            found.append(
                f"On average {fits.mean} would fit, with {sure} confidence {fits.confident}; after {policy.broken:.0%} "
                f"of the merged pages broke at once {fits.broken} still do, after run=2 {fits.unmerged}."
            )
        found.append(
            f"From a cold start 99 % of the saving is there after {clock(each.settle.cold[99])} with pages_to_scan "
            f"{each.settle.pages_to_scan:,} ({clock(each.default.cold[99])} with the default of "
            f"{each.default.pages_to_scan:,}); ksmd takes {each.settle.cpu_cold:.1%} of a CPU until then and "
            f"{each.settle.cpu_steady:.1%} afterwards."
        )
        if each.risk is not None:
            found.append(_at_risk(each.risk))
        if each.check is not None:
            closed, simulated = each.check.seconds_99
            found.append(
                f"A simulation of {each.check.vms} VMs, with {each.check.contents}, has 99 % after "
                f"{clock(simulated)}; the closed form says {clock(closed)} of it."
            )
        return found


def _at_risk(risk: Risk) -> str:
    def end(survives: bool, need: float, swap: float) -> str:
        what = f"takes {binary(need)} of {binary(risk.limit)}"
        return what + (f", {binary(swap)} of it swap" if survives and swap else "") + ("" if survives else ": too much")

    worst = end(risk.survives_worst, risk.need_worst, risk.swap_worst)
    ever = end(risk.survives_ever, risk.need_ever, risk.swap_ever)
    return (
        f"In the worst minute recorded {risk.worst:.1%} of a VM's merged pages are written ({risk.median:.2%} in the "
        f"median minute): everywhere at once that {worst}; all that was ever written, {risk.ever:.1%}, {ever}."
    )

"""Simulated time over sources or a trace: KSM's counters as they grow, and when the saving is there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ksm.constants import MADV_MERGEABLE
from ksm.cost import CostModel
from ksm.errors import UnsupportedError
from ksm.estimate import Estimate, Source, Zeros, estimate, snapshots
from ksm.machine import Machine, Process
from ksm.sources import Snapshot
from ksm.trace import Replay, Trace

SHARES = (50, 90, 99)  # percent of the settled saving
_FINER = 10  # looks for those between two samples
_MOST_SAMPLES = 1_000_000

Tunables = Mapping[str, "int | bool | str"]
Show = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class Sample:
    """The counters at one moment; of a sampled trace those of the whole, extrapolated.

    >>> Sample.of(Machine()).pages_sharing
    0
    """

    seconds: float
    full_scans: int
    pages_scanned: int | None
    pages_skipped: int | None
    pages_shared: int
    pages_sharing: int
    pages_unshared: int
    pages_volatile: int
    ksm_zero_pages: int | None
    general_profit: int
    saved_bytes: int
    ksmd_cpu_seconds: float
    cow_ksm: int | None
    """Writes that copied a KSM frame, so far."""
    settled_bytes: int
    """What KSM would save were memory to stand still as it is at this moment."""

    @classmethod
    def of(cls, machine: Machine, scale: int = 1, settled_pages: int = 0) -> Sample:
        """What a machine shows now, times `scale`.

        >>> Sample.of(Machine(), settled_pages=1).settled_bytes
        4096
        """
        now = machine.ksm.snapshot()

        def scaled(count: int | None) -> int | None:
            return None if count is None else count * scale

        return cls(
            machine.now,
            now.full_scans,
            scaled(now.pages_scanned),
            scaled(now.pages_skipped),
            now.pages_shared * scale,
            now.pages_sharing * scale,
            now.pages_unshared * scale,
            now.pages_volatile * scale,
            scaled(now.ksm_zero_pages),
            now.profit * scale,
            now.saved_bytes * scale,
            round(machine.ksmd.cpu_seconds, 6),
            scaled(machine.vmstat.get("cow_ksm")),
            settled_pages * scale * machine.page_size,
        )


@dataclass(frozen=True, slots=True)
class Simulation:
    """What came out: the counters over time, and when which share of the settled saving was there.

    >>> simulate([b"x" * 8192], seconds=1, every=0.5).samples[-1].pages_sharing
    1
    """

    settled: Estimate
    """Of memory as it was at the end; of a sampled trace, of the sample."""
    samples: tuple[Sample, ...]
    reached: dict[int, float | None]
    """Percent -> seconds (None: not by the end). Of a trace, of what memory would have settled at that moment."""
    tunables: dict[str, int | bool | str]
    sample_of: int = 1
    """One content in so many took part: what was counted is multiplied by it."""
    settled_error_bytes: float = 0.0
    """One standard error of the settled saving, from sampling alone."""
    cost: CostModel = field(default_factory=CostModel)
    """What ksmd's CPU time was charged by."""

    @property
    def cpu_share(self) -> float:
        """ksmd's share of one CPU over the whole time, by the cost model.

        >>> simulate([b"x" * 8192], seconds=1, every=0.5).cpu_share < 0.01
        True
        """
        last = self.samples[-1]
        return last.ksmd_cpu_seconds / last.seconds if last.seconds else 0.0

    @property
    def mean_saved_bytes(self) -> float:
        """The saving on average over the time, between samples on a straight line.

        >>> simulate([b"x" * 8192], seconds=100, every=1).mean_saved_bytes > 4000
        True
        """
        area = sum(
            (now.seconds - before.seconds) * (now.saved_bytes + before.saved_bytes) / 2
            for before, now in zip(self.samples[:-1], self.samples[1:], strict=True)
        )
        return area / self.samples[-1].seconds if self.samples[-1].seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON.

        >>> sorted(simulate([b"x" * 8192], seconds=1, every=0.5).to_dict())[1]
        'ksmd_cpu_share'
        """
        return {
            "settled": self.settled.to_dict(),
            "settled_error_bytes": self.settled_error_bytes,
            "reached_seconds": {str(share): when for share, when in self.reached.items()},
            "ksmd_cpu_share": self.cpu_share,
            "mean_saved_bytes": self.mean_saved_bytes,
            "sample_of": self.sample_of,
            "tunables": self.tunables,
            "cost_model": self.cost.to_dict(),
            "samples": [asdict(sample) for sample in self.samples],
        }


def simulate(
    sources: Sequence[Source] | Trace,
    *,
    seconds: float,
    every: float,
    tunables: Tunables | None = None,
    kernel: str = "6.18",
    zeros: Zeros = "merge",
    nodes: Sequence[int] | None = None,
    marked_only: bool = False,
    page_size: int | None = None,
    threads: int | None = None,
    cost: CostModel | None = None,
    reading: Show | None = None,
    progress: Show | None = None,
) -> Simulation:
    """Put sources into processes of a machine, or replay a trace, and let simulated time pass.

    Args:
        sources: what `ksm.estimate` takes, one process each, whose pages stand still; or a `Trace`, whose change.
        seconds: simulated time.
        every: seconds between two samples; for the shares it is looked ten times as often.
        tunables: attribute -> value, written before ksmd starts; others have the kernel's defaults.
        kernel: whose rules and defaults.
        zeros: as for `ksm.estimate`; so `nodes`, `marked_only`, `page_size` and `threads`, for sources only.
        cost: what ksmd's CPU time is charged by; None: the built-in model, so that answers are the same everywhere.
        reading: called with (pages read, pages in all).
        progress: called with (samples done, samples in all).

    Raises:
        ValueError: options out of range, or that a trace cannot have.
        OSError: a tunable that the kernel would refuse.
        SourceError: a source that cannot be read.

    >>> found = simulate([b"x" * 8192], seconds=1, every=0.5, tunables={"pages_to_scan": 50})
    >>> found.reached[90]
    0.05
    """
    if not 0 < every <= seconds * 1e9 or seconds / every > _MOST_SAMPLES:
        raise ValueError(f"{seconds / every:,.0f} samples are too many; every can be {seconds / _MOST_SAMPLES:g} s")
    cost = cost or CostModel()
    subject: _Subject
    if isinstance(sources, Trace):
        if nodes is not None or marked_only:
            raise ValueError("nodes and marked_only are for sources; a trace has what was recorded")
        subject = _Moving(sources, kernel, zeros, tunables or {}, cost)
    else:
        if nodes is not None and len(nodes) != len(sources):
            raise ValueError(f"{len(nodes)} nodes for {len(sources)} sources")
        subject = _Still(sources, kernel, zeros, tunables or {}, nodes, marked_only, page_size, threads, reading)
        subject.machine.ksmd.cost = cost
    subject.machine.ksm.run = 1
    samples, reached = _follow(subject, seconds, every, progress)
    settled = subject.settled()
    error = subject.error_pages() * settled.page_size
    return Simulation(settled, tuple(samples), reached, subject.tunables(), subject.scale, error, cost)


def _follow(
    subject: _Subject, seconds: float, every: float, progress: Show | None
) -> tuple[list[Sample], dict[int, float | None]]:
    machine = subject.machine
    subject.run_for(0.0)
    samples = [Sample.of(machine, subject.scale, subject.goal())]
    reached: dict[int, float | None] = dict.fromkeys(SHARES)
    steps = max(1, -(-round(seconds * 1e9) // round(every * 1e9)))
    for step in range(1, steps + 1):
        start, end = samples[-1].seconds, min(seconds, step * every)
        for part in range(1, _FINER + 1):
            subject.run_for(max(0.0, start + (end - start) * part / _FINER - machine.now))
            saved, goal = machine.ksm.snapshot().saved_pages, subject.goal()
            for share in SHARES:
                known = machine.now >= subject.begins
                if reached[share] is None and known and saved * 100 >= share * goal:
                    reached[share] = machine.now
        samples.append(Sample.of(machine, subject.scale, subject.goal()))
        if progress is not None:
            progress(step, steps)
    return samples, reached


# ---- memory that stands still, and memory that changes -----------------------------------------------


class _Subject(ABC):
    """A machine in simulated time, and what it would settle at."""

    scale = 1
    begins = 0.0
    """When all of the memory that there is at first is there."""

    def __init__(self, machine: Machine, zeros: Zeros) -> None:
        self.machine = machine
        self._zeros = zeros

    def tunables(self) -> dict[str, int | bool | str]:
        """Those of the machine."""
        return self.machine.ksm.tunables()

    def error_pages(self) -> float:
        """One standard error of the settled saving."""
        return 0.0

    @abstractmethod
    def run_for(self, seconds: float) -> None:
        """Let time pass."""

    @abstractmethod
    def settled(self) -> Estimate:
        """What memory would settle at, as it is now."""

    @abstractmethod
    def goal(self) -> int:
        """The pages that this would save, by the counters that the machine has."""

    def _estimate(self, taken: Sequence[Snapshot], nodes: Sequence[int] | None = None) -> Estimate:
        ksm = self.machine.ksm
        zero_pages = "use_zero_pages" in ksm.names() and bool(ksm.use_zero_pages)
        across = bool(ksm.merge_across_nodes)
        return estimate(taken, ksm.max_page_sharing, zero_pages, self._zeros, nodes=nodes, merge_across_nodes=across)

    def _counted(self, settled: Estimate) -> int:
        return settled.pages_sharing + (settled.ksm_zero_pages if self.machine.kernel.counts_zero_pages else 0)


class _Still(_Subject):
    """Sources, read once."""

    def __init__(
        self,
        sources: Sequence[Source],
        kernel: str,
        zeros: Zeros,
        tunables: Tunables,
        nodes: Sequence[int] | None,
        marked_only: bool,
        page_size: int | None,
        threads: int | None,
        reading: Show | None,
    ) -> None:
        put_tunables(Machine(kernel=kernel), tunables)  # what is refused is refused before anything is read
        taken = snapshots(sources, page_size, marked_only, threads, reading)
        size = taken[0].page_size if taken else page_size or 4096
        super().__init__(Machine(nodes=max(nodes or [0]) + 1, kernel=kernel, page_size=size), zeros)
        put_tunables(self.machine, tunables)
        self._settled = self._estimate(taken, nodes)
        if zeros == "absent":
            taken = [snapshot if snapshot.anonymous_known else snapshot.without_zeros() for snapshot in taken]
        load(self.machine, taken, nodes)

    def run_for(self, seconds: float) -> None:
        self.machine.run_for(seconds)

    def settled(self) -> Estimate:
        return self._settled

    def goal(self) -> int:
        return self._counted(self._settled)


class _Moving(_Subject):
    """A trace, replayed."""

    def __init__(self, trace: Trace, kernel: str, zeros: Zeros, tunables: Tunables, cost: CostModel) -> None:
        super().__init__(Machine(kernel=kernel, page_size=trace.page_size), zeros)
        self.machine.ksmd.cost = cost  # the replay of a sample scales it
        self._replay = Replay(trace, self.machine, zeros=zeros)
        self.scale = self._replay.scale
        first = trace.steps[0] if trace.steps else None
        self.begins = (
            first.seconds + (0.0 if trace.metadata.series else first.row["read_seconds"] or 0.0) if first else 0.0
        )
        self._pages_to_scan = int(tunables.get("pages_to_scan", self.machine.ksm.pages_to_scan))
        rest = {name: value for name, value in tunables.items() if name != "pages_to_scan"}
        self._replay.set_pages_to_scan(self._pages_to_scan)
        put_tunables(self.machine, rest)
        if self.scale > 1 and "advisor_mode" in rest and self.machine.ksm.advisor_mode != "none":
            raise UnsupportedError("the advisor sets pages_to_scan by itself, which a sample cannot stand for")
        self._known: tuple[int, int] | None = None

    def tunables(self) -> dict[str, int | bool | str]:
        """As they were asked for, for the whole."""
        return self.machine.ksm.tunables() | ({"pages_to_scan": self._pages_to_scan} if self.scale > 1 else {})

    def run_for(self, seconds: float) -> None:
        self._replay.run_for(seconds)

    def settled(self) -> Estimate:
        return self._estimate(self._replay.moment.snapshots() or [Snapshot("nothing", 4096, True, True, ())])

    def goal(self) -> int:
        if self._known is None or self._known[0] != self._replay.changes:
            self._known = (self._replay.changes, self._counted(self.settled()))
        return self._known[1]

    def error_pages(self) -> float:
        return self._replay.trace.sample.error(self._replay.moment.snapshots(), self.machine.ksm.max_page_sharing)


def put_tunables(machine: Machine, tunables: Tunables) -> None:
    """Write tunables; the advisor last, because nothing can be written to pages_to_scan while it is on.

    >>> machine = Machine()
    >>> put_tunables(machine, {"advisor_mode": "scan-time", "pages_to_scan": 7, "smart_scan": False})
    >>> machine.ksm.smart_scan
    False
    """
    for name in sorted(tunables, key=["advisor_mode"].count):
        value = tunables[name]
        machine.ksm.write(name, str(int(value)) if isinstance(value, bool) else str(value))


def load(machine: Machine, snapshots: Sequence[Snapshot], nodes: Sequence[int] | None = None) -> list[Process]:
    """A process for each snapshot, its pages at their addresses and all of them marked mergeable.

    >>> load(Machine(), [Snapshot("nothing", 4096, True, True, ())])[0].name
    'nothing'
    """
    processes = []
    for snapshot, node in zip(snapshots, nodes or [0] * len(snapshots), strict=True):
        process = machine.spawn(_unused(machine, snapshot.name))
        for address, prints in snapshot.blocks:
            if len(prints):
                process.mmap(prints, addr=address, node=node)
        for vma in process.vmas:
            size = machine.page_size
            process.madvise(vma.start * size, (vma.end - vma.start) * size, MADV_MERGEABLE)
        processes.append(process)
    return processes


def _unused(machine: Machine, name: str) -> str:
    """The same source may be given several times: they are as many processes."""
    taken = machine.processes
    if name not in taken:
        return name
    return next(other for n in range(2, 1 << 30) if (other := f"{name} ({n})") not in taken)

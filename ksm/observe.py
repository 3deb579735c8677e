"""One look, or two with time between, at everything that tells how KSM does: on a host, on a machine, from a file."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from ksm.census import Census, Marked, ProcessSample, marked
from ksm.errors import NoSuchProcessError, UnsupportedError
from ksm.linux import Host
from ksm.machine import Machine
from ksm.stats import ProcessStats, Stats
from ksm.sysfs import ATTRIBUTES

_RIVALS = frozenset({"ksmtuned"})  # programs that write tunables by themselves
_DEEP_LIMIT = 16  # processes whose smaps is read


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory of a host, in bytes; what cannot be told is None.

    >>> Memory(total=8 << 30).available is None
    True
    """

    total: int | None = None
    available: int | None = None
    swap_free: int | None = None
    anonymous_huge: int | None = None
    """Anonymous memory in transparent huge pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Everything at one moment.

    >>> Sample(stats=Stats(pages_sharing=1)).stats.saved_bytes
    4096
    """

    time: float = 0.0
    """Unix time; of a machine, simulated seconds."""
    clock: float = 0.0
    """Seconds on a clock that never jumps: two samples' difference is the time between them."""
    kernel: str = ""
    simulated: bool = False
    nodes: int = 1
    """NUMA nodes."""
    tunables: Mapping[str, int | bool | str] = field(default_factory=dict)
    stats: Stats = field(default_factory=Stats)
    other: Mapping[str, str] = field(default_factory=dict)
    """Files of a newer kernel that this package does not know, as text."""
    vmstat: Mapping[str, int] = field(default_factory=dict)
    ksmd_cpu_seconds: float | None = None
    """None where ksmd cannot be seen, as in a container."""
    memory: Memory = field(default_factory=Memory)
    huge_pages: str | None = None
    """transparent_hugepage/enabled: always, madvise or never."""
    processes: tuple[ProcessSample, ...] = ()
    """Those that take part."""
    processes_total: int = 0
    processes_unreadable: int = 0
    processes_shown: bool = True
    """Whether this kernel shows the processes' part (5.19 and later)."""
    rivals: tuple[str, ...] = ()
    """Programs that tune KSM by themselves and run now, such as "ksmtuned (pid 812)"."""

    @property
    def running(self) -> bool:
        """Whether `run` is 1.

        >>> Sample(tunables={"run": 2}).running
        False
        """
        return self.tunables.get("run") == 1

    @property
    def advisor(self) -> bool:
        """Whether the scan-time advisor sets `pages_to_scan`.

        >>> Sample(tunables={"advisor_mode": "scan-time"}).advisor
        True
        """
        return self.tunables.get("advisor_mode", "none") != "none"

    @property
    def lone_pages(self) -> int:
        """Pages that are compared in vain: `pages_unshared`, and with smart scan `pages_volatile` too.

        A page that smart scan skips leaves the unstable tree, and counts as volatile until it is visited again: with
        smart scan the two counters cannot be told apart.

        >>> Sample(stats=Stats(pages_unshared=1, pages_volatile=2, pages_skipped=9)).lone_pages
        1
        """
        stats = self.stats
        return stats.pages_unshared + (stats.pages_volatile if self.skips else 0)

    @property
    def skips(self) -> bool:
        """Whether smart scan is on and has skipped pages.

        >>> Sample(tunables={"smart_scan": True}, stats=Stats(pages_skipped=9)).skips
        True
        """
        return bool(self.tunables.get("smart_scan")) and bool(self.stats.pages_skipped)

    def number(self, name: str) -> int:
        """A tunable as an int; 0 where this kernel does not have it.

        >>> Sample(tunables={"run": 2}).number("run"), Sample().number("smart_scan")
        (2, 0)
        """
        value = self.tunables.get(name, 0)
        return 0 if isinstance(value, str) else int(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A sample, and what changed in the `seconds` before it.

    >>> two = Observation.between(Sample(stats=Stats()), Sample(clock=2.0, stats=Stats(pages_sharing=10)))
    >>> two.changes["pages_sharing"], two.rate("pages_sharing")
    (10, 5.0)
    """

    sample: Sample
    seconds: float = 0.0
    """0 for a single look: nothing is known of changes then."""
    changes: Mapping[str, int | float] = field(default_factory=dict)
    """By counter, those of vmstat and `ksmd_cpu_seconds` too; a counter that was reset meanwhile is left out."""

    @classmethod
    def between(cls, before: Sample, after: Sample) -> Observation:
        """From two samples of one host.

        >>> Observation.between(Sample(), Sample()).seconds
        0.0
        """
        seconds = after.clock - before.clock
        if seconds <= 0:
            return cls(sample=after)
        first, last = _counters(before), _counters(after)
        changes = {name: last[name] - first[name] for name in last if name in first}
        gone_back = {name for name in _MONOTONIC if changes.get(name, 0) < 0}  # run=2 starts full_scans anew
        return cls(
            sample=after,
            seconds=seconds,
            changes={name: value for name, value in changes.items() if name not in gone_back},
        )

    def rate(self, name: str) -> float | None:
        """A change per second; None where it is not known.

        >>> Observation(sample=Sample()).rate("cow_ksm") is None
        True
        """
        if not self.seconds or name not in self.changes:
            return None
        return self.changes[name] / self.seconds

    @property
    def visits_per_second(self) -> float | None:
        """Pages that ksmd visits a second; before Linux 6.6, at most: `pages_to_scan` after each sleep.

        >>> Observation(sample=Sample(tunables={"run": 1, "pages_to_scan": 100, "sleep_millisecs": 20}),
        ...             seconds=1.0).visits_per_second
        5000.0
        """
        if self.sample.stats.pages_scanned is not None:
            return self.rate("pages_scanned")
        sleep = self.sample.number("sleep_millisecs")
        if not self.sample.running or not sleep:
            return None if self.sample.running else 0.0
        return self.sample.number("pages_to_scan") * 1000 / sleep

    @property
    def ksmd_share(self) -> float | None:
        """ksmd's share of one CPU.

        >>> Observation(sample=Sample(), seconds=2.0, changes={"ksmd_cpu_seconds": 0.5}).ksmd_share
        0.25
        """
        return self.rate("ksmd_cpu_seconds")

    @property
    def losers(self) -> tuple[ProcessSample, ...]:
        """The processes that cost more than they save, the worst first.

        >>> Observation(sample=Sample()).losers
        ()
        """
        found = [process for process in self.sample.processes if process.stats.profit < 0]
        return tuple(sorted(found, key=lambda process: process.stats.profit))


_MONOTONIC = (
    "full_scans",
    "pages_scanned",
    "pages_skipped",
    "cow_ksm",
    "ksm_swpin_copy",
    "thp_split_page",
    "ksmd_cpu_seconds",
)


def _counters(sample: Sample) -> dict[str, int | float]:
    """Everything that changes, by name."""
    values: dict[str, int | float] = {}
    for f in fields(Stats):
        value = getattr(sample.stats, f.name)
        if f.name != "page_size" and value is not None:
            values[f.name] = value
    values.update(sample.vmstat)
    if sample.ksmd_cpu_seconds is not None:
        values["ksmd_cpu_seconds"] = sample.ksmd_cpu_seconds
    return values


class Observer:
    """Looks at a host or a machine, again and again.

    Args:
        system: a `Host` or a `Machine`.
        processes: whether to look at the processes too.
        deep: whether to look into what marked memory is that KSM does not track, and for programs that tune KSM:
            dearer, for a look or two.
        budget: processes read a look, after the first (see `Census`).

    >>> Observer(Machine()).look().simulated
    True
    """

    def __init__(self, system: Host | Machine, processes: bool = True, deep: bool = False, budget: int = 1000) -> None:
        self.system = system
        self.processes = processes
        self.deep = deep
        self.census = Census(system, budget) if isinstance(system, Host) and processes else None
        self._ksmd_seen = True

    def look(self) -> Sample:
        """Everything now.

        Raises:
            UnsupportedError: no KSM here.
            OSError: a file cannot be read.

        >>> Observer(Machine(kernel="6.1")).look().kernel
        '6.1'
        """
        if isinstance(self.system, Machine):
            return self._machine(self.system)
        return self._host(self.system)

    def _machine(self, machine: Machine) -> Sample:
        processes = [
            ProcessSample(pid=p.pid, name=p.name, stats=ProcessStats.of(p.ksm_stat, machine.page_size))
            for p in machine.processes.values()
        ]
        taken = machine.frames * machine.page_size
        free = None if machine.ram is None else max(0, machine.ram - taken)
        return Sample(
            time=machine.now,
            clock=machine.now,
            kernel=machine.kernel.version,
            simulated=True,
            nodes=machine.nodes,
            tunables=machine.ksm.tunables(),
            stats=machine.ksm.snapshot(),
            vmstat=machine.vmstat,
            ksmd_cpu_seconds=machine.ksmd.cpu_seconds,
            memory=Memory(
                total=machine.ram,
                available=free,
                swap_free=machine.swap - machine._engine.swapped_pages * machine.page_size,
            ),
            huge_pages=machine.transparent_hugepage,
            processes=tuple(p for p in processes if p.takes_part) if self.processes else (),
            processes_total=len(processes),
        )

    def _host(self, host: Host) -> Sample:
        ksm = host.ksm
        census = self.census
        found = [] if census is None else census.poll()
        sample = Sample(
            time=time.time(),
            clock=time.monotonic(),
            kernel=_kernel(host),
            nodes=_nodes(host),
            tunables=ksm.tunables(),
            stats=ksm.snapshot(),
            other={name: ksm.read(name).strip() for name in ksm.names() if name not in ATTRIBUTES},
            vmstat=_vmstat(host),
            ksmd_cpu_seconds=self._ksmd_cpu(host),
            memory=_memory(host),
            huge_pages=_huge_pages(host),
            processes=tuple(found),
            processes_total=census.total if census else 0,
            processes_unreadable=census.unreadable if census else 0,
            processes_shown=census.shown if census else True,
        )
        if not self.deep:
            return sample
        return replace(sample, processes=_with_marks(host, sample.processes), rivals=_rivals(host))

    def _ksmd_cpu(self, host: Host) -> float | None:
        if self._ksmd_seen:
            with contextlib.suppress(UnsupportedError, OSError):
                return host.ksmd_cpu_seconds()
            self._ksmd_seen = False  # looking for it means reading all of /proc
        return None


def observe(system: Host | Machine, seconds: float = 2.0, deep: bool = False) -> Observation:
    """Look, wait, look again; of a machine, `seconds` are simulated. With 0 seconds, one look.

    Raises:
        UnsupportedError: no KSM here.
        OSError: a file cannot be read.

    >>> observe(Machine(), seconds=5.0).seconds
    5.0
    """
    if seconds < 0:
        raise ValueError(f"cannot look for {seconds} seconds")
    observer = Observer(system, deep=deep)
    if not seconds:
        return Observation(sample=observer.look())
    before = Observer(system, processes=False).look()
    if isinstance(system, Machine):
        system.run_for(seconds)
    else:
        time.sleep(seconds)
    return Observation.between(before, observer.look())


# ---- what else a host tells ---------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    """A file that may not be there."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def _kernel(host: Host) -> str:
    return _text(host.proc / "sys/kernel/osrelease").strip() or os.uname().release


_VMSTAT = ("cow_ksm", "ksm_swpin_copy", "thp_split_page")


def _vmstat(host: Host) -> dict[str, int]:
    """KSM's lines, and how many huge pages were split: the zero pages that this gives back (6.12) nothing counts."""
    found = {}
    for line in _text(host.proc / "vmstat").splitlines():
        name, _, value = line.partition(" ")
        if name in _VMSTAT and value.isdecimal():
            found[name] = int(value)
    return found


def _memory(host: Host) -> Memory:
    values: dict[str, int] = {}
    for line in _text(host.proc / "meminfo").splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith(" kB"):
            values[name] = int(rest[:-3]) * 1024
    return Memory(
        total=values.get("MemTotal"),
        available=values.get("MemAvailable"),
        swap_free=values.get("SwapFree"),
        anonymous_huge=values.get("AnonHugePages"),
    )


def _nodes(host: Host) -> int:
    """How many NUMA nodes are online: the file holds ranges such as 0-1,3."""
    count = 0
    for part in _text(host.root.parents[2] / "devices/system/node/online").strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            count += int(last or first) - int(first) + 1
    return max(1, count)


def _huge_pages(host: Host) -> str | None:
    text = _text(host.root.parent / "transparent_hugepage/enabled")
    return text.partition("[")[2].partition("]")[0] or None


def _rivals(host: Host) -> tuple[str, ...]:
    found = []
    for entry in sorted(host.proc.glob("[0-9]*/comm")):
        name = _text(entry).strip()
        if name in _RIVALS:
            found.append(f"{name} (pid {entry.parent.name})")
    return tuple(found)


def _with_marks(host: Host, processes: tuple[ProcessSample, ...]) -> tuple[ProcessSample, ...]:
    """What is marked, of the processes of which KSM tracks nothing."""
    left = _DEEP_LIMIT
    found = []
    for process in processes:
        if left and not process.stats.ksm_rmap_items:
            left -= 1
            with contextlib.suppress(NoSuchProcessError, PermissionError):
                process = replace(process, marked=marked(host, process.pid))
        found.append(process)
    return tuple(found)


__all__ = ["Marked", "Memory", "Observation", "Observer", "ProcessSample", "Sample", "observe"]

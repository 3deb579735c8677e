"""Fits the cost model to the running kernel: ksmd's CPU time over memory of known content, beside what it had to do."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ksm.constants import MADV_MERGEABLE, MADV_UNMERGEABLE
from ksm.cost import COSTS, CostModel, Work
from ksm.errors import DisagreementError, UnsupportedError
from ksm.linux import Host, madvise
from ksm.machine import Machine
from ksm.pages import Fingerprints, fingerprint
from ksm.patterns import Pages, filled
from ksm.sysfs import Sysfs

# Both sides' tunables: the kernel's defaults, but chains are not pruned, because when hangs on the wall clock.
TUNABLES: Mapping[str, int] = MappingProxyType(
    {
        "max_page_sharing": 256,
        "use_zero_pages": 0,
        "merge_across_nodes": 1,
        "smart_scan": 1,
        "stable_node_chains_prune_millisecs": 100_000_000,
    }
)
COUNTERS = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "stable_node_chains")
PASSES = 5  # hash, merge, twice as before, and with smart scan one that skips
TOLERANCE = 0.20
_LOCK_SECONDS = 900.0
_PATIENCE = 60.0  # seconds, with those who use KSM for a while although they do not hold the lock

# (kind, share of the memory): what is fitted, and what the fit does not see.
FITTED = tuple((kind, share) for share in (1 / 8, 1 / 4, 1 / 2, 1) for kind in ("unique", "copies", "few"))
UNSEEN = (("guest", 3 / 16), ("pairs", 3 / 16), ("zeros", 3 / 8), ("guest", 3 / 4), ("pairs", 3 / 4))

Counts = dict[str, int]


@dataclass(frozen=True, slots=True)
class Passes:
    """ksmd's CPU seconds of each pass, and the counters after it."""

    seconds: tuple[float, ...]
    counters: tuple[Counts, ...]


@dataclass(frozen=True, slots=True)
class Observation:
    """A pass of the kernel's ksmd: what it had to do, and how long it took.

    >>> Observation("unique", 1, 1, Work(hashed=1), 1e-6).predicted(CostModel(hash_ns=900)) * 1e9
    900.0
    """

    kind: str
    pages: int
    number: int
    """Of the pass, from 1 on."""
    work: Work
    seconds: float
    """CPU time, of the least disturbed round."""
    page_size: int = 4096

    def predicted(self, cost: CostModel) -> float:
        """The CPU seconds that a model gives it.

        >>> Observation("unique", 1, 1, Work(merges=2), 1.0).predicted(CostModel(merge_ns=5e8))
        1.0
        """
        return cost.of(self.work, self.page_size) / 1e9

    def to_dict(self, cost: CostModel) -> dict[str, Any]:
        """All of it and what a model says, for JSON.

        >>> Observation("unique", 1, 1, Work(), 1.0).to_dict(CostModel())["predicted_seconds"]
        0.0
        """
        return {
            "kind": self.kind,
            "pages": self.pages,
            "pass": self.number,
            "seconds": self.seconds,
            "predicted_seconds": self.predicted(cost),
            "work": self.work.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Total:
    """All passes over one memory: CPU seconds, measured and by a model.

    >>> Total("guest", 100, 5, 2.0, 2.2).error
    0.1
    """

    kind: str
    pages: int
    passes: int
    seconds: float
    predicted_seconds: float
    page_size: int = 4096

    @property
    def error(self) -> float:
        """How far the model is off, as a share of what was measured; above 0 it says too much.

        >>> Total("guest", 100, 5, 2.0, 1.0).error
        -0.5
        """
        return round(self.predicted_seconds / self.seconds - 1, 6) if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON.

        >>> Total("guest", 100, 5, 2.0, 1.0).to_dict()["error"]
        -0.5
        """
        return {name: getattr(self, name) for name in (*self.__slots__, "error")}


# ---- the kernel ----------------------------------------------------------------------------------------------


def require_alone(host: Host, patience: float = 0.0) -> None:
    """See that this host's ksmd can be stepped and timed, and that nobody else has memory in KSM.

    Those who have are waited for, `patience` seconds.

    Raises:
        OSError: EACCES without root.
        UnsupportedError: no KSM, ksmd out of sight, or KSM is in use.

    >>> require_alone(Host(root="/nonexistent"))
    Traceback (most recent call last):
    ksm.errors.UnsupportedError: ...
    """
    ksm = host.ksm
    host.ksmd_cpu_seconds()
    deadline = time.monotonic() + patience
    with host.lock(_LOCK_SECONDS):
        ksm.write("run", ksm.read("run"))
        while others := [f"{process.name} ({process.pid})" for process in host.processes(skip_unreadable=True)]:
            if time.monotonic() >= deadline:
                break
            time.sleep(0.5)
    if others:
        raise UnsupportedError(f"KSM is in use here, by {', '.join(others[:5])}: ksmd's time would be theirs too")


def kernel_passes(host: Host, pages: Pages, passes: int = PASSES, patience: float = 0.0) -> Passes:
    """Let ksmd make passes over memory of this process, then put everything back and unmerge.

    The memory must be private and in small pages, as `ksm.patterns.filled` makes it. Holds the host's lock meanwhile.

    Raises:
        OSError: EACCES without root.
        UnsupportedError: as `require_alone`.

    >>> kernel_passes(Host(), filled("pairs", 1024)).counters[-1]["pages_sharing"]  # doctest: +SKIP
    512
    """
    with host.lock(_LOCK_SECONDS):
        require_alone(host, patience)
        with host.single_step(unmerge=True) as ksmd:
            host.ksm.write("run", "2")
            host.ksm.write("run", "0")
            set_tunables(host.ksm)
            madvise(pages, MADV_MERGEABLE)
            try:
                seconds, after = [], []
                for _ in range(passes):
                    before = host.ksmd_cpu_seconds()
                    ksmd.scan()
                    seconds.append(host.ksmd_cpu_seconds() - before)
                    after.append(counters(host.ksm))
            finally:
                madvise(pages, MADV_UNMERGEABLE)
    return Passes(tuple(seconds), tuple(after))


def set_tunables(ksm: Sysfs) -> None:
    """Give a kernel or a machine the tunables of a calibration, as far as it has them.

    >>> machine = Machine()
    >>> set_tunables(machine.ksm)
    >>> machine.ksm.stable_node_chains_prune_millisecs
    100000000
    """
    names = ksm.names()
    for name, value in TUNABLES.items():
        if name in names:
            ksm.write(name, str(value))


def counters(ksm: Sysfs) -> Counts:
    """The counters in which a kernel and a machine must agree.

    >>> counters(Machine().ksm)["pages_shared"]
    0
    """
    return {name: int(ksm.read(name)) for name in COUNTERS}


# ---- ours ------------------------------------------------------------------------------------------------------


def machine_of(
    pages: Pages | Fingerprints, kernel: str = "6.18", index: str = "hash", page_size: int = 4096
) -> Machine:
    """A simulated machine with one process that has these pages, all mergeable, with those tunables; ready to scan.

    >>> machine_of(filled("pairs", 10)).ksmd.scan()
    10
    """
    machine = Machine(kernel=kernel, page_size=page_size, index=index)
    set_tunables(machine.ksm)
    process = machine.spawn()
    process.madvise(process.mmap(pages), len(pages) * page_size, MADV_MERGEABLE)
    machine.ksm.run = 1
    return machine


def observe(host: Host, kind: str, n: int) -> list[Observation]:
    """Passes of the kernel's ksmd over n pages of a kind, with their work.

    Raises:
        DisagreementError: the kernel's counters are not those that the simulation of the same pages gives.
        OSError, UnsupportedError: as `kernel_passes`.

    >>> len(observe(Host(), "unique", 1024))  # doctest: +SKIP
    5
    """
    pages = filled(kind, n, page_size=host.page_size)
    machine = machine_of(fingerprint(pages), host.kernel.version, page_size=host.page_size)
    kernel = kernel_passes(host, pages, patience=_PATIENCE)
    found = []
    before = machine.ksmd.work
    for number, (seconds, theirs) in enumerate(zip(kernel.seconds, kernel.counters, strict=True), 1):
        machine.ksmd.scan()
        ours, work = counters(machine.ksm), machine.ksmd.work
        if theirs != ours:
            raise DisagreementError(
                f"pass {number} over {n:,} {kind} pages: the kernel says {theirs}, ksm {ours}; "
                "unless another program used KSM meanwhile, this is a bug"
            )
        found.append(Observation(kind, n, number, work - before, seconds, host.page_size))
        before = work
    return found


def observe_all(
    host: Host,
    memories: Sequence[tuple[str, float]],
    memory: int,
    rounds: int = 3,
    progress: Callable[[int, int], object] | None = None,
) -> list[Observation]:
    """`observe` each of (kind, share of `memory` bytes) once a round; the least time of each pass counts.

    The rounds go over all memories, so that what disturbs the host for a while meets one round of each at most.

    >>> len(observe_all(Host(), [("unique", 0.5)], 1 << 24, 1))  # doctest: +SKIP
    5
    """
    least: dict[tuple[str, int, int], Observation] = {}
    for done in range(rounds * len(memories)):
        kind, share = memories[done % len(memories)]
        for one in _observe_twice(host, kind, max(1, int(memory * share) // host.page_size)):
            key = (one.kind, one.pages, one.number)
            least[key] = min(one, least.get(key, one), key=lambda each: each.seconds)
        if progress is not None:
            progress(done + 1, rounds * len(memories))
    return list(least.values())


def _observe_twice(host: Host, kind: str, n: int) -> list[Observation]:
    """`observe`, again if the counters differ: others may have used KSM in between, and a bug stays."""
    try:
        return observe(host, kind, n)
    except DisagreementError:
        return observe(host, kind, n)


# ---- the fit ---------------------------------------------------------------------------------------------------


def fit(observations: Sequence[Observation], start: CostModel | None = None) -> CostModel:
    """The model whose relative errors over these passes have the least squares; no cost is below 0.

    A cost that no pass tells anything about stays what it is in `start`.

    Raises:
        ValueError: there are no observations.

    >>> passes = [Observation("made up", 9, n, Work(hashed=9, merges=n), 9e-6 + n * 5e-6) for n in (1, 2, 3)]
    >>> found = fit(passes)
    >>> round(found.hash_ns), round(found.merge_ns)
    (1000, 5000)
    """
    start = start or CostModel()
    used = [one for one in observations if one.seconds > 0]
    if not used:
        raise ValueError("there are no passes to fit a cost model to")
    columns = np.array([_columns(one) for one in used])
    told = [index for index in range(len(COSTS)) if columns[:, index].any()]
    measured = np.array([one.seconds * 1e9 for one in used])
    while True:
        relative = columns[:, told] / measured[:, None]
        found = np.linalg.lstsq(relative, np.ones(len(used)), rcond=None)[0]
        if not told or found.min() >= 0:
            break
        del told[int(found.argmin())]
    values: dict[str, Any] = {name: 0.0 for name, told_of in zip(COSTS, columns.T, strict=True) if told_of.any()}
    values |= {COSTS[index]: float(value) for index, value in zip(told, found, strict=True)}
    return replace(start, **values)


def _columns(one: Observation) -> list[float]:
    """What a pass tells about each cost, in the order of `COSTS`."""
    none: dict[str, Any] = dict.fromkeys(COSTS, 0.0)
    return [replace(CostModel(), **none | {name: 1.0}).of(one.work, one.page_size) for name in COSTS]


def totals(observations: Iterable[Observation], cost: CostModel) -> list[Total]:
    """CPU seconds by memory, measured and predicted, in the order of the observations.

    >>> totals([Observation("guest", 9, n, Work(hashed=9), 9e-6) for n in (1, 2)], CostModel(hash_ns=1000))[0].error
    0.0
    """
    found: dict[tuple[str, int], list[Observation]] = {}
    for one in observations:
        found.setdefault((one.kind, one.pages), []).append(one)
    return [
        Total(
            *key,
            len(some),
            sum(one.seconds for one in some),
            sum(one.predicted(cost) for one in some),
            some[0].page_size,
        )
        for key, some in found.items()
    ]


# ---- the host's own figures ------------------------------------------------------------------------------------


def describe(cost: CostModel, now: Callable[[], float] = time.time) -> CostModel:
    """The same model with this host's timer ticks, and where and when it was measured as its origin.

    >>> describe(CostModel(), lambda: 0.0).origin[:25]
    'ksm calibrate, 1970-01-01'
    """
    day = time.strftime("%Y-%m-%d", time.gmtime(now()))
    origin = f"ksm calibrate, {day}, {platform.system()} {platform.release()}, {processor()}"
    return replace(cost, hz=_ticks() or cost.hz, origin=origin)


def processor() -> str:
    """The model of this machine's processor, by its own name.

    >>> bool(processor())
    True
    """
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _ticks() -> int | None:
    """CONFIG_HZ, where the kernel's configuration can be read."""
    import gzip

    for path, opened in ((Path("/proc/config.gz"), gzip.open), (Path(f"/boot/config-{os.uname().release}"), open)):
        try:
            with opened(path, "rt") as file:
                match = re.search(r"^CONFIG_HZ=(\d+)$", file.read(), re.M)
        except OSError:
            continue
        if match:
            return int(match[1])
    return None

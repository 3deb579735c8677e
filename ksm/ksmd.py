"""ksmd: passes and batches, virtual time, and the scan-time advisor."""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from ksm._core import Engine, FramesExhausted
from ksm.constants import RMAP_ITEM_BYTES
from ksm.cost import CostModel as CostModel  # others look for it here, too
from ksm.cost import Work
from ksm.errors import OutOfMemoryError, kernel_error
from ksm.sysfs import Profile

Marked = Mapping[int, Sequence[tuple[int, int, int]]]
"""The mergeable ranges of each address space: first page, pages, NUMA node."""

_NS = 1_000_000_000
_UNLIMITED = 1 << 62  # a batch this long ends with its pass
_END_OF_TIME = 1 << 62  # virtual ns: 146 years
_SLICE = 1 << 18  # visits between two looks for Ctrl-C

# The outcomes of Engine.scan_batch and run_until.
_PASS_ENDED = 1
_IDLE = 2
_TIME_IS_UP = 3


class Ksmd:
    """The daemon of one `Machine`: single passes and batches by hand, or on the virtual clock.

    Scanning by hand (`scan`, `scan_pages`) takes no simulated time; `run_for` does. It counts the CPU time that
    the cost model gives either way.

    >>> from ksm import Machine
    >>> m = Machine()
    >>> m.ksmd.scan()
    0
    """

    def __init__(self, engine: Engine, lock: threading.RLock, kernel: Profile, marked: Callable[[], Marked]) -> None:
        self._engine = engine
        self._marked = marked
        self._lock = lock
        self._kernel = kernel
        self._values = {a.name: a.default for a in kernel.attributes.values() if a.writable}
        self.cost = CostModel()
        self._parked = True
        self._advisor = ScanTimeAdvisor()
        for name in _ENGINE_TUNABLES:
            if name in self._values:
                self._apply(name)
        engine.smart_scan = bool(self._values.get("smart_scan", 0))

    # ---- by hand -------------------------------------------------------------------------------

    def scan(self) -> int:
        """One pass, or the rest of the one under way; the number of visits. Nothing unless run is 1.

        >>> from ksm import Machine
        >>> m = Machine()
        >>> m.ksm.run = 1
        >>> m.ksmd.scan()
        0
        """
        return self.scan_pages(_UNLIMITED)

    def scan_pages(self, k: int) -> int:
        """One batch of at most k visits; it ends at the end of a pass. The number of visits.

        >>> from ksm import Machine
        >>> Machine().ksmd.scan_pages(100)
        0
        """
        if k < 0:
            raise ValueError(f"cannot visit {k} pages")
        with self._lock:
            before = self._engine.pages_scanned
            if self._values["run"] != 1:
                return 0
            left = k
            while True:
                done = self._engine.scan_batch(min(left, _SLICE))
                if done == _PASS_ENDED:
                    self._advise()
                left = k - (self._engine.pages_scanned - before)
                if done in (_PASS_ENDED, _IDLE) or left <= 0:
                    return self._engine.pages_scanned - before

    def _advise(self) -> None:
        """The advisor's part at the end of a pass."""
        if self._values.get("advisor_mode"):
            engine = self._engine
            self._advisor.start(*engine.pass_start)
            self._values["pages_to_scan"] = self._advisor.stop(engine.now, engine.cpu, self._values)

    # ---- on the virtual clock --------------------------------------------------------------------

    @property
    def cost(self) -> CostModel:
        """The cost model: `CostModel()` until another is set.

        Raises:
            ValueError: a cost is not a finite number from 0 on, or `hz` not a whole number from 1 to 1,000,000,000.

        >>> from ksm import CostModel, Machine
        >>> m = Machine()
        >>> m.ksmd.cost = CostModel(hash_ns=1000)
        >>> m.ksmd.cost.hash_ns
        1000
        """
        return self._cost

    @cost.setter
    def cost(self, cost: CostModel) -> None:
        costs = cost.of_each(self._engine.page_size)
        if not all(math.isfinite(ns) and ns >= 0 for ns in costs) or cost.hz != int(cost.hz) or not 1 <= cost.hz <= _NS:
            raise ValueError(f"costs are finite numbers from 0 on, and hz a whole one from 1 on: {cost}")
        with self._lock:
            self._engine.set_costs(costs, int(cost.hz))
            self._cost = cost

    @property
    def now(self) -> float:
        """Simulated seconds.

        >>> from ksm import Machine
        >>> Machine().ksmd.now
        0.0
        """
        return self._engine.now / _NS

    @property
    def cpu_seconds(self) -> float:
        """CPU time that ksmd has taken so far, by the cost model.

        >>> from ksm import Machine
        >>> Machine().ksmd.cpu_seconds
        0.0
        """
        return self._engine.cpu / _NS

    @property
    def work(self) -> Work:
        """What it has done so far that the cost model charges for.

        >>> from ksm import Machine
        >>> Machine().ksmd.work.hashed
        0
        """
        engine = self._engine
        return Work(
            engine.hashed,
            engine.unstable_levels,
            engine.merges,
            engine.already,
            engine.stable_levels,
            engine.deep_levels,
            engine.pages_skipped,
        )

    def run_for(self, seconds: float) -> None:
        """Let simulated time pass; equal however it is cut into calls.

        A batch happens at the moment it starts; its CPU time and the sleep go by before the next one.

        >>> from ksm import Machine
        >>> m = Machine()
        >>> m.ksmd.run_for(0.5)
        >>> m.ksmd.now
        0.5
        """
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"cannot run for {seconds} seconds")
        engine = self._engine
        with self._lock:
            end = engine.now + round(seconds * _NS)
            if end >= _END_OF_TIME:
                raise ValueError(f"cannot run for {seconds} seconds: that is beyond {_END_OF_TIME // _NS} seconds")
            while True:
                if not self._runnable():
                    self._parked = True
                    break
                if self._parked:
                    self._parked = False
                    engine.wake = engine.now
                advised = bool(self._values.get("advisor_mode"))
                done = engine.run_until(end, self._values["pages_to_scan"], self._sleep_ticks(), advised)
                if done == _TIME_IS_UP:
                    break
                if done == _PASS_ENDED:
                    self._advise()
            engine.now = end

    def _runnable(self) -> bool:
        return self._values["run"] == 1 and self._engine.any_registered

    def _sleep_ticks(self) -> int:
        """A sleep of sleep_millisecs, rounded up to ticks."""
        return -(-self._values["sleep_millisecs"] * int(self.cost.hz) // 1000)

    def run_wall(self, seconds: float, speed: float = 1.0, step: float = 0.1) -> None:
        """Follow the wall clock: simulated time passes `speed` times as fast as real time does.

        >>> from ksm import Machine
        >>> m = Machine()
        >>> m.ksmd.run_wall(0.01, speed=100.0, step=0.005)
        >>> m.ksmd.now
        1.0
        """
        if speed <= 0 or step <= 0:
            raise ValueError("speed and step must be positive")
        start = time.monotonic()
        first = self._engine.now
        while True:
            gone = min(time.monotonic() - start, seconds)
            self.run_for(max(0.0, (first - self._engine.now) / _NS + gone * speed))
            if gone >= seconds:
                return
            time.sleep(min(step, seconds - gone))

    # ---- what sysfs reads and writes (the backend of ksm.sysfs.StateSysfs) -------------------------

    def get(self, name: str) -> int:
        """The value behind a file, as an int; `advisor_mode` is 0 or 1.

        >>> from ksm import Machine
        >>> Machine().ksmd.get("pages_to_scan")
        100
        """
        with self._lock:
            if name in self._values:
                return self._values[name]
            engine = self._engine
            if name == "pages_volatile":
                return max(0, engine.rmap_items - engine.pages_shared - engine.pages_sharing - engine.pages_unshared)
            if name == "general_profit":
                saved = engine.pages_sharing + engine.ksm_zero_pages
                return saved * engine.page_size - engine.rmap_items * RMAP_ITEM_BYTES
            return int(getattr(engine, name))

    def set(self, name: str, value: int) -> None:
        """Store a parsed value, with what the kernel does when it changes.

        >>> from ksm import Machine
        >>> m = Machine()
        >>> m.ksmd.set("run", 1)
        >>> m.ksmd.get("run")
        1
        """
        with self._lock:
            if name not in self._values:
                raise kernel_error(errno.EACCES, f"{name} is read-only")
            if self._values[name] == value:
                return
            if name in ("merge_across_nodes", "max_page_sharing") and (
                self._engine.pages_shared or self._engine.sweep_stable()
            ):
                raise kernel_error(errno.EBUSY, f"{name}: pages are shared; write 2 to run first")
            self._values[name] = value
            if name == "run":
                self._engine.unmerging = value == 2
                if value == 2:
                    self._unmerge_all()
            elif name == "sleep_millisecs":
                self._engine.wake = self._engine.now
            elif name == "advisor_mode":
                self._advisor = ScanTimeAdvisor()
                self._engine.pass_start = (0, 0.0)
            elif name in _ENGINE_TUNABLES:
                self._apply(name)

    def _apply(self, name: str) -> None:
        """Bring a tunable into the engine."""
        value = self._values[name]
        if name == "stable_node_chains_prune_millisecs":
            self._engine.prune_ticks = -(-value * self.cost.hz // 1000)
            self._engine.prune_interval_changed()
        else:
            setattr(self._engine, name, value)

    def _unmerge_all(self) -> None:
        try:
            self._engine.unmerge_all(self._marked())
        except FramesExhausted:
            self._values["run"] = 0
            raise OutOfMemoryError(
                errno.ENOMEM, "run=2: unmerging everything needs more frames than are left; run is 0 now"
            ) from None


_ENGINE_TUNABLES = (
    "max_page_sharing",
    "merge_across_nodes",
    "use_zero_pages",
    "smart_scan",
    "stable_node_chains_prune_millisecs",
)


class ScanTimeAdvisor:
    """The kernel's scan-time advisor: integer arithmetic on the length of a pass and ksmd's share of a CPU.

    >>> ScanTimeAdvisor().change
    0
    """

    def __init__(self) -> None:
        self.change = 0
        self._previous = 0
        self._started = 0
        self._cpu = 0.0

    def start(self, now: int, cpu: float) -> None:
        """A pass begins at `now` ns; ksmd has taken `cpu` ns so far.

        >>> ScanTimeAdvisor().start(0, 0.0)
        """
        self._started = now
        self._cpu = cpu

    def stop(self, now: int, cpu: float, values: dict[str, int]) -> int:
        """The pass ended: the new pages_to_scan.

        >>> advisor = ScanTimeAdvisor()
        >>> advisor.start(0, 0.0)
        >>> advisor.stop(100 * 10**9, 10 * 10.0**9, {
        ...     "pages_to_scan": 500, "advisor_target_scan_time": 200, "advisor_max_cpu": 70,
        ...     "advisor_max_pages_to_scan": 30000})
        500
        """
        seconds = max(1, (now - self._started) // _NS)
        share = max(1, int((cpu - self._cpu) / 1e6) * 100 // (seconds * 1000))
        pages = values["pages_to_scan"]
        factor = max(1, values["advisor_target_scan_time"] * 100 // seconds)
        change = max(1, seconds * 100 // self._previous) if self._previous else 100
        self.change = (70 * self.change + 30 * change) // 100
        self._previous = seconds
        wanted = pages * 100 // factor * self.change // 100
        cost = max(1, pages // share)
        wanted = min(wanted, cost * values["advisor_max_cpu"])
        wanted = max(wanted, cost * 10)
        return min(wanted, values["advisor_max_pages_to_scan"])

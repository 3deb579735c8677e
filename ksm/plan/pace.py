"""How soon ksmd merges, and what it takes: passes in closed form, by the cost model, and the tunables that follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ksm.cost import NEAR_LEVELS, CostModel

Floats = npt.NDArray[np.float64]

SHARES = (50, 90, 99)  # percent
_SMART_VISIT = 9  # smart scan, once it has settled, skips eight visits to an unshared page and makes the ninth
_MOST_PAGES = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """What ksmd finds on a host, VM by VM in the order of its list; arrays of equal length from no VM to all.

    Attributes:
        vms: number of VMs so far.
        pages: pages of these, mergeable.
        sharing: `pages_sharing` and `ksm_zero_pages` of these, settled.
        unshared: `pages_unshared` of these.
        zero_merged: `ksm_zero_pages` of these.
        page_size: bytes.
        nodes: NUMA nodes that are kept apart, each with its own trees.
        paired: pages of the others that had no copy before the last VM came.
    """

    vms: Floats
    pages: Floats
    sharing: Floats
    unshared: Floats
    zero_merged: Floats
    page_size: int = 4096
    nodes: int = 1
    paired: float = 0.0

    def __getitem__(self, some: slice) -> Load:
        """A part of the list."""
        arrays = (self.vms, self.pages, self.sharing, self.unshared, self.zero_merged)
        vms, pages, sharing, unshared, zero = (array[some] for array in arrays)
        return Load(vms, pages, sharing, unshared, zero, self.page_size, self.nodes, self.paired)

    @property
    def shared(self) -> Floats:
        """`pages_shared` of so many VMs."""
        return np.maximum(self.pages - self.sharing - self.unshared, 0.0)


@dataclass(frozen=True, slots=True)
class Pace:
    """ksmd's tunables, with what its work costs.

    >>> round(Pace(100, 20, True).wall(1000, 1e-6), 3)  # ten batches, a tick beyond 20 ms each
    0.24
    """

    pages_to_scan: int
    sleep_millisecs: int
    smart_scan: bool
    cost: CostModel = field(default_factory=CostModel)
    gate_first: bool = True
    """As `Profile.gate_first`: without it, what is in the stable tree merges at the first visit already."""

    def wall(self, visits: float, cpu_a_visit: float) -> float:
        """Seconds that so many visits take, sleeps included, at so many CPU seconds each."""
        batch = cpu_a_visit * self.pages_to_scan
        ticks = math.ceil(self.sleep_millisecs * self.cost.hz / 1000)
        period = batch if ticks == 0 else (math.floor(batch * self.cost.hz + 1e-9) + ticks + 1) / self.cost.hz
        return visits / self.pages_to_scan * period

    def cold(self, load: Load) -> tuple[Floats, Floats, Floats]:
        """(seconds, sharing, CPU seconds) from a cold start to the end of the second pass, which merges.

        The first pass only hashes. In the second every page is looked up in the stable tree, and if it is not there in
        the unstable one; what has a copy at a lower place in the list merges. So sharing grows along the list as it
        does with the number of VMs.
        """
        hashing = self.hashing(load)
        visits, cpu = self.merging(load)
        return self.timed(load.pages, load.sharing, visits, cpu, hashing)

    def timed(
        self, pages: Floats, sharing: Floats, visits: Floats, cpu: Floats, hashing: float
    ) -> tuple[Floats, Floats, Floats]:
        """`cold`, from the work of it: `merging`, and the CPU seconds that hashing a page takes."""
        first = self.wall(pages[-1], hashing)
        took = np.array([self.wall(n, c / n) for n, c in zip(visits, cpu, strict=True)])
        seconds = np.concatenate(([0.0], first + np.concatenate(([0.0], np.cumsum(took)))))
        busy = np.concatenate(([0.0], pages[-1] * hashing + np.concatenate(([0.0], np.cumsum(cpu)))))
        return seconds, np.concatenate(([0.0], sharing)), busy

    def merging(self, load: Load) -> tuple[Floats, Floats]:
        """(visits, CPU seconds) of the second pass after a cold start, from each point of the load to the next."""
        hashing = self.hashing(load)
        visits = np.maximum(np.diff(load.pages), 1e-9)
        found = np.diff(load.sharing)
        new_nodes = np.maximum(np.diff(load.shared), 0.0)
        zero = np.diff(load.zero_merged)
        stable, unstable = self._searches(load.shared / load.nodes, load.unshared / load.nodes)
        in_unstable = visits - (found - new_nodes)  # neither zero nor found in the stable tree
        searched = (visits - zero + new_nodes) * stable + in_unstable * unstable
        in_stable = visits - zero - in_unstable
        hashed = visits if self.gate_first else visits - in_stable
        return visits, hashed * hashing + searched + found * self.cost.merge_ns * 1e-9

    def hashing(self, load: Load) -> float:
        """CPU seconds that hashing a page takes."""
        return self.cost.nanoseconds(1, 0, 0, 0, load.page_size) * 1e-9

    def _searches(self, stable: Floats, unstable: Floats) -> tuple[Floats, Floats]:
        """CPU seconds of a search in a stable and in an unstable tree, on average while they grow from one of these
        numbers of nodes to the next."""
        cost = self.cost
        in_stable = cost.stable_level_ns * levels(stable, 0) + cost.deep_ns * levels(stable, NEAR_LEVELS)
        in_unstable = cost.level_ns * levels(unstable, 0) + cost.deep_ns * levels(unstable, NEAR_LEVELS)
        return in_stable * 1e-9, in_unstable * 1e-9

    def steady(self, load: Load) -> tuple[float, float]:
        """(seconds, CPU seconds) of a pass once all is settled, on average."""
        return self.settled(self.settled_work(load, True), self.settled_work(load, False))

    def settled(self, tried: tuple[float, float], skipped: tuple[float, float]) -> tuple[float, float]:
        """`steady`, from the work of the two kinds of pass."""
        every = _SMART_VISIT if self.smart_scan else 1
        seconds = (self._takes(*tried) + (every - 1) * self._takes(*skipped)) / every
        return seconds, (tried[1] + (every - 1) * skipped[1]) / every

    def _takes(self, visits: float, cpu: float) -> float:
        return self.wall(visits, cpu / visits) if visits > 0 else 0.0

    def settled_work(self, load: Load, tried: bool) -> tuple[float, float]:
        """(visits, CPU seconds) of a pass that tries all unshared pages, or that passes over them. After a cold start
        smart scan keeps their turns together: it tries all in one pass of nine."""
        merged = float(load.pages[-1] - load.unshared[-1] - load.zero_merged[-1])
        unshared = float(load.unshared[-1])
        shared, tree = load.shared[-1] / load.nodes, unshared / load.nodes
        stable, unstable = self._searches(np.array([shared, shared]), np.array([0.0, tree]))
        cpu = merged * self.cost.merged_ns * 1e-9
        if tried:
            cpu += unshared * (self.hashing(load) + float(stable[0] + unstable[0]))
        else:
            cpu += unshared * self.cost.skip_ns * 1e-9
        visits = merged + unshared if tried else merged
        return (visits, cpu) if visits > 0 else (0.0, 0.0)

    def _settled_pass(self, load: Load, tried: bool) -> float:
        """Seconds of such a pass."""
        return self._takes(*self.settled_work(load, tried))

    def one_more(self, load: Load, share: float) -> float:
        """Seconds from the boot of the last VM of `load` until `share` (0 to 1) of what it saves is merged.

        A new process is put behind all others as ksmd sees it: it is hashed a pass later and merged two passes later;
        with smart scan, one of these may try all unshared pages, and is taken to. What it shares with a page that had
        no partner before waits until both are tried in one pass, which with smart scan may never come: infinite.
        """
        seconds = self._settled_pass(load[:-1], True)
        waiting = seconds + (self._settled_pass(load[:-1], False) if self.smart_scan else seconds)
        gained = float(load.sharing[-1] - load.sharing[-2])
        if gained <= 0:
            return waiting
        if self.smart_scan and share > 1 - min(1.0, load.paired / gained):
            return math.inf
        seconds_of, _, _ = self.cold(load[-2:])
        own = self.wall(float(load.pages[-1] - load.pages[-2]), self.hashing(load))
        merging = float(seconds_of[-1] - seconds_of[1])
        at_once = self._known(load, gained)
        if not self.gate_first and share * gained <= at_once:
            return seconds + merging * share * gained / at_once
        return waiting + own + merging * share

    @staticmethod
    def _known(load: Load, gained: float) -> float:
        """Of the pages that the last VM gains, those whose content has a KSM frame when it boots: not zero pages, nor
        what pairs with a page of another VM, nor copies within it of contents of its own, taken to be as many to a
        frame as in the first VM."""
        new = max(0.0, float(load.shared[-1] - load.shared[-2]) - load.paired)
        merged, frames = load.sharing[1] - load.zero_merged[1], load.shared[1]
        copies = float(merged / frames) if frames > 0 else 0.0
        zero = float(load.zero_merged[-1] - load.zero_merged[-2])
        return max(0.0, gained - zero - load.paired - new * copies)


def levels(sizes: Floats, beyond: int) -> Floats:
    """Levels of a tree beyond the first so many, on average while it grows from each size to the next; (len - 1,).

    A tree of n nodes, well balanced, has as many levels as n has binary digits.

    >>> levels(np.array([4.0, 8.0, 8.0]), 0).tolist(), levels(np.array([1024.0, 1024.0]), 8).tolist()
    ([3.0, 4.0], [3.0])
    """
    sizes = np.maximum(np.asarray(sizes, np.float64), 0.0)
    grows = np.diff(sizes)
    digits = np.floor(np.log2(np.maximum(sizes, 0.5))) + 1
    deep = np.maximum(digits - beyond, 0.0)
    # of all smaller trees together: below a size of so many digits there are 2 ** k trees of k + 1 digits
    total = deep * sizes - np.where(deep > 0, 2.0**digits - 2.0**beyond, 0.0)
    found: Floats = np.where(grows > 0, np.diff(total) / np.where(grows > 0, grows, 1.0), deep[1:])
    return found


def reached(seconds: Floats, sharing: Floats, share: float) -> float:
    """When that share of the last sharing was there.

    >>> reached(np.array([0.0, 10.0, 20.0]), np.array([0.0, 0.0, 100.0]), 0.5)
    15.0
    """
    goal = share * sharing[-1]
    if goal <= 0:
        return 0.0
    after = int(np.argmax(sharing >= goal * (1 - 1e-12)))
    before = max(after - 1, 0)
    gained = sharing[after] - sharing[before]
    part = (goal - sharing[before]) / gained if gained > 0 else 1.0
    return float(seconds[before] + part * (seconds[after] - seconds[before]))


def least(holds: Callable[[int], bool], most: int = _MOST_PAGES) -> int | None:
    """The least number from 1 to `most` from which on `holds` does, None if there is none. O(log most).

    >>> least(lambda n: n * n >= 50)
    8
    """
    if not holds(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def round_up(pages: int) -> int:
    """To two digits, for people to remember.

    >>> round_up(1234), round_up(7)
    (1300, 7)
    """
    unit = 10 ** max(0, len(str(pages)) - 2)
    return int(-(-pages // unit) * unit)

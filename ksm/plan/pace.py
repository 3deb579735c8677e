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
    """

    vms: Floats
    pages: Floats
    sharing: Floats
    unshared: Floats
    zero_merged: Floats
    page_size: int = 4096

    def __getitem__(self, some: slice) -> Load:
        """A part of the list."""
        arrays = (self.vms, self.pages, self.sharing, self.unshared, self.zero_merged)
        vms, pages, sharing, unshared, zero = (array[some] for array in arrays)
        return Load(vms, pages, sharing, unshared, zero, self.page_size)

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
        steps = np.diff(load.pages)
        hashing = self._hashing(load)
        first = self.wall(load.pages[-1], hashing)
        visits = np.maximum(steps, 1e-9)
        found = np.diff(load.sharing)
        new_nodes = np.maximum(np.diff(load.shared), 0.0)
        zero = np.diff(load.zero_merged)
        stable, unstable = self._searches(
            (load.shared[1:] + load.shared[:-1]) / 2, (load.unshared[1:] + load.unshared[:-1]) / 2
        )
        in_unstable = visits - (found - new_nodes)  # neither zero nor found in the stable tree
        searched = (visits - zero + new_nodes) * stable + in_unstable * unstable
        cpu = visits * hashing + searched + found * self.cost.merge_ns * 1e-9
        took = np.array([self.wall(n, c / n) for n, c in zip(visits, cpu, strict=True)])
        seconds = np.concatenate(([0.0], first + np.concatenate(([0.0], np.cumsum(took)))))
        busy = np.concatenate(([0.0], load.pages[-1] * hashing + np.concatenate(([0.0], np.cumsum(cpu)))))
        return seconds, np.concatenate(([0.0], load.sharing)), busy

    def _hashing(self, load: Load) -> float:
        return self.cost.nanoseconds(1, 0, 0, 0, load.page_size) * 1e-9

    def _searches(self, stable: Floats, unstable: Floats) -> tuple[Floats, Floats]:
        """CPU seconds of a search in a stable and in an unstable tree of so many nodes."""
        depth, deeper = (np.log2(np.maximum(nodes, 1.0)) for nodes in (stable, unstable))
        cost = self.cost
        in_stable = depth * cost.stable_level_ns + np.maximum(depth - NEAR_LEVELS, 0.0) * cost.deep_ns
        in_unstable = deeper * cost.level_ns + np.maximum(deeper - NEAR_LEVELS, 0.0) * cost.deep_ns
        return in_stable * 1e-9, in_unstable * 1e-9

    def steady(self, load: Load) -> tuple[float, float]:
        """(seconds, CPU seconds) of a pass once all is settled."""
        merged = float(load.pages[-1] - load.unshared[-1] - load.zero_merged[-1])
        unshared = float(load.unshared[-1])
        tried = unshared / (_SMART_VISIT if self.smart_scan else 1)
        searches = self._searches(load.shared[-1:], np.array([tried]))
        cpu = tried * (self._hashing(load) + float(searches[0][0] + searches[1][0]))
        cpu += (merged * self.cost.merged_ns + (unshared - tried) * self.cost.skip_ns) * 1e-9
        visits = merged + tried
        return (self.wall(visits, cpu / visits), cpu) if visits > 0 else (0.0, 0.0)

    def one_more(self, load: Load, share: float) -> float:
        """Seconds from the boot of the last VM of `load` until `share` (0 to 1) of what it saves is merged, on average.

        A new process is put behind all others as ksmd sees it: it is hashed a pass later and merged two passes later.
        What it shares with a page that had no partner before waits for both to be tried in one pass, which smart
        scan makes rare.
        """
        between = self.steady(load[:-1])[0]
        gained = float(load.sharing[-1] - load.sharing[-2])
        if gained <= 0:
            return 2 * between
        seconds, _, _ = self.cold(load[-2:])
        own_pages = float(load.pages[-1] - load.pages[-2])
        hashing = self._hashing(load)
        own = self.wall(own_pages, hashing)
        merging = float(seconds[-1] - seconds[1])
        pairs = min(1.0, max(0.0, float(load.shared[-1] - load.shared[-2])) / gained)
        at_once = 1 - pairs
        if share <= at_once or not self.smart_scan:
            return 2 * between + own + merging * share
        late = (share - at_once) / max(pairs, 1e-9)
        return 2 * between + own + merging + late * (_SMART_VISIT - 1) * between


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

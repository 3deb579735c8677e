"""Memory against the number of VMs on one host: the curve, what fits under it, and what it is at one number."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ksm.constants import RMAP_ITEM_BYTES
from ksm.estimate import STABLE_NODE_BYTES
from ksm.plan.growth import Growth, Rules, Samples
from ksm.plan.inputs import MAX_VMS, HostSpec, Policy
from ksm.plan.result import Curve, Fits

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_EVERY = 128  # every number of VMs up to here is on the curve
_STEP = 1.05  # beyond, as far apart as this ratio


def apportion(most: int, shares: Sequence[float]) -> Ints:
    """(most + 1, classes): VMs of each class among 0, 1, .. most; each further one is of the class that lacks most.

    >>> apportion(4, [0.75, 0.25])[:, 0].tolist()
    [0, 1, 2, 2, 3]
    """
    want = np.asarray(shares)
    found = np.zeros((most + 1, len(want)), np.int64)
    for n in range(1, most + 1):
        found[n] = found[n - 1]
        found[n, int(np.argmax(want * n - found[n]))] += 1
    return found


class Needs:
    """The memory that VMs of a mix need on one host under one set of rules.

    Args:
        samples: what is known of the classes.
        ram: (classes,) bytes of a VM's memory.
        mix: (most + 1, classes), made by `apportion`.
    """

    def __init__(
        self, samples: Samples, ram: Floats, mix: Ints, host: HostSpec, policy: Policy, rules: Rules, page_size: int
    ) -> None:
        self.growth = Growth(samples, rules, mix[-1])
        self.mix = mix
        self.host = host
        self.policy = policy
        self.page = page_size
        untouched = np.maximum(ram - samples.mean(samples.table.pages) * page_size, 0.0)
        self._fixed = policy.growth * untouched + host.vm_overhead  # bytes a VM of each class, never merged
        self._ram = ram
        self.bounds_only = bool(np.any((samples.sizes < 2) & (mix[-1] > 1)))

    def curve(self, vms: Ints) -> Curve:
        """The memory of so many VMs."""
        counts = self.mix[vms]
        growth, page = self.growth, self.page
        pages, fixed = growth.pages(counts), counts @ self._fixed
        zero_merged = growth.zeros(counts) if growth.rules.use_zero_pages else np.zeros(len(vms))
        frames, unshared = growth.frames(counts)
        floor = frames if not self.bounds_only else growth.frames(counts, "low")[0]
        frames_less, pages_less = growth.replicates(counts)
        both = (1 + self.policy.confidence) / 2
        downward, upward = (side(frames_less, counts, both) for side in (growth.downward, growth.upward))
        more_saved, less_saved = (
            side(pages_less - frames_less, counts, both) for side in (growth.downward, growth.upward)
        )
        low, high = np.maximum(floor - downward, 0.0), np.minimum(frames + upward, pages)
        shared = np.maximum(frames - unshared, 0.0)
        kept = (pages - zero_merged) * RMAP_ITEM_BYTES + shared * STABLE_NODE_BYTES
        without = pages * page + fixed
        unknown = np.where(counts.max(axis=1, initial=0) > 1, np.nan, 1.0) if self.bounds_only else np.ones(len(vms))
        sharing, kept_saved = pages - frames, kept
        return Curve(
            vms=vms,
            by_class=counts,
            pages=pages,
            frames=frames * unknown,
            frames_low=low,
            frames_high=high,
            unshared=np.minimum(unshared, frames) * unknown,
            without=without,
            need=(frames * page + fixed + kept) * unknown,
            need_low=low * page + fixed + kept,
            need_high=high * page + fixed + kept,
            saved=(sharing * page - kept_saved) * unknown,
            saved_low=(sharing - less_saved) * page - kept,
            saved_high=np.minimum(pages - floor + more_saved, pages) * page - kept,
            broken=self.after(vms, self.policy.broken),
            bookkeeping=kept,
        )

    def after(self, vms: Ints, share: float) -> Floats:
        """Bytes that so many VMs need at the policy's confidence, from one side, just after a share of the merged pages
        was written: each takes a frame of its own, and the KSM frames stay as long as anything maps them."""
        return self.after_each(vms, (share,))[:, 0]

    def after_each(self, vms: Ints, shares: Sequence[float]) -> Floats:
        """The same for several shares: (len(vms), len(shares)) bytes."""
        counts = self.mix[vms]
        growth = self.growth
        frames, unshared = growth.frames(counts)
        pages = growth.pages(counts)
        left_out, pages_less = growth.replicates(counts)
        zero_merged = growth.zeros(counts) if growth.rules.use_zero_pages else 0.0
        kept = (pages - zero_merged) * RMAP_ITEM_BYTES + np.maximum(frames - unshared, 0) * STABLE_NODE_BYTES
        fixed = counts @ self._fixed + kept
        found = np.empty((len(vms), len(shares)))
        for column, share in enumerate(shares):
            less = np.minimum(left_out + share * (pages_less - unshared), pages_less) if share else left_out
            after = np.minimum(frames + share * (pages - unshared), pages)
            after = np.minimum(after + growth.upward(less, counts, self.policy.confidence), pages)
            found[:, column] = after * self.page + fixed
        return found

    def confident(self, vms: Ints) -> Floats:
        """Bytes that so many VMs need with the policy's confidence, from one side."""
        return self.after(vms, 0.0)

    def committed(self, vms: Ints) -> Floats:
        """Bytes that so many VMs take when each uses all of its RAM."""
        counts = self.mix[vms]
        return counts @ (self._ram + self.host.vm_overhead)

    # ---- what fits ---------------------------------------------------------------------------------

    def grid(self) -> Ints:
        """Numbers of VMs for a curve: 0, 1, 2, ... and beyond some, further apart, up to the most."""
        most = len(self.mix) - 1
        points = list(range(min(most, _EVERY) + 1))
        while points[-1] < most:
            points.append(min(most, max(points[-1] + 1, int(points[-1] * _STEP))))
        return np.array(points, np.int64)

    def fits(self, curve: Curve) -> Fits:
        """The largest numbers of VMs that fit, by question."""
        host, usual = self.host, self.host.usable * (1 - self.policy.headroom)
        all_of_it = host.usable + host.swap

        def most(what: str, limit: float) -> int:
            return self.largest(curve.vms, lambda vms: getattr(self.curve(vms), what), limit, getattr(curve, what))

        confident = self.largest(curve.vms, self.confident, usual)
        broken = most("broken", all_of_it)
        recommended = min(confident, broken)
        end = len(self.mix) - 1
        return Fits(
            without_ksm=most("without", usual),
            committed=self.largest(curve.vms, self.committed, host.usable),
            mean=None if self.bounds_only else most("need", usual),
            low=most("need_high", usual),
            high=most("need_low", usual),
            confident=confident,
            broken=broken,
            unmerged=most("without", all_of_it),
            recommended=recommended,
            limited_by=(
                "the plan's limit" if recommended == end else "memory" if confident <= broken else "broken pages"
            ),
        )

    @staticmethod
    def largest(grid: Ints, bytes_of: Callable[[Ints], Floats], limit: float, on_grid: Floats | None = None) -> int:
        """The largest number of VMs up to which all take no more than the limit, also between points of the grid."""
        over = np.flatnonzero((bytes_of(grid) if on_grid is None else on_grid) > limit)
        if not len(over):
            return int(grid[-1])
        if over[0] == 0:
            return 0
        between = np.arange(grid[over[0] - 1] + 1, grid[over[0]], dtype=np.int64)
        if not len(between):
            return int(grid[over[0] - 1])
        return int(grid[over[0] - 1]) + int(np.argmax(np.append(bytes_of(between), np.inf) > limit))


def reach(
    samples: Samples, ram: Floats, shares: Sequence[float], host: HostSpec, policy: Policy, page_size: int
) -> Ints:
    """The mix up to a number of VMs that surely does not fit any more, or as many as a plan looks at.

    >>> from ksm.plan.planning import needs_of  # which calls it
    >>> len(needs_of([b"1" * 4096, b"2" * 4096], HostSpec(ram=1 << 18)).mix) - 1
    128
    """
    most, rules = 16, Rules(use_zero_pages=True, max_page_sharing=1 << 30)
    while True:
        mix = apportion(most, shares)
        needs = Needs(samples, ram, mix, host, policy, rules, page_size)
        last = needs.curve(np.array([most], np.int64))
        if most >= MAX_VMS or (last.need_low[0] > 1.1 * host.usable and last.without[0] > host.usable + host.swap):
            return mix
        most = min(MAX_VMS, most * 2)

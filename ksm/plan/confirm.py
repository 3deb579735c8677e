"""The closed form of `ksm.plan.pace` confirmed by simulation, on the samples' own fingerprints, thinned out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ksm.constants import MADV_MERGEABLE
from ksm.estimate import estimate
from ksm.machine import Machine
from ksm.pages import Fingerprints
from ksm.plan.growth import Rules
from ksm.plan.pace import SHARES, Load, Pace, reached
from ksm.plan.result import Check, Timeline
from ksm.sources import Snapshot
from ksm.sysfs import profile

Ints = npt.NDArray[np.int64]

_MOST_PAGES = 100_000
_MOST_VMS = 64
_LOOKS = 120
_SETTLING = 22  # passes; smart scan has come to its longest skips, and tries what is unshared in the next


def confirm(
    taken: Sequence[Snapshot],
    class_of: Sequence[int],
    counts: Ints,
    pace: Pace,
    rules: Rules,
    kernel: str,
    nodes: int = 1,
) -> tuple[Check, Timeline]:
    """Run a machine of `counts` VMs of each class, as many as samples can stand for, until it has settled.

    Its VMs are the samples over and over, what only one sample has made unlike in every copy, and are dealt out to the
    nodes. One content of so many is kept, with all its copies, and one zero page of so many, that the machine stays
    small; a batch is as much smaller, a page costs as much more. A second machine has one VM less until it has settled.

    >>> words = np.random.default_rng(0).integers(1, 1 << 60, (3000, 2), dtype=np.uint64)
    >>> vms = [Snapshot(str(n), 4096, True, True, ((0, Fingerprints(words[n * 500: n * 500 + 2000])),)) for n in (0, 1)]
    >>> check, _ = confirm(vms, [0, 0], np.array([4]), Pace(100, 20, True), Rules(), "6.18")
    >>> check.pages, abs(check.seconds_99[0] / check.seconds_99[1] - 1) < 0.1
    (8000, True)
    """
    vms = _vms(taken, class_of, counts)
    pages = sum(taken[sample].pages for sample, _ in vms)
    thinning = min(max(1, -(-pages // _MOST_PAGES)), max(1, pace.pages_to_scan))
    private = _private(taken)
    images = [_image(taken[sample], private[sample], copy, thinning) for sample, copy in vms]
    thin = replace(pace, pages_to_scan=max(1, pace.pages_to_scan // thinning), cost=pace.cost.scaled(thinning))
    page_size = taken[0].page_size
    found = _load(images, rules, page_size)
    seconds, sharing, busy = thin.cold(found)
    simulation = _Simulation(thin, rules, kernel, nodes, page_size)
    timeline = simulation.cold(images, 1.2 * float(seconds[-1]), thinning)
    pairs = {each: (reached(seconds, sharing, each / 100), _when(timeline, each / 100)) for each in SHARES}
    one_more = {}
    if len(images) > 1:
        closed = {each: thin.one_more(found, each / 100) for each in SHARES}
        longest = max(filter(math.isfinite, (*closed.values(), thin.one_more(found, 0.0))))
        simulated = simulation.one_more(images, float(sharing[-1]), longest)
        one_more = {each: (closed[each], simulated[each]) for each in SHARES}
    check = Check(
        vms=len(images),
        pages=int(found.pages[-1]),
        thinning=thinning,
        pages_sharing=(float(sharing[-1]), round(float(timeline.pages_sharing[-1]) / thinning)),
        seconds_50=pairs[50],
        seconds_90=pairs[90],
        seconds_99=pairs[99],
        cpu_seconds=(float(busy[-1]), float(np.interp(seconds[-1], timeline.seconds, timeline.cpu_seconds))),
        one_more=one_more,
    )
    return check, timeline


def _vms(taken: Sequence[Snapshot], class_of: Sequence[int], counts: Ints) -> list[tuple[int, int]]:
    """(sample, which copy of it) for each VM, the classes in their shares, at most so many."""
    scale = min(1.0, _MOST_VMS / max(int(counts.sum()), 1))
    found = []
    for c, count in enumerate(counts):
        mine = [index for index, its in enumerate(class_of) if its == c]
        found += [(mine[n % len(mine)], n // len(mine)) for n in range(max(int(count > 0), round(count * scale)))]
    return found


def _private(taken: Sequence[Snapshot]) -> list[npt.NDArray[np.bool_]]:
    """Of each sample's pages, those whose content no other sample has."""
    lows = [snapshot.words()[:, 1] for snapshot in taken]
    _, sample_of = np.unique(np.concatenate(lows), return_inverse=True)
    parts = np.split(sample_of, np.cumsum([len(low) for low in lows])[:-1])
    samples = np.zeros(int(sample_of.max(initial=-1)) + 1, np.int64)
    for part in parts:
        samples[np.unique(part)] += 1
    return [samples[part] == 1 for part in parts]


def _image(snapshot: Snapshot, private: npt.NDArray[np.bool_], copy: int, thinning: int) -> Fingerprints:
    words = snapshot.words()
    zero = Fingerprints(words).zeros(snapshot.page_size)
    # Of the zero page, which may be a third of all pages and would be there or not, one copy of so many is kept.
    keep = np.where(zero, np.cumsum(zero) % thinning == 0, words[:, 1] % np.uint64(thinning) == 0)
    words, private, zero = words[keep].copy(), private[keep], zero[keep]
    words[private & ~zero, 1] ^= np.uint64(copy * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    return Fingerprints(words)


def _load(images: Sequence[Fingerprints], rules: Rules, page_size: int) -> Load:
    """What ksmd finds in these, image by image."""
    node_of = np.arange(len(images)) % rules.separate_nodes
    answer = estimate(
        list(images),
        rules.max_page_sharing,
        rules.use_zero_pages,
        nodes=node_of.tolist(),
        merge_across_nodes=rules.separate_nodes == 1,
        page_size=page_size,
    )
    rows = np.array([[i.pages, i.pages_sharing + i.ksm_zero_pages, i.ksm_zero_pages] for i in answer.sources])
    pages, sharing, zero = np.vstack((np.zeros(3), np.cumsum(rows, axis=0))).T
    single = np.zeros(len(images) + 1)
    for node in range(rules.separate_nodes):
        mine = np.flatnonzero(node_of == node)
        steps = np.zeros(len(images) + 1)
        steps[mine + 1] = np.diff(_single([images[i] for i in mine.tolist()]))
        single += np.cumsum(steps)
    vms = np.arange(len(images) + 1.0)
    last = [images[i] for i in np.flatnonzero(node_of == node_of[-1]).tolist()]
    return Load(vms, pages, sharing, single, zero, page_size, rules.separate_nodes, _paired(last))


def _paired(images: Sequence[Fingerprints]) -> float:
    """Contents with one copy in all but the last image, and some in it."""
    if len(images) < 2:
        return 0.0
    low, copies = np.unique(np.concatenate([image.words[:, 1] for image in images[:-1]]), return_counts=True)
    return float(np.isin(low[copies == 1], images[-1].words[:, 1]).sum())


def _single(images: Sequence[Fingerprints]) -> npt.NDArray[np.float64]:
    """Contents with one copy among the first 0, 1, 2, ... images."""
    if not images:
        return np.zeros(1)
    low = np.concatenate([image.words[:, 1] for image in images])
    of_image = np.repeat(np.arange(len(images)), [len(image) for image in images])
    order = np.argsort(low, kind="stable")
    starts = np.flatnonzero(np.concatenate(([len(low) > 0], low[order][1:] != low[order][:-1])))
    seconds = (starts + 1)[np.diff(starts, append=len(low)) > 1]
    met, doubled = (np.bincount(of_image[order[at]], minlength=len(images)) for at in (starts, seconds))
    return np.concatenate(([0.0], np.cumsum(met - doubled, dtype=np.float64)))


class _Simulation:
    """Machines with the same tunables."""

    def __init__(self, pace: Pace, rules: Rules, kernel: str, nodes: int, page_size: int) -> None:
        self._pace = pace
        self._rules = rules
        self._kernel = kernel if profile(kernel).counts_zero_pages else "6.6"  # the first that counts zero pages
        self._nodes = max(nodes, rules.separate_nodes)
        self._page_size = page_size

    def _machine(self) -> Machine:
        machine = Machine(kernel=self._kernel, page_size=self._page_size, nodes=self._nodes)
        machine.ksmd.cost = self._pace.cost
        machine.ksm.max_page_sharing = self._rules.max_page_sharing
        machine.ksm.use_zero_pages = self._rules.use_zero_pages
        machine.ksm.merge_across_nodes = self._rules.separate_nodes == 1
        machine.ksm.pages_to_scan = self._pace.pages_to_scan
        machine.ksm.sleep_millisecs = self._pace.sleep_millisecs
        machine.ksm.run = 1
        return machine

    def _boot(self, machine: Machine, number: int, image: Fingerprints) -> None:
        process = machine.spawn(str(number))
        area = process.mmap(image, node=number % self._nodes)
        process.madvise(area, len(image) * self._page_size, MADV_MERGEABLE)

    @staticmethod
    def _merged(machine: Machine) -> float:
        counters = machine.ksm.snapshot()
        return float(counters.pages_sharing + (counters.ksm_zero_pages or 0))

    def cold(self, images: Sequence[Fingerprints], seconds: float, thinning: int) -> Timeline:
        """All at once, for so long."""
        machine = self._machine()
        for number, image in enumerate(images):
            self._boot(machine, number, image)
        looks = [(0.0, 0.0, 0.0)]
        for _ in range(_LOOKS):
            machine.run_for(seconds / _LOOKS)
            looks.append((machine.now, self._merged(machine) * thinning, machine.ksmd.cpu_seconds))
        at, sharing, busy = (np.array(column) for column in zip(*looks, strict=True))
        return Timeline("simulated", at, sharing, busy)

    def one_more(self, images: Sequence[Fingerprints], settled: float, seconds: float) -> dict[int, float]:
        """Share of what the last one saves -> seconds after it booted, the others having settled; `settled` is what is
        saved at last, `seconds` about how long that takes. Infinite: not within twice that."""
        machine = self._machine()
        for number, image in enumerate(images[:-1]):
            self._boot(machine, number, image)
        while machine.ksm.full_scans < _SETTLING:
            machine.run_for(max(seconds / _LOOKS, 0.02))
        before, booted = self._merged(machine), machine.now
        self._boot(machine, len(images) - 1, images[-1])
        found = dict.fromkeys(SHARES, math.inf)
        for _ in range(2 * _LOOKS):
            machine.run_for(seconds / _LOOKS)
            part = (self._merged(machine) - before) / max(settled - before, 1.0)
            for each in SHARES:
                if part >= each / 100 * (1 - 1e-9):
                    found[each] = min(found[each], machine.now - booted)
            if math.isfinite(max(found.values())):
                break
        return found


def _when(timeline: Timeline, share: float) -> float:
    return reached(timeline.seconds, timeline.pages_sharing, share)

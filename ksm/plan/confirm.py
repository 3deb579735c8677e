"""The closed form of `ksm.plan.pace` confirmed by simulation, on the samples' own fingerprints, thinned out."""

from __future__ import annotations

from collections.abc import Sequence

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


def confirm(
    taken: Sequence[Snapshot], class_of: Sequence[int], counts: Ints, pace: Pace, rules: Rules, kernel: str
) -> tuple[Check, Timeline]:
    """Run a machine of `counts` VMs of each class, as many as samples can stand for, until it has settled.

    Its VMs are the samples over and over, what only one sample has made unlike in every copy. One content of so many
    is kept, with all its copies, that the machine stays small; a batch is as much smaller, a page costs as much more.

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
    thin = Pace(
        max(1, pace.pages_to_scan // thinning), pace.sleep_millisecs, pace.smart_scan, pace.cost.scaled(thinning)
    )
    found = _load(images, rules, taken[0].page_size)
    seconds, sharing, busy = thin.cold(found)
    timeline = _simulate(images, thin, rules, kernel, taken[0].page_size, float(seconds[-1]), thinning)
    end = min(len(timeline.seconds) - 1, int(np.searchsorted(timeline.seconds, seconds[-1])))
    pairs = {each: (reached(seconds, sharing, each / 100), _when(timeline, each / 100)) for each in SHARES}
    check = Check(
        vms=len(images),
        pages=int(found.pages[-1]),
        thinning=thinning,
        pages_sharing=(float(sharing[-1]), round(float(timeline.pages_sharing[-1]) / thinning)),
        seconds_50=pairs[50],
        seconds_90=pairs[90],
        seconds_99=pairs[99],
        cpu_seconds=(float(busy[-1]), float(timeline.cpu_seconds[end])),
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
    keep = words[:, 1] % np.uint64(thinning) == 0
    words, private = words[keep].copy(), private[keep] & (len(words) > 0)
    zero = Fingerprints(words).zeros(snapshot.page_size)
    words[private & ~zero, 0] ^= np.uint64(copy * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    return Fingerprints(words)


def _load(images: Sequence[Fingerprints], rules: Rules, page_size: int) -> Load:
    """What ksmd finds in these, image by image."""
    answer = estimate(list(images), rules.max_page_sharing, rules.use_zero_pages, page_size=page_size)
    rows = np.array([[i.pages, i.pages_sharing + i.ksm_zero_pages, i.ksm_zero_pages] for i in answer.sources])
    pages, sharing, zero = np.vstack((np.zeros(3), np.cumsum(rows, axis=0))).T
    return Load(np.arange(len(images) + 1.0), pages, sharing, _single(images), zero, page_size)


def _single(images: Sequence[Fingerprints]) -> npt.NDArray[np.float64]:
    """Contents with one copy among the first 0, 1, 2, ... images."""
    low = np.concatenate([image.words[:, 1] for image in images])
    of_image = np.repeat(np.arange(len(images)), [len(image) for image in images])
    order = np.argsort(low, kind="stable")
    starts = np.flatnonzero(np.concatenate(([True], low[order][1:] != low[order][:-1])))
    seconds = (starts + 1)[np.diff(starts, append=len(low)) > 1]
    met, doubled = (np.bincount(of_image[order[at]], minlength=len(images)) for at in (starts, seconds))
    return np.concatenate(([0.0], np.cumsum(met - doubled, dtype=np.float64)))


def _simulate(
    images: Sequence[Fingerprints], pace: Pace, rules: Rules, kernel: str, page_size: int, seconds: float, thinning: int
) -> Timeline:
    counted = profile(kernel).counts_zero_pages
    machine = Machine(kernel=kernel if counted else "6.6", page_size=page_size)  # the first that counts zero pages
    machine.ksmd.cost = pace.cost
    machine.ksm.max_page_sharing = rules.max_page_sharing
    machine.ksm.use_zero_pages = rules.use_zero_pages
    machine.ksm.pages_to_scan = pace.pages_to_scan
    machine.ksm.sleep_millisecs = pace.sleep_millisecs
    for index, image in enumerate(images):
        process = machine.spawn(str(index))
        process.madvise(process.mmap(image), len(image) * page_size, MADV_MERGEABLE)
    machine.ksm.run = 1
    looks = [(0.0, 0.0, 0.0)]
    for _ in range(_LOOKS):
        machine.run_for(1.2 * seconds / _LOOKS)
        counters = machine.ksm.snapshot()
        merged = counters.pages_sharing + (counters.ksm_zero_pages or 0)
        looks.append((machine.now, float(merged * thinning), machine.ksmd.cpu_seconds))
    at, sharing, busy = (np.array(column) for column in zip(*looks, strict=True))
    return Timeline("simulated", at, sharing, busy)


def _when(timeline: Timeline, share: float) -> float:
    return reached(timeline.seconds, timeline.pages_sharing, share)

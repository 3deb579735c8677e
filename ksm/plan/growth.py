"""How the frames in use grow with the number of VMs: exact expectations within the samples, extrapolated beyond.

Settled, a content with n copies takes ceil(n / max_page_sharing) frames. So the frames of N VMs are the number of
different contents among them (`Growth.distinct`: rarefaction up to the number of samples, a fitted mixture beyond),
plus the further frames of contents with more copies than one KSM frame may have, plus the frames of zero pages.
Intervals: each sample is left out in turn (the jackknife of B. Efron and C. Stein, The jackknife estimate of variance,
Annals of Statistics 9 (1981)); its variance is that of the expectation, and as the VMs to come are draws like the
samples, T / N of it is added for them. The jackknife's factor of (T - 1) / T is left out: with it, intervals from few
samples were too narrow over draws of real workers (`python -m bench.plan`). The quantiles are Student's with T - 1
degrees of freedom, over classes by Satterthwaite's rule.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ksm.plan.contents import Table
from ksm.plan.mixture import Mixture, fit, met_once, missing

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Which = Literal["mean", "low"]

_CHUNK = 1 << 23  # numbers in the dense rows that are made at a time
_SUBSETS = 64  # of samples, over which the frames of contents beyond max_page_sharing are averaged


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Contents by how many samples of each class have them.

    Attributes:
        sizes: (classes,) how many samples there are.
        q: (groups, classes) in how many of them a content is.
        number: (groups,) of contents.
        single: (groups,) whether no image has two copies; contents that some have once and others twice, which are few,
            are taken for shared wherever they are.

    >>> groups = Groups(np.array([2]), np.array([[1], [2]]), np.array([10.0, 5.0]), np.array([True, True]))
    >>> groups.exclusive(0).tolist()
    [10.0, 5.0]
    """

    sizes: Ints
    q: Ints
    number: Floats
    single: Bools

    def exclusive(self, c: int) -> Floats:
        """Q_1 .. Q_T of the contents that only samples of one class have."""
        others = np.delete(self.q, c, axis=1).any(axis=1)
        counted = np.bincount(self.q[~others, c], self.number[~others], self.sizes[c] + 1)
        return counted[1:].astype(np.float64)

    def within(self, counts: Ints) -> tuple[Floats, Floats]:
        """Expected contents, and contents with a single copy, in subsets of the samples; `counts` is (n, classes)."""
        rows, back = np.unique(counts, axis=0, return_inverse=True)
        distinct, once = np.empty(len(rows)), np.empty(len(rows))
        for i, row in enumerate(rows):
            drawn = [(int(size), int(n)) for size, n in zip(self.sizes, row, strict=True)]
            none = np.stack([missing(*pair)[self.q[:, c]] for c, pair in enumerate(drawn)])
            distinct[i] = (self.number * (1 - none.prod(axis=0))).sum()
            alone = np.zeros(len(self.q))
            for c, pair in enumerate(drawn):
                alone += met_once(*pair)[self.q[:, c]] * np.delete(none, c, axis=0).prod(axis=0)
            once[i] = (self.number * self.single * alone).sum()
        back = back.reshape(-1)
        return distinct[back], once[back]

    def without(self, c: int, having: Floats) -> Groups:
        """The same with one sample of class c left out; `having` is (groups,) how many of the contents it has."""
        moved = self.q.copy()
        moved[:, c] -= 1
        kept, some = self.number > having, having > 0
        sizes = self.sizes.copy()
        sizes[c] -= 1
        return Groups(
            sizes,
            np.concatenate((self.q[kept], moved[some])),
            np.concatenate(((self.number - having)[kept], having[some])),
            np.concatenate((self.single[kept], self.single[some])),
        )


class Accumulation:
    """The number of different contents in any number of VMs of each class, from `Groups`."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        exclusive = [groups.exclusive(c) if size else np.zeros(1) for c, size in enumerate(groups.sizes)]
        self._mixtures: list[Mixture] = [fit(counts) for counts in exclusive]
        alone = ~(groups.q.sum(axis=1) > 1)
        self._single = []  # of the contents that one sample has, the share with one copy
        for c in range(len(groups.sizes)):
            once = alone & (groups.q[:, c] == 1)
            number = groups.number[once].sum()
            self._single.append(float(groups.number[once & groups.single].sum() / number) if number else 1.0)

    def __call__(self, counts: Ints, which: Which = "mean") -> tuple[Floats, Floats]:
        """Expected contents, and those with one copy, of (n, classes) VMs; "low": single samples show all there is."""
        sizes = self.groups.sizes
        distinct, once = self.groups.within(np.minimum(counts, sizes))
        for c, (size, mixture) in enumerate(zip(sizes, self._mixtures, strict=True)):
            beyond = counts[:, c] > size
            if not beyond.any() or (which == "low" and size <= 1):
                continue
            distinct[beyond] += mixture.more(counts[beyond, c] - size)
            sampled = mixture.once(np.full(1, size))
            once[beyond] += self._single[c] * (mixture.once(counts[beyond, c]) - sampled)
        return distinct, np.maximum(once, 0.0)

    @functools.cached_property
    def _shared(self) -> list[Mixture]:
        """Fits that start out from all that some images share."""
        groups = self.groups
        return [fit(groups.exclusive(c) if size else np.zeros(1), 1.0) for c, size in enumerate(groups.sizes)]

    def doubt(self, counts: Ints) -> tuple[Floats, Floats]:
        """How far below and above the mixture contents may be as well, by the same samples: as far as a fit that takes
        as much as it can for shared, and half the way to the straight line of Good and Turing, the most there can be.
        """
        below, above = np.zeros(len(counts)), np.zeros(len(counts))
        mixtures = zip(self.groups.sizes, self._mixtures, self._shared, strict=True)
        for c, (size, mixture, shared) in enumerate(mixtures):
            further = np.maximum(counts[:, c] - size, 0)
            once = float(self.groups.exclusive(c)[0]) if size else 0.0
            more = mixture.more(further)
            below += np.maximum(more - shared.more(further), 0.0)
            above += np.maximum(once / max(size, 1) * further - more, 0.0) / 2
        return below, above


class Samples:
    """What the samples say whatever the tunables: the fits, with all of them and with each left out."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.sizes = np.bincount(table.class_of, minlength=table.classes)
        groups, having = _groups(table)
        self.all = Accumulation(groups)
        self.left_out = [
            Accumulation(groups.without(int(c), having[:, i])) if self.sizes[c] > 1 else None
            for i, c in enumerate(table.class_of)
        ]

    def mean(self, values: Ints, leave_out: int | None = None) -> Floats:
        """(classes,) the mean over a class's samples of a value for each image."""
        keep = np.arange(len(values)) != leave_out
        of_class = self.table.class_of[keep]
        sums = np.bincount(of_class, values[keep], len(self.sizes))
        return sums / np.maximum(np.bincount(of_class, minlength=len(self.sizes)), 1)


@dataclass(frozen=True, slots=True)
class Rules:
    """The tunables that decide on frames."""

    max_page_sharing: int = 256
    use_zero_pages: bool = False
    separate_nodes: int = 1
    """NUMA nodes that do not merge with each other; VMs are dealt out to them evenly."""


class Growth:
    """Frames against numbers of VMs, with intervals, under one set of rules.

    Numbers of VMs are (n, classes) arrays; `most` is the largest number of each class that will be asked for.
    """

    def __init__(self, samples: Samples, rules: Rules, most: Sequence[int] | Ints) -> None:
        self.samples = samples
        self.table = samples.table
        self.sizes = samples.sizes
        self.rules = rules
        heavy = _heavy(self.table, rules.max_page_sharing, np.asarray(most), self.sizes)
        self._heavy, self._heavy_number, self._heavy_part = heavy
        self._drawn: dict[tuple[int, ...], Ints] = {}  # subsets of the samples, by how many of each class
        self._lone = _lone(self.table, rules.max_page_sharing)
        if not rules.use_zero_pages:
            self._heavy = np.concatenate((self._heavy, self.table.zeros[None]))
            self._heavy_number = np.append(self._heavy_number, 1.0)
            self._heavy_part = self._heavy_part + self.table.zeros

    # ---- expectations ------------------------------------------------------------------------------

    def pages(self, counts: Ints) -> Floats:
        """Pages on average."""
        return counts @ self.samples.mean(self.table.pages)

    def zeros(self, counts: Ints) -> Floats:
        """All-zero pages among them."""
        return counts @ self.samples.mean(self.table.zeros)

    def frames(self, counts: Ints, which: Which = "mean") -> tuple[Floats, Floats]:
        """Frames on average, and pages with one copy (`pages_unshared`)."""
        total, once = np.zeros(len(counts)), np.zeros(len(counts))
        for part in self._nodes(counts):
            distinct, alone = self.samples.all(part, which)
            total += distinct + self._beyond_limit(part) + part @ self.samples.mean(self._lone) + self._zero_frame(part)
            once += alone
        return np.minimum(total, self.pages(counts)), once

    def _nodes(self, counts: Ints) -> list[Ints]:
        nodes = self.rules.separate_nodes
        return [counts // nodes + (node < counts % nodes) for node in range(nodes)]

    def _zero_frame(self, counts: Ints) -> Floats:
        """Whether there is a zero page that takes a frame: 0 to 1."""
        some = np.bincount(self.table.class_of[self.table.zeros > 0], minlength=len(self.sizes))
        if self.rules.use_zero_pages or not some.any():
            return np.zeros(len(counts))
        drawn = np.minimum(counts, self.sizes)
        return np.array(
            [
                1 - math.prod(missing(int(t), int(n))[q] for t, n, q in zip(self.sizes, row, some, strict=True))
                for row in drawn
            ]
        )

    def _beyond_limit(self, counts: Ints) -> Floats:
        """Frames of contents beyond their first: the samples taken whole as often as they go into the VMs, and for
        the rest the mean over subsets of them."""
        total = np.zeros(len(counts))
        if not len(self._heavy):
            return total
        limit = self.rules.max_page_sharing
        for i, row in enumerate(counts):
            whole, rest = np.divmod(row, self.sizes)
            drawn = tuple(rest.tolist())
            if drawn not in self._drawn:
                self._drawn[drawn] = self._subsets(drawn)
            chosen = self._drawn[drawn] + whole[self.table.class_of]
            copies = self._heavy @ chosen.T
            mean = self._heavy @ (row / self.sizes)[self.table.class_of]
            # what rounding up adds is averaged over subsets; what it is added to is known exactly
            rounding = np.maximum(-(-copies // limit) - 1, 0) - copies / limit
            total[i] = self._heavy_number @ (rounding.mean(axis=1) + mean / limit)
        return total

    def _subsets(self, drawn: tuple[int, ...]) -> Ints:
        """(subsets, images) of 0 and 1, so many images of each class: all subsets if few, or some at random."""
        members = [np.flatnonzero(self.table.class_of == c) for c in range(len(self.sizes))]
        ways = math.prod(math.comb(int(size), n) for size, n in zip(self.sizes, drawn, strict=True))
        if ways <= _SUBSETS:
            each = [itertools.combinations(mine, n) for mine, n in zip(members, drawn, strict=True)]
            picks = [list(itertools.chain(*parts)) for parts in itertools.product(*each)]
        else:
            random = np.random.default_rng(0)
            picks = [
                list(itertools.chain(*(random.permutation(mine)[:n] for mine, n in zip(members, drawn, strict=True))))
                for _ in range(_SUBSETS)
            ]
        chosen = np.zeros((len(picks), self.table.images), np.int64)
        for row, pick in zip(chosen, picks, strict=True):
            row[pick] = 1
        return chosen

    # ---- intervals ---------------------------------------------------------------------------------

    def replicates(self, counts: Ints) -> tuple[Floats, Floats]:
        """(images, n) frames and pages as expected with each sample left out; NaN where it is its class's only one."""
        frames = np.full((self.table.images, len(counts)), np.nan)
        pages = frames.copy()
        parts = self._nodes(counts)
        limited = sum(self._beyond_limit(part) for part in parts)
        heavy = np.maximum(counts @ self.samples.mean(self._heavy_part), 1e-9)
        zero = sum(self._zero_frame(part) for part in parts)
        for i, accumulation in enumerate(self.samples.left_out):
            if accumulation is None:
                continue
            distinct = sum(accumulation(part)[0] for part in parts)
            share = counts @ self.samples.mean(self._heavy_part, i) / heavy
            frames[i] = distinct + limited * share + counts @ self.samples.mean(self._lone, i) + zero
            pages[i] = counts @ self.samples.mean(self.table.pages, i)
        return frames, pages

    def spread(self, replicates: Floats, counts: Ints, quantile: float) -> Floats:
        """How far the `quantile` of what N drawn VMs need lies above the expectation, by its (images, n) replicates."""
        variances, freedom = [], []
        for c, size in enumerate(self.sizes):
            if size < 2:
                continue
            mine = replicates[self.table.class_of == c]
            variance = ((mine - mine.mean(axis=0)) ** 2).sum(axis=0)
            n = counts[:, c]
            variances.append(np.where(n > 0, variance * (1 + size / np.maximum(n, 1)), 0.0))
            freedom.append(size - 1)
        if not variances:
            return np.zeros(len(counts))
        total = np.sum(variances, axis=0)
        shares = np.sum([v**2 / f for v, f in zip(variances, freedom, strict=True)], axis=0)
        degrees = np.divide(total**2, shares, out=np.full(len(total), float(max(freedom))), where=shares > 0)
        result: Floats = np.sqrt(total) * np.array([student(quantile, round(float(d), 2)) for d in degrees])
        return result

    def upward(self, replicates: Floats, counts: Ints, quantile: float) -> Floats:
        """`spread`, widened upwards for what no sample can show."""
        return self._widened(self.spread(replicates, counts, quantile), counts, 1)

    def downward(self, replicates: Floats, counts: Ints, quantile: float) -> Floats:
        """`spread`, widened downwards: what few samples show as their own may be shared by some."""
        return self._widened(self.spread(replicates, counts, quantile), counts, 0)

    def _widened(self, spread: Floats, counts: Ints, side: Literal[0, 1]) -> Floats:
        doubt = sum(self.samples.all.doubt(part)[side] for part in self._nodes(counts))
        return np.asarray(np.hypot(spread, np.asarray(doubt)))


@functools.lru_cache(maxsize=4096)
def student(quantile: float, degrees: float) -> float:
    """A quantile of Student's t, above 0.5.

    >>> round(student(0.95, 5), 3), round(student(0.95, 2), 3), round(student(0.975, 1000), 2)
    (2.015, 2.92, 1.96)
    """
    angle = np.linspace(0, np.pi / 2, 4_001)  # t = sqrt(degrees) * tan(angle)
    density = np.cos(angle) ** (degrees - 1) if degrees > 1 else np.ones_like(angle)
    below = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    return float(np.sqrt(degrees) * np.tan(np.interp(2 * quantile - 1, below / below[-1], angle)))


def _groups(table: Table) -> tuple[Groups, Floats]:
    """Contents by incidence, and how many of each group each image has: (groups, images)."""
    sizes = np.bincount(table.class_of, minlength=table.classes)
    incidence = table.incidence()
    content = table.content_of()
    several = np.zeros(table.contents, np.int64)
    several[content[table.copies > 1]] = 1
    key, radix = several, 2
    for c, size in enumerate(sizes):
        key = key + incidence[:, c] * radix
        radix *= int(size) + 1
        if radix > 1 << 60:
            raise ValueError("too many samples and classes")
    _, first, group, number = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    having = np.bincount(group[content] * table.images + table.image, minlength=len(first) * table.images)
    groups = Groups(sizes, incidence[first], number.astype(np.float64), several[first] == 0)
    return groups, having.reshape(len(first), table.images).astype(np.float64)


def _heavy(table: Table, limit: int, most: Ints, sizes: Ints) -> tuple[Ints, Floats, Ints]:
    """Contents of several images that may have more copies than one KSM frame holds: different rows of copies
    (ascending within a class), how many contents have each, and all their copies by image."""
    reach = int(np.max(-(-most // sizes)))
    which = np.flatnonzero((table.totals() * reach > limit) & (np.diff(table.starts) > 1))
    rows = np.empty((0, table.images), np.int64)
    numbers: Floats = np.empty(0)
    part = np.zeros(table.images, np.int64)
    mixer = np.random.default_rng(1).integers(1, 1 << 62, table.images) * 2 + 1
    step = max(1, _CHUNK // table.images)
    for at in range(0, len(which), step):
        dense = table.dense(which[at : at + step])
        part += dense.sum(axis=0)
        for c in range(len(sizes)):
            columns = table.class_of == c
            dense[:, columns] = np.sort(dense[:, columns], axis=1)
        dense = np.concatenate((rows, dense))
        weight = np.concatenate((numbers, np.ones(len(dense) - len(numbers))))
        _, first, group = np.unique(dense @ mixer, return_index=True, return_inverse=True)
        rows, numbers = dense[first], np.bincount(group, weight).astype(np.float64)
    return rows, numbers, part


def _lone(table: Table, limit: int) -> Ints:
    """(images,) frames beyond the first of contents that no other image has: VMs to come have others, as large."""
    alone = table.starts[:-1][np.diff(table.starts) == 1]
    more = -(-table.copies[alone].astype(np.int64) // limit) - 1
    return np.bincount(table.image[alone], more, table.images).astype(np.int64)

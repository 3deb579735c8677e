"""Plans against what is there: predicted frames of many VMs from few samples, over many draws of real workers.

    python -m bench.plan [--draws 200] [--check]           workers of both kinds of `ksm demo`
    python -m bench.plan --processes DIR [--each 80]       processes of three other kinds
    python -m bench.plan --guests DIR [--each 24]          QEMU guests of two kinds, booted here
    python -m bench.plan --images FILE...                  memory images: 8 from 3, or what they allow

Again and again some are drawn as samples, a plan is made, others are drawn as the VMs to come, and their frames are
counted in closed form, which the kernel's counters agree with. Shown are the mean and the largest error of the
predicted frames, how many of the 90 % intervals hold the truth, and half their width. `boot.` is the same for intervals
by a bootstrap over images instead of leaving out each in turn. `unmerged` is the mean error of the pages without any
merging, which is that of the draws alone: VMs differ in size. Beside the plan's mixture are Chao's estimate (Chao2 of
Q_1 and Q_2) and the straight line of Good and Turing. DIR keeps the fingerprints of what was run, to draw from again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench import guest_work, population
from ksm.cli.crew import KINDS, Crew
from ksm.estimate import estimate, snapshots
from ksm.linux import Host
from ksm.plan.contents import Table
from ksm.plan.growth import Accumulation, Groups, Growth, Rules, Samples, student
from ksm.sources import Snapshot

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.9
ROUNDS = 40  # of the bootstrap
AIM_ERROR, AIM_COVERAGE = 0.03, (0.85, 0.95)


@dataclass(frozen=True)
class Case:
    """So many samples and so many VMs to come of each class."""

    name: str
    samples: tuple[int, ...]
    vms: tuple[int, ...]


def read_workers(number: int) -> list[list[Snapshot]]:
    """What the workers of each kind hold that is marked mergeable."""
    found: list[list[Snapshot]] = [[] for _ in KINDS]
    with Host().lock(), Crew(number) as crew:  # they opt in to KSM
        crew.work()
        for worker in crew.workers:
            kind = KINDS.index(worker.name.split()[0])
            found[kind] += snapshots([f"pid:{worker.pid}"], marked_only=True)
    return found


def truth(vms: Sequence[Snapshot]) -> int:
    """The frames that these settle at."""
    answer = estimate(vms)
    return answer.pages - answer.pages_sharing


def others(samples: Samples, counts: npt.NDArray[np.int64]) -> tuple[float, float]:
    """(Chao2, Good and Turing) of the contents, by class for contents that no other class has."""
    groups = samples.all.groups
    seen = float(groups.within(np.minimum(counts, groups.sizes)[None])[0][0])
    chao = line = seen
    for c, size in enumerate(groups.sizes):
        once, *more = groups.exclusive(c)
        further = int(counts[c] - size)
        if further <= 0 or not once:
            continue
        twice = more[0] if more else 0.0
        unseen = (size - 1) / size * once * (once - 1) / (2 * (twice + 1))
        chao += unseen * (1 - (1 - once / (size * unseen + once)) ** further) if unseen else 0.0
        line += once / size * further
    return chao, line


def bootstrap(samples: Samples, counts: npt.NDArray[np.int64], rounds: int, random: np.random.Generator) -> Floats:
    """Contents expected in VMs like these, for samples drawn anew, with replacement, from the samples; (rounds,)."""
    table = samples.table
    marks = np.zeros(table.contents, np.int64)
    np.add.at(marks, table.content_of(), np.left_shift(1, table.image.astype(np.int64)))
    patterns, number = np.unique(marks, return_counts=True)
    having = (patterns[:, None] >> np.arange(table.images)) & 1
    found = []
    for _ in range(rounds):
        drawn = np.zeros((table.images, len(samples.sizes)), np.int64)
        for c, size in enumerate(samples.sizes):
            mine = np.flatnonzero(table.class_of == c)
            drawn[mine, c] = np.bincount(random.integers(0, size, size), minlength=size)
        q = having @ drawn
        seen = q.any(axis=1)
        groups = Groups(samples.sizes, q[seen], number[seen].astype(np.float64), np.ones(seen.sum(), np.bool_))
        found.append(float(Accumulation(groups)(counts[None])[0][0]))
    return np.array(found)


def by_bootstrap(samples: Samples, counts: npt.NDArray[np.int64], rounds: int, random: np.random.Generator) -> float:
    """Half an interval's width by the bootstrap's variance, used as the plan uses that of leaving out."""
    freedom = int(samples.sizes.min()) - 1
    size, number = samples.sizes.sum(), counts.sum()
    variance = float(np.var(bootstrap(samples, counts, rounds, random))) * (freedom + 1) / freedom
    return float(np.sqrt(variance * (1 + size / number)) * student((1 + CONFIDENCE) / 2, freedom))


def run(case: Case, people: Sequence[Sequence[Snapshot]], draws: int, rounds: int = 0) -> dict[str, float]:
    """Errors and coverage of a case over draws; of so many rounds of the bootstrap, too, if there are any."""
    random = np.random.default_rng(2026)
    errors: list[float] = []
    covered: list[bool] = []
    widths: list[float] = []
    booted: tuple[list[bool], list[float]] = ([], [])
    rivals: list[list[float]] = []
    sizes: list[float] = []
    for _ in range(draws):
        sampled: list[Snapshot] = []
        come: list[Snapshot] = []
        for mine, n, m in zip(people, case.samples, case.vms, strict=True):
            order = random.permutation(len(mine))
            sampled += [mine[i] for i in order[:n]]
            come += [mine[i] for i in order[n : n + m]]
        used = [c for c, n in enumerate(case.samples) if n]
        class_of = [k for k, c in enumerate(used) for _ in range(case.samples[c])]
        samples = Samples(Table.of(sampled, class_of))
        counts = np.array([case.vms[c] for c in used])
        growth = Growth(samples, Rules(), counts)
        predicted = float(growth.frames(counts[None])[0][0])
        less = growth.replicates(counts[None])[0]
        wide = float(growth.spread(less, counts[None], (1 + CONFIDENCE) / 2)[0])
        doubt = float(samples.all.doubt(counts[None])[0]) / 2
        really = truth(come)
        errors.append(predicted / really - 1)
        for width, hits, halves in (
            (wide, covered, widths),
            (by_bootstrap(samples, counts, rounds, random) if rounds else np.nan, *booted),
        ):
            low, high = predicted - width, predicted + float(np.hypot(width, doubt))
            hits.append(low <= really <= high)
            halves.append((high - low) / 2 / really)
        rivals.append([each / really - 1 for each in others(samples, counts)])
        sizes.append(float(growth.pages(counts[None])[0]) / sum(vm.pages for vm in come) - 1)
    chao, line = np.abs(rivals).mean(axis=0)
    return {
        "mean error": float(np.abs(errors).mean()),
        "bias": float(np.mean(errors)),
        "largest": float(np.abs(errors).max()),
        "coverage": float(np.mean(covered)),
        "half width": float(np.mean(widths)),
        "boot. cov.": float(np.mean(booted[0])),
        "boot. width": float(np.mean(booted[1])),
        "unmerged": float(np.abs(sizes).mean()),
        "Chao2": float(chao),
        "line": float(line),
    }


def populations(how: argparse.Namespace) -> tuple[Sequence[Sequence[Snapshot]], list[Case]]:
    """What to draw from, and the cases."""
    if how.images:
        rest = min(8, len(how.images) - 3)
        if rest < 1:
            raise SystemExit("bench.plan: four images or more are needed")
        return [snapshots(how.images)], [Case(f"{rest} guests from 3", (3,), (rest,))]
    if how.guests:
        serve, crunch = guest_work.KINDS
        return population.guests(how.guests, how.each or 24), [
            Case(f"8 {serve} from 3", (3, 0), (8, 0)),
            Case(f"8 {crunch} from 3", (0, 3), (0, 8)),
            Case("8 mixed from 3 + 3", (3, 3), (4, 4)),
            Case("12 mixed from 4 + 2", (4, 2), (9, 3)),
        ]
    if how.processes:
        return population.processes(how.processes, how.each or 80), [
            Case("24 database from 6", (6, 0, 0), (24, 0, 0)),
            Case("24 cache from 6", (0, 6, 0), (0, 24, 0)),
            Case("24 index from 6", (0, 0, 6), (0, 0, 24)),
            Case("24 mixed from 3 + 3", (3, 0, 3), (12, 0, 12)),
            Case("24 mixed from 2 + 2 + 2", (2, 2, 2), (8, 8, 8)),
        ]
    return read_workers(how.workers), [
        Case("24 render from 6", (6, 0), (24, 0)),
        Case("24 analyse from 6", (0, 6), (0, 24)),
        Case("24 mixed from 3 + 3", (3, 3), (12, 12)),
        Case("24 mixed from 4 + 2", (4, 2), (18, 6)),
        Case("8 render from 3", (3, 0), (8, 0)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--images", nargs="+", help="of guests, instead of workers: 8 from 3, or what they allow")
    parser.add_argument("--guests", type=Path, metavar="DIR", help="boot guests, and keep what they hold here")
    parser.add_argument("--processes", type=Path, metavar="DIR", help="run processes, and keep what they hold here")
    parser.add_argument("--each", type=int, help="guests or processes of each kind")
    parser.add_argument("--check", action="store_true", help="exit 1 if an aim is missed")
    how = parser.parse_args()
    people, cases = populations(how)
    print(f"{'case':24}" + "".join(f"{each:>12}" for each in COLUMNS))
    missed = 0
    for case in cases:
        found = run(case, people, how.draws, ROUNDS)
        missed += found["mean error"] > AIM_ERROR or not AIM_COVERAGE[0] <= found["coverage"] <= AIM_COVERAGE[1]
        print(f"{case.name:24}" + "".join(f"{found[each]:12.2%}" for each in COLUMNS), flush=True)
    return 1 if how.check and missed else 0


COLUMNS = (
    "mean error", "bias", "largest", "coverage", "half width", "boot. cov.", "boot. width", "unmerged", "Chao2", "line"
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())

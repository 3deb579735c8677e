"""Plans against what is there: predicted frames of many VMs from few samples, over many draws of real workers.

    python -m bench.plan [--draws 200] [--check]           workers of both kinds of `ksm demo`
    python -m bench.plan --processes DIR [--each 80]       processes of three other kinds
    python -m bench.plan --guests DIR [--each 24]          QEMU guests of two kinds, booted here
    python -m bench.plan --images FILE...                  memory images: 8 from 3, or what they allow
    python -m bench.plan --made-up                         VMs made up, easy and hard: each draw is new

Again and again some are drawn as samples, a plan is made, others are drawn as the VMs to come, and their frames are
counted in closed form, which the kernel's counters agree with. Shown are the mean and the largest error of the
predicted frames, how many of the 90 % intervals hold the truth, half their width, and how often the VMs take no more
than the plan says with 90 % confidence (`one side`: what "fits" rests on). `unmerged` is the mean error of the pages
without any merging, which is that of the draws alone: VMs differ in size. Beside the plan's mixture are Chao's estimate
(Chao2 of Q_1 and Q_2) and the straight line of Good and Turing. `boot.`, with --bootstrap, is coverage and width of
intervals by a bootstrap over images instead of leaving out each in turn. DIR keeps the fingerprints of what was run, to
draw from again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench import guest_work, made_up, population
from ksm.cli.crew import KINDS, Crew
from ksm.estimate import estimate, snapshots
from ksm.linux import Host
from ksm.plan.contents import Table
from ksm.plan.growth import Accumulation, Groups, Growth, Rules, Samples, student
from ksm.sources import Snapshot

Floats = npt.NDArray[np.float64]
Draw = Callable[[int, np.random.Generator], list[Snapshot]]
"""So many VMs of a class, at random."""

CONFIDENCE = 0.9
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


def pool(people: Sequence[Snapshot]) -> Draw:
    """Drawn from these, none twice."""
    return lambda number, random: [people[i] for i in random.permutation(len(people))[:number]]


def run(case: Case, classes: Sequence[Draw], draws: int, rounds: int = 0) -> dict[str, float]:
    """Errors and coverage of a case over draws; of so many rounds of the bootstrap, too, if there are any."""
    random = np.random.default_rng(2026)
    found: dict[str, list[float]] = {}
    for _ in range(draws):
        drawn = [
            draw(n + m, random) if n + m else [] for draw, n, m in zip(classes, case.samples, case.vms, strict=True)
        ]
        sampled = [vm for vms, n in zip(drawn, case.samples, strict=True) for vm in vms[:n]]
        come = [vm for vms, n in zip(drawn, case.samples, strict=True) for vm in vms[n:]]
        used = [c for c, n in enumerate(case.samples) if n]
        class_of = [k for k, c in enumerate(used) for _ in range(case.samples[c])]
        samples = Samples(Table.of(sampled, class_of))
        one = _one(samples, np.array([case.vms[c] for c in used]), come)
        if rounds:
            one |= _booted(samples, np.array([case.vms[c] for c in used]), truth(come), rounds, random)
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    return {
        "mean error": float(np.abs(found["error"]).mean()),
        "bias": mean.pop("error"),
        "largest": float(np.abs(found["error"]).max()),
        **mean,
    }


def _one(samples: Samples, counts: npt.NDArray[np.int64], come: Sequence[Snapshot]) -> dict[str, float]:
    """One draw: the plan's answer against the VMs that came."""
    growth, really = Growth(samples, Rules(), counts), truth(come)
    at, both = counts[None], (1 + CONFIDENCE) / 2
    predicted, less = float(growth.frames(at)[0][0]), growth.replicates(at)[0]
    low = predicted - float(growth.downward(less, at, both)[0])
    high = predicted + float(growth.upward(less, at, both)[0])
    chao, line = (abs(each / really - 1) for each in others(samples, counts))
    return {
        "error": predicted / really - 1,
        # whole frames: VMs that are all alike leave no width
        "coverage": np.floor(low) <= really <= np.ceil(high),
        "half width": (high - low) / 2 / really,
        "one side": really <= np.ceil(predicted + float(growth.upward(less, at, CONFIDENCE)[0])),
        "unmerged": abs(float(growth.pages(at)[0]) / sum(vm.pages for vm in come) - 1),
        "Chao2": chao,
        "line": line,
    }


def _booted(
    samples: Samples, counts: npt.NDArray[np.int64], really: float, rounds: int, random: np.random.Generator
) -> dict[str, float]:
    """One draw with an interval by the bootstrap."""
    predicted = float(Growth(samples, Rules(), counts).frames(counts[None])[0][0])
    width = by_bootstrap(samples, counts, rounds, random)
    high = predicted + float(np.hypot(width, samples.all.doubt(counts[None])[1][0]))
    return {
        "boot. cov.": predicted - width <= really <= high,
        "boot. width": (high - predicted + width) / 2 / really,
    }


def populations(how: argparse.Namespace) -> tuple[Sequence[Draw], list[Case]]:
    """What to draw from, and the cases."""
    if how.made_up:
        return made_up_cases()
    people, cases = real(how)
    return [pool(each) for each in people], cases


def made_up_cases() -> tuple[Sequence[Draw], list[Case]]:
    """Every kind by itself, from few samples and from more."""

    def draw(kind: str) -> Draw:
        return lambda number, random: made_up.vms(kind, number, random)

    kinds = list(made_up.KINDS)
    return [draw(kind) for kind in kinds], [
        Case(f"{vms} {kind} from {n}", *(tuple(one * (each == kind) for each in kinds) for one in (n, vms)))
        for kind in kinds
        for n, vms in ((2, 8), (3, 8), (6, 24), (12, 48))
    ]


def real(how: argparse.Namespace) -> tuple[Sequence[Sequence[Snapshot]], list[Case]]:
    """What runs or ran here, by class, and the cases."""
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
    parser.add_argument("--made-up", action="store_true", help="VMs made up, instead of workers")
    parser.add_argument("--bootstrap", type=int, default=0, metavar="ROUNDS", help="of it, for a comparison")
    parser.add_argument("--each", type=int, help="guests or processes of each kind")
    parser.add_argument("--check", action="store_true", help="exit 1 if an aim is missed")
    how = parser.parse_args()
    classes, cases = populations(how)
    columns: list[str] = []
    missed = 0
    for case in cases:
        found = run(case, classes, how.draws, how.bootstrap)
        missed += found["mean error"] > AIM_ERROR or not AIM_COVERAGE[0] <= found["coverage"] <= AIM_COVERAGE[1]
        if not columns:
            columns = list(found)
            print(f"{'case':24}" + "".join(f"{each:>11}" for each in columns))
        print(f"{case.name:24}" + "".join(f"{found[each]:11.2%}" for each in columns), flush=True)
    return 1 if how.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())

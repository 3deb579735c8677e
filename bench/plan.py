"""Plans against what is there: predicted frames of many VMs from few samples, over many draws of real workers.

    python -m bench.plan [--workers 64] [--draws 200] [--images FILE...] [--check]

Starts real worker processes of both kinds (those of `ksm demo`), or takes memory images of guests, reads what they
hold, and then again and again draws some as samples, plans, draws others as the VMs to come, and counts their frames
in closed form, which the kernel's counters agree with. Shown are the mean and the largest error of the predicted
frames, and how many of the 90 % intervals hold the truth. Beside the plan's mixture are Chao's estimate (Chao2 of Q_1
and Q_2) and the straight line of Good and Turing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ksm.cli.crew import KINDS, Crew
from ksm.estimate import estimate, snapshots
from ksm.plan.contents import Table
from ksm.plan.growth import Growth, Rules, Samples
from ksm.sources import Snapshot

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
    with Crew(number) as crew:
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


def run(case: Case, population: Sequence[Sequence[Snapshot]], draws: int) -> dict[str, float]:
    """Errors and coverage of a case over draws."""
    random = np.random.default_rng(2026)
    errors, covered, rivals, widths = [], [], [], []
    for _ in range(draws):
        sampled: list[Snapshot] = []
        come: list[Snapshot] = []
        for mine, n, m in zip(population, case.samples, case.vms, strict=True):
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
        low = predicted - float(growth.spread(less, counts[None], (1 + CONFIDENCE) / 2)[0])
        high = predicted + float(growth.upward(less, counts[None], (1 + CONFIDENCE) / 2)[0])
        really = truth(come)
        errors.append(predicted / really - 1)
        covered.append(low <= really <= high)
        widths.append((high - low) / 2 / really)
        rivals.append([each / really - 1 for each in others(samples, counts)])
    chao, line = np.abs(rivals).mean(axis=0)
    return {
        "mean error": float(np.abs(errors).mean()),
        "bias": float(np.mean(errors)),
        "largest": float(np.abs(errors).max()),
        "coverage": float(np.mean(covered)),
        "half width": float(np.mean(widths)),
        "Chao2": float(chao),
        "line": float(line),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--images", nargs="+", help="of guests, instead of workers: 8 from 3, or what they allow")
    parser.add_argument("--check", action="store_true", help="exit 1 if an aim is missed")
    how = parser.parse_args()
    if how.images:
        population = [snapshots(how.images)]
        rest = min(8, len(how.images) - 3)
        if rest < 1:
            parser.error("four images or more are needed")
        cases = [Case(f"{rest} guests from 3", (3,), (rest,))]
    else:
        population = read_workers(how.workers)
        cases = [
            Case("24 render from 6", (6, 0), (24, 0)),
            Case("24 analyse from 6", (0, 6), (0, 24)),
            Case("24 mixed from 3 + 3", (3, 3), (12, 12)),
            Case("24 mixed from 4 + 2", (4, 2), (18, 6)),
            Case("8 render from 3", (3, 0), (8, 0)),
        ]
    print(f"{'case':22}" + "".join(f"{each:>12}" for each in COLUMNS))
    missed = 0
    for case in cases:
        found = run(case, population, how.draws)
        missed += found["mean error"] > AIM_ERROR or not AIM_COVERAGE[0] <= found["coverage"] <= AIM_COVERAGE[1]
        print(f"{case.name:22}" + "".join(f"{found[each]:12.2%}" for each in COLUMNS), flush=True)
    return 1 if how.check and missed else 0


COLUMNS = ("mean error", "bias", "largest", "coverage", "half width", "Chao2", "line")

if __name__ == "__main__":
    sys.exit(main())

"""Sketches of real VMs beside their contents: whether the bounds hold, and where placement by sketches ends.

    python -m bench.sketches [--guests DIR] [--processes DIR] [--each 48] [--draws 100] [--lg-k 12 8]

Guests and processes are those of `bench.population`; DIR keeps their fingerprints. Each draw takes 24 of them, on hosts
of four, under a new secret key: their contents are the same, and their sketches are drawn anew. Counted are how often
the bounds of a sketch, of the union of a host's, of the union of all, and of what a placement saves hold what is true;
"wide" is half their mean width, relative to the truth. Then how many more frames are left when VMs are placed by
sketches than when they are placed by all of their contents.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

import ksm
from bench import population
from ksm.fleet import Host, Placement, Vm, place
from ksm.fleet.sketch import Bounds, bounds, sketch, union
from ksm.keyed import Key, keyed
from ksm.sources import Snapshot

VMS, ON_HOST = 24, 4
LIMIT = Host(name="any").max_page_sharing
Words = npt.NDArray[np.uint64]


class Tally:
    """How often bounds held, and how wide they were."""

    def __init__(self) -> None:
        self.held: list[bool] = []
        self.wide: list[float] = []

    def add(self, found: Bounds, truth: float) -> None:
        self.held.append(truth in found)
        self.wide.append((found.upper - found.lower) / 2 / truth if truth else 0.0)

    def __str__(self) -> str:
        return f"{np.mean(self.held):7.1%} of {len(self.held):5,}, {np.mean(self.wide):5.1%} wide"


def distinct(sets: Sequence[Words]) -> int:
    """Contents of some VMs together."""
    return len(np.unique(np.concatenate([words[:, 0] for words in sets])))


def frames(found: Placement, vms: Sequence[Vm], pages: Sequence[Words]) -> int:
    """What a placement leaves in memory, counted from all pages, zero pages among them."""
    on: dict[str, list[Words]] = {}
    for vm, words in zip(vms, pages, strict=True):
        on.setdefault(found.where[vm.name][0], []).append(words[:, 0])
    copies = (np.unique(np.concatenate(parts), return_counts=True)[1] for parts in on.values())
    return sum(int((-(-each // LIMIT)).sum()) for each in copies)


def draw(
    people: Sequence[Snapshot], lg_k: int, random: np.random.Generator, tallies: dict[str, Tally]
) -> tuple[float, float]:
    """One draw; how many more frames sketches leave than sets, and how much less they save."""
    key = Key.from_bytes(random.bytes(32))
    vms, pages, sets, sketches = [], [], [], []
    room = max(one.pages for one in people) * 4096
    for index, which in enumerate(random.choice(len(people), min(VMS, len(people)), replace=False)):
        one = people[which]
        words = keyed(ksm.Fingerprints(one.words()), key).words
        zero = ksm.Fingerprints(one.words()).zeros()
        own = np.unique(words[~zero], axis=0)
        about = {"kind": one.name.partition("-")[0], "host": f"h{index // ON_HOST}", "ram": room}
        vms.append(
            Vm(name=one.name, pages=len(words), zero_pages=int(zero.sum()), contents=len(own), **about)  # type: ignore[arg-type]
        )
        pages.append(words)
        sets.append(own)
        sketches.append(sketch(own, lg_k))
        tallies["of one VM"].add(bounds(union([sketches[-1]], lg_k)), len(own))
    for first in range(0, len(vms), ON_HOST):
        some = slice(first, first + ON_HOST)
        tallies["of a host's"].add(bounds(union(sketches[some], lg_k)), distinct(sets[some]))
    tallies["of all"].add(bounds(union(sketches, lg_k)), distinct(sets))
    hosts = [Host(name=f"h{index}", ram=room * ON_HOST) for index in range(-(-len(vms) // ON_HOST))]
    by_sketch = place(vms, sketches, hosts)
    by_set = place(vms, sketches, hosts, sets=[words[:, 0] for words in sets])
    mergeable = sum(vm.pages for vm in vms)
    near, best = frames(by_sketch, vms, pages), frames(by_set, vms, pages)
    tallies["of the saving"].add(by_sketch.saved, (mergeable - near) * 4096)
    return near / best - 1, 1 - (mergeable - near) / (mergeable - best)


def row(name: str, people: Sequence[Snapshot], lg_k: int, draws: int) -> None:
    """One population, printed."""
    random = np.random.default_rng(2026)
    tallies = {what: Tally() for what in ("of one VM", "of a host's", "of all", "of the saving")}
    more = np.array([draw(people, lg_k, random, tallies) for _ in range(draws)])
    print(f"{name}, {len(people)} of them, sketches of {1 << lg_k:,} contents")
    for what, tally in tallies.items():
        print(f"    bounds {what:14} hold {tally}")
    print(
        f"    placed by sketches: {more[:, 0].mean():+.2%} frames on average, {more[:, 0].max():+.2%} at most; "
        f"{more[:, 1].mean():.2%} and {more[:, 1].max():.2%} of the saving lost",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guests", type=Path, metavar="DIR", help="boot guests, and keep what they hold here")
    parser.add_argument("--processes", type=Path, metavar="DIR", help="run processes, and keep what they hold here")
    parser.add_argument("--each", type=int, default=48, help="guests and processes of each kind")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--lg-k", type=int, nargs="+", default=[12, 8])
    how = parser.parse_args()
    for name, directory, take in (
        ("guests", how.guests, population.guests),
        ("processes", how.processes, population.processes),
    ):
        if directory:
            people = [one for kind in take(directory, how.each) for one in kind]
            for lg_k in how.lg_k:
                row(name, people, lg_k, how.draws)
    return 0


if __name__ == "__main__":
    sys.exit(main())

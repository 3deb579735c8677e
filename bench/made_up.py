"""Made-up VMs of many kinds, as many as one likes: each draw is new, so how often intervals hold the truth is known.

Real VMs (`bench.population`) are few, and draws of them overlap. These say what a plan's intervals do for memory that
is easy, and for memory made to be hard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

import ksm
from ksm.pages import PAGE_SIZE, zero_words
from ksm.sources import Snapshot

Random = np.random.Generator
Ints = npt.NDArray[np.int64]

COMMON = np.arange(1, 3001)  # contents that all VMs of every kind have
_POOL, _OWN = 1 << 20, 1 << 40  # where numbers of contents start that some have, and that one alone has


def _some(random: Random, chance: npt.NDArray[np.float64], at: int = _POOL) -> Ints:
    """Contents of a pool, each with its chance."""
    return at + np.flatnonzero(random.random(len(chance)) < chance)


def alike(random: Random) -> tuple[Ints, int]:
    """As many contents of its own in each."""
    return COMMON, 1000


def sizes(random: Random) -> tuple[Ints, int]:
    """More of its own in some than in others: a quarter either way."""
    return COMMON, int(1000 * random.lognormal(0, 0.25))


def halves(random: Random) -> tuple[Ints, int]:
    """Contents that every other one has."""
    return np.concatenate((COMMON, _some(random, np.full(2000, 0.5)))), int(random.integers(800, 1200))


def spectrum(random: Random) -> tuple[Ints, int]:
    """Contents that nearly all, most, some and few have, as the packages of a distribution."""
    chance = np.random.default_rng(0).beta(0.4, 0.6, 4000)
    return np.concatenate((COMMON, _some(random, chance))), int(random.integers(500, 900))


def rare(random: Random) -> tuple[Ints, int]:
    """A large pool of contents that each VM has a fiftieth of: alone in few samples, shared in many VMs."""
    return np.concatenate((COMMON, _some(random, np.full(50_000, 0.02)))), 500


def releases(random: Random) -> tuple[Ints, int]:
    """One of four releases, each with contents of its own that come all together."""
    release = int(random.choice(4, p=(0.5, 0.3, 0.15, 0.05)))
    return np.concatenate((COMMON, _POOL + 10_000 * release + np.arange(2000))), int(random.integers(600, 1000))


def buffers(random: Random) -> tuple[Ints, int]:
    """The same few pages over and over, more often than one KSM frame can have, and zero pages."""
    again = np.repeat(_POOL + np.arange(4), random.integers(100, 900, 4))
    zeros = np.zeros(random.integers(0, 2000), np.int64)
    return np.concatenate((COMMON, again, zeros)), int(random.integers(800, 1200))


def outliers(random: Random) -> tuple[Ints, int]:
    """One of ten has five times as much of its own."""
    return COMMON, 5000 if random.random() < 0.1 else 1000


KINDS: Mapping[str, Callable[[Random], tuple[Ints, int]]] = {
    each.__name__: each for each in (alike, sizes, halves, spectrum, rare, releases, buffers, outliers)
}


def vms(kind: str, number: int, random: Random) -> list[Snapshot]:
    """So many of a kind, drawn anew."""
    zero = np.array(zero_words(PAGE_SIZE), np.uint64)
    made = []
    for _ in range(number):
        contents, own = KINDS[kind](random)
        mine = _OWN + int(random.integers(1 << 22)) * (1 << 20) + np.arange(own)
        low = np.concatenate((contents, mine)).astype(np.uint64)
        words = np.stack((low + np.uint64(9), low * np.uint64(0x9E3779B97F4A7C15)), axis=1)
        words[low == 0] = zero
        made.append(Snapshot(kind, PAGE_SIZE, True, True, ((0, ksm.Fingerprints(words)),)))
    return made

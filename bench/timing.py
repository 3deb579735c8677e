"""Paired rounds: every contestant once a round, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Times:
    """What the rounds of one contestant took, in seconds, in their order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: Times) -> float:
        """How many times as long these took as the other's: the median over the rounds that both had."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def timed(run: Callable[[], object]) -> float:
    """The seconds that a call takes, garbage collection apart."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    finally:
        gc.enable()


def paired(runs: Mapping[str, Callable[[], object]], rounds: int, warm: bool = True) -> dict[str, Times]:
    """Time each of the runs once a round; `warm` adds a round first that does not count."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + warm):
        for name, run in runs.items():
            seconds = timed(run)
            if number >= warm:
                took[name].append(seconds)
    return {name: Times(tuple(seconds)) for name, seconds in took.items()}

"""The goals that are measured in this process: against plain reading, against the kernel, and as the work grows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np

import ksm
from bench.kernel import machine, passes
from bench.reader import read
from bench.rows import Row
from bench.timing import Times, paired, timed
from ksm.calibrate import Passes, counters
from ksm.patterns import Pages, filled

Say = Callable[[str], None]


def against_reading(n: int, rounds: int) -> list[Row]:
    """Fingerprints and the index against plain reading of the same pages."""
    pages = filled("guest", n, huge=True)
    runs: dict[str, Callable[[], object]] = {}
    for threads in (1, 2):
        runs[f"read {threads}"] = lambda t=threads: read(pages, t)
        runs[f"ahead {threads}"] = lambda t=threads: read(pages, t, ahead=True)
        runs[f"fingerprint {threads}"] = lambda t=threads: ksm.fingerprint(pages, t)
        runs[f"estimate {threads}"] = lambda t=threads: ksm.estimate([pages], threads=t)
    took = paired(runs, rounds)

    def row(what: str, ours: str, theirs: str, must: float | None = None, aim: float | None = None) -> Row:
        detail = {f"{name}, million pages/s": n / took[name].median / 1e6 for name in (ours, theirs)}
        return Row(what=what, got=took[theirs].over(took[ours]), must=must, aim=aim, unit="of", detail=detail)

    return [
        row("fingerprinting / plain reading, 1 thread", "fingerprint 1", "read 1", 0.90, 1.0),
        row("fingerprinting / plain reading, 2 threads", "fingerprint 2", "read 2", 0.85, 0.95),
        row("fingerprinting / reading with prefetch, 1 thread", "fingerprint 1", "ahead 1"),
        row("fingerprinting / reading with prefetch, 2 threads", "fingerprint 2", "ahead 2"),
        row("fingerprint + index / fingerprinting, 1 thread", "estimate 1", "fingerprint 1", 0.90, 0.96),
        row("fingerprint + index / fingerprinting, 2 threads", "estimate 2", "fingerprint 2", 0.90, 0.96),
    ]


# ---- the kernel --------------------------------------------------------------------------------------


def against_kernel(kind: str, n: int, rounds: int, judged: bool) -> list[Row]:
    """Estimate and simulation against the kernel's ksmd on the same pages; `judged`: against the goals."""
    took: dict[str, list[float]] = {name: [] for name in ("merge", "pass 3", "1", "2", "cold", "still")}
    pages = filled(kind, n)
    reason = None
    for _ in range(rounds):
        found = passes(pages) if reason is None else reason
        for threads in (1, 2):
            took[str(threads)].append(_median(lambda t=threads: ksm.estimate([pages], threads=t)))
        cold, still, after = _simulated(pages)
        took["cold"].append(cold)
        took["still"].append(still)
        if isinstance(found, Passes):
            took["merge"].append(sum(found.seconds[:2]))
            took["pass 3"].append(found.seconds[2])
            reason = None if found.counters == after else "the counters differ from the kernel's"
        else:
            reason = found
    times = {name: Times(tuple(seconds)) for name, seconds in took.items() if seconds}

    def row(what: str, ours: str, theirs: str, must: float, aim: float) -> Row:
        got = None if reason else times[theirs].over(times[ours])
        detail = {f"{name}, s": times[name].median for name in (ours, theirs) if name in times}
        goals = {"must": must, "aim": aim} if judged else {}
        return Row(what=f"{what}, {kind} pages", got=got, why_not=reason, detail=detail, **goals)

    return [
        row("estimate / kernel's two passes, 1 thread", "1", "merge", 25, 31),
        row("estimate / kernel's two passes, 2 threads", "2", "merge", 45, 55),
        row("exact simulation, cold / kernel's two passes", "cold", "merge", 10, 20),
        row("exact simulation, pass over unwritten memory / kernel's", "still", "pass 3", 100, 1000),
    ]


def _median(run: Callable[[], object]) -> float:
    """Of three: next to the kernel's seconds these are short, and easily disturbed."""
    return statistics.median(timed(run) for _ in range(3))


def _simulated(pages: Pages | ksm.Fingerprints) -> tuple[float, float, tuple[dict[str, int], ...]]:
    """Seconds of the first two passes with all that comes before them, and of a third; the counters after each."""
    made: list[ksm.Machine] = []
    cold = timed(lambda: made.append(machine(pages)))
    after = []
    for number in range(3):
        seconds = timed(made[0].ksmd.scan)
        cold += seconds if number < 2 else 0
        after.append(counters(made[0].ksm))
    return cold, seconds, tuple(after)


# ---- growth ------------------------------------------------------------------------------------------


def growth(sizes: Sequence[int], rounds: int) -> list[Row]:
    """Nanoseconds a page of a machine made of fingerprints, cold, as it grows.

    The rounds of one size come in a row: a virtual machine gives freed memory back to its host after a while, and what
    the host makes it wait for to have it again is no cost of ours.
    """
    result = []
    for kind, prints in (("unique", _unique), ("guest", _guest)):
        cost: dict[int, float] = {}
        for n in sizes:
            words = prints(n)
            cost[n] = statistics.median(_simulated(words)[0] for _ in range(rounds)) / n * 1e9
        what = f"cost a page, {_millions(sizes[-1])} / {_millions(sizes[0])} pages, {kind}"
        detail = {f"{_millions(n)} pages, ns a page": ns for n, ns in cost.items()}
        result.append(Row(what=what, got=cost[sizes[-1]] / cost[sizes[0]], must=1.5, aim=1.0, less=True, detail=detail))
    return result


def _unique(n: int) -> ksm.Fingerprints:
    return ksm.Fingerprints(np.random.default_rng(1).integers(0, 2**64, (n, 2), dtype=np.uint64))


def _guest(n: int) -> ksm.Fingerprints:
    """The shares of the guest pages of `ksm.patterns`, as fingerprints."""
    random = np.random.default_rng(1)
    words = random.integers(0, 2**64, (n, 2), dtype=np.uint64)
    words[::3] = words[random.integers(0, 4096, len(words[::3]))]
    words[1::17] = ksm.fingerprint(bytes(4096)).words[0]
    return ksm.Fingerprints(words)


def _millions(n: int) -> str:
    return f"{n / 2**20:g} M"

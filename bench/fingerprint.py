"""Fingerprinting against plain reading of the same pages, side by side: ratios of medians.

    python bench/fingerprint.py [--gib 0.5] [--rounds 9] [--check]

Goals: 0.90 of plain reading with one thread, 0.85 with two (0.95 and 1.0 are possible).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ksm._core import fingerprint_forms
from ksm.pages import fingerprint

PAGE = 4096
BLOCK = 4096 * PAGE
MUST = {1: 0.90, 2: 0.85}


def read(words: np.ndarray, threads: int) -> None:
    """Read every byte: an OR over all words runs at the speed of memory, as a loop in C does."""
    step = BLOCK // 8
    blocks = [words[at : at + step] for at in range(0, len(words), step)]
    if threads == 1:
        for block in blocks:
            np.bitwise_or.reduce(block)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(np.bitwise_or.reduce, blocks))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed")
    how = parser.parse_args()
    n = int(how.gib * 2**30) // PAGE
    words = np.random.default_rng(1).integers(0, 2**64, n * PAGE // 8, dtype=np.uint64)
    pages = words.view(np.uint8).reshape(n, PAGE)
    zeros = np.zeros_like(pages)
    zeros[:] = 0
    runs: dict[str, Callable[[], object]] = {}
    for threads in MUST:
        runs[f"read, {threads} thread"] = lambda threads=threads: read(words, threads)
        runs[f"fingerprint, {threads} thread"] = lambda threads=threads: fingerprint(pages, threads)
    for form in fingerprint_forms():
        runs[f"fingerprint, {form}, 1 thread"] = lambda form=form: fingerprint(pages, 1, variant=form)
    runs["fingerprint, zero pages, 1 thread"] = lambda: fingerprint(zeros, 1)
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(how.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            took[name].append(time.perf_counter() - start)
    missed = 0
    for name, times in took.items():
        threads = int(name.split()[-2])
        ratio = statistics.median(took[f"read, {threads} thread"]) / statistics.median(times)
        goal = MUST[threads] if name == f"fingerprint, {threads} thread" else None
        missed += goal is not None and ratio < goal
        rate = n / statistics.median(times) / 1e6
        print(f"{name:36} {rate:6.2f} million pages/s, {ratio:.3f} of reading" + (f" (must {goal})" if goal else ""))
    return 1 if how.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())

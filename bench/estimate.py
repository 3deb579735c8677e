"""The whole `ksm estimate` command on a file against `xxhash` and a `set` in Python, side by side: ratios of medians.

    python bench/estimate.py [--gib 4] [--rounds 5] [--directory DIR] [--check]

Goals: 2.3 times as fast with one thread, 4 times with two (2.6 and 4.8 are possible). Both start a fresh interpreter,
and read the file from the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import ksm

PAGE = 4096
MUST = {1: 2.3, 2: 4.0}
PLAIN = """
import sys, xxhash
seen = set()
with open(sys.argv[1], "rb") as file:
    while page := file.read(4096):
        seen.add(xxhash.xxh3_128_digest(page))
print(len(seen))
"""
COMMAND = "import sys; from ksm.cli import main; sys.exit(main())"


def write(file: Path, gib: float) -> None:
    """A guest of sorts: a third of its pages twice and more, a sixteenth zero, the others unlike each other."""
    random = np.random.default_rng(1)
    common = random.integers(0, 2**64, (4096, PAGE // 8), dtype=np.uint64)
    with file.open("wb") as out:
        for _ in range(int(gib * 64)):
            pages = random.integers(0, 2**64, (4096, PAGE // 8), dtype=np.uint64)
            pages[::3] = common[::3]
            pages[1::16] = 0
            pages.tofile(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where the file is written")
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed")
    how = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(Path(ksm.__file__).parents[1])}
    with tempfile.TemporaryDirectory(dir=how.directory) as directory:
        file = Path(directory, "guest.raw")
        write(file, how.gib)
        runs = {"xxhash and a set": [sys.executable, "-c", PLAIN, str(file)]}
        for threads in MUST:
            runs[f"ksm estimate, {threads} thread"] = [
                *(sys.executable, "-c", COMMAND, "estimate", str(file), "--threads", str(threads))
            ]
        took: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(how.rounds + 1):  # the first round fills the page cache
            for name, command in runs.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, cwd=directory)
                took[name].append(time.perf_counter() - start)
    plain = statistics.median(took["xxhash and a set"][1:])
    missed = 0
    for name, times in took.items():
        median = statistics.median(times[1:])
        goal = next((MUST[threads] for threads in MUST if name == f"ksm estimate, {threads} thread"), None)
        missed += goal is not None and plain / median < goal
        rate = how.gib * 2**30 / PAGE / median / 1e6
        must = f" (must {goal})" if goal else ""
        print(f"{name:24} {median:6.2f} s, {rate:5.2f} million pages/s, {plain / median:.2f} times as fast{must}")
    return 1 if how.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())

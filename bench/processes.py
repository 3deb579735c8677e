"""The goals that take a process of their own: the whole command, memory, and the time of an import."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import ksm
from bench.rows import Row
from bench.timing import paired
from ksm.patterns import chunks

ROOT = Path(__file__).parents[1]
COMMAND = "import sys; from ksm.cli import main; sys.exit(main())"
PLAIN = """
import sys, xxhash
seen = set()
with open(sys.argv[1], "rb") as file:
    while page := file.read(4096):
        seen.add(xxhash.xxh3_128_digest(page))
print(len(seen))
"""
IMPORT = "import time; a = time.perf_counter(); import {}; print(time.perf_counter() - a)"


def environment() -> dict[str, str]:
    """For processes that shall see this ksm, and these modules."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(ksm.__file__).parents[1]), str(ROOT)))}


def _run(arguments: Sequence[str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=environment()
    )
    return done.stdout


# ---- the whole command -------------------------------------------------------------------------------


def command(n: int, rounds: int, directory: str | None = None) -> list[Row]:
    """`ksm estimate` on a file from the page cache, fresh interpreters on both sides."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        file = Path(place, "guest.raw")
        with file.open("wb") as out:
            for chunk in chunks("guest", n):
                out.write(chunk)
        runs: dict[str, Callable[[], object]] = {"xxhash": lambda: _run(["-c", PLAIN, str(file)])}
        for threads in (1, 2):
            arguments = ["-c", COMMAND, "estimate", str(file), "--threads", str(threads)]
            runs[str(threads)] = lambda arguments=arguments: _run(arguments)
        took = paired(runs, rounds)
    return [
        Row(
            what=f"whole `ksm estimate` of a file / xxhash + set, {threads} thread{'s' if threads > 1 else ''}",
            got=took["xxhash"].over(took[str(threads)]),
            must=must,
            aim=aim,
            detail={"ksm estimate, s": took[str(threads)].median, "xxhash + set, s": took["xxhash"].median},
        )
        for threads, must, aim in ((1, 2.3, 2.6), (2, 4.0, 4.8))
    ]


# ---- memory ------------------------------------------------------------------------------------------


def footprint(n: int) -> list[Row]:
    """Resident bytes a page of the engine beyond the pages themselves, after each stage."""
    result = []
    for kind in ("guest", "unique", "copies"):
        found: dict[str, float] = json.loads(_run(["-m", "bench.footprint", kind, str(n)]))
        goals = {"must": 64.0, "aim": 40.0}
        what = f"engine memory beyond {kind} pages"
        result.append(Row(what=what, got=found["after pass 2"], unit="bytes a page", less=True, detail=found, **goals))
    return result


# ---- import ------------------------------------------------------------------------------------------


def import_time(rounds: int) -> list[Row]:
    """Seconds of `import ksm` in a fresh interpreter, numpy's part of it beside it."""
    took: dict[str, list[float]] = {"ksm": [], "numpy": []}
    for _ in range(rounds + 1):
        for name, seconds in took.items():
            seconds.append(float(_run(["-c", IMPORT.format(name)])))
    medians = {f"import {name}, s": statistics.median(seconds[1:]) for name, seconds in took.items()}
    got = medians["import ksm, s"]
    return [Row(what="import ksm", got=got, must=0.15, aim=0.08, unit="s", less=True, detail=medians)]

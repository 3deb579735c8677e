"""A fleet of generated fingerprints, analysed exactly by a local cluster of two workers: time and memory over its size.

    python -m bench.fleet [--vms 10 100 1000] [--pages 262144] [--hosts-of 10] [--directory DIR] [--picture FILE.svg]

The generator: every VM runs one of 4 systems and one of 8 applications. Of its pages 10 % are zero, 30 % come from the
system's pages (each VM has 90 % of them), 20 % from the application's (70 %), 2 % it has twice, the others are its own.
`saved` is without zero pages. `a read` is to open a file and read a small range of it. `peak` is the sum over this
process, the scheduler and the workers of what they have resident, looked at five times a second; the files may be in
the page cache beside it. Placement: `bench.placement`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.scaling import picture
from ksm.fleet import Vm, analyze, local
from ksm.fleet.files import find, paths, read_range, write_pages
from ksm.fleet.vm import new_id


def generate(directory: Path, vms: int, pages: int, per_host: int, seed: int = 1) -> None:
    """Write the files of so many VMs."""
    random = np.random.default_rng(seed)

    def fresh(number: float) -> np.ndarray:
        return random.integers(0, 2**64, (int(number), 2), dtype=np.uint64)

    systems = [fresh(pages * 0.3 / 0.9) for _ in range(4)]
    applications = [fresh(pages * 0.2 / 0.7) for _ in range(8)]
    for index in range(vms):
        system, application = systems[index % 4], applications[index % 8]
        common = system[random.random(len(system)) < 0.9], application[random.random(len(application)) < 0.7]
        words = np.concatenate([*common, fresh(pages * 0.38)])
        copies = np.ones(len(words), np.int64)
        copies[random.choice(len(words), int(pages * 0.02), replace=False)] = 2
        vm = Vm(
            name=f"vm{index:06}",
            kind=f"system {index % 4}, application {index % 8}",
            host=f"h{index // per_host + 1}",
            ram=pages * 4096,
            id=new_id(),
            pages=int(copies.sum()) + pages // 10,
            zero_pages=pages // 10,
            contents=len(words),
        )
        write_pages(paths(directory, vm.name)[0], vm, words, copies)


class Peak:
    """What this process and its children have resident together, at the most."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done,))
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def _watch(self, done: threading.Event) -> None:
        this = psutil.Process()
        while not done.wait(0.2):
            resident = 0
            for process in (this, *this.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    resident += process.memory_info().rss
            self.bytes = max(self.bytes, resident)


def reading(directory: str, files: int = 100) -> float:
    """Milliseconds to open a file and read a thousandth of its contents, as each range does with each file again."""
    some, took = find([directory], ".pages.parquet")[:files], 0.0
    for first in (0, 1 << 60, 1 << 61, 1 << 62):
        began = time.perf_counter()
        for path in some:
            read_range(path, first, first + (1 << 54))
        took = time.perf_counter() - began
    return took / len(some) * 1000


def analysed(directory: str) -> dict[str, Any]:
    """One fleet in this process and its workers."""
    peak, began = Peak(), time.perf_counter()
    with peak.watched(), local(2) as client:
        found = analyze(directory, client=client)
    total = found.total
    return {
        "read": reading(directory),
        "ranges": found.ranges,
        "vms": total.vms,
        "pages": total.pages,
        "seconds": time.perf_counter() - began,
        "saved": (total.saved_bytes / total.page_size - total.saved_zero) / total.pages,
        "one": (found.one_host.saved_bytes / total.page_size - found.one_host.saved_zero) / total.pages,
        "peak": peak.bytes,
        "complete": found.complete,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vms", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--pages", type=int, default=262144)
    parser.add_argument("--hosts-of", type=int, default=10, help="VMs a host has today")
    parser.add_argument("--directory", help="where files are while they are needed: 3.8 MB a VM")
    parser.add_argument("--picture", help="an SVG or PNG")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    how = parser.parse_args()
    if how.one:
        print(json.dumps(analysed(how.one)))
        return 0
    headings = {
        "VMs": 7,
        "pages": 13,
        "files": 9,
        "ranges": 7,
        "a read": 8,
        "analysed": 10,
        "saved": 8,
        "one host": 9,
        "peak": 10,
    }
    print(*(f"{name:>{width}}" for name, width in headings.items()), flush=True)
    rows = []
    for vms in how.vms:
        with tempfile.TemporaryDirectory(dir=how.directory) as name:
            generate(Path(name), vms, how.pages, how.hosts_of)
            size = sum(path.stat().st_size for path in Path(name).iterdir())
            command = [sys.executable, "-m", "bench.fleet", "--one", name]  # what is resident here is not its
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout)
        rows.append(row)
        print(
            f"{row['vms']:7,} {row['pages']:13,} {size / 1e6:6,.0f} MB {row['ranges']:7,} "
            f"{row['read']:5.2f} ms {row['seconds']:8.1f} s {100 * row['saved']:6.1f} % "
            f"{100 * row['one']:7.1f} % {row['peak'] / 2**20:6,.0f} MiB{'' if row['complete'] else ' (partial)'}",
            flush=True,
        )
    if how.picture and len(rows) > 1:
        picture([(row["vms"], row["seconds"], row["peak"]) for row in rows], "analyse", how.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())

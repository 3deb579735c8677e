"""A fleet of generated fingerprints, analysed exactly and placed: time and memory over its size.

    python -m bench.fleet [--vms 10 100] [--pages 262144] [--hosts-of 10] [--directory DIR] [--skip-place]

The generator: every VM runs one of 4 systems and one of 8 applications. Of its pages 10 % are zero, 30 % come from the
system's pages (each VM has 90 % of them), 20 % from the application's (70 %), 2 % it has twice, the others are its own.
The saving is without zero pages, as VMs stand and as `place` puts them.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ksm.fleet import Host, Vm, analyze, local, place, read_fleet
from ksm.fleet.files import paths, write_pages, write_sketches
from ksm.fleet.sketch import sketch
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
        pages_path, sketch_path = paths(directory, vm.name)
        write_pages(pages_path, vm, words, copies)
        write_sketches(sketch_path, [vm], [sketch(words)])


def peak() -> float:
    """MiB of this process and of the largest worker that has ended."""
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vms", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--pages", type=int, default=262144)
    parser.add_argument("--hosts-of", type=int, default=10, help="VMs a host has today")
    parser.add_argument("--directory")
    parser.add_argument("--skip-place", action="store_true")
    how = parser.parse_args()
    headings = {"VMs": 7, "pages": 13, "generated": 10, "analysed": 10, "saved": 7, "placed": 10, "then": 7, "peak": 10}
    print(*(f"{name:>{width}}" for name, width in headings.items()))
    for vms in how.vms:
        with tempfile.TemporaryDirectory(dir=how.directory) as name:
            times = [time.perf_counter()]
            generate(Path(name), vms, how.pages, how.hosts_of)
            times.append(time.perf_counter())
            with local(2) as client:
                found = analyze(name, client=client)
            times.append(time.perf_counter())
            total = found.total
            line = f"{vms:7,} {total.pages:13,} {times[1] - times[0]:8.1f} s {times[2] - times[1]:8.1f} s "
            now = 100 * (total.saved_bytes / 4096 - total.saved_zero) / total.pages
            line += f"{now:5.1f} % "
            if not how.skip_place:
                count = -(-vms // how.hosts_of)
                hosts = [Host(name=f"h{i + 1}", ram=(how.hosts_of + 1) * how.pages * 4096) for i in range(count)]
                placed = place(*read_fleet([name]), hosts)
                times.append(time.perf_counter())
                share = placed.saved.estimate / total.pages / 40.96
                line += f"{times[3] - times[2]:8.1f} s {share:5.1f} % "
            print(f"{line}{peak():6,.0f} MiB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

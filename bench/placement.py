"""Placement by sharing beside the baselines, near the optimum, and over the size of the fleet.

    python -m bench.placement [--methods 2400] [--optimum 12] [--sizes 1000 10000 100000] [--picture FILE.svg]

Fleets are generated (`bench.generated` says how). `saved` is the part of all pages that merging saves by the sketches'
estimate, zero pages included; each size runs in a process of its own, whose peak memory has the sketches in it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.generated import KINDS, Fleet
from bench.scaling import picture
from ksm.fleet import Placement, PlacementError, place
from ksm.fleet.packing import Packing
from ksm.fleet.place import Method
from ksm.fleet.sample import Sample

METHODS: tuple[Method, ...] = ("today", "random", "decreasing", "class", "sharing")


def measured(fleet: Fleet, method: Method, **options: Any) -> dict[str, Any]:
    """One placement: how long it took and what it came to."""
    began = time.perf_counter()
    try:
        found = place(fleet.vms, fleet.sketches, fleet.hosts, method, **options)
    except PlacementError as error:
        return {"method": method, "why": str(error)}
    return {
        "method": method,
        "seconds": time.perf_counter() - began,
        "saved": found.saved.estimate / fleet.pages / fleet.vms[0].page_size,
        "lower": found.saved.lower / fleet.pages / fleet.vms[0].page_size,
        "upper": found.saved.upper / fleet.pages / fleet.vms[0].page_size,
        "hosts": found.hosts_used,
        "freed": found.hosts_freed,
        "moves": len(found.moves),
        "waiting": sum(not move.fits for move in found.moves),
    }


def one_size(kind: str, number: int) -> dict[str, Any]:
    """A size of fleet in this process: the baseline that knows classes, and sharing."""
    fleet = KINDS[kind](number)
    row: dict[str, Any] = {"vms": number, "sketches": sum(map(len, fleet.sketches))}
    for method in ("today", "class", "sharing"):
        row[method] = measured(fleet, method)
    return row | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def sizes(kind: str, numbers: list[int]) -> list[dict[str, Any]]:
    """Each size in a process of its own."""
    rows = []
    for number in numbers:
        command = [sys.executable, "-m", "bench.placement", "--one", kind, str(number)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return rows


def optimum(kind: str, number: int, draws: int = 5) -> list[str]:
    """Small fleets by sharing and exactly: how much more the heuristic leaves, of the contents that both look at."""
    gaps, proven = [], 0
    for draw in range(draws):
        fleet = KINDS[kind](number, per_host=4, lg_k=8, seed=draw + 10)
        best = place(fleet.vms, fleet.sketches, fleet.hosts, "exact", seconds=60.0)
        near = left(fleet, place(fleet.vms, fleet.sketches, fleet.hosts))
        proven += bool(best.proven)
        assert best.best_contents is not None
        gaps.append(near / best.best_contents - 1)
    return [kind, f"{proven} of {draws}", f"{100 * sum(gaps) / draws:.2f} %", f"{100 * max(gaps):.2f} %"]


def left(fleet: Fleet, found: Placement) -> float:
    """Contents that a placement leaves, by the sample."""
    packing = Packing(fleet.vms, fleet.hosts, Sample.of(fleet.sketches))
    number = {(fleet.hosts[bin.host].name, bin.node): index for index, bin in enumerate(packing.bins)}
    for index, vm in enumerate(fleet.vms):
        packing.put(index, number[found.where[vm.name]])
    return packing.contents()


def table(title: str, headings: list[str], rows: list[list[str]]) -> None:
    found = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        found.add_column(heading, justify="right" if index > 1 or heading == "VMs" else "left")
    for row in rows:
        found.add_row(*row)
    Console(width=130).print(found)
    print(flush=True)


def methods(kind: str, number: int) -> list[list[str]]:
    fleet = KINDS[kind](number)
    rows = []
    for method in METHODS:
        got = measured(fleet, method)
        if "why" in got:
            rows.append([kind, method, got["why"]])
            continue
        between = f"{100 * got['lower']:.1f} to {100 * got['upper']:.1f}"
        figures = [f"{100 * got['saved']:.1f} %", between, got["hosts"], got["freed"], got["moves"], got["waiting"]]
        rows.append([kind, method, *(f"{one:,}" if isinstance(one, int) else one for one in figures)])
        rows[-1].append(f"{got['seconds']:.1f} s")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=int, default=2400, help="VMs of the fleets for the table of methods; 0: none")
    parser.add_argument("--optimum", type=int, default=12, help="VMs of the fleets for the exact model; 0: none")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1000, 10000, 100000])
    parser.add_argument("--kind", choices=KINDS, default="desktops", help="of fleet, for --sizes")
    parser.add_argument("--picture", help="of --sizes: an SVG or PNG")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    how = parser.parse_args()
    if how.one:
        print(json.dumps(one_size(how.one[0], int(how.one[1]))))
        return 0
    if how.methods:
        headings = ["fleet", "placement", "saved", "between", "hosts", "freed", "moves", "wait", "time"]
        rows = [row for kind in KINDS for row in methods(kind, how.methods)]
        table(f"{how.methods:,} VMs", headings, rows)
    if how.optimum:
        headings = ["fleet", "proven", "leaves more than the optimum by", "at most"]
        table(f"{how.optimum} VMs, five fleets of each kind", headings, [optimum(kind, how.optimum) for kind in KINDS])
    if how.sizes:
        found = sizes(how.kind, how.sizes)
        rows = [
            [
                f"{row['vms']:,}",
                f"{row['sketches'] / 1e6:,.0f} MB",
                *(f"{100 * row[name]['saved']:.1f} %" for name in ("today", "class", "sharing")),
                f"{row['sharing']['seconds']:,.1f} s",
                f"{row['peak'] / 2**20:,.0f} MiB",
            ]
            for row in found
        ]
        table(
            f"{how.kind}, over the size of the fleet",
            ["VMs", "sketches", "today", "class", "sharing", "time", "peak"],
            rows,
        )
        if how.picture:
            picture([(row["vms"], row["sharing"]["seconds"], row["peak"]) for row in found], "place", how.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The same figures from everywhere: one fleet in one process, on a local cluster, on three hosts, and with faults.

    python -m bench.fleet_equal [--vms 12] [--scale 20] [--markdown]

Needs root: the hosts are network namespaces, each with a disk of its own. `digest` names all figures of a run (of every
host, VM, class and content, not only those shown); `as one process` says whether they are those that one process finds
in the files that count. tests/test_fleet_equal.py is the same with a small fleet.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.equal import Run, digest, runs
from tests.fleets import can_make_namespaces

HEADINGS = ("run", "VMs", "pages", "contents", "sharing", "saved", "on one host", "digest", "as one process", "flagged")
NUMBERS = HEADINGS[1:7]


def row(run: Run) -> list[str]:
    """What a run found."""
    answer = run.answer
    total = answer.total
    sizes = [f"{amount / 2**20:,.1f} MiB" for amount in (total.saved_bytes, answer.one_host.saved_bytes)]
    numbers = [f"{number:,}" for number in (total.vms, total.pages, answer.contents, total.pages_sharing)]
    return [run.how, *numbers, *sizes, digest(answer), "yes" if run.equal else "NO", run.flagged or "-"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vms", type=int, default=12)
    parser.add_argument("--scale", type=int, default=20, help="times 300 pages and more a VM")
    parser.add_argument("--markdown", action="store_true")
    how = parser.parse_args()
    if why := can_make_namespaces():
        raise SystemExit(f"bench.fleet_equal: {why}")
    with tempfile.TemporaryDirectory(prefix="ksm-equal-") as name:
        found = list(runs(Path(name), how.vms, how.scale))
    rows = [row(run) for run in found]
    if how.markdown:
        print(
            f"| {' | '.join(HEADINGS)} |\n|{'|'.join(' --- ' if i in (0, 7, 8, 9) else ' ---: ' for i in range(10))}|"
        )
        for cells in rows:
            print(f"| {' | '.join(cells)} |")
    else:
        table = Table(*HEADINGS, box=None, pad_edge=False, header_style="bold")
        for cells in rows:
            table.add_row(*cells)
        Console(width=220).print(table)
    return 0 if all(run.equal for run in found) else 1


if __name__ == "__main__":
    sys.exit(main())

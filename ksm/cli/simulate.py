"""`ksm simulate`: KSM's counters over simulated time, and when the saving is there."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TextIO

import click
from rich.table import Table

from ksm.cli.common import binary, clock, duration, load, out, print_json, progress, source_arguments
from ksm.estimate import Estimate, estimate, snapshots
from ksm.machine import Machine

SHARES = (50, 90, 99)  # percent of the settled saving
_FINER = 10  # looks for those between two samples
_MOST_SAMPLES = 1_000_000
_MOST_ROWS = 24


@dataclass(frozen=True, slots=True)
class Sample:
    """The counters at one moment."""

    seconds: float
    full_scans: int
    pages_scanned: int | None
    pages_skipped: int | None
    pages_shared: int
    pages_sharing: int
    pages_unshared: int
    pages_volatile: int
    ksm_zero_pages: int | None
    general_profit: int
    saved_bytes: int
    ksmd_cpu_seconds: float

    @classmethod
    def of(cls, machine: Machine) -> Sample:
        """What a machine shows now.

        >>> Sample.of(Machine()).pages_sharing
        0
        """
        now = machine.ksm.snapshot()
        return cls(
            machine.now,
            now.full_scans,
            now.pages_scanned,
            now.pages_skipped,
            now.pages_shared,
            now.pages_sharing,
            now.pages_unshared,
            now.pages_volatile,
            now.ksm_zero_pages,
            now.profit,
            now.saved_bytes,
            round(machine.ksmd.cpu_seconds, 6),
        )


@dataclass(frozen=True, slots=True)
class Run:
    """A simulation: its samples, and when which share of the settled saving was there (None: not by the end)."""

    settled: Estimate
    samples: tuple[Sample, ...]
    reached: dict[int, float | None]
    tunables: dict[str, int | bool | str]

    @property
    def cpu_share(self) -> float:
        """ksmd's share of one CPU over the whole time."""
        last = self.samples[-1]
        return last.ksmd_cpu_seconds / last.seconds if last.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "settled": self.settled.to_dict(),
            "reached_seconds": {str(share): when for share, when in self.reached.items()},
            "ksmd_cpu_share": self.cpu_share,
            "tunables": self.tunables,
            "samples": [asdict(sample) for sample in self.samples],
        }


@click.command()
@source_arguments
@click.option("--for", "seconds", default="10m", callback=duration, show_default=True, help="Simulated time.")
@click.option("--every", default="10s", callback=duration, show_default=True, help="Time between two samples.")
@click.option("--pages-to-scan", type=click.IntRange(1), default=1000, show_default=True, help="The tunable.")
@click.option("--sleep-millisecs", type=click.IntRange(0), default=20, show_default=True, help="The tunable.")
@click.option("--smart-scan/--no-smart-scan", default=None, help="The tunable.  [default: the kernel's]")
@click.option("--kernel", default="6.18", show_default=True, help="Whose rules and defaults.")
@click.option("--csv", "csv_file", metavar="FILE", help="Write the samples as CSV; - is stdout.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def command(
    sources: tuple[str, ...],
    csv_file: str | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """How KSM gets there: its counters over simulated time on these sources, one process each.

    What the pages hold stands still, and all of it is mergeable from the start. When 50, 90 and 99 % of the settled
    saving are there is looked at ten times between two samples. ksmd's CPU time follows a cost model.
    """
    if csv_file == "-" and as_json:
        raise click.UsageError("--csv - and --json both want stdout")
    if csv_file not in (None, "-") and not force and os.path.lexists(str(csv_file)):
        raise click.UsageError(f"{csv_file} exists; --force overwrites it")
    found = simulate(sources, quiet=as_json, **options)
    if csv_file == "-":
        write_csv(sys.stdout, found.samples)
        return
    if csv_file is not None:
        with open(csv_file, "w", newline="", encoding="utf-8") as file:
            write_csv(file, found.samples)
    if as_json:
        print_json(found.to_dict())
        return
    console = out()
    console.print(table(found.samples))
    for line in sentences(found):
        console.print(line, soft_wrap=True)


def simulate(
    sources: Sequence[Any],
    *,
    seconds: float,
    every: float,
    max_page_sharing: int = 256,
    use_zero_pages: bool = False,
    zeros: Any = "merge",
    nodes: Sequence[int] | None = None,
    merge_across_nodes: bool = True,
    marked_only: bool = False,
    page_size: int | None = None,
    threads: int | None = None,
    pages_to_scan: int = 1000,
    sleep_millisecs: int = 20,
    smart_scan: bool | None = None,
    kernel: str = "6.18",
    quiet: bool = True,
) -> Run:
    """Read the sources once, put them into a machine, and let time pass.

    >>> run = simulate([b"x" * 8192], seconds=1, every=0.5)
    >>> run.samples[-1].pages_sharing, len(run.samples)
    (1, 3)
    """
    if seconds / every > _MOST_SAMPLES:
        raise ValueError(f"{seconds / every:,.0f} samples are too many; --every can be {seconds / _MOST_SAMPLES:g} s")
    if nodes is not None and len(nodes) != len(sources):
        raise ValueError(f"{len(nodes)} nodes for {len(sources)} sources")
    machine = Machine(nodes=max(nodes or [0]) + 1, kernel=kernel, page_size=page_size or 4096)
    machine.ksm.max_page_sharing = max_page_sharing
    machine.ksm.use_zero_pages = use_zero_pages
    machine.ksm.merge_across_nodes = merge_across_nodes
    machine.ksm.pages_to_scan = pages_to_scan
    machine.ksm.sleep_millisecs = sleep_millisecs
    if smart_scan is not None:
        machine.ksm.smart_scan = smart_scan
    with progress("fingerprinting", quiet) as show:
        taken = snapshots(sources, page_size, marked_only, threads, show)
    settled = estimate(
        taken, max_page_sharing, use_zero_pages, zeros, nodes=nodes, merge_across_nodes=merge_across_nodes
    )
    if zeros == "absent":
        taken = [snapshot if snapshot.anonymous_known else snapshot.without_zeros() for snapshot in taken]
    load(machine, taken, nodes)
    counted = settled.pages_sharing + (settled.ksm_zero_pages if machine.kernel.counts_zero_pages else 0)
    machine.ksm.run = 1
    with progress("simulating", quiet) as show:
        samples, reached = _follow(machine, seconds, every, counted, show)
    return Run(settled, tuple(samples), reached, machine.ksm.tunables())


def _follow(
    machine: Machine, seconds: float, every: float, goal: int, show: Callable[[int, int], None]
) -> tuple[list[Sample], dict[int, float | None]]:
    samples = [Sample.of(machine)]
    reached: dict[int, float | None] = dict.fromkeys(SHARES)
    steps = max(1, -(-round(seconds * 1e9) // round(every * 1e9)))
    for step in range(1, steps + 1):
        start, end = samples[-1].seconds, min(seconds, step * every)
        for part in range(1, _FINER + 1):
            machine.run_for(max(0.0, start + (end - start) * part / _FINER - machine.now))
            saved = machine.ksm.snapshot().saved_pages
            for share in SHARES:
                if reached[share] is None and saved * 100 >= share * goal:
                    reached[share] = machine.now
        samples.append(Sample.of(machine))
        show(step, steps)
    return samples, reached


def write_csv(file: TextIO, samples: Iterable[Sample]) -> None:
    """The samples, a row each; the columns have the counters' names.

    >>> write_csv(sys.stdout, [])
    seconds,full_scans,pages_scanned,pages_skipped,pages_shared,pages_sharing,pages_unshared,pages_volatile,\
ksm_zero_pages,general_profit,saved_bytes,ksmd_cpu_seconds
    """
    names = [field.name for field in fields(Sample)]
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(sample) for sample in samples)


def table(samples: Sequence[Sample]) -> Table:
    """The samples, or as many of them as people read.

    >>> table([]).row_count
    0
    """
    result = Table(box=None, pad_edge=False, header_style="bold")
    headings = ("time", "passes", "shared", "sharing", "unshared", "volatile", "zero-merged", "saved", "ksmd CPU")
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    stride = -(-len(samples) // _MOST_ROWS) or 1
    for sample in [*samples[:-1:stride], *samples[-1:]]:
        result.add_row(
            clock(sample.seconds),
            f"{sample.full_scans:,}",
            f"{sample.pages_shared:,}",
            f"{sample.pages_sharing:,}",
            f"{sample.pages_unshared:,}",
            f"{sample.pages_volatile:,}",
            "-" if sample.ksm_zero_pages is None else f"{sample.ksm_zero_pages:,}",
            binary(sample.saved_bytes),
            f"{sample.ksmd_cpu_seconds:.2f} s",
        )
    return result


def sentences(found: Run) -> list[str]:
    """The answer in words.

    >>> sentences(simulate([b"x" * 8192], seconds=1, every=0.5))[0]
    'Settled, KSM saves 4.0 KiB; 50 % of that are there after 0.05 s, 90 % after 0.05 s, 99 % after 0.05 s.'
    """
    last = found.samples[-1]
    goal = found.settled.saved_bytes
    whens = [
        f"{share} %{' of that are there' if share == SHARES[0] else ''} "
        + ("later than this simulation went" if when is None else f"after {clock(when)}")
        for share, when in found.reached.items()
    ]
    result = [
        f"Settled, KSM saves {binary(goal)}; {', '.join(whens)}."
        if goal
        else "There is nothing to save: no two of these pages are equal."
    ]
    result.append(f"ksmd takes {100 * found.cpu_share:.2f} % of a CPU over {clock(last.seconds)}, by the cost model.")
    return [*result, *("Assumed: " + line[0].lower() + line[1:] for line in found.settled.assumed)]

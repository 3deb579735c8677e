"""`ksm simulate`: KSM's counters over simulated time, and when the saving is there."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any, TextIO

import click
from rich.table import Table

from ksm.cli.common import binary, clock, duration, duration_or_none, out, print_json, progress, source_arguments
from ksm.cost import CostModel
from ksm.estimate import snapshots
from ksm.simulation import SHARES, Sample, Simulation, simulate
from ksm.sources import Snapshot
from ksm.trace import Trace, is_trace

_MOST_ROWS = 24


@click.command()
@source_arguments
@click.option(
    "--for", "seconds", callback=duration_or_none, help="Simulated time.  [default: 10m, or as long as a trace is]"
)
@click.option("--every", default="10s", callback=duration, show_default=True, help="Time between two samples.")
@click.option("--pages-to-scan", type=click.IntRange(1), default=1000, show_default=True, help="The tunable.")
@click.option("--sleep-millisecs", type=click.IntRange(0), default=20, show_default=True, help="The tunable.")
@click.option("--smart-scan/--no-smart-scan", default=None, help="The tunable.  [default: the kernel's]")
@click.option("--kernel", default="6.18", show_default=True, help="Whose rules and defaults.")
@click.option(
    "--cost-model",
    "cost",
    metavar="FILE",
    help="From ksm calibrate, or built-in.  [default: this host's, if any]",
)
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

    The pages of sources stand still, and all of them are mergeable from the start. A trace that ksm record made is
    replayed: its pages change as they did. When 50, 90 and 99 % of the settled saving are there is looked at ten times
    between two samples. ksmd's CPU time follows a cost model.
    """
    if csv_file == "-" and as_json:
        raise click.UsageError("--csv - and --json both want stdout")
    if csv_file not in (None, "-") and not force and os.path.lexists(str(csv_file)):
        raise click.UsageError(f"{csv_file} exists; --force overwrites it")
    found = run(sources, quiet=as_json, **options)
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


def run(
    sources: Sequence[str],
    *,
    seconds: float | None,
    every: float,
    quiet: bool,
    kernel: str,
    zeros: Any,
    nodes: Sequence[int] | None,
    marked_only: bool,
    page_size: int | None,
    threads: int | None,
    smart_scan: bool | None,
    cost: str | None = None,
    **tunables: int | bool,
) -> Simulation:
    """Simulate sources or a trace with a bar for each part of it.

    >>> options = dict.fromkeys(("nodes", "page_size", "threads", "smart_scan"))
    >>> with open("two.raw", "wb") as file:
    ...     _ = file.write(b"x" * 8192)
    >>> options |= {"seconds": 1, "every": 1, "kernel": "6.18", "zeros": "merge", "marked_only": False, "quiet": True}
    >>> run(["two.raw"], **options).samples[-1].pages_sharing
    1
    """
    if smart_scan is not None:
        tunables["smart_scan"] = smart_scan
    found = given(sources, quiet, nodes, page_size, marked_only, threads)
    with progress("simulating", quiet) as show:
        return simulate(
            found,
            seconds=length(found, seconds),
            every=every,
            tunables=tunables,
            kernel=kernel,
            zeros=zeros,
            nodes=nodes,
            cost=cost_model(cost),
            progress=show,
        )


def given(
    sources: Sequence[str],
    quiet: bool = True,
    nodes: Sequence[int] | None = None,
    page_size: int | None = None,
    marked_only: bool = False,
    threads: int | None = None,
) -> list[Snapshot] | Trace:
    """The sources, read; or the trace that is the only one of them.

    >>> given(["self"])[0].name
    'self'
    """
    traces = [source for source in sources if is_trace(source)]
    if not traces:
        if nodes is not None and len(nodes) != len(sources):
            raise ValueError(f"{len(nodes)} nodes for {len(sources)} sources")
        with progress("fingerprinting", quiet) as show:
            return snapshots(sources, page_size, marked_only, threads, show)
    if len(sources) > 1:
        raise click.UsageError(f"{traces[0]} is a trace, which is replayed alone")
    if marked_only or page_size is not None or threads is not None:
        raise click.UsageError(
            "--marked-only, --page-size and --threads are for sources; a trace has what was recorded"
        )
    return Trace(traces[0])


def cost_model(given: str | None) -> CostModel:
    """The one of a file, the built-in one, or by default what was measured on this host.

    >>> cost_model("built-in") == CostModel()
    True
    """
    if given is None:
        return CostModel.of_host()
    return CostModel() if given == "built-in" else CostModel.load(given)


def length(found: list[Snapshot] | Trace, seconds: float | None) -> float:
    """How long to simulate: what was asked for; else a trace's own length, and ten minutes of sources.

    >>> length([], None)
    600.0
    """
    if seconds is not None:
        return seconds
    return max(round(found.duration, 1), 1.0) if isinstance(found, Trace) else 600.0


def write_csv(file: TextIO, samples: Iterable[Sample]) -> None:
    """The samples, a row each; the columns have the counters' names.

    >>> write_csv(sys.stdout, [])
    seconds,full_scans,pages_scanned,pages_skipped,pages_shared,pages_sharing,pages_unshared,pages_volatile,\
ksm_zero_pages,general_profit,saved_bytes,ksmd_cpu_seconds,cow_ksm,settled_bytes
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
    moved = len({sample.settled_bytes for sample in samples}) > 1
    headings = ["time", "passes", "shared", "sharing", "unshared", "volatile", "zero-merged", "saved", "ksmd CPU"]
    for heading in headings + (["CoW breaks", "would settle at"] if moved else []):
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
            *([f"{sample.cow_ksm or 0:,}", binary(sample.settled_bytes)] if moved else []),
        )
    return result


def sentences(found: Simulation) -> list[str]:
    """The answer in words.

    >>> sentences(simulate([b"x" * 8192], seconds=1, every=0.5))[0]
    'Settled, KSM saves 4.0 KiB; 50 % of that are there after 0.05 s, 90 % after 0.05 s, 99 % after 0.05 s.'
    """
    last = found.samples[-1]
    moved = len({sample.settled_bytes for sample in found.samples}) > 1
    goal = last.settled_bytes if moved or found.sample_of > 1 else found.settled.saved_bytes
    whens = [
        f"{share} %{' of that are there' if share == SHARES[0] and not moved else ''} "
        + ("later than this simulation went" if when is None else f"after {clock(when)}")
        for share, when in found.reached.items()
    ]
    if not goal:
        result = ["There is nothing to save: no two of these pages are equal."]
    elif moved:
        result = [
            f"Memory as it is at the end settles at {binary(goal)}. Of each moment's own goal: {', '.join(whens)}.",
            f"On average {binary(found.mean_saved_bytes)} are saved; {last.cow_ksm or 0:,} writes broke the sharing.",
        ]
    else:
        result = [f"Settled, KSM saves {binary(goal)}; {', '.join(whens)}."]
    result.append(
        f"ksmd takes {100 * found.cpu_share:.2f} % of a CPU over {clock(last.seconds)}, "
        f"by the cost model ({found.cost.origin})."
    )
    if found.sample_of > 1:
        result.append(
            f"Extrapolated from a sample of one content in {found.sample_of:,}: the settled saving is "
            f"{binary(goal)} ± {binary(found.settled_error_bytes)} (one standard error, from sampling alone)."
        )
    assumed = found.settled.assumed
    if moved:
        assumed = ("All these pages are mergeable, and change when the trace saw that they had.", *assumed[1:])
    return [*result, *("Assumed: " + line[0].lower() + line[1:] for line in assumed)]

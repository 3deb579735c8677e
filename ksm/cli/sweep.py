"""`ksm sweep`: which tunables bring the saving how soon, and at what cost."""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

import click
from rich.table import Table

from ksm.cli.common import binary, clock, duration_or_none, out, print_json, progress, read_options
from ksm.cli.simulate import given, length
from ksm.sweep import COLUMNS, Point, Sweep, sweep


def values(ctx: click.Context | None, param: click.Parameter | None, value: str | None) -> list[int] | None:
    """The values to try from 100,1000: the callback of an option.

    >>> values(None, None, "100,1000")
    [100, 1000]
    """
    if value is None:
        return None
    if not re.fullmatch(r"\d{1,19}(,\d{1,19})*", value, re.ASCII):
        raise click.BadParameter(f"{value!r} is not a list of values, such as 100,1000", ctx, param)
    return list(dict.fromkeys(int(part) for part in value.split(",")))


def others(ctx: click.Context | None, param: click.Parameter | None, value: tuple[str, ...]) -> dict[str, list[str]]:
    """Tunables and their values from NAME=1,2: the callback of an option.

    >>> others(None, None, ("advisor_mode=none,scan-time",))
    {'advisor_mode': ['none', 'scan-time']}
    """
    found: dict[str, list[str]] = {}
    for text in value:
        name, equals, listed = text.partition("=")
        if not equals or not name or not all(listed.split(",")):
            raise click.BadParameter(f"{text!r} is not a tunable and its values, such as smart_scan=0,1", ctx, param)
        if name in found:
            raise click.BadParameter(f"{name} is there twice", ctx, param)
        found[name] = list(dict.fromkeys(listed.split(",")))
    return found


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...|TRACE")
@click.option("--pages-to-scan", callback=values, metavar="N,N,...", help="Values to try.  [default: 100,1000,10000]")
@click.option("--sleep-millisecs", callback=values, metavar="N,N,...", help="Values to try.  [default: 20]")
@click.option("--set", "more", callback=others, multiple=True, metavar="NAME=V,V,...", help="Of any other tunable.")
@click.option(
    "--for", "seconds", callback=duration_or_none, help="Simulated time.  [default: 10m, or as long as a trace is]"
)
@click.option("--every", callback=duration_or_none, help="Time between two samples.  [default: 600 in all]")
@click.option("--kernel", default="6.18", show_default=True, help="Whose rules and defaults.")
@read_options
@click.option("--jobs", type=click.IntRange(1), default=None, help="Processes at a time.  [default: one a CPU]")
@click.option("--csv", "csv_file", metavar="FILE", help="Write the table as CSV; - is stdout.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def command(sources: tuple[str, ...], csv_file: str | None, force: bool, as_json: bool, **options: Any) -> None:
    """Simulate the same memory under every combination of tunables, in parallel processes.

    SOURCES stand still, a TRACE that ksm record made is replayed. For each combination: when 90 % of the settled saving
    are there, the saving at the end and on average, and ksmd's CPU time by the cost model.
    """
    if csv_file == "-" and as_json:
        raise click.UsageError("--csv - and --json both want stdout")
    if csv_file not in (None, "-") and not force and os.path.lexists(str(csv_file)):
        raise click.UsageError(f"{csv_file} exists; --force overwrites it")
    found = run(sources, quiet=as_json, **options)
    if csv_file == "-":
        write_csv(sys.stdout, found.points)
        return
    if csv_file is not None:
        with open(csv_file, "w", newline="", encoding="utf-8") as file:
            write_csv(file, found.points)
    if as_json:
        print_json(found.to_dict())
        return
    console = out()
    console.print(table(found))
    for line in sentences(found):
        console.print(line, soft_wrap=True)


def run(
    sources: Sequence[str],
    *,
    pages_to_scan: list[int] | None,
    sleep_millisecs: list[int] | None,
    more: dict[str, list[str]],
    seconds: float | None,
    quiet: bool,
    **options: Any,
) -> Sweep:
    """Sweep with a bar.

    >>> with open("two.raw", "wb") as file:
    ...     _ = file.write(b"x" * 8192)
    >>> options = {"sleep_millisecs": [20], "more": {}, "seconds": 1, "quiet": True, "every": 1}
    >>> len(run(["two.raw"], pages_to_scan=[1, 2], **options).points)
    2
    """
    choices: dict[str, Any] = {
        "pages_to_scan": pages_to_scan or [100, 1000, 10_000],
        "sleep_millisecs": sleep_millisecs or [20],
    }
    twice = choices.keys() & more.keys()
    if twice:
        raise click.UsageError(f"{', '.join(sorted(twice))} has an option of its own")
    reading = {name: options.pop(name, None) for name in ("page_size", "threads")}
    what = given(sources, quiet, options.get("nodes"), marked_only=options.pop("marked_only", False), **reading)
    with progress("simulating", quiet) as show:
        return sweep(what, choices | more, seconds=length(what, seconds), progress=show, **options)


def write_csv(file: TextIO, points: Iterable[Point]) -> None:
    """The points, a row each: the tunables, then what they came to.

    >>> import io
    >>> write_csv(io.StringIO(), [])
    """
    rows = [point.to_dict() for point in points]
    writer = csv.DictWriter(file, list(rows[0]) if rows else list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def table(found: Sweep) -> Table:
    """A row for each combination; what all have in common is left out.

    >>> from ksm.sweep import sweep
    >>> table(sweep([b"x" * 8192], {"pages_to_scan": [1, 2]}, seconds=1, every=0.5)).row_count
    2
    """
    result = Table(box=None, pad_edge=False, header_style="bold")
    varied = [
        name
        for name in (found.points[0].tunables if found.points else ())
        if len({point.tunables[name] for point in found.points}) > 1
    ] or list(found.points[0].tunables)
    moved = any(point.cow_ksm for point in found.points)
    results = ["time to 90 %", "saved", "on average", "settles at", "ksmd CPU", "of a CPU", "passes"]
    for heading in [*varied, *results, *(["CoW breaks"] if moved else [])]:
        result.add_column(heading, justify="right", no_wrap=True)
    best = found.best()
    for point in found.points:
        result.add_row(
            *(str(point.tunables[name]) for name in varied),
            "-" if point.seconds_to_90 is None else clock(point.seconds_to_90),
            binary(point.saved_bytes),
            binary(point.mean_saved_bytes),
            binary(point.settled_bytes),
            f"{point.ksmd_cpu_seconds:.2f} s",
            f"{100 * point.ksmd_cpu_share:.2f} %",
            f"{point.full_scans:,}",
            *([f"{point.cow_ksm or 0:,}"] if moved else []),
            style="bold" if point is best else None,
        )
    return result


def sentences(found: Sweep) -> list[str]:
    """The answer in words.

    >>> from ksm.sweep import sweep
    >>> sentences(sweep([b"x" * 40960], {"pages_to_scan": [1, 100]}, seconds=1, every=0.1))[0]
    'Over 1 s, pages_to_scan 100 is the cheapest within 5 % of the best average saving: 34.2 KiB, for 0.01 % of a CPU.'
    """
    best = found.best()
    named = ", ".join(f"{name} {value}" for name, value in best.tunables.items())
    lines = [
        f"Over {clock(found.seconds)}, {named} is the cheapest within 5 % of the best average saving: "
        f"{binary(best.mean_saved_bytes)}, for {100 * best.ksmd_cpu_share:.2f} % of a CPU."
    ]
    if found.sample_of > 1:
        lines.append(f"Extrapolated from a sample of one content in {found.sample_of:,}.")
    return lines

"""`ksm record`: the fingerprints of every page over time, for `ksm simulate` and `ksm sweep` to replay."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from ksm.cli.common import binary, clock, duration, duration_or_none, out, print_json
from ksm.keyed import Key
from ksm.trace import Progress, Trace, is_trace, record, series


def share(ctx: click.Context | None, param: click.Parameter | None, value: str | None) -> float | None:
    """A share of one CPU from 5% or 0.5: the callback of an option.

    >>> share(None, None, "5%")
    0.05
    """
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", value.strip(), re.ASCII)
    number = float(found[1]) / (100 if found[2] else 1) if found else 0.0
    if not 0 < number <= 1024:
        raise click.BadParameter(f"{value!r} is not a share of a CPU, such as 5%", ctx, param)
    return number


def one_in(ctx: click.Context | None, param: click.Parameter | None, value: str) -> int:
    """16 from 1/16: the callback of an option.

    >>> one_in(None, None, "1/16")
    16
    """
    found = re.fullmatch(r"1(?:/([1-9]\d{0,6}))?", value.strip(), re.ASCII)
    if not found:
        raise click.BadParameter(f"{value!r} is not a sample, such as 1/16", ctx, param)
    return int(found[1] or 1)


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("-o", "--output", required=True, metavar="TRACE", help="The trace to make: a directory.")
@click.option("--every", default="10s", callback=duration, show_default=True, help="Time from one step to the next.")
@click.option(
    "--for",
    "seconds",
    default=None,
    callback=duration_or_none,
    help="How long.  [default: until everything has ended, or Ctrl-C]",
)
@click.option("--cpu", default=None, callback=share, metavar="5%", help="The share of one CPU to stay below.")
@click.option("--sample", default="1", callback=one_in, metavar="1/N", help="Keep one content in N.  [default: all]")
@click.option("--key", "key_file", metavar="FILE", help="Keep fingerprints under the secret key in FILE.")
@click.option("--resume", is_flag=True, help="Go on with TRACE.")
@click.option("--series", "as_series", is_flag=True, help="Each SOURCE is a directory of dumps of one guest, in order.")
@click.option("--marked-only", is_flag=True, help="Of processes, only what is marked mergeable at that step.")
@click.option("--page-size", type=int, default=4096, show_default=True, help="Of raw images.")
@click.option("--threads", type=click.IntRange(1), default=None, help="That hash.  [default: all CPUs; one with --cpu]")
@click.option("--json", "as_json", is_flag=True, help="Print what was recorded as JSON.")
def command(
    sources: tuple[str, ...], output: str, as_series: bool, key_file: str | None, as_json: bool, **options: Any
) -> None:
    """Record what memory holds over time: fingerprints of every page, changes only.

    A SOURCE is what the other commands take, read again at each step; comm:PATTERN, all processes of such a name; or
    mergeable, all that take part in KSM. Each step is on disk when it is done: Ctrl-C ends the recording, and whatever
    else ends it loses at most the step under way.
    """
    key = None if key_file is None else Key.from_file(key_file)
    with _shown(as_json) as show:
        try:
            record(series(sources) if as_series else sources, output, key=key, progress=show, **options)
        except KeyboardInterrupt:
            if not is_trace(output):
                raise
    found = summary(output)
    if as_json:
        print_json(found)
        return
    for line in sentences(found):
        out().print(line, soft_wrap=True)


@contextlib.contextmanager
def _shown(quiet: bool) -> Iterator[Callable[[Progress], object]]:
    """A line on stderr about the last step, for terminals only."""
    if quiet or not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console

    with Console(stderr=True).status("recording ...") as status:
        yield lambda step: status.update(
            f"step {step.step}, {clock(round(step.seconds, 1))}: {step.processes:,} processes, {step.pages:,} pages, "
            f"{step.rows:,} changes, took {clock(round(step.read_seconds, 2))}; {binary(step.bytes_written)} written"
        )


def summary(path: str) -> dict[str, Any]:
    """What a trace holds, and what it takes on disk.

    >>> from ksm.trace import example
    >>> summary(str(example().path))["steps"]
    3
    """
    trace = Trace(path)
    files = [file for file in Path(path).rglob("*.parquet") if file.is_file()]
    size = sum(os.path.getsize(file) for file in files)
    pages = [step.row["pages"] for step in trace.steps if step.row["pages"] is not None]
    mean = sum(pages) / len(pages) if pages else 0.0
    hours, gib = trace.duration / 3600, mean * trace.page_size / (1 << 30)
    cpu = sum(step.row["cpu_seconds"] or 0.0 for step in trace.steps)
    took = [step.row["read_seconds"] or 0.0 for step in trace.steps]
    length = trace.duration + (took[-1] if took else 0.0)
    return {
        "trace": path,
        "steps": len(trace.steps),
        "seconds": trace.duration,
        "processes": len(trace.processes),
        "mean_pages": mean,
        "page_size": trace.page_size,
        "sample_of": trace.sample.of,
        "key_id": trace.metadata.key_id,
        "files": len(files),
        "bytes": size,
        "bytes_per_gib": size / gib if gib else None,
        "bytes_per_gib_hour": size / gib / hours if gib and hours else None,
        "cpu_seconds": cpu,
        "cpu_share": cpu / length if length and not trace.metadata.series else None,
        "step_seconds": sum(took) / len(took) if took else None,
    }


def sentences(found: dict[str, Any]) -> list[str]:
    """A summary in words.

    >>> from ksm.trace import example
    >>> sentences(summary(str(example().path)))[0].split(": ")[1]
    '3 steps over 20 s, 2 processes, 32.0 KiB of memory on average.'
    """
    lines = [
        f"{found['trace']}: {found['steps']:,} steps over {clock(round(found['seconds'], 1))}, "
        f"{found['processes']:,} processes, {binary(found['mean_pages'] * found['page_size'])} of memory on average."
    ]
    size = f"It takes {binary(found['bytes'])} in {found['files']:,} files"
    if found["bytes_per_gib_hour"] is not None and found["bytes_per_gib"] is not None:
        size += f", {binary(found['bytes_per_gib'])} a GiB of memory"
    if found["cpu_share"] is not None:
        size += f"; recording took {100 * found['cpu_share']:.1f} % of a CPU, {clock(found['step_seconds'])} a step"
    lines.append(size + ".")
    if found["sample_of"] > 1:
        lines.append(f"It is a sample: one content in {found['sample_of']:,}.")
    if found["key_id"] is not None:
        lines.append(f"Its fingerprints are under the key {found['key_id']}.")
    return lines

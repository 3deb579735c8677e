"""`ksm report`: a plan as one HTML page, or one of its charts as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ksm.cli.common import binary, out, write_whole
from ksm.cli.plan import plan_options, work_out
from ksm.plan import Plan

_PICTURES = (".png", ".svg")


@click.command()
@click.argument("sources", nargs=-1, metavar="[PLAN|SOURCE]...")
@plan_options
@click.option("-o", "--output", default="report.html", show_default=True, help="A page .html, or a chart .png or .svg.")
@click.option(
    "--chart", metavar="KIND", help="Of the picture: fits, saving, frames, pace, cpu, risk, composition, matrix."
)
@click.option("--host", type=click.IntRange(1), default=1, show_default=True, help="Of the picture: which host.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
def command(sources: tuple[str, ...], output: str, chart: str | None, host: int, force: bool, **options: Any) -> None:
    """A plan as one HTML page that works offline: charts, tables, what-if controls.

    PLAN is the JSON that `ksm plan --json` wrote, or the YAML file of a plan. With SOURCEs, samples of VMs, the plan is
    made first: the options are those of `ksm plan`. Pictures of single charts: -o fits.svg --chart fits.
    """
    kind = Path(output).suffix.lower()
    if kind not in (".html", *_PICTURES):
        raise click.UsageError(f"{output}: the output is a page (.html) or a picture (.png, .svg)")
    if (chart is not None) != (kind in _PICTURES):
        raise click.UsageError("--chart says which chart a picture is of: -o fits.svg --chart fits")
    if os.path.lexists(output) and not force:
        raise click.UsageError(f"{output} exists; --force overwrites it")
    answer = _plan(sources, options)
    if chart is not None:
        write_whole(output, lambda path: answer.chart(chart, host - 1).save(path, scale_factor=2))
    else:
        from ksm.report import plan_page

        page = plan_page(answer)
        write_whole(output, lambda path: Path(path).write_text(page, encoding="utf-8", newline="\n"))
    console = out()
    console.print(answer.verdict()[0], soft_wrap=True)
    console.print(f"{output}: {binary(os.stat(output).st_size)}; open it in a browser.", soft_wrap=True)


def _plan(sources: Sequence[str], options: dict[str, Any]) -> Plan:
    kinds = {Path(source).suffix.lower() for source in sources}
    if not kinds & {".json", ".yaml", ".yml"}:
        return work_out(sources, options)
    if len(sources) > 1 or options["file"] is not None or options["ram"] is not None or options["traces"]:
        raise click.UsageError("a plan's file says it all: give it alone, without sources, --file, --ram or --trace")
    if kinds == {".json"}:
        from ksm.plan.reading import read_plan

        return read_plan(sources[0])
    return work_out((), options | {"file": sources[0]})

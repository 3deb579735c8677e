"""`ksm advise`: what KSM is doing here, in sentences, and the commands that would follow."""

from __future__ import annotations

import textwrap

import click
from rich.console import Console
from rich.text import Text

from ksm.advise import advise
from ksm.cli.common import duration, out, print_json
from ksm.linux import Host
from ksm.observe import Observation, observe
from ksm.rules import Finding
from ksm.saved import load

_STYLES = {"problem": "bold red", "hint": "bold yellow", "info": "bold green"}


@click.command()
@click.argument("file", required=False, type=click.Path(dir_okay=False, allow_dash=False))
@click.option("--for", "seconds", default="2s", callback=duration, show_default=True, help="How long to look.")
@click.option("--figures", is_flag=True, help="Show the figures and the source of each.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(file: str | None, seconds: float, figures: bool, as_json: bool) -> None:
    """What KSM is doing on this host, and what to do about it.

    FILE is what `ksm top --json` printed, here or on another host; without it this host is looked at. Nothing is
    changed: the commands are for you to run. As root it sees every process.
    """
    o = load(file) if file else observe(Host(), seconds, deep=True)
    findings = advise(o)
    if as_json:
        print_json({**_about(o), "findings": [finding.to_dict() for finding in findings]})
        return
    console = out()
    console.width = min(console.width, 110)  # sentences are hard to read in longer lines
    console.print(_headline(o), soft_wrap=True)
    for finding in findings:
        _tell(console, finding, figures)


def _about(o: Observation) -> dict[str, object]:
    return {"kernel": o.sample.kernel, "time": o.sample.time, "seconds": o.seconds}


def _headline(o: Observation) -> str:
    what = "a simulated machine" if o.sample.simulated else "this kernel's KSM"
    looked = f"over {o.seconds:.3g} s" if o.seconds else "at one moment"
    return f"Linux {o.sample.kernel}, {what}, {looked}:"


def _tell(console: Console, finding: Finding, figures: bool) -> None:
    lines = textwrap.fill(f"{finding.level}: {finding.text}", console.width, break_on_hyphens=False)
    text = Text(f"\n{lines}")
    text.stylize(_STYLES[finding.level], 1, len(finding.level) + 2)
    console.print(text, soft_wrap=True)
    if finding.command:
        console.print(Text(f"    {finding.command}", style="cyan"), soft_wrap=True)
    if figures:
        values = ", ".join(f"{name} {value}" for name, value in finding.figures.items())
        for line in (f"[{finding.rule}] {values}", f"source: {finding.source}"):
            indented = textwrap.fill(line, console.width, initial_indent="    ", subsequent_indent="    ")
            console.print(Text(indented, style="dim"), soft_wrap=True)

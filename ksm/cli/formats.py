"""`ksm formats`: the memory images and other sources that are understood."""

from __future__ import annotations

import click
from rich.table import Table

from ksm.cli.common import out, print_json
from ksm.sources import COMPRESSIONS, FORMATS, LIVE


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def command(as_json: bool) -> None:
    """List the formats of memory images and the other sources that are understood."""
    if as_json:
        files = [{"format": one.name, "written_by": one.writers, "needs": list(one.needs)} for one in FORMATS]
        live = [{"source": scheme, "what": what} for scheme, what in LIVE.items()]
        print_json({"formats": files, "compressions": list(COMPRESSIONS), "live": live})
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("format", "written by", "needs"):
        table.add_column(heading, overflow="fold")
    for one in FORMATS:
        table.add_row(one.name, one.writers, "ksm[dumps] for " + ", ".join(one.needs) if one.needs else "")
    table.add_section()
    for scheme, what in LIVE.items():
        table.add_row(scheme, what, "Linux")
    console = out()
    console.print(table)
    console.print(
        f"\nA file's format is found by its first bytes. Around it may be {', '.join(COMPRESSIONS)}.", soft_wrap=True
    )

"""`ksm fleet place`: the moves that bring VMs together that share, beside the baselines."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from ksm.cli.common import binary, out, print_json, progress
from ksm.cli.fleet import check_report, report_options, write_report
from ksm.fleet import Placement, PlacementError, place, read_fleet, read_hosts
from ksm.fleet.place import Method

_ROWS = 20


@click.command()
@click.argument("given", nargs=-1, required=True, metavar="DIR|FILE...")
@click.option("--hosts", "hosts_file", required=True, type=click.Path(), help="YAML or JSON: the hosts.")
@click.option("--overcommit", type=float, default=1.0, show_default=True, help="RAM given to VMs, in hosts' RAM.")
@click.option("--migrations", type=click.IntRange(0), help="At most so many VMs move.  [default: any number]")
@click.option("--exact", is_flag=True, help="Also the exact optimum, for small fleets.")
@click.option("--seconds", type=float, default=30.0, show_default=True, help="That --exact may take.")
@report_options
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def command(
    given: tuple[str, ...], hosts_file: str, exact: bool, as_json: bool, report: str | None, **options: Any
) -> None:
    """Place the VMs so that those which share live together; the moves, and what the baselines would save.

    Takes the sketches that `ksm fingerprint` wrote. RAM, vCPUs, security domains, anti-affinity and pins are kept.
    """
    check_report(report, options["force"])
    hosts = read_hosts(hosts_file)
    vms, sketches = read_fleet(given)
    overcommit = options["overcommit"]
    with progress("placing", quiet=as_json) as show:
        found = place(vms, sketches, hosts, overcommit=overcommit, migrations=options["migrations"], progress=show)
    others: dict[str, Placement | str] = {}
    baselines: tuple[Method, ...] = ("today", "random", "decreasing", "class")
    for method in (*baselines, *_exact(exact)):
        try:
            others[method] = place(vms, sketches, hosts, method, overcommit=overcommit, seconds=options["seconds"])
        except PlacementError as error:
            others[method] = str(error)
    if as_json:
        said = {name: other if isinstance(other, str) else other.to_dict() for name, other in others.items()}
        print_json(found.to_dict() | {"baselines": said})
    else:
        _show(found, others)
    if report:
        from ksm.fleet.placing import Comparison
        from ksm.report import placement_page

        write_report(report, placement_page(Comparison(found=found, others=others, vms=vms, hosts=hosts)))


def _show(found: Placement, others: dict[str, Placement | str]) -> None:
    console = out()
    console.print(methods(found, others))
    console.print()
    if found.moves:
        console.print(_moves(found))
        console.print()
    for line in found.verdict():
        console.print(line, soft_wrap=True)


def _exact(wanted: bool) -> tuple[Method, ...]:
    return ("exact",) if wanted else ()


def methods(found: Placement, others: dict[str, Placement | str]) -> Table:
    """A row a way of placing.

    >>> methods.__name__
    'methods'
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("placement", "saved", "between", "hosts", "freed", "moves"):
        table.add_column(heading, justify="left" if heading == "placement" else "right")
    for name, other in {"sharing": found, **others}.items():
        if isinstance(other, str):
            table.add_row(f"{name}: {other}")
            continue
        saved = other.saved
        between = f"{binary(saved.lower)} and {binary(saved.upper)}"
        proven = " (proven)" if other.proven else ""
        numbers = (str(other.hosts_used), str(other.hosts_freed), str(len(other.moves)))
        table.add_row(name + proven, binary(saved.estimate), between, *numbers)
    return table


def _moves(found: Placement) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("move", "VM", "from", "to", "frees", ""):
        table.add_column(heading, justify="right" if heading in ("move", "frees") else "left")
    for index, move in enumerate(found.moves[:_ROWS], 1):
        here, there = f"{move.source}/{move.source_node}", f"{move.target}/{move.target_node}"
        table.add_row(str(index), move.vm, here, there, binary(move.gain), "" if move.fits else "needs spare room")
    if len(found.moves) > _ROWS:
        table.add_row("", f"({len(found.moves) - _ROWS:,} more: --json)")
    return table

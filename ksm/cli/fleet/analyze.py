"""`ksm fleet analyze`: the fleet counted, for people and for programs."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from ksm.cli.common import binary, out, print_json, progress
from ksm.cli.fleet import PARTIAL, check_report, cluster_options, opened, report_options, write_report
from ksm.fleet import Analysis, Host, Sharing, analyze, read_hosts
from ksm.keyed import Key

_ROWS = 20  # of a table on the terminal; the others are in --json and -o


@click.command()
@click.argument("given", nargs=-1, required=True, metavar="DIR|FILE...")
@click.option("--hosts", "hosts_file", type=click.Path(), help="YAML or JSON: the hosts and their tunables.")
@click.option("--max-page-sharing", type=click.IntRange(2), default=256, help="Of the one host that would hold all.")
@click.option("--use-zero-pages", is_flag=True, help="The same, of that host.")
@click.option(
    "--known", "known_files", multiple=True, type=click.Path(), help="A shared library whose pages are named."
)
@click.option("--key-file", type=click.Path(), help="What the fleet was fingerprinted with, to name contents.")
@click.option("--ranges", type=click.IntRange(1), help="Cut the work into so many.  [default: by size]")
@click.option("--single", is_flag=True, help="This process alone does it, without a cluster.")
@cluster_options
@click.option(
    "-o", "--output", type=click.Path(file_okay=False), metavar="DIR", help="Write the tables there: Parquet."
)
@report_options
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def command(
    given: tuple[str, ...],
    hosts_file: str | None,
    as_json: bool,
    output: str | None,
    report: str | None,
    **options: Any,
) -> None:
    """What KSM saves in the fleet as it stands, what it would save on one host, and who shares with whom.

    Takes the directories that `ksm fingerprint` wrote, or files of them. Exit code 3: an answer, but something was
    left out.
    """
    check_report(report, options["force"])
    hosts = read_hosts(hosts_file) if hosts_file else []
    one = Host(name="one host", max_page_sharing=options["max_page_sharing"], use_zero_pages=options["use_zero_pages"])
    key = Key.from_file(options["key_file"]) if options["key_file"] else None
    how = {"one_host": one, "known_files": options["known_files"], "key": key, "ranges": options["ranges"]}
    with progress("counting", quiet=as_json) as show:
        if options["single"]:
            if options["scheduler"] or options["workers"]:
                raise click.UsageError("--single is without --scheduler and --workers")
            answer = analyze(given, hosts, progress=show, **how)
        else:
            with opened(options) as client:
                answer = analyze(given, hosts, client=client, progress=show, **how)
    unwritten = None
    try:  # the answer is shown all the same: to count it took long
        _write(answer, output, report)
    except OSError as error:
        unwritten = error
    if as_json:
        print_json(answer.to_dict())
    else:
        show_answer(answer)
    for one_out in answer.left_out:
        click.echo(f"ksm: {one_out.path}: {'left out: ' if one_out.partial else ''}{one_out.why}", err=True)
    if not answer.complete:
        click.echo(f"ksm: partial: {_rest(answer)}", err=True)
    if unwritten:
        raise unwritten
    if not answer.complete:
        raise click.exceptions.Exit(PARTIAL)


def _write(answer: Analysis, output: str | None, report: str | None) -> None:
    if output:
        answer.write(output)
    if report:
        from ksm.report import fleet_page

        write_report(report, fleet_page(answer))


def _rest(answer: Analysis) -> str:
    if answer.ranges_counted < answer.ranges:
        return f"the figures are of {answer.ranges_counted} of {answer.ranges} ranges of contents"
    return "the figures are of the rest"


def show_answer(answer: Analysis) -> None:
    """Print the tables and sentences.

    >>> import ksm.cli.fleet.analyze as module
    >>> callable(module.show_answer)
    True
    """
    console = out()
    console.print(_hosts(answer))
    console.print()
    console.print(_classes(answer))
    console.print()
    console.print(_top(answer))
    console.print()
    for line in sentences(answer):
        console.print(line, soft_wrap=True)


def _table(*headings: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right", overflow="fold", no_wrap=index >= left)
    return table


def _hosts(answer: Analysis) -> Table:
    table = _table("host", "VMs", "pages", "zero", "shared", "sharing", "unshared", "zero-merged", "saved", "profit")
    for row in sorted(answer.hosts, key=lambda row: -row.saved_bytes)[:_ROWS]:
        table.add_row(*_row(row))
    if len(answer.hosts) > _ROWS:
        table.add_row(f"({len(answer.hosts) - _ROWS} more hosts)")
    table.add_section()
    table.add_row(*_row(answer.total), style="bold")
    table.add_row(*_row(answer.one_host))
    return table


def _row(row: Sharing) -> tuple[str, ...]:
    numbers = (row.vms, row.pages, row.zero_pages, row.pages_shared, row.pages_sharing, row.pages_unshared)
    amounts = (binary(row.saved_bytes), binary(row.general_profit))
    return (row.name, *(f"{number:,}" for number in (*numbers, row.ksm_zero_pages)), *amounts)


def _classes(answer: Analysis) -> Table:
    table = _table("class", "with", "contents in common", "bytes", left=2)
    best = sorted(answer.classes, key=lambda row: -row["contents"])[:_ROWS]
    for row in best:
        table.add_row(row["a"] or "-", row["b"] or "-", f"{row['contents']:,}", binary(row["bytes"]))
    return table


def _top(answer: Analysis) -> Table:
    table = _table("content", "what", "copies", "VMs", "classes", "hosts", left=2)
    for row in answer.top[:10]:
        numbers = (f"{row[name]:,}" for name in ("copies", "vms", "classes", "hosts"))
        table.add_row(row["content"], row["what"] or row["category"], *numbers)
    return table


def sentences(answer: Analysis) -> list[str]:
    """The answer in words, and what it takes for granted.

    >>> from ksm.fleet.analyze import _EMPTY
    >>> sentences(Analysis(**_EMPTY))[0]
    'Today KSM saves 0 B of 0 B; if one host held all, 0 B.'
    """
    return [*answer.verdict(), *(f"Assumed: {line[0].lower()}{line[1:]}" for line in answer.assumed)]

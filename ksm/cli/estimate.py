"""`ksm estimate`: what KSM would save on images and processes, once it has settled."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from ksm.cli.common import binary, out, print_json, progress, source_arguments
from ksm.estimate import Counts, Estimate, estimate


@click.command()
@source_arguments
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def command(sources: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """What KSM would save on these sources, once it has settled.

    A SOURCE is a memory image (`ksm formats` lists which; holes of a sparse file are memory never touched), pid:123,
    self, or qemu:NAME.
    Every page is looked at; the numbers are those that the kernel's counters would come to.
    """
    with progress("fingerprinting", quiet=as_json) as show:
        answer = estimate(sources, progress=show, **options)
    if as_json:
        print_json(answer.to_dict())
        return
    console = out()
    console.print(table(answer))
    for line in sentences(answer):
        console.print(line, soft_wrap=True)


def table(answer: Estimate) -> Table:
    """A row a source, and the totals.

    >>> table(estimate([b"x" * 8192])).row_count
    1
    """
    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("source", overflow="fold")
    for heading in ("pages", "zero", "shared", "sharing", "unshared", "zero-merged", "saved", "metadata", "profit"):
        result.add_column(heading, justify="right", no_wrap=True)
    for source in answer.sources:
        result.add_row(*_row(source))
    if len(answer.sources) > 1:
        result.add_section()
        result.add_row(*_row(answer), style="bold")
    return result


def _row(counts: Counts) -> tuple[str, ...]:
    return (
        counts.name,
        f"{counts.pages:,}",
        f"{counts.zero_pages:,}",
        f"{counts.pages_shared:,}",
        f"{counts.pages_sharing:,}",
        f"{counts.pages_unshared:,}",
        f"{counts.ksm_zero_pages:,}",
        binary(counts.saved_bytes),
        binary(counts.metadata_bytes),
        binary(counts.general_profit),
    )


def sentences(answer: Estimate) -> list[str]:
    """The answer in words, with what it assumes.

    >>> sentences(estimate([b"x" * 8192]))[0]
    'KSM would save 4.0 KiB of 8.0 KiB (50.0 %), for 128 B of its own: 3.9 KiB in all.'
    """
    whole = answer.pages * answer.page_size
    share = f" ({100 * answer.saved_bytes / whole:.1f} %)" if whole else ""
    result = [
        f"KSM would save {binary(answer.saved_bytes)} of {binary(whole)}{share}, "
        f"for {binary(answer.metadata_bytes)} of its own: {binary(answer.general_profit)} in all.",
        f"Duplicates: {answer.duplicates_within:,} pages within a source, {answer.duplicates_between:,} between.",
    ]
    return [*result, *("Assumed: " + line[0].lower() + line[1:] for line in answer.assumed)]

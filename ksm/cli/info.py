"""`ksm info`: what a memory image is, and what is in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click
import numpy as np
from rich.table import Table

from ksm import sources
from ksm.cli.common import binary, out, print_json, progress
from ksm.estimate import estimate
from ksm.sources import Image, Segment, Snapshot

_MOST_ROWS = 40


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--page-size", type=int, default=4096, show_default=True, help="Of raw images.")
@click.option("--marked-only", is_flag=True, help="Of processes, only what is marked mergeable now.")
@click.option("--threads", type=click.IntRange(1), default=None, help="That hash.  [default: all CPUs]")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def command(files: tuple[str, ...], page_size: int, marked_only: bool, threads: int | None, as_json: bool) -> None:
    """What a memory image is: its format, segments, pages, and how many of them are zero or duplicates.

    A FILE is a memory image (`ksm formats` lists which), or any other SOURCE of `ksm estimate`.
    """
    found = []
    for file in files:
        with sources.open(file, marked_only=marked_only, page_size=page_size) as image:
            with progress("fingerprinting", quiet=as_json) as show:
                snapshot = Snapshot.take(image, threads, functools.partial(_of, show, image.npages))
            found.append(describe(image, snapshot))
    if as_json:
        print_json(found)
        return
    for number, facts in enumerate(found):
        if number:
            out().print()
        show_facts(facts)


def _of(show: Callable[[int, int], None], total: int, done: int) -> None:
    show(done, total)


def describe(image: Image, snapshot: Snapshot) -> dict[str, Any]:
    """What is known of an image, for JSON.

    >>> image = sources.ArrayImage(np.zeros((2, 4096), np.uint8))
    >>> facts = describe(image, Snapshot.take(image))
    >>> facts["pages"], facts["zero_pages"], facts["duplicates"], facts["segments"][0]["pages"]
    (2, 2, 1, 2)
    """
    counts = estimate([snapshot])
    return {
        "name": image.name,
        "format": image.format,
        "page_size": image.page_size,
        "pages": snapshot.pages,
        "zero_pages": counts.zero_pages,
        "zero_may_be_untouched": not image.anonymous_known,
        "never_touched": image.holes,
        "duplicates": counts.duplicates_within,
        "distinct": snapshot.pages - counts.duplicates_within,
        "left_out": dict(image.excluded),
        "segments": _segments(image.segments, snapshot),
    }


def _segments(segments: tuple[Segment, ...], snapshot: Snapshot) -> list[dict[str, Any]]:
    """Each segment with its pages, and the zero ones among them."""
    starts = np.array([segment.address for segment in segments], np.uint64)
    pages, zeros = np.zeros(len(segments), np.int64), np.zeros(len(segments), np.int64)
    for address, prints in snapshot.blocks:
        if not len(segments):
            break
        at = np.uint64(address) + np.arange(len(prints), dtype=np.uint64) * np.uint64(snapshot.page_size)
        place = np.maximum(np.searchsorted(starts, at, "right") - 1, 0)
        present = np.ones(len(prints), np.bool_) if prints.present is None else prints.present
        pages += np.bincount(place[present], minlength=len(segments))
        zeros += np.bincount(place[present & prints.zeros(snapshot.page_size)], minlength=len(segments))
    return [
        {
            "address": segment.address,
            "bytes": segment.length,
            "name": segment.name,
            "pages": int(n),
            "zero_pages": int(z),
        }
        for segment, n, z in zip(segments, pages, zeros, strict=True)
    ]


def show_facts(facts: dict[str, Any]) -> None:
    """The same for people."""
    console = out()
    whole = facts["pages"] * facts["page_size"]
    console.print(f"{facts['name']}: {facts['format']}", style="bold", soft_wrap=True)
    console.print(
        f"{facts['pages']:,} pages of {binary(facts['page_size'])}: {binary(whole)}, {facts['distinct']:,} distinct"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("address", "size", "pages", "zero"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("segment", overflow="fold")
    segments = facts["segments"]
    for segment in segments[:_MOST_ROWS]:
        row = (
            f"{segment['address']:#x}",
            binary(segment["bytes"]),
            f"{segment['pages']:,}",
            f"{segment['zero_pages']:,}",
        )
        table.add_row(*row, segment["name"])
    console.print(table)
    if len(segments) > _MOST_ROWS:
        console.print(f"... and {len(segments) - _MOST_ROWS:,} more segments (--json has all)")
    zero = "zero, or never touched, which this source cannot tell" if facts["zero_may_be_untouched"] else "zero"
    console.print(f"{facts['zero_pages']:,} pages are {zero}; {facts['duplicates']:,} are duplicates of others in it.")
    if facts["never_touched"]:
        console.print(f"{facts['never_touched']:,} pages were never touched.")
    if facts["left_out"]:
        console.print("Left out: " + ", ".join(f"{count:,} {why}" for why, count in facts["left_out"].items()) + ".")

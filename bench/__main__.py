"""`python -m bench`: every goal beside what was measured, in one run, as text, JSON and a picture."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench import contest, goals, processes, show
from bench.contest import Cost
from bench.host import description
from bench.rows import Row

ROOT = Path(__file__).parents[1]
PAGES_A_GIB = 2**18
# Between these and END a document gets all tables, or those that say the most.
STARTS = {"<!-- bench: made by python -m bench -->": False, "<!-- bench: summary made by python -m bench -->": True}
END = "<!-- bench: end -->"


class Plan:
    """How large and how often, and which parts: the parts by name, each a function that gives rows."""

    def __init__(self, gib: float, rounds: int, quick: bool, directory: str | None) -> None:
        n = int(gib * PAGES_A_GIB)
        few = max(1, rounds // 3)
        most = 2**18 if quick else 2**24
        self.sizes = [n >> shift for shift in range(8, -1, -1) if n >> shift >= min(n, PAGES_A_GIB // 4)]
        self.rounds = few
        self.parts: dict[str, Callable[[], list[Row]]] = {
            "reading": lambda: goals.against_reading(n, 3 * rounds),  # ratios near 1: noise would decide
            "kernel": lambda: [
                *goals.against_kernel("guest", n, few, judged=True),
                *goals.against_kernel("unique", n, 1, judged=False),
                *goals.against_kernel("copies", n, 1, judged=False),
            ],
            "command": lambda: processes.command(n, few, directory),
            "memory": lambda: processes.footprint(n),
            "growth": lambda: goals.growth([most >> shift for shift in range(4, -1, -1)], (rounds + 1) // 2),
            "import": lambda: processes.import_time(rounds),
        }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", "gib", type=click.FloatRange(0.001), default=4.0, show_default=True, help="GiB of pages.")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=9,
    show_default=True,
    help="Of each measurement; a third or half as many of slow ones, three times as many of ratios near 1.",
)
@click.option("--only", multiple=True, help="A part: reading, kernel, command, memory, growth, import or contest.")
@click.option("--quick", is_flag=True, help="A few seconds on 16 MiB: shows the shape, its figures mean nothing.")
@click.option("--json", "json_file", metavar="FILE", help="Write all of it as JSON.")
@click.option("--picture", "picture_file", metavar="FILE", help="Draw it, as .svg or .png.")
@click.option(
    "--load",
    "load_file",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Show what --json wrote, measuring nothing.",
)
@click.option("--update", "documents", multiple=True, metavar="FILE", help="Put the tables between its markers.")
@click.option("--directory", help="Where the file for `ksm estimate` is written.  [default: the temporary directory]")
@click.option("--check", is_flag=True, help="Exit with 1 if a goal is missed.")
def command(
    gib: float,
    rounds: int,
    only: tuple[str, ...],
    quick: bool,
    json_file: str | None,
    picture_file: str | None,
    load_file: str | None,
    documents: tuple[str, ...],
    directory: str | None,
    check: bool,
) -> None:
    """How fast ksm is, beside plain memory reading, the kernel's ksmd, and what else could be used.

    The kernel's part needs root, a kernel with KSM that nobody else uses, and takes the memory of --size twice.
    """
    if load_file is not None:
        machine, rows, costs = loaded(Path(load_file))
    else:
        plan = Plan(1 / 64, 1, True, directory) if quick else Plan(gib, rounds, False, directory)
        unknown = sorted(set(only) - {*plan.parts, "contest"})
        if unknown:
            raise click.UsageError(f"there is no part named {unknown[0]}; there are {', '.join(plan.parts)}, contest")
        machine, rows, costs = measured(plan, only, json_file)
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 160
    show.text(console, machine, rows, costs)
    if picture_file is not None:
        show.picture(rows, costs).save(picture_file, scale_factor=2)
    for document in documents:
        update(Path(document), machine, rows, costs)
    if check and any(row.verdict == "missed" for row in rows):
        sys.exit(1)


def measured(plan: Plan, only: Sequence[str], json_file: str | None) -> tuple[dict[str, Any], list[Row], list[Cost]]:
    """Measure the parts that are wanted, telling on stderr which one is under way; each is kept once it is there."""
    machine = description()
    rows: list[Row] = []
    costs: list[Cost] = []

    def keep() -> None:
        if json_file is not None:
            answer = {"machine": machine, "rows": [r.to_dict() for r in rows], "contest": [c.to_dict() for c in costs]}
            Path(json_file).write_text(json.dumps(answer, indent=1) + "\n")

    for name, part in plan.parts.items():
        if not only or name in only:
            print(f"measuring: {name} ...", file=sys.stderr, flush=True)
            rows += part()
            keep()
    if not only or "contest" in only:
        print("measuring: contest ...", file=sys.stderr, flush=True)
        for size in plan.sizes:
            costs += contest.contest([size], plan.rounds)
            keep()
    return machine, rows, costs


def loaded(file: Path) -> tuple[dict[str, Any], list[Row], list[Cost]]:
    """What an earlier run wrote."""
    found = json.loads(file.read_text())
    return found["machine"], [Row.from_dict(row) for row in found["rows"]], [Cost(**cost) for cost in found["contest"]]


def update(document: Path, machine: dict[str, Any], rows: Sequence[Row], costs: Sequence[Cost]) -> None:
    """Put the tables between the markers."""
    text = document.read_text()
    found = 0
    for start, brief in STARTS.items():
        new = f"{start}\n{show.markdown(machine, rows, costs, brief)}{END}"
        text, times = re.subn(f"{re.escape(start)}\n.*?{re.escape(END)}", lambda _, n=new: n, text, flags=re.DOTALL)
        found += times
    if not found:
        raise click.UsageError(f"{document} has no lines {' or '.join(STARTS)}, and {END}")
    document.write_text(text)


if __name__ == "__main__":
    command()

"""`ksm calibrate`: steps the kernel's ksmd over known memory, and fits the cost model that `simulate` charges by."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import click
from rich.table import Table

from ksm import cost as model
from ksm.calibrate import (
    FITTED,
    TOLERANCE,
    UNSEEN,
    Observation,
    Total,
    describe,
    fit,
    observe_all,
    require_alone,
    totals,
)
from ksm.cli.common import binary, out, print_json, progress
from ksm.cost import COSTS, CostModel
from ksm.errors import DisagreementError, UnsupportedError
from ksm.linux import Host
from ksm.patterns import KINDS

_ROOM = 1.25  # of the memory, for the kernel's bookkeeping and ours

MEANINGS = {
    "hash_ns": "visiting and hashing a page of 4 KiB",
    "level_ns": "a level of the unstable tree",
    "merge_ns": "merging a page",
    "merged_ns": "visiting a page that is merged already",
    "stable_level_ns": "a level of the stable tree",
    "deep_ns": "on top, a level of either beyond its first 8",
    "skip_ns": "passing over a page by smart scan",
}


@dataclass(frozen=True, slots=True)
class Calibration:
    """A model, the passes that it was fitted to (none with --verify), and those that it has not seen."""

    cost: CostModel
    fitted: tuple[Observation, ...]
    unseen: tuple[Observation, ...]
    written: str | None = None

    @property
    def worst(self) -> Total:
        """Of the memory that the fit has not seen, that with the largest error."""
        return max(totals(self.unseen, self.cost), key=lambda total: abs(total.error))

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "cost_model": self.cost.to_dict(),
            "written": self.written,
            "worst_error_unseen": self.worst.error,
            "tolerance": TOLERANCE,
            "fitted": [total.to_dict() for total in totals(self.fitted, self.cost)],
            "unseen": [total.to_dict() for total in totals(self.unseen, self.cost)],
            "passes": [one.to_dict(self.cost) for one in (*self.fitted, *self.unseen)],
        }


@click.command()
@click.option("--memory", "mib", type=click.IntRange(16), default=1024, show_default=True, help="MiB, of the largest.")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="The least time counts.")
@click.option("--verify", is_flag=True, help="Only compare the model in use with ksmd; exit code 4 beyond 20 %.")
@click.option("--output", metavar="FILE", help=f"Where the model is written.  [default: {model.SYSTEM_FILE}]")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def command(mib: int, rounds: int, verify: bool, output: str | None, force: bool, as_json: bool) -> None:
    """Measure what ksmd's work costs on this host, for `ksm simulate`.

    Steps the real ksmd over memory with unique, duplicated and merged pages, in several sizes, fits the constants of
    the cost model, and compares it with passes over memory that the fit has not seen. Needs root, and KSM to itself.
    Every tunable is put back and all is unmerged at the end, after Ctrl-C too.
    """
    if verify and output is not None:
        raise click.UsageError("--verify writes nothing, so --output has no use")
    if output is not None and os.path.lexists(output) and not force:
        raise click.UsageError(f"{output} exists; --force overwrites it")
    host = Host()
    require_alone(host)
    memory = mib << 20
    if host.mem_available < memory * _ROOM:
        raise UnsupportedError(
            f"{binary(host.mem_available)} of memory are free, and --memory {mib} takes {binary(memory * _ROOM)}"
        )
    memories = UNSEEN if verify else (*FITTED, *UNSEEN)
    with progress("stepping ksmd", quiet=as_json) as show:
        found = observe_all(host, memories, memory, rounds, show)
    kinds = {kind for kind, _ in UNSEEN}  # FITTED has none of these
    unseen = tuple(one for one in found if one.kind in kinds)
    fitted = tuple(one for one in found if one.kind not in kinds)
    cost = CostModel.of_host() if verify else describe(fit(fitted))
    written = None
    if not verify:
        written = output or str(model.SYSTEM_FILE)
        cost.save(written)
    report(Calibration(cost, fitted, unseen, written), as_json)


def report(found: Calibration, as_json: bool) -> None:
    """Print what was found; DisagreementError if a model that was only verified is off.

    >>> from ksm.cost import Work
    >>> seen = (Observation("guest", 256, 1, Work(hashed=256), 256e-6),)
    >>> report(Calibration(CostModel(hash_ns=1000.0), seen, seen), as_json=True)  # doctest: +ELLIPSIS
    {
      "cost_model": ...
    """
    if as_json:
        print_json(found.to_dict())
    else:
        console = out()
        console.print(constants(found.cost))
        for what, some in (("fitted to", found.fitted), ("not seen by the fit", found.unseen)):
            if some:
                console.print(f"\nksmd's CPU time over memory {what}, all passes:")
                console.print(table(totals(some, found.cost)))
        for line in sentences(found):
            console.print(line, soft_wrap=True)
    if not found.fitted and abs(found.worst.error) > TOLERANCE:
        raise DisagreementError(f"the cost model is {_error(found.worst)} off, over {_name(found.worst)}")


def constants(cost: CostModel) -> Table:
    """The constants of a model, and what each is for.

    >>> constants(CostModel()).row_count == len(COSTS)
    True
    """
    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("cost")
    result.add_column("ns", justify="right")
    result.add_column("")
    for name in COSTS:
        result.add_row(name, f"{getattr(cost, name):,.0f}", MEANINGS[name])
    return result


def table(rows: Sequence[Total]) -> Table:
    """Measured beside predicted.

    >>> table([Total("guest", 262144, 5, 2.0, 1.0)]).row_count
    1
    """
    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("pages")
    for heading in ("memory", "passes", "measured", "predicted", "error"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(
            row.kind,
            binary(row.pages * row.page_size),
            str(row.passes),
            f"{row.seconds:.3f} s",
            f"{row.predicted_seconds:.3f} s",
            _error(row),
        )
    return result


def sentences(found: Calibration) -> Iterable[str]:
    """The answer in words."""
    kinds = dict.fromkeys(one.kind for one in (*found.fitted, *found.unseen))
    yield "\n" + "; ".join(f"{kind}: {KINDS[kind]}" for kind in kinds) + "."
    verdict = "within" if abs(found.worst.error) <= TOLERANCE else "NOT within"
    yield f"On memory that the fit has not seen it is off by {_error(found.worst)} at the most: {verdict} 20 %."
    yield f"Written to {found.written}." if found.written else f"The model: {found.cost.origin}."


def _error(row: Total) -> str:
    return f"{100 * row.error:+.1f} %"


def _name(row: Total) -> str:
    return f"{binary(row.pages * row.page_size)} of {row.kind} pages"

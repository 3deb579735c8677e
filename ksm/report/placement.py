"""The report page of a placement."""

from __future__ import annotations

from itertools import accumulate

from ksm.fleet.place import Placement
from ksm.fleet.placing import METHODS, Comparison, figures
from ksm.report.page import Listing, page
from ksm.units import binary, many, more_or_less

_MOVES = 500  # that are listed, of thousands


def placement_page(said: Comparison) -> str:
    """A self-contained HTML page about a placement beside others.

    Raises:
        UnsupportedError: what `ksm[report]` has is not installed.
    """
    found = said.found
    return page(
        "placement.html",
        title=f"{many(len(found.moves), 'move')}: where {many(len(said.vms), 'VM')} should live",
        figures=list(figures(said).values()),
        found=found,
        headline=_headline(said),
        warnings=_warnings(said),
        tiles=_tiles(said),
        moves=_moves(found),
    )


def _today(said: Comparison) -> Placement | None:
    today = said.others.get("today")
    return today if isinstance(today, Placement) else None


def _headline(said: Comparison) -> tuple[str, str]:
    """The answer in large print: its number, and what that is."""
    found, today = said.found, _today(said)
    moves = many(len(found.moves), "move") if found.moves else "no move"
    placed = f" and {many(found.newcomers, 'VM')} placed" if found.newcomers else ""
    freed = f"; {many(found.hosts_freed, 'host')} freed" if found.hosts_freed else ""
    if today is None:
        return binary(found.saved.estimate), f"saved, with {moves}{placed}{freed}."
    more = found.saved.estimate - today.saved.estimate
    return f"{binary(abs(more))} {'more' if more >= 0 else 'less'}", f"saved than today, with {moves}{placed}{freed}."


def _warnings(said: Comparison) -> list[str]:
    found = []
    if said.found.worst_bytes > 0:
        found.append(f"when all sharing breaks, {said.found.worst_host} lacks {binary(said.found.worst_bytes)}.")
    found += [f"{METHODS[name]}: {one}" for name, one in said.others.items() if isinstance(one, str)]
    return found


def _tiles(said: Comparison) -> list[tuple[str, str, str]]:
    found, today = said.found, _today(said)
    waiting = sum(not move.fits for move in found.moves)
    before = len({vm.host for vm in said.vms} & {host.name for host in said.hosts})
    tiles = []
    for when, one in (("then", found), ("today", today)):
        if one is not None:
            saved = one.saved
            least, most = (more_or_less(bound - saved.estimate) for bound in (saved.lower, saved.upper))
            tiles.append((f"saved {when}", binary(saved.estimate), f"95 %: {least} to {most}"))
    lacking = found.worst_bytes > 0
    return [
        *tiles,
        ("hosts with VMs", f"{found.hosts_used:,}", f"{before:,} today; {found.hosts_freed:,} freed"),
        (
            "moves",
            f"{len(found.moves):,}",
            f"{waiting:,} need spare room; {found.newcomers:,} new VMs",
        ),
        (
            "when all sharing breaks",
            f"{binary(found.worst_bytes)} short" if lacking else "all fit",
            f"on {found.worst_host}" if lacking else "every host has room for its VMs",
        ),
    ]


def _moves(found: Placement) -> Listing:
    count = len(found.moves)
    first = f"The first {_MOVES:,} of {count:,}; ksm fleet place --json has all. " if count > _MOVES else ""
    together = accumulate(move.gain for move in found.moves)
    return Listing(
        ("move", "VM", "from", "to", "frees", "all so far", ""),
        [
            (
                f"{number:,}",
                move.vm,
                f"{move.source}/{move.source_node}",
                f"{move.target}/{move.target_node}",
                binary(move.gain),
                binary(so_far),
                "" if move.fits else "needs spare room",
            )
            for number, (move, so_far) in enumerate(zip(found.moves[:_MOVES], together, strict=False), 1)
        ],
        f"{first}In an order that can be carried out, those that free most first; a host's NUMA node follows its name. "
        "Where less than nothing is freed, the move makes room for others.",
    )

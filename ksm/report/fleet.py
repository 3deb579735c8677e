"""The report page of a fleet's analysis."""

from __future__ import annotations

from typing import Any

from ksm.fleet.analysis import Analysis
from ksm.fleet.charts import KINDS, figures, named
from ksm.report.page import Listing, page
from ksm.units import binary, many

_VMS = 50  # that are listed, of thousands
_FILES = 100


def fleet_page(answer: Analysis) -> str:
    """A self-contained HTML page about a fleet as it stands.

    Raises:
        UnsupportedError: what `ksm[report]` has is not installed.
    """
    total = answer.total
    whole = total.pages * total.page_size
    return page(
        "fleet.html",
        title=f"{binary(total.saved_bytes)} saved: KSM in a fleet of {many(total.vms, 'VM')}",
        figures=list(figures(answer).values()),
        answer=answer,
        saved=binary(total.saved_bytes),
        whole=binary(whole),
        warnings=_warnings(answer),
        tiles=_tiles(answer),
        elsewhere=_elsewhere(answer),
        known=_known(answer),
        left_out=_left_out(answer),
    )


def _warnings(answer: Analysis) -> list[str]:
    """Why these are not the figures of all that was given."""
    found = []
    if missing := sum(one.partial for one in answer.left_out):
        found.append(f"{many(missing, 'file')} left out. The figures are of the rest; the files are named below.")
    if answer.ranges_counted != answer.ranges:
        found.append(
            f"the work was cut short. These are the figures of {answer.ranges_counted:,} of {answer.ranges:,} ranges "
            "of contents."
        )
    return found


def _tiles(answer: Analysis) -> list[tuple[str, str, str]]:
    total, one = answer.total, answer.one_host
    whole = max(total.pages * total.page_size, 1)
    mean = total.saved_bytes / max(len(answer.hosts), 1)
    return [
        ("VMs", f"{total.vms:,}", f"on {many(len(answer.hosts), 'host')}, {binary(mean)} saved on each on average"),
        ("saved today", f"{total.saved_bytes / whole:.1%}", f"of {binary(whole)}"),
        (
            "if one host held all",
            f"{one.saved_bytes / whole:.1%}",
            f"{binary(one.saved_bytes)}: no placement saves more",
        ),
        ("equal, but on several hosts", binary(one.saved_bytes - total.saved_bytes), "each host keeps a copy"),
        ("profit today", binary(total.general_profit), f"after {binary(total.metadata_bytes)} of bookkeeping"),
    ]


def _elsewhere(answer: Analysis) -> Listing:
    def away(vm: Any) -> int:
        return int(vm["shared_in_fleet"]) - int(vm["shared_on_host"])

    some = sorted((vm for vm in answer.vms if away(vm) > 0), key=lambda vm: (-away(vm), vm["name"]))
    size = answer.page_size
    return Listing(
        ("VM", "class", "host", "memory", "copies on its host", "copies on other hosts only"),
        [
            (
                vm["name"],
                named(vm["class"]),
                named(vm["host"], "host"),
                *(binary(pages * size) for pages in (vm["pages"], vm["shared_on_host"], away(vm))),
            )
            for vm in some[:_VMS]
        ],
        f"{_first(_VMS, len(some), 'VMs')}Zero pages apart. ksm fleet place says which of them should move.",
    )


def _first(most: int, count: int, what: str) -> str:
    return f"The first {most} of {count:,} {what}. " if count > most else ""


def _known(answer: Analysis) -> Listing:
    size = answer.page_size
    return Listing(
        ("", "different", "memory", "saved today", "saved on one host"),
        [
            (
                KINDS[row["category"]],
                f"{row['contents']:,}",
                *(binary(row[field] * size) for field in ("pages", "saved", "saved_on_one_host")),
            )
            for row in answer.known
        ],
    )


def _left_out(answer: Analysis) -> Listing:
    worst = sorted(answer.left_out, key=lambda one: not one.partial)
    return Listing(
        ("file", "is missing", "why"),
        [(one.path, "yes" if one.partial else "no", one.why) for one in worst[:_FILES]],
        _first(_FILES, len(worst), "files"),
    )

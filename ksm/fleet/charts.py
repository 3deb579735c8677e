"""The charts of a fleet's analysis, each with the table behind it: for the report page, notebooks and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ksm.charts import Figure, cells, labels, load_altair, stacked, unit
from ksm.fleet.analysis import PARTS, Analysis, Sharing
from ksm.units import binary, many

MOST = 24
"""More hosts or classes than these are not drawn: the charts have those that matter most, the tables `ROWS`."""
ROWS = 200

KINDS: Mapping[str, str] = MappingProxyType(
    {"other": "any content", "zero": "zero pages", "filled": "filled with one byte", "files": "pages of files given"}
)
"""What contents are, in words, by their category."""

_STAYS = "stays in memory"
_OF_VMS = ("no other VM has it", "zero", "copies on its host", "copies on other hosts only")


def figures(answer: Analysis) -> dict[str, Figure]:
    """The charts of an analysis, by kind.

    Kinds: "saving" (today and on one host, by where it comes from), "hosts" (what the memory of each is made of),
    "memory" (who else has what VMs have, by class), "classes" and "pairs" (what classes, and hosts, have in common),
    "spread" (classes over hosts), "contents" (those with most copies). Where there is one class or one host, those that
    would compare them are left out.

    Raises:
        UnsupportedError: altair is not installed.

    >>> from ksm.fleet import Vm, analyze, fingerprint_vm
    >>> for name in ("a", "b"):
    ...     _ = fingerprint_vm(b"x" * 4096 + name.encode() * 4096, "two", Vm(name=name, kind=name, host="h"))
    >>> list(figures(analyze("two")))
    ['saving', 'hosts', 'memory', 'classes', 'contents']
    """
    load_altair()
    found = [_saving(answer), _hosts(answer), _memory(answer)]
    classes = _added(answer, lambda vm: vm["class"])
    if len(classes) > 1:
        title = "What classes have in common"
        found.append(_pairs(answer.classes, "classes", title, _IN_COMMON.format("classes", "class", "")))
    if len(answer.hosts) > 1 and answer.host_pairs is not None:
        title, of_no_use = "What hosts have in common", " KSM merges none of it between hosts."
        found.append(_pairs(answer.host_pairs, "pairs", title, _IN_COMMON.format("hosts", "host", of_no_use)))
    if len(answer.hosts) > 1 and len(classes) > 1:
        found.append(_spread(answer, classes))
    found.append(_contents(answer))
    return {figure.name: figure for figure in found if figure.rows}


_IN_COMMON = "Contents that VMs of both {0} have; on the diagonal, that two VMs of the {1} have.{2} Zero pages apart."


def named(name: str, what: str = "class") -> str:
    """A class or host, which may have no name.

    >>> named(""), named("web")
    ('(no class)', 'web')
    """
    return name or f"(no {what})"


# ---- the saving ------------------------------------------------------------------------------------------


def _saving(answer: Analysis) -> Figure:
    rows = {"as placed today": answer.total, "all on one host": answer.one_host}
    more = answer.one_host.saved_bytes - answer.total.saved_bytes
    lost = answer.total.lost_to_limit * answer.page_size
    said = f"{binary(more)} more would be saved on one host: pages that are equal and live apart. " if more > 0 else ""
    limit = f" max_page_sharing costs {binary(lost)} of today's, taken off in proportion." if lost else ""
    return Figure(
        "saving",
        "Where the saving comes from",
        f"{said}What is equal within a VM merges anywhere; between VMs and classes it takes those on one host.{limit}",
        stacked(list(rows), [_STAYS, *PARTS], [_made_of(row) for row in rows.values()], "memory"),
        ("", "memory", "saved", "of it", *PARTS, "limit costs", "bookkeeping", "profit"),
        [
            (name, *_saved(row), binary(row.lost_to_limit * row.page_size), binary(row.metadata_bytes), _profit(row))
            for name, row in rows.items()
        ],
    )


def _made_of(row: Sharing) -> list[float]:
    """Bytes: what stays, and the saving by part, what `max_page_sharing` costs taken off the parts that it limits."""
    zeros, *rest = (float(getattr(row, field)) for field in PARTS.values())
    left = 1 - row.lost_to_limit / sum(rest) if sum(rest) else 0.0
    return [float(row.frames_bytes), *(pages * row.page_size for pages in (zeros, *(part * left for part in rest)))]


def _saved(row: Sharing) -> tuple[str, ...]:
    whole = row.pages * row.page_size
    parts = (binary(getattr(row, field) * row.page_size) for field in PARTS.values())
    return (binary(whole), binary(row.saved_bytes), f"{row.saved_bytes / max(whole, 1):.1%}", *parts)


def _profit(row: Sharing) -> str:
    return binary(row.general_profit)


def _hosts(answer: Analysis) -> Figure:
    best = sorted(answer.hosts, key=lambda row: -row.saved_bytes)
    lines = [
        (
            row.name,
            f"{row.vms:,}",
            *_saved(row),
            binary(row.pages_shared * row.page_size),
            binary(row.pages_unshared * row.page_size),
            _profit(row),
        )
        for row in best[:ROWS]
    ]
    drawn = best[:MOST]
    return Figure(
        "hosts",
        "What the memory of each host is made of",
        "Grey stays: pages that are unique on the host, and one frame for each content that merges. The rest is saved.",
        stacked(_short([row.name for row in drawn]), [_STAYS, *PARTS], [_made_of(row) for row in drawn], "memory"),
        ("host", "VMs", "memory", "saved", "of it", *PARTS, "shared, kept once", "unique", "profit"),
        lines,
        capped("hosts", len(best), "that save most"),
    )


def _short(names: Sequence[str]) -> list[str]:
    return labels(names, 18, paths=False)


def capped(what: str, count: int, which: str, drawn: int = MOST) -> str:
    """What was left out of a chart, and of its table.

    >>> capped("hosts", 300, "that save most")
    'Drawn are the 24 of 300 hosts that save most; the table has 200.'
    """
    if count <= drawn:
        return ""
    table = f"{ROWS:,}" if count > ROWS else "all"
    return f"Drawn are the {drawn} of {count:,} {what} {which}; the table has {table}."


# ---- who shares with whom --------------------------------------------------------------------------------


def _pairs(pairs: Sequence[Mapping[str, Any]], kind: str, title: str, caption: str) -> Figure:
    bytes_of: dict[tuple[str, str], int] = {}
    weight: dict[str, int] = {}
    for row in pairs:
        bytes_of[row["a"], row["b"]] = bytes_of[row["b"], row["a"]] = row["bytes"]
        for name in {row["a"], row["b"]}:
            weight[name] = weight.get(name, 0) + row["bytes"]
    chosen = _in_order(sorted(weight, key=lambda name: (-weight[name], name))[:MOST])
    names = _short([named(name) for name in chosen])
    amounts = [[bytes_of.get((a, b), 0) for b in chosen] for a in chosen]
    most = max((max(row) for row in amounts), default=0)
    size, of = unit(most)
    numbers: list[list[float | None]] = [[amount / size for amount in row] for row in amounts]
    return Figure(
        kind,
        title,
        f"{caption} In {of}.",
        cells(names, names, numbers, ("", "have in common"), ",.0f" if most >= 20 * size else ",.1f", of),
        ("", *names),
        [(name, *(binary(amount) for amount in row)) for name, row in zip(names, amounts, strict=True)],
        f"Shown are the {MOST} of {len(weight):,} with most in common." if len(weight) > MOST else "",
    )


def _in_order(names: Sequence[str]) -> list[str]:
    """h2 before h10."""
    return sorted(names, key=lambda name: ("".join(c for c in name if not c.isdigit()), len(name), name))


def _added(answer: Analysis, by: Callable[[Mapping[str, Any]], Any]) -> dict[Any, dict[str, int]]:
    """Figures of VMs, added up by what `by` says of each; those with most pages first."""
    found: dict[Any, dict[str, int]] = {}
    for vm in answer.vms:
        into = found.setdefault(by(vm), dict.fromkeys(("vms", *_ADDED), 0))
        into["vms"] += 1
        for field in _ADDED:
            into[field] += int(vm[field])
    return dict(sorted(found.items(), key=lambda one: -one[1]["pages"]))


_ADDED = ("pages", "zero_pages", "shared_on_host", "shared_in_fleet")


def _spread(answer: Analysis, classes: Mapping[str, Any]) -> Figure:
    both = _added(answer, lambda vm: (vm["class"], vm["host"]))
    hosts = _added(answer, lambda vm: vm["host"])
    down, across = _in_order(list(classes)[:MOST]), _in_order(list(hosts)[:MOST])
    numbers = [[_on_its_host(both.get((kind, host))) for host in across] for kind in down]
    rows, columns = _short([named(kind) for kind in down]), _short([named(host, "host") for host in across])
    return Figure(
        "spread",
        "How well classes are placed",
        "Of the pages that the class has on the host, zero pages apart, those of which another VM there has a copy. "
        "Empty: the class is not there.",
        cells(rows, columns, numbers, ("class", "host")),
        ("class", *columns),
        [
            (name, *("" if one is None else f"{one:.1%}" for one in line))
            for name, line in zip(rows, numbers, strict=True)
        ],
        f"Shown are the largest: {len(down)} of {many(len(classes), 'class', 'classes')}, {len(across)} of "
        f"{many(len(hosts), 'host')}."
        if max(len(classes), len(hosts)) > MOST
        else "",
    )


def _on_its_host(sums: Mapping[str, int] | None) -> float | None:
    full = sums["pages"] - sums["zero_pages"] if sums else 0
    return sums["shared_on_host"] / full if sums and full else None


def _memory(answer: Analysis) -> Figure:
    classes = _added(answer, lambda vm: vm["class"])
    size, lines = answer.page_size, []
    for kind, sums in list(classes.items())[:ROWS]:
        zero, here, fleet = sums["zero_pages"], sums["shared_on_host"], sums["shared_in_fleet"]
        lines.append((kind, sums, [size * pages for pages in (sums["pages"] - zero - fleet, zero, here, fleet - here)]))
    away = sum(sums["shared_in_fleet"] - sums["shared_on_host"] for sums in classes.values()) * size
    drawn = lines[:MOST]
    return Figure(
        "memory",
        "Who else has what VMs have",
        f"By class. {binary(away)} have copies on other hosts only, which KSM cannot merge.",
        stacked(_short([named(kind) for kind, _, _ in drawn]), _OF_VMS, [row for _, _, row in drawn], "memory"),
        ("class", "VMs", "memory", *_OF_VMS),
        [
            (named(kind), f"{sums['vms']:,}", binary(sums["pages"] * size), *(binary(amount) for amount in row))
            for kind, sums, row in lines
        ],
        capped("classes", len(classes), "that are largest"),
    )


# ---- contents --------------------------------------------------------------------------------------------


def _contents(answer: Analysis) -> Figure:
    drawn = answer.top[:12]
    names = labels([row["what"] or row["content"][:12] for row in drawn], 22, paths=False)
    amounts = [[float(row["copies"] * answer.page_size * (row["category"] == kind)) for kind in KINDS] for row in drawn]
    shown = [
        (
            row["content"],
            binary(row["copies"] * answer.page_size),
            *(f"{row[field]:,}" for field in ("copies", "vms", "classes", "hosts")),
            row["what"] or KINDS[row["category"]],
        )
        for row in answer.top[:ROWS]
    ]
    return Figure(
        "contents",
        "The contents that matter most",
        f"Those with most copies, of {many(answer.contents, 'content')} beside zero. Zero pages, pages filled with one "
        "byte and pages of files that were given have names; others are told by their fingerprint.",
        stacked(names, list(KINDS.values()), amounts, "memory of all copies"),
        ("content", "memory", "copies", "VMs", "classes", "hosts", "what"),
        shown,
        f"Drawn are the first {len(drawn)}; the table has {len(shown)}." if len(shown) > len(drawn) else "",
    )

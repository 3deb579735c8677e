"""The results as text, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.contest import Cost
from bench.host import sentence
from bench.rows import Row

STYLE = {"aim": "green", "must": "yellow", "missed": "bold red", "": ""}
SECTIONS = {"pages": "From the page bytes to the duplicates, ns a page", "keys": "The index alone, from 64-bit keys"}


def figure(value: float | None) -> str:
    """Three digits, or all of a whole number."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _cells(row: Row) -> tuple[str, ...]:
    got = row.why_not if row.got is None else f"{figure(row.got)} {row.unit}"
    return row.what, figure(row.must), figure(row.aim), got or "-", row.verdict


def text(console: Console, machine: dict[str, Any], rows: Sequence[Row], costs: Sequence[Cost]) -> None:
    """The tables for people."""
    console.print(sentence(machine), soft_wrap=True)
    console.print()
    result = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("what", "must", "aim", "got", ""):
        result.add_column(heading, justify="left" if heading in ("what", "") else "right")
    for row in rows:
        result.add_row(*_cells(row), style=STYLE[row.verdict] if console.is_terminal else "")
    console.print(result)
    console.print()
    for row in rows:
        if row.detail:
            made = ", ".join(f"{name} {figure(value)}" for name, value in row.detail.items())
            console.print(f"{row.what}: {made}", soft_wrap=True)
    for section in SECTIONS:
        some = [cost for cost in costs if cost.section == section]
        if some:
            console.print(f"\n{SECTIONS[section]}")
            console.print(_costs(some))
    for reason in dict.fromkeys(f"{cost.name}: {cost.why_not}" for cost in costs if cost.why_not):
        console.print(reason, soft_wrap=True)


def _sizes(costs: Sequence[Cost]) -> list[int]:
    return sorted({cost.pages for cost in costs})


def _by_name(costs: Sequence[Cost]) -> list[tuple[str, list[float | None]]]:
    """(name, ns a page by size), the fastest at the smallest size first."""
    sizes = _sizes(costs)
    found: dict[str, list[float | None]] = {}
    for cost in costs:
        line = found.setdefault(cost.name, [None] * len(sizes))
        line[sizes.index(cost.pages)] = None if cost.seconds is None else cost.seconds / cost.pages * 1e9
    return sorted(found.items(), key=lambda item: next((ns for ns in item[1] if ns is not None), 1e99))


def _costs(costs: Sequence[Cost]) -> Table:
    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("")
    for size in _sizes(costs):
        result.add_column(gibibytes(size), justify="right")
    for name, line in _by_name(costs):
        result.add_row(name, *(figure(ns) for ns in line))
    return result


def gibibytes(pages: int) -> str:
    """Pages of 4 KiB as memory, for people."""
    mib = pages * 4096 / 2**20
    return f"{mib / 1024:g} GiB" if mib >= 1024 else f"{mib:g} MiB"


# ---- Markdown ----------------------------------------------------------------------------------------


def markdown(machine: dict[str, Any], rows: Sequence[Row], costs: Sequence[Cost], brief: bool = False) -> str:
    """All tables; `brief`: the goals and what the contestants cost from the page bytes on."""
    lines = [f"Measured on {sentence(machine)}.", ""]
    lines += ["| what | must | aim | got |", "| --- | --- | --- | --- |"]
    shown = [row for row in rows if row.must is not None or not brief]
    lines += [f"| {what} | {must} | {aim} | {got} |" for what, must, aim, got, _ in map(_cells, shown)]
    for section, title in SECTIONS.items():
        some = [cost for cost in costs if cost.section == section and not (brief and section == "keys")]
        if not some:
            continue
        lines += ["", f"{title}:", "", "| | " + " | ".join(map(gibibytes, _sizes(some))) + " |"]
        lines.append("| --- |" + " ---: |" * len(_sizes(some)))
        lines += [f"| {name} | " + " | ".join(map(figure, line)) + " |" for name, line in _by_name(some)]
    if not brief:
        made = [row for row in rows if row.detail]
        lines += ["", "What the figures are made of:", ""]
        lines += [
            f"- {row.what}: " + ", ".join(f"{name} {figure(value)}" for name, value in row.detail.items())
            for row in made
        ]
    return "\n".join(lines) + "\n"


# ---- picture -----------------------------------------------------------------------------------------


def picture(rows: Sequence[Row], costs: Sequence[Cost]) -> Any:
    """An Altair chart: each goal's figure against what it must be, and each contestant's cost by size."""
    import altair as alt

    judged = [row for row in rows if row.verdict and row.got and row.must]
    bars = [
        {
            "what": row.what,
            "against the goal": row.must / row.got if row.less else row.got / row.must,
            "verdict": row.verdict,
            "aim": None if row.aim is None else (row.must / row.aim if row.less else row.aim / row.must),
        }
        for row in judged
    ]
    order = [bar["what"] for bar in bars]
    shades = alt.Scale(domain=["aim", "must", "missed"], range=["#2a9d8f", "#e9c46a", "#d1495b"])
    base = alt.Chart(alt.Data(values=bars)).encode(
        y=alt.Y("what:N", sort=order, title=None, axis=alt.Axis(labelLimit=480))
    )
    scale = alt.Scale(type="log")
    left = base.mark_point(filled=True, size=90).encode(
        x=alt.X("against the goal:Q", scale=scale, title="times as good as it must be (tick: the aim)"),
        color=alt.Color("verdict:N", scale=shades, legend=alt.Legend(title="reached")),
    )
    ticks = base.mark_tick(thickness=2, color="#555").encode(x=alt.X("aim:Q", scale=scale))
    rule = alt.Chart(alt.Data(values=[{"x": 1}])).mark_rule(strokeDash=[4, 4]).encode(x="x:Q")
    goals = (left + ticks + rule).properties(title="Goals", width=360)
    points = [
        {"name": cost.name, "GiB": cost.pages * 4096 / 2**30, "ns": cost.seconds / cost.pages * 1e9}
        for cost in costs
        if cost.section == "pages" and cost.seconds
    ]
    names = [name for name, _ in _by_name([cost for cost in costs if cost.section == "pages"])]
    lines = (
        alt.Chart(alt.Data(values=points))
        .mark_line(point=True)
        .encode(
            x=alt.X("GiB:Q", scale=alt.Scale(type="log", base=2), title="memory, GiB"),
            y=alt.Y("ns:Q", scale=alt.Scale(type="log"), title="ns a page"),
            color=alt.Color(
                "name:N", sort=names, scale=alt.Scale(scheme="tableau20"), legend=alt.Legend(title=None, labelLimit=240)
            ),
        )
        .properties(title="From the page bytes to the duplicates", width=360, height=320)
    )
    return alt.hconcat(goals, lines).resolve_scale(color="independent").configure_view(stroke=None)

"""What every chart shares: altair when it is there, colours, and a figure with the table behind it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ksm.errors import UnsupportedError

if TYPE_CHECKING:
    import altair

LIGHT: Mapping[str, str] = MappingProxyType(
    {
        "page": "#ffffff",
        "panel": "#f4f6f9",
        "ink": "#1a2230",
        "soft": "#566072",
        "line": "#d5dbe4",
        "grey": "#737d8c",
        "blue": "#1f6fd0",
        "green": "#0a8567",
        "orange": "#c9601c",
        "red": "#c22b3c",
    }
)
"""Colours by what they are for; text has a contrast of 4.5 to 1 and more, what is drawn 3 to 1 (WCAG 2.2 AA)."""

DARK: Mapping[str, str] = MappingProxyType(
    {
        "page": "#10151d",
        "panel": "#1a212c",
        "ink": "#e8edf4",
        "soft": "#a5b0c0",
        "line": "#344052",
        "grey": "#8b96a6",
        "blue": "#5aa5f5",
        "green": "#35b993",
        "orange": "#f08d50",
        "red": "#ff7a85",
    }
)

RAMP = ("#deeafa", "#93bdf0", "#3a7fd0", "#0b4a93")
"""Of a matrix's cells, from none to all; dark cells have white text, also on a dark page."""

CSS: Mapping[str, str] = MappingProxyType({name: f"var(--{name})" for name in LIGHT})
"""The same colours by the names that a page's style sheet gives them, which then follow light, dark and print."""

_FONT = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', 'DejaVu Sans', sans-serif"


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its title, what to see in it, and the table behind it.

    Attributes:
        name: unique on a page: letters, digits and hyphens.
        title, caption: for people; the caption is also the chart's description for those who do not see it.
        chart: of altair, without a theme, as wide as its container if its width says so.
        columns, rows: the same in numbers, ready to be read.
        note: what was left out, if anything was.

    >>> Figure("saving", "Saved", "More VMs save more.", None, ("VMs", "saved"), [("1", "0 B")]).note
    ''
    """

    name: str
    title: str
    caption: str
    chart: Any
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def load_altair() -> Any:
    """The module altair.

    Raises:
        UnsupportedError: it, or vl-convert that draws its pictures, is not installed.

    >>> load_altair().__name__
    'altair'
    """
    return need("altair")


def need(module: str) -> Any:
    """A module of the extra for reports.

    Raises:
        UnsupportedError: it is not installed.

    >>> need("no_such_module")
    Traceback (most recent call last):
        ...
    ksm.errors.UnsupportedError: charts and reports need no_such_module: pip install 'ksm[report]'
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = {"vl_convert": "vl-convert-python"}.get(module, module)
        raise UnsupportedError(f"charts and reports need {package}: pip install 'ksm[report]'") from None


def theme(colors: Mapping[str, str] = LIGHT) -> dict[str, Any]:
    """The Vega-Lite configuration of all charts, in `LIGHT`, `DARK` or `CSS` colours.

    Marks take their colour from a style by name ("blue-line", "red-rule", "grey-text", "blue-band", "blue-point", ...),
    series from the range of categories: grey, blue, green, orange, red.

    >>> theme()["style"]["red-rule"]["color"]
    '#c22b3c'
    """
    hues = ("grey", "blue", "green", "orange", "red", "ink", "soft")
    style: dict[str, Any] = {}
    for hue in hues:
        color = colors[hue]
        style[f"{hue}-line"] = {"color": color, "strokeWidth": 2}
        style[f"{hue}-rule"] = {"color": color, "strokeWidth": 1.5}
        style[f"{hue}-band"] = {"color": color, "fillOpacity": 0.2, "opacity": 1}
        style[f"{hue}-point"] = {"color": color, "size": 80, "opacity": 1}
        style[f"{hue}-text"] = {"color": color, "fontSize": 12}
        style[f"{hue}-bar"] = {"color": color}
    text = {"labelColor": colors["soft"], "titleColor": colors["ink"], "labelFontSize": 12, "titleFontSize": 12}
    return {
        "font": _FONT,
        "background": None if colors is CSS else colors["page"],
        "view": {"stroke": None},
        "axis": text
        | {
            "gridColor": colors["line"],
            "domainColor": colors["grey"],
            "tickColor": colors["grey"],
            "titleFontWeight": 500,
        },
        "legend": text | {"symbolStrokeWidth": 3, "orient": "top", "title": None, "labelLimit": 260},
        "title": {"color": colors["ink"], "fontSize": 14, "anchor": "start", "subtitleColor": colors["soft"]},
        "range": {
            "category": [colors[hue] for hue in ("grey", "blue", "green", "orange", "red")],
            "heatmap": list(RAMP),
            "ramp": list(RAMP),
        },
        "style": style,
    }


def values(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows as inline data.

    >>> values([{"vms": 1}]).to_dict()
    {'values': [{'vms': 1}]}
    """
    return load_altair().InlineData(values=[dict(row) for row in rows])


def unit(most: float) -> tuple[float, str]:
    """What to count bytes in on an axis.

    >>> unit(3 << 30)
    (1073741824, 'GiB')
    """
    gib, mib = 1 << 30, 1 << 20
    return (gib, "GiB") if most >= 2 * gib else (mib, "MiB") if most >= 2 * mib else (1024, "KiB")


def labels(names: Sequence[str], most: int = 28, paths: bool = True) -> list[str]:
    """The telling ends of names, of paths the last part, with a number after those that are there twice.

    >>> labels(["/tmp/a.raw", "/srv/a.raw", "web"]), labels(["site/h1"], paths=False)
    (['a.raw (1)', 'a.raw (2)', 'web'], ['site/h1'])
    """
    ends = [(name.rstrip("/").rpartition("/")[2] if paths else name) or name for name in names]
    ends = [end if len(end) <= most else "…" + end[-(most - 1) :] for end in ends]
    return [end if ends.count(end) == 1 else f"{end} ({n + 1})" for n, end in enumerate(ends)]


def stacked(names: Sequence[str], parts: Sequence[str], amounts: Sequence[Sequence[float]], title: str) -> Any:
    """Bars of bytes, a row a name, made up of parts.

    >>> drawn = stacked(["a"], ["zero", "other"], [[4096, 8192]], "memory")
    >>> [row["share"] for row in drawn.data.to_dict()["values"]]
    [0.33333, 0.66667]
    """
    alt = load_altair()
    size, name = unit(max((sum(row) for row in amounts), default=0))
    rows = [
        {
            "name": label,
            "part": part,
            "order": n,
            "amount": round(each / size, 4),
            "share": round(each / max(sum(row), 1), 5),
        }
        for label, row in zip(names, amounts, strict=True)
        for n, (part, each) in enumerate(zip(parts, row, strict=True))
    ]
    tips = [
        "name:N",
        "part:N",
        alt.Tooltip("amount:Q", format=",.1f", title=name),
        alt.Tooltip("share:Q", format=".1%"),
    ]
    chart = (
        alt.Chart(values(rows))
        .mark_bar()
        .encode(
            y=alt.Y("name:N", title=None, sort=list(names), axis=alt.Axis(labelLimit=150, domain=False, ticks=False)),
            x=alt.X("amount:Q", title=f"{title}, {name}", axis=alt.Axis(tickCount=8)),
            color=alt.Color("part:N", scale=alt.Scale(domain=list(parts))),
            order="order:Q",
            tooltip=tips,
        )
    )
    return chart.properties(width="container", height=len(names) * max(18, min(34, 300 // max(len(names), 1))))


def cells(
    rows: Sequence[str],
    columns: Sequence[str],
    numbers: Sequence[Sequence[float | None]],
    titles: tuple[str, str],
    form: str = ".0%",
    of: str = "share",
) -> Any:
    """A matrix in colours, from white for none to dark for the most; None leaves a cell out.

    Args:
        rows, columns: their names.
        numbers: [row][column].
        titles: of the rows and of the columns.
        form: how d3-format writes a number.
        of: what the numbers are, for the tooltip.

    >>> drawn = cells(["a", "b"], ["a", "b"], [[None, 0.5], [0.25, None]], ("of", "has"))
    >>> len(drawn.to_dict()["layer"])
    2
    """
    alt = load_altair()
    found: list[dict[str, Any]] = [
        {"row": row, "column": column, "number": round(float(number), 4)}
        for row, line in zip(rows, numbers, strict=True)
        for column, number in zip(columns, line, strict=True)
        if number is not None
    ]
    high = max([0.01, *(cell["number"] for cell in found)])
    axis = {"labelLimit": 120, "domain": False, "ticks": False, "grid": False}
    level = len(columns) * max(map(len, columns), default=0) <= 36  # characters, on a phone
    across = alt.Axis(**axis, labelAngle=0 if level else -45)
    base = alt.Chart(values(found)).encode(
        x=alt.X("column:N", title=titles[1], sort=list(columns), scale=alt.Scale(domain=list(columns)), axis=across),
        y=alt.Y("row:N", title=titles[0], sort=list(rows), scale=alt.Scale(domain=list(rows)), axis=alt.Axis(**axis)),
        tooltip=["row:N", "column:N", alt.Tooltip("number:Q", title=of, format=form.replace(".0%", ".1%"))],
    )
    scale = alt.Scale(domain=[0, high], range=list(RAMP))
    legend = alt.Legend(format=form, gradientLength=160, tickCount=3)
    layers = [base.mark_rect().encode(color=alt.Color("number:Q", scale=scale, legend=legend))]
    if len(columns) <= 9:
        dark = alt.condition(f"datum.number > {0.55 * high:.6g}", alt.value("#ffffff"), alt.value("#10151d"))
        layers.append(base.mark_text(fontSize=11).encode(text=alt.Text("number:Q", format=form), color=dark))
    chart = alt.layer(*layers).resolve_scale(color="independent")
    return chart.properties(width="container", height=len(rows) * max(22, min(44, 340 // max(len(rows), 1))))


def standing_alone(figure: Figure, colors: Mapping[str, str] = LIGHT) -> altair.TopLevelMixin:
    """A figure's chart with title, theme and a fixed width, for notebooks and files.

    >>> alt = load_altair()
    >>> drawn = alt.Chart(values([{"n": 1}])).mark_bar().encode(x="n:Q").properties(width="container")
    >>> standing_alone(Figure("a", "A", "It is so.", drawn, (), ())).to_dict()["title"]["text"]
    'A'
    """
    alt = load_altair()
    chart = figure.chart.properties(width=640, title=alt.TitleParams(figure.title, subtitle=_wrapped(figure.caption)))
    # not configure(**theme()): that takes objects, and this is the configuration as Vega-Lite has it
    found: altair.TopLevelMixin = chart.properties(config=alt.Config.from_dict(theme(colors)), padding=12)
    return found


def _wrapped(text: str, width: int = 100) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)

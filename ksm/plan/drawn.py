"""Charts of a plan's samples: what their memory is made of, and who shares with whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ksm.charts import RAMP, Figure, load_altair, values
from ksm.plan.result import Plan

GIB, MIB = 1 << 30, 1 << 20
MOST_BARS = 24
"""More samples than these are shown by class."""

PARTS = (
    ("zero", "zero"),
    ("within", "shared within the VM"),
    ("between", "shared between VMs"),
    ("unique", "unique"),
)


def unit(most: float) -> tuple[float, str]:
    """What to count bytes in on an axis.

    >>> unit(3 << 30)
    (1073741824, 'GiB')
    """
    return (GIB, "GiB") if most >= 2 * GIB else (MIB, "MiB") if most >= 2 * MIB else (1024, "KiB")


def composition(answer: Plan) -> Figure:
    """What the samples' memory is made of; by class where there are many samples.

    >>> import ksm
    >>> web = ksm.VMClass("web", [b"a" * 4096 + bytes(4096), b"a" * 4096 + b"2" * 8192])
    >>> figure = composition(ksm.plan(web, ksm.HostSpec(ram=1 << 16), simulate=False))
    >>> figure.caption
    "80% of the samples' pages are zero or have a copy; the rest is each VM's own."
    """
    alt = load_altair()
    by_class = len(answer.samples) > MOST_BARS
    groups: Sequence[Any] = answer.classes if by_class else answer.samples
    names = [each.name for each in groups]
    size, name = unit(max(each.pages for each in groups) * answer.page_size)
    rows, table = [], []
    for n, each in enumerate(groups):
        label = names[n] if names.count(names[n]) == 1 else f"{names[n]} ({n + 1})"
        for part, words in PARTS:
            pages = float(getattr(each, part))
            rows.append(
                {
                    "sample": _short(label),
                    "part": words,
                    "order": [p for p, _ in PARTS].index(part),
                    "amount": round(pages * answer.page_size / size, 4),
                    "share": round(pages / max(each.pages, 1), 5),
                }
            )
        kind = each.class_name if not by_class else f"{each.samples} samples"
        table.append((label, kind, f"{each.pages:,.0f}", *(f"{getattr(each, part):,.0f}" for part, _ in PARTS)))
    parts = [text for _, text in PARTS]
    order = list(dict.fromkeys(str(row["sample"]) for row in rows))
    chart = (
        alt.Chart(values(rows))
        .mark_bar()
        .encode(
            y=alt.Y("sample:N", title=None, sort=order, axis=alt.Axis(labelLimit=150, domain=False, ticks=False)),
            x=alt.X("amount:Q", title=f"touched memory, {name}"),
            color=alt.Color("part:N", scale=alt.Scale(domain=parts)),
            order="order:Q",
            tooltip=[
                "sample:N",
                "part:N",
                alt.Tooltip("amount:Q", format=",.1f", title=name),
                alt.Tooltip("share:Q", format=".1%"),
            ],
        )
    )
    total = sum(each.pages for each in answer.samples)
    unique = sum(each.unique for each in answer.samples)
    note = f"{len(answer.samples)} samples are shown by class: means over the samples of each." if by_class else ""
    return Figure(
        "composition",
        "What their memory is made of",
        f"{1 - unique / max(total, 1):.0%} of the samples' pages are zero or have a copy; the rest is each VM's own.",
        chart.properties(width="container", height=len(groups) * max(18, min(34, 300 // len(groups)))),
        ("sample" if not by_class else "class", "class" if not by_class else "of", "pages", *parts),
        table,
        note,
    )


def _short(text: str, most: int = 28) -> str:
    """A path's telling end."""
    text = text.rstrip("/").rpartition("/")[2] or text
    return text if len(text) <= most else "…" + text[-(most - 1) :]


def matrix(answer: Plan) -> Figure:
    """Of the row's pages, those whose content the column has; by class where there are many samples.

    >>> import ksm
    >>> web = ksm.VMClass("web", [b"a" * 4096 + b"1" * 4096, b"a" * 4096 + b"2" * 4096])
    >>> matrix(ksm.plan(web, ksm.HostSpec(ram=1 << 16), simulate=False)).rows[0][1:]
    ('', '50.0%')
    """
    alt = load_altair()
    by_class = len(answer.samples) > MOST_BARS
    pages = np.array([max(each.pages, 1) for each in answer.samples], np.float64)
    share = answer.overlap / pages[:, None]
    if by_class:
        names = [each.name for each in answer.classes]
        kinds = np.array([names.index(each.class_name) for each in answer.samples])
        share = np.array(
            [[_mean_pair(share, kinds == a, kinds == b) for b in range(len(names))] for a in range(len(names))]
        )
    else:
        names = [_short(each.name, 18) for each in answer.samples]
        names = [name if names.count(name) == 1 else f"{name} ({n + 1})" for n, name in enumerate(names)]
        np.fill_diagonal(share, np.nan)  # a sample shares everything with itself
    rows = [
        {"row": a, "column": b, "share": round(float(share[i, j]), 4)}
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if np.isfinite(share[i, j])
    ]
    known = [float(np.nanmax(share))] if rows else [0.0]
    axis = alt.Axis(labelLimit=120, domain=False, ticks=False, grid=False)
    base = alt.Chart(values(rows)).encode(
        x=alt.X(
            "column:N",
            title="have the contents",
            sort=names,
            scale=alt.Scale(domain=names),
            axis=axis.copy() if len(names) < 6 else alt.Axis(labelLimit=120, domain=False, ticks=False, labelAngle=-45),
        ),
        y=alt.Y("row:N", title="of the pages of", sort=names, scale=alt.Scale(domain=names), axis=axis),
        tooltip=["row:N", "column:N", alt.Tooltip("share:Q", format=".1%")],
    )
    high = float(max(0.01, *known))
    layers = [
        base.mark_rect().encode(
            color=alt.Color(
                "share:Q",
                scale=alt.Scale(domain=[0, high], range=list(RAMP)),
                legend=alt.Legend(format="%", gradientLength=160),
            )
        )
    ]
    if len(names) <= 9:
        dark = alt.condition(f"datum.share > {0.55 * high:.6g}", alt.value("#ffffff"), alt.value("#10151d"))
        layers.append(base.mark_text(fontSize=11).encode(text=alt.Text("share:Q", format=".0%"), color=dark))
    return Figure(
        "matrix",
        "Who shares with whom",
        "Of the pages of the row, those whose content the column has, too; zero pages apart.",
        alt.layer(*layers)
        .resolve_scale(color="independent")
        .properties(width="container", height=len(names) * max(22, min(44, 340 // max(len(names), 1)))),
        ("of the pages of", *names),
        [
            (a, *("" if not np.isfinite(share[i, j]) else f"{share[i, j]:.1%}" for j in range(len(names))))
            for i, a in enumerate(names)
        ],
        f"{len(answer.samples)} samples are shown by class: means over pairs of samples." if by_class else "",
    )


def _mean_pair(share: Any, rows: Any, columns: Any) -> float:
    """The mean over pairs of different samples; NaN where there is none."""
    block = share[np.ix_(rows, columns)]
    pairs = block.size - (int(rows.sum()) if (rows == columns).all() else 0)
    total = block.sum() - (np.trace(block) if (rows == columns).all() else 0.0)
    return float(total / pairs) if pairs else float("nan")

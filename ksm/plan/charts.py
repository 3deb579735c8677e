"""A plan's charts, each with the table behind it: the same for the report page, notebooks and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ksm.charts import Figure, load_altair, values
from ksm.errors import PlanError
from ksm.plan.result import Curve, HostPlan, Plan, Timeline
from ksm.units import binary, clock

GIB, MIB = 1 << 30, 1 << 20
MOST_BARS = 24
"""More samples than these are shown by class."""
_POINTS, _ROWS = 120, 26

PARTS = (
    ("zero", "zero"),
    ("within", "shared within the VM"),
    ("between", "shared between VMs"),
    ("unique", "unique"),
)


def figures(answer: Plan, host: int = 0, prefix: str = "") -> dict[str, Figure]:
    """The charts of a plan for one of its hosts, by kind.

    Kinds: "fits", "saving", "frames" (against the number of VMs), "pace", "cpu" (over time), "risk" (where there is a
    recording), and, of the samples, "composition" and "matrix". `prefix` goes before the figures' names.

    Raises:
        PlanError: no such host. UnsupportedError: altair is not installed.

    >>> import ksm
    >>> web = ksm.VMClass("web", [b"a" * 4096 + b"1" * 4096, b"a" * 4096 + b"2" * 4096])
    >>> sorted(figures(ksm.plan(web, ksm.HostSpec(ram=1 << 16))))
    ['composition', 'cpu', 'fits', 'frames', 'matrix', 'pace', 'saving']
    """
    load_altair()
    if not 0 <= host < len(answer.hosts):
        raise PlanError(f"host {host} of {len(answer.hosts)}: they are counted from 0")
    each = answer.hosts[host]
    found = {
        "fits": _fits(answer, each),
        "saving": _saving(answer, each),
        "frames": _frames(answer, each),
        "pace": _pace(each),
        "cpu": _cpu(each),
    }
    if each.risk is not None:
        found["risk"] = _risk(answer, each)
    found["composition"] = _composition(answer)
    found["matrix"] = _matrix(answer)
    return {kind: _named(figure, prefix + kind) for kind, figure in found.items()}


def _named(figure: Figure, name: str) -> Figure:
    return Figure(name, figure.title, figure.caption, figure.chart, figure.columns, figure.rows, figure.note)


def unit(most: float) -> tuple[float, str]:
    """What to count bytes in on an axis.

    >>> unit(3 << 30)
    (1073741824, 'GiB')
    """
    return (GIB, "GiB") if most >= 2 * GIB else (MIB, "MiB") if most >= 2 * MIB else (1024, "KiB")


def _some(curve: Curve, end: int, most: int) -> list[int]:
    """Indexes of points of the curve, evenly spread up to `end` VMs."""
    last = int(np.searchsorted(curve.vms, end, side="right"))
    found: list[int] = np.unique(np.linspace(0, last - 1, min(most, last)).astype(np.int64)).tolist()
    return found


def extent(each: HostPlan) -> int:
    """The number of VMs up to which charts and controls go: somewhat beyond all that fits.

    >>> import ksm
    >>> web = ksm.VMClass("web", [b"a" * 4096 + b"1" * 4096, b"a" * 4096 + b"2" * 4096])
    >>> extent(ksm.plan(web, ksm.HostSpec(ram=1 << 16), simulate=False).hosts[0])
    16
    """
    fits = each.fits
    beyond = max(fits.without_ksm, fits.high, fits.recommended, fits.unmerged, 3)
    return int(min(each.curve.vms[-1], np.ceil(1.3 * beyond)))


# ---- against the number of VMs --------------------------------------------------------------------------


def _x(alt: Any, end: int) -> Any:
    axis = alt.Axis(tickMinStep=1, format=",d", grid=False, tickCount=8)
    return alt.X("vms:Q", title="VMs on the host", axis=axis, scale=alt.Scale(domain=[0, end], nice=False))


def _band(
    curve: Curve, name: str, each: HostPlan, size: float, title: str, plain: tuple[str, str] | None = None
) -> tuple[list[Any], Sequence[dict[str, Any]]]:
    """Layers of a band, its middle where that is known, and a dashed line of another field to compare with."""
    alt = load_altair()
    end = extent(each)
    rows = []
    for k in _some(curve, end, _POINTS):
        row: dict[str, Any] = {"vms": int(curve.vms[k])}
        for key, field in (("low", name + "_low"), ("high", name + "_high"), ("middle", name)):
            value = float(getattr(curve, field)[k]) / size
            row[key] = round(value, 4) if np.isfinite(value) else None
        if plain is not None:
            row["plain"] = round(float(getattr(curve, plain[0])[k]) / size, 4)
        rows.append(row)
    base = alt.Chart(values(rows)).encode(x=_x(alt, end))
    tips = [
        alt.Tooltip("vms:Q", title="VMs"),
        *([alt.Tooltip("middle:Q", title=title, format=",.2f")] if rows[-1]["middle"] is not None else []),
        alt.Tooltip("low:Q", title="low", format=",.2f"),
        alt.Tooltip("high:Q", title="high", format=",.2f"),
        *([alt.Tooltip("plain:Q", title=plain[1], format=",.2f")] if plain else []),
    ]
    layers = [base.mark_area(style="blue-band").encode(y=alt.Y("low:Q", title=title), y2="high:Q", tooltip=tips)]
    if any(row["middle"] is not None for row in rows):
        layers.append(base.mark_line(style="blue-line").encode(y="middle:Q", tooltip=tips))
    if plain is not None:
        layers.append(
            base.mark_line(style="grey-line", strokeDash=[6, 4]).encode(y="plain:Q", tooltip=tips),
        )
        label = base.transform_filter(f"datum.vms == {rows[_label_at(rows)]['vms']}")
        layers.append(
            label.mark_text(style="soft-text", align="right", dx=-8, dy=-6).encode(
                y="plain:Q", text=alt.value(plain[1])
            )
        )
    return layers, rows


def _label_at(rows: Sequence[dict[str, Any]]) -> int:
    return min(len(rows) - 1, max(1, round(0.72 * len(rows))))


def _fits(answer: Plan, each: HostPlan) -> Figure:
    alt = load_altair()
    curve, fits, spec, policy = each.curve, each.fits, each.host, answer.policy
    size, name = unit(spec.ram)
    layers, _ = _band(curve, "need", each, size, f"memory, {name}", ("without", "without merging"))
    top = max(1.35 * spec.usable, spec.usable + spec.swap * 1.05) / size
    for layer in layers:
        layer.mark.clip = True
    scale = alt.Scale(domain=[0, round(top, 4)], nice=False)
    layers[0] = layers[0].encode(y=alt.Y("low:Q", title=f"memory, {name}", scale=scale))
    usable, usual = spec.usable / size, spec.usable * (1 - policy.headroom) / size
    params = [alt.param(name="ksm_usable", value=usable), alt.param(name="ksm_vms", value=fits.recommended)]
    one = alt.Chart(values([{}]))
    lines = [("ksm_usable", "red-rule", [1, 0], "usable RAM", -6)]
    if policy.headroom:
        lines.append((f"ksm_usable * {1 - policy.headroom:.6g}", "red-rule", [5, 4], "with headroom", 13))
    for value, style, dash, text, dy in lines:
        at = one.transform_calculate(y=value)
        layers.append(at.mark_rule(style=style, strokeDash=dash, clip=True).encode(y="y:Q"))
        layers.append(
            at.mark_text(style="red-text", align="left", dx=6, dy=dy).encode(
                y="y:Q", x=alt.value(0), text=alt.value(text)
            )
        )
    at = one.transform_calculate(vms="ksm_vms")
    layers.append(at.mark_rule(style="green-rule", strokeDash=[2, 3]).encode(x=_x(alt, extent(each))))
    points = [
        {"vms": n, "y": round(y, 4), "text": text}
        for n, y, text in (
            (fits.without_ksm, usual, "without KSM"),
            (fits.confident, usual, f"{policy.confidence:.0%} sure"),
            (fits.broken, usable + spec.swap / size, f"{policy.broken:.0%} may break"),
        )
        if n <= extent(each)
    ]
    tips = [alt.Tooltip("text:N", title="fit"), alt.Tooltip("vms:Q", title="VMs")]
    mark = alt.Chart(values(points)).encode(x=_x(alt, extent(each)), y="y:Q", tooltip=tips)
    layers.append(mark.mark_point(style="green-point", filled=True, clip=True))
    layers.append(mark.mark_text(style="ink-text", dy=16, dx=4, align="right", clip=True).encode(text="vms:Q"))
    chart = alt.layer(*layers).add_params(*params).properties(width="container", height=320)
    return Figure(
        "fits",
        "Memory against the number of VMs",
        f"{fits.recommended} VMs fit: where the band of what merging leaves meets the line of the usable RAM. "
        + _band_words(answer, each),
        chart,
        ("VMs", "merged", "low", "high", "without merging", f"{policy.broken:.0%} broken"),
        _table(each, ("need", "need_low", "need_high", "without", "broken"), binary),
    )


def _band_words(answer: Plan, each: HostPlan) -> str:
    if each.fits.mean is None:
        return "One sample gives bounds only: VMs all alike below, nothing shared between them above."
    return f"The band holds the truth with {answer.policy.confidence:.0%} confidence."


def _table(each: HostPlan, fields: Sequence[str], show: Any) -> list[tuple[str, ...]]:
    """Rows of the curve: some, and where it is settled how many fit."""
    curve, fits = each.curve, each.fits
    wanted = {0, *_some(curve, extent(each), _ROWS)}
    for n in (fits.without_ksm, fits.confident, fits.broken, fits.recommended):
        wanted |= set(np.flatnonzero(curve.vms == n).tolist())

    def cell(value: float) -> str:
        return show(value) if np.isfinite(value) else "unknown"

    return [(f"{curve.vms[k]:,}", *(cell(float(getattr(curve, f)[k])) for f in fields)) for k in sorted(wanted)]


def _saving(answer: Plan, each: HostPlan) -> Figure:
    alt = load_altair()
    size, name = unit(float(np.max(each.curve.saved_high)))
    layers, _ = _band(each.curve, "saved", each, size, f"saved, {name}")
    saved = each.frames["saved"]
    said = "" if saved is None else f"{binary(saved)} with {each.fits.recommended} VMs, bookkeeping paid. "
    return Figure(
        "saving",
        "What merging saves",
        said + _band_words(answer, each),
        alt.layer(*layers).properties(width="container", height=260),
        ("VMs", "saved", "low", "high", "bookkeeping"),
        _table(each, ("saved", "saved_low", "saved_high", "bookkeeping"), binary),
    )


def _frames(answer: Plan, each: HostPlan) -> Figure:
    alt = load_altair()
    curve = each.curve
    big = float(curve.pages[-1]) >= 2e6
    layers, _ = _band(
        curve,
        "frames",
        each,
        1e6 if big else 1e3,
        f"{'million' if big else 'thousand'} frames",
        ("pages", "pages touched"),
    )
    return Figure(
        "frames",
        "Frames that hold the pages",
        "How many page frames the guests' pages take once merging has settled. " + _band_words(answer, each),
        alt.layer(*layers).properties(width="container", height=260),
        ("VMs", "pages", "frames", "low", "high", "pages_unshared"),
        _table(each, ("pages", "frames", "frames_low", "frames_high", "unshared"), lambda value: f"{value:,.0f}"),
    )


# ---- over time -------------------------------------------------------------------------------------------


def _time_axis(alt: Any, most: float) -> Any:
    """Seconds on a logarithmic axis, labelled as people say them."""
    ticks = [t for t in (1, 10, 60, 600, 3600, 6 * 3600, 86400, 7 * 86400) if t <= most * 1.2]
    label = (
        "datum.value < 60 ? datum.value + ' s' : datum.value < 3600 ? datum.value / 60 + ' min' : "
        "datum.value < 86400 ? datum.value / 3600 + ' h' : datum.value / 86400 + ' d'"
    )
    axis = alt.Axis(values=ticks, labelExpr=label, grid=False)
    return alt.X("seconds:Q", title="after a cold start", scale=alt.Scale(type="log", nice=False), axis=axis)


_LABELS = ("default", "recommended", "simulated")


def _lines(alt: Any, each: HostPlan) -> Any:
    present = [label for label in _LABELS if any(line.label == label for line in each.timelines)]
    return {
        "color": alt.Color("label:N", scale=alt.Scale(domain=present)),
        "strokeDash": alt.StrokeDash(
            "label:N", scale=alt.Scale(domain=present, range=[[6, 4], [1, 0], [2, 2]][: len(present)])
        ),
        "x": _time_axis(alt, max(float(line.seconds[-1]) for line in each.timelines)),
    }


def _thin(line: Timeline, most: int = _POINTS) -> list[int]:
    found = np.linspace(0, len(line.seconds) - 1, min(most, len(line.seconds))).astype(np.int64)
    return sorted({int(k) for k in found})


def _pace(each: HostPlan) -> Figure:
    alt = load_altair()
    rows, table = [], []
    for line in each.timelines:
        end = float(line.pages_sharing[-1]) or 1.0
        for k in _thin(line):
            if line.seconds[k] >= 0.01:
                share = float(line.pages_sharing[k]) / end
                rows.append(
                    {
                        "label": line.label,
                        "seconds": round(float(line.seconds[k]), 3),
                        "share": round(share, 5),
                        "pages": int(line.pages_sharing[k]),
                        "time": clock(float(line.seconds[k])),
                    }
                )
        for k in _thin(line, 10):
            table.append(
                (
                    line.label,
                    clock(float(line.seconds[k])),
                    f"{line.pages_sharing[k]:,.0f}",
                    f"{line.cpu_seconds[k]:.2f} s",
                )
            )
    tips = [
        alt.Tooltip("label:N", title="tunables"),
        alt.Tooltip("time:N", title="after"),
        alt.Tooltip("pages:Q", title="pages_sharing", format=",d"),
        alt.Tooltip("share:Q", title="of its end", format=".1%"),
    ]
    y = alt.Y(
        "share:Q", title="pages_sharing, of what it ends at", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])
    )
    chart = alt.Chart(values(rows)).mark_line(strokeWidth=2, point=False).encode(y=y, tooltip=tips, **_lines(alt, each))
    same = ""
    if each.check is not None:
        same = (
            f" Simulated: {each.check.vms} VMs, one content in {each.check.thinning} of the samples' own, "
            "a smaller load and so a shorter time."
        )
    return Figure(
        "pace",
        "How soon pages_sharing is there",
        f"From a cold start of {each.fits.recommended} VMs: 99 % after {clock(each.settle.cold[99])} with "
        f"pages_to_scan {each.settle.pages_to_scan:,}, after {clock(each.default.cold[99])} with the default of "
        f"{each.default.pages_to_scan:,}.{same}",
        chart.properties(width="container", height=260),
        ("tunables", "after", "pages_sharing", "ksmd's CPU so far"),
        table,
    )


def _cpu(each: HostPlan) -> Figure:
    alt = load_altair()
    rows, table = [], []
    for line in each.timelines:
        at = _thin(line, 25)
        steps = np.diff(line.cpu_seconds[at]) / np.maximum(np.diff(line.seconds[at]), 1e-9)
        for k, share in zip(at[1:], steps, strict=True):
            begin = float(line.seconds[at[at.index(k) - 1]])
            for moment in (max(begin, 0.01), float(line.seconds[k])):
                rows.append({"label": line.label, "seconds": round(moment, 3), "share": round(float(share), 5)})
        for share in range(0, 101, 20):
            k = min(len(line.seconds) - 1, round(share / 100 * (len(line.seconds) - 1)))
            table.append((line.label, clock(float(line.seconds[k])), f"{line.cpu_seconds[k]:.2f} s"))
    tips = [alt.Tooltip("label:N", title="tunables"), alt.Tooltip("share:Q", title="of a CPU", format=".1%")]
    y = alt.Y("share:Q", title="ksmd, of one CPU", axis=alt.Axis(format=".0%"))
    chart = alt.Chart(values(rows)).mark_line(strokeWidth=2).encode(y=y, tooltip=tips, **_lines(alt, each))
    return Figure(
        "cpu",
        "What ksmd takes meanwhile",
        f"{each.settle.cpu_cold:.1%} of a CPU until 99 % are merged, {each.settle.cpu_steady:.1%} afterwards; with the "
        f"defaults {each.default.cpu_cold:.1%} and {each.default.cpu_steady:.1%}.",
        chart.properties(width="container", height=260),
        ("tunables", "after", "ksmd's CPU so far"),
        table,
    )


def _risk(answer: Plan, each: HostPlan) -> Figure:
    alt = load_altair()
    risk = each.risk
    assert risk is not None
    rows, table = [], []
    for seen in risk.breaking:
        some = np.unique(np.linspace(0, len(seen.seconds) - 1, min(200, len(seen.seconds))).astype(np.int64))
        # a minute that is left out must not be the worst one
        some = np.union1d(some, [int(np.argmax(seen.vm_share))]) if len(seen.seconds) else some
        for k in some.tolist():
            minute = round(float(seen.seconds[k]) / 60, 3)
            for who, share in (("all its VMs", seen.share[k]), ("the VM hit worst", seen.vm_share[k])):
                rows.append({"recording": seen.name, "who": who, "minute": minute, "share": round(float(share), 5)})
        table.append(
            (
                seen.name,
                seen.class_name,
                f"{seen.processes:,}",
                clock(seen.duration),
                f"{seen.median:.2%}",
                f"{seen.worst:.2%}",
                clock(seen.worst_at),
                f"{seen.ever:.1%}",
            )
        )
    base = alt.Chart(values(rows)).encode(
        x=alt.X("minute:Q", title="minutes of the recording", axis=alt.Axis(grid=False)),
        y=alt.Y("share:Q", title="of the merged pages, written in a minute", axis=alt.Axis(format="%")),
        color=alt.Color("who:N", scale=alt.Scale(domain=["all its VMs", "the VM hit worst"])),
        detail="recording:N",
        tooltip=["recording:N", "who:N", "minute:Q", alt.Tooltip("share:Q", format=".2%")],
    )
    line = alt.Chart(values([{"y": answer.policy.broken}])).encode(y="y:Q")
    layers = [
        base.mark_line(strokeWidth=2, point=len(rows) < 12),
        line.mark_rule(style="red-rule", strokeDash=[5, 4]),
        line.mark_text(style="red-text", align="left", dx=6, dy=-6).encode(
            x=alt.value(0), text=alt.value("what the policy has room for")
        ),
    ]
    return Figure(
        "risk",
        "How fast sharing breaks",
        f"In the worst minute recorded {risk.worst:.1%} of a VM's merged pages were written, in the median minute "
        f"{risk.median:.2%}.",
        alt.layer(*layers).properties(width="container", height=260),
        ("recording", "class", "processes", "length", "median minute", "worst minute", "at", "ever"),
        table,
    )


# ---- of the samples --------------------------------------------------------------------------------------


def _composition(answer: Plan) -> Figure:
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
            color=alt.Color("part:N", scale=alt.Scale(domain=parts), legend=alt.Legend(columns=2)),
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


def _matrix(answer: Plan) -> Figure:
    """Of the row's pages, those whose content the column has; by class where there are many samples."""
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
                scale=alt.Scale(domain=[0, high], range=list(_ramp())),
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


def _ramp() -> Sequence[str]:
    from ksm.charts import RAMP

    return RAMP


def _mean_pair(share: Any, rows: Any, columns: Any) -> float:
    """The mean over pairs of different samples; NaN where there is none."""
    block = share[np.ix_(rows, columns)]
    pairs = block.size - (int(rows.sum()) if (rows == columns).all() else 0)
    total = block.sum() - (np.trace(block) if (rows == columns).all() else 0.0)
    return float(total / pairs) if pairs else float("nan")

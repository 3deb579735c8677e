"""A plan's charts, each with the table behind it: the same for the report page, notebooks and pictures."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ksm.charts import Figure, load_altair, unit, values
from ksm.errors import PlanError
from ksm.plan.drawn import composition, matrix
from ksm.plan.result import Curve, HostPlan, Plan, Timeline
from ksm.units import binary, clock

_POINTS, _ROWS = 120, 26


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
    found["composition"] = composition(answer)
    found["matrix"] = matrix(answer)
    return {kind: _named(figure, prefix + kind) for kind, figure in found.items()}


def _named(figure: Figure, name: str) -> Figure:
    return Figure(name, figure.title, figure.caption, figure.chart, figure.columns, figure.rows, figure.note)


def _some(curve: Curve, end: int, most: int) -> list[int]:
    """Indexes of points of the curve, evenly spread up to `end` VMs."""
    last = int(np.searchsorted(curve.vms, end, side="right"))
    found: list[int] = np.unique(np.linspace(0, last - 1, min(most, last)).astype(np.int64)).tolist()
    return found


def extent(each: HostPlan) -> int:
    """The number of VMs up to which charts and controls go: somewhat beyond all that fits.

    >>> import ksm
    >>> web = ksm.VMClass("web", [b"a" * 4096 + number * 4096 for number in (b"1", b"2", b"3")])
    >>> extent(ksm.plan(web, ksm.HostSpec(ram=1 << 16), simulate=False).hosts[0])
    16
    """
    fits = each.fits
    high = fits.high if fits.mean is None else min(fits.high, 3 * fits.mean)  # two samples leave nearly all possible
    beyond = max(fits.without_ksm, high, fits.recommended, fits.unmerged, 3)
    return int(min(each.curve.vms[-1], np.ceil(1.3 * beyond)))


# ---- against the number of VMs --------------------------------------------------------------------------


def _x(alt: Any, end: int) -> Any:
    axis = alt.Axis(tickMinStep=1, format=",d", grid=False, tickCount=8)
    return alt.X("vms:Q", title="VMs on the host", axis=axis, scale=alt.Scale(domain=[0, end], nice=False))


def _rows(curve: Curve, name: str, end: int, size: float, **fields: str) -> list[dict[str, Any]]:
    """Points of a field of the curve with its low and high, and of other fields, by the names given."""
    wanted = {"low": name + "_low", "high": name + "_high", "middle": name} | fields
    rows = []
    for k in _some(curve, end, _POINTS):
        row: dict[str, Any] = {"vms": int(curve.vms[k])}
        for key, field in wanted.items():
            value = float(getattr(curve, field)[k]) / size
            row[key] = round(value, 4) if np.isfinite(value) else None
        rows.append(row)
    return rows


def _band(base: Any, rows: Sequence[dict[str, Any]], y: Any, **others: str) -> Any:
    """The layer from low to high; its tooltip tells the middle, too, and the other fields under their titles."""
    alt = load_altair()
    tips = [alt.Tooltip("vms:Q", title="VMs", format=",d")]
    titles = ({"middle": "on average"} if rows[-1]["middle"] is not None else {}) | {"low": "low", "high": "high"}
    for field, words in (titles | others).items():
        tips.append(alt.Tooltip(f"{field}:Q", title=words, format=",.2f"))
    return base.mark_area(style="blue-band").encode(y=y, y2="high:Q", tooltip=tips)


def _colored(names: Sequence[str], chart: Any, name: str) -> Any:
    """The chart in the colour that is for one of the names, which the legend tells."""
    alt = load_altair()
    color = alt.Color("series:N", scale=alt.Scale(domain=list(names)), legend=alt.Legend(symbolType="stroke"))
    return chart.transform_calculate(series=f"'{name}'").encode(color=color)


_SERIES = ("without merging", "merged", "what fits", "just after pages broke", "usable RAM")
"""Of the chart of what fits, in the order of the theme's colours."""


def _fits(answer: Plan, each: HostPlan) -> Figure:
    alt = load_altair()
    fits, spec, policy = each.fits, each.host, answer.policy
    size, name = unit(spec.ram)
    usable, swap = spec.usable / size, spec.swap / size
    top = max(1.35 * usable, 1.05 * (usable + swap))
    rows = _rows(each.curve, "need", extent(each), size, plain="without", broken="broken")
    y = alt.Y("low:Q", title=f"memory, {name}", scale=alt.Scale(domain=[0, round(top, 4)], nice=False))
    base = alt.Chart(values(rows)).encode(x=_x(alt, extent(each)))
    layers = [_band(base, rows, y, plain="without merging", broken="just after pages broke")]
    of = functools.partial(_colored, _SERIES)
    lines = [("plain", "without merging", [6, 4]), ("broken", "just after pages broke", [1, 0])]
    lines += [("middle", "merged", [1, 0])] if fits.mean is not None else []
    for field, series, dash in lines:
        layers.append(of(base.mark_line(strokeDash=dash).encode(y=f"{field}:Q"), series))
    rules = [("ksm_usable", [1, 0])]
    rules += [(f"ksm_usable * {1 - policy.headroom:.6g}", [5, 4])] if policy.headroom else []
    rules += [(f"ksm_usable + {swap:.6g}", [1, 3])] if swap else []
    for value, dash in rules:
        at = alt.Chart(values([{}])).transform_calculate(y=value)
        layers.append(of(at.mark_rule(strokeDash=dash).encode(y="y:Q"), "usable RAM"))
    at = alt.Chart(values([{}])).transform_calculate(vms="ksm_vms")
    layers.append(of(at.mark_rule(strokeDash=[2, 3]).encode(x=_x(alt, extent(each))), "what fits"))
    for points, labels in _points(answer, each, size):
        layers += [of(points, "what fits"), labels]
    for layer in layers:
        layer.mark.clip = True
    params = [alt.param(name="ksm_usable", value=usable), alt.param(name="ksm_vms", value=fits.recommended)]
    return Figure(
        "fits",
        "Memory against the number of VMs",
        _fits_words(answer, each) + _band_words(answer, each, "need"),
        alt.layer(*layers).add_params(*params).properties(width="container", height=340),
        ("VMs", "merged", "low", "high", "without merging", f"{policy.broken:.0%} broken"),
        _table(each, ("need", "need_low", "need_high", "without", "broken"), binary),
    )


def _points(answer: Plan, each: HostPlan, size: float) -> list[tuple[Any, Any]]:
    """Where so many VMs just fit, on their curves: the number, and what it is where there is room to say so."""
    alt = load_altair()
    curve, fits, policy = each.curve, each.fits, answer.policy
    found = (
        (fits.without_ksm, curve.without, "without KSM", False),
        (fits.confident, curve.need_high, f"{policy.confidence:.0%} sure", False),
        (fits.broken, curve.broken, f"if {policy.broken:.0%} break", True),
    )
    layers = []
    for above in (False, True):
        rows = [
            {"vms": n, "y": round(float(np.interp(n, curve.vms, y)) / size, 4), "text": text}
            for n, y, text, over in found
            if over is above and n <= extent(each)
        ]
        if not rows:
            continue
        base = alt.Chart(values(rows)).transform_calculate(
            label="width < 520 ? format(datum.vms, ',') : format(datum.vms, ',') + ' (' + datum.text + ')'"
        )
        base = base.encode(x=_x(alt, extent(each)), y="y:Q", tooltip=[alt.Tooltip("text:N"), alt.Tooltip("vms:Q")])
        place = {"align": "right", "dx": -7, "dy": -9} if above else {"align": "left", "dx": 7, "dy": 12}
        labels = base.mark_text(style="ink-text", **place).encode(text="label:N")
        layers.append((base.mark_point(filled=True, size=80, opacity=1), labels))
    return layers


def _fits_words(answer: Plan, each: HostPlan) -> str:
    policy, spec = answer.policy, each.host
    said = {
        "memory": "more would leave less than the headroom",
        "broken pages": f"with more, memory and swap would run out when {policy.broken:.0%} of the merged pages break",
    }
    why = said.get(each.fits.limited_by, "the plan goes no further")
    red = "Red: the usable RAM"
    red += f", dashed less the headroom of {policy.headroom:.0%}" if policy.headroom else ""
    red += ", dotted with swap" if spec.swap else ""
    return f"{each.fits.recommended:,} VMs fit: {why}. {red}. "


def _band_words(answer: Plan, each: HostPlan, field: str) -> str:
    if each.fits.mean is None:
        return "One sample gives bounds only: VMs all alike below, nothing shared between them above."
    high = getattr(each.curve, field + "_high")
    narrow = float(np.max(high - getattr(each.curve, field + "_low"))) < 0.006 * float(np.max(high))
    seen = ", and is hardly wider than the line" if narrow else ""
    return f"The band holds the truth with {answer.policy.confidence:.0%} confidence{seen}."


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
    rows = _rows(each.curve, "saved", extent(each), size)
    base = alt.Chart(values(rows)).encode(x=_x(alt, extent(each)))
    layers = [_band(base, rows, alt.Y("low:Q", title=f"saved, {name}"))]
    saved = each.frames["saved"]
    if saved is not None:
        layers.append(base.mark_line(style="blue-line").encode(y="middle:Q"))
        point = alt.Chart(values([{"vms": each.fits.recommended, "y": round(saved / size, 4)}]))
        point = point.encode(x=_x(alt, extent(each)), y="y:Q")
        layers.append(point.mark_point(style="green-point", filled=True))
        layers.append(point.mark_text(style="ink-text", align="right", dx=-9, dy=-9).encode(text="vms:Q"))
    said = "" if saved is None else f"{binary(saved)} with {each.fits.recommended} VMs, bookkeeping paid. "
    return Figure(
        "saving",
        "What merging saves",
        said + _band_words(answer, each, "saved"),
        alt.layer(*layers).properties(width="container", height=260),
        ("VMs", "saved", "low", "high", "bookkeeping"),
        _table(each, ("saved", "saved_low", "saved_high", "bookkeeping"), binary),
    )


def _frames(answer: Plan, each: HostPlan) -> Figure:
    alt = load_altair()
    curve = each.curve
    size, name = (1e6, "million") if float(curve.pages[-1]) >= 2e6 else (1e3, "thousand")
    rows = _rows(curve, "frames", extent(each), size, plain="pages")
    base = alt.Chart(values(rows)).encode(x=_x(alt, extent(each)))
    layers = [_band(base, rows, alt.Y("low:Q", title=f"{name} frames"), plain="pages touched")]
    lines = [("plain", "pages touched", [6, 4])] + (
        [("middle", "frames", [1, 0])] if each.fits.mean is not None else []
    )
    for field, series, dash in lines:
        line = base.mark_line(strokeDash=dash).encode(y=f"{field}:Q")
        layers.append(_colored(("pages touched", "frames"), line, series))
    return Figure(
        "frames",
        "Frames that hold the pages",
        "How many page frames the guests' pages take once merging has settled. " + _band_words(answer, each, "frames"),
        alt.layer(*layers).properties(width="container", height=260),
        ("VMs", "pages", "frames", "low", "high", "pages_unshared"),
        _table(each, ("pages", "frames", "frames_low", "frames_high", "unshared"), lambda value: f"{value:,.0f}"),
    )


# ---- over time -------------------------------------------------------------------------------------------


def _span(each: HostPlan) -> tuple[float, float]:
    """Seconds between which anything is to be seen: from somewhat before the first page merges."""
    ends = [float(line.seconds[-1]) for line in each.timelines]
    begins = [float(line.seconds[max(int(np.argmax(line.pages_sharing > 0)) - 1, 0)]) for line in each.timelines]
    first = min(begin if begin > 0 else end / 100 for begin, end in zip(begins, ends, strict=True))
    return max(first / 4, 0.01), max(*ends, 0.1)


def _time_axis(alt: Any, least: float, most: float) -> Any:
    """Seconds on a logarithmic axis, labelled as people say them."""
    ticks = [t for t in (0.1, 1, 10, 60, 600, 3600, 6 * 3600, 86400, 7 * 86400) if least <= t <= most]
    label = (
        "datum.value < 60 ? datum.value + ' s' : datum.value < 3600 ? datum.value / 60 + ' min' : "
        "datum.value < 86400 ? datum.value / 3600 + ' h' : datum.value / 86400 + ' d'"
    )
    axis = alt.Axis(values=ticks, labelExpr=label, grid=False)
    scale = alt.Scale(type="log", nice=False, domain=[round(least, 3), round(most, 3)])
    return alt.X("seconds:Q", title="after a cold start", scale=scale, axis=axis)


_LABELS = ("default", "recommended", "simulated")


def _lines(alt: Any, each: HostPlan) -> Any:
    present = [label for label in _LABELS if any(line.label == label for line in each.timelines)]
    return {
        "color": alt.Color("label:N", scale=alt.Scale(domain=present)),
        "strokeDash": alt.StrokeDash(
            "label:N", scale=alt.Scale(domain=present, range=[[6, 4], [1, 0], [2, 2]][: len(present)])
        ),
        "x": _time_axis(alt, *_span(each)),
    }


def _thin(line: Timeline, most: int = _POINTS) -> list[int]:
    found = np.linspace(0, len(line.seconds) - 1, min(most, len(line.seconds))).astype(np.int64)
    return sorted({int(k) for k in found})


def _pace(each: HostPlan) -> Figure:
    alt = load_altair()
    rows, table = [], []
    for line in each.timelines:
        most = float(line.pages_sharing[-1]) or 1.0
        for k in _thin(line):
            if line.seconds[k] >= 0.01:
                share = float(line.pages_sharing[k]) / most
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
    chart = alt.Chart(values(rows)).mark_line(strokeWidth=2, clip=True).encode(y=y, tooltip=tips, **_lines(alt, each))
    same = ""
    if each.check is not None:
        smaller = ", a smaller load and so a shorter time" if each.check.thinning > 1 else ""
        same = f" Simulated: {each.check.vms} VMs with {each.check.contents}{smaller}."
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
    end = _span(each)[1]
    for line in each.timelines:
        at = _thin(line, 25)
        steps = np.diff(line.cpu_seconds[at]) / np.maximum(np.diff(line.seconds[at]), 1e-9)
        for k, share in zip(at[1:], steps, strict=True):
            begin = float(line.seconds[at[at.index(k) - 1]])
            for moment in (max(begin, 0.01), float(line.seconds[k])):
                rows.append({"label": line.label, "seconds": round(moment, 3), "share": round(float(share), 5)})
        if line.label != "simulated" and float(line.seconds[-1]) < end:
            steady = each.settle.cpu_steady if line.label == "recommended" else each.default.cpu_steady
            for moment in (float(line.seconds[-1]), end):
                rows.append({"label": line.label, "seconds": round(moment, 3), "share": round(steady, 5)})
        for share in range(0, 101, 20):
            k = min(len(line.seconds) - 1, round(share / 100 * (len(line.seconds) - 1)))
            table.append((line.label, clock(float(line.seconds[k])), f"{line.cpu_seconds[k]:.2f} s"))
    tips = [alt.Tooltip("label:N", title="tunables"), alt.Tooltip("share:Q", title="of a CPU", format=".1%")]
    y = alt.Y("share:Q", title="ksmd, of one CPU", axis=alt.Axis(format=".0%"))
    chart = alt.Chart(values(rows)).mark_line(strokeWidth=2, clip=True).encode(y=y, tooltip=tips, **_lines(alt, each))
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

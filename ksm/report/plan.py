"""The report page of a plan."""

from __future__ import annotations

from typing import Any

from ksm.charts import Figure, unit
from ksm.plan.charts import extent, figures
from ksm.plan.result import HostPlan, Plan
from ksm.plan.rows import figures as rows_of
from ksm.report.page import page
from ksm.units import binary, clock

_SAMPLES = ("composition", "matrix")


def plan_page(answer: Plan) -> str:
    """A self-contained HTML page about a plan.

    Raises:
        UnsupportedError: what `ksm[report]` has is not installed.
    """
    drawn: list[Figure] = []
    hosts = []
    for n, each in enumerate(answer.hosts):
        found = figures(answer, n, f"host{n}-")
        of_samples = [found.pop(kind) for kind in _SAMPLES]
        drawn += found.values()
        if n == 0:
            drawn += of_samples
        hosts.append(_host(answer, each, n, list(found)))
    total = f"{answer.fits:,} VMs fit"
    return page(
        "plan.html",
        title=f"{total}: a plan for {', '.join(each.host.name for each in answer.hosts)}",
        figures=drawn,
        data={"hosts": [_levers(answer, each) for each in answer.hosts]},
        scripts=("plan.js",),
        answer=answer,
        hosts=hosts,
        total=total,
        classes=[
            (
                each.name,
                f"{each.share:.0%}",
                f"{each.samples}",
                binary(each.ram),
                binary(each.pages * answer.page_size),
                *(
                    f"{getattr(each, part) / max(each.pages, 1):.0%}"
                    for part in ("zero", "within", "between", "unique")
                ),
            )
            for each in answer.classes
        ],
        policy=answer.policy,
    )


def _host(answer: Plan, each: HostPlan, n: int, kinds: list[str]) -> dict[str, Any]:
    """What the template shows of one kind of host."""
    spec, fits = each.host, each.fits
    saved = each.frames["saved"]
    more = fits.recommended - fits.without_ksm
    tiles = [
        ("VMs that fit", f"{fits.recommended:,}", f"limited by {fits.limited_by}"),
        ("without KSM", f"{fits.without_ksm:,}", f"{abs(more):,} {'more' if more >= 0 else 'fewer'} with it"),
        ("memory saved", "unknown" if saved is None else binary(saved), f"of {binary(each.frames['without'] or 0)}"),
        ("99 % merged after", clock(each.settle.cold[99]), f"default: {clock(each.default.cold[99])}"),
        ("ksmd, of one CPU", f"{each.settle.cpu_cold:.1%}", f"{each.settle.cpu_steady:.1%} once settled"),
    ]
    if each.risk is not None:
        end = "the host holds" if each.risk.survives_worst else "more than the host has"
        tiles.append(("breaks in the worst minute", f"{each.risk.worst:.1%}", f"everywhere at once: {end}"))
    facts = [binary(spec.ram)]
    facts += [f"{binary(spec.reserve)} kept for the host"] if spec.reserve else []
    facts += [f"{binary(spec.swap)} swap"] if spec.swap else []
    facts += [f"{spec.nodes} NUMA nodes"] if spec.nodes > 1 else []
    facts += [f"Linux {spec.kernel}"]
    return {
        "id": f"host{n}",
        "name": spec.name if spec.count == 1 else f"{spec.count} {spec.name}",
        "facts": ", ".join(facts),
        "sentences": answer.sentences(n),
        "tiles": tiles,
        "rows": rows_of(answer, each),
        "tunables": [(one.name, str(one.value), one.why) for one in each.tunables],
        "advisor": [(one.name, str(one.value), one.why) for one in each.advisor],
        "kinds": kinds,
        "plan": each,
        "controls": _controls(answer, each),
    }


def _controls(answer: Plan, each: HostPlan) -> list[dict[str, Any]]:
    """The what-if controls: name, label, unit, range and value."""
    size, name = unit(each.host.ram)
    ram = each.host.ram / size
    step = max(2.0**-6, 2.0 ** round(_log2(ram / 128)))
    least = max(step, -(-each.host.reserve // (step * size)) * step + step)
    return [
        {
            "name": "vms",
            "label": "VMs on the host",
            "min": 0,
            "max": extent(each),
            "step": 1,
            "value": each.fits.recommended,
        },
        {
            "name": "ram",
            "label": f"RAM of the host, {name}",
            "min": least,
            "max": max(2 * ram, least),
            "step": "any",
            "value": f"{ram:.6g}",
        },
        {
            "name": "pages_to_scan",
            "label": "pages_to_scan",
            "min": 1,
            "max": max(20_000, 2 * each.settle.pages_to_scan),
            "step": 1,
            "value": each.settle.pages_to_scan,
        },
        {
            "name": "broken",
            "label": "merged pages that break, %",
            "min": 0,
            "max": 100,
            "step": "any",
            "value": f"{100 * answer.policy.broken:.6g}",
        },
    ]


def _log2(value: float) -> int:
    return max(0, int(value)).bit_length() - 1 if value >= 1 else -1


def _levers(answer: Plan, each: HostPlan) -> dict[str, Any]:
    """What the page's script works with: see `ksm.plan.outlook.what_if`, which it repeats."""
    curve, outlook = each.curve, each.outlook
    return {
        "name": each.host.name,
        "size": unit(each.host.ram)[0],
        "ram": each.host.ram,
        "reserve": each.host.reserve,
        "swap": each.host.swap,
        "headroom": answer.policy.headroom,
        "sleep_millisecs": each.settle.sleep_millisecs,
        "vms": curve.vms,
        "need": curve.need,
        "need_low": curve.need_low,
        "need_high": curve.need_high,
        "without": curve.without,
        "outlook": None if outlook is None else outlook.to_dict(),
    }

"""The charts of a placement, each with the table behind it: methods side by side, what each move brings, the hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ksm.charts import Figure, labels, load_altair, stacked, unit, values
from ksm.fleet.charts import ROWS, capped
from ksm.fleet.hosts import Host
from ksm.fleet.place import Placement
from ksm.fleet.vm import Vm
from ksm.units import binary, many, more_or_less

METHODS: Mapping[str, str] = {
    "sharing": "by sharing",
    "exact": "exact",
    "today": "as today",
    "random": "random",
    "decreasing": "largest first",
    "class": "class by class",
}
"""What the methods are called on the charts."""
_POINTS = 300
_DRAWN = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A placement, what it stands beside, and the fleet that it places: see `figures` for an example."""

    found: Placement
    others: Mapping[str, Placement | str]
    """By method; a text says why there is none."""
    vms: Sequence[Vm]
    """Where they are today."""
    hosts: Sequence[Host]


def figures(said: Comparison) -> dict[str, Figure]:
    """The charts of a placement, by kind: "methods", "moves" (left out if there are none) and "hosts".

    Raises:
        UnsupportedError: altair is not installed.

    >>> from ksm.fleet import fingerprint_vm, place, read_fleet
    >>> for name in "ab":
    ...     _ = fingerprint_vm(b"x" * 8192, "placing", Vm(name=name, host=f"h{name}"))
    >>> vms, sketches = read_fleet(["placing"])
    >>> hosts = [Host(name=f"h{name}", ram=1 << 20) for name in "ab"]
    >>> both = [place(vms, sketches, hosts, method) for method in ("sharing", "today")]
    >>> found = figures(Comparison(found=both[0], others={"today": both[1]}, vms=vms, hosts=hosts))
    >>> list(found), [row[:2] for row in found["methods"].rows]
    (['methods', 'moves', 'hosts'], [('by sharing', '12.0 KiB'), ('as today', '8.0 KiB')])
    """
    load_altair()
    found = [_methods(said), _moves(said.found), _hosts(said)]
    return {figure.name: figure for figure in found if figure.rows}


def _methods(said: Comparison) -> Figure:
    alt = load_altair()
    all_of_them: dict[str, Placement | str] = {"sharing": said.found, **said.others}
    placed = {METHODS[name]: one for name, one in all_of_them.items() if not isinstance(one, str)}
    size, of = unit(max(one.saved.upper for one in placed.values()))
    rows = [
        {
            "method": name,
            "saved": round(one.saved.estimate / size, 4),
            "least": round(one.saved.lower / size, 4),
            "most": round(one.saved.upper / size, 4),
        }
        for name, one in placed.items()
    ]
    axis = alt.Axis(labelLimit=150, domain=False, ticks=False)
    tips = ["method:N", *(alt.Tooltip(f"{name}:Q", format=",.1f") for name in ("saved", "least", "most"))]
    base = alt.Chart(values(rows)).encode(y=alt.Y("method:N", title=None, sort=list(placed), axis=axis), tooltip=tips)
    bars = base.mark_bar(style="blue-bar").encode(x=alt.X("saved:Q", title=f"saved, {of}", axis=alt.Axis(tickCount=8)))
    sure = base.mark_rule(style="ink-rule").encode(x="least:Q", x2="most:Q")
    return Figure(
        "methods",
        "What each way of placing saves",
        "Bars are estimates from the sketches; the lines are what they lie between in at least 95 of 100 cases.",
        (bars + sure).properties(width="container", height=34 * len(rows)),
        ("placement", "saved", "beside today", "at worst", "at best", "hosts", "freed", "moves", "need spare room", ""),
        [_method(METHODS[name], one, said.others.get("today")) for name, one in all_of_them.items()],
    )


def _method(name: str, one: Placement | str, today: Placement | str | None) -> tuple[str, ...]:
    if isinstance(one, str):
        return (name, *[""] * 8, one)
    saved = one.saved
    more = more_or_less(saved.estimate - today.saved.estimate) if isinstance(today, Placement) else ""
    bounds = (more_or_less(bound - saved.estimate) for bound in (saved.lower, saved.upper))
    counts = (one.hosts_used, one.hosts_freed, len(one.moves), sum(not move.fits for move in one.moves))
    proven = "" if one.proven is None else "proven: there is nothing better" if one.proven else "not proven to be best"
    return (name, binary(saved.estimate), more, *bounds, *(f"{count:,}" for count in counts), proven)


def _moves(found: Placement) -> Figure:
    """What is gained after so many moves."""
    alt = load_altair()
    gained = [0, *accumulate(move.gain for move in found.moves)]
    last = len(gained) - 1
    step = max(1, -(-last // _POINTS))
    size, of = unit(max(map(abs, gained)))
    at = sorted({*range(0, last + 1, step), last})
    rows = [{"moves": number, "gained": round(gained[number] / size, 4)} for number in at]
    chart = (
        alt.Chart(values(rows))
        .mark_line(style="blue-line")
        .encode(
            x=alt.X("moves:Q", title="moves done", axis=alt.Axis(format=",d", tickMinStep=1)),
            y=alt.Y("gained:Q", title=f"freed, {of}"),
            tooltip=[alt.Tooltip("moves:Q", format=","), alt.Tooltip("gained:Q", format=",.1f", title=of)],
        )
    )
    half = next((number for number, amount in enumerate(gained) if 2 * amount >= gained[-1]), last)
    steps = (1, 2, 5, *(10**n * m for n in range(1, 7) for m in (1, 2, 5)), last)
    shown = sorted({number for number in steps if 0 < number <= last})
    return Figure(
        "moves",
        "What the moves bring, one after the other",
        f"Half of {binary(gained[-1])} is there after {many(half, 'move')} of {last:,}. Gains are estimates."
        if gained[-1] > 0
        else f"The moves free {binary(gained[-1])} in all. Gains are estimates.",
        chart.properties(width="container", height=260),
        ("moves done", "freed"),
        [(f"{number:,}", binary(gained[number])) for number in shown],
    )


def _hosts(said: Comparison) -> Figure:
    """RAM given to VMs on each host, today and then; those that change most."""
    today: dict[str, list[int]] = {host.name: [0, 0] for host in said.hosts}
    then: dict[str, list[int]] = {host.name: [0, 0] for host in said.hosts}
    for vm in said.vms:
        for count, name in ((today, vm.host), (then, said.found.where[vm.name][0])):
            if name in count:  # today some run on none of these hosts
                count[name][0] += 1
                count[name][1] += vm.ram
    order = sorted(said.hosts, key=lambda host: (-abs(then[host.name][1] - today[host.name][1]), host.name))
    drawn = order[:_DRAWN]
    names = labels([host.name for host in drawn], 14, paths=False)
    bars = [f"{name}, {when}" for name in names for when in ("today", "then")]
    amounts = []
    for host in drawn:
        room = host.ram - host.reserve
        for count in (today, then):
            given = count[host.name][1] + count[host.name][0] * host.vm_overhead
            amounts.append([float(given), float(max(room - given, 0))])
    return Figure(
        "hosts",
        "Hosts, today and then",
        "RAM given to VMs, with what each takes beside it, and what is left. Hosts that change most come first.",
        stacked(bars, ["given to VMs", "free"], amounts, "RAM"),
        ("host", "VMs today", "VMs then", "RAM of VMs today", "RAM of VMs then", "usable RAM"),
        [_host(host, today[host.name], then[host.name]) for host in order[:ROWS]],
        capped("hosts", len(order), "that change most", _DRAWN),
    )


def _host(host: Host, today: Sequence[int], then: Sequence[int]) -> tuple[str, ...]:
    amounts: tuple[Any, ...] = (today[1], then[1], host.ram - host.reserve)
    return (host.name, f"{today[0]:,}", f"{then[0]:,}", *(binary(amount) for amount in amounts))

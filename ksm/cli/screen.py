"""What `ksm top` shows: lines of text for a screen of any size, from observations and the viewer's wishes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.text import Text

from ksm.census import ProcessSample
from ksm.observe import Observation, Sample
from ksm.passes import Progress
from ksm.units import binary, clock

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = "_.-:=+*#"
_HISTORY = 240  # looks
_SPARK = 16  # characters of a sparkline

SORTS: dict[str, tuple[str, Callable[[ProcessSample], int | str]]] = {
    "p": ("profit", lambda p: -p.stats.profit),
    "m": ("merged", lambda p: -(p.stats.ksm_merging_pages or 0)),
    "i": ("items", lambda p: -(p.stats.ksm_rmap_items or 0)),
    "z": ("zero", lambda p: -(p.stats.ksm_zero_pages or 0)),
    "a": ("anonymous", lambda p: -(p.anonymous or 0)),
    "n": ("name", lambda p: p.name.lower()),
    "d": ("pid", lambda p: p.pid),
}
"""By key: the name of the order, and what it goes by."""

HELP = """\
 p m i z a n d   sort by profit, merged pages, items, zero pages, anonymous memory, name, pid
 r               the other way round
 / TEXT Enter    only processes whose name or pid has TEXT in it; Esc shows all again
 l               only losers: processes that cost more than they save
 space           pause, go on
 + -             look more or less often
 up down PgUp PgDn Home   scroll
 h ?             this help
 q               quit"""


@dataclass(slots=True)
class View:
    """What the viewer chose.

    >>> view = View()
    >>> view.press("m"), view.sort
    (True, 'm')
    """

    sort: str = "p"
    reverse: bool = False
    filter: str = ""
    losers_only: bool = False
    paused: bool = False
    help: bool = False
    offset: int = 0
    interval: float = 2.0
    typing: str | None = None
    """The filter while it is typed."""
    done: bool = False
    ascii: bool = False

    def press(self, key: str) -> bool:
        """Take a key; whether it meant anything.

        >>> view = View()
        >>> [view.press(key) for key in ("/", "q", "backspace", "v", "m", "enter", "?", "q")][-1]
        True
        >>> view.filter, view.done
        ('vm', True)
        """
        if self.typing is not None:
            self._type(key)
            return True
        if key in SORTS:
            self.reverse = not self.reverse if key == self.sort else False
            self.sort, self.offset = key, 0
        elif key in _ACTIONS:
            _ACTIONS[key](self)
        else:
            return key == "resize"
        return True

    def _type(self, key: str) -> None:
        text = self.typing or ""
        if key == "enter":
            self.filter, self.typing, self.offset = text, None, 0
        elif key == "escape":
            self.typing = None
        elif key == "backspace":
            self.typing = text[:-1]
        elif key == "space":
            self.typing = text + " "
        elif len(key) == 1:
            self.typing = text + key

    def scroll(self, lines: int) -> None:
        """Move down by so many processes, or up.

        >>> view = View()
        >>> view.scroll(-5), view.offset
        (None, 0)
        """
        self.offset = max(0, self.offset + lines)

    def faster(self, factor: float) -> None:
        """Change the time between two looks, from a quarter of a second to a minute.

        >>> view = View()
        >>> view.faster(100.0), view.interval
        (None, 0.25)
        """
        self.interval = min(60.0, max(0.25, self.interval / factor))

    def chosen(self, processes: Sequence[ProcessSample]) -> list[ProcessSample]:
        """The processes to show, in order.

        >>> View().chosen([])
        []
        """
        wanted = (self.filter if self.typing is None else self.typing).lower()
        found = [
            p
            for p in processes
            if (not wanted or wanted in p.name.lower() or wanted in str(p.pid))
            and (not self.losers_only or p.stats.profit < 0)
        ]
        by = SORTS[self.sort][1]
        return sorted(found, key=lambda p: (by(p), p.pid), reverse=self.reverse)


def _toggle(name: str) -> Callable[[View], None]:
    return lambda view: setattr(view, name, not getattr(view, name))


def _clear(view: View) -> None:
    view.filter, view.losers_only, view.help, view.offset = "", False, False, 0


_ACTIONS: dict[str, Callable[[View], None]] = {
    "q": lambda view: setattr(view, "done", True),
    "r": _toggle("reverse"),
    "l": _toggle("losers_only"),
    "space": _toggle("paused"),
    "h": _toggle("help"),
    "?": _toggle("help"),
    "/": lambda view: setattr(view, "typing", ""),
    "escape": _clear,
    "+": lambda view: view.faster(2.0),
    "-": lambda view: view.faster(0.5),
    "up": lambda view: view.scroll(-1),
    "down": lambda view: view.scroll(1),
    "page up": lambda view: view.scroll(-10),
    "page down": lambda view: view.scroll(10),
    "home": lambda view: setattr(view, "offset", 0),
}


@dataclass(slots=True)
class History:
    """The figures of the last looks, for sparklines.

    >>> History().spark("saved", ascii=True)
    ''
    """

    values: dict[str, deque[float]] = field(default_factory=dict)

    def add(self, o: Observation) -> None:
        """Take the figures of a look.

        >>> history = History()
        >>> history.add(Observation(sample=Sample()))
        >>> list(history.values["saved"])
        [0.0]
        """
        figures = {
            "saved": o.sample.stats.saved_bytes,
            "ksmd": o.ksmd_share,
            "visits": o.visits_per_second,
            "cow": o.rate("cow_ksm"),
        }
        for name, value in figures.items():
            if value is not None:
                self.values.setdefault(name, deque(maxlen=_HISTORY)).append(float(value))

    def spark(self, name: str, ascii: bool = False, width: int = _SPARK) -> str:
        """The last values as bars between 0 and their largest.

        >>> History({"cow": deque([0.0, 1.0, 2.0])}).spark("cow", ascii=True)
        '_=#'
        """
        values = list(self.values.get(name, ()))[-width:]
        bars = _ASCII if ascii else _BLOCKS
        top = max((abs(value) for value in values), default=0.0)
        if len(values) < 2:
            return ""
        return "".join(bars[round(max(0.0, value) / top * (len(bars) - 1)) if top else 0] for value in values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Everything that one screen is made of."""

    o: Observation
    progress: Progress
    history: History
    view: View
    own_share: float | None = None
    """This program's own share of a CPU."""


def lines(frame: Frame, width: int, height: int | None) -> list[Text]:
    """The screen, cropped to `width`; with no `height`, all processes.

    >>> frame = Frame(o=Observation(sample=Sample(kernel="6.18")), progress=Progress(), history=History(), view=View())
    >>> len(lines(frame, 80, 24)) <= 24
    True
    """
    head = _head(frame, width)
    if frame.view.help:
        body = [Text(line) for line in HELP.splitlines()]
    else:
        room = None if height is None else max(0, height - len(head) - 3)  # column heads, summary, keys
        body = _table(frame, width, room)
    result = [*head, *body]
    if height is not None:
        result = result[: max(1, height - 1)]
        result += [Text("")] * (height - 1 - len(result))
        result = [*result, _foot(frame)][:height]
    for line in result:
        line.no_wrap = True
        line.truncate(width)
    return result


# ---- the head ---------------------------------------------------------------------------------------------------


def _head(frame: Frame, width: int) -> list[Text]:
    o, s = frame.o, frame.o.sample
    stats = s.stats

    def spark(name: str) -> Text:
        return Text(" " + frame.history.spark(name, frame.view.ascii), style="cyan")

    share = f", {100 * stats.saved_bytes / s.memory.total:.1f} % of RAM" if s.memory.total else ""
    zero = (
        "" if stats.ksm_zero_pages is None else f", {binary(stats.ksm_zero_pages * stats.page_size)} of it zero pages"
    )
    saved = _pairs(("saved", f"{binary(stats.saved_bytes)}{zero}{share}"))
    profit = _pairs(("profit", binary(stats.profit)), ("rmap items", binary(stats.metadata_bytes)))
    if stats.profit < 0:
        profit.stylize("bold red")
    ratio = "" if stats.sharing_ratio is None else f" ({stats.sharing_ratio:.1f} a page)"
    split = o.rate("thp_split_page")
    return [
        _title(frame),
        *_tunables(s, width),
        Text.assemble(saved, spark("saved")),
        Text.assemble(
            profit, "  ", _pairs(("chains", f"{stats.stable_node_chains:,}"), ("dups", f"{stats.stable_node_dups:,}"))
        ),
        _pairs(
            ("shared", f"{stats.pages_shared:,}"),
            ("sharing", f"{stats.pages_sharing:,}{ratio}"),
            ("unshared", f"{stats.pages_unshared:,}"),
            ("volatile", f"{stats.pages_volatile:,}"),
        ),
        Text.assemble(
            _pairs(
                ("visits", _per_second(o.visits_per_second)),
                ("skipped", _per_second(o.rate("pages_skipped"))),
                ("huge pages split", _per_second(split)),
            ),
            spark("visits"),
        ),
        Text.assemble(
            _pairs(
                ("cow_ksm", _per_second(o.rate("cow_ksm"))), ("ksm_swpin_copy", _per_second(o.rate("ksm_swpin_copy")))
            ),
            spark("cow"),
        ),
        Text.assemble(_ksmd(frame), spark("ksmd")),
        *_others(s),
        Text(""),
    ]


def _pairs(*pairs: tuple[str, str]) -> Text:
    """Names, dim, with their values."""
    text = Text()
    for k, (name, value) in enumerate(pairs):
        text.append("  " if k else "")
        text.append(f"{name} ", style="dim")
        text.append(value)
    return text


def _title(frame: Frame) -> Text:
    s, view = frame.o.sample, frame.view
    when = f"{s.time:,.0f} s simulated" if s.simulated else time.strftime("%H:%M:%S", time.localtime(s.time))
    text = Text.assemble(("ksm top", "bold"), f"  Linux {s.kernel}  {when}  every {view.interval:g} s")
    if frame.own_share is not None:
        text.append(f"  own CPU {100 * frame.own_share:.1f} %", style="dim")
    if view.paused:
        text.append("  PAUSED", style="bold yellow")
    return text


_SHORT = {
    "pages_to_scan": "scan",
    "sleep_millisecs": "sleep",
    "max_page_sharing": "max_sharing",
    "use_zero_pages": "zero",
    "smart_scan": "smart",
    "merge_across_nodes": "across",
    "stable_node_chains_prune_millisecs": "prune",
    "advisor_mode": "advisor",
}
_SHORT_ADVISOR = {
    "advisor_target_scan_time": "target",
    "advisor_max_cpu": "max_cpu",
    "advisor_min_pages_to_scan": "min",
    "advisor_max_pages_to_scan": "max",
}


def _tunables(s: Sample, width: int) -> list[Text]:
    """All of them, on as many lines as it takes."""
    values = {name: int(value) if isinstance(value, bool) else value for name, value in s.tunables.items()}
    state = {0: "stopped", 1: "running", 2: "unmerged"}.get(s.number("run"), "?")
    pairs = [(short, str(values[name])) for name, short in _SHORT.items() if name in values]
    if s.advisor:
        pairs += [(short, str(values[name])) for name, short in _SHORT_ADVISOR.items() if name in values]
    result = [Text(f"run {values.get('run', '?')} {state}", style="bold green" if s.running else "bold yellow")]
    for pair in pairs:
        text = _pairs(pair)
        if len(result[-1]) + 2 + len(text) > width:
            result.append(text)
        else:
            result[-1] = Text.assemble(result[-1], "  ", text)
    return result


def _ksmd(frame: Frame) -> Text:
    o, progress = frame.o, frame.progress
    share = o.ksmd_share
    cpu = "not visible" if o.sample.ksmd_cpu_seconds is None else "?" if share is None else f"{100 * share:.1f} %"
    at_most = "" if progress.seen else "<= "
    left = "?" if progress.left is None else f"{at_most}{clock(progress.left)} of {clock(progress.pass_seconds or 0.0)}"
    if not o.sample.running:
        left = "-"
    settle = {None: "?", 0.0: "yes"}.get(progress.settle, f"in {clock(progress.settle or 0.0)}")
    return _pairs(
        ("ksmd", cpu), ("passes", f"{o.sample.stats.full_scans:,}"), ("pass ends in", left), ("settled", settle)
    )


def _others(s: Sample) -> list[Text]:
    """Files that this package does not know, from a newer kernel."""
    return [_pairs(*s.other.items())] if s.other else []


def _per_second(rate: float | None) -> str:
    return "?" if rate is None else f"{rate:,.0f}/s"


# ---- the processes ----------------------------------------------------------------------------------------------

_COLUMNS = (("PID", 8), ("PROFIT", 12), ("MERGED", 10), ("ITEMS", 10), ("ZERO", 9), ("ANON", 11), ("BY", 6))


def _table(frame: Frame, width: int, room: int | None) -> list[Text]:
    s, view = frame.o.sample, frame.view
    chosen = view.chosen(s.processes)
    if room is not None:
        view.offset = min(view.offset, max(0, len(chosen) - room))
    shown = chosen[view.offset : None if room is None else view.offset + room]
    heads = "".join(f"{name:>{size}}" for name, size in _COLUMNS)
    name = SORTS[view.sort][0]
    result = [Text(f"{heads}  NAME", style="reverse")]
    result[0].pad_right(max(0, width - len(result[0])))
    result += [_row(process) for process in shown]
    losers = len(frame.o.losers)
    parts = [f"{len(chosen):,} of {s.processes_total:,} processes, by {name}{' reversed' if view.reverse else ''}"]
    if losers:
        parts.append(f"{losers:,} cost more than they save (!)")
    if s.processes_unreadable:
        parts.append(f"{s.processes_unreadable:,} unreadable without root")
    if not s.processes_shown:
        parts = ["this kernel does not show processes' part in KSM"]
    if view.filter:
        parts.append(f"with {view.filter!r}")
    result.insert(0, Text("; ".join(parts), style="dim"))
    return result


def _row(process: ProcessSample) -> Text:
    stats = process.stats
    how = "prctl" if stats.ksm_merge_any else "madv" if stats.ksm_mergeable else ""
    merged = _count(stats.ksm_merging_pages)
    loses = stats.profit < 0
    cells = (str(process.pid), binary(stats.profit), merged, _count(stats.ksm_rmap_items), _count(stats.ksm_zero_pages),
             "" if process.anonymous is None else binary(process.anonymous), how)  # fmt: skip
    line = "".join(f"{cell:>{size}}" for cell, (_, size) in zip(cells, _COLUMNS, strict=True))
    name = "".join(c if c.isprintable() else "?" for c in process.name)
    return Text(f"{line} {'!' if loses else ' '}{name}", style="red" if loses else "")


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _foot(frame: Frame) -> Text:
    view = frame.view
    if view.typing is not None:
        return Text(f"show names and pids with: {view.typing}_  (Enter: keep, Esc: cancel)", style="bold")
    return Text("p m i z a n d sort  r reverse  / filter  l losers  space pause  h help  q quit", style="dim")

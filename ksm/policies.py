"""How `ksm tune auto` decides: by memory pressure, as ksmtuned does, or by a time to settle and a CPU budget."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ksm.cost import CostModel
from ksm.stats import Stats

_GIB = 1 << 30
_MOST_PAGES = 1_000_000  # pages_to_scan of one batch: at most a few seconds of ksmd's CPU without a sleep


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a policy sees of a host, or of a machine, at one moment.

    >>> View(seconds=0.0, stats=Stats(), mem_total=1 << 34, mem_available=1 << 33).committed
    0
    """

    seconds: float
    """A clock that never jumps."""
    stats: Stats
    mem_total: int
    """Bytes."""
    mem_available: int
    committed: int = 0
    """Bytes that were promised to processes, touched or not (Committed_AS)."""
    ksmd_cpu: float | None = None
    """CPU seconds that ksmd has taken; None where that cannot be seen."""
    candidates: int = 0
    """Pages that KSM has to look at, those included that it has not come to yet."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the tunables should be, and why.

    >>> Decision(True, 100, 20, "as ever").settings()
    {'sleep_millisecs': '20', 'pages_to_scan': '100', 'run': '1'}
    """

    run: bool
    pages_to_scan: int
    sleep_millisecs: int
    why: str
    smart_scan: bool | None = None
    """None leaves it as it is."""

    def settings(self) -> dict[str, str]:
        """The values to write, in this order.

        >>> Decision(False, 64, 10, "").settings()["run"]
        '0'
        """
        return {
            **({} if self.smart_scan is None else {"smart_scan": str(int(self.smart_scan))}),
            "sleep_millisecs": str(self.sleep_millisecs),
            "pages_to_scan": str(self.pages_to_scan),
            "run": str(int(self.run)),
        }


class Policy(Protocol):
    """A rule that keeps what it must remember between two decisions."""

    interval: float
    """Seconds between two decisions."""

    def decide(self, view: View) -> Decision:
        """What to do now."""


# ---- pressure ---------------------------------------------------------------------------------------------------


class Pressure:
    """ksmtuned's rule: scan while memory is short, faster the longer it stays short.

    The threshold is `thres_coef` percent of all memory, at least `thres_const` KiB. ksmd runs while less than that is
    available, or while the memory promised to processes and the threshold together exceed all memory. With
    less than the threshold available `pages_to_scan` grows by `boost` at each decision, otherwise it changes by
    `decay` (a negative number), between `npages_min` and `npages_max`. ksmd sleeps `sleep_msec` on a host of 16 GiB,
    on a larger one less in proportion, on a smaller one more, and never less than 10 ms.

    The rule and the defaults are those that ksmtuned's documentation gives (Red Hat's Virtualization Tuning and
    Optimization Guide, "The KSM Tuning Service"). Two things are taken from the kernel instead of being added up:
    free memory is MemAvailable, and committed memory is Committed_AS.

    >>> policy = Pressure()
    >>> short = View(seconds=0.0, stats=Stats(), mem_total=16 << 30, mem_available=3 << 30)
    >>> [policy.decide(short).pages_to_scan for _ in range(5)]
    [300, 600, 900, 1200, 1250]
    >>> plenty = View(seconds=0.0, stats=Stats(), mem_total=16 << 30, mem_available=9 << 30)
    >>> policy.decide(plenty).run, policy.decide(plenty).pages_to_scan
    (False, 1150)

    Raises:
        ValueError: a setting that makes no sense, by its name in the configuration.
    """

    def __init__(
        self,
        interval: float = 60,
        sleep_msec: int = 10,
        boost: int = 300,
        decay: int = -50,
        npages_min: int = 64,
        npages_max: int = 1250,
        thres_coef: int = 20,
        thres_const: int = 2048,
    ) -> None:
        for name, value, good in (
            ("KSM_MONITOR_INTERVAL", interval, interval > 0),
            ("KSM_SLEEP_MSEC", sleep_msec, sleep_msec >= 0),
            ("KSM_NPAGES_BOOST", boost, boost >= 0),
            ("KSM_NPAGES_DECAY", decay, decay <= 0),
            ("KSM_NPAGES_MIN", npages_min, 0 < npages_min <= npages_max),
            ("KSM_NPAGES_MAX", npages_max, npages_max <= _MOST_PAGES),
            ("KSM_THRES_COEF", thres_coef, 0 <= thres_coef <= 100),
            ("KSM_THRES_CONST", thres_const, thres_const >= 0),
        ):
            if not good:
                raise ValueError(f"{name}={value}: {_EXPECTED[name]}")
        self.interval = interval
        self._sleep_msec = sleep_msec
        self._boost = boost
        self._decay = decay
        self._range = (npages_min, npages_max)
        self._coef = thres_coef
        self._const = thres_const * 1024
        self._pages = 0

    @classmethod
    def of(cls, settings: Mapping[str, str]) -> Pressure:
        """From the keys of /etc/ksmtuned.conf; those it does not know are left to others.

        >>> Pressure.of({"KSM_MONITOR_INTERVAL": "5", "DEBUG": "1"}).interval
        5
        """
        values = {}
        for key, name in _CONF.items():
            if key in settings:
                if not re.fullmatch(r"-?[0-9]{1,9}", settings[key]):
                    raise ValueError(f"{key}={settings[key]}: it must be a whole number")
                values[name] = int(settings[key])
        return cls(**values)

    def decide(self, view: View) -> Decision:
        """What to do now.

        >>> Pressure().decide(View(seconds=0.0, stats=Stats(), mem_total=1 << 34, mem_available=1 << 33)).run
        False
        """
        threshold = max(view.mem_total * self._coef // 100, self._const)
        short = view.mem_available < threshold
        promised = view.committed + threshold > view.mem_total
        step = self._boost if short else self._decay
        self._pages = max(self._range[0], min(self._pages + step, self._range[1]))
        sleep = max(10, self._sleep_msec * 16 * _GIB // max(1, view.mem_total))
        seen = f"{_mib(view.mem_available)} of memory available, threshold {_mib(threshold)}"
        if promised and not short:
            seen += f", {_mib(view.committed)} of {_mib(view.mem_total)} promised"
        return Decision(short or promised, self._pages, sleep, seen)


def _mib(number: int) -> str:
    return f"{number >> 20:,} MiB"


_CONF = {
    "KSM_MONITOR_INTERVAL": "interval",
    "KSM_SLEEP_MSEC": "sleep_msec",
    "KSM_NPAGES_BOOST": "boost",
    "KSM_NPAGES_DECAY": "decay",
    "KSM_NPAGES_MIN": "npages_min",
    "KSM_NPAGES_MAX": "npages_max",
    "KSM_THRES_COEF": "thres_coef",
    "KSM_THRES_CONST": "thres_const",
}
_EXPECTED = {
    "KSM_MONITOR_INTERVAL": "seconds, above 0",
    "KSM_SLEEP_MSEC": "milliseconds, not negative",
    "KSM_NPAGES_BOOST": "pages, not negative",
    "KSM_NPAGES_DECAY": "it is added, so it must not be positive, such as -50",
    "KSM_NPAGES_MIN": "from 1 to KSM_NPAGES_MAX",
    "KSM_NPAGES_MAX": f"at most {_MOST_PAGES:,}",
    "KSM_THRES_COEF": "percent of memory, 0 to 100",
    "KSM_THRES_CONST": "KiB, not negative",
}
_KNOWN = (*_CONF, "LOGFILE", "DEBUG")


def parse_conf(text: str) -> dict[str, str]:
    """The settings in a ksmtuned.conf: lines of NAME=VALUE, quoted or not, with # comments.

    Raises ValueError for a line that is something else, an expression of the shell included, and for an unknown name.

    >>> parse_conf("# a comment\\nKSM_NPAGES_MAX=2000 # more\\nLOGFILE='/var/log/ksmtuned'\\n")
    {'KSM_NPAGES_MAX': '2000', 'LOGFILE': '/var/log/ksmtuned'}
    """
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if words[:1] == ["export"]:
            words = words[1:]
        for word in words:
            name, equals, value = word.partition("=")
            if not equals or re.search(r"[$`]", value):
                raise ValueError(f"line {number}: {word[:40]!r} is not NAME=VALUE with a plain value")
            if name not in _KNOWN:
                raise ValueError(f"line {number}: {name[:40]!r} is not one of {', '.join(_KNOWN)}")
            found[name] = value
    return found


# ---- target -------------------------------------------------------------------------------------------------------


class Target:
    """Scan so fast that equal memory is merged within `settle` seconds, for at most `cpu` percent of a CPU.

    Memory that is registered while a pass is under way is met in the next one, hashed there, and merged in the one
    after that: it settles within three passes. So a pass may take a third of `settle`. Smart scan is switched off: it
    leaves pages that found no equal out of up to eight passes, in which new pages do not find them either.

    What a page costs is first taken from `ksm.CostModel`, and from what ksmd really took as soon as it has run. If
    it is more than the budget the budget wins, and `Decision.why` says how long settling takes then. CPU time taken
    beyond the budget, when pages suddenly cost more, is saved again within a minute.

    >>> cost = CostModel(hash_ns=1000, level_ns=250, deep_ns=0)
    >>> policy = Target(settle=300, cpu=20, cost=cost)
    >>> view = View(seconds=0.0, stats=Stats(), mem_total=1 << 34, mem_available=1 << 33, candidates=1_000_000)
    >>> policy.decide(view).why
    '1,000,000 pages every 100 s: 10,000 a second at 5.98 us, 6 % of a CPU'
    >>> Target(settle=300, cpu=2, cost=cost).decide(view).why
    '1,000,000 pages every 299 s: 3,343 a second at 5.98 us, the budget of 2 % of a CPU; settling takes 897 s, not 300'

    Raises:
        ValueError: `settle` below 1 or `cpu` not within 0.1 to 100.
    """

    PASSES = 3
    _REPAY = 60.0  # seconds in which CPU time beyond the budget is saved again
    _LEAST_BATCH = 100  # fewer pages are not worth waking up for
    _LONGEST_SLEEP = 1000  # ms

    def __init__(self, settle: float, cpu: float, interval: float | None = None, cost: CostModel | None = None) -> None:
        if not (settle >= 1 and math.isfinite(settle)):
            raise ValueError(f"a time to settle of {settle:g} s; it can be 1 s or more")
        if not 0.1 <= cpu <= 100:
            raise ValueError(f"a budget of {cpu:g} % of a CPU; it can be 0.1 to 100")
        self.interval = max(1.0, min(10.0, settle / 10)) if interval is None else interval
        self._settle = settle
        self._budget = min(cpu / 100, 0.99)
        self._cost = cost or CostModel()
        self._before: View | None = None
        self._told: Decision | None = None
        self._measured: float | None = None  # CPU seconds a visit
        self._overhead: float | None = None  # seconds between two batches, beyond sleep_millisecs
        self._debt = 0.0  # CPU seconds beyond the budget

    def decide(self, view: View) -> Decision:
        """What to do now.

        >>> nothing = View(seconds=0.0, stats=Stats(), mem_total=1 << 34, mem_available=1 << 33)
        >>> Target(settle=300, cpu=20).decide(nothing).why
        'nothing is registered'
        """
        if self._before is not None:
            self._learn(self._before, view)
        pages = max(view.candidates, view.stats.rmap_items)
        if pages == 0:
            decision = Decision(True, self._LEAST_BATCH, 20, "nothing is registered", smart_scan=False)
        else:
            decision = self._rate(view, pages)
        self._before, self._told = view, decision
        return decision

    def _rate(self, view: View, visits: int) -> Decision:
        """For a pass of so many visits."""
        each = self._measured if self._measured is not None else self.model(view)
        wanted = visits * self.PASSES / self._settle
        allowed = max(self._budget / 10, self._budget - self._debt / self._REPAY)
        rate = max(1.0, min(wanted, allowed / each))
        why = f"{visits:,.0f} pages every {visits / rate:.0f} s: {rate:,.0f} a second at {each * 1e6:.2f} us, "
        if rate < wanted * 0.99:
            why += f"the budget of {100 * self._budget:.3g} % of a CPU; "
            why += f"settling takes {self.PASSES * visits / rate:.0f} s, not {self._settle:.0f}"
        else:
            why += f"{100 * rate * each:.2g} % of a CPU"
        sleep = max(20, min(self._LONGEST_SLEEP, math.ceil(1000 * self._LEAST_BATCH / rate)))
        asleep = sleep / 1000 + (self._overhead if self._overhead is not None else 1 / self._cost.hz)
        batch = rate * asleep / max(0.01, 1 - rate * each)
        return Decision(True, max(1, min(round(batch), _MOST_PAGES)), sleep, why, smart_scan=False)

    def model(self, view: View) -> float:
        """CPU seconds that the cost model gives a visit, on average over the passes until all is settled.

        A page that is merged already is cheap, one that changes is hashed, and any other is hashed and sought in
        both trees.

        >>> view = View(seconds=0.0, stats=Stats(pages_sharing=1000), mem_total=1, mem_available=1, candidates=1000)
        >>> round(Target(settle=60, cpu=5, cost=CostModel(merged_ns=180)).model(view) * 1e9)
        180
        """
        stats = view.stats
        merged = stats.pages_shared + stats.pages_sharing
        pages = max(view.candidates, stats.rmap_items, 1)
        hashed = max(0, pages - merged)
        sought = max(0, hashed - stats.pages_volatile)
        total = self._cost.nanoseconds(hashed, 0, 0, merged, stats.page_size)
        total += sought * (self._cost.search_ns(sought) + self._cost.search_ns(1 + stats.pages_shared))
        return max(total / pages, 1.0) / 1e9

    def _learn(self, before: View, now: View) -> None:
        """From what ksmd did since the last decision."""
        seconds = now.seconds - before.seconds
        if now.ksmd_cpu is None or before.ksmd_cpu is None or seconds <= 0:
            return
        cpu = now.ksmd_cpu - before.ksmd_cpu
        self._debt = min(self._REPAY, max(0.0, self._debt + cpu - self._budget * seconds))
        if now.stats.pages_scanned is None or before.stats.pages_scanned is None:
            return  # before 6.6 visits are not counted
        visits = now.stats.pages_scanned - before.stats.pages_scanned
        if visits < 1000:
            return
        self._measured = _blend(self._measured, cpu / visits)
        if self._told is not None and visits > 10 * self._told.pages_to_scan:
            period = seconds * self._told.pages_to_scan / visits
            beyond = period - self._told.sleep_millisecs / 1000 - self._told.pages_to_scan * cpu / visits
            self._overhead = _blend(self._overhead, max(0.0, min(beyond, 0.05)))


def _blend(old: float | None, new: float) -> float:
    return new if old is None else (old + new) / 2

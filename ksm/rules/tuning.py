"""Tunables and time: too slow, too dear, tunables that fight each other, and what this kernel does not have."""

from __future__ import annotations

from ksm.ksmd import CostModel
from ksm.observe import Observation
from ksm.passes import PassClock
from ksm.rules import KSM_RST, Answer, Says, echo, rule
from ksm.sysfs import ATTRIBUTES, profile
from ksm.units import binary, clock

_SLOW_PASS = 1800.0  # seconds
_TARGET_PASS = 200  # seconds: the advisor's default target
_DEAR = 0.3  # of a CPU
_MOST_PAGES = 30_000  # the advisor's own limit for pages_to_scan


@rule("hint", f"{KSM_RST} (advisor_min_pages_to_scan)")
def advisor_floor(o: Observation) -> Answer:
    """The advisor has not left its least pages_to_scan, and passes are long."""
    s = o.sample
    least, pages = s.number("advisor_min_pages_to_scan"), s.number("pages_to_scan")
    if not s.running or not s.advisor or pages > least:
        return None
    progress = PassClock().update(o)
    target = s.number("advisor_target_scan_time")
    late = progress.pass_seconds is None or progress.pass_seconds > target
    if not late and s.stats.full_scans >= 2:
        return None
    figures = {
        "pages_to_scan": pages,
        "advisor_min_pages_to_scan": least,
        "advisor_target_scan_time": target,
        "full_scans": s.stats.full_scans,
        "pass_seconds": progress.pass_seconds,
    }
    takes = f", about {clock(progress.pass_seconds)} each" if progress.pass_seconds else ""
    return Says(
        f"The advisor is at its floor: {pages:,} pages a batch. It adapts only at the end of a pass, so the first "
        f"passes run at that speed{takes}. A higher floor merges sooner.",
        figures,
        echo(advisor_min_pages_to_scan=min(_MOST_PAGES, max(2000, 4 * least))),
    )


@rule("hint", f"{KSM_RST} (advisor_max_pages_to_scan, advisor_max_cpu)")
def advisor_ceiling(o: Observation) -> Answer:
    """The advisor cannot reach its target within its limits."""
    s = o.sample
    seconds = PassClock().update(o).pass_seconds
    target = s.number("advisor_target_scan_time")
    if not s.running or not s.advisor or s.stats.full_scans < 2 or seconds is None or seconds <= 1.25 * target:
        return None
    most, cpu = s.number("advisor_max_pages_to_scan"), s.number("advisor_max_cpu")
    figures = {"pass_seconds": seconds, "advisor_target_scan_time": target, "pages_to_scan": s.number("pages_to_scan")}
    text = f"A pass takes about {clock(seconds)}, longer than the advisor's target of {clock(target)}"
    if s.number("pages_to_scan") >= most:
        text += f", and pages_to_scan is at advisor_max_pages_to_scan ({most:,})."
        return Says(text, {**figures, "advisor_max_pages_to_scan": most}, echo(advisor_max_pages_to_scan=2 * most))
    share = o.ksmd_share
    if share is not None and share * 100 >= 0.9 * cpu:
        text += f", and ksmd takes {100 * share:.0f} % of a CPU of the {cpu} % that advisor_max_cpu lets it have."
        return Says(
            text, {**figures, "ksmd_share": share, "advisor_max_cpu": cpu}, echo(advisor_max_cpu=min(100, cpu + 20))
        )
    return None


@rule("problem", f"{KSM_RST} (advisor_mode: pages_to_scan cannot be written while it is on)")
def rivals(o: Observation) -> Answer:
    """Two programs, or a program and the advisor, set the same tunables."""
    s = o.sample
    if not s.rivals:
        return None
    who = ", ".join(s.rivals)
    if s.advisor:
        return Says(
            f"The advisor is on and {who} runs. The advisor owns pages_to_scan: every write of it fails with EINVAL, "
            "so the other program's tuning does nothing, except that it may turn ksmd on and off.",
            {"advisor_mode": s.tunables["advisor_mode"], "rivals": list(s.rivals)},
            "echo none > /sys/kernel/mm/ksm/advisor_mode",
        )
    return Says(
        f"{who} runs: it sets run, pages_to_scan and sleep_millisecs by itself, and what others write does not last.",
        {"advisor_mode": s.tunables.get("advisor_mode"), "rivals": list(s.rivals)},
        level="info",
    )


@rule("problem", f"{KSM_RST} (advisor_min_pages_to_scan, advisor_max_pages_to_scan)")
def advisor_limits(o: Observation) -> Answer:
    """The advisor's limits contradict each other."""
    s = o.sample
    least, most = s.number("advisor_min_pages_to_scan"), s.number("advisor_max_pages_to_scan")
    if "advisor_mode" not in s.tunables or least <= most:
        return None
    default = ATTRIBUTES["advisor_min_pages_to_scan"].default
    return Says(
        f"advisor_min_pages_to_scan ({least:,}) is above advisor_max_pages_to_scan ({most:,}): the advisor starts "
        "above what it may use.",
        {"advisor_min_pages_to_scan": least, "advisor_max_pages_to_scan": most},
        echo(advisor_min_pages_to_scan=min(default, most)),
        None if s.advisor else "hint",
    )


@rule("problem", f"{KSM_RST} (sleep_millisecs)")
def no_sleep(o: Observation) -> Answer:
    """ksmd never sleeps."""
    s = o.sample
    if not s.running or s.tunables.get("sleep_millisecs") != 0:
        return None
    share = o.ksmd_share
    now = f" (now {100 * share:.0f} %)" if share else ""
    return Says(
        f"sleep_millisecs is 0: ksmd never sleeps and takes up to a whole CPU{now}.",
        {"sleep_millisecs": 0, "ksmd_share": share},
        echo(sleep_millisecs=20),
    )


@rule("hint", f"{KSM_RST} (pages_to_scan); CPU by ksm.CostModel")
def slow(o: Observation) -> Answer:
    """A pass takes very long."""
    s = o.sample
    progress = PassClock().update(o)
    rate = o.visits_per_second
    if not s.running or s.advisor or not progress.pass_seconds or not rate or progress.pass_seconds < _SLOW_PASS:
        return None
    visits = progress.pass_seconds * rate
    sleep = max(1, s.number("sleep_millisecs"))
    pages = min(_MOST_PAGES, max(1, round(visits * sleep / 1000 / _TARGET_PASS)))
    if pages <= s.number("pages_to_scan"):
        return None
    faster = pages * 1000 / sleep
    share = faster * CostModel().hash_ns / 1e9  # most visits hash a page
    return Says(
        f"A pass over {visits:,.0f} pages takes {clock(progress.pass_seconds)} at {rate:,.0f} visits a second "
        f"({s.number('pages_to_scan'):,} pages every {sleep} ms). {pages:,} pages a batch would make it about "
        f"{clock(visits / faster)}, for {100 * share:.0f} % of a CPU.",
        {
            "pass_seconds": progress.pass_seconds,
            "visits_per_second": rate,
            "visits": round(visits),
            "ksmd_share": share,
        },
        echo(pages_to_scan=pages),
    )


@rule("hint", f"{KSM_RST} (pages_to_scan, sleep_millisecs); the limit of 30 % is this program's")
def dear(o: Observation) -> Answer:
    """ksmd takes much CPU time and nothing more merges."""
    s = o.sample
    share = o.ksmd_share
    if not s.running or s.stats.full_scans < 2 or share is None or share <= _DEAR or s.number("sleep_millisecs") == 0:
        return None
    gained = sum(int(o.changes.get(name, 0)) for name in ("pages_shared", "pages_sharing", "ksm_zero_pages"))
    rate = o.visits_per_second or 0.0
    if gained > 0.001 * rate * o.seconds:
        return None
    pages = max(100, s.number("pages_to_scan") // 5)
    can_tune = not s.advisor and pages < s.number("pages_to_scan")
    return Says(
        f"ksmd takes {100 * share:.0f} % of a CPU, {rate:,.0f} visits a second, and merged "
        f"{max(0, gained):,} more pages in {clock(o.seconds)}: what can be merged is merged. It may go slower.",
        {"ksmd_share": share, "visits_per_second": rate, "newly_merged": gained},
        echo(pages_to_scan=pages) if can_tune else echo(advisor_max_cpu=10) if s.advisor else None,
    )


@rule("info", f"{KSM_RST}; the versions: docs/counters.md")
def old_kernel(o: Observation) -> Answer:
    """What this kernel does not have, where it would be of use now."""
    s = o.sample
    try:
        known = profile(s.kernel)
    except ValueError:
        return Says(f"Linux {s.kernel} is older than 5.15: not all advice fits it.", {"kernel": s.kernel})
    missing = []
    if not known.process_merge_any and not s.stats.rmap_items and not s.processes:
        missing.append("PR_SET_MEMORY_MERGE, to opt whole programs in (6.4)")
    if "ksm_process_profit" not in known.ksm_stat_fields and s.stats.rmap_items:
        missing.append("profits (6.4)")
    if s.tunables.get("use_zero_pages") and not known.counts_zero_pages:
        missing.append("a count of zero pages, so that what use_zero_pages saves shows nowhere (6.6)")
    if not known.smart_scan and s.stats.pages_unshared > s.stats.saved_pages:
        missing.append("smart scan, which skips pages that do not merge (6.7)")
    if not known.advisor and s.running and s.stats.rmap_items:
        missing.append("the advisor, which sets pages_to_scan (6.8)")
    if not missing:
        return None
    return Says(f"Linux {s.kernel} does not have: {'; '.join(missing)}.", {"kernel": s.kernel, "missing": len(missing)})


@rule("hint", "https://docs.kernel.org/admin-guide/mm/transhuge.html; zero pages of split huge pages: docs/counters.md")
def huge_pages(o: Observation) -> Answer:
    """Huge pages and KSM undo each other's work."""
    s = o.sample
    huge = s.memory.anonymous_huge
    if s.huge_pages != "always" or not s.running or not s.stats.rmap_items:
        return None
    have = f" now {binary(huge)} of anonymous memory are in huge pages;" if huge is not None else ""
    return Says(
        f'transparent_hugepage is "always":{have} KSM splits a huge page when one of its pages merges, and khugepaged '
        "makes huge pages of what it can. Choose by program: huge pages for speed, KSM for memory.",
        {"huge_pages": s.huge_pages, "anonymous_huge_bytes": huge, "rmap_items": s.stats.rmap_items},
        "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
    )


@rule("info", f"{KSM_RST} (full_scans)")
def speed(o: Observation) -> Answer:
    """How fast ksmd goes, and what that costs."""
    rate, share = o.visits_per_second, o.ksmd_share
    if not o.sample.running or not rate or share is None or o.sample.stats.pages_scanned is None:
        return None
    return Says(
        f"ksmd visited {rate:,.0f} pages a second over {clock(o.seconds)}, for {100 * share:.1f} % of a CPU "
        f"({share / rate * 1e9:,.0f} ns a visit).",
        {"visits_per_second": rate, "ksmd_share": share},
    )

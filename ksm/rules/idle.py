"""Why nothing is merged: rules for the case that KSM does nothing, or nothing yet."""

from __future__ import annotations

from ksm.observe import Observation, ProcessSample
from ksm.passes import PassClock
from ksm.rules import KSM_RST, Answer, Says, echo, restart, rule
from ksm.units import binary, clock, many

_MOST_PAGES = 10_000  # a batch: beyond it ksmd holds a CPU for long
_MANUAL_MADVISE = "https://man7.org/linux/man-pages/man2/madvise.2.html"
_MANUAL_PRCTL = "https://man7.org/linux/man-pages/man2/PR_SET_MEMORY_MERGE.2const.html"


@rule("problem", f"{KSM_RST} (run)")
def stopped(o: Observation) -> Answer:
    """`run` is 0: ksmd does not scan."""
    if o.sample.tunables.get("run") != 0:
        return None
    saved = o.sample.stats.saved_bytes
    more = "and nothing is merged"
    if saved:
        more = f"so nothing new is merged; the {binary(saved)} it saved stay saved until programs write to those pages"
    return Says(f"ksmd does not run (run is 0), {more}.", {"run": 0, "saved_bytes": saved}, echo(run=1))


@rule("problem", f"{KSM_RST} (run)")
def unmerged(o: Observation) -> Answer:
    """`run` is 2: everything was given back."""
    if o.sample.tunables.get("run") != 2:
        return None
    text = "run is 2: ksmd stopped and gave every merged page its own copy back. What is marked mergeable stays marked."
    return Says(text, {"run": 2}, echo(run=1))


@rule("problem", f"{_MANUAL_MADVISE} (MADV_MERGEABLE); {_MANUAL_PRCTL}")
def nothing_registered(o: Observation) -> Answer:
    """ksmd runs, and no program has marked memory that KSM can take."""
    s = o.sample
    if not s.running or s.stats.rmap_items or s.processes or o.changes.get("pages_scanned"):
        return None
    figures = {"rmap_items": 0, "processes": 0, "processes_unreadable": s.processes_unreadable}
    unsure = ""
    if s.processes_unreadable:
        unsure = f" ({many(s.processes_unreadable, 'process', 'processes')} of other users could not be read.)"
    return Says(
        "ksmd runs and has nothing to scan: no program has marked memory mergeable. KSM takes only what programs "
        "offer, by madvise(MADV_MERGEABLE) or prctl(PR_SET_MEMORY_MERGE). Both succeed, and do nothing, on shared, "
        "file and hugetlb memory: QEMU's must be private and anonymous (no memory-backend-memfd or hugepages, no "
        f"mem-merge=off).{unsure}",
        figures,
        "ksm run -- PROGRAM",
    )


@rule("problem", f"{KSM_RST} (pages_to_scan, sleep_millisecs)")
def asleep(o: Observation) -> Answer:
    """ksmd runs, has something to scan, and its counters stand still."""
    s = o.sample
    if not s.running or not (s.processes or s.stats.rmap_items) or not o.seconds:
        return None
    if any(o.changes.get(name) for name in ("pages_scanned", "pages_skipped", "full_scans")):
        return None
    if s.stats.pages_scanned is None and o.ksmd_share != 0.0:
        return None  # before 6.6 only whole passes show
    pages, sleep = s.number("pages_to_scan"), s.number("sleep_millisecs")
    figures = {"pages_to_scan": pages, "sleep_millisecs": sleep, "seconds": round(o.seconds, 3)}
    if not pages:
        return Says("pages_to_scan is 0: ksmd wakes up and visits nothing.", figures, echo(pages_to_scan=1000))
    if sleep >= o.seconds * 1000:
        text = f"ksmd visited nothing in {clock(o.seconds)}: it sleeps {clock(sleep / 1000)} between batches."
        return Says(text, figures, echo(sleep_millisecs=20))
    return None


@rule("info", f"{KSM_RST} (full_scans); merging takes two passes: docs/counters.md")
def first_pass(o: Observation) -> Answer:
    """Not two passes yet: too early to judge."""
    s = o.sample
    if not s.running or s.stats.full_scans >= 2 or not (s.processes or s.stats.rmap_items):
        return None
    progress = PassClock().update(o)
    rate = o.visits_per_second
    figures = {
        "full_scans": s.stats.full_scans,
        "visits_per_second": rate,
        "pass_seconds_at_most": progress.pass_seconds,
        "settle_seconds_at_most": progress.settle,
    }
    faster = min(_MOST_PAGES, max(1000, 10 * s.number("pages_to_scan")))
    when = ""
    if progress.pass_seconds and progress.settle and rate:
        when = (
            f" At {rate:,.0f} visits a second a pass takes at most {clock(progress.pass_seconds)}; what stands still "
            f"is merged in at most {clock(progress.settle)}."
        )
    return Says(
        f"ksmd has finished {s.stats.full_scans} of the two passes that merging takes: the first remembers checksums, "
        f"the second merges. It is too early to judge.{when}",
        figures,
        echo(pages_to_scan=faster) if faster > s.number("pages_to_scan") and not s.advisor else None,
    )


@rule("problem", f"{_MANUAL_MADVISE} (MADV_MERGEABLE: private anonymous pages)")
def not_anonymous(o: Observation) -> Answer:
    """Memory is marked, and none of it is anonymous memory with pages."""
    s = o.sample
    if not s.running or not s.stats.full_scans:
        return None
    idle = [p for p in s.processes if p.stats.ksm_mergeable and not p.stats.ksm_rmap_items and p.marked is not None]
    idle = [p for p in idle if p.marked is not None and not p.marked.anonymous]
    if not idle:
        return None
    size = sum(p.marked.size for p in idle if p.marked)
    rss = sum(p.marked.rss for p in idle if p.marked)
    names = _names(idle)
    why = "it was never written to" if not rss else f"the {binary(rss)} in memory are shared or file pages"
    return Says(
        f"{names} marked {binary(size)} mergeable, and none of it is anonymous memory: {why}. KSM takes private "
        "anonymous pages only.",
        {"processes": [p.pid for p in idle], "marked_bytes": size, "resident_bytes": rss, "anonymous_bytes": 0},
    )


@rule("problem", f'{KSM_RST} (pages_unshared: "unique but repeatedly checked for merging")')
def no_duplicates(o: Observation) -> Answer:
    """Everything was compared, and no two pages are equal."""
    s = o.sample
    if not s.running or s.stats.full_scans < 2 or o.sample.stats.saved_pages or s.lone_pages <= s.stats.rmap_items // 2:
        return None
    if _apart(o):
        return None
    pids = " ".join(f"pid:{p.pid}" for p in s.processes[:8])
    return Says(
        f"After {s.stats.full_scans:,} passes {s.lone_pages:,} pages were compared and no two are equal. "
        "Encrypted, compressed and random data never merge; neither does memory of one program that runs once.",
        {"full_scans": s.stats.full_scans, "pages_not_merged": s.lone_pages, "pages_sharing": 0},
        f"ksm estimate {pids}" if pids and not s.simulated else echo(run=0),
    )


@rule("hint", f"{KSM_RST} (merge_across_nodes)")
def numa(o: Observation) -> Answer:
    """Several NUMA nodes, and equal pages on different ones stay apart."""
    s = o.sample
    if not _apart(o):
        return None
    nothing = s.running and not s.stats.saved_pages and s.stats.full_scans >= 2 and s.lone_pages > 0
    text = (
        f"merge_across_nodes is 0: equal pages on different ones of the {s.nodes} NUMA nodes are not merged. That "
        "keeps memory near its readers and saves less."
    )
    if nothing:
        text = (
            f"Nothing is merged after {s.stats.full_scans:,} passes, and merge_across_nodes is 0: pages are compared "
            f"within each of the {s.nodes} NUMA nodes only."
        )
    return Says(
        f"{text} Changing it takes unmerging everything first.",
        {"merge_across_nodes": 0, "nodes": s.nodes, "pages_sharing": s.stats.pages_sharing},
        restart(merge_across_nodes=1),
        "problem" if nothing else None,
    )


def _apart(o: Observation) -> bool:
    return o.sample.nodes > 1 and o.sample.tunables.get("merge_across_nodes") is False


def _names(processes: list[ProcessSample]) -> str:
    """Some of them by name and pid."""
    shown = [f"{p.name} (pid {p.pid})" for p in processes[:3]]
    more = f" and {len(processes) - 3:,} more" if len(processes) > 3 else ""
    return ", ".join(shown) + more

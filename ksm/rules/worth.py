"""Whether merging pays: the ratios, the profit and whose it is, what the bookkeeping takes."""

from __future__ import annotations

from ksm.constants import RMAP_ITEM_BYTES
from ksm.observe import Observation, ProcessSample
from ksm.rules import KSM_RST, Answer, Says, echo, restart, rule
from ksm.units import binary, many

_WASTE = 10  # unshared pages for each saved one
_VOLATILE = 0.3  # of the tracked pages
_METADATA = 0.1  # of the saving
_LOST = 0.01  # of the saving
_MANY_SHARERS = 4096  # no reason to let one page have more: each reverse map walk visits all of them


@rule("info", f"{KSM_RST} (pages_sharing / pages_shared)")
def saving(o: Observation) -> Answer:
    """What is saved, and how well it is shared."""
    st = o.sample.stats
    if not st.saved_pages:
        return None
    parts = [f"{st.pages_sharing:,} places share {st.pages_shared:,} KSM pages"]
    if st.sharing_ratio is not None:
        parts[0] += f" (sharing/shared {st.sharing_ratio:.1f})"
    if st.ksm_zero_pages:
        parts.append(f"{st.ksm_zero_pages:,} map the zero page")
    return Says(
        f"KSM saves {binary(st.saved_bytes)}: {' and '.join(parts)}. Less {binary(st.metadata_bytes)} of its own that "
        f"is {binary(st.profit)}.",
        {
            "pages_sharing": st.pages_sharing,
            "pages_shared": st.pages_shared,
            "ksm_zero_pages": st.ksm_zero_pages,
            "sharing_ratio": st.sharing_ratio,
            "profit": st.profit,
        },
    )


@rule("hint", f'{KSM_RST} (pages_unshared / pages_sharing: "wasted effort"); the limit of {_WASTE} is this program\'s')
def wasted_effort(o: Observation) -> Answer:
    """Far more unique pages are looked at than are saved."""
    s, st = o.sample, o.sample.stats
    lone = s.lone_pages
    if st.full_scans < 2 or not st.saved_pages or lone <= _WASTE * st.saved_pages:
        return None
    worst = sorted(s.processes, key=_unmerged, reverse=True)[:3]
    who = ", ".join(f"{p.name} (pid {p.pid}): {_unmerged(p):,}" for p in worst if _unmerged(p) > 0)
    return Says(
        f"{lone:,} unique pages are looked at again and again, for {st.saved_pages:,} saved ones: "
        f"{lone / st.saved_pages:.0f} for one."
        + (f" Most pages that are tracked and not merged: {who}." if who else ""),
        {
            "pages_not_merged": lone,
            "pages_sharing": st.pages_sharing,
            "ksm_zero_pages": st.ksm_zero_pages,
            "unshared_ratio": st.unshared_ratio,
        },
    )


def _unmerged(process: ProcessSample) -> int:
    return (process.stats.ksm_rmap_items or 0) - (process.stats.ksm_merging_pages or 0)


@rule("hint", f'{KSM_RST} (pages_volatile: "poor use of madvise MADV_MERGEABLE"); the limit of 30 % is this program\'s')
def volatile(o: Observation) -> Answer:
    """Much of what is tracked changes from pass to pass."""
    s, st = o.sample, o.sample.stats
    share = st.volatile_share
    if not s.running or st.full_scans < 2 or share is None or share <= _VOLATILE:
        return None
    figures = {"pages_volatile": st.pages_volatile, "rmap_items": st.rmap_items, "volatile_share": share}
    if s.skips:
        return Says(
            f"{100 * share:.0f} % of the tracked pages ({st.pages_volatile:,} of {st.rmap_items:,}) count as volatile. "
            "With smart scan that does not say that they change: a page that is skipped counts as volatile until it is "
            "visited again. Two passes without smart scan tell the two apart.",
            figures,
            echo(smart_scan=0),
            "info",
        )
    return Says(
        f"{100 * share:.0f} % of the tracked pages ({st.pages_volatile:,} of {st.rmap_items:,}) changed between two "
        "passes, or were first seen in this one. Hashing them is wasted; longer passes see more of them change. Mark "
        "only memory that stands still.",
        figures,
    )


@rule("info", f"{KSM_RST} (max_page_sharing, stable_node_chains, stable_node_dups)")
def chains(o: Observation) -> Answer:
    """Contents that have more copies than one KSM page may have."""
    s, st = o.sample, o.sample.stats
    lost = st.stable_node_dups - st.stable_node_chains
    limit = s.number("max_page_sharing")
    if lost <= 0 or not limit:
        return None
    longest = -(-st.stable_node_dups // st.stable_node_chains) if st.stable_node_chains else st.stable_node_dups
    wanted = min(_MANY_SHARERS, 1 << (longest * limit - 1).bit_length())
    figures = {
        "stable_node_chains": st.stable_node_chains,
        "stable_node_dups": st.stable_node_dups,
        "max_page_sharing": limit,
        "lost_bytes": lost * st.page_size,
    }
    text = (
        f"max_page_sharing ({limit}) limits how many places one KSM page may have, and "
        f"{many(st.stable_node_chains, 'content reaches', 'contents reach')} it: "
        f"{many(lost, 'KSM page')} beyond the first of each take {binary(lost * st.page_size)}."
    )
    if lost < _LOST * st.saved_pages or wanted <= limit:
        return Says(f"{text} That is little; leave it.", figures)
    return Says(
        f"{text} A larger limit saves them, and makes reclaim and migration of such a page slower; changing it takes "
        "unmerging everything first.",
        figures,
        restart(max_page_sharing=wanted),
        "hint",
    )


@rule("problem", f"{KSM_RST} (general_profit, ksm_process_profit)")
def negative_profit(o: Observation) -> Answer:
    """KSM takes more memory than it saves."""
    st = o.sample.stats
    if st.profit >= 0:
        return None
    whose = ", ".join(f"{p.name} (pid {p.pid}) {binary(p.stats.profit)}" for p in o.losers[:3])
    early = " It is early, though: merging takes two passes." if st.full_scans < 2 else ""
    return Says(
        f"KSM costs more memory than it saves: {binary(st.saved_bytes)} saved, {binary(st.metadata_bytes)} of rmap "
        f"items ({RMAP_ITEM_BYTES} bytes for each of {st.rmap_items:,} tracked pages): {binary(st.profit)}."
        + (f" Most of it by {whose}." if whose else "")
        + early,
        {
            "profit": st.profit,
            "saved_bytes": st.saved_bytes,
            "metadata_bytes": st.metadata_bytes,
            "losers": [p.pid for p in o.losers[:8]],
        },
        None if early else echo(run=2),
        "info" if early else None,
    )


@rule("hint", f"{KSM_RST} (ksm_process_profit; ksm_rmap_items / ksm_merging_pages above 64)")
def losers(o: Observation) -> Answer:
    """The whole pays; some processes do not."""
    st = o.sample.stats
    found = o.losers
    if st.profit < 0 or not found or st.full_scans < 2:
        return None
    total = sum(p.stats.profit for p in found)
    whose = "; ".join(
        f"{p.name} (pid {p.pid}) {binary(p.stats.profit)}, {p.stats.ksm_merging_pages or 0:,} of "
        f"{p.stats.ksm_rmap_items or 0:,} tracked pages merged"
        for p in found[:3]
    )
    return Says(
        f"{len(found):,} of {len(o.sample.processes):,} processes cost more than they save, {binary(total)} together: "
        f"{whose}. Marking their memory does not pay.",
        {"losers": [p.pid for p in found[:64]], "profit": total},
    )


@rule("hint", f"{KSM_RST} (general_profit); the limit of 10 % is this program's")
def metadata(o: Observation) -> Answer:
    """The bookkeeping eats a good part of the saving."""
    st = o.sample.stats
    if st.profit < 0 or not st.saved_bytes or st.metadata_bytes <= _METADATA * st.saved_bytes:
        return None
    return Says(
        f"Rmap items take {binary(st.metadata_bytes)}, {100 * st.metadata_bytes / st.saved_bytes:.0f} % of the "
        f"{binary(st.saved_bytes)} that is saved: {st.rmap_items:,} pages are tracked for {st.saved_pages:,} saved "
        "ones.",
        {"metadata_bytes": st.metadata_bytes, "saved_bytes": st.saved_bytes, "rmap_items": st.rmap_items},
    )


@rule("hint", f"{KSM_RST} (use_zero_pages)")
def zero_pages(o: Observation) -> Answer:
    """Empty pages are probably what fills the chains."""
    s, st = o.sample, o.sample.stats
    if s.tunables.get("use_zero_pages") is not False or not st.stable_node_chains:
        return None
    limit = s.number("max_page_sharing")
    return Says(
        f"use_zero_pages is 0, and {many(st.stable_node_chains, 'content has', 'contents have')} more than {limit} "
        f"copies: most often it is the empty page. With use_zero_pages those places map the kernel's zero page instead "
        f"of {st.stable_node_dups:,} KSM pages. Pages that are merged already stay as they are.",
        {"use_zero_pages": 0, "stable_node_chains": st.stable_node_chains, "stable_node_dups": st.stable_node_dups},
        echo(use_zero_pages=1),
        "info" if st.stable_node_dups < _LOST * st.saved_pages else None,
    )

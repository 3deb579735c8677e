"""What can go wrong: more to unmerge than there is memory, sharing that breaks as it is made, hidden processes."""

from __future__ import annotations

from ksm.observe import Observation
from ksm.rules import KSM_RST, Answer, Says, echo, rule
from ksm.units import binary

_NEAR = 0.8  # of the memory that is free
_BREAKING = 0.1  # of the merged pages, a minute


@rule("problem", f"{KSM_RST} (run: 2 unmerges all pages); MemAvailable: man 5 proc_meminfo")
def unmerge_risk(o: Observation) -> Answer:
    """Unmerging everything would need more memory than there is."""
    s = o.sample
    saved, available = s.stats.saved_bytes, s.memory.available
    if not saved or available is None:
        return None
    free = available + (s.memory.swap_free or 0)
    if saved <= _NEAR * free:
        return None
    figures = {"saved_bytes": saved, "available_bytes": available, "swap_free_bytes": s.memory.swap_free}
    swap = f" and {binary(s.memory.swap_free)} of swap" if s.memory.swap_free else ""
    if saved > free:
        return Says(
            f"Do not write 2 to run: unmerging needs {binary(saved)}, and {binary(available)}{swap} are available. "
            "Were the programs to write to what they share, it would be the same. Move or stop some first; ksmd can be "
            "stopped without unmerging.",
            figures,
            echo(run=0),
        )
    return Says(
        f"Unmerging would take {binary(saved)} of the {binary(available)}{swap} that are available: there is little to "
        "spare should the sharing break.",
        figures,
        level="hint",
    )


@rule("hint", f"{KSM_RST} (cow_ksm); the limit of 10 % a minute is this program's")
def breaking(o: Observation) -> Answer:
    """Merged pages are written to, and copied, nearly as fast as they are merged."""
    st = o.sample.stats
    rate = o.rate("cow_ksm")
    merged = st.pages_shared + st.pages_sharing
    if not rate or rate * 60 <= _BREAKING * merged:
        return None
    return Says(
        f"Programs write to merged pages: {rate:,.0f} copies a second (cow_ksm), of {merged:,} merged pages. Each "
        "write waits for a copy, and ksmd merges the page again later.",
        {"cow_ksm_per_second": rate, "merged_pages": merged},
    )


@rule("hint", f"{KSM_RST} (ksm_swpin_copy)")
def swapped_copies(o: Observation) -> Answer:
    """Merged pages come back from swap as copies."""
    rate = o.rate("ksm_swpin_copy")
    if not rate:
        return None
    return Says(
        f"{rate:,.0f} pages a second come back from swap as copies (ksm_swpin_copy): they were merged when they went "
        "out, and take more memory now than then.",
        {"ksm_swpin_copy_per_second": rate},
    )


@rule("info", "https://docs.kernel.org/filesystems/proc.html (hidepid; ptrace access)")
def hidden(o: Observation) -> Answer:
    """Not everything could be seen from here."""
    s = o.sample
    missing = []
    if s.processes_unreadable:
        missing.append(f"{s.processes_unreadable:,} of {s.processes_total:,} processes belong to other users")
    if s.ksmd_cpu_seconds is None:
        missing.append("ksmd cannot be seen, as in a container or with hidepid, so its CPU time is unknown")
    if not s.processes_shown:
        missing.append("this kernel does not show the processes' part (5.19 and later do)")
    if not missing:
        return None
    return Says(
        f"Seen from here: {'; '.join(missing)}. Root on the host sees all.",
        {"processes_unreadable": s.processes_unreadable, "processes_total": s.processes_total},
    )

"""The engine: frames, rmap items, trees and passes. It owns all memory and is the one extension.

Internal: `ksm.machine` and `ksm.ksmd` drive it under one lock for each engine; nothing here is synchronised.
Pages are given by their virtual page number (`vpn`), `n` counts pages, a space is an address space (an mm).
"""

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt

class FramesExhausted(Exception):
    """The simulated RAM has no frame left; ksm.machine reclaims, or says who asked."""

@final
class Engine:
    """Frames, slots, rmap items and trees of one simulated machine, and ksmd's walk over them."""

    max_page_sharing: int
    merge_across_nodes: bool
    use_zero_pages: bool
    smart_scan: bool
    unmerging: bool
    """run is 2."""
    prune_ticks: int
    """stable_node_chains_prune_millisecs in ticks."""
    now: int
    """Virtual time, ns."""
    wake: int
    """When the next batch of `run_until` starts, ns."""
    pass_start: tuple[int, float]
    """Virtual time and ksmd's CPU time, ns, when the pass under way began."""

    @property
    def cpu(self) -> float:
        """CPU time that the batches have taken by the costs that were set, ns."""

    @property
    def pages_shared(self) -> int: ...
    @property
    def pages_sharing(self) -> int: ...
    @property
    def pages_unshared(self) -> int: ...
    @property
    def rmap_items(self) -> int: ...
    @property
    def stable_node_chains(self) -> int: ...
    @property
    def stable_node_dups(self) -> int: ...
    @property
    def ksm_zero_pages(self) -> int: ...
    @property
    def full_scans(self) -> int: ...
    @property
    def pages_scanned(self) -> int: ...
    @property
    def pages_skipped(self) -> int: ...
    @property
    def cow_ksm(self) -> int: ...
    @property
    def ksm_swpin_copy(self) -> int: ...
    @property
    def hashed(self) -> int:
        """Pages that a ksmd would have hashed."""
    @property
    def stable_levels(self) -> int:
        """Levels of stable trees that a ksmd would have descended, at log2 of a tree's size for each search."""
    @property
    def unstable_levels(self) -> int:
        """The same of unstable trees."""
    @property
    def deep_levels(self) -> int:
        """Those of both that lie beyond the first 8 levels of their trees."""
    @property
    def merges(self) -> int: ...
    @property
    def already(self) -> int:
        """Visits to slots that were merged already."""
    @property
    def comparisons(self) -> int:
        """Contents that this engine compared in trees; with index "tree" what a ksmd compares."""
    @property
    def bytes_compared(self) -> int: ...
    @property
    def resident(self) -> int:
        """Frames with a mapper."""
    @property
    def swapped_pages(self) -> int: ...
    @property
    def max_resident(self) -> int: ...
    @property
    def max_swapped(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def nodes(self) -> int: ...
    @property
    def hash_index(self) -> bool: ...
    @property
    def fingerprints_only(self) -> bool: ...
    @property
    def any_registered(self) -> bool: ...
    @property
    def in_pass(self) -> bool: ...
    def __init__(
        self,
        page_size: int = 4096,
        nodes: int = 1,
        hash_index: bool = True,
        gate_first: bool = True,
        zero_giveback: bool = True,
        counts_zero_pages: bool = True,
        max_resident: int = 0,
        max_swapped: int = 0,
    ) -> None: ...
    def new_space(self) -> int: ...
    def use_fingerprints(self, high: int, low: int) -> None: ...
    def prune_interval_changed(self) -> None: ...
    def register(self, mm: int) -> None: ...
    def registered(self, mm: int) -> bool: ...
    def set_any_marked(self, mm: int, marked: bool) -> None: ...
    def space_counts(self, mm: int) -> tuple[int, int, int]: ...
    def exit_space(self, mm: int) -> None: ...
    def populate(self, mm: int, vpn: int, pages: Any, present: Any, marked: bool, nid: int) -> None:
        """pages: uint8 (n, page_size or 16), C-contiguous, borrowed; present: uint8 (n,)."""
    def populate_huge(self, mm: int, vpn: int, writing: bool, marked: bool, nid: int) -> bool: ...
    def write(self, mm: int, vpn: int, offset: int, data: Any, marked: bool, nid: int, origin: int) -> None: ...
    def overwrite(
        self,
        mm: int,
        vpn: int,
        rows: npt.NDArray[np.uint8],
        present: npt.NDArray[np.uint8],
        marked: bool,
        nid: int,
        origin: int,
    ) -> None: ...
    def read(self, mm: int, vpn: int, offset: int, n: int, marked: bool, nid: int, origin: int) -> bytes: ...
    def mark(self, mm: int, vpn: int, n: int, marked: bool) -> None: ...
    def hide(self, mm: int, vpn: int, n: int, hidden: bool) -> None: ...
    def unmerge(self, mm: int, vpn: int, n: int, nid: int) -> None: ...
    def unmap(self, mm: int, vpn: int, n: int) -> None: ...
    def discard(self, mm: int, vpn: int, n: int) -> None: ...
    def lazy_free(self, mm: int, vpn: int, n: int) -> None: ...
    def page_out(self, mm: int, vpn: int, n: int) -> None: ...
    def reclaim(self, frames: int) -> int: ...
    def touched(self, mm: int, vpn: int, n: int) -> list[int]: ...
    def move(self, mm: int, old: int, new: int, n: int, marked: bool) -> None: ...
    def fork(self, parent: int, child: int) -> None: ...
    def migrate(self, mm: int, vpn: int, n: int, nid: int) -> None: ...
    def set_costs(self, costs: Sequence[float], hz: int) -> None: ...
    def scan_batch(self, budget: int) -> int: ...
    def run_until(self, end: int, budget: int, ticks: int, by_pass: bool) -> int: ...
    def unmerge_all(self, marked: Mapping[int, Sequence[tuple[int, int, int]]]) -> None: ...
    def sweep_stable(self) -> bool: ...
    def memory(self) -> dict[str, int]:
        """Bytes that each structure has allocated, touched or not; pages that were handed in are not among them."""
    def dump(self) -> dict[str, Any]: ...

def fingerprint_forms() -> tuple[str, ...]:
    """The forms of the hash that were compiled in, best first."""

def fingerprint_pages(
    pages: npt.NDArray[np.uint8],
    out: npt.NDArray[np.uint64],
    zero: npt.NDArray[np.uint8] | None = None,
    variant: str | None = None,
) -> None:
    """Write XXH3-128 of every page (n, page_size) to `out` (n, 2: high, low), to `zero` (n,) whether it is zeros."""

@final
class Settling:
    """Counts what pages settle at that come in the order of ksmd's visits.

    `expected` pages make room for as many at once, which is twice as fast as growing.

    >>> counting = Settling(max_page_sharing=2, sources=1)
    >>> counting.visit(0, np.zeros((3, 2), np.uint64))
    >>> counting.counts()[0]["pages_shared"], counting.counts()[0]["pages_unshared"]
    (1, 1)
    """

    def __init__(self, max_page_sharing: int, sources: int, expected: int = 0) -> None: ...
    def visit(
        self,
        source: int,
        words: npt.NDArray[np.uint64],
        present: npt.NDArray[np.uint8] | None = None,
        zero_high: int = 0,
        zero_low: int = 0,
        zeros_merge: bool = True,
    ) -> None:
        """Pages of one source by their (high, low) words, all but those with a 0 in `present`; releases the GIL."""
    def counts(self) -> list[dict[str, int]]:
        """What each source's pages came to so far, by name."""
    @property
    def stable_node_chains(self) -> int: ...
    @property
    def stable_node_dups(self) -> int: ...

@final
class Sharing:
    """Which contents the members of groups have, as they come and go.

    Args:
        row: (n,) uint32, contents of one member after the other, each once a member.
        starts: (members + 1,) int64, where each one's begin in `row`, ascending from 0 to n.

    All methods are O(contents of the member). Members out of range are an IndexError.
    """

    def __init__(self, row: npt.NDArray[np.uint32], starts: npt.NDArray[np.int64]) -> None: ...
    def add(self, member: int, group: int) -> None:
        """A member joins a group, a number below 2**32."""
    def remove(self, member: int, group: int) -> None:
        """A member leaves the group that it is in."""
    def new(self, member: int, group: int) -> int:
        """How many contents a member would bring that nobody there has."""
    def freed(self, member: int, group: int) -> int:
        """How many contents would go with a member of the group."""
    def new_each(self, members: npt.NDArray[np.int64], group: int, out: npt.NDArray[np.int64]) -> None:
        """`new` of several members, written to `out`."""
    @property
    def pairs(self) -> int:
        """Contents over all groups, one in two groups counted twice."""

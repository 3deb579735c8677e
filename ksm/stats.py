"""Frozen snapshots of KSM's counters, and the ratios derived from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ksm.constants import RMAP_ITEM_BYTES


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """All counters of /sys/kernel/mm/ksm at one moment; a counter that the kernel's version lacks is None.

    The derived values follow the kernel's own documentation (Documentation/admin-guide/mm/ksm.rst), which each of
    them names. A ratio whose denominator is 0 has no value: it is None, never 0 or infinity.

    >>> s = Stats(page_size=4096, pages_shared=2, pages_sharing=10, pages_unshared=5, pages_volatile=3,
    ...           full_scans=7, stable_node_chains=0, stable_node_dups=0, ksm_zero_pages=4)
    >>> s.saved_bytes, s.sharing_ratio, s.unshared_ratio, s.rmap_items, s.profit
    (57344, 5.0, 0.5, 20, 56064)
    """

    page_size: int = 4096
    pages_shared: int = 0
    """KSM frames in use: what the merged pages still take."""
    pages_sharing: int = 0
    """Further places that share them: what is saved."""
    pages_unshared: int = 0
    """Unique pages, looked at in every pass."""
    pages_volatile: int = 0
    """Pages that change too fast to be placed in a tree."""
    full_scans: int = 0
    stable_node_chains: int = 0
    stable_node_dups: int = 0
    general_profit: int | None = None
    """Bytes, by the kernel's own count (6.4 and later; with the zero pages from 6.6 on)."""
    pages_scanned: int | None = None
    """Since 6.6."""
    ksm_zero_pages: int | None = None
    """Since 6.6. Before it pages merged with the zero page are counted nowhere."""
    pages_skipped: int | None = None
    """Since 6.7."""

    @property
    def saved_pages(self) -> int:
        """`pages_sharing` + `ksm_zero_pages`, "the actual number of pages saved by KSM" (ksm.rst).

        >>> Stats(pages_sharing=10, ksm_zero_pages=4).saved_pages
        14
        """
        return self.pages_sharing + (self.ksm_zero_pages or 0)

    @property
    def saved_bytes(self) -> int:
        """`saved_pages` in bytes; what KSM itself takes (`metadata_bytes`) is not taken off.

        >>> Stats(pages_sharing=10).saved_bytes
        40960
        """
        return self.saved_pages * self.page_size

    @property
    def sharing_ratio(self) -> float | None:
        """`pages_sharing` / `pages_shared`: high "indicates good sharing" (ksm.rst); below max_page_sharing.

        None when nothing is merged.

        >>> Stats(pages_shared=2, pages_sharing=10).sharing_ratio
        5.0
        >>> Stats().sharing_ratio is None
        True
        """
        return _ratio(self.pages_sharing, self.pages_shared)

    @property
    def unshared_ratio(self) -> float | None:
        """`pages_unshared` / `pages_sharing`: high "indicates wasted effort" (ksm.rst).

        None when nothing is merged, also when there are unshared pages.

        >>> Stats(pages_sharing=10, pages_unshared=5).unshared_ratio
        0.5
        >>> Stats(pages_unshared=5).unshared_ratio is None
        True
        """
        return _ratio(self.pages_unshared, self.pages_sharing)

    @property
    def rmap_items(self) -> int:
        """Pages that KSM keeps track of: shared + sharing + unshared + volatile, the sum that ksm.rst gives.

        The kernel never shows a negative `pages_volatile`, so this is too high by as much as the others exceed
        the items.

        >>> Stats(pages_shared=1, pages_sharing=2, pages_unshared=3, pages_volatile=4).rmap_items
        10
        """
        return self.pages_shared + self.pages_sharing + self.pages_unshared + self.pages_volatile

    @property
    def metadata_bytes(self) -> int:
        """What tracking costs: `rmap_items` * 64 bytes, a rmap_item on 64-bit systems (ksm.rst).

        >>> Stats(pages_unshared=10).metadata_bytes
        640
        """
        return self.rmap_items * RMAP_ITEM_BYTES

    @property
    def profit(self) -> int:
        """Bytes won or lost: the kernel's `general_profit`; before 6.4, `saved_bytes` - `metadata_bytes`.

        The latter is ksm.rst's formula for the former.

        >>> Stats(pages_unshared=10).profit
        -640
        """
        return self.saved_bytes - self.metadata_bytes if self.general_profit is None else self.general_profit

    @property
    def volatile_share(self) -> float | None:
        """`pages_volatile` / `rmap_items`: high indicates "poor use of madvise" (ksm.rst). None: nothing tracked.

        >>> Stats(pages_sharing=3, pages_volatile=1).volatile_share
        0.25
        """
        return _ratio(self.pages_volatile, self.rmap_items)

    @property
    def merged_share(self) -> float | None:
        """(`pages_shared` + `pages_sharing`) / `rmap_items`: how many of the tracked pages are merged.

        None when nothing is tracked.

        >>> Stats(pages_shared=1, pages_sharing=1, pages_unshared=2).merged_share
        0.5
        """
        return _ratio(self.pages_shared + self.pages_sharing, self.rmap_items)

    def to_dict(self) -> dict[str, int | float | None]:
        """Counters and derived values under their names, for JSON.

        >>> Stats(pages_sharing=1).to_dict()["saved_bytes"]
        4096
        """
        names = [f.name for f in fields(self)]
        return {name: getattr(self, name) for name in (*names, *_DERIVED)}


_DERIVED = (
    "saved_pages",
    "saved_bytes",
    "sharing_ratio",
    "unshared_ratio",
    "rmap_items",
    "metadata_bytes",
    "profit",
    "volatile_share",
    "merged_share",
)


def parse_ksm_stat(text: str) -> dict[str, int | bool]:
    """What /proc/PID/ksm_stat holds: a mapping of its names to ints and bools; {} for a process without memory.

    >>> parse_ksm_stat("ksm_rmap_items 5\\nksm_process_profit -320\\nksm_mergeable: yes\\n")
    {'ksm_rmap_items': 5, 'ksm_process_profit': -320, 'ksm_mergeable': True}
    """
    values: dict[str, int | bool] = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        value = value.strip()
        if not value:
            continue
        values[name.rstrip(":")] = value == "yes" if value in ("yes", "no") else int(value)
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStats:
    """One process's part in KSM; a value that the kernel's version does not show is None.

    >>> ProcessStats.of({"ksm_rmap_items": 10, "ksm_merging_pages": 2, "ksm_mergeable": True}).saved_bytes
    8192
    """

    page_size: int = 4096
    ksm_rmap_items: int | None = None
    """Pages of it that KSM tracks, since 6.1."""
    ksm_zero_pages: int | None = None
    """Since 6.6."""
    ksm_merging_pages: int | None = None
    """Pages of it that are merged, the first of each group included; since 5.19."""
    ksm_process_profit: int | None = None
    """Since 6.4."""
    ksm_merge_any: bool | None = None
    """Whether prctl made all of its memory mergeable; since 6.14."""
    ksm_mergeable: bool | None = None
    """Whether any of its memory is marked; since 6.14."""

    @classmethod
    def of(cls, ksm_stat: Mapping[str, int | bool], page_size: int = 4096) -> ProcessStats:
        """From the mapping that `Process.ksm_stat` and `Host.ksm_stat` give; names it does not know are left out.

        >>> ProcessStats.of({"ksm_rmap_items": 10}).ksm_rmap_items
        10
        """
        known = {f.name for f in fields(cls)} - {"page_size"}
        values: dict[str, Any] = {name: value for name, value in ksm_stat.items() if name in known}
        return cls(page_size=page_size, **values)

    @property
    def saved_bytes(self) -> int:
        """(`ksm_merging_pages` + `ksm_zero_pages`) * page size, ksm.rst's measure within a process.

        Summed over processes it exceeds the system's, which leaves out one page of each group.

        >>> ProcessStats(ksm_merging_pages=2, ksm_zero_pages=1).saved_bytes
        12288
        """
        return ((self.ksm_merging_pages or 0) + (self.ksm_zero_pages or 0)) * self.page_size

    @property
    def metadata_bytes(self) -> int:
        """`ksm_rmap_items` * 64 bytes.

        >>> ProcessStats(ksm_rmap_items=10).metadata_bytes
        640
        """
        return (self.ksm_rmap_items or 0) * RMAP_ITEM_BYTES

    @property
    def profit(self) -> int:
        """`ksm_process_profit`; before 6.4, `saved_bytes` - `metadata_bytes`, ksm.rst's formula for it.

        >>> ProcessStats(ksm_rmap_items=10, ksm_merging_pages=1).profit
        3456
        """
        return self.saved_bytes - self.metadata_bytes if self.ksm_process_profit is None else self.ksm_process_profit

    @property
    def items_per_merged_page(self) -> float | None:
        """`ksm_rmap_items` / `ksm_merging_pages`; above 64, with pages of 4 KiB, merging costs more than it saves.

        (ksm.rst: such a madvise policy "should be dropped".) None when nothing is merged.

        >>> ProcessStats(ksm_rmap_items=10, ksm_merging_pages=4).items_per_merged_page
        2.5
        """
        return _ratio(self.ksm_rmap_items or 0, self.ksm_merging_pages or 0)

    def to_dict(self) -> dict[str, int | float | bool | None]:
        """Values and derived values under their names, for JSON.

        >>> ProcessStats(ksm_merging_pages=1).to_dict()["profit"]
        4096
        """
        derived = ("saved_bytes", "metadata_bytes", "profit", "items_per_merged_page")
        return {name: getattr(self, name) for name in (*(f.name for f in fields(self)), *derived)}

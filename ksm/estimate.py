"""The settled state in closed form: what KSM's counters come to when memory stands still."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ksm import sources
from ksm._core import Settling
from ksm.constants import RMAP_ITEM_BYTES
from ksm.html import table
from ksm.pages import Fingerprints, as_pages, zero_words
from ksm.sources.image import ArrayImage, Image
from ksm.sources.snapshot import Snapshot
from ksm.units import binary

Source: TypeAlias = (
    "str | os.PathLike[str] | Image | Snapshot | Fingerprints | npt.NDArray[Any] | bytes | bytearray | memoryview"
)
Zeros: TypeAlias = Literal["merge", "absent"]

Indexes: TypeAlias = npt.NDArray[np.int64]

STABLE_NODE_BYTES = 64  # x86-64, Linux 6.18, by /sys/kernel/slab/ksm_stable_node

_MOST_SHARING = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Counts:
    """The counters that pages settle at.

    `pages_shared`, `pages_sharing`, `pages_unshared` and `ksm_zero_pages` are the kernel's; of one source they are its
    part of them, and `pages_shared + pages_sharing` is its process's `ksm_merging_pages`.

    >>> Counts("vm1", 4096, 3, 0, 0, 1, 2, 0, 0, 2, 0).saved_bytes
    8192
    """

    name: str
    page_size: int
    pages: int
    """Pages that take part."""
    zero_pages: int
    """All-zero pages among them."""
    zero_or_untouched: int
    """All-zero pages of dumps, which may as well have been never touched; part of `pages` if zeros="merge"."""
    pages_shared: int
    pages_sharing: int
    pages_unshared: int
    ksm_zero_pages: int
    duplicates_within: int
    """Pages whose content the same source has at a lower address."""
    duplicates_between: int
    """Pages without such a copy in their own source, but with one in an earlier source."""

    @property
    def rmap_items(self) -> int:
        """Pages that the kernel remembers."""
        return self.pages_shared + self.pages_sharing + self.pages_unshared

    @property
    def ksm_merging_pages(self) -> int:
        """Pages that map a KSM frame."""
        return self.pages_shared + self.pages_sharing

    @property
    def saved_bytes(self) -> int:
        """Memory that merging frees."""
        return (self.pages_sharing + self.ksm_zero_pages) * self.page_size

    @property
    def metadata_bytes(self) -> int:
        """What the kernel's bookkeeping takes: 64 bytes an rmap item."""
        return self.rmap_items * RMAP_ITEM_BYTES

    @property
    def stable_node_bytes(self) -> int:
        """What the records of the KSM frames take on top: 64 bytes each, which `general_profit` leaves out."""
        return self.pages_shared * STABLE_NODE_BYTES

    @property
    def general_profit(self) -> int:
        """Bytes saved, less the bookkeeping; below 0 is a loss."""
        return self.saved_bytes - self.metadata_bytes

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON.

        >>> Counts("vm1", 4096, 3, 0, 0, 1, 2, 0, 0, 2, 0).to_dict()["general_profit"]
        8000
        """
        derived = (
            "ksm_merging_pages",
            "rmap_items",
            "saved_bytes",
            "metadata_bytes",
            "stable_node_bytes",
            "general_profit",
        )
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True, slots=True)
class Estimate(Counts):
    """What `estimate` found: the totals, each source's part, and what was assumed.

    >>> answer = estimate([b"x" * 8192, b"x" * 4096])
    >>> answer.pages_shared, answer.pages_sharing, answer.sources[1].pages_sharing
    (1, 2, 1)
    """

    sources: tuple[Counts, ...]
    stable_node_chains: int
    """Contents with more copies than one KSM frame may have."""
    stable_node_dups: int
    """The KSM frames of those."""
    max_page_sharing: int
    use_zero_pages: bool
    merge_across_nodes: bool
    zeros: Zeros
    assumed: tuple[str, ...]
    """What the answer takes for granted, in sentences."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON.

        >>> estimate([b"x" * 8192]).to_dict()["sources"][0]["pages_sharing"]
        1
        """
        return Counts.to_dict(self) | {
            "sources": [source.to_dict() for source in self.sources],
            "assumed": list(self.assumed),
        }

    def _repr_html_(self) -> str:
        def row(each: Counts) -> tuple[str, ...]:
            counts = (each.pages, each.pages_shared, each.pages_sharing, each.pages_unshared, each.ksm_zero_pages)
            return (each.name, *(f"{n:,}" for n in counts), binary(each.saved_bytes), binary(each.general_profit))

        columns = ("source", "pages", "shared", "sharing", "unshared", "zero", "saved", "profit")
        total = ("total", *row(self)[1:])
        return table(columns, [*map(row, self.sources), total])


def estimate(
    images: Iterable[Source] | Source,
    max_page_sharing: int = 256,
    use_zero_pages: bool = False,
    zeros: Zeros = "merge",
    names: Sequence[str] | None = None,
    *,
    nodes: Sequence[int] | None = None,
    merge_across_nodes: bool = True,
    page_size: int | None = None,
    marked_only: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Estimate:
    """What KSM settles at on these sources, were all their pages mergeable and still. O(n).

    Every page is fingerprinted (128 bits) and counted: exact, no sampling. Huge pages are not modelled: since Linux
    6.12 zero pages of a huge page that KSM splits are given back on top, and no counter shows it.

    Args:
        images: paths, "pid:123", "self", `Image`s, `Fingerprints`, arrays or bytes; ksmd comes to them in this order.
        max_page_sharing: the tunable, 2 or more.
        use_zero_pages: the tunable; on, all-zero pages become `ksm_zero_pages`.
        zeros: what all-zero pages of a dump are that cannot tell them from never-touched ones: "merge", pages
            like others; or "absent", never touched. Either way they are counted in `zero_or_untouched`.
        names: of the sources; None: their own.
        nodes: the NUMA node of each source; None: all on node 0.
        merge_across_nodes: the tunable.
        page_size: bytes a page; None: what the sources say, or 4096.
        marked_only: of live processes, only what is marked mergeable now.
        threads: that hash; None: one a CPU.
        progress: called with (pages done, pages in all).

    Raises:
        ValueError: a tunable out of range, page sizes that differ, lists of unequal length.
        SourceError: a source that cannot be read.

    >>> answer = estimate([b"x" * 4096 * 5], max_page_sharing=2)
    >>> answer.pages_shared, answer.pages_sharing, answer.pages_unshared
    (2, 2, 1)
    """
    if not 2 <= max_page_sharing <= _MOST_SHARING:
        raise ValueError(f"max_page_sharing is {max_page_sharing}; it can be 2 to {_MOST_SHARING}")
    if zeros not in ("merge", "absent"):
        raise ValueError(f"zeros is {zeros!r}; it can be 'merge' or 'absent'")
    given = _as_list(images)
    if not given:
        raise ValueError("no sources: there is nothing to estimate")
    for what, values in (("names", names), ("nodes", nodes)):
        if values is not None and len(values) != len(given):
            raise ValueError(f"{len(values)} {what} for {len(given)} sources")
    taken = snapshots(given, page_size, marked_only, threads, progress)
    if names is not None:
        taken = [replace(snapshot, name=name) for snapshot, name in zip(taken, names, strict=True)]
    found, chains, dups = _count(taken, _Rules(max_page_sharing, use_zero_pages, zeros, merge_across_nodes), nodes)
    total = Counts("total", taken[0].page_size, *(sum(column) for column in zip(*map(_numbers, found), strict=True)))
    answer: dict[str, Any] = asdict(total) | {
        "sources": tuple(found),
        "stable_node_chains": chains,
        "stable_node_dups": dups,
        "max_page_sharing": max_page_sharing,
        "use_zero_pages": use_zero_pages,
        "merge_across_nodes": merge_across_nodes,
        "zeros": zeros,
        "assumed": tuple(_assumptions(taken, total, zeros)),
    }
    return Estimate(**answer)


def _as_list(images: Iterable[Source] | Source) -> list[Source]:
    if isinstance(images, str | os.PathLike | Image | Snapshot | Fingerprints | bytes | bytearray | memoryview):
        return [images]
    if isinstance(images, np.ndarray) and images.dtype != object:
        return [images]
    return list(images)


# ---- reading ---------------------------------------------------------------------------------------


def _open(source: Source, index: int, page_size: int | None, marked_only: bool) -> tuple[Image | Snapshot, bool]:
    """The source as an image or snapshot, and whether it is ours to close."""
    name = f"source {index}"
    if isinstance(source, Image | Snapshot):
        return source, False
    if isinstance(source, Fingerprints):
        return Snapshot(name, page_size or 4096, source.present is not None, True, ((0, source),)), False
    if isinstance(source, str | os.PathLike):
        return sources.open(source, marked_only=marked_only, page_size=page_size or 4096), True
    pages = as_pages(source, page_size)
    return ArrayImage(pages, name, anonymous_known=not isinstance(source, np.memmap)), False


def snapshots(
    images: Sequence[Source],
    page_size: int | None = None,
    marked_only: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[Snapshot]:
    """Read sources once, to estimate and to simulate from the same pages. Arguments and errors as `estimate`.

    >>> [snapshot.pages for snapshot in snapshots([bytes(8192), bytes(4096)])]
    [2, 1]
    """
    opened: list[tuple[Image | Snapshot, bool]] = []
    try:
        for index, source in enumerate(images):
            opened.append(_open(source, index, page_size, marked_only))
        sizes = sorted({image.page_size for image, _ in opened})
        if len(sizes) > 1:
            raise ValueError(f"page sizes differ: {', '.join(map(str, sizes))}; KSM merges pages of one size")
        total = sum(image.pages if isinstance(image, Snapshot) else image.npages for image, _ in opened)
        result: list[Snapshot] = []
        done = 0

        def more(now: int) -> None:
            if progress is not None:
                progress(done + now, total)

        more(0)
        for image, _ in opened:
            snapshot = image if isinstance(image, Snapshot) else Snapshot.take(image, threads, more)
            result.append(snapshot)
            done += snapshot.pages
        return result
    finally:
        for image, ours in opened:
            if ours and isinstance(image, Image):
                image.close()


# ---- counting --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rules:
    max_page_sharing: int
    use_zero_pages: bool
    zeros: Zeros
    merge_across_nodes: bool


_COUNTED = tuple(field.name for field in fields(Counts) if field.name not in ("name", "page_size"))


def _numbers(counts: Counts) -> tuple[int, ...]:
    return tuple(getattr(counts, name) for name in _COUNTED)


def _count(taken: Sequence[Snapshot], rules: _Rules, nodes: Sequence[int] | None) -> tuple[list[Counts], int, int]:
    """Each source's part, and how many chains and dups there are."""
    high, low = map(int, zero_words(taken[0].page_size))
    found: dict[int, Counts] = {}
    chains = dups = 0
    for members in _groups_of_nodes(len(taken), nodes, rules.merge_across_nodes):
        expected = sum(taken[index].pages for index in members)
        counting = Settling(rules.max_page_sharing, len(members), expected)
        for number, index in enumerate(members):
            part = taken[index]
            zeros_merge = not rules.use_zero_pages and (part.anonymous_known or rules.zeros == "merge")
            for _, prints in part.blocks:
                words = np.ascontiguousarray(prints.words)
                present = None if prints.present is None else np.ascontiguousarray(prints.present).view(np.uint8)
                counting.visit(number, words, present, high, low, zeros_merge)
        for index, row in zip(members, counting.counts(), strict=True):
            part = taken[index]
            zeros = row["zero_pages"]
            ambiguous = 0 if part.anonymous_known else zeros
            absent = ambiguous if rules.zeros == "absent" else 0
            row["pages"] -= absent
            row["zero_pages"] -= absent
            row["zero_or_untouched"] = ambiguous
            row["ksm_zero_pages"] = zeros - absent if rules.use_zero_pages else 0
            found[index] = Counts(part.name, part.page_size, **row)
        chains += counting.stable_node_chains
        dups += counting.stable_node_dups
    return [found[index] for index in range(len(taken))], chains, dups


def _groups_of_nodes(n: int, nodes: Sequence[int] | None, across: bool) -> list[list[int]]:
    """The sources that can merge with each other."""
    if across or nodes is None:
        return [list(range(n))]
    return [[i for i in range(n) if nodes[i] == node] for node in sorted(set(nodes))]


def _assumptions(taken: Sequence[Snapshot], total: Counts, zeros: Zeros) -> Iterable[str]:
    yield "All these pages are mergeable and do not change."
    if total.zero_or_untouched:
        what = "left out, as never touched" if zeros == "absent" else "counted as pages that merge"
        yield (
            f"{total.zero_or_untouched:,} all-zero pages of dumps are zero or never touched, which a dump cannot tell: "
            f"here they are {what}."
        )
    blind = [part.name for part in taken if not part.zero_page_known]
    if blind:
        yield (
            f"Whether zero pages of {', '.join(blind)} are the shared zero page, which never merges, could not be seen "
            "(it needs Linux 6.7 or root): here they are counted as pages that merge."
        )

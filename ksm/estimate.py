"""The settled state in closed form: what KSM's counters come to when memory stands still."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ksm import sources
from ksm.constants import RMAP_ITEM_BYTES
from ksm.pages import Fingerprints, as_pages, zero_words
from ksm.sources.image import ArrayImage, Image
from ksm.sources.snapshot import Snapshot

Source: TypeAlias = (
    "str | os.PathLike[str] | Image | Snapshot | Fingerprints | npt.NDArray[Any] | bytes | bytearray | memoryview"
)
Zeros: TypeAlias = Literal["merge", "absent"]

Indexes: TypeAlias = npt.NDArray[np.int64]

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
    def general_profit(self) -> int:
        """Bytes saved, less the bookkeeping; below 0 is a loss."""
        return self.saved_bytes - self.metadata_bytes

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON.

        >>> Counts("vm1", 4096, 3, 0, 0, 1, 2, 0, 0, 2, 0).to_dict()["general_profit"]
        8000
        """
        derived = ("ksm_merging_pages", "rmap_items", "saved_bytes", "metadata_bytes", "general_profit")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True, slots=True)
class Estimate(Counts):
    """What `estimate` found: the totals, each source's part, and what was assumed.

    >>> answer = estimate([b"x" * 8192, b"x" * 4096])
    >>> answer.pages_shared, answer.pages_sharing, answer.sources[1].pages_sharing
    (1, 2, 1)
    """

    sources: tuple[Counts, ...]
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
    """What KSM settles at on these sources, were all their pages mergeable and still. O(n log n).

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
    found = _count(taken, _Rules(max_page_sharing, use_zero_pages, zeros, merge_across_nodes), nodes)
    total = Counts("total", taken[0].page_size, *(sum(column) for column in zip(*map(_numbers, found), strict=True)))
    answer: dict[str, Any] = asdict(total) | {
        "sources": tuple(found),
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


def _count(taken: Sequence[Snapshot], rules: _Rules, nodes: Sequence[int] | None) -> list[Counts]:
    """Each source's part."""
    zero_word = zero_words(taken[0].page_size)
    rows: list[dict[str, int]] = []
    merging = []
    for part in taken:
        its = part.words()
        zero = (its == zero_word).all(axis=1)
        zeros = int(np.count_nonzero(zero))
        ambiguous = 0 if part.anonymous_known else zeros
        absent = ambiguous if rules.zeros == "absent" else 0
        merges = its[~zero] if zeros and (absent or rules.use_zero_pages) else its
        merging.append(merges)
        row = dict.fromkeys(_COUNTED, 0)
        row["pages"] = len(its) - absent
        row["zero_pages"] = zeros - absent
        row["zero_or_untouched"] = ambiguous
        row["ksm_zero_pages"] = zeros - absent if rules.use_zero_pages else 0
        rows.append(row)
    for members in _groups_of_nodes(len(taken), nodes, rules.merge_across_nodes):
        found = _settle([merging[i] for i in members], rules.max_page_sharing)
        for name, column in found.items():
            for i, value in zip(members, column.tolist(), strict=True):
                rows[i][name] = value
    return [Counts(part.name, part.page_size, **row) for part, row in zip(taken, rows, strict=True)]


def _groups_of_nodes(n: int, nodes: Sequence[int] | None, across: bool) -> list[list[int]]:
    """The sources that can merge with each other."""
    if across or nodes is None:
        return [list(range(n))]
    return [[i for i in range(n) if nodes[i] == node] for node in sorted(set(nodes))]


def _settle(words: Sequence[npt.NDArray[np.uint64]], limit: int) -> dict[str, npt.NDArray[np.int64]]:
    """Counters of each source when ksmd visits these pages in order.

    Of n equal pages, in the order of the visits, each run of `limit` has a frame: its first page counts as shared, the
    others as sharing; a last run of one page stays unshared.
    """
    everything = np.concatenate(words) if len(words) != 1 else words[0]
    source = np.repeat(np.arange(len(words), dtype=np.int32), [len(w) for w in words])
    lone, member, starts = _grouped(everything)
    sizes = np.diff(starts, append=len(member))
    rank = np.arange(len(member)) - np.repeat(starts, sizes)
    last = rank == np.repeat(sizes, sizes) - 1
    head = rank % limit == 0
    source_of = source[member]
    within = np.zeros(len(member), np.bool_)
    within[1:] = (rank[1:] > 0) & (source_of[1:] == source_of[:-1])

    def per_source(chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        return np.bincount(source_of[chosen], minlength=len(words)).astype(np.int64)

    return {
        "pages_shared": per_source(head & ~last),
        "pages_sharing": per_source(~head),
        "pages_unshared": per_source(head & last) + np.bincount(source[lone], minlength=len(words)),
        "duplicates_within": per_source(within),
        "duplicates_between": per_source((rank > 0) & ~within),
    }


def _grouped(words: npt.NDArray[np.uint64]) -> tuple[Indexes, Indexes, Indexes]:
    """Pages that are like no other (some of them may also come as groups of one); the others by content and then in
    the order of visits; and where each group starts in those.

    Sorts one number a page: the low word's upper bits, then the page's index. Groups whose upper bits collide are put
    right afterwards. Counting took 110, 190 and 230 ns a page for 250,000, 1 and 4 million pages this way, and 350, 290
    and 430 with an argsort of whole words and a second sort within the groups.
    """
    bits = np.uint64(max(len(words) - 1, 1).bit_length())
    mask = (np.uint64(1) << bits) - np.uint64(1)
    keys = (words[:, 1] & ~mask) | np.arange(len(words), dtype=np.uint64)
    keys.sort()
    same = (keys[1:] ^ keys[:-1]) <= mask
    edge = np.zeros(1, np.bool_)
    paired = np.concatenate((same, edge)) | np.concatenate((edge, same)) if len(words) else same[:0]
    index = (keys & mask).astype(np.int64)
    lone, member = index[~paired], index[paired]
    prefix = keys[paired] >> bits
    del keys, index
    high, low = words[member, 0], words[member, 1]
    new_prefix = _changes(prefix)
    new = new_prefix | _changes(high) | _changes(low)
    if not np.array_equal(new, new_prefix):  # different pages under one prefix, perhaps in turns
        group = np.cumsum(new_prefix)
        wrong = np.zeros(len(group) + 1, np.bool_)
        wrong[group[new & ~new_prefix]] = True
        at = np.flatnonzero(wrong[group])
        order = at[np.lexsort((member[at], high[at], low[at], group[at]))]
        member[at], high[at], low[at] = member[order], high[order], low[order]
        new = new_prefix | _changes(high) | _changes(low)
    return lone, member, np.flatnonzero(new)


def _changes(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Where a value differs from the one before it; the first does."""
    changes = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=changes[1:])
    return changes


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

"""Counting one range of contents over all VMs: sums that add up over ranges, so that nobody needs to hold all of it.

What KSM settles at follows from how often a content stands in one merge group (a host, or one NUMA node of it),
whatever the order: n copies under a limit of m take n // m shared frames, one more if n % m is at least 2; if n % m
is 1 that page stays alone. All figures here are integers, so any way to cut and to add gives the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ksm.fleet.known import CATEGORIES, Known

Ints: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.uint64]

TOP = 50
MOST_COLUMNS = 2048  # of a matrix: its cost is the square
_OFTEN = 1 << 16  # copies: beyond that they are told apart by sorting
_BLOCK = 1 << 24  # cells of the incidence matrix at a time; counts in float32 are exact below 2^24 rows

GROUP_FIGURES = (
    *("pages", "pages_shared", "pages_sharing", "pages_unshared", "stable_node_chains", "stable_node_dups"),
    *("within_vms", "between_vms", "between_classes", "lost_to_limit"),
)
KNOWN_FIGURES = ("contents", "pages", "saved", "saved_on_one_host")  # pages, but the first
VM_FIGURES = ("pages", "contents", "duplicated", "shared_on_host", "shared_in_fleet")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where VMs stand: what counting needs to know of them. VMs are numbered by merge group, then by class.

    >>> layout([("h1", 0), ("h1", 0)], ["web", "db"], {("h1", 0): 256}).order
    array([1, 0])
    """

    group: Ints
    """The merge group of each VM, ascending."""
    kind: Ints
    """The class of each VM."""
    host: Ints
    """The host of each VM, ascending."""
    limit: Ints
    """`max_page_sharing` of each group."""
    one_limit: int
    """That of the one host that holds all."""
    known: Known
    """Contents to count by category."""
    order: Ints
    """Which of the VMs given is number 0, 1, ..."""
    groups: tuple[tuple[str, int], ...]
    kinds: tuple[str, ...]
    hosts: tuple[str, ...]


def layout(
    where: Sequence[tuple[str, int]],
    kinds: Sequence[str],
    limits: Mapping[tuple[str, int], int],
    one_limit: int = 256,
    known: Known | None = None,
) -> Layout:
    """Number VMs that stand in merge groups `where`, (host, node), and are of classes `kinds`.

    >>> layout([("h2", 0), ("h1", 0)], ["web", "web"], {("h1", 0): 256, ("h2", 0): 2}).limit
    array([256,   2])
    """
    groups = sorted(set(where))
    names = sorted(set(kinds))
    hosts = sorted({host for host, _ in groups})
    group = _numbers(where, groups)
    kind = _numbers(kinds, names)
    host_of_group = _numbers([host for host, _ in groups], hosts)
    order = np.lexsort((kind, group))
    return Layout(
        group=group[order],
        kind=kind[order],
        host=host_of_group[group[order]],
        limit=np.array([limits[place] for place in groups], np.int64),
        one_limit=one_limit,
        known=known or Known.of(),
        order=order,
        groups=tuple(groups),
        kinds=tuple(names),
        hosts=tuple(hosts),
    )


def _numbers(values: Sequence[Any], names: Sequence[Any]) -> Ints:
    number = {name: index for index, name in enumerate(names)}
    return np.array([number[value] for value in values], np.int64)


@dataclass(frozen=True, slots=True)
class Tally:
    """The sums over some contents.

    >>> rows = np.array([1, 1], np.uint64), np.array([1, 1], np.uint64), np.array([2, 1]), np.array([0, 1])
    >>> tally = count(rows, layout([("h", 0)] * 2, ["a", "a"], {("h", 0): 256}))
    >>> tally.groups[0, GROUP_FIGURES.index("pages_sharing")].item(), (tally + tally).contents
    (2, 2)
    """

    contents: int
    """Different ones."""
    groups: Ints
    """(groups, len(GROUP_FIGURES))"""
    one: Ints
    """(len(GROUP_FIGURES),): were all of it one host."""
    vms: Ints
    """(VMs, len(VM_FIGURES))"""
    kinds: Ints
    """(classes, classes): contents that both have; on the diagonal, that two or more VMs of the class have."""
    hosts: Ints | None
    """The same for hosts; None: too many of them."""
    known: Ints
    """(len(CATEGORIES), len(KNOWN_FIGURES))"""
    top: tuple[tuple[int, int, int, int, int, int], ...]
    """(copies, high, low, VMs, classes, hosts) of those with most copies."""

    def __add__(self, other: Tally) -> Tally:
        """The sums over both; no content may be in both."""
        hosts = None if self.hosts is None or other.hosts is None else self.hosts + other.hosts
        return Tally(
            self.contents + other.contents,
            self.groups + other.groups,
            self.one + other.one,
            self.vms + other.vms,
            self.kinds + other.kinds,
            hosts,
            self.known + other.known,
            merged_top((*self.top, *other.top)),
        )


def nothing(where: Layout) -> Tally:
    """The sums over no content.

    >>> nothing(layout([("h", 0)], ["a"], {("h", 0): 256})).contents
    0
    """
    none = np.zeros(0, np.uint64)
    return count((none, none, np.zeros(0, np.int64), np.zeros(0, np.int64)), where)


def merged_top(rows: Iterable[tuple[int, int, int, int, int, int]]) -> tuple[tuple[int, int, int, int, int, int], ...]:
    """The TOP contents with most copies, ties by content: the same in whatever order they came.

    >>> merged_top([(1, 5, 5, 1, 1, 1), (2, 9, 9, 1, 1, 1)])[0][0]
    2
    """
    return tuple(sorted(rows, key=lambda row: (-row[0], row[1], row[2]))[:TOP])


def count(rows: tuple[Words, Words, Ints, Ints], where: Layout) -> Tally:
    """Count contents. O(n log n) in rows, O(1) memory beyond ten times theirs.

    Args:
        rows: high, low, copies and VM's number, a row a content of a VM; VM by VM in ascending order.
        where: the VMs.

    >>> high = np.array([7, 7, 8], np.uint64)
    >>> tally = count((high, high, np.array([1, 1, 5]), np.array([0, 1, 1])),
    ...               layout([("h", 0)] * 2, ["a", "b"], {("h", 0): 2}))
    >>> dict(zip(GROUP_FIGURES, tally.groups[0].tolist()))["pages_shared"], tally.kinds.tolist()
    (3, [[0, 1], [1, 0]])
    """
    high, low, copies, vm = _by_content(*rows)
    content = _starts(high, low)
    group, kind = where.group[vm], where.kind[vm]
    in_group = content | _changes(group)
    in_class = in_group | _changes(kind)
    code = np.cumsum(content) - 1
    groups = np.zeros((len(where.groups), len(GROUP_FIGURES)), np.int64)
    n_in_group = _sums(copies, in_group)
    saved = _settle(groups, group[in_group], n_in_group, where.limit[group[in_group]])
    _split(groups, group, copies, in_group, group[in_class])
    n, vms_having = _sums(copies, content), _sums(np.ones_like(vm), content)
    pairs = _pairs(code, kind, len(where.kinds))
    one = np.zeros((1, len(GROUP_FIGURES)), np.int64)
    nowhere = np.zeros(len(n), np.int64)
    saved_on_one = _settle(one, nowhere, n, np.full(len(n), where.one_limit))
    _split(one, np.zeros_like(vm), copies, content, np.zeros(len(pairs[0]), np.int64))
    in_host = content | _changes(where.host[vm])
    host_pairs = (code[in_host], where.host[vm][in_host], _sums(np.ones_like(vm), in_host))
    own = np.stack(
        [
            _per_vm(where, vm, copies),
            _per_vm(where, vm, np.ones_like(vm)),
            _per_vm(where, vm, copies - 1),
            _per_vm(where, vm, copies * (np.repeat(n_in_group, _lengths(in_group)) > copies)),
            _per_vm(where, vm, copies * (vms_having[code] > 1)),
        ],
        axis=1,
    )
    return Tally(
        contents=len(n),
        groups=groups,
        one=one[0],
        vms=own,
        kinds=_common(pairs, len(where.kinds)),
        hosts=_common(host_pairs, len(where.hosts)) if len(where.hosts) <= MOST_COLUMNS else None,
        known=_known(where.known.find(high[content], low[content]), n, _sums(saved, content[in_group]), saved_on_one),
        top=_top(n, high[content], low[content], vms_having, pairs, host_pairs),
    )


def _by_content(high: Words, low: Words, copies: Ints, vm: Ints) -> tuple[Words, Words, Ints, Ints]:
    """The rows by content, and by VM within one: a stable sort of runs that are in order already."""
    order = np.argsort(high, kind="stable")
    high, low = high[order], low[order]
    if ((high[1:] == high[:-1]) & (low[1:] != low[:-1])).any():  # high words that collide: rare
        inner = np.lexsort((low, high))  # stable, too
        order, high, low = order[inner], high[inner], low[inner]
    return high, low, copies[order], vm[order]


def _starts(high: Words, low: Words) -> npt.NDArray[np.bool_]:
    result = np.ones(len(high), np.bool_)
    result[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return result


def _changes(values: Ints) -> npt.NDArray[np.bool_]:
    result: npt.NDArray[np.bool_] = np.ones(len(values), np.bool_)
    result[1:] = values[1:] != values[:-1]
    return result


def _sums(values: Ints, starts: npt.NDArray[np.bool_]) -> Ints:
    """The sum of each run."""
    if not len(values):
        return np.zeros(0, np.int64)
    sums: Ints = np.add.reduceat(values, np.flatnonzero(starts))
    return sums


def _lengths(starts: npt.NDArray[np.bool_]) -> Ints:
    lengths: Ints = np.diff(np.flatnonzero(starts), append=len(starts))
    return lengths


def _into(figures: Ints, name: str, at: Ints, values: Ints) -> None:
    # float sums of whole numbers are exact below 2^53, and pages are fewer
    figures[:, GROUP_FIGURES.index(name)] += np.bincount(at, values, len(figures)).astype(np.int64)


def _settle(figures: Ints, group: Ints, n: Ints, limit: Ints) -> Ints:
    """What n copies of a content in a group come to; the pages saved."""
    alone = (n % limit == 1).astype(np.int64)
    frames = n // limit + (n % limit >= 2)
    chained = frames > 1
    _into(figures, "pages", group, n)
    _into(figures, "pages_shared", group, frames)
    _into(figures, "pages_unshared", group, alone)
    _into(figures, "pages_sharing", group, n - frames - alone)
    _into(figures, "stable_node_chains", group, chained.astype(np.int64))
    _into(figures, "stable_node_dups", group, np.where(chained, frames, 0))
    _into(figures, "lost_to_limit", group, frames + alone - 1)
    saved: Ints = n - frames - alone
    return saved


def _split(figures: Ints, group: Ints, copies: Ints, in_group: npt.NDArray[np.bool_], classes: Ints) -> None:
    """Whose the duplicates are. `classes` has the group of each (content, group, class) that there is."""
    runs = np.bincount(group[in_group], minlength=len(figures))
    rows = np.bincount(group, minlength=len(figures))
    by_class = np.bincount(classes, minlength=len(figures))
    _into(figures, "within_vms", group, copies - 1)
    figures[:, GROUP_FIGURES.index("between_vms")] += rows - by_class
    figures[:, GROUP_FIGURES.index("between_classes")] += by_class - runs


def _pairs(code: Ints, column: Ints, columns: int) -> tuple[Ints, Ints, Ints]:
    """The different (content, column), ascending, and how many rows each has."""
    keys = code * columns + column
    if (keys[1:] < keys[:-1]).any():
        keys = np.sort(keys)
    first = _changes(keys)
    return keys[first] // columns, keys[first] % columns, _lengths(first)


def _common(pairs: tuple[Ints, Ints, Ints], columns: int) -> Ints:
    """How many contents two columns have in common, from the (content, column) pairs."""
    code, column, rows = pairs
    result = np.zeros((columns, columns), np.int64)
    fits = np.flatnonzero(rows > 1)
    diagonal = np.bincount(column[fits], minlength=columns)
    first = _changes(code)
    several = np.repeat(_lengths(first) > 1, _lengths(first))
    code, column = code[several], column[several]
    dense = np.cumsum(_changes(code)) - 1
    step = max(_BLOCK // max(columns, 1), 1)
    for at in range(0, int(dense[-1]) + 1 if len(dense) else 0, step):
        some = slice(*np.searchsorted(dense, [at, at + step]))
        block = np.zeros((min(step, int(dense[-1]) + 1 - at), columns), np.float32)
        block[dense[some] - at, column[some]] = 1
        result += (block.T @ block).astype(np.int64)
    np.fill_diagonal(result, diagonal)
    return result


def _per_vm(where: Layout, vm: Ints, values: Ints) -> Ints:
    return np.bincount(vm, values, len(where.order)).astype(np.int64)


def _known(category: Ints, n: Ints, saved: Ints, saved_on_one: Ints) -> Ints:
    columns = [np.bincount(category, values, len(CATEGORIES)) for values in (np.ones_like(n), n, saved, saved_on_one)]
    return np.stack(columns, axis=1).astype(np.int64)


def _top(
    n: Ints, high: Words, low: Words, vms: Ints, kinds: tuple[Ints, Ints, Ints], hosts: tuple[Ints, Ints, Ints]
) -> tuple[tuple[int, int, int, int, int, int], ...]:
    if not len(n):
        return ()
    often = np.bincount(np.minimum(n, _OFTEN))
    at_least = np.cumsum(often[::-1])[::-1]  # how many contents have so many copies, or more
    enough = np.flatnonzero(at_least >= TOP)
    best = np.flatnonzero(n >= max(2, int(enough[-1]) if len(enough) else 0))
    if len(best) > TOP:  # ties at the edge: by content, as `merged_top` does
        best = best[np.lexsort((low[best], high[best], -n[best]))[:TOP]]
    k, h = np.bincount(kinds[0], minlength=len(n)), np.bincount(hosts[0], minlength=len(n))
    columns = (n[best], high[best], low[best], vms[best], k[best], h[best])
    return merged_top(zip(*(column.tolist() for column in columns), strict=True))

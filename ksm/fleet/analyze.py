"""`analyze`: what KSM saves in a fleet as it stands, what it would save on one host, and who shares with whom."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from ksm.errors import SchedulerLostError, SourceError, WorkersGoneError
from ksm.fleet import cluster, runner, survey
from ksm.fleet.analysis import Analysis, Sharing
from ksm.fleet.extras import need
from ksm.fleet.hosts import Host, hosts_of
from ksm.fleet.known import CATEGORIES, ZERO, Known
from ksm.fleet.survey import Entry, LeftOut
from ksm.fleet.tally import GROUP_FIGURES, KNOWN_FIGURES, VM_FIGURES, Ints, Layout, Tally, count, layout, nothing
from ksm.fleet.vm import Vm
from ksm.keyed import Key
from ksm.pages import zero_words
from ksm.units import binary

Paths: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"

ROWS_AT_A_TIME = 4_000_000  # a range takes about 150 bytes a row while it is counted


def analyze(
    given: Paths | Any,
    hosts: Iterable[Host] = (),
    *,
    vms: Sequence[Vm] | None = None,
    client: Any = None,
    ranges: int | None = None,
    one_host: Host | None = None,
    known_files: Sequence[str | os.PathLike[str]] = (),
    key: Key | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Analysis:
    """Count a fleet exactly. O(rows log rows); memory by the range, not by the fleet.

    Args:
        given: directories of `ksm fingerprint` and files of it, seen from here or from the workers; or a Dask
            DataFrame with columns vm (names), high, low (uint64) and copies, as `contents` gives.
        hosts: their tunables; a host not among them has the default ones.
        vms: of a DataFrame, the VMs; their `zero_pages` are counted, and `pages` and `contents` are checked.
        client: a `distributed.Client`; None: this process does it all. The figures are the same.
        ranges: into how many ranges of contents the work is cut; None: by the size of the fleet.
        one_host: the tunables of the host that would hold all.
        known_files: shared libraries and the like, whose pages are named and counted apart.
        key: what the fleet was fingerprinted with; only needed to name contents.
        progress: called with (ranges done, ranges).

    Returns:
        The figures. Files that are damaged, of an unknown format or gone, or on a host whose workers died, are left
        out and named in `left_out`; if the scheduler or all workers go away, figures of the ranges that were done are
        given. `complete` tells.

    Raises:
        SourceError: no file is left; page sizes or keys differ. ValueError: a host has too few nodes.

    >>> from ksm.fleet import Vm, fingerprint_vm
    >>> for name in ("a", "b"):
    ...     vm = fingerprint_vm(b"x" * 4096 + name.encode() * 4096, "pair", Vm(name=name, kind=name, host="h"))
    >>> found = analyze("pair")
    >>> found.total.pages_sharing, found.total.saved_between_classes, found.complete
    (1, 1, True)
    """
    if ranges is not None and not 1 <= ranges <= 1 << 20:
        raise ValueError(f"{ranges} ranges; 1 to {1 << 20} can be")
    if _is_frame(given):
        entries, frames, left = _of_frame(given, vms)
    else:
        entries, left = _look(given, client)
        frames = ()
    while True:
        if not entries:
            why = "; ".join(f"{one.path}: {one.why}" for one in left[:3])
            raise SourceError(f"no file is left to analyse ({why})")
        answer, broken = _count(entries, frames, hosts, client, ranges, one_host, known_files, key, progress)
        if not broken:
            return replace(answer, left_out=tuple(left))
        left += [LeftOut(entries[number].path, why) for number, why in sorted(broken.items())]
        if frames:
            raise SourceError("; ".join(f"{one.path}: {one.why}" for one in left))
        entries = [entry for number, entry in enumerate(entries) if number not in broken]


def _is_frame(given: Any) -> bool:
    return hasattr(given, "to_delayed") and hasattr(given, "columns")


def _look(given: Paths, client: Any) -> tuple[list[Entry], list[LeftOut]]:
    paths = [os.fspath(given)] if isinstance(given, str | os.PathLike) else [os.fspath(path) for path in given]
    if not paths:
        raise ValueError("no files: there is nothing to analyse")
    paths = [os.path.abspath(path) for path in paths] if client is not None else paths
    seen = {"": survey.look(paths)} if client is None else cluster.everywhere(client, survey.look, paths)
    entries, missing = survey.gather(seen)
    entries, dropped = survey.choose(entries)
    return entries, sorted([*missing, *dropped], key=lambda one: one.path)


def _of_frame(frame: Any, vms: Sequence[Vm] | None) -> tuple[list[Entry], tuple[Any, ...], list[LeftOut]]:
    if vms is None:
        raise ValueError("a DataFrame says nothing of the VMs: vms= is needed")
    missing = [name for name in ("vm", "high", "low", "copies") if name not in frame.columns]
    if missing:
        raise ValueError(f"the DataFrame has no column {', '.join(missing)}")
    entries = [Entry(f"{vm.name} in the DataFrame", vm) for vm in vms]
    chosen, dropped = survey.choose(entries)
    if dropped:
        raise ValueError(f"{dropped[0].path}: {dropped[0].why}")
    return chosen, tuple(frame.to_delayed()), []


def _count(
    entries: Sequence[Entry],
    frames: tuple[Any, ...],
    hosts: Iterable[Host],
    client: Any,
    ranges: int | None,
    one_host: Host | None,
    known_files: Sequence[str | os.PathLike[str]],
    key: Key | None,
    progress: Callable[[int, int], object] | None,
) -> tuple[Analysis, runner.Errors]:
    """The figures; or which entries cannot be used, and why."""
    vms = [entry.vm for entry in entries]
    by_name = hosts_of(vms, hosts)
    known = Known.of(vms[0].page_size, known_files, _right(key, vms[0]))
    one = one_host or Host(name="one host")
    where, groups = _layout(vms, by_name, one, known)
    number = {int(old): new for new, old in enumerate(where.order)}
    files = () if frames else tuple((number[index], entry) for index, entry in enumerate(entries))
    work = runner.Work(where, files, _numbered(frames, {vm.name: number[i] for i, vm in enumerate(vms)}))
    rows = sum(vm.contents for vm in vms)
    workers = 1 if client is None else max(len(client.nthreads()), 1)
    parts = work.ranges(ranges or max(-(-rows // ROWS_AT_A_TIME), 1 if client is None else 2 * workers))
    total, done = nothing(where), 0
    errors: runner.Errors = {}
    counting: Iterator[runner.Counted] = runner.here(work, parts) if client is None else runner.on(client, work, parts)
    cut = ""
    try:
        for tally, wrong in counting:
            total, done = total + tally, done + 1
            errors |= wrong
            if progress is not None:
                progress(done, len(parts))
    except SchedulerLostError as error:
        if not done:
            raise
        cut = f"{error}: {done} of {len(parts)} ranges of contents were counted, and the figures are of these alone."
    except WorkersGoneError as error:  # counted again without the files that only they had
        return Analysis(**_EMPTY), {
            index: str(error) for index, entry in enumerate(entries) if entry.places and error.hosts >= {*entry.places}
        }
    broken = {int(where.order[index]): why for index, why in errors.items()}
    if done == len(parts):
        broken = _unlike(vms, where, total) | broken  # what reading found says more
    if broken:
        return Analysis(**_EMPTY), broken
    answer = _answer(vms, where, groups, by_name, one, total, cut)
    return replace(answer, ranges=len(parts), ranges_counted=done), {}


def _right(key: Key | None, vm: Vm) -> Key | None:
    if (key.id if key else "") != vm.key_id and key is not None:
        raise SourceError(f"the key has id {key.id}, and the fleet was fingerprinted with {vm.key_id or 'none'}")
    return key


def _layout(vms: Sequence[Vm], hosts: dict[str, Host], one: Host, known: Known) -> tuple[Layout, list[tuple[str, int]]]:
    places = []
    for vm in vms:
        name = vm.host or "(no host)"
        places.append((name, 0 if hosts[name].merge_across_nodes else vm.node))
    limits = {place: hosts[place[0]].max_page_sharing for place in places}
    return layout(places, [vm.kind for vm in vms], limits, one.max_page_sharing, known), places


def _numbered(frames: tuple[Any, ...], number: dict[str, int]) -> tuple[Any, ...]:
    if not frames:
        return ()
    give = need("dask").delayed(_with_numbers, pure=False)
    return tuple(give(frame, number) for frame in frames)


def _with_numbers(frame: Any, number: dict[str, int]) -> Any:
    numbers = frame["vm"].map(number)
    if numbers.isna().any():
        raise ValueError(f"the DataFrame has a VM that vms= has not: {frame['vm'][numbers.isna()].iloc[0]}")
    return frame.assign(number=numbers.astype("int64"))


def _unlike(vms: Sequence[Vm], where: Layout, total: Tally) -> runner.Errors:
    """VMs of which not as many pages were counted as their metadata says."""
    wrong: runner.Errors = {}
    for new, old in enumerate(where.order.tolist()):
        vm, (pages, contents) = vms[old], total.vms[new, :2].tolist()
        if (pages, contents) != (vm.pages - vm.zero_pages, vm.contents):
            wrong[old] = (
                f"damaged: {pages} pages of {contents} contents, its metadata says {vm.pages - vm.zero_pages} "
                f"of {vm.contents}"
            )
    return wrong


# ---- the answer --------------------------------------------------------------------------------------


def _answer(
    vms: Sequence[Vm],
    where: Layout,
    places: Sequence[tuple[str, int]],
    hosts: dict[str, Host],
    one: Host,
    total: Tally,
    cut: str,
) -> Analysis:
    size = vms[0].page_size
    zeros_alone = np.array([vms[i].zero_pages for i in where.order.tolist()], np.int64)
    given_back = np.array([hosts[places[i][0]].use_zero_pages for i in where.order.tolist()], np.bool_)
    apart = _zeros(where, zeros_alone, given_back, size)
    together = _zeros(where, zeros_alone, np.full(len(vms), one.use_zero_pages), size)
    rows = {name: Sharing(name=name, page_size=size) for name in where.hosts}
    for index, (name, _) in enumerate(where.groups):
        here = where.group == index
        part = _sharing(
            name,
            size,
            int(here.sum()),
            total.groups[index],
            apart.groups[index],
            int(zeros_alone[here & given_back].sum()),
        )
        rows[name] = _add(rows[name], part)
    fleet = Sharing(name="fleet", page_size=size)
    for row in rows.values():
        fleet = _add(fleet, row)
    back = int(zeros_alone.sum()) if one.use_zero_pages else 0
    merged = replace(_sharing("one host", size, len(vms), total.one, together.one, back))
    return Analysis(
        page_size=size,
        key_id=vms[0].key_id,
        total=fleet,
        one_host=merged,
        hosts=tuple(rows.values()),
        vms=tuple(_vm_row(vms[old], total.vms[new]) for new, old in enumerate(where.order.tolist())),
        classes=_pairs(where.kinds, total.kinds, size),
        host_pairs=None if total.hosts is None else _pairs(where.hosts, total.hosts, size),
        top=_top(where.known, total, zeros_alone, where, size),
        known=_known(total, fleet, merged, int(zeros_alone.sum())),
        left_out=(),
        assumed=(*_assumed(vms, cut), *_too_small(rows.values(), hosts)),
        contents=total.contents,
        ranges=1,
        ranges_counted=1,
    )


def _zeros(where: Layout, zeros: Ints, given_back: Any, size: int) -> Tally:
    """The all-zero pages that merge like others, counted as one content."""
    some = np.flatnonzero((zeros > 0) & ~given_back)
    high, low = (np.full(len(some), word, np.uint64) for word in zero_words(size))
    return count((high, low, zeros[some], some), where)


def _sharing(name: str, size: int, vms: int, figures: Ints, zeros: Ints, given_back: int) -> Sharing:
    a = dict(zip(GROUP_FIGURES, figures.tolist(), strict=True))
    z = dict(zip(GROUP_FIGURES, zeros.tolist(), strict=True))
    settled = ("pages_shared", "pages_sharing", "pages_unshared", "stable_node_chains", "stable_node_dups")
    return Sharing(
        name=name,
        page_size=size,
        vms=vms,
        pages=a["pages"] + z["pages"] + given_back,
        zero_pages=z["pages"] + given_back,
        ksm_zero_pages=given_back,
        saved_zero=z["pages_sharing"] + given_back,
        saved_within_vms=a["within_vms"],
        saved_between_vms=a["between_vms"],
        saved_between_classes=a["between_classes"],
        lost_to_limit=a["lost_to_limit"],
        **{figure: a[figure] + z[figure] for figure in settled},
    )


def _add(one: Sharing, other: Sharing) -> Sharing:
    figures = [name for name in Sharing.__dataclass_fields__ if name not in ("name", "page_size")]
    return replace(one, **{name: getattr(one, name) + getattr(other, name) for name in figures})


def _vm_row(vm: Vm, figures: Ints) -> dict[str, Any]:
    about = {"name": vm.name, "class": vm.kind, "host": vm.host, "node": vm.node}
    counted = dict(zip(VM_FIGURES, figures.tolist(), strict=True))
    counted["pages"] += vm.zero_pages
    return about | counted | {"zero_pages": vm.zero_pages}


def _pairs(names: Sequence[str], matrix: Ints, size: int) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"a": names[i], "b": names[j], "contents": int(matrix[i, j]), "bytes": int(matrix[i, j]) * size}
        for i in range(len(names))
        for j in range(i, len(names))
    )


def _top(known: Known, total: Tally, zeros: Ints, where: Layout, size: int) -> tuple[dict[str, Any], ...]:
    rows: list[dict[str, Any]] = []
    names = ("copies", "vms", "classes", "hosts")
    for copies, high, low, vms, kinds, hosts in total.top:
        category, what = known.name(high, low)
        content = {"content": f"{high:016x}{low:016x}", "category": category, "what": what}
        rows.append(content | dict(zip(names, (copies, vms, kinds, hosts), strict=True)))
    if zeros.any():
        high, low = map(int, zero_words(size))
        having = np.flatnonzero(zeros)
        numbers = (int(zeros.sum()), len(having), len(set(where.kind[having])), len(set(where.host[having])))
        content = {"content": f"{high:016x}{low:016x}", "category": ZERO, "what": "zero pages"}
        rows.append(content | dict(zip(names, numbers, strict=True)))
    return tuple(sorted(rows, key=lambda row: (-row["copies"], row["content"])))


def _known(total: Tally, fleet: Sharing, merged: Sharing, zeros: int) -> tuple[dict[str, Any], ...]:
    rows = [
        {"category": name} | dict(zip(KNOWN_FIGURES, total.known[index].tolist(), strict=True))
        for index, name in enumerate(CATEGORIES)
    ]
    zero = (int(zeros > 0), zeros, fleet.saved_zero, merged.saved_zero)
    return ({"category": ZERO} | dict(zip(KNOWN_FIGURES, zero, strict=True)), *rows)


def _assumed(vms: Sequence[Vm], cut: str) -> Iterator[str]:
    if cut:
        yield cut
    yield "All these pages are mergeable and do not change."
    unknown = sum(vm.zero_or_untouched for vm in vms if vm.zeros == "merge")
    absent = sum(vm.zero_or_untouched for vm in vms if vm.zeros == "absent")
    if unknown:
        yield f"{unknown:,} all-zero pages of dumps are zero or never touched: they are counted as pages that merge."
    if absent:
        yield f"{absent:,} all-zero pages of dumps are zero or never touched: they are left out, as never touched."
    alone = sum(not vm.host for vm in vms)
    if alone:
        yield f"{alone:,} VMs without a host are counted as if one host held them."


def _too_small(rows: Iterable[Sharing], hosts: dict[str, Host]) -> Iterator[str]:
    for row in rows:
        ram = hosts[row.name].ram - hosts[row.name].reserve
        if 0 < ram < row.frames_bytes:
            yield f"Host {row.name} has {binary(ram)} for VMs, and their pages take {binary(row.frames_bytes)} merged."


_EMPTY: dict[str, Any] = {
    "page_size": 0,
    "key_id": "",
    "total": Sharing(name=""),
    "one_host": Sharing(name=""),
    "hosts": (),
    "vms": (),
    "classes": (),
    "host_pairs": None,
    "top": (),
    "known": (),
    "left_out": (),
    "assumed": (),
    "contents": 0,
    "ranges": 1,
    "ranges_counted": 0,
}

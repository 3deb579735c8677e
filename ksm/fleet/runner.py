"""Runs the count of every range, here or on a cluster, a few ranges at a time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ksm.errors import SourceError
from ksm.fleet import cluster, files
from ksm.fleet.survey import Entry
from ksm.fleet.tally import Layout, Tally, count

Errors: TypeAlias = dict[int, str]
Piece: TypeAlias = tuple[tuple[Any, Any, Any, Any], Errors]
Counted: TypeAlias = tuple[Tally, Errors]

_WORDS = 1 << 64


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be counted: files with the numbers of their VMs, by where they can be read, and Dask partitions.

    >>> Work((), ()).ranges(2)[1][0] == 1 << 63
    True
    """

    layout: Any
    """A `Layout`."""
    entries: tuple[tuple[int, Entry], ...]
    frames: tuple[Any, ...] = ()
    """Partitions of a Dask DataFrame, delayed, with columns number, high, low, copies."""

    def ranges(self, number: int) -> list[tuple[int, int]]:
        """That many ranges of high words, first and last."""
        edges = [_WORDS * index // number for index in range(number + 1)]
        return [(first, last - 1) for first, last in itertools.pairwise(edges)]

    def by_place(self) -> dict[tuple[str, ...], list[tuple[int, str]]]:
        """(number, path) of the files by where they can be read."""
        result: dict[tuple[str, ...], list[tuple[int, str]]] = {}
        for number, entry in self.entries:
            result.setdefault(entry.places, []).append((number, entry.path))
        return result


def read_piece(where: Sequence[tuple[int, str]], first: int, last: int) -> Piece:
    """One range out of some files, VM by VM; of files that cannot be read, what is wrong.

    >>> read_piece([(0, "nothing.pages.parquet")], 0, 9)[1]
    {0: 'No such file or directory'}
    """
    parts, errors = [], {}
    for number, path in sorted(where):
        try:
            high, low, copies = files.read_range(path, first, last)
        except SourceError as error:
            errors[number] = str(error).removeprefix(f"{path}: ")
            continue
        parts.append((high, low, copies, np.full(len(high), number, np.int64)))
    return _joined(parts), errors


def frame_piece(frame: Any, first: int, last: int) -> Piece:
    """One range out of a pandas DataFrame with columns number, high, low, copies.

    >>> import pandas
    >>> columns = {"number": [0], "high": np.array([5], np.uint64), "low": np.array([1], np.uint64), "copies": [2]}
    >>> frame_piece(pandas.DataFrame(columns), 0, 9)[0][2]
    array([2])
    """
    high = frame["high"].to_numpy(np.uint64)
    some = (high >= np.uint64(first)) & (high <= np.uint64(last))
    low = frame["low"].to_numpy(np.uint64)[some]
    copies, number = (frame[name].to_numpy(np.int64)[some] for name in ("copies", "number"))
    return (high[some], low, copies, number), {}


def _joined(parts: Sequence[Any]) -> Any:
    if not parts:
        none = np.zeros(0, np.uint64)
        return none, none, np.zeros(0, np.int64), np.zeros(0, np.int64)
    return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))


def count_pieces(where: Layout, *pieces: Piece) -> Counted:
    """Count one range out of pieces of it.

    >>> from ksm.fleet.tally import layout
    >>> count_pieces(layout([("h", 0)], ["a"], {("h", 0): 256}), read_piece([], 0, 9))[0].contents
    0
    """
    errors: Errors = {}
    for _, wrong in pieces:
        errors |= wrong
    rows = pieces[0][0] if len(pieces) == 1 else _in_order(_joined([rows for rows, _ in pieces]))
    return count(rows, where), errors


def _in_order(rows: Any) -> Any:
    order = np.argsort(rows[3], kind="stable")
    return tuple(column[order] for column in rows)


def count_files(where: Layout, paths: Sequence[tuple[int, str]], first: int, last: int) -> Counted:
    """Read and count one range of files that are all here.

    >>> from ksm.fleet.tally import layout
    >>> count_files(layout([("h", 0)], ["a"], {("h", 0): 256}), [], 0, 9)[1]
    {}
    """
    return count_pieces(where, read_piece(paths, first, last))


def here(work: Work, ranges: Sequence[tuple[int, int]]) -> Iterator[Counted]:
    """Count range after range in this process.

    >>> list(here(Work(None, ()), []))
    []
    """
    paths = [(number, entry.path) for number, entry in work.entries]
    frames = [part.compute(scheduler="synchronous") for part in work.frames]
    for first, last in ranges:
        pieces = [frame_piece(frame, first, last) for frame in frames]
        yield count_pieces(work.layout, *([read_piece(paths, first, last)] if paths or not pieces else []), *pieces)


def on(client: Any, work: Work, ranges: Sequence[tuple[int, int]]) -> Iterator[Counted]:
    """Count on a cluster, in whatever order ranges are done. Files are read by workers on the hosts that have them.

    Two ranges a worker are under way at a time, so that memory does not grow with the fleet. Work that a dying worker
    had is done again by others.

    >>> list(on(None, Work(None, ()), []))
    []

    Raises:
        SchedulerLostError: it went away, or all workers. WorkersGoneError: those of a host that alone has files.
        KsmError: workers died over and over.
    """
    if not ranges:
        return
    submit = _submitter(client, work)
    needed = {places for places in work.by_place() if places}
    todo = list(ranges)[::-1]
    wide = 2 * max(sum(client.nthreads().values()), 1)
    running = {submit(*todo.pop()) for _ in range(min(wide, len(todo)))}
    try:
        while running:
            for future in cluster.first_done(client, running, needed):
                running.discard(future)
                yield cluster.result(client, future, needed)
                if todo:
                    running.add(submit(*todo.pop()))
    finally:
        with contextlib.suppress(Exception):
            client.cancel(list(running))


def _submitter(client: Any, work: Work) -> Callable[[int, int], Any]:
    """What starts the count of a range. The layout and the lists of files travel once, as tasks that can be redone."""
    token = object.__repr__(work) + str(id(work))
    where = client.submit(_same, work.layout, key=f"ksm-layout-{hash(token):x}", priority=10)
    paths = {
        places: client.submit(_same, paths, key=f"ksm-paths-{hash(token):x}-{index}", priority=10)
        for index, (places, paths) in enumerate(work.by_place().items())
    }
    frames = client.compute(list(work.frames)) if work.frames else []

    def start(first: int, last: int) -> Any:
        if list(paths) == [()] and not frames:
            return client.submit(count_files, where, paths[()], first, last, pure=False)
        pieces = [client.submit(frame_piece, frame, first, last, pure=False) for frame in frames]
        for places, some in paths.items():  # hosts, not addresses: a worker may be another one by then
            workers = list(places) or None
            pieces.append(client.submit(read_piece, some, first, last, pure=False, workers=workers))
        return client.submit(count_pieces, where, *pieces, pure=False)

    return start


def _same(value: Any) -> Any:
    return value

"""Traces: what is recorded is what was there, in files that survive a crash and that anybody can read."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

import ksm
import ksm.trace
from ksm import sources
from ksm.keyed import Key, keyed
from ksm.sources import ArrayImage, Snapshot
from ksm.trace import Trace, format, record
from ksm.trace.memory import Memory, Sample
from ksm.trace.watch import _natural, series

PAGE = 4096
KEY = Key.from_bytes(b"k" * 32)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="live processes can be read on Linux only")
Pages = npt.NDArray[np.uint8]


def guest(rng: np.random.Generator, pages: Pages, present: npt.NDArray[np.bool_], name: str) -> ArrayImage:
    """The guest a moment later: some pages have changed, some have come, some have gone."""
    for _ in range(12):
        at = int(rng.integers(len(pages)))
        pages[at] = rng.choice([0, 1, 2, 200]) if rng.random() < 0.5 else rng.integers(0, 256, PAGE, dtype=np.uint8)
        present[at] = rng.random() < 0.7
    return ArrayImage(pages.copy(), name, present.copy(), address=0x10000)


def guests(seed: int, steps: int = 6) -> dict[str, list[ArrayImage]]:
    rng = np.random.default_rng(seed)
    found: dict[str, list[ArrayImage]] = {}
    for number in range(3):
        pages = rng.integers(0, 4, (80, 1), dtype=np.uint8).repeat(PAGE, axis=1)
        present = rng.random(80) < 0.8
        found[f"vm{number}"] = [guest(rng, pages, present, f"vm{number}") for _ in range(steps - number)]
    return found


def content(snapshot: Snapshot) -> dict[int, int]:
    """Page number -> fingerprint."""
    return {
        address // PAGE + i: value
        for address, prints in snapshot.blocks
        for i in range(len(prints))
        if (value := prints[i]) is not None
    }


# ---- what is recorded -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "keyed"])
def test_every_moment_is_as_it_was(tmp_path: Path, seed: int, key: Key | None) -> None:
    source = guests(seed)
    record(source, tmp_path / "t", every=10, key=key)
    trace = ksm.trace.open(tmp_path / "t", key)
    assert [step.seconds for step in trace.steps] == [0, 10, 20, 30, 40, 50]
    for step in range(6):
        there = {snapshot.name: content(snapshot) for snapshot in trace.at(step * 10 + 5)}
        expected = {}
        for name, images in source.items():
            if step < len(images):
                snapshot = Snapshot.take(images[step])
                blocks = snapshot.blocks if key is None else [(a, keyed(p, key)) for a, p in snapshot.blocks]
                expected[name] = content(Snapshot(name, PAGE, True, True, tuple(blocks)))
        assert there == expected


def test_only_changes_are_stored(tmp_path: Path) -> None:
    images = guests(1, 4)["vm0"]
    record({"vm": [images[0], images[0], images[1], images[1]]}, tmp_path / "t", every=1)
    rows = pq.read_table(tmp_path / "t" / "pages").to_pydict()
    before, after = (content(Snapshot.take(image)) for image in images[:2])
    changed = {page for page in before.keys() | after.keys() if before.get(page) != after.get(page)}
    assert rows["step"].count(0) == len(before) and 1 not in rows["step"] and 3 not in rows["step"]
    assert {page for page, step in zip(rows["page"], rows["step"], strict=True) if step == 2} == changed


def test_counts_of_each_step(tmp_path: Path) -> None:
    images = guests(2, 4)["vm0"]
    record({"vm": images}, tmp_path / "t", every=1)
    held = [content(Snapshot.take(image)) for image in images]
    zero = ksm.fingerprint(bytes(PAGE))[0]
    for number, step in enumerate(Trace(tmp_path / "t").steps):
        now, before = held[number], held[number - 1] if number else {}
        assert step.row["pages"] == len(now)
        assert step.row["zero_pages"] == list(now.values()).count(zero or 0)
        assert step.row["changed"] == sum(before[page] != now[page] for page in now.keys() & before.keys())
        assert step.row["appeared"] == len(now.keys() - before.keys())
        assert step.row["gone"] == len(before.keys() - now.keys())


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "keyed"])
def test_a_sample_keeps_all_copies_of_some_contents(tmp_path: Path, key: Key | None) -> None:
    source = guests(3)
    record(source, tmp_path / "all", key=key)
    record(source, tmp_path / "some", key=key, sample=4)
    every, some = Trace(tmp_path / "all"), Trace(tmp_path / "some")
    zero = ksm.fingerprint(bytes(PAGE))[0]
    for at in range(0, 60, 10):
        whole = {snapshot.name: content(snapshot) for snapshot in every.at(at)}
        part = {snapshot.name: content(snapshot) for snapshot in some.at(at)}
        assert part.keys() == whole.keys()
        for name, pages in whole.items():
            expected = {p: f for p, f in pages.items() if f != zero and f % 2**64 % 4 == 0}
            assert {p: f for p, f in part[name].items() if f != zero} == expected
            assert {p for p, f in part[name].items() if f == zero} <= {p for p, f in pages.items() if f == zero}


def test_zero_pages_of_a_sample_are_about_their_share() -> None:
    memory = Memory(np.arange(100_000, dtype=np.uint64), np.zeros((100_000, 2), np.uint64))
    kept = Sample(16).keeps(memory, np.ones(100_000, np.bool_))
    assert abs(int(kept.sum()) - 100_000 / 16) < 300


def test_what_leaves_the_sample_and_what_is_gone_differ(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pages = rng.integers(0, 256, (400, PAGE), dtype=np.uint8)
    other = rng.integers(0, 256, (400, PAGE), dtype=np.uint8)
    half = np.arange(400) < 200
    record({"vm": [ArrayImage(pages), ArrayImage(other, present=half)]}, tmp_path / "t", sample=2)
    rows = pq.read_table(tmp_path / "t" / "pages").to_pylist()
    left = [row for row in rows if row["step"] == 1 and row["high"] is None]
    assert {row["page"] for row in left if row["present"]} <= set(range(200))
    assert {row["page"] for row in left if not row["present"]} <= set(range(200, 400))
    assert any(row["present"] for row in left) and any(not row["present"] for row in left)


# ---- the files ------------------------------------------------------------------------------------


def test_any_parquet_tool_reads_it(tmp_path: Path) -> None:
    """As a data set of files, by two implementations of Parquet where both are there."""
    record(guests(4), tmp_path / "t")
    table = pa.dataset.dataset(tmp_path / "t" / "pages").to_table()
    assert table.schema.names == format.schema("pages").names
    metadata = json.loads(pq.read_schema(next((tmp_path / "t" / "steps").iterdir())).metadata[b"ksm.trace"])
    assert metadata["format"] == 1 and metadata["page_size"] == PAGE and metadata["fingerprint"] == "xxh3-128"
    if importlib.util.find_spec("duckdb"):
        import duckdb

        found = duckdb.sql(f"select sum(page), max(low), count(high) from '{tmp_path}/t/pages/*.parquet'").fetchall()
        columns = table.to_pydict()
        assert found[0][0] == sum(columns["page"]) and found[0][1] == max(filter(None, columns["low"]))
        assert found[0][2] == sum(value is not None for value in columns["high"])


def test_parts_are_closed_when_they_are_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = guests(5)
    monkeypatch.setattr(format, "_ADDED", 2)
    record(source, tmp_path / "t")
    assert len(format.parts(tmp_path / "t", "pages")) == 3 and len(format.parts(tmp_path / "t", "steps")) == 3
    monkeypatch.undo()
    record(source, tmp_path / "one")
    for at in range(0, 60, 10):
        assert [content(s) for s in Trace(tmp_path / "t").at(at)] == [
            content(s) for s in Trace(tmp_path / "one").at(at)
        ]


def test_pages_of_many_steps_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ksm.trace import recorder

    monkeypatch.setattr(recorder, "CHUNK", 7)
    source = guests(6)
    record(source, tmp_path / "t")
    assert [content(s) for s in Trace(tmp_path / "t").at(0)] == [content(Snapshot.take(i[0])) for i in source.values()]


# ---- going on after the end -------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "keyed"])
@pytest.mark.parametrize("sample", [1, 3])
def test_resumed_is_as_recorded_at_once(tmp_path: Path, key: Key | None, sample: int) -> None:
    source = guests(7)
    options: Any = {"every": 10, "key": key, "sample": sample}
    record(source, tmp_path / "once", **options)
    record(source, tmp_path / "twice", seconds=20, **options)
    assert len(Trace(tmp_path / "twice").steps) == 3
    record(source, tmp_path / "twice", resume=True, **options)
    once, twice = Trace(tmp_path / "once"), Trace(tmp_path / "twice")
    assert [step.seconds for step in once.steps] == [step.seconds for step in twice.steps]
    assert twice.steps[3].row["changed"] is None and twice.steps[4].row["changed"] is not None
    for at in range(0, 60, 10):
        assert [content(s) for s in once.at(at)] == [content(s) for s in twice.at(at)]
    rows = [pq.read_table(trace.path / "pages").num_rows for trace in (once, twice)]
    assert rows[0] == rows[1]


def test_a_step_that_was_not_finished_does_not_count(tmp_path: Path) -> None:
    source = guests(8)
    record(source, tmp_path / "t", seconds=20)
    (tmp_path / "t" / "steps" / ".part-00000000.parquet.tmp").write_bytes(b"half of")
    steps = tmp_path / "t" / "steps" / "part-00000000.parquet"
    whole = steps.read_bytes()
    table = pq.read_table(steps)
    pq.write_table(table.filter(pa.compute.less(table["step"], 2)), steps)  # as before the last step was finished
    before = [content(s) for s in Trace(tmp_path / "t").at(1e9)]
    record(source, tmp_path / "t", resume=True)
    trace = Trace(tmp_path / "t")
    assert [step.number for step in trace.steps][:3] == [0, 1, 3]  # the number is not used again
    assert before == [content(Snapshot.take(images[1])) for images in source.values()]
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(whole) > 0 and [content(s) for s in trace.at(30)] == [
        content(Snapshot.take(images[3])) for images in source.values()
    ]


def test_pages_are_on_disk_before_the_step_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where writing fails, after the first step, the step before is the last one."""
    source = guests(8)
    replace = format.replace

    def failing(path: Path, data: memoryview) -> None:
        if path.exists() and path.parent.name == kind:
            raise OSError(28, "No space left on device")
        replace(path, data)

    monkeypatch.setattr(format, "replace", failing)
    for kind in ("pages", "steps"):
        with pytest.raises(OSError, match="No space"):
            record(source, tmp_path / kind)
        trace = Trace(tmp_path / kind)
        assert len(trace.steps) == 1
        expected = [content(Snapshot.take(images[0])) for images in source.values()]
        assert [content(snapshot) for snapshot in trace.at(1e9)] == expected


def test_settings_cannot_change_midway(tmp_path: Path) -> None:
    source = guests(9)
    record(source, tmp_path / "t", seconds=0, key=KEY)
    other = Key.from_bytes(b"o" * 32)
    for options, what in (({}, "the key"), ({"key": other}, "the key"), ({"key": KEY, "sample": 2}, "the sample")):
        with pytest.raises(ksm.SourceError, match=what):
            record(source, tmp_path / "t", resume=True, **options)  # type: ignore[arg-type]
    with pytest.raises(ksm.SourceError, match=f"of key {KEY.id}, not {other.id}"):
        ksm.trace.open(tmp_path / "t", other)
    record(source, tmp_path / "plain", seconds=0)
    with pytest.raises(ksm.SourceError, match="plain, without a key"):
        ksm.trace.open(tmp_path / "plain", KEY)


def test_parts_of_two_recordings_do_not_mix(tmp_path: Path) -> None:
    record(guests(10), tmp_path / "a", seconds=0)
    record(guests(10), tmp_path / "b", seconds=0, key=KEY)
    part = tmp_path / "b" / "pages" / "part-00000000.parquet"
    part.rename(tmp_path / "a" / "pages" / "part-00000001.parquet")
    with pytest.raises(ksm.SourceError, match="belongs to another recording"):
        Trace(tmp_path / "a").at(0)


def test_there_already(tmp_path: Path) -> None:
    record(guests(1), tmp_path / "t", seconds=0)
    with pytest.raises(OSError, match=r"exists: .*--resume. goes on"):
        record(guests(1), tmp_path / "t")
    with pytest.raises(ksm.SourceError, match="no trace to resume"):
        record(guests(1), tmp_path / "missing", resume=True)


def test_two_recordings_cannot_write_one_trace(tmp_path: Path) -> None:
    source = guests(1)
    record(source, tmp_path / "t", seconds=0)

    def again(step: ksm.trace.Progress) -> None:
        with pytest.raises(OSError, match="another recording"):
            record(source, tmp_path / "t", resume=True)

    record(source, tmp_path / "t", resume=True, seconds=0, progress=again)


def test_nothing_is_left_of_a_recording_that_could_not_begin(tmp_path: Path) -> None:
    for given in (["/nonexistent"], ["pid:999999999"], []):
        with pytest.raises((ksm.SourceError, ValueError)):
            record(given, tmp_path / "t")
        assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"every": float("nan")}, {"seconds": -1}, {"cpu": 0}, {"sample": 0}, {"sample": 1 << 21}]
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        record(guests(1), tmp_path / "t", **options)
    assert not (tmp_path / "t").exists()


def test_page_sizes_that_differ(tmp_path: Path) -> None:
    small, large = (ArrayImage(np.zeros((4, size), np.uint8)) for size in (4096, 16384))
    with pytest.raises(ValueError, match="page sizes differ"):
        record({"a": [small], "b": [large]}, tmp_path / "t")
    record({"b": [large]}, tmp_path / "t")
    assert Trace(tmp_path / "t").page_size == 16384


# ---- hostile files ----------------------------------------------------------------------------------


def rewrite(path: Path, **columns: Any) -> None:
    """Some columns of a part replaced, its metadata kept."""
    table = pq.read_table(path)
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    pq.write_table(table, path)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    record({"vm": [ArrayImage(np.arange(4, dtype=np.uint8)[:, None].repeat(PAGE, axis=1))] * 2}, tmp_path / "t")
    return tmp_path / "t"


def test_a_part_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "_ADDED", 2)
    record(guests(5), tmp_path / "t")
    for kind in ("pages", "steps"):
        (tmp_path / "t" / kind / "part-00000001.parquet").rename(tmp_path / "away")
        with pytest.raises(ksm.SourceError, match=r"part-00000001\.parquet is missing"):
            Trace(tmp_path / "t").at(0)
        (tmp_path / "away").rename(tmp_path / "t" / kind / "part-00000001.parquet")


def test_a_part_of_more_rows_than_any_has(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes can stand for billions of equal rows."""
    monkeypatch.setattr(format, "_MOST_ROWS", 3)
    with pytest.raises(ksm.SourceError, match="more than 3 rows"):
        Trace(trace).at(0)


PART = "part-00000000.parquet"


@pytest.mark.parametrize("kind", ["pages", "steps"])
@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_parts(trace: Path, kind: str, keep: int) -> None:
    path = trace / kind / PART
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ksm.SourceError, match=PART):
        Trace(trace).at(0)


@pytest.mark.parametrize("kind", ["pages", "steps"])
def test_flipped_bytes_are_an_error_or_harmless(trace: Path, kind: str) -> None:
    path = trace / kind / PART
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(whole)
        broken[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        try:
            Trace(trace).at(0)
        except ksm.SourceError:
            continue


@pytest.mark.parametrize(
    ("kind", "columns", "message"),
    [
        ("pages", {"page": [3, 2, 1, 0]}, "ascending"),
        ("pages", {"page": [0, 1, 1, 2]}, "ascending"),
        ("pages", {"page": [0, 1, 2, 1 << 60]}, "page numbers"),
        ("pages", {"seconds": [0.0, float("nan"), 0.0, 0.0]}, "without a time"),
        ("pages", {"process": ["vm", "vm", "vm", "other"]}, "other, which was not there"),
        ("pages", {"step": [1, 0, 0, 0]}, "comes after"),
        ("steps", {"seconds": [0.0, float("inf"), 10.0, 10.0]}, "comes after"),
        ("steps", {"seconds": [10.0, 10.0, 0.0, 0.0]}, "comes after"),
        ("steps", {"step": [0, 0, 0, 0]}, "comes after"),
        ("steps", {"step": [0, 1, 1, 1]}, "of other steps"),
        ("steps", {"alive": [None, None, True, None]}, "without alive"),
    ],
)
def test_rows_that_contradict_each_other(trace: Path, kind: str, columns: dict[str, Any], message: str) -> None:
    rewrite(trace / kind / PART, **columns)
    with pytest.raises(ksm.SourceError, match=message):
        Trace(trace).at(100)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"page_size": 1000},
        {"page_size": "4096"},
        {"sample_of": 0},
        {"key_id": 7},
        {"page_size": None},
    ],
)
def test_metadata_that_is_no_traces(trace: Path, change: dict[str, Any]) -> None:
    path = trace / "steps" / PART
    table = pq.read_table(path)
    metadata = json.loads(table.schema.metadata[b"ksm.trace"]) | change
    pq.write_table(table.replace_schema_metadata({b"ksm.trace": json.dumps(metadata)}), path)
    with pytest.raises(ksm.SourceError, match=r"format 2|metadata is not"):
        Trace(trace)


def test_what_is_no_trace(tmp_path: Path, trace: Path) -> None:
    for path, what in ((tmp_path / "missing", "no such trace"), (tmp_path, "not a trace")):
        with pytest.raises(ksm.SourceError, match=what):
            Trace(path)
    assert not ksm.trace.is_trace(tmp_path) and not ksm.trace.is_trace("a\0b") and not ksm.trace.is_trace(b"x" * 4096)
    pq.write_table(pa.table({"step": [0]}), trace / "steps" / PART)
    with pytest.raises(ksm.SourceError, match="columns"):
        Trace(trace)


# ---- live processes -----------------------------------------------------------------------------------

CHILD = """
import mmap, sys
area = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(64):
    area[page * 4096] = page + 1
print("ready", flush=True)
for line in sys.stdin:
    area[int(line) * 4096] = 255
    print("done", flush=True)
"""


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    with start() as process:
        yield process
        process.kill()


def start(executable: str = sys.executable) -> subprocess.Popen[str]:
    process = subprocess.Popen([executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@LINUX
def test_a_process_that_ends(tmp_path: Path, child: subprocess.Popen[str]) -> None:
    def each(step: ksm.trace.Progress) -> None:
        assert child.stdin is not None and child.stdout is not None
        if step.step == 1:
            child.stdin.write("7\n")
            child.stdin.flush()
            child.stdout.readline()
        if step.step == 2:
            child.kill()
            child.wait()

    record([f"pid:{child.pid}"], tmp_path / "t", every=0.05, progress=each)
    trace = Trace(tmp_path / "t")
    assert len(trace.steps) == 3
    assert [[seen.alive for seen in step.processes] for step in trace.steps] == [[True], [True], [False]]
    pages = np.zeros((65, PAGE), np.uint8)
    pages[:, 0] = [*range(1, 65), 255]
    then = [content(trace.at(step.seconds)[0]).values() for step in trace.steps[1:]]  # as a step found it
    before, after = ([value in seen for value in ksm.fingerprint(pages)] for seen in then)
    assert before == [True] * 64 + [False]
    assert after == [page != 7 for page in range(64)] + [True]
    assert trace.steps[1].row["changed"] >= 1
    assert trace.steps[0].row["pages"] > 64 and trace.at(1e9) == []


@LINUX
def test_processes_that_come_and_go(tmp_path: Path) -> None:
    executable = tmp_path / "ksm-test-proc"
    executable.symlink_to(sys.executable)
    running: list[subprocess.Popen[str]] = []

    def each(step: ksm.trace.Progress) -> None:
        if step.step in (1, 2):
            running.append(start(str(executable)))
        if step.step == 3:
            running[0].kill()
            running[0].wait()
        if step.step == 4:
            raise KeyboardInterrupt  # the way to end a recording

    try:
        with pytest.raises(KeyboardInterrupt):
            record(["comm:ksm-test-pr*"], tmp_path / "t", every=0.05, progress=each)
    finally:
        for process in running:
            with process:
                process.kill()
    steps = Trace(tmp_path / "t").steps
    one, two = (f"pid:{process.pid}" for process in running)
    there = [{seen.process: seen.alive for seen in step.processes} for step in steps]
    assert there == [{}, {one: True}, {one: True, two: True}, {one: False, two: True}]


@LINUX
def test_a_resumed_recording_knows_its_processes(tmp_path: Path, child: subprocess.Popen[str]) -> None:
    """One with the same name that started at another time, as after a reboot, is another process."""
    record([f"pid:{child.pid}"], tmp_path / "t", seconds=0)
    record([f"pid:{child.pid}"], tmp_path / "t", seconds=0, resume=True)
    steps = tmp_path / "t" / "steps" / "part-00000001.parquet"
    ticks = pq.read_table(steps)["start_ticks"].to_pylist()
    assert ticks[0] == int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    rewrite(steps, start_ticks=[1, None])
    record([f"pid:{child.pid}"], tmp_path / "t", seconds=0, resume=True)
    seen = [[change.alive for change in step.processes] for step in Trace(tmp_path / "t").steps]
    assert seen == [[True], [True], [False, True]]


@LINUX
def test_somebody_elses_process_that_comes_later(
    tmp_path: Path, child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left out; at the first step it would have been an error."""
    executable = tmp_path / "ksm-later-proc"
    executable.symlink_to(sys.executable)
    later: list[subprocess.Popen[str]] = []
    opened = sources.open

    def forbidding(where: str, **options: Any) -> Any:
        if later and where == f"pid:{later[0].pid}":
            raise ksm.errors.kernel_error(13, where)
        return opened(where, **options)

    def each(step: ksm.trace.Progress) -> None:
        if step.step == 1:
            later.append(start(str(executable)))
        if step.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(sources, "open", forbidding)
    try:
        with pytest.raises(KeyboardInterrupt):
            record(["comm:ksm-later*", f"pid:{child.pid}"], tmp_path / "t", every=0.05, progress=each)
        assert len(Trace(tmp_path / "t").steps) == 3 and Trace(tmp_path / "t").processes == (f"pid:{child.pid}",)
        with pytest.raises(PermissionError):
            record(["comm:ksm-later*"], tmp_path / "other")
    finally:
        for process in later:
            with process:
                process.kill()


@LINUX
def test_killed_at_any_moment(tmp_path: Path, child: subprocess.Popen[str]) -> None:
    """What a recording that was killed has written is whole, and it can be resumed."""
    script = f"import ksm.trace; ksm.trace.record(['pid:{child.pid}'], 't', every=0.002)"  # always busy
    environment = {**os.environ, "PYTHONPATH": str(Path(ksm.__file__).parents[1])}
    recorder = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "t").rglob("part-*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    recorder.send_signal(signal.SIGKILL)
    recorder.wait()
    steps = len(Trace(tmp_path / "t").steps)
    assert steps > 1 and len(Trace(tmp_path / "t").at(1e9)) == 1
    record([f"pid:{child.pid}"], tmp_path / "t", every=0.01, seconds=0.03, resume=True)
    trace = Trace(tmp_path / "t")
    assert len(trace.steps) > steps
    assert trace.steps[steps].seconds >= trace.steps[steps - 1].seconds


@LINUX
def test_a_budget_is_kept(tmp_path: Path) -> None:
    """At 20 % of a CPU, 256 MiB take many times as long as the CPU time that they cost."""
    record([ArrayImage(np.ones((16, PAGE), np.uint8))], tmp_path / "warm")  # imports apart
    path = tmp_path / "guest.raw"
    np.ones((65536, PAGE), np.uint8).tofile(path)
    seen: list[ksm.trace.Progress] = []
    begun, cpu = time.monotonic(), time.process_time()
    record([path], tmp_path / "t", every=0.01, seconds=0.5, cpu=0.2, progress=seen.append)
    used = (time.process_time() - cpu) / (time.monotonic() - begun)
    assert used < 0.4 and len(seen) >= 2


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    (tmp_path / ".file.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: writing"):
        format.replace(tmp_path / "file", memoryview(b"data"))
    assert not (tmp_path / "file").exists() and not (tmp_path / ".file.tmp").is_symlink()


# ---- series ---------------------------------------------------------------------------------------------


def test_series_of_dumps(tmp_path: Path) -> None:
    (tmp_path / "vm1").mkdir()
    images = guests(11, 12)["vm0"]
    for number, image in enumerate(images):
        _, pages, _ = next(iter(image.blocks()))
        pages.tofile(tmp_path / "vm1" / f"dump-{number}.raw")
    found = series([tmp_path / "vm1"])
    assert [Path(path).name for path in found["vm1"]] == [f"dump-{number}.raw" for number in range(12)]
    record(found, tmp_path / "t", every=3600)
    trace = Trace(tmp_path / "t")
    assert trace.duration == 11 * 3600 and trace.metadata.series
    for number in range(12):
        expected = Snapshot.take(ksm.open(found["vm1"][number]))
        assert content(trace.at(number * 3600)[0]) == content(expected)


def test_series_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "dump").write_bytes(bytes(PAGE))
    for given, what in (
        ([tmp_path / "missing"], "No such file"),
        ([tmp_path / "empty"], "no dumps"),
        ([tmp_path / "a", tmp_path / "a"], "another series"),
        ([tmp_path / "a" / "dump"], "Not a directory"),
    ):
        with pytest.raises(ksm.SourceError, match=what):
            series(given)
    assert sorted(["b10", "b9", "a", "10", "9"], key=_natural) == ["9", "10", "a", "b9", "b10"]

"""What may go wrong with a fleet: hostile files, full disks, Ctrl-C, hosts and schedulers that go away."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from ksm.cli import main
from ksm.errors import SourceError, UnsupportedError, WorkersGoneError
from ksm.fleet import Host, Vm, analyze, connect, fingerprint_vm
from ksm.fleet import cluster as cluster_module
from ksm.fleet.files import find, paths, read_range, read_sketches, read_vm, write_pages
from tests.fleets import Cells, connect_when_up, environment, fleet, free_port, pages, wait_for_workers

COMMAND = "import sys; from ksm.cli import main; sys.exit(main())"

root = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0, reason="mounting and users need root on Linux"
)


# ---- hostile files ----------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[pa.Table], pa.Table], **about: Any) -> None:
    """The file, its columns and its metadata changed, written by pyarrow alone."""
    table = parquet.read_table(path)
    said = json.loads(table.schema.metadata[b"ksm.fleet"]) | about
    table = change(table).replace_schema_metadata({b"ksm.fleet": json.dumps(said).encode()})
    parquet.write_table(table, path, row_group_size=50)


def column(name: str, values: Callable[[Any], Any]) -> Callable[[pa.Table], pa.Table]:
    """A table's column, made anew from the old one."""
    return lambda table: table.set_column(table.schema.names.index(name), name, values(table.column(name)))


def same(table: pa.Table) -> pa.Table:
    return table


LIES: dict[str, tuple[Callable[[pa.Table], pa.Table], dict[str, Any], str]] = {
    "negative copies": (
        column("copies", lambda old: pa.array([-1] * len(old), pa.int32())),
        {},
        "a content that no page has",
    ),
    "no copies": (column("copies", lambda old: pa.array([0] * len(old), pa.int32())), {}, "a content that no page has"),
    "copies of another type": (column("copies", lambda old: old.cast(pa.float64())), {}, "float64"),
    "text for words": (column("high", lambda old: old.cast(pa.string())), {}, "damaged"),
    "signed words": (column("low", lambda old: pa.array([1] * len(old), pa.int64())), {}, "int64"),
    "a null": (column("low", lambda old: pa.array([None, *old.to_pylist()[1:]], pa.uint64())), {}, "damaged"),
    "not in order": (lambda table: table.take(list(range(len(table)))[::-1]), {}, "not in order"),
    "a content twice": (lambda table: table.take([0, *range(len(table) - 1)]), {}, "not in order"),
    "a column too few": (lambda table: table.drop_columns(["copies"]), {}, "its columns are high, low"),
    "fewer rows": (lambda table: table.slice(1), {}, "rows, its metadata says"),
    "more pages": (same, {"pages": 10_000}, "its metadata says"),
    "fewer pages": (same, {"pages": 10}, "zero pages and"),
    "no pages": (same, {"pages": -1}, "pages is -1, below 0"),
    "pages without end": (same, {"pages": 10**30, "zero_pages": 10**29}, "above"),
    "pages as text": (same, {"pages": "many"}, "pages is 'many'"),
    "an odd page size": (same, {"page_size": 4095}, "a page size of 4095"),
    "another format": (same, {"format": 2}, "format 2 of `ksm fingerprint`; this version of ksm reads format 1"),
    "a name for terminals": (same, {"name": "\x1b[2Jvm"}, "a name that cannot be printed"),
    "no name": (same, {"name": ""}, "a VM needs a name"),
    "zeros that are none": (same, {"zeros": "perhaps"}, "zeros is 'perhaps'"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_file_is_named_and_left_out(tmp_path: Path, lie: str) -> None:
    change, about, why = LIES[lie]
    fleet(tmp_path, vms=2)
    expected = analyze(tmp_path / "vm0.pages.parquet")
    rewritten(tmp_path / "vm1.pages.parquet", change, **about)
    answer = analyze(tmp_path, ranges=3)
    (left,) = answer.left_out
    assert left.path.endswith("vm1.pages.parquet") and why in left.why and "\n" not in left.why
    assert not answer.complete and answer.total == expected.total


def test_a_file_written_by_others_is_as_good(tmp_path: Path) -> None:
    fleet(tmp_path, vms=2)
    expected = analyze(tmp_path)
    rewritten(tmp_path / "vm1.pages.parquet", same)
    assert analyze(tmp_path) == expected


def test_rows_that_are_not_on_the_disk(tmp_path: Path) -> None:
    """A hundred thousand rows in a few kilobytes would take memory by their number."""
    path = tmp_path / "bomb.pages.parquet"
    number = 100_000
    about = {"format": 1, **Vm(name="bomb", pages=number, contents=number).to_dict()}
    rows = {
        "high": np.zeros(number, np.uint64),
        "low": np.zeros(number, np.uint64),
        "copies": np.ones(number, np.int32),
    }
    table = pa.table(rows).replace_schema_metadata({b"ksm.fleet": json.dumps(about).encode()})
    parquet.write_table(table, path)
    for read in (read_vm, read_range):
        with pytest.raises(SourceError, match=r"bomb.*: damaged: 100000 rows in \d+ bytes"):
            read(path)


def test_damage_anywhere_is_an_error_or_harmless(tmp_path: Path) -> None:
    """Bytes changed at random: what is read is the whole truth, or the file is refused; nothing else is raised."""
    image = pages(5, 1)[0]
    vm = fingerprint_vm(image, tmp_path, Vm(name="a"))
    pages_path, sketch_path = paths(tmp_path, "a")
    truth = read_range(pages_path)
    whole, small = pages_path.read_bytes(), sketch_path.read_bytes()
    random = np.random.default_rng(1)
    refused = 0
    for round in range(150):
        data = bytearray(whole)
        for at in random.integers(0, len(data), 1 + round % 3):
            data[at] ^= int(random.integers(1, 256))
        pages_path.unlink()
        pages_path.write_bytes(data[: int(random.integers(len(data)))] if round % 5 == 0 else data)
        try:
            assert read_vm(pages_path).contents == vm.contents
            assert all(np.array_equal(one, other) for one, other in zip(read_range(pages_path), truth, strict=True))
        except SourceError as error:
            refused += str(error).startswith(str(pages_path)) and "\n" not in str(error)
        torn = bytearray(small)
        torn[int(random.integers(len(torn)))] ^= 0x55
        sketch_path.write_bytes(torn)
        with contextlib.suppress(SourceError):
            list(read_sketches(sketch_path))
    assert refused > 100


def test_what_is_no_file_does_not_hang(tmp_path: Path) -> None:
    fleet(tmp_path, vms=1)
    os.mkfifo(tmp_path / "pipe.pages.parquet")
    (tmp_path / "directory.pages.parquet").mkdir()
    answer = analyze(tmp_path)
    assert {Path(one.path).name: one.why for one in answer.left_out} == {
        "pipe.pages.parquet": "not a regular file",
        "directory.pages.parquet": "not a regular file",
    }


def test_a_host_with_too_few_nodes_or_too_little_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet(tmp_path / "fleet", vms=2)
    hosts = tmp_path / "hosts.yaml"
    hosts.write_text("[{name: h0, nodes: 1}]")
    arguments = ["fleet", "analyze", str(tmp_path / "fleet"), "--single", "--hosts", str(hosts)]
    assert main(arguments) == 2
    assert capsys.readouterr().err == "ksm: host h0 has 1 NUMA nodes, and a VM stands on node 1\n"
    answer = analyze(tmp_path / "fleet", [Host(name="h0", nodes=2, ram=1 << 20)])
    assert any(line.startswith("Host h0 has 1.0 MiB for VMs") for line in answer.assumed)
    assert not any(
        "Host h0" in line for line in analyze(tmp_path / "fleet", [Host(name="h0", nodes=2, ram=1 << 30)]).assumed
    )


# ---- rights and disks -------------------------------------------------------------------------------


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """A directory that everybody can reach."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == os.geteuid() and directory.is_relative_to(tmp_path.parents[2]):
            directory.chmod(0o755)
    return tmp_path


@root
def test_no_permission(shown: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet(shown / "fleet", vms=2)
    raw = shown / "guest.raw"
    raw.write_bytes(b"x" * 8192)
    # what commands import when they run may be installed where nobody can read
    assert main(["fingerprint", str(raw), "-o", str(shown / "first")]) == 0
    assert main(["fleet", "analyze", str(shown / "first"), "--single", "--json", "-o", str(shown / "first")]) == 0
    capsys.readouterr()
    (shown / "fleet" / "vm1.pages.parquet").chmod(0)
    with as_nobody():
        assert main(["fleet", "analyze", str(shown / "fleet"), "--single"]) == 3
        said = capsys.readouterr().err.splitlines()
        assert said[0].endswith("vm1.pages.parquet: left out: Permission denied") and len(said) == 2
        assert main(["fingerprint", str(raw), "-o", str(shown / "fleet")]) == 77
        assert capsys.readouterr().err == f"ksm: {shown}/fleet/guest.raw.pages.parquet: Permission denied\n"
        assert main(["fingerprint", str(raw), "-o", str(shown / "new")]) == 77
        assert capsys.readouterr().err == f"ksm: {shown}/new: Permission denied\n"
        assert main(["fleet", "analyze", str(shown / "fleet" / "vm0.pages.parquet"), "--single", "--json", "-o",
                     str(shown / "tables")]) == 77  # fmt: skip
    answer = capsys.readouterr()
    assert json.loads(answer.out)["complete"] and answer.err == f"ksm: {shown}/tables: Permission denied\n"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts disks of so many KiB."""
    mounted: list[Path] = []

    def make(kib: int) -> Path:
        where = tmp_path / f"disk{len(mounted)}"
        where.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(where)], check=True)
        mounted.append(where)
        return where

    yield make
    for where in mounted:
        subprocess.run(["umount", "-l", str(where)], check=True)


@root
def test_a_disk_that_fills_up_while_fingerprinting(
    tmp_path: Path, small: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sources = []
    for name, number in (("a", 100), ("b", 9000), ("c", 10)):
        words = np.random.default_rng(number).integers(0, 256, (number, 4096), dtype=np.uint8)
        words.tofile(tmp_path / f"{name}.raw")
        sources.append(f"{name}={tmp_path}/{name}.raw")
    disk = small(128)
    assert main(["fingerprint", *sources, "-o", str(disk), "--json"]) == 74
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == f"ksm: {disk}/b.pages.parquet: No space left on device"
    assert [vm["name"] for vm in json.loads(said.out)["vms"]] == ["a"]
    assert json.loads(said.out)["failed"] == {"c": "not read"}
    assert {path.name for path in disk.iterdir()} == {"a.pages.parquet", "a.sketch.parquet"}
    assert analyze(disk).complete


@root
def test_a_sketch_that_does_not_fit_leaves_no_pages(tmp_path: Path, small: Callable[[int], Path]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (9000, 4096), dtype=np.uint8)
    fingerprint_vm(image, tmp_path, Vm(name="a"))
    pages_path, sketch_path = (path.stat().st_size for path in paths(tmp_path, "a"))
    disk = small((pages_path + sketch_path // 2) // 1024)
    with pytest.raises(OSError, match=r"a\.(pages|sketch)\.parquet"):
        fingerprint_vm(image, disk, Vm(name="a"))
    assert not list(disk.iterdir())


@root
def test_a_disk_that_fills_up_while_tables_are_written(
    tmp_path: Path, small: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fleet(tmp_path / "fleet")
    disk = small(24)
    assert main(["fleet", "analyze", str(tmp_path / "fleet"), "--single", "--json", "-o", str(disk)]) == 74
    said = capsys.readouterr()
    assert json.loads(said.out)["complete"]  # what was counted is not lost
    assert len(said.err.splitlines()) == 1 and said.err.endswith(": No space left on device\n")
    there = list(disk.iterdir())
    assert there and not [path for path in there if path.name.startswith(".")]
    assert len(parquet.read_table(disk / "hosts.parquet")) == 3


# ---- Ctrl-C -----------------------------------------------------------------------------------------


def started(*arguments: str, directory: Path) -> subprocess.Popen[str]:
    """The command in a session of its own, with its own place for temporary files."""
    directory.mkdir()
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=directory,  # not where the source tree would be imported
        env=environment() | {"TMPDIR": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def session(leader: int) -> list[int]:
    """The processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            about = path.read_text().rpartition(")")[2].split()
            if int(about[3]) == leader and about[0] != "Z":
                found.append(int(path.parent.name))
    return found


def until(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def command() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []

    def run(*arguments: str, directory: Path) -> subprocess.Popen[str]:
        running.append(started(*arguments, directory=directory))
        return running[-1]

    yield run
    for process in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def interrupted(process: subprocess.Popen[str]) -> None:
    """As Ctrl-C in a terminal: the whole group gets the signal."""
    os.killpg(process.pid, signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, said, errors) == (130, "", "ksm: interrupted\n")
    until(lambda: not session(process.pid), 10)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


@linux
def test_interrupted_fingerprinting(tmp_path: Path, command: Any) -> None:
    pages(1, 1)[0].tofile(tmp_path / "guest.raw")
    sources = [f"vm{index}={tmp_path}/guest.raw" for index in range(3000)]
    where = tmp_path / "fleet"
    process = command("fingerprint", *sources, "-o", str(where), directory=tmp_path / "own")
    until(lambda: (where / "vm3.sketch.parquet").exists())
    interrupted(process)
    names = {path.name for path in where.iterdir()}
    assert not [name for name in names if name.startswith(".")]
    number = len(find([where], ".pages.parquet"))
    assert 3 < number < 3000 and len(names) == 2 * number  # both files of each
    assert analyze(where).total.vms == number and not list((tmp_path / "own").iterdir())


@linux
def test_interrupted_on_a_local_cluster(tmp_path: Path, command: Any) -> None:
    fleet(tmp_path / "fleet")
    process = command(
        "fleet", "analyze", str(tmp_path / "fleet"), "--workers", "2", "--ranges", "100000", directory=tmp_path / "own"
    )
    until(lambda: len(session(process.pid)) >= 3)
    time.sleep(3)  # they count
    assert process.poll() is None and list((tmp_path / "own").iterdir())
    interrupted(process)
    assert not list((tmp_path / "own").iterdir())


@linux
def test_interrupted_on_a_cluster_of_others(tmp_path: Path, command: Any) -> None:
    fleet(tmp_path / "fleet")
    cells = Cells(tmp_path)
    address = f"tcp://127.0.0.1:{(port := free_port())}"
    try:
        cells.scheduler("127.0.0.1", port)
        cells.worker(address)
        with connect_when_up(address) as client:
            arguments = ("fleet", "analyze", str(tmp_path / "fleet"), "--scheduler", address, "--ranges", "100000")
            process = command(*arguments, directory=tmp_path / "own")
            until(lambda: any(client.processing().values()))
            interrupted(process)
            until(lambda: not any(client.processing().values()), 10)
            assert analyze(tmp_path / "fleet", client=client) == analyze(tmp_path / "fleet", ranges=2)  # it still works
    finally:
        cells.end()
    assert not list((tmp_path / "own").iterdir())


@linux
def test_an_interrupt_before_dask_has_begun_says_nothing_else(tmp_path: Path) -> None:
    """Its event loop then cancels what it has not started, and would log the traceback."""
    cells = Cells(tmp_path)
    address = f"tcp://127.0.0.1:{(port := free_port())}"
    try:
        cells.scheduler("127.0.0.1", port)
        cells.worker(address)
        with connect_when_up(address):
            pass
        # A process of its own: a signal that comes at another time would end these tests.
        done = subprocess.run(
            [sys.executable, "-c", EARLY, address],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        cells.end()
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n3\n", "")


EARLY = """
import os, signal, sys, threading
from ksm.fleet import connect

signal.signal(signal.SIGINT, signal.default_int_handler)
with connect(sys.argv[1]) as client:
    busy, over = threading.Event(), threading.Event()

    def hold() -> None:
        busy.set()
        over.wait()

    client.loop.add_callback(hold)
    busy.wait()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        client.scheduler_info()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    over.set()
    print(client.submit(sum, [1, 2]).result())
"""


# ---- clusters that lose parts -----------------------------------------------------------------------


def test_a_worker_of_another_version(tmp_path: Path) -> None:
    """A real worker whose environment says that its ksm is another."""
    other = tmp_path / "other" / "ksm-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: ksm\nVersion: 0.0.1\n")
    cells = Cells(tmp_path)
    address = f"tcp://127.0.0.1:{(port := free_port())}"
    try:
        cells.scheduler("127.0.0.1", port)
        cells.worker(address)
        with connect_when_up(address) as client:
            cells.worker(address, search=str(other.parent))
            wait_for_workers(client, 2)
            expected = r"worker tcp://127\S+ has ksm 0\.0\.1, and this is ksm"
            with pytest.raises(UnsupportedError, match=expected), connect(address):
                pass
    finally:
        cells.end()


@root
def test_a_host_goes_away_with_its_files(tmp_path: Path) -> None:
    """Two hosts with disks of their own; one dies half-way, and what only it had is named and left out."""
    everything = tmp_path / "all"
    fleet(everything)
    seen = tmp_path / "seen"
    seen.mkdir()
    cells = Cells(tmp_path)
    address = f"tcp://127.0.0.1:{(port := free_port())}"
    try:
        cells.scheduler("127.0.0.1", port)
        workers = []
        for index in range(2):
            own = tmp_path / f"disk{index}"
            own.mkdir()
            for number in range(3 * index, 3 * index + 3):
                shutil.copy(everything / f"vm{number}.pages.parquet", own)
            inside = ("unshare", "-m", "sh", "-c", f'mount --bind "{own}" "{seen}" && exec "$@"', "sh")
            workers.append(cells.worker(address, "--host", f"127.0.0.{index + 2}", inside=inside))
        with connect_when_up(address) as client:
            wait_for_workers(client, 2)
            assert dataclasses.replace(analyze(seen, client=client), left_out=()).total == analyze(everything).total

            def kill(done: int, of: int) -> None:
                if done == 3:
                    workers[1].kill()
                    workers[1].wait()

            answer = analyze(seen, client=client, ranges=40, progress=kill)
    finally:
        cells.end()
    assert {(Path(one.path).name, one.why) for one in answer.left_out} == {
        (f"vm{number}.pages.parquet", "no worker is left on 127.0.0.3") for number in (3, 4, 5)
    }
    assert not answer.complete
    assert answer.total == analyze([everything / f"vm{number}.pages.parquet" for number in range(3)]).total


def test_a_result_that_goes_with_its_host_is_not_waited_for(tmp_path: Path) -> None:
    """Done, and lost before it was fetched: another worker makes it again, or none can."""
    cells = Cells(tmp_path)
    address = f"tcp://127.0.0.1:{(port := free_port())}"
    try:
        cells.scheduler("127.0.0.1", port)
        workers = [cells.worker(address, "--host", f"127.0.0.{index + 2}") for index in range(2)]
        with connect_when_up(address) as client:
            wait_for_workers(client, 2)
            there = {"workers": ["127.0.0.3"], "pure": False}
            bound = client.submit(len, "abc", **there)
            free = client.submit(len, "abcd", **there, allow_other_workers=True)
            cluster_module.first_done(client, [bound])
            cluster_module.first_done(client, [free])
            workers[1].kill()
            workers[1].wait()
            until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == 1)
            assert cluster_module.result(client, free, [("127.0.0.2", "127.0.0.3")]) == 4
            with pytest.raises(WorkersGoneError, match=r"no worker is left on 127\.0\.0\.3"):
                cluster_module.result(client, bound, [("127.0.0.3",)])
    finally:
        cells.end()


def test_images_are_fingerprinted_where_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files are those that this process would write; when the scheduler dies, what was written stays whole."""
    for index, image in enumerate(pages(1, 2)):
        image.tofile(tmp_path / f"guest{index}.raw")
    cells = Cells(tmp_path)
    address = f"tcp://127.0.0.1:{(port := free_port())}"
    sources = [f"vm{index}={tmp_path}/guest{index}.raw" for index in range(2)]
    there, here = str(tmp_path / "there"), str(tmp_path / "here")
    try:
        scheduler = cells.scheduler("127.0.0.1", port)
        cells.worker(address)
        with connect_when_up(address):
            pass
        assert (
            main(["fingerprint", *sources, "gone=/nowhere.raw", "-o", there, "--host", "h", "--scheduler", address])
            == 65
        )
        assert capsys.readouterr().err == "ksm: gone: /nowhere.raw: no worker has it\n"
        assert main(["fingerprint", *sources, "-o", here, "--host", "h"]) == 0
        one, other = analyze(there), analyze(here)
        assert one == other and one.total.vms == 2
        many = [f"more{index}={tmp_path}/guest0.raw" for index in range(500)]
        capsys.readouterr()
        process = started(
            "fingerprint", *many, "-o", there, "--scheduler", address, "--json", directory=tmp_path / "own"
        )
        until(lambda: len(list(Path(there).iterdir())) > 8)
        scheduler.kill()
        said, errors = process.communicate(timeout=60)
    finally:
        cells.end()
    assert process.returncode == 75 and "the scheduler went away" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    answer = json.loads(said)
    assert len(answer["vms"]) + len(answer["failed"]) == 500 and answer["failed"]
    left = [path for path in Path(there).iterdir() if path.name.startswith(".")]
    assert len(left) <= 2  # of the one that the worker was killed in, by this test
    assert analyze(there).complete


def test_a_key_does_not_travel_in_the_clear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_bytes(bytes(range(32)))
    (tmp_path / "key").chmod(0o600)
    arguments = ["fingerprint", "x.raw", "-o", str(tmp_path), "--key-file", str(tmp_path / "key")]
    assert main([*arguments, "--scheduler", "tcp://10.0.0.1:8786"]) == 2
    assert "--key-file needs tls://" in capsys.readouterr().err


# ---- read without us --------------------------------------------------------------------------------


def test_files_are_read_without_ksm(tmp_path: Path) -> None:
    """docs/fleet.md describes the files: pyarrow and datasketches alone find what `analyze` finds."""
    fleet(tmp_path, vms=2, per_host=2)
    found = analyze(tmp_path)
    script = f"""
import glob, json, sys
import datasketches
import pyarrow
import pyarrow.parquet as parquet

union, about, tables = datasketches.theta_union(12), [], []
for path in sorted(glob.glob({str(tmp_path / "*.pages.parquet")!r})):
    about.append(json.loads(parquet.read_schema(path).metadata[b"ksm.fleet"]))
    tables.append(parquet.read_table(path).replace_schema_metadata())
for path in glob.glob({str(tmp_path / "*.sketch.parquet")!r}):
    for row in parquet.read_table(path).to_pylist():
        union.update(datasketches.compact_theta_sketch.deserialize(row["sketch"]))
counted = pyarrow.concat_tables(tables).group_by(["high", "low"]).aggregate([("copies", "sum"), ("copies", "count")])
copies, files = (counted[name].to_pylist() for name in ("copies_sum", "copies_count"))
figures = len(copies), sum(copies), sum(copies) - len(copies), sum(each > 1 for each in files)
assert not [name for name in sys.modules if name.split(".")[0] == "ksm"]
print(json.dumps([about, figures, union.get_result().get_estimate()]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    about, (contents, number, saved, common), estimate = json.loads(done.stdout)
    assert contents == found.contents == estimate
    assert number + sum(vm["zero_pages"] for vm in about) == found.total.pages
    assert saved == found.total.pages_sharing - found.total.saved_zero
    assert common == next(row["contents"] for row in found.host_pairs or ())
    for vm in about:
        assert (vm["format"], vm["host"], vm["zeros"], vm["key_id"], vm["page_size"]) == (1, "h0", "touched", "", 4096)
        assert {"name", "class", "node", "ram", "tags", "taken", "id", "pages", "contents"} <= set(vm)


def test_contents_written_in_any_order_are_sorted(tmp_path: Path) -> None:
    words = np.random.default_rng(1).integers(0, 2**64, (1000, 2), dtype=np.uint64)
    write_pages(tmp_path / "a.pages.parquet", Vm(name="a", pages=1000, contents=1000), words, np.ones(1000, np.int64))
    high, low, _ = read_range(tmp_path / "a.pages.parquet")
    assert sorted(map(tuple, words.tolist())) == list(zip(high.tolist(), low.tolist(), strict=True))

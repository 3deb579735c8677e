"""`ksm fingerprint` and `ksm fleet` as a hostile user would call them: one clear line, an exit code, and no hang."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ksm.cli import main
from ksm.errors import SchedulerLostError
from ksm.fleet import Host, Vm, analyze, fingerprint_vm, read_hosts
from ksm.fleet.cluster import connect
from ksm.fleet.files import paths, read_sketches, write_vm
from ksm.fleet.sketch import sketch
from tests.fleets import fleet

Said = Callable[..., tuple[int, str]]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """The exit code of a command, and its one line on stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        code = main([str(argument) for argument in arguments])
        lines = capsys.readouterr().err.splitlines()
        assert lines and not any("Traceback" in line for line in lines)
        return code, lines[-1]

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hostile")
    fleet(directory, vms=2)
    return directory


# ---- schedulers that are none -----------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Callable[[bytes], str]]:
    """A server that says what it is given to whoever connects, and nothing more."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        peers = []

        def start(greeting: bytes) -> str:
            def serve() -> None:
                while True:
                    try:
                        peer, _ = listening.accept()
                    except OSError:
                        return
                    peers.append(peer)
                    peer.sendall(greeting)

            threading.Thread(target=serve, daemon=True).start()
            return f"tcp://127.0.0.1:{listening.getsockname()[1]}"

        yield start
        for peer in peers:
            peer.close()
        listening.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("greeting", [b"", b"220", b"HTTP/1.0 400 Bad request\r\n\r\n"])
def test_a_server_that_is_no_scheduler(server: Callable[[bytes], str], greeting: bytes) -> None:
    """A silent one would be waited for for ever; another's first bytes would be taken for the length of a message."""
    began = time.monotonic()
    with pytest.raises(SchedulerLostError, match=r"127\.0\.0\.1:\d+: no scheduler answers"):  # noqa: SIM117
        with connect(server(greeting), seconds=1):
            pass
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "address", ["", "127.0.0.1:8786", "tcp://", "tcp://host", "tcp://:1", "tcp://h:99999", "tcp://h:x", "http://h:1"]
)
def test_addresses_that_are_none(said: Said, files: Path, address: str) -> None:
    assert said("fleet", "analyze", files, "--scheduler", address) == (
        2,
        f"ksm: {address!r} is not the address of a scheduler, such as tcp://10.0.0.1:8786",
    )


def test_a_name_that_nobody_has(said: Said, files: Path) -> None:
    code, line = said("fleet", "analyze", files, "--scheduler", "tcp://no-such-host.invalid:1")
    assert code == 75 and "tcp://no-such-host.invalid:1: no scheduler answers" in line


# ---- hosts ------------------------------------------------------------------------------------------

HOSTS = {
    "": "not a list of hosts",
    "[]": "not a list of hosts",
    "[1]": "1 is not a host",
    "{a: 5}": "5 is not a host",
    "[{ram: 8M}]": "a host without a name: {'ram': '8M'}",
    "[{name: a, ram: -8M}]": "'-8M' is not a size",
    "[{name: a, ram: .nan}]": "nan is not a size",
    "[{name: a, ram: 99999999999999T}]": "above 4503599627370496",
    "[{name: a, ram: 8M, nodes: 0}]": "host a: nodes is 0",
    "[{name: a, ram: 8M, nodes: 1000000000}]": "host a: nodes is 1000000000",
    "[{name: a, ram: 8M, vcpus: 99999999999999999999}]": "above 4503599627370496",
    "[{name: a, ram: 8M, count: 100000000000}]": "count is 100000000000",
    "[{name: a, ram: 8M}, {name: a, ram: 8M}]": "a is there twice",
    "[{name: a, ram: 8M, bogus: 1}]": "'bogus' is not known of a host",
    '[{name: "a\\e[2J", ram: 8M}]': "a name that cannot be printed",
    "!!python/object/apply:os.getpid []": "neither YAML nor JSON",
    "[" * 5000: "neither YAML nor JSON",
}


@pytest.mark.parametrize("text", HOSTS, ids=lambda text: text[:40])
def test_hosts_that_are_none(said: Said, files: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "hosts.yaml").write_text(text)
    code, line = said("fleet", "place", files, "--hosts", tmp_path / "hosts.yaml")
    assert code == 65 and HOSTS[text] in line and line.startswith(f"ksm: {tmp_path}/hosts.yaml: ")


def test_hosts_without_ram_can_be_analysed_and_not_filled(said: Said, files: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts.yaml").write_text("{a: {ram: 8M}, b: {}}")
    assert read_hosts(tmp_path / "hosts.yaml")[1] == Host(name="b")
    assert said("fleet", "place", files, "--hosts", tmp_path / "hosts.yaml") == (
        2,
        "ksm: placement needs hosts with RAM: b has none",
    )


# ---- names and paths --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["..", ".hidden", "../up", "a/b", "%2E", "ü", "con ( ),=:@+"])
def test_names_that_are_paths_or_hidden(tmp_path: Path, name: str) -> None:
    """No name leaves the directory, and none makes a file that is then not found."""
    fingerprint_vm(b"x" * 4096, tmp_path / "fleet", Vm(name=name))
    assert [vm["name"] for vm in analyze(tmp_path / "fleet").vms] == [name]
    assert {path.parent for path in paths(tmp_path / "fleet", name)} == {tmp_path / "fleet"}
    assert [path.name for path in tmp_path.iterdir()] == ["fleet"]


def test_a_name_that_is_too_long_stops_no_other(said: Said, tmp_path: Path) -> None:
    raw = tmp_path / "guest.raw"
    raw.write_bytes(b"x" * 4096)
    code, line = said("fingerprint", f"{'n' * 250}={raw}", f"fine={raw}", "-o", tmp_path / "fleet")
    assert code == 65 and "File name too long" in line
    assert sorted(path.name for path in (tmp_path / "fleet").iterdir()) == ["fine.pages.parquet", "fine.sketch.parquet"]


def test_a_process_that_is_not_there_stops_no_other(said: Said, tmp_path: Path) -> None:
    raw = tmp_path / "guest.raw"
    raw.write_bytes(b"x" * 4096)
    code, line = said("fingerprint", "pid:999999999", f"fine={raw}", "-o", tmp_path / "fleet")
    assert code == 65 and "no such process" in line and len(list((tmp_path / "fleet").iterdir())) == 2


def test_loops_pipes_and_empty_files(said: Said, files: Path, tmp_path: Path) -> None:
    for ending in ("pages", "sketch"):
        (tmp_path / f"empty.{ending}.parquet").write_bytes(b"")
        (tmp_path / f"loop.{ending}.parquet").symlink_to(tmp_path / f"loop.{ending}.parquet")
        (tmp_path / f"self.{ending}.parquet").symlink_to(tmp_path)
        os.mkfifo(tmp_path / f"pipe.{ending}.parquet")
    whole = files / "vm0.pages.parquet"
    answer = analyze([tmp_path, whole])
    assert {Path(one.path).name.split(".")[0]: one.why for one in answer.left_out} == {
        "empty": "damaged, or no file of ksm: Parquet file size is 0 bytes",
        "loop": "Too many levels of symbolic links",
        "self": "not a regular file",
        "pipe": "not a regular file",
    }
    assert not answer.complete and answer.total == analyze(whole).total
    (tmp_path / "hosts.yaml").write_text("[{name: a, ram: 80M}]")
    code, line = said("fleet", "place", tmp_path, "--hosts", tmp_path / "hosts.yaml")
    assert code == 65 and ".sketch.parquet: " in line


def test_the_other_file_of_a_vm(said: Said, files: Path, tmp_path: Path) -> None:
    code, line = said("fleet", "analyze", "--single", files / "vm0.sketch.parquet")
    assert code == 65 and "its columns are name, class," in line
    (tmp_path / "hosts.yaml").write_text("[{name: a, ram: 80M}]")
    code, line = said("fleet", "place", files / "vm0.pages.parquet", "--hosts", tmp_path / "hosts.yaml")
    assert code == 65 and "it has no column `sketch`" in line


def test_a_vm_that_is_there_twice_is_not_placed(said: Said, files: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.sketch.parquet"
    copy.write_bytes((files / "vm0.sketch.parquet").read_bytes())
    (tmp_path / "hosts.yaml").write_text("[{name: a, ram: 80M}]")
    code, line = said("fleet", "place", files, copy, "--hosts", tmp_path / "hosts.yaml")
    assert code == 65 and "vm0 is there twice, in " in line and str(copy) in line


# ---- sketches that lie ------------------------------------------------------------------------------


def patched(at: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + value + data[at + len(value) :]


def seeded(number: int) -> Callable[[bytes], bytes]:
    """So many contents under another seed of DataSketches."""

    def make(_: bytes) -> bytes:
        import datasketches

        other = datasketches.update_theta_sketch(12, seed=123)
        for value in range(number):
            other.update(value)
        return bytes(other.compact().serialize())

    return make


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda data: b"", "not a theta sketch"),
    "three bytes": (lambda data: data[:3], "not a theta sketch"),
    "truncated": (lambda data: data[:-8], "not a theta sketch"),
    "more than there is": (patched(8, (2**31).to_bytes(4, "little")), "not a theta sketch"),
    "another family": (patched(2, b"\x07"), "not a theta sketch"),
    "another seed": (seeded(20_000), "seed hash mismatch"),
    "another seed, few contents": (seeded(100), "seed hash mismatch"),
    "out of order": (lambda data: data[:24] + data[32:40] + data[24:32] + data[40:], "not in order"),
    "a hash twice": (lambda data: data[:24] + data[32:40] + data[32:], "not in order"),
    "a hash above the threshold": (lambda data: data[:-8] + bytes([255] * 7) + b"\x7f", "not in order"),
    "a threshold of 0": (patched(16, bytes(8)), "not in order"),
    "another threshold": (patched(16, (2**63 - 2**40).to_bytes(8, "little")), "a sketch of about"),
}


def sketch_file(path: Path, **about: object) -> None:
    """The one row of a file, some of it changed."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    (row,) = table.to_pylist()
    parquet.write_table(pa.Table.from_pylist([row | about]).replace_schema_metadata(table.schema.metadata), path)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two VMs of 10,000 contents, and a host for them."""
    words = np.random.default_rng(1).integers(0, 2**64, (10_000, 2), dtype=np.uint64)
    for name in ("a", "b"):
        vm = Vm(name=name, host="h", ram=40 << 20, pages=10_000, contents=10_000)
        write_vm(tmp_path, vm, words, np.ones(10_000, np.int64), sketch(words))
    (tmp_path / "hosts.yaml").write_text("[{name: h, ram: 80M}]")
    return tmp_path


@pytest.mark.parametrize("how", BROKEN)
def test_a_sketch_that_is_none(said: Said, two: Path, how: str) -> None:
    change, why = BROKEN[how]
    ((_, data),) = read_sketches(two / "b.sketch.parquet")
    sketch_file(two / "b.sketch.parquet", sketch=change(data))
    code, line = said("fleet", "place", two, "--hosts", two / "hosts.yaml")
    assert code == 65 and line.startswith(f"ksm: {two}/b.sketch.parquet: b: ") and why in line


@pytest.mark.parametrize(
    ("about", "why"),
    [
        ({"ram": -5}, "ram is -5, below 0"),
        ({"ram": float("nan")}, "ram is nan"),
        ({"vcpus": 2**62}, "above"),
        ({"contents": 1}, "a sketch of about"),
        ({"zero_pages": 1}, "1 zero pages and 10000 contents in 10000"),
        ({"name": None}, "a VM without a name"),
        ({"name": "b\nc"}, "cannot be printed"),
        ({"tags": "{"}, "damaged"),
        ({"tags": "[1]"}, "tags is [1]"),
        ({"sketch": None}, "a row without a sketch"),
        ({"page_size": 16384}, "page_size differs: 16384, 4096"),
        ({"key_id": "abc"}, "key_id differs: none, abc"),
    ],
    ids=str,
)
def test_a_sketch_whose_metadata_lies(said: Said, two: Path, about: dict[str, object], why: str) -> None:
    sketch_file(two / "b.sketch.parquet", **about)
    code, line = said("fleet", "place", two, "--hosts", two / "hosts.yaml")
    assert code == 65 and why in line


def test_sketches_that_do_not_lie(said: Said, two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fleet", "place", str(two), "--hosts", str(two / "hosts.yaml")]) == 0
    assert capsys.readouterr().err == ""


# ---- constraints that contradict each other ---------------------------------------------------------


@pytest.mark.parametrize(
    ("hosts", "options", "vm", "why"),
    [
        ("[{name: h, ram: 39M}]", (), {}, "more than any NUMA node of any host has"),
        ("[{name: h, ram: 79M}]", (), {}, "the VMs need 83,886,080 bytes"),
        ("[{name: h, ram: 80M, vcpus: 1}]", (), {}, "the VMs need 2 vCPUs, and the hosts have 1"),
        ("[{name: h, ram: 80M}]", (), {"apart": "x"}, "anti-affinity 'x' keeps 2 VMs on hosts of their own"),
        ("[{name: h, ram: 80M}]", (), {"domain": None}, "2 security domains need as many places"),
        ("[{name: i, ram: 80M}]", (), {"pinned": True}, "a is pinned to host 'h', node 0, which is not among"),
        ("[{name: h, ram: 79M},{name: i, ram: 80M}]", (), {"pinned": True}, "b is pinned to host h, which its RAM"),
        ("[{name: h, ram: 79M},{name: i, ram: 80M}]", ("--migrations", "0"), {}, "1 VMs have to move"),
    ],
)  # fmt: skip
def test_constraints_that_contradict_each_other(
    said: Said, two: Path, hosts: str, options: tuple[str, ...], vm: dict[str, object], why: str
) -> None:
    (two / "hosts.yaml").write_text(hosts)
    for name in ("a", "b"):
        about = {key: name if value is None else value for key, value in vm.items()}
        sketch_file(two / f"{name}.sketch.parquet", **about)
    code, line = said("fleet", "place", two, "--hosts", two / "hosts.yaml", *options)
    assert code == 65 and why in line


# ---- keys -------------------------------------------------------------------------------------------


def test_a_fleet_under_a_key(said: Said, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From images to moves under a key; another key, no key where one is, and plain files beside are told."""
    for name, seed in (("key", 0), ("other", 1)):
        (tmp_path / name).write_bytes(bytes(range(seed, seed + 32)))
        (tmp_path / name).chmod(0o600)
    raw = tmp_path / "guest.raw"
    raw.write_bytes(np.random.default_rng(1).bytes(4096 * 50))
    keyed, plain = tmp_path / "keyed", tmp_path / "plain"
    options = ["--json", "--host", "h"]
    for name in ("a", "b"):
        key = ["--key-file", str(tmp_path / "key")]
        assert main(["fingerprint", f"{name}={raw}", "-o", str(keyed), *key, *options]) == 0
    assert main(["fingerprint", f"c={raw}", "-o", str(plain), *options]) == 0
    capsys.readouterr()
    assert main(["fleet", "analyze", "--single", str(keyed), "--key-file", str(tmp_path / "key"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["pages_sharing"] == 50
    code, line = said("fleet", "analyze", "--single", keyed, "--key-file", tmp_path / "other")
    assert code == 65 and "the key has id" in line
    code, line = said("fleet", "analyze", "--single", keyed, plain)
    assert code == 65 and "keys differ" in line and "none in" in line
    (tmp_path / "hosts.yaml").write_text("[{name: h, ram: 80M}]")
    code, line = said("fleet", "place", keyed, plain, "--hosts", tmp_path / "hosts.yaml")
    assert code == 65 and "key_id differs" in line
    assert main(["fleet", "place", str(keyed), "--hosts", str(tmp_path / "hosts.yaml")]) == 0

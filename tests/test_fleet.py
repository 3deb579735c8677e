"""Fingerprint files and the analysis: equal from everywhere, equal to the estimate, and no damage unnoticed."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ksm
from ksm.errors import SchedulerLostError, SourceError, UnsupportedError
from ksm.fleet import Host, Vm, analyze, connect, fingerprint_vm, local
from ksm.fleet import cluster as cluster_module
from ksm.fleet.files import find, paths, read_range, read_sketches, read_vm
from ksm.keyed import Key
from tests.fleets import Cells, connect_when_up, fleet, free_port, pages, wait_for_workers

KEY = Key.from_bytes(bytes(range(32)))


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with local(2) as found:
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fleet")
    fleet(directory)
    return directory


def same(one: Any, other: Any) -> None:
    """All figures; how the work was cut is not one."""
    a, b = one.to_dict(), other.to_dict()
    for name in ("ranges", "ranges_counted"):
        del a[name], b[name]
    assert a == b


# ---- files ------------------------------------------------------------------------------------------


def test_files_hold_what_the_pages_are(tmp_path: Path) -> None:
    image = pages(3)[0]
    written = fingerprint_vm(image, tmp_path, Vm(name="a/b", kind="web", tags={"os": "linux"}, ram=1 << 30))
    pages_path, sketch_path = paths(tmp_path, "a/b")
    assert read_vm(pages_path) == written
    prints = ksm.fingerprint(image)
    contents, copies = prints[~prints.zeros()].unique()
    high, low, n = read_range(pages_path)
    assert sorted(zip(*contents.words.T.tolist(), copies.tolist(), strict=True)) == list(
        zip(high.tolist(), low.tolist(), n.tolist(), strict=True)
    )
    assert written.zero_pages == int(prints.zeros().sum()) and written.pages == len(image)
    ((vm, sketch),) = read_sketches(sketch_path)
    assert vm == written
    import datasketches

    assert datasketches.compact_theta_sketch.deserialize(sketch).get_estimate() == len(contents)


def test_files_are_readable_without_us(tmp_path: Path) -> None:
    import json

    import pandas

    fleet(tmp_path, vms=1)
    frame = pandas.read_parquet(tmp_path / "vm0.pages.parquet")
    vm = read_vm(tmp_path / "vm0.pages.parquet")
    assert list(frame.columns) == ["high", "low", "copies"] and frame["copies"].sum() == vm.pages - vm.zero_pages
    assert frame["high"].is_monotonic_increasing
    import pyarrow.parquet

    about = json.loads(pyarrow.parquet.read_schema(tmp_path / "vm0.pages.parquet").metadata[b"ksm.fleet"])
    assert about["format"] == 1 and about["class"] == "k0" and about["zeros"] == "touched"


@pytest.mark.parametrize("parts", [1, 3, 64])
def test_ranges_make_up_the_whole(files: Path, parts: int) -> None:
    path = find([files], ".pages.parquet")[0]
    whole = read_range(path)
    edges = [(1 << 64) * i // parts for i in range(parts + 1)]
    some = [read_range(path, first, last - 1) for first, last in itertools.pairwise(edges)]
    for column, joined in zip(whole, zip(*some, strict=True), strict=True):
        assert np.array_equal(column, np.concatenate(joined))


def test_a_range_reads_only_its_row_groups(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    words = random.integers(0, 2**64, (100_000, 2), dtype=np.uint64)
    from ksm.fleet.files import write_pages

    path = tmp_path / "big.pages.parquet"
    write_pages(path, Vm(name="big", pages=100_000, contents=100_000), words, np.ones(100_000, np.int64))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)  # damage the middle
    path.write_bytes(data)
    assert len(read_range(path, 0, 1 << 60)[0]) == int((words[:, 0] <= 1 << 60).sum())
    with pytest.raises(SourceError, match="damaged"):
        read_range(path)


def test_a_key_hides_and_keeps_equality(tmp_path: Path) -> None:
    fleet(tmp_path / "plain")
    fleet(tmp_path / "keyed", key=KEY)
    plain, keyed = analyze(tmp_path / "plain"), analyze(tmp_path / "keyed", key=KEY)
    assert plain.total == keyed.total and plain.one_host == keyed.one_host
    assert plain.known == keyed.known and keyed.known[2]["contents"] == 1  # 0xaa, named under the key
    assert keyed.key_id == KEY.id
    blind = analyze(tmp_path / "keyed")
    assert blind.known[2]["contents"] == 0 and blind.total == keyed.total
    one, other = (set(read_range(tmp_path / kind / "vm0.pages.parquet")[0].tolist()) for kind in ("plain", "keyed"))
    assert not one & other
    with pytest.raises(SourceError, match=f"the key has id {KEY.id}, and the fleet was fingerprinted with none"):
        analyze(tmp_path / "plain", key=KEY)


def test_zeros_of_dumps(tmp_path: Path) -> None:
    raw = tmp_path / "dump.raw"
    raw.write_bytes(bytes(4096 * 7) + b"x" * 4096)
    merge = fingerprint_vm(str(raw), tmp_path, Vm(name="merge"))
    absent = fingerprint_vm(str(raw), tmp_path, Vm(name="absent", zeros="absent"))
    assert (merge.zeros, merge.pages, merge.zero_pages, merge.zero_or_untouched) == ("merge", 8, 7, 7)
    assert (absent.zeros, absent.pages, absent.zero_pages, absent.zero_or_untouched) == ("absent", 1, 0, 7)
    said = " ".join(analyze(tmp_path).assumed)
    assert "7 all-zero pages of dumps are zero or never touched: they are counted" in said
    assert "7 all-zero pages of dumps are zero or never touched: they are left out" in said


# ---- the analysis says what the estimate says -------------------------------------------------------

SETTLED = ("pages", "zero_pages", "pages_shared", "pages_sharing", "pages_unshared", "ksm_zero_pages", "saved_bytes",
           "stable_node_chains", "stable_node_dups", "metadata_bytes", "general_profit")  # fmt: skip


def settled(row: Any) -> dict[str, int]:
    return {name: getattr(row, name) for name in SETTLED}


@pytest.mark.parametrize("limit", [2, 3, 256])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("across", [True, False])
def test_as_the_estimate(tmp_path: Path, limit: int, zero: bool, across: bool) -> None:
    images = fleet(tmp_path, seed=limit, vms=8, per_host=4)
    tunables: dict[str, Any] = {"max_page_sharing": limit, "use_zero_pages": zero, "merge_across_nodes": across}
    hosts = [Host(name=f"h{index}", nodes=2, **tunables) for index in range(2)]
    answer = analyze(tmp_path, hosts, ranges=5, one_host=Host(name="one", max_page_sharing=limit, use_zero_pages=zero))
    for index in range(2):
        expected = ksm.estimate(images[4 * index : 4 * index + 4], nodes=[0, 1, 0, 1], **tunables)
        assert settled(answer.hosts[index]) == settled(expected)
    expected = ksm.estimate(images, max_page_sharing=limit, use_zero_pages=zero)
    assert settled(answer.one_host) == settled(expected)
    for row in (*answer.hosts, answer.total, answer.one_host):
        parts = row.saved_zero + row.saved_within_vms + row.saved_between_vms + row.saved_between_classes
        assert (parts - row.lost_to_limit) * 4096 == row.saved_bytes
    assert sum(row["saved"] for row in answer.known) * 4096 == answer.total.saved_bytes
    assert sum(row["saved_on_one_host"] for row in answer.known) * 4096 == answer.one_host.saved_bytes


def test_who_shares_with_whom(tmp_path: Path) -> None:
    images = fleet(tmp_path, vms=5)
    answer = analyze(tmp_path, ranges=3)
    sets = []
    for image in images:
        prints = ksm.fingerprint(image)
        sets.append({tuple(row) for row in prints.words[~prints.zeros()].tolist()})
    kinds = {"k0": (0, 2, 4), "k1": (1, 3)}
    found = {(row["a"], row["b"]): row["contents"] for row in answer.classes}
    unions = {name: set().union(*(sets[i] for i in members)) for name, members in kinds.items()}
    assert found["k0", "k1"] == len(unions["k0"] & unions["k1"])
    assert found["k1", "k1"] == len(sets[1] & sets[3])
    assert found["k0", "k0"] == sum(sum(c in sets[i] for i in kinds["k0"]) > 1 for c in unions["k0"])
    assert answer.host_pairs is not None
    pair = {(row["a"], row["b"]): row["contents"] for row in answer.host_pairs}
    assert pair["h0", "h1"] == len((sets[0] | sets[1]) & (sets[2] | sets[3]))
    assert pair["h2", "h2"] == 0  # one VM
    assert answer.contents == len(set().union(*sets))
    poison = next(row for row in answer.top if row["what"].startswith("0xaa"))
    assert (poison["copies"], poison["vms"], poison["hosts"], poison["classes"]) == (25, 5, 3, 2)
    assert answer.top[0]["category"] == "zero"
    vm = next(row for row in answer.vms if row["name"] == "vm4")
    assert vm["shared_on_host"] == 0 and vm["contents"] == len(sets[4])
    words = ksm.fingerprint(images[4]).words.tolist()
    elsewhere = set().union(*sets[:4])
    assert vm["shared_in_fleet"] == sum(tuple(row) in elsewhere for row in words)


def test_files_name_their_pages(tmp_path: Path) -> None:
    library = tmp_path / "libx.so"
    library.write_bytes(np.random.default_rng(1).integers(0, 256, 10_000, dtype=np.uint8).tobytes())
    data = library.read_bytes()
    image = np.frombuffer(data + bytes(-len(data) % 4096) + b"z" * 4096 * 3, np.uint8).reshape(-1, 4096)
    for name in ("a", "b"):
        fingerprint_vm(image, tmp_path, Vm(name=name, host="h"))
    answer = analyze(tmp_path, known_files=[library])
    (row,) = (row for row in answer.known if row["category"] == "files")
    assert (row["contents"], row["pages"], row["saved"]) == (3, 6, 3)
    assert any(top["what"] == "libx.so, page 2" for top in answer.top)


def test_rows_and_files(files: Path, tmp_path: Path) -> None:
    import pandas

    answer = analyze(files)
    written = answer.write(tmp_path / "out")
    assert {path.name for path in written} == {
        *(f"{name}.parquet" for name in ("hosts", "vms", "classes", "host_pairs", "top", "known")),
        "analysis.json",
    }
    hosts = pandas.read_parquet(tmp_path / "out" / "hosts.parquet")
    assert hosts["saved_bytes"].sum() == answer.total.saved_bytes
    assert answer.to_frame("hosts")["saved_bytes"].tolist() == hosts["saved_bytes"].tolist()


# ---- distributed equals single ----------------------------------------------------------------------


def test_a_local_cluster_gives_the_same(files: Path, client: Any) -> None:
    single = analyze(files)
    same(analyze(files, client=client), single)
    same(analyze(files, client=client, ranges=17), single)


def test_dask_frames_in_and_out(files: Path, client: Any) -> None:
    from ksm.fleet import content_totals, contents

    single = analyze(files)
    frame, vms = contents(files)
    assert set(frame.columns) == {"vm", "high", "low", "copies"} and frame.npartitions == 6
    same(analyze(frame, vms=vms, client=client), dataclasses.replace(single))
    same(analyze(frame, vms=vms), single)
    totals = content_totals(files, ranges=4).compute()
    assert len(totals) == single.contents
    assert int((totals["copies"] - 1).sum()) + single.one_host.saved_zero == single.one_host.saved_bytes // 4096
    best = next(row for row in single.top if row["category"] != "zero")
    row = totals.sort_values(["copies"], ascending=False).iloc[0]
    assert (row["copies"], row["vms"], row["hosts"]) == (best["copies"], best["vms"], best["hosts"])


@pytest.mark.parametrize("where", ["here", "cluster"])
def test_damage_is_named_left_out_and_flagged(tmp_path: Path, client: Any, where: str) -> None:
    fleet(tmp_path)
    used = client if where == "cluster" else None
    path = tmp_path / "vm1.pages.parquet"
    whole = path.read_bytes()
    rest = [str(tmp_path / f"vm{index}.pages.parquet") for index in (0, 2, 3, 4, 5)]
    expected = analyze(rest)
    middle = bytearray(whole)
    middle[200:260] = bytes(60)
    for damaged in (whole[: len(whole) // 2], b"", b"PAR1" + b"x" * 100 + b"PAR1", bytes(middle)):
        path.write_bytes(damaged)
        answer = analyze(tmp_path, client=used, ranges=4)
        (left,) = answer.left_out
        assert left.path.endswith("vm1.pages.parquet") and left.why and left.partial and not answer.complete
        assert answer.total == expected.total and answer.vms == expected.vms
    path.unlink()
    answer = analyze([*rest, str(path)], client=used)
    assert [one.why for one in answer.left_out] == ["No such file or directory"]
    assert answer.total == expected.total


def test_a_file_that_is_there_twice(tmp_path: Path, client: Any) -> None:
    fleet(tmp_path)
    expected = analyze(tmp_path)
    shutil.copy(tmp_path / "vm1.pages.parquet", tmp_path / "copy.pages.parquet")
    for used in (None, client):
        answer = analyze([tmp_path, tmp_path / "vm1.pages.parquet"], client=used)
        assert [one.why.split(":")[-1] for one in answer.left_out] == [" counted once"]
        assert answer.total == expected.total and answer.complete


def test_metadata_that_lies(tmp_path: Path) -> None:
    from ksm.fleet.files import write_pages

    fleet(tmp_path, vms=2)
    path = tmp_path / "vm1.pages.parquet"
    vm = read_vm(path)
    high, low, copies = read_range(path)
    write_pages(path, dataclasses.replace(vm, pages=vm.pages + 1), np.stack([high, low], axis=1), copies)
    answer = analyze(tmp_path)
    assert "its metadata says" in answer.left_out[0].why and answer.total.vms == 1


def test_versions_pages_and_keys_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet(tmp_path, vms=2)
    import ksm.fleet.files as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "FORMAT", 99)
        fingerprint_vm(b"x" * 4096, tmp_path, Vm(name="new"))
    answer = analyze(tmp_path)
    (left,) = answer.left_out
    assert "format 99" in left.why and "reads format 1" in left.why and not answer.complete
    (tmp_path / "new.pages.parquet").unlink()
    fingerprint_vm(np.zeros((2, 16384), np.uint8), tmp_path, Vm(name="big", page_size=16384))
    with pytest.raises(SourceError, match=r"page sizes differ.*16384 in .*big\.pages"):
        analyze(tmp_path)
    (tmp_path / "big.pages.parquet").unlink()
    fingerprint_vm(b"x" * 4096, tmp_path, Vm(name="secret"), key=KEY)
    with pytest.raises(SourceError, match=rf"keys differ.*{KEY.id} in .*secret\.pages"):
        analyze(tmp_path)


def test_an_older_fingerprint_gives_way(tmp_path: Path) -> None:
    for directory, when in (("old", "2026-01-01T00:00:00+00:00"), ("new", "2026-02-01T00:00:00+00:00")):
        image = b"x" * 4096 * (2 if directory == "new" else 5)
        fingerprint_vm(image, tmp_path / directory, Vm(name="a", taken=when))
    answer = analyze([tmp_path / "old", tmp_path / "new"])
    assert answer.total.pages == 2 and "older fingerprint of a" in answer.left_out[0].why and answer.complete


def test_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "x.pages.parquet").write_bytes(b"no")
    with pytest.raises(SourceError, match="no file is left to analyse"):
        analyze(tmp_path)
    with pytest.raises(SourceError, match=r"no files \*\.pages\.parquet"):
        analyze(tmp_path / "..")


# ---- clusters ---------------------------------------------------------------------------------------


def test_a_scheduler_that_is_not_there() -> None:
    with (
        pytest.raises(SchedulerLostError, match=r"tcp://127\.0\.0\.1:1: no scheduler answers"),
        connect("tcp://127.0.0.1:1", seconds=0.5),
    ):
        pass


def test_a_worker_with_another_version(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_module.check(client)
    monkeypatch.setattr(cluster_module, "ksm_version", elder)
    with pytest.raises(UnsupportedError, match=r"worker tcp://.* has ksm 0\.0\.1, and this is ksm"):
        cluster_module.check(Elders(client))


def elder() -> str:
    return "9.9"


class Elders:
    """The real client; the workers' answers as those of another version would be."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def run(self, function: Any, **options: Any) -> Any:
        return dict.fromkeys(self._client.run(os.getpid, **options), "0.0.1")


def test_the_scheduler_goes_away(tmp_path: Path) -> None:
    fleet(tmp_path / "fleet")
    cells = Cells(tmp_path)
    address = f"tcp://127.0.0.1:{(port := free_port())}"
    try:
        scheduler = cells.scheduler("127.0.0.1", port)
        cells.worker(address)
        with connect_when_up(address) as client:
            wait_for_workers(client, 1)

            def end(done: int, of: int) -> None:
                if done == 3:
                    scheduler.kill()
                    scheduler.wait()

            answer = analyze(tmp_path / "fleet", client=client, ranges=200, progress=end)
    finally:
        cells.end()
    assert 3 <= answer.ranges_counted < 200 and not answer.complete
    assert f"{answer.ranges_counted} of 200 ranges" in answer.assumed[0]
    whole = analyze(tmp_path / "fleet")
    assert 0 < answer.contents < whole.contents


def test_tls(tmp_path: Path) -> None:
    import subprocess

    if shutil.which("openssl") is None:
        pytest.skip("certificates are made with openssl")
    ca, cert, key = (str(tmp_path / name) for name in ("cert.pem", "cert.pem", "key.pem"))
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
            "-keyout",
            key,
            "-addext",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "-out",
            cert,
        ],
        check=True,
        capture_output=True,
    )
    files = tmp_path / "fleet"
    fleet(files, vms=2)
    port = free_port()
    address = f"tls://127.0.0.1:{port}"
    options = ("--tls-ca-file", ca, "--tls-cert", cert, "--tls-key", key)
    cells = Cells(tmp_path)
    from ksm.fleet import Tls

    try:
        cells.scheduler("127.0.0.1", port, "--protocol", "tls", *options)
        cells.worker(address, *options)
        with connect_when_up(address, Tls(ca, cert, key)) as client:
            same(analyze(files, client=client), analyze(files))
        with pytest.raises(SchedulerLostError), connect(f"tcp://127.0.0.1:{port}", seconds=1):
            pass
    finally:
        cells.end()
    with (
        pytest.raises(SourceError, match=r"missing\.pem: cannot be read"),
        connect(address, Tls("missing.pem", cert, key)),
    ):
        pass
    with pytest.raises(ValueError, match="tls:// takes"), connect(address):
        pass

"""`ksm fingerprint`, `ksm fleet analyze` and `ksm fleet place` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ksm.cli import main
from ksm.fleet import Vm, fingerprint_vm
from tests.fleets import pages


def test_from_images_to_moves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = str(tmp_path / "fleet")
    for index, image in enumerate(pages(1, 4)):
        raw = tmp_path / f"guest{index}.raw"
        image.tofile(raw)
        where = ["--class", f"k{index % 2}", "--host", f"h{index // 2}", "--ram", "4M"]
        assert main(["fingerprint", f"vm{index}={raw}", "-o", fleet, *where, "--json"]) == 0
        (vm,) = json.loads(capsys.readouterr().out)["vms"]
        assert vm["name"] == f"vm{index}" and vm["pages"] == len(image) and vm["zeros"] == "merge"
    assert main(["fleet", "analyze", fleet, "--single", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["complete"] and answer["total"]["vms"] == 4 and answer["total"]["saved_bytes"] > 0
    hosts = tmp_path / "hosts.yaml"
    hosts.write_text("[{name: h0, ram: 8M}, {name: h1, ram: 8M}]")
    assert main(["fleet", "place", fleet, "--hosts", str(hosts), "--exact", "--json"]) == 0
    placed = json.loads(capsys.readouterr().out)
    assert placed["saved"]["estimate"] > placed["baselines"]["today"]["saved"]["estimate"]
    assert placed["where"]["vm0"]["host"] == placed["where"]["vm2"]["host"]
    assert main(["fleet", "place", fleet, "--hosts", str(hosts)]) == 0
    assert "exact" not in (said := capsys.readouterr().out) and "every host still has room" in said


def test_failures_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = tmp_path / "fleet"
    raw = tmp_path / "guest.raw"
    raw.write_bytes(b"x" * 8192)
    assert main(["fingerprint", str(raw), str(tmp_path / "gone.raw"), "-o", str(fleet)]) == 65
    assert "gone.raw" in capsys.readouterr().err and (fleet / "guest.raw.pages.parquet").exists()
    assert main(["fingerprint", str(raw), "-o", str(fleet)]) == 65
    assert "--force replaces it" in capsys.readouterr().err
    (fleet / "bad.pages.parquet").write_bytes(b"no")
    assert main(["fleet", "analyze", str(fleet), "--single"]) == 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "bad.pages.parquet: left out" in said[0] and "partial" in said[1]
    assert main(["fleet", "analyze", str(fleet), "--scheduler", "nowhere"]) == 2
    hosts = tmp_path / "hosts.yaml"
    hosts.write_text("[{name: h0, ram: 4K}]")
    assert main(["fleet", "place", str(fleet), "--hosts", str(hosts)]) == 65
    said = capsys.readouterr().err.splitlines()
    assert len(said) >= 1 and "more than any NUMA node of any host has" in said[-1]


def test_place_says_what_its_numbers_leave_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """VMs that run nowhere yet, and VMs that can only change places."""
    page = {kind: bytes([kind]) * 8192 + bytes(range(256)) * 32 for kind in (1, 2)}
    for name, host, kind in (("a", "h1", 1), ("b", "h2", 2), ("c", "h1", 2), ("d", "h2", 1)):
        pinned = name in "ab"
        fingerprint_vm(page[kind], tmp_path / "full", Vm(name=name, host=host, ram=1 << 20, pinned=pinned))
    hosts = tmp_path / "hosts.yaml"
    hosts.write_text("[{name: h, count: 2, ram: 2M}]")
    assert main(["fleet", "place", str(tmp_path / "full"), "--hosts", str(hosts)]) == 0
    said = capsys.readouterr().out
    assert said.count("needs spare room") == 1 and "1 of the moves change places" in said and "2 moves, 0 hosts" in said
    hosts.write_text("[{name: other, count: 2, ram: 3M}]")
    for name in "ab":
        fingerprint_vm(page[1], tmp_path / "new", Vm(name=name, host="h1"))
    assert main(["fleet", "place", str(tmp_path / "new"), "--hosts", str(hosts)]) == 0
    said = capsys.readouterr().out
    assert "2 VMs on none of these hosts today: placed, no move." in said and "0 moves" in said

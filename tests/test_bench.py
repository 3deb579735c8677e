"""The benchmark prints every goal beside a figure; what the figures are is no matter of a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ksm
from ksm.calibrate import machine_of
from ksm.patterns import filled

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "bench").exists(), reason="an installed package is tested, without bench/")

GOALS = {  # must and aim of what a release is measured by
    "fingerprinting / plain reading, 1 thread": (0.90, 1.0),
    "fingerprinting / plain reading, 2 threads": (0.85, 0.95),
    "fingerprint + index / fingerprinting, 1 thread": (0.90, 0.96),
    "fingerprint + index / fingerprinting, 2 threads": (0.90, 0.96),
    "estimate / kernel's two passes, 1 thread, guest pages": (25, 31),
    "estimate / kernel's two passes, 2 threads, guest pages": (45, 55),
    "exact simulation, cold / kernel's two passes, guest pages": (10, 20),
    "exact simulation, pass over unwritten memory / kernel's, guest pages": (100, 1000),
    "whole `ksm estimate` of a file / xxhash + set, 1 thread": (2.3, 2.6),
    "whole `ksm estimate` of a file / xxhash + set, 2 threads": (4.0, 4.8),
    "engine memory beyond guest pages": (64, 40),
    "engine memory beyond unique pages": (64, 40),
    "engine memory beyond copies pages": (64, 40),
    "import ksm": (0.15, 0.08),
}
KERNEL = "kernel's"


def bench(*arguments: str, where: Path, code: int = 0) -> str:
    """`python -m bench` on the ksm that is tested; its output."""
    path = os.pathsep.join((str(Path(ksm.__file__).parents[1]), str(ROOT)))
    command = [sys.executable, "-m", "bench", *arguments]
    done = subprocess.run(
        command, cwd=where, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("bench")
    bench("--quick", "--json", "found.json", where=where)
    return where / "found.json"


def test_every_goal_has_a_figure(results: Path) -> None:
    found = {row["what"]: row for row in json.loads(results.read_text())["rows"]}
    assert {what: (found[what]["must"], found[what]["aim"]) for what in GOALS} == GOALS
    assert [what for what in found if what.startswith("cost a page")]
    for what, row in found.items():
        if KERNEL in what and row["got"] is None:
            assert os.geteuid() != 0 or "KSM" in row["why_not"]
            continue
        assert row["got"] > 0, row
        limit, better = row["must"], row["got"] <= row["must"] if row["less"] else row["got"] >= (row["must"] or 0)
        assert (row["verdict"] in ("must", "aim")) == (limit is not None and better)


def test_memory_by_structure(results: Path) -> None:
    rows = {row["what"]: row["detail"] for row in json.loads(results.read_text())["rows"]}
    for kind in ("guest", "unique", "copies"):
        found = rows[f"engine memory beyond {kind} pages"]
        assert found["allocated for frames"] >= 8 and found["allocated for slots and rmap items"] >= 8
    m = machine_of(filled("unique", 1000))
    before = m._engine.memory()
    process = m.processes["process-1"]
    process.write(process.vmas[0].start * 4096, bytes(5 * 4096))
    after = m._engine.memory()
    assert after["contents of their own"] - before["contents of their own"] == 5 * 4096
    assert set(before) == set(after) and all(size >= 0 for size in before.values())


def test_the_unstable_table_follows_what_joins() -> None:
    """Of 16 copies of each content one joins: room for a third of the pages is enough. All of unique ones find it."""
    n = 1 << 16
    table = {}
    for kind in ("copies", "unique"):
        m = machine_of(filled(kind, n))
        m.ksmd.scan()
        m.ksmd.scan()
        table[kind] = m._engine.memory()["unstable table"] / n
    assert 8 / 16 <= table["copies"] <= 8 / 3 / 0.9 * 1.05
    assert 8 <= table["unique"] <= 8 / 0.9 * 1.05


def test_contestants_count_the_same(results: Path) -> None:
    """A contestant that counts other contents than ksm has no seconds, and says so."""
    costs = json.loads(results.read_text())["contest"]
    names = {cost["name"] for cost in costs}
    assert {"ksm, 1 thread", "xxhash and a set", "plain reading, 1 thread", "the kernel's ksmd", "duperemove"} <= names
    for cost in costs:
        assert cost["pages"] == 4096
        assert cost["seconds"] or "installed" in cost["why_not"] or cost["name"] == "the kernel's ksmd", cost
        assert not cost["why_not"] or "counts" not in cost["why_not"]


def test_results_can_be_shown_again(results: Path, tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- bench: made by python -m bench -->\nold\n<!-- bench: end -->\nafter\n")
    printed = bench("--load", str(results), "--update", str(document), where=tmp_path)
    first, *table, last = document.read_text().splitlines()
    document.write_text("<!-- bench: summary made by python -m bench -->\n<!-- bench: end -->\n")
    bench("--load", str(results), "--update", str(document), where=tmp_path)
    brief = document.read_text()
    assert all(f"| {what} |" in brief for what in GOALS) and "with prefetch" not in brief
    assert (first, last) == ("before", "after")
    assert "old" not in table
    for what in GOALS:
        assert what in printed
        assert any(line.startswith(f"| {what} |") for line in table)


def test_a_picture(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    bench("--load", str(results), "--picture", "speed.svg", where=tmp_path)
    picture = (tmp_path / "speed.svg").read_text()
    assert "plain reading, 1 thread" in picture and "import ksm" in picture


def test_what_is_asked_wrongly(results: Path, tmp_path: Path) -> None:
    assert "no part named nonsense" in bench("--only", "nonsense", where=tmp_path, code=2)
    (tmp_path / "README.md").write_text("no markers")
    assert "has no lines" in bench("--load", str(results), "--update", "README.md", where=tmp_path, code=2)


def test_check_fails_when_a_goal_is_missed(results: Path, tmp_path: Path) -> None:
    found = json.loads(results.read_text())
    for got, code in ((1e-9, 0), (1e9, 1)):
        found["rows"] = [row | {"got": got} for row in found["rows"] if row["less"]]
        (tmp_path / "found.json").write_text(json.dumps(found))
        bench("--load", "found.json", "--check", where=tmp_path, code=code)

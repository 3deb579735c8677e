"""The cost model of ksmd: its arithmetic, what it counts in a machine, and its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ksm
from ksm import cost
from ksm.cost import COSTS, CostModel, config_files

PAGE = 4096
FREE = replace(CostModel(), **dict.fromkeys(COSTS, 0.0))


def test_every_cost_counts_once() -> None:
    work = {"hash_ns": 0, "level_ns": 1, "merge_ns": 2, "merged_ns": 3}
    named = {"stable_level_ns": "stable_levels", "deep_ns": "deep_levels", "skip_ns": "skipped"}
    assert {*work, *named} == set(COSTS)
    for name in COSTS:
        model = replace(FREE, **{name: 7.0})
        given = [0, 0, 0, 0]
        if name in work:
            given[work[name]] = 3
        keywords = {named[name]: 3} if name in named else {}
        assert model.nanoseconds(*given, **keywords) == 21.0
    assert replace(FREE, hash_ns=7.0).nanoseconds(3, 0, 0, 0, 16384) == 84.0


def test_scaled() -> None:
    twice = CostModel().scaled(2)
    assert twice.nanoseconds(1, 2, 3, 4, stable_levels=5, deep_levels=6, skipped=7) == 2 * CostModel().nanoseconds(
        1, 2, 3, 4, stable_levels=5, deep_levels=6, skipped=7
    )
    assert twice.hz == CostModel().hz


def cpu(model: CostModel, contents: list[int], passes: int, smart_scan: bool = False) -> float:
    """ksmd's CPU nanoseconds of the last pass over pages with these contents."""
    m = ksm.Machine()
    m.ksmd.cost = model
    m.ksm.smart_scan = smart_scan
    pages = np.repeat(np.array(contents, np.uint64)[:, None], PAGE // 8, axis=1)
    p = m.spawn()
    p.madvise(p.mmap(pages.view(np.uint8)), len(pages) * PAGE, ksm.MADV_MERGEABLE)
    m.ksm.run = 1
    for _ in range(passes - 1):
        m.ksmd.scan()
    before = m.ksmd.cpu_seconds
    m.ksmd.scan()
    return (m.ksmd.cpu_seconds - before) * 1e9


def test_what_passes_are_charged() -> None:
    one = {name: replace(FREE, **{name: 1.0}) for name in COSTS}
    unique, equal = list(range(1, 1025)), [5] * 100
    assert cpu(one["hash_ns"], unique, 1) == pytest.approx(1024)
    assert cpu(one["level_ns"], unique, 1) == 0
    # The tree grows from 0 to 1,023 pages while they are searched for: 1 level up to 1 page, 2 up to 3, ...
    sizes = [int(n).bit_length() for n in range(1024)]
    assert cpu(one["level_ns"], unique, 2) == pytest.approx(sum(sizes))
    assert cpu(one["deep_ns"], unique, 2) == pytest.approx(sum(max(0, n - 8) for n in sizes))
    assert cpu(one["stable_level_ns"], unique, 2) == 0
    assert cpu(one["merge_ns"], equal, 2) == pytest.approx(99)
    assert cpu(one["stable_level_ns"], equal, 2) == pytest.approx(98)  # 98 find the one node
    assert cpu(one["merged_ns"], equal, 3) == pytest.approx(100)
    assert cpu(one["skip_ns"], unique, 5, smart_scan=True) == pytest.approx(1024)


def test_a_search_costs_what_its_levels_cost() -> None:
    model = CostModel(level_ns=100.0, deep_ns=300.0)
    for depth in range(21):
        deep = max(0, depth - cost.NEAR_LEVELS)
        assert model.search_ns(1 << depth) == pytest.approx(model.nanoseconds(0, depth, 0, 0, deep_levels=deep))


def test_the_file_comes_back(tmp_path: Path) -> None:
    model = CostModel(hash_ns=901.5, deep_ns=3.0, hz=1000, origin="measured")
    where = tmp_path / "new" / "cost.json"
    model.save(where)
    found = CostModel.load(where)
    assert found == model
    assert found.origin == f"{where}: measured"
    assert [path.name for path in where.parent.iterdir()] == ["cost.json"]
    assert where.stat().st_mode & 0o777 == 0o644


def test_where_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(cost, "SYSTEM_FILE", tmp_path / "etc" / "cost.json")
    assert CostModel.of_host() == CostModel()
    for hash_ns, where in zip((2.0, 1.0), reversed(config_files()), strict=True):
        CostModel(hash_ns=hash_ns).save(where)
        assert CostModel.of_host().hash_ns == hash_ns
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert config_files()[0] == tmp_path / "home" / ".config" / "ksm" / "cost.json"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "does not say"),
        ({"hash_ns": None}, "hash_ns is None"),
        ({"hash_ns": "800"}, "hash_ns is '800'"),
        ({"hash_ns": True}, "hash_ns is True"),
        ({"level_ns": -1}, "level_ns is -1"),
        ({"level_ns": float("nan")}, "level_ns is nan"),
        ({"deep_ns": 1e300}, "deep_ns is 1e[+]300"),
        ({"hz": 0}, "hz is 0"),
        ({"hz": 2.5}, "hz is 2.5"),
    ],
)
def test_damaged_files(tmp_path: Path, change: dict[str, object], says: str) -> None:
    where = tmp_path / "cost.json"
    CostModel().save(where)
    where.write_text(json.dumps(json.loads(where.read_text()) | change))
    with pytest.raises(ksm.SourceError, match=says):
        CostModel.load(where)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"{" * 100_000, b'{"a":' + b"[" * 70_000])
def test_what_is_no_model(tmp_path: Path, content: bytes) -> None:
    where = tmp_path / "cost.json"
    where.write_bytes(content)
    with pytest.raises(ksm.SourceError, match=r"cost\.json"):
        CostModel.load(where)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="writing"):
        CostModel().save(tmp_path / "file" / "cost.json")
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match="writing"):
        CostModel().save(tmp_path / "directory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]

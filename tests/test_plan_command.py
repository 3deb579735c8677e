"""`ksm plan`: its table, JSON, exit code, YAML files, and what it says to bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ksm.cli import main
from ksm.cli.plan import DOES_NOT_FIT, read

PAGE = 4096
GOOD = """
classes:
  web: {samples: ["web*.raw"], ram: 8M, share: 75%}
  db: {samples: [db.raw, web1.raw], share: 0.25}
hosts: [{name: small, ram: 32M, reserve: 1M, kernel: "6.6"}, {ram: 0.5G, count: 2}]
policy: {headroom: 5%, settle: 10m, max_page_sharing: 512}
"""


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    common = random.integers(0, 256, (300, PAGE), dtype=np.uint8)
    for name in ("web1.raw", "web2.raw", "web3.raw", "db.raw"):
        own = random.integers(0, 256, (100, PAGE), dtype=np.uint8)
        np.concatenate((common, own)).tofile(name)
    return ["web1.raw", "web2.raw", "web3.raw"]


def test_table_verdict_and_next_command(samples: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *samples, "--ram", "32M"]) == 0
    printed = capsys.readouterr().out
    for part in ("VMs without KSM", "pages_to_scan", "VMs fit on host", "Assumed: ", "Next: ksm plan"):
        assert part in printed


def test_json_and_required_number(samples: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", *samples, "--ram", "32M", "--broken", "0", "--json"]
    assert main(asked) == 0
    answer = json.loads(capsys.readouterr().out)
    fits = answer["fits"]
    # 300 frames and 100 a VM within 90 % of 8,192 pages, less 64 bytes an rmap item
    assert answer["hosts"][0]["fits"]["mean"] == pytest.approx((0.9 * 8192 - 300) / 107, abs=2)
    assert main([*asked, "--require", str(fits)]) == 0
    assert main([*asked, "--require", str(fits + 1)]) == DOES_NOT_FIT


def test_a_file_of_classes_and_hosts(samples: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("plan.yaml").write_text(GOOD)
    classes, hosts, policy = read("plan.yaml")
    assert [len(each.samples) for each in classes] == [3, 2] and hosts[1].count == 2 and policy.settle == 600
    assert main(["plan", "--file", "plan.yaml", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert sum(answer["hosts"][0]["mix"].values()) == answer["hosts"][0]["fits"]["recommended"]
    assert answer["fits"] == sum(each["fits"]["recommended"] * each["host"]["count"] for each in answer["hosts"])
    assert answer["hosts"][0]["advisor"] == [] and answer["hosts"][1]["advisor"] != []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "line 1: not YAML"),
        ("- 1", "there must be a mapping"),
        ("{classes: {}, hosts: [{ram: 1G}]}", "a mapping of names to classes"),
        ("{classes: {a: {samples: [db.raw]}}}", "hosts must be a list"),
        ("{classes: {a: {samples: db.raw}}, hosts: [{ram: 1G}]}", "samples must be a list"),
        ("{classes: {a: {samples: ['none*']}}, hosts: [{ram: 1G}]}", "no samples"),
        ("{classes: {a: {sample: [db.raw]}}, hosts: [{ram: 1G}]}", "sample is not known"),
        ("{classes: {a: {samples: [db.raw], ram: 4Q}}, hosts: [{ram: 1G}]}", "'4Q' is not a size"),
        ("{classes: {a: {samples: [db.raw]}}, hosts: [{}]}", "a host has no ram"),
        ("{classes: {a: {samples: [db.raw]}}, hosts: [{ram: 1G, nodes: x}]}", "whole number"),
        ("{classes: {a: {samples: [db.raw]}}, hosts: [{ram: 1G}], policy: {settle: soon}}", "not a duration"),
        ("{classes: {a: {samples: [db.raw], share: 50%}}, hosts: [{ram: 1G}]}", "does not sum to 1"),
    ],
)
def test_bad_files(text: str, message: str, samples: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("plan.yaml").write_text(text)
    assert main(["plan", "--file", "plan.yaml"]) == 65
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["db.raw"], 2),
        (["--ram", "1G"], 2),
        (["db.raw", "--ram", "much"], 2),
        (["db.raw", "--ram", "1M"], 65),
        (["missing.raw", "--ram", "1G"], 65),
        (["db.raw", "--ram", "1G", "--confidence", "100%"], 65),
        (["--file", "missing.yaml"], 66),
        (["db.raw", "--file", "x.yaml"], 2),
    ],
)
def test_bad_arguments(arguments: list[str], code: int, samples: list[str]) -> None:
    assert main(["plan", *arguments]) == code

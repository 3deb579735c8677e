"""`ksm plan`: its table, JSON, exit code, YAML files, and what it says to bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import ksm
from ksm.cli import main
from ksm.cli.plan import DOES_NOT_FIT, read, share

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
    for part in (
        "VMs without KSM",
        "pages_to_scan",
        "VMs fit on host",
        "Assumed: ",
        "Next: ksm report",
        "In CI: ksm plan",
    ):
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
        ("{classes: {a: {samples: [db.raw], share: .nan}}, hosts: [{ram: 1G}]}", "share: nan is not a share"),
        ("{classes: {a: {samples: [db.raw], share: -5%}}, hosts: [{ram: 1G}]}", "'-5%' is not a share"),
        (
            "{classes: {a: {samples: [db.raw]}, a: {samples: [web1.raw]}}, hosts: [{ram: 1G}]}",
            "line 1: a is there twice",
        ),
        ("{classes: {'': {samples: [db.raw]}}, hosts: [{ram: 1G}]}", "name is ''"),
        ("{classes: {a: {samples: [db.raw]}}, hosts: [{ram: 1G, name: ' '}]}", "a host: name is ' '"),
        (
            "{classes: {a: {samples: [db.raw]}}, hosts: [{ram: 1G}], policy: {max_page_sharing: 2.5}}",
            "not a whole number",
        ),
        ("{classes: {a: {samples: [db.raw]}}, hosts: [{ram: 1G}], policy: {settle: -1}}", "not a duration"),
        ("!!python/object/apply:os.system [id]", "not YAML"),
        ("{classes: &c {a: *c}, hosts: [{ram: 1G}]}", "a is not known"),
        ("{classes: {1: {samples: [db.raw]}}, hosts: [{ram: 1G}]}", "class name 1 must be in quotes"),
        ("{classes: {a: {samples: [db.raw]}}, hosts: [{ram: -1G}]}", "ram: '-1G' is not a size"),
        ("{classes: {a: {samples: [db.raw]}}, hosts: [{ram: 999999999999999T}]}", "no machine has that much"),
        ("{classes: {a: {samples: [db.raw]}}, hosts: [{ram: 1G, count: 1.5}]}", "count: 1.5 is not a whole number"),
        ("{classes: {a: {samples: [db.raw]}}, hosts: [{ram: 1G, count: -1}]}", "-1 hosts of this kind"),
        ("{classes: {a: {samples: [db.raw]}}, hosts: [{ram: 1G, swap: [1]}]}", "swap must be one value"),
        ("{classes: {a: {samples: [db.raw]}}, hosts: [{ram: 1G, colour: red}]}", "colour is not known"),
        ("{classes: {a: {samples: [db.raw]}}, hosts: [{ram: 1G, kernel: 6.10}]}", "kernel: 6.1 must be in quotes"),
        ("{classes: {a: {samples: [db.raw]}}, hosts: [{ram: 1G, kernel: six}]}", "'six' is not a kernel version"),
        (
            "{classes: {a: {samples: [db.raw]}}, hosts: [{ram: 1G}], policy: {use_zero_pages: 7}}",
            "neither true nor false",
        ),
        ("{classes: {a: {samples: [db.raw]}}, hosts: [{ram: 1G}], policy: {headrom: 5%}}", "headrom is not known"),
        ("{classes: {a: {samples: [db.raw]}}, hosts: [{ram: 1G}], policy: {headroom: 100%}}", "headroom is 1"),
        ("# " + "x" * (1 << 20), "more than 1 MiB"),
        ("x: " + "[" * 5000, "not YAML"),
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
        (["--file", "/dev/zero"], 65),
        (["db.raw", "--ram", "1G", "--page-size", "0"], 2),
        (["db.raw", "--ram", "1G", "--headroom", "nan"], 2),
        (["db.raw", "--ram", "1G", "--kernel", "99"], 2),
        (["db.raw", "--file", "x.yaml"], 2),
        (["--file", "plan.yaml", "--headroom", "5%"], 2),  # which the file would not heed
        (["--file", "plan.yaml", "--trace", "x"], 2),
        (["db.raw", "--ram", "1G", "--require", "0"], 2),
        (["db.raw", "--ram", "1G", "--require", "-1"], 2),
        (["db.raw", "--ram", "1G", "--require", "9" * 30], 3),
        (["db.raw", "--ram", "1G", "--confidence", "99.91%"], 65),
        (["db.raw", "--ram", "1G", "--confidence", "90"], 65),
        (["db.raw", "--ram", "1G", "--settle", "0"], 2),
        (["db.raw", "--ram", "1G", "--vm-ram", "1K"], 65),
        (["db.raw", "--ram", "1G", "--vm-overhead", "1T"], 65),
        (["empty.raw", "--ram", "1G"], 65),
        (["zero.dump", "--ram", "1G", "--zeros", "absent"], 65),
    ],
)
def test_bad_arguments(arguments: list[str], code: int, samples: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("plan.yaml").write_text(GOOD)
    Path("empty.raw").touch()
    np.zeros((10, PAGE), np.uint8).tofile("zero.dump")
    assert main(["plan", *arguments]) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("Usage: ") or error.count("\n") == 0


def test_shares_are_read_as_they_are_written() -> None:
    assert share("99.9%") == 0.999 and share("0.1%") == 0.001  # 99.9 / 100 is a bit more, and would be refused
    assert ksm.Policy(confidence=share("99.9%"), ksmd_cpu=share("0.1%")).confidence == 0.999


def test_a_file_of_aliases_does_not_grow(samples: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    lists = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))
    Path("plan.yaml").write_text(f"a0: &a0 [x]\n{lists}\nclasses: *a29\nhosts: *a29")
    assert main(["plan", "--file", "plan.yaml"]) == 65
    assert len(capsys.readouterr().err) < 300


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupted(samples: list[str]) -> None:
    np.ones(1 << 27, np.uint8).tofile("large.raw")
    script = "import sys; from ksm.cli import main; sys.exit(main())"
    command = [
        sys.executable,
        "-c",
        script,
        "plan",
        *[str(Path("large.raw").resolve())] * 300,
        "--ram",
        "1T",
    ]  # 37 GiB to read
    environment = os.environ | {"PYTHONPATH": str(Path(ksm.__file__).parents[1])}
    with subprocess.Popen(command, cwd="/", env=environment, stdout=-1, stderr=-1, text=True) as process:
        time.sleep(2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        printed, error = process.communicate(timeout=20)
    assert process.returncode == 130 and printed == "" and "Traceback" not in error

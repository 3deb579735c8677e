"""The command line: answers, exit codes, one line an error, and what goes to which stream."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ksm
from ksm.estimate import estimate

PAGE = 4096
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(**extra: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return {**kept, "PYTHONPATH": str(Path(ksm.__file__).parents[1]), **extra}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ksm", *arguments],
            cwd=tmp_path,
            env=environment(**extra),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def image(tmp_path: Path) -> str:
    """Pages 0 to 999 unlike each other, 500 like page 0, 100 zero."""
    pages = np.random.default_rng(1).integers(0, 256, (1600, PAGE), dtype=np.uint8)
    pages[1000:1500] = pages[0]
    pages[1500:] = 0
    pages.tofile(tmp_path / "guest.raw")
    return "guest.raw"


# ---- estimate ---------------------------------------------------------------------------------------


def test_estimate_for_people(run: Run, image: str) -> None:
    done = run("estimate", image, image)
    assert done.returncode == 0 and done.stderr == ""
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["source", "pages", "zero"]
    assert lines[1].split()[:3] == ["guest.raw", "1,600", "100"]
    assert lines[3].split()[0] == "total"
    assert "200 all-zero pages of dumps are zero or never touched" in done.stdout


def test_estimate_for_programs(run: Run, image: str, tmp_path: Path) -> None:
    done = run("estimate", image, "--json", "--max-page-sharing", "7", "--use-zero-pages", "--threads", "1")
    answer = estimate([tmp_path / image], max_page_sharing=7, use_zero_pages=True).to_dict()
    answer["sources"][0]["name"] = image
    assert json.loads(done.stdout) == answer
    assert answer["ksm_zero_pages"] == 100 and answer["pages_shared"] == 72


def test_estimate_zeros_absent(run: Run, image: str) -> None:
    answer = json.loads(run("estimate", image, "--json", "--zeros", "absent").stdout)
    assert (answer["pages"], answer["zero_pages"], answer["zero_or_untouched"]) == (1500, 0, 100)


@pytest.mark.skipif(sys.platform != "linux", reason="live processes are read on Linux only")
def test_estimate_of_a_process(run: Run) -> None:
    done = run("estimate", "self", f"pid:{os.getpid()}", "--json")
    answer = json.loads(done.stdout)
    assert [source["name"] for source in answer["sources"]] == ["self", f"pid:{os.getpid()}"]
    assert all(source["pages"] > 100 for source in answer["sources"])
    nothing = json.loads(run("estimate", "self", "--marked-only", "--json").stdout)
    assert nothing["pages"] == 0


def test_names_with_brackets_are_shown_as_they_are(run: Run, image: str, tmp_path: Path) -> None:
    (tmp_path / "[red]x[bold]").write_bytes(bytes(PAGE))
    assert "[red]x[bold]" in run("estimate", "[red]x[bold]").stdout


def test_nodes(run: Run, image: str) -> None:
    apart = ("--nodes", "0,1", "--no-merge-across-nodes", "--json")
    answer = json.loads(run("estimate", image, image, *apart).stdout)
    one, two = answer["sources"]
    assert one["pages_sharing"] == two["pages_sharing"] > 0 and two["duplicates_between"] == 0
    simulated = json.loads(run("simulate", image, image, *apart, "--for", "20s", "--no-smart-scan").stdout)
    assert simulated["settled"] == answer
    for name in ("pages_shared", "pages_sharing", "pages_unshared"):
        assert simulated["samples"][-1][name] == answer[name]
    across = json.loads(run("estimate", image, image, "--nodes", "0,1", "--json").stdout)
    assert across["sources"][1]["duplicates_between"] > 0
    for command in ("estimate", "simulate"):
        done = run(command, image, "--nodes", "0,1")
        assert (done.returncode, done.stderr) == (2, "ksm: 2 nodes for 1 sources\n")
        assert run(command, image, "--nodes", "0,x").returncode == 2


# ---- simulate ---------------------------------------------------------------------------------------


def test_simulate_for_people(run: Run, image: str) -> None:
    done = run("simulate", image, image, "--for", "20s", "--every", "5s")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines()[0].split()[:2] == ["time", "passes"]
    assert "99 % after" in done.stdout and "of a CPU" in done.stdout


def test_simulate_settles_where_the_estimate_says(run: Run, image: str) -> None:
    arguments = ("--for", "30s", "--every", "10s", "--no-smart-scan", "--max-page-sharing", "9", "--use-zero-pages")
    answer = json.loads(run("simulate", image, image, *arguments, "--json").stdout)
    last, settled = answer["samples"][-1], answer["settled"]
    for name in ("pages_shared", "pages_sharing", "pages_unshared", "ksm_zero_pages", "general_profit"):
        assert last[name] == settled[name], name
    assert last["seconds"] == 30 and len(answer["samples"]) == 4
    assert 0 < answer["reached_seconds"]["50"] <= answer["reached_seconds"]["90"] <= answer["reached_seconds"]["99"]
    assert answer["tunables"]["max_page_sharing"] == 9
    assert 0 < answer["ksmd_cpu_share"] < 1


def test_simulate_too_short(run: Run, image: str) -> None:
    done = run("simulate", image, "--for", "100ms", "--every", "50ms", "--pages-to-scan", "10")
    assert "later than this simulation went" in done.stdout


def test_simulate_csv(run: Run, image: str, tmp_path: Path) -> None:
    done = run("simulate", image, "--for", "2s", "--every", "1s", "--csv", "-")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [float(row["seconds"]) for row in rows] == [0, 1, 2]
    assert int(rows[-1]["pages_sharing"]) > 0
    run("simulate", image, "--for", "2s", "--every", "1s", "--csv", "out.csv")
    assert (tmp_path / "out.csv").read_text() == done.stdout
    again = run("simulate", image, "--for", "1s", "--csv", "out.csv")
    assert again.returncode == 2 and "--force overwrites it" in again.stderr
    assert (tmp_path / "out.csv").read_text() == done.stdout
    assert run("simulate", image, "--for", "1s", "--csv", "out.csv", "--force").returncode == 0


def test_simulate_of_an_old_kernel(run: Run, image: str) -> None:
    answer = json.loads(run("simulate", image, "--for", "2s", "--kernel", "5.15", "--json").stdout)
    assert answer["samples"][-1]["pages_scanned"] is None
    assert answer["samples"][-1]["pages_sharing"] > 0
    assert "smart_scan" not in answer["tunables"]


def test_simulate_zeros_absent(run: Run, image: str) -> None:
    answer = json.loads(run("simulate", image, "--for", "5s", "--zeros", "absent", "--json").stdout)
    last, settled = answer["samples"][-1], answer["settled"]
    assert (last["pages_shared"], last["pages_sharing"]) == (settled["pages_shared"], settled["pages_sharing"])


# ---- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["estimate", "/nonexistent"], 65, "ksm: /nonexistent: No such file or directory"),
        (["estimate", "/"], 65, "ksm: /: a directory; an image must be a regular file"),
        (["estimate", "/dev/null"], 65, "ksm: /dev/null: a device; an image must be a regular file"),
        (["estimate", "cut"], 65, "ksm: cut: ends at offset 5 inside a page"),
        (["estimate", "pid:4194305"], 65, "ksm: pid:4194305: no such process"),
        (["estimate", "guest.raw", "--max-page-sharing", "1"], 2, "ksm: max_page_sharing is 1"),
        (["estimate", "guest.raw", "--page-size", "5"], 2, "ksm: page_size is 5"),
        (["simulate", "guest.raw", "--kernel", "2.6"], 2, "ksm: kernel '2.6'"),
        (["simulate", "guest.raw", "--max-page-sharing", "1"], 1, "max_page_sharing"),
        (["simulate", "guest.raw", "--for", "99d", "--every", "1ms"], 2, "samples are too many"),
        (["simulate", "guest.raw", "--csv", "/nonexistent/x", "--for", "1s"], 66, "ksm: /nonexistent/x: No such file"),
    ],
)
def test_errors_are_one_line(
    run: Run, image: str, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "cut").write_bytes(b"12345")
    done = run(*arguments)
    assert done.returncode == code
    assert message in done.stderr and done.stderr.startswith("ksm: ") and done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["estimate"],
        ["estimate", "x", "--zeros", "some"],
        ["estimate", "x", "--threads", "0"],
        ["simulate", "x", "--for", "soon"],
        ["simulate", "x", "--for", "0"],
        ["simulate", "x", "--pages-to-scan", "0"],
        ["simulate", "x", "--csv", "-", "--json"],
    ],
)
def test_wrong_usage(run: Run, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Error: " in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["estimate", "--help"], ["simulate", "-h"], ["demo", "-h"]])
def test_help(run: Run, arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 0 and done.stdout.startswith("Usage: ksm")


def test_version(run: Run) -> None:
    done = run("--version")
    assert done.returncode == 0 and done.stdout.startswith("ksm")


def test_no_command_shows_the_help(run: Run) -> None:
    done = run()
    assert done.returncode == 2 and "simulate" in done.stdout + done.stderr


def test_nobody_reads(image: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "ksm", "estimate", image, "--json"],
        cwd=tmp_path,
        env=environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writer)
    assert done.returncode == 141 and done.stderr == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_disk_full(image: str, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ksm", "estimate", image, "--json"],
            cwd=tmp_path,
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 74 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(image: str, tmp_path: Path, number: int, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ksm", "simulate", image, "--for", "1000d", "--every", "100d", "--pages-to-scan", "1"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == "" and "Traceback" not in err and err.count("\n") <= 1


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals of this kind")
@pytest.mark.parametrize(("extra", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colour_is_for_terminals(image: str, tmp_path: Path, extra: dict[str, str], coloured: bool) -> None:
    import pty

    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ksm", "estimate", image],
        cwd=tmp_path,
        env=environment(TERM="xterm-256color", **extra),
        stdin=follower,
        stdout=follower,
        stderr=subprocess.DEVNULL,
    )
    os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 4096):
            shown += part
    except OSError:  # the other end has gone
        pass
    os.close(leader)
    assert process.wait(60) == 0
    assert b"source" in shown
    assert (b"\x1b[3" in shown) is False  # bold at most, no colours in the numbers
    assert (b"\x1b[1m" in shown) or not coloured

"""Sweeps: each point is what simulating it alone gives, and no process is left behind however a sweep ends."""

from __future__ import annotations

import csv
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
import ksm.sweep
from ksm.errors import KsmError
from ksm.simulation import simulate
from ksm.sources import ArrayImage
from ksm.sweep import Point, grid, sweep
from ksm.trace import Trace, record
from tests.test_cli import Run, environment, run  # noqa: F401 - a fixture

PAGE = 4096
RNG = np.random.default_rng(1)
IMAGE = RNG.integers(0, 256, (500, PAGE), dtype=np.uint8)


def test_points_are_simulations() -> None:
    choices = {"pages_to_scan": [100, 1000], "sleep_millisecs": [20, 200], "smart_scan": [False, True]}
    found = sweep([IMAGE, IMAGE], choices, seconds=5, every=0.5, jobs=2)
    assert [point.tunables for point in found.points] == grid(choices) and len(found.points) == 8
    for point in found.points:
        alone = simulate([IMAGE, IMAGE], seconds=5, every=0.5, tunables=point.tunables)
        assert point == Point.of(point.tunables, alone)
    slow, fast = (point.seconds_to_90 for point in (found.points[2], found.points[4]))
    assert fast is not None and slow is not None and fast < slow
    most = max(point.mean_saved_bytes for point in found.points)
    assert found.best(0).mean_saved_bytes == most
    cheapest = min(found.points, key=lambda point: point.ksmd_cpu_seconds)
    assert found.best(1) == cheapest != found.best(0)


def test_a_trace(tmp_path: Path) -> None:
    other = IMAGE.copy()
    other[:100] = RNG.integers(0, 256, (100, PAGE), dtype=np.uint8)
    series = {"a": [ArrayImage(IMAGE)] * 3, "b": [ArrayImage(IMAGE), ArrayImage(other), ArrayImage(IMAGE)]}
    record(series, tmp_path / "t", every=5)
    trace = Trace(tmp_path / "t")
    found = sweep(trace, {"pages_to_scan": [200]}, seconds=12, every=1)
    assert found.points == (
        Point.of({"pages_to_scan": 200}, simulate(trace, seconds=12, every=1, tunables={"pages_to_scan": 200})),
    )
    assert found.points[0].cow_ksm == 100 and found.points[0].settled_bytes == 500 * PAGE


def test_large_pages() -> None:
    found = sweep([IMAGE.reshape(-1, 16384)] * 2, {}, seconds=5, page_size=16384)
    assert found.points[0].saved_bytes == IMAGE.nbytes


@pytest.mark.parametrize(
    ("choices", "options", "message"),
    [
        ({"pages_to_scan": []}, {}, "without a value"),
        ({"pages_to_scan": range(400), "sleep_millisecs": range(400)}, {}, "too many"),
        ({}, {"jobs": 0}, "processes"),
        ({}, {"kernel": "2.6"}, "kernel"),
        ({}, {"nodes": [0, 1]}, "2 nodes"),
        ({"max_page_sharing": [256, 1]}, {}, "Invalid argument"),
        ({"no_such_tunable": [1]}, {}, "No such file"),
        ({"smart_scan": [1]}, {"kernel": "6.1"}, "No such file"),
    ],
)
def test_what_cannot_be(choices: dict[str, list[int]], options: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        sweep([b"x" * PAGE], choices, seconds=1, **options)  # type: ignore[arg-type]


def test_a_process_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ksm.sweep, "_WORK", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(KsmError, match=r"died \(exit code -9\)"):
        sweep([b"x" * PAGE], {"pages_to_scan": [1, 2, 3]}, seconds=1, jobs=2)


def test_files_beside_the_caller_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker does not take a module from the directory that the user stands in."""
    monkeypatch.chdir(tmp_path)
    for name in ("pickle", "numpy", "struct"):
        (tmp_path / f"{name}.py").write_text("import os; os._exit(3)\n")
    assert len(sweep([b"x" * PAGE], {}, seconds=1).points) == 1


# ---- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> str:
    IMAGE.tofile(tmp_path / "guest.raw")
    return "guest.raw"


def test_for_people(run: Run, image: str) -> None:  # noqa: F811
    done = run("sweep", image, image, "--pages-to-scan", "10,1000", "--for", "20s")
    assert done.returncode == 0 and done.stderr == "" and "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].split()[0] == "pages_to_scan" and "sleep_millisecs" not in lines[0]
    assert [line.split()[0] for line in lines[1:3]] == ["10", "1000"]
    assert "pages_to_scan 1000" in lines[3] and "cheapest" in lines[3]


def test_for_programs(run: Run, image: str, tmp_path: Path) -> None:  # noqa: F811
    arguments = ("sweep", image, image, "--pages-to-scan", "100", "--set", "advisor_mode=none,scan-time")
    answer = json.loads(run(*arguments, "--for", "5s", "--every", "1s", "--json").stdout)
    assert [point["advisor_mode"] for point in answer["points"]] == ["none", "scan-time"]
    assert all(point["saved_bytes"] == IMAGE.nbytes for point in answer["points"])
    done = run(*arguments, "--for", "5s", "--every", "1s", "--csv", "out.csv")
    assert done.returncode == 0 and "cheapest" in done.stdout
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{name: str(value) for name, value in point.items()} for point in answer["points"]] == rows
    assert run(*arguments, "--csv", "out.csv").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--pages-to-scan", "1,"], 2),
        (["--pages-to-scan", "1;2"], 2),
        (["--set", "smart_scan"], 2),
        (["--set", "smart_scan="], 2),
        (["--set", "pages_to_scan=1"], 2),
        (["--set", "smart_scan=1", "--set", "smart_scan=0"], 2),
        (["--set", "max_page_sharing=1"], 1),
        (["--csv", "-", "--json"], 2),
        (["--for", "0"], 2),
        (["missing.raw"], 65),
    ],
)
def test_wrong_usage(run: Run, image: str, arguments: list[str], code: int) -> None:  # noqa: F811
    done = run("sweep", image, *arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def workers(parent: int) -> list[int]:
    """The running children of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(stat[1]) == parent and stat[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux's procfs")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left(image: str, tmp_path: Path, number: signal.Signals) -> None:
    arguments = ["sweep", image, "--for", "30d", "--every", "100s", "--sleep-millisecs", "0", "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ksm", *arguments], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while len(mine := workers(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(mine) == 2
    time.sleep(0.5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert "Traceback" not in errors
    while (left := [pid for pid in mine if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left

"""Calibration: the arithmetic of the fit, the patterns of pages, and the kernel itself where there is one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ksm
from ksm import cost as model
from ksm.calibrate import (
    FITTED,
    UNSEEN,
    Observation,
    counters,
    fit,
    kernel_passes,
    machine_of,
    observe,
    require_alone,
    totals,
)
from ksm.cli import main
from ksm.cli.demo import cannot_verify
from ksm.cost import COSTS, CostModel, Work
from ksm.linux import Host
from ksm.patterns import KINDS, chunks, contents, filled

PAGE = 4096
REAL = cannot_verify(Host())
kernel = pytest.mark.skipif(REAL is not None, reason=f"the kernel cannot be asked here: {REAL}")


# ---- pages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pages_hold_what_their_kind_says(kind: str) -> None:
    n = 10_000
    pages = np.concatenate(list(chunks(kind, n)))
    number = contents(kind, n)
    prints = ksm.fingerprint(pages)
    pairs = set(zip(map(int, number), map(tuple, prints.words.tolist()), strict=True))
    assert len(pairs) == len(set(number.tolist())) == len(prints.unique()[0])  # one content each way
    assert np.array_equal(prints.zeros(), ~pages.any(axis=1))
    assert (filled(kind, n) == pages).all()
    zeros = {"zeros": sum(i % 7 < 3 for i in range(n)), "guest": sum(i % 17 == 1 for i in range(n))}
    different = len(set(number.tolist()))
    expected = {"unique": n, "copies": n // 16, "pairs": n // 2, "few": n // 2 + 512, "zeros": n - zeros["zeros"] + 1}
    assert different == expected.get(kind, different)
    assert prints.zeros().sum() == zeros.get(kind, 0)


def test_no_such_pages() -> None:
    with pytest.raises(ValueError, match="'nonsense' pages; there are unique"):
        contents("nonsense", 3)


# ---- the fit -------------------------------------------------------------------------------------


def passes(cost: CostModel, noise: float = 0.0) -> list[Observation]:
    """What simulated machines do, charged by a model."""
    random = np.random.default_rng(1)
    found = []
    for kind in ("unique", "copies", "few"):
        for n in (500, 2000, 8000):
            machine = machine_of(ksm.fingerprint(np.concatenate(list(chunks(kind, n)))))
            before = machine.ksmd.work
            for number in range(1, 6):
                machine.ksmd.scan()
                work = machine.ksmd.work - before
                before = machine.ksmd.work
                seconds = cost.of(work) / 1e9 * (1 + noise * random.standard_normal())
                found.append(Observation(kind, n, number, work, seconds))
    return found


TRUE = CostModel(
    hash_ns=700.0,
    level_ns=150.0,
    merge_ns=1500.0,
    merged_ns=200.0,
    stable_level_ns=20.0,
    deep_ns=250.0,
    skip_ns=90.0,
)


def test_the_fit_finds_the_constants() -> None:
    found = fit(passes(TRUE))
    for name in COSTS:
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name


def test_the_fit_bears_noise() -> None:
    seen = passes(TRUE, noise=0.05)
    found = fit(seen)
    assert found.hash_ns == pytest.approx(700, rel=0.1)
    assert all(getattr(found, name) >= 0 for name in COSTS)
    assert all(abs(total.error) < 0.1 for total in totals(seen, found))


def test_no_cost_falls_below_nothing() -> None:
    """A pass with more merges that took less time must not make merging pay."""
    seen = [Observation("x", 9, n, Work(hashed=1000, merges=n * 100), (10 - n) * 1e-4) for n in range(1, 6)]
    found = fit(seen)
    assert found.merge_ns == 0.0 < found.hash_ns


def test_what_nothing_is_told_about_stays() -> None:
    start = CostModel(skip_ns=77.0, deep_ns=33.0)
    found = fit([Observation("x", 9, 1, Work(hashed=1000), 9e-4)], start)
    assert (found.hash_ns, found.skip_ns, found.deep_ns) == (pytest.approx(900.0), 77.0, 33.0)
    with pytest.raises(ValueError, match="no passes"):
        fit([])


def test_totals_add_up_by_memory() -> None:
    seen = passes(TRUE)
    rows = totals(seen, TRUE)
    assert [(row.kind, row.pages) for row in rows[:2]] == [("unique", 500), ("unique", 2000)]
    assert all(row.passes == 5 and row.error == pytest.approx(0, abs=1e-6) for row in rows)
    assert sum(row.seconds for row in rows) == pytest.approx(sum(one.seconds for one in seen))
    worse = totals(seen, TRUE.scaled(1.5))
    assert all(row.error == pytest.approx(0.5, abs=1e-5) for row in worse)


def test_what_is_not_fitted_is_not_seen() -> None:
    assert {kind for kind, _ in FITTED}.isdisjoint({kind for kind, _ in UNSEEN})


# ---- the kernel ----------------------------------------------------------------------------------


@kernel
def test_the_kernel_and_ksm_count_alike_and_all_is_put_back() -> None:
    host = Host()
    with host.lock():
        before = {name: host.ksm.read(name) for name in host.ksm.tunables()}
        for kind in KINDS:
            found = observe(host, kind, 2048)  # raises if a counter differs
            assert [one.number for one in found] == [1, 2, 3, 4, 5]
            assert all(one.seconds > 0 for one in found)
            assert found[0].work.hashed == 2048
        assert {name: host.ksm.read(name) for name in host.ksm.tunables()} == before
        assert host.ksm.pages_shared == 0


@kernel
def test_shared_memory_of_others_is_in_the_way(tmp_path: Path) -> None:
    script = (
        "import mmap, sys, ksm; a = mmap.mmap(-1, 1 << 16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); a[0] = 1;"
        " ksm.linux.madvise(a, ksm.MADV_MERGEABLE); print('ready', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(ksm.__file__).parents[1])}
    host = Host()
    with (
        host.lock(),
        subprocess.Popen(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other,
    ):
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == b"ready\n"
        try:
            with pytest.raises(ksm.UnsupportedError, match=rf"in use here, by \S+ \({other.pid}\)"):
                require_alone(host)
            with pytest.raises(ksm.UnsupportedError, match="in use"):
                kernel_passes(host, filled("pairs", 16))
        finally:
            other.stdin.close()


@kernel
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = tmp_path / "cost.json"
    arguments = ["calibrate", "--memory", "16", "--rounds", "1", "--output", str(where)]
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    written = CostModel.load(where)
    assert written == CostModel(**answer["cost_model"])
    assert written.hash_ns > 0 and "ksm calibrate, 20" in written.origin
    assert {row["kind"] for row in answer["fitted"]} == {"unique", "copies", "few"}
    assert {row["kind"] for row in answer["unseen"]} == {"guest", "pairs", "zeros"}
    errors = [abs(row["error"]) for row in answer["unseen"]]
    assert max(errors) == abs(answer["worst_error_unseen"])
    for row in (*answer["fitted"], *answer["unseen"]):
        mine = [one for one in answer["passes"] if (one["kind"], one["pages"]) == (row["kind"], row["pages"])]
        assert row["seconds"] == pytest.approx(sum(one["seconds"] for one in mine))
    assert main(arguments) == 2
    assert "exists; --force overwrites it" in capsys.readouterr().err


@kernel
def test_verify_tells_a_wrong_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    CostModel().scaled(10).save(tmp_path / "ksm" / "cost.json")
    assert main(["calibrate", "--memory", "16", "--rounds", "1", "--verify"]) == 4
    found = capsys.readouterr()
    assert "NOT within 20 %" in found.out and "off, over" in found.err
    assert [path.name for path in (tmp_path / "ksm").iterdir()] == ["cost.json"]


@kernel
def test_ctrl_c_puts_everything_back(tmp_path: Path) -> None:
    host = Host()
    where = tmp_path / "cost.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(ksm.__file__).parents[1])}
    script = "import sys; from ksm.cli import main; sys.exit(main())"
    arguments = ["calibrate", "--memory", "256", "--output", str(where)]
    with host.lock():
        before = {name: host.ksm.read(name) for name in host.ksm.tunables()}
        scans = host.ksm.full_scans
    run = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], cwd=tmp_path, env=environment, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 60
        while host.ksm.full_scans == scans and time.monotonic() < deadline:
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert (run.returncode, errors.decode().strip()) == (130, "ksm: interrupted")
    assert not where.exists()
    with host.lock():
        assert {name: host.ksm.read(name) for name in host.ksm.tunables()} == before
        assert not [process for process in host.processes(skip_unreadable=True) if process.pid == run.pid]


def test_without_the_kernel(run_python: Callable[[str], str]) -> None:
    """One line and an exit code where ksmd cannot be had."""
    script = (
        "import sys, ksm.cli.calibrate as c, ksm.linux; from ksm.cli import main; sys.stderr = sys.stdout;"
        " c.Host = lambda: ksm.linux.Host(root='/nonexistent'); print(main(['calibrate']))"
    )
    said, code = run_python(script).splitlines()
    assert said.startswith("ksm: there is no KSM here")
    assert code == "69"


def test_asked_wrongly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--verify", "--output", "x"]) == 2
    assert main(["calibrate", "--memory", "1"]) == 2
    assert main(["calibrate", "--rounds", "0"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@kernel
def test_too_little_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "--memory", str(1 << 30)]) == 69
    assert "of memory are free" in capsys.readouterr().err


# ---- who uses it -----------------------------------------------------------------------------------


def test_simulate_says_by_which_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(model, "SYSTEM_FILE", tmp_path / "none.json")
    image = tmp_path / "guest.raw"
    image.write_bytes(np.concatenate(list(chunks("guest", 5000))).tobytes())

    def cpu(*options: str) -> tuple[float, str]:
        assert main(["simulate", str(image), "--for", "20s", "--json", *options]) == 0
        answer = json.loads(capsys.readouterr().out)
        return answer["samples"][-1]["ksmd_cpu_seconds"], answer["cost_model"]["origin"]

    built_in, origin = cpu()
    assert origin.startswith("built in")
    replace(CostModel().scaled(2), origin="measured here").save(tmp_path / "config" / "ksm" / "cost.json")
    twice, origin = cpu()
    assert origin == f"{tmp_path / 'config' / 'ksm' / 'cost.json'}: measured here"
    assert twice == pytest.approx(2 * built_in, rel=0.1)
    assert cpu("--cost-model", "built-in") == (built_in, CostModel().origin)
    CostModel().scaled(0).save(tmp_path / "free.json")
    assert cpu("--cost-model", str(tmp_path / "free.json"))[0] == 0
    assert main(["simulate", str(image), "--for", "1s"]) == 0
    assert "by the cost model (" in capsys.readouterr().out
    assert main(["simulate", str(image), "--cost-model", "/nonexistent"]) == 65
    (tmp_path / "config" / "ksm" / "cost.json").write_text("{}")
    assert main(["simulate", str(image)]) == 65
    assert counters(machine_of(filled("pairs", 4)).ksm)["pages_sharing"] == 0

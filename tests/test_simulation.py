"""Simulated time over sources and traces: replayed memory behaves as memory that is really written to."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import ksm
import ksm.trace
from ksm.keyed import Key
from ksm.simulation import Simulation, simulate
from ksm.sources import ArrayImage
from ksm.trace import Replay, Trace, record
from tests.test_cli import Run, run  # noqa: F401 - a fixture

PAGE = 4096
Pages = npt.NDArray[np.uint8]


def moments(seed: int, steps: int, pages: int = 600) -> dict[str, list[Pages]]:
    """Two guests that share half of their pages at first, and change a few of them at each step."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, 256, (pages, PAGE), dtype=np.uint8)
    found: dict[str, list[Pages]] = {}
    for name in ("vm1", "vm2"):
        now = common.copy()
        now[pages // 2 :] = rng.integers(0, 256, (pages - pages // 2, PAGE), dtype=np.uint8)
        found[name] = [now.copy()]
        for _ in range(steps - 1):
            where = rng.choice(pages, 20, replace=False)
            now[where[:10]] = rng.integers(0, 256, (10, PAGE), dtype=np.uint8)
            now[where[10:]] = common[:10]
            found[name].append(now.copy())
    return found


def recorded(where: Path, held: dict[str, list[Pages]], every: float, **options: object) -> Trace:
    images = {name: [ArrayImage(pages) for pages in series] for name, series in held.items()}
    record(images, where, every=every, **options)  # type: ignore[arg-type]
    return Trace(where)


COUNTERS = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "full_scans", "pages_scanned")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("key", [None, Key.from_bytes(b"k" * 32)], ids=["plain", "keyed"])
def test_a_replay_is_as_if_it_were_written(tmp_path: Path, seed: int, key: Key | None) -> None:
    """The same changes, once out of a trace and once by writing bytes to a machine of pages, counter for counter."""
    held = moments(seed, 8)
    replay = recorded(tmp_path / "t", held, 3.0, key=key).replay(ksm.Machine(kernel="6.6"))
    machine = ksm.Machine(kernel="6.6")
    where = {}
    for name, series in held.items():
        process = machine.spawn(name)
        where[name] = process.mmap(series[0].nbytes, addr=0)
        process.write(where[name], series[0].tobytes())
        process.madvise(where[name], series[0].nbytes, ksm.MADV_MERGEABLE)
    for m in (replay.machine, machine):
        m.ksm.pages_to_scan = 500
        m.ksm.run = 1
    for step in range(1, 9):
        replay.run_for(2.999)
        machine.run_for(2.999)
        ours, theirs = replay.ksm.snapshot(), machine.ksm.snapshot()
        assert [getattr(ours, name) for name in COUNTERS] == [getattr(theirs, name) for name in COUNTERS], step
        assert replay.machine.vmstat == machine.vmstat
        replay.machine.check()
        replay.run_for(0.001)
        machine.run_for(0.001)
        if step < 8:
            for name, series in held.items():
                for page in np.flatnonzero((series[step] != series[step - 1]).any(axis=1)):
                    machine.processes[name].write(int(page) * PAGE, series[step][page].tobytes())
    assert machine.vmstat["cow_ksm"] > 50


def test_processes_and_pages_that_come_and_go(tmp_path: Path) -> None:
    pages = np.arange(1, 101, dtype=np.uint8)[:, None].repeat(PAGE, axis=1)
    half = np.arange(100) < 50
    series = {
        "long": [ArrayImage(pages), ArrayImage(pages, present=half), ArrayImage(pages, present=~half)],
        "short": [ArrayImage(pages, address=1 << 30)],
    }
    record(series, tmp_path / "t", every=10)
    replay = Trace(tmp_path / "t").replay()
    replay.ksm.run = 1
    replay.run_for(9)
    assert (replay.ksm.pages_shared, replay.ksm.pages_sharing) == (100, 100)
    replay.run_for(10)
    assert list(replay.machine.processes) == ["long"]
    assert replay.ksm.pages_sharing == 0 and replay.machine.frames == 50
    assert replay.machine.processes["long"].ksm_stat["ksm_rmap_items"] == 50
    replay.run_for(100)
    assert replay.machine.frames == 50 and replay.now == 119


def test_volatile_pages(tmp_path: Path) -> None:
    """Pages that change between any two visits never settle; the others do."""
    rng = np.random.default_rng(3)
    still = rng.integers(0, 256, (40, PAGE), dtype=np.uint8)
    held = {"vm": [np.concatenate((still, rng.integers(0, 256, (10, PAGE), dtype=np.uint8))) for _ in range(40)]}
    replay = recorded(tmp_path / "t", held, 0.02).replay(ksm.Machine(kernel="6.6"))
    replay.ksm.run = 1
    replay.run_for(0.7)
    assert (replay.ksm.pages_unshared, replay.ksm.pages_volatile) == (40, 10)


def test_zero_pages_of_dumps(tmp_path: Path) -> None:
    pages = np.zeros((50, PAGE), np.uint8)
    pages[:10] = 7
    for known, expected in ((True, 49), (False, 9)):
        record({"vm": [ArrayImage(pages, anonymous_known=known)]}, tmp_path / f"{known}")
        replay = Trace(tmp_path / f"{known}").replay(zeros="absent")
        replay.ksm.run = 1
        replay.run_for(2)
        assert replay.ksm.pages_sharing == (48 if known else expected)


def test_what_a_replay_cannot_have(tmp_path: Path) -> None:
    trace = ksm.trace.example()
    with pytest.raises(ValueError, match="do not fit"):
        Replay(trace, ksm.Machine(page_size=16384))
    used = ksm.Machine()
    used.spawn()
    with pytest.raises(ValueError, match="of its own"):
        Replay(trace, used)
    with pytest.raises(ValueError, match="zeros is"):
        Replay(trace, zeros="perhaps")
    for seconds in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="cannot run"):
            trace.replay().run_for(seconds)


# ---- samples ----------------------------------------------------------------------------------------


def test_samples_extrapolate_without_bias_and_know_their_error(tmp_path: Path) -> None:
    """Over many keys, which choose as many samples: the mean is right, and one standard error covers about 68 %."""
    rng = np.random.default_rng(0)
    contents = rng.integers(0, 256, (300, PAGE), dtype=np.uint8)
    pages = contents[rng.integers(0, 300, 3000) * rng.integers(1, 3, 3000) % 300]
    pages[:200] = 0
    image = ArrayImage(pages)
    truth = ksm.estimate([image]).pages_sharing
    answers, errors = [], []
    for number in range(40):
        where = tmp_path / str(number)
        record({"vm": [image]}, where, sample=4, key=Key.from_bytes(bytes([number]) * 32))
        trace = Trace(where)
        taken = trace.at(0)
        answers.append(ksm.estimate(taken).pages_sharing * 4)
        errors.append(trace.sample.error(taken))
    spread = float(np.std(answers))
    assert abs(np.mean(answers) - truth) < 3 * spread / np.sqrt(40)
    assert 0.7 < np.mean(errors) / spread < 1.4
    covered = np.mean(np.abs(np.array(answers) - truth) <= np.array(errors))
    assert 0.5 <= covered <= 0.85


def test_a_sample_takes_as_long_as_the_whole(tmp_path: Path) -> None:
    """Passes over a sample, with batches and costs scaled, end when those over the whole do."""
    held = moments(1, 3, 4000)
    whole = simulate(recorded(tmp_path / "all", held, 5), seconds=10, every=1, tunables={"pages_to_scan": 200})
    part = simulate(
        recorded(tmp_path / "some", held, 5, sample=4), seconds=10, every=1, tunables={"pages_to_scan": 200}
    )
    assert part.sample_of == 4 and part.tunables["pages_to_scan"] == 200
    for ours, theirs in zip(part.samples, whole.samples, strict=True):
        assert abs(ours.full_scans - theirs.full_scans) <= 1 + theirs.full_scans // 10
    assert part.cpu_share == pytest.approx(whole.cpu_share, rel=0.25)
    error = 4 * part.settled_error_bytes
    assert abs(part.samples[-1].saved_bytes - whole.samples[-1].saved_bytes) < error > 0
    assert whole.settled_error_bytes == 0
    last, other = part.samples[-1], whole.samples[-1]
    assert last.saved_bytes == last.pages_sharing * PAGE
    for name in ("pages_shared", "pages_sharing", "pages_scanned", "general_profit", "cow_ksm", "settled_bytes"):
        assert getattr(last, name) == pytest.approx(getattr(other, name), rel=0.25), name
    assert last.pages_unshared + last.pages_volatile == pytest.approx(
        other.pages_unshared + other.pages_volatile, rel=0.25
    )


def test_samples_too_thin(tmp_path: Path) -> None:
    trace = recorded(tmp_path / "t", moments(1, 1, 50), 5, sample=64)
    with pytest.raises(ksm.UnsupportedError, match="at least 512"):
        simulate(trace, seconds=1, every=1, tunables={"pages_to_scan": 100})
    with pytest.raises(ksm.UnsupportedError, match="advisor"):
        simulate(trace, seconds=1, every=1, tunables={"advisor_mode": "scan-time", "pages_to_scan": 1000})


# ---- simulate -----------------------------------------------------------------------------------------


def test_sources_and_a_still_trace_give_the_same(tmp_path: Path) -> None:
    held = moments(2, 1)
    trace = simulate(recorded(tmp_path / "t", held, 1), seconds=3, every=1)
    sources = simulate([ArrayImage(held[name][0], name) for name in held], seconds=3, every=1)
    assert trace.samples == sources.samples and trace.reached == sources.reached
    assert trace.tunables == sources.tunables
    assert trace.settled.pages_sharing == sources.settled.pages_sharing == sources.samples[-1].pages_sharing


def test_goals_follow_memory(tmp_path: Path) -> None:
    pages = np.arange(1, 101, dtype=np.uint8)[:, None].repeat(PAGE, axis=1)
    unlike = pages + np.uint8(128)
    trace = recorded(tmp_path / "t", {"a": [pages, pages], "b": [pages, unlike]}, 10)
    found = simulate(trace, seconds=30, every=5, tunables={"pages_to_scan": 100})
    assert [sample.settled_bytes // PAGE for sample in found.samples] == [100, 100, 0, 0, 0, 0, 0]
    assert found.samples[-1].cow_ksm == 100 and found.samples[1].pages_sharing == 100
    assert found.samples[-1].pages_sharing == 0


def test_tunables_are_checked(tmp_path: Path) -> None:
    for tunables in ({"max_page_sharing": 1}, {"nonsense": 1}, {"pages_sharing": 1}, {"use_zero_pages": "perhaps"}):
        with pytest.raises(OSError):
            simulate([b"x" * PAGE], seconds=1, every=1, tunables=tunables)
    with pytest.raises(ValueError, match="recorded"):
        simulate(ksm.trace.example(), seconds=1, every=1, nodes=[0, 0])


def test_mean_saving() -> None:
    found = simulate([b"x" * PAGE * 2], seconds=2, every=1)
    assert isinstance(found, Simulation)
    assert found.mean_saved_bytes == (0 + PAGE) / 2 / 2 + PAGE / 2


# ---- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def dumps(tmp_path: Path) -> None:
    for name, series in moments(5, 3).items():
        (tmp_path / name).mkdir()
        for number, pages in enumerate(series):
            pages.tofile(tmp_path / name / f"{number}.raw")


def test_record_and_simulate(run: Run, tmp_path: Path, dumps: None) -> None:  # noqa: F811
    done = run("record", "vm1", "vm2", "--series", "--every", "5s", "-o", "host.trace")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines()[0] == "host.trace: 3 steps over 10 s, 2 processes, 4.7 MiB of memory on average."
    done = run("simulate", "host.trace", "--every", "1s")
    assert done.returncode == 0 and "CoW breaks" in done.stdout and "would settle at" in done.stdout
    answer = json.loads(run("simulate", "host.trace", "--every", "1s", "--json").stdout)
    assert answer["samples"][-1]["seconds"] == 10 and answer["samples"][-1]["cow_ksm"] > 0
    again = run("record", "vm1", "vm2", "--series", "-o", "host.trace")
    assert again.returncode == 1 and "--resume" in again.stderr and again.stderr.count("\n") == 1


def test_record_under_a_key(run: Run, tmp_path: Path, dumps: None) -> None:  # noqa: F811
    (tmp_path / "host.key").write_bytes(bytes(32))
    (tmp_path / "host.key").chmod(0o600)
    arguments = ("record", "vm1", "--series", "--key", "host.key", "-o", "host.trace", "--sample", "1/2", "--json")
    found = json.loads(run(*arguments).stdout)
    assert found["key_id"] == Key.from_bytes(bytes(32)).id and found["sample_of"] == 2 and found["bytes"] > 0
    (tmp_path / "host.key").chmod(0o644)
    done = run("record", "vm1", "--series", "--key", "host.key", "-o", "other.trace")
    assert done.returncode == 65 and "everybody" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["record", "vm1", "-o", "t", "--every", "0"], 2),
        (["record", "vm1", "-o", "t", "--cpu", "none"], 2),
        (["record", "vm1", "-o", "t", "--cpu", "0%"], 2),
        (["record", "vm1", "-o", "t", "--sample", "2"], 2),
        (["record", "vm1"], 2),
        (["record", "missing.raw", "-o", "t"], 65),
        (["record", "missing", "-o", "t", "--series"], 65),
        (["record", "vm1", "--series", "-o", "t", "--resume"], 65),
        (["record", "vm1", "--series", "-o", "missing/t"], 1),
        (["simulate", "missing.trace"], 65),
    ],
)
def test_wrong_usage_is_told(run: Run, dumps: None, arguments: list[str], code: int) -> None:  # noqa: F811
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


def test_without_pyarrow(run: Run, tmp_path: Path, dumps: None) -> None:  # noqa: F811
    (tmp_path / "pyarrow.py").write_text("raise ImportError\n")
    script = "import sys; sys.path.insert(0, '.'); from ksm.cli import main; sys.exit(main())"
    import sys

    from tests.test_cli import environment

    done = subprocess.run(
        [sys.executable, "-c", script, "record", "vm1", "--series", "-o", "t"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 69
        and done.stderr == "ksm: traces are Parquet files and need pyarrow: pip install 'ksm[trace]'\n"
    )

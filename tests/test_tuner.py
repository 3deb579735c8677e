"""The tuner: what it writes, whom it steps aside for, and that everything is put back however it ends."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import ksm
from ksm.cli import main
from ksm.linux import KSM_ROOT, Host, madvise
from ksm.policies import Decision, Pressure, Target, View
from ksm.stats import Stats
from ksm.stepper import restore
from ksm.sysfs import profile
from ksm.tune import value_of
from ksm.tuner import LOCK_PATH, MANAGED, Lookout, Step, Tuner, value_of_or_none

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the tuner is for Linux")


def why_not() -> str | None:
    if not Path(KSM_ROOT, "run").exists():
        return "the running kernel has no KSM"
    return None if os.geteuid() == 0 else "tuning needs root"


needs_kernel = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def make_host(where: Path, kernel: str = "6.12") -> Host:
    """A host of files with 16 GiB of memory, of which 2 are available, and one guest of 100 pages."""
    (where / "ksm").mkdir()
    for name, attribute in profile(kernel).attributes.items():
        (where / "ksm" / name).write_text(attribute.format(attribute.default))
    guest = where / "proc" / "100"
    guest.mkdir(parents=True)
    (guest / "ksm_stat").write_text("ksm_rmap_items 0\nksm_merge_any: yes\nksm_mergeable: yes\n")
    (guest / "ksm_merging_pages").write_text("0\n")
    (guest / "comm").write_text("guest\n")
    (guest / "status").write_text("Name: guest\nRssAnon:\t400 kB\n")
    set_available(where, 2 << 20)
    return Host(where / "ksm", where / "proc", where / "kernel.lock")


def set_available(where: Path, kib: int) -> None:
    text = f"MemTotal: {16 << 20} kB\nMemAvailable: {kib} kB\nCommitted_AS: 1000 kB\n"
    (where / "new").write_text(text)
    (where / "new").rename(where / "proc" / "meminfo")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return make_host(tmp_path)


class Steps(list[Step]):
    def __call__(self, step: Step) -> None:
        self.append(step)


def tuner(host: Host, report: Callable[[Step], None] = lambda step: None, **options: object) -> Tuner:
    return Tuner(host, Pressure(interval=0.01), report, lock_path=host.root.parent / "tune.lock", **options)  # type: ignore[arg-type]


def managed(host: Host) -> dict[str, str]:
    return {name: value_of(host.ksm, name) for name in MANAGED if name in host.ksm.names()}


# ---- in order --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["5.15", "6.1", "6.6", "6.12"])
def test_it_writes_and_puts_back(tmp_path: Path, kernel: str) -> None:
    host = make_host(tmp_path, kernel)
    host.ksm.sleep_millisecs = 33
    before = managed(host)
    steps = Steps()
    with tuner(host, steps) as it:
        it.run(seconds=0.05)
        assert (host.ksm.run, host.ksm.sleep_millisecs) == (1, 10)
        assert steps[0].changed == {"sleep_millisecs": "10", "pages_to_scan": "300", "run": "1"}
        assert host.ksm.pages_to_scan == min(1250, 300 * it.steps)
        set_available(tmp_path, 9 << 20)
        last = it.step()
        assert last.changed["run"] == "0" and host.ksm.run == 0
        assert last.decision is not None and "threshold 3,276 MiB" in last.decision.why
    assert managed(host) == before
    assert (tmp_path / "tune.lock").read_text() == ""
    assert json.loads(json.dumps(steps[0].to_dict()))["wanted"]["run"] == "1"


def test_the_advisor_is_off_meanwhile(host: Host) -> None:
    (host.root / "advisor_mode").write_text("none [scan-time]\n")
    with tuner(host) as it:
        assert (host.root / "advisor_mode").read_text() == "none"
        (host.root / "advisor_mode").write_text("[none] scan-time\n")  # as the kernel would show it
        it.run(seconds=0.03)
    assert (host.root / "advisor_mode").read_text() == "scan-time"


def test_run_is_never_2(host: Host) -> None:
    host.ksm.run = 2
    with tuner(host) as it:
        it.step()
        assert host.ksm.run == 1
    assert host.ksm.run == 0


def test_a_dry_run_writes_nothing(host: Host, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in host.root.iterdir()}
    steps = Steps()
    with tuner(host, steps, dry_run=True) as it:
        it.run(seconds=0.03)
    assert steps and steps[-1].changed["run"] == "1"
    assert {path.name: path.stat().st_mtime_ns for path in host.root.iterdir()} == before
    assert not (tmp_path / "tune.lock").exists()


def test_target_counts_who_takes_part(host: Host, tmp_path: Path) -> None:
    """New processes with all their anonymous pages, those scanned twice with what is tracked of them."""
    lookout = Lookout(host, lambda: 5.0)
    view = lookout.look()
    assert (view.candidates, view.seconds, view.ksmd_cpu) == (100 * 4096 // host.page_size, 5.0, None)
    (tmp_path / "proc/100/ksm_stat").write_text("ksm_rmap_items 40\nksm_mergeable: yes\n")
    assert lookout.look().candidates == view.candidates
    (host.root / "full_scans").write_text("2\n")
    assert lookout.look().candidates == 40
    (tmp_path / "proc/100/ksm_stat").unlink()
    (tmp_path / "proc/100/ksm_merging_pages").write_text("0\n")
    assert lookout.look().candidates == 0
    steps = Steps()
    (host.root / "full_scans").write_text("0\n")
    with Tuner(host, Target(60, 10), steps, lock_path=tmp_path / "tune.lock") as it:
        it.step()
        assert host.ksm.smart_scan is False and host.ksm.run == 1
    assert host.ksm.smart_scan is True


# ---- others ---------------------------------------------------------------------------------------------------


def test_others_decide_about_run(host: Host) -> None:
    """ksmd stopped under it: it leaves all alone until that is undone, and at the end too."""
    with tuner(host) as it:
        it.step()
        host.ksm.run = 0
        aside = it.step()
        assert aside.changed == {} and "somebody set run to 0" in aside.note and host.ksm.run == 0
        host.ksm.run = 1
        assert it.step().decision is not None
        host.ksm.run = 2
        assert "somebody set run to 2" in it.step().note
    assert host.ksm.run == 2  # theirs
    assert host.ksm.pages_to_scan == 100  # ours


def test_others_switch_the_advisor_on(host: Host) -> None:
    with tuner(host) as it:
        it.step()
        (host.root / "advisor_mode").write_text("none [scan-time]\n")
        host.ksm.pages_to_scan = 500
        assert "leaving pages_to_scan to the kernel" in it.step().note
    assert host.ksm.pages_to_scan == 500 and host.ksm.advisor_mode == "scan-time"
    assert host.ksm.run == 0


def test_others_change_what_is_tuned(host: Host) -> None:
    with tuner(host) as it:
        it.step()
        host.ksm.pages_to_scan = 7
        assert it.step().note == "somebody set pages_to_scan to 7"
        assert host.ksm.pages_to_scan == 600
        host.ksm.sleep_millisecs = 99
    assert host.ksm.sleep_millisecs == 99
    assert host.ksm.pages_to_scan == 100


def test_a_program_that_steps_ksmd_is_waited_for(host: Host) -> None:
    other = Host(host.root, host.proc, host.lock_path)
    with tuner(host) as it:
        with other.lock():
            step = it.step()
        assert "another program drives ksmd" in step.note and step.changed == {} and host.ksm.run == 0
        assert it.step().changed["run"] == "1"


def test_a_second_one_is_refused(host: Host) -> None:
    other = Host(host.root, host.proc, host.lock_path)
    with tuner(host) as it:
        it.step()
        with pytest.raises(TimeoutError, match=rf"another tuner is running \(pid {os.getpid()}\)"), tuner(other):
            pass
        assert host.ksm.run == 1
    with tuner(other):
        pass


def test_what_a_killed_one_left_is_put_back(host: Host, tmp_path: Path) -> None:
    lost = {"pid": 4711, "saved": {"pages_to_scan": "55", "run": "0", "sleep_millisecs": "-3", "max_page_sharing": "9"}}
    (tmp_path / "tune.lock").write_text(json.dumps(lost))
    host.ksm.pages_to_scan, host.ksm.run = 1250, 1
    with tuner(host) as it:
        it.step()
    assert (host.ksm.pages_to_scan, host.ksm.run) == (55, 0)
    assert (host.ksm.sleep_millisecs, host.ksm.max_page_sharing) == (20, 256)
    for damaged in ("{", "[]", '{"saved": 5}', '{"saved": {"run": [1]}}', "\0" * 9):
        (tmp_path / "tune.lock").write_text(damaged)
        with tuner(host) as it:
            it.step()
        assert (host.ksm.pages_to_scan, host.ksm.run) == (55, 0)


# ---- faults ------------------------------------------------------------------------------------------------------


def test_a_file_vanishes_for_a_while(host: Host) -> None:
    steps = Steps()
    meminfo = (host.proc / "meminfo").read_text()
    with tuner(host, steps) as it:
        (host.proc / "meminfo").unlink()
        for _ in range(4):
            it._turn()
        (host.proc / "meminfo").write_text(meminfo)
        it._turn()
        assert "meminfo is missing" in steps[3].note and steps[4].changed["run"] == "1"
        (host.proc / "meminfo").unlink()
        with pytest.raises(ksm.UnsupportedError, match="meminfo is missing"):
            it.run()
    assert host.ksm.run == 0


def test_a_tunable_vanishes_for_good(host: Host) -> None:
    with pytest.raises(FileNotFoundError, match="pages_to_scan"), tuner(host) as it:
        it.step()
        (host.root / "pages_to_scan").unlink()
        it.run()
    assert (host.ksm.run, host.ksm.sleep_millisecs) == (0, 20)  # the others are put back all the same


def test_an_error_in_the_report_puts_back(host: Host) -> None:
    def report(step: Step) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError), tuner(host, report) as it:
        it.run()
    assert host.ksm.run == 0 and host.ksm.pages_to_scan == 100


def test_the_clock_that_people_set_does_not_matter(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> float:
        raise AssertionError("the wall clock was asked")

    monkeypatch.setattr(time, "time", nobody)
    steps = Steps()
    with tuner(host, steps) as it:
        it.run(seconds=0.1)
    assert len(steps) >= 3


def test_after_a_pause_there_is_one_turn(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system was suspended, or the process stopped, for an hour: no 360,000 turns in a row."""
    offset = [0.0]
    genuine = time.monotonic
    steps = Steps()

    def report(step: Step) -> None:
        steps(step)
        if len(steps) == 3:
            offset[0] += 3600

    monkeypatch.setattr("ksm.tuner.time.monotonic", lambda: genuine() + offset[0])
    with tuner(host, report) as it:
        it.run(seconds=3600.05)
    assert 3 <= len(steps) <= 20


def test_it_can_be_woken_and_stopped(host: Host) -> None:
    class Slow:
        interval = 1000.0

        def decide(self, view: View) -> Decision:
            return Decision(True, 100, 20, "")

    steps = Steps()
    with Tuner(host, Slow(), lambda step: wake(step), lock_path=host.root.parent / "tune.lock") as it:

        def wake(step: Step) -> None:
            steps(step)
            if len(steps) < 5:
                it.wake()
            else:
                it.stop()

        start = time.monotonic()
        it.run()
    assert len(steps) == 5 and time.monotonic() - start < 10
    with pytest.raises(ValueError, match="inside its `with`"):
        tuner(host, dry_run=True)._wait(0.0)


def test_small_things(host: Host) -> None:
    assert LOCK_PATH.startswith("/run/") and os.path.dirname(LOCK_PATH) == "/run"  # where only root can write
    assert value_of_or_none(host.ksm, "advisor_mode") == "none"
    assert (
        Step(seconds=1.0, view=View(seconds=1.0, stats=Stats(), mem_total=1, mem_available=1)).to_dict()["note"] == ""
    )


# ---- the command, in a process of its own ------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
import ksm.cli.tune_auto as auto
from ksm.linux import Host
root = Path(sys.argv[1])
auto.Host = lambda: Host(root / "ksm", root / "proc", root / "kernel.lock")
auto.LOCK_PATH = root / "tune.lock"
from ksm.cli import main
sys.exit(main(["tune", "auto", *sys.argv[2:]]))
"""


@contextlib.contextmanager
def started(where: Path, *arguments: str, stdout: int | None = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": str(Path(ksm.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(where), "--interval", "50ms", *arguments],
        cwd=where,
        env=environment,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def running(host: Host) -> bool:
    text = (host.root / "run").read_text()
    return text.strip() == "1"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_stop_it_cleanly(host: Host, tmp_path: Path, number: int) -> None:
    before = managed(host)
    with started(tmp_path) as process:
        until(lambda: running(host))
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and err == ""
    lines = out.splitlines()
    assert lines[0] == "policy pressure, a decision every 0.05 s"
    assert lines[1].startswith("0 s: set sleep_millisecs=10 pages_to_scan=300 run=1; 2,048 MiB of memory available")
    assert lines[-1].endswith("the tunables are put back")
    assert managed(host) == before


def test_a_killed_one_and_its_heir(host: Host, tmp_path: Path) -> None:
    before = managed(host)
    with started(tmp_path) as process:
        until(lambda: running(host))
        process.kill()
    assert managed(host) != before
    with started(tmp_path) as second:
        until(lambda: json.loads((tmp_path / "tune.lock").read_text() or "{}").get("pid") == second.pid)
        with started(tmp_path) as third:
            _, err = third.communicate(timeout=20)
        assert third.returncode == 74 and err == f"ksm: another tuner is running (pid {second.pid})\n"
        second.terminate()
        assert second.wait(20) == 0
    assert managed(host) == before


def test_sigusr1_is_retune(host: Host, tmp_path: Path) -> None:
    with started(tmp_path, "--interval", "1h", "--json") as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGUSR1)
        second = json.loads(process.stdout.readline())
        process.terminate()
        process.communicate(timeout=20)
    assert (first["wanted"]["pages_to_scan"], second["wanted"]["pages_to_scan"]) == ("300", "600")
    assert process.returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_does_not_end_it(host: Host, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full, started(tmp_path, "--log", "/dev/full", "-v", stdout=full.fileno()) as process:
        until(lambda: (host.root / "pages_to_scan").read_text() == "1250")
        process.terminate()
        _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert err.splitlines() == [
        "ksm: writing stdout: No space left on device; the tuner goes on without it",
        "ksm: writing /dev/full: No space left on device; the tuner goes on without it",
    ]
    assert host.ksm.run == 0


def test_nobody_listens_any_more(host: Host, tmp_path: Path) -> None:
    with started(tmp_path, "-v") as process:
        until(lambda: running(host))
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(20) == 141
    assert host.ksm.run == 0


def test_the_settings_of_a_file(host: Host, tmp_path: Path) -> None:
    log = tmp_path / "log"
    (tmp_path / "conf").write_text(f"KSM_NPAGES_BOOST=77\nLOGFILE={log}\nDEBUG=1\nKSM_MONITOR_INTERVAL=9\n")
    with started(tmp_path, "--config", "conf", "--for", "300ms") as process:
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and err == ""
    assert "pages_to_scan=77 " in out
    told = log.read_text().splitlines()
    assert len(told) == len(out.splitlines()) and "T" in told[0].split()[0]


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("KSM_NPAGES_MAX=x", 2, "a whole number"),
        ("nonsense", 2, "conf: line 1: 'nonsense'"),
        (None, 66, "conf: No such file or directory"),
    ],
)
def test_bad_settings_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, code: int, words: str
) -> None:
    if text is not None:
        (tmp_path / "conf").write_text(text)
    assert main(["tune", "auto", "--config", str(tmp_path / "conf")]) == code
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_rights_are_missing(host: Host, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to give up root's rights")
    before = managed(host)
    script = SCRIPT.replace(
        "import sys\n", "import sys, os; import ksm.cli.tune_auto, rich.table; os.setuid(65534)\n", 1
    )
    environment = os.environ | {"PYTHONPATH": str(Path(ksm.__file__).parents[1])}
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent != Path("/tmp") and parent.is_relative_to("/tmp"):
            parent.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 77 and done.stderr.count("\n") == 1 and "needs root" in done.stderr, done.stderr
    assert managed(host) == before


UNIT = Path(__file__).parents[1] / "docs" / "ksm-tune.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_the_unit_is_one(tmp_path: Path) -> None:
    text = UNIT.read_text()
    assert "ExecStart=/usr/local/bin/ksm tune auto " in text
    unit = tmp_path / "ksm-tune.service"
    unit.write_text(text.replace("/usr/local/bin/ksm", "/bin/true").replace("man:ksm-tune-auto(1)", "man:true(1)"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# ---- the running kernel --------------------------------------------------------------------------------------------


@needs_kernel
def test_on_the_running_kernel(tmp_path: Path) -> None:
    """Memory is short (the threshold is all of it): ksmd runs and merges; then not, and what is merged stays so."""
    host = Host()
    n = 2000
    area = mmap.mmap(-1, n * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    madvise(area, ksm.MADV_NOHUGEPAGE)
    np.frombuffer(area, np.uint8)[:] = 201
    with host.lock():
        saved = {name: host.ksm.read(name) for name in host.ksm.tunables()}
        try:
            before = managed(host)
            madvise(area, ksm.MADV_MERGEABLE)
            policy = Pressure(interval=0.2, thres_coef=100, npages_max=5000, boost=1000)
            steps = Steps()
            with Tuner(host, policy, steps, lock_path=tmp_path / "lock") as it:
                merged = lambda: host.ksm_stat()["ksm_merging_pages"] == n  # noqa: E731
                end = time.monotonic() + 20
                while not merged() and time.monotonic() < end:
                    it.run(seconds=0.5)
                assert merged()
                assert host.ksm.run == 1
            assert managed(host) == before
            assert host.ksm_stat()["ksm_merging_pages"] == n
            assert {step.note for step in steps} == {""}
        finally:
            madvise(area, ksm.MADV_UNMERGEABLE)
            restore(host.ksm, saved)
            host.step(passes=2)


@needs_kernel
def test_target_on_the_running_kernel(tmp_path: Path) -> None:
    host = Host()
    n = 6000
    area = mmap.mmap(-1, n * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    madvise(area, ksm.MADV_NOHUGEPAGE)
    half = np.random.default_rng(7).integers(0, 256, n // 2 * mmap.PAGESIZE, np.uint8)
    np.frombuffer(area, np.uint8)[:] = np.concatenate([half, half])
    with host.lock():
        saved = {name: host.ksm.read(name) for name in host.ksm.tunables()}
        try:
            madvise(area, ksm.MADV_MERGEABLE)
            start, cpu = time.monotonic(), host.ksmd_cpu_seconds()
            with Tuner(host, Target(settle=6, cpu=30, interval=0.5), lambda step: None, lock_path=tmp_path / "l") as it:
                while host.ksm_stat()["ksm_merging_pages"] < n * 0.99 and time.monotonic() - start < 30:
                    it.run(seconds=0.5)
                took = time.monotonic() - start
            assert took < 20  # the machine is shared
            assert (host.ksmd_cpu_seconds() - cpu) / took < 0.35
        finally:
            madvise(area, ksm.MADV_UNMERGEABLE)
            restore(host.ksm, saved)
            host.step(passes=2)

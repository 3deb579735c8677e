"""`ksm run`: the program is opted in, and is otherwise as it would be without."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ksm
import ksm.optin
from ksm.cli.run import sentences
from ksm.errors import UnsupportedError, kernel_error
from ksm.linux import KSM_ROOT, Host, get_memory_merge
from ksm.optin import Outcome, Saving, execute, family, require_opt_in, saving
from ksm.stepper import restore

PRELOAD = Path(__file__).parents[1] / "docs" / "ksm-preload.c"


def why_not() -> str | None:
    if sys.platform != "linux" or not Path(KSM_ROOT, "run").exists():
        return "the running kernel has no KSM"
    try:
        require_opt_in()
    except UnsupportedError as error:
        return str(error)
    return None if os.geteuid() == 0 else "keeping other users of KSM away needs root"


needs_kernel = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.fixture
def host() -> Iterator[Host]:
    """Nobody else uses KSM meanwhile."""
    host = Host()
    with host.lock():
        yield host


def ksm_run(*arguments: str, **options: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(ksm.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-m", "ksm", "run", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    with process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


WAYS = pytest.mark.parametrize("way", [[], ["--json"]], ids=["exec", "stats"])


@needs_kernel
@WAYS
def test_the_program_and_its_children_are_opted_in(host: Host, way: list[str]) -> None:
    script = "cat /proc/self/ksm_stat; (cat /proc/self/ksm_stat; exit 0); grep -h '^Sig[BI]' /proc/self/status; exit 3"
    code, out, _ = finish(ksm_run(*way, "--", "sh", "-c", script))
    assert code == 3
    assert out.count("ksm_merge_any: yes") == 2
    # what any program is given by this process: nothing blocked, and ignored what was so before (nohup), no more
    plain = subprocess.run(["grep", "-h", "^Sig[BI]", "/proc/self/status"], capture_output=True, text=True, check=True)
    assert out.splitlines()[-2:] == plain.stdout.splitlines()
    assert plain.stdout.startswith("SigBlk:\t0000000000000000\n")
    assert get_memory_merge() is False


@needs_kernel
@WAYS
@pytest.mark.parametrize(("arguments", "code"), [(["nonono"], 127), (["/etc/passwd"], 126)])
def test_exit_codes(host: Host, way: list[str], arguments: list[str], code: int) -> None:
    got, out, err = finish(ksm_run(*way, *arguments))
    assert (got, out) == (code, "")
    assert err.startswith(f"ksm: {arguments[0]}: ") and err.count("\n") == 1


@needs_kernel
@pytest.mark.parametrize(
    ("way", "number"),
    [([], signal.SIGTERM), (["--json"], signal.SIGTERM), (["--json"], signal.SIGINT), (["--json"], signal.SIGUSR1)],
)
def test_signals_reach_the_program(host: Host, way: list[str], number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    process = ksm_run(*way, "--", "sh", "-c", f"trap 'exit 9' {name}; echo ready; while :; do sleep 0.05; done")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert finish(process)[0] == 9


@needs_kernel
@pytest.mark.parametrize(
    ("way", "number"), [([], signal.SIGTERM), (["--json"], signal.SIGSEGV), (["--json"], signal.SIGKILL)]
)
def test_it_ends_by_the_same_signal(host: Host, way: list[str], number: signal.Signals) -> None:
    code, _, _ = finish(ksm_run(*way, "sh", "-c", f"kill -{int(number)} $$"))
    assert code == -number


COUNT = """
import signal, time
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
print("ready", flush=True)
end = time.monotonic() + 5
while not seen and time.monotonic() < end:
    time.sleep(0.05)
time.sleep(0.3)
print("interrupted", len(seen), flush=True)
"""


@needs_kernel
@WAYS
def test_ctrl_c_arrives_once(host: Host, way: list[str]) -> None:
    """A terminal sends it to all of the group: the program must not get it from ksm a second time."""
    import pty

    pid, leader = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = str(Path(ksm.__file__).parents[1])
        os.execv(sys.executable, [sys.executable, "-m", "ksm", "run", *way, "--", sys.executable, "-c", COUNT])
    shown = b""
    try:
        while part := os.read(leader, 4096):
            shown += part
            if b"ready" in part:
                os.write(leader, b"\x03")
    except OSError:  # the other end has gone
        pass
    os.close(leader)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"interrupted 1\r\n" in shown


EQUAL_PAGES = """
import ctypes, mmap, sys, time
area = mmap.mmap(-1, 4000 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.write(b"equal".ljust(mmap.PAGESIZE, b"!") * 4000)
end = time.monotonic() + 20
merged = 0
while merged < 4000 and time.monotonic() < end:
    time.sleep(0.1)
    merged = int(open("/proc/self/ksm_merging_pages").read())
time.sleep(0.6)
"""


@needs_kernel
def test_what_it_saved(host: Host) -> None:
    saved = {name: host.ksm.read(name) for name in host.ksm.tunables()}
    try:
        host.ksm.write("advisor_mode", "none")
        host.ksm.pages_to_scan, host.ksm.sleep_millisecs, host.ksm.run = 20_000, 10, 1
        code, out, err = finish(ksm_run("--json", "--", sys.executable, "-c", EQUAL_PAGES))
        answer = json.loads(err)
        assert (code, out) == (0, "") and answer["ksmd_running"]
        assert answer["best"]["merging_pages"] >= 4000 and answer["best"]["rmap_items"] >= 4000
        assert answer["best"]["profit"] > 3900 * host.page_size
        assert answer["best"]["host_saved"] - answer["host_saved_before"] >= 3980 * host.page_size
        assert 0 < answer["last"]["seconds"] <= answer["seconds"]
        _, _, err = finish(ksm_run("--stats", "sleep", "0.2"))
        assert err.startswith("ksm: at best, after 0") and "ksmd is not running" not in err
        host.ksm.run = 0
        _, _, err = finish(ksm_run("--stats", "sleep", "0.2"))
        assert "ksmd is not running: nothing merges before `ksm tune set run=1`" in err
    finally:
        restore(host.ksm, saved)


@needs_kernel
def test_orphans_belong_to_the_family(host: Host) -> None:
    _, _, err = finish(ksm_run("--json", "sh", "-c", "(sleep 0.5 & sleep 0.5 &) ; sleep 0.4"))
    assert json.loads(err)["most_processes"] >= 3


@needs_kernel
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_the_preloaded_library(host: Host, tmp_path: Path) -> None:
    subprocess.run(["cc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", tmp_path / "p.so", PRELOAD], check=True)
    done = subprocess.run(
        ["cat", "/proc/self/ksm_stat"], env=os.environ | {"LD_PRELOAD": str(tmp_path / "p.so")}, capture_output=True
    )
    assert b"ksm_merge_any: yes" in done.stdout


def test_where_it_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> None:
        monkeypatch.setattr("ksm.optin.get_memory_merge", lambda: (_ for _ in ()).throw(kernel_error(number, "prctl")))

    monkeypatch.setattr(sys, "platform", "linux")
    refuse(errno.EINVAL)
    with pytest.raises(UnsupportedError, match=r"since Linux 6\.4, .* ksm\.linux\.madvise"):
        require_opt_in()
    refuse(errno.EPERM)
    with pytest.raises(UnsupportedError, match="refused here, perhaps by seccomp"):
        require_opt_in()
    monkeypatch.setattr("ksm.optin.get_memory_merge", lambda: False)
    switched: list[bool] = []
    monkeypatch.setattr("ksm.optin.set_memory_merge", switched.append)
    monkeypatch.setattr("ksm.optin._release", lambda: (6, 5))
    monkeypatch.setattr("ksm.optin._PROBE", "import sys; sys.exit(0)")
    with pytest.raises(UnsupportedError, match=r"kept since Linux 6\.7, .* preload a library"):
        require_opt_in()
    assert switched == [True, False]
    monkeypatch.setattr("ksm.optin._PROBE", "import sys; sys.exit(1)")  # a distribution that brought it back
    require_opt_in()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UnsupportedError, match="this is darwin"):
        require_opt_in()


def test_an_exec_that_fails_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    state = [False]
    monkeypatch.setattr("ksm.optin.get_memory_merge", lambda: state[0])
    monkeypatch.setattr("ksm.optin.set_memory_merge", lambda on: state.__setitem__(0, on))
    before = signal.getsignal(signal.SIGPIPE)
    with pytest.raises(FileNotFoundError):
        execute(["/nonexistent/program"])
    assert state == [False] and signal.getsignal(signal.SIGPIPE) == before


def test_sums_and_sentences(tmp_path: Path) -> None:
    for pid, child in (("5", "6 7"), ("6", ""), ("7", "5 99")):  # a loop, as reused pids may show
        (tmp_path / pid / "task" / pid).mkdir(parents=True)
        (tmp_path / pid / "task" / pid / "children").write_text(child)
        (tmp_path / pid / "ksm_stat").write_text("ksm_rmap_items 10\nksm_merging_pages 4\nksm_zero_pages 1\n")
    host = Host(tmp_path, tmp_path)
    assert sorted(family(host, 5)) == [5, 6, 7, 99]
    now = saving(host, family(host, 5), 2.0)
    assert (now.processes, now.merging_pages, now.zero_pages, now.rmap_items) == (3, 12, 3, 30)
    assert now.profit == 15 * host.page_size - 30 * 64 and now.host_saved == 0
    outcome = Outcome(Saving(seconds=0.0), now, now, 3, 5.0, scanning=False)
    lines = sentences(outcome)
    assert lines[0].startswith("at best, after 2 s, 12 pages merged in 3 processes, 3 more with the zero page: profit")
    assert lines[1].startswith("last seen 3 s before its end: 12 merged of 30 that KSM tracks")
    assert len(lines) == 3
    assert sentences(Outcome(Saving(seconds=0.0), seconds=0.5)) == [
        "it ended after 0.5 s, before anything could be seen"
    ]


def test_usage() -> None:
    if sys.platform != "linux":
        pytest.skip("Linux only")
    code, _, err = finish(ksm_run())
    assert code == 2 and "Missing argument" in err
    start = time.monotonic()
    code, out, _ = finish(ksm_run("--help"))
    assert code == 0 and "PR_SET_MEMORY_MERGE" in out and time.monotonic() - start < 20

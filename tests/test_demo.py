"""`ksm demo`, on real processes and, as root with KSM, the real kernel."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ksm
from ksm.cli import demo
from ksm.cli.common import out
from ksm.cli.crew import Crew
from ksm.errors import DisagreementError, KsmError
from ksm.estimate import estimate
from ksm.linux import Host
from ksm.sources import ProcessImage, Snapshot
from ksm.sysfs import ATTRIBUTES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the demo reads live processes, which needs Linux")

WHY_NOT = demo.cannot_verify(Host())
kernel = pytest.mark.skipif(WHY_NOT is not None, reason=f"the kernel cannot be asked: {WHY_NOT}")


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ksm", "demo", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(ksm.__file__).parents[1])},
        cwd="/",  # not the source tree: python -c looks there first
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def tunables() -> dict[str, str]:
    files = Host().ksm
    return {name: files.read(name) for name in files.names() if name in ATTRIBUTES and ATTRIBUTES[name].writable}


def workers() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"ksm/cli/worker.py" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture
def crew(ksm_lock: None) -> Iterator[Crew]:
    with Crew(2) as both:
        yield both


def test_crew_works_is_stopped_and_ends(crew: Crew) -> None:
    crew.work()
    assert [worker.name for worker in crew.workers] == ["render 1", "analyse 1"]
    for worker in crew.workers:
        assert Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        with ProcessImage(worker.pid, marked_only=worker.opted_in) as image:
            assert 10 << 20 < image.npages * image.page_size < 100 << 20
    pids = [worker.pid for worker in crew.workers]
    crew.__exit__(None, None, None)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_workers_hold_the_lock_until_they_end(tmp_path: Path) -> None:
    host = Host(lock_path=tmp_path / "lock")
    with contextlib.ExitStack() as stack:
        with host.lock() as lock:
            stack.enter_context(Crew(1, lock))
        with pytest.raises(TimeoutError), host.lock(0.0):
            pass
    with host.lock(0.0):
        pass


def test_a_worker_that_dies_is_an_error(crew: Crew) -> None:
    crew._processes[1].kill()
    with pytest.raises(KsmError, match="ended early, with exit code -9"):
        crew.work()


def test_prediction_of_two_workers(crew: Crew) -> None:
    crew.work()
    found = demo._predict([demo._read(worker) for worker in crew.workers], True)
    ours = found.ours.after[-1]
    for name in ("pages_shared", "pages_sharing", "pages_unshared", "general_profit"):
        assert ours[name] == getattr(found.settled, name), name
    assert ours["pages_volatile"] == 0
    for source, process in zip(found.settled.sources, found.ours.processes, strict=True):
        assert process["ksm_merging_pages"] == source.ksm_merging_pages
        assert process["ksm_rmap_items"] == source.rmap_items


def test_differences_are_found_and_named() -> None:
    counts = dict.fromkeys((*demo.COUNTERS, *demo.SINCE_START), 1)
    process = dict.fromkeys(demo.PER_PROCESS, 2)
    snapshot = Snapshot("render 1", 4096, True, True, ())
    found = demo.Demo([snapshot], estimate([snapshot]), {}, demo.Passes([counts], [process]))
    found.kernel = demo.Passes([dict(counts)], [dict(process)])
    demo._compare(found)
    assert found.differences == [] and found.same_after_each_pass
    demo.require_agreement(found)
    found.kernel = demo.Passes([counts | {"pages_sharing": 3}], [process | {"ksm_rmap_items": 4}])
    demo._compare(found)
    assert found.differences == [
        "pages_sharing: kernel 3, ksm 1",
        "ksm_rmap_items of render 1: kernel 4, ksm 2",
    ]
    demo._show_verdict(found, out())
    with pytest.raises(DisagreementError, match="pages_sharing: kernel 3, ksm 1") as caught:
        demo.require_agreement(found)
    assert caught.value.exit_code == 4


def test_what_keeps_the_kernel_out(tmp_path: Path) -> None:
    assert "there is no KSM here" in str(demo.cannot_verify(Host(root=tmp_path)))


@kernel
def test_the_kernel_agrees() -> None:
    with Host().lock():  # nobody else's tunables in between
        before = tunables()
    process = start("--json")
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    answer = json.loads(output)
    if answer["unverified"]:
        pytest.skip(answer["unverified"])
    assert answer["agree"] and answer["differences"] == []
    assert answer["ksm"]["counters"]["pages_sharing"] == answer["estimate"]["pages_sharing"] > 20_000
    assert answer["kernel"]["counters"]["ksm_zero_pages"] == answer["estimate"]["ksm_zero_pages"] > 1_000
    assert answer["kernel"]["counters"]["stable_node_chains"] > 0
    assert len(answer["kernel"]["processes"]) == demo.WORKERS
    with Host().lock():
        assert tunables() == before
        assert Host().ksm.pages_shared == 0


@kernel
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_puts_everything_back(number: int, code: int) -> None:
    with Host().lock():
        before = tunables()
    process = start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Now the kernel"):
            break
    time.sleep(0.3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode in (code, 0)  # 0: it had ended already
    assert "Traceback" not in errors
    with Host().lock():
        assert tunables() == before


def test_workers_do_not_outlive_a_killed_demo() -> None:
    process = start()
    deadline = time.monotonic() + 100
    mine: list[int] = []
    while not mine and time.monotonic() < deadline and process.poll() is None:
        mine = [
            pid
            for pid in workers()
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1] == str(process.pid)
        ]
        time.sleep(0.05)
    if not mine:
        process.kill()
        process.communicate()
        pytest.skip("another program held this kernel's KSM for too long")
    time.sleep(0.5)  # they ask to be killed with their parent as soon as they run
    process.kill()
    process.communicate()
    while any(Path(f"/proc/{pid}").exists() for pid in mine) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in mine)

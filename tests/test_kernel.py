"""The engine and the running kernel, counter for counter, on random programs; and the harness that compares them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel import compare, host, sysfs
from tests.kernel.comparison import opponent
from tests.kernel.host import PAGE, SYSFS, Unavailable
from tests.kernel.program import ARENA, HUGE, MERGEABLE, STYLES, Program, apply, content, generate, state
from tests.kernel.real import TUNABLES, KernelSession, RealMachine


def why_not() -> str | None:
    """Why the engine cannot be held against the running kernel; None: it can."""
    if not (SYSFS / "smart_scan").exists():
        return "the kernel is older than 6.7"
    return host.why_not()


needs_kernel = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
INDEXES = ("hash", "tree")


def open_session(swap: bool = False) -> Iterator[KernelSession]:
    try:
        with KernelSession(swap=swap) as session:
            yield session
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def session() -> Iterator[KernelSession]:
    yield from open_session()


@pytest.fixture
def session_with_swap() -> Iterator[KernelSession]:
    yield from open_session(swap=True)


def agree(session: KernelSession, program: Program) -> None:
    """Both indexes do, step for step, what the kernel does."""
    kernel = compare.on(lambda _: RealMachine(session))
    steps = list(kernel(program))
    for index in INDEXES:
        ours = opponent(index, os.uname().release)
        if list(ours(program)) != steps:
            report = compare.steady_difference(program, kernel, ours)
            if report:
                listing = "\n".join(map(json.dumps, program["ops"]))
                pytest.fail(f"index {index}, {report}\n{listing}", pytrace=False)


# ---- the engine ------------------------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("style", STYLES)
def test_random_programs(session: KernelSession, style: str) -> None:
    for seed in range(25):
        agree(session, generate(seed, style=style))


@needs_kernel
def test_random_programs_with_huge_pages(session: KernelSession) -> None:
    for seed in range(15):
        agree(session, generate(seed, style="huge"))


@needs_kernel
def test_random_programs_with_swap(session_with_swap: KernelSession) -> None:
    for seed in range(25):
        agree(session_with_swap, generate(seed, swap=True, style="pressure"))


@needs_kernel
@pytest.mark.parametrize("name", compare.kept())
def test_programs_that_once_differed(name: str) -> None:
    program = compare.kept()[name]
    for session in open_session(program["swap"]):
        agree(session, program)


@needs_kernel
def test_the_answers_of_the_sysfs_files_are_this_kernel_s() -> None:
    try:
        rows = sysfs.measure()
    except Unavailable as reason:
        pytest.skip(str(reason))
    kept = json.loads(sysfs.ANSWERS.read_text())
    assert [row for row in rows if row not in kept] == []
    assert len(rows) == len(kept)


# ---- the harness: programs ---------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_program_for_good() -> None:
    programs = [generate(seed, swap=seed % 2 == 1, style=style) for seed, style in enumerate([None, *STYLES])]
    assert all(len(program["ops"]) >= 60 for program in programs)
    assert json.loads(json.dumps(programs)) == programs
    digest = hashlib.blake2b(json.dumps(programs).encode(), digest_size=8).hexdigest()
    assert digest == "055b6a82f7a80994"


def test_contents_differ_and_some_only_late() -> None:
    pages = [content(number) for number in range(120)]
    assert len(set(pages)) == 120 and not any(pages[0])
    assert pages[1][:-1] == pages[3][:-1] and pages[2][1:] == pages[4][1:]


def test_shrinking_keeps_what_matters() -> None:
    program = generate(5, nops=80)
    wanted = [program["ops"][i] for i in (7, 40, 66)]

    def differs(shorter: Program) -> bool:
        kept = iter(shorter["ops"])
        return all(any(op is want for op in kept) for want in wanted)

    assert compare.shrink(program, differs)["ops"] == wanted


def test_a_report_names_what_differs() -> None:
    report = compare.report(3, ["scan"], ("", {"a": 1, "b": 2}), ("errno 5", {"a": 1, "b": 3}))
    assert report == "operation 3: ['scan']\n  result: kernel , ours errno 5\n  b: kernel 2, ours 3"


# ---- the harness: the session --------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nobody else uses the kernel's KSM meanwhile; the sessions of this test take another lock."""
    if why_not():
        pytest.skip(str(why_not()))
    with host.locked(host.LOCK):
        try:
            host.require_unused()
        except Unavailable as reason:
            pytest.skip(str(reason))
        monkeypatch.setattr(host, "LOCK", tmp_path / "lock")
        yield tmp_path / "lock"


def tunables() -> dict[str, str]:
    return {name: (SYSFS / name).read_text() for name in TUNABLES if (SYSFS / name).exists()}


def our_groups() -> list[Path]:
    return groups_of(os.getpid())


def groups_of(pid: int) -> list[Path]:
    return list(host.memory_cgroups().root.glob(f"ksm-{pid}-*"))


def is_free(lock: Path) -> bool:
    return subprocess.run(["flock", "-n", lock, "true"]).returncode == 0


@needs_kernel
def test_the_kernel_repeats_itself(session: KernelSession) -> None:
    for style in STYLES:
        program = generate(1000, style=style)
        first, second = (list(compare.run(program, lambda _: RealMachine(session))) for _ in range(2))
        assert first == second


def test_everything_is_put_back_after_an_exception(alone: Path) -> None:
    before = tunables()
    with pytest.raises(ZeroDivisionError), KernelSession(swap=True) as fresh:
        machine = RealMachine(fresh)
        p = machine.spawn("left behind")
        p.mmap(8 * PAGE, addr=ARENA)
        p.madvise(ARENA, 8 * PAGE, MERGEABLE)
        p.write(ARENA, b"a" * 8 * PAGE)
        for name, text in [("max_page_sharing", "7"), ("use_zero_pages", "1"), ("smart_scan", "0"), ("run", "1")]:
            machine.ksm.write(name, text)
        machine.ksmd.scan()
        machine.ksmd.scan()
        assert machine.ksm.read("pages_sharing") == "6\n"
        assert "zram0" in Path("/proc/swaps").read_text()
        raise ZeroDivisionError
    assert tunables() == before
    assert (SYSFS / "pages_shared").read_text() == "0\n"
    assert is_free(alone) and not our_groups()
    assert "zram0" not in Path("/proc/swaps").read_text()


def test_everything_is_put_back_after_sigterm(alone: Path) -> None:
    before = tunables()
    script = f"""
import time
from pathlib import Path
from tests.kernel import host
from tests.kernel.real import KernelSession, RealMachine
host.LOCK = Path({str(alone)!r})
with KernelSession() as session:
    machine = RealMachine(session)
    machine.ksm.write("max_page_sharing", "9")
    machine.spawn("left behind")
    print("ready", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        assert not is_free(alone)
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 128 + signal.SIGTERM
    assert tunables() == before
    assert not groups_of(child.pid)


def test_no_session_beside_other_registered_memory(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PATIENCE_WITH_OTHERS", 0.1)
    script = "import ctypes, sys; print(ctypes.CDLL(None).prctl(67, 1, 0, 0, 0), flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "0\n"
        with pytest.raises(Unavailable, match=f"process {other.pid} "), KernelSession():
            pass
        other.communicate("")


def test_a_killed_session_is_cleaned_up_by_the_next(alone: Path) -> None:
    before = tunables()
    script = f"""
import os, signal
from pathlib import Path
from tests.kernel import host
from tests.kernel.real import KernelSession, RealMachine
host.LOCK = Path({str(alone)!r})
with KernelSession(swap=True) as session:
    RealMachine(session).spawn("left behind")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.Popen([sys.executable, "-c", script])
    assert killed.wait(30) == -signal.SIGKILL
    assert tunables() != before
    with KernelSession(swap=True):
        pass
    assert tunables() == before
    assert "zram0" not in Path("/proc/swaps").read_text()
    for group in groups_of(killed.pid):
        group.rmdir()


# ---- the harness: the machine ----------------------------------------------------------------------------------------


@needs_kernel
def test_scanning_with_nothing_to_scan_returns_at_once(session: KernelSession) -> None:
    with RealMachine(session) as machine:
        machine.ksmd.scan()  # else it would wait for a ksmd that does not wake up, and give up
        machine.ksm.write("run", "1")
        machine.ksmd.scan()
        machine.ksmd.scan_pages(5)
        assert machine.ksm.read("full_scans") == "0\n"


@needs_kernel
def test_a_long_file_of_procfs_is_read_whole() -> None:
    with Path("/proc/kallsyms").open("rb") as file:
        text = host.whole(file.fileno())
    assert len(text) > 65536 and text == Path("/proc/kallsyms").read_bytes()


@needs_kernel
def test_counters_start_from_nothing(session: KernelSession) -> None:
    for _ in range(2):
        with RealMachine(session) as machine:
            assert not any(state(machine).values())
            machine.ksm.write("run", "1")
            p = machine.spawn("a")
            p.mmap(3 * PAGE, addr=ARENA)
            p.madvise(ARENA, 3 * PAGE, MERGEABLE)
            p.write(ARENA, b"a" * 3 * PAGE)
            machine.ksmd.scan_pages(2)
            machine.ksmd.scan()
            assert machine.ksm.read("pages_scanned") == "3\n"
            machine.ksmd.scan()
            assert state(machine)["pages_sharing"] == 2
            p.write(ARENA, b"b")
            assert machine.vmstat["cow_ksm"] == 1


@needs_kernel
def test_a_worker_reports_what_the_kernel_says(session: KernelSession) -> None:
    steps: list[tuple[list[Any], str]] = [
        (["spawn", "a"], ""),
        (["write", "a", 0, 1], "errno 14"),
        (["mmap", "a", 0, 2, 3], str(ARENA)),
        (["fill", "a", 1, [5, 5]], "errno 14"),
        (["read", "a", 1], hashlib.blake2b(content(5), digest_size=8).hexdigest()),
        (["mprotect", "a", 0, 1, 1], ""),
        (["write", "a", 0, 1], "errno 14"),
        (["madvise", "a", 0, 1, MERGEABLE, 1], "errno 22"),
        (["madvise", "a", 0, 5, MERGEABLE], "errno 12"),
        (["mremap", "a", 1, 1, 2, 3, 8], str(ARENA + 8 * PAGE)),
        (["prctl", "a", 68], "0"),
        (["prctl", "a", 67, 1, 1], "errno 22"),
        (["prctl", "a", 67, 1], "0"),
        (["fork", "a", "b"], ""),
        (["prctl", "b", 68], "1"),
        (["exit", "a"], ""),
        (["read", "b", 8], hashlib.blake2b(content(5), digest_size=8).hexdigest()),
        (["read", "a", 8], "no process"),
        (["sysfs", "run", "3"], "errno 22"),
        (["sysfs", "pages_to_scan", "x"], "errno 22"),
    ]
    with RealMachine(session) as machine:
        for op, expected in steps:
            assert apply(machine, op) == expected, op


@needs_kernel
def test_a_worker_keeps_its_own_memory_out(session: KernelSession) -> None:
    with RealMachine(session) as machine:
        p = machine.spawn("a")
        machine.ksm.write("run", "1")
        p.prctl(67, 1)
        q = p.fork("b")
        for _ in range(3):
            machine.ksmd.scan()
        assert machine.ksm.read("pages_scanned") == "0\n"
        for each in (p, q):
            assert each.ksm_stat["ksm_rmap_items"] == 0 and each.ksm_stat["ksm_merge_any"]


@needs_kernel
def test_reclaim_takes_everything(session_with_swap: KernelSession) -> None:
    with RealMachine(session_with_swap) as machine:
        machine.ksm.write("run", "1")
        for name in "abc":
            p = machine.spawn(name)
            p.mmap(4 * PAGE, addr=ARENA)
            p.madvise(ARENA, 4 * PAGE, MERGEABLE)
            p.write(ARENA, b"a" * 2 * PAGE + name.encode() * PAGE)
        machine.ksmd.scan()
        machine.ksmd.scan()
        machine.reclaim()
        for p in machine.processes.values():
            with open(f"/proc/{p.pid}/pagemap", "rb") as entries:
                entries.seek(ARENA // PAGE * 8)
                where = [int.from_bytes(entries.read(8), "little") >> 62 for _ in range(4)]
            assert where == [1, 1, 1, 0]  # swapped, swapped, swapped, never touched


@needs_kernel
def test_huge_pages_are_there(session: KernelSession) -> None:
    with RealMachine(session) as machine:
        machine.spawn("a")
        for op in (["mmap", "a", 0, 2 * HUGE, 3], ["madvise", "a", 0, HUGE, 14], ["poke", "a", 5, 0, 1]):
            assert apply(machine, op).startswith("errno") is False
        smaps = Path(f"/proc/{machine.processes['a'].pid}/smaps_rollup").read_text()
        if "AnonHugePages:      2048 kB" not in smaps:
            pytest.skip("no huge page was to be had")

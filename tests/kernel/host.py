"""What a session changes on the host, each thing as a context that puts it back."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

SYSFS = Path("/sys/kernel/mm/ksm")
LOCK = Path("/run/lock/ksm-kernel.lock")
CGROUPS = Path("/sys/fs/cgroup/memory")
ZRAM = Path("/sys/block/zram0")
KHUGEPAGED = Path("/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs")
SWAP_BYTES = 256 << 20
SWAP_LABEL = "ksm-tests"
PAGE = 4096
FOREVER_MS = 10_000_000
PATIENCE = 60.0  # seconds for one batch
PATIENCE_WITH_OTHERS = 10.0  # seconds in which others' registered memory may go away


class Unavailable(Exception):
    """The running kernel cannot be the judge here and now; the message says why."""


def why_not() -> str | None:
    """Why the running kernel cannot judge here; None: it can."""
    if not SYSFS.is_dir():
        return "this kernel has no KSM"
    if os.geteuid() != 0:
        return "driving the kernel's KSM needs root"
    if not (SYSFS / "smart_scan").exists() or not Path("/proc/self/ksm_stat").exists():
        return "the kernel is older than 6.7"
    if not (CGROUPS / "memory.force_empty").exists():
        return "no cgroup v1 memory controller, by which to flush the LRU caches"
    try:
        subprocess.run(["cc", "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return "no C compiler"
    return None


def is_mergeable(process: Path) -> bool:
    with suppress(OSError):
        return " yes" in (process / "ksm_stat").read_text()
    return False


def require_unused() -> None:
    """Nobody's memory but ours may be registered: it would be scanned, counted and unmerged too."""
    if (SYSFS / "run").read_text() == "1\n":
        raise Unavailable("KSM is running on this host")
    deadline = time.monotonic() + PATIENCE_WITH_OTHERS
    while found := [p for p in Path("/proc").glob("[0-9]*") if is_mergeable(p)]:
        if time.monotonic() > deadline:
            raise Unavailable(f"process {found[0].name} on this host has memory registered with KSM")
        time.sleep(0.01)


def kernel_thread(name: str) -> Path:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "comm").read_text() == f"{name}\n" and not os.path.exists(process / "exe"):
                return process
    raise Unavailable(f"{name} is not to be seen; is this a container?")


def wait_for_sleep(stat: int, what: str) -> None:
    """Until a thread that was just woken sleeps again. Waiting for a lock is another state than S."""
    deadline = time.monotonic() + PATIENCE
    spins = 0
    while b") S " not in os.pread(stat, 64, 0):
        spins += 1
        if spins > 20:
            time.sleep(0.00005)
            if time.monotonic() > deadline:
                raise TimeoutError(f"the kernel did not finish {what} in {PATIENCE:g} s")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # may wait for another's turn
        yield
    finally:
        os.close(fd)


@contextmanager
def pinned() -> Iterator[None]:
    """This thread and the workers on one CPU: a third of the time, since each waits for the other anyway."""
    before = os.sched_getaffinity(0)
    here = ctypes.CDLL(None).sched_getcpu()
    os.sched_setaffinity(0, {here} & before or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """SIGTERM ends the program the way an exception does, so that everything is put back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def held_back(*signals: int) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def cgroup(name: str) -> Iterator[Path]:
    path = CGROUPS / name
    path.mkdir(exist_ok=True)
    try:
        yield path
    finally:
        deadline = time.monotonic() + 5
        while True:
            try:
                path.rmdir()
                break
            except OSError:  # busy: what was in it is still on its way out
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)


@contextmanager
def swap_on_zram() -> Iterator[None]:
    """The host has swap space meanwhile, on /dev/zram0."""
    if not ZRAM.is_dir():
        raise Unavailable("no zram, on which to put swap space")
    libc = ctypes.CDLL(None, use_errno=True)

    def put_back() -> None:
        libc.swapoff(b"/dev/zram0")
        (ZRAM / "reset").write_text("1")

    if (ZRAM / "disksize").read_text() != "0\n":
        with open("/dev/zram0", "rb") as device:
            if SWAP_LABEL.encode() not in device.read(PAGE):
                raise Unavailable("/dev/zram0 is in use")
        put_back()  # a session before this one was killed
    try:
        (ZRAM / "disksize").write_text(str(SWAP_BYTES))
        subprocess.run(["mkswap", "-L", SWAP_LABEL, "/dev/zram0"], check=True, capture_output=True)
        if libc.swapon(b"/dev/zram0", 0):
            raise OSError(ctypes.get_errno(), "swapon /dev/zram0")
        yield
    finally:
        put_back()


@contextmanager
def remembered(values: dict[str, str]) -> Iterator[dict[str, str]]:
    """The values to put back: those found, or those that a killed session left in the lock file."""
    with suppress(ValueError):
        values = json.loads(LOCK.read_text())
    LOCK.write_text(json.dumps(values))
    yield values
    LOCK.write_text("")


@contextmanager
def khugepaged_asleep() -> Iterator[None]:
    """Else it makes huge pages of ours at its own pace. A change of its interval wakes it once."""
    before = KHUGEPAGED.read_text()
    stat = os.open(kernel_thread("khugepaged") / "stat", os.O_RDONLY)
    try:
        KHUGEPAGED.write_text(str(FOREVER_MS))
        wait_for_sleep(stat, "khugepaged's last look round")
        yield
    finally:
        KHUGEPAGED.write_text(before)
        os.close(stat)


def kill_all(group: Path) -> None:
    """Kill every process of a cgroup: all of them are ours."""
    for _ in range(1000):
        pids = (group / "cgroup.procs").read_text().split()
        if not pids:
            return
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.001)


def opened(stack: ExitStack, path: Path, flags: int) -> int:
    """A file descriptor that the stack closes."""
    fd = os.open(path, flags)
    stack.callback(os.close, fd)
    return fd

"""What a session changes on the host, each thing as a context that puts it back."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SYSFS = Path("/sys/kernel/mm/ksm")
LOCK = Path("/run/lock/ksm-kernel.lock")
ZRAM = Path("/sys/block/zram0")
KHUGEPAGED = Path("/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs")
SWAP_BYTES = 256 << 20
SWAP_LABEL = "ksm-tests"
PAGE = 4096
WORKER = "KSM_TESTS_WORKER"
"""The environment variable that names a compiled worker, where there is no compiler."""
FOREVER_MS = 10_000_000
PATIENCE = 60.0  # seconds for one batch
PATIENCE_WITH_OTHERS = 10.0  # seconds in which others' registered memory may go away


class Unavailable(Exception):
    """The running kernel cannot be the judge here and now; the message says why."""


@dataclass(frozen=True)
class Hierarchy:
    """A version of the memory cgroups."""

    root: Path
    evict: str
    """The file by which the kernel is asked to reclaim a group's memory,"""
    everything: bytes
    """what is written to it to have all of it,"""
    resident: bytes
    """and the line of memory.stat that says how much is still there."""


V1 = Hierarchy(Path("/sys/fs/cgroup/memory"), "memory.force_empty", b"0", b"total_rss")
V2 = Hierarchy(Path("/sys/fs/cgroup"), "memory.reclaim", b"64G", b"anon")


def memory_cgroups() -> Hierarchy:
    """The one to use: version 1 where the host has it."""
    if (V1.root / V1.evict).exists():
        return V1
    with suppress(OSError):
        if "memory" in (V2.root / "cgroup.subtree_control").read_text().split():
            return V2
    raise Unavailable("no memory cgroups")


def numa_nodes() -> int:
    """How many NUMA nodes have memory."""
    with suppress(OSError):
        text = Path("/sys/devices/system/node/has_memory").read_text()
        return 1 + max(int(number) for number in re.findall(r"\d+", text))
    return 1


def why_not() -> str | None:
    """Why the running kernel cannot judge here; None: it can."""
    if not SYSFS.is_dir():
        return "this kernel has no KSM"
    if os.geteuid() != 0:
        return "driving the kernel's KSM needs root"
    try:
        memory_cgroups()
    except Unavailable as reason:
        return str(reason)
    if WORKER in os.environ:
        return None
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
def cgroup(groups: Hierarchy, name: str) -> Iterator[Path]:
    path = groups.root / name
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
    try:
        thread = kernel_thread("khugepaged")
    except Unavailable:  # the kernel has no use for it on a small machine
        yield
        return
    before = KHUGEPAGED.read_text()
    stat = os.open(thread / "stat", os.O_RDONLY)
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


def whole(fd: int) -> bytes:
    """All of a file of procfs: many give no more than a page at a time, however much is asked for."""
    text = bytearray()
    while part := os.pread(fd, 65536, len(text)):
        text += part
    return bytes(text)


def opened_if_there(path: Path) -> int | None:
    """A file descriptor for reading a file that not every kernel has."""
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None


def opened(stack: ExitStack, path: Path, flags: int) -> int:
    """A file descriptor that the stack closes."""
    fd = os.open(path, flags)
    stack.callback(os.close, fd)
    return fd

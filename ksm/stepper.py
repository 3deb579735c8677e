"""Driving the running kernel's ksmd one pass or batch at a time, and putting everything back."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ksm.errors import kernel_error
from ksm.sysfs import ADVISOR_MODES, Sysfs

_WHOLE_PASS = 2_000_000_000  # pages_to_scan beyond any pass, so that a batch ends with its pass
_ASLEEP = 10_000_000  # ms: ksmd sleeps until the value changes


class Stepper:
    """The parked ksmd of a host, with the methods of `Machine.ksmd`; made by `Host.single_step`.

    `flush` is called before each batch; `status` is ksmd's /proc/PID/status, or None where it cannot be seen.
    """

    def __init__(self, ksm: Sysfs, flush: Callable[[], None], status: Path | None, timeout: float) -> None:
        self._ksm = ksm
        self._flush = flush
        self._status = status
        self._timeout = timeout
        names = ksm.names()
        self._counters = tuple(name for name in ("full_scans", "pages_scanned", "pages_skipped") if name in names)
        self._sleep = _ASLEEP
        ksm.write("run", "0")
        if "advisor_mode" in names:
            ksm.write("advisor_mode", ADVISOR_MODES[0])
        self._park()

    def scan(self) -> int | None:
        """One pass, or the rest of the one under way; nothing happens while nothing is registered.

        The number of visits; None on kernels before 6.6, which do not count them.

        >>> from ksm.linux import Host
        >>> with Host().single_step() as ksmd:  # doctest: +SKIP
        ...     ksmd.scan()
        1024
        """
        return self._batch(_WHOLE_PASS)

    def scan_pages(self, k: int) -> int | None:
        """One batch of at most k visits; it ends at the end of a pass. The number of visits, as in `scan`.

        >>> from ksm.linux import Host
        >>> with Host().single_step() as ksmd:  # doctest: +SKIP
        ...     ksmd.scan_pages(100)
        100
        """
        if not 0 < k <= _WHOLE_PASS:
            raise ValueError(f"cannot visit {k:,} pages in a batch; it can be 1 to {_WHOLE_PASS:,}")
        return self._batch(k)

    def _batch(self, k: int) -> int | None:
        self._flush()
        if self._ksm.pages_to_scan != k:
            self._ksm.pages_to_scan = k
        before = self._progress()
        switches = self._switches()[1]
        try:
            self._ksm.write("run", "1")
            self._wait(before, switches, k)
        finally:
            self._ksm.write("run", "0")  # returns after the batch
            self._park()
        if "pages_scanned" not in before:
            return None
        return self._progress()["pages_scanned"] - before["pages_scanned"]

    def _wait(self, before: dict[str, int], switches: int, k: int) -> None:
        """Until the batch has ended, or ksmd has seen that there is nothing to scan."""
        start = time.monotonic()
        pause = 0.0001
        while True:
            now = self._progress()
            visits = now.get("pages_scanned", 0) - before.get("pages_scanned", 0)
            if now["full_scans"] != before["full_scans"] or visits >= k:
                return
            state, switched = self._switches()
            if state == "S" and switched != switches:
                return  # it has run, and sleeps
            gone = time.monotonic() - start
            if self._status is None and now == before and gone > 1.0:
                return  # ksmd is out of sight, and nothing has moved for a second
            if gone > self._timeout:
                raise TimeoutError(f"ksmd did not finish a batch of {k:,} pages in {self._timeout:g} s")
            time.sleep(pause)
            pause = min(pause * 1.2, 0.01)

    def _park(self) -> None:
        """Wake ksmd, which then finds that run is 0 and waits for that to change."""
        self._sleep = _ASLEEP + (self._sleep == _ASLEEP)
        self._ksm.write("sleep_millisecs", str(self._sleep))

    def _progress(self) -> dict[str, int]:
        return {name: int(self._ksm.read(name)) for name in self._counters}

    def _switches(self) -> tuple[str, int]:
        """ksmd's state letter, and how often it has gone to sleep."""
        if self._status is None:
            return "?", 0
        text = self._status.read_text()
        state = re.search(r"^State:\s*(\S)", text, re.M)
        count = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", text, re.M)
        return state[1] if state else "?", int(count[1]) if count else 0


def restore(ksm: Sysfs, saved: dict[str, str], unmerge: bool = False) -> None:
    """Write every tunable's old text back, whatever fails; the first failure is raised at the end.

    Where merged pages stand in the way, or with `unmerge`, everything is unmerged first. An advisor that was on
    starts anew, at its least pages_to_scan.

    >>> from ksm.sysfs import ATTRIBUTES, StateSysfs, profile
    >>> class Values(dict):
    ...     get, set = dict.__getitem__, dict.__setitem__
    >>> ksm = StateSysfs(Values((a.name, a.default) for a in ATTRIBUTES.values()), profile("6.18"))
    >>> restore(ksm, {"run": "1\\n", "sleep_millisecs": "10\\n"})
    >>> ksm.run, ksm.sleep_millisecs
    (1, 10)
    """
    failures: list[OSError] = []

    def put(name: str, text: str) -> None:
        try:
            if ksm.read(name).strip() == saved[name].strip():
                return
            try:
                ksm.write(name, text)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                _unmerge(ksm)
                ksm.write(name, text)
        except OSError as error:
            failures.append(error)

    with contextlib.suppress(OSError):  # what this leaves undone fails again below, and is told
        ksm.write("run", "0")
        if unmerge:
            _unmerge(ksm)
        if "advisor_mode" in saved:
            ksm.write("advisor_mode", ADVISOR_MODES[0])  # pages_to_scan cannot be written while it is on
    last = [name for name in ("sleep_millisecs", "advisor_mode", "run") if name in saved]
    for name in (*(name for name in saved if name not in last), *last):
        chosen = re.search(r"\[(.*?)\]", saved[name])
        put(name, chosen[1] if chosen else saved[name].strip())
    if failures:
        raise failures[0]


def _unmerge(ksm: Sysfs) -> None:
    ksm.write("run", "2")
    ksm.write("run", "0")


def flock(path: Path, timeout: float | None) -> int:
    """An open descriptor that holds the exclusive lock on `path`; TimeoutError after `timeout` seconds.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as where:
    ...     os.close(flock(Path(where, "lock"), 1.0))
    """
    import fcntl  # not everywhere, and this module is imported everywhere

    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise kernel_error(error.errno or errno.EIO, f"opening the lock {path}") from error
    try:
        if timeout is None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            return descriptor
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{path} is held by another program after {timeout:g} s") from None
                time.sleep(0.02)
    except BaseException:
        os.close(descriptor)
        raise


# ---- the per-CPU lists of fresh pages -------------------------------------------------------------------------


@contextlib.contextmanager
def lru_flush(proc: Path = Path("/proc")) -> Iterator[Callable[[], None]]:
    """A function that empties the kernel's per-CPU page lists: a page on one has a reference too many to merge.

    move_pages(2) does it, moving one page to where it is; where that cannot be used, `memory.force_empty` of an empty
    version 1 memory cgroup. Measured on Linux 6.18: without either, no page rewritten within a pass merged in
    it; with either, all did (150 trials each). Compacting memory failed in 2 of 16.

    >>> with lru_flush() as flush:  # doctest: +SKIP
    ...     flush()
    """
    page = mmap.mmap(-1, mmap.PAGESIZE)
    page[0] = 1
    if _move_page(page):
        yield lambda: _flush_or_fail(page)
        return
    group = _memory_cgroups(proc)
    if group is None:
        raise kernel_error(
            errno.ENOSYS, "nothing empties the per-CPU page lists here: no move_pages, no version 1 memory cgroup"
        )
    mine = group / f"ksm-{os.getpid()}-{threading.get_ident()}"
    mine.mkdir(exist_ok=True)

    def flush() -> None:
        (mine / "memory.force_empty").write_text("0")

    try:
        yield flush
    finally:
        mine.rmdir()


_SYS_MOVE_PAGES = {"x86_64": 279, "aarch64": 239, "riscv64": 239, "loongarch64": 239, "ppc64le": 301, "s390x": 310}


def _move_page(page: mmap.mmap) -> bool:
    """Ask the kernel to move a page to the node that it is on; False where it cannot be asked."""
    number = _SYS_MOVE_PAGES.get(platform.machine())
    if number is None or sys.maxsize < 1 << 32:  # a 32-bit process has other numbers
        return False
    libc = ctypes.CDLL(None)
    byte = ctypes.c_char.from_buffer(page)
    pages = (ctypes.c_void_p * 1)(ctypes.addressof(byte))
    status = (ctypes.c_int * 1)(-1)
    where = ctypes.c_long(number), ctypes.c_long(0), ctypes.c_ulong(1), pages
    moved: int = libc.syscall(*where, None, status, ctypes.c_int(0))  # without nodes it tells where the page is
    if moved == 0 and status[0] >= 0:
        node = (ctypes.c_int * 1)(status[0])
        moved = libc.syscall(*where, node, status, ctypes.c_int(2))  # MPOL_MF_MOVE
    return moved == 0 and status[0] >= 0


def _flush_or_fail(page: mmap.mmap) -> None:
    if not _move_page(page):
        raise kernel_error(errno.EIO, "move_pages worked before and does not now")


def _memory_cgroups(proc: Path) -> Path | None:
    with contextlib.suppress(OSError):
        for line in (proc / "mounts").read_text().splitlines():
            words = line.split()
            if len(words) > 3 and words[2] == "cgroup" and "memory" in words[3].split(","):
                return Path(words[1])
    return None

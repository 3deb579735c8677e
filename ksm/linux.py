"""The running kernel behind the interfaces of `ksm.Machine`: its files, its processes, its ksmd step by step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ksm.constants import PR_GET_MEMORY_MERGE, PR_SET_MEMORY_MERGE
from ksm.errors import NoSuchProcessError, UnsupportedError, kernel_error
from ksm.stats import ProcessStats, parse_ksm_stat
from ksm.stepper import Stepper, flock, lru_flush, restore
from ksm.sysfs import ATTRIBUTES, Profile, Sysfs, profile

KSM_ROOT = "/sys/kernel/mm/ksm"
LOCK_PATH = "/run/lock/ksm-kernel.lock"

_VMSTAT = ("cow_ksm", "ksm_swpin_copy")


def _require_linux(what: str) -> None:
    if sys.platform != "linux":
        raise UnsupportedError(f"{what} needs Linux, and this is {sys.platform}")


def _page_size() -> int:
    return mmap.PAGESIZE


# ---- this process's own memory ----------------------------------------------------------------------------


def madvise(buffer: object, advice: int) -> int:
    """Give advice on the whole pages inside a buffer; the number of bytes that were advised.

    The buffer is anything with contiguous memory: a numpy array, a memoryview, an mmap. Pages that it only shares
    with other data, at its ends, are left alone; when it holds no whole page nothing is done and 0 returned.

    Raises:
        OSError: the kernel's errno, such as EINVAL for MADV_MERGEABLE on a kernel without KSM.
        ValueError: the buffer is not contiguous.
        UnsupportedError: not on Linux.

    >>> import mmap
    >>> from ksm.constants import MADV_MERGEABLE
    >>> madvise(mmap.mmap(-1, 16384), MADV_MERGEABLE)  # doctest: +SKIP
    16384
    """
    _require_linux("madvise")
    array = buffer if isinstance(buffer, np.ndarray) else np.asarray(memoryview(buffer))  # type: ignore[arg-type]
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise ValueError("madvise needs contiguous memory, and this buffer has gaps")
    page = _page_size()
    start = -(-array.ctypes.data // page) * page
    length = (array.ctypes.data + array.nbytes) // page * page - start
    if length <= 0:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.madvise(start, length, advice) != 0:
        raise kernel_error(ctypes.get_errno(), f"madvise of {length:,} bytes at {start:#x} with advice {advice}")
    return length


def _prctl(option: int, value: int, name: str) -> int:
    _require_linux(name)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
    answer: int = libc.prctl(option, value, 0, 0, 0)
    if answer < 0:
        raise kernel_error(ctypes.get_errno(), f"prctl({name}): it is there since Linux 6.4, on kernels with KSM")
    return answer


def set_memory_merge(on: bool) -> None:
    """Make all of this process's memory mergeable, present and future, or give every merged page back.

    Raises:
        OSError: EINVAL before Linux 6.4 or without KSM.

    >>> set_memory_merge(True)  # doctest: +SKIP
    """
    _prctl(PR_SET_MEMORY_MERGE, int(bool(on)), "PR_SET_MEMORY_MERGE")


def get_memory_merge() -> bool:
    """Whether `set_memory_merge` is on, here or inherited.

    >>> get_memory_merge()  # doctest: +SKIP
    False
    """
    return _prctl(PR_GET_MEMORY_MERGE, 0, "PR_GET_MEMORY_MERGE") != 0


# ---- the kernel's files -----------------------------------------------------------------------------------


class FileSysfs(Sysfs):
    """The attributes as real files, below `root`.

    >>> FileSysfs(Path("/sys/kernel/mm/ksm"), 4096).run  # doctest: +SKIP
    0
    """

    __slots__ = ("_page_size", "root")

    def __init__(self, root: Path, page_size: int) -> None:
        self.root = root
        self._page_size = page_size

    @property
    def page_size(self) -> int:
        return self._page_size

    def names(self) -> tuple[str, ...]:
        found = {path.name for path in self.root.iterdir()}
        return (*(name for name in ATTRIBUTES if name in found), *sorted(found - ATTRIBUTES.keys()))

    def _path(self, name: str) -> Path:
        if "/" in name or name in ("", ".", ".."):
            raise kernel_error(errno.ENOENT, f"{name!r} is not the name of an attribute")
        return self.root / name

    def read(self, name: str) -> str:
        path = self._path(name)
        try:
            return path.read_text("utf-8")
        except OSError as error:
            raise kernel_error(error.errno or errno.EIO, f"reading {path}") from error

    def write(self, name: str, text: str | bytes) -> None:
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)
        path = self._path(name)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_TRUNC)  # as a shell's > does; sysfs does not care
            try:
                os.write(fd, data)
            finally:
                os.close(fd)
        except OSError as error:
            raise kernel_error(error.errno or errno.EIO, f"writing {data[:40]!r} to {path}{_hint(error)}") from error


def _hint(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM) and os.geteuid() != 0:
        return ", which needs root"
    if error.errno == errno.EBUSY:
        return ": pages are merged; write 2 to run first"
    return ""


# ---- the host ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class HostProcess:
    """A process of the host that takes part in KSM.

    >>> HostProcess(pid=1, name="qemu", ksm_stat={"ksm_merging_pages": 2}).stats.saved_bytes
    8192
    """

    pid: int
    name: str
    ksm_stat: dict[str, int | bool] = field(default_factory=dict)
    page_size: int = 4096

    @property
    def stats(self) -> ProcessStats:
        """Its values with what derives from them.

        >>> HostProcess(pid=1, name="qemu", ksm_stat={"ksm_rmap_items": 2}).stats.metadata_bytes
        128
        """
        return ProcessStats.of(self.ksm_stat, self.page_size)

    def to_dict(self) -> dict[str, int | float | bool | str | None]:
        """All of it under its names, for JSON.

        >>> HostProcess(pid=1, name="qemu").to_dict()["name"]
        'qemu'
        """
        return {"pid": self.pid, "name": self.name, **self.stats.to_dict()}


class Host:
    """The machine that this runs on.

    Args:
        root: the directory of KSM's attributes.
        proc: where procfs is.
        lock_path: the file that everyone who drives this kernel's ksmd locks.

    Making one touches nothing; what a kernel lacks is an `UnsupportedError` when it is asked for.

    >>> Host().ksm.pages_sharing  # doctest: +SKIP
    0
    """

    def __init__(
        self,
        root: str | os.PathLike[str] = KSM_ROOT,
        proc: str | os.PathLike[str] = "/proc",
        lock_path: str | os.PathLike[str] = LOCK_PATH,
    ) -> None:
        self.root = Path(root)
        self.proc = Path(proc)
        self.lock_path = Path(lock_path)
        self._lock = threading.RLock()
        self._depth = 0
        self._ksmd: int | None = None  # its pid, once it was found: it never ends

    @property
    def ksm(self) -> Sysfs:
        """The kernel's attributes, the same interface as `Machine.ksm`; UnsupportedError without KSM.

        >>> sorted(Host().ksm.names())[0]  # doctest: +SKIP
        'advisor_max_cpu'
        """
        if not (self.root / "run").exists():
            where = "a kernel built with CONFIG_KSM" if sys.platform == "linux" else "Linux"
            raise UnsupportedError(f"there is no KSM here ({self.root}/run is missing); it needs {where}")
        return FileSysfs(self.root, self.page_size)

    @property
    def kernel(self) -> Profile:
        """The profile that the kernel's release names; ValueError before 5.15.

        >>> Host().kernel.advisor  # doctest: +SKIP
        True
        """
        _require_linux("a kernel profile of this host")
        return profile(os.uname().release)

    @property
    def page_size(self) -> int:
        """Bytes in a page.

        >>> Host().page_size in (4096, 16384, 65536)
        True
        """
        return _page_size()

    @property
    def vmstat(self) -> dict[str, int]:
        """KSM's lines of /proc/vmstat, counted since boot; a line that this kernel lacks is left out.

        >>> Host().vmstat  # doctest: +SKIP
        {'cow_ksm': 0, 'ksm_swpin_copy': 0}
        """
        lines = dict(line.split(" ", 1) for line in self._proc_text("vmstat").splitlines() if " " in line)
        return {name: int(lines[name]) for name in _VMSTAT if name in lines}

    @property
    def mem_available(self) -> int:
        """Bytes that could be taken without swapping (MemAvailable).

        >>> Host().mem_available > 0  # doctest: +SKIP
        True
        """
        return self._meminfo("MemAvailable")

    @property
    def mem_total(self) -> int:
        """Bytes of memory.

        >>> Host().mem_total > 0  # doctest: +SKIP
        True
        """
        return self._meminfo("MemTotal")

    @property
    def committed(self) -> int:
        """Bytes that the kernel has promised to processes, touched or not (Committed_AS).

        >>> Host().committed > 0  # doctest: +SKIP
        True
        """
        return self._meminfo("Committed_AS")

    def _meminfo(self, name: str) -> int:
        match = re.search(rf"^{name}:\s*(\d+) kB", self._proc_text("meminfo"), re.M)
        if match is None:
            raise UnsupportedError(f"{self.proc}/meminfo has no {name}")
        return int(match[1]) * 1024

    def _proc_text(self, name: str) -> str:
        try:
            return (self.proc / name).read_text("utf-8")
        except FileNotFoundError:
            raise UnsupportedError(f"{self.proc / name} is missing; this needs Linux's procfs") from None

    # ---- ksmd ----

    def ksmd_cpu_seconds(self) -> float:
        """CPU time that ksmd has taken since boot.

        >>> Host().ksmd_cpu_seconds() >= 0  # doctest: +SKIP
        True
        """
        pid = self.ksmd_pid()
        if pid is None:
            raise UnsupportedError(f"there is no ksmd in {self.proc}")
        with contextlib.suppress(OSError):
            return int((self.proc / str(pid) / "schedstat").read_text().split()[0]) / 1e9
        words = (self.proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def ksmd_pid(self) -> int | None:
        """ksmd's pid, or None where it cannot be seen, as in a container.

        >>> Host(proc="/nonexistent").ksmd_pid() is None
        True
        """
        for pid in self._pids() if self._ksmd is None else [self._ksmd]:
            with contextlib.suppress(OSError):
                stat = (self.proc / str(pid) / "stat").read_text()
                if "(ksmd)" in stat and stat.rpartition(")")[2].split()[1] == "2":  # a child of kthreadd
                    self._ksmd = pid
                    return pid
        return None

    def _pids(self) -> list[int]:
        with contextlib.suppress(OSError):
            return sorted(int(path.name) for path in self.proc.iterdir() if path.name.isdecimal())
        return []

    # ---- processes ----

    def ksm_stat(self, pid: int | str = "self") -> dict[str, int | bool]:
        """What /proc/PID/ksm_stat shows, under its names, as `Process.ksm_stat` gives it; {} for a kernel thread.

        On kernels that keep it apart, `ksm_merging_pages` comes from the file of that name.

        Raises:
            OSError: ESRCH for no such process, EACCES for one of another user.
            UnsupportedError: a kernel before 5.19, or one without KSM.

        >>> Host().ksm_stat()["ksm_rmap_items"]  # doctest: +SKIP
        0
        """
        values: dict[str, int | bool] = {}
        stat = self._process_file(pid, "ksm_stat")
        if stat is not None:
            values = parse_ksm_stat(stat)
        if "ksm_merging_pages" not in values:
            merging = self._process_file(pid, "ksm_merging_pages")
            if merging is None and stat is None:
                raise UnsupportedError("this kernel has no /proc/PID/ksm_stat; it is there since Linux 6.1, with KSM")
            if merging is not None and merging.strip():
                values["ksm_merging_pages"] = int(merging)
        return values

    def _process_file(self, pid: int | str, name: str) -> str | None:
        """The text of a process's file, or None when the process is there and the file is not."""
        directory = self.proc / str(pid)
        try:
            return (directory / name).read_text("utf-8")
        except ProcessLookupError:
            raise kernel_error(errno.ESRCH, f"process {pid}") from None
        except FileNotFoundError:
            if not directory.exists():
                raise kernel_error(errno.ESRCH, f"process {pid}") from None
            return None
        except PermissionError as error:
            raise kernel_error(
                error.errno or errno.EACCES, f"reading {directory / name} needs its owner or root"
            ) from error

    def processes(self, everyone: bool = False, skip_unreadable: bool = False) -> list[HostProcess]:
        """The processes that take part in KSM, by pid: with tracked or merged pages, or memory marked mergeable.

        Args:
            everyone: those that take no part, too.
            skip_unreadable: leave out processes of other users instead of raising EACCES.

        Before Linux 6.14 a process whose marked memory has not been scanned yet cannot be told.

        >>> [p.name for p in Host().processes()]  # doctest: +SKIP
        ['qemu-system-x86']
        """
        found = []
        for pid in self._pids():
            try:
                values = self.ksm_stat(pid)
                name = (self.proc / str(pid) / "comm").read_text("utf-8", "replace").rstrip("\n")
            except (NoSuchProcessError, FileNotFoundError, ProcessLookupError):
                continue  # it has gone meanwhile
            except PermissionError:
                if skip_unreadable:
                    continue
                raise
            part = any(value for key, value in values.items() if key != "ksm_process_profit")
            if values and (part or everyone):
                found.append(HostProcess(pid=pid, name=name, ksm_stat=values, page_size=self.page_size))
        return found

    # ---- driving ksmd ----

    @contextlib.contextmanager
    def lock(self, timeout: float | None = None) -> Iterator[int]:
        """Hold this host's KSM alone, against every program that takes the same lock; it can be taken again inside.

        Gives the descriptor that holds it. A child that inherits it holds the lock too, until it has ended.

        Raises TimeoutError after `timeout` seconds.

        >>> with Host().lock():  # doctest: +SKIP
        ...     pass
        """
        _require_linux("the lock on a host's KSM")
        with self._lock:
            if self._depth == 0:
                self._descriptor = flock(self.lock_path, timeout)
            self._depth += 1
            try:
                yield self._descriptor
            finally:
                self._depth -= 1
                if self._depth == 0:
                    os.close(self._descriptor)

    @contextlib.contextmanager
    def single_step(self, unmerge: bool = False, timeout: float = 600.0) -> Iterator[Stepper]:
        """Take ksmd over: it is parked, and scans only when told to, exactly one pass or batch at a time.

        Holds the lock. Afterwards, also after an error, every tunable has its old value again, those that the
        caller changed too; where pages merged meanwhile stand in the way of that they are unmerged. `unmerge`
        gives every page of the host a private copy at the end in any case. A process that is killed restores
        nothing: ksmd then stays parked, with `sleep_millisecs` at 10,000 seconds.

        Inside, leave `run`, `pages_to_scan`, `sleep_millisecs` and `advisor_mode` alone.

        Raises:
            OSError: EACCES without root.
            TimeoutError: a batch took longer than `timeout` seconds.

        >>> with Host().single_step() as ksmd:  # doctest: +SKIP
        ...     ksmd.scan()
        1024
        """
        ksm = self.ksm
        with self.lock():
            saved = {name: ksm.read(name) for name in ksm.names() if name in ATTRIBUTES and ATTRIBUTES[name].writable}
            ksm.write("run", "0")  # fails where nothing can be driven, before anything has changed
            try:
                with lru_flush(self.proc) as flush:
                    yield Stepper(ksm, flush, self._ksmd_status(), timeout)
            finally:
                restore(ksm, saved, unmerge)

    def _ksmd_status(self) -> Path | None:
        pid = self.ksmd_pid()
        return None if pid is None else self.proc / str(pid) / "status"

    def step(self, pages: int | None = None, passes: int = 1) -> None:
        """Have ksmd do `passes` passes, or one batch of at most `pages` visits, and leave every tunable as it was.

        >>> Host().step()  # doctest: +SKIP
        """
        with self.single_step() as ksmd:
            if pages is not None:
                ksmd.scan_pages(pages)
            else:
                for _ in range(passes):
                    ksmd.scan()

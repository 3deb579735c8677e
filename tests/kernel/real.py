"""RealMachine: the interface of `ksm.Machine` on the running kernel, single-stepped."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

SYSFS = Path("/sys/kernel/mm/ksm")
LOCK = Path("/run/lock/ksm-kernel.lock")
CGROUPS = Path("/sys/fs/cgroup/memory")
PAGE = 4096
FOREVER_MS = 10_000_000
UNLIMITED = 2_000_000_000
NEVER_PRUNE = 100_000_000

COUNTERS = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "full_scans",
    "stable_node_chains",
    "stable_node_dups",
    "general_profit",
    "pages_scanned",
    "ksm_zero_pages",
    "pages_skipped",
)
TUNABLES = {
    "run": "0",
    "advisor_mode": "none",
    "pages_to_scan": "100",
    "sleep_millisecs": "20",
    "merge_across_nodes": "1",
    "max_page_sharing": "256",
    "use_zero_pages": "0",
    "stable_node_chains_prune_millisecs": str(NEVER_PRUNE),
    "smart_scan": "1",
    "advisor_max_cpu": "70",
    "advisor_min_pages_to_scan": "500",
    "advisor_max_pages_to_scan": "30000",
    "advisor_target_scan_time": "200",
}
MMAP, WRITE, READ, MADVISE, MUNMAP, MPROTECT, MREMAP, PRCTL, FORK, EXIT = range(1, 11)


def why_not() -> str | None:
    """Why the running kernel cannot judge here; None: it can."""
    if not SYSFS.is_dir():
        return "this kernel has no KSM"
    if os.geteuid() != 0:
        return "driving the kernel's KSM needs root"
    if not (SYSFS / "smart_scan").exists() or not Path("/proc/self/ksm_stat").exists():
        return "the kernel is older than 6.7"
    return None


class KernelSession:
    """Holds the kernel's KSM for one user: the lock, a parked ksmd, workers; puts everything back at the end."""

    def __init__(self, swap: bool = False) -> None:
        self._swap = swap
        self._files: dict[str, int] = {}
        self._saved: dict[str, str] = {}
        self._sleep = FOREVER_MS

    def __enter__(self) -> KernelSession:
        LOCK.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphaned workers come here
        for name in TUNABLES:
            text = (SYSFS / name).read_text().strip()
            self._saved[name] = re.sub(r".*\[(.*)\].*", r"\1", text)
        for name in [*TUNABLES, *COUNTERS]:
            flags = os.O_RDWR if name in TUNABLES else os.O_RDONLY
            self._files[name] = os.open(SYSFS / name, flags)
        self._vmstat = os.open("/proc/vmstat", os.O_RDONLY)
        ksmd = next(int(p.name) for p in Path("/proc").glob("[0-9]*") if (p / "comm").read_text() == "ksmd\n")
        self._ksmd = os.open(f"/proc/{ksmd}/status", os.O_RDONLY)
        self._directory = tempfile.TemporaryDirectory(prefix="ksm-worker-")
        worker = Path(self._directory.name) / "worker"
        source = Path(__file__).with_name("worker.c")
        subprocess.run(["cc", "-O1", "-static", "-o", worker, source], check=True)
        self._cgroup = CGROUPS / f"ksm-{os.getpid()}"
        self._cgroup.mkdir(exist_ok=True)
        self._flush = os.open(self._cgroup / "memory.force_empty", os.O_WRONLY)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.zygote = subprocess.Popen([worker], close_fds=False, preexec_fn=lambda: give_channel(theirs.fileno()))
        theirs.close()
        self._channel = ours
        self.write("run", "0")
        self.write("advisor_mode", "none")
        if self._swap:
            self._start_swap()

    def _start_swap(self) -> None:
        Path("/sys/block/zram0/reset").write_text("1")
        Path("/sys/block/zram0/disksize").write_text("256M")
        subprocess.run(["mkswap", "/dev/zram0"], check=True, stdout=subprocess.DEVNULL)
        if ctypes.CDLL(None, use_errno=True).swapon(b"/dev/zram0", 0):
            raise OSError(ctypes.get_errno(), "swapon /dev/zram0")

    def close(self) -> None:
        """Kill the workers, unmerge, and put every tunable back."""
        if self._files:
            if hasattr(self, "zygote"):
                self.zygote.kill()
                self.zygote.wait()
            self.write("run", "2")
            self.write("run", "0")
            for name in [n for n in self._saved if n not in ("run", "advisor_mode", "pages_to_scan")]:
                self.write(name, self._saved[name])
            if self._saved["advisor_mode"] == "none":
                self.write("pages_to_scan", self._saved["pages_to_scan"])
            self.write("advisor_mode", self._saved["advisor_mode"])
            self.write("run", self._saved["run"])
        if self._swap:
            ctypes.CDLL(None).swapoff(b"/dev/zram0")
            Path("/sys/block/zram0/reset").write_text("1")
        for fd in self._files.values():
            os.close(fd)
        self._files = {}
        if hasattr(self, "_flush"):
            os.close(self._flush)
            self._cgroup.rmdir()
            del self._flush
        os.close(self._lock)

    # ---- files -----------------------------------------------------------------------------------

    def read(self, name: str) -> str:
        return os.pread(self._files[name], 4096, 0).decode()

    def write(self, name: str, text: str | bytes) -> None:
        os.pwrite(self._files[name], text.encode() if isinstance(text, str) else text, 0)

    def number(self, name: str) -> int:
        return int(os.pread(self._files[name], 64, 0))

    def vmstat(self) -> dict[str, int]:
        text = os.pread(self._vmstat, 65536, 0)
        return {
            name: int(re.search(rb"^%s (\d+)$" % name.encode(), text, re.M)[1])  # type: ignore[index]
            for name in ("cow_ksm", "ksm_swpin_copy")
        }

    def flush(self) -> None:
        """Empty the per-CPU lists that hold an extra reference on fresh pages."""
        os.write(self._flush, b"0")

    # ---- stepping --------------------------------------------------------------------------------

    def step(self, pages: int) -> None:
        """Exactly one batch of at most `pages` visits, or none if nothing is registered; ksmd is parked around it."""
        self.flush()
        self.write("pages_to_scan", str(pages))
        for _ in range(3):  # "nothing registered" is only believed when ksmd came to it three times
            if self._let_go(pages):
                return

    def _let_go(self, pages: int) -> bool:
        """Let ksmd run until it has done its batch, or looked and gone back to sleep; whether it did anything."""
        before = self._progress()
        switches = self._switches()
        self.write("run", "1")
        started = time.monotonic()
        nudged = False
        spins = 0
        while True:
            scanned, passes = self._progress()
            if passes != before[1] or scanned - before[0] >= pages:
                break
            spins += 1
            if spins > 20:
                if self._switches() != switches:
                    break
                time.sleep(0.0001)
            waited = time.monotonic() - started
            if waited > 0.05 and not nudged and (scanned, passes) == before:
                # It may have fallen asleep, not parked, between the last two writes of the step before.
                nudged = True
                self._change_sleep()
            if waited > 60:
                raise RuntimeError(f"ksmd did not finish a batch of {pages} in 60 s")
        self.write("run", "0")  # waits for the batch's end
        self._change_sleep()
        return self._progress() != before

    def _change_sleep(self) -> None:
        """Wake ksmd from its sleep: any change of sleep_millisecs does."""
        self._sleep = FOREVER_MS + (self._sleep == FOREVER_MS)
        self.write("sleep_millisecs", str(self._sleep))

    def require_alone(self) -> None:
        """Nobody else on this host may have memory registered: its pages would be counted too."""
        for _ in range(100):
            before = self._progress()
            self.step(1)
            if self._progress() == before:
                return
            self.write("run", "2")
            self.write("run", "0")
            time.sleep(0.1)
        raise RuntimeError("another process on this host is registered with KSM")

    def _progress(self) -> tuple[int, int]:
        return self.number("pages_scanned"), self.number("full_scans")

    def _switches(self) -> bytes:
        text = os.pread(self._ksmd, 8192, 0)
        return text[text.index(b"voluntary_ctxt_switches:") :].split(b"\n", 1)[0]

    # ---- workers ---------------------------------------------------------------------------------

    def fork(self, channel: socket.socket) -> tuple[int, socket.socket]:
        """Have the worker at `channel` fork; the child's pid and channel."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket.send_fds(channel, [struct.pack("6Q", FORK, 0, 0, 0, 0, 0)], [theirs.fileno()])
        value, _, _ = receive(channel)
        theirs.close()
        receive(ours)
        return value, ours

    def fresh(self) -> tuple[int, socket.socket]:
        return self.fork(self._channel)


def give_channel(fd: int) -> None:
    """Make fd descriptor 3 of the program about to start."""
    if fd == 3:
        os.set_inheritable(3, True)
    else:
        os.dup2(fd, 3)


def receive(channel: socket.socket) -> tuple[int, int, bytes]:
    packet = channel.recv(1 << 17)
    if len(packet) < 16:
        raise RuntimeError("a worker died")
    value, error = struct.unpack_from("qq", packet)
    return value, error, packet[16:]


class RealProcess:
    """One worker."""

    def __init__(self, machine: RealMachine, name: str, pid: int, channel: socket.socket) -> None:
        self.machine, self.name, self.pid, self._channel = machine, name, pid, channel
        self._stat = os.open(f"/proc/{pid}/ksm_stat", os.O_RDONLY)

    def _call(self, op: int, *numbers: int, data: bytes = b"") -> tuple[int, bytes]:
        words = [n % (1 << 64) for n in numbers] + [0] * (5 - len(numbers))
        self._channel.send(struct.pack("6Q", op, *words) + data)
        value, error, rest = receive(self._channel)
        if error:
            raise OSError(error, os.strerror(error))
        return value, rest

    def mmap(self, length: int, prot: int = 3, addr: int | None = None, node: int = 0) -> int:
        assert addr is not None
        return self._call(MMAP, addr, length, prot)[0]

    def write(self, addr: int, data: bytes) -> None:
        self._call(WRITE, addr, len(data), data=data)

    def read(self, addr: int, n: int) -> bytes:
        return self._call(READ, addr, n)[1]

    def madvise(self, addr: int, length: int, advice: int) -> None:
        self._call(MADVISE, addr, length, advice)

    def munmap(self, addr: int, length: int) -> None:
        self._call(MUNMAP, addr, length)

    def mprotect(self, addr: int, length: int, prot: int) -> None:
        self._call(MPROTECT, addr, length, prot)

    def mremap(self, addr: int, old: int, new: int, flags: int = 0, new_addr: int | None = None) -> int:
        return self._call(MREMAP, addr, old, new, flags, new_addr or 0)[0]

    def prctl(self, option: int, a2: int = 0, a3: int = 0, a4: int = 0, a5: int = 0) -> int:
        return self._call(PRCTL, option, a2, a3, a4, a5)[0]

    def fork(self, name: str) -> RealProcess:
        return self.machine._add(name, *self.machine.session.fork(self._channel))

    def exit(self) -> None:
        self._channel.send(struct.pack("6Q", EXIT, 0, 0, 0, 0, 0))
        while self._channel.recv(16):  # closed after the address space has gone
            pass
        self._close()
        del self.machine.processes[self.name]

    def _close(self) -> None:
        self._channel.close()
        os.close(self._stat)

    @property
    def ksm_stat(self) -> dict[str, int | bool]:
        found: dict[str, int | bool] = {}
        for line in os.pread(self._stat, 4096, 0).decode().splitlines():
            name, value = line.replace(":", "").split()
            found[name] = value == "yes" if value in ("yes", "no") else int(value)
        return found


class RealSysfs:
    """The kernel's files; run, pages_to_scan and sleep_millisecs are kept apart, since stepping uses them."""

    def __init__(self, session: KernelSession) -> None:
        self._session = session
        self.logical = {"run": 0, "pages_to_scan": 100, "sleep_millisecs": 20}
        self.base = {name: session.number(name) for name in ("pages_scanned", "pages_skipped")}

    def read(self, name: str) -> str:
        if name in self.logical:
            return f"{self.logical[name]}\n"
        if name in self.base:
            return f"{self._session.number(name) - self.base[name]}\n"
        return self._session.read(name)

    def write(self, name: str, text: str | bytes) -> None:
        if name not in self.logical:
            self._session.write(name, text)
            return
        plain = text.encode() if isinstance(text, str) else text
        if name != "run":
            self._session.write(name, plain)
            if plain:
                self.logical[name] = self._session.number(name)
            return
        number = re.fullmatch(rb"\+?0*([012])\n?", plain)
        if number is None:
            self._session.write("run", plain)
            return
        value = int(number[1])
        if value != self.logical["run"]:
            self._session.write("run", "2" if value == 2 else "0")
            self.logical["run"] = value


class RealKsmd:
    """One pass, or one batch, at a time."""

    def __init__(self, machine: RealMachine) -> None:
        self._machine = machine

    def scan(self) -> None:
        self.scan_pages(UNLIMITED)

    def scan_pages(self, k: int) -> None:
        if self._machine.ksm.logical["run"] == 1 and k:
            self._machine.session.step(k)


class RealMachine:
    """A fresh start of the kernel's KSM, with processes of its own; one at a time in a session."""

    def __init__(self, session: KernelSession) -> None:
        self.session = session
        self.processes: dict[str, RealProcess] = {}
        self.page_size = PAGE
        session.write("run", "2")
        session.write("run", "0")
        for name, value in TUNABLES.items():
            if name != "run":
                session.write(name, value)
        session.write("sleep_millisecs", str(session._sleep))
        left = {name: session.number(name) for name in COUNTERS if name not in ("pages_scanned", "pages_skipped")}
        if any(left.values()):
            raise RuntimeError(f"KSM is not empty at the start: {left}")
        session.require_alone()
        self.ksm = RealSysfs(session)
        self.ksmd = RealKsmd(self)
        self._base = session.vmstat()

    def __enter__(self) -> RealMachine:
        return self

    def __exit__(self, *_: object) -> None:
        for process in list(self.processes.values()):
            process.exit()

    def spawn(self, name: str) -> RealProcess:
        return self._add(name, *self.session.fresh())

    def _add(self, name: str, pid: int, channel: socket.socket) -> RealProcess:
        self.processes[name] = RealProcess(self, name, pid, channel)
        return self.processes[name]

    def reclaim(self) -> None:
        raise OSError(errno.ENOSYS, "whole-machine reclaim cannot be asked of the kernel page by page")

    @property
    def vmstat(self) -> dict[str, int]:
        return {name: value - self._base[name] for name, value in self.session.vmstat().items()}


def terminate_on_sigterm() -> None:
    """Let SIGTERM unwind like Ctrl-C, so that sessions put everything back."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)

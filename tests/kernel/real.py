"""RealMachine: the interface of `ksm.Machine` on the running kernel, single-stepped."""

from __future__ import annotations

import atexit
import errno
import functools
import os
import re
import signal
import socket
import struct
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from tests.kernel import host
from tests.kernel.host import FOREVER_MS, PAGE, SYSFS, Unavailable, opened, why_not

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
CUMULATIVE = ("pages_scanned", "pages_skipped")
VMSTAT = ("cow_ksm", "ksm_swpin_copy")
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
MMAP, WRITE, READ, MADVISE, MUNMAP, MPROTECT, MREMAP, PRCTL, FORK, EXIT, CHURN, MIGRATE, FLUSH = range(1, 14)
COMMAND = struct.Struct("6Q")
REPLY = struct.Struct("2q")
LONGEST = 32 * PAGE  # bytes of data in one command


class KernelSession:
    """Holds the kernel's KSM for one user: the lock, a parked ksmd, workers; puts everything back at the end.

    `swap` gives the host a swap device on zram while the session lasts.
    """

    def __init__(self, swap: bool = False) -> None:
        self._swap = swap
        self._files: dict[str, int] = {}
        self._sleep = FOREVER_MS
        self.nodes = host.numa_nodes()
        self.processes: set[RealProcess] = set()

    def __enter__(self) -> KernelSession:
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers, unmerge, and put everything back; a signal that comes meanwhile waits for the end."""
        with host.held_back(signal.SIGINT, signal.SIGTERM):
            self._stack.close()

    def _start(self, stack: ExitStack) -> None:
        reason = why_not()
        if reason:
            raise Unavailable(reason)
        stack.enter_context(host.sigterm_unwinds())
        stack.enter_context(host.locked(host.LOCK))
        stack.enter_context(host.pinned())
        host.require_unused()
        if host.KHUGEPAGED.exists():
            stack.enter_context(host.khugepaged_asleep())
        for name in [name for name in [*TUNABLES, *COUNTERS] if (SYSFS / name).exists()]:
            self._files[name] = opened(stack, SYSFS / name, os.O_RDWR if name in TUNABLES else os.O_RDONLY)
        self._vmstat = opened(stack, Path("/proc/vmstat"), os.O_RDONLY)
        self._ksmd = opened(stack, host.kernel_thread("ksmd") / "stat", os.O_RDONLY)
        if self._swap:
            stack.enter_context(host.swap_on_zram())
        found = {name: selected(self.read(name)) for name in TUNABLES if name in self._files}
        stack.callback(self._restore, stack.enter_context(host.remembered(found)))
        self._start_workers(stack)
        self.write("run", "0")
        self._stop_advisor()
        self._park()

    def _start_workers(self, stack: ExitStack) -> None:
        """The zygote, in a memory cgroup of its own; every worker is its descendant."""
        self._groups = host.memory_cgroups()
        work = stack.enter_context(host.cgroup(self._groups, f"ksm-{os.getpid()}-work"))
        self._evict = opened(stack, work / self._groups.evict, os.O_WRONLY)
        self._memory = opened(stack, work / "memory.stat", os.O_RDONLY)
        self._flush: int | None = None
        if self._groups is host.V1:
            empty = stack.enter_context(host.cgroup(self._groups, f"ksm-{os.getpid()}-empty"))
            self._flush = opened(stack, empty / self._groups.evict, os.O_WRONLY)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.callback(self._channel.close)
        with theirs:
            zygote = subprocess.Popen([worker(), str(theirs.fileno())], pass_fds=[theirs.fileno()])
        stack.callback(self._forget_processes)
        stack.callback(zygote.wait, timeout=10)
        stack.callback(zygote.kill)
        stack.callback(host.kill_all, work)
        (work / "cgroup.procs").write_text(str(zygote.pid))

    def _forget_processes(self) -> None:
        for process in list(self.processes):
            process.close()

    def _restore(self, saved: dict[str, str]) -> None:
        """All tunables as they were; KSM pages must go first, since they forbid changes."""
        self.write("run", "2")
        self.write("run", "0")
        self._stop_advisor()
        for name in sorted(saved, key=["advisor_mode", "run"].count):  # these two last
            if name != "pages_to_scan" or saved.get("advisor_mode", "none") == "none":
                self.write(name, saved[name])

    def _stop_advisor(self) -> None:
        if self.has("advisor_mode"):
            self.write("advisor_mode", "none")

    # ---- files -----------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        """Whether this kernel has the file."""
        return name in self._files

    def _file(self, name: str) -> int:
        if name not in self._files:
            raise FileNotFoundError(errno.ENOENT, "this kernel has no such file", str(SYSFS / name))
        return self._files[name]

    def read(self, name: str) -> str:
        return os.pread(self._file(name), PAGE, 0).decode()

    def write(self, name: str, text: str | bytes) -> None:
        os.pwrite(self._file(name), text.encode() if isinstance(text, str) else text, 0)

    def number(self, name: str) -> int:
        return int(os.pread(self._file(name), 64, 0))

    def vmstat(self) -> dict[str, int]:
        text = host.whole(self._vmstat)
        names = [name for name in VMSTAT if b"\n%s " % name.encode() in text]
        return {name: number_after(text, b"\n%s " % name.encode()) for name in names}

    # ---- stepping --------------------------------------------------------------------------------

    def step(self, pages: int) -> None:
        """Exactly one batch of at most `pages` visits; ksmd is parked before and after."""
        self.flush()
        self.write("pages_to_scan", str(pages))
        self.write("run", "1")
        host.wait_for_sleep(self._ksmd, f"a batch of {pages:,} pages")
        self.write("run", "0")
        self._park()

    def flush(self) -> None:
        """Empty the per-CPU lists that hold an extra reference on fresh pages."""
        if self._flush is None:
            self._ask_zygote(FLUSH)
        else:
            os.write(self._flush, b"0")

    def _park(self) -> None:
        """Move ksmd from its sleep between batches to its sleep until `run` changes."""
        self._sleep = FOREVER_MS + (self._sleep == FOREVER_MS)
        self.write("sleep_millisecs", str(self._sleep))
        host.wait_for_sleep(self._ksmd, "being parked")

    def evict(self) -> None:
        """Have the kernel reclaim all it can of the workers' memory: until two rounds in a row got nothing.

        The first round only takes the marks of use away. The kernel decides by counts whether to look at its active
        pages at all, and brings them up to date when they are read and much has happened.
        """
        self.flush()
        seen: list[int] = []
        while len(seen) < 3 or len(set(seen[-3:])) > 1:
            self._ask_zygote(CHURN)
            seen.append(number_after(b"\n" + host.whole(self._memory), b"\n%s " % self._groups.resident))
            with suppress(BlockingIOError):
                os.write(self._evict, self._groups.everything)

    def _ask_zygote(self, op: int) -> None:
        self._channel.send(COMMAND.pack(op, 0, 0, 0, 0, 0))
        _, error, _ = receive(self._channel)
        if error:
            raise OSError(error, os.strerror(error))

    def require_idle(self) -> None:
        """ksmd must find nothing registered: only then do counters start from nothing."""
        watched = [name for name in ("full_scans", "pages_scanned") if self.has(name)]
        for _ in range(100):
            before = [self.number(name) for name in watched]
            self.step(1)
            if [self.number(name) for name in watched] == before:
                return
            self.write("run", "2")
            self.write("run", "0")
            time.sleep(0.02)
        raise Unavailable("another process on this host is registered with KSM")

    # ---- workers ---------------------------------------------------------------------------------

    def fork(self, channel: socket.socket | None = None) -> tuple[int, socket.socket]:
        """Have the worker at `channel`, or the zygote, fork; the child's pid and channel."""
        channel = channel or self._channel
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(channel, [COMMAND.pack(FORK, 0, 0, 0, 0, 0)], [theirs.fileno()])
            value, error, _ = receive(channel)
        if error:
            ours.close()
            raise OSError(error, os.strerror(error))
        receive(ours)
        return value, ours


def selected(text: str) -> str:
    """What a file holds, as it can be written back: `[none] scan-time` is `none`."""
    return re.sub(r".*\[(.*)\].*", r"\1", text.strip())


def number_after(text: bytes, name: bytes) -> int:
    start = text.index(name) + len(name)
    return int(text[start : text.index(b"\n", start)])


@functools.cache
def worker() -> Path:
    """The compiled worker; it goes with this process."""
    if host.WORKER in os.environ:
        return Path(os.environ[host.WORKER])
    directory = tempfile.TemporaryDirectory(prefix="ksm-worker-")
    path = Path(directory.name) / "worker"
    source = Path(__file__).with_name("worker.c")
    for how in (["-static"], []):  # not every system has a static libc
        made = subprocess.run(["cc", "-O2", *how, "-o", path, source], capture_output=True, text=True)
        if made.returncode == 0:
            break
    else:
        raise Unavailable(f"cc cannot compile the worker: {made.stderr}")
    atexit.register(directory.cleanup)
    return path


def receive(channel: socket.socket) -> tuple[int, int, bytes]:
    packet = channel.recv(LONGEST + REPLY.size)
    if len(packet) < REPLY.size:
        raise RuntimeError("a worker died")
    value, error = REPLY.unpack_from(packet)
    return value, error, packet[REPLY.size :]


class RealProcess:
    """One worker."""

    def __init__(self, machine: RealMachine, name: str, pid: int, channel: socket.socket) -> None:
        self.machine, self.name, self.pid, self._channel = machine, name, pid, channel
        self._stat = host.opened_if_there(Path(f"/proc/{pid}/ksm_stat"))
        machine.session.processes.add(self)

    def _call(self, op: int, *numbers: int, data: bytes = b"") -> tuple[int, bytes]:
        words = [n % (1 << 64) for n in numbers] + [0] * (5 - len(numbers))
        self._channel.send(COMMAND.pack(op, *words) + data)
        value, error, rest = receive(self._channel)
        if error:
            raise OSError(error, os.strerror(error))
        return value, rest

    def mmap(self, length: int, prot: int = 3, addr: int | None = None, node: int = 0) -> int:
        if addr is None:
            raise NotImplementedError("the kernel is asked at fixed addresses")
        nodes = self.machine.session.nodes
        if not 0 <= node < nodes:
            raise NotImplementedError(f"node {node} of {nodes}")
        return self._call(MMAP, addr, length, prot, node + 1 if nodes > 1 else 0)[0]

    def migrate(self, addr: int, length: int, node: int) -> None:
        self._call(MIGRATE, addr, length, node)

    def write(self, addr: int, data: bytes) -> None:
        for i in range(0, len(data), LONGEST):
            part = data[i : i + LONGEST]
            self._call(WRITE, addr + i, len(part), data=part)

    def read(self, addr: int, n: int) -> bytes:
        parts = (self._call(READ, addr + i, min(LONGEST, n - i))[1] for i in range(0, n, LONGEST))
        return b"".join(parts)

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
        self._channel.send(COMMAND.pack(EXIT, 0, 0, 0, 0, 0))
        while self._channel.recv(16):  # the end comes after the address space has gone
            pass
        self.close()

    def close(self) -> None:
        """Let go of a worker that is no more."""
        self._channel.close()
        if self._stat is not None:
            os.close(self._stat)
        self.machine.session.processes.discard(self)
        del self.machine.processes[self.name]

    @property
    def ksm_stat(self) -> dict[str, int | bool]:
        if self._stat is None:
            return {}
        words = host.whole(self._stat).decode().replace(":", "").split()
        pairs = zip(words[::2], words[1::2], strict=True)
        return {name: value == "yes" if value in ("yes", "no") else int(value) for name, value in pairs}


class RealSysfs:
    """The kernel's files; run, pages_to_scan and sleep_millisecs are kept apart, since stepping uses them."""

    def __init__(self, session: KernelSession) -> None:
        self._session = session
        self.logical = {"run": 0, "pages_to_scan": 100, "sleep_millisecs": 20}
        self.base = {name: session.number(name) for name in CUMULATIVE if session.has(name)}

    def read(self, name: str) -> str:
        if name in self.logical:
            return f"{self.logical[name]}\n"
        if name in self.base:
            return f"{self._session.number(name) - self.base[name]}\n"
        return self._session.read(name)

    def write(self, name: str, text: str | bytes) -> None:
        plain = text.encode() if isinstance(text, str) else text
        if name == "run":
            self._write_run(plain)
            return
        if name == "advisor_mode" and plain.startswith(b"scan-time"):
            raise NotImplementedError("the advisor goes by wall time, and takes the file by which ksmd is stepped")
        self._session.write(name, plain)
        if name in self.logical and plain:
            self.logical[name] = self._session.number(name)

    def _write_run(self, plain: bytes) -> None:
        """1 is only remembered: ksmd would start at once."""
        number = re.fullmatch(rb"\+?0*([012])\n?", plain[:PAGE].split(b"\0")[0])
        if number is None:
            self._session.write("run", plain)
            if plain and self._session.number("run") == 1:
                raise AssertionError(f"the kernel takes {plain!r} for 1")
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

    page_size = PAGE

    def __init__(self, session: KernelSession) -> None:
        self.session = session
        self.processes: dict[str, RealProcess] = {}
        session.write("run", "2")
        session.write("run", "0")
        for name, value in TUNABLES.items():
            if name not in ("run", "sleep_millisecs") and session.has(name):
                session.write(name, value)
        left = {name: session.number(name) for name in COUNTERS if name not in CUMULATIVE and session.has(name)}
        if any(left.values()):
            raise Unavailable(f"KSM is not empty at the start: {left}")
        session.require_idle()
        self.ksm = RealSysfs(session)
        self.ksmd = RealKsmd(self)
        self._base = session.vmstat()

    def __enter__(self) -> RealMachine:
        return self

    def __exit__(self, *_: object) -> None:
        for process in list(self.processes.values()):
            process.exit()

    def spawn(self, name: str) -> RealProcess:
        return self._add(name, *self.session.fork())

    def _add(self, name: str, pid: int, channel: socket.socket) -> RealProcess:
        self.processes[name] = RealProcess(self, name, pid, channel)
        return self.processes[name]

    def reclaim(self) -> None:
        self.session.evict()

    @property
    def vmstat(self) -> dict[str, int]:
        return {name: value - self._base[name] for name, value in self.session.vmstat().items()}

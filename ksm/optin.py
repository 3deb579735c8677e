"""Running a program with all of its memory opted in to KSM, and what it and its children got out of that."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields

from ksm.errors import KsmError, UnsupportedError
from ksm.linux import Host, get_memory_merge, set_memory_merge
from ksm.stats import ProcessStats

_PR_SET_CHILD_SUBREAPER = 36
_SURVIVES_EXEC = (6, 7)
_FORWARDED = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
_FIRST_LOOK = 0.05  # seconds; later ones come less and less often
_PROBE = "import ctypes, sys; sys.exit(ctypes.CDLL(None).prctl(68, 0, 0, 0, 0))"


def require_opt_in() -> None:
    """Raise `UnsupportedError` with the way out where prctl(PR_SET_MEMORY_MERGE) and exec do not opt a program in.

    >>> require_opt_in()  # doctest: +SKIP
    """
    if sys.platform != "linux":
        raise UnsupportedError(f"prctl(PR_SET_MEMORY_MERGE) needs Linux, and this is {sys.platform}")
    try:
        before = get_memory_merge()
        set_memory_merge(True)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise UnsupportedError(
                "this kernel has no prctl(PR_SET_MEMORY_MERGE): it is there since Linux 6.4, with CONFIG_KSM; before "
                "it a program must mark its memory itself, by madvise(MADV_MERGEABLE), as ksm.linux.madvise does"
            ) from None
        raise UnsupportedError(f"prctl(PR_SET_MEMORY_MERGE) is refused here, perhaps by seccomp: {error}") from None
    try:
        if _release() < _SURVIVES_EXEC and subprocess.run([sys.executable, "-I", "-S", "-c", _PROBE]).returncode != 1:
            raise UnsupportedError(
                "this kernel drops the opt-in when a program is executed (it is kept since Linux 6.7, so systemd's "
                "MemoryKSM= does not help either): preload a library that opts in from inside, see docs/run.md"
            )
    finally:
        set_memory_merge(before)


def _release() -> tuple[int, ...]:
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return tuple(int(part) for part in match.groups()) if match else (0, 0)


def execute(arguments: Sequence[str]) -> None:
    """Become the program, opted in; returns only by raising.

    Raises:
        OSError: ENOENT, EACCES ... of the exec.

    >>> execute(["no such program"])  # doctest: +SKIP
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    before = get_memory_merge()
    set_memory_merge(True)
    ignored = [number for number in (signal.SIGPIPE, signal.SIGXFSZ) if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:  # by Python, and that would be inherited
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(arguments[0], list(arguments))
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        set_memory_merge(before)


# ---- what it got out of it -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What KSM shows of a family of processes at one moment, added up over them.

    Of each group of equal pages one is counted that is not saved: `profit` is what the kernel's own measure gives, and
    more than the host gains where the family shares among itself.

    >>> Saving(seconds=1.0, processes=2).merging_pages
    0
    """

    seconds: float
    """Since the program started."""
    processes: int = 0
    merging_pages: int = 0
    zero_pages: int = 0
    rmap_items: int = 0
    profit: int = 0
    """Bytes, the sum of ksm_process_profit."""
    host_saved: int = 0
    """Bytes that KSM saves on the whole host."""

    def to_dict(self) -> dict[str, int | float]:
        """For JSON.

        >>> Saving(seconds=1.0).to_dict()["processes"]
        0
        """
        return {name.name: getattr(self, name.name) for name in fields(self)}


@dataclass(slots=True)
class Outcome:
    """How a program ended, and what KSM did for it meanwhile.

    >>> Outcome(before=Saving(seconds=0.0)).exit_code
    0
    """

    before: Saving
    best: Saving = field(default_factory=lambda: Saving(seconds=0.0))
    """When its profit was highest."""
    last: Saving = field(default_factory=lambda: Saving(seconds=0.0))
    """When it was seen last: a process that has ended shows nothing any more."""
    most_processes: int = 0
    seconds: float = 0.0
    status: int = 0
    """As waitpid(2) gives it."""
    scanning: bool = True
    """Whether ksmd was running when last seen."""

    @property
    def exit_code(self) -> int:
        """The program's, or minus the signal that ended it.

        >>> Outcome(before=Saving(seconds=0.0), status=0x0300).exit_code
        3
        """
        return os.waitstatus_to_exitcode(self.status)

    def to_dict(self) -> dict[str, object]:
        """For JSON.

        >>> Outcome(before=Saving(seconds=0.0)).to_dict()["exit_code"]
        0
        """
        return {
            "exit_code": self.exit_code,
            "seconds": self.seconds,
            "most_processes": self.most_processes,
            "ksmd_running": self.scanning,
            "host_saved_before": self.before.host_saved,
            "best": self.best.to_dict(),
            "last": self.last.to_dict(),
        }


def family(host: Host, pid: int) -> Iterator[int]:
    """A process and all its descendants, as far as they can be seen.

    >>> os.getpid() in family(Host(), os.getpid())
    True
    """
    seen = set()
    ahead = [pid]
    while ahead:
        one = ahead.pop()
        if one in seen:
            continue
        seen.add(one)
        yield one
        with contextlib.suppress(OSError):  # it has gone
            for task in (host.proc / str(one) / "task").iterdir():
                with contextlib.suppress(OSError):
                    ahead += [int(child) for child in (task / "children").read_text().split()]


def saving(host: Host, pids: Iterable[int], seconds: float) -> Saving:
    """What KSM shows of these processes now; those that have gone, or that cannot be read, count nothing.

    >>> saving(Host(), [], 0.0).processes
    0
    """
    found = []
    for pid in pids:
        with contextlib.suppress(OSError, KsmError):
            found.append(ProcessStats.of(host.ksm_stat(pid), host.page_size))
    saved = 0
    with contextlib.suppress(OSError, KsmError):
        saved = host.ksm.snapshot().saved_bytes
    return Saving(
        seconds=seconds,
        processes=len(found),
        merging_pages=sum(stats.ksm_merging_pages or 0 for stats in found),
        zero_pages=sum(stats.ksm_zero_pages or 0 for stats in found),
        rmap_items=sum(stats.ksm_rmap_items or 0 for stats in found),
        profit=sum(stats.profit for stats in found),
        host_saved=saved,
    )


# ---- watching over it --------------------------------------------------------------------------------------------


def run(arguments: Sequence[str], host: Host, every: float = 1.0) -> Outcome:
    """Run a program opted in, pass signals on, look at it now and then, and wait for its end.

    Signals that were sent to this process alone are passed on; those from a terminal reach the program anyway. Looks
    come after 0.05 s and then less and less often, up to `every` seconds. Everything that this process starts or
    inherits meanwhile counts as the program's, so it should have no other children.

    Raises:
        OSError: the program cannot be executed.

    >>> run(["true"], Host()).exit_code  # doctest: +SKIP
    0
    """
    watched = _FORWARDED | {signal.SIGCHLD}
    before = saving(host, [], 0.0)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        _adopt_orphans()
        start = time.monotonic()
        program = _start(arguments, mask)
        outcome = Outcome(before)
        pause = _FIRST_LOOK
        try:
            while not _ended(program, outcome):
                _pass_on(signal.sigtimedwait(watched, pause), program.pid)
                gone = time.monotonic() - start
                if gone >= outcome.last.seconds + pause:
                    _look(host, gone, outcome)
                    pause = min(every, pause * 1.5)
        except BaseException:
            program.kill()
            program.wait()
            raise
        outcome.seconds = time.monotonic() - start
        return outcome
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start(arguments: Sequence[str], mask: Iterable[int]) -> subprocess.Popen[bytes]:
    """The program, opted in by inheritance, with the signal mask that this process had."""
    own = get_memory_merge()
    set_memory_merge(True)

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        return subprocess.Popen(arguments, close_fds=False, preexec_fn=unblock)
    finally:
        set_memory_merge(own)


def _ended(program: subprocess.Popen[bytes], outcome: Outcome) -> bool:
    """Collect what has ended; True when that was the program itself."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            pid, status = 0, 0
        if pid == program.pid:
            outcome.status = status
            program.returncode = os.waitstatus_to_exitcode(status)
            return True
        if pid == 0:
            return False


def _pass_on(info: signal.struct_siginfo | None, pid: int) -> None:
    if info is not None and info.si_signo in _FORWARDED and info.si_code <= 0:  # from a process, not from a terminal
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, info.si_signo)


def _look(host: Host, seconds: float, outcome: Outcome) -> None:
    mine = os.getpid()  # orphans are children of this process
    now = saving(host, (one for one in family(host, mine) if one != mine), seconds)
    if now.processes == 0:
        return  # it is ending: what it had can no longer be seen
    outcome.last = now
    outcome.most_processes = max(outcome.most_processes, now.processes)
    if now.profit >= outcome.best.profit or outcome.best.processes == 0:
        outcome.best = now
    with contextlib.suppress(OSError, KsmError):
        outcome.scanning = host.ksm.run == 1


def _adopt_orphans() -> None:
    """Children whose parents have ended become ours: so they still belong to the family."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

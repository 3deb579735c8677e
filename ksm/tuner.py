"""The long-running tuner of a host's KSM: looks, decides, writes, steps aside for others, and puts everything back."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ksm.errors import KsmError
from ksm.linux import Host
from ksm.policies import Decision, Policy, View
from ksm.stepper import flock
from ksm.sysfs import ADVISOR_MODES, ATTRIBUTES, Sysfs
from ksm.tune import require_rights, value_of

LOCK_PATH = "/run/ksm-tune.lock"
"""What a tuner holds as long as it runs. Only root can write where it is, so what it says can be trusted."""

MANAGED = ("smart_scan", "sleep_millisecs", "pages_to_scan", "advisor_mode", "run")
"""The tunables that a tuner writes, in the order in which they are put back."""

_PUT_BACK_SECONDS = 60.0  # below the 90 s that systemd gives a service to stop
_MOST_FAILURES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One turn of a tuner: what it saw and decided, and what was written.

    >>> Step(seconds=60.0, note="ksmd is in other hands").changed
    {}
    """

    seconds: float
    """Since the tuner started."""
    view: View | None = None
    decision: Decision | None = None
    changed: dict[str, str] = field(default_factory=dict)
    """Values written, or with `dry_run` those that would have been."""
    note: str = ""
    """What was in the way."""

    def to_dict(self) -> dict[str, Any]:
        """For a line of JSON.

        >>> Step(seconds=1.0).to_dict()["changed"]
        {}
        """
        found: dict[str, Any] = {"seconds": round(self.seconds, 3), "changed": self.changed, "note": self.note}
        if self.decision is not None:
            found |= {"why": self.decision.why, "wanted": self.decision.settings()}
        if self.view is not None:
            view = self.view
            found |= {
                "mem_available": view.mem_available,
                "committed": view.committed,
                "candidates": view.candidates,
                "ksmd_cpu_seconds": view.ksmd_cpu,
                "pages_shared": view.stats.pages_shared,
                "pages_sharing": view.stats.pages_sharing,
                "full_scans": view.stats.full_scans,
                "saved_bytes": view.stats.saved_bytes,
                "profit": view.stats.profit,
            }
        return found


# ---- looking ---------------------------------------------------------------------------------------------------


class Lookout:
    """Looks at a host for a policy; remembers which processes KSM has come round to.

    A process that takes part counts with its present anonymous pages until two passes have ended since it was first
    seen, and with the pages that KSM tracks of it from then on. Costs some 30 us a process of the host.

    >>> Lookout(Host()).look().mem_total > 0  # doctest: +SKIP
    True
    """

    def __init__(self, host: Host, clock: Callable[[], float] = time.monotonic) -> None:
        self._host = host
        self._clock = clock
        self._first: dict[int, int] = {}  # pid -> full_scans when it was first seen

    def look(self) -> View:
        """Everything there is to see, now.

        >>> Lookout(Host()).look().committed > 0  # doctest: +SKIP
        True
        """
        host = self._host
        stats = host.ksm.snapshot()
        cpu: float | None = None
        with contextlib.suppress(KsmError, OSError):
            cpu = host.ksmd_cpu_seconds()
        return View(
            seconds=self._clock(),
            stats=stats,
            mem_total=host.mem_total,
            mem_available=host.mem_available,
            committed=host.committed,
            ksmd_cpu=cpu,
            candidates=self._candidates(stats.full_scans),
        )

    def _candidates(self, passes: int) -> int:
        found = {}
        with contextlib.suppress(KsmError, OSError):  # before 5.19 processes tell nothing
            found = {p.pid: p.stats for p in self._host.processes(skip_unreadable=True)}
        self._first = {pid: self._first.get(pid, passes) for pid in found}
        pages = 0
        for pid, stats in found.items():
            tracked = stats.ksm_rmap_items or 0
            new = passes - self._first[pid] < 2
            pages += max(tracked, self._anonymous(pid) // stats.page_size) if new else tracked
        return pages

    def _anonymous(self, pid: int) -> int:
        """Bytes of anonymous memory that a process has present; 0 if it has gone."""
        with contextlib.suppress(OSError):
            match = re.search(r"^RssAnon:\s*(\d+) kB", (self._host.proc / str(pid) / "status").read_text(), re.M)
            return int(match[1]) * 1024 if match else 0
        return 0


# ---- tuning ----------------------------------------------------------------------------------------------------


class Tuner:
    """Applies a policy to a host, as a context manager: at its end the tunables are as they were.

    Each turn holds the lock of `Host.lock` only while it writes, and a turn for which another program has it (one
    that steps ksmd, for milliseconds or minutes) is left out: holding it all the time would keep every such program
    from working for as long as a tuner runs. A second tuner is refused by a lock of their own, `lock_path`, which also
    remembers the old values: should this tuner be killed, the next one puts those back.

    Where somebody else changes `run` or switches the advisor on the tuner does nothing until that is undone, and
    at the end it leaves alone what others have set. It never writes 2 to `run`, at the end neither: if that
    was the old value, ksmd is left stopped.

    Args:
        host: the host.
        policy: what decides.
        report: called with every `Step`.
        dry_run: decide and report, and write nothing; needs no rights and no lock.
        lock_path: where tuners find out about each other.
        look: what shows the host to the policy.

    Raises:
        OSError: without the rights to write the tunables.
        TimeoutError: another tuner is running.

    >>> from ksm.policies import Pressure
    >>> with Tuner(Host(), Pressure(), print, dry_run=True) as tuner:  # doctest: +SKIP
    ...     tuner.run(seconds=300)
    """

    def __init__(
        self,
        host: Host,
        policy: Policy,
        report: Callable[[Step], None],
        dry_run: bool = False,
        lock_path: str | os.PathLike[str] = LOCK_PATH,
        look: Callable[[], View] | None = None,
    ) -> None:
        self.host = host
        self.policy = policy
        self.steps = 0
        self._report = report
        self._dry_run = dry_run
        self._lock_path = Path(lock_path)
        self._look = look or Lookout(host).look
        self._present: tuple[str, ...] = ()
        self._saved: dict[str, str] = {}
        self._written: dict[str, str] = {}
        self._failures = 0
        self._pipe: tuple[int, int] | None = None  # a byte in it ends the wait; a signal handler can safely write it
        self._stopping = False
        self._start = time.monotonic()

    def __enter__(self) -> Tuner:
        with contextlib.ExitStack() as stack:
            self._present = tuple(name for name in MANAGED if name in self.host.ksm.names())
            if not self._dry_run:
                require_rights(self.host, self._present)
                descriptor = stack.enter_context(_only_one(self._lock_path))
                with self.host.lock(_PUT_BACK_SECONDS):  # or these would be the values of who steps ksmd
                    self._take_over(descriptor)
                stack.callback(_forget, descriptor)  # after everything is put back
                stack.callback(self._put_back)
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
                stack.callback(os.close, end)
            stack.callback(setattr, self, "_pipe", None)  # before it is closed
            self._start = time.monotonic()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _take_over(self, descriptor: int) -> None:
        ksm = self.host.ksm
        self._saved = {name: value_of(ksm, name) for name in self._present}
        self._saved |= _left_behind(descriptor)
        _remember(descriptor, self._saved)
        if value_of_or_none(ksm, "advisor_mode") not in (None, ADVISOR_MODES[0]):
            self._write("advisor_mode", ADVISOR_MODES[0])  # pages_to_scan is the advisor's while it is on

    # ---- the loop ----

    def run(self, seconds: float | None = None) -> None:
        """Turn after turn, until `stop` is called or that many seconds have gone by; by a clock that never jumps.

        A turn that fails (a file has vanished, say) is reported and tried again; the fifth such in a row raises.

        >>> Tuner(Host(), Pressure(), print).run()  # doctest: +SKIP
        """
        end = None if seconds is None else time.monotonic() + seconds
        due = time.monotonic()
        while not self._stopping:
            self._turn()
            now = time.monotonic()
            due = max(due + self.policy.interval, now)  # after a pause of the whole system: one turn, not many
            if end is not None and due >= end:
                self._wait(end - now)
                return
            if self._wait(due - now):
                due = time.monotonic()

    def _wait(self, seconds: float) -> bool:
        """True if it was woken before the time was up."""
        if self._pipe is None:
            raise ValueError("a tuner runs inside its `with` only")
        woken, _, _ = select.select([self._pipe[0]], [], [], max(0.0, seconds))
        if woken:
            os.read(self._pipe[0], 4096)
        return bool(woken)

    def wake(self) -> None:
        """Have the next turn now; for a signal handler or another thread.

        >>> Tuner(Host(), Pressure(), print).wake()  # doctest: +SKIP
        """
        if self._pipe is not None:
            with contextlib.suppress(BlockingIOError):  # full: it will wake up anyway
                os.write(self._pipe[1], b".")

    def stop(self) -> None:
        """Have `run` return; for a signal handler or another thread.

        >>> Tuner(Host(), Pressure(), print).stop()  # doctest: +SKIP
        """
        self._stopping = True
        self.wake()

    def _turn(self) -> None:
        try:
            step = self.step()
            self._failures = 0
        except (KsmError, OSError) as error:
            self._failures += 1
            if self._failures >= _MOST_FAILURES:
                raise
            step = Step(seconds=self._gone(), note=str(error))
        self.steps += 1
        self._report(step)

    def step(self) -> Step:
        """One turn: look, decide, write.

        >>> with Tuner(Host(), Pressure(), print, dry_run=True) as tuner:  # doctest: +SKIP
        ...     tuner.step().changed
        {'run': '0'}
        """
        with contextlib.ExitStack() as stack:
            if not self._dry_run:
                try:
                    stack.enter_context(self.host.lock(0.0))
                except TimeoutError:
                    return Step(seconds=self._gone(), note="another program drives ksmd; waiting until it has done")
            view = self._look()
            aside = self._aside()
            if aside:
                return Step(seconds=self._gone(), view=view, note=aside)
            decision = self.policy.decide(view)
            changed = {}
            note = []
            for name, value in decision.settings().items():
                if name not in self._present:
                    continue
                now = value_of(self.host.ksm, name)
                if name in self._written and now != self._written[name]:
                    note.append(f"somebody set {name} to {now}")
                if now != value:
                    changed[name] = value
                if not self._dry_run:
                    self._write(name, value)
            return Step(seconds=self._gone(), view=view, decision=decision, changed=changed, note="; ".join(note))

    def _gone(self) -> float:
        return time.monotonic() - self._start

    def _write(self, name: str, value: str) -> None:
        if value_of(self.host.ksm, name) != value:
            self.host.ksm.write(name, value)
        self._written[name] = value

    def _aside(self) -> str:
        """Why somebody else is in charge now, or nothing."""
        ksm = self.host.ksm
        run = value_of(ksm, "run")
        told = self._written.get("run", run)
        if run != told:
            return f"somebody set run to {run}; leaving ksmd to them until it is {told} again"
        mode = value_of_or_none(ksm, "advisor_mode")
        if mode not in (None, ADVISOR_MODES[0]):
            return f"somebody set advisor_mode to {mode}; leaving pages_to_scan to the kernel until it is none again"
        return ""

    # ---- the end ----

    def _put_back(self) -> None:
        """The old values, of what still is as the tuner wrote it; tries all, and raises the first failure."""
        failures: list[Exception] = []
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.host.lock(_PUT_BACK_SECONDS))
            except TimeoutError as error:
                left = ", ".join(f"{name}={value}" for name, value in self._saved.items())
                raise KsmError(f"the tunables are not put back ({left}): {error}") from None
            for name in MANAGED:
                try:
                    self._put_back_one(name)
                except (OSError, KsmError) as error:
                    failures.append(error)
        if failures:
            raise failures[0]

    def _put_back_one(self, name: str) -> None:
        ksm = self.host.ksm
        if name not in self._saved or value_of(ksm, name) != self._written.get(name):
            return
        if name == "pages_to_scan" and value_of_or_none(ksm, "advisor_mode") not in (None, ADVISOR_MODES[0]):
            return
        old = "0" if (name, self._saved[name]) == ("run", "2") else self._saved[name]
        if old != self._written[name]:
            ksm.write(name, old)


def value_of_or_none(ksm: Sysfs, name: str) -> str | None:
    """A file's value, or None where this kernel has no such file.

    >>> from ksm import Machine
    >>> value_of_or_none(Machine(kernel="6.6").ksm, "advisor_mode") is None
    True
    """
    return value_of(ksm, name) if name in ksm.names() else None


# ---- the lock of tuners, with what they must put back -----------------------------------------------------------


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[int]:
    try:
        descriptor = flock(path, 0.0)
    except TimeoutError:
        who = f"{path} is locked"
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            who = f"pid {int(json.loads(path.read_text())['pid'])}"
        raise TimeoutError(f"another tuner is running ({who})") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _left_behind(descriptor: int) -> dict[str, str]:
    """The old values that a tuner which was killed did not put back; none that the kernel would refuse."""
    found: dict[str, str] = {}
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        for name, value in json.loads(os.pread(descriptor, 65536, 0))["saved"].items():
            if name in MANAGED:
                with contextlib.suppress(OSError):
                    ATTRIBUTES[name].parse(str(value).encode())
                    found[name] = str(value)
    return found


def _remember(descriptor: int, saved: dict[str, str]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "saved": saved}).encode(), 0)


def _forget(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)

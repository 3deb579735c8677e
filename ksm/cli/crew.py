"""The worker processes of `ksm demo`: started, opted in one after the other, stopped, and always ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ksm.errors import KsmError

if TYPE_CHECKING:
    from typing_extensions import Self

KINDS = ("render", "analyse")


@dataclass(frozen=True, slots=True)
class Worker:
    """One running worker.

    >>> Worker("render 1", None, "prctl").opted_in
    True
    """

    name: str
    process: subprocess.Popen[str] | None
    how: str
    """ "prctl", "madvise", or why it could not opt in."""

    @property
    def pid(self) -> int:
        """Its process id, 0 for none."""
        return self.process.pid if self.process is not None else 0

    @property
    def opted_in(self) -> bool:
        """Whether the kernel took its word."""
        return self.how in ("prctl", "madvise")


class Crew:
    """Workers of both kinds in turn. A context manager: at its end all of them are dead.

    Args:
        number: how many.
        lock: what `Host.lock` gave. They hold it too: nobody else has it before the memory of the last one has gone,
            not even when we are killed.

    >>> with Crew(1) as crew:
    ...     crew.workers  # those that have opted in: `work` has them do so
    []
    """

    def __init__(self, number: int, lock: int | None = None) -> None:
        self.workers: list[Worker] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._number = number
        self._inherited = () if lock is None else (lock,)

    def __enter__(self) -> Self:
        script = Path(__file__).with_name("worker.py")
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        try:
            for index in range(self._number):
                arguments = [sys.executable, str(script), KINDS[index % len(KINDS)], str(index // len(KINDS) + 1)]
                self._processes.append(
                    subprocess.Popen(
                        arguments,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                        env=environment,
                        pass_fds=self._inherited,
                        start_new_session=True,  # Ctrl-C is for us; we end them
                    )
                )
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._processes:
            with contextlib.suppress(OSError):
                process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def work(self) -> None:
        """Opt in one by one, in order, so that ksmd comes to them in this order; then all work, and are stopped."""
        for process in self._processes:
            _expect(process, "ready")
        for index, process in enumerate(self._processes):
            how = _answer(process)
            self.workers.append(Worker(f"{KINDS[index % len(KINDS)]} {index // len(KINDS) + 1}", process, how))
        for process in self._processes:
            _tell(process)
        for process in self._processes:
            _expect(process, "done")
        for process in self._processes:
            _stop(process)


def _tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write("go\n")
        process.stdin.flush()
    except OSError:
        raise _died(process) from None


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise _died(process)
    return line


def _answer(process: subprocess.Popen[str]) -> str:
    _tell(process)
    return _line(process)


def _expect(process: subprocess.Popen[str], word: str) -> None:
    if (line := _line(process)) != word:
        raise KsmError(f"a worker said {line!r} instead of {word!r}")


def _died(process: subprocess.Popen[str]) -> KsmError:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    return KsmError(f"worker {process.pid} ended early, with exit code {process.returncode}")


def _stop(process: subprocess.Popen[str], seconds: float = 10.0) -> None:
    """SIGSTOP, and wait until it has stopped."""
    process.send_signal(signal.SIGSTOP)
    stat = Path(f"/proc/{process.pid}/stat")
    deadline = time.monotonic() + seconds
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "Tt":
        if time.monotonic() > deadline:
            raise KsmError(f"worker {process.pid} did not stop")
        time.sleep(0.001)

"""A grid of tunables over the same memory, simulated in parallel processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ksm.errors import KsmError
from ksm.estimate import Source, Zeros, snapshots
from ksm.machine import Machine
from ksm.simulation import Simulation, Tunables, put_tunables, simulate
from ksm.sources import Snapshot
from ksm.threads import usable_cpus
from ksm.trace import Trace

_SIZE = struct.Struct("=Q")
_WORK = "import sys; sys.path[:1] = filter(None, sys.path[:1]); from ksm.sweep import work; work()"  # not from here
_SAMPLES = 600
_MOST_POINTS = 100_000


@dataclass(frozen=True, slots=True)
class Point:
    """What one choice of tunables came to.

    >>> sweep([b"x" * 8192], {"pages_to_scan": [100]}, seconds=1, every=0.5).points[0].saved_bytes
    4096
    """

    tunables: dict[str, int | bool | str]
    """Those of the grid; the others have the kernel's defaults."""
    seconds_to_90: float | None
    """When 90 % of the settled saving was there, of a trace of what memory would have settled at then. None: never."""
    saved_bytes: int
    """At the end."""
    mean_saved_bytes: float
    """Over the whole time."""
    settled_bytes: int
    """What memory would settle at, as it is at the end."""
    general_profit: int
    """At the end."""
    ksmd_cpu_seconds: float
    """By the cost model."""
    ksmd_cpu_share: float
    """Of one CPU, over the whole time."""
    full_scans: int
    pages_scanned: int | None
    pages_volatile: int
    """At the end."""
    cow_ksm: int | None
    """Writes that broke the sharing."""

    @classmethod
    def of(cls, tunables: Tunables, found: Simulation) -> Point:
        """The summary of a simulation.

        >>> Point.of({}, simulate([b"x" * 8192], seconds=1, every=0.5)).full_scans > 1
        True
        """
        last = found.samples[-1]
        return cls(
            dict(tunables),
            found.reached[90],
            last.saved_bytes,
            found.mean_saved_bytes,
            last.settled_bytes,
            last.general_profit,
            last.ksmd_cpu_seconds,
            found.cpu_share,
            last.full_scans,
            last.pages_scanned,
            last.pages_volatile,
            last.cow_ksm,
        )

    def to_dict(self) -> dict[str, Any]:
        """One flat row: the tunables, then the results.

        >>> point = Point.of({"pages_to_scan": 100}, simulate([b"x" * 8192], seconds=1, every=0.5))
        >>> list(point.to_dict())[:2]
        ['pages_to_scan', 'seconds_to_90']
        """
        return self.tunables | {name: getattr(self, name) for name in COLUMNS}


COLUMNS = tuple(name for name in Point.__slots__ if name != "tunables")


@dataclass(frozen=True, slots=True)
class Sweep:
    """All points of a grid, in its order.

    >>> found = sweep([b"x" * 40960], {"pages_to_scan": [1, 100]}, seconds=1, every=0.1)
    >>> found.best().tunables
    {'pages_to_scan': 100}
    """

    points: tuple[Point, ...]
    seconds: float
    kernel: str
    sample_of: int = 1

    def best(self, within: float = 0.05) -> Point:
        """The cheapest in CPU time of those that save nearly as much on average over the time as any, but for `within`.

        >>> sweep([b"x" * 8192], {}, seconds=1, every=0.5).best().tunables
        {}
        """
        most = max(point.mean_saved_bytes for point in self.points)
        near = [point for point in self.points if point.mean_saved_bytes >= (1 - within) * most]
        return min(near, key=lambda point: point.ksmd_cpu_seconds)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON.

        >>> sorted(sweep([b"x" * 8192], {}, seconds=1, every=0.5).to_dict())
        ['kernel', 'points', 'sample_of', 'seconds']
        """
        return {
            "seconds": self.seconds,
            "kernel": self.kernel,
            "sample_of": self.sample_of,
            "points": [point.to_dict() for point in self.points],
        }


def grid(choices: Mapping[str, Sequence[int | bool | str]]) -> list[dict[str, int | bool | str]]:
    """Every combination of the choices; the last tunable changes fastest.

    >>> grid({"pages_to_scan": [100, 200], "smart_scan": [True]})
    [{'pages_to_scan': 100, 'smart_scan': True}, {'pages_to_scan': 200, 'smart_scan': True}]
    """
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def sweep(
    sources: Sequence[Source] | Trace,
    choices: Mapping[str, Sequence[int | bool | str]],
    *,
    seconds: float,
    every: float | None = None,
    kernel: str = "6.18",
    zeros: Zeros = "merge",
    nodes: Sequence[int] | None = None,
    marked_only: bool = False,
    page_size: int | None = None,
    threads: int | None = None,
    jobs: int | None = None,
    reading: Callable[[int, int], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Sweep:
    """Simulate the same memory under every combination of tunables, each in a process of its own.

    Sources are read once. Each process has the fingerprints and a machine in memory, about 100 bytes a page. When the
    calling process ends, whichever way, so do they.

    Args:
        sources: as for `ksm.simulation.simulate`.
        choices: tunable -> the values to try.
        every: seconds between two samples; None: 600 in all. It is looked ten times as often when 90 % are there.
        jobs: processes at a time; None: one a CPU.
        progress: called with (points done, points in all).
        seconds, kernel, zeros, nodes, marked_only, page_size, threads, reading: as for `simulate`.

    Raises:
        ValueError: no value for a tunable, too many combinations, or as `simulate`.
        OSError: a tunable that the kernel would refuse; all are tried before anything is simulated.
        KsmError: a process died.

    >>> found = sweep([b"x" * 40960], {"pages_to_scan": [1, 100]}, seconds=1, every=0.1, jobs=1)
    >>> [point.seconds_to_90 for point in found.points]
    [0.49, 0.03]
    """
    if any(not values for values in choices.values()):
        raise ValueError("a tunable without a value to try")
    points = grid(choices)
    if len(points) > _MOST_POINTS:
        raise ValueError(f"{len(points):,} combinations are too many; {_MOST_POINTS:,} are the most")
    for tunables in points:
        put_tunables(Machine(kernel=kernel), tunables)
    jobs = usable_cpus() if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"{jobs} processes: one or more are needed")
    what = sources if isinstance(sources, Trace) else snapshots(sources, page_size, marked_only, threads, reading)
    every = seconds / _SAMPLES if every is None else every
    options: dict[str, Any] = {"seconds": seconds, "every": every, "kernel": kernel, "zeros": zeros, "nodes": nodes}
    if not isinstance(what, Trace) and what:
        options["page_size"] = what[0].page_size
    with _Crew(min(jobs, len(points))) as crew:
        found = crew.run([(what, tunables, options) for tunables in points], progress)
    return Sweep(tuple(found), seconds, kernel, sources.sample.of if isinstance(sources, Trace) else 1)


# ---- processes ------------------------------------------------------------------------------------------

Job = tuple["Trace | list[Snapshot]", Tunables, "dict[str, Any]"]


class _Crew:
    """Worker processes, one a job. At its end none is left.

    Not multiprocessing: that would run the caller's main module again in each process, and needs one that allows it.
    """

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="ksm-sweep")
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._over = False

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._over = True
            for process in self._running:
                process.kill()
        self._pool.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[Job], progress: Callable[[int, int], object] | None) -> list[Point]:
        futures = [self._pool.submit(self._one, job) for job in jobs]
        left: set[Future[Point]] = set(futures)
        if progress is not None:
            progress(0, len(jobs))
        while left:
            done, left = wait(left, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            if progress is not None:
                progress(len(jobs) - len(left), len(jobs))
        return [future.result() for future in futures]

    def _one(self, job: Job) -> Point:
        with self._started() as (process, requests, answers):
            try:
                data = pickle.dumps(job)
                requests.write(_SIZE.pack(len(data)))
                requests.write(data)
                requests.flush()
                answer = answers.read()
            except BrokenPipeError:
                answer = b""
            process.wait()
        if process.returncode or not answer:
            raise KsmError(f"a process of the sweep died (exit code {process.returncode}); was there enough memory?")
        found = pickle.loads(answer)
        if isinstance(found, Exception):
            raise found
        point: Point = found
        return point

    @contextlib.contextmanager
    def _started(self) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]]:
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._lock:
            if self._over:
                raise KsmError("the sweep was ended")
            process = subprocess.Popen(
                [sys.executable, "-c", _WORK],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is for us; we end them
            )
            self._running.add(process)
        assert process.stdin is not None and process.stdout is not None
        try:
            yield process, process.stdin, process.stdout
        finally:
            with self._lock:
                self._running.discard(process)
                process.kill()
            process.wait()
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.stdout.close()


def work() -> None:
    """The whole life of a worker: one job from stdin, its answer to stdout; it ends with the process that asked.

    >>> callable(work)
    True
    """
    requests = sys.stdin.buffer
    (size,) = _SIZE.unpack(requests.read(_SIZE.size))
    what, tunables, options = pickle.loads(requests.read(size))
    threading.Thread(target=_watch_parent, args=(requests,), daemon=True).start()
    answer: Point | Exception
    try:
        answer = Point.of(tunables, simulate(what, tunables=tunables, **options))
    except Exception as error:
        answer = error
    sys.stdout.buffer.write(pickle.dumps(answer))
    sys.stdout.buffer.flush()
    os._exit(0)  # the thread still reads


def _watch_parent(requests: IO[bytes]) -> None:
    requests.read(1)
    os._exit(1)

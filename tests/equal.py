"""One fleet analysed in every way there is: in one process, on a local cluster, on three hosts, with faults."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksm.fleet import Analysis, analyze, contents, local
from tests.fleets import Cells, connect_when_up, fleet, namespaces, wait_for_workers

BAD, TWICE = 3, 0  # the VM whose file is damaged, and the one whose file is there twice
RANGES = 24


@dataclass(frozen=True)
class Run:
    """One way, and what came of it."""

    how: str
    answer: Analysis
    expected: Analysis
    """What one process finds in the files that count."""
    note: str = ""

    @property
    def equal(self) -> bool:
        return figures(self.answer) == figures(self.expected)

    @property
    def flagged(self) -> str:
        said = [
            f"{Path(one.path).name} {'left out' if one.partial else 'dropped'}: {_short(one.why)}"
            for one in self.answer.left_out
        ]
        return "; ".join([*([self.note] if self.note else []), *said, *([] if self.answer.complete else ["partial"])])


def _short(why: str) -> str:
    """Without directories, and without what pyarrow says beyond the first clause."""
    return " ".join(Path(word).name if "/" in word else word for word in why.split(",")[0].split())


def figures(answer: Analysis) -> str:
    """All that was found: of every host, VM, class and content; not how the work was cut and what was left out."""
    found = answer.to_dict()
    for name in ("ranges", "ranges_counted", "left_out", "complete"):
        del found[name]
    return json.dumps(found, sort_keys=True)


def digest(answer: Analysis) -> str:
    """A short name for all figures: where it is the same, they are."""
    return hashlib.sha256(figures(answer).encode()).hexdigest()[:12]


@contextlib.contextmanager
def three_hosts(directory: Path, files: Sequence[Path]) -> Iterator[tuple[Any, Path, list[Path], list[Any]]]:
    """A scheduler and two workers on each of three hosts, which are network namespaces with disks of their own.

    Gives the client, the path at which each host sees its own disk, the three disks, and the workers' processes.
    """
    seen = directory / "seen"
    seen.mkdir(parents=True)
    cells = Cells(directory)
    with namespaces(["ha", "hb", "hc"]) as spaces:
        try:
            names = list(spaces)
            address = f"tcp://{spaces[names[0]]}:8786"
            cells.scheduler(spaces[names[0]], 8786, inside=("ip", "netns", "exec", names[0]))
            workers: list[subprocess.Popen[bytes]] = []
            disks = [directory / f"disk{index}" for index in range(3)]
            for index, (name, disk) in enumerate(zip(names, disks, strict=True)):
                disk.mkdir()
                for path in files[index::3]:
                    shutil.copy(path, disk)
                # `ip netns exec` also makes a mount namespace: each host has a disk of its own at the same path
                mounted = f'mount --bind "{disk}" "{seen}" && exec "$@"'
                inside = ("ip", "netns", "exec", name, "sh", "-c", mounted, "sh")
                workers += [cells.worker(address, "--host", spaces[name], inside=inside) for _ in range(2)]
            with connect_when_up(address) as client:
                wait_for_workers(client, 6)
                yield client, seen, disks, workers
        finally:
            cells.end()


def runs(directory: Path, vms: int = 6, scale: int = 1) -> Iterator[Run]:
    """The fleet in every way; needs root, for the hosts. `scale` times 300 pages and more a VM."""
    everything = directory / "all"
    fleet(everything, vms=vms, scale=scale)
    files = [everything / f"vm{index}.pages.parquet" for index in range(vms)]
    expected = analyze(everything, ranges=1)
    fewer = analyze([path for index, path in enumerate(files) if index != BAD], ranges=1)
    yield Run("one process", expected, expected)
    yield Run(f"one process, {RANGES} ranges", analyze(everything, ranges=RANGES), expected)
    with local(2) as client:
        yield Run("local cluster", analyze(everything, client=client), expected)
        frame, about = contents(everything)
        yield Run("local cluster, Dask DataFrame", analyze(frame, vms=about, client=client), expected)
    with three_hosts(directory, files) as (client, seen, disks, workers):

        def again(progress: Callable[[int, int], object] | None = None) -> Analysis:
            return analyze(seen, client=client, ranges=RANGES, progress=progress)

        yield Run("three hosts", again(), expected)
        said = []

        def kill(done: int, of: int) -> None:
            if done == of // 2:
                workers[2].kill()
                workers[2].wait()
                said.append(f"killed after {done} of {of} ranges")

        answer = again(kill)
        yield Run("three hosts, a worker killed", answer, expected, " ".join(said))
        shutil.copy(files[TWICE], disks[1] / "again.pages.parquet")
        yield Run("three hosts, a file twice", again(), expected)
        (disks[1] / "again.pages.parquet").unlink()
        damaged = disks[BAD % 3] / files[BAD].name
        damage(damaged)
        yield Run("three hosts, a file damaged", again(), fewer)
        shutil.copy(files[TWICE], disks[1] / "again.pages.parquet")
        yield Run("three hosts, both", again(), fewer)


def damage(path: Path) -> None:
    """Some bytes of its contents overwritten: its metadata is whole, and says nothing of it."""
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 32] = bytes(32)
    path.write_bytes(data)

"""What the tests of the fleet share: small fleets on disk, and cells of a network."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import ksm
from ksm.errors import SchedulerLostError, UnsupportedError
from ksm.fleet import Vm, connect, fingerprint_vm

PAGE = 4096


def pages(seed: int, vms: int = 6, common: int = 120, own: int = 60) -> list[npt.NDArray[np.uint8]]:
    """Guests of two kinds that have pages of all, of their kind, their own, zeros and fills."""
    random = np.random.default_rng(seed)
    everyone = random.integers(0, 256, (common, PAGE), dtype=np.uint8)
    kinds = random.integers(0, 256, (2, common, PAGE), dtype=np.uint8)
    result = []
    for index in range(vms):
        mine = random.integers(0, 256, (own, PAGE), dtype=np.uint8)
        parts = [
            everyone[random.random(common) < 0.9],
            kinds[index % 2][random.random(common) < 0.7],
            mine,
            mine[: own // 3],
        ]
        image = np.concatenate(
            [*parts, np.zeros((random.integers(20, 50), PAGE), np.uint8), np.full((5, PAGE), 0xAA, np.uint8)]
        )
        result.append(image[random.permutation(len(image))])
    return result


def fleet(
    directory: Path, seed: int = 1, vms: int = 6, per_host: int = 2, scale: int = 1, **options: Any
) -> list[npt.NDArray[np.uint8]]:
    """The files of such guests; "vm3" is of class "k1" and stands on "h1" when two share a host."""
    images = pages(seed, vms, 120 * scale, 60 * scale)
    for index, image in enumerate(images):
        vm = Vm(name=f"vm{index}", kind=f"k{index % 2}", host=f"h{index // per_host}", node=index % 2)
        fingerprint_vm(image, directory, vm, threads=1, **options)
    return images


# ---- a cluster of its own processes -----------------------------------------------------------------

SCHEDULER = "from distributed.cli.dask_scheduler import main; main()"
WORKER = "from distributed.cli.dask_worker import main; main()"


def environment(search: str = "") -> dict[str, str]:
    """For processes that shall see this ksm; `search` comes first on their path."""
    path = [str(Path(ksm.__file__).parents[1]), str(Path(__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([search, *path] if search else path)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cells:
    """A scheduler and workers as separate processes, each in the network namespace that it is started in; all end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(
        self, script: str, *arguments: str, inside: tuple[str, ...] = (), search: str = ""
    ) -> subprocess.Popen[bytes]:
        log = (self.directory / f"log-{len(self.processes)}").open("wb")
        with log:
            process = subprocess.Popen(
                [*inside, sys.executable, "-c", script, *arguments],
                cwd=self.directory,
                env=environment(search),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def scheduler(self, host: str, port: int, *more: str, inside: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        return self.start(
            SCHEDULER, "--host", host, "--port", str(port), "--dashboard-address", ":0", *more, inside=inside
        )

    def worker(
        self, address: str, *more: str, inside: tuple[str, ...] = (), search: str = ""
    ) -> subprocess.Popen[bytes]:
        arguments = ("--nworkers", "1", "--nthreads", "1", "--no-dashboard", "--no-nanny", "--local-directory")
        return self.start(WORKER, address, *arguments, str(self.directory), *more, inside=inside, search=search)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def wait_for_workers(client: Any, number: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while len(client.scheduler_info(n_workers=-1)["workers"]) < number:
        assert time.monotonic() < deadline, "the workers did not come up"
        time.sleep(0.1)


class connect_when_up:
    """`connect`, as soon as the scheduler and a worker answer."""

    def __init__(self, address: str, tls: Any = None, seconds: float = 60) -> None:
        self.arguments = (address, tls)
        self.deadline = time.monotonic() + seconds

    def __enter__(self) -> Any:
        while True:
            self.inner = connect(*self.arguments, seconds=1)
            try:
                return self.inner.__enter__()
            except (SchedulerLostError, UnsupportedError):
                if time.monotonic() > self.deadline:
                    raise
                time.sleep(0.1)

    def __exit__(self, *error: Any) -> Any:
        return self.inner.__exit__(*error)


@contextlib.contextmanager
def namespaces(names: list[str]) -> Iterator[dict[str, str]]:
    """Network namespaces on one bridge, gone afterwards; the address of each. They reach only each other."""
    unique = f"{os.getpid() % 100000}"
    bridge = f"kb{unique}"
    made: list[str] = []

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", "10.213.77.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        addresses = {}
        for index, name in enumerate(names):
            space = f"{name}-{unique}"
            ip("netns", "add", space)
            made.append(space)
            ip("link", "add", f"kv{index}{unique}", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", f"kv{index}{unique}", "master", bridge, "up")
            address = f"10.213.77.{index + 2}"
            ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
            addresses[space] = address
        yield addresses
    finally:
        for space in made:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)


def can_make_namespaces() -> str:
    """Why not; "": they can be made."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are of Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    done = subprocess.run(["ip", "netns", "add", f"probe-{os.getpid()}"], capture_output=True, check=False)
    if done.returncode:
        return f"no network namespace can be made: {done.stderr.decode().strip()}"
    subprocess.run(["ip", "netns", "del", f"probe-{os.getpid()}"], check=False)
    return ""

"""Many real VMs and processes to draw samples from: their fingerprints are kept in a directory, to be drawn again.

Guests are Debian's kernel in QEMU, emulated, out of the host's KSM, with two kinds of work (`bench.guest_work`), no two
alike. Processes are those of `bench.workers`, of three kinds, whose anonymous memory is read.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import ksm
from bench import guest_work, workers
from ksm.pages import PAGE_SIZE
from ksm.sources import Snapshot

MEBIBYTES = 256
HERE = Path(__file__).parents[1]
AT_ONCE = 2
Population = list[list[Snapshot]]  # by kind


def kept(
    directory: Path, kinds: Sequence[str], each: int, read: Callable[[str, int], Snapshot], at_once: int = AT_ONCE
) -> Population:
    """So many of each kind; those that are not in the directory are read first, some at once."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {(kind, seed): directory / f"{kind}-{seed:03}.npz" for seed in range(each) for kind in kinds}

    def take(who: tuple[str, int]) -> None:
        if not files[who].exists():
            np.savez(files[who], words=read(*who).words())
            print(files[who], file=sys.stderr, flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(take, files))
    found: Population = [[] for _ in kinds]
    for (kind, _), file in files.items():
        with np.load(file) as arrays:
            prints = ksm.Fingerprints(arrays["words"])
        found[kinds.index(kind)].append(Snapshot(file.stem, PAGE_SIZE, True, True, ((0, prints),)))
    return found


def guests(directory: Path, each: int) -> Population:
    """So many guests of each kind, booted if need be, when their work is done."""
    with tempfile.TemporaryDirectory(prefix="ksm-bench-") as place:
        archive: list[bytes] = []

        def read(kind: str, seed: int) -> Snapshot:
            return _boot(kind, seed, Path(place), archive[0])

        if any(not (directory / f"{kind}-{each - 1:03}.npz").exists() for kind in guest_work.KINDS):
            archive.append(_archive(Path(place)))
        return kept(directory, guest_work.KINDS, each, read)


def processes(directory: Path, each: int) -> Population:
    """So many processes of each kind of `bench.workers`, when their work is done."""
    return kept(directory, workers.KINDS, each, _work)


def _boot(kind: str, seed: int, place: Path, base: bytes) -> Snapshot:
    from tests.frozen import Guest, cpio  # which fetches Debian's packages

    with tempfile.TemporaryDirectory(dir=place) as directory:
        initramfs = base + cpio({"guest": f"{kind} {seed}".encode()})  # the kernel takes archives one after the other
        Path(directory, "initramfs").write_bytes(initramfs)
        with Guest(f"bench-{kind}-{seed}", Path(directory), memory=MEBIBYTES, huge=False) as guest:
            guest.wait_until_ready()
            guest.freeze()
            with ksm.open(f"qemu-ram:{guest.name}") as image:
                return Snapshot.take(image)


def _archive(place: Path) -> bytes:
    """The initramfs that all guests have: busybox, this Python, and their work."""
    from tests.kernel.boot import Tree

    root = place / "root"
    root.mkdir()
    tree = Tree(root)
    tree.archive(place / "base", tree.add_python("bench.guest_work", HERE))
    return (place / "base").read_bytes()


def _work(kind: str, seed: int) -> Snapshot:
    command = [sys.executable, str(Path(workers.__file__)), kind, str(seed)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline().startswith(b"ready"):
                raise RuntimeError(f"a {kind} worker ended early")
            with ksm.open(f"pid:{process.pid}") as image:
                return Snapshot.take(image, threads=1)
        finally:
            process.kill()

"""The kernel's own ksmd on the pages that we measure with, stepped pass by pass; and ours, for the same counters."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import ksm
from bench.memory import Pages
from ksm.errors import KsmError
from ksm.linux import Host

# Both sides' tunables: the kernel's defaults, but chains are not pruned, because when hangs on the wall clock.
TUNABLES: Mapping[str, int] = {
    "max_page_sharing": 256,
    "use_zero_pages": 0,
    "merge_across_nodes": 1,
    "smart_scan": 1,
    "stable_node_chains_prune_millisecs": 100_000_000,
}
COUNTERS = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "stable_node_chains")
PASSES = 3  # the first hashes, the second merges, the third finds nothing new
_LOCK_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Passes:
    """ksmd's CPU seconds of each pass, and the counters after it."""

    seconds: tuple[float, ...]
    counters: tuple[dict[str, int], ...]


def why_not(host: Host | None = None) -> str | None:
    """Why the kernel cannot be measured here, or None."""
    host = host or Host()
    try:
        host.ksm.read("run")
        host.ksmd_cpu_seconds()
    except KsmError as error:
        return str(error)
    if os.geteuid() != 0 or not os.access(host.root / "run", os.W_OK):
        return "driving ksmd needs root"
    return None


def kernel_passes(pages: Pages, host: Host | None = None) -> Passes | str:
    """Let ksmd make its passes over memory of this process, then give every page its own copy again.

    A text says why it was not done. Pages must not share their huge pages with others: `filled(small=True)`.
    """
    host = host or Host()
    with host.lock(_LOCK_SECONDS):
        others = [process.name for process in host.processes(skip_unreadable=True)]
        if others:
            return f"KSM is in use here, by {', '.join(others[:3])}"
        with host.single_step(unmerge=True) as ksmd:
            names = host.ksm.names()
            host.ksm.write("run", "2")
            host.ksm.write("run", "0")
            for name, value in TUNABLES.items():
                if name in names:
                    host.ksm.write(name, str(value))
            ksm.linux.madvise(pages, ksm.MADV_MERGEABLE)
            try:
                seconds, counters = [], []
                for _ in range(PASSES):
                    before = host.ksmd_cpu_seconds()
                    ksmd.scan()
                    seconds.append(host.ksmd_cpu_seconds() - before)
                    counters.append({name: int(host.ksm.read(name)) for name in COUNTERS})
            finally:
                ksm.linux.madvise(pages, ksm.MADV_UNMERGEABLE)
        return Passes(tuple(seconds), tuple(counters))


def machine(pages: Pages | ksm.Fingerprints, index: str = "hash") -> ksm.Machine:
    """A simulated machine with one process that has these pages, all mergeable, ready to scan."""
    found = ksm.Machine(kernel=os.uname().release if sys.platform == "linux" else "6.18", index=index)
    for name, value in TUNABLES.items():
        if name in found.ksm.names():
            found.ksm.write(name, str(value))
    process = found.spawn()
    process.madvise(process.mmap(pages), len(pages) * found.page_size, ksm.MADV_MERGEABLE)
    found.ksm.run = 1
    return found


def counters(found: ksm.Machine) -> dict[str, int]:
    """What is compared with the kernel's."""
    return {name: int(found.ksm.read(name)) for name in COUNTERS}

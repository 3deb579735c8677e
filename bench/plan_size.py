"""The time and memory that a plan takes, by the number and size of its samples.

    python -m bench.plan_size [--images 20] [--mebibytes 1024]

The samples are in memory, 60 % of each in all of them, 35 % its own, 5 % zero, so that the time is that of hashing and
planning, and not a disk's. Memory is the peak beyond what the samples take.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

import ksm
from ksm.estimate import snapshots
from ksm.pages import PAGE_SIZE
from ksm.sources import ArrayImage
from ksm.sources.image import Block

Bytes = npt.NDArray[np.uint8]
SHIFT = 16  # bytes by which one image's own part begins later than another's


class Sample(ArrayImage):
    """An image of parts that others have, too, and of one that is its own: the same bytes, but from another one on."""

    def __init__(self, number: int, common: Bytes, own: Bytes, zeros: Bytes) -> None:
        pages = len(own) // PAGE_SIZE - 1
        mine = own[number * SHIFT :][: pages * PAGE_SIZE].reshape(-1, PAGE_SIZE)
        super().__init__(mine, f"vm{number}")
        self._parts = (common.reshape(-1, PAGE_SIZE), mine, zeros.reshape(-1, PAGE_SIZE))
        self.npages = sum(map(len, self._parts))

    def blocks(self) -> Iterator[Block]:
        """Its parts."""
        at = 0
        for part in self._parts:
            yield at, part, None
            at += part.nbytes


def peak() -> float:
    """MiB that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Plan, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--mebibytes", type=int, default=1024)
    how = parser.parse_args()
    pages = how.mebibytes * (1 << 20) // PAGE_SIZE
    random = np.random.default_rng(0)
    common = random.integers(0, 256, int(pages * 0.6) * PAGE_SIZE, dtype=np.uint8)
    own = random.integers(0, 256, (int(pages * 0.35) + 1) * PAGE_SIZE, dtype=np.uint8)
    images = [Sample(n, common, own, np.zeros(int(pages * 0.05) * PAGE_SIZE, np.uint8)) for n in range(how.images)]
    before, began, worked = peak(), time.perf_counter(), time.process_time()
    taken = snapshots(images)
    hashed = time.perf_counter()
    host = ksm.HostSpec(ram=how.images * 8 * how.mebibytes << 20, nodes=2)
    answer = ksm.plan(ksm.VMClass("vm", taken), host)
    ended = time.perf_counter()
    print(f"{how.images} images of {how.mebibytes} MiB, {sum(each.pages for each in taken):,} pages")
    print(f"hashing   {hashed - began:7.1f} s")
    print(f"planning  {ended - hashed:7.1f} s, its simulation included")
    print(f"CPU       {time.process_time() - worked:7.1f} s")
    print(f"memory    {peak() - before:7.0f} MiB at the most")
    print(f"answer    {answer.fits} VMs")


if __name__ == "__main__":
    main()

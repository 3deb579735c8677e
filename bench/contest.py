"""What the same pages cost each contestant, ksm, the kernel and what a user would pick instead, as the work grows."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ksm
from bench.kernel import machine, passes
from bench.peers import FROM_KEYS, FROM_PAGES, Peer, duperemove
from bench.reader import read
from bench.timing import timed
from ksm.patterns import Pages, filled


@dataclass(frozen=True, slots=True)
class Cost:
    """What one contestant took for so many pages; without seconds, why it did not run."""

    section: str
    """"pages": from the page bytes; "keys": the index alone, from 64-bit keys."""
    name: str
    pages: int
    seconds: float | None
    why_not: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


def contest(sizes: Sequence[int], rounds: int) -> list[Cost]:
    """Every contestant on every size, medians; all of them must count as many different contents."""
    result: list[Cost] = []
    for n in sizes:
        pages = filled("guest", n)
        result += _others(pages, rounds)
        prints = ksm.fingerprint(pages)
        result += _peers("pages", FROM_PAGES, pages, len(prints.unique()[0]), rounds)
        keys = prints.words[:, 1].copy()
        del pages
        result += _peers("keys", FROM_KEYS, keys, len(prints.unique()[0]), rounds)
    return result


def _peers(section: str, peers: Sequence[Peer], given: Any, contents: int, rounds: int) -> list[Cost]:
    result = []
    for peer in peers:
        reason = peer.missing or (f"not tried beyond {peer.most:,} pages" if len(given) > peer.most else None)
        took: list[float] = []
        found: list[int] = []
        while reason is None and len(took) < rounds and sum(took) < 20:
            took.append(timed(lambda count=peer.count, found=found: found.append(count(given))))
            if found[-1] != contents:
                reason = f"it counts {found[-1]:,} contents, and there are {contents:,}"
        result.append(Cost(section, peer.name, len(given), None if reason else statistics.median(took), reason))
    return result


def _others(pages: Pages, rounds: int) -> list[Cost]:
    """Plain reading, the exact simulation, the kernel, and duperemove, which reads a file."""
    n = len(pages)

    def simulate() -> None:
        found = machine(pages)
        found.ksmd.scan()
        found.ksmd.scan()

    def median(run: Any) -> float:
        return statistics.median(timed(run) for _ in range(rounds))

    result = [
        Cost("pages", "plain reading, 1 thread", n, median(lambda: read(pages))),
        Cost("pages", "ksm, exact simulation", n, median(simulate)),
    ]
    found = passes(pages)
    seconds = None if isinstance(found, str) else sum(found.seconds[:2])
    result.append(Cost("pages", "the kernel's ksmd", n, seconds, found if isinstance(found, str) else None))
    return [*result, _duperemove(pages)]


def _duperemove(pages: Pages) -> Cost:
    peer = Peer("duperemove", duperemove, "/duperemove", most=1 << 18)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "guest.raw")
        if peer.missing is None and len(pages) <= peer.most:
            with file.open("wb") as out:
                pages.tofile(out)
                os.fsync(out.fileno())  # duperemove reads the extents, which are not there before
        contents = len(ksm.fingerprint(pages).unique()[0])
        reason = peer.missing or (f"not tried beyond {peer.most:,} pages" if len(pages) > peer.most else None)
        found: list[int] = []
        seconds = timed(lambda: found.append(duperemove(file))) if reason is None else None
        if found and found[0] != contents:
            reason = f"it counts {found[0]:,} contents, and there are {contents:,}"
    return Cost("pages", peer.name, len(pages), None if reason else seconds, reason)

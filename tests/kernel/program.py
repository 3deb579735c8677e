"""Programs: seeded random lists of operations that any executor (kernel, engine, model) can apply."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tests.kernel.host import PAGE
from tests.kernel.real import COUNTERS

ARENA = 0x100000000000
HUGE = 512  # pages of a huge page
MERGEABLE, UNMERGEABLE, DONTNEED, FREE, PAGEOUT, HUGEPAGE, NOHUGEPAGE = 12, 13, 4, 8, 21, 14, 15
SET_MEMORY_MERGE, GET_MEMORY_MERGE = 67, 68

Op = list[Any]
Program = dict[str, Any]


def content(number: int) -> bytes:
    """Page bytes by number: 0 is all zero; below 64 odd ones differ in the last byte, even ones in the first."""
    data = bytearray(PAGE)
    if number >= 64:
        data[PAGE // 2] = number
    elif number % 2:
        data[-1] = number
    elif number:
        data[0] = number
    return bytes(data)


@dataclass(frozen=True)
class Style:
    """What the programs of one kind are made of."""

    often: dict[str, int] = field(default_factory=dict)
    """How often each kind of step comes, where it differs from `USUALLY`."""
    contents: tuple[int, ...] = (2, 3, 5, 8)
    sharing: tuple[int, ...] = (2, 2, 3, 4, 256)
    zero_pages: float = 0.4
    smart: float = 0.5
    pages: int = 48
    processes: int = 4


USUALLY = {
    "spawn": 3, "fill": 8, "write": 12, "poke": 3, "exchange": 2, "read": 3, "mark": 5, "unmark": 3, "dontneed": 3,
    "free": 1, "munmap": 3, "mmap": 4, "mprotect": 2, "mremap": 4, "fork": 3, "exit": 2, "prctl": 3, "sysfs": 3,
    "stop": 1, "scan": 18, "part": 14, "bad": 2, "pageout": 1, "reclaim": 1, "huge": 0,
}  # fmt: skip
QUIET = {
    "mprotect": 0, "mremap": 0, "prctl": 0, "stop": 0, "bad": 0, "sysfs": 1, "munmap": 1, "mmap": 1, "pageout": 0,
    "reclaim": 0, "free": 0, "fork": 1, "exit": 1, "spawn": 1,
}  # fmt: skip
STYLES = {
    "mixed": Style(),
    "trees": Style({**QUIET, "write": 20, "poke": 10, "exchange": 8, "mark": 2, "unmark": 2, "dontneed": 4, "part": 20},
                   contents=(16, 30, 60, 120), smart=0.2),
    "chains": Style({**QUIET, "write": 16, "dontneed": 5, "fork": 4, "exit": 4, "spawn": 4, "unmark": 4, "sysfs": 3},
                    contents=(1, 2, 3), sharing=(2, 2, 2, 3), smart=0.2),
    "families": Style({**QUIET, "fork": 10, "exit": 8, "prctl": 5, "stop": 2, "free": 2}),
    "ranges": Style({"mmap": 10, "munmap": 8, "mremap": 16, "mprotect": 8, "mark": 8, "unmark": 8, "prctl": 8, "bad": 6,
                     "fork": 5, "scan": 10, "part": 10}, pages=24),
    "zeros": Style({**QUIET, "read": 8, "free": 4, "prctl": 3, "mremap": 4, "fork": 4},
                   contents=(2, 3), zero_pages=0.9),
    "pressure": Style({"pageout": 12, "reclaim": 6, "free": 6, "read": 10, "fork": 5}),
}  # fmt: skip
NUMA_STYLE = Style(
    {**QUIET, "migrate": 14, "write": 16, "dontneed": 5, "fork": 4, "exit": 3, "spawn": 4, "sysfs": 2},
    contents=(1, 2, 3, 5),
    sharing=(2, 2, 3, 4, 256),
    zero_pages=0.2,
    pages=24,
)
HUGE_STYLE = Style({"huge": 8, "fill": 4, "mprotect": 2, "mremap": 2}, pages=3 * HUGE + 40, processes=3)


def generate(seed: int, nops: int = 60, swap: bool = False, style: str | None = None, nodes: int = 1) -> Program:
    """A program from a seed; without a style, each seed has its own. With several NUMA nodes half are about them."""
    rng = random.Random(f"ksm program {seed} {swap} {style}" + f" {nodes} nodes" * (nodes > 1))
    name = style or rng.choice([*STYLES, *["numa"] * len(STYLES)] if nodes > 1 else list(STYLES))
    writer = Writer(rng, {**STYLES, "huge": HUGE_STYLE, "numa": NUMA_STYLE}[name], nodes)
    writer.settings()
    while len(writer.ops) < nops:
        writer.step()
    more = {"nodes": nodes} if nodes > 1 else {}
    return {"seed": seed, "style": name, "swap": swap, **more, "ops": writer.ops}


class Writer:
    """Writes one program, an operation or a few at a time."""

    def __init__(self, rng: random.Random, style: Style, nodes: int = 1) -> None:
        self.rng = rng
        self.style = style
        self.nodes = nodes
        self.ops: list[Op] = []
        self.names: list[str] = []
        self.born = 0
        self.contents = rng.choice(style.contents)
        self.often = {**USUALLY, "migrate": 3 if nodes > 1 else 0, **style.often}
        if self.often["reclaim"]:
            # What reclaim does to a freed page that a fork shares hangs on the order of the processes' VMAs.
            self.often[rng.choice(["free", "fork"])] = 0

    def settings(self) -> None:
        rng = self.rng
        self.sysfs_write("run", "1")
        self.sysfs_write("max_page_sharing", rng.choice(self.style.sharing))
        if rng.random() < self.style.zero_pages:
            self.sysfs_write("use_zero_pages", 1)
        if rng.random() > self.style.smart:
            self.sysfs_write("smart_scan", 0)
        if rng.random() < 0.5:
            self.sysfs_write("stable_node_chains_prune_millisecs", 0)
        if self.nodes > 1 and rng.random() < 0.8:
            self.sysfs_write("merge_across_nodes", 0)
        self.spawn()
        self.fill()

    def step(self) -> None:
        kind = self.rng.choices(list(self.often), list(self.often.values()))[0]
        if kind in ("spawn", "scan", "part", "sysfs", "reclaim") or self.names:
            getattr(self, kind)()

    # ---- what operations are about -----------------------------------------------------------------

    def where(self, longest: int = 12) -> tuple[int, int]:
        pages = self.style.pages
        if pages >= HUGE and self.rng.random() < 0.7:
            start = self.rng.choice([0, HUGE, 2 * HUGE]) + self.rng.choice([0, 0, 0, 1, 7, HUGE - 3])
            return start, min(self.rng.choice([1, 3, 8, HUGE, HUGE, 2 * HUGE]), pages - start)
        start = self.rng.randrange(pages)
        return start, min(self.rng.randint(1, longest), pages - start)

    def page(self) -> int:
        return self.where()[0]

    def some(self) -> str:
        return self.rng.choice(self.names)

    def number(self) -> int:
        return self.rng.randrange(self.contents)

    def newborn(self) -> str | None:
        """A new process's name, unless there are enough."""
        if len(self.names) >= self.style.processes:
            return None
        self.names.append(f"p{self.born}")
        self.born += 1
        return self.names[-1]

    # ---- processes -----------------------------------------------------------------------------------

    def spawn(self) -> None:
        name = self.newborn()
        if name is None:
            return
        self.ops.append(["spawn", name])
        start, n = self.rng.randrange(8), self.rng.randint(8, 32)
        if self.style.pages >= HUGE:
            start, n = self.rng.choice([0, 0, 3]), self.rng.choice([HUGE, HUGE + 5, 2 * HUGE, 3 * HUGE])
        self.map(name, start, n, 3)
        if self.style.pages >= HUGE and self.rng.random() < 0.9:
            self.ops.append(["madvise", name, start, n, HUGEPAGE])
        if self.rng.random() < 0.2:
            self.ops.append(["prctl", name, SET_MEMORY_MERGE, 1])
        elif self.rng.random() < 0.9:
            self.ops.append(["madvise", name, start, n, MERGEABLE])

    def fork(self) -> None:
        parent = self.some()
        name = self.newborn()
        if name:
            self.ops.append(["fork", parent, name])

    def exit(self) -> None:
        if len(self.names) > 1:
            self.ops.append(["exit", self.names.pop(self.rng.randrange(len(self.names)))])

    def prctl(self) -> None:
        arguments = self.rng.choice([
            [SET_MEMORY_MERGE, 1], [SET_MEMORY_MERGE, 1], [SET_MEMORY_MERGE, 0], [SET_MEMORY_MERGE, 0],
            [SET_MEMORY_MERGE, 7], [GET_MEMORY_MERGE], [GET_MEMORY_MERGE, 1], [SET_MEMORY_MERGE, 1, 1],
        ])  # fmt: skip
        self.ops.append(["prctl", self.some(), *arguments])

    def map(self, name: str, start: int, n: int, prot: int) -> None:
        """With several NUMA nodes, on one of them."""
        node = [self.rng.randrange(self.nodes)] if self.nodes > 1 else []
        self.ops.append(["mmap", name, start, n, prot, *node])

    def migrate(self) -> None:
        self.ops.append(["migrate", self.some(), *self.where(), self.rng.randrange(self.nodes)])

    # ---- memory --------------------------------------------------------------------------------------

    def fill(self) -> None:
        start, n = self.where(24)
        self.ops.append(["fill", self.some(), start, [self.number() for _ in range(min(n, 24))]])

    def write(self) -> None:
        self.ops.append(["write", self.some(), self.page(), self.number()])
        if self.rng.random() < 0.1:
            self.ops[-1].append(self.rng.choice([1, 2048, 4095]))  # reaches into the next page

    def poke(self) -> None:
        self.ops.append(["poke", self.some(), self.page(), self.rng.choice([0, 1, 2048, 4095]), self.rng.randrange(4)])

    def exchange(self) -> None:
        """Two pages take each other's place in the order of contents."""
        name, numbers = self.some(), (self.number(), self.number())
        for page in (self.page(), self.page()):
            self.ops.append(["write", name, page, numbers[0]])
            numbers = numbers[::-1]

    def read(self) -> None:
        self.ops.append(["read", self.some(), self.page()])

    def advise(self, advice: int) -> None:
        self.ops.append(["madvise", self.some(), *self.where(), advice])

    def mark(self) -> None:
        self.advise(MERGEABLE)

    def unmark(self) -> None:
        self.advise(UNMERGEABLE)

    def dontneed(self) -> None:
        self.advise(DONTNEED)

    def free(self) -> None:
        self.advise(FREE)

    def pageout(self) -> None:
        self.advise(PAGEOUT)

    def huge(self) -> None:
        self.advise(self.rng.choice([HUGEPAGE, HUGEPAGE, HUGEPAGE, NOHUGEPAGE]))

    def reclaim(self) -> None:
        self.ops.append(["reclaim"])

    def munmap(self) -> None:
        self.ops.append(["munmap", self.some(), *self.where()])

    def mmap(self) -> None:
        name = self.some()
        start, n = self.where()
        self.map(name, start, n, self.rng.choice([3, 3, 3, 3, 1, 0]))
        if self.often["huge"] and self.rng.random() < 0.7:
            self.ops.append(["madvise", name, start, n, HUGEPAGE])
        if self.rng.random() < 0.7:
            self.ops.append(["madvise", name, start, n, MERGEABLE])

    def mprotect(self) -> None:
        self.ops.append(["mprotect", self.some(), *self.where(), self.rng.choice([0, 1, 3, 3])])

    def mremap(self) -> None:
        start, old = self.where(6)
        new = self.rng.choice([old, old, self.rng.randint(1, 8)])
        flags = self.rng.choice([0, 3, 3, 3, 7, 2])
        self.ops.append(["mremap", self.some(), start, old, new, flags, self.page()])

    def bad(self) -> None:
        start, n = self.where()
        self.ops.append(
            self.rng.choice([
                ["madvise", self.some(), start, n, 9999],
                ["madvise", self.some(), start, n, MERGEABLE, 17],
                ["madvise", self.some(), start, 0, MERGEABLE],
                ["munmap", self.some(), start, 0],
                ["mprotect", self.some(), start, 0, 1],
            ])
        )  # fmt: skip

    # ---- ksmd ------------------------------------------------------------------------------------------

    def sysfs_write(self, name: str, value: int | str) -> None:
        self.ops.append(["sysfs", name, str(value)])

    def sysfs(self) -> None:
        name, values = self.rng.choice([
            ("max_page_sharing", ["2", "3", "4", "1", "0", "-1"]),
            ("merge_across_nodes", ["0", "1", "2"]),
            ("use_zero_pages", ["0", "1", "y", "n", "2"]),
            ("smart_scan", ["0", "1", "on", "off", "z"]),
            ("stable_node_chains_prune_millisecs", ["0", "100000000", "0x1"]),
            ("pages_to_scan", ["1", "4294967296", "-1", "+7"]),
        ])  # fmt: skip
        self.sysfs_write(name, self.rng.choice(values))

    def stop(self) -> None:
        """run=2, mostly; sometimes ksmd is asked to scan although it is stopped."""
        self.sysfs_write("run", self.rng.choice(["2", "2", "2", "0", "3", "x"]))
        if self.rng.random() < 0.3:
            self.step()
        self.sysfs_write("run", "1")

    def scan(self) -> None:
        self.ops += [["scan"]] * self.rng.choice([1, 1, 1, 2, 3])

    def part(self) -> None:
        most = 40 if self.style.pages < HUGE else 700
        self.ops.append(["scan_pages", self.rng.randint(1, most)])


def at(page: int) -> int:
    return ARENA + page * PAGE


def apply(machine: Any, op: Op) -> str:
    """Run one operation; its errno by number, or what it returned (of bytes a digest)."""
    if op[0] not in _OF_THE_MACHINE and op[1] not in machine.processes:
        return "no process"  # shrinking can take the spawn away
    try:
        if op[0] in _OF_THE_MACHINE:
            result = _OF_THE_MACHINE[op[0]](machine, *op[1:])
        else:
            result = _OF_A_PROCESS[op[0]](machine.processes[op[1]], *op[2:])
    except OSError as error:
        return f"errno {error.errno}"
    if isinstance(result, bytes):
        return hashlib.blake2b(result, digest_size=8).hexdigest()
    return str(result) if op[0] in _ANSWERING else ""


_OF_THE_MACHINE: dict[str, Callable[..., Any]] = {
    "spawn": lambda m, name: m.spawn(name),
    "sysfs": lambda m, name, text: m.ksm.write(name, text),
    "scan": lambda m: m.ksmd.scan(),
    "scan_pages": lambda m, k: m.ksmd.scan_pages(k),
    "reclaim": lambda m: m.reclaim(),
}
_OF_A_PROCESS: dict[str, Callable[..., Any]] = {
    "mmap": lambda p, page, n, prot, node=0: p.mmap(n * PAGE, prot, addr=at(page), node=node),
    "migrate": lambda p, page, n, node: p.migrate(at(page), n * PAGE, node),
    "fill": lambda p, page, numbers: p.write(at(page), b"".join(map(content, numbers))),
    "write": lambda p, page, number, offset=0: p.write(at(page) + offset, content(number)),
    "poke": lambda p, page, offset, byte: p.write(at(page) + offset, bytes([byte])),
    "read": lambda p, page: p.read(at(page), PAGE),
    "madvise": lambda p, page, n, advice, offset=0: p.madvise(at(page) + offset, n * PAGE, advice),
    "munmap": lambda p, page, n: p.munmap(at(page), n * PAGE),
    "mprotect": lambda p, page, n, prot: p.mprotect(at(page), n * PAGE, prot),
    "mremap": lambda p, page, old, new, flags, target: p.mremap(
        at(page), old * PAGE, new * PAGE, flags, at(target) if flags & 6 else None
    ),
    "prctl": lambda p, *arguments: p.prctl(*arguments),
    "fork": lambda p, name: p.fork(name),
    "exit": lambda p: p.exit(),
}
_ANSWERING = {"mmap", "mremap", "prctl"}


def state(machine: Any) -> dict[str, Any]:
    """Every counter, vmstat, and every living process's ksm_stat, flat."""
    found: dict[str, Any] = {}
    for name in COUNTERS:
        with suppress(FileNotFoundError):  # not every kernel has all of them
            found[name] = int(machine.ksm.read(name))
    found |= machine.vmstat
    for name, process in sorted(machine.processes.items()):
        found |= {f"{name}.{key}": value for key, value in process.ksm_stat.items()}
    return found

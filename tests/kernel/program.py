"""Programs: seeded random lists of operations that any executor (kernel, engine, model) can apply."""

from __future__ import annotations

import hashlib
import random
from typing import Any

from tests.kernel.real import COUNTERS, PAGE

ARENA = 0x100000000000
ARENA_PAGES = 48
CONTENTS = 8
MERGEABLE, UNMERGEABLE, DONTNEED, FREE, PAGEOUT, HUGEPAGE = 12, 13, 4, 8, 21, 14

Op = list[Any]
Program = dict[str, Any]


def content(number: int) -> bytes:
    """Page bytes by number: 0 is all zero; odd ones differ in the last byte only, even ones in the first."""
    data = bytearray(PAGE)
    if number % 2:
        data[-1] = number
    elif number:
        data[0] = number
    return bytes(data)


def generate(seed: int, nops: int = 60, swap: bool = False) -> Program:
    """A program from a seed; the same seed gives the same program for good."""
    rng = random.Random(f"ksm program {seed} {swap}")
    writer = _Writer(rng, swap)
    writer.settings()
    while len(writer.ops) < nops:
        writer.step()
    return {"seed": seed, "swap": swap, "ops": writer.ops}


class _Writer:
    def __init__(self, rng: random.Random, swap: bool) -> None:
        self.rng = rng
        self.ops: list[Op] = []
        self.names: list[str] = []
        self.born = 0
        self.contents = rng.choice([2, 3, 5, CONTENTS])
        self.kinds = {
            "spawn": 3, "fill": 8, "write": 14, "read": 3, "mark": 5, "unmark": 3, "dontneed": 3, "free": 1,
            "munmap": 3, "mmap": 4, "mprotect": 2, "mremap": 4, "fork": 3, "exit": 2, "prctl": 3, "sysfs": 3,
            "scan": 18, "pages": 14, "bad": 2, "pageout": 5 if swap else 0,
        }  # fmt: skip

    def settings(self) -> None:
        rng = self.rng
        self.ops.append(["sysfs", "run", "1"])
        self.ops.append(["sysfs", "max_page_sharing", str(rng.choice([2, 2, 3, 4, 256]))])
        if rng.random() < 0.4:
            self.ops.append(["sysfs", "use_zero_pages", "1"])
        if rng.random() < 0.5:
            self.ops.append(["sysfs", "smart_scan", "0"])
        if rng.random() < 0.5:
            self.ops.append(["sysfs", "stable_node_chains_prune_millisecs", "0"])
        self.spawn()
        self.fill()

    def step(self) -> None:
        kind = self.rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        if kind in ("spawn", "scan", "pages", "sysfs") or self.names:
            getattr(self, kind)()

    def where(self, longest: int = 12) -> tuple[int, int]:
        start = self.rng.randrange(ARENA_PAGES)
        return start, min(self.rng.randint(1, longest), ARENA_PAGES - start)

    def some(self) -> str:
        return self.rng.choice(self.names)

    def spawn(self) -> None:
        if len(self.names) >= 4:
            return
        name = f"p{self.born}"
        self.born += 1
        self.names.append(name)
        self.ops.append(["spawn", name])
        start, n = self.rng.randrange(8), self.rng.randint(8, 32)
        self.ops.append(["mmap", name, start, n, 3])
        if self.rng.random() < 0.2:
            self.ops.append(["prctl", name, 67, 1])
        elif self.rng.random() < 0.9:
            self.ops.append(["madvise", name, start, n, MERGEABLE])

    def fill(self) -> None:
        name = self.some()
        start, n = self.where(24)
        numbers = [self.rng.randrange(self.contents) for _ in range(n)]
        self.ops.append(["fill", name, start, numbers])

    def write(self) -> None:
        self.ops.append(["write", self.some(), self.rng.randrange(ARENA_PAGES), self.rng.randrange(self.contents)])

    def read(self) -> None:
        self.ops.append(["read", self.some(), self.rng.randrange(ARENA_PAGES)])

    def mark(self) -> None:
        self.ops.append(["madvise", self.some(), *self.where(), MERGEABLE])

    def unmark(self) -> None:
        self.ops.append(["madvise", self.some(), *self.where(), UNMERGEABLE])

    def dontneed(self) -> None:
        self.ops.append(["madvise", self.some(), *self.where(), DONTNEED])

    def free(self) -> None:
        self.ops.append(["madvise", self.some(), *self.where(), FREE])

    def pageout(self) -> None:
        self.ops.append(["madvise", self.some(), *self.where(), PAGEOUT])

    def munmap(self) -> None:
        self.ops.append(["munmap", self.some(), *self.where()])

    def mmap(self) -> None:
        name = self.some()
        start, n = self.where()
        self.ops.append(["mmap", name, start, n, self.rng.choice([3, 3, 3, 1])])
        if self.rng.random() < 0.7:
            self.ops.append(["madvise", name, start, n, MERGEABLE])

    def mprotect(self) -> None:
        self.ops.append(["mprotect", self.some(), *self.where(), self.rng.choice([0, 1, 3, 3])])

    def mremap(self) -> None:
        start, old = self.where(6)
        new = self.rng.choice([old, old, self.rng.randint(1, 8)])
        flags = self.rng.choice([0, 3, 3, 3, 7, 2])
        self.ops.append(["mremap", self.some(), start, old, new, flags, self.rng.randrange(ARENA_PAGES)])

    def fork(self) -> None:
        if len(self.names) >= 4:
            return
        name = f"p{self.born}"
        self.born += 1
        self.ops.append(["fork", self.some(), name])
        self.names.append(name)

    def exit(self) -> None:
        if len(self.names) > 1:
            self.ops.append(["exit", self.names.pop(self.rng.randrange(len(self.names)))])

    def prctl(self) -> None:
        arguments = self.rng.choice([[67, 1], [67, 1], [67, 0], [67, 0], [67, 7], [68, 0], [68, 1], [67, 1, 1]])
        self.ops.append(["prctl", self.some(), *arguments])

    def sysfs(self) -> None:
        name, values = self.rng.choice([
            ("run", ["2", "1", "0", "3", "x", "1"]),
            ("max_page_sharing", ["2", "3", "4", "1", "0", "-1"]),
            ("merge_across_nodes", ["0", "1", "2"]),
            ("use_zero_pages", ["0", "1", "y", "n", "2"]),
            ("smart_scan", ["0", "1", "on", "off", "z"]),
            ("stable_node_chains_prune_millisecs", ["0", "100000000", "0x1"]),
            ("pages_to_scan", ["1", "4294967296", "-1", "+7"]),
        ])  # fmt: skip
        self.ops.append(["sysfs", name, self.rng.choice(values)])
        if name == "run":
            self.ops.append(["sysfs", "run", "1"])

    def scan(self) -> None:
        for _ in range(self.rng.choice([1, 1, 1, 2, 3])):
            self.ops.append(["scan"])

    def pages(self) -> None:
        self.ops.append(["scan_pages", self.rng.randint(1, 40)])

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


def at(page: int) -> int:
    return ARENA + page * PAGE


def apply(machine: Any, op: Op) -> str:
    """Run one operation; its errno by number, or a digest of what it returned."""
    try:
        result = _apply(machine, op)
    except OSError as error:
        return f"errno {error.errno}"
    if isinstance(result, bytes):
        return hashlib.blake2b(result, digest_size=8).hexdigest()
    return str(result)


def _apply(machine: Any, op: Op) -> Any:
    kind = op[0]
    if kind == "spawn":
        machine.spawn(op[1])
        return None
    if kind == "sysfs":
        return machine.ksm.write(op[1], op[2])
    if kind == "scan":
        machine.ksmd.scan()
        return None
    if kind == "scan_pages":
        machine.ksmd.scan_pages(op[1])
        return None
    if op[1] not in machine.processes:  # shrinking can take the spawn away
        return "no process"
    p = machine.processes[op[1]]
    if kind == "mmap":
        return p.mmap(op[3] * PAGE, op[4], addr=at(op[2]))
    if kind == "fill":
        return p.write(at(op[2]), b"".join(content(number) for number in op[3]))
    if kind == "write":
        return p.write(at(op[2]), content(op[3]))
    if kind == "read":
        return p.read(at(op[2]), PAGE)
    if kind == "madvise":
        return p.madvise(at(op[2]) + (op[5] if len(op) > 5 else 0), op[3] * PAGE, op[4])
    if kind == "munmap":
        return p.munmap(at(op[2]), op[3] * PAGE)
    if kind == "mprotect":
        return p.mprotect(at(op[2]), op[3] * PAGE, op[4])
    if kind == "mremap":
        return p.mremap(at(op[2]), op[3] * PAGE, op[4] * PAGE, op[5], at(op[6]) if op[5] & 6 else None)
    if kind == "prctl":
        return p.prctl(*op[2:])
    if kind == "fork":
        p.fork(op[2])
        return None
    if kind == "exit":
        return p.exit()
    raise ValueError(f"no such operation: {op}")


def state(machine: Any) -> dict[str, Any]:
    """Every counter, vmstat, and every living process's ksm_stat, flat."""
    found: dict[str, Any] = {name: int(machine.ksm.read(name)) for name in COUNTERS}
    found |= machine.vmstat
    for name, process in sorted(machine.processes.items()):
        found |= {f"{name}.{key}": value for key, value in process.ksm_stat.items()}
    return found

"""The plain model and the machine with either index, side by side: the same operations, the same answers.

`python -m tests.lockstep --programs N` runs random programs without needing the kernel.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from typing import Any

import ksm
from tests.kernel.program import ARENA, apply, at, content
from tests.kernel.real import PAGE
from tests.model import ModelMachine

ARENA_PAGES = 24
SWAP_BYTES = 1 << 30
Op = list[Any]
Variant = dict[str, Any]


class Disagreement(AssertionError):
    """Two executors answered differently; the message holds the program."""


class Lockstep:
    """The executors, and the program so far."""

    def __init__(
        self, nodes: int = 1, swap: bool = False, ram: int | None = None, kernel: str = "6.18", check_every: int = 1
    ) -> None:
        self.nodes = nodes
        self.check_every = check_every  # a check makes the engine write down what it would leave implicit
        self.swap = swap
        settings: dict[str, Any] = {
            "nodes": nodes,
            "swap": SWAP_BYTES if swap else 0,
            "ram": None if ram is None else ram * PAGE,
            "kernel": kernel,
        }
        self.program: list[Op] = []
        self.variant = {"nodes": nodes, "swap": swap, "ram": ram, "kernel": kernel}
        self.executors: dict[str, Any] = {
            "model": ModelMachine(**settings),
            "tree": ksm.Machine(index="tree", **settings),
            "hash": ksm.Machine(index="hash", **settings),
        }

    @property
    def names(self) -> list[str]:
        """The live processes."""
        return list(self.executors["model"].processes)

    def step(self, op: Op) -> None:
        """One operation on every executor; raises when results, counters or structures differ."""
        self.program.append(op)
        results = {name: perform(machine, op) for name, machine in self.executors.items()}
        self._compare("result", results)
        self._compare("state", {name: everything(machine) for name, machine in self.executors.items()})
        if len(self.program) % self.check_every:
            return
        for name, machine in self.executors.items():
            try:
                machine.check()
            except Exception as error:
                self._fail(f"{name}: {error!r}")

    def run(self, ops: list[Op]) -> None:
        """A whole program."""
        for op in ops:
            self.step(op)

    def _compare(self, what: str, found: dict[str, Any]) -> None:
        want = found["model"]
        for name, got in found.items():
            if got == want:
                continue
            if isinstance(want, dict):
                # The model shows every field; a machine of an older profile only those that its kernel had.
                differ = [key for key in got if want.get(key) != got[key]]
                if not differ:
                    continue
                self._fail("\n".join(f"{key}: model {want.get(key)!r}, {name} {got.get(key)!r}" for key in differ))
            self._fail(f"{what}: model {want}, {name} {got}")

    def _fail(self, report: str) -> None:
        program = "\n".join(json.dumps(op) for op in self.program)
        last = len(self.program) - 1
        raise Disagreement(f"{report}\nafter operation {last} of Lockstep(**{self.variant}):\n{program}")


def perform(machine: Any, op: Op) -> str:
    """`tests.kernel.program.apply`, and the operations that only simulated machines have."""
    try:
        if op[0] == "reclaim":
            machine.reclaim()
            return "None"
        if op[0] == "mmap" and len(op) > 5:
            return str(machine.processes[op[1]].mmap(op[3] * PAGE, op[4], addr=at(op[2]), node=op[5]))
        if op[0] == "migrate":
            machine.processes[op[1]].migrate(at(op[2]), op[3] * PAGE, op[4])
            return "None"
        if op[0] == "write" and len(op) > 4:
            return str(machine.processes[op[1]].write(at(op[2]) + op[4], content(op[3])[:10] + b"!"))
    except OSError as error:
        return f"errno {error.errno}"
    return apply(machine, op)


def everything(machine: Any) -> dict[str, Any]:
    """Every sysfs file, vmstat, and every living process's ksm_stat."""
    found: dict[str, Any] = dict(machine.vmstat)
    for name in FILES:
        try:
            found[name] = machine.ksm.read(name)
        except OSError as error:
            found[name] = f"errno {error.errno}"
    for name, process in machine.processes.items():
        found |= {f"{name}.{key}": value for key, value in process.ksm_stat.items()}
    return found


FILES = sorted(ModelMachine().ksm.files)


def generate(
    seed: int, nodes: int = 1, swap: bool = False, ram: int | None = None, kernel: str = "6.18", nops: int = 120
) -> list[Op]:
    """A random program from a seed, for a variant of the machine."""
    rng = random.Random(f"{seed} {nodes} {swap} {ram}")
    contents = rng.choice([2, 3, 5, 8, 13])
    names: list[str] = []
    numbers = itertools.count()
    ops: list[Op] = [["sysfs", "run", "1"], ["sysfs", "max_page_sharing", rng.choice(["2", "2", "3", "4", "256"])]]
    ops.append(["sysfs", "stable_node_chains_prune_millisecs", rng.choice(["0", "100000000"])])
    ops.append(["sysfs", "smart_scan", rng.choice("01")])
    if rng.random() < 0.4:
        ops.append(["sysfs", "use_zero_pages", "1"])
    if nodes > 1:
        ops.append(["sysfs", "merge_across_nodes", rng.choice("001")])

    def born(how: str) -> None:
        name = f"p{next(numbers)}"
        if how == "fork" and names:
            ops.append(["fork", rng.choice(names), name])
        else:
            ops.extend([["spawn", name], ["mmap", name, 0, ARENA_PAGES, 3, rng.randrange(nodes)]])
            ops.append(["prctl", name, 67, 1] if how == "prctl" else ["madvise", name, 0, ARENA_PAGES, 12])
        names.append(name)

    kinds = {
        "write": 28, "scan": 22, "pages": 12, "advise": 9, "discard": 4, "unmap": 3, "map": 4, "birth": 5, "exit": 2,
        "prctl": 2, "mremap": 3, "protect": 1, "read": 3, "tune": 5, "reclaim": 3,
        "migrate": 4 if nodes > 1 else 0,
    }  # fmt: skip
    while len(ops) < nops:
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        if not names or (kind == "birth" and len(names) < 4):
            born(rng.choice(["spawn", "spawn", "prctl", "fork", "fork", "fork"]))
            continue
        name, page = rng.choice(names), rng.randrange(ARENA_PAGES)
        count = rng.randint(1, ARENA_PAGES - page)
        few = min(count, 6)
        if kind == "write":
            for _ in range(rng.randint(1, 12)):
                ops.append(["write", name, rng.randrange(ARENA_PAGES), rng.randrange(contents)])
        elif kind == "scan":
            ops.extend([["scan"]] * rng.choice([1, 1, 2, 3]))
        elif kind == "pages":
            ops.append(["scan_pages", rng.randint(1, 12)])
        elif kind == "advise":
            ops.append(["madvise", name, page, count, rng.choice([12, 12, 13])])
        elif kind == "discard":
            ops.append(["madvise", name, page, count, rng.choice([4, 4, 8, 21])])
        elif kind == "unmap":
            ops.append(["munmap", name, page, few])
        elif kind == "map":
            ops.append(["mmap", name, page, count, rng.choice([3, 3, 3, 1]), rng.randrange(nodes)])
        elif kind == "exit" and len(names) > 1:
            names.remove(name)
            ops.append(["exit", name])
        elif kind == "prctl":
            ops.append(["prctl", name, 67, rng.randrange(2)])
        elif kind == "mremap":
            flags, new = rng.choice([(3, few), (7, few), (3, rng.randint(1, 6)), (0, rng.randint(1, 6))])
            ops.append(["mremap", name, page, few, new, flags, rng.randrange(2 * ARENA_PAGES)])
        elif kind == "protect":
            ops.append(["mprotect", name, page, count, rng.choice([0, 1, 3])])
        elif kind == "read":
            ops.append(["read", name, page])
        elif kind == "tune":
            file, values = rng.choice(TUNING)
            ops.append(["sysfs", file, rng.choice(values)])
            ops.append(["sysfs", "run", "1"])
        elif kind == "reclaim":
            ops.append(["reclaim"])
        elif kind == "migrate":
            ops.append(["migrate", name, page, count, rng.randrange(nodes)])
    return ops


TUNING = [
    ("run", ["0", "2", "2"]),
    ("max_page_sharing", ["2", "3", "5", "1"]),
    ("use_zero_pages", ["0", "1"]),
    ("smart_scan", ["0", "1"]),
    ("stable_node_chains_prune_millisecs", ["0", "100000000"]),
    ("merge_across_nodes", ["0", "1"]),
    ("pages_to_scan", ["10", "-1"]),
]


def variants() -> list[Variant]:
    """The machines that programs run on."""
    return [
        {},
        {"swap": True},
        {"nodes": 2},
        {"nodes": 3},
        {"nodes": 3, "swap": True},
        {"ram": 30},
        *({"kernel": kernel} for kernel in ("5.15", "6.1", "6.6", "6.8", "6.12")),
    ]


def check_every(seed: int) -> int:
    """How often to check the machines of a program: after each operation, or seldom, so that passes stay implicit."""
    return 1 if seed % 2 else 40


def label(variant: Variant) -> str:
    """A variant in a word."""
    return "-".join(f"{key}{value}" for key, value in variant.items()) or "plain"


def shrink(ops: list[Op], variant: Variant) -> list[Op]:
    """The shortest part of a program found that the executors still disagree on."""

    def differs(some: list[Op]) -> bool:
        try:
            Lockstep(**variant).run(some)
        except Disagreement:
            return True
        except Exception:
            return False  # leaving something out made it no program
        return False

    size = len(ops) // 2
    while size:
        start = 0
        while start < len(ops):
            shorter = ops[:start] + ops[start + size :]
            if differs(shorter):
                ops = shorter
            else:
                start += size
        size //= 2
    return ops


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lockstep", description=__doc__)
    parser.add_argument("--programs", type=int, default=100, help="of each variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ops", type=int, default=120)
    parser.add_argument("--only", help="the variant to run, by its label")
    parser.add_argument("--stop", type=int, default=3, help="after so many disagreements of a variant")
    arguments = parser.parse_args()
    failed = 0
    for variant in variants():
        if arguments.only not in (None, label(variant)):
            continue
        start, bad, done = time.monotonic(), 0, 0
        for seed in range(arguments.seed, arguments.seed + arguments.programs):
            ops = generate(seed, nops=arguments.ops, **variant)
            done += 1
            settings = {**variant, "check_every": check_every(seed)}
            try:
                Lockstep(**settings).run(ops)
            except Disagreement:
                bad += 1
                print(f"seed {seed}:")
                try:
                    Lockstep(**settings).run(shrink(ops, settings))
                except Disagreement as error:
                    print(error, flush=True)
                if bad == arguments.stop:
                    break
        print(f"{label(variant)}: {done} programs, {bad} disagreements, {time.monotonic() - start:.1f} s", flush=True)
        failed += bad
    return 1 if failed else 0


__all__ = ["ARENA", "Disagreement", "Lockstep", "check_every", "generate", "label", "shrink", "variants"]

if __name__ == "__main__":
    sys.exit(main())

"""Random programs by the hundred: on the kernel and on ours, counter for counter, differences shrunk and kept."""

from __future__ import annotations

import argparse
import time
from collections.abc import Generator
from typing import Any

import ksm
from tests.kernel import compare
from tests.kernel.host import SWAP_BYTES
from tests.kernel.program import STYLES, Program, generate
from tests.kernel.real import NEVER_PRUNE
from tests.model import ModelMachine


def opponent(name: str, kernel: str) -> compare.Runner:
    """What is compared with the kernel of that release: the model, or the engine with one of its indexes."""

    def make(program: Program) -> Any:
        settings: dict[str, Any] = {"kernel": kernel, "nodes": program.get("nodes", 1)}
        settings["swap"] = SWAP_BYTES if program["swap"] else 0
        machine: Any = ModelMachine(**settings) if name == "model" else ksm.Machine(index=name, **settings)
        machine.ksm.write("stable_node_chains_prune_millisecs", str(NEVER_PRUNE))
        return machine

    return without_newer_fields(compare.on(make), kernel) if name == "model" else compare.on(make)


def without_newer_fields(run: compare.Runner, kernel: str) -> compare.Runner:
    """The model shows all there ever is; this leaves what a kernel of that release has."""
    machine = ksm.Machine(kernel=kernel)
    known = {*machine.kernel.attributes, *machine.vmstat, *machine.spawn("any").ksm_stat}

    def narrowed(program: Program) -> Generator[compare.Step, None, None]:
        for result, state in run(program):
            yield result, {name: value for name, value in state.items() if name.rpartition(".")[2] in known}

    return narrowed


class Comparison:
    """A number of programs, one after the other; those that differ on the host's own kernel are kept."""

    def __init__(self, arguments: argparse.Namespace, keep: bool) -> None:
        self.arguments = arguments
        self.keep = keep
        self.done = self.differed = self.unsteady = self.operations = 0
        self.start = time.monotonic()

    def finished(self) -> bool:
        return bool(self.done >= self.arguments.programs or self.differed >= self.arguments.stop)

    def one(self, kernel: compare.Runner, release: str, nodes: int = 1) -> None:
        """The next program, on a kernel of that release."""
        a = self.arguments
        ours = kernel if a.against == "self" else opponent(a.against, release)
        program = generate(a.seed + self.done, a.ops, a.swap, a.style, nodes)
        self.done += 1
        self.operations += len(program["ops"])
        report = compare.difference(program, kernel, ours)
        if report is None:
            pass
        elif a.against == "self" or compare.difference(program, kernel, ours) is None:
            self.unsteady += 1
            print(f"{program['style']} {program['seed']}: not so the second time\n{report}", flush=True)
        else:
            self.differed += 1
            self.show(program, kernel, ours)
        if self.done % 500 == 0:
            print(self, flush=True)

    def show(self, program: Program, kernel: compare.Runner, ours: compare.Runner) -> None:
        """Shrink a program that differs, print it, keep it."""
        small = compare.shrink(program, lambda p: compare.difference(p, kernel, ours) is not None)
        report = compare.difference(small, kernel, ours) or "not repeatable"
        print(f"{program['style']} {program['seed']}: shrunk to {len(small['ops'])} operations")
        for op in small["ops"]:
            print(f"   {op}")
        print(report, flush=True)
        if self.keep:
            print(f"kept as {compare.keep(small, report)}", flush=True)

    @property
    def verdict(self) -> int:
        """The exit status."""
        return 1 if self.differed or self.unsteady else 0

    def __str__(self) -> str:
        took = time.monotonic() - self.start
        return (
            f"{self.done:,} programs ({self.operations:,} operations) against {self.arguments.against}: "
            f"{self.differed} differed, {self.unsteady} did not repeat on the kernel; "
            f"{took:.1f} s, {took / max(1, self.done) * 1000:.0f} ms a program"
        )


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that every comparison has."""
    made = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    made.add_argument("--programs", type=int, default=200)
    made.add_argument("--seed", type=int, default=0, help="of the first program")
    made.add_argument("--ops", type=int, default=60)
    made.add_argument("--swap", action="store_true", help="with swap on zram")
    made.add_argument("--style", choices=[*STYLES, "huge", "numa"], help="of every program; else each seed has its own")
    made.add_argument("--against", choices=["hash", "tree", "model", "self"], default="hash")
    made.add_argument("--stop", type=int, default=5, help="after so many differences")
    return made

"""`python -m tests.kernel --programs N`: N random programs on the running kernel and on ours, counter for counter."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from tests.kernel import compare, host
from tests.kernel.host import SWAP_BYTES, Unavailable
from tests.kernel.program import STYLES, Program, generate
from tests.kernel.real import NEVER_PRUNE, KernelSession, RealMachine

TURN = 20.0  # seconds after which others get the kernel for a moment


def opponent(name: str) -> compare.Factory:
    """A factory of what is compared with the kernel: the model, or the engine with one of its indexes."""

    def make(program: Program) -> Any:
        swap = SWAP_BYTES if program["swap"] else 0
        machine: Any
        if name == "model":
            from tests.model import ModelMachine

            machine = ModelMachine(swap=swap)
        else:
            import ksm

            machine = ksm.Machine(index=name, swap=swap)
        machine.ksm.write("stable_node_chains_prune_millisecs", str(NEVER_PRUNE))
        return machine

    return make


class Comparison:
    """A number of programs, run in turns."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.done = self.differed = self.unsteady = self.operations = 0
        self.start = time.monotonic()

    def finished(self) -> bool:
        return bool(self.done >= self.arguments.programs or self.differed >= self.arguments.stop)

    def turn(self) -> None:
        """Run programs for a while, then let go of the kernel."""
        end = time.monotonic() + TURN
        with KernelSession(swap=self.arguments.swap) as session:
            while not self.finished() and time.monotonic() < end:
                self.one(session)
        time.sleep(0.05)

    def one(self, session: KernelSession) -> None:
        a = self.arguments

        def kernel(program: Program) -> RealMachine:
            return RealMachine(session)

        ours = kernel if a.against == "self" else opponent(a.against)
        program = generate(a.seed + self.done, a.ops, a.swap, a.style)
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
            show(program, kernel, ours)
        if self.done % 500 == 0:
            print(self, flush=True)

    def __str__(self) -> str:
        took = time.monotonic() - self.start
        return (
            f"{self.done:,} programs ({self.operations:,} operations) against {self.arguments.against}: "
            f"{self.differed} differed, {self.unsteady} did not repeat on the kernel; "
            f"{took:.1f} s, {took / max(1, self.done) * 1000:.0f} ms a program"
        )


def show(program: Program, kernel: compare.Factory, ours: compare.Factory) -> None:
    """Shrink a program that differs, print it, keep it."""
    small = compare.shrink(program, lambda p: compare.difference(p, kernel, ours) is not None)
    report = compare.difference(small, kernel, ours) or "not repeatable"
    print(f"{program['style']} {program['seed']}: shrunk to {len(small['ops'])} operations")
    for op in small["ops"]:
        print(f"   {op}")
    print(report)
    print(f"kept as {compare.keep(small, report)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernel", description=__doc__)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--ops", type=int, default=60)
    parser.add_argument("--swap", action="store_true", help="with swap on zram")
    parser.add_argument("--style", choices=[*STYLES, "huge"], help="of every program; else each seed has its own")
    parser.add_argument("--against", choices=["hash", "tree", "model", "self"], default="hash")
    parser.add_argument("--stop", type=int, default=5, help="after so many differences")
    parser.add_argument("--wait", type=float, default=10, help="seconds, until others' registered memory is gone")
    comparison = Comparison(parser.parse_args())
    host.PATIENCE_WITH_OTHERS = comparison.arguments.wait
    try:
        while not comparison.finished():
            comparison.turn()
    except Unavailable as reason:
        print(f"cannot run: {reason}")
        return 77
    finally:
        print(comparison)
    return 1 if comparison.differed or comparison.unsteady else 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.kernel --programs N`: N random programs on the running kernel and on ours, counter for counter."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from typing import Any

from tests.kernel import compare
from tests.kernel.program import Program, generate
from tests.kernel.real import NEVER_PRUNE, KernelSession, RealMachine, terminate_on_sigterm, why_not


def opponent(name: str, session: KernelSession) -> compare.Factory:
    """A factory of what is compared with the kernel."""
    if name == "model":
        from tests.model import ModelMachine

        return lambda: prepared(ModelMachine(swap=1 << 28))
    import ksm

    return lambda: prepared(ksm.Machine(index=name, swap=1 << 28))


def prepared(machine: Any) -> Any:
    """The settings that every program starts from."""
    machine.ksm.write("stable_node_chains_prune_millisecs", str(NEVER_PRUNE))
    return machine


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernel", description=__doc__)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--ops", type=int, default=60)
    parser.add_argument("--swap", action="store_true", help="with swap on zram and MADV_PAGEOUT")
    parser.add_argument("--against", choices=["hash", "tree", "model"], default="hash")
    parser.add_argument("--stop", type=int, default=5, help="after so many differences")
    arguments = parser.parse_args()
    reason = why_not()
    if reason:
        print(f"cannot run: {reason}")
        return 77
    terminate_on_sigterm()
    found = unsteady = 0
    start = time.monotonic()
    with KernelSession(swap=arguments.swap) as session:
        kernel = partial(RealMachine, session)
        ours = opponent(arguments.against, session)
        for i in range(arguments.programs):
            program = generate(arguments.seed + i, arguments.ops, arguments.swap)
            report = compare.difference(program, kernel, ours)
            if report and compare.difference(program, kernel, ours) is None:
                unsteady += 1
                print(f"seed {program['seed']}: the kernel did otherwise the second time\n{report}", flush=True)
            elif report:
                found += 1
                show(program, kernel, ours)
                if found >= arguments.stop:
                    break
            if (i + 1) % 500 == 0:
                took = time.monotonic() - start
                print(f"{i + 1:,} programs, {found} differences, {took:.0f} s", flush=True)
    took = time.monotonic() - start
    print(
        f"{i + 1:,} programs of {arguments.ops} operations against {arguments.against}: {found} differed, "
        f"{unsteady} did not repeat on the kernel itself, {took:.1f} s"
    )
    return 1 if found else 0


def show(program: Program, kernel: compare.Factory, ours: compare.Factory) -> None:
    """Shrink a program that differs, print it, keep it."""
    small = compare.shrink(program, lambda p: compare.difference(p, kernel, ours) is not None)
    report = compare.difference(small, kernel, ours) or "not repeatable"
    print(f"seed {program['seed']}: shrunk to {len(small['ops'])} operations")
    for op in small["ops"]:
        print(f"   {op}")
    print(report)
    print(f"kept as {compare.keep(small, report)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

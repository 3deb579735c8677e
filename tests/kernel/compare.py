"""Run programs on two executors, find the first difference, shrink the program, keep it."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

from tests.kernel.program import Op, Program, apply, state

Step = tuple[str, dict[str, Any]]
Factory = Callable[[Program], Any]
Runner = Callable[[Program], Generator[Step, None, None]]
"""Runs a program somewhere: each operation's result, and the counters after it."""
REGRESSIONS = Path(__file__).with_name("regressions")


def run(program: Program, factory: Factory) -> Generator[Step, None, None]:
    """Each operation's result and the counters after it, on a machine made for the program."""
    machine = factory(program)
    managed: AbstractContextManager[Any] = machine if hasattr(machine, "__exit__") else nullcontext(machine)
    with managed:
        for op in program["ops"]:
            yield apply(machine, op), state(machine)


def on(factory: Factory) -> Runner:
    """Runs programs on machines of a factory."""
    return lambda program: run(program, factory)


def difference(program: Program, kernel: Runner, ours: Runner) -> str | None:
    """A report of the first difference between the two, or None."""
    expected = list(kernel(program))
    with closing(ours(program)) as steps:
        for i, (op, want, have) in enumerate(zip(program["ops"], expected, steps, strict=True)):
            if want != have:
                return report(i, op, want, have)
    return None


def steady_difference(program: Program, kernel: Runner, ours: Runner) -> str | None:
    """A difference that is there the second time as well: others may have disturbed the kernel."""
    return difference(program, kernel, ours) and difference(program, kernel, ours)


def report(i: int, op: Op, want: Step, have: Step) -> str:
    """What differs after operation `i`, a line each."""
    lines = [f"operation {i}: {op}"]
    if want[0] != have[0]:
        lines.append(f"  result: kernel {want[0]}, ours {have[0]}")
    for name in sorted(want[1].keys() | have[1].keys()):
        if want[1].get(name) != have[1].get(name):
            lines.append(f"  {name}: kernel {want[1].get(name)}, ours {have[1].get(name)}")
    return "\n".join(lines)


def shrink(program: Program, differs: Callable[[Program], bool], limit: int = 400) -> Program:
    """The smallest program found that still differs, by leaving operations out, in halves and then singly."""
    ops = list(program["ops"])
    size = max(1, len(ops) // 2)
    tries = 0
    while size and tries < limit:
        i = 0
        shrunk = False
        while i < len(ops) and tries < limit:
            shorter = ops[:i] + ops[i + size :]
            tries += 1
            if differs({**program, "ops": shorter}):
                ops, shrunk = shorter, True
            else:
                i += size
        if not shrunk or size > 1:
            size //= 2
    return {**program, "ops": ops}


def keep(program: Program, found: str) -> Path:
    """Store a program that differed, as a regression test."""
    REGRESSIONS.mkdir(exist_ok=True)
    path = REGRESSIONS / f"{program.get('style', 'seed')}-{program['seed']}.json"
    head = json.dumps({**program, "found": found, "ops": []}, indent=1)
    lines = ",\n".join(f"  {json.dumps(op)}" for op in program["ops"])
    path.write_text(head.replace('"ops": []', f'"ops": [\n{lines}\n ]') + "\n")
    return path


def kept() -> dict[str, Program]:
    """The stored programs, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(REGRESSIONS.glob("*.json"))}

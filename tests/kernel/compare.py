"""Run programs on two executors, find the first difference, shrink the program, keep it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.kernel.program import Op, Program, apply, state

Factory = Callable[[], Any]
REGRESSIONS = Path(__file__).with_name("regressions")


def difference(program: Program, kernel: Factory, ours: Factory) -> str | None:
    """Run a program on both, step by step; a report of the first difference, or None."""
    with kernel() as judge:
        machine = ours()
        for i, op in enumerate(program["ops"]):
            report = _compare(i, op, judge, machine)
            if report:
                return report
    return None


def _compare(i: int, op: Op, judge: Any, machine: Any) -> str | None:
    expected, got = apply(judge, op), apply(machine, op)
    lines = []
    if expected != got:
        lines.append(f"  result: kernel {expected}, ours {got}")
    want, have = state(judge), state(machine)
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            lines.append(f"  {name}: kernel {want.get(name)}, ours {have.get(name)}")
    if not lines:
        return None
    return "\n".join([f"operation {i}: {op}", *lines])


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


def keep(program: Program, report: str) -> Path:
    """Store a program that differed, as a regression test."""
    REGRESSIONS.mkdir(exist_ok=True)
    path = REGRESSIONS / f"seed-{program['seed']}{'-swap' if program['swap'] else ''}.json"
    path.write_text(json.dumps({**program, "found": report}, indent=1) + "\n")
    return path

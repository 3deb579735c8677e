"""What runs in a guest: takes programs over a serial line, runs them on the guest's kernel, answers with every step."""

from __future__ import annotations

import base64
import json
import os
import sys
import traceback
import tty
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from tests.kernel import compare, host
from tests.kernel.program import Program
from tests.kernel.real import KernelSession, RealMachine


def pack(message: dict[str, Any]) -> bytes:
    """One line of text: a serial line is slow, and steps are much alike.

    >>> unpack(pack({"a": 1}))
    {'a': 1}
    """
    return base64.b64encode(zlib.compress(json.dumps(message).encode(), 1)) + b"\n"


def unpack(line: bytes) -> dict[str, Any]:
    """What `pack` made a line of."""
    message: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(line)))
    return message


class Judge:
    """Runs programs; a session lasts as long as the programs want the same."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._swap: bool | None = None
        self._session: KernelSession

    def run(self, program: Program) -> list[compare.Step]:
        if program["swap"] != self._swap:
            self._stack.close()
            self._session = self._stack.enter_context(KernelSession(swap=program["swap"]))
            self._swap = program["swap"]
        return list(compare.run(program, lambda _: RealMachine(self._session)))


def answers(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """First what this kernel is, then a reply to each line."""
    yield {"kernel": os.uname().release, "nodes": host.numa_nodes()}
    judge = Judge()
    for line in lines:
        try:
            yield {"steps": judge.run(unpack(line)["program"])}
        except Exception:
            yield {"error": traceback.format_exc()}


def main() -> None:
    terminal = os.open(sys.argv[1], os.O_RDWR)
    tty.setraw(terminal)
    with open(terminal, "rb", closefd=False) as lines, open(terminal, "wb") as out:
        for answer in answers(iter(lines.readline, b"")):
            out.write(pack(answer))
            out.flush()


if __name__ == "__main__":
    main()

"""`python -m tests.kernel --programs N`: N random programs on the running kernel and on ours, counter for counter."""

from __future__ import annotations

import os
import sys
import time

from tests.kernel import compare, host
from tests.kernel.comparison import Comparison, parser
from tests.kernel.host import Unavailable
from tests.kernel.real import KernelSession, RealMachine

TURN = 20.0  # seconds after which others get the kernel for a moment


def turn(comparison: Comparison) -> None:
    """Run programs for a while, then let go of the kernel."""
    end = time.monotonic() + TURN
    with KernelSession(swap=comparison.arguments.swap) as session:
        kernel = compare.on(lambda _: RealMachine(session))
        while not comparison.finished() and time.monotonic() < end:
            comparison.one(kernel, os.uname().release, session.nodes)
    time.sleep(0.05)


def main() -> int:
    options = parser("tests.kernel", __doc__)
    options.add_argument("--wait", type=float, default=10, help="seconds, until others' registered memory is gone")
    comparison = Comparison(options.parse_args(), keep=True)
    host.PATIENCE_WITH_OTHERS = comparison.arguments.wait
    try:
        while not comparison.finished():
            turn(comparison)
    except Unavailable as reason:
        print(f"cannot run: {reason}")
        return 77
    finally:
        print(comparison)
    return comparison.verdict


if __name__ == "__main__":
    sys.exit(main())

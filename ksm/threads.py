"""How many threads a piece of work is given."""

from __future__ import annotations

import os


def usable_cpus() -> int:
    """CPUs that the process may use, 1 or more.

    >>> usable_cpus() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_for(asked: int | None) -> int:
    """As many as were asked for; None: one a CPU.

    Raises:
        ValueError: fewer than one.

    >>> threads_for(3)
    3
    """
    if asked is not None and asked < 1:
        raise ValueError(f"{asked} threads cannot work: one or more are needed")
    return usable_cpus() if asked is None else asked

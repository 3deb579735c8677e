"""A small recording to try things on."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np

from ksm.sources import ArrayImage
from ksm.trace.reader import Trace
from ksm.trace.recorder import record


@functools.cache
def example() -> Trace:
    """Two guests of four pages, three of them equal, over 20 s: vm2 changes one of these after 10 s.

    It is recorded anew in each process that asks for it, into a temporary directory that goes with the process.

    >>> example().processes
    ('vm1', 'vm2')
    """
    where = Path(tempfile.mkdtemp(prefix="ksm-example-"))
    atexit.register(shutil.rmtree, where, ignore_errors=True)
    one = np.random.default_rng(1).integers(0, 256, (4, 4096), dtype=np.uint8)
    two = one.copy()
    two[3] += 1
    changed = two.copy()
    changed[0] += 1
    first = ArrayImage(one, "vm1")
    guests = {"vm1": [first] * 3, "vm2": [ArrayImage(two), ArrayImage(changed), ArrayImage(changed)]}
    record(guests, where / "example.trace", every=10.0)
    return Trace(where / "example.trace")

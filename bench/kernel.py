"""The kernel's own ksmd on the pages that we measure with, where it can be asked."""

from __future__ import annotations

import os
import sys

import ksm
from ksm.calibrate import Passes, kernel_passes, machine_of
from ksm.errors import KsmError
from ksm.linux import Host
from ksm.patterns import Pages

PASSES = 3  # the first hashes, the second merges, the third finds nothing new


def passes(pages: Pages) -> Passes | str:
    """Let ksmd make its passes over memory of this process; a text says why it did not.

    The pages must not be in huge pages: `filled`.
    """
    try:
        return kernel_passes(Host(), pages, PASSES)
    except (KsmError, OSError) as error:
        return str(error)


def machine(pages: Pages | ksm.Fingerprints, index: str = "hash") -> ksm.Machine:
    """A simulated machine with these pages and the same tunables, of this kernel where there is one."""
    return machine_of(pages, os.uname().release if sys.platform == "linux" else "6.18", index)

"""Linux Kernel Samepage Merging, exactly, on pages of your choice; and the real KSM of the host it runs on.

>>> import ksm
>>> m = ksm.Machine()
>>> p = m.spawn("vm1")
>>> a = p.mmap(b"x" * 4096 * 3)
>>> p.madvise(a, 4096 * 3, ksm.MADV_MERGEABLE)
>>> m.ksm.run = 1
>>> _ = m.ksmd.scan(), m.ksmd.scan()
>>> m.ksm.snapshot().saved_bytes
8192
"""

import importlib
from typing import Any

from ksm import linux
from ksm.constants import (
    MADV_COLD,
    MADV_DONTNEED,
    MADV_FREE,
    MADV_HUGEPAGE,
    MADV_MERGEABLE,
    MADV_NOHUGEPAGE,
    MADV_NORMAL,
    MADV_PAGEOUT,
    MADV_RANDOM,
    MADV_SEQUENTIAL,
    MADV_UNMERGEABLE,
    MADV_WILLNEED,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PR_GET_MEMORY_MERGE,
    PR_SET_MEMORY_MERGE,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
)
from ksm.cost import CostModel
from ksm.errors import (
    DisagreementError,
    InvariantError,
    KernelFileNotFoundError,
    KernelPermissionError,
    KsmError,
    NoPageBytesError,
    NoSuchProcessError,
    OutOfMemoryError,
    PlanError,
    SourceError,
    SyscallError,
    UnsupportedError,
)
from ksm.estimate import Estimate, estimate
from ksm.ksmd import Ksmd
from ksm.machine import Machine, Process
from ksm.pages import Fingerprints, fingerprint
from ksm.plan import HostSpec, Plan, Policy, VMClass, plan
from ksm.sources import Image, open
from ksm.stats import Stats
from ksm.sysfs import Sysfs
from ksm.vmas import Vma

__version__: str

__all__ = [
    "MADV_COLD",
    "MADV_DONTNEED",
    "MADV_FREE",
    "MADV_HUGEPAGE",
    "MADV_MERGEABLE",
    "MADV_NOHUGEPAGE",
    "MADV_NORMAL",
    "MADV_PAGEOUT",
    "MADV_RANDOM",
    "MADV_SEQUENTIAL",
    "MADV_UNMERGEABLE",
    "MADV_WILLNEED",
    "MREMAP_DONTUNMAP",
    "MREMAP_FIXED",
    "MREMAP_MAYMOVE",
    "PROT_NONE",
    "PROT_READ",
    "PROT_WRITE",
    "PR_GET_MEMORY_MERGE",
    "PR_SET_MEMORY_MERGE",
    "CostModel",
    "DisagreementError",
    "Estimate",
    "Fingerprints",
    "HostSpec",
    "Image",
    "InvariantError",
    "KernelFileNotFoundError",
    "KernelPermissionError",
    "KsmError",
    "Ksmd",
    "Machine",
    "NoPageBytesError",
    "NoSuchProcessError",
    "OutOfMemoryError",
    "Plan",
    "PlanError",
    "Policy",
    "Process",
    "SourceError",
    "Stats",
    "SyscallError",
    "Sysfs",
    "UnsupportedError",
    "VMClass",
    "Vma",
    "__version__",
    "estimate",
    "fingerprint",
    "linux",
    "open",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # takes longer than the rest of this package

        return version("ksm")
    if name in ("keyed", "simulation", "sweep", "trace"):  # modules that are imported when they are used
        return importlib.import_module(f"ksm.{name}")
    raise AttributeError(f"module 'ksm' has no attribute {name!r}")

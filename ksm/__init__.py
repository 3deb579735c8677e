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
import sys
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from ksm import linux
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
    "estimate",
    "fingerprint",
    "linux",
    "open",
    "plan",
]


# What is imported when it is asked for: `import ksm` costs next to nothing, and numpy comes with the first use.
_HOMES = MappingProxyType(
    {
        "CostModel": "ksm.cost",
        "DisagreementError": "ksm.errors",
        "InvariantError": "ksm.errors",
        "KernelFileNotFoundError": "ksm.errors",
        "KernelPermissionError": "ksm.errors",
        "KsmError": "ksm.errors",
        "NoPageBytesError": "ksm.errors",
        "NoSuchProcessError": "ksm.errors",
        "OutOfMemoryError": "ksm.errors",
        "PlanError": "ksm.errors",
        "SourceError": "ksm.errors",
        "SyscallError": "ksm.errors",
        "UnsupportedError": "ksm.errors",
        "Estimate": "ksm.estimate",
        "estimate": "ksm.estimate",
        "Ksmd": "ksm.ksmd",
        "Machine": "ksm.machine",
        "Process": "ksm.machine",
        "Fingerprints": "ksm.pages",
        "fingerprint": "ksm.pages",
        "HostSpec": "ksm.plan",
        "Plan": "ksm.plan",
        "Policy": "ksm.plan",
        "VMClass": "ksm.plan",
        "plan": "ksm.plan",
        "Image": "ksm.sources",
        "open": "ksm.sources",
        "Stats": "ksm.stats",
        "Sysfs": "ksm.sysfs",
        "Vma": "ksm.vmas",
    }
)
_MODULES = ("keyed", "linux", "simulation", "sweep", "trace")


class _Package(ModuleType):
    """A function keeps its name, also when the submodule of the same name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("ksm")
    if name in _MODULES:
        return importlib.import_module(f"ksm.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ksm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

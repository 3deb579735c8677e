"""Every exception of the package; each carries its errno and the CLI's exit code."""

from __future__ import annotations

import errno as _errno
import os
from collections.abc import Iterable


class KsmError(Exception):
    """Base of every error that this package raises on purpose.

    `exit_code` is what the command line exits with when the error ends it.

    >>> KsmError("no").exit_code
    1
    """

    exit_code: int = 1


class SyscallError(KsmError, OSError):
    """What the kernel would answer: an `OSError` with the kernel's errno.

    >>> kernel_error(22, "unaligned address").errno
    22
    """

    exit_code = 1


class KernelPermissionError(SyscallError, PermissionError):
    """EACCES or EPERM, as opening a read-only attribute for writing gives.

    >>> isinstance(kernel_error(13, "read-only"), PermissionError)
    True
    """

    exit_code = 77


class KernelFileNotFoundError(SyscallError, FileNotFoundError):
    """ENOENT: this kernel profile has no such attribute.

    >>> isinstance(kernel_error(2, "smart_scan"), FileNotFoundError)
    True
    """


class NoSuchProcessError(SyscallError, ProcessLookupError):
    """ESRCH: the process has exited.

    >>> isinstance(kernel_error(3, "vm1 has exited"), ProcessLookupError)
    True
    """

    exit_code = 66


class OutOfMemoryError(SyscallError, MemoryError):
    """ENOMEM: the machine's RAM and swap are used up; the message names what asked.

    ENOMEM for an address range with holes is a plain `SyscallError`.

    >>> isinstance(OutOfMemoryError(12, "unmerging vm1 needs 3 frames"), MemoryError)
    True
    """


class NoPageBytesError(KsmError):
    """Page bytes were asked of a machine that was built from fingerprints alone.

    >>> issubclass(NoPageBytesError, KsmError)
    True
    """


class SourceError(KsmError):
    """A source of pages cannot be read: truncated, lying, gone, of an unknown kind.

    >>> SourceError("guest.raw: 5 bytes, not a whole page").exit_code
    65
    """

    exit_code = 65


class PlanError(KsmError, ValueError):
    """What a plan was given does not fit together: a class without samples, a mix that does not sum to 1, ...

    >>> PlanError("class web has no samples").exit_code
    65
    """

    exit_code = 65


class UnsupportedError(KsmError):
    """This host cannot do what was asked (no KSM in the kernel, wrong system).

    >>> UnsupportedError("this kernel has no KSM").exit_code
    69
    """

    exit_code = 69


class SchedulerLostError(KsmError):
    """The Dask scheduler does not answer, or went away before the work was done.

    >>> SchedulerLostError("tcp://10.0.0.1:8786: no scheduler answers").exit_code
    75
    """

    exit_code = 75


class WorkersGoneError(KsmError):
    """No worker is left on hosts that alone have files which are needed; `hosts` has their names.

    >>> str(WorkersGoneError(["10.0.0.2"]))
    'no worker is left on 10.0.0.2'
    """

    exit_code = 75

    def __init__(self, hosts: Iterable[str]) -> None:
        self.hosts = frozenset(hosts)
        super().__init__(f"no worker is left on {', '.join(sorted(self.hosts))}")


class InvariantError(KsmError):
    """`Machine.check` found a broken invariant; the message names it. A bug in ksm.

    >>> InvariantError("rb-order: node 3").exit_code
    70
    """

    exit_code = 70


class DisagreementError(KsmError):
    """The kernel's counters and ours differ where they must agree.

    >>> DisagreementError("pages_sharing: kernel 10, ksm 11").exit_code
    4
    """

    exit_code = 4


_BY_ERRNO: dict[int, type[SyscallError]] = {
    _errno.EACCES: KernelPermissionError,
    _errno.EPERM: KernelPermissionError,
    _errno.ENOENT: KernelFileNotFoundError,
    _errno.ESRCH: NoSuchProcessError,
}


def kernel_error(number: int, message: str) -> SyscallError:
    """Make the `SyscallError` (the fitting subclass) for errno `number`.

    >>> kernel_error(16, "max_page_sharing: pages are shared")
    SyscallError(16, 'Device or resource busy: max_page_sharing: pages are shared')
    """
    kind = _BY_ERRNO.get(number, SyscallError)
    return kind(number, f"{os.strerror(number)}: {message}")

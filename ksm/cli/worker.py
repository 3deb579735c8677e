"""A worker of `ksm demo`: a process that does some work on shared and private data, and opts in to KSM.

Run as a script: `worker.py KIND NUMBER`. It talks over its pipes: after "ready" it waits for a line, opts in, says how
("prctl", "madvise" or "no: ..."), works, says "done", and waits to be killed. It needs nothing of the package.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import signal
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

_PR_SET_PDEATHSIG = 1
_PR_SET_THP_DISABLE = 41
_PR_SET_MEMORY_MERGE = 67
_MADV_MERGEABLE = 12
_PAGE = 4096
_MIB = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)


def mark(array: npt.NDArray[Any]) -> None:
    """Mark the whole pages of an array mergeable."""
    start = -(-array.ctypes.data // _PAGE) * _PAGE
    end = (array.ctypes.data + array.nbytes) // _PAGE * _PAGE
    if _libc.madvise(start, end - start, _MADV_MERGEABLE):
        raise OSError(ctypes.get_errno(), "madvise")


def touched(nbytes: int, value: int = 0) -> npt.NDArray[Any]:
    """Memory that has really been written to, also where the value is 0."""
    array = np.empty(nbytes, np.uint8)
    array[:] = 1
    array[:] = value
    return array


def render(number: int) -> list[npt.NDArray[Any]]:
    """A web worker: the site's templates, as every such worker has them, and the pages it has rendered itself."""
    rows = [hashlib.sha256(b"template %d" % i).hexdigest().encode() for i in range(64 * 1024)]
    templates = np.frombuffer(b"\n".join(b"<li class='item'>" + row + b"{{ name }}</li>" for row in rows), np.uint8)
    library = np.concatenate([np.roll(templates, 7 * i) for i in range(2)])
    cache = touched(5 * _MIB)
    digests = (hashlib.sha256(b"user %d of %d" % (i, number)).digest() for i in range(len(cache) // 32))
    cache[:] = np.frombuffer(b"".join(digests), np.uint8)
    canvas = touched(3 * _MIB, 0xFF)  # white, the same page over and over
    return [templates, library, cache, canvas, touched(2 * _MIB)]


def analyse(number: int) -> list[npt.NDArray[Any]]:
    """A data worker: the data set that all of them read, and what this one has computed from its own sample."""
    data = np.random.default_rng(2024).normal(size=2 * _MIB)
    sample = np.random.default_rng(number).integers(0, len(data), 256 * 1024)
    picked = data[sample]
    sums = np.cumsum(picked)
    histogram = touched(4 * _MIB).view(np.int64)  # sparse: most of its pages stay zero
    np.add.at(histogram, np.abs(picked * 1000).astype(np.int64) % len(histogram), 1)
    return [data, picked, sums, histogram]


def main(kind: str, number: int) -> None:
    """Do the work of one worker.

    >>> [array.nbytes > 0 for array in analyse(1)]
    [True, True, True, True]
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    print("ready", flush=True)
    if not sys.stdin.readline():
        return
    whole = kind == "render"
    probe = touched(4 * _PAGE)
    try:
        if whole and _libc.prctl(_PR_SET_MEMORY_MERGE, 1, 0, 0, 0):
            if ctypes.get_errno() != errno.EINVAL:
                raise OSError(ctypes.get_errno(), "prctl")
            whole = False  # before Linux 6.4
        if not whole:
            mark(probe)
        how = "prctl" if whole else "madvise"
    except OSError as error:
        how = f"no: {errno.errorcode.get(error.errno or 0, error.errno)}"
    print(how, flush=True)
    if not sys.stdin.readline():
        return
    arrays = render(number) if kind == "render" else analyse(number)
    if how == "madvise":
        for array in arrays:
            mark(array)
    print("done", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    sys.path.pop(0)  # the package's own directory: its modules are not top-level ones
    main(sys.argv[1], int(sys.argv[2]))

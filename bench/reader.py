"""Plain memory reading, by a few lines of C that are compiled when first asked for."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

SOURCE = Path(__file__).with_name("reader.c")
_BLOCK = 1 << 21  # words a thread reads at a time: 16 MiB, as a thread that fingerprints does


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        built = Path(directory, "reader.so")
        subprocess.run([compiler, "-O3", "-shared", "-fPIC", "-o", str(built), str(SOURCE)], check=True)
        library = ctypes.CDLL(str(built))
    for name in ("read_plain", "read_ahead"):
        function = getattr(library, name)
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        function.restype = ctypes.c_uint64
    return library


def how() -> str:
    """What reads: the C loop, or numpy where there is no compiler."""
    return "a loop in C" if _library() is not None else "numpy"


def read(pages: npt.NDArray[np.uint8], threads: int = 1, ahead: bool = False) -> int:
    """Read every byte; the sum of all words. `ahead` prefetches 2 KiB ahead (in C only)."""
    words = pages.reshape(-1).view(np.uint64)
    one = _reader(ahead)
    blocks = [words[at : at + _BLOCK] for at in range(0, len(words), _BLOCK)]
    if threads == 1:
        return sum(map(one, blocks)) % 2**64
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(one, blocks)) % 2**64


def _reader(ahead: bool) -> Callable[[npt.NDArray[np.uint64]], int]:
    library = _library()
    if library is None:
        return lambda words: int(np.add.reduce(words))
    function = library.read_ahead if ahead else library.read_plain
    return lambda words: int(function(words.ctypes.data, len(words)))

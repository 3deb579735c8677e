"""How much memory the engine takes beyond the pages, measured: `python -m bench.footprint KIND PAGES` prints JSON."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

from bench.kernel import machine
from ksm.patterns import filled


def resident() -> int:
    """Bytes of this process that are in memory now, what the allocator could give back apart."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def forget_peak() -> None:
    """What was in memory at the most is counted from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most that was in memory since `forget_peak`."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def measure(kind: str, n: int) -> dict[str, float]:
    """Bytes a page after each stage, and at the most; and what each structure has allocated, touched or not."""
    machine(filled("unique", 64)).ksmd.scan()  # what is loaded once does not count
    pages = filled(kind, n)
    base = resident()
    forget_peak()
    found = machine(pages)
    after = {"after mmap": resident()}
    for number in range(3):
        found.ksmd.scan()
        after[f"after pass {number + 1}"] = resident()
    after["at the most"] = peak()
    allocated = {f"allocated for {name}": size for name, size in found._engine.memory().items() if size > n}
    return {name: (size - base) / n for name, size in after.items()} | {k: v / n for k, v in allocated.items()}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))

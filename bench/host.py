"""What machine a measurement was made on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from bench.reader import how
from ksm._core import fingerprint_forms
from ksm.calibrate import processor

PACKAGES = ("ksm", "numpy", "xxhash", "pandas", "polars", "duckdb")


def description() -> dict[str, str | int | float]:
    """The machine, its system and the versions, for people and JSON."""
    return {
        "processor": processor(),
        "cpus": os.cpu_count() or 1,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES if _version(name)),
        "fingerprint": fingerprint_forms()[0],
        "plain_reading": how(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def sentence(found: dict[str, str | int | float]) -> str:
    """The machine in a line."""
    return (
        f"{found['processor']}, {found['cpus']} CPUs, {found['memory_gib']} GiB; {found['system']} "
        f"({found['architecture']}); Python {found['python']}; {found['packages']}"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

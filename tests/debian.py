"""Debian packages without installing them: downloaded by apt-get, unpacked into a cache."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

CACHE = Path(os.environ.get("KSM_GUEST_CACHE", "~/.cache/ksm-guests")).expanduser()
TOOLS = ("apt-get", "apt-cache", "dpkg")


class NoPackage(Exception):
    """A package cannot be had here; the message says why."""


def unpacked(package: str) -> Path:
    """The directory with a package's files; for the name of a kernel series, of the newest kernel in it.

    It is kept: the next time needs no network.
    """
    kept = CACHE / package
    if kept.is_dir():
        return kept
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise NoPackage(f"{package}: no {', '.join(missing)}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        _run("apt-get", "download", "-qq", _meant(package), cwd=scratch)
        for archive in Path(scratch).glob("*.deb"):
            _run("dpkg", "-x", archive.name, "files", cwd=scratch)
        try:
            Path(scratch, "files").rename(kept)
        except OSError:  # somebody else was faster
            if not kept.is_dir():
                raise
    return kept


def _meant(package: str) -> str:
    """linux-image-cloud-amd64 only names the package that has the kernel."""
    depends = _run("apt-cache", "depends", package)
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    return found[1] if found else package


def _run(*command: str, cwd: str | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise NoPackage(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout

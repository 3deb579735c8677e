"""What every test may use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

import ksm
from ksm.linux import Host

# Machines that run tests are shared: how long one example takes says nothing.
hypothesis.settings.register_profile("ksm", deadline=None, print_blob=True)
hypothesis.settings.load_profile("ksm")

# A shell's background jobs ignore Ctrl-C, and so would all that they start: tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def ksm_lock() -> Iterator[None]:
    """For tests that mark memory: it would be in the counters of those that drive the kernel's KSM, which root may."""
    if sys.platform == "linux" and os.geteuid() == 0:
        with Host().lock():
            yield
    else:
        yield


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[[str], str]:
    """Run a script in a fresh interpreter that sees the same ksm, from an empty directory; gives its output."""

    def run(script: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(Path(ksm.__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run

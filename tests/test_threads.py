"""How many threads a piece of work is given."""

from __future__ import annotations

import os

import pytest

from ksm.threads import threads_for, usable_cpus


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_affinity_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cpus)})
        assert usable_cpus() == threads_for(None) == 1
    finally:
        os.sched_setaffinity(0, cpus)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cpus() == threads_for(None) == os.cpu_count()


def test_as_many_as_asked() -> None:
    assert threads_for(1) == 1 and threads_for(1000) == 1000
    for asked in (0, -1):
        with pytest.raises(ValueError, match=f"{asked} threads cannot work: one or more are needed"):
            threads_for(asked)

"""A plan against the kernel itself: real workers, merged by the real ksmd at its own pace."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import numpy as np
import pytest

import ksm
from ksm.cli import demo
from ksm.cli.crew import KINDS, Crew
from ksm.estimate import snapshots
from ksm.linux import Host
from ksm.plan.confirm import _load
from ksm.plan.contents import Table
from ksm.plan.growth import Growth, Rules, Samples
from ksm.plan.pace import Pace, reached

PAGE = 4096
SCAN = {"pages_to_scan": "1500", "sleep_millisecs": "20", "smart_scan": "1", "use_zero_pages": "0"}
WHY_NOT = demo.cannot_verify(Host())
if WHY_NOT is None and not {*SCAN, "pages_scanned"} <= set(Host().ksm.names()):
    WHY_NOT = "this kernel has no pages_scanned, or no smart scan"

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"the kernel cannot be asked: {WHY_NOT}")


@contextlib.contextmanager
def tunables(host: Host) -> Iterator[None]:
    """The host's KSM alone, with ours; everything as before at the end."""
    files = host.ksm
    with host.lock():
        saved = {name: files.read(name) for name in SCAN}
        assert files.pages_shared == 0, "something else is merged on this host"
        try:
            files.write("run", "2")  # which sets full_scans back
            files.write("run", "0")
            for name, text in SCAN.items():
                files.write(name, text)
            yield
        finally:
            files.write("run", "2")
            files.write("run", "0")
            for name, text in saved.items():
                files.write(name, text)


def test_frames_and_time_are_those_of_the_kernel() -> None:
    """Ten workers planned from three of each kind; ksmd then merges all ten."""
    host = Host()
    known = ksm.sysfs.profile("6.18")
    with tunables(host), Crew(10) as crew:
        crew.work()
        taken = [snapshots([f"pid:{worker.pid}"], marked_only=True)[0] for worker in crew.workers]
        kinds = [KINDS.index(worker.name.split()[0]) for worker in crew.workers]
        files = host.ksm
        pages, cpu, visited = sum(each.pages for each in taken), host.ksmd_cpu_seconds(), files.pages_scanned
        began = time.monotonic()
        files.write("run", "1")
        looks = [(0.0, 0.0, 0.0)]
        while time.monotonic() - began < 40 and (len(looks) < 60 or looks[-1][2] > looks[-60][2]):
            time.sleep(0.05)
            now = time.monotonic() - began
            looks.append((now, float(files.pages_scanned - visited), float(files.pages_sharing)))
            if files.full_scans < 2:
                busy = host.ksmd_cpu_seconds() - cpu
        files.write("run", "0")
    seconds, visits, sharing = np.array(looks).T
    frames = pages - sharing[-1]

    order = sorted(range(6), key=lambda n: kinds[n])
    samples = Samples(Table.of([taken[n] for n in order], sorted(kinds[:6])))
    growth = Growth(samples, Rules(), np.array([5, 5]))
    counts = np.array([[5, 5]])
    predicted = float(growth.frames(counts)[0][0])
    wide = float(growth.upward(growth.replicates(counts)[0], counts, 0.95)[0])
    assert predicted == pytest.approx(frames, rel=0.03)
    assert abs(predicted - frames) <= wide + 0.002 * frames  # the interval, and what its readers changed meanwhile

    pace = Pace(int(SCAN["pages_to_scan"]), int(SCAN["sleep_millisecs"]), known.smart_scan)
    load = _load([ksm.Fingerprints(each.words()) for each in taken], Rules(), PAGE)
    closed, merged, cost = pace.cold(load)
    visited_by = np.concatenate(([0.0, load.pages[-1]], load.pages[-1] + load.pages[1:]))
    for share in (0.5, 0.9, 0.99):
        expected = reached(visited_by, merged, share)
        assert reached(visits, sharing, share) == pytest.approx(expected, rel=0.03)  # ksmd's own clock
        # by the wall it is not sooner, and later where others want its CPU
        assert 0.8 < reached(seconds, sharing, share) / reached(closed, merged, share) < 6
    assert 1 / 3 < busy / cost[-1] < 3  # the cost of another machine

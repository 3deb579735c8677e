"""Distributed equals single: from one process, a local cluster and three hosts, with and without faults."""

from __future__ import annotations

import pytest

from tests.equal import Run, digest, runs
from tests.fleets import can_make_namespaces


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    if why := can_make_namespaces():
        pytest.skip(why)
    return {run.how: run for run in runs(tmp_path_factory.mktemp("equal"))}


DROPPED = "vm0.pages.parquet dropped: the same file as again.pages.parquet: counted once"
LEFT_OUT = "vm3.pages.parquet left out: damaged: could not verify page integrity"
FLAGGED = {
    "one process": "",
    "one process, 24 ranges": "",
    "local cluster": "",
    "local cluster, Dask DataFrame": "",
    "three hosts": "",
    "three hosts, a worker killed": "killed after 12 of 24 ranges",
    "three hosts, a file twice": DROPPED,
    "three hosts, a file damaged": f"{LEFT_OUT}; partial",
    "three hosts, both": f"{DROPPED}; {LEFT_OUT}; partial",
}


@pytest.mark.parametrize("how", FLAGGED)
def test_the_same_figures_and_what_is_flagged(found: dict[str, Run], how: str) -> None:
    assert found[how].equal
    assert found[how].flagged == FLAGGED[how]


def test_all_ways_are_there_and_figures_can_differ(found: dict[str, Run]) -> None:
    assert list(found) == list(FLAGGED)
    whole, fewer = found["one process"].answer, found["three hosts, both"].answer
    assert 0 < fewer.total.saved_bytes < whole.total.saved_bytes and fewer.total.vms == whole.total.vms - 1
    assert digest(fewer) != digest(whole)

"""Each kernel and path on its own: `python -m pytest bench -n 0 --benchmark-enable --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import ksm
from bench.kernel import machine
from bench.reader import read
from ksm._core import Settling, fingerprint_forms
from ksm.cli import main
from ksm.pages import zero_words
from ksm.patterns import Pages, filled

PAGE = 4096
N = 1 << 15  # pages: 128 MiB, beyond any cache


@pytest.fixture(scope="module", params=["guest", "unique", "copies"])
def pages(request: pytest.FixtureRequest) -> Pages:
    return filled(request.param, N)


@pytest.fixture(scope="module")
def guest() -> Pages:
    return filled("guest", N)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_plain_reading(benchmark: BenchmarkFixture, guest: Pages, threads: int, ahead: bool) -> None:
    benchmark(read, guest, threads, ahead)


@pytest.mark.parametrize("form", fingerprint_forms())
def test_fingerprint_forms(benchmark: BenchmarkFixture, guest: Pages, form: str) -> None:
    assert len(benchmark(ksm.fingerprint, guest, 1, variant=form)) == N


@pytest.mark.parametrize("threads", [1, 2])
def test_fingerprint(benchmark: BenchmarkFixture, pages: Pages, threads: int) -> None:
    assert len(benchmark(ksm.fingerprint, pages, threads)) == N


def test_fingerprint_zeros(benchmark: BenchmarkFixture) -> None:
    zeros = np.zeros((N, PAGE), np.uint8)
    zeros[:] = 0  # touched
    assert benchmark(ksm.fingerprint, zeros, 1).zeros().all()


def test_index(benchmark: BenchmarkFixture, pages: Pages) -> None:
    words = ksm.fingerprint(pages).words

    def settle() -> int:
        counting = Settling(256, 1, N)
        counting.visit(0, words, None, *map(int, zero_words()))
        return counting.counts()[0]["pages"]

    assert benchmark(settle) == N


@pytest.mark.parametrize("threads", [1, 2])
def test_estimate(benchmark: BenchmarkFixture, pages: Pages, threads: int) -> None:
    assert benchmark(ksm.estimate, [pages], threads=threads).pages == N


def scanned(passes: int, pages: Any, index: str = "hash") -> ksm.Machine:
    found = machine(pages, index)
    for _ in range(passes):
        found.ksmd.scan()
    return found


def rounds(benchmark: BenchmarkFixture, passes: int, pages: Any, index: str = "hash") -> None:
    """Time the pass after so many, on a new machine each round."""

    def setup() -> tuple[tuple[ksm.Machine], dict[str, Any]]:
        return (scanned(passes, pages, index),), {}

    assert benchmark.pedantic(lambda found: found.ksmd.scan(), setup=setup, rounds=5) == N


def test_populate(benchmark: BenchmarkFixture, pages: Pages) -> None:
    assert benchmark(machine, pages).frames == N


@pytest.mark.parametrize("passes", [0, 1, 2], ids=["first", "second", "still"])
def test_pass(benchmark: BenchmarkFixture, pages: Pages, passes: int) -> None:
    rounds(benchmark, passes, pages)


@pytest.mark.parametrize("passes", [0, 1, 2], ids=["first", "second", "still"])
def test_pass_with_trees(benchmark: BenchmarkFixture, guest: Pages, passes: int) -> None:
    rounds(benchmark, passes, guest, "tree")


@pytest.mark.parametrize("passes", [0, 1, 2], ids=["first", "second", "still"])
def test_pass_over_fingerprints(benchmark: BenchmarkFixture, guest: Pages, passes: int) -> None:
    rounds(benchmark, passes, ksm.fingerprint(guest))


def test_writes(benchmark: BenchmarkFixture, guest: Pages) -> None:
    """A write to every 64th page of settled memory, each the copy of a merged or of an own frame."""

    def setup() -> tuple[tuple[ksm.Process], dict[str, Any]]:
        return (scanned(3, guest).processes["process-1"],), {}

    def write(process: ksm.Process) -> None:
        start = process.vmas[0].start * PAGE
        for at in range(0, N, 64):
            process.write(start + at * PAGE, b"new")

    benchmark.pedantic(write, setup=setup, rounds=5)


def test_quiet_hours(benchmark: BenchmarkFixture, guest: Pages) -> None:
    """An hour of simulated time over memory that has settled."""

    def setup() -> tuple[tuple[ksm.Machine], dict[str, Any]]:
        return (scanned(3, guest),), {}

    benchmark.pedantic(lambda found: found.run_for(3600), setup=setup, rounds=3)


@pytest.fixture
def command(tmp_path: Any, guest: Pages) -> Callable[..., int]:
    file = tmp_path / "guest.raw"
    guest.tofile(file)
    return lambda name, *options: main([name, str(file), *options])


@pytest.mark.parametrize(("name", "options"), [("estimate", ()), ("simulate", ("--for", "60s"))])
def test_command(benchmark: BenchmarkFixture, command: Callable[..., int], name: str, options: tuple[str, ...]) -> None:
    assert benchmark.pedantic(command, args=(name, "--json", *options), rounds=3) == 0

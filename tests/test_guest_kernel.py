"""The engine and the kernels of guests with two NUMA nodes, counter for counter; and the guests themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel import boot, compare
from tests.kernel.comparison import opponent
from tests.kernel.guest import Judge, booted
from tests.kernel.program import generate

KERNEL = "linux-image-6.12-cloud-amd64"
KERNELS = {"6.1": "linux-image-cloud-amd64", "6.12": KERNEL}
NODES = 2
SEEDS = (0, 1, 2, 7, 8, 15, 18, 28, 31, 33, 86, 115, 122, 152)  # most of them told something when they were first run


@pytest.fixture(scope="module", params=KERNELS)
def judge(request: pytest.FixtureRequest) -> Iterator[Judge]:
    kernel = KERNELS[request.param]
    reason = boot.why_not(kernel)
    if reason:
        pytest.skip(reason)
    with booted(kernel, NODES) as judge:
        assert judge.release.startswith(f"{request.param}.")
        yield judge


def test_the_guest_has_two_nodes(judge: Judge) -> None:
    assert judge.nodes == NODES


@pytest.mark.parametrize("seed", SEEDS)
def test_programs_about_numa_agree(judge: Judge, seed: int) -> None:
    program = generate(seed, style="numa", nodes=NODES)
    steps = list(judge.run(program))
    for index in ("hash", "tree"):
        report = compare.difference(program, lambda _: (step for step in steps), opponent(index, judge.release))
        if report:
            pytest.fail(f"index {index}, {report}\n" + "\n".join(map(json.dumps, program["ops"])), pytrace=False)


def test_programs_about_numa_migrate_what_is_merged() -> None:
    ops = [op for seed in SEEDS for op in generate(seed, style="numa", nodes=NODES)["ops"]]
    assert {op[5] for op in ops if op[0] == "mmap"} == set(range(NODES))
    assert sum(op[0] == "migrate" for op in ops) > 100
    assert ops.count(["sysfs", "merge_across_nodes", "0"]) > len(SEEDS) // 2


def test_what_goes_wrong_in_the_guest_is_told(judge: Judge) -> None:
    with pytest.raises(RuntimeError, match=r"in the guest:(?s:.*)KeyError: 'no such operation'"):
        list(judge.run({"seed": 0, "swap": False, "ops": [["spawn", "a"], ["no such operation", "a"]]}))
    assert next(iter(judge.run({"seed": 0, "swap": False, "ops": [["scan"]]})))[1]["full_scans"] == 0


def test_a_guest_that_ends_shows_its_last_words(tmp_path: Path) -> None:
    reason = boot.why_not(KERNEL)
    if reason:
        pytest.skip(reason)
    root = tmp_path / "root"
    root.mkdir()
    boot.Tree(root).archive(tmp_path / "initramfs", "echo that was all")
    with boot.Guest(boot.kernel_image(KERNEL), tmp_path / "initramfs") as guest:
        with pytest.raises(RuntimeError, match=r"the guest has ended(?s:.*)that was all"):
            guest.receive()
        assert not guest.running
    assert not guest.running


def test_modules_come_after_those_they_need() -> None:
    reason = boot.why_not(KERNEL)
    if reason:
        pytest.skip(reason)
    names = list(boot.modules(KERNEL, "zram", "there is no such module"))
    assert names.index("zsmalloc") < names.index("zram")

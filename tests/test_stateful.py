"""The plain model and the machine with either index, side by side through every operation."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.lockstep import Lockstep, check_every, generate, label, variants

ARENA_PAGES = 24
PAGES = st.integers(0, ARENA_PAGES - 1)
COUNTS = st.integers(1, ARENA_PAGES)
CONTENTS = st.integers(0, 12)
NODES = st.integers(0, 1)


class Machines(RuleBasedStateMachine):
    """Any operation on any process, in any order; all must agree after each."""

    def __init__(self) -> None:
        super().__init__()
        self.lockstep = Lockstep()
        self.born = 0

    @initialize(nodes=st.sampled_from([1, 1, 2]), swap=st.booleans(), ram=st.sampled_from([None, None, None, 40]))
    def build(self, nodes: int, swap: bool, ram: int | None) -> None:
        """One or two NUMA nodes, with or without swap, with or without a limit of RAM."""
        self.lockstep = Lockstep(nodes=nodes, swap=swap, ram=ram)
        self.step("sysfs", "run", "1")
        self.newborn("spawn", 0)

    def step(self, *op: object) -> None:
        """One operation everywhere; raises when the machines disagree."""
        self.lockstep.step(list(op))

    def process(self, at: int) -> str:
        """One of the live processes."""
        names = self.lockstep.names
        return names[at % len(names)]

    def newborn(self, how: str, at: int) -> None:
        """A new process, alone or by fork."""
        name = f"p{self.born}"
        self.born += 1
        if how == "fork" and self.lockstep.names:
            self.step("fork", self.process(at), name)
            return
        self.step("spawn", name)
        self.step("mmap", name, 0, ARENA_PAGES, 3, at % self.lockstep.nodes)
        if how == "prctl":
            self.step("prctl", name, 67, 1)
        else:
            self.step("madvise", name, 0, ARENA_PAGES, 12)

    # processes

    @precondition(lambda self: len(self.lockstep.names) < 4)
    @rule(how=st.sampled_from(["spawn", "prctl", "fork", "fork"]), at=PAGES)
    def appear(self, how: str, at: int) -> None:
        self.newborn(how, at)

    @precondition(lambda self: len(self.lockstep.names) > 1)
    @rule(at=PAGES)
    def exit(self, at: int) -> None:
        self.step("exit", self.process(at))

    @rule(at=PAGES, arguments=st.sampled_from([(67, 1), (67, 1), (67, 0), (67, 2), (68,), (68, 1), (67, 1, 1), (1,)]))
    def prctl(self, at: int, arguments: tuple[int, ...]) -> None:
        self.step("prctl", self.process(at), *arguments)

    # memory

    @rule(at=PAGES, pages=st.lists(PAGES, min_size=1, max_size=10), content=CONTENTS, more=st.integers(0, 3))
    def write(self, at: int, pages: list[int], content: int, more: int) -> None:
        for i, page in enumerate(pages):
            self.step("write", self.process(at), page, (content + i * more) % 13)

    @rule(at=PAGES, page=PAGES, content=CONTENTS)
    def touch(self, at: int, page: int, content: int) -> None:
        self.step("write", self.process(at), page, content, 100)

    @rule(at=PAGES, page=PAGES)
    def read(self, at: int, page: int) -> None:
        self.step("read", self.process(at), page)

    @rule(at=PAGES, page=PAGES, count=COUNTS, advice=st.sampled_from([12, 12, 13, 4, 8, 21, 99]))
    def madvise(self, at: int, page: int, count: int, advice: int) -> None:
        self.step("madvise", self.process(at), page, count, advice)

    @rule(at=PAGES, page=PAGES, count=COUNTS, prot=st.sampled_from([3, 3, 1, 0]), node=NODES)
    def mmap(self, at: int, page: int, count: int, prot: int, node: int) -> None:
        self.step("mmap", self.process(at), page, count, prot, node % self.lockstep.nodes)

    @rule(at=PAGES, page=PAGES, count=st.integers(1, 4))
    def munmap(self, at: int, page: int, count: int) -> None:
        self.step("munmap", self.process(at), page, count)

    @rule(at=PAGES, page=PAGES, count=COUNTS, prot=st.sampled_from([0, 1, 3]))
    def mprotect(self, at: int, page: int, count: int, prot: int) -> None:
        self.step("mprotect", self.process(at), page, count, prot)

    @rule(at=PAGES, page=PAGES, count=st.integers(1, 6), to=st.integers(0, 47), flags=st.sampled_from([3, 7]))
    def move(self, at: int, page: int, count: int, to: int, flags: int) -> None:
        self.step("mremap", self.process(at), page, count, count, flags, to)

    @rule(at=PAGES, page=PAGES, old=st.integers(1, 6), new=st.integers(1, 6))
    def resize(self, at: int, page: int, old: int, new: int) -> None:
        self.step("mremap", self.process(at), page, old, new, 0, 0)

    @precondition(lambda self: self.lockstep.nodes > 1)
    @rule(at=PAGES, page=PAGES, count=COUNTS, node=NODES)
    def migrate(self, at: int, page: int, count: int, node: int) -> None:
        self.step("migrate", self.process(at), page, count, node)

    @rule()
    def reclaim(self) -> None:
        self.step("reclaim")

    # ksmd

    @rule(n=st.integers(1, 3))
    def scan(self, n: int) -> None:
        for _ in range(n):
            self.step("scan")

    @rule(k=st.integers(1, 12))
    def scan_pages(self, k: int) -> None:
        self.step("scan_pages", k)

    @rule(
        setting=st.sampled_from(
            [
                ("run", "0"),
                ("run", "1"),
                ("run", "2"),
                ("max_page_sharing", "2"),
                ("max_page_sharing", "3"),
                ("max_page_sharing", "256"),
                ("merge_across_nodes", "0"),
                ("merge_across_nodes", "1"),
                ("use_zero_pages", "0"),
                ("use_zero_pages", "1"),
                ("smart_scan", "0"),
                ("smart_scan", "1"),
                ("stable_node_chains_prune_millisecs", "0"),
                ("stable_node_chains_prune_millisecs", "100000000"),
                ("pages_to_scan", "-1"),
            ]
        )
    )
    def tune(self, setting: tuple[str, str]) -> None:
        self.step("sysfs", *setting)
        if setting[0] == "run":
            self.step("sysfs", "run", "1")


def test_stateful() -> None:
    """Hypothesis looks for the shortest disagreement."""
    run_state_machine_as_test(
        Machines,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("variant", variants(), ids=label)
@pytest.mark.parametrize("seed", range(24))
def test_random_programs(seed: int, variant: dict[str, object]) -> None:
    """Long programs by seed, in every variant of the machine."""
    Lockstep(**variant, check_every=check_every(seed)).run(generate(seed, **variant))  # type: ignore[arg-type]


def test_a_quiet_page_whose_frame_merges_through_a_fork() -> None:
    Lockstep().run([
        ["sysfs", "run", "1"], ["sysfs", "max_page_sharing", "2"], ["spawn", "p0"], ["mmap", "p0", 0, 12, 3],
        ["madvise", "p0", 0, 12, 12], ["fork", "p0", "p2"], ["poke", "p0", 8, 1, 0], ["scan"], ["scan"],
        ["fork", "p0", "p3"], ["scan"], ["fill", "p2", 9, [0, 0, 0]], ["scan"], ["scan"], ["scan_pages", 22],
    ])  # fmt: skip

"""The published tests that others hold KSM to: the kernel's selftests and LTP, as cases for any executor.

`python -m tests.published` prints what each case expects and what the machine and the running kernel give.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kernel.real import KernelSession, RealMachine, why_not
from tests.model import ModelMachine

PAGE = 4096
AT = 0x100000000000
MERGEABLE, UNMERGEABLE, DONTNEED = 12, 13, 4
SET_MEMORY_MERGE, GET_MEMORY_MERGE = 67, 68
MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """One figure of a case."""

    what: str
    expected: object
    got: object

    @property
    def ok(self) -> bool:
        """Whether the figure is as published (a callable expectation is a bound)."""
        return bool(self.expected(self.got)) if callable(self.expected) else self.expected == self.got


Rows = Iterator[Row]


@dataclass(frozen=True)
class Case:
    """A published test: `run` takes a fresh machine whose `run` is 0 and yields its figures."""

    name: str
    run: Callable[[Any], Rows]
    nodes: int = 1  # NUMA nodes that it needs
    pages: int = 0  # how many pages it fills, when they are many
    borrows: bool = False  # maps images, which only the machine can
    shrunk: Callable[[Any], Rows] | None = None  # the same at a size that the kernel steps through quickly


def count(m: Any, name: str) -> int:
    """One counter."""
    return int(m.ksm.read(name))


def start(m: Any, **tunables: int) -> None:
    """Set tunables, then switch ksmd on."""
    for name, value in {"smart_scan": 0, **tunables}.items():
        m.ksm.write(name, str(value))
    m.ksm.write("run", "1")


def passes(m: Any, n: int = 2) -> None:
    """Some whole passes."""
    for _ in range(n):
        m.ksmd.scan()


def filled(m: Any, name: str, pages: int, content: bytes = b"*", node: int = 0, at: int = AT) -> Any:
    """A process with so many equal pages, marked mergeable."""
    p = m.processes.get(name) or m.spawn(name)
    if node:
        p.mmap(pages * PAGE, addr=at, node=node)
    else:
        p.mmap(pages * PAGE, addr=at)
    p.madvise(at, pages * PAGE, MERGEABLE)
    p.write(at, content * (pages * PAGE))
    return p


# the kernel's selftests, ksm_tests


def formula(duplicates: int, limit: int) -> tuple[int, int]:
    """Shared and sharing for equal pages under a limit, as the selftest computes them.

    >>> formula(10, 4), formula(8, 4), formula(9, 4)
    ((3, 7), (2, 6), (2, 6))
    """
    if duplicates % limit in (0, 1):
        return duplicates // limit, duplicates // limit * (limit - 1)
    shared = duplicates // limit + 1
    return shared, duplicates - shared


def merge(duplicates: int, limit: int) -> Callable[[Any], Rows]:
    """check_ksm_merge: equal pages, two passes."""

    def run(m: Any) -> Rows:
        start(m, max_page_sharing=limit)
        filled(m, "a", duplicates)
        passes(m)
        shared, sharing = formula(duplicates, limit)
        yield Row("pages_shared", shared, count(m, "pages_shared"))
        yield Row("pages_sharing", sharing, count(m, "pages_sharing"))

    return run


def unmerge_by_write(m: Any) -> Rows:
    """check_ksm_unmerge: one byte written to each of two merged pages."""
    start(m)
    p = filled(m, "a", 2)
    passes(m)
    yield Row("pages_shared, merged", 1, count(m, "pages_shared"))
    p.write(AT, b"e")
    p.write(AT + PAGE, b"f")
    passes(m, 1)
    yield Row("pages_shared", 0, count(m, "pages_shared"))
    yield Row("pages_sharing", 0, count(m, "pages_sharing"))


def zero_page_merge(use_zero_pages: int, n: int = 10) -> Callable[[Any], Rows]:
    """check_ksm_zero_page_merge."""

    def run(m: Any) -> Rows:
        start(m, use_zero_pages=use_zero_pages)
        filled(m, "a", n, b"\0")
        passes(m)
        shared, sharing = (0, 0) if use_zero_pages else (1, n - 1)
        yield Row("pages_shared", shared, count(m, "pages_shared"))
        yield Row("pages_sharing", sharing, count(m, "pages_sharing"))

    return run


def numa_merge(across: int) -> Callable[[Any], Rows]:
    """check_ksm_numa_merge: two equal pages on two nodes."""

    def run(m: Any) -> Rows:
        start(m, merge_across_nodes=across, max_page_sharing=2)
        filled(m, "a", 1, node=0)
        filled(m, "a", 1, node=1, at=AT + PAGE)
        passes(m)
        yield Row("pages_shared", across, count(m, "pages_shared"))
        yield Row("pages_sharing", across, count(m, "pages_sharing"))

    return run


# the kernel's selftests, ksm_functional_tests

FUNCTIONAL_PAGES = 2 * MIB // PAGE


def merged(m: Any, content: bytes = b"\xcf", pages: int = FUNCTIONAL_PAGES, **tunables: int) -> Any:
    """A process whose pages have all merged."""
    start(m, **tunables)
    p = filled(m, "a", pages, content)
    passes(m)
    return p


def merging(p: Any) -> int:
    """The process's merged pages."""
    return int(p.ksm_stat["ksm_merging_pages"])


def still_merged(m: Any, p: Any) -> int:
    """What the process's own counter says once ksmd has passed again."""
    passes(m, 1)
    return merging(p)


def unmerge(m: Any) -> Rows:
    """test_unmerge."""
    p = merged(m)
    yield Row("ksm_merging_pages, merged", FUNCTIONAL_PAGES, merging(p))
    p.madvise(AT, FUNCTIONAL_PAGES * PAGE, UNMERGEABLE)
    yield Row("ksm_merging_pages", 0, still_merged(m, p))


def unmerge_discarded(m: Any) -> Rows:
    """test_unmerge_discarded: half is thrown away first."""
    p = merged(m)
    p.madvise(AT, FUNCTIONAL_PAGES // 2 * PAGE, DONTNEED)
    p.madvise(AT, FUNCTIONAL_PAGES * PAGE, UNMERGEABLE)
    yield Row("ksm_merging_pages", 0, still_merged(m, p))


def unmerge_zero_pages(m: Any) -> Rows:
    """test_unmerge_zero_pages."""
    n = FUNCTIONAL_PAGES
    p = merged(m, b"\0", use_zero_pages=1)
    yield Row("ksm_zero_pages, placed", n, count(m, "ksm_zero_pages"))
    p.madvise(AT, n // 2 * PAGE, UNMERGEABLE)
    yield Row("ksm_zero_pages, half unmerged", n // 2, count(m, "ksm_zero_pages"))
    for page in range(n // 2, n):
        p.write(AT + page * PAGE, b"\1")
    yield Row("ksm_zero_pages, the rest written", 0, count(m, "ksm_zero_pages"))


def unmerge_prot_none(m: Any) -> Rows:
    """test_prot_none: merged memory that nobody may touch is unmerged."""
    p = merged(m)
    p.mprotect(AT, FUNCTIONAL_PAGES * PAGE, 0)
    p.madvise(AT, FUNCTIONAL_PAGES * PAGE, UNMERGEABLE)
    yield Row("ksm_merging_pages", 0, still_merged(m, p))


def refused(call: Callable[..., Any], *args: int) -> int:
    """The errno with which a call is refused, 0 if it is not."""
    try:
        call(*args)
    except OSError as error:
        return error.errno or -1
    return 0


def prctl(m: Any) -> Rows:
    """test_prctl: set, get, clear."""
    p = m.spawn("a")
    yield Row("set", 0, p.prctl(SET_MEMORY_MERGE, 1))
    yield Row("get", 1, p.prctl(GET_MEMORY_MERGE))
    yield Row("set with a third argument", 22, refused(p.prctl, SET_MEMORY_MERGE, 1, 1))
    yield Row("clear", 0, p.prctl(SET_MEMORY_MERGE, 0))
    yield Row("get, cleared", 0, p.prctl(GET_MEMORY_MERGE))


def prctl_fork(m: Any) -> Rows:
    """test_prctl_fork: the child inherits it."""
    p = m.spawn("a")
    p.prctl(SET_MEMORY_MERGE, 1)
    child = p.fork("b")
    yield Row("get in the child", 1, child.prctl(GET_MEMORY_MERGE))
    yield Row("ksm_merge_any of the child", True, child.ksm_stat["ksm_merge_any"])


def prctl_unmerge(m: Any) -> Rows:
    """test_prctl_unmerge: clearing unmerges."""
    start(m)
    p = m.spawn("a")
    p.prctl(SET_MEMORY_MERGE, 1)
    p.mmap(FUNCTIONAL_PAGES * PAGE, addr=AT)
    p.write(AT, b"\xcf" * (FUNCTIONAL_PAGES * PAGE))
    passes(m)
    yield Row("ksm_merging_pages, merged", lambda n: n >= FUNCTIONAL_PAGES, merging(p))
    p.prctl(SET_MEMORY_MERGE, 0)
    yield Row("ksm_merging_pages", 0, still_merged(m, p))


def fork_merging_pages(m: Any) -> Rows:
    """test_fork_ksm_merging_page_count: a child starts at 0."""
    p = merged(m)
    child = p.fork("b")
    yield Row("ksm_merging_pages of the child", 0, merging(child))


# LTP


def ltp_same_memory(size: int) -> Callable[[Any], Rows]:
    """ksm01 to ksm06's create_same_memory: three processes, filled again and again."""
    pages = size // PAGE
    total = 3 * pages

    def run(m: Any) -> Rows:
        start(m, max_page_sharing=total, merge_across_nodes=1)

        def figures(stage: str, shared: int, sharing: int, unshared: int = 0) -> Rows:
            for _ in range(3):
                m.ksmd.scan()
            for name, expected in [("shared", shared), ("sharing", sharing), ("volatile", 0), ("unshared", unshared)]:
                yield Row(f"pages_{name}, {stage}", expected, count(m, f"pages_{name}"))

        def fill(letters: bytes) -> None:
            for at, letter in enumerate(letters):
                p = m.processes.get(f"child{at}")
                if p is None:
                    p = m.spawn(f"child{at}")
                    p.mmap(size, addr=AT)
                    p.madvise(AT, size, MERGEABLE)
                p.write(AT, bytes([letter]) * size)

        fill(b"caa")
        yield from figures("c a a", 2, total - 2)
        fill(b"cba")
        yield from figures("c b a", 3, total - 3)
        fill(b"ddd")
        yield from figures("d d d", 1, total - 1)
        m.processes["child1"].write(AT + size - 1, b"e")
        yield from figures("d d d, one byte differs", 1, total - 2, 1)
        m.ksm.write("run", "2")
        for name in ("shared", "sharing", "unshared", "volatile"):
            yield Row(f"pages_{name}, run=2", 0, count(m, f"pages_{name}"))
        m.ksm.write("run", "0")

    return run


def ltp_same_images(size: int) -> Callable[[Any], Rows]:
    """The same fills as memory that the machine borrows (`mmap(image)`), each stage mapped afresh."""
    pages = size // PAGE
    total = 3 * pages

    def run(m: Any) -> Rows:
        import numpy as np

        start(m, max_page_sharing=total, merge_across_nodes=1)
        buffer = {letter: np.full(size, letter, np.uint8) for letter in b"abcd"}
        odd = buffer[ord("d")].copy()
        odd[-1] = ord("e")
        d = buffer[ord("d")]
        stages = [
            ("c a a", [buffer[letter] for letter in b"caa"], (2, total - 2, 0)),
            ("c b a", [buffer[letter] for letter in b"cba"], (3, total - 3, 0)),
            ("d d d", [d, d, d], (1, total - 1, 0)),
            ("d d d, one byte differs", [d, odd, d], (1, total - 2, 1)),
        ]
        for stage, images, (shared, sharing, unshared) in stages:
            for at, image in enumerate(images):
                p = m.processes.get(f"child{at}") or m.spawn(f"child{at}")
                p.mmap(image, addr=AT)
                p.madvise(AT, size, MERGEABLE)
            passes(m)
            for name, want in [("shared", shared), ("sharing", sharing), ("volatile", 0), ("unshared", unshared)]:
                yield Row(f"pages_{name}, {stage}", want, count(m, f"pages_{name}"))
        m.ksm.write("run", "2")
        m.ksm.write("run", "0")
        for name in ("shared", "sharing", "unshared", "volatile"):
            yield Row(f"pages_{name}, run=2", 0, count(m, f"pages_{name}"))

    return run


def ltp_numa(nodes: int, n: int, across: int) -> Callable[[Any], Rows]:
    """test_ksm_merge_across_nodes: n equal pages on each of the nodes."""

    def run(m: Any) -> Rows:
        start(m, merge_across_nodes=across, max_page_sharing=n * nodes)
        p = m.spawn("a")
        for node in range(nodes):
            at = AT + node * n * PAGE
            p.mmap(n * PAGE, addr=at, node=node)
            p.madvise(at, n * PAGE, MERGEABLE)
            p.write(at, b"a" * (n * PAGE))
        passes(m)
        shared = 1 if across else nodes
        yield Row("pages_shared", shared, count(m, "pages_shared"))
        yield Row("pages_sharing", n * nodes - shared, count(m, "pages_sharing"))

    return run


def ltp_smart_scan(m: Any) -> Rows:
    """ksm07: a page that nobody shares is skipped in at least half of the passes."""
    start(m, smart_scan=1)
    filled(m, "a", 1, b"a")
    n = 20
    before = count(m, "full_scans")
    passes(m, n)
    yield Row("full_scans", n, count(m, "full_scans") - before)
    yield Row("pages_skipped, at least half", lambda skipped: skipped >= n // 2, count(m, "pages_skipped"))


LTP_SIZE = 128 * MIB

CASES = [
    *(
        Case(f"selftest-merge-{d}-by-{limit}", merge(d, limit))
        for d, limit in [(2, 256), (10, 3), (9, 3), (100, 10), (101, 10), (109, 10), (600, 256), (2, 2), (3, 2), (5, 2)]
    ),
    Case("selftest-unmerge-by-write", unmerge_by_write),
    *(Case(f"selftest-zero-page-merge-{on}", zero_page_merge(on)) for on in (0, 1)),
    *(Case(f"selftest-numa-across-{across}", numa_merge(across), nodes=2) for across in (0, 1)),
    Case("selftest-unmerge", unmerge, pages=FUNCTIONAL_PAGES),
    Case("selftest-unmerge-discarded", unmerge_discarded, pages=FUNCTIONAL_PAGES),
    Case("selftest-unmerge-zero-pages", unmerge_zero_pages, pages=FUNCTIONAL_PAGES),
    Case("selftest-unmerge-prot-none", unmerge_prot_none, pages=FUNCTIONAL_PAGES),
    Case("selftest-prctl", prctl),
    Case("selftest-prctl-fork", prctl_fork),
    Case("selftest-prctl-unmerge", prctl_unmerge, pages=FUNCTIONAL_PAGES),
    Case("selftest-fork-merging-pages", fork_merging_pages, pages=FUNCTIONAL_PAGES),
    Case(
        "ltp-same-memory",
        ltp_same_memory(LTP_SIZE),
        pages=3 * LTP_SIZE // PAGE,
        # 3 x 128 MiB at the kernel's pace of a page or two a microsecond, filled four times over, is a matter of
        # seconds, but every byte of it goes to the workers through a pipe: 3 x 2 MiB there
        shrunk=ltp_same_memory(2 * MIB),
    ),
    Case("ltp-same-memory-borrowed", ltp_same_images(LTP_SIZE), pages=3 * LTP_SIZE // PAGE, borrows=True),
    *(
        Case(f"ltp-numa-{nodes}-nodes-across-{across}", ltp_numa(nodes, 8, across), nodes=nodes)
        for nodes in (2, 4)
        for across in (0, 1)
    ),
    Case("ltp-smart-scan", ltp_smart_scan),
]

SLOW = 20_000  # pages; the plain model is not asked to fill more


def executors() -> dict[str, Callable[[Case], contextlib.AbstractContextManager[Any]]]:
    """How to make a fresh machine for a case, by the executor's name."""
    return {"tree": on_machine("tree"), "hash": on_machine("hash"), "model": on_model, "kernel": on_kernel}


def suits(executor: str, case: Case) -> str | None:
    """Why a case is not for an executor at all, if so."""
    if executor == "model" and case.pages > SLOW:
        return "too large for the plain model"
    if case.borrows and executor in ("model", "kernel"):
        return f"the {executor}'s processes cannot borrow memory"
    if executor == "kernel" and case.nodes > len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))):
        return f"this host has not {case.nodes} NUMA nodes"
    return None


def refusal(executor: str, case: Case) -> str | None:
    """Why an executor cannot run a case here, if it cannot."""
    return suits(executor, case) or (why_not() if executor == "kernel" else None)


def on_machine(index: str) -> Callable[[Case], contextlib.AbstractContextManager[Any]]:
    """A `ksm.Machine` with one of the two indexes."""

    def make(case: Case) -> contextlib.AbstractContextManager[Any]:
        import ksm

        return contextlib.nullcontext(ksm.Machine(nodes=case.nodes, index=index))

    return make


def on_model(case: Case) -> contextlib.AbstractContextManager[Any]:
    """The plain model."""
    return contextlib.nullcontext(ModelMachine(nodes=case.nodes))


@contextlib.contextmanager
def on_kernel(case: Case) -> Iterator[Any]:
    """The running kernel."""
    with KernelSession() as session, RealMachine(session) as machine:
        yield machine


def run(case: Case, executor: str) -> list[Row]:
    """All figures of a case on an executor."""
    with executors()[executor](case) as machine:
        return list((case.shrunk or case.run)(machine) if executor == "kernel" else case.run(machine))


def main() -> int:
    names = sys.argv[1:] or ["hash", "kernel"]
    wrong = 0
    print(f"{'case':34} {'figure':40} {'published':>10}" + "".join(f" {name:>10}" for name in names))
    for case in CASES:
        why = {name: refusal(name, case) for name in names}
        found = {name: run(case, name) for name in names if why[name] is None}
        for at, row in enumerate(next(iter(found.values()), [])):
            rows = {name: rows[at] for name, rows in found.items()}
            marks = {name: f"{row.got}{'' if row.ok else ' !'}" for name, row in rows.items()}
            wrong += sum(not row.ok for row in rows.values())
            published = "a bound" if callable(row.expected) else row.expected
            line = f"{case.name:34} {row.what:40} {published!s:>10}"
            print(line + "".join(f" {marks.get(name, '-'):>10}" for name in names))
        for name, reason in why.items():
            if reason:
                print(f"{case.name:34} not on {name}: {reason}")
    print(f"{len(CASES)} cases, {wrong} wrong figures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

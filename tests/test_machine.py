"""The machine model: mapping, access, errors, limits, memory, threads, borrowed and fingerprint-only images."""

from __future__ import annotations

import errno
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ksm

PAGE = 4096
BOTH = pytest.mark.parametrize("index", ["hash", "tree"])


def page(number: int) -> bytes:
    return number.to_bytes(2, "big") * (PAGE // 2)


def machine(**how: Any) -> ksm.Machine:
    m = ksm.Machine(**how)
    m.ksm.run = 1
    return m


def spawn_marked(m: ksm.Machine, name: str, contents: list[int]) -> tuple[ksm.Process, int]:
    p = m.spawn(name)
    a = p.mmap(b"".join(page(c) for c in contents))
    p.madvise(a, len(contents) * PAGE, ksm.MADV_MERGEABLE)
    return p, a


def error_of(work: Callable[[], Any]) -> int:
    with pytest.raises(OSError) as caught:
        work()
    assert caught.value.errno is not None
    return caught.value.errno


# ---- the closed form and the life of a merged page ---------------------------------------------------


@BOTH
@pytest.mark.parametrize(("n", "limit"), [(1, 2), (2, 2), (3, 2), (7, 3), (8, 3), (9, 3), (300, 256), (256, 256)])
def test_static_copies_settle_at_the_closed_form(index: str, n: int, limit: int) -> None:
    m = machine(index=index)
    m.ksm.max_page_sharing = limit
    spawn_marked(m, "a", [7] * n)
    for _ in range(4):
        m.ksmd.scan()
    shared = n // limit + (n % limit >= 2)
    assert (m.ksm.pages_shared, m.ksm.pages_unshared) == (shared, int(n % limit == 1))
    assert m.ksm.pages_sharing == n - shared - (n % limit == 1)
    assert m.frames == shared + (n % limit == 1)
    m.check()


@BOTH
def test_write_breaks_sharing_and_counters_follow_at_the_next_visit(index: str) -> None:
    m = machine(index=index)
    p, a = spawn_marked(m, "a", [1, 1, 1])
    m.ksmd.scan()
    m.ksmd.scan()
    assert (m.ksm.pages_shared, m.ksm.pages_sharing, m.frames) == (1, 2, 1)
    p.write(a, b"new")
    assert (m.ksm.pages_shared, m.ksm.pages_sharing, m.frames) == (1, 2, 2)
    assert m.vmstat["cow_ksm"] == 1
    m.ksmd.scan()
    assert (m.ksm.pages_shared, m.ksm.pages_sharing, m.ksm.pages_volatile) == (1, 1, 1)
    assert p.read(a, 5) == b"new" + page(1)[3:5]
    assert p.read(a + PAGE, PAGE) == page(1)
    m.check()


def test_run_2_unmerges_everything() -> None:
    m = machine()
    spawn_marked(m, "a", [1, 1, 2, 2])
    m.ksmd.scan()
    m.ksmd.scan()
    assert m.frames == 2
    m.ksm.run = 2
    assert (m.frames, m.ksm.pages_shared, m.ksm.pages_sharing, m.ksm.full_scans) == (4, 0, 0, 0)
    m.check()


# ---- errors --------------------------------------------------------------------------------------------


def test_mapping_errors_are_the_kernels() -> None:
    p = ksm.Machine().spawn()
    a = p.mmap(4 * PAGE)
    assert error_of(lambda: p.mmap(0)) == errno.EINVAL
    assert error_of(lambda: p.mmap(-1)) == errno.EINVAL
    assert error_of(lambda: p.mmap(PAGE, addr=a + 1)) == errno.EINVAL
    assert error_of(lambda: p.mmap(PAGE, prot=99)) == errno.EINVAL
    assert error_of(lambda: p.mmap(PAGE, node=1)) == errno.EINVAL
    assert error_of(lambda: p.mmap(PAGE, addr=1 << 47)) == errno.ENOMEM
    assert error_of(lambda: p.munmap(a + 1, PAGE)) == errno.EINVAL
    assert error_of(lambda: p.munmap(a, 0)) == errno.EINVAL
    assert error_of(lambda: p.mprotect(a, 8 * PAGE, 1)) == errno.ENOMEM
    assert error_of(lambda: p.madvise(a, PAGE, 9999)) == errno.EINVAL
    assert error_of(lambda: p.madvise(a + 5, PAGE, ksm.MADV_MERGEABLE)) == errno.EINVAL
    assert error_of(lambda: p.madvise(a, 8 * PAGE, ksm.MADV_MERGEABLE)) == errno.ENOMEM
    assert p.ksm_stat["ksm_mergeable"] is True  # the mapped part is marked all the same
    assert error_of(lambda: p.prctl(1)) == errno.EINVAL
    assert error_of(lambda: p.prctl(ksm.PR_SET_MEMORY_MERGE, 1, 1)) == errno.EINVAL
    assert error_of(lambda: p.prctl(ksm.PR_GET_MEMORY_MERGE, 1)) == errno.EINVAL


def test_access_errors() -> None:
    p = ksm.Machine().spawn()
    a = p.mmap(2 * PAGE)
    p.mprotect(a + PAGE, PAGE, ksm.PROT_NONE)
    assert error_of(lambda: p.read(a + PAGE, 1)) == errno.EFAULT
    assert error_of(lambda: p.write(a, b"x" * (PAGE + 1))) == errno.EFAULT
    assert p.read(a, PAGE) == b"x" * PAGE  # what came before the fault is written
    assert error_of(lambda: p.read(a + 2 * PAGE, 1)) == errno.EFAULT
    with pytest.raises(ValueError, match="cannot read"):
        p.read(a, -1)


def test_mremap_errors() -> None:
    p = ksm.Machine().spawn()
    a = p.mmap(4 * PAGE)
    p.mprotect(a + 2 * PAGE, PAGE, 1)
    assert error_of(lambda: p.mremap(a, PAGE, 2 * PAGE)) == errno.ENOMEM
    assert error_of(lambda: p.mremap(a, 4 * PAGE, 5 * PAGE, ksm.MREMAP_MAYMOVE)) == errno.EFAULT
    assert error_of(lambda: p.mremap(a + 9 * PAGE, PAGE, PAGE)) == errno.EFAULT
    assert error_of(lambda: p.mremap(a, PAGE, 0)) == errno.EINVAL
    assert error_of(lambda: p.mremap(a, PAGE, PAGE, ksm.MREMAP_FIXED, a)) == errno.EINVAL
    assert error_of(lambda: p.mremap(a, 2 * PAGE, PAGE, ksm.MREMAP_MAYMOVE | ksm.MREMAP_DONTUNMAP)) == errno.EINVAL


def test_exited_processes_say_so() -> None:
    m = ksm.Machine()
    p = m.spawn("gone")
    p.exit()
    for work in (p.exit, lambda: p.mmap(PAGE), lambda: p.ksm_stat, lambda: p.fork("x")):
        with pytest.raises(ProcessLookupError, match="gone has exited"):
            work()
    assert not p.alive


def test_bad_arguments_are_named() -> None:
    for how, what in [
        ({"page_size": 1000}, "page_size"),
        ({"index": "list"}, "index"),
        ({"nodes": 0}, "nodes"),
        ({"ram": 5}, "ram"),
        ({"swap": -1}, "swap"),
        ({"kernel": "4.19"}, "4.19"),
        ({"transparent_hugepage": "maybe"}, "transparent_hugepage"),
    ]:
        with pytest.raises(ValueError, match=what):
            ksm.Machine(**how)  # type: ignore[arg-type]
    m = ksm.Machine()
    m.spawn("a")
    with pytest.raises(ValueError, match="named 'a' is alive"):
        m.spawn("a")
    with pytest.raises(ValueError, match="cannot visit"):
        m.ksmd.scan_pages(-1)
    for seconds in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="cannot run"):
            m.run_for(seconds)


# ---- RAM and swap ----------------------------------------------------------------------------------------


def test_out_of_memory_names_who_asked() -> None:
    m = machine(ram=4 * PAGE)
    spawn_marked(m, "vm1", [1, 1, 1, 1])
    m.ksmd.scan()
    m.ksmd.scan()
    assert m.frames == 1
    p = m.processes["vm1"]
    b = p.mmap(3 * PAGE)
    p.write(b, b"x" * 3 * PAGE)
    with pytest.raises(ksm.OutOfMemoryError, match=r"unmerging vm1 needs a frame.*no swap") as caught:
        p.madvise(p.vmas[0].start * PAGE, 7 * PAGE, ksm.MADV_UNMERGEABLE)
    assert caught.value.errno == errno.ENOMEM
    assert isinstance(caught.value, MemoryError)
    assert p.ksm_stat["ksm_mergeable"] is True
    with pytest.raises(ksm.OutOfMemoryError, match="run=2"):
        m.ksm.run = 2
    assert m.ksm.run == 0
    m.check()


def test_swap_makes_room_and_brings_pages_back() -> None:
    m = machine(ram=4 * PAGE, swap=8 * PAGE)
    p = m.spawn("a")
    a = p.mmap(8 * PAGE)
    for i in range(8):
        p.write(a + i * PAGE, page(i))
    assert m.frames <= 4
    assert [p.read(a + i * PAGE, PAGE) == page(i) for i in range(8)] == [True] * 8
    with pytest.raises(ksm.OutOfMemoryError, match="swap is full"):
        b = p.mmap(16 * PAGE)
        p.write(b, b"y" * 16 * PAGE)
    m.check()


# ---- images ------------------------------------------------------------------------------------------------


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to measure memory")
def test_a_memmap_is_borrowed(tmp_path: Path) -> None:
    size = 4 << 30
    path = tmp_path / "image"
    with path.open("wb") as f:
        f.truncate(size)
    image = np.memmap(path, np.uint8, "r")
    m = ksm.Machine()
    before = rss()
    p = m.spawn()
    a = p.mmap(image)
    assert m.frames == size // PAGE
    assert rss() - before < 64 * (size // PAGE) + (64 << 20)
    p.write(a, b"mine")
    assert p.read(a, 4) == b"mine"
    assert bytes(image[:4]) == bytes(4)


def test_borrowed_pages_are_never_written() -> None:
    image = np.frombuffer(page(1) * 4, np.uint8).copy()
    image.setflags(write=False)
    m = machine()
    p = m.spawn()
    a = p.mmap(image)
    p.madvise(a, 4 * PAGE, ksm.MADV_MERGEABLE)
    for _ in range(3):
        m.ksmd.scan()
        p.write(a + PAGE, os.urandom(8))
    assert bytes(image) == page(1) * 4
    m.check()


@pytest.mark.parametrize("bad", [b"", b"x" * 100, np.zeros((4, 100), np.uint8), object(), [1, 2], np.zeros(8, object)])
def test_images_that_are_none(bad: object) -> None:
    with pytest.raises((TypeError, ValueError, OSError)):
        ksm.Machine().spawn().mmap(bad)


@BOTH
def test_fingerprints_alone_run_the_same_engine(index: str) -> None:
    rng = random.Random(1)
    contents = [rng.choice([0, 0, *range(1, 40)]) for _ in range(500)]
    pages = np.frombuffer(b"".join(page(c) for c in contents), np.uint8).reshape(-1, PAGE)
    machines = []
    for image in (pages, ksm.fingerprint(pages)):
        m = machine(index=index)
        m.ksm.max_page_sharing = 4
        m.ksm.use_zero_pages = 1
        p = m.spawn()
        a = p.mmap(image)
        p.madvise(a, pages.nbytes, ksm.MADV_MERGEABLE)
        for _ in range(3):
            m.ksmd.scan()
        m.check()
        machines.append(m)
    assert machines[0].ksm.snapshot() == machines[1].ksm.snapshot()
    p = machines[1].spawn()
    a = p.mmap(PAGE)
    with pytest.raises(ksm.NoPageBytesError):
        p.read(a, 1)
    with pytest.raises(ksm.NoPageBytesError):
        p.write(a, b"x")


@BOTH
def test_fingerprints_are_written_like_bytes(index: str) -> None:
    rng = random.Random(2)
    machines = [machine(index=index) for _ in range(2)]
    for m in machines:
        p = m.spawn()
        a = p.mmap(60 * PAGE, addr=1 << 30)
        p.madvise(a, 60 * PAGE, ksm.MADV_MERGEABLE)
        p.madvise(a + 20 * PAGE, 10 * PAGE, ksm.MADV_UNMERGEABLE)
    for _ in range(20):
        start, n = rng.randrange(50), rng.randrange(1, 10)
        data = b"".join(page(rng.randrange(6)) for _ in range(n))
        written = [rng.random() < 0.7 for _ in range(n)]
        prints = ksm.Fingerprints(ksm.fingerprint(np.frombuffer(data, np.uint8)).words, np.array(written))
        for k in range(n):
            if written[k]:
                there = (1 << 30) + (start + k) * PAGE
                machines[0].processes["process-1"].write(there, data[k * PAGE : (k + 1) * PAGE])
        machines[1].processes["process-1"].write((1 << 30) + start * PAGE, prints)
        for m in machines:
            m.ksmd.scan_pages(17)
            m.ksmd.scan()
            m.check()
        assert machines[0].ksm.snapshot() == machines[1].ksm.snapshot()
        assert machines[0].vmstat == machines[1].vmstat
    assert machines[0].vmstat["cow_ksm"] > 5
    with pytest.raises(OSError, match="write"):
        machines[1].processes["process-1"].write(1, prints)
    with pytest.raises(OSError, match="Bad address"):
        machines[1].processes["process-1"].write(0, prints)
    with pytest.raises(ValueError, match="bytes"):
        machines[0].processes["process-1"].write(1 << 30, prints)


def test_absent_slots_of_fingerprints_stay_untouched() -> None:
    words = ksm.fingerprint(np.frombuffer(page(1) * 3, np.uint8)).words
    m = machine()
    p = m.spawn()
    a = p.mmap(ksm.Fingerprints(words, np.array([True, False, True])))
    p.madvise(a, 3 * PAGE, ksm.MADV_MERGEABLE)
    m.ksmd.scan()
    m.ksmd.scan()
    assert (m.frames, m.ksm.pages_shared, m.ksm.pages_sharing) == (1, 1, 1)


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_page_sizes(page_size: int) -> None:
    m = machine(page_size=page_size)
    p = m.spawn()
    a = p.mmap(bytes(page_size - 1) + b"1" + bytes(page_size - 1) + b"1" + bytes(page_size))
    p.madvise(a, 3 * page_size, ksm.MADV_MERGEABLE)
    m.ksmd.scan()
    m.ksmd.scan()
    assert (m.ksm.pages_shared, m.ksm.pages_sharing, m.ksm.pages_unshared) == (1, 1, 1)
    assert m.ksm.general_profit == page_size - 3 * 64
    m.check()


# ---- memory and threads --------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to measure memory")
def test_machines_give_their_memory_back() -> None:
    def use() -> None:
        m = machine()
        p, a = spawn_marked(m, "a", [1, 2, 2, 3])
        m.ksmd.scan()
        m.ksmd.scan()
        p.write(a, b"x")
        p.fork("b").exit()

    for _ in range(500):
        use()
    gc.collect()
    before = rss()
    for _ in range(10_000):
        use()
    gc.collect()
    assert rss() - before < 4 << 20


def test_bookkeeping_that_does_not_fit_is_refused(run_python: Callable[[str], str]) -> None:
    script = """
import resource, numpy as np, ksm
words = np.zeros((64 << 20, 2), np.uint64)
limit = 3 << 30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
p = ksm.Machine().spawn()
try:
    p.mmap(ksm.Fingerprints(words))
except MemoryError as error:
    print("refused", len(p.vmas), p.machine.frames)
"""
    assert run_python(script) == "refused 0 0\n"


def test_threads_share_a_machine() -> None:
    m = machine()
    errors = []

    def work(number: int) -> None:
        try:
            rng = random.Random(number)
            p, a = spawn_marked(m, f"p{number}", [rng.randrange(5) for _ in range(64)])
            for _ in range(60):
                p.write(a + rng.randrange(64) * PAGE, page(rng.randrange(5)))
                m.ksmd.scan_pages(50)
                m.ksm.snapshot()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    m.check()
    for _ in range(3):
        m.ksmd.scan()
    assert m.ksm.pages_shared == 5


def test_scanning_releases_the_gil() -> None:
    m = machine()
    rng = np.random.default_rng(1)
    p = m.spawn()
    a = p.mmap(rng.integers(0, 255, 128 << 20, np.uint8))
    p.madvise(a, 128 << 20, ksm.MADV_MERGEABLE)
    thread = threading.Thread(target=m.ksmd.scan)
    ticks = 0
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # a scan that kept the GIL would not be interrupted
    try:
        thread.start()
        while thread.is_alive():
            time.sleep(0.0005)
            ticks += 1
    finally:
        sys.setswitchinterval(switch)
    assert ticks > 4


# ---- virtual time --------------------------------------------------------------------------------------------


@BOTH
def test_run_for_is_the_same_however_it_is_cut(index: str) -> None:
    def run(cuts: list[float]) -> tuple[Any, float]:
        m = machine(index=index)
        m.ksm.pages_to_scan = 7
        spawn_marked(m, "a", [i % 11 for i in range(300)])
        for cut in cuts:
            m.run_for(cut)
        return m.ksm.snapshot(), m.ksmd.cpu_seconds

    assert run([10.0]) == run([0.25] * 40) == run([0.001] * 10_000)


def test_advisor_moves_pages_to_scan() -> None:
    m = machine()
    m.ksm.advisor_target_scan_time = 1
    m.ksm.advisor_mode = "scan-time"
    assert m.ksm.pages_to_scan == 500
    spawn_marked(m, "a", list(range(60_000)))
    m.run_for(60.0)
    assert 500 < m.ksm.pages_to_scan <= 30_000
    m.ksm.advisor_mode = "none"
    assert m.ksm.pages_to_scan == 100


def test_profiles_differ() -> None:
    assert ksm.Machine(kernel="5.15").kernel.smart_scan is False
    with pytest.raises(FileNotFoundError):
        ksm.Machine(kernel="5.15").ksm.read("smart_scan")
    with pytest.raises(OSError, match="prctl"):
        ksm.Machine(kernel="5.15").spawn().prctl(ksm.PR_SET_MEMORY_MERGE, 1)
    # Before 6.11 the stable tree was searched before the checksum gate: a newcomer merges at its first visit.
    for kernel, sharing in (("6.8", 2), ("6.12", 1)):
        m = machine(kernel=kernel)
        spawn_marked(m, "a", [1, 1])
        m.ksmd.scan()
        m.ksmd.scan()
        spawn_marked(m, "b", [1])
        m.ksmd.scan()
        assert m.ksm.pages_sharing == sharing


@pytest.mark.parametrize("seed", range(6))
def test_quiet_passes_count_what_stepping_through_trees_counts(seed: int) -> None:
    """Long quiet stretches, cut into odd batches and disturbed now and then, with and without smart scan."""
    rng = random.Random(seed)
    contents = [rng.randrange(1, 500) for _ in range(400)]
    machines = [machine(index=index) for index in ("hash", "tree")]
    for m in machines:
        m.ksm.max_page_sharing = 2 + seed % 3
        m.ksm.smart_scan = seed % 2
        for name in ("a", "b"):
            p = m.spawn(name)
            a = p.mmap(b"".join(page(c) for c in contents), addr=1 << 30)
            p.madvise(a, 300 * PAGE, ksm.MADV_MERGEABLE)
    for _ in range(120):
        what, at, value = rng.choice("ssssspppwume"), (1 << 30) + rng.randrange(400) * PAGE, rng.randrange(1, 500)
        for m in machines:
            p = m.processes[rng.choice("ab") if m is machines[0] else p.name] if what in "wum" else m.processes["a"]
            if what == "s":
                m.ksmd.scan()
            elif what == "p":
                m.ksmd.scan_pages(value)
            elif what == "w":
                p.write(at, page(value))
            elif what == "u":
                p.madvise(at, PAGE, ksm.MADV_UNMERGEABLE)
            elif what == "m":
                p.madvise(at, PAGE, ksm.MADV_MERGEABLE)
            elif what == "e" and value < 25 and "b" in m.processes:
                m.processes["b"].exit()
                m.spawn("b").mmap(400 * PAGE, addr=1 << 30)
        assert machines[0].ksm.snapshot() == machines[1].ksm.snapshot()
        assert machines[0].vmstat == machines[1].vmstat
        assert machines[0].ksmd.work == machines[1].ksmd.work
    for m in machines:
        m.check()


@BOTH
def test_made_up_fingerprints_of_small_numbers(index: str) -> None:
    """Nothing merges in the first pass, and the table does not take them for one another."""
    for word in (0, 1):
        words = np.zeros((60_000, 2), np.uint64)
        words[:, word] = np.arange(60_000) // 2
        m = machine(index=index)
        p = m.spawn()
        a = p.mmap(ksm.Fingerprints(words))
        p.madvise(a, 60_000 * PAGE, ksm.MADV_MERGEABLE)
        m.ksmd.scan()
        assert (m.ksm.pages_shared, m.ksm.pages_volatile) == (0, 60_000)
        m.ksmd.scan()
        assert (m.ksm.pages_shared, m.ksm.pages_sharing) == (30_000, 30_000)


def test_arrays_that_outgrow_the_allocator() -> None:
    """Frames, nodes and tables of a machine this large are mapped on their own, and move as they grow."""
    n = 700_000
    words = np.arange(2 * n, dtype=np.uint64).reshape(n, 2)
    words[::7] = words[::7] % np.uint64(5000)
    image = ksm.Fingerprints(words)
    expected = ksm.estimate([image], threads=1)
    m = ksm.Machine()
    p = m.spawn("a")
    parts = [
        p.mmap(ksm.Fingerprints(words[at : at + n // 4])) for at in range(0, n, n // 4)
    ]  # the arrays grow in steps
    for part in parts:
        p.madvise(part, n // 4 * PAGE, ksm.MADV_MERGEABLE)
    m.ksm.run = 1
    for _ in range(2):
        m.ksmd.scan()
    settled = (expected.pages_shared, expected.pages_sharing, expected.pages_unshared)
    assert (m.ksm.pages_shared, m.ksm.pages_sharing, m.ksm.pages_unshared) == settled
    # A write to a page in the unstable tree makes the next pass walk the trees: they are built, and searched.
    p.write(parts[2] + PAGE, ksm.Fingerprints(words[-2:-1]))
    for _ in range(2):
        m.ksmd.scan()
    assert (m.ksm.pages_shared, m.ksm.pages_sharing) == (settled[0] + 1, settled[1] + 1)


@pytest.mark.parametrize("leave", ["exit", "run=2"])
def test_many_leave_the_unstable_tree_at_once(leave: str) -> None:
    """In the middle of a pass all that joined goes: with its process, or by run=2."""
    m = ksm.Machine()
    p = m.spawn("a")
    a = p.mmap(b"".join(page(n) for n in range(1, 256)))
    p.madvise(a, 255 * PAGE, ksm.MADV_MERGEABLE)
    m.ksm.run = 1
    m.ksmd.scan()
    assert m.ksmd.scan_pages(250) == 250
    assert m.ksm.pages_unshared == 250
    if leave == "exit":
        p.exit()
        m.ksmd.scan()
    else:
        m.ksm.run = 2
    m.check()
    assert m.ksm.pages_unshared == m.ksm.pages_volatile == 0

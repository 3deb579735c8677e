"""Looking at a host or a machine, following its passes, saving what was seen; on made-up files and on this host."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import ksm
from ksm.census import Census, Marked, ProcessSample, marked
from ksm.errors import NoSuchProcessError, SourceError, UnsupportedError
from ksm.linux import Host
from ksm.observe import Memory, Observation, Observer, Sample, observe
from ksm.passes import PassClock
from ksm.saved import from_dict, load, to_dict
from ksm.stats import ProcessStats, Stats
from ksm.sysfs import profile

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
KERNEL_THREAD = {"ksm_stat": "", "ksm_merging_pages": "", "comm": "kworker\n", "statm": "0 0 0 0 0 0 0\n"}
PAGE = os.sysconf("SC_PAGE_SIZE")


def stat(items: int = 0, merging: int = 0, zero: int = 0, mergeable: str = "no") -> str:
    return (
        f"ksm_rmap_items {items}\nksm_zero_pages {zero}\nksm_merging_pages {merging}\n"
        f"ksm_process_profit {(merging + zero) * PAGE - 64 * items}\nksm_merge_any: no\nksm_mergeable: {mergeable}\n"
    )


class MadeUp:
    """A host of files below a directory: KSM of a version, ksmd, and processes that come and go."""

    def __init__(self, where: Path, kernel: str = "6.18") -> None:
        self.root = where / "sys/kernel/mm/ksm"
        self.proc = where / "proc"
        self.root.mkdir(parents=True)
        for name, attribute in profile(kernel).attributes.items():
            (self.root / name).write_text(attribute.format(attribute.default))
        self.write("sys/kernel/osrelease", f"{kernel}.1-test\n")
        self.write("vmstat", "ksm_swpin_copy 3\ncow_ksm 7\n")
        self.write("meminfo", "MemTotal: 1024 kB\nMemAvailable: 512 kB\nSwapFree: 10 kB\nAnonHugePages: 4 kB\n")
        self.write("self/ksm_stat", stat() if kernel >= "6.14" else "ksm_rmap_items 0\n" if kernel >= "6.1" else "")
        self.write("37/stat", "37 (ksmd) S 2 0 0 0 -1 0 0 0 0 0 150 50 0 0 25 5 1 0\n")
        self.write("37/schedstat", "1500000000 0 0\n")
        self.write("37/comm", "ksmd\n")
        self.write("37/ksm_stat", "")
        self.host = Host(self.root, self.proc, where / "lock")

    def write(self, name: str, text: str) -> None:
        path = self.proc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def process(self, pid: int, text: str, name: str = "guest") -> None:
        for file, content in (("ksm_stat", text), ("comm", f"{name}\n"), ("statm", "900 500 100 1 0 1 0\n")):
            self.write(f"{pid}/{file}", content)

    def gone(self, pid: int) -> None:
        for file in (self.proc / str(pid)).iterdir():
            file.unlink()
        (self.proc / str(pid)).rmdir()


@pytest.fixture
def made(tmp_path: Path) -> MadeUp:
    return MadeUp(tmp_path)


# ---- the census -------------------------------------------------------------------------------------------------


def test_census_finds_who_takes_part(made: MadeUp) -> None:
    made.process(100, stat(12, 8), "vm 1")
    made.process(101, stat())
    made.process(102, stat(mergeable="yes"))
    census = Census(made.host)
    one, two = census.poll()
    assert (one.pid, one.name, one.stats.ksm_merging_pages, one.stats.profit) == (100, "vm 1", 8, 8 * PAGE - 768)
    assert one.anonymous == 400 * PAGE
    assert (two.pid, two.stats.ksm_mergeable) == (102, True)
    assert (census.total, census.unreadable, census.shown) == (4, 0, True)
    made.gone(100)
    made.process(103, stat(1))
    made.process(102, stat())
    assert [p.pid for p in census.poll()] == [103]


def counted(census: Census, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that one look reads."""
    read: list[int] = []
    genuine = Census._sample

    def sample(self: Census, pid: int) -> ProcessSample | None:
        read.append(pid)
        return genuine(self, pid)

    with monkeypatch.context() as patch:
        patch.setattr(Census, "_sample", sample)
        census.poll()
    return read


def test_census_reads_no_more_than_its_budget(made: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    for pid in range(1000, 1300):
        made.process(pid, stat(1) if pid < 1020 else stat())
    census = Census(made.host, budget=60)
    assert len(census.poll()) == 20
    made.process(1299, stat(5))  # an old one that marks its memory late
    found = []
    for _ in range(12):
        read = counted(census, monkeypatch)
        found.append(len(census._part))
        assert len(read) <= 60
        assert set(range(1000, 1020)) <= set(read), "those that take part are read each time"
    assert found[0] == 20 and found[-1] == 21, "the others are read in turn"
    made.process(2000, stat(9))
    assert 2000 in [p.pid for p in census.poll()], "new processes are read at once"


def test_census_with_processes_that_vanish_or_are_hidden(made: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    for pid in (100, 101, 102, 103):
        made.process(pid, stat(1))
    (made.proc / "103/statm").unlink()
    genuine = Census._read

    def read(self: Census, pid: int | str, name: str) -> str:
        if pid == 100 and name == "ksm_stat":
            raise PermissionError(13, "no")
        if pid == 101 and name == "comm":
            raise ProcessLookupError(3, "gone")
        return genuine(self, pid, name)

    monkeypatch.setattr(Census, "_read", read)
    census = Census(made.host)
    assert [p.pid for p in census.poll()] == [102]
    assert census.unreadable == 1


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory on a file system in memory, where there is one: a disk takes minutes for a hundred thousand files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as where:
        yield Path(where)


def test_census_of_as_many_processes_as_there_can_be(in_memory: Path) -> None:
    """32,768 of them: one that marks its memory late is found after as many looks as the documentation says."""
    made = MadeUp(in_memory)
    nothing = in_memory / "ksm_stat"
    nothing.write_text(stat())
    for pid in set(range(1, 32_769)) - {37, 20_000, 32_000}:
        os.mkdir(made.proc / str(pid))
        os.link(nothing, made.proc / str(pid) / "ksm_stat")
    made.process(20_000, stat())
    made.process(32_000, stat(10, 5))
    census = Census(made.host)
    assert [p.pid for p in census.poll()] == [32_000] and census.total == 32_768
    made.process(20_000, stat(10, 5))
    looks = 0
    while [p.pid for p in census.poll()] != [20_000, 32_000]:
        looks += 1
    assert looks <= 32_768 / (census.budget / 2)


@pytest.mark.parametrize(("kernel", "files"), [("5.15", 0), ("5.19", 1), ("6.1", 2)])
def test_census_on_older_kernels(tmp_path: Path, kernel: str, files: int) -> None:
    made = MadeUp(tmp_path, kernel)
    made.process(100, "ksm_rmap_items 10\n")
    if kernel == "5.15":
        (made.proc / "self/ksm_stat").unlink()
    else:
        made.write("self/ksm_merging_pages", "0\n")
        made.write("100/ksm_merging_pages", "4\n")
    if kernel == "5.19":
        (made.proc / "self/ksm_stat").unlink()
        (made.proc / "100/ksm_stat").unlink()
    census = Census(made.host)
    found = census.poll()
    assert census.shown == bool(files)
    assert [p.stats.ksm_merging_pages for p in found] == ([4] if files else [])
    assert [p.stats.ksm_rmap_items for p in found] == ([10] if files == 2 else [None] if files else [])


@linux_only
def test_what_is_marked_of_a_live_process() -> None:
    with pytest.raises(NoSuchProcessError):
        marked(Host(), 2**22 + 1)
    assert marked(Host(), os.getpid()) == Marked()


def test_what_is_marked_in_the_text_of_smaps(made: MadeUp) -> None:
    text = (
        "1000-3000 rw-p 00000000 00:00 0\nSize: 8 kB\nRss: 4 kB\nAnonymous: 4 kB\nAnonHugePages: 0 kB\nSwap: 0 kB\n"
        "VmFlags: rd wr mg\n"
        "5000-9000 rw-p 00000000 00:00 0\nSize: 16 kB\nRss: 16 kB\nAnonymous: 16 kB\nVmFlags: rd wr\n"
    )
    made.write("100/smaps", text)
    found = marked(made.host, 100)
    assert found == Marked(size=8192, rss=4096, anonymous=4096)
    assert found.untouched == 4096


# ---- observations -----------------------------------------------------------------------------------------------


def test_a_made_up_host(made: MadeUp) -> None:
    (made.root / "from_the_future").write_text("on\n")
    thp = made.root.parent / "transparent_hugepage"
    thp.mkdir()
    (thp / "enabled").write_text("always [madvise] never\n")
    nodes = made.root.parents[2] / "devices/system/node"
    nodes.mkdir(parents=True)
    (nodes / "online").write_text("0-1,3\n")
    made.process(100, stat(mergeable="yes"))
    made.write("100/smaps", "0-1 r\nSize: 8 kB\nRss: 8 kB\nAnonymous: 0 kB\nVmFlags: mg\n")
    made.process(812, stat(), "ksmtuned")
    sample = Observer(made.host, deep=True).look()
    assert (sample.kernel, sample.nodes, sample.huge_pages) == ("6.18.1-test", 3, "madvise")
    assert sample.other == {"from_the_future": "on"}
    assert sample.vmstat == {"cow_ksm": 7, "ksm_swpin_copy": 3}
    assert sample.memory == Memory(total=1 << 20, available=1 << 19, swap_free=10240, anonymous_huge=4096)
    assert sample.ksmd_cpu_seconds == 1.5
    assert sample.rivals == ("ksmtuned (pid 812)",)
    assert sample.processes[0].marked == Marked(size=8192, rss=8192)
    made.gone(37)
    observer = Observer(made.host, processes=False)
    observer.system = Host(made.root, made.proc)  # which has not seen ksmd
    assert observer.look().ksmd_cpu_seconds is None
    assert observer.look().processes == ()


def test_no_ksm(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no KSM here"):
        observe(Host(tmp_path, tmp_path), 0)


def test_a_machine() -> None:
    m = ksm.Machine(ram=1 << 24, swap=1 << 20, nodes=2)
    pages = np.random.default_rng(0).integers(0, 256, (50, 4096), dtype=np.uint8)
    for name in ("a", "b"):
        p = m.spawn(name)
        p.madvise(p.mmap(pages), pages.nbytes, ksm.MADV_MERGEABLE)
    m.spawn("idle")
    m.ksm.run = 1
    o = observe(m, 10.0)
    s = o.sample
    assert (s.simulated, s.nodes, s.kernel, o.seconds, s.processes_total) == (True, 2, "6.18", 10.0, 3)
    assert [(p.name, p.stats.ksm_merging_pages) for p in s.processes] == [("a", 50), ("b", 50)]
    assert o.changes["pages_sharing"] == 50 and o.rate("pages_sharing") == 5.0
    assert s.memory.available == (1 << 24) - 50 * 4096
    assert s.memory.swap_free == 1 << 20
    assert o.ksmd_share is not None and 0 < o.ksmd_share < 1
    assert o.visits_per_second == m.ksm.pages_scanned / 10
    with pytest.raises(ValueError, match="-1 seconds"):
        observe(m, -1)


def test_what_was_reset_is_not_a_change() -> None:
    before = Sample(clock=1.0, stats=Stats(full_scans=9, pages_sharing=5), vmstat={"cow_ksm": 5})
    after = Sample(clock=3.0, stats=Stats(full_scans=1, pages_sharing=2), vmstat={"cow_ksm": 9})
    o = Observation.between(before, after)
    assert "full_scans" not in o.changes and o.rate("full_scans") is None
    assert (o.changes["pages_sharing"], o.rate("cow_ksm")) == (-3, 2.0)
    assert Observation.between(after, before).changes == {}, "a clock that goes back tells nothing"


@linux_only
def test_a_wall_clock_that_jumps(made: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    observer = Observer(made.host)
    before = observer.look()
    monkeypatch.setattr(time, "time", lambda: before.time - 86400)
    time.sleep(0.01)
    o = Observation.between(before, observer.look())
    assert 0.01 <= o.seconds < 10


def test_visits_before_they_were_counted() -> None:
    s = Sample(tunables={"run": 1, "pages_to_scan": 100, "sleep_millisecs": 20})
    assert Observation(sample=s, seconds=1).visits_per_second == 5000
    assert Observation(sample=replace(s, tunables={"run": 0})).visits_per_second == 0
    assert Observation(sample=replace(s, tunables={"run": 1, "sleep_millisecs": 0})).visits_per_second is None


# ---- passes -----------------------------------------------------------------------------------------------------


def at(clock: float, scans: int, scanned: int, merged: int = 0, items: int = 1000) -> Sample:
    stats = Stats(full_scans=scans, pages_scanned=scanned, pages_sharing=merged, pages_unshared=items - merged)
    return Sample(clock=clock, stats=stats, tunables={"run": 1})


def follow(*samples: Sample) -> list[Any]:
    clock = PassClock()
    pairs = zip((samples[0], *samples), samples, strict=False)
    return [clock.update(Observation.between(one, two)) for one, two in pairs]


def test_passes_are_followed() -> None:
    """1,000 pages, 100 visits a second, a look every two seconds."""
    states = follow(*(at(2.0 * k, 200 * k // 1000, 200 * k, 100) for k in range(18)))
    assert states[0].left is None, "one look gives no rate"
    assert (states[1].pass_seconds, states[1].left, states[1].seen) == (None, None, False)
    at_the_end = states[5]
    assert at_the_end.seen and at_the_end.left == pytest.approx(10.0)
    assert at_the_end.settle == pytest.approx(10.0), "one of two passes is done"
    assert states[7].left == pytest.approx(6.0)
    assert states[15].settle == 0.0
    late = follow(*(at(2.0 * k, 5 + 200 * k // 1000, 200 * k, 100) for k in range(11)))
    assert late[9].settle is None, "no two passes to compare yet"
    assert late[10].settle == 0.0
    growing = follow(*(at(2.0 * k, 200 * k // 1000, 200 * k, 10 * k) for k in range(18)))
    assert growing[16].settle == pytest.approx(8.0 + 10.0)


def test_passes_start_anew_after_unmerging() -> None:
    states = follow(*(at(10.0 * k, k, 1000 * k) for k in range(4)), at(40.0, 0, 4000), at(41.0, 0, 4100))
    assert states[3].seen and not states[4].seen
    assert (states[5].left, states[5].settle) == (None, None), "nobody knows how long the new first pass is"
    assert PassClock().update(Observation(sample=Sample())).left is None


def test_a_first_pass_is_bounded_by_the_processes() -> None:
    guest = ProcessSample(pid=1, name="vm", stats=ProcessStats(ksm_rmap_items=5), anonymous=1000 * 4096)
    states = follow(*(replace(at(float(k), 0, 100 * k), processes=(guest,)) for k in range(3)))
    assert states[2].left == pytest.approx(10.0) and not states[2].seen


def test_passes_of_a_kernel_that_counts_no_visits() -> None:
    states = follow(*(replace(at(10.0 * k, k, 0), stats=Stats(full_scans=k, pages_unshared=5)) for k in range(4)))
    assert states[3].pass_seconds == pytest.approx(10.0) and states[3].left == pytest.approx(10.0)


def test_passes_of_a_machine() -> None:
    """What is said to be left is what is left, on a machine whose end is known."""
    m = ksm.Machine()
    pages = np.random.default_rng(0).integers(0, 256, (5000, 4096), dtype=np.uint8)
    p = m.spawn("a")
    p.madvise(p.mmap(pages), pages.nbytes, ksm.MADV_MERGEABLE)
    m.ksm.smart_scan = False
    m.ksm.run = 1
    observer, clock = Observer(m), PassClock()
    before = observer.look()
    for _ in range(25):
        m.run_for(0.1)
        after = observer.look()
        progress = clock.update(Observation.between(before, after))
        before = after
    scans, start = m.ksm.full_scans, m.now
    while m.ksm.full_scans == scans:
        m.run_for(0.01)
    assert progress.seen and progress.left == pytest.approx(m.now - start, abs=0.2)


# ---- saved ------------------------------------------------------------------------------------------------------


def example() -> Observation:
    guest = ProcessSample(
        pid=7,
        name="vm \udcff",
        stats=ProcessStats(ksm_rmap_items=5, ksm_merge_any=True, ksm_process_profit=-320),
        anonymous=4096,
        marked=Marked(size=8192),
    )
    sample = Sample(
        time=1e9,
        clock=5.0,
        kernel="6.18",
        nodes=2,
        tunables={"run": 1, "smart_scan": True, "advisor_mode": "none"},
        stats=Stats(pages_sharing=3, general_profit=-5),
        vmstat={"cow_ksm": 3},
        memory=Memory(total=5),
        processes=(guest,),
        rivals=("ksmtuned (pid 1)",),
    )
    return Observation.between(replace(sample, clock=1.0, stats=Stats()), sample)


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    o = example()
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(to_dict(o)))
    again = load(path)
    assert again == replace(o, sample=replace(o.sample, clock=0.0))  # the clock means nothing elsewhere
    machine = observe(ksm.Machine(kernel="5.15"), 1.0)
    assert from_dict(json.loads(json.dumps(to_dict(machine)))).changes == machine.changes


def edited(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def edit(values: dict[str, Any]) -> None:
        inner: Any = values
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited("format", value="other"), "not an observation"),
        (edited("version", value=2), "version 2; this ksm reads version 1"),
        (edited("counters", value=[]), "counters is no JSON object"),
        (edited("counters", "pages_sharing", value=-1), "pages_sharing is negative"),
        (edited("counters", "pages_sharing", value=None), "pages_sharing is no whole number"),
        (edited("counters", "pages_sharing", value=True), "pages_sharing is no whole number"),
        (edited("counters", "pages_sharing", value=1 << 70), "pages_sharing is no whole number of 64 bits"),
        (edited("counters", "page_size", value=0), "page_size is 0"),
        (edited("tunables", "run", value=[]), "run is no whole number"),
        (edited("processes", value={}), "processes is no list"),
        (edited("processes", 0, value=5), "a process is no JSON object"),
        (edited("processes", 0, "ksm_merge_any", value=1), "ksm_merge_any is neither"),
        (edited("processes", 0, "name", value=1), "name is no text"),
        (edited("processes", 0, "marked", "size", value=1.5), "size is no whole number"),
        (edited("seconds", value=-1), "seconds is negative"),
        (edited("changes", "x", value=1e300), "x is too large"),
        (edited("time", value="now"), "time is no number"),
        (lambda values: values.pop("kernel"), "has no 'kernel'"),
    ],
)
def test_a_file_that_lies(tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    values = json.loads(json.dumps(to_dict(example())))
    edit(values)
    (tmp_path / "f").write_text(json.dumps(values))
    with pytest.raises(SourceError, match=message):
        load(tmp_path / "f")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"NaN", b'{"a": Infinity}', b"1" * 10_000, b"[]", b"null"]
)
def test_a_file_that_is_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(SourceError):
        load(tmp_path / "f")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_any_value_anywhere_is_refused_or_read(data: st.DataObject) -> None:
    values = json.loads(json.dumps(to_dict(example())))
    inner: Any = values
    while isinstance(inner, dict | list) and inner:
        keys = sorted(inner) if isinstance(inner, dict) else range(len(inner))
        holder, key = inner, data.draw(st.sampled_from(keys))
        inner = inner[key]
        if data.draw(st.booleans()):
            break
    holder[key] = data.draw(json_values)
    with contextlib.suppress(SourceError):
        assert isinstance(from_dict(values), Observation)


# ---- this host --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ended(herd: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        os.killpg(herd.pid, signal.SIGKILL)


@linux_only
def test_of_thousands_of_processes_few_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 more processes, real ones: after the first look no more than the budget, and all of them in turn."""
    if not Path("/proc/self/ksm_stat").exists():
        pytest.skip("the kernel does not show processes' part in KSM")
    script = (
        "import os, signal, sys\n"
        "for _ in range(2000):\n"
        "    if os.fork() == 0: signal.pause()\n"
        "print('ready', flush=True); sys.stdin.read(); os.killpg(0, signal.SIGKILL)\n"
    )
    command = [sys.executable, "-S", "-c", script]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as herd,
        ended(herd),
    ):
        assert herd.stdout is not None and herd.stdout.readline() == b"ready\n"
        observer = Observer(Host()) if Path(Host().root, "run").exists() else None
        census = observer.census if observer and observer.census else Census(Host())
        census.poll()
        assert census.total > 2000
        looks = [counted(census, monkeypatch) for _ in range(8)]
        assert all(len(pids) <= census.budget for pids in looks) and len(set().union(*looks)) > 2000

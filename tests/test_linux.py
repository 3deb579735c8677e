"""The running kernel: on made-up files everywhere, and on the real ones where root may drive KSM."""

from __future__ import annotations

import errno
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import ksm.linux
from ksm.constants import MADV_MERGEABLE, MADV_NOHUGEPAGE, MADV_UNMERGEABLE
from ksm.errors import KernelFileNotFoundError, KernelPermissionError, NoSuchProcessError, UnsupportedError
from ksm.linux import Host, HostProcess, madvise
from ksm.stepper import Stepper, restore
from ksm.sysfs import ATTRIBUTES, StateSysfs, Sysfs, profile

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def root_is_missing() -> str | None:
    if sys.platform != "linux" or not Path(ksm.linux.KSM_ROOT, "run").exists():
        return "the running kernel has no KSM"
    return None if os.geteuid() == 0 else "driving the kernel's KSM needs root"


drives_the_kernel = pytest.mark.skipif(root_is_missing() is not None, reason=root_is_missing() or "")


# ---- made-up files ---------------------------------------------------------------------------------------------


@pytest.fixture
def made_up(tmp_path: Path) -> Host:
    """A host of files: KSM as of 6.1, ksmd as pid 37, a guest, a shell and a kernel thread."""
    root = tmp_path / "ksm"
    root.mkdir()
    for name, attribute in profile("6.1").attributes.items():
        (root / name).write_text(attribute.format(attribute.default))
    (root / "pages_sharing").write_text("10\n")
    (root / "pages_shared").write_text("2\n")
    (root / "from_the_future").write_text("1\n")
    proc = tmp_path / "proc"
    files = {
        "vmstat": "nr_free_pages 5\nksm_swpin_copy 3\ncow_ksm 7\n",
        "meminfo": "MemTotal:        1024 kB\nMemFree:  1 kB\nMemAvailable:     512 kB\n",
        "37/comm": "ksmd\n",
        "37/stat": "37 (ksmd) S 2 0 0 0 -1 2097216 0 0 0 0 150 50 0 0 25 5 1 0\n",
        "37/ksm_stat": "",
        "40/comm": "ksmd\n",
        "40/stat": "40 (ksmd) S 1 0 0 0 -1 0 0 0 0 0 9 9 0 0 20 0\n",
        "40/ksm_stat": "ksm_rmap_items 0\n",
        "40/ksm_merging_pages": "0\n",
        "100/comm": "qemu (vm 1)\n",
        "100/stat": "100 (qemu (vm 1)) S 1 0 0 0 -1 0 0 0 0 0 9 9 0 0 20 0\n",
        "100/ksm_stat": "ksm_rmap_items 12\n",
        "100/ksm_merging_pages": "8\n",
    }
    for name, text in files.items():
        path = proc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Host(root, proc, tmp_path / "lock")


def test_files_as_sysfs(made_up: Host) -> None:
    ksm = made_up.ksm
    assert (ksm.pages_sharing, ksm.pages_shared, ksm.merge_across_nodes) == (10, 2, True)
    ksm.run = 1
    assert ksm.run == 1
    assert ksm.names()[-1] == "from_the_future"
    assert ksm.names()[:-1] == tuple(profile("6.1").attributes)
    stats = ksm.snapshot()
    assert (stats.sharing_ratio, stats.ksm_zero_pages) == (5.0, None)
    for act in (
        lambda: ksm.smart_scan,
        lambda: ksm.read("no"),
        lambda: ksm.write("no", "1"),
        lambda: ksm.read("../no"),
    ):
        with pytest.raises(KernelFileNotFoundError):
            act()
    assert "15 files" in repr(ksm)


def test_no_ksm(tmp_path: Path) -> None:
    host = Host(tmp_path, tmp_path)
    for ask in (
        lambda: host.ksm,
        lambda: host.vmstat,
        lambda: host.mem_available,
        host.ksmd_cpu_seconds,
        lambda: host.step(),
        lambda: host.ksm_stat(os.getpid()),
    ):
        with pytest.raises((UnsupportedError, NoSuchProcessError)):
            ask()
    assert host.processes() == []


def test_host_numbers(made_up: Host) -> None:
    assert made_up.vmstat == {"cow_ksm": 7, "ksm_swpin_copy": 3}
    (made_up.proc / "vmstat").write_text("nr_free_pages 5\n")
    assert made_up.vmstat == {}
    assert made_up.mem_total == 1 << 20
    assert made_up.mem_available == 1 << 19
    assert made_up.ksmd_pid() == 37
    assert made_up.ksmd_cpu_seconds() == 200 / os.sysconf("SC_CLK_TCK")
    (made_up.proc / "37/schedstat").write_text("1500000000 5 7\n")
    assert made_up.ksmd_cpu_seconds() == 1.5
    (made_up.proc / "meminfo").write_text("MemTotal: 5 kB\n")
    with pytest.raises(UnsupportedError, match="MemAvailable"):
        made_up.mem_available  # noqa: B018


def test_processes(made_up: Host) -> None:
    (guest,) = made_up.processes()
    assert (guest.pid, guest.name) == (100, "qemu (vm 1)")
    assert guest.ksm_stat == {"ksm_rmap_items": 12, "ksm_merging_pages": 8}
    assert guest.to_dict()["profit"] == 8 * guest.page_size - 12 * 64
    assert [p.pid for p in made_up.processes(everyone=True)] == [40, 100]
    assert made_up.ksm_stat(37) == {}
    with pytest.raises(NoSuchProcessError):
        made_up.ksm_stat(5)
    for name in ("40/ksm_stat", "40/ksm_merging_pages"):
        (made_up.proc / name).unlink()
    with pytest.raises(UnsupportedError, match=r"since Linux 6\.1"):
        made_up.ksm_stat(40)
    assert HostProcess(pid=1, name="x").stats.profit == 0


def test_processes_of_others(made_up: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = Path.read_text

    def read_text(path: Path, *args: str) -> str:
        if path.parts[-2:] == ("100", "ksm_stat"):
            raise PermissionError(errno.EACCES, "no")
        return genuine(path, *args)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(KernelPermissionError, match="needs its owner or root"):
        made_up.processes()
    assert made_up.processes(skip_unreadable=True) == []


def test_elsewhere_than_linux(made_up: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    for act in (
        lambda: madvise(bytearray(1), MADV_MERGEABLE),
        lambda: ksm.linux.set_memory_merge(True),
        ksm.linux.get_memory_merge,
        lambda: made_up.kernel,
        lambda: made_up.step(),
        lambda: Host("/nonexistent").ksm,
    ):
        with pytest.raises(UnsupportedError, match=r"darwin|needs Linux"):
            act()


@linux_only
def test_the_lock(made_up: Host) -> None:
    other = Host(made_up.root, made_up.proc, made_up.lock_path)
    held = pytest.raises(TimeoutError, match="held by another program")
    with made_up.lock(), made_up.lock(), held, other.lock(timeout=0.05):
        pass
    with other.lock(timeout=0.05):
        pass
    with pytest.raises(OSError, match="opening the lock"), Host(lock_path=made_up.root / "no" / "lock").lock():
        pass


# ---- the stepper without a kernel ----------------------------------------------------------------------------


class Ksmd(dict[str, int]):
    """A backend whose ksmd does what `batch` says when run becomes 1."""

    def __init__(self, batch: Callable[[Ksmd], None]) -> None:
        super().__init__((a.name, a.default) for a in ATTRIBUTES.values())
        self.batch = batch

    def get(self, name: str) -> int:  # type: ignore[override]
        return self[name]

    def set(self, name: str, value: int) -> None:
        self[name] = value
        if name == "run" and value == 1:
            self.batch(self)


def visit(ksmd: Ksmd) -> None:
    """A pass has 100 pages."""
    done = ksmd["pages_scanned"] % 100
    pages = min(ksmd["pages_to_scan"], 100 - done)
    ksmd["pages_scanned"] += pages
    ksmd["full_scans"] += done + pages == 100


@pytest.mark.parametrize("kernel", ["6.1", "6.18"])
def test_batches(kernel: str) -> None:
    ksmd = Ksmd(visit)
    flushed: list[int] = []
    sysfs = StateSysfs(ksmd, profile(kernel))
    stepper = Stepper(sysfs, lambda: flushed.append(1), None, 10.0)
    if kernel == "6.1":
        assert stepper.scan() is None
        assert sysfs.full_scans == 1
    else:
        assert [stepper.scan_pages(30), stepper.scan(), stepper.scan()] == [30, 70, 100]
        assert len(flushed) == 3
    assert sysfs.run == 0
    with pytest.raises(ValueError, match="cannot visit 0 pages"):
        stepper.scan_pages(0)


def test_an_unseen_ksmd_that_idles_or_hangs() -> None:
    idle = Stepper(StateSysfs(Ksmd(lambda _: None), profile("6.18")), lambda: None, None, 10.0)
    assert idle.scan() == 0

    def skip(ksmd: Ksmd) -> None:
        ksmd["pages_skipped"] += 1

    sysfs = StateSysfs(Ksmd(skip), profile("6.18"))
    with pytest.raises(TimeoutError, match=r"batch of 5 pages in 0\.05 s"):
        Stepper(sysfs, lambda: None, None, 0.05).scan_pages(5)
    assert sysfs.run == 0


def test_restoring() -> None:
    ksmd = Ksmd(lambda _: None)
    sysfs = StateSysfs(ksmd, profile("6.18"))
    sysfs.advisor_mode = "scan-time"
    sysfs.run = 2
    saved = {name: sysfs.read(name) for name in sysfs.tunables()}
    sysfs.run = 0
    sysfs.advisor_mode = "none"
    sysfs.pages_to_scan, sysfs.sleep_millisecs, sysfs.use_zero_pages = 7, 8, True
    restore(sysfs, saved, unmerge=True)
    assert {name: sysfs.read(name) for name in saved} == saved
    with pytest.raises(FileNotFoundError):
        restore(sysfs, {"gone": "1\n", "sleep_millisecs": "9\n"})
    assert sysfs.sleep_millisecs == 9  # one failure does not stop the rest


# ---- madvise -------------------------------------------------------------------------------------------------


@linux_only
def test_whole_pages_only() -> None:
    page = mmap.PAGESIZE
    whole = mmap.mmap(-1, 4 * page)
    assert madvise(whole, MADV_NOHUGEPAGE) == 4 * page
    view = np.frombuffer(whole, np.uint8)
    assert madvise(view[1:], MADV_NOHUGEPAGE) == 3 * page
    assert madvise(view[:-1], MADV_NOHUGEPAGE) == 3 * page
    assert madvise(view[1:-1].view(np.int8), MADV_NOHUGEPAGE) == 2 * page
    assert madvise(view[: page - 1], MADV_NOHUGEPAGE) == 0
    assert madvise(view[1 : page + 5], MADV_NOHUGEPAGE) == 0
    assert madvise(view[:0], MADV_NOHUGEPAGE) == 0
    assert madvise(memoryview(whole)[page:], MADV_NOHUGEPAGE) == 3 * page
    assert madvise(view.reshape(4, page).T, MADV_NOHUGEPAGE) == 4 * page
    assert madvise(b"", MADV_NOHUGEPAGE) == 0
    with pytest.raises(ValueError, match="contiguous"):
        madvise(view[::2], MADV_NOHUGEPAGE)
    with pytest.raises(OSError, match="advice 9999") as caught:
        madvise(whole, 9999)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(TypeError):
        madvise(5, MADV_NOHUGEPAGE)
    stamps = np.zeros(page, "datetime64[ns]")
    assert madvise(stamps, MADV_NOHUGEPAGE) >= 7 * page


@linux_only
def test_unmapped_memory() -> None:
    page = mmap.PAGESIZE
    area = mmap.mmap(-1, 2 * page)
    view = np.frombuffer(area, np.uint8)
    gone = np.lib.stride_tricks.as_strided(view[:1], (1 << 40,), (1,))
    with pytest.raises(OSError, match="madvise of") as caught:
        madvise(gone, MADV_NOHUGEPAGE)
    assert caught.value.errno == errno.ENOMEM


# ---- the running kernel --------------------------------------------------------------------------------------


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    with host.lock():
        before = host.ksm.tunables()
        yield host
        assert host.ksm.tunables() == before


@drives_the_kernel
def test_an_array_really_merges(host: Host) -> None:
    n = 40
    page = np.random.default_rng(5).integers(0, 256, mmap.PAGESIZE, np.uint8)
    area = mmap.mmap(-1, n * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(area, np.uint8).reshape(n, mmap.PAGESIZE)
    madvise(area, MADV_NOHUGEPAGE)
    array[:] = page
    first = host.ksm.snapshot()
    passes = host.ksm.full_scans
    assert madvise(array, MADV_MERGEABLE) == array.nbytes
    host.step()
    assert host.ksm.full_scans == passes + 1
    host.step()
    merged = host.ksm.snapshot()
    assert merged.pages_sharing - first.pages_sharing == n - 1
    assert merged.pages_shared - first.pages_shared == 1
    mine = host.ksm_stat()
    assert mine["ksm_merging_pages"] == n
    assert mine == host.ksm_stat(os.getpid())
    assert any(p.pid == os.getpid() and p.stats.ksm_merging_pages == n for p in host.processes())
    assert (array == page).all()
    copies = host.vmstat["cow_ksm"]
    array[3, 5] ^= 1
    assert host.vmstat["cow_ksm"] == copies + 1
    madvise(array, MADV_UNMERGEABLE)
    host.step(passes=2)
    assert host.ksm_stat()["ksm_rmap_items"] == 0
    assert array[3, 5] == page[5] ^ 1


@drives_the_kernel
def test_batches_of_the_kernel(host: Host) -> None:
    n = 100
    area = mmap.mmap(-1, n * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    madvise(area, MADV_NOHUGEPAGE)
    np.frombuffer(area, np.uint64)[:: mmap.PAGESIZE // 8] = np.arange(n, dtype=np.uint64) + 12345
    with host.single_step(unmerge=True) as ksmd:
        ksmd.scan()
        madvise(area, MADV_MERGEABLE)
        host.ksm.smart_scan = False
        ksmd.scan()
        other = host.ksm.pages_scanned
        assert ksmd.scan_pages(30) == 30
        assert host.ksm.pages_scanned == other + 30
        passes = host.ksm.full_scans
        assert [ksmd.scan_pages(30) for _ in range(2)] == [30, 30]
        assert host.ksm.full_scans == passes
        rest = ksmd.scan()
        assert rest is not None
        assert rest >= n - 90
        assert host.ksm.full_scans == passes + 1
        assert host.ksm_stat()["ksm_rmap_items"] == n
        madvise(area, MADV_UNMERGEABLE)
        ksmd.scan()
        ksmd.scan()


@drives_the_kernel
def test_nothing_registered_is_noticed(host: Host) -> None:
    with host.single_step() as ksmd:
        ksmd.scan()
        start = time.monotonic()
        ksmd.scan()
        assert time.monotonic() - start < 10


@drives_the_kernel
def test_everything_is_put_back_after_a_failure(host: Host) -> None:
    before = host.ksm.tunables()
    area = mmap.mmap(-1, 10 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    madvise(area, MADV_NOHUGEPAGE)
    np.frombuffer(area, np.uint8)[:] = 77
    madvise(area, MADV_MERGEABLE)
    with pytest.raises(RuntimeError, match="on purpose"), host.single_step() as ksmd:
        host.ksm.write("run", "2")
        host.ksm.write("run", "0")
        host.ksm.max_page_sharing = 5
        host.ksm.use_zero_pages = True
        host.ksm.stable_node_chains_prune_millisecs = 1
        if "advisor_mode" in host.ksm.names():
            host.ksm.advisor_min_pages_to_scan = 7
            host.ksm.advisor_mode = "scan-time"
            host.ksm.advisor_mode = "none"
        ksmd.scan()
        ksmd.scan()
        assert host.ksm.pages_shared >= 2  # in the way of max_page_sharing's old value
        raise RuntimeError("on purpose")
    assert host.ksm.tunables() == before
    madvise(area, MADV_UNMERGEABLE)


@drives_the_kernel
def test_a_running_ksmd_runs_again(host: Host) -> None:
    saved = {name: host.ksm.read(name) for name in host.ksm.tunables()}
    try:
        host.ksm.run = 1
        host.step()
        assert host.ksm.run == 1
    finally:
        restore(host.ksm, saved)


@drives_the_kernel
def test_without_root(host: Host) -> None:
    os.seteuid(65534)
    try:
        assert host.ksm.run in (0, 1, 2)
        with pytest.raises(KernelPermissionError, match="run, which needs root"):
            host.ksm.run = 1
        with pytest.raises(KernelPermissionError, match="run, which needs root"):
            host.step()
        with pytest.raises(KernelPermissionError, match="needs its owner or root"):
            host.ksm_stat(1)
    finally:
        os.seteuid(0)
    with pytest.raises(KernelPermissionError) as caught:
        host.ksm.write("pages_shared", "1")
    assert caught.value.errno == errno.EACCES


@drives_the_kernel
def test_the_hosts_numbers(host: Host) -> None:
    assert host.page_size == mmap.PAGESIZE
    assert 0 < host.mem_available <= host.mem_total
    assert host.ksmd_pid() is not None
    before = host.ksmd_cpu_seconds()
    with host.single_step() as ksmd:
        ksmd.scan()
    assert host.ksmd_cpu_seconds() > before
    assert set(host.ksm_stat()) <= set(host.kernel.ksm_stat_fields) | {"ksm_merging_pages"}
    assert set(host.vmstat) == set(host.kernel.vmstat_fields)
    with pytest.raises(NoSuchProcessError):
        host.ksm_stat(1 << 23)
    sysfs: Sysfs = host.ksm
    assert sysfs.snapshot().page_size == mmap.PAGESIZE


@linux_only
@pytest.mark.usefixtures("ksm_lock")
def test_memory_merge(run_python: Callable[[str], str]) -> None:
    if not Host().root.exists() or not Host().kernel.process_merge_any:
        pytest.skip("the running kernel has no KSM, or is older than 6.4")
    code = """if True:
        from ksm.linux import get_memory_merge, set_memory_merge
        seen = [get_memory_merge()]
        for on in (True, True, False):
            set_memory_merge(on)
            seen.append(get_memory_merge())
        print(seen)
    """
    assert run_python(code) == "[False, True, True, False]\n"

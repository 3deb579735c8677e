"""Sources of pages: raw files, sparse files, live processes, and everything that is wrong with them."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ksm import sources
from ksm.errors import KernelPermissionError, SourceError
from ksm.linux import Host
from ksm.pages import fingerprint
from ksm.sources import ArrayImage, Image, ProcessImage, RawImage, Segment, Snapshot
from ksm.sources.pagemap import Pagemap
from ksm.sources.process import parse_smaps

PAGE = 4096
linux = pytest.mark.skipif(sys.platform != "linux", reason="live processes are read on Linux only")


def random_pages(n: int, seed: int = 1) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, PAGE), dtype=np.uint8)


def content(image: Image) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    last = -1
    for address, pages, present in image.blocks():
        assert address > last and address % image.page_size == 0
        assert pages.dtype == np.uint8 and pages.shape[1] == image.page_size
        for i, page in enumerate(pages):
            if present is None or present[i]:
                found[address + i * image.page_size] = page.tobytes()
        last = address + (len(pages) - 1) * image.page_size
    return found


# ---- raw files -------------------------------------------------------------------------------------


def test_raw_file(tmp_path: Path) -> None:
    pages = random_pages(20)
    file = tmp_path / "guest.raw"
    pages.tofile(file)
    with sources.open(file) as image:
        assert isinstance(image, RawImage)
        assert (image.npages, image.holes, image.anonymous_known, image.page_size) == (20, 0, False, PAGE)
        assert content(image) == {i * PAGE: page.tobytes() for i, page in enumerate(pages)}
        assert content(image) == content(image)  # again
    with pytest.raises(ValueError, match="closed"):
        next(image.blocks())


def test_blocks_outlive_the_image(tmp_path: Path) -> None:
    file = tmp_path / "guest.raw"
    random_pages(2).tofile(file)
    with sources.open(file) as image:
        ((_, pages, _),) = image.blocks()
    assert (pages == random_pages(2)).all()
    assert not pages.flags.writeable


def test_raw_file_of_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksm.sources.stored._BLOCK_BYTES", 16 << 20)
    file = tmp_path / "guest.raw"
    pages = np.zeros((9000, PAGE), np.uint8)
    pages[:, 0] = np.arange(9000) % 251
    pages.tofile(file)
    with sources.open(file) as image:
        blocks = list(image.blocks())
        assert len(blocks) == 3
        assert image.segments == (Segment(0, 9000 * PAGE),)
        assert np.concatenate([block[1][:, 0] for block in blocks]).tolist() == pages[:, 0].tolist()


def test_holes_are_never_touched(tmp_path: Path) -> None:
    pages = random_pages(3)
    file = tmp_path / "sparse.raw"
    with file.open("wb") as f:
        f.truncate(100 * PAGE)
        f.seek(10 * PAGE)
        f.write(pages[0].tobytes())
        f.seek(50 * PAGE)
        f.write(pages[1:].tobytes())
    with sources.open(file) as image:
        if image.holes == 0:
            pytest.skip("this file system has no holes")
        assert (image.npages, image.holes, image.anonymous_known) == (3, 97, True)
        assert content(image) == {
            10 * PAGE: pages[0].tobytes(),
            50 * PAGE: pages[1].tobytes(),
            51 * PAGE: pages[2].tobytes(),
        }


def test_many_small_holes_make_few_blocks(tmp_path: Path) -> None:
    """A memory file on a file system that fragments: a block for each piece of data would take minutes."""
    pages = random_pages(5000)
    file = tmp_path / "fragmented.raw"
    with file.open("wb") as f:
        for i, page in enumerate(pages):
            f.seek((2 * i + 40 * (i >= 4000)) * PAGE)
            f.write(page.tobytes())
    with sources.open(file) as image:
        if image.holes == 0:
            pytest.skip("this file system has no holes")
        assert image.npages == 5000
        blocks = list(image.blocks())
        assert [(address // PAGE, len(pages)) for address, pages, _ in blocks] == [(0, 7999), (8040, 1999)]
        assert b"".join(content(image).values()) == pages.tobytes()
        assert Snapshot.take(image).pages == 5000


def test_a_file_that_is_one_hole(tmp_path: Path) -> None:
    file = tmp_path / "hole.raw"
    with file.open("wb") as f:
        f.truncate(1 << 40)  # nothing may follow from the length
    with sources.open(file) as image:
        if image.holes == 0:
            pytest.skip("this file system has no holes")
        assert (image.npages, image.holes) == (0, (1 << 40) // PAGE)
        assert content(image) == {}


def test_holes_smaller_than_a_page(tmp_path: Path) -> None:
    file = tmp_path / "sparse.raw"
    with file.open("wb") as f:
        f.truncate(4 * 65536)
        f.seek(65536 + 8192)
        f.write(b"x" * 4096)
    with RawImage(file, page_size=65536) as image:
        if image.holes == 0:
            pytest.skip("this file system has no holes")
        assert (image.npages, image.holes) == (1, 3)
        (page,) = content(image).items()
        assert page == (65536, bytes(8192) + b"x" * 4096 + bytes(65536 - 12288))


def test_truncated_file(tmp_path: Path) -> None:
    file = tmp_path / "cut.raw"
    file.write_bytes(bytes(2 * PAGE + 5))
    with pytest.raises(SourceError, match=r"cut.raw: ends at offset 8197 .* 5 bytes after the last whole one"):
        sources.open(file)


def test_file_that_shrinks(tmp_path: Path) -> None:
    file = tmp_path / "guest.raw"
    file.write_bytes(bytes(20 * PAGE))
    with sources.open(file) as image:
        os.truncate(file, 5 * PAGE)
        with pytest.raises(SourceError, match="shrank below offset 81920"):
            list(image.blocks())


def test_empty_file(tmp_path: Path) -> None:
    file = tmp_path / "empty.raw"
    file.touch()
    with pytest.raises(SourceError, match="the file is empty"):
        sources.open(file)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("/", "a directory"),
        ("/dev/null", "a device"),
        ("/nonexistent/guest.raw", "No such file"),
        ("", "No such file"),
        ("a\0b", "null byte"),
        ("pid:", "not a process id"),
        ("pid:x", "not a process id"),
        ("pid:-1", "not a process id"),
        ("pid:0", "not a process id"),
        ("pid:4194305", "no such process"),
        ("pid:99999999999999999999", "not a process id"),
        ("pid:²", "not a process id"),
    ],
)
def test_what_is_no_source(where: str, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        sources.open(where)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pipe_is_no_source_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="a pipe"):
        sources.open(tmp_path / "pipe")


@pytest.mark.parametrize("head", [b"QFI\xfb", b"KDMV", b"DISKDUMP", b"PAGEDU64", b"\x89LZO\0\r\n\x1a\n"])
def test_other_formats_are_not_taken_for_raw_pages(tmp_path: Path, head: bytes) -> None:
    file = tmp_path / "guest.raw"
    file.write_bytes(head.ljust(PAGE, b"\0"))
    with pytest.raises(SourceError, match="cannot be read; `ksm formats` lists what can"):
        sources.open(file)
    assert RawImage(file).npages == 1  # whoever knows better can say so


def test_a_path_object_is_never_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").write_bytes(bytes(PAGE))
    assert isinstance(sources.open(Path("self")), RawImage)
    assert isinstance(sources.open("self"), ProcessImage)


@pytest.mark.parametrize("size", [0, -4096, 4097])
def test_bad_page_size(tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        RawImage(tmp_path / "x", size)


def test_open_files_are_closed(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/dev/fd"))

    bad = tmp_path / "cut.raw"
    bad.write_bytes(b"x" * 5)
    elf = tmp_path / "elf"
    elf.write_bytes(b"\x7fELF".ljust(PAGE))
    before = descriptors()
    for where in (bad, elf, tmp_path, "pid:4194305"):
        with pytest.raises(SourceError):
            sources.open(where)
    with sources.open("self") if sys.platform == "linux" else RawImage(elf):
        pass
    assert descriptors() == before


# ---- arrays and snapshots ----------------------------------------------------------------------------


def test_array_image() -> None:
    pages = random_pages(4)
    present = np.array([True, False, True, True])
    image = ArrayImage(pages, "mine", present, address=0x1000)
    assert (image.npages, image.holes, len(content(image))) == (3, 1, 3)
    with pytest.raises(ValueError, match="uint8"):
        ArrayImage(pages.view(np.uint16))
    with pytest.raises(ValueError, match="present has shape"):
        ArrayImage(pages, present=present[:2])


def test_snapshot_holds_the_fingerprints(tmp_path: Path) -> None:
    pages = random_pages(4)
    pages[2] = 0
    seen: list[int] = []
    snapshot = Snapshot.take(ArrayImage(pages, present=np.array([True, False, True, True])), progress=seen.append)
    assert snapshot.pages == 3 and seen == [3]
    assert (snapshot.words() == fingerprint(pages).words[[0, 2, 3]]).all()
    assert (snapshot.without_zeros().words() == fingerprint(pages).words[[0, 3]]).all()


# ---- live processes ------------------------------------------------------------------------------------

CHILD = """
import ctypes, mmap, sys
page = mmap.PAGESIZE
area = mmap.mmap(-1, 64 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_NOHUGEPAGE)
for i in range(8):
    area[i * page : (i + 1) * page] = bytes([i + 1]) * page
area[8 * page : 9 * page] = bytes(page)      # written, all zero
area[9 * page]                               # only read: the shared zero page
shared = mmap.mmap(-1, 8 * page, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
shared[:] = b"s" * len(shared)
file = open(sys.argv[1], "r+b")
private = mmap.mmap(file.fileno(), 4 * page, flags=mmap.MAP_PRIVATE)
bytes(private)                               # all four are mapped
private[page : 2 * page] = b"p" * page       # one is copied
def at(m): return ctypes.addressof(ctypes.c_char.from_buffer(m))
print(at(area), at(shared), at(private), flush=True)
if len(sys.argv) > 2:
    area.madvise(12)
    print("marked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[..., tuple[int, list[int]]]]:
    """Start the child above; gives its pid and the addresses of its three areas."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> tuple[int, list[int]]:
        file = tmp_path / "mapped"
        file.write_bytes(b"f" * 4 * mmap.PAGESIZE)
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(file), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        addresses = [int(word) for word in process.stdout.readline().split()]
        if arguments and process.stdout.readline() != "marked\n":
            pytest.skip("this kernel has no KSM: madvise(MADV_MERGEABLE) fails")
        return process.pid, addresses

    yield start
    for process in started:
        process.kill()
        process.communicate()


@linux
def test_anonymous_pages_of_a_process(child: Callable[..., tuple[int, list[int]]]) -> None:
    pid, (area, shared, private) = child()
    page = mmap.PAGESIZE
    with sources.open(f"pid:{pid}") as image:
        assert isinstance(image, ProcessImage)
        found = content(image)
        assert image.npages == len(found)
        assert image.anonymous_known and image.name == f"pid:{pid}"
        for i in range(8):
            assert found[area + i * page] == bytes([i + 1]) * page
        assert found[area + 8 * page] == bytes(page)
        if image.zero_page_known:
            assert area + 9 * page not in found
            assert image.excluded["zero page"] >= 1
        assert not any(area + i * page in found for i in range(10, 64))  # never touched
        assert not any(shared + i * page in found for i in range(8))
        assert [private + i * page in found for i in range(4)] == [False, True, False, False]
        assert found[private + page] == b"p" * page
        special = [a for a in image.areas if a.what in ("[vvar]", "[vdso]", "[vsyscall]", "[vvar_vclock]")]
        assert special and not any(a.start in found for a in special)
        assert any(a.what == "[stack]" and any(a.start <= at < a.end for at in found) for a in image.areas)


@linux
def test_marked_only(ksm_lock: None, child: Callable[..., tuple[int, list[int]]]) -> None:
    pid, _ = child()
    with ProcessImage(pid, marked_only=True) as image:
        assert image.npages == 0
        assert image.excluded["not marked"] > 0
    pid, (area, _, _) = child("mark")
    with sources.open(f"pid:{pid}", marked_only=True) as image:
        wanted = {area + i * mmap.PAGESIZE for i in range(9)}
        assert set(content(image)) - {area + 9 * mmap.PAGESIZE} == wanted


@linux
def test_this_process() -> None:
    pages = random_pages(300)
    with sources.open("self") as image:
        found = content(image)
    start = -(-pages.ctypes.data // PAGE) * PAGE
    if mmap.PAGESIZE != PAGE:
        pytest.skip("pages of another size")
    assert found[start] == ctypes.string_at(start, PAGE)


@linux
def test_zero_page_is_found_by_both_ways() -> None:
    """By the ioctl, and by its frame number; where both work they agree."""
    page = mmap.PAGESIZE
    area = mmap.mmap(-1, 16 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    area[0] = 1
    area[page] = 0
    bytes(area[2 * page : 4 * page])
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    pagemap = Pagemap(os.open("/proc/self/pagemap", os.O_RDONLY))
    from ksm.sources.pagemap import zero_page_frames

    tried = 0
    for scans, frames in ((True, frozenset()), (False, zero_page_frames())):
        if (scans and not pagemap._scans) or (not scans and not frames):
            continue
        other = Pagemap(os.open("/proc/self/pagemap", os.O_RDONLY))
        other._scans, other._zero_frames = scans, frames
        slots = other.slots(address, address + 16 * page)
        assert slots.present.tolist() == [True] * 4 + [False] * 12
        assert slots.zero.tolist() == [False, False, True, True] + [False] * 12
        assert slots.mergeable.tolist() == [True, True] + [False] * 14
        other.close()
        tried += 1
    pagemap.close()
    if not tried:
        pytest.skip("the zero page cannot be seen here: it needs Linux 6.7 or root")


@linux
def test_process_that_ends_while_it_is_read(child: Callable[..., tuple[int, list[int]]]) -> None:
    pid, _ = child()
    with ProcessImage(pid) as image:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(SourceError, match=f"pid:{pid}: the process ended while it was read"):
            list(image.blocks())
    with pytest.raises(SourceError, match="no memory of its own"):  # a zombie
        sources.open(f"pid:{pid}")


@linux
def test_pages_that_go_away_are_not_present(child: Callable[..., tuple[int, list[int]]]) -> None:
    page = mmap.PAGESIZE
    area = mmap.mmap(-1, 300 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    for i in range(300):
        area[i * page] = 1
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    with ProcessImage("self") as image:
        # A file mapping past the file's end: nothing can be read there.
        with open(os.memfd_create("empty"), "rb") as empty:
            assert libc.mmap(address + 100 * page, 50 * page, 1, 0x12, empty.fileno(), 0) == address + 100 * page
        found = content(image)
    assert [i for i in range(300) if address + i * page not in found] == list(range(100, 150))
    del image


@linux
def test_another_users_process(child: Callable[..., tuple[int, list[int]]], tmp_path: Path) -> None:
    if os.geteuid() != 0:
        with pytest.raises(KernelPermissionError, match="its own user or by root"):
            sources.open("pid:1")
        return
    pid, _ = child()
    reader, writer = os.pipe()
    reading = os.fork()
    if reading == 0:  # as somebody else, in a process of its own
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            try:
                sources.open(f"pid:{pid}")
                os.write(writer, b"it was opened")
            except KernelPermissionError as error:
                os.write(writer, f"{error.exit_code} {error.errno} {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(reading, 0)
    assert answer.startswith("77 13 ") and answer.endswith(
        f"pid:{pid}: its memory can be read by its own user or by root"
    )


@linux
def test_a_kernel_thread_has_no_memory() -> None:
    names = ((entry, Path("/proc", entry, "stat")) for entry in os.listdir("/proc") if entry.isdigit())
    for pid, stat in names:
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == "2":
            with pytest.raises((SourceError, KernelPermissionError)):
                sources.open(f"pid:{pid}")
            return
    pytest.skip("no kernel thread can be seen here")


@linux
def test_swapped_and_released_memory_is_not_counted() -> None:
    page = mmap.PAGESIZE
    area = mmap.mmap(-1, 512 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    area[:] = b"x" * len(area)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    pagemap = Pagemap(os.open("/proc/self/pagemap", os.O_RDONLY))
    assert pagemap.slots(address, address + len(area)).mergeable.all()
    area.madvise(mmap.MADV_DONTNEED)
    time.sleep(0)
    assert not pagemap.slots(address, address + len(area)).present.any()
    pagemap.close()


def test_smaps_of_odd_names() -> None:
    text = (
        "00400000-00452000 r-xp 00000000 08:02 173521 /tmp/VmFlags: a-b c\n"
        "Size:  328 kB\nVmFlags: rd ex mr mw me\n"
        "7f0000000000-7f0000002000 rw-p 00000000 00:00 0 \n"
        "Size:  8 kB\nVmFlags: rd wr mr mw me ac mg\n"
    )
    areas = list(parse_smaps(iter(text.splitlines(keepends=True))))
    assert [(a.start, a.end, a.marked, a.compatible) for a in areas] == [
        (0x400000, 0x452000, False, True),
        (0x7F0000000000, 0x7F0000002000, True, True),
    ]
    assert areas[0].what == "/tmp/VmFlags: a-b c" and areas[1].what == ""


# ---- the kernel's own view --------------------------------------------------------------------------

# A process that opts in as a whole, with memory of every kind; each line of "N name" is a kind and its page count.
ODD_MEMORY = """
import ctypes, os, sys, tempfile, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.madvise.argtypes = libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.prctl(41, 1, 0, 0, 0)  # no huge pages
if libc.prctl(67, 1, 0, 0, 0):
    print("refused", flush=True)
    sys.exit()
PAGE, N = os.sysconf("SC_PAGESIZE"), 64
SHARED, PRIVATE, DROPPABLE, ANONYMOUS, GROWSDOWN = 1, 2, 8, 0x20, 0x100

def area(flags, fd=-1, fill=True):
    at = libc.mmap(None, N * PAGE, 3, flags, fd, 0)
    if at == 2 ** (8 * ctypes.sizeof(ctypes.c_void_p)) - 1:
        return None  # not on this kernel
    if fill:
        ctypes.memmove(at, os.urandom(N * PAGE), N * PAGE)
    return at

def file(flags):
    with tempfile.TemporaryFile() as f:
        f.write(os.urandom(N * PAGE))
        f.flush()
        at = area(flags, f.fileno(), fill=False)
    for page in range(0, N, 2):
        ctypes.memset(at + page * PAGE, 7, 100)
    for page in range(N):
        ctypes.string_at(at + page * PAGE, 1)

def memory_file(flags):
    fd = os.memfd_create("odd")
    os.ftruncate(fd, N * PAGE)
    area(flags, fd)

for flags in (PRIVATE, SHARED):
    area(flags | ANONYMOUS), file(flags), memory_file(flags), area(flags, os.open("/dev/zero", os.O_RDWR))
area(PRIVATE | ANONYMOUS | GROWSDOWN), area(DROPPABLE | ANONYMOUS)
for protection in (0, 1, 5):
    libc.mprotect(area(PRIVATE | ANONYMOUS), N * PAGE, protection)
libc.mlock(area(PRIVATE | ANONYMOUS), N * PAGE)
for advice in (4, 8, 10, 13, 16, 18, 20, 102):  # don't need, free, don't fork, unmergeable, no dump, wipe, cold, guard
    libc.madvise(area(PRIVATE | ANONYMOUS), N // 2 * PAGE, advice)
only_read = area(PRIVATE | ANONYMOUS, fill=False)
for page in range(N):
    ctypes.string_at(only_read + page * PAGE, 1)
print("ready", flush=True)
sys.stdin.read()
"""


@linux
def test_the_kernel_takes_the_same_pages() -> None:
    """Of memory of every kind, what is read is what the kernel's ksmd remembers, page for page."""
    host = Host()
    if os.geteuid() != 0 or not os.access(host.root / "run", os.W_OK):
        pytest.skip("driving the kernel's KSM needs root")
    with host.lock():
        process = subprocess.Popen(
            [sys.executable, "-c", ODD_MEMORY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                pytest.skip("this kernel refuses PR_SET_MEMORY_MERGE")
            os.kill(process.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            with ProcessImage(process.pid, marked_only=True) as image, ProcessImage(process.pid) as everything:
                assert image.zero_page_known
                assert everything.npages == image.npages + 32  # those marked unmergeable
                with host.single_step(unmerge=True) as ksmd:
                    host.ksm.smart_scan = False
                    for _ in range(3):
                        ksmd.scan()
                    assert host.ksm_stat(process.pid)["ksm_rmap_items"] == image.npages
        finally:
            process.kill()
            process.communicate()

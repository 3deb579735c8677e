"""ELF cores, LiME and AVML dumps, and compression around them: what is read, and what is refused with which offset."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from ksm import sources
from ksm.errors import KsmError, SourceError, UnsupportedError
from ksm.sources import RawImage, Segment, extras
from ksm.sources.compression import COMPRESSIONS, StreamData
from ksm.sources.data import FileData
from ksm.sources.elf import ElfImage
from ksm.sources.lime import AvmlImage, LimeImage
from ksm.sources.stored import Extent, StoredImage
from tests import dumps
from tests.test_sources import content

PAGE = 4096
zstd = extras.load("zstd")


def some(pages: int, seed: int = 1) -> bytes:
    """Pages of noise, text and zeros."""
    rng = np.random.default_rng(seed)
    kinds = [rng.bytes(PAGE), b"text " * 819 + b"!", bytes(PAGE)]
    return b"".join(kinds[0] if n % 3 == 0 else kinds[n % 3][:-1] + bytes([seed]) for n in range(pages - 1)) + bytes(
        PAGE
    )


MEMORY = {0x1000: some(9), 0x100000: some(40, 2), 0xFFFC0000: some(4, 3)}
PAGES = dumps.pages_of(MEMORY)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes, name: str = "dump") -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


Write = Callable[[bytes], Path]


# ---- ELF ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"shift": 0x1000}, {"physical": False}, {"extended": True}, {"reverse": True}], ids=str
)
def test_elf_core(write: Write, options: dict[str, bool]) -> None:
    file = write(dumps.elf_core(MEMORY, **options))
    with sources.open(file) as image:
        assert isinstance(image, ElfImage) and image.format == "ELF core"
        assert image.npages == len(PAGES) and image.holes == 0 and not image.anonymous_known
        assert image.segments == tuple(Segment(address, len(data)) for address, data in MEMORY.items())
        assert content(image) == PAGES == content(image)
    with pytest.raises(ValueError, match="closed"):
        list(image.blocks())


def test_elf_as_pyelftools_sees_it(write: Write) -> None:
    file = write(dumps.elf_core(MEMORY, extended=False))
    with file.open("rb") as stream, sources.open(file) as image:
        found = {}
        for segment in ELFFile(stream).iter_segments("PT_LOAD"):
            found |= dumps.pages_of({segment["p_paddr"]: segment.data()})
        assert content(image) == found


def test_elf_segments_that_are_not_in_the_file(write: Write) -> None:
    """A core has less than was in memory: p_filesz below p_memsz, down to 0."""
    file = write(dumps.elf_core(MEMORY, absent={0x1000: 3 * PAGE, 0x400000: 5 * PAGE}))
    with sources.open(file) as image:
        assert content(image) == PAGES
        assert image.excluded == {"not in the dump": 8}
        assert Segment(0x400000, 5 * PAGE) in image.segments


def test_elf_segments_that_begin_inside_a_page(write: Write) -> None:
    data = some(3)
    file = write(dumps.elf_core({0x1800: data}))
    with sources.open(file) as image:
        assert content(image) == {0x2000: data[0x800:0x1800], 0x3000: data[0x1800:0x2800]}
        assert image.excluded == {"part of a page": 2}


def test_elf_segments_that_overlap(write: Write) -> None:
    first, second = some(10, 1), some(10, 2)
    file = write(dumps.elf_core({0x5000: first, 0x1000: second, 0xF000: second}))
    with sources.open(file) as image:
        expected = (
            dumps.pages_of({0x1000: second}) | dumps.pages_of({0xF000: second[0:]}) | dumps.pages_of({0x5000: first})
        )
        assert content(image) == expected
        assert image.excluded == {"described twice": 6}


def test_elf_of_the_kernels_half_is_left_out(write: Write) -> None:
    file = write(dumps.elf_core({0x1000: some(2), 0xFFFFFFFFFF600000: some(1)}, physical=False))
    with sources.open(file) as image:
        assert content(image) == dumps.pages_of({0x1000: some(2)})


def test_elf_with_holes(tmp_path: Path) -> None:
    """The kernel writes the cores of processes with holes where memory was never touched."""
    whole = dumps.elf_core({0x10000: bytes(100 * PAGE)}, shift=0x508)
    start = len(whole) - 100 * PAGE
    file = tmp_path / "core"
    with file.open("wb") as f:
        f.write(whole[:start])
        f.seek(start + 50 * PAGE)
        f.write(b"x" * PAGE)
        f.truncate(len(whole))
    with sources.open(file) as image:
        if image.holes == 0:
            pytest.skip("this file system has no holes")
        found = content(image)
        assert found[0x10000 + 50 * PAGE] == b"x" * PAGE
        assert set(found) <= {0x10000, *(0x10000 + n * PAGE for n in (49, 50, 51))}
        assert image.npages + image.holes == 100 and image.anonymous_known


def elf_with(offset: int, form: str, value: int) -> bytes:
    data = bytearray(dumps.elf_core(MEMORY))
    struct.pack_into(form, data, offset, value)
    return bytes(data)


def claiming_headers(count: int) -> bytes:
    data = bytearray(dumps.elf_core(MEMORY, extended=True))
    (sections,) = struct.unpack_from("<Q", data, 40)
    struct.pack_into("<I", data, sections + 44, count)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x7fELF", "offset 0x0: the ELF header is cut off: 64 bytes are needed, 4 are there"),
        (elf_with(4, "B", 1), "offset 0x4: an ELF file of another class"),
        (elf_with(5, "B", 2), "offset 0x4: an ELF file of another class"),
        (elf_with(16, "<H", 2), "offset 0x10: an ELF file, but no core: its type is 2"),
        (elf_with(54, "<H", 32), "offset 0x36: program headers of 32 bytes"),
        (elf_with(32, "<Q", 1 << 40), "offset 0x10000000000: the table of 4 program headers of 224 bytes goes beyond"),
        (elf_with(32, "<Q", (1 << 64) - 8), "offset 0xfffffffffffffff8: the table"),
        (elf_with(56, "<H", 0xFFFF), "offset 0x28: the number of program headers is in section header 0"),
        (claiming_headers(0xFFFFFFFF), "offset 0x28: 4294967295 program headers; at most 16777216 are read"),
        (elf_with(56, "<H", 0xFFFE), "the table of 65534 program headers"),
        (elf_with(64 + 56 + 8, "<Q", 1 << 62), "offset 0x4000000000000000: the segment of address 0x1000"),
        (elf_with(64 + 56 + 32, "<Q", 1 << 62), "cannot be"),
        (elf_with(64 + 56 + 40, "<Q", (1 << 64) - 1), "cannot be"),
        (dumps.elf_core({}), "no PT_LOAD segment"),
        (dumps.elf_core(MEMORY)[:-1], "goes beyond the end of the file"),
    ],
)
def test_broken_elf(write: Write, data: bytes, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        sources.open(write(data))
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ---- LiME and AVML -----------------------------------------------------------------------------------


def test_lime(write: Write) -> None:
    with sources.open(write(dumps.lime(MEMORY))) as image:
        assert isinstance(image, LimeImage) and image.npages == len(PAGES)
        assert content(image) == PAGES
    odd = {0x1000: some(9)[:-1024], 0x100000: some(2)}
    with sources.open(write(dumps.lime(odd))) as image:
        assert content(image) == {a: page for a, page in dumps.pages_of(odd).items() if len(page) == PAGE}
        assert image.excluded == {"part of a page": 1}


def test_avml(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(dumps.avml(MEMORY))
    with sources.open(file) as image:
        assert isinstance(image, AvmlImage) and image.npages == len(PAGES) and image.format == "AVML, compressed"
        assert content(image) == PAGES == content(image)
    with sources.open(write(dumps.avml(dict(reversed(MEMORY.items()))))) as image:
        assert content(image) == PAGES
    monkeypatch.setattr("ksm.sources.lime.BLOCK_BYTES", 100_000)  # blocks that end inside a chunk
    with sources.open(file) as image:
        assert content(image) == PAGES


def test_avml_of_odd_chunks(write: Write) -> None:
    """Chunks need not hold whole pages, may be stored plainly, and others may lie between them."""
    import cramjam

    memory = some(20)
    whole = bytes(cramjam.snappy.compress(memory[: 5 * PAGE + 100])) + b"\xfe\x05\x00\x0012345"
    whole += bytes(cramjam.snappy.compress(memory[5 * PAGE + 100 :]))
    data = (
        b"AVML" + struct.pack("<IQQQ", 2, 0x1000, 0x1000 + len(memory) - 1, 0) + whole + struct.pack("<Q", len(whole))
    )
    with sources.open(write(data)) as image:
        assert content(image) == dumps.pages_of({0x1000: memory})


def broken(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


LIME, AVML = dumps.lime(MEMORY), dumps.avml({0x1000: some(9)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LIME[:20], "offset 0x0: a range's header is cut off: 32 bytes are needed, 20 are there"),
        (LIME[:-1], "the range of address 0xfffc0000 of 16384 bytes goes beyond the end"),
        (LIME + b"EMiL", "header is cut off"),
        (LIME + b"x" * 32, "no header of a range"),
        (broken(LIME, 4, b"\2"), "offset 0x0: no header of a range (EMiL, version 1)"),
        (broken(LIME, 16, bytes(8)), "offset 0x0: a range from 0x1000 to 0x0 cannot be"),
        (broken(LIME, 16, b"\xff" * 8), "cannot be"),
        (broken(LIME, 16, b"\xff" * 7 + b"\x7f"), "goes beyond"),
        (AVML[:-1], "the length after a range is cut off"),
        (AVML[:60], "goes beyond the end of the file"),
        (broken(AVML, len(AVML) - 8, b"\0"), "the range before it takes"),
        (broken(AVML, 16, b"\xff\xff\xff\xff\x7f"), "snappy chunk"),
        (broken(AVML, 42, b"\x02"), "unknown type 0x2"),
        (broken(AVML, 42, b"\x00\x02\0\0"), "a snappy chunk of 2 bytes"),
        (broken(AVML, 50, b"\xff\xff\xff\x7f"), "a snappy chunk of 268435455 bytes"),
        (broken(AVML, 50, b"\xff\xff\xff\xff\xff"), "without their length"),
        (dumps.avml({0x1000: some(1)[:-1]}), "4095 bytes at 0x1000: parts of a page"),
        (AVML + AVML, "overlaps another"),
        (broken(AVML, 46, b"\0\0\0\0"), "broken snappy data"),
        (broken(AVML, 80, b"abcdefgh"), "broken snappy data"),
    ],
)
def test_broken_lime_and_avml(write: Write, data: bytes, message: str) -> None:
    with pytest.raises(SourceError, match="offset") as caught, sources.open(write(data)) as image:
        list(image.blocks())
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ---- where things lie ----------------------------------------------------------------------------------


def test_pieces_of_several_files_make_few_blocks(write: Callable[..., Path]) -> None:
    one, two = FileData(str(write(some(50, 1), "one"))), FileData(str(write(some(50, 2), "two")))
    extents = [Extent(PAGE * 2 * n, PAGE * n, PAGE, n % 2) for n in range(50)]
    with StoredImage([one, two], extents, PAGE) as image:
        assert len(list(image.blocks())) == 1
        expected = {PAGE * 2 * n: some(50, 1 + n % 2)[PAGE * n : PAGE * (n + 1)] for n in range(50)}
        assert content(image) == expected


@pytest.mark.parametrize("seed", range(20))
def test_overlaps_of_every_shape(write: Callable[..., Path], seed: int) -> None:
    """The first extent counts: against a page table filled from the last to the first."""
    rng = np.random.default_rng(seed)
    file = write(b"".join(n.to_bytes(2, "big") * (PAGE // 2) for n in range(200)))
    extents = []
    for _ in range(int(rng.integers(1, 30))):
        length = int(rng.integers(1, 40))
        place, offset = int(rng.integers(0, 60)), int(rng.integers(0, 200 - length))
        extents.append(Extent(place * PAGE, offset * PAGE, length * PAGE))
    expected = {}
    for extent in reversed(extents):
        for n in range(extent.length // PAGE):
            expected[extent.address + n * PAGE] = (extent.offset // PAGE + n).to_bytes(2, "big") * (PAGE // 2)
    with StoredImage([FileData(str(file))], extents, PAGE) as image:
        assert content(image) == expected
        assert image.npages == len(expected)


# ---- compression ---------------------------------------------------------------------------------------

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda data: zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1}),
}


@pytest.mark.parametrize("how", PACK)
@pytest.mark.parametrize("kind", ["raw", "elf", "lime", "avml"])
def test_compressed(write: Write, how: str, kind: str) -> None:
    memory = {0: some(400)} if kind == "raw" else MEMORY
    plain = {"raw": memory[min(memory)], "elf": dumps.elf_core(memory), "lime": LIME, "avml": dumps.avml(MEMORY)}[kind]
    with sources.open(write(PACK[how](plain))) as image:
        assert image.format.endswith(f", {how}")
        assert content(image) == dumps.pages_of(memory) == content(image)


@pytest.mark.parametrize("how", PACK)
def test_several_members_and_padding(write: Write, how: str) -> None:
    plain = some(900)
    packed = PACK[how](plain[:5000]) + PACK[how](b"") + PACK[how](plain[5000:]) + bytes(8)
    with sources.open(write(packed)) as image:
        assert isinstance(image, RawImage)
        assert content(image) == dumps.pages_of({0: plain})


def test_zstd_with_a_skippable_frame(write: Write) -> None:
    packed = b"\x50\x2a\x4d\x18\x04\0\0\0skip" + zstd.compress(some(5))
    with sources.open(write(packed)) as image:
        assert content(image) == dumps.pages_of({0: some(5)})


@pytest.mark.parametrize("how", PACK)
def test_broken_compression(write: Write, how: str) -> None:
    packed = PACK[how](some(600))
    for data in (packed[:-3], packed[: len(packed) // 2], packed[:20] + b"garbage" * 3 + packed[41:], packed + b"more"):
        with pytest.raises(SourceError, match=r"offset 0x[0-9a-f]+: ") as caught:
            sources.open(write(data))
        assert how in str(caught.value)


def test_going_back_in_a_stream(write: Write) -> None:
    plain = some(2000)
    data = StreamData(FileData(str(write(gzip.compress(plain)))), COMPRESSIONS["gzip"])
    for offset, length in ((5_000_000, 100), (10, 4096), (300_000, 2_000_000), (7_000_000, 1), (0, 3)):
        assert data.view(offset, length).tobytes() == plain[offset : offset + length]
        assert data.read(offset, length, "it") == plain[offset : offset + length]
    assert data.has(len(plain) - 1, 1) and not data.has(len(plain), 1) and data.size() == len(plain)
    with pytest.raises(SourceError, match="the unpacked data end"):
        data.view(len(plain) - 10, 20)


def test_a_compressed_dump_out_of_order_is_unpacked_once(write: Write) -> None:
    memory = {n << 20: some(3, n) for n in range(1, 40)}
    file = write(gzip.compress(dumps.elf_core(memory, reverse=True)))
    with sources.open(file) as image:
        assert isinstance(image, ElfImage) and isinstance(image.datas[0], FileData)
        assert content(image) == dumps.pages_of(memory)


def test_no_room_to_unpack(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write(gzip.compress(dumps.elf_core(MEMORY, reverse=True)))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    with pytest.raises(SourceError, match=r"unpacking it into .*not there \(TMPDIR\): No such file"):
        sources.open(file)


def test_compressed_twice(write: Write) -> None:
    with pytest.raises(SourceError, match="compressed twice"):
        sources.open(write(gzip.compress(lzma.compress(some(2)))))


def test_without_the_library(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("backports.zstd", "compression.zstd", "cramjam"):
        monkeypatch.setitem(sys.modules, module, None)
    for data in (zstd.compress(some(2)), AVML):
        with pytest.raises(UnsupportedError, match=r"pip install 'ksm\[dumps\]'"):
            sources.open(write(data))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited with Linux's RLIMIT_AS")
def test_memory_does_not_follow_from_what_a_file_claims(write: Callable[..., Path]) -> None:
    """2 GiB behind some KiB, xz and zstd that want a gigabyte, claimed ranges: in 1 GiB of address space."""
    big = zstd.compress(bytes(256 << 20)) * 8
    greedy = lzma.compress(b"x" * PAGE, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}])
    options = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.enable_long_distance_matching: 1}
    window = zstd.ZstdCompressor(options=options)
    files = {
        "big": write(big, "big"),
        "xz": write(greedy, "xz"),
        "zstd": write(window.compress(some(2)) + window.flush(), "zstd"),
        "elf": write(elf_with(64 + 56 + 32, "<Q", 1 << 40), "elf"),
        "lime": write(broken(LIME, 16, b"\xff" * 5 + b"\0\0\0"), "lime"),
    }
    child = os.fork()
    if child == 0:
        try:
            room = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE + (1 << 30)
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            with sources.open(files["big"]) as image:
                assert sum(len(pages) for _, pages, _ in image.blocks()) == 2 << 18
            for name in ("xz", "zstd", "elf", "lime"):
                with pytest.raises(KsmError, match="offset"):
                    sources.open(files[name])
            os._exit(0)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_sparse_dumps_cost_what_they_hold(tmp_path: Path) -> None:
    """A TiB in the file, of which some pages are there."""
    size = 1 << 40
    page = b"x" * PAGE
    for name, head in (("elf", dumps.elf_core({0: b""}, physical=False)), ("lime", dumps.lime({0: page})[:32])):
        data = bytearray(head)
        if name == "elf":
            struct.pack_into("<QQ", data, 64 + 56 + 32, size, size)
        else:
            struct.pack_into("<Q", data, 16, size - 1)
        start = len(data)
        file = tmp_path / name
        with file.open("wb") as f:
            f.write(data)
            f.truncate(start + size)
            f.seek(start + (size >> 1))
            f.write(page)
        with sources.open(file) as image:
            if image.holes == 0:
                pytest.skip("this file system has no holes")
            found = content(image)
            assert found[size >> 1] == page and len(found) < 10
            assert image.npages + image.holes == size // PAGE

"""QEMU migration streams, and libvirt's save files around them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from pathlib import Path

import pytest

from ksm import sources
from ksm.errors import SourceError
from ksm.sources import Segment
from ksm.sources.migration import MigrationImage
from tests import dumps
from tests.test_dumps import broken, some
from tests.test_sources import content

PAGE = 4096
# Pages out of order, holes, and more of a kind in a row than are looked at together.
MEMORY = {
    "pc.ram": {0x300000: some(30), 0: bytes(3000 * PAGE)[: 600 * PAGE], 0x700000: some(1) * 1300},
    "vga.vram": {0x4000: some(9, 2)},
}
SIZES = {"pc.ram": 16 << 20, "vga.vram": 1 << 20}
STREAM = dumps.migration(MEMORY, SIZES)
EXPECTED = dumps.pages_of(MEMORY["pc.ram"]) | dumps.pages_of({(16 << 20) + 0x4000: some(9, 2)})


@pytest.mark.parametrize("options", [{}, {"packed": True}, {"footers": False}, {"bits": 12}], ids=str)
def test_stream(tmp_path: Path, options: dict[str, int]) -> None:
    (tmp_path / "state").write_bytes(dumps.migration(MEMORY, SIZES, **options))
    with sources.open(tmp_path / "state") as image:
        assert isinstance(image, MigrationImage) and image.format == "QEMU migration stream"
        assert image.segments == (Segment(0, 16 << 20, "pc.ram"), Segment(16 << 20, 1 << 20, "vga.vram"))
        assert image.npages == len(EXPECTED)
        assert content(image) == EXPECTED == content(image)


def test_the_last_copy_of_a_page_counts(tmp_path: Path) -> None:
    """A guest that runs while it is moved dirties pages, which are sent again."""
    section = struct.pack(">I", 2)
    end = struct.pack(">Q", 0x10) + b"\x7e" + section
    page = some(3)[:PAGE]
    again = b"\x02" + section + struct.pack(">Q", 0x300000 | 8) + b"\x06pc.ram" + page
    again += struct.pack(">Q", 0x301000 | 0x22) + b"\x55" + struct.pack(">Q", 0x302000 | 0x22) + b"\0" + end
    at = STREAM.index(b"\x03" + section + struct.pack(">Q", 0x10))
    (tmp_path / "state").write_bytes(STREAM[:at] + again + STREAM[at:])
    with sources.open(tmp_path / "state") as image:
        expected = EXPECTED | {0x300000: page, 0x301000: b"\x55" * PAGE, 0x302000: bytes(PAGE)}
        assert content(image) == expected


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_libvirt_save_file(tmp_path: Path, pack: type[bytes]) -> None:
    (tmp_path / "save").write_bytes(dumps.libvirt(pack(STREAM), b"<domain type='kvm'/>".ljust(1000, b"\0")))
    with sources.open(tmp_path / "save") as image:
        assert isinstance(image, MigrationImage)
        assert image.format.startswith("QEMU migration stream") and image.format.endswith("libvirt save file")
        assert content(image) == EXPECTED
    (tmp_path / "save.gz").write_bytes(gzip.compress(dumps.libvirt(STREAM)))
    with sources.open(tmp_path / "save.gz") as image:
        assert image.format == "QEMU migration stream, libvirt save file, gzip"
        assert content(image) == EXPECTED


def test_compressed_stream(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(gzip.compress(STREAM))
    with sources.open(tmp_path / "state") as image:
        assert content(image) == EXPECTED


RAM = STREAM.index(b"\x01\0\0\0\2\3ram")  # the first section
LIST = RAM + 17
PAGES_AT = STREAM.index(b"\x02\0\0\0\2", LIST) + 5
CAPABLE = b"\x05\x1aconfiguration/capabilities" + struct.pack(">II", 1, 1) + b"\x0amapped-ram"
ODD = b"\x05\x03odd" + struct.pack(">I", 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (STREAM[:6], "offset 0x4: the header is cut off"),
        (broken(STREAM, 7, b"\2"), "offset 0x4: a migration stream of version 2"),
        (STREAM[:RAM], "a section, before the end of RAM, is cut off"),
        (STREAM[: RAM + 3], "a section is cut off"),
        (STREAM[: PAGES_AT + 5], "a RAM record is cut off"),
        (STREAM[: PAGES_AT + 100], "a page of 4096 bytes goes beyond the end"),
        (broken(STREAM, 9, b"\xff" * 4), "the machine's name of 4294967295 bytes goes beyond"),
        (broken(STREAM, RAM, b"\4"), "a section of type 0x4 where RAM is not complete"),
        (broken(STREAM, RAM, b"\x63"), "a section of type 0x63"),
        (broken(STREAM, RAM + 6, b"dam"), "section b'dam', version 4"),
        (broken(STREAM, LIST + 15, b"\xff" * 8), "RAM block b'pc.ram' of 18446744073709551615 bytes"),
        (broken(STREAM, LIST + 21, b"\1"), "RAM block b'pc.ram'"),
        (broken(STREAM, PAGES_AT, b"\x7f"), "of block pc.ram, of 16777216 bytes"),
        (broken(STREAM, PAGES_AT + 7, b"\x40"), "XBZRLE, which cannot be read"),
        (broken(STREAM, PAGES_AT + 7, b"\x80"), "RDMA, which cannot be read"),
        (broken(STREAM, PAGES_AT + 7, b"\x01"), "flags 0x1"),
        (broken(STREAM, PAGES_AT + 7, b"\x28"), "a page of no RAM block"),
        (broken(STREAM, PAGES_AT + 9, b"xx"), "RAM block b'xx.ram', which was not listed"),
        (STREAM[:RAM] + CAPABLE + STREAM[RAM:], "with 'mapped-ram', which cannot be read"),
        (STREAM[:RAM] + ODD + STREAM[RAM:], "the unknown subsection b'odd'"),
        (dumps.migration(MEMORY, SIZES, bits=30), "pages of 30 bits"),
        (dumps.libvirt(STREAM)[:50], "offset 0x0: the libvirt header is cut off"),
        (broken(dumps.libvirt(STREAM), 16, b"\0\0\0\2"), "of version 0x2000000"),
        (broken(dumps.libvirt(STREAM), 20, b"\xff" * 4), "the domain's XML of 4294967295 bytes goes beyond"),
        (broken(dumps.libvirt(STREAM), 11, b"dPart"), "unfinished libvirt save file"),
    ],
)
def test_broken_stream(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "state").write_bytes(data)
    with pytest.raises(SourceError) as caught, sources.open(tmp_path / "state") as image:
        list(image.blocks())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_compressed_page(tmp_path: Path) -> None:
    data = dumps.migration({"pc.ram": {0: some(1)[:-1] + b"x"}}, {"pc.ram": PAGE}, packed=True)
    at = data.index(b"\x78\x9c")
    for value, message in ((b"\0\0\0", "broken page"), (data[at : at + 3], "")):
        (tmp_path / "state").write_bytes(broken(data, at, value))
        with sources.open(tmp_path / "state") as image:
            if message:
                with pytest.raises(SourceError, match=message):
                    list(image.blocks())
            else:
                list(image.blocks())
    (tmp_path / "state").write_bytes(broken(data, at - 4, b"\xff\xff\xff\xff"))
    with pytest.raises(SourceError, match="a compressed page of 4294967295 bytes"):
        sources.open(tmp_path / "state")

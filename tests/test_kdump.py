"""kdump-compressed dumps, plain and flattened, with every compression."""

from __future__ import annotations

import gzip
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from ksm import sources
from ksm.errors import SourceError
from ksm.sources import Segment
from ksm.sources.data import FileData
from ksm.sources.flattened import FlatData
from ksm.sources.image import spans
from ksm.sources.kdump import KdumpImage
from tests import dumps
from tests.test_dumps import MEMORY, PAGES, broken, some
from tests.test_sources import content

PAGE = 4096
HOW = ["plain", "zlib", "lzo", "snappy", "zstd"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("flat", [False, True])
def test_every_compression(tmp_path: Path, how: str, flat: bool) -> None:
    data = dumps.kdump(MEMORY, how)
    (tmp_path / "dump").write_bytes(dumps.flattened(data) if flat else data)
    with sources.open(tmp_path / "dump") as image:
        assert isinstance(image, KdumpImage)
        assert image.format == "kdump-compressed" + ", flattened" * flat
        assert image.npages == len(PAGES) and not image.anonymous_known and not image.excluded
        assert image.segments == tuple(Segment(address, len(data)) for address, data in MEMORY.items())
        assert content(image) == PAGES == content(image)


def test_what_was_filtered_out(tmp_path: Path) -> None:
    filtered = {0x2000: some(1), 0x200000: some(70)}
    memory = {0x1000: some(1), 0x3000: some(20)}
    (tmp_path / "dump").write_bytes(dumps.kdump(memory, filtered=filtered))
    with sources.open(tmp_path / "dump") as image:
        assert image.excluded == {"filtered out": 71}
        assert image.segments == (Segment(0x1000, 22 * PAGE), Segment(0x200000, 70 * PAGE))
        assert content(image) == dumps.pages_of(memory)


def test_a_part_of_a_split_dump(tmp_path: Path) -> None:
    for version in (5, 6):
        (tmp_path / "dump").write_bytes(dumps.kdump({0: some(100)}, split=(13, 57), version=version))
        with sources.open(tmp_path / "dump") as image:
            pages = dumps.pages_of({0: some(100)})
            assert content(image) == {at: page for at, page in pages.items() if 13 <= at // PAGE < 57}
            assert image.segments == (Segment(13 * PAGE, 44 * PAGE),)


def test_large_memory_is_looked_at_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksm.sources.kdump._BITMAP_STEP", 1)  # eight pages at a time
    monkeypatch.setattr("ksm.sources.kdump.BLOCK_BYTES", 5 * PAGE)
    (tmp_path / "dump").write_bytes(dumps.kdump({0x3000: some(50), 0x90000: some(9)}))
    with sources.open(tmp_path / "dump") as image:
        assert image.segments == (Segment(0x3000, 50 * PAGE), Segment(0x90000, 9 * PAGE))
        assert content(image) == dumps.pages_of({0x3000: some(50), 0x90000: some(9)})
        assert max(len(pages) for _, pages, _ in image.blocks()) == 5


def test_flattened_in_any_order_and_written_twice(tmp_path: Path) -> None:
    data = dumps.kdump(MEMORY, "snappy")
    order = list(range(-(-len(data) // 777)))
    random.Random(1).shuffle(order)
    (tmp_path / "dump").write_bytes(gzip.compress(dumps.flattened(data, 777, order)))
    with sources.open(tmp_path / "dump") as image:
        assert image.format == "kdump-compressed, flattened, gzip"
        assert content(image) == PAGES
    stale = dumps.flattened(b"\xee" * len(data), 1234)[:-16]  # every byte written wrongly before
    (tmp_path / "dump").write_bytes(stale + dumps.flattened(data, 777, order)[4096:])
    with sources.open(tmp_path / "dump") as image:
        assert content(image) == PAGES


def test_flattened_data_has_gaps(tmp_path: Path) -> None:
    head = dumps.flattened(b"")[:4096]
    records = b"".join(struct.pack(">qq", at, 10) + bytes([at]) * 10 for at in (100, 20, 30))
    (tmp_path / "flat").write_bytes(head + records + struct.pack(">qq", -1, -1))
    data = FlatData(FileData(str(tmp_path / "flat")))
    assert data.size() == 110
    assert data.head(25, 100) == bytes([20]) * 5 + bytes([30]) * 10
    assert data.has(20, 20) and not data.has(20, 21) and not data.has(50, 1) and not data.has(0, 1)
    with pytest.raises(SourceError, match="offset 0x27: a piece of 2 bytes goes beyond"):
        data.view(39, 2)


def test_spans() -> None:
    numbers = np.array([0, 1, 2, 19, 40, 41, 42, 43])
    assert list(spans(numbers, 1000)) == [(0, 3), (3, 4), (4, 8)]
    assert list(spans(numbers, 3)) == [(0, 3), (3, 4), (4, 7), (7, 8)]
    assert list(spans(numbers[:0], 3)) == []


DUMP = dumps.kdump({0: some(30)})
DESCRIPTORS = 4 * PAGE
FLAT = dumps.flattened(DUMP)


def packed(form: str, value: int) -> bytes:
    return struct.pack(form, value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DUMP[:100], "offset 0x0: the kdump header is cut off"),
        (DUMP[:4100], "offset 0x1000: the kdump sub-header is cut off"),
        (DUMP[:9000], "offset 0x2000: the bitmaps of 8192 bytes goes beyond"),
        (DUMP[: DESCRIPTORS + 10], "offset 0x4000: the descriptors of 30 pages or more"),
        (DUMP[:-1], "goes beyond the end of the file"),
        (broken(DUMP, 428, packed("<I", 4097)), "offset 0x1ac: blocks of 4097 bytes"),
        (broken(DUMP, 428, packed(">I", 8192)), "another architecture"),
        (broken(DUMP, 424, packed("<I", 9)), "incomplete dump"),
        (broken(DUMP, 432, packed("<I", 0xFFFFFFFF)), "the bitmaps of 8192 bytes goes beyond"),
        (broken(DUMP, 436, packed("<I", 0xFFFFFFFF)), "the bitmaps of 17592186040320 bytes goes beyond"),
        (broken(DUMP, PAGE + 96, packed("<Q", 1 << 60)), "bitmaps of 32768 pages each, for 1152921504606846976 pages"),
        (broken(DUMP, DESCRIPTORS, packed("<q", 1 << 50)), "offset 0x4000000000000: a piece"),
        (broken(DUMP, DESCRIPTORS, packed("<q", -1)), "offset 0x4000: a page of"),
        (broken(DUMP, DESCRIPTORS + 8, packed("<I", 0)), "offset 0x4000: a page of 0 bytes"),
        (broken(DUMP, DESCRIPTORS + 8, packed("<I", 4097)), "a page of 4097 bytes"),
        (broken(DUMP, DESCRIPTORS + 12, packed("<I", 1)), "a broken page"),
        (broken(DUMP, DESCRIPTORS + 36, packed("<I", 3)), "unknown way, flags 0x3"),
        (broken(DUMP, DESCRIPTORS + 36, packed("<I", 2)), "broken page"),
        (broken(DUMP, DESCRIPTORS + 36, packed("<I", 4)), "broken page"),
        (broken(DUMP, DESCRIPTORS + 36, packed("<I", 32)), "broken page"),
        (FLAT[:30], "offset 0x0: the flattened header is cut off"),
        (FLAT[:-16], "a record's header is cut off"),
        (FLAT[:5000], "offset 0x1010: the record of 0x0 of 5000 bytes goes beyond"),
        (broken(FLAT, 23, b"\7"), "of type 7, version 1"),
        (broken(FLAT, 4096, b"\xff" * 7), "cannot be"),
        (broken(FLAT, 4104, b"\xff" * 8), "cannot be"),
        (broken(FLAT, 4104, b"\x7f" + b"\xff" * 7), "cannot be"),
    ],
)
def test_broken_kdump(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "dump").write_bytes(data)
    with pytest.raises(SourceError, match="offset") as caught, sources.open(tmp_path / "dump") as image:
        list(image.blocks())
    assert message in str(caught.value) and "\n" not in str(caught.value)

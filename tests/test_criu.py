"""CRIU image directories."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest

from ksm import sources
from ksm.errors import SourceError
from ksm.sources import Segment
from ksm.sources.criu import CriuImage
from tests import criu_writer, dumps
from tests.test_dumps import broken, some
from tests.test_sources import content

PAGE = 4096
MEMORY = {0x400000: some(3), 0x7F0000000000: some(40, 2), 0x7F0000100000: some(1), 0x7FFC00000000: some(8, 3)}
PAGES = dumps.pages_of(MEMORY)


@pytest.mark.parametrize("form", ["flags", "old", "wide"])
def test_process(tmp_path: Path, form: str) -> None:
    path = criu_writer.write(tmp_path, MEMORY, form=form)
    for where in (path, tmp_path, str(tmp_path)):
        with sources.open(where) as image:
            assert isinstance(image, CriuImage) and image.format == "CRIU image" and image.name == str(path)
            assert image.npages == len(PAGES) and image.anonymous_known and not image.excluded
            assert content(image) == PAGES == content(image)


def test_what_the_vmas_say(tmp_path: Path) -> None:
    vmas = [(0x400000, 0x500000, 1), (0x7F0000000000, 0x7F0000200000, 0x201)]
    vdso = (0x7FFC00002000, 0x7FFC00004000, 0x201 | criu_writer.VDSO)
    criu_writer.write(tmp_path, MEMORY, vmas=[*vmas, vdso, (0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000, 4)])
    with sources.open(tmp_path) as image:
        assert content(image) == {at: page for at, page in PAGES.items() if not vdso[0] <= at < vdso[1]}
        assert image.excluded == {"never mergeable": 2}
        assert image.segments == tuple(Segment(start, end - start) for start, end, _ in vmas)


def test_incremental_dumps(tmp_path: Path) -> None:
    """Pages that did not change are in the dump before, or in the one before that."""
    first, second, third = (some(10, seed) for seed in (1, 2, 3))
    criu_writer.write(tmp_path / "1", {0x10000: first})
    middle = second[: 2 * PAGE]
    criu_writer.write(tmp_path / "2", {0x12000: middle}, in_parent={0x10000: 2, 0x14000: 6})
    criu_writer.write(
        tmp_path / "3", {0x13000: third[:PAGE]}, in_parent={0x10000: 3, 0x14000: 2, 0x90000: 5}, lazy={0x80000: 4}
    )
    for older, newer in (("1", "2"), ("2", "3")):
        (tmp_path / newer / "parent").symlink_to(f"../{older}")
    with sources.open(tmp_path / "3") as image:
        expected = dumps.pages_of({0x10000: first[: 6 * PAGE]}) | {0x12000: middle[:PAGE], 0x13000: third[:PAGE]}
        assert content(image) == expected
        assert image.excluded == {"not in the dump": 9}


def test_parents_in_a_circle(tmp_path: Path) -> None:
    criu_writer.write(tmp_path / "1", {0x1000: some(1)}, in_parent={0x10000: 2})
    (tmp_path / "1" / "parent").symlink_to(".")
    with pytest.raises(SourceError, match=r"more than 100 parents|Too many levels"):
        sources.open(tmp_path / "1")


def test_several_processes_are_several_sources(tmp_path: Path) -> None:
    for pid in (7, 8):
        criu_writer.write(tmp_path, MEMORY, pid=pid)
    with pytest.raises(
        SourceError, match=r"2 processes, each a source of its own: \S+/pagemap-7.img \S+/pagemap-8.img"
    ):
        sources.open(tmp_path)


def test_holes_in_a_pages_file_are_zero_pages(tmp_path: Path) -> None:
    path = criu_writer.write(tmp_path, {0x1000: bytes(100 * PAGE)})
    with (tmp_path / "pages-1.img").open("wb") as f:
        f.truncate(100 * PAGE)
    with sources.open(path) as image:
        assert (image.npages, image.holes) == (100, 0)


def entry(**fields: int) -> bytes:
    return criu_writer.image(
        0x56084025, [criu_writer.MESSAGES["head"](pages_id=1), criu_writer.MESSAGES["entry"](**fields)]
    )


HEAD = entry(vaddr=0x1000, nr_pages=1, flags=4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HEAD[:8], "offset 0x8: no number of a pages file"),
        (HEAD[:10], "offset 0x8: a message's length is cut off"),
        (HEAD[:-1], "a message is cut off"),
        (broken(HEAD, 8, b"\xff" * 4), "offset 0x8: a message of 4294967295 bytes"),
        (broken(HEAD, 12, b"\x0b"), "a field of the unknown kind 3"),
        (broken(HEAD, 12, b"\x0a\x05"), "offset 0xe: a field of 5 bytes goes beyond its message"),
        (broken(HEAD, 13, b"\x81"), "a number that does not end"),
        (entry(nr_pages=1, flags=4), "an entry without its address"),
        (entry(vaddr=0x1000, flags=4), "an entry without its address or count"),
        (entry(vaddr=0x1001, nr_pages=1, flags=4), "1 pages at 0x1001 cannot be"),
        (entry(vaddr=0x1000, nr_pages_wide=1 << 60, flags=4), "cannot be"),
        (entry(vaddr=0x1000, nr_pages=0xFFFFFFFF, flags=4), "the pages of 0x1000, by "),
        (entry(vaddr=0x1000, nr_pages=1, flags=1), "No such file"),
        (criu_writer.image(0x56084025, [criu_writer.MESSAGES["head"](pages_id=9)]), "pages-9.img: No such file"),
    ],
)
def test_broken_images(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "pages-1.img").write_bytes(some(2))
    (tmp_path / "pagemap-7.img").write_bytes(data)
    with pytest.raises(SourceError) as caught:
        sources.open(tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_mm(tmp_path: Path) -> None:
    criu_writer.write(tmp_path, MEMORY, vmas=[(0x5000, 0x1000, 0)])
    with pytest.raises(SourceError, match=r"mm-7.img: offset 0x8: a VMA from 0x5000 to 0x1000 cannot be"):
        sources.open(tmp_path)
    (tmp_path / "mm-7.img").write_bytes(struct.pack("<II", 0x54564319, 1))
    with pytest.raises(SourceError, match=r"mm-7.img: offset 0x0: no CRIU image"):
        sources.open(tmp_path)


def test_a_compressed_pagemap(tmp_path: Path) -> None:
    path = criu_writer.write(tmp_path, MEMORY)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(SourceError, match="unpack them all"):
        sources.open(path)

"""`ksm formats`, `ksm info`, and that formats are told by content."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from ksm import sources
from ksm.cli import main
from ksm.cli.info import describe
from ksm.sources import COMPRESSIONS, FORMATS, LIVE, ArrayImage, Snapshot
from ksm.sources.formats import recognise
from ksm.sources.qemu import QemuImage, guest_name, running
from tests import criu_writer, dumps
from tests.test_dumps import MEMORY, PAGES, some

PAGE = 4096


def files(folder: Path) -> dict[str, Path]:
    """The same memory in every format that has addresses, each under a misleading name."""
    made = {
        "ELF core": dumps.elf_core(MEMORY),
        "kdump-compressed": dumps.kdump(MEMORY),
        "LiME": dumps.lime(MEMORY),
        "AVML, compressed": dumps.avml(MEMORY),
        "raw": MEMORY[0x1000],
        "QEMU migration stream": dumps.migration({"pc.ram": MEMORY}, {"pc.ram": 1 << 32}),
    }
    found = {}
    for number, (name, data) in enumerate(made.items()):
        found[name] = folder / ("a.raw", "b.elf", "c.gz", "d", "e.lime", "f.vmem")[number]
        found[name].write_bytes(data)
    found["CRIU image"] = criu_writer.write(folder / "criu", MEMORY)
    return found


def test_every_format_is_recognised_and_reads_the_same(tmp_path: Path) -> None:
    found = files(tmp_path)
    assert set(found) == {one.name for one in FORMATS}
    for name, path in found.items():
        with sources.open(path) as image:
            assert image.format == name
            assert image.npages == (9 if name == "raw" else len(PAGES))
            assert recognise(path.read_bytes()[:64]) is next(
                (one for one in FORMATS if one.name == name and one.signatures), None
            )


def test_formats_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats"]) == 0
    text = capsys.readouterr().out
    assert main(["formats", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [one["format"] for one in answer["formats"]] == [one.name for one in FORMATS]
    assert answer["compressions"] == list(COMPRESSIONS) == ["gzip", "bzip2", "xz", "zstd"]
    assert [one["source"] for one in answer["live"]] == list(LIVE)
    for one in FORMATS:
        assert one.name in text
    for how in (*COMPRESSIONS, *LIVE):
        assert how in text


def test_the_documents_list_every_format() -> None:
    document = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
    for one in FORMATS:
        assert f"\n| {one.name} |" in document


def test_info_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = np.frombuffer(b"".join(PAGES.values()), np.uint8).reshape(-1, PAGE)
    distinct = len({page.tobytes() for page in pages})
    zero = sum(not page.any() for page in pages)
    file = tmp_path / "dump.gz"
    file.write_bytes(gzip.compress(dumps.elf_core(MEMORY, absent={0x1000: PAGE})))
    assert main(["info", "--json", str(file), str(file)]) == 0
    facts, again = json.loads(capsys.readouterr().out)
    assert facts == again
    assert facts["format"] == "ELF core, gzip" and facts["page_size"] == PAGE
    assert (facts["pages"], facts["zero_pages"], facts["distinct"]) == (len(PAGES), zero, distinct)
    assert facts["duplicates"] == len(PAGES) - distinct
    assert facts["zero_may_be_untouched"] and facts["left_out"] == {"not in the dump": 1}
    for segment, (address, data) in zip(facts["segments"], MEMORY.items(), strict=True):
        inside = np.frombuffer(data, np.uint8).reshape(-1, PAGE)
        assert segment["address"] == address and segment["pages"] == len(inside)
        assert segment["zero_pages"] == np.count_nonzero(~inside.any(axis=1))
    assert main(["info", str(file)]) == 0
    text = capsys.readouterr().out
    assert f"{len(PAGES):,} pages of 4.0 KiB" in text and "0xfffc0000" in text
    assert "zero, or never touched, which this source cannot tell" in text and "Left out: 1 not in the dump." in text


def test_info_of_holes_and_of_many_segments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sparse"
    with file.open("wb") as f:
        f.truncate(50 * PAGE)
        f.write(b"x" * PAGE)
    assert main(["info", str(file)]) == 0
    text = capsys.readouterr().out
    assert "pages were never touched." in text and "cannot tell" not in text
    file.write_bytes(dumps.lime({n << 20: some(1) for n in range(50)}))
    assert main(["info", str(file)]) == 0
    assert "... and 10 more segments (--json has all)" in capsys.readouterr().out
    assert describe(image := ArrayImage(np.zeros((0, PAGE), np.uint8)), Snapshot.take(image))["pages"] == 0


def test_info_of_what_is_no_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "core"
    file.write_bytes(b"\x7fELF")
    for command in ("info", "estimate"):
        assert main([command, str(file)]) == 65
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith(f"ksm: {file}: offset 0x0: the ELF header is cut off")
        assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["qemu-system-x86_64", "-name", "web"], "web"),
        (["/usr/bin/qemu-kvm", "-m", "4096", "-name", "guest=web,debug-threads=on"], "web"),
        (["/usr/libexec/qemu-kvm", "--name", "debug-threads=on,guest=web"], "web"),
        (["kvm", "-name", "a,,b,process=x"], "a,b"),
        (["qemu-system-x86_64", "-m", "1G"], None),
        (["qemu-system-x86_64", "-name"], None),
        (["bash", "-name", "web"], None),
        ([""], None),
    ],
)
def test_names_of_guests(words: list[str], name: str | None) -> None:
    assert guest_name(words) == name


def test_no_such_guest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "qemu:no such guest"]) == 65
    assert capsys.readouterr().err == "ksm: qemu:no such guest: no running QEMU has that name\n"
    assert issubclass(QemuImage, sources.ProcessImage) and "no such guest" not in dict(running()).values()

"""One frozen guest in every form that can be had of it, and whether the readers find the same pages.

`python -m tests.frozen_forms` prints the table of docs/formats.md.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile

from ksm import sources
from ksm.sources import Image
from tests import dumps
from tests.frozen import Guest, booted

PAGE = 4096
VGA_WINDOW = range(0xA0000, 0xC0000)  # of the physical address space; RAM behind it is not to be seen there
_RAM_END = 1 << 30  # beyond it are video RAM and firmware
Digests = dict[int, bytes]
Moved = Callable[[Image, Digests], Digests]


@dataclass(frozen=True)
class Row:
    """What came of one form: pages that both have, those that are equal, and those that the reader lacks."""

    form: str
    writer: str
    compared: int
    equal: int
    absent: int
    """Pages of the guest that are not in it; all of them zero."""


def digest(page: bytes) -> bytes:
    return hashlib.blake2b(page, digest_size=16).digest()


ZERO = digest(bytes(PAGE))


def of_image(image: Image) -> Digests:
    """The pages that a reader finds."""
    found = {}
    for address, pages, present in image.blocks():
        for index, page in enumerate(pages):
            if present is None or present[index]:
                found[address + index * PAGE] = digest(page.tobytes())
    return found


def physical_ranges(elf: Path) -> list[tuple[int, int]]:
    """(start, size) of the guest's memory, by pyelftools."""
    with elf.open("rb") as stream:
        return [(one["p_paddr"], one["p_memsz"]) for one in ELFFile(stream).iter_segments("PT_LOAD")]


class Forms:
    """A frozen guest, and files made of it."""

    def __init__(self, guest: Guest, folder: Path) -> None:
        self.guest = guest
        self.folder = folder
        self.elf = folder / "guest.elf"
        guest.dump(self.elf, "elf")
        self.memory: dict[int, bytes] = {}
        for start, size in physical_ranges(self.elf):
            path = folder / f"raw-{start:x}"
            guest.pmemsave(path, start, size)
            self.memory[start] = path.read_bytes()
        self.truth = {address: digest(page) for address, page in dumps.pages_of(self.memory).items()}

    def row(self, form: str, writer: str, where: Path | str, moved: Moved | None = None, needed: int = 1 << 64) -> Row:
        """Read one form and compare; `moved` brings its addresses to physical ones; none below `needed` may lack."""
        with sources.open(where) as image:
            found = of_image(image)
            if moved:
                found = moved(image, found)
        both = [address for address in found if address in self.truth]
        lacking = [address for address in self.truth if address not in found and address < needed]
        wrong = [address for address in lacking if self.truth[address] != ZERO]
        assert not wrong, f"{form}: {len(wrong)} pages that are not zero are missing, from {wrong[0]:#x} on"
        equal = sum(found[address] == self.truth[address] for address in both)
        return Row(form, writer, len(both), equal, len(lacking))

    # -- QEMU's own forms --

    def of_qemu(self) -> Iterator[Row]:
        raw = self.folder / "low.raw"
        self.guest.pmemsave(raw, 0, self.guest.memory << 20)
        yield self.row("raw", "QEMU pmemsave", raw, needed=self.guest.memory << 20)
        yield self.row("ELF core", "QEMU dump-guest-memory", self.elf)
        for form in self.guest.dump_forms():
            if form != "elf":
                path = self.folder / form
                self.guest.dump(path, form)
                yield self.row("kdump-compressed, flattened", f"QEMU dump-guest-memory ({form})", path)
        yield self.row("live guest", "qemu-ram:NAME", f"qemu-ram:{self.guest.name}", self.of_process, _RAM_END)

    def of_migration(self, stream: Path) -> Iterator[Row]:
        yield self.row("QEMU migration stream", "QEMU migrate", stream, of_blocks)
        save = self.folder / "guest.save"
        save.write_bytes(dumps.libvirt(stream.read_bytes()))
        yield self.row("QEMU migration stream, libvirt save file", "QEMU migrate, header by tests", save, of_blocks)

    # -- other tools' --

    def of_others(self, packers: Sequence[str] = ("gzip", "bzip2", "xz", "zstd")) -> Iterator[Row]:
        for form, write in (("LiME", dumps.lime), ("AVML, compressed", dumps.avml)):
            path = self.folder / form.split(",")[0]
            path.write_bytes(write(self.memory))
            yield self.row(form, "tests", path)
        if shutil.which("makedumpfile"):
            flat = self.folder / "kdump-zlib"
            if flat.exists():
                path = self.folder / "rearranged"
                with flat.open("rb") as stdin:
                    subprocess.run(["makedumpfile", "-R", path], stdin=stdin, check=True, capture_output=True)
                yield self.row("kdump-compressed", "makedumpfile -R", path)
            elf = plain_headers(self.elf)
            for option, how in (("-c", "zlib"), ("-l", "LZO")):
                path = self.folder / f"makedumpfile{option}"
                subprocess.run(["makedumpfile", option, "-d", "0", elf, path], check=True, capture_output=True)
                # makedumpfile takes what the kernel uses as memory: no video RAM, no firmware.
                yield self.row(f"kdump-compressed ({how})", f"makedumpfile {option}", path, needed=_RAM_END)
        for tool in packers:
            if shutil.which(tool):
                path = self.folder / f"elf.{tool}"
                with path.open("wb") as out:
                    subprocess.run([tool, "-qc1", self.elf], stdout=out, check=True)
                yield self.row(f"ELF core, {tool}", f"QEMU dump-guest-memory, {tool}", path)

    def of_gcore(self) -> Row:
        """A core of the QEMU process, by gdb: the guest's RAM is one of its segments."""
        path = self.folder / "gcore"
        subprocess.run(
            ["gcore", "-o", path, str(self.guest.pid)], check=True, capture_output=True, stdin=subprocess.DEVNULL
        )
        return self.row("ELF core of the QEMU process", "gcore", f"{path}.{self.guest.pid}", self.of_process, _RAM_END)

    # -- addresses --

    def of_process(self, image: Image, found: Digests) -> Digests:
        """From QEMU's addresses to the guest's: RAM blocks are told by their sizes."""
        blocks = {self.guest.memory << 20: 0, 16 << 20: 0xFD000000}
        areas = [area for area in qemu_blocks(self.guest) if area[1] - area[0] in blocks]
        assert len(areas) == 2
        moved = {}
        for start, end in areas:
            base = blocks[end - start]
            moved |= {at - start + base: found[at] for at in range(start, end, PAGE) if at in found}
        return without_window(moved)


def without_window(found: Digests) -> Digests:
    """RAM from 640 KiB to 1 MiB is behind the VGA window and, where it is not shadowed, ROMs."""
    return {at: one for at, one in found.items() if at not in VGA_WINDOW}


def of_blocks(image: Image, found: Digests) -> Digests:
    """From the addresses of a migration stream's RAM blocks to physical ones."""
    places = {"pc.ram": 0, "vga.vram": 0xFD000000, "pc.bios": 0xFFFC0000}
    moved = {}
    for segment in image.segments:
        name = segment.name.rpartition("/")[2]
        if name in places:
            inside = range(segment.address, segment.address + segment.length, PAGE)
            moved |= {at - segment.address + places[name]: found[at] for at in inside if at in found}
    return without_window(moved)


def qemu_blocks(guest: Guest) -> list[tuple[int, int]]:
    """(start, end) of QEMU's RAM blocks in its memory, by /proc/PID/smaps: those that fork does not copy."""
    found, area = [], (0, 0)
    for line in Path(f"/proc/{guest.pid}/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            area = (int(first.split("-")[0], 16), int(first.split("-")[1], 16))
        elif first == "VmFlags:" and "dc" in line.split():
            found.append(area)
    return found


def plain_headers(elf: Path) -> Path:
    """The same core with its program headers directly after the ELF header, where makedumpfile looks for them."""
    path = elf.with_suffix(".plain")
    shutil.copyfile(elf, path)
    with path.open("r+b") as file:
        head = bytearray(file.read(4096))
        (table,) = struct.unpack_from("<Q", head, 32)
        (count,) = struct.unpack_from("<H", head, 56)
        head[64 : 64 + 56 * count] = head[table : table + 56 * count]
        struct.pack_into("<QQ", head, 32, 64, 0)
        struct.pack_into("<HHH", head, 58, 0, 0, 0)
        file.seek(0)
        file.write(head[: max(table, 64 + 56 * count)])
    return path


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="ksm-forms-") as scratch, booted("ksm-forms", Path(scratch)) as guest:
        forms = Forms(guest, Path(scratch))
        rows = [*forms.of_qemu(), *forms.of_others()]
        rows += [forms.of_gcore()] if shutil.which("gcore") else []
        stream = Path(scratch, "stream")
        guest.migrate(stream)
        rows += forms.of_migration(stream)
    print("| format | written by | pages | equal | not in it, all zero |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row.form} | {row.writer} | {row.compared:,} | {row.equal:,} | {row.absent:,} |")
    return int(any(row.equal != row.compared for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""ELF cores: guests by QEMU's dump-guest-memory and `virsh dump --memory-only`, processes by gcore or the kernel."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from ksm.errors import SourceError
from ksm.sources.data import Data
from ksm.sources.image import Segment
from ksm.sources.stored import Extent, StoredImage

SIGNATURE = b"\x7fELF"

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_PROGRAM = np.dtype(
    {
        "names": ["type", "flags", "offset", "vaddr", "paddr", "filesz", "memsz", "align"],
        "formats": ["<u4", "<u4", *["<u8"] * 6],
    }
)
_ET_CORE = 4
_PT_LOAD = 1
_PN_XNUM = 0xFFFF  # the count is in section 0
_MOST_HEADERS = 4096  # read at a time
_MOST = 1 << 24  # in all: far more than a process can have VMAs
_HIGH = np.uint64(1 << 63)  # the kernel's half, such as [vsyscall]; and "no physical address"


class ElfImage(StoredImage):
    """The memory in an ELF core, 64 bits, little-endian.

    A page's address is physical in a guest's dump and virtual in a process's, which has no physical ones. What a
    segment has in memory but not in the file was left out by whoever wrote it: `excluded` counts it. Holes of a
    sparse core are pages that were never touched; that is how the kernel writes the cores of processes.

    Raises:
        SourceError: it is no such core, or its headers do not fit the file.

    >>> ElfImage.format
    'ELF core'
    """

    format = "ELF core"

    def __init__(self, data: Data, page_size: int = 4096) -> None:
        loads = [header for part in _program_headers(data) for header in part[part["type"] == _PT_LOAD]]
        physical = any(0 < int(load["paddr"]) < _HIGH for load in loads)
        extents, segments, missing = [], [], 0
        for load in loads:
            address = int(load["paddr"] if physical else load["vaddr"])
            offset, size, memory = int(load["offset"]), int(load["filesz"]), int(load["memsz"])
            if address >= _HIGH or memory == 0:
                continue
            if address + max(size, memory) > _HIGH or size > memory:
                raise data.error(offset, f"a segment of {size} bytes, {memory} in memory, at {address:#x} cannot be")
            missing += (memory - size) // page_size
            segments.append(Segment(address, memory))
            if size:
                extents.append(Extent(address, offset, size))
        if not segments:
            raise SourceError(f"{data.name}: an ELF core without memory in it: it has no PT_LOAD segment")
        for extent in sorted(extents, key=lambda extent: extent.offset):
            data.need(extent.offset, extent.length, f"the segment of address {extent.address:#x}")
        super().__init__([data], extents, page_size, segments=segments, excluded={"not in the dump": missing})


def _program_headers(data: Data) -> Iterator[np.ndarray[tuple[int], np.dtype[np.void]]]:
    """All program headers, some at a time; their place and number are checked."""
    head = data.read(0, _HEADER.size, "the ELF header")
    ident, kind, _, _, _, table, sections, _, _, size, count, _, _, _ = _HEADER.unpack(head)
    if ident[4:6] != b"\x02\x01":
        raise data.error(4, "an ELF file of another class: cores of 64 bits, little-endian, can be read")
    if kind != _ET_CORE:
        raise data.error(16, f"an ELF file, but no core: its type is {kind}, not ET_CORE ({_ET_CORE})")
    if size != _PROGRAM.itemsize:
        raise data.error(54, f"program headers of {size} bytes; they have {_PROGRAM.itemsize}")
    if count == _PN_XNUM:
        if sections < _HEADER.size:
            raise data.error(40, "the number of program headers is in section header 0, and there is none")
        count = _SECTION.unpack(data.read(sections, _SECTION.size, "section header 0"))[7]
    if count > _MOST:
        raise data.error(40, f"{count} program headers; at most {_MOST} are read")
    data.need(table, count * size, f"the table of {count} program headers")
    for first in range(0, count, _MOST_HEADERS):
        some = min(_MOST_HEADERS, count - first)
        yield np.frombuffer(data.read(table + first * size, some * size, "the program headers"), _PROGRAM)

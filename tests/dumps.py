"""Writers of memory dumps, made from the formats' descriptions and sharing nothing with the readers."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import cramjam

PAGE = 4096

# Memory to dump: the bytes at an address.
Memory = Mapping[int, bytes]


def pages_of(memory: Memory) -> dict[int, bytes]:
    """The same, page by page."""
    return {
        address + at: content[at : at + PAGE]
        for address, content in memory.items()
        for at in range(0, len(content), PAGE)
    }


def elf_core(
    memory: Memory,
    *,
    physical: bool = True,
    absent: Mapping[int, int] | None = None,
    shift: int = 0x508,
    extended: bool = False,
    reverse: bool = False,
) -> bytes:
    """An ELF core; `absent` has addresses and sizes that only p_memsz tells of, `shift` is where the data begin."""
    loads = [(address, len(content), len(content)) for address, content in memory.items()]
    missing = absent or {}
    loads = [(address, size, size + missing.get(address, 0)) for address, size, _ in loads]
    loads += [(address, 0, size) for address, size in missing.items() if address not in memory]
    count = len(loads) + 1
    table, note = 64, b"note".ljust(20, b"\0")
    sections = table + 56 * count
    note_at = sections + (64 if extended else 0)
    at = max(shift, note_at + len(note))
    headers, body = struct.pack("<IIQQQQQQ", 4, 0, note_at, 0, 0, len(note), len(note), 0), b""
    content = {}
    for address in reversed(memory) if reverse else memory:
        content[address] = at + len(body)
        body += memory[address]
    for address, size, in_memory in loads:
        virtual, real = (0, address) if physical else (address, 0)
        headers += struct.pack("<IIQQQQQQ", 1, 6, content.get(address, 0), virtual, real, size, in_memory, 0)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    fields = (4, 62, 1, 0, table, sections if extended else 0, 0, 64, 56, 0xFFFF if extended else count)
    head = ident + struct.pack("<HHIQQQIHHHHHH", *fields, 64, int(extended), 0)
    if extended:
        headers += struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, count, 0, 0)
    return (head + headers + note).ljust(at, b"\xee") + body


def lime(memory: Memory) -> bytes:
    """As LiME writes it with format=lime."""
    return b"".join(
        struct.pack("<IIQQQ", 0x4C694D45, 1, address, address + len(content) - 1, 0) + content
        for address, content in memory.items()
    )


def avml(memory: Memory) -> bytes:
    """As AVML writes it with --compress."""
    parts = []
    for address, content in memory.items():
        packed = bytes(cramjam.snappy.compress(content))
        header = b"AVML" + struct.pack("<IQQQ", 2, address, address + len(content) - 1, 0)
        parts += [header, packed, struct.pack("<Q", len(packed))]
    return b"".join(parts)

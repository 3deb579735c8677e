"""Writers of memory dumps, made from the formats' descriptions and sharing nothing with the readers."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence

import cramjam
import lzallright

from ksm.sources import extras

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


# ---- kdump-compressed ------------------------------------------------------------------------------------

_PACKERS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "plain": (0, bytes),
    "zlib": (1, zlib.compress),
    "lzo": (2, lambda page: bytes(lzallright.LZOCompressor().compress(page))),
    "snappy": (4, lambda page: bytes(cramjam.snappy.compress_raw(page))),
    "zstd": (32, lambda page: bytes(extras.load("zstd").compress(page))),
}


def kdump(
    memory: Memory,
    how: str = "zlib",
    *,
    filtered: Memory | None = None,
    version: int = 6,
    split: tuple[int, int] | None = None,
) -> bytes:
    """A kdump-compressed dump; `filtered` is memory that was there and is not in it; `split` is this file's part."""
    pages = {address // PAGE: page for address, page in pages_of(memory).items()}
    valid = set(pages) | {address // PAGE for address in pages_of(filtered or {})}
    top = max(valid) + 1
    blocks = -(-top // (8 * PAGE))
    maps = bytearray(blocks * PAGE), bytearray(blocks * PAGE)
    for bitmap, numbers in zip(maps, (valid, pages), strict=True):
        for number in numbers:
            bitmap[number // 8] |= 1 << number % 8
    start, end = split or (0, 0)
    numbers32 = (1, PAGE, 1, 2 * blocks, top & 0xFFFFFFFF, 0, 0, 0)
    head = struct.pack("<8sI390s22s8I", b"KDUMP   ", version, b"Linux", b"", *numbers32)
    wide = (start, end, top) if version >= 6 else (0, 0, 0)
    sub = struct.pack("<QiiQQ6Q3Q", 0, 0, bool(split), start, end, *[0] * 6, *wide)
    flag, pack = _PACKERS[how]
    wanted = [number for number in sorted(pages) if not split or start <= number < end]
    at = PAGE * (2 + 2 * blocks) + 24 * len(wanted)
    descriptors, body, zero = b"", b"", None
    for number in wanted:
        page = pages[number]
        if page == bytes(PAGE) and zero is not None:  # all zero pages share one
            descriptors += zero
            continue
        packed = pack(page)
        plain = len(packed) >= PAGE
        stored = page if plain else packed
        descriptor = struct.pack("<qIIQ", at + len(body), len(stored), 0 if plain else flag, 0)
        body += stored
        descriptors += descriptor
        if page == bytes(PAGE):
            zero = descriptor
    return head.ljust(PAGE, b"\0") + sub.ljust(PAGE, b"\0") + b"".join(maps) + descriptors + body


def flattened(data: bytes, size: int = 5000, order: Sequence[int] | None = None) -> bytes:
    """As makedumpfile -F: records of at most `size` bytes, in the order given."""
    starts = list(range(0, len(data), size))
    records = [starts[index] for index in order] if order else starts
    parts = [struct.pack(">16sqq", b"makedumpfile", 1, 1).ljust(4096, b"\0")]
    for start in records:
        piece = data[start : start + size]
        parts += [struct.pack(">qq", start, len(piece)), piece]
    return b"".join(parts) + struct.pack(">qq", -1, -1)


# ---- QEMU and libvirt --------------------------------------------------------------------------------------


def _text(name: bytes) -> bytes:
    return bytes([len(name)]) + name


def migration(
    memory: Mapping[str, Memory], sizes: Mapping[str, int], *, packed: bool = False, footers: bool = True, bits: int = 0
) -> bytes:
    """A stream of RAM blocks: one section lists them, one sends the pages, one ends; then a device follows."""
    section = struct.pack(">I", 2)
    footer = b"\x7e" + section if footers else b""
    out = b"QEVM" + struct.pack(">I", 3) + b"\x07" + struct.pack(">I", 4) + b"pc-x"
    if bits:
        out += b"\x05" + _text(b"configuration/target-page-bits") + struct.pack(">II", 1, bits)
    out += b"\x01" + section + _text(b"ram") + struct.pack(">II", 0, 4) + struct.pack(">Q", sum(sizes.values()) | 4)
    out += b"".join(_text(name.encode()) + struct.pack(">Q", size) for name, size in sizes.items())
    out += struct.pack(">Q", 0x10) + footer + b"\x02" + section
    for name, content in memory.items():
        named = 0
        for address, page in pages_of(content).items():
            block = b"" if named else _text(name.encode())
            if page == bytes(PAGE):
                out += struct.pack(">Q", address | 2 | named) + block + b"\0"
            elif packed:
                piece = zlib.compress(page)
                out += struct.pack(">Q", address | 0x100 | named) + block + struct.pack(">I", len(piece)) + piece
            else:
                out += struct.pack(">Q", address | 8 | named) + block + page
            named = 0x20
    out += struct.pack(">Q", 0x10) + footer + b"\x03" + section + struct.pack(">Q", 0x10) + footer
    return out + b"\x04" + struct.pack(">I", 3) + _text(b"timer") + struct.pack(">II", 0, 2) + b"device state"


def libvirt(stream: bytes, xml: bytes = b"<domain/>\0") -> bytes:
    """A libvirt save file around a stream."""
    return struct.pack("<16s4I60x", b"LibvirtQemudSave", 2, len(xml), 1, 0) + xml + stream

"""What is fuzzed: open a file and read all its pages; and small files of each format to begin from."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable, Mapping

from ksm import sources
from ksm.errors import KsmError
from ksm.sources import extras
from tests import criu_writer, dumps

_MOST_BYTES = 64 << 20  # a compressed zero page takes few bytes: so much may come out of a small file
_PAGE = 4096


def target(path: str) -> int:
    """Read a file like `ksm estimate` does; how many pages it has, 0 if it is refused."""
    try:
        with sources.open(path) as image:
            assert image.npages >= 0 and image.holes >= 0
            seen = 0
            last = -1
            for address, pages, present in image.blocks():
                assert address > last and pages.shape[1] == image.page_size
                assert present is None or len(present) == len(pages)
                last = address + (len(pages) - 1) * image.page_size
                seen += len(pages) if present is None else int(present.sum())
                if pages.nbytes > _MOST_BYTES or seen * image.page_size > _MOST_BYTES:
                    return seen
                int(pages[-1].sum())
            assert seen == image.npages
            return seen
    except KsmError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 1000, text
        return 0


def _memory(pages: int) -> dict[int, bytes]:
    kinds = (bytes(range(256)) * 16, bytes(_PAGE), b"ksm " * 1024)
    return {0x1000: b"".join(kinds[n % 3] for n in range(pages)), 0x40000: kinds[0]}


def _elf() -> list[bytes]:
    return [
        dumps.elf_core(_memory(3)),
        dumps.elf_core(_memory(2), extended=True, absent={0x1000: 8192}, physical=False),
    ]


def _kdump() -> list[bytes]:
    made = [dumps.kdump(_memory(4), how) for how in ("plain", "zlib", "lzo", "snappy", "zstd")]
    return [*made, dumps.kdump(_memory(4), split=(1, 3), version=5)]


def _migration() -> list[bytes]:
    memory, sizes = {"pc.ram": _memory(4)}, {"pc.ram": 1 << 20}
    return [dumps.migration(memory, sizes), dumps.migration(memory, sizes, packed=True, bits=12)]


def _criu() -> list[bytes]:
    made = criu_writer.MESSAGES
    entry = made["entry"](vaddr=0x1000, nr_pages=1, flags=criu_writer.PRESENT)
    return [criu_writer.image(0x56084025, [made["head"](pages_id=1), entry])]


def _compressed() -> list[bytes]:
    plain = b"".join(_memory(5).values())
    packers = (gzip.compress, bz2.compress, lzma.compress, extras.load("zstd").compress)
    return [pack(plain) for pack in packers] + [pack(dumps.lime(_memory(2))) for pack in packers]


SEEDS: Mapping[str, Callable[[], list[bytes]]] = {
    "elf": _elf,
    "lime": lambda: [dumps.lime(_memory(3))],
    "avml": lambda: [dumps.avml(_memory(3)), dumps.avml(_memory(1)) + struct.pack("<Q", 0)],
    "kdump": _kdump,
    "flattened": lambda: [dumps.flattened(_kdump()[1], 3000), dumps.flattened(_elf()[0], 5000, [1, 0, 2])],
    "migration": _migration,
    "libvirt": lambda: [dumps.libvirt(_migration()[0]), dumps.libvirt(gzip.compress(_migration()[0]))],
    "criu": _criu,
    "compressed": _compressed,
}

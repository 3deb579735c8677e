"""QEMU migration streams, as `migrate file:` or `exec:cat` write them, and libvirt's save files around them."""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ksm.errors import SourceError
from ksm.sources.data import Data, FileData
from ksm.sources.image import BLOCK_BYTES, Block, Image, Numbers, Segment, spans

SIGNATURE = b"QEVM"
LIBVIRT = b"LibvirtQemudSave"

_LIBVIRT_HEADER = struct.Struct("<16s4I60x")  # magic, version, length of the XML, was running, compression
_LIBVIRT_VERSIONS = (1, 2)

_VERSION = 3
_EOF, _START, _PART, _END, _FULL, _SUBSECTION, _CONFIGURATION, _COMMAND = 0, 1, 2, 3, 4, 5, 7, 8
_FOOTER = 0x7E
_RAM = b"ram"
_RAM_VERSION = 4

# What the low bits of a RAM record's address say.
_ZERO, _MEM_SIZE, _PAGE, _EOS, _CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
_XBZRLE, _HOOK, _COMPRESSED, _FLUSH = 0x40, 0x80, 0x100, 0x200
_FLAGS = 0xFFF

_WINDOW = 8 << 20
_MANY = 1024  # records looked at together
_ALIGNED = 2 << 20  # where RAM blocks begin
_HIGH = 1 << 62

_IS_PAGE, _IS_FILL, _IS_COMPRESSED = 0, 1, 2


def inside_libvirt(data: Data) -> FileData:
    """The stream in a libvirt save file, behind its header and the domain's XML.

    >>> LIBVIRT.decode()
    'LibvirtQemudSave'
    """
    _, version, length, _, _ = _LIBVIRT_HEADER.unpack(data.read(0, _LIBVIRT_HEADER.size, "the libvirt header"))
    if version not in _LIBVIRT_VERSIONS:
        raise data.error(16, f"a libvirt save file of version {version:#x}; versions 1 and 2 can be read")
    data.need(_LIBVIRT_HEADER.size, length, "the domain's XML")
    file = data.in_any_order()
    if not isinstance(file, FileData):
        raise SourceError(f"{data.name}: a libvirt save file inside another format")
    inner = file.rest(_LIBVIRT_HEADER.size + length)
    file.close()
    return inner


class _Reader:
    """Reads big-endian numbers from a place on."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.at = 0
        self._start = 0
        self._window = memoryview(b"")

    def ahead(self, length: int) -> memoryview:
        """The next `length` bytes, or as many as there are; the place stays."""
        first = self.at - self._start
        if first + length > len(self._window):
            there = min(self.data.size() - self.at, max(_WINDOW, length))
            if there <= 0:
                return memoryview(b"")
            self._start, first = self.at, 0
            self._window = self.data.view(self.at, there).data
        return self._window[first : first + length]

    def take(self, length: int, what: str) -> memoryview:
        found = self.ahead(length)
        if len(found) < length:
            raise self.data.error(self.at, f"{what} is cut off: {length} bytes are needed, {len(found)} are there")
        self.at += length
        return found

    def number(self, length: int, what: str) -> int:
        return int.from_bytes(self.take(length, what), "big")

    def text(self, what: str) -> bytes:
        return bytes(self.take(self.number(1, what), what))

    def skip(self, length: int, what: str) -> None:
        self.data.need(self.at, length, what)
        self.at += length


class MigrationImage(Image):
    """The RAM in a QEMU migration stream, version 3.

    RAM blocks (pc.ram, vga.vram, ...) have names and no guest-physical addresses in the stream: they are laid one
    after the other, in the stream's order, each from a multiple of 2 MiB on; `segments` has their names. Of a page
    that was sent several times the last counts. Zero pages are stored as such, touched or not. The devices' state is
    not looked at.

    Raises:
        SourceError: the stream is broken or cut off, or uses what is not read (XBZRLE, mapped-ram, multifd).

    >>> MigrationImage.format
    'QEMU migration stream'
    """

    format = "QEMU migration stream"

    def __init__(self, data: Data, page_size: int = 4096) -> None:
        self._data = data.in_any_order()
        self.name = data.name
        stream = _Stream(self._data)
        self.page_size = stream.page_size
        self.segments = tuple(stream.blocks)
        numbers, places, kinds = stream.records()
        order = np.argsort(numbers, kind="stable")
        numbers = numbers[order]
        last = np.flatnonzero(np.diff(numbers, append=-1))
        self._numbers, self._places, self._kinds = numbers[last], places[order[last]], kinds[order[last]]
        self.npages = len(self._numbers)

    def blocks(self) -> Iterator[Block]:
        """The pages, gathered block by block."""
        for first, last in spans(self._numbers, BLOCK_BYTES // self.page_size):
            rows = self._numbers[first:last] - self._numbers[first]
            pages = np.zeros((int(rows[-1]) + 1, self.page_size), np.uint8)
            places, kinds = self._places[first:last], self._kinds[first:last]
            stored = kinds == _IS_PAGE
            if stored.all() and len(rows) == len(pages):
                pages = self._data.gather(places, self.page_size)
            elif stored.any():
                pages[rows[stored]] = self._data.gather(places[stored], self.page_size)
            filled = (kinds == _IS_FILL) & (places != 0)
            pages[rows[filled]] = places[filled, np.newaxis].astype(np.uint8)
            for index in np.flatnonzero(kinds == _IS_COMPRESSED).tolist():
                pages[rows[index]] = self._inflated(int(places[index]))
            present = None
            if len(rows) < len(pages):
                present = np.zeros(len(pages), np.bool_)
                present[rows] = True
            yield int(self._numbers[first]) * self.page_size, pages, present

    def _inflated(self, place: int) -> npt.NDArray[np.uint8]:
        length = int.from_bytes(self._data.read(place, 4, "a compressed page"), "big")
        packed = self._data.read(place + 4, length, "a compressed page")
        try:
            page = zlib.decompressobj().decompress(packed, self.page_size + 1)
        except zlib.error as error:
            raise self._data.error(place, f"a broken page: {error}") from None
        if len(page) != self.page_size:
            raise self._data.error(place, f"a page of {len(page)} bytes; pages have {self.page_size}")
        return np.frombuffer(page, np.uint8)

    def close(self) -> None:
        """Close the file."""
        self._data.close()


class _Stream:
    """Walks a stream up to the end of its RAM, and notes where each page is."""

    def __init__(self, data: Data) -> None:
        self.page_size = 4096
        self.blocks: list[Segment] = []
        self._names: dict[bytes, Segment] = {}
        self._current: Segment | None = None
        self._parts: list[tuple[Numbers, Numbers, npt.NDArray[np.uint8]]] = []
        self._few = (array("q"), array("q"), array("B"))
        self._in = _Reader(data)
        self._walk()

    # -- sections --

    def _walk(self) -> None:
        read, data = self._in, self._in.data
        magic, version = bytes(read.take(4, "the header")), read.number(4, "the header")
        if magic != SIGNATURE or version != _VERSION:
            raise data.error(4, f"a migration stream of version {version}; version {_VERSION} can be read")
        ram = None
        while True:
            at = read.at
            kind = read.number(1, "a section, before the end of RAM,")
            if kind == _CONFIGURATION:
                self._configuration()
            elif kind == _COMMAND:
                read.skip(2, "a command")
                read.skip(read.number(2, "a command"), "a command")
            elif kind == _START:
                number = read.number(4, "a section")
                name = read.text("a section's name")
                read.skip(4, "a section")
                version = read.number(4, "a section")
                if name != _RAM or version != _RAM_VERSION:
                    raise data.error(
                        at,
                        f"section {name!r}, version {version}: only that of RAM, version {_RAM_VERSION}, can be read",
                    )
                ram = number
                self._ram()
            elif kind in (_PART, _END) and ram is not None and read.number(4, "a section") == ram:
                self._ram()
            else:
                raise data.error(at, f"a section of type {kind:#x} where RAM is not complete yet")
            if bytes(read.ahead(1)) == bytes([_FOOTER]):
                read.skip(5, "a section's footer")
            if kind == _END:
                return

    def _configuration(self) -> None:
        """The machine's name and, in subsections, the page size and what was agreed on."""
        read = self._in
        read.skip(read.number(4, "the machine's name"), "the machine's name")
        while bytes(read.ahead(1)) == bytes([_SUBSECTION]):
            at = read.at
            read.skip(1, "a subsection")
            name = read.text("a subsection's name")
            read.skip(4, "a subsection")
            if name == b"configuration/target-page-bits":
                bits = read.number(4, "the page size")
                if not 12 <= bits <= 16:
                    raise read.data.error(at, f"pages of {bits} bits")
                self.page_size = 1 << bits
            elif name == b"configuration/capabilities":
                for _ in range(read.number(4, "the capabilities")):
                    capability = read.text("a capability").decode("latin-1")
                    raise read.data.error(at, f"a migration stream with {capability!r}, which cannot be read")
            elif name == b"configuration/uuid":
                read.skip(16, "the UUID")
            else:
                raise read.data.error(at, f"the unknown subsection {name!r}")

    # -- RAM --

    def _ram(self) -> None:
        """One RAM section: records up to its end."""
        read = self._in
        while True:
            at = read.at
            word = read.number(8, "a RAM record")
            flags, address = word & _FLAGS, word & ~_FLAGS
            if flags == _EOS:
                return
            if flags == _MEM_SIZE:
                self._block_list(address)
            elif flags == _FLUSH:
                continue
            elif flags & ~_CONTINUE in (_PAGE, _ZERO, _COMPRESSED):
                block = self._block(flags, at)
                if address & (self.page_size - 1) or address + self.page_size > block.length:
                    raise read.data.error(at, f"page {address:#x} of block {block.name}, of {block.length} bytes")
                self._record(flags & ~_CONTINUE, block.address + address)
                if flags & _CONTINUE:
                    self._run(flags, block)
            else:
                names = {_XBZRLE: "XBZRLE", _HOOK: "RDMA"}
                kind = next((name for flag, name in names.items() if flags & flag), f"flags {flags:#x}")
                raise read.data.error(at, f"a RAM record with {kind}, which cannot be read")

    def _block_list(self, total: int) -> None:
        read = self._in
        end = 0
        while total > 0:
            at = read.at
            name = read.text("a RAM block's name")
            length = read.number(8, "a RAM block's length")
            if not 0 < length <= total or length % self.page_size or name in self._names or end + length > _HIGH:
                raise read.data.error(at, f"RAM block {name!r} of {length} bytes, where {total} are left, cannot be")
            block = Segment(end, length, name.decode("latin-1"))
            self._names[name] = block
            self.blocks.append(block)
            end += length + -length % _ALIGNED
            total -= length

    def _block(self, flags: int, at: int) -> Segment:
        if not flags & _CONTINUE:
            name = self._in.text("a RAM block's name")
            if name not in self._names:
                raise self._in.data.error(at, f"a page of RAM block {name!r}, which was not listed")
            self._current = self._names[name]
        if self._current is None:
            raise self._in.data.error(at, "a page of no RAM block")
        return self._current

    def _record(self, kind: int, address: int) -> None:
        numbers, places, kinds = self._few
        numbers.append(address // self.page_size)
        read = self._in
        if kind == _ZERO:
            kinds.append(_IS_FILL)
            places.append(read.number(1, "a page's fill byte"))
            return
        places.append(read.at)
        if kind == _PAGE:
            kinds.append(_IS_PAGE)
            read.skip(self.page_size, "a page")
            return
        kinds.append(_IS_COMPRESSED)
        length = read.number(4, "a compressed page")
        if length > 2 * self.page_size:
            raise read.data.error(read.at, f"a compressed page of {length} bytes")
        read.skip(length, "a compressed page")

    def _run(self, flags: int, block: Segment) -> None:
        """Further records of the same kind, many at a time: their heads lie at equal distances."""
        kind = flags & ~_CONTINUE
        if kind == _COMPRESSED:
            return
        payload = self.page_size if kind == _PAGE else 1
        record = np.dtype([("word", ">u8"), ("payload", np.uint8, (payload,))])
        while True:
            ahead = self._in.ahead(_MANY * record.itemsize)
            table = np.frombuffer(ahead, record, len(ahead) // record.itemsize)
            words = table["word"].astype(np.int64)
            offsets = words & ~_FLAGS
            same = (words & _FLAGS) == flags
            same &= (offsets >= 0) & (offsets <= block.length - self.page_size) & (offsets & (self.page_size - 1) == 0)
            count = len(same) if same.all() else int(np.argmin(same))
            if count == 0:
                return
            numbers = (offsets[:count] + block.address) // self.page_size
            if kind == _PAGE:
                places = self._in.at + 8 + np.arange(count, dtype=np.int64) * record.itemsize
            else:
                places = table["payload"][:count, 0].astype(np.int64)
            self._flush()
            self._parts.append((numbers, places, np.full(count, _IS_PAGE if kind == _PAGE else _IS_FILL, np.uint8)))
            self._in.at += count * record.itemsize
            if count < len(same):
                return

    def _flush(self) -> None:
        """Keep the order in which pages came."""
        numbers, places, kinds = self._few
        if numbers:
            self._parts.append((np.array(numbers), np.array(places), np.array(kinds)))
            self._few = (array("q"), array("q"), array("B"))

    def records(self) -> tuple[Numbers, Numbers, npt.NDArray[np.uint8]]:
        """(page number, offset or fill byte, kind) of all records, in the stream's order."""
        self._flush()
        if not self._parts:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8)
        numbers, places, kinds = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        return numbers, places, kinds

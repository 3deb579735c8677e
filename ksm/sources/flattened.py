"""makedumpfile's flattened form: a file cut into records that say where each belongs; what QEMU's kdump writes."""

from __future__ import annotations

import itertools
import struct
from array import array

import numpy as np

from ksm.sources.data import Bytes, Data
from ksm.sources.stored import Extent, disjoint

SIGNATURE = b"makedumpfile\0\0\0\0"

_HEADER_BYTES = 4096
_HEADER = struct.Struct(">16sqq")
_RECORD = struct.Struct(">qq")
_END = -1
_MOST_REWRITTEN = 1 << 20  # records, in a file that writes places twice


class FlatData(Data):
    """The file that a flattened one describes. Of what is written twice the later counts.

    Bytes that no record writes are not there: reading them is an error.

    Raises:
        SourceError: a record is broken or goes beyond the file; names its offset.

    >>> import tempfile
    >>> from ksm.sources.data import FileData
    >>> with tempfile.NamedTemporaryFile() as f:
    ...     head = struct.pack(">16sqq", b"makedumpfile", 1, 1).ljust(4096, b"\\0")
    ...     _ = f.write(head + struct.pack(">qq3sqq", 0, 3, b"abc", -1, -1)); f.flush()
    ...     FlatData(FileData(f.name)).head(0, 10)
    b'abc'
    """

    def __init__(self, data: Data) -> None:
        self._data = data.in_any_order()
        self.name = self._data.name
        self._starts, self._ends, self._places = self._index()
        # Where records follow each other without a gap, the end of the last.
        gaps = np.flatnonzero(self._starts[1:] != self._ends[:-1])
        self._run_starts = self._starts[np.concatenate([[0], gaps + 1])] if len(self._starts) else self._starts
        self._run_ends = self._ends[np.concatenate([gaps, [len(self._ends) - 1]])] if len(self._ends) else self._ends

    def _index(self) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], ...]:
        """(starts, ends, offsets in the flattened file) by ascending start, without overlap."""
        data = self._data
        _, kind, version = _HEADER.unpack(data.read(0, _HEADER.size, "the flattened header"))
        if (kind, version) != (1, 1):
            raise data.error(16, f"a flattened file of type {kind}, version {version}; type 1, version 1 can be read")
        records = array("q")
        at = _HEADER_BYTES
        while True:
            offset, size = _RECORD.unpack(data.read(at, _RECORD.size, "a record's header"))
            if offset == _END:
                break
            if offset < 0 or size <= 0 or offset + size >= 1 << 62:
                raise data.error(at, f"a record of {size} bytes at {offset:#x} cannot be")
            at += _RECORD.size
            data.need(at, size, f"the record of {offset:#x}")
            records.extend((offset, offset + size, at))
            at += size
        table = np.frombuffer(records, np.int64).reshape(-1, 3) if records else np.empty((0, 3), np.int64)
        table = table[np.argsort(table[:, 0], kind="stable")]
        if (table[1:, 0] < table[:-1, 1]).any():
            if len(table) > _MOST_REWRITTEN:
                raise data.error(0, f"{len(table)} records, and some write the same place")
            later_first = sorted(table.tolist(), key=lambda record: -record[2])
            parts = disjoint([Extent(start, place, end - start) for start, end, place in later_first])
            table = np.array([(part.address, part.end, part.offset) for part in parts], np.int64)
        return np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1]), np.ascontiguousarray(table[:, 2])

    def _there(self, offset: int) -> int:
        """How many bytes there are from `offset` on without a gap."""
        run = int(np.searchsorted(self._run_starts, offset, "right")) - 1
        return max(0, int(self._run_ends[run]) - offset) if run >= 0 else 0

    def has(self, offset: int, length: int) -> bool:
        return length <= self._there(offset)

    def size(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def head(self, offset: int, length: int) -> bytes:
        return self.view(offset, min(length, self._there(offset))).tobytes()

    def view(self, offset: int, length: int) -> Bytes:
        self.need(offset, length, "a piece")
        if length == 0:
            return np.empty(0, np.uint8)
        record = int(np.searchsorted(self._starts, offset, "right")) - 1
        if offset + length <= self._ends[record]:
            return self._data.view(int(self._places[record]) + offset - int(self._starts[record]), length)
        found = np.empty(length, np.uint8)
        for index in itertools.count(record):
            start, end = max(offset, int(self._starts[index])), min(offset + length, int(self._ends[index]))
            place = int(self._places[index]) + start - int(self._starts[index])
            found[start - offset : end - offset] = self._data.view(place, end - start)
            if end == offset + length:
                return found
        raise AssertionError

    def close(self) -> None:
        self._data.close()

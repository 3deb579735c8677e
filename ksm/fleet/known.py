"""Contents with a name: zero pages, pages filled with one byte, pages of files such as shared libraries."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ksm.errors import SourceError
from ksm.keyed import Key, keyed
from ksm.pages import PAGE_SIZE, Fingerprints, fingerprint

ZERO, FILLED, FILES, OTHER = "zero", "filled", "files", "other"
CATEGORIES = (OTHER, FILLED, FILES)

# What the bytes mean: Linux, include/uapi and Documentation/mm/slab.rst (slab poisoning, page_poison=1)
_FILLS = MappingProxyType(
    {
        0xAA: "page poison of Linux",
        0x6B: "freed slab poison of Linux",
        0x5A: "unused slab poison of Linux",
        0xFF: "all ones",
    }
)
_MOST_FILE = 1 << 32  # bytes of one file


@dataclass(frozen=True, slots=True)
class Known:
    """Contents with their names, by ascending high word.

    >>> known = Known.of(page_size=4096)
    >>> high, low = fingerprint(b"\\xaa" * 4096).words[0]
    >>> known.name(int(high), int(low))
    ('filled', '0xaa in every byte (page poison of Linux)')
    """

    high: npt.NDArray[np.uint64]
    low: npt.NDArray[np.uint64]
    category: npt.NDArray[np.int64]
    """An index into CATEGORIES."""
    names: tuple[str, ...]

    @classmethod
    def of(
        cls, page_size: int = PAGE_SIZE, files: Sequence[str | os.PathLike[str]] = (), key: Key | None = None
    ) -> Known:
        """The pages filled with one byte other than 0, and every page of these files, the last filled up with zeros.

        Args:
            page_size: bytes a page.
            files: shared libraries, kernels, programs.
            key: what the fleet was fingerprinted with, if it was.

        Raises:
            SourceError: a file cannot be read.

        >>> len(Known.of(16384).names)
        255
        """
        fills = np.repeat(np.arange(1, 256, dtype=np.uint8), page_size).reshape(255, page_size)
        parts = [fingerprint(fills).words]
        names = [
            f"0x{byte:02x} in every byte" + (f" ({_FILLS[byte]})" if byte in _FILLS else "") for byte in range(1, 256)
        ]
        category = [CATEGORIES.index(FILLED)] * 255
        for path in files:
            words = _pages_of(path, page_size)
            parts.append(words)
            names += [f"{os.path.basename(os.fspath(path))}, page {number}" for number in range(len(words))]
            category += [CATEGORIES.index(FILES)] * len(words)
        prints = Fingerprints(np.concatenate(parts))
        zero = prints.zeros(page_size)
        words = (prints if key is None else keyed(prints, key, page_size)).words
        _, first = np.unique(words[:, 0], return_index=True)
        first = first[~zero[first]]
        return cls(
            words[first, 0], words[first, 1], np.array(category, np.int64)[first], tuple(names[i] for i in first)
        )

    def find(self, high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """The category of each content, an index into CATEGORIES.

        >>> Known.of().find(np.zeros(2, np.uint64), np.zeros(2, np.uint64))
        array([0, 0])
        """
        at = self._at(high, low)
        return np.where(at < 0, 0, self.category[at])

    def name(self, high: int, low: int) -> tuple[str, str]:
        """The category of a content, and what it is.

        >>> Known.of().name(1, 2)
        ('other', '')
        """
        at = int(self._at(np.array([high], np.uint64), np.array([low], np.uint64))[0])
        return (OTHER, "") if at < 0 else (CATEGORIES[int(self.category[at])], self.names[at])

    def _at(self, high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        at = np.minimum(np.searchsorted(self.high, high), len(self.high) - 1)
        return np.where((self.high[at] == high) & (self.low[at] == low), at, -1)


def _pages_of(path: str | os.PathLike[str], page_size: int) -> npt.NDArray[np.uint64]:
    where = os.fspath(path)
    try:
        if os.path.isfile(where) and os.path.getsize(where) > _MOST_FILE:
            raise SourceError(f"{where}: larger than {_MOST_FILE >> 30} GiB, to look for its pages")
        with open(where, "rb") as file:
            data = file.read()
    except OSError as error:
        raise SourceError(f"{where}: {error.strerror}") from None
    return fingerprint(data + bytes(-len(data) % page_size), page_size=page_size).words

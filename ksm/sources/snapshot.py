"""The fingerprints of a source's pages at their addresses: 16 bytes a page, read once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ksm.pages import Fingerprints, fingerprint
from ksm.sources.image import Image


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a source held when it was read; enough to estimate and to simulate from.

    >>> from ksm.sources import ArrayImage
    >>> Snapshot.take(ArrayImage(np.zeros((2, 4096), np.uint8))).pages
    2
    """

    name: str
    page_size: int
    anonymous_known: bool
    """Whether its zero pages are known to have been touched, as `Image.anonymous_known`."""
    zero_page_known: bool
    """Whether slots that map the shared zero page are known to be left out."""
    blocks: tuple[tuple[int, Fingerprints], ...]
    """(address, fingerprints) by ascending address."""

    @classmethod
    def take(
        cls, image: Image, threads: int | None = None, progress: Callable[[int], object] | None = None
    ) -> Snapshot:
        """Read all pages of an image; `progress` is called with the number of pages done.

        >>> from ksm.sources import ArrayImage
        >>> len(Snapshot.take(ArrayImage(np.zeros((2, 4096), np.uint8))).blocks)
        1
        """
        found = []
        done = 0
        for address, pages, present in image.blocks():
            prints = fingerprint(pages, threads, progress=_beyond(done, progress) if present is None else None)
            if present is not None:
                prints = Fingerprints(prints.words, present)
            found.append((address, prints))
            done += prints.pages
            if progress is not None:
                progress(done)
        return cls(image.name, image.page_size, image.anonymous_known, image.zero_page_known, tuple(found))

    @property
    def pages(self) -> int:
        """How many pages there are.

        >>> Snapshot("nothing", 4096, True, True, ()).pages
        0
        """
        return sum(prints.pages for _, prints in self.blocks)

    def words(self) -> npt.NDArray[np.uint64]:
        """The (n, 2) fingerprint words of the pages that are present, by address.

        >>> Snapshot("nothing", 4096, True, True, ()).words().shape
        (0, 2)
        """
        parts = [prints.words if prints.present is None else prints.words[prints.present] for _, prints in self.blocks]
        return np.concatenate(parts) if parts else np.empty((0, 2), np.uint64)

    def without_zeros(self) -> Snapshot:
        """The same, its all-zero pages not present.

        >>> from ksm.sources import ArrayImage
        >>> Snapshot.take(ArrayImage(np.zeros((2, 4096), np.uint8))).without_zeros().pages
        0
        """
        blocks = []
        for address, prints in self.blocks:
            zero = prints.zeros(self.page_size)
            present = ~zero if prints.present is None else prints.present & ~zero
            blocks.append((address, Fingerprints(prints.words, present)))
        return Snapshot(self.name, self.page_size, self.anonymous_known, self.zero_page_known, tuple(blocks))


def _beyond(done: int, progress: Callable[[int], object] | None) -> Callable[[int], object] | None:
    return None if progress is None else lambda now: progress(done + now)

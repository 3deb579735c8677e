"""Where pages come from: `open` finds the reader that fits."""

from __future__ import annotations

import os

from ksm.errors import SourceError
from ksm.sources.criu import directory_pagemap
from ksm.sources.data import FileData
from ksm.sources.formats import COMPRESSIONS, FORMATS, LIVE, Format, read_file
from ksm.sources.image import ArrayImage, Block, Image, Segment
from ksm.sources.process import ProcessImage
from ksm.sources.qemu import QemuImage
from ksm.sources.raw import RawImage
from ksm.sources.snapshot import Snapshot

__all__ = [
    "COMPRESSIONS",
    "FORMATS",
    "LIVE",
    "ArrayImage",
    "Block",
    "Format",
    "Image",
    "ProcessImage",
    "QemuImage",
    "RawImage",
    "Segment",
    "Snapshot",
    "open",
]


def open(where: str | os.PathLike[str], *, marked_only: bool = False, page_size: int = 4096) -> Image:
    """Open a source of pages: "pid:123", "self", "qemu:NAME", or the path of an image file or CRIU directory.

    A file's format is found by its first bytes, not by its name; what has no known signature is raw pages.
    `FORMATS` lists what is understood. "qemu:NAME" is what a running QEMU has marked mergeable; "qemu-ram:NAME" its
    RAM whether marked or not.

    Args:
        where: the source.
        marked_only: of a process, only what is marked mergeable now.
        page_size: of a raw image, and of dumps that do not say.

    Raises:
        SourceError: there is no such source, or it cannot be read.
        PermissionError: the process belongs to somebody else.
        UnsupportedError: it needs a package that is not installed.

    >>> open("self").name
    'self'
    """
    text = os.fspath(where)
    if not isinstance(where, os.PathLike):
        if text == "self":
            return ProcessImage("self", marked_only)
        if text.startswith("pid:"):
            digits = text[4:]
            if not (digits.isascii() and digits.isdigit()) or len(digits) > 10:
                raise SourceError(f"{text}: not a process id")
            return ProcessImage(int(digits), marked_only)
        for scheme in ("qemu:", "qemu-ram:"):
            if text.startswith(scheme):
                return QemuImage(text.removeprefix(scheme), all_ram=scheme == "qemu-ram:")
    if os.path.isdir(text):
        text = directory_pagemap(text)
    return read_file(FileData(text), page_size)

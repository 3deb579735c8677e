"""Where pages come from: `open` finds the reader that fits."""

from __future__ import annotations

import builtins
import os
from collections.abc import Mapping
from types import MappingProxyType

from ksm.errors import SourceError
from ksm.sources.image import ArrayImage, Block, Image, Segment
from ksm.sources.process import ProcessImage
from ksm.sources.raw import RawImage
from ksm.sources.snapshot import Snapshot

__all__ = ["ArrayImage", "Block", "Image", "ProcessImage", "RawImage", "Segment", "Snapshot", "open"]

# Formats that a file's first bytes give away and that have no reader here: to take them for raw pages would be wrong.
_OTHER_FORMATS: Mapping[bytes, str] = MappingProxyType(
    {
        b"\x7fELF": "an ELF file (a core dump?)",
        b"EMiL": "a LiME or AVML dump",
        b"AVML": "an AVML dump",
        b"KDUMP   ": "a kdump-compressed dump",
        b"DISKDUMP": "a diskdump-compressed dump",
        b"makedumpfile\0": "a flattened kdump dump",
        b"LibvirtQemudSave": "a libvirt save file",
        b"LibvirtQemudPart": "an unfinished libvirt save file",
        b"QEVM": "a QEMU migration stream",
        b"QFI\xfb": "a qcow2 disk image",
        b"\x1f\x8b\x08": "gzip-compressed",
        b"\x28\xb5\x2f\xfd": "zstd-compressed",
        b"\xfd7zXZ\0": "xz-compressed",
    }
)


def open(where: str | os.PathLike[str], *, marked_only: bool = False, page_size: int = 4096) -> Image:
    """Open a source of pages: "pid:123", "self", or the path of an image file.

    A file's format is found by its first bytes, not by its name; what has no known signature is raw pages.

    Args:
        where: the source.
        marked_only: of a process, only what is marked mergeable now.
        page_size: of a raw image.

    Raises:
        SourceError: there is no such source, or it cannot be read.
        PermissionError: the process belongs to somebody else.

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
    image = RawImage(text, page_size)
    try:
        with builtins.open(text, "rb") as file:
            head = file.read(32)
        for signature, kind in _OTHER_FORMATS.items():
            if head.startswith(signature):
                raise SourceError(f"{text}: {kind}; only raw images and live processes can be read")
    except BaseException:
        image.close()
        raise
    return image

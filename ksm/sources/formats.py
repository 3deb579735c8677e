"""The formats of image files: how each is recognised, who writes it, and which reader takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ksm.errors import SourceError
from ksm.sources import criu, elf, flattened, kdump, lime, migration
from ksm.sources.compression import COMPRESSIONS, StreamData, compression_of
from ksm.sources.data import Data, FileData
from ksm.sources.image import Image
from ksm.sources.raw import RawImage

__all__ = ["COMPRESSIONS", "FORMATS", "LIVE", "Format", "read_file", "recognise"]

_HEAD = 64


@dataclass(frozen=True, slots=True)
class Format:
    """A format of image files.

    >>> FORMATS[0].name, FORMATS[0].signatures
    ('ELF core', (b'\\x7fELF',))
    """

    name: str
    signatures: tuple[bytes, ...]
    """What such a file begins with; none: whatever is not something else."""
    writers: str
    """Which tools write it."""
    read: Callable[[Data, int], Image]
    """Makes the image, from the data and the page size that was asked for."""
    needs: tuple[str, ...] = ()
    """Of what is in it, that which takes packages of ksm[dumps]."""


FORMATS: tuple[Format, ...] = (
    Format("ELF core", (elf.SIGNATURE,), "QEMU dump-guest-memory, virsh dump --memory-only, gcore", elf.ElfImage),
    Format(
        "kdump-compressed",
        (kdump.SIGNATURE, flattened.SIGNATURE),
        "QEMU dump-guest-memory -z -l -s, virsh dump --format kdump-*, makedumpfile",
        kdump.KdumpImage,
        ("LZO", "snappy", "zstd"),
    ),
    Format(
        "QEMU migration stream",
        (migration.SIGNATURE, migration.LIBVIRT),
        "QEMU migrate to a file, virsh save, virsh managedsave",
        migration.MigrationImage,
    ),
    Format("LiME", (lime.LIME,), "LiME, AVML", lime.LimeImage),
    Format("AVML, compressed", (lime.AVML,), "AVML --compress", lime.AvmlImage, ("snappy",)),
    Format("CRIU image", (criu.SIGNATURE,), "criu dump (the directory, or its pagemap-PID.img)", criu.CriuImage),
    Format("raw", (), "QEMU pmemsave, Firecracker, cloud-hypervisor, VMware .vmem, memory-backing files", RawImage),
)

# Sources that are no files.
LIVE: Mapping[str, str] = MappingProxyType(
    {
        "pid:123, self": "a live process: the pages that KSM could take",
        "qemu:NAME": "a running QEMU guest by its -name: what QEMU has marked mergeable",
        "qemu-ram:NAME": "the same guest's RAM, marked or not (mem-merge=off)",
    }
)

# Formats that a file's first bytes give away and that have no reader here: to take them for raw pages would be wrong.
_OTHERS: Mapping[bytes, str] = MappingProxyType(
    {
        b"DISKDUMP": "a diskdump-compressed dump",
        b"LibvirtQemudPart": "an unfinished libvirt save file",
        b"QFI\xfb": "a qcow2 disk image",
        b"KDMV": "a VMDK disk image",
        b"PAGEDU64": "a Windows crash dump",
        b"PAGEDUMP": "a Windows crash dump",
        b"hibr": "a Windows hibernation file",
        b"\x89LZO\0\r\n\x1a\n": "lzop-compressed",
        b"\x04\x22\x4d\x18": "lz4-compressed",
        b"PK\x03\x04": "a zip archive",
    }
)


def recognise(head: bytes) -> Format | None:
    """The format of what begins so, if it is known to be one; None: raw pages, or a format without a reader.

    >>> recognise(b"\\x7fELF\\x02\\x01").name
    'ELF core'
    """
    for format in FORMATS:
        if head.startswith(format.signatures or (b"\0never\0",)):
            return format
    return None


def read_file(file: FileData, page_size: int = 4096) -> Image:
    """The image in a file, compressed or not. The image takes over the file and closes it, also if this fails.

    Raises:
        SourceError: the format is known but not read here, or the file is broken.
        UnsupportedError: a package that it takes is not installed.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as f:
    ...     _ = f.write(bytes(8192)); f.flush()
    ...     read_file(FileData(f.name)).format
    'raw'
    """
    data: Data = file
    around: list[str] = []
    try:
        while wrapping := _wrapping(data, data.head(0, _HEAD)):
            if wrapping[0] in around or len(around) == _MOST_LAYERS:
                raise SourceError(f"{data.name}: {wrapping[0]} inside {around[-1]}; unpack it once")
            around.insert(0, wrapping[0])
            data = wrapping[1]()
        head = data.head(0, _HEAD)
        for signature, kind in _OTHERS.items():
            if head.startswith(signature):
                raise SourceError(f"{data.name}: {kind}, which cannot be read; `ksm formats` lists what can")
        format = recognise(head)
        image = format.read(data, page_size) if format else RawImage(data, page_size)
    except BaseException:
        data.close()
        file.close()
        raise
    image.format = ", ".join([image.format, *around])
    return image


_MOST_LAYERS = 3  # such as a compressed stream in a libvirt save file


def _wrapping(data: Data, head: bytes) -> tuple[str, Callable[[], Data]] | None:
    """What is around the image, and how to get at what is inside."""
    if packed := compression_of(head):
        return packed.name, lambda: StreamData(_as_file(data), packed)
    if head.startswith(flattened.SIGNATURE):
        return "flattened", lambda: flattened.FlatData(data)
    if head.startswith(migration.LIBVIRT):
        return "libvirt save file", lambda: migration.inside_libvirt(data)
    return None


def _as_file(data: Data) -> FileData:
    if not isinstance(data, FileData):
        raise SourceError(f"{data.name}: compressed twice; unpack it once")
    return data

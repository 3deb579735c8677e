"""CRIU images by the protobuf library, from the definitions of CRIU's images/pagemap.proto and mm.proto."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PAGE = 4096
PARENT, LAZY, PRESENT = 1, 2, 4
VDSO = 1 << 3

_FIELD = descriptor_pb2.FieldDescriptorProto
_KINDS = {"u32": _FIELD.TYPE_UINT32, "u64": _FIELD.TYPE_UINT64, "bool": _FIELD.TYPE_BOOL, "s64": _FIELD.TYPE_INT64}
_DEFINITIONS = {
    "head": [("pages_id", 1, "u32")],
    "entry": [
        ("vaddr", 1, "u64"),
        ("nr_pages", 2, "u32"),
        ("in_parent", 3, "bool"),
        ("flags", 4, "u32"),
        ("nr_pages_wide", 5, "u64"),
    ],
    "vma": [
        *(("start", 1, "u64"), ("end", 2, "u64"), ("pgoff", 3, "u64"), ("shmid", 4, "u64"), ("prot", 5, "u32")),
        *(("flags", 6, "u32"), ("status", 7, "u32"), ("fd", 8, "s64"), ("madv", 9, "u64")),
    ],
    "mm": [("mm_start_code", 1, "u64"), ("exe_file_id", 12, "u32"), ("vmas", 14, ".ksm.vma")],
}


def _messages() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="ksm.proto", package="ksm", syntax="proto2")
    for name, fields in _DEFINITIONS.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            made = message.field.add(name=field, number=number, label=_FIELD.LABEL_OPTIONAL)
            if kind.startswith("."):
                made.type, made.type_name, made.label = _FIELD.TYPE_MESSAGE, kind, _FIELD.LABEL_REPEATED
            else:
                made.type = _KINDS[kind]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    find = pool.FindMessageTypeByName
    return {name: message_factory.GetMessageClass(find(f"ksm.{name}")) for name in _DEFINITIONS}


MESSAGES = _messages()


def image(magic: int, messages: Sequence[Any]) -> bytes:
    """An image file of messages."""
    parts = [message.SerializeToString() for message in messages]
    return struct.pack("<II", 0x54564319, magic) + b"".join(struct.pack("<I", len(part)) + part for part in parts)


def write(
    folder: Path,
    memory: Mapping[int, bytes],
    *,
    pid: int = 7,
    in_parent: Mapping[int, int] | None = None,
    lazy: Mapping[int, int] | None = None,
    vmas: Sequence[tuple[int, int, int]] = (),
    form: str = "flags",
) -> Path:
    """pagemap-PID.img, pages-1.img and mm-PID.img; `form`: how an entry says what it is ("flags", "old", "wide")."""
    folder.mkdir(exist_ok=True)
    entries = [(address, len(content) // PAGE, PRESENT) for address, content in memory.items()]
    entries += [(address, pages, PARENT) for address, pages in (in_parent or {}).items()]
    entries += [(address, pages, LAZY) for address, pages in (lazy or {}).items()]
    made = [MESSAGES["head"](pages_id=1)]
    for address, pages, flags in sorted(entries):
        entry = MESSAGES["entry"](vaddr=address, nr_pages=pages)
        if form == "old":
            entry.in_parent = flags == PARENT
        else:
            entry.flags = flags
        if form == "wide":
            entry.nr_pages, entry.nr_pages_wide = 0, pages
        made.append(entry)
    (folder / f"pagemap-{pid}.img").write_bytes(image(0x56084025, made))
    (folder / "pages-1.img").write_bytes(b"".join(memory[address] for address in sorted(memory)))
    if vmas:
        areas = [MESSAGES["vma"](start=start, end=end, status=status, fd=-1) for start, end, status in vmas]
        mm = MESSAGES["mm"](mm_start_code=1 << 40, exe_file_id=3, vmas=areas)
        (folder / f"mm-{pid}.img").write_bytes(image(0x57492820, [mm]))
    return folder / f"pagemap-{pid}.img"

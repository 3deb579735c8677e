"""What is known of a VM beside its pages: its name and class, where it runs, how it may be placed."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from ksm.errors import SourceError

Zeros: TypeAlias = Literal["touched", "merge", "absent"]

NONE: Mapping[str, str] = MappingProxyType({})
MOST = 1 << 52  # of a count or of bytes: sums over many VMs still fit into 64 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Vm:
    """One VM, as the metadata of its files and as a row of tables.

    >>> vm = Vm(name="web-1", kind="web", host="h1", pages=1000, zero_pages=100, contents=800)
    >>> vm.ram, Vm.from_dict(vm.to_dict()) == vm
    (4096000, True)
    """

    name: str
    kind: str = ""
    """Its class; "class" in files and on the command line."""
    host: str = ""
    """The host that it runs on; "": not placed."""
    node: int = 0
    """The NUMA node of that host that holds its memory."""
    ram: int = 0
    """Bytes that it was given and may touch; 0 becomes what its pages take."""
    vcpus: int = 1
    domain: str = ""
    """Its security domain: only VMs of one domain may merge with each other."""
    apart: str = ""
    """VMs of the same non-empty name are kept on different hosts (anti-affinity)."""
    pinned: bool = False
    """Whether it stays where it is."""
    tags: Mapping[str, str] = field(default_factory=lambda: NONE)
    page_size: int = 4096
    key_id: str = ""
    """Which key its fingerprints were made with (`ksm.keyed.Key.id`); "": none, plain XXH3-128."""
    zeros: Zeros = "touched"
    """What its all-zero pages were taken for: "touched" (the source knows), or of a dump, which cannot know: "merge",
    pages like others, or "absent", never touched and left out."""
    zero_or_untouched: int = 0
    """All-zero pages of a dump, whether left out or not."""
    taken: str = ""
    """When, ISO 8601 in UTC."""
    id: str = ""
    """Of this fingerprint: the same file under two names has the same one."""
    pages: int = 0
    """Pages that take part, zero pages included."""
    zero_pages: int = 0
    contents: int = 0
    """Different contents, zero not counted."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a VM needs a name")
        for what in ("node", "ram", "vcpus", "pages", "zero_pages", "contents", "zero_or_untouched"):
            if getattr(self, what) < 0:
                raise ValueError(f"{self.name}: {what} is {getattr(self, what)}, below 0")
            if getattr(self, what) > MOST:
                raise ValueError(f"{self.name}: {what} is {getattr(self, what)}, above {MOST}")
        for what in ("name", "kind", "host", "domain", "apart"):
            if not getattr(self, what).isprintable():
                raise ValueError(f"{getattr(self, what)!r}: a {what} that cannot be printed")
        if self.page_size < 512 or self.page_size & (self.page_size - 1) or self.page_size > 1 << 30:
            raise ValueError(f"{self.name}: a page size of {self.page_size}")
        if self.zero_pages > self.pages or self.contents > self.pages - self.zero_pages:
            raise ValueError(f"{self.name}: {self.zero_pages} zero pages and {self.contents} contents in {self.pages}")
        if not self.ram:
            object.__setattr__(self, "ram", self.pages * self.page_size)
        object.__setattr__(self, "tags", MappingProxyType(dict(self.tags)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Vm.from_dict, (self.to_dict(),)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold; `kind` is "class" there.

        >>> Vm(name="a", kind="web").to_dict()["class"]
        'web'
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["tags"] = dict(self.tags)
        return {("class" if name == "kind" else name): value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Vm:
        """The reverse of `to_dict`; names that it does not know are left out.

        Raises:
            SourceError: a value of the wrong type, or out of range.

        >>> Vm.from_dict({"name": "a", "class": "web", "pages": 10}).kind
        'web'
        """
        given = {("kind" if name == "class" else name): value for name, value in values.items()}
        taken: dict[str, Any] = {}
        for f in fields(cls):
            if f.name not in given or given[f.name] is None:
                continue
            value = given[f.name]
            wanted = _TYPES.get(str(f.type), str)
            if f.name == "tags" and isinstance(value, str):
                value = json.loads(value)
            if (wanted is int and isinstance(value, bool)) or not isinstance(value, wanted):
                raise SourceError(f"{f.name} is {value!r}")
            taken[f.name] = value
        if "name" not in taken:
            raise SourceError("a VM without a name")
        if taken.get("zeros", "touched") not in ("touched", "merge", "absent"):
            raise SourceError(f"zeros is {taken['zeros']!r}")
        try:
            return cls(**taken)
        except (TypeError, ValueError) as error:
            raise SourceError(str(error)) from None


_TYPES: Mapping[str, type] = MappingProxyType({"int": int, "bool": bool, "Mapping[str, str]": dict})


def new_id() -> str:
    """A random id for a fingerprint just taken.

    >>> len(new_id())
    32
    """
    return uuid.uuid4().hex


def now() -> str:
    """The time, as `Vm.taken` has it.

    >>> now().endswith("+00:00")
    True
    """
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

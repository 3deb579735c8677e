"""Which files there are, where they lie, and which of them take part."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ksm.errors import SourceError
from ksm.fleet import files
from ksm.fleet.vm import Vm


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a VM's contents, and the hosts of workers that can read it; (): all can.

    >>> Entry("a.pages.parquet", Vm(name="a")).places
    ()
    """

    path: str
    vm: Vm
    places: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file that does not take part, and why.

    >>> LeftOut("a.pages.parquet", "damaged").to_dict()
    {'path': 'a.pages.parquet', 'why': 'damaged', 'partial': True}
    """

    path: str
    why: str
    partial: bool = True
    """Whether something is missing from the answer because of it; a file that is there twice leaves no gap."""

    def to_dict(self) -> dict[str, str | bool]:
        """For JSON."""
        return {"path": self.path, "why": self.why, "partial": self.partial}


Seen = list[tuple[str, Vm | None, str]]


def look(given: Sequence[str]) -> Seen:
    """What one host sees: (path, the VM or None, what is wrong) of every file in what was given.

    >>> look(["nothing"])
    [('nothing', None, 'nothing: No such file or directory')]
    """
    seen: Seen = []
    for where in given:
        try:
            found = files.find([where], files.PAGES)
        except SourceError as error:
            seen.append((where, None, str(error)))
            continue
        for path in found:
            try:
                seen.append((path, files.read_vm(path), ""))
            except SourceError as error:
                seen.append((path, None, str(error)))
    return seen


def gather(by_place: Mapping[str, Seen]) -> tuple[list[Entry], list[LeftOut]]:
    """One list out of what the hosts see. The same file seen from everywhere is shared.

    >>> here = [("a.pages.parquet", Vm(name="a", id="1"), "")]
    >>> gather({"h1": here, "h2": here})[0][0].places, gather({"h1": here, "h2": []})[0][0].places
    ((), ('h1',))
    """
    vms: dict[tuple[str, str], tuple[Vm, list[str]]] = {}
    broken: dict[str, str] = {}
    for place, seen in by_place.items():
        for path, vm, why in seen:
            if vm is None:
                broken.setdefault(path, why)
            else:
                vms.setdefault((path, vm.id), (vm, []))[1].append(place)
    entries = [
        Entry(path, vm, () if len(places) == len(by_place) else tuple(sorted(places)))
        for (path, _), (vm, places) in vms.items()
    ]
    readable = {entry.path for entry in entries}
    missing = [
        LeftOut(path, _without(path, why))
        for path, why in broken.items()
        if path not in readable and not any(other.startswith(path.rstrip(os.sep) + os.sep) for other in readable)
    ]
    return sorted(entries, key=lambda entry: (entry.vm.name, entry.path, entry.places)), sorted(
        missing, key=lambda one: one.path
    )


def _without(path: str, why: str) -> str:
    return why.removeprefix(f"{path}: ")


def choose(entries: Sequence[Entry]) -> tuple[list[Entry], list[LeftOut]]:
    """Each VM once: a file that is there twice counts once; of two fingerprints of one VM the later.

    Raises:
        SourceError: page sizes or keys differ.

    >>> twice = [Entry("a.pages.parquet", Vm(name="a", id="1")), Entry("b.pages.parquet", Vm(name="a", id="1"))]
    >>> [(one.path, one.why) for one in choose(twice)[1]]
    [('b.pages.parquet', 'the same file as a.pages.parquet: counted once')]
    """
    kept: dict[str, Entry] = {}
    by_id: dict[str, Entry] = {}
    dropped = []
    for entry in entries:
        same = by_id.get(entry.vm.id) if entry.vm.id else None
        if same is not None:
            dropped.append(LeftOut(entry.path, f"the same file as {same.path}: counted once", False))
            continue
        by_id[entry.vm.id] = entry
        other = kept.get(entry.vm.name)
        if other is None:
            kept[entry.vm.name] = entry
            continue
        old, new = sorted((other, entry), key=lambda one: (one.vm.taken, one.path))
        kept[entry.vm.name] = new
        dropped.append(LeftOut(old.path, f"an older fingerprint of {entry.vm.name} than {new.path}", False))
    result = sorted(kept.values(), key=lambda entry: entry.vm.name)
    _alike(result)
    return result, dropped


def _alike(entries: Sequence[Entry]) -> None:
    first: dict[object, Entry] = {}
    for entry in entries:
        first.setdefault(entry.vm.page_size, entry)
    if len(first) > 1:
        said = ", ".join(f"{size} in {entry.path}" for size, entry in first.items())
        raise SourceError(f"page sizes differ, and KSM merges pages of one size: {said}")
    first = {}
    for entry in entries:
        first.setdefault(entry.vm.key_id, entry)
    if len(first) > 1:
        said = ", ".join(f"{key or 'none'} in {entry.path}" for key, entry in first.items())
        raise SourceError(f"keys differ, and fingerprints under different keys never compare: {said}")

"""Frames, swap, mapped ranges and address spaces: what memory does around KSM."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from tests.model.ksm import Item, StableNode

PROT_READ, PROT_WRITE = 1, 2
HUGE_PAGES = 512
Where = tuple["Mm", int]  # one slot: an address space and a page number in it
Home = tuple[object, int]  # where an anonymous frame was born: a family of ranges and an index in it


def fail(number: int, what: str) -> NoReturn:
    """Raise the OSError that the kernel's errno stands for."""
    raise OSError(number, f"{os.strerror(number)}: {what}")


def keys_in(mapping: dict[int, Any], start: int, end: int) -> Iterator[int]:
    """The keys of [start, end), ascending; keys may be removed meanwhile."""
    few = end - start <= len(mapping)
    return (k for k in (range(start, end) if few else sorted(mapping)) if start <= k < end and k in mapping)


class OutOfMemory(OSError, MemoryError):
    """RAM and swap are used up."""


class Frame:
    """One physical page."""

    def __init__(self, content: bytes, node: int, home: Home) -> None:
        self.content = content
        self.node = node  # NUMA
        self.home = home
        self.mappers: set[Where] = set()
        self.clean: set[Where] = set()  # those of them through which it was not written since MADV_FREE or the merge
        self.ksm: StableNode | None = None
        self.orphan = False  # a KSM frame without a node: a merge was undone, but others map the frame
        self.dirty = False  # worth keeping whatever the mappings say
        self.lazy = False  # MADV_FREE'd: reclaim may drop it
        self.swap: SwapEntry | None = None  # a copy still lies in swap, for others
        self.huge: list[Frame] | None = None  # the frames of the huge page that this one is part of

    @property
    def merged(self) -> bool:
        """Whether it is a KSM frame: never written, never exchanged for another by ksmd."""
        return self.ksm is not None or self.orphan

    @property
    def alive(self) -> bool:
        """Whether anything still holds the frame."""
        return bool(self.mappers) or self.swap is not None


class SwapEntry:
    """One page in swap, for all slots that mapped it; `frame` is the copy that was read back already."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.refs: set[Where] = set()
        self.frame: Frame | None = None


@dataclass(frozen=True)
class ZeroPage:
    """A mapping of the shared zero page."""

    by_ksm: bool


LINKS = count()
READ_ZERO, KSM_ZERO = ZeroPage(False), ZeroPage(True)
Slot = Frame | SwapEntry | ZeroPage


@dataclass
class Vma:
    """One mapped range, in page numbers, end excluded."""

    start: int
    end: int
    prot: int
    node: int = 0
    mergeable: bool = False
    huge: bool = False
    shift: int = 0  # index of a page in its home = page number + shift
    families: tuple[
        object, ...
    ] = ()  # one's own since the first fault, last; before it what came by fork, oldest first
    linked: int = field(default_factory=lambda: next(LINKS))  # when it joined its family in its present extent

    def home(self, page: int) -> Home:
        """Where a page of this range is born."""
        return self.families[0], page + self.shift

    def joins(self, right: Vma) -> bool:
        """Whether this range and the one right behind it become one."""
        return (
            self.end == right.start
            and (self.prot, self.node, self.mergeable, self.huge, self.shift)
            == (right.prot, right.node, right.mergeable, right.huge, right.shift)
            and (
                self.families == right.families
                or (not right.families and len(self.families) == 1)
                or (not self.families and len(right.families) == 1)
            )
        )


@dataclass(eq=False)
class Mm:
    """One address space."""

    name: str
    alive: bool = True
    vmas: list[Vma] = field(default_factory=list)  # by address
    slots: dict[int, Slot] = field(default_factory=dict)
    tables: set[int] = field(default_factory=set)  # 2 MiB units that are mapped page by page
    huge_zeros: set[int] = field(default_factory=set)  # 2 MiB units that map the huge zero page
    merge_any: bool = False
    registered: bool = False
    items: dict[int, Item] = field(default_factory=dict)
    counted_before: int = 0  # the parent's number of items, which kernels once let the child start at

    def vma_at(self, page: int) -> Vma | None:
        """The range that holds `page`."""
        return next((vma for vma in self.vmas if vma.start <= page < vma.end), None)

    def vmas_in(self, start: int, end: int) -> list[Vma]:
        """The ranges that meet [start, end)."""
        return [vma for vma in self.vmas if vma.start < end and start < vma.end]

    def covers(self, start: int, end: int) -> bool:
        """Whether [start, end) has no hole."""
        return sum(min(v.end, end) - max(v.start, start) for v in self.vmas_in(start, end)) == end - start

    def cut(self, start: int, end: int) -> list[Vma]:
        """Split ranges at both ends, so that whole ranges fill [start, end); give those."""
        out: list[Vma] = []
        self.split_units(start, end)
        for vma in self.vmas:
            marks = [vma.start, *(m for m in (start, end) if vma.start < m < vma.end), vma.end]
            if len(marks) > 2:
                out += [replace(vma, start=a, end=b, linked=next(LINKS)) for a, b in pairwise(marks)]
            else:
                out.append(vma)
        self.vmas = out
        return self.vmas_in(start, end)

    def split_units(self, start: int, end: int) -> None:
        """A boundary inside a 2 MiB unit: from now on it is mapped page by page (its frames stay together)."""
        for unit in {start // HUGE_PAGES, end // HUGE_PAGES}:
            first, last = unit * HUGE_PAGES, (unit + 1) * HUGE_PAGES
            if first < start < last or first < end < last:
                huge = unit in self.huge_zeros or any(self.pages_in(first, last))
                self.huge_zeros.discard(unit)
                if huge:
                    self.tables.add(unit)

    def join(self, start: int, end: int) -> None:
        """Make one of neighbours that differ in nothing and meet in [start, end]."""
        out: list[Vma] = []
        for vma in sorted(self.vmas, key=lambda v: v.start):
            if out and start <= vma.start <= end and out[-1].joins(vma):
                out[-1] = replace(out[-1], end=vma.end, families=out[-1].families or vma.families, linked=next(LINKS))
            else:
                out.append(vma)
        self.vmas = out

    def pages_in(self, start: int, end: int) -> Iterator[int]:
        """The pages of [start, end) that have a slot, by address; slots may come and go meanwhile."""
        return keys_in(self.slots, start, end)


class Memory:
    """RAM and swap, and every way in which a slot changes what it maps."""

    def __init__(self, page_size: int, ram: int | None, swap: int, huge_gives_back: bool) -> None:
        self.page_size = page_size
        self.ram_pages = None if ram is None else ram // page_size
        self.swap_pages = swap // page_size
        self.huge_gives_back = huge_gives_back
        self.zero = bytes(page_size)
        self.frames: set[Frame] = set()
        self.mms: dict[str, Mm] = {}
        self.cow_ksm = 0
        self.swpin_copy = 0

    # RAM

    def new_frame(self, content: bytes, mm: Mm, page: int, vma: Vma) -> Frame:
        """Allocate; when RAM is full everything that can goes to swap first."""
        if self.ram_pages is not None and self.frames_used() >= self.ram_pages:
            self.reclaim()
            if self.frames_used() >= self.ram_pages:
                raise OutOfMemory(errno.ENOMEM, f"{mm.name}: no frame for page {page:#x}")
        if not vma.families:
            near = next(
                (
                    v
                    for v in mm.vmas
                    if len(v.families) == 1
                    and (v.end == vma.start or vma.end == v.start)
                    and (v.mergeable, v.huge, v.node, v.shift) == (vma.mergeable, vma.huge, vma.node, vma.shift)
                ),
                None,
            )
            vma.families = near.families if near else (object(),)
            vma.linked = next(LINKS)
        frame = Frame(content, vma.node, vma.home(page))
        self.frames.add(frame)
        return frame

    def frames_used(self) -> int:
        """Count the frames that something holds."""
        self.frames = {frame for frame in self.frames if frame.alive}
        return len(self.frames)

    def swap_used(self) -> int:
        """Count the pages that lie in swap."""
        return len({id(s) for mm in self.mms.values() for s in mm.slots.values() if isinstance(s, SwapEntry)})

    # what a slot maps

    def set_slot(self, mm: Mm, page: int, new: Slot | None, clean: bool = False) -> None:
        """Replace what a slot maps."""
        where = (mm, page)
        old = mm.slots.pop(page, None)
        if isinstance(old, Frame):
            old.mappers.discard(where)
            old.clean.discard(where)
        elif isinstance(old, SwapEntry):
            old.refs.discard(where)
            if not old.refs and old.frame is not None:
                old.frame.swap = None
                old.frame = None
        if new is not None:
            mm.slots[page] = new
        if isinstance(new, Frame):
            new.mappers.add(where)
            if clean:
                new.clean.add(where)
        elif isinstance(new, SwapEntry):
            new.refs.add(where)

    def zap(self, mm: Mm, start: int, end: int) -> None:
        """Drop what the slots of [start, end) map."""
        mm.split_units(start, end)
        mm.huge_zeros = {unit for unit in mm.huge_zeros if unit * HUGE_PAGES < start or (unit + 1) * HUGE_PAGES > end}
        for page in mm.pages_in(start, end):
            self.set_slot(mm, page, None)

    # faults

    def fault(self, mm: Mm, page: int, vma: Vma, write: bool) -> Frame | None:
        """Make a slot readable (None: it maps the zero page) or privately writable."""
        slot = mm.slots.get(page)
        if isinstance(slot, SwapEntry):
            slot = self.swap_in(mm, page, vma, slot)
        if isinstance(slot, Frame) and not write:
            return slot
        if slot is None and write and self.populate_huge(mm, page, vma):
            slot = mm.slots[page]
        if slot is None and not write and self.untouched(mm, page, vma):
            mm.huge_zeros.add(page // HUGE_PAGES)
            return None
        if not isinstance(slot, Frame) or slot.huge is None:
            mm.tables.add(page // HUGE_PAGES)
        if not write:
            if slot is None:
                self.set_slot(mm, page, READ_ZERO)
            return None
        if isinstance(slot, Frame):
            return self.own(mm, page, vma, slot)
        fresh = self.new_frame(self.zero, mm, page, vma)
        self.set_slot(mm, page, fresh)
        return fresh

    def own(self, mm: Mm, page: int, vma: Vma, frame: Frame) -> Frame:
        """Copy on write: a KSM frame always, another one when somebody else holds it too."""
        if not frame.merged and len(frame.mappers) == 1 and frame.swap is None:
            frame.clean.clear()
            return frame
        copy = self.new_frame(frame.content, mm, page, vma)
        if frame.merged:
            self.cow_ksm += 1
        self.set_slot(mm, page, copy)
        return copy

    def untouched(self, mm: Mm, page: int, vma: Vma) -> bool:
        """Whether the 2 MiB unit around `page` can still be mapped by one huge page (the huge zero page may be)."""
        unit = page // HUGE_PAGES
        first, last = unit * HUGE_PAGES, (unit + 1) * HUGE_PAGES
        inside = vma.huge and vma.start <= first and last <= vma.end
        return inside and unit not in mm.tables and not any(mm.pages_in(first, last))

    def populate_huge(self, mm: Mm, page: int, vma: Vma) -> bool:
        """A write to an untouched 2 MiB unit under MADV_HUGEPAGE fills the whole unit with one huge page."""
        if not self.untouched(mm, page, vma):
            return False
        unit = page // HUGE_PAGES
        mm.huge_zeros.discard(unit)
        pages = range(unit * HUGE_PAGES, (unit + 1) * HUGE_PAGES)
        whole = [self.new_frame(self.zero, mm, p, vma) for p in pages]
        for p, frame in zip(pages, whole, strict=True):
            frame.huge = whole
            self.set_slot(mm, p, frame)
        return True

    def split_partial(self, mm: Mm, start: int, end: int) -> None:
        """MADV_FREE or MADV_PAGEOUT of a part: a huge page that nobody else maps is split."""
        for unit in {start // HUGE_PAGES, end // HUGE_PAGES}:
            first, last = unit * HUGE_PAGES, (unit + 1) * HUGE_PAGES
            if first < start < last or first < end < last:
                for page in mm.pages_in(first, last):
                    slot = mm.slots[page]
                    if isinstance(slot, Frame) and slot.huge is not None and len(slot.mappers) == 1:
                        self.split_huge(slot)

    def split_huge(self, frame: Frame) -> None:
        """Split the huge page around `frame`; since 6.12 its all-zero pages give their frames back."""
        whole, frame.huge = frame.huge or [], None
        for part in whole:
            part.huge = None
            if self.huge_gives_back and part.content == self.zero and part.ksm is None:
                for mm, page in list(part.mappers):
                    self.set_slot(mm, page, READ_ZERO)

    def write(self, mm: Mm, page: int, vma: Vma, offset: int, data: bytes) -> None:
        """Store bytes into one page."""
        frame = self.fault(mm, page, vma, True)
        assert frame is not None
        frame.content = frame.content[:offset] + data + frame.content[offset + len(data) :]

    # swap

    def swap_in(self, mm: Mm, page: int, vma: Vma, entry: SwapEntry) -> Frame:
        """Bring a page back: the first of a group gets the frame, strangers after it a copy."""
        home = vma.home(page)
        frame = entry.frame
        if frame is None:
            frame = self.new_frame(entry.content, mm, page, vma)
            entry.frame, frame.swap = frame, entry
        elif frame.ksm is None and frame.home != home:
            frame = self.new_frame(entry.content, mm, page, vma)
            self.swpin_copy += 1
        self.set_slot(mm, page, frame)
        return frame

    def free(self, mm: Mm, page: int) -> None:
        """MADV_FREE: swap is given up at once, a frame when reclaim comes by, unless it is written before."""
        slot = mm.slots[page]
        if isinstance(slot, SwapEntry):
            self.set_slot(mm, page, None)
        elif isinstance(slot, Frame):
            if slot.dirty or slot.swap is not None:
                if len(slot.mappers) > 1:
                    return
                slot.dirty = False
            slot.lazy = True
            slot.clean.add((mm, page))

    def evict(self, frame: Frame) -> None:
        """Reclaim comes by: a frame goes to swap; a lazy one is dropped, for as long as its mappings are clean."""
        if frame.lazy:
            if frame.huge is not None:
                self.split_huge(frame)
            for mm, page in [] if frame.dirty else sorted(self.findable(frame), key=in_walk_order):
                if (mm, page) not in frame.clean:
                    break
                self.set_slot(mm, page, None)
            frame.lazy = False
            return
        if frame.swap is None and self.swap_used() >= self.swap_pages:
            return
        if frame.huge is not None:
            self.split_huge(frame)
        entry = frame.swap or SwapEntry(frame.content)
        entry.frame, frame.swap = frame, entry
        for mm, page in self.findable(frame):
            self.set_slot(mm, page, entry)
        if not frame.mappers:
            entry.frame, frame.swap = None, None

    def findable(self, frame: Frame) -> list[Where]:
        """The mappers that reclaim finds: of a KSM frame those with an item on its node, and what they forked."""
        if frame.orphan:
            return []
        if frame.ksm is None:
            return list(frame.mappers)
        found = []
        for mm, page in frame.mappers:
            vma = mm.vma_at(page)
            assert vma is not None
            if any(item.page == page and item.family in vma.families for item in frame.ksm.items):
                found.append((mm, page))
        return found

    def reclaim(self) -> None:
        """Everything that can goes, process by process, by address; what stayed once may go the second time."""
        for mm in list(self.mms.values()) * 2:
            for page in sorted(mm.slots):
                slot = mm.slots.get(page)
                if isinstance(slot, Frame) and slot.huge and not all(part.mappers for part in slot.huge):
                    self.split_huge(slot)
                    slot = mm.slots.get(page)
                if isinstance(slot, Frame):
                    self.evict(slot)
                elif isinstance(slot, SwapEntry) and slot.frame is not None and not slot.frame.mappers:
                    slot.frame.swap = None
                    slot.frame = None


def in_walk_order(where: Where) -> tuple[int, int]:
    """In which order a frame's mappers are gone through: by their range's start, then by when it got this extent."""
    mm, page = where
    vma = mm.vma_at(page)
    assert vma is not None
    return vma.start + vma.shift, vma.linked

"""ModelMachine: processes and their system calls on top of the memory and KSM of the model."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

from tests.model.ksm import FOREVER, ITEM_BYTES, Ksm
from tests.model.memory import (
    HUGE_PAGES,
    KSM_ZERO,
    LINKS,
    PROT_READ,
    PROT_WRITE,
    Frame,
    Memory,
    Mm,
    SwapEntry,
    Vma,
    fail,
)
from tests.model.sysfs import DEFAULT_PAGES_TO_SCAN, ModelSysfs

DONTNEED, FREE, MERGEABLE, UNMERGEABLE, HUGEPAGE, NOHUGEPAGE, PAGEOUT = 4, 8, 12, 13, 14, 15, 21
MAYMOVE, FIXED, DONTUNMAP = 1, 2, 4
ADVICES = (DONTNEED, FREE, MERGEABLE, UNMERGEABLE, HUGEPAGE, NOHUGEPAGE, PAGEOUT)
SET_MEMORY_MERGE, GET_MEMORY_MERGE = 67, 68
TOP = 1 << 47
WORD = 1 << 64


class ModelKsmd:
    """Steps the daemon."""

    def __init__(self, machine: ModelMachine) -> None:
        self._m = machine

    def scan(self) -> None:
        """One pass, or the rest of the one under way."""
        self._m.engine.batch(FOREVER)

    def scan_pages(self, k: int) -> None:
        """One batch of at most k visits."""
        self._m.engine.batch(k)


class ModelMachine:
    """A machine whose KSM follows the rules as they are written down, slowly.

    >>> m = ModelMachine()
    >>> p = m.spawn("a")
    >>> at = p.mmap(8192)
    >>> p.write(at, b"x" * 8192)
    >>> p.madvise(at, 8192, MERGEABLE)
    >>> m.ksm.write("run", "1")
    >>> m.ksmd.scan(); m.ksmd.scan()
    >>> m.ksm.read("pages_shared"), m.ksm.read("pages_sharing")
    ('1\\n', '1\\n')
    """

    def __init__(
        self,
        ram: int | None = None,
        swap: int = 0,
        nodes: int = 1,
        page_size: int = 4096,
        kernel: str = "6.18",
        index: str = "tree",
    ) -> None:
        major, minor = kernel.split(".")[:2]
        version = (int(major), int(minor))
        self.version = version
        self.page_size = page_size
        self.numa_nodes = nodes
        self.memory = Memory(page_size, ram, swap, huge_gives_back=version >= (6, 12))
        self.engine = Ksm(self.memory, nodes, version < (6, 11), version >= (6, 6), version >= (6, 7))
        self.engine.passes_over_none = (6, 1) <= version < (6, 5)
        self.engine.at_pass_start = self._pass_starts
        self.engine.at_pass_end = self._pass_ends
        self.pages_to_scan = DEFAULT_PAGES_TO_SCAN
        self.sleep_millisecs = 20
        self.advisor = False
        self.advisor_max_cpu = 70
        self.advisor_target_scan_time = 200
        self.advisor_min_pages_to_scan = 500
        self.advisor_max_pages_to_scan = 30000
        self.advisor_previous_seconds = 0
        self.advisor_change = 0
        self.pass_started_ms = 0
        self.pass_cpu_ms = 0
        self.processes: dict[str, ModelProcess] = {}
        self.ksm = ModelSysfs(self, version)
        self.ksmd = ModelKsmd(self)

    def spawn(self, name: str) -> ModelProcess:
        """A new process with nothing mapped."""
        return self._add(Mm(name))

    def _add(self, mm: Mm) -> ModelProcess:
        if mm.name in self.processes:
            raise ValueError(f"{mm.name} is running already")
        self.memory.mms[mm.name] = mm
        process = self.processes[mm.name] = ModelProcess(self, mm)
        return process

    def reclaim(self) -> None:
        """Everything that can goes to swap."""
        self.memory.reclaim()

    @property
    def vmstat(self) -> dict[str, int]:
        """KSM's events of /proc/vmstat."""
        return {"cow_ksm": self.memory.cow_ksm, "ksm_swpin_copy": self.memory.swpin_copy}

    def check(self) -> None:
        """Raise AssertionError if a structure is inconsistent."""
        k = self.engine
        for tree in [*k.stable, *k.unstable]:
            tree.check()  # type: ignore[attr-defined]
        for mm in k.mms:
            assert mm.registered
            for item in mm.items.values():
                assert item.node is None or (item in item.node.items and item.node in k.nodes)
        for node in k.nodes:
            assert node.frame.ksm is node
        for mm in self.memory.mms.values():
            for page, slot in mm.slots.items():
                assert mm.vma_at(page) is not None
                assert not isinstance(slot, Frame) or (mm, page) in slot.mappers
                assert not isinstance(slot, SwapEntry) or (mm, page) in slot.refs

    # the scan-time advisor

    def _pass_starts(self) -> None:
        self.pass_started_ms = self.engine.now_ms
        self.pass_cpu_ms = 0

    def _pass_ends(self) -> None:
        if self.advisor:
            self.advise((self.engine.now_ms - self.pass_started_ms) // 1000, self.pass_cpu_ms)

    def advise(self, seconds: int, cpu_ms: int) -> None:
        """Set pages_to_scan after a pass that took so long and so much CPU."""
        seconds = max(seconds, 1)
        cpu = max(cpu_ms * 100 // (seconds * 1000), 1)
        factor = max(self.advisor_target_scan_time * 100 // seconds, 1)
        change = max(seconds * 100 // (self.advisor_previous_seconds or seconds), 1)
        change = (self.advisor_change * 70 + change * 30) // 100
        pages = self.pages_to_scan * 100 // factor * change // 100
        cost = max(self.pages_to_scan // cpu, 1)
        pages = max(min(pages, cost * self.advisor_max_cpu), cost * 10)
        self.pages_to_scan = min(pages, self.advisor_max_pages_to_scan)
        self.advisor_change = change
        self.advisor_previous_seconds = seconds


class ModelProcess:
    """One process: its system calls."""

    def __init__(self, machine: ModelMachine, mm: Mm) -> None:
        self._m = machine
        self._mm = mm
        self.name = mm.name

    # the address space

    def mmap(self, length: int, prot: int = 3, addr: int | None = None, node: int = 0) -> int:
        """Map private anonymous memory; `addr` replaces what was there."""
        if length <= 0 or (addr is not None and addr % self._m.page_size):
            fail(errno.EINVAL, "mmap")
        count = self._pages(length)
        if addr is None:
            start = max((vma.end for vma in self._mm.vmas), default=0x100000000)
        else:
            start = addr // self._m.page_size
        self._unmap(start, start + count)
        if self._mm.merge_any:
            self._m.engine.enter(self._mm)
        self._mm.vmas.append(Vma(start, start + count, prot, node, mergeable=self._mm.merge_any, shift=0))
        self._mm.join(start, start + count)
        return start * self._m.page_size

    def munmap(self, addr: int, length: int) -> None:
        """Unmap; holes do not matter."""
        start, end = self._range(addr, length)
        if length == 0:
            fail(errno.EINVAL, "munmap of nothing")
        self._unmap(start, end)

    def mprotect(self, addr: int, length: int, prot: int) -> None:
        """Change the protection, up to the first hole."""
        start, end = self._range(addr, length)
        stop = start
        for vma in self._mm.vmas_in(start, end) if start < end else []:
            if vma.start > stop:
                break
            stop = min(vma.end, end)
            if vma.prot != prot:
                self._change(max(vma.start, start), stop, lambda part: setattr(part, "prot", prot))
        if stop < end:
            fail(errno.ENOMEM, "mprotect of a hole")

    def mremap(self, addr: int, old: int, new: int, flags: int = 0, new_addr: int | None = None) -> int:
        """Grow, shrink or move one range."""
        size = self._m.page_size
        if flags & ~7 or (flags & (FIXED | DONTUNMAP) and not flags & MAYMOVE):
            fail(errno.EINVAL, "mremap flags")
        if addr % size or not new or not old:
            fail(errno.EINVAL, "mremap")
        start, old_n, new_n = addr // size, self._pages(old), self._pages(new)
        if flags & DONTUNMAP and old_n != new_n:
            fail(errno.EINVAL, "MREMAP_DONTUNMAP with another length")
        to = -1
        if flags & FIXED:
            if new_addr is None or new_addr % size:
                fail(errno.EINVAL, "mremap target")
            to = new_addr // size
            if self._m.version < (6, 17) and self._mm.vma_at(start) is None:
                fail(errno.EFAULT, "mremap of nothing")
            if to < start + old_n and start < to + new_n:
                fail(errno.EINVAL, "mremap onto itself")
        mm = self._mm
        vma = mm.vma_at(start)
        if vma is None:
            fail(errno.EFAULT, "mremap of nothing")
        if flags & FIXED and self._m.version < (6, 17):
            # what is in the way, and too much, goes first; then it may turn out that it cannot be done
            self._unmap(to, to + new_n)
            self._unmap(start + new_n, start + old_n)
            old_n = min(old_n, new_n)
            if vma.end < start + old_n:
                fail(errno.EFAULT, "mremap across ranges")
            self._move(start, old_n, to, new_n, bool(flags & DONTUNMAP))
            return new_addr or 0
        if flags & FIXED and old_n == new_n:
            # a plain move may span several ranges and holes; holes leave the target as it is
            for part in mm.vmas_in(start, start + old_n):
                part = replace(part, start=max(part.start, start), end=min(part.end, start + old_n))
                at = part.start - start + to
                self._unmap(at, at + part.end - part.start)
                self._move(part.start, part.end - part.start, at, part.end - part.start, bool(flags & DONTUNMAP))
            return new_addr or 0
        if vma.end < start + (min(old_n, new_n) if flags & FIXED else old_n) and (new_n > old_n or flags & FIXED):
            fail(errno.EFAULT, "mremap across ranges")
        if not flags & (FIXED | DONTUNMAP):
            if new_n <= old_n:
                self._unmap(start + new_n, start + old_n)
                return addr
            if vma.end == start + old_n and not mm.vmas_in(start + old_n, start + new_n):
                mm.vmas.append(replace(vma, start=start + old_n, end=start + new_n))
                mm.join(start + old_n, start + new_n)
                return addr
            if not flags & MAYMOVE:
                fail(errno.ENOMEM, "no room to grow in place")
        if to < 0:
            to = max(v.end for v in mm.vmas)
        if flags & FIXED:
            self._unmap(to, to + new_n)
        if new_n < old_n:
            self._unmap(start + new_n, start + old_n)
            old_n = new_n
        self._move(start, old_n, to, new_n, bool(flags & DONTUNMAP))
        return to * size

    def _move(self, start: int, old_n: int, to: int, new_n: int, keep: bool) -> None:
        """Move slots; KSM's get private copies first, and their items stay behind."""
        mm = self._mm
        vma = mm.vma_at(start)
        assert vma is not None
        if vma.mergeable:
            self._m.engine.unmerge(mm, start, start + old_n)
        shift = vma.shift + start - to if vma.families else 0
        mm.vmas.append(replace(vma, start=to, end=to + new_n, shift=shift))
        for page in mm.pages_in(start, start + old_n):
            slot = mm.slots[page]
            mm.tables.add((page - start + to) // HUGE_PAGES)
            clean = isinstance(slot, Frame) and (mm, page) in slot.clean
            self._m.memory.set_slot(mm, page - start + to, slot, clean)
            self._m.memory.set_slot(mm, page, None)
        if not keep:
            self._unmap(start, start + old_n)
        elif (vma.start, vma.end) == (start, start + old_n):
            vma.families = ()
        mm.join(to, to + new_n)

    def _unmap(self, start: int, end: int) -> None:
        if start >= end:
            return
        gone = self._mm.cut(start, end)
        self._m.memory.zap(self._mm, start, end)
        self._mm.vmas = [vma for vma in self._mm.vmas if vma not in gone]
        units = {page // HUGE_PAGES for vma in self._mm.vmas for page in range(vma.start, vma.end)}
        self._mm.tables &= units
        self._mm.huge_zeros &= units

    # memory

    def write(self, addr: int, data: bytes) -> None:
        """Store bytes, page by page, up to the first page that cannot be written."""
        for page, offset, at, count in self._split(addr, len(data)):
            vma = self._mm.vma_at(page)
            if vma is None or not vma.prot & PROT_WRITE:
                fail(errno.EFAULT, f"{self.name}: write to page {page:#x}")
            self._m.memory.write(self._mm, page, vma, offset, bytes(data[at : at + count]))

    def read(self, addr: int, n: int) -> bytes:
        """Load bytes; an untouched page maps the zero page."""
        out = b""
        for page, offset, _, count in self._split(addr, n):
            vma = self._mm.vma_at(page)
            if vma is None or not vma.prot & (PROT_READ | PROT_WRITE):
                fail(errno.EFAULT, f"{self.name}: read of page {page:#x}")
            frame = self._m.memory.fault(self._mm, page, vma, False)
            out += (frame.content if frame else self._m.memory.zero)[offset : offset + count]
        return out

    def madvise(self, addr: int, length: int, advice: int) -> None:
        """Advise on a range; ENOMEM after all mapped parts are done, when it has holes."""
        start, end = self._range(addr, length) if advice in ADVICES else (0, 0)
        if advice not in ADVICES:
            fail(errno.EINVAL, f"advice {advice}")
        if start == end:
            return
        for vma in self._mm.vmas_in(start, end):
            first, last = max(vma.start, start), min(vma.end, end)
            if advice == MERGEABLE and not vma.mergeable:
                self._m.engine.enter(self._mm)
                self._change(first, last, lambda part: setattr(part, "mergeable", True))
            elif advice == UNMERGEABLE and vma.mergeable:
                self._m.engine.unmerge(self._mm, first, last)
                self._change(first, last, lambda part: setattr(part, "mergeable", False))
            elif advice in (HUGEPAGE, NOHUGEPAGE) and vma.huge != (advice == HUGEPAGE):
                self._change(first, last, lambda part: setattr(part, "huge", advice == HUGEPAGE))
            elif advice == DONTNEED:
                self._m.memory.zap(self._mm, first, last)
                if self._m.version >= (6, 14):  # empty page tables are given back
                    self._mm.tables -= {u for u in self._mm.tables if first <= u * HUGE_PAGES <= last - HUGE_PAGES}
            elif advice == FREE:
                self._free(first, last)
            elif advice == PAGEOUT:
                self._page_out(first, last)
        if not self._mm.covers(start, end):
            fail(errno.ENOMEM, "madvise of a hole")

    def _change(self, start: int, end: int, change: Callable[[Vma], None]) -> None:
        """Change a part of one range, which may split it off or join it to a neighbour."""
        (part,) = self._mm.cut(start, end)
        change(part)
        self._mm.join(start, end)

    def _free(self, start: int, end: int) -> None:
        self._m.memory.split_partial(self._mm, start, end)
        for page in self._mm.pages_in(start, end):
            self._m.memory.free(self._mm, page)

    def _page_out(self, start: int, end: int) -> None:
        self._m.memory.split_partial(self._mm, start, end)
        for page in self._mm.pages_in(start, end):
            slot = self._mm.slots.get(page)
            if isinstance(slot, Frame) and len(slot.mappers) == 1:
                self._m.memory.evict(slot)

    def migrate(self, addr: int, length: int, node: int) -> None:
        """Move the frames that the range maps to another NUMA node, for all who map them, if all can be found."""
        start, end = self._range(addr, length)
        for page in self._mm.pages_in(start, end):
            slot = self._mm.slots[page]
            if isinstance(slot, Frame) and len(self._m.memory.findable(slot)) == len(slot.mappers):
                for frame in slot.huge or [slot]:
                    frame.node = node

    # processes

    def fork(self, name: str) -> ModelProcess:
        """A child that shares every frame until one writes."""
        child = Mm(name, merge_any=self._mm.merge_any, tables=set(self._mm.tables), huge_zeros=set(self._mm.huge_zeros))
        process = self._m._add(child)
        for page, slot in self._mm.slots.items():
            clean = isinstance(slot, Frame) and (self._mm, page) in slot.clean
            self._m.memory.set_slot(child, page, slot, clean)
        if self._m.version < (6, 12):
            child.counted_before = self.ksm_stat["ksm_rmap_items"]
        child.vmas = [inherited(vma) for vma in self._mm.vmas]
        if self._mm.registered:
            self._m.engine.enter(child)
        return process

    def exit(self) -> None:
        """End; what KSM remembers stays until it passes."""
        self._mm.alive = False
        self._m.engine.exit(self._mm)
        self._m.memory.zap(self._mm, 0, TOP)
        self._mm.vmas = []
        del self._m.processes[self.name], self._m.memory.mms[self.name]

    def prctl(self, option: int, a2: int = 0, a3: int = 0, a4: int = 0, a5: int = 0) -> int:
        """PR_SET_MEMORY_MERGE and PR_GET_MEMORY_MERGE."""
        if option not in (SET_MEMORY_MERGE, GET_MEMORY_MERGE) or self._m.version < (6, 4):
            fail(errno.EINVAL, f"prctl {option}")
        if a3 or a4 or a5 or (option == GET_MEMORY_MERGE and a2):
            fail(errno.EINVAL, "prctl arguments")
        if option == GET_MEMORY_MERGE:
            return int(self._mm.merge_any)
        if a2 and not self._mm.merge_any:
            self._m.engine.enter(self._mm)
            self._mm.merge_any = True
            for vma in self._mm.vmas:
                vma.mergeable = True
        elif not a2 and self._mm.merge_any:
            for vma in self._mm.vmas:
                if vma.mergeable:
                    self._m.engine.unmerge(self._mm, vma.start, vma.end)
                    vma.mergeable = False
            self._mm.merge_any = False
        return 0

    @property
    def ksm_stat(self) -> dict[str, int | bool]:
        """/proc/PID/ksm_stat."""
        k, mm = self._m.engine, self._mm
        merging, zero = k.merging_pages_of(mm), k.zero_pages_of(mm)
        return {
            "ksm_rmap_items": mm.counted_before + len(mm.items),
            "ksm_zero_pages": zero,
            "ksm_merging_pages": merging,
            "ksm_process_profit": (merging + zero) * self._m.page_size - len(mm.items) * ITEM_BYTES,
            "ksm_merge_any": mm.merge_any,
            "ksm_mergeable": any(vma.mergeable for vma in mm.vmas),
        }

    # helpers

    def _pages(self, length: int) -> int:
        return -(-length // self._m.page_size)

    def _range(self, addr: int, length: int) -> tuple[int, int]:
        if addr % self._m.page_size or addr < 0 or addr + length > WORD:
            fail(errno.EINVAL, f"range {addr:#x}+{length:#x}")
        start = addr // self._m.page_size
        return start, start + self._pages(length)

    def _split(self, addr: int, length: int) -> list[tuple[int, int, int, int]]:
        """(page, offset in it, offset in the data, bytes) for each page of a range."""
        out, size, at = [], self._m.page_size, 0
        while at < length:
            page, offset = divmod(addr + at, size)
            count = min(size - offset, length - at)
            out.append((page, offset, at, count))
            at += count
        return out


def inherited(vma: Vma) -> Vma:
    """A child's copy of a range: it adds a family of its own to what its parent's has."""
    return replace(vma, families=(*vma.families, object()) if vma.families else (), linked=next(LINKS))


__all__ = ["KSM_ZERO", "ModelKsmd", "ModelMachine", "ModelProcess"]

"""A simulated machine and its processes: address spaces, madvise, copy-on-write, swap, NUMA nodes, the RAM limit."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from ksm._core import Engine, FramesExhausted
from ksm.check import verify
from ksm.constants import (
    MADV_COLD,
    MADV_DONTNEED,
    MADV_FREE,
    MADV_HUGEPAGE,
    MADV_MERGEABLE,
    MADV_NOHUGEPAGE,
    MADV_NORMAL,
    MADV_PAGEOUT,
    MADV_RANDOM,
    MADV_SEQUENTIAL,
    MADV_UNMERGEABLE,
    MADV_WILLNEED,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PR_GET_MEMORY_MERGE,
    PR_SET_MEMORY_MERGE,
    PROT_READ,
    PROT_WRITE,
    RMAP_ITEM_BYTES,
)
from ksm.errors import NoSuchProcessError, OutOfMemoryError, kernel_error
from ksm.ksmd import Ksmd
from ksm.pages import Fingerprints, as_pages, fingerprint
from ksm.sysfs import StateSysfs, Sysfs, profile
from ksm.vmas import Vma, VmaList

T = TypeVar("T")

_FIRST_ADDRESS = 0x7F00_0000_0000
_END_ADDRESS = 1 << 47  # user space of a 64-bit process with 4-level page tables
_PAGE_SIZES = (4096, 16384, 65536)
# Bookkeeping beyond this share of the memory that is available is refused before it is tried.
_BOOKKEEPING_BYTES = 64
_CHECK_ABOVE = 1 << 28

_PLAIN_ADVICE = frozenset({MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_COLD})
_KNOWN_ADVICE = _PLAIN_ADVICE | {
    MADV_DONTNEED,
    MADV_FREE,
    MADV_MERGEABLE,
    MADV_UNMERGEABLE,
    MADV_HUGEPAGE,
    MADV_NOHUGEPAGE,
    MADV_PAGEOUT,
}


class Machine:
    """A host that runs KSM: processes in, the kernel's counters out.

    Args:
        ram: bytes of memory, or None for no limit. Whatever needs a frame when none is left, and none can be
            reclaimed, raises `OutOfMemoryError`.
        swap: bytes of swap space.
        nodes: NUMA nodes.
        page_size: 4096, 16384 or 65536.
        kernel: the profile, from "5.15" on: which sysfs files there are, their defaults, and how ksmd behaves.
        index: "hash" or "tree"; both are exact, `tree` counts what ksmd would compare.
        transparent_hugepage: "madvise", "always" or "never": what writes to untouched memory populate.

    Every method may be called from any thread; one lock guards the machine, and scanning releases the GIL.

    >>> m = Machine()
    >>> a, b = m.spawn("a"), m.spawn("b")
    >>> for p in (a, b):
    ...     where = p.mmap(b"x" * 4096)
    ...     p.madvise(where, 4096, MADV_MERGEABLE)
    >>> m.ksm.run = 1
    >>> for _ in range(2):
    ...     _ = m.ksmd.scan()
    >>> m.ksm.pages_shared, m.ksm.pages_sharing
    (1, 1)
    """

    def __init__(
        self,
        ram: int | None = None,
        swap: int = 0,
        nodes: int = 1,
        page_size: int = 4096,
        kernel: str = "6.18",
        index: str = "hash",
        transparent_hugepage: str = "madvise",
    ) -> None:
        if page_size not in _PAGE_SIZES:
            raise ValueError(f"page_size is {page_size}; it can be {', '.join(map(str, _PAGE_SIZES))}")
        if index not in ("hash", "tree"):
            raise ValueError(f"index is {index!r}; it can be 'hash' or 'tree'")
        if transparent_hugepage not in ("madvise", "always", "never"):
            raise ValueError(
                f"transparent_hugepage is {transparent_hugepage!r}; it can be 'madvise', 'always' or 'never'"
            )
        if not 1 <= nodes <= 255:
            raise ValueError(f"nodes is {nodes}; it can be 1 to 255")
        if ram is not None and ram < page_size:
            raise ValueError(f"ram is {ram} bytes, less than a page of {page_size}")
        if swap < 0:
            raise ValueError(f"swap is {swap} bytes; it cannot be negative")
        self.page_size = page_size
        self.nodes = nodes
        self.kernel = profile(kernel)
        self.index = index
        self.transparent_hugepage = transparent_hugepage
        self.ram = ram
        self.swap = swap
        self._lock = threading.RLock()
        self._engine = Engine(
            page_size=page_size,
            nodes=nodes,
            hash_index=index == "hash",
            gate_first=self.kernel.gate_first,
            zero_giveback=self.kernel.zero_giveback,
            counts_zero_pages=self.kernel.counts_zero_pages,
            max_resident=0 if ram is None else ram // page_size,
            max_swapped=swap // page_size,
        )
        self._processes: dict[str, Process] = {}
        self._next_pid = 1
        self.ksmd = Ksmd(self._engine, self._lock, self.kernel, self._marked)
        self.ksm: Sysfs = StateSysfs(self.ksmd, self.kernel, page_size, self._lock)

    def _marked(self) -> dict[int, list[tuple[int, int, int]]]:
        """The mergeable ranges of every process: first page, pages, NUMA node."""
        return {
            process._mm: [
                (vma.start, vma.end - vma.start, vma.node)
                for vma in process._vmas
                if vma.mergeable and not process._hides(vma.prot)
            ]
            for process in self._processes.values()
        }

    def spawn(self, name: str | None = None) -> Process:
        """Start a process with an empty address space; names are unique among the living.

        >>> Machine().spawn("vm1").name
        'vm1'
        """
        with self._lock:
            process = Process(self, self._claim_name(name), self._next_pid)
            self._processes[process.name] = process
            self._next_pid += 1
            return process

    def _claim_name(self, name: str | None) -> str:
        name = f"process-{self._next_pid}" if name is None else name
        if name in self._processes:
            raise ValueError(f"a process named {name!r} is alive")
        return name

    @property
    def processes(self) -> Mapping[str, Process]:
        """The living processes by name, a copy of the moment.

        >>> m = Machine()
        >>> _ = m.spawn("vm1")
        >>> list(m.processes)
        ['vm1']
        """
        with self._lock:
            return MappingProxyType(dict(self._processes))

    @property
    def vmstat(self) -> dict[str, int]:
        """KSM's lines of /proc/vmstat that the profile has, counted from the machine's start.

        >>> Machine().vmstat
        {'ksm_swpin_copy': 0, 'cow_ksm': 0}
        """
        with self._lock:
            return {name: getattr(self._engine, name) for name in self.kernel.vmstat_fields}

    @property
    def now(self) -> float:
        """Simulated seconds since the machine was made.

        >>> Machine().now
        0.0
        """
        return self.ksmd.now

    def run_for(self, seconds: float) -> None:
        """Let `seconds` of simulated time pass: ksmd scans, sleeps, and scans again.

        >>> m = Machine()
        >>> m.run_for(60.0)
        >>> m.now
        60.0
        """
        self.ksmd.run_for(seconds)

    @property
    def frames(self) -> int:
        """Frames in use, the measure of the memory taken: merged pages count once.

        >>> m = Machine()
        >>> _ = m.spawn().mmap(b"x" * 8192)
        >>> m.frames
        2
        """
        return self._engine.resident

    @property
    def swapped(self) -> int:
        """Pages in swap; one that several slots share counts once.

        >>> m = Machine(swap=1 << 20)
        >>> _ = m.spawn().mmap(b"x" * 8192)
        >>> _ = m.reclaim()
        >>> m.swapped, m.frames
        (2, 0)
        """
        return self._engine.swapped_pages

    def reclaim(self) -> int:
        """Move everything that can go to swap, and drop what MADV_FREE gave up; the number of pages that went.

        >>> m = Machine(swap=1 << 20)
        >>> _ = m.spawn().mmap(b"x" * 8192)
        >>> m.reclaim()
        2
        """
        with self._lock:
            return self._engine.reclaim(0)

    def check(self) -> None:
        """Walk every structure and verify it; `InvariantError` names the invariant that is broken. O(pages).

        >>> Machine().check()
        """
        with self._lock:
            verify(self._engine.dump())

    def _needs_frames(self, what: str, work: Callable[[], T]) -> T:
        """Do work that may need frames, with reclaim when there are none; work can be done again from the start."""
        while True:
            try:
                return work()
            except FramesExhausted:
                if self._engine.reclaim(max(64, (self.ram or 0) // self.page_size // 64)) == 0:
                    raise OutOfMemoryError(
                        errno.ENOMEM,
                        f"{what} needs a frame, and all {(self.ram or 0) // self.page_size:,} frames of RAM are in use"
                        + (" and swap is full" if self.swap else " and there is no swap"),
                    ) from None

    def __repr__(self) -> str:
        return f"<ksm.Machine kernel={self.kernel.version} {len(self._processes)} processes, {self.frames:,} frames>"


class Process:
    """A process of a `Machine`; made by `Machine.spawn` and `Process.fork`.

    >>> p = Machine().spawn("vm1")
    >>> p.name, p.pid
    ('vm1', 1)
    """

    def __init__(self, machine: Machine, name: str, pid: int) -> None:
        self.machine = machine
        self.name = name
        self.pid = pid
        self._engine = machine._engine
        self._lock = machine._lock
        self._page = machine.page_size
        self._mm = self._engine.new_space()
        self._vmas = VmaList()
        self._merge_any = False
        self._items_before = 0  # the parent's items, at which kernels once let the child's number start
        self._alive = True

    # ---- mapping -------------------------------------------------------------------------------

    def mmap(
        self,
        length: int | object,
        prot: int = PROT_READ | PROT_WRITE,
        addr: int | None = None,
        node: int = 0,
    ) -> int:
        """Map anonymous private memory and return its address.

        Args:
            length: bytes, rounded up to pages, nothing populated; or an image to populate from: an (n, page_size)
                or flat uint8 array, memmap, bytes, `Fingerprints`, or an `Image` with `blocks()`. Its bytes are
                borrowed, never written, and must not change.
            prot: PROT_NONE 0, PROT_READ 1, PROT_WRITE 2.
            addr: a page-aligned address to map at, replacing what is there (MAP_FIXED); None: any free one.
            node: the NUMA node of its frames.

        Raises:
            OSError: EINVAL for a length of 0, an unaligned address, bad prot or node; ENOMEM beyond the address space.
            OutOfMemoryError: populating needs more frames than there are.

        >>> p = Machine().spawn()
        >>> p.read(p.mmap(b"abc" + bytes(4093)), 3)
        b'abc'
        """
        with self._lock:
            self._require_alive()
            if isinstance(length, int):
                return self._map(length, prot, addr, node)
            return self._map_image(length, prot, addr, node)

    def _map(self, length: int, prot: int, addr: int | None, node: int) -> int:
        if length <= 0 or not 0 <= prot <= 7 or not 0 <= node < self.machine.nodes:
            raise kernel_error(errno.EINVAL, f"mmap of {length} bytes, prot {prot}, node {node}")
        n = -(-length // self._page)
        if addr is None:
            start = self._free_range(n)
        else:
            start = self._aligned(addr, "mmap")
            if (start + n) * self._page > _END_ADDRESS:
                raise kernel_error(errno.ENOMEM, f"mmap of {length} bytes at {addr:#x} ends beyond the address space")
            self._unmap(start, n)
        if self.merge_any:
            self._engine.register(self._mm)  # ksmd lets go of a space without marks, merge-any or not
        self._insert(Vma(start, start + n, prot, self.merge_any, None, node))
        self._hide(start, n, prot)
        return start * self._page

    def _map_image(self, image: Any, prot: int, addr: int | None, node: int) -> int:
        blocks = list(self._image_blocks(image))
        n = max((at + len(pages) for at, pages, _ in blocks), default=0)
        present = sum(len(pages) for _, pages, _ in blocks)
        _require_host_memory(present, _BOOKKEEPING_BYTES * present)
        address = self._map(n * self._page, prot, addr, node)
        start = address // self._page
        self._vmas.found_family(self._vmas.at(start) or Vma(start, start + n))
        for at, pages, there in blocks:

            def populate(at: int = at, pages: Any = pages, there: Any = there) -> None:
                self._engine.populate(self._mm, start + at, pages, there, self.merge_any, node)

            try:
                self.machine._needs_frames(f"populating {len(pages):,} pages of {self.name}", populate)
            except BaseException:
                self._unmap(start, n)
                raise
        self._hide(start, n, prot)
        return address

    def _image_blocks(self, image: Any) -> Iterable[tuple[int, Any, Any]]:
        """(first page, contents, present flags) of an image, in the form that the engine borrows."""
        if isinstance(image, Fingerprints):
            self._use_fingerprints()
            yield 0, _rows(image.words), _flags(image.present, len(image))
            return
        if hasattr(image, "blocks"):
            first: int | None = None
            for address, pages, there in image.blocks():
                first = address if first is None else first
                yield (address - first) // self._page, self._contents(pages), _flags(there, len(pages))
            return
        pages = as_pages(image, self._page)
        yield 0, self._contents(pages), _flags(None, len(pages))

    def _use_fingerprints(self) -> None:
        """Make the machine one of fingerprints, if it is not yet."""
        if not self._engine.fingerprints_only:
            zero = fingerprint(np.zeros((1, self._page), np.uint8), threads=1)
            self._engine.use_fingerprints(int(zero.words[0, 0]), int(zero.words[0, 1]))

    def _contents(self, pages: Any) -> Any:
        """Page bytes as the engine wants them; fingerprints of them on a machine made of fingerprints."""
        if self._engine.fingerprints_only:
            return _rows(fingerprint(pages).words)
        return as_pages(pages, self._page)

    def munmap(self, addr: int, length: int) -> None:
        """Unmap a range; what is not mapped in it does not matter.

        >>> p = Machine().spawn()
        >>> p.munmap(p.mmap(8192), 8192)
        """
        with self._lock:
            self._require_alive()
            start = self._aligned(addr, "munmap")
            n = -(-length // self._page)
            if length <= 0 or (start + n) * self._page > _END_ADDRESS:
                raise kernel_error(errno.EINVAL, f"munmap of {length} bytes")
            self._unmap(start, n)

    def mprotect(self, addr: int, length: int, prot: int) -> None:
        """Change the protection of a range; a hole ends it with ENOMEM, what came before is changed.

        >>> p = Machine().spawn()
        >>> a = p.mmap(4096)
        >>> p.mprotect(a, 4096, 1)
        """
        with self._lock:
            self._require_alive()
            start = self._aligned(addr, "mprotect")
            if not 0 <= prot <= 7:
                raise kernel_error(errno.EINVAL, f"mprotect with prot {prot}")
            if length <= 0:
                if length < 0:
                    raise kernel_error(errno.ENOMEM, f"mprotect of {length} bytes")
                return
            end = start + -(-length // self._page)
            at = start
            for vma in self._vmas.overlapping(start, end):
                if vma.start > at:
                    break
                self._vmas.change(max(start, vma.start), min(end, vma.end), prot=prot)
                self._hide(max(start, vma.start), min(end, vma.end) - max(start, vma.start), prot)
                at = vma.end
            if at < end:
                raise kernel_error(errno.ENOMEM, f"mprotect: {at * self._page:#x} is not mapped")

    def mremap(self, addr: int, old: int, new: int, flags: int = 0, new_addr: int | None = None) -> int:
        """Grow, shrink or move a mapping; returns its address.

        Moving gives every KSM frame and KSM-placed zero page a private copy first, and leaves the rmap items behind.

        >>> p = Machine().spawn()
        >>> a = p.mmap(8192)
        >>> p.mremap(a, 8192, 4096) == a
        True
        """
        with self._lock:
            self._require_alive()
            vma, start, n_old, n_new = self._mremap_arguments(addr, old, new, flags, new_addr)
            # Since 6.17 a move of unchanged size takes all the mappings in the range, and leaves out the holes.
            # Before, what lies at the target or beyond the new size is gone even if the move is refused then.
            recent = self.machine.kernel.number >= (6, 17)
            many = recent and flags & MREMAP_FIXED and n_old == n_new
            moves = bool(flags & (MREMAP_FIXED | MREMAP_DONTUNMAP))
            kept = min(n_old, n_new)
            if flags & MREMAP_FIXED and not recent:
                self._unmap(self._mremap_target(new_addr, n_new, flags), n_new)
                if n_old > kept:
                    self._unmap(start + kept, n_old - kept)
            if start + kept > vma.end and (moves or n_new > n_old) and not many:
                raise kernel_error(errno.EFAULT, f"mremap: {addr:#x} and {old} bytes span several mappings")
            if n_new < n_old:
                self._unmap(start + n_new, n_old - n_new)
            if moves:
                return self._move(start, kept, n_new, self._mremap_target(new_addr, n_new, flags), flags)
            if n_new <= n_old:
                return addr
            grown = start + n_new
            if start + n_old == vma.end and not self._vmas.overlapping(vma.end, grown):
                if grown * self._page > _END_ADDRESS:
                    raise kernel_error(errno.ENOMEM, "mremap beyond the address space")
                self._insert(replace(vma, start=vma.end, end=grown))
                return addr
            if not flags & MREMAP_MAYMOVE:
                raise kernel_error(errno.ENOMEM, f"mremap cannot grow {addr:#x} in place")
            return self._move(start, n_old, n_new, self._free_range(n_new), flags)

    def _mremap_arguments(
        self, addr: int, old: int, new: int, flags: int, new_addr: int | None
    ) -> tuple[Vma, int, int, int]:
        n_old, n_new = -(-old // self._page), -(-new // self._page)
        bad = (
            flags & ~(MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP)
            or (flags & MREMAP_FIXED and not flags & MREMAP_MAYMOVE)
            or (flags & MREMAP_DONTUNMAP and (not flags & MREMAP_MAYMOVE or n_old != n_new))
            or addr % self._page
            or n_new <= 0
            or n_old < 0
            or new > _END_ADDRESS
        )
        start = addr // self._page
        vma = self._vmas.at(start)
        overlaps = False
        if not bad and flags & (MREMAP_FIXED | MREMAP_DONTUNMAP) and new_addr is not None:
            target = new_addr // self._page
            bad = bool(new_addr % self._page) or new_addr + new > _END_ADDRESS
            overlaps = start < target + n_new and target < start + n_old
        if bad or (overlaps and (vma is not None or self.machine.kernel.number >= (6, 17))):
            raise kernel_error(errno.EINVAL, f"mremap({addr:#x}, {old}, {new}, {flags})")
        if vma is None:
            raise kernel_error(errno.EFAULT, f"mremap: {addr:#x} is not mapped")
        if n_old == 0:
            raise kernel_error(errno.EINVAL, "mremap of 0 bytes of private memory")
        return vma, start, n_old, n_new

    def _mremap_target(self, new_addr: int | None, n_new: int, flags: int) -> int:
        if new_addr is None:
            if flags & MREMAP_FIXED:
                raise kernel_error(errno.EINVAL, "mremap: MREMAP_FIXED without an address")
            return self._free_range(n_new)
        target = new_addr // self._page
        if not flags & MREMAP_FIXED and self._vmas.overlapping(target, target + n_new):
            return self._free_range(n_new)
        return target

    def _move(self, start: int, n_old: int, n_new: int, target: int, flags: int) -> int:
        """Move every mapping of a range to its place at `target`; the last one takes up the growth."""
        for vma in self._vmas.overlapping(start, start + n_old):
            low, high = max(start, vma.start), min(start + n_old, vma.end)
            place = target + low - start
            size = high - low + (n_new - n_old if high == start + n_old else 0)
            self._unmap(place, size)
            if vma.mergeable:
                self._unmerge(vma, low, high - low, "moving")
            self._engine.move(self._mm, low, place, high - low, vma.mergeable)
            if not flags & MREMAP_DONTUNMAP:
                self._remove(low, high)
            elif (low, high) == (vma.start, vma.end):
                self._vmas.change(low, high, family=0, inherited=False)  # what is left starts anew
            moved = vma.moved + place - low if vma.family else 0
            self._insert(replace(vma, start=place, end=place + size, moved=moved))
            self._hide(place, size, vma.prot)
        return target * self._page

    # ---- access --------------------------------------------------------------------------------

    def write(self, addr: int, data: bytes | bytearray | memoryview | Fingerprints) -> None:
        """Write bytes, page by page; a KSM frame or one shared by fork is copied first.

        Fingerprints stand for whole pages, of which those not present stay as they are. They go to a machine that
        was made of fingerprints, or holds no page yet.

        Raises:
            OSError: EFAULT where nothing is mapped or the protection forbids it; the pages before are written.
                EINVAL for fingerprints at an unaligned address.
            NoPageBytesError: the machine was built from fingerprints, and data are bytes.
            ValueError: the machine holds bytes, and data are fingerprints.

        >>> p = Machine().spawn()
        >>> a = p.mmap(4096)
        >>> p.write(a, b"abc")
        >>> p.read(a, 4)
        b'abc\\x00'
        """
        if isinstance(data, Fingerprints):
            self._overwrite(addr, data)
            return
        view = memoryview(data).cast("B")
        with self._lock:
            self._require_alive()
            done = 0
            while done < len(view):
                vpn, offset = divmod(addr + done, self._page)
                vma = self._accessible(vpn, PROT_WRITE)
                part = view[done : done + self._page - offset]
                if not vma.family:
                    self._vmas.found_family(vma)
                self._fault_huge(vma, vpn, True)

                def work(vpn: int = vpn, offset: int = offset, part: memoryview = part, vma: Vma = vma) -> None:
                    self._engine.write(self._mm, vpn, offset, part, vma.mergeable, vma.node, vpn - vma.moved)

                self.machine._needs_frames(f"writing to {self.name}", work)
                done += len(part)

    def _overwrite(self, addr: int, prints: Fingerprints) -> None:
        rows, present = _rows(prints.words), _flags(prints.present, len(prints))
        with self._lock:
            self._require_alive()
            start = self._aligned(addr, "write")
            self._use_fingerprints()
            done = 0
            while done < len(rows):
                vma = self._accessible(start + done, PROT_WRITE)
                if not vma.family:
                    self._vmas.found_family(vma)
                    vma = self._vmas.at(start + done) or vma
                part = slice(done, min(len(rows), vma.end - start))

                def work(at: int = start + done, part: slice = part, vma: Vma = vma) -> None:
                    there = present[part]
                    self._engine.overwrite(self._mm, at, rows[part], there, vma.mergeable, vma.node, at - vma.moved)

                self.machine._needs_frames(f"writing to {self.name}", work)
                done = part.stop

    def read(self, addr: int, n: int) -> bytes:
        """Read n bytes; untouched pages map the shared zero page, swapped ones come back.

        >>> p = Machine().spawn()
        >>> p.read(p.mmap(4096), 2)
        b'\\x00\\x00'
        """
        if n < 0:
            raise ValueError(f"cannot read {n} bytes")
        with self._lock:
            self._require_alive()
            parts = []
            done = 0
            while done < n:
                vpn, offset = divmod(addr + done, self._page)
                vma = self._accessible(vpn, PROT_READ | PROT_WRITE)
                size = min(n - done, self._page - offset)
                self._fault_huge(vma, vpn, False)

                def work(vpn: int = vpn, offset: int = offset, size: int = size, vma: Vma = vma) -> bytes:
                    return self._engine.read(self._mm, vpn, offset, size, vma.mergeable, vma.node, vpn - vma.moved)

                parts.append(self.machine._needs_frames(f"reading from {self.name}", work))
                done += size
            return b"".join(parts)

    def _accessible(self, vpn: int, prot: int) -> Vma:
        vma = self._vmas.at(vpn)
        if vma is None or not vma.prot & prot:
            raise kernel_error(errno.EFAULT, f"{self.name} at {vpn * self._page:#x}")
        return vma

    def _fault_huge(self, vma: Vma, vpn: int, writing: bool) -> None:
        """Populate a whole huge page where the policy and the VMA allow it and nothing is mapped yet."""
        policy = self.machine.transparent_hugepage
        if policy == "never" or vma.huge is False or (policy == "madvise" and not vma.huge):
            return
        size = self._page // 8
        first = vpn - vpn % size
        if first >= vma.start and first + size <= vma.end:
            self._engine.populate_huge(self._mm, first, writing, vma.mergeable, vma.node)

    # ---- advice --------------------------------------------------------------------------------

    def madvise(self, addr: int, length: int, advice: int) -> None:
        """MADV_MERGEABLE, UNMERGEABLE, DONTNEED, FREE, PAGEOUT, HUGEPAGE, NOHUGEPAGE; other known advice does nothing.

        Raises:
            OSError: EINVAL for an unaligned address, a bad length or advice; ENOMEM when part of the range is not
                mapped (the mapped parts are advised).
            OutOfMemoryError: unmerging needs more frames than there are; the mark stays.

        >>> p = Machine().spawn()
        >>> a = p.mmap(4096)
        >>> p.madvise(a, 4096, MADV_MERGEABLE)
        >>> p.ksm_stat["ksm_mergeable"]
        True
        """
        with self._lock:
            self._require_alive()
            if advice not in _KNOWN_ADVICE:
                raise kernel_error(errno.EINVAL, f"madvise with advice {advice}")
            start = self._aligned(addr, "madvise")
            if length < 0 or addr + length > 1 << 64:
                raise kernel_error(errno.EINVAL, f"madvise of {length} bytes")
            if length == 0:
                return
            end = start + -(-length // self._page)
            at = start
            hole = False
            for vma in self._vmas.overlapping(start, end):
                hole = hole or vma.start > at
                low = max(start, vma.start)
                self._advise(vma, low, min(end, vma.end) - low, advice)
                at = vma.end
            if hole or at < end:
                raise kernel_error(errno.ENOMEM, f"madvise: part of {addr:#x} and {length} bytes is not mapped")

    def _advise(self, vma: Vma, start: int, n: int, advice: int) -> None:
        if advice == MADV_MERGEABLE:
            if not vma.mergeable:
                self._mark(start, n, True)
                self._engine.register(self._mm)
        elif advice == MADV_UNMERGEABLE:
            if vma.mergeable:
                self._unmerge(vma, start, n, "unmerging")
                self._mark(start, n, False)
        elif advice == MADV_DONTNEED:
            self._engine.discard(self._mm, start, n)
        elif advice == MADV_FREE:
            self._engine.lazy_free(self._mm, start, n)
        elif advice == MADV_PAGEOUT:
            self._engine.page_out(self._mm, start, n)
        elif advice in (MADV_HUGEPAGE, MADV_NOHUGEPAGE):
            self._vmas.change(start, start + n, huge=advice == MADV_HUGEPAGE)

    def prctl(self, option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
        """PR_SET_MEMORY_MERGE (any nonzero arg2 is on) and PR_GET_MEMORY_MERGE.

        Raises:
            OSError: EINVAL for another option, an argument that must be 0, or a kernel before 6.4.

        >>> p = Machine().spawn()
        >>> p.prctl(PR_SET_MEMORY_MERGE, 1)
        0
        >>> p.prctl(PR_GET_MEMORY_MERGE)
        1
        """
        with self._lock:
            self._require_alive()
            known = self.machine.kernel.process_merge_any and option in (PR_SET_MEMORY_MERGE, PR_GET_MEMORY_MERGE)
            if not known or arg3 or arg4 or arg5 or (option == PR_GET_MEMORY_MERGE and arg2):
                raise kernel_error(errno.EINVAL, f"prctl({option}, {arg2}, {arg3}, {arg4}, {arg5})")
            if option == PR_GET_MEMORY_MERGE:
                return int(self.merge_any)
            if arg2:
                self._start_merge_any()
            else:
                self._stop_merge_any()
            return 0

    @property
    def merge_any(self) -> bool:
        """Whether prctl(PR_SET_MEMORY_MERGE) is on for the process; may be set.

        >>> p = Machine().spawn()
        >>> p.merge_any = True
        >>> p.merge_any
        True
        """
        return self._merge_any

    @merge_any.setter
    def merge_any(self, on: bool) -> None:
        self.prctl(PR_SET_MEMORY_MERGE, int(on))

    def _start_merge_any(self) -> None:
        if self.merge_any:
            return
        self._engine.register(self._mm)
        self._merge_any = True
        for vma in self._vmas:
            self._engine.mark(self._mm, vma.start, vma.end - vma.start, True)
        self._vmas.change_all(mergeable=True)
        self._note_marks()

    def _stop_merge_any(self) -> None:
        if not self.merge_any:
            return
        for vma in self._vmas:
            if vma.mergeable:
                self._unmerge(vma, vma.start, vma.end - vma.start, "unmerging")
                self._engine.mark(self._mm, vma.start, vma.end - vma.start, False)
        self._vmas.change_all(mergeable=False)
        self._note_marks()
        self._merge_any = False

    # ---- life ----------------------------------------------------------------------------------

    def fork(self, name: str | None = None) -> Process:
        """Start a child that shares every page, mark and merge-any flag.

        >>> p = Machine().spawn("a")
        >>> p.fork("b").name
        'b'
        """
        with self._lock:
            self._require_alive()
            child = self.machine.spawn(name)
            child._vmas = self._vmas.forked()
            child._merge_any = self.merge_any
            self._engine.fork(self._mm, child._mm)
            if self._engine.registered(self._mm):
                self._engine.register(child._mm)
            if self.machine.kernel.inherits_item_count:
                child._items_before = self._items_before + self._engine.space_counts(self._mm)[0]
            child._note_marks()
            return child

    def exit(self) -> None:
        """End the process: its frames go now, its rmap items when ksmd comes by.

        >>> m = Machine()
        >>> m.spawn().exit()
        >>> len(m.processes)
        0
        """
        with self._lock:
            self._require_alive()
            self._alive = False
            self._vmas = VmaList()
            self._engine.exit_space(self._mm)
            del self.machine._processes[self.name]

    @property
    def alive(self) -> bool:
        """Whether the process has not exited.

        >>> Machine().spawn().alive
        True
        """
        return self._alive

    @property
    def ksm_stat(self) -> dict[str, int | bool]:
        """What /proc/PID/ksm_stat shows, under its names.

        >>> Machine().spawn().ksm_stat["ksm_rmap_items"]
        0
        """
        with self._lock:
            self._require_alive()
            items, merging, zero = self._engine.space_counts(self._mm)
            found: dict[str, int | bool] = {
                "ksm_rmap_items": self._items_before + items,
                "ksm_zero_pages": zero,
                "ksm_merging_pages": merging,
                "ksm_process_profit": (merging + zero) * self._page - items * RMAP_ITEM_BYTES,
                "ksm_merge_any": self.merge_any,
                "ksm_mergeable": self._vmas.any_mergeable,
            }
            return {name: found[name] for name in self.machine.kernel.ksm_stat_fields}

    @property
    def vmas(self) -> tuple[Vma, ...]:
        """The mapped ranges by address, in page numbers.

        >>> p = Machine().spawn()
        >>> _ = p.mmap(8192)
        >>> p.vmas[0].end - p.vmas[0].start
        2
        """
        with self._lock:
            return tuple(self._vmas)

    def migrate(self, addr: int, length: int, node: int) -> None:
        """Move the frames of a range to a NUMA node, as move_pages(2) does; all that share them see it.

        >>> m = Machine(nodes=2)
        >>> p = m.spawn()
        >>> p.migrate(p.mmap(4096), 4096, 1)
        """
        with self._lock:
            self._require_alive()
            if not 0 <= node < self.machine.nodes or length < 0:
                raise kernel_error(errno.EINVAL, f"migrate {length} bytes to node {node}")
            start = self._aligned(addr, "migrate")
            self._engine.migrate(self._mm, start, -(-length // self._page), node)

    # ---- the list of VMAs ------------------------------------------------------------------------

    def _require_alive(self) -> None:
        if not self._alive:
            raise NoSuchProcessError(errno.ESRCH, f"{os.strerror(errno.ESRCH)}: {self.name} has exited")

    def _aligned(self, addr: int, what: str) -> int:
        if addr % self._page or not 0 <= addr < 1 << 64:
            raise kernel_error(errno.EINVAL, f"{what}: {addr:#x} is not a multiple of {self._page}")
        return addr // self._page

    def _free_range(self, n: int) -> int:
        """A free range of n pages, above what is mapped if possible, aligned for huge pages."""
        size = self._page // 8
        start = max(_FIRST_ADDRESS // self._page, self._vmas.end + 1)
        start += -start % size
        if (start + n) * self._page <= _END_ADDRESS:
            return start
        gap = self._vmas.gap(16, _END_ADDRESS // self._page, n)
        if gap is None:
            raise kernel_error(errno.ENOMEM, f"no free range of {n} pages in {self.name}")
        return gap

    def _insert(self, vma: Vma) -> None:
        self._vmas.insert(vma)
        self._note_marks()

    def _remove(self, start: int, end: int) -> None:
        self._vmas.remove(start, end)
        self._note_marks()

    def _note_marks(self) -> None:
        self._engine.set_any_marked(self._mm, self._vmas.any_mergeable)

    def _mark(self, start: int, n: int, mergeable: bool) -> None:
        self._engine.mark(self._mm, start, n, mergeable)
        self._vmas.change(start, start + n, mergeable=mergeable)
        self._note_marks()

    def _unmap(self, start: int, n: int) -> None:
        self._engine.unmap(self._mm, start, n)
        self._remove(start, start + n)

    def _hides(self, prot: int) -> bool:
        return not prot and self.machine.kernel.passes_over_none

    def _hide(self, start: int, n: int, prot: int) -> None:
        if self.machine.kernel.passes_over_none:
            self._engine.hide(self._mm, start, n, not prot)

    def _unmerge(self, vma: Vma, start: int, n: int, what: str) -> None:
        if self._hides(vma.prot):
            return
        self.machine._needs_frames(f"{what} {self.name}", lambda: self._engine.unmerge(self._mm, start, n, vma.node))

    def __repr__(self) -> str:
        return f"<ksm.Process {self.name!r} {'alive' if self._alive else 'exited'}>"


def _flags(present: Any, n: int) -> Any:
    return np.ones(n, np.uint8) if present is None else np.ascontiguousarray(present).view(np.uint8)


def _rows(words: Any) -> Any:
    """Fingerprint words (n, 2) as rows of 16 bytes."""
    return np.ascontiguousarray(words).view(np.uint8).reshape(-1, 16)


def _require_host_memory(pages: int, needed: int) -> None:
    """Refuse bookkeeping that this host has no memory for, before the kernel kills somebody for it."""
    if needed < _CHECK_ABOVE:
        return
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return
    if needed > available:
        raise MemoryError(
            f"the bookkeeping of {pages:,} pages takes about {needed >> 20:,} MiB and {available >> 20:,} MiB are free"
        )

"""The engine: frames, rmap items, trees and passes. It owns all memory and is the one extension.

Invariants (`Engine.check` verifies them and names the one that is broken):

frame-mappers     a frame's mappers, swapped and pins are the slots, swap slots and holders that refer to it
resident          resident frames are those with a mapper
block-order       a space's blocks ascend by address, aligned to SLOTS, and belong to it
slot-masks        anon is set exactly where a slot's frame is a mapped anonymous frame; used counts the slots
item-count        items of a space, and of the engine, are the set bits of the item masks
item-state        an item's state and link name a stable node that lists it, or a live unstable node
node-count        a stable node's count is the length of its list; all items of the list are in state IN_STABLE
shared-sharing    pages_shared counts nodes with items, pages_sharing their other items
unshared          pages_unshared counts items in the state IN_UNSTABLE
chains            every dup is in one chain, chains and dups are counted, candidates too
stale             a node is stale exactly when no slot maps its frame, and is counted
rb-shape          trees are red-black: no red node has a red child, black heights agree, parents agree
rb-order          contents ascend in the stable trees, and in the unstable trees as long as nothing changed
table             every stable tree place can be found in the table by its content
merging           a space's merging pages are its items on stable nodes
list              ksmd's list links the registered spaces, each once, and the cursor is on it

The engine's layers lie in ksm/_cy, each over those before it: `store` (the one struct), `frames`, `stable`,
`unstable`, `slots`, then `visit` and `walk` for ksmd and `faults` for the processes. Here are what owns the
memory, what Python calls, and the dump for the checker.

Callers hold one lock for each engine: nothing here is synchronised. Errors of the nogil functions are
return values: NO_MEMORY (bookkeeping does not fit) and NO_FRAME (the simulated RAM is used up).
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from ksm._cy.clock cimport COSTS, Clock, batch, run_until
from ksm._cy.faults cimport evict, found_by_reclaim, own_frame, swap_in, unmerge_block
from ksm._cy.frames cimport (
    content_hash, find_block, find_slot, frame_gone, frame_new, has_room, home_node, keep_origins, make_slot, mark_slot,
    set_slot, slot_frame, swapped, sweep_blocks)
from ksm._cy.memory cimport release
from ksm._cy.page cimport page_is_zero
from ksm._cy.rbtree cimport Node, rb_is_red, rb_parent
from ksm._cy.slots cimport drop_all_items, split_huge, vacate
from ksm._cy.stable cimport build_stable, in_table, remove_node
from ksm._cy.store cimport (
    FINGERPRINT_BYTES, NEAR_LEVELS, NO_FRAME, NO_MEMORY, NO_SLOT, Erased, Store, grow, levels_beyond, range_mask)
from ksm._cy.table cimport table_free
from ksm._cy.types cimport (
    DIRTY, FIRST_FRAME, FREE_NODE, HUGE, HUGE_ZERO, KSM, KSM_ZERO, LAZY, NOTHING, OWNED, SLOTS, ZERO_PAGE,
    Block, Frame, Origin, Space, StableNode)
from ksm._cy.together cimport (
    Together, together_add, together_free, together_having, together_remove, together_reserve)
from ksm._cy.unstable cimport build_unstable, clear_unstable, list_joined, make_explicit, touch_unstable, unstable_state
from ksm._cy.visit cimport reserve
from ksm._cy.walk cimport link_space, unlink_space, unregister
from ksm._cy.contents cimport (
    BETWEEN, COUNTED, PAGES, SHARED, SHARING, UNSHARED, WITHIN, ZEROS, Contents, contents_free, contents_reserve,
    contents_visit)
from ksm._cy.xxh3 cimport (
    XXH3_FORM_AVX2, XXH3_FORM_BEST, XXH3_FORM_NEON, XXH3_FORM_SCALAR, XXH3_FORM_SSE2, fingerprint_run_form, xxh3_has)

from ksm.errors import NoPageBytesError


class FramesExhausted(Exception):
    """The simulated RAM has no frame left; ksm.machine reclaims, or says who asked."""


@cython.final
cdef class Engine:
    """Frames, slots, rmap items and trees of one simulated machine, and ksmd's walk over them."""

    cdef Store m
    cdef Clock clock
    cdef list borrowed                      # keeps the buffers alive whose pages are mapped

    def __cinit__(self, uint32_t page_size=4096, uint32_t nodes=1, bint hash_index=True, bint gate_first=True,
                  bint zero_giveback=True, bint counts_zero_pages=True,
                  uint64_t max_resident=0, uint64_t max_swapped=0):
        self.m.page_size = page_size
        self.m.nodes = nodes
        self.m.hash_index = hash_index
        self.m.gate_first = gate_first
        self.m.zero_giveback = zero_giveback
        self.m.counts_zero_pages = counts_zero_pages
        self.m.max_resident = max_resident
        self.m.max_swapped = max_swapped
        self.m.width = page_size
        self.m.huge = page_size // 8
        self.borrowed = []
        self.m.max_page_sharing = 256
        self.m.merge_across_nodes = True
        self.clock.hz = 250
        self.m.zero = <uint8_t *>calloc(1, page_size)
        self.m.stable_roots = <uint32_t *>calloc(nodes, sizeof(uint32_t))
        self.m.unstable_roots = <uint32_t *>calloc(nodes, sizeof(uint32_t))
        self.m.stable_sizes = <uint64_t *>calloc(nodes, sizeof(uint64_t))
        self.m.unstable_sizes = <uint64_t *>calloc(nodes, sizeof(uint64_t))
        if (self.m.zero == NULL or self.m.stable_roots == NULL or self.m.unstable_roots == NULL
                or self.m.stable_sizes == NULL or self.m.unstable_sizes == NULL
                or grow(<void **>&self.m.frames, &self.m.frame_capacity, FIRST_FRAME, sizeof(Frame)) < 0
                or grow(<void **>&self.m.spaces, &self.m.space_capacity, 1, sizeof(Space)) < 0
                or grow(<void **>&self.m.stable, &self.m.stable_capacity, 1, sizeof(StableNode)) < 0
                or grow(<void **>&self.m.places, &self.m.place_capacity, 1, sizeof(Node)) < 0
                or reserve(&self.m) < 0
                or max_swapped and keep_origins(&self.m) < 0):
            raise MemoryError("no memory for an empty machine")
        # Index 0 means "none" everywhere; these entries are never handed out.
        self.m.frame_count = FIRST_FRAME
        self.m.space_count = self.m.stable_count = self.m.place_count = 1
        self.m.joined_count = self.m.built = 1
        memset(&self.m.spaces[0], 0, sizeof(Space))
        memset(&self.m.stable[0], 0, sizeof(StableNode))
        memset(&self.m.places[0], 0, sizeof(Node))
        self.m.zero_hash = content_hash(&self.m, self.m.zero)

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(FIRST_FRAME, self.m.frame_count):
            if self.m.frames[i].flags & OWNED:
                free(<void *>self.m.frames[i].data)
        for i in range(self.m.block_count):
            free(self.m.blocks[i])
        for i in range(self.m.space_count):
            release(self.m.spaces[i].blocks, self.m.spaces[i].capacity * sizeof(uint32_t))
        release(self.m.blocks, self.m.block_capacity * sizeof(Block *))
        free(self.m.homes)
        release(self.m.free_blocks, self.m.free_blocks_capacity * sizeof(uint32_t))
        release(self.m.frames, self.m.frame_capacity * sizeof(Frame))
        release(self.m.spaces, self.m.space_capacity * sizeof(Space))
        release(self.m.stable, self.m.stable_capacity * sizeof(StableNode))
        release(self.m.places, self.m.place_capacity * sizeof(Node))
        release(self.m.links, self.m.link_capacity * sizeof(Node))
        release(self.m.origins, self.m.origin_capacity * sizeof(Origin))
        release(self.m.joined_nid, self.m.nid_capacity * sizeof(uint8_t))
        free(self.m.stable_roots)
        free(self.m.unstable_roots)
        free(self.m.stable_sizes)
        free(self.m.unstable_sizes)
        release(self.m.pending, self.m.pending_capacity * sizeof(uint32_t))
        release(self.m.erased, self.m.erased_capacity * sizeof(Erased))
        free(self.m.zero)
        table_free(&self.m.stable_table)
        table_free(&self.m.unstable_table)

    # ---- tunables and counters, under their names in the kernel's files -----------------------------

    @property
    def max_page_sharing(self):
        return self.m.max_page_sharing

    @max_page_sharing.setter
    def max_page_sharing(self, value):
        self.m.max_page_sharing = value
        self.m.calm_valid = False

    @property
    def merge_across_nodes(self):
        return self.m.merge_across_nodes

    @merge_across_nodes.setter
    def merge_across_nodes(self, value):
        self.m.merge_across_nodes = value
        self.m.calm_valid = False

    @property
    def use_zero_pages(self):
        return self.m.use_zero_pages

    @use_zero_pages.setter
    def use_zero_pages(self, value):
        self.m.use_zero_pages = value
        self.m.calm_valid = False

    @property
    def smart_scan(self):
        return self.m.smart_scan

    @smart_scan.setter
    def smart_scan(self, value):
        self.m.smart_scan = value

    @property
    def unmerging(self):
        return self.m.unmerging

    @unmerging.setter
    def unmerging(self, value):
        self.m.unmerging = value

    @property
    def prune_ticks(self):
        return self.m.prune_ticks

    @prune_ticks.setter
    def prune_ticks(self, value):
        self.m.prune_ticks = value

    @property
    def now(self):
        return self.clock.now

    @now.setter
    def now(self, value):
        self.clock.now = value

    @property
    def wake(self):
        return self.clock.wake

    @wake.setter
    def wake(self, value):
        self.clock.wake = value

    @property
    def cpu(self):
        return self.clock.cpu

    @property
    def pass_start(self):
        return self.clock.pass_now, self.clock.pass_cpu

    @pass_start.setter
    def pass_start(self, value):
        self.clock.pass_now, self.clock.pass_cpu = value

    @property
    def pages_shared(self):
        return self.m.pages_shared

    @property
    def pages_sharing(self):
        return self.m.pages_sharing

    @property
    def pages_unshared(self):
        return self.m.pages_unshared

    @property
    def rmap_items(self):
        return self.m.rmap_items

    @property
    def stable_node_chains(self):
        return self.m.stable_node_chains

    @property
    def stable_node_dups(self):
        return self.m.stable_node_dups

    @property
    def ksm_zero_pages(self):
        return self.m.ksm_zero_pages

    @property
    def full_scans(self):
        return self.m.full_scans

    @property
    def pages_scanned(self):
        return self.m.pages_scanned

    @property
    def pages_skipped(self):
        return self.m.pages_skipped

    @property
    def cow_ksm(self):
        return self.m.cow_ksm

    @property
    def ksm_swpin_copy(self):
        return self.m.ksm_swpin_copy

    @property
    def hashed(self):
        return self.m.hashed

    @property
    def stable_levels(self):
        return levels_beyond(self.m.stable_searches, 0)

    @property
    def unstable_levels(self):
        return levels_beyond(self.m.unstable_searches, 0)

    @property
    def deep_levels(self):
        return (levels_beyond(self.m.stable_searches, NEAR_LEVELS)
                + levels_beyond(self.m.unstable_searches, NEAR_LEVELS))

    @property
    def merges(self):
        return self.m.merges

    @property
    def already(self):
        return self.m.already

    @property
    def comparisons(self):
        return self.m.comparisons

    @property
    def bytes_compared(self):
        return self.m.bytes_compared

    @property
    def resident(self):
        return self.m.resident

    @property
    def swapped_pages(self):
        return self.m.swapped_pages

    @property
    def max_resident(self):
        return self.m.max_resident

    @property
    def max_swapped(self):
        return self.m.max_swapped

    @property
    def page_size(self):
        return self.m.page_size

    @property
    def nodes(self):
        return self.m.nodes

    @property
    def hash_index(self):
        return self.m.hash_index

    @property
    def fingerprints_only(self):
        return self.m.fingerprints_only

    # ---- the Python surface: one method a thing that a process, ksmd or sysfs does ---------------
    # Pages are given by their virtual page number; `n` counts pages. Ranges may hold any slots.

    cdef object answer(self, int done):
        if done == NO_MEMORY:
            raise MemoryError(f"no memory for the bookkeeping of {self.m.frame_count:,} frames")
        if done == NO_FRAME:
            raise FramesExhausted
        return done

    def new_space(self):
        """A new, empty address space; its number stays valid until it has exited and ksmd has left it."""
        cdef uint32_t mm
        for mm in range(1, self.m.space_count):
            if not self.m.spaces[mm].alive and not self.m.spaces[mm].registered:
                break
        else:
            self.answer(grow(<void **>&self.m.spaces, &self.m.space_capacity, <uint64_t>self.m.space_count + 1,
                             sizeof(Space)))
            mm = self.m.space_count
            self.m.space_count += 1
        memset(&self.m.spaces[mm], 0, sizeof(Space))
        self.m.spaces[mm].alive = 1
        self.m.born += 1
        self.m.spaces[mm].born = self.m.spaces[mm].root = self.m.born
        return mm

    def use_fingerprints(self, uint64_t high, uint64_t low):
        """Make contents fingerprints of 16 bytes instead of pages, given that of the zero page."""
        if self.m.resident or self.m.swapped_pages or self.m.stable_node_chains or self.m.pages_shared:
            raise ValueError("this machine has pages with bytes; fingerprints need a machine of their own")
        clear_unstable(&self.m)
        self.sweep_stable()
        memcpy(self.m.zero, &high, 8)
        memcpy(self.m.zero + 8, &low, 8)
        self.m.fingerprints_only = True
        self.m.width = FINGERPRINT_BYTES
        self.m.zero_hash = content_hash(&self.m, self.m.zero)

    @property
    def any_registered(self):
        """Whether ksmd has anything to do."""
        return self.m.spaces[0].next != 0

    @property
    def in_pass(self):
        """Whether a pass is under way."""
        return self.m.cursor != 0

    def prune_interval_changed(self):
        """Look at every chain again before the next batch."""
        self.m.next_prune = 0

    def register(self, uint32_t mm):
        """Put the space into ksmd's list, just before the space that ksmd is in."""
        if not self.m.spaces[mm].registered:
            link_space(&self.m, mm, self.m.cursor)
            self.m.spaces[mm].registered = 1

    def registered(self, uint32_t mm):
        return bool(self.m.spaces[mm].registered)

    def set_any_marked(self, uint32_t mm, bint marked):
        """Whether the space has a VMA marked mergeable, populated or not."""
        self.m.spaces[mm].any_marked = marked

    def space_counts(self, uint32_t mm):
        """(rmap items, merging pages, KSM-placed zero pages) of a space."""
        cdef Space *s = &self.m.spaces[mm]
        return s.items, s.merging, s.zero_pages

    def exit_space(self, uint32_t mm):
        """Unmap everything; ksmd drops the items when it comes by."""
        cdef Space *s = &self.m.spaces[mm]
        self.unmap(mm, 0, <uint64_t>-1)
        s = &self.m.spaces[mm]
        s.alive = 0
        s.any_marked = 0
        if not s.registered:
            s.count = 0
        elif mm != self.m.cursor:
            if s.items == 0:
                unregister(&self.m, mm)
                return
            unlink_space(&self.m, mm)
            link_space(&self.m, mm, self.m.spaces[self.m.cursor].next)
        s.exited = 1

    def populate(self, uint32_t mm, uint64_t vpn, const uint8_t[:, ::1] pages, const uint8_t[::1] present,
                 bint marked, uint8_t nid):
        """Map the rows of `pages` (n, page_size or 16) at vpn where present (n,) is not 0, borrowing their bytes."""
        cdef uint64_t k, n = pages.shape[0]
        cdef uint32_t slot, f
        cdef int done = 0
        if pages.shape[1] != self.m.width or present.shape[0] != pages.shape[0]:
            raise ValueError("pages and present do not fit")
        self.borrowed.append(pages)
        with nogil:
            for k in range(n):
                if not present[k]:
                    continue
                slot = make_slot(&self.m, mm, vpn + k)
                if slot == NO_SLOT:
                    done = NO_MEMORY
                    break
                if slot_frame(&self.m, slot) != NOTHING:
                    continue
                if not has_room(&self.m, 1):
                    done = NO_FRAME
                    break
                f = frame_new(&self.m, &pages[k, 0], 0, nid)
                if f == 0:
                    done = NO_MEMORY
                    break
                set_slot(&self.m, slot, f, True)
                mark_slot(&self.m, slot, marked, nid)
        self.answer(done)

    def populate_huge(self, uint32_t mm, uint64_t vpn, bint writing, bint marked, uint8_t nid):
        """Fault on a huge page's range: zero-filled frames on a write, the huge zero page on a read.

        Only where nothing is mapped yet, or, on a write, nothing but the huge zero page; whether it was done.
        """
        cdef uint64_t k
        cdef uint32_t slot, f
        slot = find_slot(&self.m, mm, vpn)
        cdef uint32_t first = NOTHING if slot == NO_SLOT else slot_frame(&self.m, slot)
        for k in range(self.m.huge):
            slot = find_slot(&self.m, mm, vpn + k)
            f = NOTHING if slot == NO_SLOT else slot_frame(&self.m, slot)
            if f != first or f != NOTHING and not (writing and f == HUGE_ZERO):
                return False
        if writing and not has_room(&self.m, self.m.huge):
            return False
        self.answer(keep_origins(&self.m))
        for k in range(self.m.huge):
            slot = make_slot(&self.m, mm, vpn + k)
            f = HUGE_ZERO
            if writing and slot != NO_SLOT:
                f = frame_new(&self.m, self.m.zero, HUGE, nid)
            if slot == NO_SLOT or f == 0:
                self.answer(NO_MEMORY)
            set_slot(&self.m, slot, f, writing)
            mark_slot(&self.m, slot, marked, nid)
        return True

    def write(self, uint32_t mm, uint64_t vpn, uint32_t offset, const uint8_t[::1] data, bint marked, uint8_t nid,
              uint64_t origin):
        """Write within one page: a write fault if need be, then the bytes. `origin`: vpn less what mremap moved."""
        cdef uint32_t slot = make_slot(&self.m, mm, vpn)
        if self.m.fingerprints_only:
            raise NoPageBytesError("this machine was built from fingerprints and has no page bytes to write")
        if slot == NO_SLOT:
            self.answer(NO_MEMORY)
        self.answer(own_frame(&self.m, slot, nid, origin))
        mark_slot(&self.m, slot, marked, nid)
        if data.shape[0]:
            memcpy(<uint8_t *>self.m.frames[slot_frame(&self.m, slot)].data + offset, &data[0], data.shape[0])

    def overwrite(self, uint32_t mm, uint64_t vpn, const uint8_t[:, ::1] rows, const uint8_t[::1] present, bint marked,
                  uint8_t nid, uint64_t origin):
        """Write whole pages, given as fingerprints: rows (n, 16), those where present (n,) is not 0."""
        cdef uint64_t k, n = rows.shape[0]
        cdef uint32_t slot
        cdef int done = 0
        if rows.shape[1] != FINGERPRINT_BYTES or not self.m.fingerprints_only or present.shape[0] != rows.shape[0]:
            raise ValueError("rows, present and this machine do not fit")
        with nogil:
            for k in range(n):
                if not present[k]:
                    continue
                slot = make_slot(&self.m, mm, vpn + k)
                done = NO_MEMORY if slot == NO_SLOT else own_frame(&self.m, slot, nid, origin + k)
                if done < 0:
                    break
                mark_slot(&self.m, slot, marked, nid)
                memcpy(<uint8_t *>self.m.frames[slot_frame(&self.m, slot)].data, &rows[k, 0], FINGERPRINT_BYTES)
        self.answer(done)

    def read(self, uint32_t mm, uint64_t vpn, uint32_t offset, uint32_t n, bint marked, uint8_t nid, uint64_t origin):
        """Read within one page: a read fault if need be, then the bytes."""
        cdef uint32_t slot = make_slot(&self.m, mm, vpn), f
        if self.m.fingerprints_only:
            raise NoPageBytesError("this machine was built from fingerprints and has no page bytes to read")
        if slot == NO_SLOT:
            self.answer(NO_MEMORY)
        f = slot_frame(&self.m, slot)
        if f == NOTHING:
            set_slot(&self.m, slot, ZERO_PAGE, False)
            mark_slot(&self.m, slot, marked, nid)
        elif f >= FIRST_FRAME and not (self.m.blocks[slot >> 6].anon >> (slot & 63)) & 1:
            self.answer(swap_in(&self.m, slot, nid, origin))
            f = slot_frame(&self.m, slot)
        if f < FIRST_FRAME:
            return bytes(n)
        return PyBytes_FromStringAndSize(<const char *>self.m.frames[f].data + offset, n)

    def mark(self, uint32_t mm, uint64_t vpn, uint64_t n, bint marked):
        """Set or clear the mergeable mark of a range."""
        cdef Space *space = &self.m.spaces[mm]
        cdef uint32_t at = find_block(&self.m, space, vpn), i
        cdef Block *b
        cdef uint64_t mask
        while at < space.count and self.m.blocks[space.blocks[at]].vpn < vpn + n:
            b = self.m.blocks[space.blocks[at]]
            mask = range_mask(b.vpn, vpn, n)
            if not marked:
                for i in range(SLOTS):
                    if (mask & b.marked & b.item) >> i & 1:
                        touch_unstable(&self.m, space.blocks[at] << 6 | i)
            b.marked = b.marked | mask if marked else b.marked & ~mask
            at += 1

    def hide(self, uint32_t mm, uint64_t vpn, uint64_t n, bint hidden):
        """Whether unstable searches that come to a slot of the range take its page for gone (PROT_NONE, 6.1 to 6.4)."""
        cdef Space *space = &self.m.spaces[mm]
        cdef uint32_t at = find_block(&self.m, space, vpn), i
        cdef Block *b
        cdef uint64_t mask
        while at < space.count and self.m.blocks[space.blocks[at]].vpn < vpn + n:
            b = self.m.blocks[space.blocks[at]]
            mask = range_mask(b.vpn, vpn, n)
            for i in range(SLOTS):
                if (mask & b.item) >> i & 1:
                    touch_unstable(&self.m, space.blocks[at] << 6 | i)
            b.hidden = b.hidden | mask if hidden else b.hidden & ~mask
            b.calm &= ~mask
            at += 1

    def unmerge(self, uint32_t mm, uint64_t vpn, uint64_t n, uint8_t nid):
        """Give every KSM frame and KSM-placed zero page of a range a private copy on node nid."""
        cdef Space *space = &self.m.spaces[mm]
        cdef uint32_t at = find_block(&self.m, space, vpn)
        while at < space.count and self.m.blocks[space.blocks[at]].vpn < vpn + n:
            self.answer(unmerge_block(&self.m, space.blocks[at],
                                      range_mask(self.m.blocks[space.blocks[at]].vpn, vpn, n), nid))
            at += 1

    def unmap(self, uint32_t mm, uint64_t vpn, uint64_t n):
        """Unmap a range: frames go, items stay for ksmd to drop."""
        cdef Space *space = &self.m.spaces[mm]
        cdef uint32_t at = find_block(&self.m, space, vpn), i
        cdef uint64_t mask, end = vpn + n
        cdef Block *b
        while at < space.count and self.m.blocks[space.blocks[at]].vpn < end:
            b = self.m.blocks[space.blocks[at]]
            mask = range_mask(b.vpn, vpn, n)
            if b.used:
                for i in range(SLOTS):
                    if (mask >> i) & 1:
                        vacate(&self.m, space.blocks[at] << 6 | i)
            b.marked &= ~mask
            at += 1
        if n > SLOTS:
            sweep_blocks(&self.m, mm)

    def discard(self, uint32_t mm, uint64_t vpn, uint64_t n):
        """MADV_DONTNEED: like unmap, but the VMA and its mark stay."""
        cdef Space *space = &self.m.spaces[mm]
        cdef uint32_t at = find_block(&self.m, space, vpn), i
        cdef uint64_t mask
        while at < space.count and self.m.blocks[space.blocks[at]].vpn < vpn + n:
            mask = range_mask(self.m.blocks[space.blocks[at]].vpn, vpn, n)
            for i in range(SLOTS):
                if (mask >> i) & 1:
                    vacate(&self.m, space.blocks[at] << 6 | i)
            at += 1

    def lazy_free(self, uint32_t mm, uint64_t vpn, uint64_t n):
        """MADV_FREE: the next reclaim may drop these frames; swapped ones go at once."""
        cdef uint64_t v
        cdef uint32_t slot, f
        cdef Block *b
        self.answer(keep_origins(&self.m))
        for v in self.touched(mm, vpn, n):
            slot = find_slot(&self.m, mm, v)
            b = self.m.blocks[slot >> 6]
            if (b.anon >> (slot & 63)) & 1 and not self.covers_huge(slot, vpn, n):
                split_huge(&self.m, slot)
            f = slot_frame(&self.m, slot)
            if f < FIRST_FRAME:
                continue
            if not (b.anon >> (slot & 63)) & 1:
                vacate(&self.m, slot)
            elif self.m.frames[f].mappers == 1 or not (self.m.frames[f].flags & DIRTY or swapped(&self.m, f)):
                self.m.frames[f].flags = (self.m.frames[f].flags | LAZY) & ~DIRTY
                b.clean |= <uint64_t>1 << (slot & 63)

    cdef bint covers_huge(self, uint32_t slot, uint64_t vpn, uint64_t n):
        """Whether the n pages from vpn on hold all of the huge page that the slot may be part of."""
        cdef uint64_t first = (self.m.blocks[slot >> 6].vpn + (slot & 63)) & ~<uint64_t>(self.m.huge - 1)
        return vpn <= first and first + self.m.huge <= vpn + n

    def page_out(self, uint32_t mm, uint64_t vpn, uint64_t n):
        """MADV_PAGEOUT: what only this space maps goes to swap, as far as there is room."""
        cdef uint64_t v
        cdef uint32_t slot
        for v in self.touched(mm, vpn, n):
            slot = find_slot(&self.m, mm, v)
            if ((self.m.blocks[slot >> 6].anon >> (slot & 63)) & 1 and
                    self.m.frames[slot_frame(&self.m, slot)].mappers == 1 and
                    (self.m.max_swapped or split_huge(&self.m, slot))):     # without swap a huge page is only split
                evict(&self.m, slot)

    def reclaim(self, uint64_t frames):
        """Swap out or drop by space and address, until so many frames are free (0: all that can); slots that went."""
        cdef uint32_t mm, at, i, slot, f
        cdef uint64_t gone = 0, before = self.m.resident
        for mm in [*range(1, self.m.space_count)] * 2:      # what stays the first time may go the second
            for at in range(self.m.spaces[mm].count):
                for i in range(SLOTS):
                    slot = self.m.spaces[mm].blocks[at] << 6 | i
                    if (self.m.blocks[slot >> 6].anon >> i) & 1:
                        gone += evict(&self.m, slot)
                        if frames and before - self.m.resident >= frames:
                            return gone
        for f in range(FIRST_FRAME, self.m.frame_count):
            if self.m.frames[f].mappers == 0:
                frame_gone(&self.m, f)
        return gone

    def touched(self, uint32_t mm, uint64_t vpn, uint64_t n):
        """The page numbers of a range whose slots map or hold something, ascending."""
        cdef Space *space = &self.m.spaces[mm]
        cdef uint32_t at = find_block(&self.m, space, vpn), i
        cdef Block *b
        cdef list found = []
        while at < space.count and self.m.blocks[space.blocks[at]].vpn < vpn + n:
            b = self.m.blocks[space.blocks[at]]
            for i in range(SLOTS):
                if (range_mask(b.vpn, vpn, n) >> i) & 1 and b.frame[i] != NOTHING:
                    found.append(b.vpn + i)
            at += 1
        return found

    def move(self, uint32_t mm, uint64_t old, uint64_t new, uint64_t n, bint marked):
        """Move what a range maps, already unmerged, to an empty range; items stay behind."""
        cdef uint32_t source, target, f
        cdef uint64_t v, clean
        cdef bint anon
        self.answer(keep_origins(&self.m))
        for v in self.touched(mm, old, n):
            target = make_slot(&self.m, mm, new + (v - old))
            if target == NO_SLOT:
                self.answer(NO_MEMORY)
            source = find_slot(&self.m, mm, v)
            touch_unstable(&self.m, source)
            f = slot_frame(&self.m, source)
            anon = (self.m.blocks[source >> 6].anon >> (source & 63)) & 1
            clean = (self.m.blocks[source >> 6].clean >> (source & 63)) & 1
            set_slot(&self.m, source, NOTHING, False)
            set_slot(&self.m, target, f, anon)
            self.m.blocks[target >> 6].clean |= clean << (target & 63)
            mark_slot(&self.m, target, marked, home_node(&self.m, source))

    def fork(self, uint32_t parent, uint32_t child):
        """Share everything that parent maps with the empty space child."""
        cdef uint32_t at, i, slot, f
        cdef Block *b
        cdef Block *c
        self.m.spaces[child].root = self.m.spaces[parent].root
        for at in range(self.m.spaces[parent].count):
            b = self.m.blocks[self.m.spaces[parent].blocks[at]]
            if b.used == 0:
                continue
            slot = make_slot(&self.m, child, b.vpn)
            if slot == NO_SLOT:
                self.answer(NO_MEMORY)
            c = self.m.blocks[slot >> 6]
            c.marked = b.marked
            c.hidden = b.hidden
            if self.m.nodes > 1:
                memcpy(&self.m.homes[slot & ~63u], &self.m.homes[self.m.spaces[parent].blocks[at] << 6], SLOTS)
            for i in range(SLOTS):
                f = b.frame[i]
                if f == NOTHING:
                    continue
                set_slot(&self.m, slot + i, f, (b.anon >> i) & 1)
                c.clean |= b.clean & <uint64_t>1 << i
                if f == KSM_ZERO:
                    self.m.ksm_zero_pages += 1
                    self.m.spaces[child].zero_pages += 1
                elif f >= FIRST_FRAME and (b.anon >> i) & 1:
                    self.m.frames[f].mappers += 1
                elif f >= FIRST_FRAME:
                    self.m.origins[f].swapped += 1

    def migrate(self, uint32_t mm, uint64_t vpn, uint64_t n, uint8_t nid):
        """Move the frames of a range to a NUMA node; all that map them see it.

        A KSM frame with a mapping that its items do not lead to stays where it is.
        """
        cdef uint64_t v
        cdef uint32_t slot
        fixed = self.unreachable(mm, vpn, n)
        for v in self.touched(mm, vpn, n):
            slot = find_slot(&self.m, mm, v)
            if (self.m.blocks[slot >> 6].anon >> (slot & 63)) & 1 and slot_frame(&self.m, slot) not in fixed:
                if self.m.frames[slot_frame(&self.m, slot)].mappers > 1:
                    build_unstable(&self.m)
                    self.m.check_all = True
                touch_unstable(&self.m, slot)
                self.m.frames[slot_frame(&self.m, slot)].nid = nid

    cdef set unreachable(self, uint32_t mm, uint64_t vpn, uint64_t n):
        """The KSM frames of a range that have a mapping which no item leads to. O(all slots) if it holds any."""
        cdef uint64_t v
        cdef uint32_t slot, f, block, i
        kept = set()
        for v in self.touched(mm, vpn, n):
            f = slot_frame(&self.m, find_slot(&self.m, mm, v))
            if f >= FIRST_FRAME and self.m.frames[f].flags & KSM:
                kept.add(f)
        found = set()
        for block in range(self.m.block_count if kept else 0):
            for i in range(SLOTS):
                slot = block << 6 | i
                if (self.m.blocks[block].anon >> i) & 1 and slot_frame(&self.m, slot) in kept:
                    if not found_by_reclaim(&self.m, slot):
                        found.add(slot_frame(&self.m, slot))
        return found

    def set_costs(self, costs, uint64_t hz):
        """What batches cost from now on: ns of each kind of work, in the order of `Clock.costs`; ticks a second."""
        cdef int i
        if len(costs) != COSTS or hz == 0:
            raise ValueError(f"{COSTS} costs and ticks a second are wanted, not {costs} and {hz}")
        for i in range(COSTS):
            self.clock.costs[i] = costs[i]
        self.clock.hz = hz

    def scan_batch(self, uint64_t budget):
        """One batch of at most `budget` visits: 0 budget spent, 1 the pass ended, 2 nothing registered."""
        cdef int done
        with nogil:
            done = batch(&self.clock, &self.m, budget)
        return self.answer(done)

    def run_until(self, int64_t end, uint64_t budget, uint64_t ticks, bint by_pass):
        """Batches with sleeps of `ticks` between them, before `end`, 2**18 visits or 2**16 batches at a time.

        1 a pass ended, and `by_pass` is set; 2 nothing is registered; 3 time is up; 4 there is more to do.
        """
        cdef int done
        with nogil:
            done = run_until(&self.clock, &self.m, end, budget, ticks, by_pass)
        return self.answer(done)

    def unmerge_all(self, marked):
        """run=2: space by space, private copies in marked VMAs and items dropped; the position is reset.

        marked: for each living space its marked ranges (first page, pages, NUMA node).
        """
        cdef uint32_t mm, next
        self.m.cursor = 0
        self.m.cursor_vpn = 0
        mm = self.m.spaces[0].next
        while mm:
            next = self.m.spaces[mm].next
            for vpn, n, nid in marked.get(mm, ()):
                self.unmerge(mm, vpn, n, nid)
            drop_all_items(&self.m, mm)
            if self.m.spaces[mm].exited:
                unregister(&self.m, mm)
            mm = next
        self.sweep_stable()
        self.m.full_scans = 0

    def sweep_stable(self):
        """Remove the stable nodes whose frames are not mapped, as far as the kernel does; whether one is busy."""
        cdef uint32_t nid, n, next
        cdef bint busy = False
        build_stable(&self.m)
        for nid in range(self.m.nodes):
            while self.m.stable_roots[nid]:
                if remove_node(&self.m, self.m.places[self.m.stable_roots[nid]].value):
                    busy = True
                    break
        n = self.m.migrating_first
        while n:
            next = self.m.stable[n].next
            busy = busy or remove_node(&self.m, n) == 1
            n = next
        return busy

    def memory(self):
        """Bytes that each structure has allocated. O(blocks + frames)."""
        cdef uint32_t i
        cdef uint64_t spaces = self.m.space_capacity * sizeof(Space), owned = 0
        for i in range(self.m.space_count):
            spaces += self.m.spaces[i].capacity * sizeof(uint32_t)
        for i in range(FIRST_FRAME, self.m.frame_count):
            owned += self.m.width if self.m.frames[i].flags & OWNED else 0
        return {
            "slots and rmap items": self.m.block_count * sizeof(Block) + self.m.block_capacity * sizeof(Block *)
            + self.m.free_blocks_capacity * sizeof(uint32_t),
            "frames": self.m.frame_capacity * sizeof(Frame) + self.m.origin_capacity * sizeof(Origin),
            "contents of their own": owned,
            "address spaces": spaces,
            "stable nodes": self.m.stable_capacity * sizeof(StableNode),
            "stable trees": self.m.place_capacity * sizeof(Node) + self.m.pending_capacity * sizeof(uint32_t),
            "stable table": self.m.stable_table.capacity * sizeof(uint64_t),
            "unstable trees": self.m.link_capacity * sizeof(Node) + self.m.nid_capacity * sizeof(uint8_t)
            + self.m.erased_capacity * sizeof(Erased),
            "unstable table": self.m.unstable_table.capacity * sizeof(uint64_t),
        }

    def dump(self):
        """Every structure, as tuples: what ksm.check verifies. O(everything)."""
        cdef uint32_t i, at, k
        cdef Block *b
        cdef Space *s
        cdef StableNode *n
        cdef list slots = [], frames = [], nodes = [], spaces = []
        if self.m.implicit:
            make_explicit(&self.m)
        list_joined(&self.m)
        for i in range(self.m.space_count):
            s = &self.m.spaces[i]
            spaces.append((s.next, s.prev, s.registered, s.exited, s.items, s.merging, s.zero_pages,
                           [(s.blocks[at], self.m.blocks[s.blocks[at]].vpn, self.m.blocks[s.blocks[at]].mm,
                             self.m.blocks[s.blocks[at]].used) for at in range(s.count)]))
            for at in range(self.m.spaces[i].count):
                b = self.m.blocks[self.m.spaces[i].blocks[at]]
                for k in range(SLOTS):
                    if b.frame[k] != NOTHING or (b.item >> k) & 1:
                        slots.append((self.m.spaces[i].blocks[at] << 6 | k, i, b.vpn + k, b.frame[k], (b.anon >> k) & 1,
                                      (b.marked >> k) & 1, (b.item >> k) & 1, b.state[k], b.link[k], b.next[k],
                                      b.prev[k], (b.calm >> k) & 1))
        for i in range(FIRST_FRAME, self.m.frame_count):
            if self.m.frames[i].data != NULL:
                frames.append((i, self.m.frames[i].mappers, swapped(&self.m, i), self.m.frames[i].pins,
                               self.m.frames[i].node, self.m.frames[i].flags, self.m.frames[i].nid,
                               PyBytes_FromStringAndSize(<const char *>self.m.frames[i].data, self.m.width)))
        for i in range(1, self.m.stable_count):
            if self.m.stable[i].kind != FREE_NODE:
                n = &self.m.stable[i]
                nodes.append((i, n.kind, n.frame, n.count, n.first, n.next, n.prev, n.owner, n.candidates, n.nid,
                              n.stale, n.unsettled, n.hash, in_table(&self.m, i)))
        return {
            "slots": slots, "frames": frames, "nodes": nodes, "spaces": spaces, "cursor": self.m.cursor,
            "places": [dump_node(self.m.places, i) for i in range(self.m.place_count)],
            "stable_roots": [self.m.stable_roots[i] for i in range(self.m.nodes)],
            "stable_sizes": [self.m.stable_sizes[i] for i in range(self.m.nodes)],
            "calm_valid": self.m.calm_valid,
            "pending": [self.m.pending[i] for i in range(self.m.pending_count)],
            "joined": [dump_node(self.m.links, i) if i < self.m.built else (0, 0, 0, 0, self.m.links[i].value)
                       for i in range(self.m.joined_count)],
            "unstable_roots": [self.m.unstable_roots[i] for i in range(self.m.nodes)],
            "unstable_sizes": [self.m.unstable_sizes[i] for i in range(self.m.nodes)],
            "built": self.m.built, "unstable_changed": self.m.unstable_changed,
            "erased": [(self.m.erased[i].node, self.m.erased[i].frame) for i in range(self.m.erased_count)],
            "erased_done": self.m.erased_done, "state": unstable_state(&self.m),
            "counters": {name: getattr(self, name) for name in (
                "pages_shared", "pages_sharing", "pages_unshared", "rmap_items", "stable_node_chains",
                "stable_node_dups", "ksm_zero_pages", "resident", "swapped_pages", "max_page_sharing")},
            "stale": self.m.stale, "unsettled": self.m.unsettled, "migrating": self.m.migrating,
        }


cdef object dump_node(const Node *t, uint32_t n):
    return t[n].left, t[n].right, rb_parent(t, n), bool(rb_is_red(t, n)), t[n].value


# ---- fingerprints, without any engine ----------------------------------------------------------

_FORMS = {"avx2": XXH3_FORM_AVX2, "sse2": XXH3_FORM_SSE2, "neon": XXH3_FORM_NEON, "scalar": XXH3_FORM_SCALAR}


def fingerprint_forms():
    """The forms of the hash that this build has and this processor runs, best first.

    >>> fingerprint_forms()[-1]
    'scalar'
    """
    return tuple(name for name, form in _FORMS.items() if xxh3_has(form))


def fingerprint_pages(const uint8_t[:, ::1] pages not None, uint64_t[:, ::1] out not None,
                      uint8_t[::1] zero=None, variant=None):
    """Write XXH3-128 of every page to `out` (high, low), and to `zero` whether it is all zeros. O(bytes).

    `variant` names one of `fingerprint_forms()`; any other is a ValueError. Releases the GIL.

    >>> import numpy as np
    >>> out = np.empty((1, 2), np.uint64)
    >>> fingerprint_pages(np.zeros((1, 4096), np.uint8), out)
    >>> f"{out[0, 0]:x} {out[0, 1]:x}"
    '3ee8dc4f9e7ee495 93d76fe148c689ba'
    """
    cdef size_t count = pages.shape[0], size = pages.shape[1], i
    cdef int form = XXH3_FORM_BEST
    if variant is not None:
        if variant not in fingerprint_forms():
            raise ValueError(f"no {variant!r} in this build: it has {', '.join(fingerprint_forms())}")
        form = _FORMS[variant]
    if size <= 240 or size % 16:
        raise ValueError(f"pages of {size} bytes: must be more than 240 and a multiple of 16")
    if <size_t>out.shape[0] != count or out.shape[1] != 2 or (zero is not None and <size_t>zero.shape[0] != count):
        raise ValueError(f"{count} pages need out ({count}, 2) and zero ({count},)")
    if count == 0:
        return
    cdef const uint8_t *page = &pages[0, 0]
    cdef uint64_t *words = &out[0, 0]
    cdef uint8_t *zeros = NULL if zero is None else &zero[0]
    cdef uint64_t *zero_words = NULL    # what the first zero page came to: a zero page is hashed once
    with nogil:
        if zeros == NULL:
            fingerprint_run_form(form, page, count, size, words)
        else:
            for i in range(count):
                zeros[i] = page_is_zero(page, size)
                if zeros[i] and zero_words != NULL:
                    words[0] = zero_words[0]
                    words[1] = zero_words[1]
                else:
                    fingerprint_run_form(form, page, 1, size, words)
                    if zeros[i]:
                        zero_words = words
                page += size
                words += 2


# ---- the settled state, without any engine ------------------------------------------------------

@cython.final
cdef class Settling:
    """Counts what pages settle at that come in the order of ksmd's visits; see `_cy/contents.pxd`.

    `expected` pages make room for as many at once, which is twice as fast as growing.

    >>> import numpy as np
    >>> counting = Settling(max_page_sharing=2, sources=1)
    >>> counting.visit(0, np.zeros((3, 2), np.uint64))
    >>> counting.counts()[0]["pages_shared"], counting.counts()[0]["pages_unshared"]
    (1, 1)
    """

    cdef Contents contents
    cdef int64_t *numbers
    cdef uint32_t sources, limit

    def __cinit__(self, uint32_t max_page_sharing, uint32_t sources, uint64_t expected=0):
        if max_page_sharing < 2 or not 0 < sources < 1 << 30:
            raise ValueError(f"max_page_sharing {max_page_sharing}, {sources} sources")
        self.limit, self.sources = max_page_sharing, sources
        self.numbers = <int64_t *>calloc(sources, COUNTED * sizeof(int64_t))
        if self.numbers == NULL or contents_reserve(&self.contents, expected) < 0:
            raise MemoryError

    def __dealloc__(self):
        contents_free(&self.contents)
        free(self.numbers)
        self.numbers = NULL

    def visit(self, uint32_t source, const uint64_t[:, ::1] words not None, const uint8_t[::1] present=None,
              uint64_t zero_high=0, uint64_t zero_low=0, bint zeros_merge=True):
        """Pages of one source by their (high, low) words, all but those with a 0 in `present`. Releases the GIL."""
        cdef uint64_t n = words.shape[0], at = 0, some
        if source >= self.sources or words.shape[1] != 2 or (present is not None and <uint64_t>present.shape[0] != n):
            raise ValueError(f"source {source} of {self.sources}: words must be (n, 2), and present (n,)")
        cdef const uint8_t *there = NULL
        cdef bint full = False
        if n == 0:
            return
        if present is not None:
            there = &present[0]
        with nogil:
            while at < n and not full:
                some = min(n - at, 65536)
                full = contents_reserve(&self.contents, some) < 0
                if not full:
                    contents_visit(&self.contents, &words[at, 0], there, some, zero_high, zero_low, zeros_merge,
                                   source, self.limit, self.numbers)
                    if there != NULL:
                        there += some
                at += some
        if full:
            raise MemoryError(f"counting {self.contents.count:,} different pages")

    def counts(self):
        """What each source's pages came to so far, by name."""
        cdef uint32_t i
        cdef int64_t *row
        rows = []
        for i in range(self.sources):
            row = self.numbers + i * COUNTED
            rows.append({"pages": row[PAGES], "zero_pages": row[ZEROS], "pages_shared": row[SHARED],
                         "pages_sharing": row[SHARING], "pages_unshared": row[UNSHARED],
                         "duplicates_within": row[WITHIN], "duplicates_between": row[BETWEEN]})
        return rows

    @property
    def stable_node_chains(self):
        return self.contents.chains

    @property
    def stable_node_dups(self):
        return self.contents.dups


# ---- contents that members of groups have in common, without any engine ----------------------------

@cython.final
cdef class Sharing:
    """Which contents the members of groups have, as they come and go; see `_cy/together.pxd`.

    Member i has the contents `row[starts[i]:starts[i + 1]]`, each once. All questions are O(its contents).

    >>> import numpy as np
    >>> sharing = Sharing(np.array([0, 1, 1, 2], np.uint32), np.array([0, 2, 4], np.int64))
    >>> sharing.add(0, 7)
    >>> sharing.new(1, 7), sharing.freed(0, 7), sharing.pairs
    (1, 2, 2)
    """

    cdef Together table
    cdef const uint32_t[::1] row
    cdef const int64_t[::1] starts
    cdef int64_t members

    def __cinit__(self, const uint32_t[::1] row not None, const int64_t[::1] starts not None):
        cdef int64_t i
        self.members = starts.shape[0] - 1
        if self.members < 0 or starts[0] != 0 or starts[self.members] != row.shape[0]:
            raise ValueError(f"starts must go from 0 to {row.shape[0]}")
        for i in range(self.members):
            if starts[i] > starts[i + 1]:
                raise ValueError(f"starts[{i + 1}] is below starts[{i}]")
        self.row = row
        self.starts = starts
        if together_reserve(&self.table, 1) < 0:
            raise MemoryError

    def __dealloc__(self):
        together_free(&self.table)

    cdef const uint32_t *contents(self, int64_t member, uint64_t *n) except? NULL:
        if not 0 <= member < self.members:
            raise IndexError(f"member {member} of {self.members}")
        n[0] = <uint64_t>(self.starts[member + 1] - self.starts[member])
        return &self.row[self.starts[member]] if n[0] else NULL

    def add(self, int64_t member, uint32_t group):
        """A member joins a group."""
        cdef uint64_t n = 0
        cdef const uint32_t *row = self.contents(member, &n)
        if together_reserve(&self.table, n) < 0:
            raise MemoryError(f"counting {self.table.live:,} contents of groups")
        together_add(&self.table, group, row, n)

    def remove(self, int64_t member, uint32_t group):
        """A member leaves the group that it is in."""
        cdef uint64_t n = 0
        cdef const uint32_t *row = self.contents(member, &n)
        together_remove(&self.table, group, row, n)

    def new(self, int64_t member, uint32_t group):
        """How many contents a member would bring that nobody there has."""
        cdef uint64_t n = 0
        cdef const uint32_t *row = self.contents(member, &n)
        return together_having(&self.table, group, row, n, 0)

    def freed(self, int64_t member, uint32_t group):
        """How many contents would go with a member of the group."""
        cdef uint64_t n = 0
        cdef const uint32_t *row = self.contents(member, &n)
        return together_having(&self.table, group, row, n, 1)

    def new_each(self, const int64_t[::1] members not None, uint32_t group, int64_t[::1] out not None):
        """`new` of several members, written to `out`."""
        cdef int64_t i
        cdef uint64_t n = 0
        cdef const uint32_t *row
        if out.shape[0] != members.shape[0]:
            raise ValueError(f"out has room for {out.shape[0]} of {members.shape[0]} members")
        for i in range(members.shape[0]):
            row = self.contents(members[i], &n)
            out[i] = <int64_t>together_having(&self.table, group, row, n, 0)

    @property
    def pairs(self):
        """Contents over all groups, one in two groups counted twice."""
        return self.table.live

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

The hash index is exact for one reason. A search through trees in which nothing is stale, changed or
unsettled is a function of content alone, so a table may answer it; what it would have inserted is kept
in order (`pending`, and unstable nodes from `built` on) and replayed into the trees before the first
search that could meet something stale or changed (`stable_clean`, `touch_unstable`).

Callers hold one lock for each engine: nothing here is synchronised. Errors of the nogil functions are
return values: NO_MEMORY (bookkeeping does not fit) and NO_FRAME (the simulated RAM is used up).
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

from ksm._cy.contents cimport (
    BETWEEN, COUNTED, PAGES, SHARED, SHARING, UNSHARED, WITHIN, ZEROS, Contents, contents_free, contents_reserve,
    contents_visit)
from ksm._cy.page cimport page_compare, page_is_zero, prefix_key
from ksm._cy.rbtree cimport INDEX, VALUE_FLAG, Node, rb_erase, rb_insert, rb_is_red, rb_parent
from ksm._cy.table cimport (
    Table, table_clear, table_free, table_next, table_put, table_remove, table_reserve, table_start)
from ksm._cy.xxh3 cimport (
    XXH3_FORM_BEST, XXH3_FORM_NEON, XXH3_FORM_SCALAR, XXH3_FORM_SSE2, fingerprint_run_form, xxh3_128_best, xxh3_forms)
from ksm._cy.types cimport (
    CACHED, CHAIN, DIRTY, DUP, FIRST_FRAME, FREE_NODE, HASHED, HUGE, HUGE_ZERO, IN_NONE, IN_STABLE, IN_UNSTABLE, KSM, KSM_ZERO,
    LAZY, MIGRATING, NOTHING, OWNED, PLAIN, SLOTS, ZERO_PAGE, Block, Frame, Space, StableNode)

from ksm.errors import InvariantError, NoPageBytesError

cdef extern from *:
    """
    #define ctz64(x) __builtin_ctzll(x)
    #define popcount64(x) __builtin_popcountll(x)
    #define prefetch(p) __builtin_prefetch(p)
    #define bit_length64(x) ((x) ? 64 - __builtin_clzll(x) : 0)
    """
    int ctz64(uint64_t x) noexcept nogil
    void prefetch(const void *p) noexcept nogil
    int popcount64(uint64_t x) noexcept nogil
    int bit_length64(uint64_t x) noexcept nogil

cdef enum:
    NO_MEMORY = -1
    NO_FRAME = -2
    FINGERPRINT_BYTES = 16
    CHAIN_END = 0
    NO_SLOT = 0xffffffff
    # What an unstable search comes to when it does not find a slot.
    SEARCH_GIVEN_UP = 0xfffffffe    # no match, and the item has not joined
    NOT_FOUND = 0xffffffff          # no match; the item has joined
    SLICE = 65536           # visits between two looks for Ctrl-C

    # what scan() came to
    BUDGET_SPENT = 0
    PASS_ENDED = 1
    IDLE = 2


cdef struct Erased:         # an unstable node that left before it was built into its tree
    uint32_t node
    uint32_t after          # the number of nodes that had joined by then
    uint32_t frame          # pinned: holds the content that the node had


cdef inline uint64_t below(uint64_t n) noexcept nogil:
    """The mask of the bits under n, n <= 64."""
    return <uint64_t>-1 if n >= 64 else (<uint64_t>1 << n) - 1


cdef int grow(void **array, uint32_t *capacity, uint64_t wanted, size_t size) noexcept nogil:
    """Room for `wanted` elements, by half as much again; -1 and nothing changed if there is none."""
    cdef uint64_t roomy = capacity[0] + (capacity[0] >> 1) + 64
    cdef void *moved
    if wanted <= capacity[0]:
        return 0
    if roomy < wanted:
        roomy = wanted
    if roomy > INDEX:
        roomy = INDEX
        if wanted > roomy:
            return NO_MEMORY
    moved = realloc(array[0], roomy * size)
    if moved == NULL:
        return NO_MEMORY
    array[0] = moved
    capacity[0] = <uint32_t>roomy
    return 0


cdef inline uint64_t range_mask(uint64_t first, uint64_t vpn, uint64_t n) noexcept nogil:
    """The slots of the block that starts at `first` that lie in the n pages from vpn on."""
    cdef uint64_t low = vpn - first if vpn > first else 0
    cdef uint64_t high = vpn + n - first if vpn + n > first else 0
    if low >= SLOTS:
        return 0
    return below(high) & ~below(low)


class FramesExhausted(Exception):
    """The simulated RAM has no frame left; ksm.machine reclaims, or says who asked."""


@cython.final
cdef class Engine:
    """Frames, slots, rmap items and trees of one simulated machine, and ksmd's walk over them."""

    # Tunables, read at every visit; ksm.machine keeps them in step with sysfs.
    cdef public uint64_t max_page_sharing
    cdef public bint merge_across_nodes
    cdef public bint use_zero_pages
    cdef public bint smart_scan
    cdef public bint unmerging              # run is 2
    cdef public uint64_t prune_ticks        # stable_node_chains_prune_millisecs in ticks
    cdef public uint64_t tick               # virtual jiffies

    # Counters, named as the kernel's files.
    cdef readonly uint64_t pages_shared, pages_sharing, pages_unshared, rmap_items
    cdef readonly uint64_t stable_node_chains, stable_node_dups, ksm_zero_pages
    cdef readonly uint64_t full_scans, pages_scanned, pages_skipped, cow_ksm, ksm_swpin_copy

    # What a ksmd at work would have paid, for the cost model; and what this engine compared.
    cdef readonly uint64_t hashed, levels, merges, already, comparisons, bytes_compared

    cdef readonly uint64_t resident, swapped_pages
    cdef readonly uint64_t max_resident, max_swapped
    cdef readonly uint32_t page_size, nodes
    cdef readonly bint hash_index, fingerprints_only

    cdef uint32_t width                     # bytes of a content: page_size or FINGERPRINT_BYTES
    cdef uint32_t huge                      # slots of a huge page
    cdef bint gate_first, zero_giveback
    cdef list borrowed                      # keeps the buffers alive whose pages are mapped
    cdef uint8_t *zero                      # the content of the zero page
    cdef uint64_t zero_hash

    cdef Block **blocks
    cdef uint32_t block_count, block_capacity, free_blocks_count, free_blocks_capacity
    cdef uint32_t *free_blocks
    cdef Frame *frames
    cdef uint32_t frame_count, frame_capacity, free_frame
    cdef Space *spaces
    cdef uint32_t space_count, space_capacity
    cdef uint64_t born

    # Stable trees, one root a NUMA node.
    cdef StableNode *stable
    cdef uint32_t stable_count, stable_capacity, free_stable
    cdef Node *places
    cdef uint32_t place_count, place_capacity, free_place
    cdef uint32_t *stable_roots
    cdef uint64_t *stable_sizes
    cdef Table stable_table
    cdef uint32_t *pending                  # places to insert into their trees, in order
    cdef uint32_t pending_count, pending_capacity
    cdef uint64_t stale, unsettled, migrating
    cdef uint32_t migrating_first
    cdef uint64_t next_prune                # no chain is due before this tick
    cdef bint chains_due

    # Unstable trees of this pass.
    cdef Node *joined
    cdef uint8_t *joined_nid
    cdef uint32_t joined_count, joined_capacity, nid_capacity, built
    cdef uint32_t *unstable_roots
    cdef uint64_t *unstable_sizes
    cdef Table unstable_table
    cdef Erased *erased
    cdef uint32_t erased_count, erased_capacity, erased_done
    cdef bint unstable_changed              # something in the unstable trees changed: walk them
    cdef bint check_all                     # a shared frame became KSM: trust no unstable node

    # ksmd's position: the space (0: between passes) and the next page.
    cdef uint32_t cursor
    cdef uint64_t cursor_vpn

    def __cinit__(self, uint32_t page_size=4096, uint32_t nodes=1, bint hash_index=True, bint gate_first=True,
                  bint zero_giveback=True, uint64_t max_resident=0, uint64_t max_swapped=0):
        self.page_size = page_size
        self.nodes = nodes
        self.hash_index = hash_index
        self.gate_first = gate_first
        self.zero_giveback = zero_giveback
        self.max_resident = max_resident
        self.max_swapped = max_swapped
        self.width = page_size
        self.huge = page_size // 8
        self.borrowed = []
        self.max_page_sharing = 256
        self.merge_across_nodes = True
        self.zero = <uint8_t *>calloc(1, page_size)
        self.stable_roots = <uint32_t *>calloc(nodes, sizeof(uint32_t))
        self.unstable_roots = <uint32_t *>calloc(nodes, sizeof(uint32_t))
        self.stable_sizes = <uint64_t *>calloc(nodes, sizeof(uint64_t))
        self.unstable_sizes = <uint64_t *>calloc(nodes, sizeof(uint64_t))
        if (self.zero == NULL or self.stable_roots == NULL or self.unstable_roots == NULL
                or self.stable_sizes == NULL or self.unstable_sizes == NULL
                or grow(<void **>&self.frames, &self.frame_capacity, FIRST_FRAME, sizeof(Frame)) < 0
                or grow(<void **>&self.spaces, &self.space_capacity, 1, sizeof(Space)) < 0
                or grow(<void **>&self.stable, &self.stable_capacity, 1, sizeof(StableNode)) < 0
                or grow(<void **>&self.places, &self.place_capacity, 1, sizeof(Node)) < 0
                or grow(<void **>&self.joined, &self.joined_capacity, 1, sizeof(Node)) < 0
                or self.reserve() < 0):
            raise MemoryError("no memory for an empty machine")
        # Index 0 means "none" everywhere; these entries are never handed out.
        self.frame_count = FIRST_FRAME
        self.space_count = self.stable_count = self.place_count = 1
        self.joined_count = self.built = 1
        memset(&self.spaces[0], 0, sizeof(Space))
        memset(&self.stable[0], 0, sizeof(StableNode))
        memset(&self.places[0], 0, sizeof(Node))
        memset(&self.joined[0], 0, sizeof(Node))
        self.zero_hash = self.content_hash(self.zero)

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(FIRST_FRAME, self.frame_count):
            if self.frames[i].flags & OWNED:
                free(<void *>self.frames[i].data)
        for i in range(self.block_count):
            free(self.blocks[i])
        for i in range(self.space_count):
            free(self.spaces[i].blocks)
        free(self.blocks)
        free(self.free_blocks)
        free(self.frames)
        free(self.spaces)
        free(self.stable)
        free(self.places)
        free(self.joined)
        free(self.joined_nid)
        free(self.stable_roots)
        free(self.unstable_roots)
        free(self.stable_sizes)
        free(self.unstable_sizes)
        free(self.pending)
        free(self.erased)
        free(self.zero)
        table_free(&self.stable_table)
        table_free(&self.unstable_table)

    # ---- contents ----------------------------------------------------------------------------

    cdef uint64_t content_hash(self, const uint8_t *data) noexcept nogil:
        cdef uint64_t words[2]
        if self.fingerprints_only:
            memcpy(words, data, FINGERPRINT_BYTES)
        else:
            xxh3_128_best(data, self.page_size, words)
        return words[1]

    cdef uint64_t frame_hash(self, uint32_t f) noexcept nogil:
        """The frame's hash, computed once for a content."""
        cdef Frame *frame = &self.frames[f]
        if not frame.flags & HASHED:
            frame.hash = self.content_hash(frame.data)
            frame.flags |= HASHED
        return frame.hash

    cdef bint same_content(self, uint32_t f, uint32_t g) noexcept nogil:
        return (self.frames[f].data == self.frames[g].data or
                (self.frame_hash(f) == self.frame_hash(g) and
                 memcmp(self.frames[f].data, self.frames[g].data, self.width) == 0))

    cdef bint is_zero(self, uint32_t f) noexcept nogil:
        return (self.frames[f].data == self.zero or
                (self.frame_hash(f) == self.zero_hash and
                 memcmp(self.frames[f].data, self.zero, self.width) == 0))

    cdef int compare(self, const uint8_t *p, const uint8_t *q) noexcept nogil:
        """Byte order of two contents; counts what a ksmd would have compared."""
        cdef size_t where
        cdef int order = page_compare(p, q, self.width, &where)
        self.comparisons += 1
        self.bytes_compared += where + (order != 0)
        return order

    cdef int compare_at(self, uint64_t prefix, const uint8_t *data, const Node *node, const uint8_t *other) noexcept nogil:
        """`compare` for a node whose prefix is up to date: most end without touching its page."""
        cdef uint64_t differ = prefix ^ node.prefix
        if differ:
            self.comparisons += 1
            self.bytes_compared += 8 - ((bit_length64(differ) - 1) >> 3)
            return -1 if prefix < node.prefix else 1
        return self.compare(data, other)

    # ---- frames ------------------------------------------------------------------------------

    cdef uint32_t frame_new(self, const uint8_t *data, uint8_t flags, uint8_t nid) noexcept nogil:
        """A resident frame with one mapper; 0: no memory for the bookkeeping. The caller checked `has_room`."""
        cdef uint32_t f = self.free_frame
        cdef Frame *frame
        if f:
            self.free_frame = self.frames[f].node
        else:
            if grow(<void **>&self.frames, &self.frame_capacity, <uint64_t>self.frame_count + 1, sizeof(Frame)) < 0:
                return 0
            f = self.frame_count
            self.frame_count += 1
        frame = &self.frames[f]
        frame.data = data
        frame.flags = flags
        frame.nid = nid
        frame.mappers = 1
        frame.swapped = frame.pins = frame.node = frame.home = 0
        self.resident += 1
        return f

    cdef uint32_t frame_copy(self, uint32_t f, uint8_t nid) noexcept nogil:
        """A resident copy of `f` with its own data; 0: no memory."""
        cdef uint8_t *data = <uint8_t *>malloc(self.width)
        cdef uint32_t copy
        if data == NULL:
            return 0
        memcpy(data, self.frames[f].data if f else self.zero, self.width)
        copy = self.frame_new(data, OWNED, nid)
        if copy == 0:
            free(data)
        return copy

    cdef bint has_room(self, uint64_t frames=1) noexcept nogil:
        return self.max_resident == 0 or self.resident + frames <= self.max_resident

    cdef void frame_release(self, uint32_t f) noexcept nogil:
        """Free the record when nothing refers to the content any more."""
        cdef Frame *frame = &self.frames[f]
        if frame.mappers or frame.swapped or frame.pins:
            return
        if frame.flags & OWNED:
            free(<void *>frame.data)
        frame.data = NULL
        frame.flags = 0
        frame.node = self.free_frame
        self.free_frame = f

    cdef void frame_unpin(self, uint32_t f) noexcept nogil:
        self.frames[f].pins -= 1
        self.frame_release(f)

    cdef void frame_unmap(self, uint32_t f) noexcept nogil:
        """One mapper less; without any the frame is not resident, no longer KSM, and its stable node stale."""
        cdef Frame *frame = &self.frames[f]
        frame.mappers -= 1
        if frame.mappers:
            return
        self.resident -= 1
        if frame.flags & KSM:
            frame.flags &= ~KSM
            if frame.node:
                self.stable[frame.node].stale = 1
                self.stale += 1
        self.frame_release(f)

    # ---- blocks and slots ----------------------------------------------------------------------

    cdef inline Block *block_of(self, uint32_t slot) noexcept nogil:
        return self.blocks[slot >> 6]

    cdef inline uint32_t slot_frame(self, uint32_t slot) noexcept nogil:
        return self.blocks[slot >> 6].frame[slot & 63]

    cdef inline bint mergeable(self, uint32_t slot) noexcept nogil:
        """Whether the slot maps an anonymous frame in a marked VMA now."""
        cdef Block *b = self.blocks[slot >> 6]
        return ((b.anon & b.marked) >> (slot & 63)) & 1

    cdef uint32_t find_block(self, const Space *space, uint64_t vpn) noexcept nogil:
        """Position in space.blocks of the first block that ends after vpn. O(log n)."""
        cdef uint32_t low = 0, high = space.count, middle
        if high and self.blocks[space.blocks[high - 1]].vpn + SLOTS <= vpn:
            return high
        while low < high:
            middle = (low + high) >> 1
            if self.blocks[space.blocks[middle]].vpn + SLOTS <= vpn:
                low = middle + 1
            else:
                high = middle
        return low

    cdef uint32_t find_slot(self, uint32_t mm, uint64_t vpn) noexcept nogil:
        """The slot at vpn; NO_SLOT when no block covers it."""
        cdef Space *space = &self.spaces[mm]
        cdef uint32_t at = self.find_block(space, vpn)
        if at == space.count or self.blocks[space.blocks[at]].vpn > vpn:
            return NO_SLOT
        return space.blocks[at] << 6 | <uint32_t>(vpn & 63)

    cdef uint32_t make_slot(self, uint32_t mm, uint64_t vpn) noexcept nogil:
        """The slot at vpn, with a new block if need be; NO_SLOT: no memory."""
        cdef Space *space = &self.spaces[mm]
        cdef uint32_t at = self.find_block(space, vpn), id
        cdef Block *b
        if at < space.count and self.blocks[space.blocks[at]].vpn <= vpn:
            return space.blocks[at] << 6 | <uint32_t>(vpn & 63)
        if grow(<void **>&space.blocks, &space.capacity, <uint64_t>space.count + 1, sizeof(uint32_t)) < 0:
            return NO_SLOT
        if self.free_blocks_count:
            b = self.blocks[self.free_blocks[self.free_blocks_count - 1]]
            self.free_blocks_count -= 1
            id = self.free_blocks[self.free_blocks_count]
        else:
            if (self.block_count >= VALUE_FLAG >> 6 or
                    grow(<void **>&self.blocks, &self.block_capacity, <uint64_t>self.block_count + 1,
                         sizeof(Block *)) < 0 or
                    grow(<void **>&self.free_blocks, &self.free_blocks_capacity, <uint64_t>self.block_count + 1,
                         sizeof(uint32_t)) < 0):
                return NO_SLOT
            b = <Block *>malloc(sizeof(Block))
            if b == NULL:
                return NO_SLOT
            id = self.block_count
            self.blocks[id] = b
            self.block_count += 1
        memset(b, 0, sizeof(Block))
        b.vpn = vpn & ~<uint64_t>63
        b.mm = mm
        cdef uint32_t i = space.count
        while i > at:
            space.blocks[i] = space.blocks[i - 1]
            i -= 1
        space.blocks[at] = id
        space.count += 1
        return id << 6 | <uint32_t>(vpn & 63)

    cdef void sweep_blocks(self, uint32_t mm) noexcept nogil:
        """Give back the blocks that hold neither a slot nor an item. O(blocks of the space)."""
        cdef Space *space = &self.spaces[mm]
        cdef uint32_t i, kept = 0, id
        for i in range(space.count):
            id = space.blocks[i]
            if self.blocks[id].used or self.blocks[id].item:
                space.blocks[kept] = id
                kept += 1
            else:
                self.blocks[id].mm = 0
                self.free_blocks[self.free_blocks_count] = id
                self.free_blocks_count += 1
        space.count = kept

    cdef void set_slot(self, uint32_t slot, uint32_t frame, bint anon) noexcept nogil:
        """Store what a slot maps; the frames' mappers are the caller's business."""
        cdef Block *b = self.blocks[slot >> 6]
        cdef uint32_t i = slot & 63
        cdef uint64_t bit = <uint64_t>1 << i
        b.used += (frame != NOTHING) - (b.frame[i] != NOTHING)
        b.frame[i] = frame
        if frame >= FIRST_FRAME and self.frames[frame].home == 0:
            self.frames[frame].home = <uint32_t>(b.vpn + i)
        b.anon = b.anon | bit if anon else b.anon & ~bit
        b.settled &= ~bit
        b.clean &= ~bit

    cdef void mark_slot(self, uint32_t slot, bint marked) noexcept nogil:
        cdef Block *b = self.blocks[slot >> 6]
        cdef uint64_t bit = <uint64_t>1 << (slot & 63)
        b.marked = b.marked | bit if marked else b.marked & ~bit

    cdef void vacate(self, uint32_t slot) noexcept nogil:
        """Take whatever the slot maps away from it (unmap, or before something else is mapped)."""
        cdef uint32_t f = self.slot_frame(slot)
        cdef Block *b = self.blocks[slot >> 6]
        if f == NOTHING:
            return
        self.touch_unstable(slot)
        if f == KSM_ZERO:
            self.ksm_zero_pages -= 1
            self.spaces[b.mm].zero_pages -= 1
            self.set_slot(slot, NOTHING, False)
        elif f < FIRST_FRAME:
            self.set_slot(slot, NOTHING, False)
        elif (b.anon >> (slot & 63)) & 1:
            self.set_slot(slot, NOTHING, False)
            self.frame_unmap(f)
        else:
            self.set_slot(slot, NOTHING, False)
            self.swap_drop(f)

    cdef void swap_drop(self, uint32_t f) noexcept nogil:
        """One swapped slot less refers to f."""
        self.frames[f].swapped -= 1
        if self.frames[f].swapped == 0:
            self.frames[f].flags &= ~CACHED
            self.swapped_pages -= 1
        self.frame_release(f)

    cdef void remap(self, uint32_t slot, uint32_t frame) noexcept nogil:
        """Make an anonymous slot map another frame, which gains a mapper."""
        cdef uint32_t old = self.slot_frame(slot)
        self.touch_unstable(slot)
        if not (self.blocks[slot >> 6].clean >> (slot & 63)) & 1:
            self.frames[old].flags |= DIRTY
        self.frames[frame].mappers += 1
        self.set_slot(slot, frame, True)
        self.blocks[slot >> 6].clean |= <uint64_t>1 << (slot & 63)
        self.frame_unmap(old)

    # ---- rmap items ----------------------------------------------------------------------------

    cdef void hang(self, uint32_t slot, uint32_t n) noexcept nogil:
        """Put the slot's item, which is in no tree, on the stable node n."""
        cdef Block *b = self.blocks[slot >> 6]
        cdef uint32_t i = slot & 63, first = self.stable[n].first
        b.state[i] = IN_STABLE
        b.link[i] = n
        b.prev[i] = NO_SLOT
        b.next[i] = NO_SLOT
        b.settled |= <uint64_t>1 << i
        if self.stable[n].count:
            self.blocks[first >> 6].prev[first & 63] = slot
            b.next[i] = first
            self.pages_sharing += 1
        else:
            self.pages_shared += 1
        self.stable[n].first = slot
        self.set_count(n, self.stable[n].count + 1)
        self.spaces[b.mm].merging += 1

    cdef void unhang(self, uint32_t slot) noexcept nogil:
        """Take the slot's item off its stable node."""
        cdef Block *b = self.blocks[slot >> 6]
        cdef uint32_t i = slot & 63, n = b.link[i], prev = b.prev[i], next = b.next[i]
        if prev != NO_SLOT:
            self.blocks[prev >> 6].next[prev & 63] = next
        else:
            self.stable[n].first = next
        if next != NO_SLOT:
            self.blocks[next >> 6].prev[next & 63] = prev
        b.state[i] = IN_NONE
        b.settled &= ~(<uint64_t>1 << i)
        self.spaces[b.mm].merging -= 1
        if self.stable[n].count > 1:
            self.pages_sharing -= 1
        else:
            self.pages_shared -= 1
        self.set_count(n, self.stable[n].count - 1)

    cdef void leave_tree(self, uint32_t slot) noexcept nogil:
        """The slot's item leaves the tree that it is in; a stale stable node goes with all its items."""
        cdef Block *b = self.blocks[slot >> 6]
        cdef uint32_t i = slot & 63
        if b.state[i] == IN_STABLE:
            if self.stable[b.link[i]].stale:
                self.drop_node(b.link[i])
            else:
                self.unhang(slot)
        elif b.state[i] >= IN_UNSTABLE:
            if b.state[i] == self.unstable_state():
                self.unstable_erase(b.link[i])
            b.state[i] = IN_NONE
            self.pages_unshared -= 1

    cdef void drop_items(self, Block *b, uint32_t id, uint64_t mask) noexcept nogil:
        """Drop the items of a block's slots in mask, in ascending order."""
        cdef uint64_t bits = b.item & mask
        cdef int dropped = popcount64(bits)
        cdef int i
        while bits:
            i = ctz64(bits)
            bits &= bits - 1
            self.leave_tree(id << 6 | <uint32_t>i)
            b.item &= ~(<uint64_t>1 << i)
        self.rmap_items -= dropped
        self.spaces[b.mm].items -= dropped

    # ---- stable trees --------------------------------------------------------------------------

    cdef inline bint candidate(self, uint32_t n, uint32_t more=0) noexcept nogil:
        """Whether the node, `more` items fuller, can take another one."""
        return self.stable[n].count > 0 and self.stable[n].count + more < self.max_page_sharing

    cdef void set_count(self, uint32_t n, uint32_t count) noexcept nogil:
        cdef bint before = self.candidate(n)
        self.stable[n].count = count
        if self.stable[n].kind == DUP:
            self.stable[self.stable[n].owner].candidates += self.candidate(n) - <int>before
            self.settle(self.stable[n].owner)

    cdef void settle(self, uint32_t chain) noexcept nogil:
        """Note whether a walk through the chain could change it.

        None does with two dups or more of which none, or only the head, can take an item.
        """
        cdef StableNode *c = &self.stable[chain]
        cdef bint unsettled = not (c.count >= 2 and (c.candidates == 0 or
                                                     (c.candidates == 1 and self.candidate(c.first))))
        self.unsettled += unsettled - <int>c.unsettled
        c.unsettled = unsettled

    cdef uint32_t new_stable(self, uint8_t kind, uint8_t nid, uint64_t hash) noexcept nogil:
        """An empty stable node or chain; `reserve` went before."""
        cdef uint32_t n = self.free_stable
        if n:
            self.free_stable = self.stable[n].next
        else:
            n = self.stable_count
            self.stable_count += 1
        memset(&self.stable[n], 0, sizeof(StableNode))
        self.stable[n].kind = kind
        self.stable[n].nid = nid
        self.stable[n].hash = hash
        return n

    cdef void free_stable_node(self, uint32_t n) noexcept nogil:
        self.stable[n].kind = FREE_NODE
        self.stable[n].next = self.free_stable
        self.free_stable = n

    cdef inline uint64_t table_key(self, uint64_t hash, uint8_t nid) noexcept nogil:
        return hash ^ (<uint64_t>nid * 0x9e3779b97f4a7c15u)

    cdef const uint8_t *place_content(self, uint32_t place) noexcept nogil:
        """The content of a tree place; a chain there must not be empty."""
        cdef uint32_t n = self.places[place].value
        if self.stable[n].kind == CHAIN:
            n = self.stable[n].first
        return self.frames[self.stable[n].frame].data

    cdef void erase_place(self, uint32_t n) noexcept nogil:
        """Take the plain node or chain n out of its tree."""
        cdef uint32_t place = self.stable[n].owner, nid = self.stable[n].nid
        rb_erase(self.places, &self.stable_roots[nid], place)
        self.stable_sizes[nid] -= 1
        if self.hash_index:
            table_remove(&self.stable_table, self.table_key(self.stable[n].hash, self.stable[n].nid), place)
        self.places[place].left = self.free_place
        self.free_place = place

    cdef void leave_chain(self, uint32_t n) noexcept nogil:
        """Take the dup n out of its chain, which may be left empty."""
        cdef StableNode *node = &self.stable[n]
        cdef StableNode *chain = &self.stable[node.owner]
        if node.prev != CHAIN_END:
            self.stable[node.prev].next = node.next
        else:
            chain.first = node.next
        if node.next != CHAIN_END:
            self.stable[node.next].prev = node.prev
        chain.candidates -= self.candidate(n)
        chain.count -= 1
        self.stable_node_dups -= 1
        self.settle(node.owner)

    cdef void enter_chain(self, uint32_t n, uint32_t chain) noexcept nogil:
        """Put n at the head of the chain."""
        cdef StableNode *node = &self.stable[n]
        cdef StableNode *c = &self.stable[chain]
        node.kind = DUP
        node.owner = chain
        node.nid = c.nid
        node.prev = CHAIN_END
        node.next = c.first
        if c.first != CHAIN_END:
            self.stable[c.first].prev = n
        c.first = n
        c.count += 1
        c.candidates += self.candidate(n)
        self.stable_node_dups += 1
        self.settle(chain)

    cdef void free_chain(self, uint32_t chain) noexcept nogil:
        """The record of a chain that is out of the tree."""
        self.unsettled -= self.stable[chain].unsettled
        self.stable_node_chains -= 1
        self.free_stable_node(chain)

    cdef void detach_node(self, uint32_t n) noexcept nogil:
        """Take a stable node out of its tree, chain or the migrating list."""
        cdef StableNode *node = &self.stable[n]
        self.build_stable()
        if node.kind == DUP:
            self.leave_chain(n)
        elif node.kind == PLAIN:
            self.erase_place(n)
        elif node.kind == MIGRATING:
            if node.prev:
                self.stable[node.prev].next = node.next
            else:
                self.migrating_first = node.next
            if node.next:
                self.stable[node.next].prev = node.prev
            self.migrating -= 1

    cdef void drop_node(self, uint32_t n) noexcept nogil:
        """Forget a stable node with all its items."""
        cdef uint32_t frame = self.stable[n].frame
        while self.stable[n].count:
            self.unhang(self.stable[n].first)
        self.detach_node(n)
        self.stale -= self.stable[n].stale
        self.frames[frame].node = 0
        self.frame_unpin(frame)
        self.free_stable_node(n)

    cdef uint32_t choose(self, uint32_t n, bint prune) noexcept nogil:
        """The node that stands for tree place n (plain or chain) on a walk; 0: the tree changed, start again."""
        cdef StableNode *chain = &self.stable[n]
        cdef uint32_t dup, next, best = 0
        if chain.kind == PLAIN:
            if chain.stale:
                self.drop_node(n)
                return 0
            return n
        prune = prune and self.tick >= chain.prune_tick + self.prune_ticks
        if prune:
            chain.prune_tick = self.tick
        dup = chain.first
        while dup != CHAIN_END:
            next = self.stable[dup].next
            if self.stable[dup].stale:
                self.drop_node(dup)
            elif self.candidate(dup) and (best == 0 or self.stable[dup].count > self.stable[best].count):
                best = dup
                if not prune:
                    break
            dup = next
        if chain.count == 0:
            self.build_stable()
            self.erase_place(n)
            self.free_chain(n)
            return 0
        if chain.count == 1:
            return self.collapse(n)
        if best and best != chain.first and self.candidate(best, 1):
            self.leave_chain(best)
            self.enter_chain(best, n)
        return best if best else chain.first

    cdef uint32_t collapse(self, uint32_t chain) noexcept nogil:
        """A chain of one dup: the dup takes the tree place itself."""
        cdef uint32_t dup = self.stable[chain].first, place = self.stable[chain].owner
        self.leave_chain(dup)
        self.stable[dup].kind = PLAIN
        self.stable[dup].owner = place
        self.places[place].value = dup
        self.free_chain(chain)
        return dup

    cdef bint stable_clean(self) noexcept nogil:
        """Whether a search through the stable trees depends on contents alone."""
        return (self.hash_index and self.stale == 0 and self.unsettled == 0 and self.migrating == 0
                and not self.chains_due)

    cdef uint32_t stable_lookup(self, uint32_t f, uint8_t nid) noexcept nogil:
        """The tree place with f's content, from the table; 0: none."""
        cdef uint64_t hash = self.frame_hash(f), key = self.table_key(hash, nid)
        cdef uint64_t at = table_start(&self.stable_table, key)
        cdef uint32_t place, n
        while True:
            place = table_next(&self.stable_table, key, &at)
            if place == 0:
                return 0
            n = self.places[place].value
            if (self.stable[n].hash == hash and self.stable[n].nid == nid and
                    memcmp(self.place_content(place), self.frames[f].data, self.width) == 0):
                return place

    cdef uint32_t stable_walk(self, uint32_t f, uint8_t nid, bint prune, uint32_t *parent, bint *left) noexcept nogil:
        """The tree place with f's content, by walking; 0: none, and where a new one would hang.

        Everything on the path is walked as a match would be: stale nodes go, chains collapse or reorder.
        """
        cdef const uint8_t *data = self.frames[f].data
        cdef uint64_t prefix = prefix_key(data)
        cdef bint quiet
        cdef uint32_t place, n
        cdef int order
        self.build_stable()
        while True:
            quiet = self.stable_clean()
            parent[0] = 0
            left[0] = False
            place = self.stable_roots[nid]
            n = 1
            while place:
                if not quiet:
                    n = self.choose(self.places[place].value, prune)
                    if n == 0:
                        break
                order = self.compare_at(prefix, data, &self.places[place], self.place_content(place))
                if order == 0:
                    return place
                parent[0] = place
                left[0] = order < 0
                place = self.places[place].left if order < 0 else self.places[place].right
            if n:
                return 0

    cdef void build_stable(self) noexcept nogil:
        """Insert the pending places into their trees, in the order in which they came."""
        cdef uint32_t i, place, at, parent
        cdef uint8_t nid
        cdef bint left
        cdef int order
        cdef const uint8_t *data
        for i in range(self.pending_count):
            place = self.pending[i]
            nid = self.stable[self.places[place].value].nid
            data = self.place_content(place)
            at = self.stable_roots[nid]
            parent = 0
            left = False
            while at:
                order = self.compare_at(self.places[place].prefix, data, &self.places[at], self.place_content(at))
                parent = at
                left = order < 0
                at = self.places[at].left if left else self.places[at].right
            rb_insert(self.places, &self.stable_roots[nid], place, parent, left)
        self.pending_count = 0

    cdef uint32_t stable_search(self, uint32_t f, uint8_t nid) noexcept nogil:
        """Visit's search: the stable node that can take an item with f's content; 0: none."""
        cdef uint32_t place, parent, n
        cdef bint left
        self.levels += bit_length64(self.stable_sizes[nid])
        if self.stable_clean():
            place = self.stable_lookup(f, nid)
        else:
            place = self.stable_walk(f, nid, True, &parent, &left)
        if place == 0:
            return 0
        n = self.choose(self.places[place].value, True)
        return n if n and self.candidate(n) else 0

    cdef uint32_t stable_insert(self, uint32_t f, uint8_t nid) noexcept nogil:
        """Make a stable node for the KSM frame f; the same content in the tree makes it a dup."""
        cdef uint32_t n = self.new_stable(PLAIN, nid, self.frame_hash(f)), place, parent = 0
        cdef bint left = False, clean
        self.levels += bit_length64(self.stable_sizes[nid])
        clean = self.stable_clean()
        if clean:
            place = self.stable_lookup(f, nid)
        else:
            place = self.stable_walk(f, nid, False, &parent, &left)
        self.stable[n].frame = f
        self.frames[f].node = n
        self.frames[f].pins += 1
        if place:
            self.add_dup(n, place)
        else:
            self.add_place(n, clean, parent, left)
        return n

    cdef void add_dup(self, uint32_t n, uint32_t place) noexcept nogil:
        """Make n the head of the chain at a tree place, which is made if need be."""
        cdef uint32_t other = self.places[place].value, chain
        if self.stable[other].kind == CHAIN:
            self.enter_chain(n, other)
            return
        chain = self.new_stable(CHAIN, self.stable[other].nid, self.stable[other].hash)
        self.stable[chain].owner = place
        self.stable[chain].prune_tick = self.tick
        self.stable_node_chains += 1
        self.next_prune = min(self.next_prune, self.tick + self.prune_ticks)
        self.places[place].value = chain
        self.enter_chain(other, chain)
        self.enter_chain(n, chain)

    cdef void add_place(self, uint32_t n, bint later, uint32_t parent, bint left) noexcept nogil:
        """Give n a tree place of its own, now or when the tree is next built."""
        cdef uint32_t place = self.free_place
        cdef uint8_t nid = self.stable[n].nid
        if place:
            self.free_place = self.places[place].left
        else:
            place = self.place_count
            self.place_count += 1
        self.stable[n].kind = PLAIN
        self.stable[n].owner = place
        self.places[place].value = n
        self.places[place].prefix = prefix_key(self.frames[self.stable[n].frame].data)
        self.stable_sizes[nid] += 1
        if later:
            self.pending[self.pending_count] = place
            self.pending_count += 1
        else:
            rb_insert(self.places, &self.stable_roots[nid], place, parent, left)
        if self.hash_index:
            table_put(&self.stable_table, self.table_key(self.stable[n].hash, nid), place)

    # ---- unstable trees ------------------------------------------------------------------------

    cdef inline uint8_t unstable_state(self) noexcept nogil:
        """The state of items that joined in this pass."""
        return <uint8_t>(IN_UNSTABLE + (self.full_scans & 1))

    cdef inline uint8_t nid_of_joined(self, uint32_t node) noexcept nogil:
        return self.joined_nid[node] if self.nodes > 1 else 0

    cdef void clear_unstable(self) noexcept nogil:
        """Empty the unstable trees: a pass begins."""
        cdef uint32_t i
        for i in range(self.erased_count):
            self.frame_unpin(self.erased[i].frame)
        self.erased_count = self.erased_done = 0
        self.joined_count = self.built = 1
        self.unstable_changed = self.check_all = False
        table_clear(&self.unstable_table)
        for i in range(self.nodes):
            self.unstable_roots[i] = 0
            self.unstable_sizes[i] = 0

    cdef void unstable_erase(self, uint32_t node) noexcept nogil:
        """Take a node out of its unstable tree, or note that it is to leave when the tree is built."""
        cdef uint32_t frame
        cdef uint8_t nid = self.nid_of_joined(node)
        self.unstable_sizes[nid] -= 1
        if node < self.built:
            rb_erase(self.joined, &self.unstable_roots[nid], node)
            return
        frame = self.slot_frame(self.joined[node].value)
        self.frames[frame].pins += 1
        self.erased[self.erased_count].node = node
        self.erased[self.erased_count].after = self.joined_count
        self.erased[self.erased_count].frame = frame
        self.erased_count += 1
        self.joined[node].value = VALUE_FLAG | frame    # where its content is, for build_unstable

    cdef void touch_unstable(self, uint32_t slot) noexcept nogil:
        """To be called before a slot changes: if its item is in an unstable tree, shape matters from now on."""
        cdef Block *b = self.blocks[slot >> 6]
        if b.state[slot & 63] == self.unstable_state():
            self.build_unstable()
            self.unstable_changed = True
            self.joined[b.link[slot & 63]].value |= VALUE_FLAG

    cdef void build_unstable(self) noexcept nogil:
        """Insert and erase what joined and left since the trees were last built, in that order."""
        while self.built < self.joined_count:
            while self.erased_done < self.erased_count and self.erased[self.erased_done].after <= self.built:
                self.erase_built(self.erased_done)
            self.build_joined(self.built)
            self.built += 1
        while self.erased_done < self.erased_count:
            self.erase_built(self.erased_done)

    cdef void erase_built(self, uint32_t i) noexcept nogil:
        cdef uint32_t node = self.erased[i].node
        rb_erase(self.joined, &self.unstable_roots[self.nid_of_joined(node)], node)
        self.erased_done += 1

    cdef void build_joined(self, uint32_t node) noexcept nogil:
        """Insert a node while nothing in the tree has changed."""
        cdef const uint8_t *data = self.joined_content(node)
        cdef uint32_t *root = &self.unstable_roots[self.nid_of_joined(node)]
        cdef uint32_t at = root[0], parent = 0
        cdef bint left = False
        cdef int order
        while at:
            order = self.compare_at(self.joined[node].prefix, data, &self.joined[at], self.joined_content(at))
            parent = at
            left = order < 0
            at = self.joined[at].left if left else self.joined[at].right
        rb_insert(self.joined, root, node, parent, left)

    cdef const uint8_t *joined_content(self, uint32_t node) noexcept nogil:
        """What an unchanged or noted-as-erased node holds."""
        cdef uint32_t value = self.joined[node].value
        return self.frames[value & INDEX if value & VALUE_FLAG else self.slot_frame(value)].data

    cdef uint32_t unstable_search(self, uint32_t slot, uint32_t f, uint8_t nid) noexcept nogil:
        """Visit's search: the slot with f's content in the unstable tree, or SEARCH_GIVEN_UP or NOT_FOUND."""
        self.levels += bit_length64(self.unstable_sizes[nid])
        if self.hash_index and not self.unstable_changed:
            return self.unstable_lookup(slot, f, nid)
        return self.unstable_walk(slot, f, nid)

    cdef uint32_t unstable_lookup(self, uint32_t slot, uint32_t f, uint8_t nid) noexcept nogil:
        """`unstable_search` by the table, while nothing in the trees has changed."""
        cdef uint64_t hash = self.frame_hash(f), key = self.table_key(hash, nid)
        cdef uint64_t at = table_start(&self.unstable_table, key)
        cdef uint32_t node, other, g
        while True:
            node = table_next(&self.unstable_table, key, &at)
            if node == 0:
                break
            other = self.joined[node].value
            if other & VALUE_FLAG or self.nid_of_joined(node) != nid:
                continue
            g = self.slot_frame(other)
            if g == f:
                return SEARCH_GIVEN_UP
            if self.same_content(f, g):
                return other
        node = self.join(slot, f, nid)
        table_put(&self.unstable_table, key, node)
        return NOT_FOUND

    cdef uint32_t join(self, uint32_t slot, uint32_t f, uint8_t nid) noexcept nogil:
        """Make the slot's item an unstable node, which is not linked yet."""
        cdef Block *b = self.blocks[slot >> 6]
        cdef uint32_t node = self.joined_count
        self.joined_count += 1
        self.joined[node].value = slot
        self.joined[node].prefix = prefix_key(self.frames[f].data)
        if self.nodes > 1:
            self.joined_nid[node] = nid
        b.state[slot & 63] = self.unstable_state()
        b.link[slot & 63] = node
        self.unstable_sizes[nid] += 1
        self.pages_unshared += 1
        return node

    cdef uint32_t unstable_walk(self, uint32_t slot, uint32_t f, uint8_t nid) noexcept nogil:
        """`unstable_search` by walking the tree as it is, compared by the contents of now."""
        cdef const uint8_t *data = self.frames[f].data
        cdef uint64_t prefix = prefix_key(data)
        cdef uint32_t at = self.unstable_roots[nid], parent = 0, other, g, node
        cdef bint left = False
        cdef int order
        while at:
            other = self.joined[at].value & INDEX
            if self.joined[at].value & VALUE_FLAG or self.check_all:
                if not self.mergeable(other):
                    return SEARCH_GIVEN_UP
                g = self.slot_frame(other)
                if g == f:
                    return SEARCH_GIVEN_UP
                order = self.compare(data, self.frames[g].data)
            else:
                g = self.slot_frame(other)
                if g == f:
                    return SEARCH_GIVEN_UP
                order = self.compare_at(prefix, data, &self.joined[at], self.frames[g].data)
            if order == 0:
                if self.frames[g].flags & KSM or not self.merge_across_nodes and self.frames[g].nid != nid:
                    return SEARCH_GIVEN_UP
                return other
            parent = at
            left = order < 0
            at = self.joined[at].left if left else self.joined[at].right
        node = self.join(slot, f, nid)
        rb_insert(self.joined, &self.unstable_roots[nid], node, parent, left)
        self.built = self.joined_count
        return NOT_FOUND

    # ---- one visit -----------------------------------------------------------------------------

    cdef int reserve(self) noexcept nogil:
        """Room for whatever one visit may add, so that a visit cannot fail half-way."""
        if self.stable_count + 2 > self.stable_capacity:
            if grow(<void **>&self.stable, &self.stable_capacity, <uint64_t>self.stable_count + 2,
                    sizeof(StableNode)) < 0:
                return NO_MEMORY
        if self.place_count + 1 > self.place_capacity:
            if grow(<void **>&self.places, &self.place_capacity, <uint64_t>self.place_count + 1, sizeof(Node)) < 0:
                return NO_MEMORY
        if self.joined_count + 1 > self.joined_capacity:
            if grow(<void **>&self.joined, &self.joined_capacity, <uint64_t>self.joined_count + 1, sizeof(Node)) < 0:
                return NO_MEMORY
        if self.nodes > 1 and self.joined_count + 1 > self.nid_capacity:
            if grow(<void **>&self.joined_nid, &self.nid_capacity, <uint64_t>self.joined_count + 1, 1) < 0:
                return NO_MEMORY
        if self.erased_count + 1 > self.erased_capacity:
            if grow(<void **>&self.erased, &self.erased_capacity, <uint64_t>self.erased_count + 1,
                    sizeof(Erased)) < 0:
                return NO_MEMORY
        if self.pending_count + 1 > self.pending_capacity:
            if grow(<void **>&self.pending, &self.pending_capacity, <uint64_t>self.pending_count + 1,
                    sizeof(uint32_t)) < 0:
                return NO_MEMORY
        if table_reserve(&self.stable_table, 1) < 0 or table_reserve(&self.unstable_table, 1) < 0:
            return NO_MEMORY
        return 0

    cdef bint skip(self, Block *b, uint32_t i) noexcept nogil:
        """Smart scan: age the item of a slot that maps no KSM frame; whether this visit is skipped."""
        cdef uint8_t age = b.age[i]
        if self.frames[b.frame[i]].flags & KSM:
            return False
        if age < 255:
            b.age[i] = age + 1
        if age < 3:
            return False
        if b.skips[i] == 0:
            b.skips[i] = 1 if age <= 3 else 2 if age <= 5 else 4 if age <= 8 else 8
            return False
        b.skips[i] -= 1
        self.pages_skipped += 1
        return True

    cdef void visit(self, uint32_t slot) noexcept nogil:
        """Everything that ksmd does at one slot, whose item exists."""
        cdef Block *b = self.blocks[slot >> 6]
        cdef uint32_t f = b.frame[slot & 63]
        cdef uint8_t nid = 0 if self.merge_across_nodes else self.frames[f].nid
        if self.frames[f].flags & KSM:
            self.visit_ksm(slot, f, nid)
            return
        self.frames[f].pins += 1
        self.visit_frame(slot, f, nid)
        self.frame_unpin(f)

    cdef void visit_frame(self, uint32_t slot, uint32_t f, uint8_t nid) noexcept nogil:
        """A visit to a slot that maps an ordinary frame, pinned by the caller: it may be merged away meanwhile."""
        cdef Block *b = self.blocks[slot >> 6]
        cdef uint32_t i = slot & 63, n = 0, sum
        if self.gate_first:
            self.leave_tree(slot)
        else:
            n = self.stable_search(f, nid)
            self.leave_tree(slot)
            if n:
                self.merge_with(slot, n)
                return
        self.hashed += 1
        sum = <uint32_t>(self.frame_hash(f) >> 32)
        if b.checksum[i] != sum:
            b.checksum[i] = sum
            return
        if self.use_zero_pages and self.is_zero(f):
            if self.split_huge(slot):
                self.merge_with_zero(slot)
                return
            # The split gave the page back under ksmd's hands, which goes on searching with what it held.
            self.build_unstable()
            self.unstable_changed = True
        if self.gate_first:
            n = self.stable_search(f, nid)
            if n:
                self.merge_with(slot, n)
                return
        n = self.unstable_search(slot, f, nid)
        if n < SEARCH_GIVEN_UP:
            self.merge_two(slot, n, nid)
        elif n == NOT_FOUND and self.slot_frame(slot) != f:
            self.touch_unstable(slot)

    cdef void visit_ksm(self, uint32_t slot, uint32_t f, uint8_t nid) noexcept nogil:
        """A visit to a slot that maps a KSM frame: hang its item on the frame's node, even a full one."""
        cdef Block *b = self.blocks[slot >> 6]
        cdef uint32_t i = slot & 63, n = self.frames[f].node
        if not self.merge_across_nodes and self.stable[n].kind != MIGRATING and self.stable[n].nid != nid:
            self.start_migrating(n)
        if self.stable[n].kind == MIGRATING:
            n = self.place_migrating(slot, n, nid)
        if b.state[i] == IN_STABLE and b.link[i] == n:
            self.already += 1
            return
        self.leave_tree(slot)
        if n:
            if self.slot_frame(slot) != self.stable[n].frame:
                self.remap(slot, self.stable[n].frame)
            self.merges += 1
            self.hang(slot, n)

    cdef void merge_with(self, uint32_t slot, uint32_t n) noexcept nogil:
        """Map the stable node's frame in place of the slot's, which has the same content."""
        if self.slot_frame(slot) < FIRST_FRAME or not self.split_huge(slot):
            return
        self.merges += 1
        self.remap(slot, self.stable[n].frame)
        self.hang(slot, n)

    cdef void merge_with_zero(self, uint32_t slot) noexcept nogil:
        """Map the shared zero page for ksmd (use_zero_pages)."""
        cdef uint32_t f = self.slot_frame(slot)
        self.merges += 1
        self.set_slot(slot, KSM_ZERO, False)
        self.frame_unmap(f)
        self.ksm_zero_pages += 1
        self.spaces[self.blocks[slot >> 6].mm].zero_pages += 1

    cdef void merge_two(self, uint32_t slot, uint32_t other, uint8_t nid) noexcept nogil:
        """The slot's frame becomes the KSM frame of both, under a new stable node."""
        cdef uint32_t f = self.slot_frame(slot), n
        if f < FIRST_FRAME:
            return
        if self.one_huge_page(slot, other):     # it is split, and its parts can merge from the next pass on
            self.split_huge(slot)
            return
        if not self.split_huge(slot) or not self.split_huge(other):
            return
        self.merges += 1
        if self.frames[f].mappers > 1:
            self.build_unstable()
            self.unstable_changed = self.check_all = True
        self.leave_tree(other)
        self.frames[f].flags |= KSM | DIRTY
        self.blocks[slot >> 6].clean |= <uint64_t>1 << (slot & 63)
        self.remap(other, f)
        n = self.stable_insert(f, nid)
        self.hang(other, n)
        self.hang(slot, n)

    cdef bint one_huge_page(self, uint32_t slot, uint32_t other) noexcept nogil:
        """Whether two slots map parts of one huge page."""
        cdef uint32_t f = self.slot_frame(slot), g = self.slot_frame(other), near
        cdef Block *b = self.blocks[slot >> 6]
        cdef uint64_t unit = (b.vpn + (slot & 63)) & ~<uint64_t>(self.huge - 1)
        if not (self.frames[f].flags & HUGE and self.frames[g].flags & HUGE):
            return False
        near = self.find_slot(b.mm, unit + (self.frames[g].home & (self.huge - 1)))
        return near != NO_SLOT and self.slot_frame(near) == g

    cdef bint split_huge(self, uint32_t slot) noexcept nogil:
        """Split the huge page that the slot is part of; whether the slot still maps its frame.

        Since 6.12 a split gives all-zero pages back: their slots map the shared zero page, uncounted.
        """
        cdef uint32_t f = self.slot_frame(slot), mm
        cdef Block *b = self.blocks[slot >> 6]
        cdef uint64_t first = (b.vpn + (slot & 63)) & ~<uint64_t>(self.huge - 1)
        if not self.frames[f].flags & HUGE:
            return True
        for mm in range(1, self.space_count):   # fork shares huge pages
            if mm == b.mm or self.shares_unit(b.mm, mm, first):
                self.split_unit(mm, first)
        return (self.blocks[slot >> 6].anon >> (slot & 63)) & 1

    cdef bint shares_unit(self, uint32_t mm, uint32_t other, uint64_t first) noexcept nogil:
        """Whether two spaces map a frame in common in the huge page's range."""
        cdef uint64_t vpn
        cdef uint32_t s, t
        for vpn in range(first, first + self.huge):
            s = self.find_slot(mm, vpn)
            t = self.find_slot(other, vpn)
            if s == NO_SLOT or t == NO_SLOT:
                continue
            if self.slot_frame(s) >= FIRST_FRAME and self.slot_frame(s) == self.slot_frame(t):
                return True
        return False

    cdef void split_unit(self, uint32_t mm, uint64_t first) noexcept nogil:
        """Make the frames of one space's huge page single ones, and give the all-zero ones back."""
        cdef uint64_t vpn, born
        cdef uint32_t s, f, left
        for vpn in range(first, first + self.huge):
            s = self.find_slot(mm, vpn)
            if s == NO_SLOT or not (self.blocks[s >> 6].anon >> (s & 63)) & 1:
                continue
            f = self.slot_frame(s)
            if not self.frames[f].flags & HUGE:
                continue
            self.frames[f].flags &= ~HUGE
            if not self.zero_giveback or not self.is_zero(f):
                continue
            born = 0
            left = self.frames[f].mappers
            while left:
                s = self.next_mapper(f, vpn, &born)
                if s == NO_SLOT:
                    break
                self.touch_unstable(s)
                self.set_slot(s, ZERO_PAGE, False)
                self.frame_unmap(f)
                left -= 1

    # ---- NUMA: KSM frames that lie on another node than their tree -------------------------------

    cdef void start_migrating(self, uint32_t n) noexcept nogil:
        """Take a stable node out of its tree; it is placed anew by the visit under way."""
        cdef StableNode *node = &self.stable[n]
        self.detach_node(n)
        node.kind = MIGRATING
        node.prev = 0
        node.next = self.migrating_first
        if node.next:
            self.stable[node.next].prev = n
        self.migrating_first = n
        self.migrating += 1

    cdef uint32_t place_migrating(self, uint32_t slot, uint32_t n, uint8_t nid) noexcept nogil:
        """Put a migrating node into the tree of nid, or find the node to merge its slot with instead; 0: neither."""
        cdef uint32_t f = self.stable[n].frame, parent = 0, place, other
        cdef bint left = False
        self.levels += bit_length64(self.stable_sizes[nid])
        place = self.stable_walk(f, nid, True, &parent, &left)
        if place:
            other = self.choose(self.places[place].value, True)
            if self.frames[f].mappers == 1:
                if not self.candidate(other):
                    return 0
                if self.frames[self.stable[other].frame].nid == nid:
                    return other
        self.detach_node(n)
        self.stable[n].nid = nid
        self.stable[n].kind = PLAIN
        if place:
            self.add_dup(n, place)
        else:
            self.add_place(n, False, parent, left)
        return n if self.candidate(n) else 0

    # ---- ksmd's walk ---------------------------------------------------------------------------

    cdef void link_space(self, uint32_t mm, uint32_t before) noexcept nogil:
        """Put a space into ksmd's list, just before another (0: at the end)."""
        cdef Space *s = &self.spaces[mm]
        s.next = before
        s.prev = self.spaces[before].prev
        self.spaces[s.prev].next = mm
        self.spaces[before].prev = mm

    cdef void unlink_space(self, uint32_t mm) noexcept nogil:
        cdef Space *s = &self.spaces[mm]
        self.spaces[s.prev].next = s.next
        self.spaces[s.next].prev = s.prev

    cdef void unregister(self, uint32_t mm) noexcept nogil:
        """Take a space without items out of ksmd's list."""
        self.unlink_space(mm)
        self.spaces[mm].registered = 0
        self.sweep_blocks(mm)

    cdef void start_pass(self) noexcept nogil:
        cdef uint32_t n = self.migrating_first, next
        self.clear_unstable()
        while n and not self.merge_across_nodes:
            next = self.stable[n].next
            if self.stable[n].stale:
                self.drop_node(n)
            n = next
        self.cursor = self.spaces[0].next
        self.cursor_vpn = 0

    cdef void drop_all_items(self, uint32_t mm) noexcept nogil:
        cdef Space *space = &self.spaces[mm]
        cdef uint32_t i
        for i in range(space.count):
            self.drop_items(self.blocks[space.blocks[i]], space.blocks[i], <uint64_t>-1)

    cdef int scan_space(self, uint64_t *budget) noexcept nogil:
        """Go on in the space under the cursor; BUDGET_SPENT, or PASS_ENDED at the end of the space."""
        cdef Space *space = &self.spaces[self.cursor]
        cdef uint32_t at = self.find_block(space, self.cursor_vpn), id, i
        cdef Block *b
        cdef uint64_t bits, from_here, quiet
        while at < space.count:
            id = space.blocks[at]
            b = self.blocks[id]
            if at + 4 < space.count:
                prefetch(self.blocks[space.blocks[at + 4]])
            from_here = ~below(self.cursor_vpn - b.vpn) if self.cursor_vpn > b.vpn else <uint64_t>-1
            bits = b.anon & b.marked & from_here
            if bits == 0:
                self.drop_items(b, id, from_here)
                self.cursor_vpn = b.vpn + SLOTS
                at += 1
                continue
            # Visits to merged slots change nothing but two counts: a whole block of them is one step.
            quiet = popcount64(bits)
            if bits & ~b.settled == 0 and b.item & from_here == bits and quiet < budget[0] and self.merge_across_nodes:
                self.already += quiet
                self.pages_scanned += quiet
                budget[0] -= quiet
                self.cursor_vpn = b.vpn + SLOTS
                at += 1
                continue
            i = ctz64(bits)
            if b.item & from_here & below(i):
                self.drop_items(b, id, from_here & below(i))
            if not (b.item >> i) & 1:
                b.item |= <uint64_t>1 << i
                b.state[i] = IN_NONE
                b.checksum[i] = 0
                b.age[i] = b.skips[i] = 0
                space.items += 1
                self.rmap_items += 1
            self.cursor_vpn = b.vpn + i + 1
            if self.smart_scan and self.skip(b, i):
                self.leave_tree(id << 6 | i)
                continue
            if self.reserve() < 0:
                self.cursor_vpn -= 1
                return NO_MEMORY
            self.visit(id << 6 | i)
            self.pages_scanned += 1
            budget[0] -= 1
            if budget[0] == 0:
                return BUDGET_SPENT
        return PASS_ENDED

    cdef int scan(self, uint64_t budget) noexcept nogil:
        """One batch: at most `budget` visits, to the end of the pass at most."""
        cdef bint fresh = False
        cdef uint32_t mm
        cdef int done
        if self.spaces[0].next == 0:
            return IDLE
        if budget == 0:
            return BUDGET_SPENT
        self.note_due_chains()
        if self.cursor == 0:
            self.start_pass()
            fresh = True
        while self.cursor:
            mm = self.cursor
            if self.spaces[mm].exited:
                self.drop_all_items(mm)
                fresh = True
            else:
                done = self.scan_space(&budget)
                if done != PASS_ENDED:
                    return done
            self.cursor = self.spaces[mm].next
            self.cursor_vpn = 0
            if self.spaces[mm].exited or (fresh and not self.spaces[mm].any_marked):
                self.unregister(mm)
            fresh = True
        self.full_scans += 1
        return PASS_ENDED

    cdef void note_due_chains(self) noexcept nogil:
        """Whether a walk now would prune a chain; only its prune_tick would change, but that matters later."""
        cdef uint32_t n
        self.chains_due = False
        if self.stable_node_chains == 0 or self.tick < self.next_prune:
            return
        self.next_prune = <uint64_t>-1
        for n in range(1, self.stable_count):
            if self.stable[n].kind == CHAIN and self.stable[n].prune_tick != self.tick:
                self.next_prune = min(self.next_prune, self.stable[n].prune_tick + self.prune_ticks)
        self.chains_due = self.tick >= self.next_prune

    # ---- what processes do with their memory -----------------------------------------------------

    cdef bint alone(self, uint32_t slot) noexcept nogil:
        """Whether the slot maps an anonymous frame that nobody else refers to."""
        cdef uint32_t f = self.slot_frame(slot)
        return ((self.blocks[slot >> 6].anon >> (slot & 63)) & 1 and not self.frames[f].flags & KSM and
                self.frames[f].mappers == 1 and self.frames[f].swapped == 0)

    cdef int own_frame(self, uint32_t slot, uint8_t nid, uint64_t origin) noexcept nogil:
        """Make the slot map a frame of its own, whose data may be written: a write fault."""
        cdef Block *b = self.blocks[slot >> 6]
        cdef uint32_t i = slot & 63, f = b.frame[i], copy
        cdef uint8_t *data
        cdef int done
        if f >= FIRST_FRAME and not (b.anon >> i) & 1:
            done = self.swap_in(slot, nid, origin)
            if done < 0:
                return done
            f = b.frame[i]
        if not self.alone(slot) and not self.has_room():
            return NO_FRAME
        self.touch_unstable(slot)
        if self.alone(slot) and self.frames[f].pins == 0:
            if not self.frames[f].flags & OWNED:
                data = <uint8_t *>malloc(self.width)
                if data == NULL:
                    return NO_MEMORY
                memcpy(data, self.frames[f].data, self.width)
                self.frames[f].data = data
            self.frames[f].flags = (self.frames[f].flags | OWNED) & ~(HASHED | LAZY | DIRTY)
            b.clean &= ~(<uint64_t>1 << i)
            return 0
        copy = self.frame_copy(f if f >= FIRST_FRAME else 0, nid)
        if copy == 0:
            return NO_MEMORY
        self.frames[copy].flags |= self.frames[f].flags & HUGE if f >= FIRST_FRAME else 0
        if f >= FIRST_FRAME and self.frames[f].flags & KSM:
            self.cow_ksm += 1
        self.vacate(slot)
        self.set_slot(slot, copy, True)
        return 0

    cdef int swap_in(self, uint32_t slot, uint8_t nid, uint64_t origin) noexcept nogil:
        """Bring a swapped slot's content back.

        The first of several slots reads it into a frame that stays cached for the others. Of these, only one at
        the same place of the same line of forks may map it, or any, if it has been merged meanwhile; the rest copy.
        """
        cdef uint32_t f = self.slot_frame(slot), copy
        cdef Frame *frame = &self.frames[f]
        cdef uint16_t root = <uint16_t>self.spaces[self.blocks[slot >> 6].mm].root
        cdef bint strange = (frame.flags & CACHED and (frame.home != <uint32_t>origin or frame.root != root)
                             and not (frame.flags & KSM and not self.unmerging))
        if (frame.mappers == 0 or strange) and not self.has_room():
            return NO_FRAME
        if strange:
            copy = self.frame_copy(f, nid)
            if copy == 0:
                return NO_MEMORY
            self.ksm_swpin_copy += 1
            self.set_slot(slot, copy, True)
        else:
            if frame.mappers == 0:
                self.resident += 1
                frame.nid = nid
            if not frame.flags & CACHED:
                frame.flags |= CACHED
                frame.home = <uint32_t>origin
                frame.root = root
            frame.mappers += 1
            self.set_slot(slot, f, True)
        self.swap_drop(f)
        return 0

    cdef bint swap_out(self, uint32_t slot) noexcept nogil:
        """Move what one slot maps to swap; False: no swap space left. The frame's other mappers must follow."""
        cdef uint32_t f = self.slot_frame(slot)
        cdef Frame *frame = &self.frames[f]
        if frame.swapped == 0:
            if self.swapped_pages >= self.max_swapped:
                return False
            self.swapped_pages += 1
        self.touch_unstable(slot)
        frame.swapped += 1
        frame.flags &= ~HUGE
        self.set_slot(slot, f, False)
        self.frame_unmap(f)
        if frame.mappers == 0:
            frame.flags &= ~CACHED
        return True

    cdef int unmerge_block(self, uint32_t id, uint64_t mask) noexcept nogil:
        """Private copies for the KSM frames and KSM-placed zero pages of a block's slots in mask."""
        cdef Block *b = self.blocks[id]
        cdef uint32_t i, f
        cdef int done
        for i in range(SLOTS):
            f = b.frame[i]
            if (mask >> i) & 1 and (f == KSM_ZERO or ((b.anon >> i) & 1 and self.frames[f].flags & KSM)):
                done = self.own_frame(id << 6 | i, self.frames[f].nid if f >= FIRST_FRAME else 0, 0)
                if done < 0:
                    return done
        return 0

    cdef int remove_node(self, uint32_t n) noexcept nogil:
        """Sweep one tree place: 1 if a frame of it is still mapped."""
        cdef uint32_t dup
        if self.stable[n].kind != CHAIN:
            if not self.stable[n].stale:
                return 1
            self.drop_node(n)
            return 0
        while self.stable[n].count:
            dup = self.stable[n].first
            if not self.stable[dup].stale:
                return 1
            self.drop_node(dup)
        self.build_stable()
        self.erase_place(n)
        self.free_chain(n)
        return 0

    # ---- the Python surface: one method a thing that a process, ksmd or sysfs does ---------------
    # Pages are given by their virtual page number; `n` counts pages. Ranges may hold any slots.

    cdef object answer(self, int done):
        if done == NO_MEMORY:
            raise MemoryError(f"no memory for the bookkeeping of {self.frame_count:,} frames")
        if done == NO_FRAME:
            raise FramesExhausted
        return done

    def new_space(self):
        """A new, empty address space; its number stays valid until it has exited and ksmd has left it."""
        cdef uint32_t mm
        for mm in range(1, self.space_count):
            if not self.spaces[mm].alive and not self.spaces[mm].registered:
                break
        else:
            self.answer(grow(<void **>&self.spaces, &self.space_capacity, <uint64_t>self.space_count + 1,
                             sizeof(Space)))
            mm = self.space_count
            self.space_count += 1
        memset(&self.spaces[mm], 0, sizeof(Space))
        self.spaces[mm].alive = 1
        self.born += 1
        self.spaces[mm].born = self.spaces[mm].root = self.born
        return mm

    def use_fingerprints(self, uint64_t high, uint64_t low):
        """Make contents fingerprints of 16 bytes instead of pages, given that of the zero page."""
        if self.resident or self.swapped_pages or self.stable_node_chains or self.pages_shared:
            raise ValueError("this machine has pages with bytes; fingerprints need a machine of their own")
        self.clear_unstable()
        self.sweep_stable()
        memcpy(self.zero, &high, 8)
        memcpy(self.zero + 8, &low, 8)
        self.fingerprints_only = True
        self.width = FINGERPRINT_BYTES
        self.zero_hash = self.content_hash(self.zero)

    @property
    def any_registered(self):
        """Whether ksmd has anything to do."""
        return self.spaces[0].next != 0

    @property
    def in_pass(self):
        """Whether a pass is under way."""
        return self.cursor != 0

    def prune_interval_changed(self):
        """Look at every chain again before the next batch."""
        self.next_prune = 0

    def register(self, uint32_t mm):
        """Put the space into ksmd's list, just before the space that ksmd is in."""
        if not self.spaces[mm].registered:
            self.link_space(mm, self.cursor)
            self.spaces[mm].registered = 1

    def registered(self, uint32_t mm):
        return bool(self.spaces[mm].registered)

    def set_any_marked(self, uint32_t mm, bint marked):
        """Whether the space has a VMA marked mergeable, populated or not."""
        self.spaces[mm].any_marked = marked

    def space_counts(self, uint32_t mm):
        """(rmap items, merging pages, KSM-placed zero pages) of a space."""
        cdef Space *s = &self.spaces[mm]
        return s.items, s.merging, s.zero_pages

    def exit_space(self, uint32_t mm):
        """Unmap everything; ksmd drops the items when it comes by."""
        cdef Space *s = &self.spaces[mm]
        self.unmap(mm, 0, <uint64_t>-1)
        s = &self.spaces[mm]
        s.alive = 0
        s.any_marked = 0
        if not s.registered:
            s.count = 0
        elif mm != self.cursor:
            if s.items == 0:
                self.unregister(mm)
                return
            self.unlink_space(mm)
            self.link_space(mm, self.spaces[self.cursor].next)
        s.exited = 1

    def populate(self, uint32_t mm, uint64_t vpn, const uint8_t[:, ::1] pages, const uint8_t[::1] present,
                 bint marked, uint8_t nid):
        """Map the rows of `pages` (n, page_size or 16) at vpn where present (n,) is not 0, borrowing their bytes."""
        cdef uint64_t k, n = pages.shape[0]
        cdef uint32_t slot, f
        cdef int done = 0
        if pages.shape[1] != self.width or present.shape[0] != pages.shape[0]:
            raise ValueError("pages and present do not fit")
        self.borrowed.append(pages)
        with nogil:
            for k in range(n):
                if not present[k]:
                    continue
                slot = self.make_slot(mm, vpn + k)
                if slot == NO_SLOT:
                    done = NO_MEMORY
                    break
                if self.slot_frame(slot) != NOTHING:
                    continue
                if not self.has_room():
                    done = NO_FRAME
                    break
                f = self.frame_new(&pages[k, 0], 0, nid)
                if f == 0:
                    done = NO_MEMORY
                    break
                self.set_slot(slot, f, True)
                self.mark_slot(slot, marked)
        self.answer(done)

    def populate_huge(self, uint32_t mm, uint64_t vpn, bint writing, bint marked, uint8_t nid):
        """Fault on a huge page's range: zero-filled frames on a write, the huge zero page on a read.

        Only where nothing is mapped yet, or, on a write, nothing but the huge zero page; whether it was done.
        """
        cdef uint64_t k
        cdef uint32_t slot, f
        for k in range(self.huge):
            slot = self.find_slot(mm, vpn + k)
            f = NOTHING if slot == NO_SLOT else self.slot_frame(slot)
            if f != NOTHING and not (writing and f == HUGE_ZERO):
                return False
        if writing and not self.has_room(self.huge):
            return False
        for k in range(self.huge):
            slot = self.make_slot(mm, vpn + k)
            f = HUGE_ZERO
            if writing and slot != NO_SLOT:
                f = self.frame_new(self.zero, HUGE, nid)
            if slot == NO_SLOT or f == 0:
                self.answer(NO_MEMORY)
            self.set_slot(slot, f, writing)
            self.mark_slot(slot, marked)
        return True

    def write(self, uint32_t mm, uint64_t vpn, uint32_t offset, const uint8_t[::1] data, bint marked, uint8_t nid,
              uint64_t origin):
        """Write within one page: a write fault if need be, then the bytes. `origin` is vpn less what mremap moved it."""
        cdef uint32_t slot = self.make_slot(mm, vpn)
        if self.fingerprints_only:
            raise NoPageBytesError("this machine was built from fingerprints and has no page bytes to write")
        if slot == NO_SLOT:
            self.answer(NO_MEMORY)
        self.answer(self.own_frame(slot, nid, origin))
        self.mark_slot(slot, marked)
        if data.shape[0]:
            memcpy(<uint8_t *>self.frames[self.slot_frame(slot)].data + offset, &data[0], data.shape[0])

    def read(self, uint32_t mm, uint64_t vpn, uint32_t offset, uint32_t n, bint marked, uint8_t nid, uint64_t origin):
        """Read within one page: a read fault if need be, then the bytes."""
        cdef uint32_t slot = self.make_slot(mm, vpn), f
        if self.fingerprints_only:
            raise NoPageBytesError("this machine was built from fingerprints and has no page bytes to read")
        if slot == NO_SLOT:
            self.answer(NO_MEMORY)
        f = self.slot_frame(slot)
        if f == NOTHING:
            self.set_slot(slot, ZERO_PAGE, False)
            self.mark_slot(slot, marked)
        elif f >= FIRST_FRAME and not (self.blocks[slot >> 6].anon >> (slot & 63)) & 1:
            self.answer(self.swap_in(slot, nid, origin))
            f = self.slot_frame(slot)
        if f < FIRST_FRAME:
            return bytes(n)
        return PyBytes_FromStringAndSize(<const char *>self.frames[f].data + offset, n)

    def mark(self, uint32_t mm, uint64_t vpn, uint64_t n, bint marked):
        """Set or clear the mergeable mark of a range."""
        cdef Space *space = &self.spaces[mm]
        cdef uint32_t at = self.find_block(space, vpn), i
        cdef Block *b
        cdef uint64_t mask
        while at < space.count and self.blocks[space.blocks[at]].vpn < vpn + n:
            b = self.blocks[space.blocks[at]]
            mask = range_mask(b.vpn, vpn, n)
            if not marked:
                for i in range(SLOTS):
                    if (mask & b.marked & b.item) >> i & 1:
                        self.touch_unstable(space.blocks[at] << 6 | i)
            b.marked = b.marked | mask if marked else b.marked & ~mask
            at += 1

    def unmerge(self, uint32_t mm, uint64_t vpn, uint64_t n):
        """Give every KSM frame and KSM-placed zero page of a range a private copy."""
        cdef Space *space = &self.spaces[mm]
        cdef uint32_t at = self.find_block(space, vpn)
        while at < space.count and self.blocks[space.blocks[at]].vpn < vpn + n:
            self.answer(self.unmerge_block(space.blocks[at],
                                           range_mask(self.blocks[space.blocks[at]].vpn, vpn, n)))
            at += 1

    def unmap(self, uint32_t mm, uint64_t vpn, uint64_t n):
        """Unmap a range: frames go, items stay for ksmd to drop."""
        cdef Space *space = &self.spaces[mm]
        cdef uint32_t at = self.find_block(space, vpn), i
        cdef uint64_t mask, end = vpn + n
        cdef Block *b
        while at < space.count and self.blocks[space.blocks[at]].vpn < end:
            b = self.blocks[space.blocks[at]]
            mask = range_mask(b.vpn, vpn, n)
            if b.used:
                for i in range(SLOTS):
                    if (mask >> i) & 1:
                        self.vacate(space.blocks[at] << 6 | i)
            b.marked &= ~mask
            at += 1
        if n > SLOTS:
            self.sweep_blocks(mm)

    def discard(self, uint32_t mm, uint64_t vpn, uint64_t n):
        """MADV_DONTNEED: like unmap, but the VMA and its mark stay."""
        cdef Space *space = &self.spaces[mm]
        cdef uint32_t at = self.find_block(space, vpn), i
        cdef uint64_t mask
        while at < space.count and self.blocks[space.blocks[at]].vpn < vpn + n:
            mask = range_mask(self.blocks[space.blocks[at]].vpn, vpn, n)
            for i in range(SLOTS):
                if (mask >> i) & 1:
                    self.vacate(space.blocks[at] << 6 | i)
            at += 1

    def lazy_free(self, uint32_t mm, uint64_t vpn, uint64_t n):
        """MADV_FREE: the next reclaim may drop these frames; swapped ones go at once."""
        cdef uint64_t v
        cdef uint32_t slot, f
        cdef Block *b
        for v in self.touched(mm, vpn, n):
            slot = self.find_slot(mm, v)
            f = self.slot_frame(slot)
            b = self.blocks[slot >> 6]
            if f < FIRST_FRAME:
                continue
            if not (b.anon >> (slot & 63)) & 1:
                self.vacate(slot)
            elif self.frames[f].mappers == 1 or not (self.frames[f].flags & DIRTY or self.frames[f].swapped):
                self.frames[f].flags = (self.frames[f].flags | LAZY) & ~DIRTY
                b.clean |= <uint64_t>1 << (slot & 63)

    def page_out(self, uint32_t mm, uint64_t vpn, uint64_t n):
        """MADV_PAGEOUT: what only this space maps goes to swap, as far as there is room."""
        cdef uint64_t v
        cdef uint32_t slot
        for v in self.touched(mm, vpn, n):
            slot = self.find_slot(mm, v)
            if ((self.blocks[slot >> 6].anon >> (slot & 63)) & 1 and
                    self.frames[self.slot_frame(slot)].mappers == 1):
                self.evict(slot)

    def reclaim(self, uint64_t frames):
        """Swap out or drop by space and address, until so many frames are free (0: all that can); slots that went."""
        cdef uint32_t mm, at, i, slot, f
        cdef uint64_t gone = 0, before = self.resident
        for mm in range(1, self.space_count):
            for at in range(self.spaces[mm].count):
                for i in range(SLOTS):
                    slot = self.spaces[mm].blocks[at] << 6 | i
                    if (self.blocks[slot >> 6].anon >> i) & 1:
                        gone += self.evict(slot)
                        if frames and before - self.resident >= frames:
                            return gone
        for f in range(FIRST_FRAME, self.frame_count):
            if self.frames[f].mappers == 0:
                self.frames[f].flags &= ~CACHED
        return gone

    cdef int evict(self, uint32_t slot) noexcept nogil:
        """Reclaim one slot's mapping of its frame; the number of slots that went.

        A lazily freed frame is dropped slot by slot, until one has written it since: then it is kept after all.
        Slots go in the order of the processes' age, those that mremap moved last.
        """
        cdef uint32_t f = self.slot_frame(slot), s
        cdef uint64_t vpn = self.blocks[slot >> 6].vpn + (slot & 63), born = 0
        cdef uint64_t home = vpn & 0xffffffff00000000u | self.frames[f].home
        cdef int gone = 0
        if self.frames[f].flags & HUGE and self.max_swapped == 0:
            self.split_huge(slot)
            if self.slot_frame(slot) != f:
                return 1
        if self.frames[f].flags & DIRTY:
            self.frames[f].flags &= ~LAZY
        if not self.frames[f].flags & LAZY:
            return self.swap_out(slot)
        if self.frames[f].flags & KSM:      # its slots lie anywhere, and are all clean
            self.vacate(slot)
            return 1
        while self.frames[f].flags & LAZY:
            s = self.next_mapper(f, home, &born)
            if s == NO_SLOT:
                if vpn == home or self.slot_frame(slot) != f:
                    break
                s = slot
                home = vpn
            if (self.blocks[s >> 6].clean >> (s & 63)) & 1:
                gone += 1
                self.vacate(s)
            else:
                self.frames[f].flags &= ~LAZY
        return gone

    cdef uint32_t next_mapper(self, uint32_t f, uint64_t vpn, uint64_t *born) noexcept nogil:
        """The slot at vpn that maps f in the space made next after `born`, which moves on; NO_SLOT: no more.

        What fork shares lies at one address, as long as mremap does not move it.
        """
        cdef uint32_t mm, s, found = NO_SLOT
        cdef uint64_t best = <uint64_t>-1
        for mm in range(1, self.space_count):
            if born[0] < self.spaces[mm].born < best:
                s = self.find_slot(mm, vpn)
                if s != NO_SLOT and (self.blocks[s >> 6].anon >> (s & 63)) & 1 and self.slot_frame(s) == f:
                    best = self.spaces[mm].born
                    found = s
        born[0] = best
        return found

    def touched(self, uint32_t mm, uint64_t vpn, uint64_t n):
        """The page numbers of a range whose slots map or hold something, ascending."""
        cdef Space *space = &self.spaces[mm]
        cdef uint32_t at = self.find_block(space, vpn), i
        cdef Block *b
        cdef list found = []
        while at < space.count and self.blocks[space.blocks[at]].vpn < vpn + n:
            b = self.blocks[space.blocks[at]]
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
        for v in self.touched(mm, old, n):
            target = self.make_slot(mm, new + (v - old))
            if target == NO_SLOT:
                self.answer(NO_MEMORY)
            source = self.find_slot(mm, v)
            self.touch_unstable(source)
            f = self.slot_frame(source)
            anon = (self.blocks[source >> 6].anon >> (source & 63)) & 1
            clean = (self.blocks[source >> 6].clean >> (source & 63)) & 1
            self.set_slot(source, NOTHING, False)
            self.set_slot(target, f, anon)
            self.blocks[target >> 6].clean |= clean << (target & 63)
            self.mark_slot(target, marked)

    def fork(self, uint32_t parent, uint32_t child):
        """Share everything that parent maps with the empty space child."""
        cdef uint32_t at, i, slot, f
        cdef Block *b
        cdef Block *c
        self.spaces[child].root = self.spaces[parent].root
        for at in range(self.spaces[parent].count):
            b = self.blocks[self.spaces[parent].blocks[at]]
            if b.used == 0:
                continue
            slot = self.make_slot(child, b.vpn)
            if slot == NO_SLOT:
                self.answer(NO_MEMORY)
            c = self.blocks[slot >> 6]
            c.marked = b.marked
            for i in range(SLOTS):
                f = b.frame[i]
                if f == NOTHING:
                    continue
                self.set_slot(slot + i, f, (b.anon >> i) & 1)
                c.clean |= b.clean & <uint64_t>1 << i
                if f == KSM_ZERO:
                    self.ksm_zero_pages += 1
                    self.spaces[child].zero_pages += 1
                elif f >= FIRST_FRAME and (b.anon >> i) & 1:
                    self.frames[f].mappers += 1
                elif f >= FIRST_FRAME:
                    self.frames[f].swapped += 1

    def migrate(self, uint32_t mm, uint64_t vpn, uint64_t n, uint8_t nid):
        """Move the frames of a range to a NUMA node; all that map them see it."""
        cdef uint64_t v
        cdef uint32_t slot
        for v in self.touched(mm, vpn, n):
            slot = self.find_slot(mm, v)
            if (self.blocks[slot >> 6].anon >> (slot & 63)) & 1:
                if self.frames[self.slot_frame(slot)].mappers > 1:
                    self.build_unstable()
                    self.unstable_changed = self.check_all = True
                self.touch_unstable(slot)
                self.frames[self.slot_frame(slot)].nid = nid

    def scan_batch(self, uint64_t budget):
        """One batch of at most `budget` visits: 0 budget spent, 1 the pass ended, 2 nothing registered."""
        cdef int done
        with nogil:
            done = self.scan(budget)
        return self.answer(done)

    def unmerge_all(self):
        """run=2: space by space, private copies in marked VMAs and items dropped; the position is reset."""
        cdef uint32_t mm, at, next
        self.cursor = 0
        self.cursor_vpn = 0
        mm = self.spaces[0].next
        while mm:
            next = self.spaces[mm].next
            for at in range(self.spaces[mm].count):
                self.answer(self.unmerge_block(self.spaces[mm].blocks[at],
                                               self.blocks[self.spaces[mm].blocks[at]].marked))
            self.drop_all_items(mm)
            if self.spaces[mm].exited:
                self.unregister(mm)
            mm = next
        self.sweep_stable()
        self.full_scans = 0

    def sweep_stable(self):
        """Remove the stable nodes whose frames are not mapped, as far as the kernel does; whether one is busy."""
        cdef uint32_t nid, n, next
        cdef bint busy = False
        self.build_stable()
        for nid in range(self.nodes):
            while self.stable_roots[nid]:
                if self.remove_node(self.places[self.stable_roots[nid]].value):
                    busy = True
                    break
        n = self.migrating_first
        while n:
            next = self.stable[n].next
            busy = busy or self.remove_node(n) == 1
            n = next
        return busy

    def dump(self):
        """Every structure, as tuples: what ksm.check verifies. O(everything)."""
        cdef uint32_t i, at, k
        cdef Block *b
        cdef list slots = [], frames = [], nodes = [], spaces = []
        for i in range(self.space_count):
            spaces.append((self.spaces[i].next, self.spaces[i].prev, self.spaces[i].registered, self.spaces[i].exited,
                           self.spaces[i].items, self.spaces[i].merging, self.spaces[i].zero_pages,
                           [(self.spaces[i].blocks[at], self.blocks[self.spaces[i].blocks[at]].vpn,
                             self.blocks[self.spaces[i].blocks[at]].mm, self.blocks[self.spaces[i].blocks[at]].used)
                            for at in range(self.spaces[i].count)]))
            for at in range(self.spaces[i].count):
                b = self.blocks[self.spaces[i].blocks[at]]
                for k in range(SLOTS):
                    if b.frame[k] != NOTHING or (b.item >> k) & 1:
                        slots.append((self.spaces[i].blocks[at] << 6 | k, i, b.vpn + k, b.frame[k], (b.anon >> k) & 1,
                                      (b.marked >> k) & 1, (b.item >> k) & 1, b.state[k], b.link[k], b.next[k],
                                      b.prev[k]))
        for i in range(FIRST_FRAME, self.frame_count):
            if self.frames[i].data != NULL:
                frames.append((i, self.frames[i].mappers, self.frames[i].swapped, self.frames[i].pins,
                               self.frames[i].node, self.frames[i].flags, self.frames[i].nid,
                               PyBytes_FromStringAndSize(<const char *>self.frames[i].data, self.width)))
        for i in range(1, self.stable_count):
            if self.stable[i].kind != FREE_NODE:
                nodes.append((i, self.stable[i].kind, self.stable[i].frame, self.stable[i].count, self.stable[i].first,
                              self.stable[i].next, self.stable[i].prev, self.stable[i].owner,
                              self.stable[i].candidates, self.stable[i].nid, self.stable[i].stale,
                              self.stable[i].unsettled, self.stable[i].hash, self.in_table(i)))
        return {
            "slots": slots, "frames": frames, "nodes": nodes, "spaces": spaces, "cursor": self.cursor,
            "places": [dump_node(self.places, i) for i in range(self.place_count)],
            "stable_roots": [self.stable_roots[i] for i in range(self.nodes)],
            "stable_sizes": [self.stable_sizes[i] for i in range(self.nodes)],
            "pending": [self.pending[i] for i in range(self.pending_count)],
            "joined": [dump_node(self.joined, i) for i in range(self.joined_count)],
            "unstable_roots": [self.unstable_roots[i] for i in range(self.nodes)],
            "unstable_sizes": [self.unstable_sizes[i] for i in range(self.nodes)],
            "built": self.built, "unstable_changed": self.unstable_changed,
            "erased": [(self.erased[i].node, self.erased[i].frame) for i in range(self.erased_count)],
            "erased_done": self.erased_done, "state": self.unstable_state(),
            "counters": {name: getattr(self, name) for name in (
                "pages_shared", "pages_sharing", "pages_unshared", "rmap_items", "stable_node_chains",
                "stable_node_dups", "ksm_zero_pages", "resident", "swapped_pages", "max_page_sharing")},
            "stale": self.stale, "unsettled": self.unsettled, "migrating": self.migrating,
        }

    cdef bint in_table(self, uint32_t n):
        """Whether the table leads to the tree place of n (dups: true)."""
        cdef uint64_t key = self.table_key(self.stable[n].hash, self.stable[n].nid)
        cdef uint64_t at = table_start(&self.stable_table, key)
        cdef uint32_t place
        if not self.hash_index or self.stable[n].kind == DUP or self.stable[n].kind == MIGRATING:
            return True
        while True:
            place = table_next(&self.stable_table, key, &at)
            if place == 0 or place == self.stable[n].owner:
                return place != 0


cdef object dump_node(const Node *t, uint32_t n):
    return t[n].left, t[n].right, rb_parent(t, n), bool(rb_is_red(t, n)), t[n].value


# ---- fingerprints, without any engine ----------------------------------------------------------

_FORMS = {"scalar": XXH3_FORM_SCALAR, "sse2": XXH3_FORM_SSE2, "neon": XXH3_FORM_NEON}


def fingerprint_forms():
    """The forms of the hash that were compiled in, best first.

    >>> fingerprint_forms()[-1]
    'scalar'
    """
    cdef int i = 0
    names = []
    while xxh3_forms[i]:
        names += [name for name, form in _FORMS.items() if form == xxh3_forms[i]]
        i += 1
    return tuple(names)


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

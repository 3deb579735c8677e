# cython: language_level=3
"""Contents, frames, blocks and slots: what memory holds, and who maps it."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

from ksm._cy.page cimport page_compare
from ksm._cy.rbtree cimport VALUE_FLAG, Node
from ksm._cy.store cimport Store, FINGERPRINT_BYTES, NO_HOME, NO_MEMORY, NO_SLOT, grow, bit_length64
from ksm._cy.types cimport CACHED, FIRST_FRAME, HASHED, KSM, NOTHING, OWNED, SLOTS, Block, Frame, Origin, Space
from ksm._cy.xxh3 cimport xxh3_128_best


cdef inline uint32_t content_hash(Store *m, const uint8_t *data) noexcept nogil:
    cdef uint64_t words[2]
    if m.fingerprints_only:     # which may be made up, of small numbers
        memcpy(words, data, FINGERPRINT_BYTES)
        return <uint32_t>((words[0] * 0x9e3779b97f4a7c15u + words[1] * 0xc2b2ae3d27d4eb4fu + 0x165667b19e3779f9u) >> 32)
    xxh3_128_best(data, m.page_size, words)
    return <uint32_t>(words[1] >> 32)


cdef inline uint32_t frame_hash(Store *m, uint32_t f) noexcept nogil:
    """The frame's hash, computed once for a content."""
    cdef Frame *frame = &m.frames[f]
    if not frame.flags & HASHED:
        frame.hash = content_hash(m, frame.data)
        frame.flags |= HASHED
    return frame.hash


cdef inline bint same_content(Store *m, uint32_t f, uint32_t g) noexcept nogil:
    return (m.frames[f].data == m.frames[g].data or
            (frame_hash(m, f) == frame_hash(m, g) and
             memcmp(m.frames[f].data, m.frames[g].data, m.width) == 0))


cdef inline bint is_zero(Store *m, uint32_t f) noexcept nogil:
    return (m.frames[f].data == m.zero or
            (frame_hash(m, f) == m.zero_hash and
             memcmp(m.frames[f].data, m.zero, m.width) == 0))


cdef inline int compare(Store *m, const uint8_t *p, const uint8_t *q) noexcept nogil:
    """Byte order of two contents; counts what a ksmd would have compared."""
    cdef size_t where
    cdef int order = page_compare(p, q, m.width, &where)
    m.comparisons += 1
    m.bytes_compared += where + (order != 0)
    return order


cdef inline int compare_at(Store *m, uint64_t prefix, const uint8_t *data,
                           const Node *node, const uint8_t *other) noexcept nogil:
    """`compare` for a node whose prefix is up to date: most end without touching its page."""
    cdef uint64_t differ = prefix ^ node.prefix
    if differ:
        m.comparisons += 1
        m.bytes_compared += 8 - ((bit_length64(differ) - 1) >> 3)
        return -1 if prefix < node.prefix else 1
    return compare(m, data, other)


cdef inline uint32_t frame_new(Store *m, const uint8_t *data, uint8_t flags, uint8_t nid) noexcept nogil:
    """A resident frame with one mapper; 0: no memory for the bookkeeping. The caller checked `has_room`."""
    cdef uint32_t f = m.free_frame
    cdef Frame *frame
    if f:
        m.free_frame = m.frames[f].node
    else:
        if grow(<void **>&m.frames, &m.frame_capacity, <uint64_t>m.frame_count + 1, sizeof(Frame)) < 0:
            return 0
        if m.origins and grow(<void **>&m.origins, &m.origin_capacity, <uint64_t>m.frame_count + 1, sizeof(Origin)) < 0:
            return 0
        f = m.frame_count
        m.frame_count += 1
    frame = &m.frames[f]
    frame.data = data
    frame.flags = flags
    frame.nid = nid
    frame.mappers = 1
    frame.pins = 0
    frame.node = 0
    if m.origins:
        m.origins[f].swapped = 0
        m.origins[f].home = NO_HOME
    m.resident += 1
    return f


cdef inline uint32_t frame_copy(Store *m, uint32_t f, uint8_t nid) noexcept nogil:
    """A resident copy of `f` with its own data; 0: no memory."""
    cdef uint8_t *data = <uint8_t *>malloc(m.width)
    cdef uint32_t copy
    if data == NULL:
        return 0
    memcpy(data, m.frames[f].data if f else m.zero, m.width)
    copy = frame_new(m, data, OWNED, nid)
    if copy == 0:
        free(data)
    return copy


cdef inline bint has_room(Store *m, uint64_t frames) noexcept nogil:
    return m.max_resident == 0 or m.resident + frames <= m.max_resident


cdef inline void frame_release(Store *m, uint32_t f) noexcept nogil:
    """Free the record when nothing refers to the content any more."""
    cdef Frame *frame = &m.frames[f]
    if frame.mappers or frame.pins or swapped(m, f):
        return
    if frame.flags & OWNED:
        free(<void *>frame.data)
    frame.data = NULL
    frame.flags = 0
    frame.node = m.free_frame
    m.free_frame = f


cdef inline void frame_unpin(Store *m, uint32_t f) noexcept nogil:
    m.frames[f].pins -= 1
    frame_release(m, f)


cdef inline void frame_unmap(Store *m, uint32_t f) noexcept nogil:
    """One mapper less; without any the frame is not counted as resident, though swap may have it cached still."""
    m.frames[f].mappers -= 1
    if m.frames[f].mappers:
        return
    m.resident -= 1
    if not m.frames[f].flags & CACHED:
        frame_gone(m, f)
    frame_release(m, f)


cdef inline void frame_gone(Store *m, uint32_t f) noexcept nogil:
    """The frame, which no slot maps, leaves RAM: it is no longer KSM, and its stable node is stale."""
    m.frames[f].flags &= ~CACHED
    if m.frames[f].flags & KSM:
        m.frames[f].flags &= ~KSM
        if m.frames[f].node:
            m.stable[m.frames[f].node].stale = 1
            m.stale += 1


cdef inline uint32_t swapped(Store *m, uint32_t f) noexcept nogil:
    """Slots whose content the frame is in swap."""
    return m.origins[f].swapped if m.origins else 0


cdef inline int keep_origins(Store *m) noexcept nogil:
    """Note where frames come from, from now on; -1: no memory.

    Called before anything could have moved, so that every frame lies where it was first mapped.
    """
    cdef uint32_t id, i, f
    if m.origins:
        return 0
    if grow(<void **>&m.origins, &m.origin_capacity, m.frame_capacity, sizeof(Origin)) < 0:
        return NO_MEMORY
    for f in range(m.frame_count):
        m.origins[f].swapped = m.origins[f].root = 0
        m.origins[f].home = NO_HOME
    for id in range(m.block_count):
        for i in range(SLOTS):
            f = m.blocks[id].frame[i]
            if f >= FIRST_FRAME:
                m.origins[f].home = <uint32_t>(m.blocks[id].vpn + i)
    return 0


cdef inline uint32_t slot_frame(Store *m, uint32_t slot) noexcept nogil:
    return m.blocks[slot >> 6].frame[slot & 63]


cdef inline bint mergeable(Store *m, uint32_t slot) noexcept nogil:
    """Whether the slot maps an anonymous frame in a marked VMA now."""
    cdef Block *b = m.blocks[slot >> 6]
    return ((b.anon & b.marked & ~b.hidden) >> (slot & 63)) & 1


cdef inline uint32_t find_block(Store *m, const Space *space, uint64_t vpn) noexcept nogil:
    """Position in space.blocks of the first block that ends after vpn. O(log n)."""
    cdef uint32_t low = 0, high = space.count, middle
    if high and m.blocks[space.blocks[high - 1]].vpn + SLOTS <= vpn:
        return high
    while low < high:
        middle = (low + high) >> 1
        if m.blocks[space.blocks[middle]].vpn + SLOTS <= vpn:
            low = middle + 1
        else:
            high = middle
    return low


cdef inline uint32_t find_slot(Store *m, uint32_t mm, uint64_t vpn) noexcept nogil:
    """The slot at vpn; NO_SLOT when no block covers it."""
    cdef Space *space = &m.spaces[mm]
    cdef uint32_t at = find_block(m, space, vpn)
    if at == space.count or m.blocks[space.blocks[at]].vpn > vpn:
        return NO_SLOT
    return space.blocks[at] << 6 | <uint32_t>(vpn & 63)


cdef inline int grow_homes(Store *m) noexcept nogil:
    """Room for one more block's homes."""
    cdef void *moved
    cdef uint64_t wanted = (<uint64_t>m.block_count + 1) * SLOTS
    if m.nodes == 1 or wanted <= m.home_capacity:
        return 0
    moved = realloc(m.homes, wanted * 2)
    if moved == NULL:
        return NO_MEMORY
    m.homes = <uint8_t *>moved
    m.home_capacity = wanted * 2
    return 0


cdef inline uint8_t home_node(Store *m, uint32_t slot) noexcept nogil:
    """The NUMA node of new frames for a slot."""
    return m.homes[slot] if m.nodes > 1 else 0


cdef inline uint32_t make_slot(Store *m, uint32_t mm, uint64_t vpn) noexcept nogil:
    """The slot at vpn, with a new block if need be; NO_SLOT: no memory."""
    cdef Space *space = &m.spaces[mm]
    cdef uint32_t at = find_block(m, space, vpn), id
    cdef Block *b
    if at < space.count and m.blocks[space.blocks[at]].vpn <= vpn:
        return space.blocks[at] << 6 | <uint32_t>(vpn & 63)
    if grow(<void **>&space.blocks, &space.capacity, <uint64_t>space.count + 1, sizeof(uint32_t)) < 0:
        return NO_SLOT
    if m.free_blocks_count:
        b = m.blocks[m.free_blocks[m.free_blocks_count - 1]]
        m.free_blocks_count -= 1
        id = m.free_blocks[m.free_blocks_count]
    else:
        if (m.block_count >= VALUE_FLAG >> 6 or
                grow(<void **>&m.blocks, &m.block_capacity, <uint64_t>m.block_count + 1,
                     sizeof(Block *)) < 0 or
                grow(<void **>&m.free_blocks, &m.free_blocks_capacity, <uint64_t>m.block_count + 1,
                     sizeof(uint32_t)) < 0):
            return NO_SLOT
        if grow_homes(m) < 0:
            return NO_SLOT
        b = <Block *>malloc(sizeof(Block))
        if b == NULL:
            return NO_SLOT
        id = m.block_count
        m.blocks[id] = b
        m.block_count += 1
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


cdef inline void sweep_blocks(Store *m, uint32_t mm) noexcept nogil:
    """Give back the blocks that hold neither a slot nor an item. O(blocks of the space)."""
    cdef Space *space = &m.spaces[mm]
    cdef uint32_t i, kept = 0, id
    for i in range(space.count):
        id = space.blocks[i]
        if m.blocks[id].used or m.blocks[id].item:
            space.blocks[kept] = id
            kept += 1
        else:
            m.blocks[id].mm = 0
            m.free_blocks[m.free_blocks_count] = id
            m.free_blocks_count += 1
    space.count = kept


cdef inline void set_slot(Store *m, uint32_t slot, uint32_t frame, bint anon) noexcept nogil:
    """Store what a slot maps; the frames' mappers are the caller's business."""
    cdef Block *b = m.blocks[slot >> 6]
    cdef uint32_t i = slot & 63
    cdef uint64_t bit = <uint64_t>1 << i
    b.used += (frame != NOTHING) - (b.frame[i] != NOTHING)
    b.frame[i] = frame
    if m.origins and frame >= FIRST_FRAME and m.origins[frame].home == NO_HOME:
        m.origins[frame].home = <uint32_t>(b.vpn + i)
    b.anon = b.anon | bit if anon else b.anon & ~bit
    b.settled &= ~bit
    b.calm &= ~bit
    b.clean &= ~bit


cdef inline void mark_slot(Store *m, uint32_t slot, bint marked, uint8_t nid) noexcept nogil:
    """Note what the slot's VMA says: whether it is mergeable, and where it allocates."""
    if m.nodes > 1:
        m.homes[slot] = nid
    cdef Block *b = m.blocks[slot >> 6]
    cdef uint64_t bit = <uint64_t>1 << (slot & 63)
    b.marked = b.marked | bit if marked else b.marked & ~bit


cdef inline void swap_drop(Store *m, uint32_t f) noexcept nogil:
    """One swapped slot less refers to f."""
    m.origins[f].swapped -= 1
    if m.origins[f].swapped == 0:
        m.frames[f].flags &= ~CACHED
        m.swapped_pages -= 1
        if m.frames[f].mappers == 0:
            frame_gone(m, f)
    frame_release(m, f)

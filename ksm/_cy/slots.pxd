# cython: language_level=3
"""What takes something away from a slot: unmapping, remapping, leaving a tree, splitting a huge page."""

from libc.stdint cimport uint32_t, uint64_t

from ksm._cy.frames cimport find_slot, frame_unmap, is_zero, set_slot, slot_frame, swap_drop
from ksm._cy.stable cimport drop_node, unhang
from ksm._cy.store cimport Store, NO_SLOT, ctz64, popcount64
from ksm._cy.types cimport (
    DIRTY, FIRST_FRAME, HUGE, IN_NONE, IN_STABLE, IN_UNSTABLE, KSM_ZERO, NOTHING, ZERO_PAGE, Block, Space)
from ksm._cy.unstable cimport touch_unstable, unstable_erase, unstable_state


cdef inline void vacate(Store *m, uint32_t slot) noexcept nogil:
    """Take whatever the slot maps away from it (unmap, or before something else is mapped)."""
    cdef uint32_t f = slot_frame(m, slot)
    cdef Block *b = m.blocks[slot >> 6]
    if f == NOTHING:
        return
    touch_unstable(m, slot)
    if f == KSM_ZERO:
        m.ksm_zero_pages -= 1
        m.spaces[b.mm].zero_pages -= 1
        set_slot(m, slot, NOTHING, False)
    elif f < FIRST_FRAME:
        set_slot(m, slot, NOTHING, False)
    elif (b.anon >> (slot & 63)) & 1:
        set_slot(m, slot, NOTHING, False)
        frame_unmap(m, f)
    else:
        set_slot(m, slot, NOTHING, False)
        swap_drop(m, f)


cdef inline void remap(Store *m, uint32_t slot, uint32_t frame) noexcept nogil:
    """Make an anonymous slot map another frame, which gains a mapper."""
    cdef uint32_t old = slot_frame(m, slot)
    touch_unstable(m, slot)
    if not (m.blocks[slot >> 6].clean >> (slot & 63)) & 1:
        m.frames[old].flags |= DIRTY
    m.resident += m.frames[frame].mappers == 0      # swap had it cached
    m.frames[frame].mappers += 1
    set_slot(m, slot, frame, True)
    m.blocks[slot >> 6].clean |= <uint64_t>1 << (slot & 63)
    frame_unmap(m, old)


cdef inline void leave_tree(Store *m, uint32_t slot) noexcept nogil:
    """The slot's item leaves the tree that it is in; a stale stable node goes with all its items."""
    cdef Block *b = m.blocks[slot >> 6]
    cdef uint32_t i = slot & 63
    if b.state[i] == IN_STABLE:
        if m.stable[b.link[i]].stale:
            drop_node(m, b.link[i])
        else:
            unhang(m, slot)
    elif b.state[i] >= IN_UNSTABLE:
        if b.state[i] == unstable_state(m):
            unstable_erase(m, slot)
        b.state[i] = IN_NONE
        m.pages_unshared -= 1


cdef inline void drop_items(Store *m, Block *b, uint32_t id, uint64_t mask) noexcept nogil:
    """Drop the items of a block's slots in mask, in ascending order."""
    cdef uint64_t bits = b.item & mask
    cdef int dropped = popcount64(bits)
    cdef int i
    while bits:
        i = ctz64(bits)
        bits &= bits - 1
        leave_tree(m, id << 6 | <uint32_t>i)
        b.item &= ~(<uint64_t>1 << i)
        b.calm &= ~(<uint64_t>1 << i)
    m.rmap_items -= dropped
    m.spaces[b.mm].items -= dropped


cdef inline bint one_huge_page(Store *m, uint32_t slot, uint32_t other) noexcept nogil:
    """Whether two slots map parts of one huge page."""
    cdef uint32_t f = slot_frame(m, slot), g = slot_frame(m, other), near
    cdef Block *b = m.blocks[slot >> 6]
    cdef uint64_t unit = (b.vpn + (slot & 63)) & ~<uint64_t>(m.huge - 1)
    if not (m.frames[f].flags & HUGE and m.frames[g].flags & HUGE):
        return False
    near = find_slot(m, b.mm, unit + (m.origins[g].home & (m.huge - 1)))
    return near != NO_SLOT and slot_frame(m, near) == g


cdef inline bint split_huge(Store *m, uint32_t slot) noexcept nogil:
    """Split the huge page that the slot is part of; whether the slot still maps its frame.

    Since 6.12 a split gives all-zero pages back: their slots map the shared zero page, uncounted.
    """
    cdef uint32_t f = slot_frame(m, slot), mm
    cdef Block *b = m.blocks[slot >> 6]
    cdef uint64_t first = (b.vpn + (slot & 63)) & ~<uint64_t>(m.huge - 1)
    if not m.frames[f].flags & HUGE:
        return True
    for mm in range(1, m.space_count):   # fork shares huge pages
        if mm == b.mm or shares_unit(m, b.mm, mm, first):
            split_unit(m, mm, first)
    return (m.blocks[slot >> 6].anon >> (slot & 63)) & 1


cdef inline bint shares_unit(Store *m, uint32_t mm, uint32_t other, uint64_t first) noexcept nogil:
    """Whether two spaces map a frame in common in the huge page's range."""
    cdef uint64_t vpn
    cdef uint32_t s, t
    for vpn in range(first, first + m.huge):
        s = find_slot(m, mm, vpn)
        t = find_slot(m, other, vpn)
        if s == NO_SLOT or t == NO_SLOT:
            continue
        if slot_frame(m, s) >= FIRST_FRAME and slot_frame(m, s) == slot_frame(m, t):
            return True
    return False


cdef inline void split_unit(Store *m, uint32_t mm, uint64_t first) noexcept nogil:
    """Make the frames of one space's huge page single ones, and give the all-zero ones back."""
    cdef uint64_t vpn, born
    cdef uint32_t s, f, left
    for vpn in range(first, first + m.huge):
        s = find_slot(m, mm, vpn)
        if s == NO_SLOT or not (m.blocks[s >> 6].anon >> (s & 63)) & 1:
            continue
        f = slot_frame(m, s)
        if not m.frames[f].flags & HUGE:
            continue
        m.frames[f].flags &= ~HUGE
        if not m.zero_giveback or not is_zero(m, f):
            continue
        born = 0
        left = m.frames[f].mappers
        while left:
            s = next_mapper(m, f, vpn, &born)
            if s == NO_SLOT:
                break
            touch_unstable(m, s)
            set_slot(m, s, ZERO_PAGE, False)
            frame_unmap(m, f)
            left -= 1


cdef inline void drop_all_items(Store *m, uint32_t mm) noexcept nogil:
    cdef Space *space = &m.spaces[mm]
    cdef uint32_t i
    for i in range(space.count):
        drop_items(m, m.blocks[space.blocks[i]], space.blocks[i], <uint64_t>-1)


cdef inline uint32_t next_mapper(Store *m, uint32_t f, uint64_t vpn, uint64_t *born) noexcept nogil:
    """The slot at vpn that maps f in the space made next after `born`, which moves on; NO_SLOT: no more.

    What fork shares lies at one address, as long as mremap does not move it.
    """
    cdef uint32_t mm, s, found = NO_SLOT
    cdef uint64_t best = <uint64_t>-1
    for mm in range(1, m.space_count):
        if born[0] < m.spaces[mm].born < best:
            s = find_slot(m, mm, vpn)
            if s != NO_SLOT and (m.blocks[s >> 6].anon >> (s & 63)) & 1 and slot_frame(m, s) == f:
                best = m.spaces[mm].born
                found = s
    born[0] = best
    return found

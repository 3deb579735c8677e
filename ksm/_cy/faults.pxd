# cython: language_level=3
"""What processes and reclaim do to a slot: write faults, swap-in and swap-out, unmerging."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy

from ksm._cy.frames cimport (
    find_slot, frame_copy, frame_gone, frame_unmap, has_room, set_slot, slot_frame, swap_drop, swapped)
from ksm._cy.slots cimport next_mapper, vacate
from ksm._cy.store cimport Store, NO_MEMORY, NO_FRAME, NO_SLOT
from ksm._cy.types cimport (
    CACHED, DIRTY, FIRST_FRAME, HASHED, HUGE, IN_STABLE, KSM, KSM_ZERO, LAZY, OWNED, SLOTS, Block, Frame, Origin, Space)
from ksm._cy.unstable cimport touch_unstable


cdef inline bint alone(Store *m, uint32_t slot) noexcept nogil:
    """Whether the slot maps an anonymous frame that nobody else refers to."""
    cdef uint32_t f = slot_frame(m, slot)
    return ((m.blocks[slot >> 6].anon >> (slot & 63)) & 1 and not m.frames[f].flags & KSM and
            m.frames[f].mappers == 1 and swapped(m, f) == 0)


cdef inline int own_frame(Store *m, uint32_t slot, uint8_t nid, uint64_t origin) noexcept nogil:
    """Make the slot map a frame of its own, whose data may be written: a write fault."""
    cdef Block *b = m.blocks[slot >> 6]
    cdef uint32_t i = slot & 63, f = b.frame[i], copy
    cdef uint8_t *data
    cdef int done
    if f >= FIRST_FRAME and not (b.anon >> i) & 1:
        done = swap_in(m, slot, nid, origin)
        if done < 0:
            return done
        f = b.frame[i]
    if not alone(m, slot) and not has_room(m, 1):
        return NO_FRAME
    touch_unstable(m, slot)
    if alone(m, slot) and m.frames[f].pins == 0:
        if not m.frames[f].flags & OWNED:
            data = <uint8_t *>malloc(m.width)
            if data == NULL:
                return NO_MEMORY
            memcpy(data, m.frames[f].data, m.width)
            m.frames[f].data = data
        m.frames[f].flags = (m.frames[f].flags | OWNED) & ~(HASHED | LAZY | DIRTY)
        b.clean &= ~(<uint64_t>1 << i)
        b.calm &= ~(<uint64_t>1 << i)
        return 0
    copy = frame_copy(m, f if f >= FIRST_FRAME else 0, nid)
    if copy == 0:
        return NO_MEMORY
    m.frames[copy].flags |= m.frames[f].flags & HUGE if f >= FIRST_FRAME else 0
    if f >= FIRST_FRAME and m.frames[f].flags & KSM:
        m.cow_ksm += 1
    vacate(m, slot)
    set_slot(m, slot, copy, True)
    return 0


cdef inline int swap_in(Store *m, uint32_t slot, uint8_t nid, uint64_t origin) noexcept nogil:
    """Bring a swapped slot's content back.

    The first of several slots reads it into a frame that stays cached for the others. Of these, only one at
    the same place of the same line of forks may map it, or any, if it has been merged meanwhile; the rest copy.
    """
    cdef uint32_t f = slot_frame(m, slot), copy
    cdef Frame *frame = &m.frames[f]
    cdef Origin *from_ = &m.origins[f]
    cdef uint32_t root = <uint32_t>m.spaces[m.blocks[slot >> 6].mm].root
    cdef bint strange = (frame.flags & CACHED and (from_.home != <uint32_t>origin or from_.root != root)
                         and not (frame.flags & KSM and not m.unmerging))
    if (frame.mappers == 0 or strange) and not has_room(m, 1):
        return NO_FRAME
    if strange:
        copy = frame_copy(m, f, nid)
        if copy == 0:
            return NO_MEMORY
        m.ksm_swpin_copy += 1
        set_slot(m, slot, copy, True)
    else:
        if frame.mappers == 0:
            m.resident += 1
            frame.nid = nid
        if not frame.flags & CACHED:
            frame.flags |= CACHED
            from_.home = <uint32_t>origin
            from_.root = root
        frame.mappers += 1
        set_slot(m, slot, f, True)
    swap_drop(m, f)
    return 0


cdef inline bint swap_out(Store *m, uint32_t slot) noexcept nogil:
    """Move what one slot maps to swap; False: no swap space left. The frame's other mappers must follow."""
    cdef uint32_t f = slot_frame(m, slot)
    cdef Frame *frame = &m.frames[f]
    if swapped(m, f) == 0:
        if m.swapped_pages >= m.max_swapped:
            return False
        m.swapped_pages += 1
    touch_unstable(m, slot)
    m.origins[f].swapped += 1
    frame.flags &= ~HUGE
    set_slot(m, slot, f, False)
    frame_unmap(m, f)
    if frame.mappers == 0:
        frame_gone(m, f)
    return True


cdef inline int unmerge_block(Store *m, uint32_t id, uint64_t mask, uint8_t nid) noexcept nogil:
    """Private copies, on node nid, for the KSM frames and KSM-placed zero pages of a block's slots in mask."""
    cdef Block *b = m.blocks[id]
    cdef uint32_t i, f
    cdef int done
    for i in range(SLOTS):
        f = b.frame[i]
        if (mask >> i) & 1 and (f == KSM_ZERO or ((b.anon >> i) & 1 and m.frames[f].flags & KSM)):
            done = own_frame(m, id << 6 | i, nid, 0)
            if done < 0:
                return done
    return 0


cdef inline bint found_by_reclaim(Store *m, uint32_t slot) noexcept nogil:
    """Whether reclaim comes to a KSM frame's mapping: through an item on its node, here or where fork took it from."""
    cdef Block *b = m.blocks[slot >> 6]
    cdef uint32_t n = m.frames[slot_frame(m, slot)].node, mm, s
    cdef Space *space = &m.spaces[b.mm]
    for mm in range(1, m.space_count):
        if m.spaces[mm].root != space.root or m.spaces[mm].born > space.born:
            continue
        s = find_slot(m, mm, b.vpn + (slot & 63))
        if s != NO_SLOT and m.blocks[s >> 6].state[s & 63] == IN_STABLE and m.blocks[s >> 6].link[s & 63] == n:
            return True
    return False


cdef inline int evict(Store *m, uint32_t slot) noexcept nogil:
    """Reclaim one slot's mapping of its frame; the number of slots that went.

    A lazily freed frame is dropped slot by slot, until one has written it since: then it is kept after all.
    Slots go in the order of the processes' age, those that mremap moved last.
    """
    cdef uint32_t f = slot_frame(m, slot), s
    cdef uint64_t vpn = m.blocks[slot >> 6].vpn + (slot & 63), born = 0
    cdef uint64_t home
    cdef int gone = 0
    if m.frames[f].flags & DIRTY and m.frames[f].flags & LAZY:
        m.frames[f].flags &= ~LAZY      # kept after all, until reclaim comes by again
        return 0
    if not m.frames[f].flags & LAZY:
        if m.frames[f].flags & KSM and not found_by_reclaim(m, slot):
            return 0
        gone = swap_out(m, slot)
        if gone and m.frames[f].mappers and m.frames[f].flags & KSM:
            m.frames[f].flags |= CACHED
        return gone
    if m.frames[f].flags & KSM and m.frames[f].node == 0:
        m.frames[f].flags &= ~LAZY      # reclaim finds none of its slots
        return 0
    if m.frames[f].flags & KSM:      # its slots lie anywhere, and are all clean
        vacate(m, slot)
        return 1
    home = vpn & 0xffffffff00000000u | m.origins[f].home
    while m.frames[f].flags & LAZY:
        s = next_mapper(m, f, home, &born)
        if s == NO_SLOT:
            if vpn == home or slot_frame(m, slot) != f:
                break
            s = slot
            home = vpn
        if (m.blocks[s >> 6].clean >> (s & 63)) & 1:
            gone += 1
            vacate(m, s)
        else:
            m.frames[f].flags &= ~LAZY
    return gone

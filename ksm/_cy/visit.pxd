# cython: language_level=3
"""Everything that ksmd does at one slot."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ksm._cy.frames cimport (
    frame_copy, frame_hash, frame_unmap, frame_unpin, home_node, is_zero, mergeable, set_slot, slot_frame)
from ksm._cy.rbtree cimport Node
from ksm._cy.slots cimport leave_tree, one_huge_page, remap, split_huge, vacate
from ksm._cy.stable cimport hang, misplaced, place_migrating, stable_insert, stable_search, start_migrating
from ksm._cy.store cimport Store, NO_MEMORY, SEARCH_GIVEN_UP, NOT_FOUND, grow
from ksm._cy.table cimport table_reserve
from ksm._cy.types cimport (
    DIRTY, FIRST_FRAME, IN_STABLE, KSM, KSM_ZERO, MIGRATING, OLD, ONE_SKIP, ZERO_PAGE, Block, StableNode)
from ksm._cy.unstable cimport build_unstable, reserve_joined, touch_unstable, unstable_search


cdef inline int reserve(Store *m) noexcept nogil:
    """Room for whatever one visit may add, so that a visit cannot fail half-way."""
    if m.stable_count + 2 > m.stable_capacity:
        if grow(<void **>&m.stable, &m.stable_capacity, <uint64_t>m.stable_count + 2,
                sizeof(StableNode)) < 0:
            return NO_MEMORY
    if m.place_count + 1 > m.place_capacity:
        if grow(<void **>&m.places, &m.place_capacity, <uint64_t>m.place_count + 1, sizeof(Node)) < 0:
            return NO_MEMORY
    if m.pending_count + 1 > m.pending_capacity:
        if grow(<void **>&m.pending, &m.pending_capacity, <uint64_t>m.pending_count + 1,
                sizeof(uint32_t)) < 0:
            return NO_MEMORY
    if table_reserve(&m.stable_table, 1, 0) < 0:
        return NO_MEMORY
    return reserve_joined(m, m.implicit_most + 1 if m.implicit else 1)


cdef inline bint skip(Store *m, Block *b, uint32_t i) noexcept nogil:
    """Smart scan: age the item of a slot that maps no KSM frame; whether this visit is skipped."""
    cdef uint8_t age = b.smart[i] & OLD
    b.smart[i] += age < OLD
    if age < 3:
        return False
    if b.smart[i] < ONE_SKIP:
        b.smart[i] += ONE_SKIP * (1 if age <= 3 else 2 if age <= 5 else 4 if age <= 8 else 8)
        return False
    b.smart[i] -= ONE_SKIP
    m.pages_skipped += 1
    return True


cdef inline void visit(Store *m, uint32_t slot) noexcept nogil:
    """Everything that ksmd does at one slot, whose item exists."""
    cdef Block *b = m.blocks[slot >> 6]
    cdef uint32_t f = b.frame[slot & 63]
    cdef uint8_t nid = 0 if m.merge_across_nodes else m.frames[f].nid
    b.calm &= ~(<uint64_t>1 << (slot & 63))
    if m.frames[f].flags & KSM and m.frames[f].node:
        visit_ksm(m, slot, f, nid)
        return
    m.frames[f].pins += 1
    visit_frame(m, slot, f, nid)
    frame_unpin(m, f)


cdef inline void visit_frame(Store *m, uint32_t slot, uint32_t f, uint8_t nid) noexcept nogil:
    """A visit to a slot that maps an ordinary frame, pinned by the caller: it may be merged away meanwhile."""
    cdef uint32_t n
    if m.gate_first:
        leave_tree(m, slot)
        if not pass_gate(m, slot, f):
            return
        n = stable_search(m, f, nid)
    else:
        n = stable_search(m, f, nid)
        leave_tree(m, slot)
        if n == 0 and not pass_gate(m, slot, f):
            return
    if n:
        merge_with(m, slot, n)
    else:
        find_partner(m, slot, f, nid)


cdef inline bint pass_gate(Store *m, uint32_t slot, uint32_t f) noexcept nogil:
    """Whether the visit goes on: the page holds what it held last time, and it is no page of zeros to give up."""
    cdef Block *b = m.blocks[slot >> 6]
    cdef uint32_t i = slot & 63, sum = frame_hash(m, f)
    m.hashed += 1
    if b.checksum[i] != sum:
        b.checksum[i] = sum
        return False
    if m.use_zero_pages and not m.frames[f].flags & KSM and is_zero(m, f):
        if split_huge(m, slot):
            merge_with_zero(m, slot)
            return False
        # The split gave the page back under ksmd's hands, which goes on searching with what it held.
        build_unstable(m)
    return True


cdef inline void find_partner(Store *m, uint32_t slot, uint32_t f, uint8_t nid) noexcept nogil:
    """Merge with a page of the unstable tree, or join it."""
    cdef uint32_t n = unstable_search(m, slot, f, nid)
    if n < SEARCH_GIVEN_UP:
        merge_two(m, slot, n, nid)
    elif n == NOT_FOUND and (slot_frame(m, slot) != f or m.frames[f].flags & KSM or not mergeable(m, slot)):
        touch_unstable(m, slot)     # what stands there is not what the table takes it for
        m.blocks[slot >> 6].calm &= ~(<uint64_t>1 << (slot & 63))


cdef inline void visit_ksm(Store *m, uint32_t slot, uint32_t f, uint8_t nid) noexcept nogil:
    """A visit to a slot that maps a KSM frame: hang its item on the frame's node, even a full one."""
    cdef Block *b = m.blocks[slot >> 6]
    cdef uint32_t i = slot & 63, n = m.frames[f].node
    if m.stable[n].kind != MIGRATING and misplaced(m, n):
        start_migrating(m, n)
    if m.stable[n].kind == MIGRATING:
        n = place_migrating(m, n, nid)
    if n and b.state[i] == IN_STABLE and b.link[i] == n:
        m.already += 1
        return
    leave_tree(m, slot)
    if n:
        if slot_frame(m, slot) == m.stable[n].frame:    # a KSM frame is never exchanged for another
            m.merges += 1
            hang(m, slot, n)
    elif m.gate_first or pass_gate(m, slot, f):
        find_partner(m, slot, f, nid)


cdef inline void merge_with(Store *m, uint32_t slot, uint32_t n) noexcept nogil:
    """Map the stable node's frame in place of the slot's, which has the same content."""
    cdef uint32_t f = slot_frame(m, slot)
    if f < FIRST_FRAME or m.frames[f].flags & KSM or not split_huge(m, slot):
        return
    m.merges += 1
    remap(m, slot, m.stable[n].frame)
    hang(m, slot, n)


cdef inline void merge_with_zero(Store *m, uint32_t slot) noexcept nogil:
    """Map the shared zero page for ksmd (use_zero_pages); before 6.6 nothing told it from any other zero page."""
    cdef uint32_t f = slot_frame(m, slot)
    m.merges += 1
    if not m.counts_zero_pages:
        set_slot(m, slot, ZERO_PAGE, False)
        frame_unmap(m, f)
        return
    set_slot(m, slot, KSM_ZERO, False)
    frame_unmap(m, f)
    m.ksm_zero_pages += 1
    m.spaces[m.blocks[slot >> 6].mm].zero_pages += 1


cdef inline void merge_two(Store *m, uint32_t slot, uint32_t other, uint8_t nid) noexcept nogil:
    """The slot's frame becomes the KSM frame of both, under a new stable node."""
    cdef uint32_t f = slot_frame(m, slot), n
    if f < FIRST_FRAME:
        return
    if one_huge_page(m, slot, other):     # it is split, and its parts can merge from the next pass on
        split_huge(m, slot)
        return
    if not split_huge(m, slot):
        return
    if m.frames[slot_frame(m, other)].flags & KSM or not split_huge(m, other):
        undo_merge(m, slot, f)
        return
    m.merges += 1
    if m.frames[f].mappers > 1:
        build_unstable(m)
        m.check_all = True
        m.calm_valid = False    # whoever else maps it belongs on its node
    leave_tree(m, other)
    m.frames[f].flags |= KSM | DIRTY
    m.blocks[slot >> 6].clean |= <uint64_t>1 << (slot & 63)
    remap(m, other, f)
    n = stable_insert(m, f, nid)
    hang(m, other, n)
    hang(m, slot, n)


cdef inline void undo_merge(Store *m, uint32_t slot, uint32_t f) noexcept nogil:
    """The visited frame became a KSM frame, and its partner's slot cannot be made to map it: the slot gets a copy.

    For those who share the frame by fork it stays a KSM frame, without a stable node.
    """
    cdef uint32_t copy
    if m.frames[f].mappers > 1:
        build_unstable(m)
        m.check_all = True
        m.calm_valid = False    # whoever else maps it belongs on its node
    m.frames[f].flags |= KSM
    if (m.blocks[slot >> 6].hidden >> (slot & 63)) & 1:
        return
    copy = frame_copy(m, f, home_node(m, slot))
    if copy == 0:
        return
    m.cow_ksm += 1
    vacate(m, slot)
    set_slot(m, slot, copy, True)

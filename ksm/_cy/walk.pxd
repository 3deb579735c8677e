# cython: language_level=3
"""ksmd's walk: the list of spaces, passes and batches."""

from libc.stdint cimport uint32_t, uint64_t

from ksm._cy.ahead cimport look_ahead
from ksm._cy.calm cimport block_is_calm, scan_calm, start_calm
from ksm._cy.frames cimport find_block, sweep_blocks
from ksm._cy.memory cimport fetch
from ksm._cy.slots cimport drop_all_items, drop_items, leave_tree
from ksm._cy.stable cimport drop_node, note_due_chains
from ksm._cy.store cimport Store, NO_MEMORY, NO_SLOT, BUDGET_SPENT, PASS_ENDED, IDLE, below, ctz64, popcount64
from ksm._cy.types cimport IN_NONE, KSM, SLOTS, Block, Space
from ksm._cy.unstable cimport clear_unstable
from ksm._cy.visit cimport reserve, skip, visit


cdef inline void link_space(Store *m, uint32_t mm, uint32_t before) noexcept nogil:
    """Put a space into ksmd's list, just before another (0: at the end)."""
    cdef Space *s = &m.spaces[mm]
    s.next = before
    s.prev = m.spaces[before].prev
    m.spaces[s.prev].next = mm
    m.spaces[before].prev = mm


cdef inline void unlink_space(Store *m, uint32_t mm) noexcept nogil:
    cdef Space *s = &m.spaces[mm]
    m.spaces[s.prev].next = s.next
    m.spaces[s.next].prev = s.prev


cdef inline void unregister(Store *m, uint32_t mm) noexcept nogil:
    """Take a space without items out of ksmd's list."""
    unlink_space(m, mm)
    m.spaces[mm].registered = 0
    sweep_blocks(m, mm)


cdef inline void start_pass(Store *m) noexcept nogil:
    cdef uint32_t n = m.migrating_first, next
    clear_unstable(m)
    m.join_most = m.rmap_items
    while n and not m.merge_across_nodes:
        next = m.stable[n].next
        if m.stable[n].stale:
            drop_node(m, n)
        n = next
    start_calm(m)
    m.cursor = m.spaces[0].next
    m.cursor_vpn = 0


cdef inline int scan_space(Store *m, uint64_t *budget) noexcept nogil:
    """Go on in the space under the cursor; BUDGET_SPENT, or PASS_ENDED at the end of the space."""
    cdef Space *space = &m.spaces[m.cursor]
    cdef uint32_t at = find_block(m, space, m.cursor_vpn), id, i
    cdef Block *b
    cdef uint64_t bits, from_here, quiet
    cdef uint32_t ahead = NO_SLOT
    while at < space.count:
        id = space.blocks[at]
        b = m.blocks[id]
        if at + 4 < space.count:
            fetch(m.blocks[space.blocks[at + 4]])
        from_here = ~below(m.cursor_vpn - b.vpn) if m.cursor_vpn > b.vpn else <uint64_t>-1
        bits = b.anon & b.marked & from_here
        if bits == 0:
            drop_items(m, b, id, from_here)
            m.cursor_vpn = b.vpn + SLOTS
            at += 1
            continue
        if block_is_calm(m, b, bits, from_here):
            if scan_calm(m, b, bits, budget) == BUDGET_SPENT:
                return BUDGET_SPENT
            at += 1
            continue
        # Visits to merged slots change nothing but two counts: a whole block of them is one step.
        quiet = popcount64(bits)
        if bits & ~b.settled == 0 and b.item & from_here == bits and quiet < budget[0] and m.merge_across_nodes:
            m.already += quiet
            m.pages_scanned += quiet
            budget[0] -= quiet
            m.cursor_vpn = b.vpn + SLOTS
            at += 1
            continue
        if id != ahead:
            look_ahead(m, b, bits & b.item)
            ahead = id
        i = ctz64(bits)
        if b.item & from_here & below(i):
            drop_items(m, b, id, from_here & below(i))
        if not (b.item >> i) & 1:
            b.item |= <uint64_t>1 << i
            b.state[i] = IN_NONE
            b.checksum[i] = 0
            b.smart[i] = 0
            space.items += 1
            m.rmap_items += 1
        m.cursor_vpn = b.vpn + i + 1
        if m.smart_scan and not m.frames[b.frame[i]].flags & KSM and skip(m, b, i):
            leave_tree(m, id << 6 | i)
            continue
        if reserve(m) < 0:
            m.cursor_vpn -= 1
            return NO_MEMORY
        visit(m, id << 6 | i)
        m.pages_scanned += 1
        budget[0] -= 1
        if budget[0] == 0:
            return BUDGET_SPENT
    return PASS_ENDED


cdef inline int scan(Store *m, uint64_t budget) noexcept nogil:
    """One batch: at most `budget` visits, to the end of the pass at most."""
    cdef bint fresh = False
    cdef uint32_t mm
    cdef int done
    if m.spaces[0].next == 0:
        return IDLE
    if budget == 0:
        return BUDGET_SPENT
    note_due_chains(m)
    if m.cursor == 0:
        start_pass(m)
        fresh = True
    while m.cursor:
        mm = m.cursor
        if m.spaces[mm].exited:
            drop_all_items(m, mm)
            fresh = True
        else:
            done = scan_space(m, &budget)
            if done != PASS_ENDED:
                return done
        m.cursor = m.spaces[mm].next
        m.cursor_vpn = 0
        if m.spaces[mm].exited or (fresh and not m.spaces[mm].any_marked):
            unregister(m, mm)
        fresh = True
    clear_unstable(m)
    m.full_scans += 1
    return PASS_ENDED

# cython: language_level=3
"""Passes over memory where nothing happens: visits that are known beforehand to find nothing.

A calm slot joined an unstable tree at its last visit, and its page has not changed since. If no two calm slots hold
equal pages, and no stable node with room holds such a page, then a visit to a calm slot can only join again: it is
counted, and nothing is looked up. That holds until another slot joins or a stable node gains room.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ksm._cy.frames cimport frame_hash, is_zero, same_content
from ksm._cy.stable cimport candidate, stable_clean, stable_lookup
from ksm._cy.store cimport Store, BUDGET_SPENT, PASS_ENDED, bit_length64, ctz64
from ksm._cy.table cimport Table, table_clear, table_fetch, table_next, table_put, table_reserve, table_start
from ksm._cy.types cimport CHAIN, IN_NONE, IN_UNSTABLE, KSM, Block
from ksm._cy.unstable cimport reserve_joined, unstable_state
from ksm._cy.visit cimport skip


cdef inline void start_calm(Store *m) noexcept nogil:
    """At the start of a pass: whether it may begin implicit. O(calm slots) when that is not known from the last one."""
    if not m.hash_index or not m.merge_across_nodes:
        return
    if not m.calm_valid:
        m.calm_valid = calm_is_distinct(m)
        m.implicit_most = m.unstable_table.used
        table_clear(&m.unstable_table)
    m.implicit = m.calm_valid and reserve_joined(m, m.implicit_most) == 0


cdef inline bint calm_is_distinct(Store *m) noexcept nogil:
    """Whether a visit to any calm slot would find nothing, whoever joined before it.

    The unstable table, which is empty, is left with an entry for each of their pages.
    """
    cdef uint32_t mm = m.spaces[0].next, at
    if table_reserve(&m.unstable_table, m.pages_unshared + 1, m.rmap_items) < 0:
        return False
    while mm:
        for at in range(m.spaces[mm].count):
            if not block_is_distinct(m, m.spaces[mm].blocks[at], &m.unstable_table):
                return False
        mm = m.spaces[mm].next
    return True


cdef inline bint block_is_distinct(Store *m, uint32_t id, Table *seen) noexcept nogil:
    """Add a block's calm slots to those seen; whether all their pages are new."""
    cdef Block *b = m.blocks[id]
    cdef uint64_t bits = b.calm & b.item, left, at
    cdef uint32_t i, f, hash, other, place
    if table_reserve(seen, 64, m.rmap_items) < 0:
        return False
    left = bits
    while left:
        i = ctz64(left)
        left &= left - 1
        hash = frame_hash(m, b.frame[i])
        table_fetch(seen, hash)
        table_fetch(&m.stable_table, hash)
    while bits:
        i = ctz64(bits)
        bits &= bits - 1
        f = b.frame[i]
        if m.frames[f].flags & KSM:     # merged through another slot that fork gave it to
            b.calm &= ~(<uint64_t>1 << i)
            continue
        hash = frame_hash(m, f)
        if m.use_zero_pages and is_zero(m, f):
            return False
        at = table_start(seen, hash)
        while True:
            other = table_next(seen, hash, &at)
            if other == 0:
                break
            if same_content(m, f, other):
                return False
        table_put(seen, hash, f)
        place = stable_lookup(m, f, 0)
        if place and has_room_for_one(m, m.places[place].value):
            return False
    return True


cdef inline bint has_room_for_one(Store *m, uint32_t n) noexcept nogil:
    """Whether the node, or a dup of the chain, can take another item."""
    return m.stable[n].candidates > 0 if m.stable[n].kind == CHAIN else candidate(m, n, 0)


cdef inline bint block_is_calm(Store *m, const Block *b, uint64_t bits, uint64_t from_here) noexcept nogil:
    """Whether visits to the slots in bits, all that there are from here on in the block, change counts only."""
    return (m.implicit and m.calm_valid and bits & ~(b.settled | b.calm) == 0 and b.item & from_here == bits
            and stable_clean(m))


cdef inline int scan_calm(Store *m, Block *b, uint64_t bits, uint64_t *budget) noexcept nogil:
    """Visit these slots of a calm block; BUDGET_SPENT, with the position behind the last visit, or PASS_ENDED."""
    cdef uint32_t i
    cdef uint32_t stable_depth = bit_length64(m.stable_sizes[0])
    cdef uint8_t joined = unstable_state(m)
    cdef uint64_t visits = 0, rejoined = 0
    while bits:
        i = ctz64(bits)
        bits &= bits - 1
        if (b.calm >> i) & 1:
            if m.smart_scan and skip(m, b, i):
                if b.state[i] >= IN_UNSTABLE:
                    b.state[i] = IN_NONE
                    m.pages_unshared -= 1
                continue
            m.pages_unshared += b.state[i] < IN_UNSTABLE
            b.state[i] = joined
            m.unstable_searches[bit_length64(m.unstable_sizes[0])] += 1
            m.unstable_sizes[0] += 1
            rejoined += 1
        visits += 1
        if visits == budget[0]:
            m.cursor_vpn = b.vpn + i + 1
            break
    m.hashed += rejoined
    m.stable_searches[stable_depth] += rejoined
    m.already += visits - rejoined
    m.pages_scanned += visits
    budget[0] -= visits
    if budget[0] == 0:
        return BUDGET_SPENT
    m.cursor_vpn = b.vpn + 64
    return PASS_ENDED

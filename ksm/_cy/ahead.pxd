# cython: language_level=3
"""Looking ahead in a block: what the visits to come will read is fetched, all slots of the block side by side.

A visit that looks its page up reads a table entry, then what the entry names, then the page there, each where no
cache expects it. Nothing here changes anything, or has to be right.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ksm._cy.frames cimport slot_frame
from ksm._cy.memory cimport fetch
from ksm._cy.stable cimport table_key
from ksm._cy.store cimport Store, ctz64
from ksm._cy.table cimport Table, table_fetch, table_next, table_start
from ksm._cy.types cimport CHAIN, FIRST_FRAME, HASHED, KSM, ONE_SKIP, SLOTS, Block, Frame

cdef enum:
    LINES = 2       # of a page, fetched before it is compared: what the processor sees as a stream from then on
    LINE = 64


cdef inline uint32_t first_match(const Table *t, uint32_t key) noexcept nogil:
    """The first id under a key; 0: none."""
    cdef uint64_t at = table_start(t, key)
    return table_next(t, key, &at)


cdef inline void fetch_page(Store *m, const uint8_t *data) noexcept nogil:
    cdef uint32_t at = 0, end = min(<uint32_t>(LINES * LINE), m.width)
    while at < end:
        fetch(data + at)
        at += LINE


cdef inline void look_ahead(Store *m, const Block *b, uint64_t bits) noexcept nogil:
    """Fetch what visits to these slots of a block will read, as far as their pages are known to be looked up."""
    cdef uint32_t keys[SLOTS]
    cdef uint32_t nodes[SLOTS]      # the stable node that has the page, on the way to it its place; 0: none
    cdef uint32_t found[SLOTS]      # the frame that has the page, on the way to it an unstable slot + 1; 0: none
    cdef uint8_t slots[SLOTS]
    cdef uint32_t i, k, n = 0
    cdef const Frame *frame
    if not m.hash_index or m.stable_table.capacity == 0 or m.unstable_table.capacity == 0:
        return
    while bits:
        i = ctz64(bits)
        bits &= bits - 1
        frame = &m.frames[b.frame[i]]
        if frame.flags & (KSM | HASHED) == HASHED and b.checksum[i] == frame.hash and b.smart[i] < ONE_SKIP:
            slots[n] = i
            keys[n] = table_key(frame.hash, 0 if m.merge_across_nodes else frame.nid)
            table_fetch(&m.stable_table, keys[n])
            table_fetch(&m.unstable_table, keys[n])
            n += 1
    for k in range(n):
        found[k] = 0
        nodes[k] = first_match(&m.stable_table, keys[k])
        if nodes[k]:
            fetch(&m.places[nodes[k]])
        else:
            found[k] = first_match(&m.unstable_table, keys[k])
            if found[k]:
                fetch(&m.blocks[(found[k] - 1) >> 6].frame[(found[k] - 1) & 63])
    for k in range(n):
        if nodes[k]:
            nodes[k] = m.places[nodes[k]].value
            fetch(&m.stable[nodes[k]])
        elif found[k]:
            found[k] = slot_frame(m, found[k] - 1)
            fetch(&m.frames[found[k]])
    for k in range(n):
        if m.stable[nodes[k]].kind == CHAIN:
            nodes[k] = m.stable[nodes[k]].first
            fetch(&m.stable[nodes[k]])
    for k in range(n):
        if nodes[k]:
            found[k] = m.stable[nodes[k]].frame
            fetch(&m.frames[found[k]])
            if m.stable[nodes[k]].count:
                i = m.stable[nodes[k]].first
                fetch(&m.blocks[i >> 6].prev[i & 63])
    for k in range(n):
        if found[k] >= FIRST_FRAME and m.frames[found[k]].data != NULL:
            fetch_page(m, m.frames[found[k]].data)
            fetch_page(m, m.frames[b.frame[slots[k]]].data)

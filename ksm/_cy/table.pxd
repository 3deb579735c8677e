# cython: language_level=3
"""Open-addressing table from 32-bit hashes to 32-bit ids: 8-byte entries, linear probes.

Ids with one hash are told apart by the caller, who compares the content. Ids 0 and 0xffffffff are taken for
empty and deleted. The capacity is any number, so that memory follows what is stored; hash * capacity / 2^32 is
where a search starts.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from ksm._cy.memory cimport fetch, release, zeroed

cdef enum:
    DELETED = 0xffffffffu

ctypedef struct Table:
    uint64_t *entries   # hash << 32 | id
    uint64_t capacity
    uint64_t used       # live and deleted entries


cdef inline void table_free(Table *t) noexcept nogil:
    release(t.entries, t.capacity * sizeof(uint64_t))
    t.entries = NULL
    t.capacity = t.used = 0


cdef inline void table_clear(Table *t) noexcept nogil:
    if t.used:
        memset(t.entries, 0, t.capacity * sizeof(uint64_t))
        t.used = 0


cdef inline uint64_t table_start(const Table *t, uint32_t hash) noexcept nogil:
    return hash * t.capacity >> 32


cdef inline void table_fetch(const Table *t, uint32_t hash) noexcept nogil:
    fetch(&t.entries[table_start(t, hash)])


cdef inline void table_link(Table *t, uint64_t entry) noexcept nogil:
    cdef uint64_t i = table_start(t, entry >> 32)
    while t.entries[i]:
        i += 1
        if i == t.capacity:
            i = 0
    t.entries[i] = entry
    t.used += 1


cdef inline int table_reserve(Table *t, uint64_t extra, uint64_t most) noexcept nogil:
    """Room for `extra` more entries at a load of at most 9/10; -1: out of memory, nothing changed.

    Of `most` entries, which a caller may expect, a third are provided for at first, and then twice as many each time:
    far fewer may come. Moved entries keep the order of their hashes: old and new memory are gone through in order.
    """
    cdef uint64_t capacity = t.capacity, had = t.capacity
    cdef uint64_t *old = t.entries
    cdef uint64_t i, live = 0, wanted, roomy
    if (t.used + extra) * 10 <= capacity * 9:
        return 0
    if t.used == 0:
        capacity = 0    # nothing to move
    for i in range(capacity):
        live += old[i] != 0 and <uint32_t>old[i] != DELETED
    wanted = live + extra
    roomy = live * 2
    if wanted <= most:
        roomy = min(max(roomy, most // 3), most)
    wanted = max(wanted, roomy) * 10 // 9 + 256
    cdef uint64_t *entries = <uint64_t *>zeroed(wanted * sizeof(uint64_t))
    if entries == NULL:
        return -1
    t.entries = entries
    t.capacity = wanted
    t.used = 0
    for i in range(capacity):
        if old[i] != 0 and <uint32_t>old[i] != DELETED:
            table_link(t, old[i])
    release(old, had * sizeof(uint64_t))
    return 0


cdef inline void table_put(Table *t, uint32_t hash, uint32_t id) noexcept nogil:
    """Add an entry; `table_reserve` went before."""
    table_link(t, <uint64_t>hash << 32 | id)


cdef inline uint32_t table_next(const Table *t, uint32_t hash, uint64_t *at) noexcept nogil:
    """The next id with this hash, from `at[0]` on; 0: no more."""
    cdef uint64_t entry
    while True:
        entry = t.entries[at[0]]
        if entry == 0:
            return 0
        at[0] = at[0] + 1 if at[0] + 1 < t.capacity else 0
        if entry >> 32 == hash and <uint32_t>entry != DELETED:
            return <uint32_t>entry


cdef inline void table_remove(Table *t, uint32_t hash, uint32_t id) noexcept nogil:
    cdef uint64_t i = table_start(t, hash)
    cdef uint64_t wanted = <uint64_t>hash << 32 | id
    while t.entries[i]:
        if t.entries[i] == wanted:
            t.entries[i] = <uint64_t>hash << 32 | DELETED
            return
        i = i + 1 if i + 1 < t.capacity else 0

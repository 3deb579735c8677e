# cython: language_level=3
"""Open-addressing table from 64-bit hashes to 32-bit ids: 8-byte entries, linear probes.

An entry is a 32-bit tag and an id; ids with one tag are told apart by the caller (it compares the
whole hash and the content). Ids 0 and 0xffffffff are taken for empty and deleted.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cdef enum:
    DELETED = 0xffffffffu

ctypedef struct Table:
    uint64_t *entries   # tag << 32 | id
    uint64_t mask       # capacity - 1; the capacity is a power of two
    uint64_t used       # live and deleted entries


cdef inline void table_free(Table *t) noexcept nogil:
    free(t.entries)
    t.entries = NULL
    t.mask = t.used = 0


cdef inline void table_clear(Table *t) noexcept nogil:
    if t.used:
        memset(t.entries, 0, (t.mask + 1) * sizeof(uint64_t))
        t.used = 0


cdef inline void table_link(Table *t, uint64_t entry) noexcept nogil:
    cdef uint64_t i = (entry >> 32) & t.mask
    while t.entries[i]:
        i = (i + 1) & t.mask
    t.entries[i] = entry
    t.used += 1


cdef inline int table_reserve(Table *t, uint64_t extra) noexcept nogil:
    """Room for `extra` more entries at a load of at most 2/3; -1: out of memory, nothing changed."""
    cdef uint64_t capacity = t.mask + 1 if t.entries else 0
    cdef uint64_t *old = t.entries
    cdef uint64_t i
    if old and (t.used + extra) * 3 <= capacity * 2:
        return 0
    cdef uint64_t live = 0
    for i in range(capacity):
        live += old[i] != 0 and <uint32_t>old[i] != DELETED
    cdef uint64_t wanted = 256
    while wanted < (live + extra) * 2:
        wanted *= 2
    cdef uint64_t *entries = <uint64_t *>calloc(wanted, sizeof(uint64_t))
    if entries == NULL:
        return -1
    t.entries = entries
    t.mask = wanted - 1
    t.used = 0
    for i in range(capacity):
        if old[i] != 0 and <uint32_t>old[i] != DELETED:
            table_link(t, old[i])
    free(old)
    return 0


cdef inline void table_put(Table *t, uint64_t hash, uint32_t id) noexcept nogil:
    """Add an entry; `table_reserve` went before."""
    table_link(t, (hash & 0xffffffff00000000u) | id)


cdef inline uint64_t table_start(const Table *t, uint64_t hash) noexcept nogil:
    return (hash >> 32) & t.mask


cdef inline uint32_t table_next(const Table *t, uint64_t hash, uint64_t *at) noexcept nogil:
    """The next id with this hash's tag, from `at[0]` on; 0: no more."""
    cdef uint64_t entry
    while True:
        entry = t.entries[at[0]]
        if entry == 0:
            return 0
        at[0] = (at[0] + 1) & t.mask
        if (entry ^ hash) >> 32 == 0 and <uint32_t>entry != DELETED:
            return <uint32_t>entry


cdef inline void table_remove(Table *t, uint64_t hash, uint32_t id) noexcept nogil:
    cdef uint64_t i = (hash >> 32) & t.mask
    cdef uint64_t wanted = (hash & 0xffffffff00000000u) | id
    while t.entries[i]:
        if t.entries[i] == wanted:
            t.entries[i] = (hash & 0xffffffff00000000u) | DELETED
            return
        i = (i + 1) & t.mask

# cython: language_level=3
"""How many members of a group have a content: one open-addressing table over (group, content) pairs.

A count that falls to 0 keeps its entry, which is used again when the pair comes back; growing drops it.
"""

from libc.stdint cimport uint32_t, uint64_t

from ksm._cy.memory cimport fetch, release, zeroed

cdef enum:
    AHEAD = 8       # contents of a row whose entries are fetched before they are looked at

ctypedef struct Pair:
    uint64_t key        # (group << 32 | content) + 1; 0: empty
    uint64_t count

ctypedef struct Together:
    Pair *pairs
    uint64_t mask       # their number - 1; a power of two
    uint64_t used       # entries, those with a count of 0 too
    uint64_t live       # entries with a count


cdef inline void together_free(Together *t) noexcept nogil:
    release(t.pairs, (t.mask + 1) * sizeof(Pair) if t.pairs != NULL else 0)
    t.pairs = NULL


cdef inline uint64_t pair_place(const Together *t, uint64_t key) noexcept nogil:
    """Where a search for a key starts."""
    return (key * 0x9e3779b97f4a7c15u >> 20) & t.mask


cdef inline Pair *pair_find(const Together *t, uint64_t key) noexcept nogil:
    """The entry of a key, or the empty one where it belongs."""
    cdef uint64_t at = pair_place(t, key)
    while t.pairs[at].key and t.pairs[at].key != key:
        at = (at + 1) & t.mask
    return &t.pairs[at]


cdef inline int together_reserve(Together *t, uint64_t extra) noexcept nogil:
    """Room for `extra` more pairs, the table at most two thirds full; -1: no memory, nothing changed."""
    cdef uint64_t size = t.mask + 1 if t.pairs != NULL else 0, larger = 1024, i
    cdef Together grown
    if (t.used + extra) * 3 <= size * 2:
        return 0
    while larger * 2 < (t.live + extra) * 3:
        larger *= 2
    grown.pairs = <Pair *>zeroed(larger * sizeof(Pair))
    if grown.pairs == NULL:
        return -1
    grown.mask = larger - 1
    grown.used = grown.live = t.live
    for i in range(size):
        if t.pairs[i].count:
            pair_find(&grown, t.pairs[i].key)[0] = t.pairs[i]
    together_free(t)
    t[0] = grown
    return 0


cdef inline void together_add(Together *t, uint32_t group, const uint32_t *row, uint64_t n) noexcept nogil:
    """One more member with these contents; `together_reserve` went before."""
    cdef uint64_t i, key
    cdef Pair *pair
    for i in range(n):
        key = (<uint64_t>group << 32 | row[i]) + 1
        pair = pair_find(t, key)
        t.used += pair.key == 0
        t.live += pair.count == 0
        pair.key = key
        pair.count += 1


cdef inline void together_remove(Together *t, uint32_t group, const uint32_t *row, uint64_t n) noexcept nogil:
    """One member with these contents less, who was there."""
    cdef uint64_t i
    cdef Pair *pair
    for i in range(n):
        pair = pair_find(t, (<uint64_t>group << 32 | row[i]) + 1)
        if pair.count:
            pair.count -= 1
            t.live -= pair.count == 0


cdef inline uint64_t together_having(const Together *t, uint32_t group, const uint32_t *row, uint64_t n,
                                     uint64_t count) noexcept nogil:
    """How many of these contents exactly `count` members of the group have."""
    cdef uint64_t i, found = 0
    for i in range(n):
        if i + AHEAD < n:
            fetch(&t.pairs[pair_place(t, (<uint64_t>group << 32 | row[i + AHEAD]) + 1)])
        found += pair_find(t, (<uint64_t>group << 32 | row[i]) + 1).count == count
    return found

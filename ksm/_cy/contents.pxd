# cython: language_level=3
"""Contents by fingerprint, and what their pages settle at: one look-up a page, fetched ahead.

An open-addressing table of 8-byte entries, 32 bits of a hash and the content's number, that only grows.

A content's pages come in the order of ksmd's visits. Of each run of `limit` the first page is shared and the others
are sharing; the last run may have one page only, which is unshared until a second comes.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from ksm._cy.memory cimport fetch, release, resize, zeroed

cdef enum:
    FAR = 64        # pages ahead whose table entry is fetched: a power of two, as it is divided by
    NEAR = 12       # pages ahead whose content is fetched: its entry has come by then

    # What is counted, for each source.
    PAGES = 0
    ZEROS = 1
    SHARED = 2
    SHARING = 3
    UNSHARED = 4
    WITHIN = 5      # copies of a page of the same source
    BETWEEN = 6     # copies of a page of an earlier source, the first in this one
    COUNTED = 7

ctypedef struct Content:
    uint64_t high
    uint64_t low
    uint32_t run        # pages of the last run: 1 to limit
    uint32_t last       # source of its last page << 2 | runs of two pages and more, 2 standing for more than 1

ctypedef struct Contents:
    uint64_t *entries   # upper half of the hash << 32 | number; 0: empty
    uint64_t mask       # their number - 1; a power of two
    Content *all        # from 1 on: 0 is no content's number
    uint64_t count
    uint64_t capacity
    int64_t chains      # contents with two nodes and more
    int64_t dups        # their nodes


cdef inline void contents_free(Contents *c) noexcept nogil:
    release(c.entries, (c.mask + 1) * sizeof(uint64_t) if c.entries != NULL else 0)
    release(c.all, c.capacity * sizeof(Content))
    c.entries = NULL
    c.all = NULL
    c.count = c.capacity = 0


cdef inline int contents_reserve(Contents *c, uint64_t extra) noexcept nogil:
    """Room for `extra` more contents, the table at most half full; -1: out of memory or of numbers, nothing lost."""
    cdef uint64_t wanted = c.count + extra + 1
    cdef uint64_t size = c.mask + 1 if c.entries != NULL else 0
    cdef uint64_t larger = 1024, i, at
    cdef Content *grown
    cdef uint64_t *entries
    if wanted >= 0xffffffffu:
        return -1
    if wanted > c.capacity:
        wanted += c.capacity
        grown = <Content *>resize(c.all, c.capacity * sizeof(Content), wanted * sizeof(Content))
        if grown == NULL:
            return -1
        c.all = grown
        c.capacity = wanted
    if (c.count + extra) * 2 <= size:
        return 0
    while larger < (c.count + extra) * 2:
        larger *= 2
    entries = <uint64_t *>zeroed(larger * sizeof(uint64_t))
    if entries == NULL:
        return -1
    for i in range(size):
        if c.entries[i]:
            at = (c.entries[i] >> 32) & (larger - 1)
            while entries[at]:
                at = (at + 1) & (larger - 1)
            entries[at] = c.entries[i]
    release(c.entries, size * sizeof(uint64_t))
    c.entries = entries
    c.mask = larger - 1
    return 0


cdef inline uint64_t mixed(uint64_t high, uint64_t low) noexcept nogil:
    """The table's hash; good also for fingerprints that somebody made up, such as small numbers."""
    cdef uint64_t x = (low ^ high * 0x9e3779b97f4a7c15u)
    x ^= x >> 32
    return x * 0xd6e8feb86659fd93u


cdef inline void content_visit(Contents *c, uint64_t high, uint64_t low, uint64_t hash, uint32_t source,
                               uint32_t limit, int64_t *counts) noexcept nogil:
    """One more page; `contents_reserve` went before."""
    cdef uint64_t at = (hash >> 32) & c.mask, entry
    cdef Content *content
    cdef int64_t *row = counts + source * COUNTED
    cdef int64_t *before
    cdef uint32_t nodes
    while True:
        entry = c.entries[at]
        if entry == 0:
            break
        at = (at + 1) & c.mask
        if (entry ^ hash) >> 32:
            continue
        content = &c.all[entry & 0xffffffffu]
        if content.low == low and content.high == high:
            nodes = content.last & 3
            before = counts + (content.last >> 2) * COUNTED
            row[WITHIN if before == row else BETWEEN] += 1
            if content.run == limit:
                content.run = 1
                row[UNSHARED] += 1
            else:
                if content.run == 1:
                    before[UNSHARED] -= 1
                    before[SHARED] += 1
                    if nodes:
                        c.chains += nodes == 1
                        c.dups += 1 + (nodes == 1)
                        nodes = 2
                    else:
                        nodes = 1
                content.run += 1
                row[SHARING] += 1
            content.last = source << 2 | nodes
            return
    c.count += 1
    content = &c.all[c.count]
    content.high, content.low = high, low
    content.run, content.last = 1, source << 2
    row[UNSHARED] += 1
    c.entries[at] = (hash & 0xffffffff00000000u) | c.count


cdef inline uint64_t content_ahead(const Contents *c, const uint64_t *words) noexcept nogil:
    """The hash of a page that comes FAR later, whose entry is fetched."""
    cdef uint64_t hash = mixed(words[0], words[1])
    fetch(&c.entries[(hash >> 32) & c.mask])
    return hash


cdef inline void contents_visit(Contents *c, const uint64_t *words, const uint8_t *present, uint64_t n,
                                uint64_t zero_high, uint64_t zero_low, bint zeros_merge,
                                uint32_t source, uint32_t limit, int64_t *counts) noexcept nogil:
    """Pages by their (high, low) words; of all-zero pages only the number is counted unless they merge."""
    cdef int64_t *row = counts + source * COUNTED
    cdef uint64_t hashes[FAR]
    cdef uint64_t i, hash
    for i in range(min(n, <uint64_t>FAR)):
        hashes[i] = content_ahead(c, words + 2 * i)
    for i in range(n):
        hash = hashes[i % FAR]
        if i + FAR < n:
            hashes[i % FAR] = content_ahead(c, words + 2 * (i + FAR))
        if i + NEAR < n:    # an empty entry leads to content 0: no branch, which nobody could predict
            fetch(&c.all[c.entries[(hashes[(i + NEAR) % FAR] >> 32) & c.mask] & 0xffffffffu])
        if present != NULL and not present[i]:
            continue
        row[PAGES] += 1
        if words[2 * i + 1] == zero_low and words[2 * i] == zero_high:
            row[ZEROS] += 1
            if not zeros_merge:
                continue
        content_visit(c, words[2 * i], words[2 * i + 1], hash, source, limit, counts)

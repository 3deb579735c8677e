# cython: language_level=3
"""The engine's structs: blocks of slots, frames, stable nodes, address spaces."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    SLOTS = 64          # slots of a block: one bit each in its masks

    # Block.smart. The kernel's age goes on to 255, but beyond 8 nothing depends on it.
    OLD = 15
    ONE_SKIP = 16

    # What Block.frame holds for slots that map no anonymous frame.
    NOTHING = 0         # never touched, or unmapped
    ZERO_PAGE = 1       # the shared zero page, mapped by a read or by a huge page's split
    KSM_ZERO = 2        # the shared zero page, mapped by ksmd (use_zero_pages)
    HUGE_ZERO = 3       # part of the huge zero page, mapped by a read
    FIRST_FRAME = 4

    # Block.state: the tree that the slot's rmap item is in.
    IN_NONE = 0
    IN_STABLE = 1
    IN_UNSTABLE = 2     # 2 or 3, by the parity of the pass in which it joined

    # Frame.flags
    OWNED = 1           # data was allocated here; otherwise it is borrowed
    HASHED = 2          # hash is that of data
    KSM = 4             # merged and write-protected; without a stable node: the merge was undone for one mapper
    LAZY = 8            # MADV_FREE'd through a slot; what reclaim drops are clean slots
    HUGE = 16           # part of a transparent huge page
    CACHED = 32         # read back from swap, where other slots still have it
    DIRTY = 64          # the frame itself, by merging: reclaim does not drop it

    # StableNode.kind
    FREE_NODE = 0
    PLAIN = 1           # alone in its tree place
    DUP = 2             # one of a chain
    CHAIN = 3           # groups dups in one tree place; has no frame
    MIGRATING = 4       # taken out of its tree, its frame lies on another NUMA node


ctypedef struct Block:
    uint64_t vpn                # first virtual page number, a multiple of SLOTS
    uint64_t anon               # slots that map an anonymous frame now
    uint64_t marked             # slots in a VMA marked mergeable
    uint64_t item               # slots with an rmap item
    uint64_t clean              # slots that have not written since MADV_FREE or since a merge
    uint64_t settled            # slots whose item hangs on the node of the KSM frame that they map
    uint64_t hidden             # slots in a PROT_NONE VMA, where the profile passes over them
    uint64_t calm               # slots whose last visit found nothing equal, and which have not changed since
    uint32_t mm
    uint32_t used               # slots whose frame is not NOTHING
    uint32_t frame[64]
    uint32_t checksum[64]       # rmap item: the hash remembered at the last visit
    uint32_t link[64]           # rmap item: its stable node, or its node in the unstable tree
    uint32_t next[64]           # rmap item: neighbours on its stable node
    uint32_t prev[64]
    uint8_t state[64]
    uint8_t smart[64]           # rmap item, for smart scan: its age, at most OLD, and visits to skip * ONE_SKIP


ctypedef struct Frame:
    const uint8_t *data         # page bytes, or the 16 bytes of a fingerprint
    uint32_t hash               # bits 32 to 63 of XXH3-128, or mixed of a fingerprint: for tables and checksums
    uint32_t mappers            # slots that map it
    uint32_t node               # KSM: its stable node. Free: the next free frame
    uint16_t pins               # others who need its content: a stable node, a visit, the erase log
    uint8_t nid
    uint8_t flags


ctypedef struct Origin:         # what only swap, lazy freeing and huge pages need to know of a frame
    uint32_t swapped            # slots whose content it is in swap
    uint32_t home               # low half of the page number where it was first mapped, or read back to
    uint32_t root               # CACHED: low half of the space root that it was read back for


ctypedef struct StableNode:
    uint64_t prune_tick         # CHAIN: jiffies of the last pruning
    uint32_t hash
    uint32_t frame
    uint32_t count              # items on it; CHAIN: dups in it
    uint32_t first              # its first item's slot; CHAIN: its first dup
    uint32_t next               # DUP: neighbours in the chain. MIGRATING: in that list. Free: the next free
    uint32_t prev
    uint32_t owner              # PLAIN and CHAIN: tree place. DUP: its chain
    uint32_t candidates         # CHAIN: dups that can take another item
    uint8_t kind
    uint8_t nid
    uint8_t stale               # no slot maps the frame any more
    uint8_t unsettled           # CHAIN: a walk through it would change it


ctypedef struct Space:          # an mm
    uint32_t *blocks            # block ids by ascending address
    uint32_t count
    uint32_t capacity
    uint32_t next               # ksmd's list
    uint32_t prev
    uint32_t alive
    uint32_t exited
    uint32_t registered
    uint32_t any_marked         # has a VMA marked mergeable
    uint64_t born               # spaces in the order in which they were made
    uint64_t root               # the space at the head of the line of forks
    uint64_t items
    uint64_t merging
    uint64_t zero_pages

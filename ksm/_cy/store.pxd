# cython: language_level=3
"""The engine's state in one struct, its codes, and the arrays that grow; index 0 means "none" in each."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ksm._cy.memory cimport resize
from ksm._cy.rbtree cimport INDEX, Node
from ksm._cy.table cimport Table
from ksm._cy.types cimport SLOTS, Block, Frame, Origin, Space, StableNode


cdef extern from *:
    """
    #define ctz64(x) __builtin_ctzll(x)
    #define popcount64(x) __builtin_popcountll(x)
    #define bit_length64(x) ((x) ? 64 - __builtin_clzll(x) : 0)
    """
    int ctz64(uint64_t x) noexcept nogil
    int popcount64(uint64_t x) noexcept nogil
    int bit_length64(uint64_t x) noexcept nogil


cdef enum:
    NO_MEMORY = -1
    NO_FRAME = -2
    FINGERPRINT_BYTES = 16
    CHAIN_END = 0
    NO_SLOT = 0xffffffff
    NO_HOME = 0xffffffff
    # What an unstable search comes to when it does not find a slot.
    SEARCH_GIVEN_UP = 0xfffffffe    # no match, and the item has not joined
    NOT_FOUND = 0xffffffff          # no match; the item has joined

    NEAR_LEVELS = 8     # of a tree, from its root: what ksmd touches there stays in its caches

    # what scan() came to
    BUDGET_SPENT = 0
    PASS_ENDED = 1
    IDLE = 2


ctypedef struct Erased:         # an unstable node that left before it was built into its tree
    uint32_t node
    uint32_t after          # the number of nodes that had joined by then
    uint32_t frame          # pinned: holds the content that the node had


ctypedef struct Store:
    # Tunables, read at every visit; ksm.machine keeps them in step with sysfs.
    uint64_t max_page_sharing
    bint merge_across_nodes
    bint use_zero_pages
    bint smart_scan
    bint unmerging  # run is 2
    uint64_t prune_ticks  # stable_node_chains_prune_millisecs in ticks
    uint64_t tick  # virtual jiffies

    # Counters, named as the kernel's files.
    uint64_t pages_shared, pages_sharing, pages_unshared, rmap_items
    uint64_t stable_node_chains, stable_node_dups, ksm_zero_pages
    uint64_t full_scans, pages_scanned, pages_skipped, cow_ksm, ksm_swpin_copy

    # What a ksmd at work would have paid, for the cost model; and what this engine compared.
    uint64_t hashed, merges, already, comparisons, bytes_compared
    uint64_t stable_searches[65]    # by the depth of the tree searched: the bits of its size
    uint64_t unstable_searches[65]

    uint64_t resident, swapped_pages
    uint64_t max_resident, max_swapped
    uint32_t page_size, nodes
    bint hash_index, fingerprints_only

    uint32_t width  # bytes of a content: page_size or FINGERPRINT_BYTES
    uint32_t huge  # slots of a huge page
    bint gate_first, zero_giveback, counts_zero_pages
    uint8_t *zero  # the content of the zero page
    uint32_t zero_hash

    Block **blocks
    uint8_t *homes  # by slot, if there are several NUMA nodes: where its VMA allocates
    uint64_t home_capacity
    uint32_t block_count, block_capacity, free_blocks_count, free_blocks_capacity
    uint32_t *free_blocks
    Frame *frames
    uint32_t frame_count, frame_capacity, free_frame
    Origin *origins  # by frame; NULL until something needs them
    uint32_t origin_capacity
    Space *spaces
    uint32_t space_count, space_capacity
    uint64_t born

    # Stable trees, one root a NUMA node.
    StableNode *stable
    uint32_t stable_count, stable_capacity, free_stable
    Node *places
    uint32_t place_count, place_capacity, free_place
    uint32_t *stable_roots
    uint64_t *stable_sizes
    Table stable_table
    uint32_t *pending  # places to insert into their trees, in order
    uint32_t pending_count, pending_capacity
    uint64_t stale, unsettled, migrating
    uint32_t migrating_first
    uint64_t next_prune  # no chain is due before this tick
    bint chains_due

    # Unstable trees of this pass.
    Node *links  # up to `built`, value: the slot; its top bit: look before you trust it. Room for all that joined
    uint8_t *joined_nid
    uint32_t joined_count, link_capacity, nid_capacity, built
    uint32_t *unstable_roots
    uint64_t *unstable_sizes
    Table unstable_table  # the slot + 1 of each that joined, as long as nothing changed
    Erased *erased
    uint32_t erased_count, erased_capacity, erased_done
    bint implicit  # only calm slots have joined so far: their states say which, nothing else does
    uint64_t implicit_most  # how many these can be: the calm slots when they were last looked at
    uint64_t join_most  # how many can join in this pass, if nobody leaves: the rmap items at its start
    bint calm_valid  # no two calm slots, and no calm slot and a node with room, have equal content
    bint unstable_changed  # something in the unstable trees changed: walk them
    bint check_all  # a shared frame became KSM: trust no unstable node

    # ksmd's position: the space (0: between passes) and the next page.
    uint32_t cursor
    uint64_t cursor_vpn


cdef inline uint64_t levels_beyond(const uint64_t *searches, int near) noexcept nogil:
    """The levels that so many searches descended, without the first `near` of each."""
    cdef uint64_t levels = 0
    cdef int depth
    for depth in range(near + 1, 65):
        levels += <uint64_t>(depth - near) * searches[depth]
    return levels


cdef inline uint64_t below(uint64_t n) noexcept nogil:
    """The mask of the bits under n, n <= 64."""
    return <uint64_t>-1 if n >= 64 else (<uint64_t>1 << n) - 1


cdef inline int grow(void **array, uint32_t *capacity, uint64_t wanted, size_t size) noexcept nogil:
    """Room for `wanted` elements, by half as much again; -1 and nothing changed if there is none."""
    cdef uint64_t roomy = capacity[0] + (capacity[0] >> 1) + 64
    cdef void *moved
    if wanted <= capacity[0]:
        return 0
    if roomy < wanted:
        roomy = wanted
    if roomy > INDEX:
        roomy = INDEX
        if wanted > roomy:
            return NO_MEMORY
    moved = resize(array[0], capacity[0] * size, roomy * size)
    if moved == NULL:
        return NO_MEMORY
    array[0] = moved
    capacity[0] = <uint32_t>roomy
    return 0


cdef inline uint64_t range_mask(uint64_t first, uint64_t vpn, uint64_t n) noexcept nogil:
    """The slots of the block that starts at `first` that lie in the n pages from vpn on."""
    cdef uint64_t low = vpn - first if vpn > first else 0
    cdef uint64_t high = vpn + n - first if vpn + n > first else 0
    if low >= SLOTS:
        return 0
    return below(high) & ~below(low)

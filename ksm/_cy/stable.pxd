# cython: language_level=3
"""Stable nodes: the items that hang on them, their chains, their trees, and the table in front of the trees.

The hash index is exact for one reason. A search through trees in which nothing is stale, changed or unsettled is a
function of content alone, so a table may answer it; the places that it would have inserted are kept in order
(`pending`) and put into the trees before the first search that could meet something else (`stable_clean`).
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memset

from ksm._cy.frames cimport compare_at, frame_hash, frame_unpin
from ksm._cy.page cimport prefix_key
from ksm._cy.rbtree cimport rb_erase, rb_insert
from ksm._cy.store cimport Store, CHAIN_END, NO_SLOT, bit_length64
from ksm._cy.table cimport table_next, table_put, table_remove, table_start
from ksm._cy.types cimport CHAIN, DUP, FREE_NODE, IN_NONE, IN_STABLE, KSM, MIGRATING, PLAIN, Block, StableNode


cdef inline void hang(Store *m, uint32_t slot, uint32_t n) noexcept nogil:
    """Put the slot's item, which is in no tree, on the stable node n."""
    cdef Block *b = m.blocks[slot >> 6]
    cdef uint32_t i = slot & 63, first = m.stable[n].first
    b.state[i] = IN_STABLE
    b.link[i] = n
    b.prev[i] = NO_SLOT
    b.next[i] = NO_SLOT
    b.settled |= <uint64_t>1 << i
    if m.stable[n].count:
        m.blocks[first >> 6].prev[first & 63] = slot
        b.next[i] = first
        m.pages_sharing += 1
    else:
        m.pages_shared += 1
    m.stable[n].first = slot
    set_count(m, n, m.stable[n].count + 1)
    m.spaces[b.mm].merging += 1


cdef inline void unhang(Store *m, uint32_t slot) noexcept nogil:
    """Take the slot's item off its stable node."""
    cdef Block *b = m.blocks[slot >> 6]
    cdef uint32_t i = slot & 63, n = b.link[i], prev = b.prev[i], next = b.next[i]
    if prev != NO_SLOT:
        m.blocks[prev >> 6].next[prev & 63] = next
    else:
        m.stable[n].first = next
    if next != NO_SLOT:
        m.blocks[next >> 6].prev[next & 63] = prev
    b.state[i] = IN_NONE
    b.settled &= ~(<uint64_t>1 << i)
    m.spaces[b.mm].merging -= 1
    if m.stable[n].count > 1:
        m.pages_sharing -= 1
    else:
        m.pages_shared -= 1
    set_count(m, n, m.stable[n].count - 1)


cdef inline bint candidate(Store *m, uint32_t n, uint32_t more) noexcept nogil:
    """Whether the node, `more` items fuller, can take another one."""
    return m.stable[n].count > 0 and m.stable[n].count + more < m.max_page_sharing


cdef inline void set_count(Store *m, uint32_t n, uint32_t count) noexcept nogil:
    cdef bint before = candidate(m, n, 0)
    m.stable[n].count = count
    if not before and candidate(m, n, 0):
        m.calm_valid = False    # a calm slot may find it
    if m.stable[n].kind == DUP:
        m.stable[m.stable[n].owner].candidates += candidate(m, n, 0) - <int>before
        settle(m, m.stable[n].owner)


cdef inline void settle(Store *m, uint32_t chain) noexcept nogil:
    """Note whether a walk through the chain could change it.

    None does with two dups or more of which none, or only the head, can take an item.
    """
    cdef StableNode *c = &m.stable[chain]
    cdef bint unsettled = not (c.count >= 2 and (c.candidates == 0 or
                                                 (c.candidates == 1 and candidate(m, c.first, 0))))
    m.unsettled += unsettled - <int>c.unsettled
    c.unsettled = unsettled


cdef inline uint32_t new_stable(Store *m, uint8_t kind, uint8_t nid, uint32_t hash) noexcept nogil:
    """An empty stable node or chain; `reserve` went before."""
    cdef uint32_t n = m.free_stable
    if n:
        m.free_stable = m.stable[n].next
    else:
        n = m.stable_count
        m.stable_count += 1
    memset(&m.stable[n], 0, sizeof(StableNode))
    m.stable[n].kind = kind
    m.stable[n].nid = nid
    m.stable[n].hash = hash
    return n


cdef inline void free_stable_node(Store *m, uint32_t n) noexcept nogil:
    m.stable[n].kind = FREE_NODE
    m.stable[n].next = m.free_stable
    m.free_stable = n


cdef inline uint32_t table_key(uint32_t hash, uint8_t nid) noexcept nogil:
    return hash ^ (<uint32_t>nid * 0x9e3779b9u)


cdef inline const uint8_t *place_content(Store *m, uint32_t place) noexcept nogil:
    """The content of a tree place; a chain there must not be empty."""
    cdef uint32_t n = m.places[place].value
    if m.stable[n].kind == CHAIN:
        n = m.stable[n].first
    return m.frames[m.stable[n].frame].data


cdef inline void erase_place(Store *m, uint32_t n) noexcept nogil:
    """Take the plain node or chain n out of its tree."""
    cdef uint32_t place = m.stable[n].owner, nid = m.stable[n].nid
    rb_erase(m.places, &m.stable_roots[nid], place)
    m.stable_sizes[nid] -= 1
    if m.hash_index:
        table_remove(&m.stable_table, table_key(m.stable[n].hash, m.stable[n].nid), place)
    m.places[place].left = m.free_place
    m.free_place = place


cdef inline void leave_chain(Store *m, uint32_t n) noexcept nogil:
    """Take the dup n out of its chain, which may be left empty."""
    cdef StableNode *node = &m.stable[n]
    cdef StableNode *chain = &m.stable[node.owner]
    if node.prev != CHAIN_END:
        m.stable[node.prev].next = node.next
    else:
        chain.first = node.next
    if node.next != CHAIN_END:
        m.stable[node.next].prev = node.prev
    chain.candidates -= candidate(m, n, 0)
    chain.count -= 1
    m.stable_node_dups -= 1
    settle(m, node.owner)


cdef inline void enter_chain(Store *m, uint32_t n, uint32_t chain) noexcept nogil:
    """Put n at the head of the chain."""
    cdef StableNode *node = &m.stable[n]
    cdef StableNode *c = &m.stable[chain]
    node.kind = DUP
    node.owner = chain
    node.nid = c.nid
    node.prev = CHAIN_END
    node.next = c.first
    if c.first != CHAIN_END:
        m.stable[c.first].prev = n
    c.first = n
    c.count += 1
    c.candidates += candidate(m, n, 0)
    m.stable_node_dups += 1
    settle(m, chain)


cdef inline void free_chain(Store *m, uint32_t chain) noexcept nogil:
    """The record of a chain that is out of the tree."""
    m.unsettled -= m.stable[chain].unsettled
    m.stable_node_chains -= 1
    free_stable_node(m, chain)


cdef inline void detach_node(Store *m, uint32_t n) noexcept nogil:
    """Take a stable node out of its tree, chain or the migrating list."""
    cdef StableNode *node = &m.stable[n]
    build_stable(m)
    if node.kind == DUP:
        leave_chain(m, n)
    elif node.kind == PLAIN:
        erase_place(m, n)
    elif node.kind == MIGRATING:
        if node.prev:
            m.stable[node.prev].next = node.next
        else:
            m.migrating_first = node.next
        if node.next:
            m.stable[node.next].prev = node.prev
        m.migrating -= 1


cdef inline void drop_node(Store *m, uint32_t n) noexcept nogil:
    """Forget a stable node with all its items."""
    cdef uint32_t frame = m.stable[n].frame
    while m.stable[n].count:
        unhang(m, m.stable[n].first)
    detach_node(m, n)
    m.stale -= m.stable[n].stale
    m.frames[frame].node = 0
    if m.frames[frame].mappers == 0:    # swap may have it cached still
        m.frames[frame].flags &= ~KSM
    frame_unpin(m, frame)
    free_stable_node(m, n)


cdef inline uint32_t choose(Store *m, uint32_t n, bint prune) noexcept nogil:
    """The node that stands for tree place n (plain or chain) on a walk; 0: the tree changed, start again."""
    cdef StableNode *chain = &m.stable[n]
    cdef uint32_t dup, next, best = 0
    if chain.kind == PLAIN:
        if chain.stale:
            drop_node(m, n)
            return 0
        return n
    prune = prune and m.tick >= chain.prune_tick + m.prune_ticks
    if prune:
        chain.prune_tick = m.tick
    dup = chain.first
    while dup != CHAIN_END:
        next = m.stable[dup].next
        if m.stable[dup].stale:
            drop_node(m, dup)
        elif candidate(m, dup, 0) and (best == 0 or m.stable[dup].count > m.stable[best].count):
            best = dup
            if not prune:
                break
        dup = next
    if chain.count == 0:
        build_stable(m)
        erase_place(m, n)
        free_chain(m, n)
        return 0
    # Before 6.11 a chain collapses only on a pruning walk that leaves one dup, which can take an item.
    if chain.count == 1 and (m.gate_first or (prune and best)):
        return collapse(m, n)
    if best and best != chain.first and candidate(m, best, 1):
        leave_chain(m, best)
        enter_chain(m, best, n)
    return best if best else chain.first


cdef inline uint32_t collapse(Store *m, uint32_t chain) noexcept nogil:
    """A chain of one dup: the dup takes the tree place itm."""
    cdef uint32_t dup = m.stable[chain].first, place = m.stable[chain].owner
    leave_chain(m, dup)
    m.stable[dup].kind = PLAIN
    m.stable[dup].owner = place
    m.places[place].value = dup
    free_chain(m, chain)
    return dup


cdef inline bint stable_clean(Store *m) noexcept nogil:
    """Whether a search through the stable trees depends on contents alone."""
    return (m.hash_index and m.stale == 0 and m.unsettled == 0 and m.migrating == 0
            and not m.chains_due)


cdef inline uint32_t stable_lookup(Store *m, uint32_t f, uint8_t nid) noexcept nogil:
    """The tree place with f's content, from the table; 0: none."""
    cdef uint32_t hash = frame_hash(m, f), key = table_key(hash, nid)
    cdef uint64_t at = table_start(&m.stable_table, key)
    cdef uint32_t place, n
    while True:
        place = table_next(&m.stable_table, key, &at)
        if place == 0:
            return 0
        n = m.places[place].value
        if (m.stable[n].hash == hash and m.stable[n].nid == nid and
                memcmp(place_content(m, place), m.frames[f].data, m.width) == 0):
            return place


cdef inline uint32_t stable_walk(Store *m, uint32_t f, uint8_t nid, bint prune, uint32_t *chosen,
                                 uint32_t *parent, bint *left) noexcept nogil:
    """The tree place with f's content, by walking, and what `choose` chose there; 0: none, and where it would hang.

    Everything on the path is walked as a match would be: stale nodes go, chains collapse or reorder.
    """
    cdef const uint8_t *data = m.frames[f].data
    cdef uint64_t prefix = prefix_key(data)
    cdef bint quiet
    cdef uint32_t place, n
    cdef int order
    build_stable(m)
    while True:
        quiet = stable_clean(m)
        parent[0] = 0
        left[0] = False
        place = m.stable_roots[nid]
        n = 1
        while place:
            if not quiet:
                n = choose(m, m.places[place].value, prune)
                if n == 0:
                    break
            order = compare_at(m, prefix, data, &m.places[place], place_content(m, place))
            if order == 0:
                chosen[0] = choose(m, m.places[place].value, prune) if quiet else n
                return place
            parent[0] = place
            left[0] = order < 0
            place = m.places[place].left if order < 0 else m.places[place].right
        if n:
            return 0


cdef inline void build_stable(Store *m) noexcept nogil:
    """Insert the pending places into their trees, in the order in which they came."""
    cdef uint32_t i, place, at, parent
    cdef uint8_t nid
    cdef bint left
    cdef int order
    cdef const uint8_t *data
    for i in range(m.pending_count):
        place = m.pending[i]
        nid = m.stable[m.places[place].value].nid
        data = place_content(m, place)
        at = m.stable_roots[nid]
        parent = 0
        left = False
        while at:
            order = compare_at(m, m.places[place].prefix, data, &m.places[at], place_content(m, at))
            parent = at
            left = order < 0
            at = m.places[at].left if left else m.places[at].right
        rb_insert(m.places, &m.stable_roots[nid], place, parent, left)
    m.pending_count = 0


cdef inline bint misplaced(Store *m, uint32_t n) noexcept nogil:
    """Whether the stable node's frame has gone to another NUMA node than that of its tree."""
    return not m.merge_across_nodes and m.frames[m.stable[n].frame].nid != m.stable[n].nid


cdef inline uint32_t stable_search(Store *m, uint32_t f, uint8_t nid) noexcept nogil:
    """Visit's search: the stable node that can take an item with f's content; 0: none."""
    cdef uint32_t place, parent, n = 0
    cdef bint left
    m.stable_searches[bit_length64(m.stable_sizes[nid])] += 1
    if stable_clean(m):
        place = stable_lookup(m, f, nid)
        if place:
            n = choose(m, m.places[place].value, True)
    else:
        stable_walk(m, f, nid, True, &n, &parent, &left)
    if n == 0 or not candidate(m, n, 0):
        return 0
    if misplaced(m, n):
        start_migrating(m, n)
        return 0
    return n


cdef inline uint32_t stable_insert(Store *m, uint32_t f, uint8_t nid) noexcept nogil:
    """Make a stable node for the KSM frame f; the same content in the tree makes it a dup."""
    cdef uint32_t n = new_stable(m, PLAIN, nid, frame_hash(m, f)), place, chosen, parent = 0
    cdef bint left = False, clean
    m.stable_searches[bit_length64(m.stable_sizes[nid])] += 1
    clean = stable_clean(m)
    if clean:
        place = stable_lookup(m, f, nid)
    else:
        place = stable_walk(m, f, nid, False, &chosen, &parent, &left)
    m.stable[n].frame = f
    m.frames[f].node = n
    m.frames[f].pins += 1
    if place:
        add_dup(m, n, place)
    else:
        add_place(m, n, clean, parent, left)
    return n


cdef inline void add_dup(Store *m, uint32_t n, uint32_t place) noexcept nogil:
    """Make n the head of the chain at a tree place, which is made if need be."""
    cdef uint32_t other = m.places[place].value, chain
    if m.stable[other].kind == CHAIN:
        enter_chain(m, n, other)
        return
    chain = new_stable(m, CHAIN, m.stable[other].nid, m.stable[other].hash)
    m.stable[chain].owner = place
    m.stable[chain].prune_tick = m.tick
    m.stable_node_chains += 1
    m.next_prune = min(m.next_prune, m.tick + m.prune_ticks)
    m.places[place].value = chain
    enter_chain(m, other, chain)
    enter_chain(m, n, chain)


cdef inline void add_place(Store *m, uint32_t n, bint later, uint32_t parent, bint left) noexcept nogil:
    """Give n a tree place of its own, now or when the tree is next built."""
    cdef uint32_t place = m.free_place
    cdef uint8_t nid = m.stable[n].nid
    if place:
        m.free_place = m.places[place].left
    else:
        place = m.place_count
        m.place_count += 1
    m.stable[n].kind = PLAIN
    m.stable[n].owner = place
    m.places[place].value = n
    m.places[place].prefix = prefix_key(m.frames[m.stable[n].frame].data)
    m.stable_sizes[nid] += 1
    if later:
        m.pending[m.pending_count] = place
        m.pending_count += 1
    else:
        rb_insert(m.places, &m.stable_roots[nid], place, parent, left)
    if m.hash_index:
        table_put(&m.stable_table, table_key(m.stable[n].hash, nid), place)


cdef inline void start_migrating(Store *m, uint32_t n) noexcept nogil:
    """Take a stable node out of its tree; it waits until a slot that maps its frame is visited."""
    detach_node(m, n)
    wait(m, n)


cdef inline void wait(Store *m, uint32_t n) noexcept nogil:
    """Put a node that stands nowhere on the list of those to be placed anew."""
    cdef StableNode *node = &m.stable[n]
    node.kind = MIGRATING
    node.prev = 0
    node.next = m.migrating_first
    if node.next:
        m.stable[node.next].prev = n
    m.migrating_first = n
    m.migrating += 1


cdef inline uint32_t place_migrating(Store *m, uint32_t n, uint8_t nid) noexcept nogil:
    """Place the waiting node of a visited slot in the tree of nid.

    The node that the slot belongs to from now on: n, or one to merge with; 0: none, the search goes on elsewhere.
    """
    cdef uint32_t f = m.stable[n].frame, parent = 0, place, other = 0
    cdef bint left = False, lonely = m.frames[f].mappers == 1
    m.stable_searches[bit_length64(m.stable_sizes[nid])] += 1
    place = stable_walk(m, f, nid, True, &other, &parent, &left)
    if place and lonely:
        if not candidate(m, other, 0):
            return 0
        if not misplaced(m, other):
            return other
    detach_node(m, n)
    m.stable[n].nid = nid
    m.stable[n].kind = PLAIN
    if place and lonely:
        take_place(m, n, other)
    elif place:
        add_dup(m, n, place)
    else:
        add_place(m, n, False, parent, left)
    return n if candidate(m, n, 0) else 0


cdef inline void take_place(Store *m, uint32_t n, uint32_t other) noexcept nogil:
    """n stands where `other` stood, which has left this NUMA node in its turn and waits."""
    cdef uint32_t owner = m.stable[other].owner
    if m.stable[other].kind == DUP:
        leave_chain(m, other)
        enter_chain(m, n, owner)
    else:
        m.stable[n].owner = owner
        m.places[owner].value = n
    wait(m, other)


cdef inline void note_due_chains(Store *m) noexcept nogil:
    """Whether a walk now would prune a chain; only its prune_tick would change, but that matters later."""
    cdef uint32_t n
    m.chains_due = False
    if m.stable_node_chains == 0 or m.tick < m.next_prune:
        return
    m.next_prune = <uint64_t>-1
    for n in range(1, m.stable_count):
        if m.stable[n].kind == CHAIN and m.stable[n].prune_tick != m.tick:
            m.next_prune = min(m.next_prune, m.stable[n].prune_tick + m.prune_ticks)
    m.chains_due = m.tick >= m.next_prune


cdef inline int remove_node(Store *m, uint32_t n) noexcept nogil:
    """Sweep one tree place: 1 if a frame of it is still mapped."""
    cdef uint32_t dup
    if m.stable[n].kind != CHAIN:
        if m.frames[m.stable[n].frame].mappers:
            return 1
        drop_node(m, n)
        return 0
    while m.stable[n].count:
        dup = m.stable[n].first
        if m.frames[m.stable[dup].frame].mappers:
            return 1
        drop_node(m, dup)
    build_stable(m)
    erase_place(m, n)
    free_chain(m, n)
    return 0


cdef inline bint in_table(Store *m, uint32_t n) noexcept nogil:
    """Whether the table leads to the tree place of n (dups: true)."""
    cdef uint32_t key = table_key(m.stable[n].hash, m.stable[n].nid)
    cdef uint64_t at = table_start(&m.stable_table, key)
    cdef uint32_t place
    if not m.hash_index or m.stable[n].kind == DUP or m.stable[n].kind == MIGRATING:
        return True
    while True:
        place = table_next(&m.stable_table, key, &at)
        if place == 0 or place == m.stable[n].owner:
            return place != 0

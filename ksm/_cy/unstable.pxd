# cython: language_level=3
"""The unstable trees of one pass, the table in front of them, and how they are built when it matters.

Items that join are numbered and entered in the table; those that leave again are logged. Both together give the trees.

A pass may begin `implicit`: as long as only calm slots join, which are known to find nothing, their states alone say
who joined, in the order of the walk. Numbers and table are made up for when anything else happens.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ksm._cy.frames cimport compare, compare_at, frame_hash, frame_unpin, mergeable, same_content, slot_frame
from ksm._cy.memory cimport release, zeroed
from ksm._cy.page cimport prefix_key
from ksm._cy.rbtree cimport INDEX, VALUE_FLAG, Node, rb_erase, rb_insert
from ksm._cy.stable cimport table_key
from ksm._cy.store cimport Store, Erased, SEARCH_GIVEN_UP, NO_MEMORY, NOT_FOUND, bit_length64, ctz64, grow
from ksm._cy.table cimport table_clear, table_next, table_put, table_remove, table_reserve, table_start
from ksm._cy.types cimport IN_UNSTABLE, KSM, SLOTS, Block, Space

cdef enum:
    MANY_PINS = 0xfff0      # of a frame: more would not fit


cdef inline uint8_t unstable_state(Store *m) noexcept nogil:
    """The state of items that joined in this pass."""
    return <uint8_t>(IN_UNSTABLE + (m.full_scans & 1))


cdef inline uint8_t nid_of_joined(Store *m, uint32_t node) noexcept nogil:
    return m.joined_nid[node] if m.nodes > 1 else 0


cdef inline int reserve_joined(Store *m, uint64_t extra) noexcept nogil:
    """Room for `extra` more nodes in the trees and the table; -1: no memory."""
    cdef uint64_t wanted = m.joined_count + extra
    if m.built <= 1 and fresh_links(m, wanted) < 0:
        return NO_MEMORY
    if grow(<void **>&m.links, &m.link_capacity, wanted, sizeof(Node)) < 0:
        return NO_MEMORY
    if m.nodes > 1 and grow(<void **>&m.joined_nid, &m.nid_capacity, wanted, 1) < 0:
        return NO_MEMORY
    return table_reserve(&m.unstable_table, extra, m.join_most)


cdef inline int fresh_links(Store *m, uint64_t wanted) noexcept nogil:
    """Room for the trees while nothing is in them: nothing is moved, and so nothing touched."""
    cdef uint64_t roomy = min(wanted + (wanted >> 1), <uint64_t>INDEX)
    cdef Node *links
    if wanted <= m.link_capacity or wanted > roomy:
        return 0
    links = <Node *>zeroed(roomy * sizeof(Node))
    if links == NULL:
        return NO_MEMORY
    release(m.links, m.link_capacity * sizeof(Node))
    m.links = links
    m.link_capacity = <uint32_t>roomy
    return 0


cdef inline void clear_unstable(Store *m) noexcept nogil:
    """Empty the unstable trees: a pass begins or ends."""
    cdef uint32_t i
    for i in range(m.erased_count):
        frame_unpin(m, m.erased[i].frame)
    m.erased_count = m.erased_done = 0
    m.joined_count = m.built = 1
    m.implicit = False
    m.unstable_changed = m.check_all = False
    table_clear(&m.unstable_table)
    for i in range(m.nodes):
        m.unstable_roots[i] = 0
        m.unstable_sizes[i] = 0


cdef inline void make_explicit(Store *m) noexcept nogil:
    """Number those who joined in an implicit pass, and enter them in the table; `reserve_joined` went before."""
    cdef uint32_t mm = m.spaces[0].next, at, id, i
    cdef uint8_t joined = unstable_state(m)
    cdef uint64_t bits
    cdef Block *b
    m.implicit = False
    while mm:
        for at in range(m.spaces[mm].count):
            id = m.spaces[mm].blocks[at]
            b = m.blocks[id]
            bits = b.item & b.calm
            while bits:
                i = ctz64(bits)
                bits &= bits - 1
                if b.state[i] == joined:
                    b.link[i] = new_joined(m, 0)
                    table_put(&m.unstable_table, table_key(frame_hash(m, b.frame[i]), 0), (id << 6 | i) + 1)
        mm = m.spaces[mm].next


cdef inline void list_joined(Store *m) noexcept nogil:
    """Write down whose the nodes are that the trees lack: items know theirs, and the log those who left. O(slots)."""
    cdef uint32_t mm = m.spaces[0].next, at, id, i
    cdef uint8_t joined = unstable_state(m)
    cdef uint64_t bits
    cdef Block *b
    while mm:
        for at in range(m.spaces[mm].count):
            id = m.spaces[mm].blocks[at]
            b = m.blocks[id]
            bits = b.item
            while bits:
                i = ctz64(bits)
                bits &= bits - 1
                if b.state[i] == joined and b.link[i] >= m.built:
                    m.links[b.link[i]].value = id << 6 | i
        mm = m.spaces[mm].next
    for i in range(m.erased_done, m.erased_count):
        m.links[m.erased[i].node].value = VALUE_FLAG | m.erased[i].frame    # where its content is


cdef inline uint32_t new_joined(Store *m, uint8_t nid) noexcept nogil:
    cdef uint32_t node = m.joined_count
    m.joined_count += 1
    if m.nodes > 1:
        m.joined_nid[node] = nid
    return node


cdef inline void unstable_erase(Store *m, uint32_t slot) noexcept nogil:
    """Take a slot's node out of its unstable tree, or note that it is to leave when the tree is built."""
    cdef uint32_t frame, node
    cdef uint8_t nid
    if m.implicit:
        make_explicit(m)
    node = m.blocks[slot >> 6].link[slot & 63]
    nid = nid_of_joined(m, node)
    frame = slot_frame(m, slot)
    m.unstable_sizes[nid] -= 1
    if node >= m.built and (m.frames[frame].pins >= MANY_PINS or grow(
            <void **>&m.erased, &m.erased_capacity, <uint64_t>m.erased_count + 1, sizeof(Erased)) < 0):
        build_unstable(m)   # the log cannot take it
    if node < m.built:
        rb_erase(m.links, &m.unstable_roots[nid], node)
        return
    table_remove(&m.unstable_table, table_key(frame_hash(m, frame), nid), slot + 1)
    m.frames[frame].pins += 1
    m.erased[m.erased_count].node = node
    m.erased[m.erased_count].after = m.joined_count
    m.erased[m.erased_count].frame = frame
    m.erased_count += 1


cdef inline void touch_unstable(Store *m, uint32_t slot) noexcept nogil:
    """To be called before a slot changes: if its item is in an unstable tree, shape matters from now on."""
    cdef Block *b = m.blocks[slot >> 6]
    if b.state[slot & 63] == unstable_state(m) and (b.item >> (slot & 63)) & 1:
        build_unstable(m)
        m.links[b.link[slot & 63]].value |= VALUE_FLAG


cdef inline void build_unstable(Store *m) noexcept nogil:
    """Insert and erase what joined and left in this pass, in that order; from now on the trees are kept."""
    if m.implicit:
        make_explicit(m)
    m.unstable_changed = True
    if m.built < m.joined_count:
        list_joined(m)
    while m.built < m.joined_count:
        while m.erased_done < m.erased_count and m.erased[m.erased_done].after <= m.built:
            erase_built(m, m.erased_done)
        build_joined(m, m.built)
        m.built += 1
    while m.erased_done < m.erased_count:
        erase_built(m, m.erased_done)


cdef inline void erase_built(Store *m, uint32_t i) noexcept nogil:
    cdef uint32_t node = m.erased[i].node
    rb_erase(m.links, &m.unstable_roots[nid_of_joined(m, node)], node)
    m.erased_done += 1


cdef inline void build_joined(Store *m, uint32_t node) noexcept nogil:
    """Insert a node while nothing in the tree has changed."""
    cdef const uint8_t *data = joined_content(m, node)
    cdef uint32_t *root = &m.unstable_roots[nid_of_joined(m, node)]
    cdef uint32_t at = root[0], parent = 0
    cdef bint left = False
    cdef int order
    m.links[node].prefix = prefix_key(data)
    while at:
        order = compare_at(m, m.links[node].prefix, data, &m.links[at], joined_content(m, at))
        parent = at
        left = order < 0
        at = m.links[at].left if left else m.links[at].right
    rb_insert(m.links, root, node, parent, left)


cdef inline const uint8_t *joined_content(Store *m, uint32_t node) noexcept nogil:
    """What an unchanged or noted-as-erased node holds."""
    cdef uint32_t value = m.links[node].value
    return m.frames[value & INDEX if value & VALUE_FLAG else slot_frame(m, value)].data


cdef inline uint32_t unstable_search(Store *m, uint32_t slot, uint32_t f, uint8_t nid) noexcept nogil:
    """Visit's search: the slot with f's content in the unstable tree, or SEARCH_GIVEN_UP or NOT_FOUND."""
    m.unstable_searches[bit_length64(m.unstable_sizes[nid])] += 1
    if m.implicit:
        make_explicit(m)
    if m.hash_index and not m.unstable_changed:
        return unstable_lookup(m, slot, f, nid)
    return unstable_walk(m, slot, f, nid)


cdef inline uint32_t unstable_lookup(Store *m, uint32_t slot, uint32_t f, uint8_t nid) noexcept nogil:
    """`unstable_search` by the table, while nothing in the trees has changed."""
    cdef uint32_t key = table_key(frame_hash(m, f), nid)
    cdef uint64_t at = table_start(&m.unstable_table, key)
    cdef uint32_t other, g
    while True:
        other = table_next(&m.unstable_table, key, &at)
        if other == 0:
            break
        other -= 1
        if nid_of_joined(m, m.blocks[other >> 6].link[other & 63]) != nid:
            continue
        g = slot_frame(m, other)
        if g == f:
            return SEARCH_GIVEN_UP
        if same_content(m, f, g):
            return SEARCH_GIVEN_UP if m.frames[f].flags & KSM else other
    join(m, slot, nid)
    table_put(&m.unstable_table, key, slot + 1)
    return NOT_FOUND


cdef inline uint32_t join(Store *m, uint32_t slot, uint8_t nid) noexcept nogil:
    """Make the slot's item an unstable node, which is not linked yet."""
    cdef Block *b = m.blocks[slot >> 6]
    cdef uint32_t node = new_joined(m, nid)
    b.state[slot & 63] = unstable_state(m)
    b.link[slot & 63] = node
    m.unstable_sizes[nid] += 1
    m.pages_unshared += 1
    b.calm |= <uint64_t>1 << (slot & 63)
    m.calm_valid = False
    return node


cdef inline uint32_t unstable_walk(Store *m, uint32_t slot, uint32_t f, uint8_t nid) noexcept nogil:
    """`unstable_search` by walking the tree as it is, compared by the contents of now."""
    cdef const uint8_t *data = m.frames[f].data
    cdef uint64_t prefix = prefix_key(data)
    cdef uint32_t at = m.unstable_roots[nid], parent = 0, other, g, node
    cdef bint left = False
    cdef int order
    while at:
        other = m.links[at].value & INDEX
        if m.links[at].value & VALUE_FLAG or m.check_all:
            if not mergeable(m, other):
                return SEARCH_GIVEN_UP
            g = slot_frame(m, other)
            if g == f:
                return SEARCH_GIVEN_UP
            order = compare(m, data, m.frames[g].data)
        else:
            g = slot_frame(m, other)
            if g == f:
                return SEARCH_GIVEN_UP
            order = compare_at(m, prefix, data, &m.links[at], m.frames[g].data)
        if order == 0:
            if m.frames[f].flags & KSM or not m.merge_across_nodes and m.frames[g].nid != nid:
                return SEARCH_GIVEN_UP
            return other
        parent = at
        left = order < 0
        at = m.links[at].left if left else m.links[at].right
    node = join(m, slot, nid)
    m.links[node].value = slot
    m.links[node].prefix = prefix
    rb_insert(m.links, &m.unstable_roots[nid], node, parent, left)
    m.built = m.joined_count
    return NOT_FOUND

# cython: language_level=3
"""Red-black trees over one array of nodes: textbook insertion and removal, no keys, no allocation.

A node is an index; 0 is nil (black). The caller finds the place by its own comparison and links the
node there. The shape is what the textbook algorithms give, rotation for rotation (Cormen, Leiserson,
Rivest, Stein, "Introduction to Algorithms", chapter 13): KSM's counters depend on it.
"""

from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    RED = 0x80000000u
    VALUE_FLAG = 0x80000000u
    INDEX = 0x7fffffff

ctypedef struct Node:
    uint32_t left
    uint32_t right
    uint32_t parent     # the top bit is the colour: set is red
    uint32_t value      # the owner's; its top bit is the owner's too
    uint64_t prefix     # first 8 bytes of the key, big-endian: most comparisons end here


cdef inline uint32_t rb_parent(const Node *t, uint32_t n) noexcept nogil:
    return t[n].parent & INDEX


cdef inline bint rb_is_red(const Node *t, uint32_t n) noexcept nogil:
    return t[n].parent & RED != 0


cdef inline void rb_set_parent(Node *t, uint32_t n, uint32_t parent) noexcept nogil:
    t[n].parent = (t[n].parent & RED) | parent


cdef inline void rb_replace_child(Node *t, uint32_t *root, uint32_t parent, uint32_t old, uint32_t new) noexcept nogil:
    if parent == 0:
        root[0] = new
    elif t[parent].left == old:
        t[parent].left = new
    else:
        t[parent].right = new


cdef inline void rb_rotate_left(Node *t, uint32_t *root, uint32_t n) noexcept nogil:
    cdef uint32_t up = t[n].right, parent = rb_parent(t, n)
    t[n].right = t[up].left
    if t[up].left:
        rb_set_parent(t, t[up].left, n)
    rb_set_parent(t, up, parent)
    rb_replace_child(t, root, parent, n, up)
    t[up].left = n
    rb_set_parent(t, n, up)


cdef inline void rb_rotate_right(Node *t, uint32_t *root, uint32_t n) noexcept nogil:
    cdef uint32_t up = t[n].left, parent = rb_parent(t, n)
    t[n].left = t[up].right
    if t[up].right:
        rb_set_parent(t, t[up].right, n)
    rb_set_parent(t, up, parent)
    rb_replace_child(t, root, parent, n, up)
    t[up].right = n
    rb_set_parent(t, n, up)


cdef inline void rb_insert(Node *t, uint32_t *root, uint32_t n, uint32_t parent, bint at_left) noexcept nogil:
    """Link `n` as a child of `parent` (0: as the root) and restore the colours. O(log n)."""
    cdef uint32_t grand, uncle
    t[n].left = t[n].right = 0
    t[n].parent = parent | RED
    if parent == 0:
        root[0] = n
    elif at_left:
        t[parent].left = n
    else:
        t[parent].right = n
    while True:
        parent = rb_parent(t, n)
        if parent == 0 or not rb_is_red(t, parent):
            break
        grand = rb_parent(t, parent)
        if parent == t[grand].left:
            uncle = t[grand].right
            if uncle and rb_is_red(t, uncle):
                t[parent].parent &= INDEX
                t[uncle].parent &= INDEX
                t[grand].parent |= RED
                n = grand
                continue
            if n == t[parent].right:
                rb_rotate_left(t, root, parent)
                n = parent
                parent = rb_parent(t, n)
            t[parent].parent &= INDEX
            t[grand].parent |= RED
            rb_rotate_right(t, root, grand)
        else:
            uncle = t[grand].left
            if uncle and rb_is_red(t, uncle):
                t[parent].parent &= INDEX
                t[uncle].parent &= INDEX
                t[grand].parent |= RED
                n = grand
                continue
            if n == t[parent].left:
                rb_rotate_right(t, root, parent)
                n = parent
                parent = rb_parent(t, n)
            t[parent].parent &= INDEX
            t[grand].parent |= RED
            rb_rotate_left(t, root, grand)
    t[root[0]].parent &= INDEX


cdef inline void rb_erase_fixup(Node *t, uint32_t *root, uint32_t n) noexcept nogil:
    """`n` (nil allowed: its parent was set) carries one black too many."""
    cdef uint32_t parent, sib
    while n != root[0] and not (n and rb_is_red(t, n)):
        parent = rb_parent(t, n)
        if n == t[parent].left:
            sib = t[parent].right
            if rb_is_red(t, sib):
                t[sib].parent &= INDEX
                t[parent].parent |= RED
                rb_rotate_left(t, root, parent)
                sib = t[parent].right
            if not (t[sib].left and rb_is_red(t, t[sib].left)) and not (t[sib].right and rb_is_red(t, t[sib].right)):
                t[sib].parent |= RED
                n = parent
                continue
            if not (t[sib].right and rb_is_red(t, t[sib].right)):
                t[t[sib].left].parent &= INDEX
                t[sib].parent |= RED
                rb_rotate_right(t, root, sib)
                sib = t[parent].right
            t[sib].parent = rb_parent(t, sib) | (t[parent].parent & RED)
            t[parent].parent &= INDEX
            t[t[sib].right].parent &= INDEX
            rb_rotate_left(t, root, parent)
        else:
            sib = t[parent].left
            if rb_is_red(t, sib):
                t[sib].parent &= INDEX
                t[parent].parent |= RED
                rb_rotate_right(t, root, parent)
                sib = t[parent].left
            if not (t[sib].left and rb_is_red(t, t[sib].left)) and not (t[sib].right and rb_is_red(t, t[sib].right)):
                t[sib].parent |= RED
                n = parent
                continue
            if not (t[sib].left and rb_is_red(t, t[sib].left)):
                t[t[sib].right].parent &= INDEX
                t[sib].parent |= RED
                rb_rotate_left(t, root, sib)
                sib = t[parent].left
            t[sib].parent = rb_parent(t, sib) | (t[parent].parent & RED)
            t[parent].parent &= INDEX
            t[t[sib].left].parent &= INDEX
            rb_rotate_right(t, root, parent)
        break
    if n:
        t[n].parent &= INDEX


cdef inline void rb_erase(Node *t, uint32_t *root, uint32_t n) noexcept nogil:
    """Unlink `n`; with two children its successor takes its place. O(log n)."""
    cdef uint32_t spliced = n, child, parent
    cdef bint was_red
    if t[n].left and t[n].right:
        spliced = t[n].right
        while t[spliced].left:
            spliced = t[spliced].left
    was_red = rb_is_red(t, spliced)
    child = t[spliced].left if t[spliced].left else t[spliced].right
    parent = rb_parent(t, spliced)
    rb_set_parent(t, child, parent)     # also when child is nil: the fix-up starts from there
    rb_replace_child(t, root, parent, spliced, child)
    if spliced != n:
        if parent == n:
            rb_set_parent(t, child, spliced)
        t[spliced].left = t[n].left
        t[spliced].right = t[n].right
        t[spliced].parent = t[n].parent
        rb_replace_child(t, root, rb_parent(t, n), n, spliced)
        if t[spliced].left:
            rb_set_parent(t, t[spliced].left, spliced)
        if t[spliced].right:
            rb_set_parent(t, t[spliced].right, spliced)
    if not was_red and root[0]:
        rb_erase_fixup(t, root, child)
    t[0].parent = 0

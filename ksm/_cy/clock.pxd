# cython: language_level=3
"""Virtual time: what a batch costs ksmd, and batch after batch until a moment.

The cost is the formula of `ksm.cost.CostModel.nanoseconds`, term by term in its order, so that both give the same
bits; setup.py keeps the compiler from joining multiplications and additions.
"""

from libc.math cimport rint
from libc.stdint cimport int64_t, uint32_t, uint64_t

from ksm._cy.store cimport IDLE, NEAR_LEVELS, PASS_ENDED, Store, levels_beyond
from ksm._cy.walk cimport scan

cdef enum:
    NS = 1000000000
    COSTS = 7

    # what run_until() came to, beside the outcomes of scan()
    TIME_IS_UP = 3
    GO_ON = 4               # enough for one call

    LONG = 1 << 18          # visits, and
    MANY = 1 << 16          # batches, after which the caller may want to look at signals

ctypedef struct Clock:
    int64_t now             # ns
    int64_t wake            # when the next batch starts
    double cpu              # ns that ksmd has taken
    int64_t pass_now        # both of them when the pass under way began
    double pass_cpu
    uint64_t hz
    double costs[7]         # ns: a page hashed, a level of the unstable, of the stable tree, a deep one, a merge, a
    uint64_t charged[7]     # merged page, a skipped one; and how many of each are in `cpu` already


cdef inline void charge(Clock *c, const Store *m) noexcept nogil:
    """Add to ksmd's CPU time what was done since the last charge."""
    cdef uint64_t done[7]
    cdef double cost = 0
    cdef int i
    done[0] = m.hashed
    done[1] = levels_beyond(m.unstable_searches, 0)
    done[2] = levels_beyond(m.stable_searches, 0)
    done[3] = levels_beyond(m.stable_searches, NEAR_LEVELS) + levels_beyond(m.unstable_searches, NEAR_LEVELS)
    done[4] = m.merges
    done[5] = m.already
    done[6] = m.pages_skipped
    for i in range(COSTS):
        cost += <double>(done[i] - c.charged[i]) * c.costs[i]
        c.charged[i] = done[i]
    c.cpu += cost


cdef inline uint64_t tick_at(const Clock *c, int64_t now) noexcept nogil:
    """The timer ticks that have gone by at a moment."""
    return <uint64_t>(now // NS) * c.hz + <uint64_t>(now % NS) * c.hz // NS


cdef inline int64_t after_sleep(const Clock *c, int64_t now, uint64_t ticks) noexcept nogil:
    """When a sleep of so many ticks that begins now ends: on a tick, and not too early."""
    cdef uint64_t at
    if ticks == 0:
        return now
    at = tick_at(c, now) + ticks + 1
    return <int64_t>(at // c.hz * NS + (at % c.hz * NS + c.hz - 1) // c.hz)


cdef inline int batch(Clock *c, Store *m, uint64_t budget) noexcept nogil:
    """One batch now, and what it costs."""
    cdef int done
    m.tick = tick_at(c, c.now)
    if m.cursor == 0:
        c.pass_now = c.now
        c.pass_cpu = c.cpu
    done = scan(m, budget)
    charge(c, m)
    return done


cdef inline int run_until(Clock *c, Store *m, int64_t end, uint64_t budget, uint64_t ticks,
                          bint by_pass) noexcept nogil:
    """Batches of `budget` visits with sleeps of `ticks` between them, before `end`.

    TIME_IS_UP, IDLE when nothing is registered, GO_ON, NO_MEMORY, or, `by_pass`, PASS_ENDED.
    """
    cdef uint64_t visits = m.pages_scanned + LONG
    cdef uint32_t batches = 0
    cdef double before
    cdef int done
    while True:
        if m.spaces[0].next == 0:
            return IDLE
        if c.wake >= end:
            return TIME_IS_UP
        if m.pages_scanned >= visits or batches == MANY:
            return GO_ON
        if c.wake > c.now:
            c.now = c.wake
        before = c.cpu
        done = batch(c, m, budget)
        if done < 0:
            return done
        c.wake = after_sleep(c, c.now + max(<int64_t>1, <int64_t>rint(c.cpu - before)), ticks)
        batches += 1
        if done == PASS_ENDED and by_pass:
            return done

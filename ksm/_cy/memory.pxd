# cython: language_level=3
"""What the host's memory is asked for beyond malloc: fetching ahead, and huge pages."""

from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #include <stddef.h>
    #ifdef __linux__
    #include <sys/mman.h>
    #endif
    #if defined(__GNUC__) || defined(__clang__)
    #define KSM_FETCH(address) __builtin_prefetch(address)
    #else
    #define KSM_FETCH(address) ((void)(address))
    #endif

    /* What is read at random wants huge pages. */
    static inline void *ksm_huge(void *memory, size_t bytes) {
    #if defined(__linux__) && defined(MADV_HUGEPAGE)
        size_t huge = (size_t)2 << 20, from = ((size_t)memory + huge - 1) / huge * huge;
        if (memory != NULL && (size_t)memory + bytes >= from + huge)
            madvise((void *)from, ((size_t)memory + bytes - from) / huge * huge, MADV_HUGEPAGE);
    #else
        (void)bytes;
    #endif
        return memory;
    }
    """
    void fetch "KSM_FETCH" (const void *address) noexcept nogil
    void *huge "ksm_huge" (void *memory, size_t size) noexcept nogil

# cython: language_level=3
"""The memory of arrays that grow, and fetching ahead.

Large arrays are mapped on their own, in huge pages: they are read at random, where every miss of a small page's
translation costs as much as the miss itself; and room that was taken ahead costs nothing until it is used, where
an allocator's realloc may copy and so touch it.
"""

cdef extern from *:
    """
    #ifndef KSM_MEMORY
    #define KSM_MEMORY
    #include <stddef.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #if defined(__GNUC__) || defined(__clang__)
    #define KSM_FETCH(address) __builtin_prefetch(address)
    #else
    #define KSM_FETCH(address) ((void)(address))
    #endif

    #ifdef __linux__
    #include <sys/mman.h>
    #endif
    #if defined(MREMAP_FIXED) && defined(MADV_HUGEPAGE)
    enum { KSM_HUGE = 2 << 20, KSM_LARGE = 4 * KSM_HUGE };

    static inline size_t ksm_mapped(size_t bytes) {     /* what an array takes; 0: it comes from malloc */
        return bytes < KSM_LARGE || bytes > SIZE_MAX - KSM_HUGE ? 0 : (bytes + KSM_HUGE - 1) / KSM_HUGE * KSM_HUGE;
    }

    static inline void *ksm_map(size_t bytes) {
        char *all = (char *)mmap(NULL, bytes + KSM_HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (all == (char *)MAP_FAILED)
            return NULL;
        size_t before = (KSM_HUGE - (uintptr_t)all % KSM_HUGE) % KSM_HUGE;
        if (before)
            munmap(all, before);
        munmap(all + before + bytes, KSM_HUGE - before);
        madvise(all + before, bytes, MADV_HUGEPAGE);    /* where it is refused, pages are small */
        return all + before;
    }

    static inline void ksm_release(void *memory, size_t bytes) {
        if (ksm_mapped(bytes))
            munmap(memory, ksm_mapped(bytes));
        else
            free(memory);
    }

    static inline void *ksm_resize(void *old, size_t before, size_t after) {
        size_t has = ksm_mapped(before), wants = ksm_mapped(after);
        if (!has && !wants)
            return realloc(old, after);
        if (has == wants)
            return old;
        void *grown = wants ? ksm_map(wants) : malloc(after);
        if (grown == NULL)
            return NULL;
        if (has && wants > has) {
            if (mremap(old, has, has, MREMAP_MAYMOVE | MREMAP_FIXED, grown) != MAP_FAILED)
                return grown;
            munmap(grown, wants);
            return NULL;
        }
        if (before)
            memcpy(grown, old, before < after ? before : after);
        ksm_release(old, before);
        return grown;
    }

    static inline void *ksm_zeroed(size_t bytes) {
        return ksm_mapped(bytes) ? ksm_map(ksm_mapped(bytes)) : calloc(1, bytes);
    }
    #else
    static inline void ksm_release(void *memory, size_t bytes) {
        (void)bytes;
        free(memory);
    }

    static inline void *ksm_resize(void *old, size_t before, size_t after) {
        (void)before;
        return realloc(old, after);
    }

    static inline void *ksm_zeroed(size_t bytes) {
        return calloc(1, bytes);
    }
    #endif
    #endif
    """
    void fetch "KSM_FETCH" (const void *address) noexcept nogil

    # An array of `before` bytes made one of `after`; NULL: no memory, and the old one is as it was.
    void *resize "ksm_resize" (void *old, size_t before, size_t after) noexcept nogil
    void *zeroed "ksm_zeroed" (size_t bytes) noexcept nogil
    void release "ksm_release" (void *memory, size_t bytes) noexcept nogil

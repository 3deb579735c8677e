# cython: language_level=3
"""Page bytes: zero test, comparison in memcmp's order, and the key prefix that orders most pages.

`n` is a multiple of 16. Nothing needs alignment. `page_equal` is the C library's memcmp, the fastest
there is; `page_compare` is ours because memcmp does not tell where it stopped.
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp

cdef extern from *:
    """
    #ifndef KSM_PAGE
    #define KSM_PAGE
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>

    static inline uint64_t page_word(const uint8_t *p) {
        uint64_t x;
        memcpy(&x, p, 8);
        return x;
    }

    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    #define PAGE_BIG_ENDIAN(x) (x)
    #else
    #define PAGE_BIG_ENDIAN(x) __builtin_bswap64(x)
    #endif

    static inline uint64_t prefix_key(const uint8_t *p) {
        return PAGE_BIG_ENDIAN(page_word(p));
    }

    /* Word by word: the reference, and what is used where no vector form is. */

    static inline int page_is_zero_scalar(const uint8_t *p, size_t n) {
        size_t i = 0;
        for (; i + 32 <= n; i += 32)
            if (page_word(p + i) | page_word(p + i + 8) | page_word(p + i + 16) | page_word(p + i + 24))
                return 0;
        for (; i < n; i += 8)
            if (page_word(p + i))
                return 0;
        return 1;
    }

    static inline int page_compare_from(const uint8_t *p, const uint8_t *q, size_t i, size_t n, size_t *where) {
        for (; i < n; i += 8) {
            uint64_t a = page_word(p + i), b = page_word(q + i);
            if (a != b) {
                a = PAGE_BIG_ENDIAN(a), b = PAGE_BIG_ENDIAN(b);
                *where = i + (size_t)__builtin_clzll(a ^ b) / 8;
                return a < b ? -1 : 1;
            }
        }
        *where = n;
        return 0;
    }

    static inline int page_compare_scalar(const uint8_t *p, const uint8_t *q, size_t n, size_t *where) {
        return page_compare_from(p, q, 0, n, where);
    }

    #if defined(__SSE2__)
    #include <emmintrin.h>
    typedef __m128i page_vector;
    #define PAGE_LOAD(p) _mm_loadu_si128((const __m128i *)(p))
    #define PAGE_OR _mm_or_si128
    #define PAGE_XOR _mm_xor_si128
    #define PAGE_NONE(x) (_mm_movemask_epi8(_mm_cmpeq_epi8(x, _mm_setzero_si128())) == 0xffff)
    #elif defined(__ARM_NEON) && defined(__aarch64__)
    #include <arm_neon.h>
    typedef uint32x4_t page_vector;
    #define PAGE_LOAD(p) vreinterpretq_u32_u8(vld1q_u8(p))
    #define PAGE_OR vorrq_u32
    #define PAGE_XOR veorq_u32
    #define PAGE_NONE(x) (vmaxvq_u32(x) == 0)
    #endif

    #if defined(PAGE_LOAD)
    static inline int page_is_zero_vector(const uint8_t *p, size_t n) {
        size_t i = 0;
        for (; i + 64 <= n; i += 64) {
            page_vector any = PAGE_OR(PAGE_OR(PAGE_LOAD(p + i), PAGE_LOAD(p + i + 16)),
                                      PAGE_OR(PAGE_LOAD(p + i + 32), PAGE_LOAD(p + i + 48)));
            if (!PAGE_NONE(any))
                return 0;
        }
        return page_is_zero_scalar(p + i, n - i);
    }

    static inline int page_compare_vector(const uint8_t *p, const uint8_t *q, size_t n, size_t *where) {
        size_t i = 0;
        for (; i + 64 <= n; i += 64) {
            page_vector any = PAGE_OR(PAGE_OR(PAGE_XOR(PAGE_LOAD(p + i), PAGE_LOAD(q + i)),
                                              PAGE_XOR(PAGE_LOAD(p + i + 16), PAGE_LOAD(q + i + 16))),
                                      PAGE_OR(PAGE_XOR(PAGE_LOAD(p + i + 32), PAGE_LOAD(q + i + 32)),
                                              PAGE_XOR(PAGE_LOAD(p + i + 48), PAGE_LOAD(q + i + 48))));
            if (!PAGE_NONE(any))
                break;
        }
        return page_compare_from(p, q, i, n, where);
    }
    #define page_is_zero page_is_zero_vector
    #define page_compare page_compare_vector
    #else
    #define page_is_zero page_is_zero_scalar
    #define page_compare page_compare_scalar
    #endif
    #endif
    """
    bint page_is_zero(const uint8_t *p, size_t n) noexcept nogil
    bint page_is_zero_scalar(const uint8_t *p, size_t n) noexcept nogil

    # The sign of memcmp; `where` is the first byte that differs, or n.
    int page_compare(const uint8_t *p, const uint8_t *q, size_t n, size_t *where) noexcept nogil
    int page_compare_scalar(const uint8_t *p, const uint8_t *q, size_t n, size_t *where) noexcept nogil

    uint64_t prefix_key(const uint8_t *p) noexcept nogil    # the first 8 bytes, big-endian: ordered as memcmp


cdef inline bint page_equal(const uint8_t *p, const uint8_t *q, size_t n) noexcept nogil:
    return memcmp(p, q, n) == 0

# cython: language_level=3
"""XXH3-128 (seed 0, default secret) of inputs over 240 bytes, and of runs of pages.

Written from the published xxHash specification ("XXH3 algorithm description for large inputs").
Forms that give the same bits: `scalar`, always there, is the reference; `sse2` is part of every x86-64 and
`neon` of every arm64; `avx2` is compiled for its functions alone and taken where the processor has it. No -march
is needed.

4 KiB pages from memory against plain reading, one thread, GCC 12 -O3, virtual machines that read 6.5 to 7.4
million pages a second: avx2 0.93 to 0.96, without prefetch 0.87, 2 KiB ahead 0.88, 8 KiB 0.77; sse2 0.76 to 0.91
(the narrower, the fewer loads are under way at a time); the textbook sse2 loop (one chain of sums, unaligned
secret) 0.82; blocks unrolled whole 0.54; scalar 0.49.
"""

from libc.stdint cimport uint8_t, uint64_t

cdef extern from *:
    """
    #ifndef KSM_XXH3
    #define KSM_XXH3
    #include <stddef.h>
    #include <stdint.h>
    #include <string.h>

    #define KSM_PREFETCH_AHEAD 4096   /* bytes; runs on into the next page */
    #define KSM_PREFETCH(p) __builtin_prefetch((const void *)((uintptr_t)(p) + KSM_PREFETCH_AHEAD))

    #define XXH3_P32_1 0x9E3779B1u
    #define XXH3_P32_2 0x85EBCA77u
    #define XXH3_P32_3 0xC2B2AE3Du
    #define XXH3_P64_1 0x9E3779B185EBCA87u
    #define XXH3_P64_2 0xC2B2AE3D27D4EB4Fu
    #define XXH3_P64_3 0x165667B19E3779F9u
    #define XXH3_P64_4 0x85EBCA77C2B2AE63u
    #define XXH3_P64_5 0x27D4EB2F165667C5u
    #define XXH3_MX1   0x165667919E3779F9u

    enum {
        XXH3_STRIPE = 64, XXH3_BLOCK_STRIPES = 16, XXH3_BLOCK = XXH3_STRIPE * XXH3_BLOCK_STRIPES,
        /* where in the secret each step reads */
        XXH3_AT_SCRAMBLE = 192 - 64, XXH3_AT_LAST = 192 - 71, XXH3_AT_LOW = 11, XXH3_AT_HIGH = 192 - 75
    };

    /* The secret, and the same from its 9th byte on: what the even and the odd stripes read is then aligned. */
    #define XXH3_SECRET_REST \\
        0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, \\
        0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, \\
        0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, \\
        0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, \\
        0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, \\
        0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, \\
        0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, \\
        0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, \\
        0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, \\
        0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, \\
        0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, \\
        0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e
    static const uint8_t xxh3_secret[192] __attribute__((aligned(16))) = {
        0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, XXH3_SECRET_REST
    };
    static const uint8_t xxh3_secret_odd[184] __attribute__((aligned(16))) = {XXH3_SECRET_REST};

    static inline uint64_t xxh3_load(const uint8_t *p) {
        uint64_t x;
        memcpy(&x, p, 8);
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        x = __builtin_bswap64(x);
    #endif
        return x;
    }

    static inline uint64_t xxh3_merge(const uint64_t acc[8], uint64_t sum, const uint8_t *secret) {
        for (int i = 0; i < 4; i++) {
            unsigned __int128 product = (unsigned __int128)(acc[2 * i] ^ xxh3_load(secret + 16 * i))
                                        * (acc[2 * i + 1] ^ xxh3_load(secret + 16 * i + 8));
            sum += (uint64_t)product ^ (uint64_t)(product >> 64);
        }
        sum = (sum ^ (sum >> 37)) * XXH3_MX1;
        return sum ^ (sum >> 32);
    }

    static inline void xxh3_stripe(uint64_t acc[8], const uint8_t *p, const uint8_t *secret) {
        for (int i = 0; i < 8; i++) {
            uint64_t lane = xxh3_load(p + 8 * i), mixed = lane ^ xxh3_load(secret + 8 * i);
            acc[i ^ 1] += lane;
            acc[i] += (mixed & 0xffffffffu) * (mixed >> 32);
        }
    }

    /* Each form is three steps on the accumulators: `stripes` takes in a block or its beginning, the secret
       moving on by 8 bytes a stripe, `scramble` ends a block, `last` takes in the last 64 bytes. */

    static inline void xxh3_stripes_scalar(uint64_t acc[8], const uint8_t *p, size_t count) {
        for (const uint8_t *secret = xxh3_secret; count; count--, p += XXH3_STRIPE, secret += 8) {
            KSM_PREFETCH(p);
            xxh3_stripe(acc, p, secret);
        }
    }

    static inline void xxh3_last_scalar(uint64_t acc[8], const uint8_t *p) {
        KSM_PREFETCH(p);
        xxh3_stripe(acc, p, xxh3_secret + XXH3_AT_LAST);
    }

    static inline void xxh3_scramble_scalar(uint64_t acc[8]) {
        for (int i = 0; i < 8; i++)
            acc[i] = (acc[i] ^ (acc[i] >> 47) ^ xxh3_load(xxh3_secret + XXH3_AT_SCRAMBLE + 8 * i)) * XXH3_P32_1;
    }

    #if defined(__SSE2__)
    #include <emmintrin.h>

    /* The sums of a block or a part of it. They start from zero and swap their halves once, at the end, so
       that the accumulators' latency hides behind them. */
    typedef struct { __m128i products[4], lanes[4]; } xxh3_sums_sse2;

    static inline void xxh3_take_sse2(xxh3_sums_sse2 *sums, int i, const uint8_t *p, __m128i secret) {
        __m128i x = _mm_loadu_si128((const __m128i *)p + i);
        __asm__("" : "+x"(x));   /* or else the compiler loads it twice, and loads are the bottleneck */
        sums->lanes[i] = _mm_add_epi64(sums->lanes[i], x);
        x = _mm_xor_si128(x, secret);
        __m128i product = _mm_mul_epu32(x, _mm_shuffle_epi32(x, _MM_SHUFFLE(3, 3, 1, 1)));
        sums->products[i] = _mm_add_epi64(sums->products[i], product);
    }

    static inline void xxh3_stripe_sse2(xxh3_sums_sse2 *sums, const uint8_t *p, const uint8_t *secret) {
        KSM_PREFETCH(p);
        for (int i = 0; i < 4; i++)
            xxh3_take_sse2(sums, i, p, _mm_load_si128((const __m128i *)secret + i));
    }

    static inline void xxh3_add_sse2(uint64_t acc[8], const xxh3_sums_sse2 *sums) {
        for (int i = 0; i < 4; i++) {
            __m128i *at = (__m128i *)acc + i, other = _mm_shuffle_epi32(sums->lanes[i], _MM_SHUFFLE(1, 0, 3, 2));
            _mm_storeu_si128(at, _mm_add_epi64(_mm_loadu_si128(at), _mm_add_epi64(sums->products[i], other)));
        }
    }

    static inline void xxh3_stripes_sse2(uint64_t acc[8], const uint8_t *p, size_t count) {
        const uint8_t *even = xxh3_secret, *odd = xxh3_secret_odd;
        xxh3_sums_sse2 sums = {0};
        for (; count > 1; count -= 2, p += 2 * XXH3_STRIPE, even += 16, odd += 16) {
            xxh3_stripe_sse2(&sums, p, even);
            xxh3_stripe_sse2(&sums, p + XXH3_STRIPE, odd);
        }
        if (count)
            xxh3_stripe_sse2(&sums, p, even);
        xxh3_add_sse2(acc, &sums);
    }

    static inline void xxh3_last_sse2(uint64_t acc[8], const uint8_t *p) {
        const __m128i *secret = (const __m128i *)(xxh3_secret + XXH3_AT_LAST);
        xxh3_sums_sse2 sums = {0};
        KSM_PREFETCH(p);
        for (int i = 0; i < 4; i++)
            xxh3_take_sse2(&sums, i, p, _mm_loadu_si128(secret + i));
        xxh3_add_sse2(acc, &sums);
    }

    static inline void xxh3_scramble_sse2(uint64_t acc[8]) {
        const __m128i prime = _mm_set1_epi32((int)XXH3_P32_1);
        const __m128i *secret = (const __m128i *)(xxh3_secret + XXH3_AT_SCRAMBLE);
        for (int i = 0; i < 4; i++) {
            __m128i *at = (__m128i *)acc + i, x = _mm_loadu_si128(at);
            x = _mm_xor_si128(_mm_xor_si128(x, _mm_srli_epi64(x, 47)), _mm_loadu_si128(secret + i));
            __m128i low = _mm_mul_epu32(x, prime), high = _mm_mul_epu32(_mm_srli_epi64(x, 32), prime);
            _mm_storeu_si128(at, _mm_add_epi64(low, _mm_slli_epi64(high, 32)));
        }
    }
    #endif

    #if defined(__x86_64__) && defined(__GNUC__)
    #define XXH3_AVX2 __attribute__((target("avx2")))
    #include <immintrin.h>

    /* As sse2, twice as wide, where the processor has it. */
    typedef struct { __m256i products[2], lanes[2]; } xxh3_sums_avx2;

    XXH3_AVX2 static inline void xxh3_take_avx2(xxh3_sums_avx2 *sums, int i, const uint8_t *p, __m256i secret) {
        __m256i x = _mm256_loadu_si256((const __m256i *)p + i);
        __asm__("" : "+x"(x));
        sums->lanes[i] = _mm256_add_epi64(sums->lanes[i], x);
        x = _mm256_xor_si256(x, secret);
        __m256i product = _mm256_mul_epu32(x, _mm256_srli_epi64(x, 32));
        sums->products[i] = _mm256_add_epi64(sums->products[i], product);
    }

    XXH3_AVX2 static inline void xxh3_some_avx2(uint64_t acc[8], const uint8_t *p, const uint8_t *secret,
                                                size_t count) {
        xxh3_sums_avx2 sums = {0};
        for (; count; count--, p += XXH3_STRIPE, secret += 8) {
            KSM_PREFETCH(p);
            for (int i = 0; i < 2; i++)
                xxh3_take_avx2(&sums, i, p, _mm256_loadu_si256((const __m256i *)secret + i));
        }
        for (int i = 0; i < 2; i++) {
            __m256i *at = (__m256i *)acc + i, other = _mm256_shuffle_epi32(sums.lanes[i], _MM_SHUFFLE(1, 0, 3, 2));
            other = _mm256_add_epi64(sums.products[i], other);
            _mm256_storeu_si256(at, _mm256_add_epi64(_mm256_loadu_si256(at), other));
        }
    }

    XXH3_AVX2 static inline void xxh3_stripes_avx2(uint64_t acc[8], const uint8_t *p, size_t count) {
        xxh3_some_avx2(acc, p, xxh3_secret, count);
    }

    XXH3_AVX2 static inline void xxh3_last_avx2(uint64_t acc[8], const uint8_t *p) {
        xxh3_some_avx2(acc, p, xxh3_secret + XXH3_AT_LAST, 1);
    }

    XXH3_AVX2 static inline void xxh3_scramble_avx2(uint64_t acc[8]) {
        const __m256i prime = _mm256_set1_epi32((int)XXH3_P32_1);
        const __m256i *secret = (const __m256i *)(xxh3_secret + XXH3_AT_SCRAMBLE);
        for (int i = 0; i < 2; i++) {
            __m256i *at = (__m256i *)acc + i, x = _mm256_loadu_si256(at);
            x = _mm256_xor_si256(_mm256_xor_si256(x, _mm256_srli_epi64(x, 47)), _mm256_loadu_si256(secret + i));
            __m256i low = _mm256_mul_epu32(x, prime), high = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), prime);
            _mm256_storeu_si256(at, _mm256_add_epi64(low, _mm256_slli_epi64(high, 32)));
        }
    }
    #endif

    #if defined(__ARM_NEON) && defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    #define XXH3_NEON
    #include <arm_neon.h>

    static inline uint64x2_t xxh3_neon_load(const uint8_t *p) {
        return vreinterpretq_u64_u8(vld1q_u8(p));
    }

    static inline void xxh3_stripe_neon(uint64x2_t sums[4], const uint8_t *p, const uint8_t *secret) {
        KSM_PREFETCH(p);
        for (int i = 0; i < 4; i++) {
            uint64x2_t lanes = xxh3_neon_load(p + 16 * i);
            uint64x2_t mixed = veorq_u64(lanes, xxh3_neon_load(secret + 16 * i));
            sums[i] = vaddq_u64(sums[i], vextq_u64(lanes, lanes, 1));
            sums[i] = vmlal_u32(sums[i], vmovn_u64(mixed), vshrn_n_u64(mixed, 32));
        }
    }

    static inline void xxh3_some_neon(uint64_t acc[8], const uint8_t *p, const uint8_t *secret, size_t count) {
        uint64x2_t sums[4];
        for (int i = 0; i < 4; i++)
            sums[i] = vld1q_u64(acc + 2 * i);
        for (; count; count--, p += XXH3_STRIPE, secret += 8)
            xxh3_stripe_neon(sums, p, secret);
        for (int i = 0; i < 4; i++)
            vst1q_u64(acc + 2 * i, sums[i]);
    }

    static inline void xxh3_stripes_neon(uint64_t acc[8], const uint8_t *p, size_t count) {
        xxh3_some_neon(acc, p, xxh3_secret, count);
    }

    static inline void xxh3_last_neon(uint64_t acc[8], const uint8_t *p) {
        xxh3_some_neon(acc, p, xxh3_secret + XXH3_AT_LAST, 1);
    }

    static inline void xxh3_scramble_neon(uint64_t acc[8]) {
        const uint32x2_t prime = vdup_n_u32(XXH3_P32_1);
        for (int i = 0; i < 4; i++) {
            uint64x2_t x = vld1q_u64(acc + 2 * i);
            x = veorq_u64(x, vshrq_n_u64(x, 47));
            x = veorq_u64(x, xxh3_neon_load(xxh3_secret + XXH3_AT_SCRAMBLE + 16 * i));
            uint64x2_t high = vshlq_n_u64(vmull_u32(vshrn_n_u64(x, 32), prime), 32);
            vst1q_u64(acc + 2 * i, vmlal_u32(high, vmovn_u64(x), prime));
        }
    }
    #endif

    #define XXH3_FORM(FORM, TARGET)                                                                                  \\
    TARGET static inline void xxh3_128_##FORM(const uint8_t *p, size_t n, uint64_t *out2) {                          \\
        uint64_t acc[8] = {XXH3_P32_3, XXH3_P64_1, XXH3_P64_2, XXH3_P64_3,                                           \\
                           XXH3_P64_4, XXH3_P32_2, XXH3_P64_5, XXH3_P32_1};                                          \\
        size_t rest = n;                                                                                             \\
        for (; rest > XXH3_BLOCK; rest -= XXH3_BLOCK, p += XXH3_BLOCK) {                                             \\
            xxh3_stripes_##FORM(acc, p, XXH3_BLOCK_STRIPES);                                                         \\
            xxh3_scramble_##FORM(acc);                                                                               \\
        }                                                                                                            \\
        xxh3_stripes_##FORM(acc, p, (rest - 1) / XXH3_STRIPE);                                                       \\
        xxh3_last_##FORM(acc, p + rest - XXH3_STRIPE);                                                               \\
        out2[0] = xxh3_merge(acc, ~(n * XXH3_P64_2), xxh3_secret + XXH3_AT_HIGH);                                    \\
        out2[1] = xxh3_merge(acc, n * XXH3_P64_1, xxh3_secret + XXH3_AT_LOW);                                        \\
    }                                                                                                                \\
    TARGET static inline void xxh3_run_##FORM(const uint8_t *base, size_t npages, size_t page_size, uint64_t *out) { \\
        for (; npages; npages--, base += page_size, out += 2)                                                        \\
            xxh3_128_##FORM(base, page_size, out);                                                                   \\
    }

    XXH3_FORM(scalar, )
    #if defined(__SSE2__)
    XXH3_FORM(sse2, )
    #endif
    #if defined(XXH3_AVX2)
    XXH3_FORM(avx2, XXH3_AVX2)
    #endif
    #if defined(XXH3_NEON)
    XXH3_FORM(neon, )
    #endif

    enum { XXH3_FORM_BEST, XXH3_FORM_SCALAR, XXH3_FORM_SSE2, XXH3_FORM_NEON, XXH3_FORM_AVX2 };

    /* Whether a form was compiled in and runs on this processor. */
    static inline int xxh3_has(int form) {
        switch (form) {
        case XXH3_FORM_SCALAR: return 1;
    #if defined(__SSE2__)
        case XXH3_FORM_SSE2: return 1;
    #endif
    #if defined(XXH3_AVX2)
        case XXH3_FORM_AVX2: __builtin_cpu_init(); return __builtin_cpu_supports("avx2") != 0;
    #endif
    #if defined(XXH3_NEON)
        case XXH3_FORM_NEON: return 1;
    #endif
        }
        return 0;
    }

    static inline int xxh3_best(void) {
        static int best = XXH3_FORM_BEST;
        if (best == XXH3_FORM_BEST)
            best = xxh3_has(XXH3_FORM_AVX2) ? XXH3_FORM_AVX2 : xxh3_has(XXH3_FORM_SSE2) ? XXH3_FORM_SSE2
                   : xxh3_has(XXH3_FORM_NEON) ? XXH3_FORM_NEON : XXH3_FORM_SCALAR;
        return best;
    }

    static inline int fingerprint_run_form(int form, const uint8_t *base, size_t npages, size_t page_size,
                                           uint64_t *out) {
        if (form == XXH3_FORM_BEST)
            form = xxh3_best();
        else if (!xxh3_has(form))
            return -1;
        switch (form) {
        case XXH3_FORM_SCALAR: xxh3_run_scalar(base, npages, page_size, out); return 0;
    #if defined(__SSE2__)
        case XXH3_FORM_SSE2: xxh3_run_sse2(base, npages, page_size, out); return 0;
    #endif
    #if defined(XXH3_AVX2)
        case XXH3_FORM_AVX2: xxh3_run_avx2(base, npages, page_size, out); return 0;
    #endif
    #if defined(XXH3_NEON)
        case XXH3_FORM_NEON: xxh3_run_neon(base, npages, page_size, out); return 0;
    #endif
        }
        return -1;
    }

    static inline void xxh3_128_best(const uint8_t *p, size_t n, uint64_t *out2) {
        fingerprint_run_form(XXH3_FORM_BEST, p, 1, n, out2);
    }
    #endif
    """
    enum:
        XXH3_FORM_BEST, XXH3_FORM_SCALAR, XXH3_FORM_SSE2, XXH3_FORM_NEON, XXH3_FORM_AVX2

    bint xxh3_has(int form) noexcept nogil      # compiled in, and this processor has it

    void xxh3_128_best(const uint8_t *p, size_t n, uint64_t *out2) noexcept nogil   # n > 240; high, then low 64 bits

    # out: npages pairs, (high, low). -1: there is no such form here, nothing is written.
    int fingerprint_run_form(int form, const uint8_t *base, size_t npages, size_t page_size,
                             uint64_t *out) noexcept nogil

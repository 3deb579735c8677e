/* Plain reading of memory: the sum of all 64-bit words, which is what a pass over pages cannot be faster than. */
#include <stddef.h>
#include <stdint.h>

uint64_t read_plain(const uint64_t *words, size_t n)
{
    uint64_t sum[8] = {0};
    for (size_t i = 0; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; j++)
            sum[j] += words[i + j];
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

uint64_t read_ahead(const uint64_t *words, size_t n)
{
    uint64_t sum[8] = {0};
    for (size_t i = 0; i + 8 <= n; i += 8) {
        __builtin_prefetch(words + i + 256); /* 2 KiB ahead; beyond the end it does nothing */
        for (int j = 0; j < 8; j++)
            sum[j] += words[i + j];
    }
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

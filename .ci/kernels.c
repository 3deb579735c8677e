/* Compares the best form of each kernel with the scalar one; prints the forms and a digest of every result. */
#include <stdio.h>
#include <stdlib.h>

#include "page.h"
#include "xxh3.h"

enum { SIZE = 70000, PAGE = 4096 };

static int sign(int x) { return (x > 0) - (x < 0); }

int main(void) {
    static uint8_t p[SIZE], q[SIZE];
    uint64_t x = 88172645463325252u, sum = 0;
    int wrong = 0;
    for (int i = 0; i < SIZE; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        p[i] = (uint8_t)x;
    }
    for (size_t n = 241; n < SIZE - 8; n += n < 5000 ? 1 : 977) {
        uint64_t best[2], scalar[2];
        xxh3_128_best(p + n % 7, n, best);
        xxh3_128_scalar(p + n % 7, n, scalar);
        wrong += memcmp(best, scalar, 16) != 0;
        sum = sum * 31 + best[0] + best[1];
    }
    memcpy(q, p, PAGE);
    for (size_t k = 0; k < PAGE; k++) {
        size_t best, scalar;
        q[k] ^= (uint8_t)(1 + k % 255);
        int order = page_compare(p, q, PAGE, &best);
        wrong += order != page_compare_scalar(p, q, PAGE, &scalar) || order != sign(memcmp(p, q, PAGE));
        wrong += best != k || scalar != k;
        q[k] = p[k];
    }
    size_t where;
    wrong += page_compare(p, q, PAGE, &where) != 0 || where != PAGE;
    memset(q, 0, PAGE);
    wrong += !page_is_zero(q, PAGE) || !page_is_zero_scalar(q, PAGE);
    for (size_t k = 0; k < PAGE; k++) {
        q[k] = 1;
        wrong += page_is_zero(q, PAGE) || page_is_zero_scalar(q, PAGE);
        q[k] = 0;
    }
    wrong += fingerprint_run_form(XXH3_FORM_BEST, p, 1, PAGE, (uint64_t *)q) != 0;
    printf("form %d, %d wrong, prefix %016llx, digest %016llx\n", xxh3_best(), wrong,
           (unsigned long long)prefix_key(p), (unsigned long long)sum);
    return wrong != 0;
}

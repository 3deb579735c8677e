/* A process for CRIU to dump: memory of every kind at a known address, with contents that the test knows. */
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096

int main(void)
{
    unsigned char *area =
        mmap((void *)0x10000000, 256 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    volatile unsigned char read = 0;

    madvise(area, 256 * PAGE, MADV_NOHUGEPAGE);
    for (int page = 0; page < 100; page += 2) { /* noise, every other page */
        unsigned state = 12345 + page;
        for (int i = 0; i < PAGE; i++) {
            state = state * 1103515245u + 12345u;
            area[page * PAGE + i] = state >> 16;
        }
    }
    for (int page = 120; page < 140; page++) /* equal pages */
        memset(area + page * PAGE, 'k', PAGE);
    for (int page = 150; page < 160; page++) /* zeros that were written */
        area[page * PAGE] = 0;
    for (int page = 170; page < 180; page++) /* only read: the zero page */
        read += area[page * PAGE];
    setsid();
    for (;;)
        pause();
}

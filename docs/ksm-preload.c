/* Opts a program in to KSM from inside: cc -shared -fPIC -o ksm-preload.so ksm-preload.c; LD_PRELOAD=./ksm-preload.so PROGRAM */
#include <sys/prctl.h>

#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67 /* since Linux 6.4 */
#endif

__attribute__((constructor)) static void opt_in(void)
{
    prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0);
}

/* A process that does as it is told: one command a packet on the descriptor it is given, one reply each.
 *
 * Its own memory must not show in KSM's counters: it allocates nothing, and when its process opts in to merging
 * as a whole it takes every mapping outside the arena out again at once.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CHANNEL 3
#define ARENA_START 0x100000000000ull
#define ARENA_END 0x110000000000ull
#define MAX_DATA (32 * 4096)

#define PAGE 4096
#define BIND 2 /* of <linux/mempolicy.h>, which not every system has */
#define MOVE_ALL 4
#define MAX_MOVED 64

enum { MMAP = 1, WRITE, READ, MADVISE, MUNMAP, MPROTECT, MREMAP, PRCTL, FORK, EXIT, CHURN, MIGRATE, FLUSH };

struct command { uint64_t op, a, b, c, d, e; };
struct reply { int64_t value; int64_t error; };

static struct { struct command c; unsigned char data[MAX_DATA]; } in;
static struct { struct reply r; unsigned char data[MAX_DATA]; } out;
static char maps[65536];
static sigjmp_buf fault;

static void on_fault(int number) { (void)number; siglongjmp(fault, 1); }

static uint64_t hex(const char **p)
{
	uint64_t value = 0;
	for (;; ++*p) {
		char c = **p;
		if (c >= '0' && c <= '9') value = value << 4 | (c - '0');
		else if (c >= 'a' && c <= 'f') value = value << 4 | (c - 'a' + 10);
		else return value;
	}
}

/* Take all mappings outside the arena out of merging. */
static void unmark_self(void)
{
	size_t have = 0;
	ssize_t n;
	int fd = open("/proc/self/maps", O_RDONLY);
	while ((n = read(fd, maps + have, sizeof maps - 1 - have)) > 0) have += n;
	close(fd);
	maps[have] = 0;
	for (const char *p = maps; *p; ++p) {
		uint64_t start = hex(&p), end;
		++p;
		end = hex(&p);
		if (end <= ARENA_START || start >= ARENA_END)
			madvise((void *)start, end - start, MADV_UNMERGEABLE);
		while (*p && *p != '\n') ++p;
		if (!*p) break;
	}
}

static int take_descriptor(struct msghdr *message)
{
	struct cmsghdr *c = CMSG_FIRSTHDR(message);
	int fd = -1;
	if (c && c->cmsg_type == SCM_RIGHTS) memcpy(&fd, CMSG_DATA(c), sizeof fd);
	return fd;
}

static int64_t answer(int64_t value)
{
	out.r.value = value;
	out.r.error = value < 0 ? errno : 0;
	return value;
}

/* Touch memory page by page, as a program would; EFAULT from the first page that faults on. */
static void access_memory(int writing)
{
	unsigned char *at = (unsigned char *)in.c.a;
	volatile size_t done = 0;
	if (sigsetjmp(fault, 1)) {
		errno = EFAULT;
		answer(-1);
		return;
	}
	while (done < in.c.b) {
		size_t part = 4096 - ((uintptr_t)(at + done) & 4095);
		if (part > in.c.b - done) part = in.c.b - done;
		if (writing) memcpy(at + done, in.data + done, part);
		else memcpy(out.data + done, at + done, part);
		done += part;
	}
	answer(0);
}

/* Enough faults for the kernel to bring its counts of this cgroup's pages up to date when next asked. */
static void churn(void)
{
	const size_t length = 512 * 4096;
	char *p = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (size_t i = 0; i < length; i += 4096) p[i] = 1;
	munmap(p, length);
}

/* Memory at a fixed address; with `node` counted from 1, all its frames come from that NUMA node. */
static int64_t map(uint64_t node)
{
	uint64_t start = in.c.a, length = in.c.b, mask = 1ull << (node - 1);
	int64_t got = syscall(SYS_mmap, start, length, in.c.c, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
	if (got >= 0 && node && syscall(SYS_mbind, start, length, BIND, &mask, 64, 0) < 0) return -1;
	return got;
}

/* Move the frames of a range to a NUMA node, for all who map them; those that cannot move stay. */
static int64_t migrate(uint64_t start, uint64_t length, int node)
{
	void *pages[MAX_MOVED];
	int nodes[MAX_MOVED], status[MAX_MOVED];
	for (uint64_t done = 0; done < length;) {
		int n = 0;
		for (; n < MAX_MOVED && done < length; ++n, done += PAGE) {
			pages[n] = (void *)(start + done);
			nodes[n] = node;
		}
		/* more than 0: so many did not move; ENOENT: none of them is there */
		if (syscall(SYS_move_pages, 0, n, pages, nodes, status, MOVE_ALL) < 0 && errno != ENOENT) return -1;
	}
	return 0;
}

/* A move of a page to where it is: before any, the kernel empties the per-CPU lists of fresh pages. */
static int64_t flush(void)
{
	void *page = (void *)((uintptr_t)&in & ~(uintptr_t)(PAGE - 1));
	int node = 0, status;
	return syscall(SYS_move_pages, 0, 1, &page, &node, &status, 2) < 0 ? -1 : 0;
}

int main(int count, char **arguments)
{
	if (count != 2) return 2;
	int given = atoi(arguments[1]);
	if (given != CHANNEL) {
		dup2(given, CHANNEL);
		close(given);
	}
	struct sigaction action = {.sa_handler = on_fault, .sa_flags = SA_NODEFER};
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	signal(SIGCHLD, SIG_IGN); /* children leave no zombies, */
	prctl(PR_SET_CHILD_SUBREAPER, 1); /* nor do theirs */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (;;) {
		struct iovec vector = {&in, sizeof in};
		char control[CMSG_SPACE(sizeof(int))];
		struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control,
					 .msg_controllen = sizeof control};
		size_t size = sizeof out.r;
		if (recvmsg(CHANNEL, &message, 0) < (ssize_t)sizeof in.c) _exit(0);
		switch (in.c.op) {
		case MMAP: answer(map(in.c.d)); break;
		case WRITE: access_memory(1); break;
		case READ: access_memory(0); size += in.c.b; break;
		case MADVISE: answer(syscall(SYS_madvise, in.c.a, in.c.b, in.c.c)); break;
		case MUNMAP: answer(syscall(SYS_munmap, in.c.a, in.c.b)); break;
		case MPROTECT: answer(syscall(SYS_mprotect, in.c.a, in.c.b, in.c.c)); break;
		case MREMAP: answer(syscall(SYS_mremap, in.c.a, in.c.b, in.c.c, in.c.d, in.c.e)); break;
		case PRCTL:
			answer(syscall(SYS_prctl, in.c.a, in.c.b, in.c.c, in.c.d, in.c.e));
			if (in.c.a == 67 && out.r.value == 0 && in.c.b) unmark_self();
			break;
		case FORK: {
			int channel = take_descriptor(&message);
			pid_t child = fork();
			if (child == 0) {
				prctl(PR_SET_PDEATHSIG, 0);
				dup2(channel, CHANNEL);
				close(channel);
				answer(0);
				break;
			}
			answer(child);
			close(channel);
			break;
		}
		case CHURN: churn(); answer(0); break;
		case MIGRATE: answer(migrate(in.c.a, in.c.b, in.c.c)); break;
		case FLUSH: answer(flush()); break;
		case EXIT: _exit(0);
		default: errno = ENOSYS; answer(-1);
		}
		if (send(CHANNEL, &out, size, 0) < 0) _exit(0);
	}
}

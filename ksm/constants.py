"""The kernel's numbers that the interface speaks in: madvise, mmap, mremap and prctl constants."""

from __future__ import annotations

# <asm-generic/mman-common.h>
PROT_NONE = 0
PROT_READ = 1
PROT_WRITE = 2

MADV_NORMAL = 0
MADV_RANDOM = 1
MADV_SEQUENTIAL = 2
MADV_WILLNEED = 3
MADV_DONTNEED = 4
MADV_FREE = 8
MADV_MERGEABLE = 12
MADV_UNMERGEABLE = 13
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_COLD = 20
MADV_PAGEOUT = 21

# <linux/mman.h>
MREMAP_MAYMOVE = 1
MREMAP_FIXED = 2
MREMAP_DONTUNMAP = 4

# <linux/prctl.h>
PR_SET_MEMORY_MERGE = 67
PR_GET_MEMORY_MERGE = 68

# What the kernel keeps for every scanned page (Documentation/admin-guide/mm/ksm.rst: "general_profit").
RMAP_ITEM_BYTES = 64

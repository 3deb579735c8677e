"""VMs that were fingerprinted, as samples for `ksm.plan` and `ksm.estimate`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from ksm.errors import SourceError
from ksm.fleet.files import PAGES, find, read_range, read_vm
from ksm.pages import Fingerprints, zero_words
from ksm.sources import Snapshot

_MOST = 1 << 28  # pages of one VM: 4 GiB of fingerprints


def is_fingerprinted(path: str) -> bool:
    """Whether a path is a file that `ksm fingerprint` wrote of a VM's contents, or a directory with some.

    >>> is_fingerprinted("web-1.pages.parquet"), is_fingerprinted("guest.raw")
    (True, False)
    """
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            return any(entry.name.endswith(PAGES) and not entry.name.startswith(".") for entry in entries)
    return path.endswith(PAGES)


def samples(paths: Sequence[str]) -> tuple[list[Snapshot], str]:
    """The VMs of such files and directories, and which key their fingerprints are under ("" for none).

    Where a page was is not in the files, so pages come in the order of their fingerprints. All-zero pages of dumps are
    there, whatever they were taken for: `Policy.zeros` and `ksm.estimate` decide. 16 bytes a page.

    Raises:
        SourceError: a file that cannot be read, is damaged, or has more than 2**28 pages; fingerprints of several keys.

    >>> from ksm.fleet import Vm, fingerprint_vm
    >>> _ = fingerprint_vm(b"a" * 8192 + bytes(4096), ".", Vm(name="sampled"))
    >>> (one,), key = samples(["sampled.pages.parquet"])
    >>> one.name, one.pages, key
    ('sampled', 3, '')
    """
    found: list[Snapshot] = []
    keys: dict[str, str] = {}
    for path in find(paths, PAGES):
        vm = read_vm(path)
        keys.setdefault(vm.key_id, path)
        high, low, copies = read_range(path)
        zeros = vm.zero_pages if vm.zeros == "touched" else vm.zero_or_untouched
        if int(copies.sum()) != vm.pages - vm.zero_pages:
            raise SourceError(f"{path}: damaged: {int(copies.sum())} pages, its metadata says {vm.pages}")
        if vm.pages + zeros > _MOST:
            raise SourceError(f"{path}: {vm.pages:,} pages; a sample can have {_MOST:,}")
        words = np.repeat(np.stack((high, low), axis=1), copies, axis=0)
        zero = np.tile(np.array(zero_words(vm.page_size), np.uint64), (zeros, 1))
        prints = Fingerprints(np.concatenate((words, zero)))
        found.append(Snapshot(vm.name, vm.page_size, vm.zeros == "touched", True, ((0, prints),)))
    if len(keys) > 1:
        raise SourceError(f"{' and '.join(list(keys.values())[:2])}: fingerprints of different keys cannot be compared")
    return found, next(iter(keys), "")

"""From a source of pages to the files of a VM."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ksm.errors import SourceError
from ksm.estimate import Source, snapshots
from ksm.fleet import files
from ksm.fleet.sketch import LG_K, sketch
from ksm.fleet.vm import Vm, new_id, now
from ksm.keyed import Key, keyed
from ksm.pages import Fingerprints


def fingerprint_vm(
    source: Source,
    directory: str | os.PathLike[str],
    vm: Vm,
    *,
    key: Key | None = None,
    lg_k: int = LG_K,
    marked_only: bool = False,
    threads: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Vm:
    """Read a source's pages and write the VM's two files, both or none. O(pages).

    Args:
        source: what `ksm.estimate` takes.
        directory: where they are written; made if it is not there.
        vm: what is known of it. `zeros` is heeded for dumps ("merge" or "absent"; "touched" counts as "merge");
            counts, id and time are filled in.
        key: a secret, to fingerprint under; see `ksm.keyed`.
        lg_k: the sketch keeps 2 to this power contents.
        marked_only: of a process, only what is marked mergeable now.
        threads: that hash.
        force: replace files that are there.
        progress: called with (pages done, pages in all).

    Returns:
        What was written as metadata.

    Raises:
        SourceError: the source cannot be read, or the VM's files are there. OSError: they cannot be written.

    >>> fingerprint_vm(b"x" * 8192 + bytes(4096), "fleet", Vm(name="a")).contents
    1
    >>> fingerprint_vm(bytes(4096), "fleet", Vm(name="a"))
    Traceback (most recent call last):
    ksm.errors.SourceError: fleet/a.pages.parquet: is there already (--force replaces it)
    """
    if not 5 <= lg_k <= 21:
        raise ValueError(f"lg_k is {lg_k}; it can be 5 to 21")
    Path(directory).mkdir(parents=True, exist_ok=True)
    if not force:
        for path in files.paths(directory, vm.name):
            if path.exists():
                raise SourceError(f"{path}: is there already (--force replaces it)")
    page_size = vm.page_size
    (taken,) = snapshots([source], page_size, marked_only, threads, progress)
    prints = Fingerprints(taken.words())
    zero = prints.zeros(taken.page_size)
    zeros = int(np.count_nonzero(zero))
    unknown = 0 if taken.anonymous_known else zeros
    absent = unknown if vm.zeros == "absent" else 0
    contents, copies = prints[~zero].unique()
    if key is not None:
        contents = keyed(contents, key, taken.page_size)
    done = replace(
        vm,
        page_size=taken.page_size,
        ram=vm.ram or len(prints) * taken.page_size,
        key_id=key.id if key else "",
        zeros="touched" if taken.anonymous_known else "absent" if vm.zeros == "absent" else "merge",
        zero_or_untouched=unknown,
        taken=vm.taken or now(),
        id=new_id(),
        pages=len(prints) - absent,
        zero_pages=zeros - absent,
        contents=len(contents),
    )
    files.write_vm(directory, done, contents.words, copies, sketch(contents.words, lg_k))
    return done


def fingerprint_where(source: str, directory: str, vm: Vm, options: dict[str, Any]) -> dict[str, Any]:
    """`fingerprint_vm` for a worker: a source that it can open, an answer that travels.

    >>> with open("one.raw", "wb") as file:
    ...     _ = file.write(bytes(4096))
    >>> fingerprint_where("one.raw", "fleet", Vm(name="w"), {})["zero_pages"]
    1
    """
    return fingerprint_vm(source, directory, vm, **options).to_dict()

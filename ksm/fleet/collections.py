"""Dask collections of a fleet: its contents VM by VM, and in all, for questions of one's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from ksm.errors import SourceError
from ksm.fleet import files, runner, survey
from ksm.fleet.extras import need
from ksm.fleet.vm import Vm


def contents(given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> tuple[Any, list[Vm]]:
    """The contents of VMs as a Dask DataFrame, and the VMs: what `analyze` takes.

    Args:
        given: directories of `ksm fingerprint`, or files of it.

    Returns:
        The frame, of columns vm, high, low, copies and a partition a VM, zero pages not in it; the VMs.

    Raises:
        SourceError: a file cannot be used; here none is left out.

    >>> from ksm.fleet import fingerprint_vm
    >>> _ = fingerprint_vm(b"x" * 8192, "small", Vm(name="a"))
    >>> frame, vms = contents("small")
    >>> frame["copies"].sum().compute(scheduler="synchronous").item(), vms[0].name
    (2, 'a')
    """
    frames, pandas = need("dask.dataframe"), need("pandas")
    entries = _entries(given)
    dtypes = {"vm": "object", "high": "uint64", "low": "uint64", "copies": "int64"}
    meta = pandas.DataFrame({name: pandas.Series(dtype=dtype) for name, dtype in dtypes.items()})
    paths, names = [entry.path for entry in entries], [entry.vm.name for entry in entries]
    return frames.from_map(_frame, paths, names, meta=meta), [entry.vm for entry in entries]


def content_totals(given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], ranges: int = 16) -> Any:
    """Every content of the fleet as a Dask DataFrame: high, low, copies, vms, hosts. A partition a range of contents.

    Raises:
        SourceError: a file cannot be used.

    >>> from ksm.fleet import fingerprint_vm
    >>> _ = fingerprint_vm(b"x" * 8192, "tiny", Vm(name="a"), force=True)
    >>> content_totals("tiny").compute(scheduler="synchronous")["copies"].tolist()
    [2]
    """
    frames, pandas = need("dask.dataframe"), need("pandas")
    entries = _entries(given)
    names = sorted({entry.vm.host for entry in entries})
    work = [(index, entry.path) for index, entry in enumerate(entries)]
    hosts = np.array([names.index(entry.vm.host) for entry in entries], np.int64)
    dtypes = {"high": "uint64", "low": "uint64", "copies": "int64", "vms": "int64", "hosts": "int64"}
    meta = pandas.DataFrame({name: pandas.Series(dtype=dtype) for name, dtype in dtypes.items()})
    parts = runner.Work((), ()).ranges(ranges)
    return frames.from_map(_totals, parts, work=work, host_of=hosts, meta=meta)


def _entries(given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[survey.Entry]:
    one = isinstance(given, str | os.PathLike)
    found = files.find([given] if one else given, files.PAGES)  # type: ignore[list-item, arg-type]
    return survey.choose([survey.Entry(path, files.read_vm(path)) for path in found])[0]


def _frame(path: str, name: str) -> Any:
    high, low, copies = files.read_range(path)
    return need("pandas").DataFrame({"vm": name, "high": high, "low": low, "copies": copies}).astype({"vm": "object"})


def _totals(part: tuple[int, int], work: Sequence[tuple[int, str]], host_of: Any) -> Any:
    pandas = need("pandas")
    (high, low, copies, number), errors = runner.read_piece(work, *part)
    for index, why in errors.items():
        raise SourceError(f"{dict(work)[index]}: {why}")
    rows = pandas.DataFrame({"high": high, "low": low, "copies": copies, "host": host_of[number]})
    grouped = rows.groupby(["high", "low"], sort=True)
    result = grouped.agg(copies=("copies", "sum"), vms=("copies", "size"), hosts=("host", "nunique")).reset_index()
    return result.astype("int64").astype({"high": "uint64", "low": "uint64"})

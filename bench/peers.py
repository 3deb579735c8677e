"""What else counts equal pages: each of these takes the same pages and must find as many different contents as ksm."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ksm._core import Settling
from ksm.estimate import estimate
from ksm.patterns import Pages

Keys = npt.NDArray[np.uint64]

PAGE = 4096


@dataclass(frozen=True, slots=True)
class Peer:
    """A contestant: what it is called, what it needs, and how it counts the different contents."""

    name: str
    count: Callable[[Any], int]
    needs: str | None = None
    """A module, or the name of a program if it starts with a slash."""
    most: int = 1 << 62
    """Pages beyond which it takes too much memory or time to wait for."""

    @property
    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.needs is None:
            return None
        if self.needs.startswith("/"):
            return None if shutil.which(self.needs[1:]) else f"{self.needs[1:]} is not installed"
        return None if importlib.util.find_spec(self.needs) else f"the module {self.needs} is not installed"


# ---- from the pages ----------------------------------------------------------------------------------


def _slices(pages: Pages) -> list[memoryview]:
    whole = memoryview(pages.reshape(-1))
    return [whole[at : at + PAGE] for at in range(0, len(whole), PAGE)]


def _ksm(pages: Pages, threads: int | None) -> int:
    """Different contents of an estimate: each has one page that is no copy of another."""
    found = estimate([pages], threads=threads)
    return found.pages - found.duplicates_within - found.duplicates_between


def _xxhash(pages: Pages) -> int:
    import xxhash

    digest = xxhash.xxh3_128_digest
    return len({digest(page) for page in _slices(pages)})


def _hashlib(pages: Pages) -> int:
    return len({hashlib.blake2b(page, digest_size=16).digest() for page in _slices(pages)})


def _numpy(pages: Pages) -> int:
    return len(np.unique(pages.view(f"V{PAGE}")))


def _pandas(pages: Pages) -> int:
    import pandas as pd

    return len(pd.Series([bytes(page) for page in _slices(pages)], dtype=object).value_counts(sort=False))


def _arrow(pages: Pages) -> Any:
    """The pages as an Arrow table of one binary column, without a copy."""
    import pyarrow as pa

    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(PAGE), len(pages), [None, pa.py_buffer(pages)])
    return pa.table({"page": column})


def _polars(pages: Pages) -> int:
    import polars as pl

    return pl.DataFrame(_arrow(pages)).lazy().group_by("page").agg(pl.len()).select(pl.len()).collect().item()


def _duckdb(pages: Pages) -> int:
    return _duckdb_groups(_arrow(pages), "page")


def _duckdb_groups(table: Any, column: str) -> int:
    import duckdb

    with duckdb.connect() as connection:
        connection.register("pages", table)
        query = f"select count(*) from (select {column}, count(*) from pages group by {column})"
        return int(connection.execute(query).fetchall()[0][0])


FROM_PAGES = (
    Peer("ksm, 1 thread", lambda pages: _ksm(pages, 1)),
    Peer("ksm, 2 threads", lambda pages: _ksm(pages, 2)),
    Peer("xxhash and a set", _xxhash, "xxhash"),
    Peer("hashlib (blake2b) and a set", _hashlib),
    Peer("numpy.unique of the pages", _numpy, most=1 << 17),
    Peer("pandas value_counts", _pandas, "pandas", most=1 << 18),
    Peer("polars group-by", _polars, "polars", most=1 << 18),
    Peer("duckdb GROUP BY", _duckdb, "duckdb", most=1 << 18),
)


# ---- from a file -------------------------------------------------------------------------------------


def duperemove(file: Path) -> int:
    """Its hashes of a file's 4 KiB blocks, counted in the database that it makes; it deduplicates nothing."""
    with tempfile.TemporaryDirectory() as directory:
        hashes = Path(directory, "hashes.db")
        command = ["duperemove", "-q", "-b", str(PAGE), f"--hashfile={hashes}", "--dedupe-options=partial,same"]
        subprocess.run([*command, str(file)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with sqlite3.connect(hashes) as database:
            return int(database.execute("select count(distinct digest) from hashes").fetchone()[0])


# ---- from 64-bit keys, the index alone -----------------------------------------------------------------


def _settling(keys: Keys) -> int:
    counting = Settling(256, 1, len(keys))
    counting.visit(0, np.stack((keys, keys), axis=1))
    found = counting.counts()[0]
    return found["pages"] - found["duplicates_within"]


def _pandas_keys(keys: Keys) -> int:
    import pandas as pd

    return len(pd.Series(keys).value_counts(sort=False))


def _polars_keys(keys: Keys) -> int:
    import polars as pl

    return pl.DataFrame({"key": keys}).lazy().group_by("key").agg(pl.len()).select(pl.len()).collect().item()


def _duckdb_keys(keys: Keys) -> int:
    import pyarrow as pa

    return _duckdb_groups(pa.table({"key": keys}), "key")


FROM_KEYS = (
    Peer("ksm", _settling),
    Peer("a dict", lambda keys: len(dict.fromkeys(keys.tolist()))),
    Peer("numpy.unique with counts", lambda keys: len(np.unique(keys, return_counts=True)[0])),
    Peer("pandas value_counts", _pandas_keys, "pandas"),
    Peer("polars group-by", _polars_keys, "polars"),
    Peer("duckdb GROUP BY", _duckdb_keys, "duckdb"),
)

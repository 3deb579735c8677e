"""The two Parquet files of a VM: its contents by prefix, and its sketch. docs/fleet.md describes both.

`NAME.pages.parquet` has a row a content: `high` and `low` (uint64, the fingerprint), `copies` (int32, pages that
have it), ascending by high, then low, in row groups of 16,384 rows, so that a range of prefixes is read without the
rest. Zero pages are counted in the metadata alone. `NAME.sketch.parquet` has one row; files of many rows are as good.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import stat
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ksm.errors import SourceError
from ksm.fleet.extras import need
from ksm.fleet.vm import Vm

FORMAT = 1
PAGES, SKETCH = ".pages.parquet", ".sketch.parquet"

_KEY = b"ksm.fleet"
_ROWS = 16384
_MOST_COPIES = (1 << 31) - 1
_LEAST_BYTES = 4  # a row on disk: distinct fingerprints do not compress, so fewer mean a row count that lies

Words = npt.NDArray[np.uint64]
Copies = npt.NDArray[np.int64]
Rows = tuple[Words, Words, Copies]


def paths(directory: str | os.PathLike[str], name: str) -> tuple[Path, Path]:
    """Where the two files of the VM of that name are.

    >>> [path.name for path in paths("fleet", "web/1")]
    ['web%2F1.pages.parquet', 'web%2F1.sketch.parquet']
    """
    stem = urllib.parse.quote(name, safe=" ()+,:=@")
    stem = stem.replace(".", "%2E", 1) if stem.startswith(".") else stem  # hidden files are none of a fleet
    return Path(directory, stem + PAGES), Path(directory, stem + SKETCH)


@contextlib.contextmanager
def whole(*paths: Path) -> Iterator[list[Path]]:
    """Names to write to, beside the paths: with the end of the `with` all are there, complete; if it fails, none is.

    Raises:
        OSError: with the first path's name, whatever the file system or pyarrow raised.

    >>> with whole(Path("whole.txt")) as (part,):
    ...     _ = part.write_text("all of it")
    >>> Path("whole.txt").read_text(), part.exists()
    ('all of it', False)
    """
    parts = [path.with_name(f".{path.name}.{os.getpid()}.part") for path in paths]
    try:
        yield parts
        for part in parts:
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        for part, path in zip(parts, paths, strict=True):
            part.replace(path)
    except OSError as error:
        raise _unwritten(paths[0], error) from None
    finally:
        for part in parts:
            with contextlib.suppress(OSError):
                part.unlink()


def write_vm(
    directory: str | os.PathLike[str],
    vm: Vm,
    words: npt.NDArray[np.uint64],
    copies: npt.NDArray[np.int64],
    sketch: bytes,
) -> None:
    """Write both files of a VM, or none: a disk that fills up leaves no half of it.

    >>> from ksm.fleet.sketch import sketch
    >>> one = np.ones((1, 2), np.uint64)
    >>> write_vm(".", Vm(name="both", pages=3, contents=1), one, np.array([3]), sketch(one))
    >>> [path.exists() for path in paths(".", "both")]
    [True, True]
    """
    with whole(*paths(directory, vm.name)) as (pages_part, sketch_part):
        write_pages(pages_part, vm, words, copies)
        write_sketches(sketch_part, [vm], [sketch])


def write_pages(path: Path, vm: Vm, words: npt.NDArray[np.uint64], copies: npt.NDArray[np.int64]) -> None:
    """Write a VM's contents. What is there is whole: the file appears under its name when it is complete.

    Args:
        path: of the file, which is replaced.
        vm: the metadata.
        words: (n, 2) the contents without zero, each once, in any order.
        copies: (n,) how many pages have them.

    Raises:
        OSError: it cannot be written.

    >>> write_pages(Path("a.pages.parquet"), Vm(name="a", pages=3, contents=1), np.ones((1, 2), np.uint64),
    ...             np.array([3]))
    >>> read_vm("a.pages.parquet").contents
    1
    """
    pa = need("pyarrow")
    if len(copies) and not 1 <= copies.min() <= copies.max() <= _MOST_COPIES:
        raise ValueError(f"{vm.name}: copies must be 1 to {_MOST_COPIES}")
    order = np.lexsort((words[:, 1], words[:, 0]))
    columns = {
        "high": np.ascontiguousarray(words[order, 0]),
        "low": np.ascontiguousarray(words[order, 1]),
        "copies": copies[order].astype(np.int32),
    }
    schema = pa.schema(
        [pa.field(name, pa.from_numpy_dtype(column.dtype), False) for name, column in columns.items()]
    ).with_metadata({_KEY: json.dumps({"format": FORMAT, **vm.to_dict()}).encode()})
    table = pa.Table.from_arrays([pa.array(column) for column in columns.values()], schema=schema)
    _write(path, table, row_group_size=_ROWS, use_dictionary=["copies"], compression="NONE")


def write_sketches(path: Path, vms: Sequence[Vm], sketches: Sequence[bytes]) -> None:
    """Write the sketches of one VM or of many, a row each.

    >>> from ksm.fleet.sketch import sketch
    >>> write_sketches(Path("a.sketch.parquet"), [Vm(name="a")], [sketch(np.zeros((0, 2), np.uint64))])
    >>> [vm.name for vm, _ in read_sketches("a.sketch.parquet")]
    ['a']
    """
    pa = need("pyarrow")
    rows = [vm.to_dict() | {"tags": json.dumps(dict(vm.tags))} for vm in vms]
    names = list(Vm(name="x").to_dict())
    columns = {name: pa.array([row[name] for row in rows]) for name in names}
    columns["sketch"] = pa.array(list(sketches), pa.binary())
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps({"format": FORMAT}).encode()})
    _write(path, table, compression="NONE")


def _write(path: Path, table: Any, **options: Any) -> None:
    with whole(path) as (part,):
        need("pyarrow.parquet").write_table(table, part, write_page_checksum=True, **options)


def _unwritten(path: Path, error: OSError) -> OSError:
    """pyarrow's errors have no file name, and their text is long."""
    if error.errno is None:
        return OSError(f"{path}: cannot be written: {str(error).splitlines()[0]}")
    return type(error)(error.errno, os.strerror(error.errno), str(path))


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever a damaged file makes pyarrow raise is a `SourceError` that names the file."""
    pa = need("pyarrow")
    where = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(where).st_mode):  # opening a pipe could wait for ever
            raise SourceError("not a regular file")
        yield
    except SourceError as error:
        text = str(error)
        raise error if text.startswith(where) else SourceError(f"{where}: {text}") from None
    except OSError as error:
        if error.errno is not None:
            raise SourceError(f"{where}: {os.strerror(error.errno)}") from None
        raise SourceError(f"{where}: damaged: {str(error).splitlines()[0]}") from None
    except (pa.ArrowException, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise SourceError(f"{where}: damaged, or no file of ksm: {str(error).splitlines()[0]}") from None


def _about(metadata: Any) -> dict[str, Any]:
    text = (metadata or {}).get(_KEY)
    if text is None:
        raise SourceError("a Parquet file, but not one of `ksm fingerprint`")
    about = json.loads(text)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        version = about.get("format") if isinstance(about, dict) else None
        raise SourceError(f"format {version!r} of `ksm fingerprint`; this version of ksm reads format {FORMAT}")
    return about


def read_vm(path: str | os.PathLike[str]) -> Vm:
    """The metadata of a VM's file of contents.

    Raises:
        SourceError: it cannot be read, is damaged, no such file, or of a format that this version does not know.

    >>> read_vm("nothing.pages.parquet")
    Traceback (most recent call last):
    ksm.errors.SourceError: nothing.pages.parquet: No such file or directory
    """
    with _reading(path):
        footer, _, _ = _footer(path)
        schema = footer.schema.to_arrow_schema()
        about = _about(schema.metadata)
        if schema.names != ["high", "low", "copies"]:
            raise SourceError(f"its columns are {', '.join(schema.names)}, not high, low, copies")
        vm = Vm.from_dict(about)
        if footer.num_rows != vm.contents:
            raise SourceError(f"damaged: {footer.num_rows} rows, its metadata says {vm.contents}")
        return vm


def _footer(path: str | os.PathLike[str]) -> tuple[Any, Words, Words]:
    """A file's Parquet metadata, the first and the last high word of each row group. What was read is remembered."""
    about = os.stat(path)
    return _footer_of(os.fspath(path), about.st_size, about.st_ino, about.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _footer_of(path: str, size: int, inode: int, changed: int) -> tuple[Any, Words, Words]:
    footer = need("pyarrow.parquet").read_metadata(path)
    if footer.num_rows * _LEAST_BYTES > size:
        raise SourceError(f"damaged: {footer.num_rows} rows in {size} bytes")
    edges = []
    for index in range(footer.num_row_groups):
        known = footer.row_group(index).column(0).statistics
        told = known is not None and known.has_min_max and isinstance(known.min, int)
        edges.append((known.min, known.max) if told else (0, (1 << 64) - 1))
    least, most = np.array(edges, np.uint64).reshape(-1, 2).T
    return footer, least, most


def read_range(path: str | os.PathLike[str], first: int = 0, last: int = (1 << 64) - 1) -> Rows:
    """The contents of a file whose high word is `first` to `last`, both included: high, low, copies.

    Raises:
        SourceError: as `read_vm`; checksums that do not match; contents out of order.

    >>> write_pages(Path("b.pages.parquet"), Vm(name="b", pages=3, contents=2),
    ...             np.array([[1, 1], [5, 5]], np.uint64), np.array([1, 2]))
    >>> read_range("b.pages.parquet", 2, 9)[2].tolist()
    [2]
    """
    parquet = need("pyarrow.parquet")
    with _reading(path):
        footer, least, most = _footer(path)
        wanted = np.flatnonzero((least <= np.uint64(last)) & (most >= np.uint64(first))).tolist()
        with parquet.ParquetFile(path, metadata=footer, page_checksum_verification=True) as file:
            table = file.read_row_groups(wanted, columns=["high", "low", "copies"], use_threads=False)
        high, low, copies = (np.asarray(table.column(name)) for name in ("high", "low", "copies"))
    if high.dtype != np.uint64 or low.dtype != np.uint64 or copies.dtype != np.int32:
        raise SourceError(f"{os.fspath(path)}: damaged, or no file of ksm: {high.dtype}, {low.dtype}, {copies.dtype}")
    if len(high) and ((high[1:] < high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] <= low[:-1]))).any():
        raise SourceError(f"{os.fspath(path)}: damaged: its contents are not in order")
    if len(copies) and copies.min() < 1:
        raise SourceError(f"{os.fspath(path)}: damaged: a content that no page has")
    start, end = np.searchsorted(high, np.array([first, last], np.uint64), side="left")
    end += np.searchsorted(high[end:], np.uint64(last), side="right")
    return high[start:end], low[start:end], copies[start:end].astype(np.int64)


def read_sketches(path: str | os.PathLike[str]) -> Iterator[tuple[Vm, bytes]]:
    """The VMs of a file of sketches, one after the other.

    Raises:
        SourceError: as `read_vm`.

    >>> next(read_sketches("nothing.sketch.parquet"))
    Traceback (most recent call last):
    ksm.errors.SourceError: nothing.sketch.parquet: No such file or directory
    """
    parquet = need("pyarrow.parquet")
    with _reading(path), parquet.ParquetFile(path, page_checksum_verification=True) as file:
        _about(file.schema_arrow.metadata)
        if "sketch" not in file.schema_arrow.names:
            raise SourceError("it has no column `sketch`")
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                data = row.pop("sketch")
                if not isinstance(data, bytes):
                    raise SourceError("a row without a sketch")
                yield Vm.from_dict(row), data


def find(given: Sequence[str | os.PathLike[str]], ending: str) -> list[str]:
    """The files with that ending in directories, and files as they are given; sorted, each once.

    Raises:
        SourceError: a directory without such files, or that cannot be read.

    >>> find(["x.pages.parquet", "x.pages.parquet"], PAGES)
    ['x.pages.parquet']
    """
    found: list[str] = []
    for where in [os.fspath(path) for path in given]:
        if not os.path.isdir(where):
            found.append(where)
            continue
        try:
            names = [name for name in os.listdir(where) if name.endswith(ending) and not name.startswith(".")]
        except OSError as error:
            raise SourceError(f"{where}: {error.strerror}") from None
        if not names:
            raise SourceError(f"{where}: no files *{ending} in this directory")
        found += [os.path.join(where, name) for name in names]
    return sorted(set(found))

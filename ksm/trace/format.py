"""The files of a trace: columns, metadata, and parts that are written so that a crash leaves whole ones."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ksm.errors import SourceError, UnsupportedError, kernel_error

FORMAT = 1
_KEY = b"ksm.trace"
_PART = re.compile(r"part-\d{8}\.parquet")
PAGES, STEPS = "pages", "steps"
CHUNK = 1 << 20  # rows added at a time, at most
_MOST_ROWS = 1 << 21  # a part has less: a file cannot make its reader take more memory than they need
_ROWS, _ADDED = 1 << 17, 64  # a part is rewritten at each addition until it has so much in it
COUNTERS = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "ksm_zero_pages", "full_scans")


def arrow() -> Any:
    """The pyarrow module, or an error that says how to get it.

    >>> arrow().__name__
    'pyarrow'
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UnsupportedError("traces are Parquet files and need pyarrow: pip install 'ksm[trace]'") from None
    return pyarrow


def schema(kind: str) -> Any:
    """The columns of `pages` or `steps`, as a pyarrow schema; docs/record.md says what they mean.

    >>> schema("pages").names
    ['step', 'seconds', 'process', 'page', 'high', 'low', 'present']
    """
    pa = arrow()
    name = pa.dictionary(pa.int32(), pa.string())
    head = [pa.field("step", pa.uint32(), False), pa.field("seconds", pa.float64(), False)]
    if kind == PAGES:
        return pa.schema(
            [
                *head,
                pa.field("process", name, False),
                pa.field("page", pa.uint64(), False),
                pa.field("high", pa.uint64()),
                pa.field("low", pa.uint64()),
                pa.field("present", pa.bool_(), False),
            ]
        )
    flags = ("alive", "anonymous_known", "zero_page_known")
    counts = ("pages", "zero_pages", "changed", "appeared", "gone", *COUNTERS)
    return pa.schema(
        [
            *head,
            pa.field("process", name),
            *(pa.field(flag, pa.bool_()) for flag in flags),
            pa.field("start_ticks", pa.uint64()),
            *(pa.field(count, pa.uint64()) for count in counts),
            pa.field("read_seconds", pa.float64()),
            pa.field("cpu_seconds", pa.float64()),
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What is the same in all parts of a trace; JSON under the key `ksm.trace` of every Parquet file.

    >>> Metadata(page_size=4096, started="2026-01-01T00:00:00+00:00").fingerprint
    'xxh3-128'
    """

    format: int = FORMAT
    page_size: int
    started: str
    """When `seconds` is 0: UTC, ISO 8601."""
    sample_of: int = 1
    """One content in so many is in the trace."""
    key_id: str | None = None
    """Of the secret key; None: plain fingerprints."""
    every: float = 10.0
    """Seconds between two steps that were asked for; the steps tell the true ones."""
    sources: tuple[str, ...] = ()
    """As they were asked for."""
    marked_only: bool = False
    series: bool = False
    """Whether each source is a series of dumps, and `seconds` are nominal."""
    kernel: str = ""
    """The release of the host's kernel."""
    tunables: dict[str, int | bool | str] | None = None
    """Of the host's KSM when the recording began; None: there is none, or it cannot be read."""
    ksm: str = ""
    """The version of ksm that wrote it."""

    @property
    def fingerprint(self) -> str:
        """What `high` and `low` are.

        >>> Metadata(page_size=4096, started="", key_id="00").fingerprint
        'blake2b-128(key, xxh3-128)'
        """
        return "xxh3-128" if self.key_id is None else "blake2b-128(key, xxh3-128)"

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON.

        >>> Metadata(page_size=4096, started="").to_dict()["page_size"]
        4096
        """
        return {**asdict(self), "sources": list(self.sources), "fingerprint": self.fingerprint}

    @classmethod
    def parse(cls, text: bytes, where: str) -> Metadata:
        """From the JSON in a file; SourceError for what is not of this format.

        >>> Metadata.parse(b'{"format": 1, "page_size": 4096, "started": ""}', "x").page_size
        4096
        """
        try:
            found = json.loads(text)
            if found["format"] != FORMAT:
                raise SourceError(f"{where}: a trace of format {found['format']}; this ksm reads format {FORMAT}")
            names = {field.name for field in fields(cls)}
            found = {name: value for name, value in found.items() if name in names}
            made = cls(**{**found, "sources": tuple(found.get("sources", ()))})
            size, of = made.page_size, made.sample_of
            if not (isinstance(size, int) and isinstance(of, int) and 256 <= size <= 1 << 30 and 1 <= of <= 1 << 20):
                raise ValueError
            if size & (size - 1) or not isinstance(made.key_id, str | None):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError):
            raise SourceError(f"{where}: its metadata is not that of a trace") from None
        return made


class Writer:
    """Writes one kind of parts of a trace; what was added is on disk, whole, when `add` returns.

    The part that is being filled is written anew each time, beside the old one, which it then replaces: a crash at
    any moment leaves one or the other. Parts are numbered.

    >>> writer = Writer(Path("host.trace"), "steps", Metadata(page_size=4096, started=""))
    >>> writer.add({"step": [0], "seconds": [0.0]})
    >>> [path.name for path in Path("host.trace", "steps").iterdir()]
    ['part-00000000.parquet']
    """

    def __init__(self, directory: Path, kind: str, metadata: Metadata) -> None:
        self._directory = directory / kind
        made = not self._directory.exists()
        self._directory.mkdir(parents=True, exist_ok=True)
        if made:
            _sync(directory)
        text = json.dumps(metadata.to_dict()).encode()
        self._schema = schema(kind).with_metadata({_KEY: text})
        self._tables: list[Any] = []
        there = parts(directory, kind)
        self._number = int(there[-1].name[5:13]) + 1 if there else 0
        self._path = self._directory
        self.bytes_written = 0
        """On disk when all is done: what rewriting replaced is not counted."""
        self._last_size = 0

    def add(self, columns: dict[str, Any]) -> None:
        """Put some rows on disk; columns left out are null.

        Raises:
            OSError: the disk is full, the directory is gone, ...
        """
        pa = arrow()
        n = len(columns["step"])
        arrays = [_array(columns.get(field.name), field.type, n) for field in self._schema]
        if sum(map(len, self._tables)) > _ROWS or len(self._tables) >= _ADDED:
            self._tables = []
        if not self._tables:
            self._path = self._directory / f"part-{self._number:08}.parquet"
            self._number += 1
            self._last_size = 0
        self._tables.append(pa.Table.from_arrays(arrays, schema=self._schema))
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(
            pa.concat_tables(self._tables).combine_chunks(),
            sink,
            compression="zstd",
            use_dictionary=["step", "seconds", "process"] if "page" in self._schema.names else True,
            column_encoding={"page": "DELTA_BINARY_PACKED"} if "page" in self._schema.names else None,
            write_statistics=["step", "seconds", "process", "page"],
        )
        data = sink.getvalue()
        replace(self._path, memoryview(data))
        self.bytes_written += data.size - self._last_size
        self._last_size = data.size


def _array(values: Any, kind: Any, n: int) -> Any:
    pa = arrow()
    if values is None:
        return pa.nulls(n, kind)
    return values if isinstance(values, pa.Array) else pa.array(values, kind)


def clean(directory: Path) -> None:
    """Remove what a writer that was killed left half-written.

    >>> clean(Path("/nonexistent"))
    """
    for kind in (PAGES, STEPS):
        for path in (directory / kind).glob(".part-*.tmp"):
            path.unlink(missing_ok=True)


def replace(path: Path, data: memoryview) -> None:
    """Write a file so that there is the old one or the new one at any moment, also after a loss of power.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "file")
    >>> replace(path, memoryview(b"data"))
    >>> path.read_bytes()
    b'data'
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise kernel_error(error.errno or errno.EIO, f"writing {path}") from error
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    _sync(path.parent)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(fd)
    finally:
        os.close(fd)


def parts(directory: Path, kind: str) -> list[Path]:
    """The part files of one kind, by their number.

    >>> parts(Path("/nonexistent"), "pages")
    []
    """
    return sorted(path for path in (directory / kind).glob("part-*.parquet") if _PART.fullmatch(path.name))


def whole(directory: Path, kind: str) -> list[Path]:
    """The same, and SourceError if one is missing between them.

    >>> whole(Path("/nonexistent"), "pages")
    []
    """
    found = parts(directory, kind)
    for number, path in enumerate(found):
        if path.name != f"part-{number:08}.parquet":
            raise SourceError(f"{directory / kind}: part-{number:08}.parquet is missing, and {path.name} is there")
    return found


def is_trace(where: object) -> bool:
    """Whether a path is that of a trace: a directory with `steps` that has parts.

    >>> is_trace("/")
    False
    """
    try:
        path = Path(where)  # type: ignore[arg-type]
        return path.is_dir() and bool(parts(path, STEPS))
    except (TypeError, ValueError, OSError):
        return False


def read(path: Path, kind: str, expected: Metadata | None = None) -> tuple[Metadata, Iterator[Any]]:
    """A part's metadata, checked against that of the trace, and its rows as record batches.

    Raises:
        SourceError: not Parquet, damaged, other columns, or of another recording.

    >>> read(Path("/nonexistent/part"), "pages")
    Traceback (most recent call last):
    ksm.errors.SourceError: /nonexistent/part: No such file or directory
    """
    pa = arrow()
    wanted = schema(kind)
    with errors_of(path):
        file = pa.parquet.ParquetFile(path)
        found = file.schema_arrow
        if not found.equals(wanted, check_metadata=False):
            raise SourceError(f"{path}: its columns are not those of a trace's {kind}")
        metadata = Metadata.parse((found.metadata or {}).get(_KEY, b""), str(path))
    for name in ("page_size", "started", "sample_of", "key_id"):
        if expected is not None and getattr(metadata, name) != getattr(expected, name):
            raise SourceError(
                f"{path}: {name} is {getattr(metadata, name)!r} and {getattr(expected, name)!r} in the trace's other "
                "parts: it belongs to another recording"
            )
    return metadata, _batches(path, file)


def _batches(path: Path, file: Any) -> Iterator[Any]:
    rows = 0
    with errors_of(path), file:
        for batch in file.iter_batches(batch_size=_ROWS):
            rows += len(batch)
            if rows > _MOST_ROWS:
                raise SourceError(f"{path}: more than {_MOST_ROWS:,} rows, which no part of a trace has")
            yield batch


@contextlib.contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Turn what pyarrow says about a file into a SourceError, with the file's name.

    >>> with errors_of(Path("part")):
    ...     raise ValueError("corrupt")
    Traceback (most recent call last):
    ksm.errors.SourceError: part: corrupt
    """
    try:
        yield
    except SourceError as error:
        raise error if str(error).startswith(str(path)) else SourceError(f"{path}: {error}") from None
    except OSError as error:
        raise SourceError(f"{path}: {os.strerror(error.errno) if error.errno else _line(error)}") from None
    except (arrow().ArrowException, ValueError, IndexError, OverflowError) as error:
        raise SourceError(f"{path}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

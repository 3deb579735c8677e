"""Observations as JSON: what `ksm top --json` prints and `ksm advise FILE` reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from ksm.census import Marked, ProcessSample
from ksm.errors import SourceError
from ksm.observe import Memory, Observation, Sample
from ksm.stats import ProcessStats, Stats

FORMAT = "ksm-observation"
VERSION = 1
_LARGEST = 64 << 20  # bytes of a file that is read: 32,768 processes take 15 MiB

T = TypeVar("T")


def to_dict(observation: Observation) -> dict[str, Any]:
    """Everything of an observation, with the derived values, for JSON.

    >>> to_dict(Observation(sample=Sample()))["counters"]["pages_sharing"]
    0
    """
    sample = observation.sample
    rates = {name: observation.rate(name) for name in observation.changes}
    return {
        "format": FORMAT,
        "version": VERSION,
        "time": sample.time,
        "date": None if sample.simulated else datetime.fromtimestamp(sample.time, timezone.utc).isoformat(),
        "kernel": sample.kernel,
        "simulated": sample.simulated,
        "nodes": sample.nodes,
        "tunables": dict(sample.tunables),
        "counters": sample.stats.to_dict(),
        "other": dict(sample.other),
        "vmstat": dict(sample.vmstat),
        "ksmd_cpu_seconds": sample.ksmd_cpu_seconds,
        "memory": {f.name: getattr(sample.memory, f.name) for f in fields(Memory)},
        "huge_pages": sample.huge_pages,
        "processes": [process.to_dict() for process in sample.processes],
        "processes_total": sample.processes_total,
        "processes_unreadable": sample.processes_unreadable,
        "processes_shown": sample.processes_shown,
        "rivals": list(sample.rivals),
        "seconds": observation.seconds,
        "changes": dict(observation.changes),
        "per_second": rates,
    }


def load(path: str | Path) -> Observation:
    """Read an observation from a file of JSON.

    Raises:
        SourceError: it is no such file, or it does not hold what it should.
        OSError: it cannot be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as where:
    ...     _ = Path(where, "f").write_text(json.dumps(to_dict(Observation(sample=Sample(kernel="6.18")))))
    ...     load(Path(where, "f")).sample.kernel
    '6.18'
    """
    with open(path, "rb") as file:
        try:
            data = file.read(_LARGEST + 1)
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror}") from None
    if len(data) > _LARGEST:
        raise SourceError(f"{path}: larger than {_LARGEST >> 20} MiB, no observation")
    try:
        values = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not JSON: {error}") from None
    try:
        return from_dict(values)
    except SourceError as error:
        raise SourceError(f"{path}: {error}") from None


def from_dict(values: object) -> Observation:
    """The observation that `to_dict` gave; what derives is not read but derived anew.

    Raises SourceError for what is none.

    >>> from_dict(to_dict(Observation(sample=Sample(kernel="6.18"), seconds=2.0))).seconds
    2.0
    """
    top = _Object(values, "the file")
    if top.get("format", _text) != FORMAT:
        raise SourceError(f"not an observation of ksm: its format is not {FORMAT!r}")
    if (version := top.get("version", _count)) != VERSION:
        raise SourceError(f"an observation of version {version}; this ksm reads version {VERSION}")
    counters = top.child("counters")
    memory = top.child("memory")
    sample = Sample(
        time=top.get("time", _number),
        kernel=top.get("kernel", _text),
        simulated=top.get("simulated", _flag),
        nodes=top.get("nodes", _count),
        tunables=top.child("tunables").members(_tunable),
        stats=Stats(**{f.name: counters.get(f.name, _stat(f.name)) for f in fields(Stats)}),
        other=top.child("other").members(_text),
        vmstat=top.child("vmstat").members(_count),
        ksmd_cpu_seconds=top.get("ksmd_cpu_seconds", _optional(_number)),
        memory=Memory(**{f.name: memory.get(f.name, _optional(_count)) for f in fields(Memory)}),
        huge_pages=top.get("huge_pages", _optional(_text)),
        processes=tuple(_process(value, counters.get("page_size", _count)) for value in top.rows("processes")),
        processes_total=top.get("processes_total", _count),
        processes_unreadable=top.get("processes_unreadable", _count),
        processes_shown=top.get("processes_shown", _flag),
        rivals=tuple(_text(value, "rivals") for value in top.rows("rivals")),
    )
    if sample.stats.page_size <= 0:
        raise SourceError("page_size is 0")
    return Observation(
        sample=sample, seconds=top.get("seconds", _number), changes=top.child("changes").members(_change)
    )


def _process(value: object, page_size: int) -> ProcessSample:
    one = _Object(value, "a process")
    stats = ProcessStats(
        page_size=page_size,
        ksm_rmap_items=one.get("ksm_rmap_items", _optional(_count)),
        ksm_zero_pages=one.get("ksm_zero_pages", _optional(_count)),
        ksm_merging_pages=one.get("ksm_merging_pages", _optional(_count)),
        ksm_process_profit=one.get("ksm_process_profit", _optional(_whole)),
        ksm_merge_any=one.get("ksm_merge_any", _optional(_flag)),
        ksm_mergeable=one.get("ksm_mergeable", _optional(_flag)),
    )
    marks = one.get("marked", lambda value, what: None if value is None else _Object(value, what))
    return ProcessSample(
        pid=one.get("pid", _count),
        name=one.get("name", _text),
        stats=stats,
        anonymous=one.get("anonymous", _optional(_count)),
        marked=None if marks is None else Marked(**{f.name: marks.get(f.name, _count) for f in fields(Marked)}),
    )


# ---- values of an untrusted file ----------------------------------------------------------------------------------

Read = Callable[[object, str], T]
_WIDEST = 1 << 64


class _Object:
    """A JSON object whose members are checked as they are taken."""

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise SourceError(f"{what} is no JSON object")
        self.values: dict[str, object] = value
        self.what = what

    def get(self, name: str, read: Read[T]) -> T:
        if name not in self.values:
            raise SourceError(f"{self.what} has no {name!r}")
        return read(self.values[name], name)

    def members(self, read: Read[T]) -> dict[str, T]:
        return {name: read(value, name) for name, value in self.values.items()}

    def child(self, name: str) -> _Object:
        return self.get(name, _Object)

    def rows(self, name: str) -> list[object]:
        value = self.get(name, lambda value, _: value)
        if not isinstance(value, list):
            raise SourceError(f"{name} is no list")
        return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise SourceError(f"{what} is no text")
    return value


def _flag(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise SourceError(f"{what} is neither true nor false")
    return value


def _whole(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -_WIDEST < value < _WIDEST:
        raise SourceError(f"{what} is no whole number of 64 bits")
    return value


def _count(value: object, what: str) -> int:
    number = _whole(value, what)
    if number < 0:
        raise SourceError(f"{what} is negative")
    return number


def _change(value: object, what: str) -> int | float:
    return _whole(value, what) if isinstance(value, int) else _finite(value, what)


def _number(value: object, what: str) -> float:
    number = _finite(value, what)
    if number < 0:
        raise SourceError(f"{what} is negative")
    return number


def _finite(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SourceError(f"{what} is no number")
    if abs(value) > _WIDEST:
        raise SourceError(f"{what} is too large")
    return float(value)


def _tunable(value: object, what: str) -> int | bool | str:
    return value if isinstance(value, str | bool) else _count(value, what)


def _optional(read: Read[T]) -> Read[T | None]:
    return lambda value, what: None if value is None else read(value, what)


def _stat(name: str) -> Read[Any]:
    """How a counter is read: all are counts, the profit may be negative, those of later kernels may be missing."""
    if name == "general_profit":
        return _optional(_whole)
    default = Stats.__dataclass_fields__[name].default
    return _optional(_count) if default is None else _count


def _no_constant(name: str) -> Mapping[str, object]:
    raise ValueError(f"{name} is no JSON")

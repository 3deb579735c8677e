"""Plans read back from what `to_dict` wrote, with every value checked."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ksm.errors import PlanError
from ksm.plan.result import Floats, HostPlan, Ints, Plan

_MOST = 1 << 28  # bytes of a file


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file that `ksm plan --json` wrote.

    Raises:
        PlanError: it is no such file, or damaged. OSError: it cannot be read.

    >>> import ksm
    >>> answer = ksm.plan(ksm.VMClass("web", [b"a" * 4096, b"a" * 4096]), ksm.HostSpec(ram=1 << 16), simulate=False)
    >>> _ = Path("plan.json").write_text(json.dumps(answer.to_dict()))
    >>> read_plan("plan.json").verdict() == answer.verdict()
    True
    """
    if (size := os.stat(path).st_size) > _MOST:
        raise PlanError(f"{os.fspath(path)}: {size:,} bytes, too much for a plan")
    try:
        said = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{os.fspath(path)}: not JSON, or truncated: {error}") from None
    try:
        return plan_from(said)
    except PlanError as error:
        raise PlanError(f"{os.fspath(path)}: {error}") from None


def plan_from(said: Any) -> Plan:
    """The plan that `to_dict` was of.

    Raises:
        PlanError: something is missing, unknown, or not of its kind, or numbers contradict each other.

    >>> plan_from({"fits": 3})
    Traceback (most recent call last):
        ...
    ksm.errors.PlanError: not a plan that ksm plan --json wrote: there is no classes
    """
    if not isinstance(said, dict):
        raise PlanError("not a plan that ksm plan --json wrote")
    known = {name: value for name, value in said.items() if name not in ("fits", "verdict")}
    for field in dataclasses.fields(Plan):
        if field.name not in known:
            raise PlanError(f"not a plan that ksm plan --json wrote: there is no {field.name}")
    found: Plan = _build(Plan, known, "")
    _check(found)
    if said.get("fits") != found.fits:
        raise PlanError(f"fits is {said.get('fits')!r}, but its hosts hold {found.fits}")
    return found


def _build(kind: type, said: Any, where: str) -> Any:
    """A dataclass, by the types of its fields."""
    if not isinstance(said, dict):
        raise PlanError(f"{where}: not an object")
    hints = typing.get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):
        at = f"{where}.{field.name}" if where else field.name
        if field.name in said:
            values[field.name] = _value(hints[field.name], said[field.name], at)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise PlanError(f"{at} is missing")
    if unknown := sorted(set(said) - set(hints)):
        raise PlanError(f"{where + ': ' if where else ''}{unknown[0]!r} is not known: a plan of another version?")
    try:
        return kind(**values)
    except ValueError as error:
        raise PlanError(f"{where}: {error}") from None


def _value(hint: Any, said: Any, where: str) -> Any:
    if hint is Any:
        return said
    if hint in (Ints, Floats):
        return _array(hint, said, where)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _union(inner, said, where)
    if origin is tuple:
        if not isinstance(said, list) or (inner[-1] is not ... and len(said) != len(inner)):
            raise PlanError(f"{where}: not a list of the right length")
        kinds = [inner[0]] * len(said) if inner[-1] is ... else inner
        return tuple(
            _value(kind, item, f"{where}[{n}]") for n, (kind, item) in enumerate(zip(kinds, said, strict=True))
        )
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(said, dict):
            raise PlanError(f"{where}: not an object")
        return {_key(inner[0], key, where): _value(inner[1], item, f"{where}.{key}") for key, item in said.items()}
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), said, where)
    return _plain(hint, said, where)


def _union(kinds: tuple[Any, ...], said: Any, where: str) -> Any:
    if said is None and type(None) in kinds:
        return None
    for kind in (kind for kind in kinds if kind is not type(None)):
        try:
            return _value(kind, said, where)
        except PlanError as error:
            wrong = error
    raise wrong


def _plain(kind: Any, said: Any, where: str) -> Any:
    """A number, a string or a truth value."""
    if said is None and ".one_more." in where:  # never: JSON has no infinity
        return math.inf
    if kind is float and isinstance(said, int) and not isinstance(said, bool):
        said = float(said) if abs(said) < 1 << 1000 else math.nan
    if type(said) is not kind or (kind is float and math.isnan(said)) or (kind is int and abs(said) >= 1 << 63):
        raise PlanError(f"{where}: {str(said)[:40]!r} is not a{'n' if kind is int else ''} {kind.__name__}")
    return said


def _key(kind: Any, said: str, where: str) -> Any:
    if kind is not int:
        return said
    if not said.isdecimal() or len(said) > 9:
        raise PlanError(f"{where}: {said[:40]!r} is not a number")
    return int(said)


def _array(hint: Any, said: Any, where: str) -> Any:
    kind: Any = np.int64 if hint == Ints else np.float64
    try:
        rows = np.array(said, dtype=object)
        if any(isinstance(item, bool | str | list | dict) for item in rows.flat):
            raise ValueError("not numbers")
        if kind is np.int64 and any(not isinstance(item, int) for item in rows.flat):
            raise ValueError("not whole numbers")
        return rows.astype(kind)
    except (ValueError, TypeError, OverflowError):
        raise PlanError(f"{where}: not an array of numbers") from None


# ---- what must hold between the numbers ------------------------------------------------------------------


def _check(answer: Plan) -> None:
    if not answer.hosts or not answer.classes or not answer.samples:
        raise PlanError("a plan without hosts, classes or samples")
    if not 512 <= answer.page_size <= 1 << 30:
        raise PlanError(f"page_size: {answer.page_size}")
    if answer.overlap.shape != (len(answer.samples),) * 2:
        raise PlanError("overlap: not a row and a column a sample")
    names = {each.name for each in answer.classes}
    for sample in answer.samples:
        if sample.class_name not in names:
            raise PlanError(f"samples: {sample.name} is of class {sample.class_name}, which is not among the classes")
        parts = (sample.zero, sample.within, sample.between, sample.unique)
        if min(parts) < 0 or sum(parts) != sample.pages:
            raise PlanError(f"samples: the parts of {sample.name} do not add up to its pages")
    for each in answer.hosts:
        _check_host(each, len(names))


def _check_host(each: HostPlan, classes: int) -> None:
    curve, spec, fits = each.curve, each.host, each.fits
    n = len(curve.vms)
    if curve.vms.ndim != 1 or n < 2 or curve.vms[0] != 0 or np.any(np.diff(curve.vms) <= 0):
        raise PlanError(f"{spec.name}: the curve's vms do not ascend from 0")
    if curve.by_class.shape != (n, classes) or np.any(curve.by_class.sum(axis=1) != curve.vms):
        raise PlanError(f"{spec.name}: the curve's classes do not add up to its vms")
    for result in (curve, each.outlook):
        for field in dataclasses.fields(result) if result is not None else ():
            value = getattr(result, field.name)
            if isinstance(value, np.ndarray) and field.name != "shares" and len(np.atleast_1d(value)) != n:
                raise PlanError(f"{spec.name}: {field.name} has not a value for each of the curve's vms")
    for name in ("need_low", "need_high", "without", "broken", "frames_low", "frames_high", "saved_low", "saved_high"):
        if not np.isfinite(getattr(curve, name)).all():
            raise PlanError(f"{spec.name}: {name} is not known everywhere")
    if not 0 <= fits.recommended <= curve.vms[-1] or sum(each.mix.values()) != fits.recommended:
        raise PlanError(f"{spec.name}: {fits.recommended} VMs are recommended, which the curve or the mix has not")
    for settle in (each.settle, each.default):
        if sorted(settle.cold) != [50, 90, 99] or sorted(settle.one_more) != [50, 90, 99]:
            raise PlanError(f"{spec.name}: the times are not those of 50, 90 and 99 %")
        if settle.pages_to_scan < 1 or settle.sleep_millisecs < 0:
            raise PlanError(f"{spec.name}: pages_to_scan is {settle.pages_to_scan}")
    for line in each.timelines:
        if len({len(line.seconds), len(line.pages_sharing), len(line.cpu_seconds)}) != 1:
            raise PlanError(f"{spec.name}: the arrays of timeline {line.label} differ in length")
    if each.outlook is not None:
        shares = each.outlook.shares
        ok = len(shares) > 1 and shares[0] == 0 and shares[-1] == 1 and np.all(np.diff(shares) > 0)
        if not ok or each.outlook.after.shape != (n, len(shares)) or each.outlook.hz < 1:
            raise PlanError(f"{spec.name}: the shares of the outlook do not ascend from 0 to 1")
    for seen in each.risk.breaking if each.risk is not None else ():
        if len({len(seen.seconds), len(seen.share), len(seen.vm_share)}) != 1:
            raise PlanError(f"{spec.name}: the arrays of {seen.name} differ in length")

"""What ksmd's work costs in CPU time: the model, and the file that `ksm calibrate` keeps it in."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ksm.errors import SourceError, kernel_error

NEAR_LEVELS = 8
"""Levels of a tree, from its root, that stay in ksmd's caches."""

SYSTEM_FILE = Path("/etc/ksm/cost.json")
_FORMAT = "ksm cost model 1"
_BUILT_IN = "built in: measured on Linux 6.18 on an AMD EPYC virtual machine"


@dataclass(frozen=True, slots=True)
class Work:
    """What ksmd did, as far as it costs: counts from some moment on.

    >>> Work(hashed=5) - Work(hashed=2)
    Work(hashed=3, levels=0, merges=0, already=0, stable_levels=0, deep_levels=0, skipped=0)
    """

    hashed: int = 0
    """Pages hashed."""
    levels: int = 0
    """Levels of unstable trees descended."""
    merges: int = 0
    """Pages merged."""
    already: int = 0
    """Visits to merged pages."""
    stable_levels: int = 0
    """Levels of stable trees descended."""
    deep_levels: int = 0
    """Levels of both kinds beyond the first 8 of their trees."""
    skipped: int = 0
    """Pages that smart scan skipped."""

    def __sub__(self, earlier: Work) -> Work:
        return Work(  # spelt out: this is done for every batch of a simulation
            self.hashed - earlier.hashed,
            self.levels - earlier.levels,
            self.merges - earlier.merges,
            self.already - earlier.already,
            self.stable_levels - earlier.stable_levels,
            self.deep_levels - earlier.deep_levels,
            self.skipped - earlier.skipped,
        )

    def to_dict(self) -> dict[str, int]:
        """All of it, for JSON.

        >>> Work(merges=2).to_dict()["merges"]
        2
        """
        return {name.name: getattr(self, name.name) for name in fields(self)}


@dataclass(frozen=True, slots=True)
class CostModel:
    """What ksmd's work costs in CPU nanoseconds, and how it sleeps.

    Levels of trees beyond the first 8 cost `deep_ns` more: their nodes and pages are no longer in the caches. The
    defaults are what `ksm calibrate` found on Linux 6.18 on an AMD EPYC virtual machine.

    >>> CostModel(hash_ns=1000).nanoseconds(5, 0, 0, 0)
    5000.0
    """

    hash_ns: float = 800.0
    """Visiting and hashing a page of 4 KiB."""
    level_ns: float = 130.0
    """A level of the unstable tree: finding the page of another process and comparing."""
    merge_ns: float = 1380.0
    """Comparing all of two pages and mapping a merged frame in place of another."""
    merged_ns: float = 255.0
    """Visiting a page that is merged already."""
    hz: int = 250
    """Timer ticks a second: sleeps end on a tick."""
    stable_level_ns: float = 0.0
    """A level of the stable tree."""
    deep_ns: float = 270.0
    """What a level of either tree costs on top, beyond the first 8."""
    skip_ns: float = 250.0
    """Passing over a page that smart scan skips."""
    origin: str = field(default=_BUILT_IN, compare=False)
    """Where the figures are from, for people."""

    def nanoseconds(
        self,
        hashed: float,
        levels: float,
        merges: float,
        already: float,
        page_size: int = 4096,
        *,
        stable_levels: float = 0,
        deep_levels: float = 0,
        skipped: float = 0,
    ) -> float:
        """CPU time of so much work.

        Args:
            hashed: pages hashed.
            levels: levels of unstable trees descended.
            merges: pages merged.
            already: visits to merged pages.
            page_size: bytes a page.
            stable_levels: levels of stable trees descended.
            deep_levels: those of both kinds beyond the first 8 of their trees.
            skipped: pages that smart scan skipped.

        >>> CostModel(hash_ns=1000).nanoseconds(1000, 0, 0, 0)
        1000000.0
        """
        work = (hashed, levels, stable_levels, deep_levels, merges, already, skipped)
        total = 0.0
        for number, ns in zip(work, self.of_each(page_size), strict=True):
            total += number * ns  # as the engine adds; sum() is more exact from Python 3.12 on
        return total

    def of_each(self, page_size: int = 4096) -> tuple[float, ...]:
        """CPU nanoseconds of one of each kind of work, in the engine's order.

        A page hashed, a level of the unstable tree, one of the stable tree, a deep one, a merge, a visit to a merged
        page, a skipped page.

        >>> CostModel(hash_ns=1000).of_each(8192)[0]
        2000.0
        """
        return (
            self.hash_ns * (page_size / 4096),
            self.level_ns,
            self.stable_level_ns,
            self.deep_ns,
            self.merge_ns,
            self.merged_ns,
            self.skip_ns,
        )

    def of(self, work: Work, page_size: int = 4096) -> float:
        """CPU nanoseconds of work that was counted.

        >>> CostModel(merge_ns=5.0).of(Work(merges=2))
        10.0
        """
        return self.nanoseconds(
            work.hashed,
            work.levels,
            work.merges,
            work.already,
            page_size,
            stable_levels=work.stable_levels,
            deep_levels=work.deep_levels,
            skipped=work.skipped,
        )

    def search_ns(self, size: float) -> float:
        """A search through an unstable tree of `size` pages.

        >>> cost = CostModel(level_ns=100, deep_ns=300)
        >>> cost.search_ns(1 << 8), cost.search_ns(1 << 10)
        (800.0, 1600.0)
        """
        depth = math.log2(max(size, 1.0))
        return depth * self.level_ns + max(0.0, depth - NEAR_LEVELS) * self.deep_ns

    def scaled(self, factor: float) -> CostModel:
        """The same with every cost times `factor`; ticks stay.

        >>> CostModel(hash_ns=1000.0).scaled(2).hash_ns
        2000.0
        """
        return replace(self, **{name: getattr(self, name) * factor for name in COSTS})

    # ---- the file ----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON.

        >>> CostModel().to_dict()["hz"]
        250
        """
        return {name.name: getattr(self, name.name) for name in fields(self)}

    @classmethod
    def of_host(cls) -> CostModel:
        """What `ksm calibrate` measured here, from `config_files()`; the built-in figures where it has not been run.

        Raises:
            SourceError: the file is damaged.

        >>> CostModel.of_host().hash_ns > 0
        True
        """
        return next((cls.load(path) for path in config_files() if path.is_file()), cls())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostModel:
        """Read what `save` wrote.

        Raises:
            SourceError: it cannot be read, or is no cost model.

        >>> CostModel.load("/nonexistent")
        Traceback (most recent call last):
        ksm.errors.SourceError: ...
        """
        try:
            with open(path, encoding="utf-8") as file:
                found = json.loads(file.read(1 << 16))
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
            raise SourceError(f"{path} is no cost model: {error}") from error
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise SourceError(f"{path} is no cost model: it does not say that it is a {_FORMAT!r}")
        values: dict[str, Any] = {}
        for name in (*COSTS, "hz"):
            value = found.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
                raise SourceError(f"{path}: {name} is {value!r}, and must be a number from 0 to 1e9")
            values[name] = float(value)
        if not values["hz"].is_integer() or values["hz"] < 1:
            raise SourceError(f"{path}: hz is {values['hz']}, and must be a whole number from 1 on")
        return cls(**values | {"hz": int(values["hz"])}, origin=f"{path}: {found.get('origin', 'of unknown origin')}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all; directories are made as needed.

        Raises:
            OSError: with the kernel's errno.

        >>> CostModel(hash_ns=900.0).save("cost.json")
        >>> CostModel.load("cost.json").hash_ns
        900.0
        """
        target = Path(path)
        text = json.dumps({"format": _FORMAT, **self.to_dict()}, indent=2) + "\n"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    file.write(text)
                os.chmod(name, 0o644)
                os.replace(name, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
        except OSError as error:
            raise kernel_error(error.errno or 0, f"writing {target}") from error


COSTS = tuple(name.name for name in fields(CostModel) if name.name.endswith("_ns"))


def config_files() -> tuple[Path, ...]:
    """Where a calibrated model is looked for, the first that is there wins: the user's, then the host's.

    >>> len(config_files())
    2
    """
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(home, "ksm", "cost.json"), SYSTEM_FILE

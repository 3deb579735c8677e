"""What the analysis of a fleet found, as rows, for people and for files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ksm.constants import RMAP_ITEM_BYTES
from ksm.fleet.extras import need
from ksm.fleet.files import whole
from ksm.fleet.survey import LeftOut
from ksm.units import binary

if TYPE_CHECKING:
    import altair

Table: TypeAlias = Literal["hosts", "vms", "classes", "host_pairs", "top", "known"]
TABLES: tuple[Table, ...] = ("hosts", "vms", "classes", "host_pairs", "top", "known")

PARTS: Mapping[str, str] = MappingProxyType(
    {
        "zeros": "saved_zero",
        "within VMs": "saved_within_vms",
        "between VMs of a class": "saved_between_vms",
        "between classes": "saved_between_classes",
    }
)
"""What a saving is made up of, in words: the fields of `Sharing`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """What KSM settles at on one host, or on several added up.

    >>> Sharing(name="h", pages=10, pages_shared=1, pages_sharing=4, pages_unshared=5).saved_bytes
    16384
    """

    name: str
    page_size: int = 4096
    vms: int = 0
    pages: int = 0
    zero_pages: int = 0
    pages_shared: int = 0
    pages_sharing: int = 0
    pages_unshared: int = 0
    ksm_zero_pages: int = 0
    stable_node_chains: int = 0
    stable_node_dups: int = 0
    saved_zero: int = 0
    """Pages saved that are zeros. With the next three it makes up all of the saving, `lost_to_limit` taken off."""
    saved_within_vms: int = 0
    """Pages whose content the same VM has again."""
    saved_between_vms: int = 0
    """Further pages whose content other VMs of the class have."""
    saved_between_classes: int = 0
    """Further pages whose content VMs of other classes have."""
    lost_to_limit: int = 0
    """Frames more than one a content, zeros apart, since `max_page_sharing` limits what one may be mapped by."""

    @property
    def saved_bytes(self) -> int:
        """Memory that merging frees."""
        return (self.pages_sharing + self.ksm_zero_pages) * self.page_size

    @property
    def frames_bytes(self) -> int:
        """Memory that the pages take then."""
        return self.pages * self.page_size - self.saved_bytes

    @property
    def metadata_bytes(self) -> int:
        """What the kernel's bookkeeping takes: 64 bytes an rmap item."""
        return (self.pages_shared + self.pages_sharing + self.pages_unshared) * RMAP_ITEM_BYTES

    @property
    def general_profit(self) -> int:
        """Bytes saved, less the bookkeeping."""
        return self.saved_bytes - self.metadata_bytes

    def to_dict(self) -> dict[str, Any]:
        """A row.

        >>> Sharing(name="h").to_dict()["saved_bytes"]
        0
        """
        derived = ("saved_bytes", "frames_bytes", "metadata_bytes", "general_profit")
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """A fleet, counted.

    >>> nothing = Analysis(page_size=4096, key_id="", total=Sharing(name="fleet"), one_host=Sharing(name="one host"),
    ...                    hosts=(), vms=(), classes=(), host_pairs=None, top=(), known=(), left_out=(), assumed=(),
    ...                    contents=0, ranges=1, ranges_counted=1)
    >>> nothing.complete
    True
    """

    page_size: int
    key_id: str
    total: Sharing
    """All hosts added up, as VMs stand today."""
    one_host: Sharing
    """Were all VMs on one host."""
    hosts: tuple[Sharing, ...]
    vms: tuple[Mapping[str, Any], ...]
    """A row a VM: pages, contents, duplicated (pages that it has again itself), shared_on_host and shared_in_fleet
    (pages whose content another VM there has), zeros not counted in these."""
    classes: tuple[Mapping[str, Any], ...]
    """A row for two classes: contents (without zero) that both have; for one and itself, that two of its VMs have."""
    host_pairs: tuple[Mapping[str, Any], ...] | None
    """The same for hosts; None if there are more than 2,048."""
    top: tuple[Mapping[str, Any], ...]
    """The contents with most copies."""
    known: tuple[Mapping[str, Any], ...]
    """Pages and saving by what contents are: zero, filled with one byte, of files, other."""
    left_out: tuple[LeftOut, ...]
    assumed: tuple[str, ...]
    contents: int
    """Different ones, zero not counted."""
    ranges: int
    ranges_counted: int
    """Fewer than `ranges`: the work was cut short, and these are the figures of so many of them."""

    @property
    def complete(self) -> bool:
        """Whether all of the files given are in it, and all of their contents.

        A file that is there twice leaves no gap.
        """
        return self.ranges_counted == self.ranges and not any(one.partial for one in self.left_out)

    def verdict(self) -> list[str]:
        """The answer in sentences.

        >>> from ksm.fleet.analyze import _EMPTY
        >>> Analysis(**_EMPTY).verdict()
        ['Today KSM saves 0 B of 0 B; if one host held all, 0 B.']
        """
        total, one = self.total, self.one_host
        whole = total.pages * total.page_size
        share = f" ({100 * total.saved_bytes / whole:.1f} %)" if whole else ""
        better = f" ({100 * one.saved_bytes / whole:.1f} %)" if whole else ""
        lines = [
            f"Today KSM saves {binary(total.saved_bytes)} of {binary(whole)}{share}; if one host held all, "
            f"{binary(one.saved_bytes)}{better}."
        ]
        if total.saved_bytes:
            said = ", ".join(
                f"{name} {binary(getattr(total, field) * total.page_size)}" for name, field in PARTS.items()
            )
            lost = total.lost_to_limit * total.page_size
            lines.append(f"Of today's saving: {said}{f'; max_page_sharing costs {binary(lost)}' if lost else ''}.")
        return lines

    def chart(self, kind: str = "saving") -> altair.TopLevelMixin:
        """A chart of altair: for notebooks, and to be saved as PNG or SVG by its `save`.

        Args:
            kind: "saving", "hosts", "memory", "contents", and where there are several of them "classes", "pairs" (of
                hosts) and "spread" (classes over hosts): see `ksm.fleet.charts.figures`.

        Raises:
            ValueError: no such kind. UnsupportedError: what `ksm[report]` has is not installed.

        >>> from ksm.fleet import Vm, analyze, fingerprint_vm
        >>> _ = fingerprint_vm(b"x" * 8192, "alone", Vm(name="a"))
        >>> analyze("alone").chart("hosts").to_dict()["mark"]["type"]
        'bar'
        """
        from ksm.charts import standing_alone
        from ksm.fleet.charts import figures

        found = figures(self)
        if kind not in found:
            raise ValueError(f"no chart {kind!r} of this fleet: there are {', '.join(found)}")
        return standing_alone(found[kind])

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "complete": self.complete,
            "page_size": self.page_size,
            "key_id": self.key_id,
            "contents": self.contents,
            "total": self.total.to_dict(),
            "one_host": self.one_host.to_dict(),
            **{name: self._rows(name) for name in TABLES},
            "left_out": [one.to_dict() for one in self.left_out],
            "assumed": list(self.assumed),
            "ranges": self.ranges,
            "ranges_counted": self.ranges_counted,
        }

    def _rows(self, name: Table) -> list[dict[str, Any]] | None:
        rows: Sequence[Any] | None = getattr(self, name)
        return None if rows is None else [row.to_dict() if isinstance(row, Sharing) else dict(row) for row in rows]

    def to_frame(self, name: Table = "hosts") -> Any:
        """One of the tables as a pandas DataFrame: hosts, vms, classes, host_pairs, top, known."""
        if name not in TABLES:
            raise ValueError(f"{name!r} is no table; these are: {', '.join(TABLES)}")
        return need("pandas").DataFrame(self._rows(name) or [])

    def write(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write each table as TABLE.parquet, and all of it as analysis.json; the paths.

        Raises:
            OSError: one cannot be written; those before are there.
        """
        pa, parquet = need("pyarrow"), need("pyarrow.parquet")
        where = Path(directory)
        where.mkdir(parents=True, exist_ok=True)
        done = []
        for name in TABLES:
            rows = self._rows(name)
            if not rows:
                continue
            about = {b"ksm.fleet.complete": json.dumps(self.complete).encode()}
            table = pa.Table.from_pylist(rows).replace_schema_metadata(about)
            with whole(where / f"{name}.parquet") as (part,):
                parquet.write_table(table, part)
            done.append(where / f"{name}.parquet")
        with whole(where / "analysis.json") as (part,):
            part.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        return [*done, where / "analysis.json"]

"""The sources of a plan's samples and recordings, with recordings among the samples taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ksm.errors import PlanError
from ksm.estimate import Source
from ksm.plan.breaking import breaking, lasts, recording, samples_of
from ksm.plan.contents import Table
from ksm.plan.inputs import VMClass
from ksm.plan.result import Breaking

if TYPE_CHECKING:
    from ksm.trace import Trace


@dataclass(frozen=True, slots=True)
class Given:
    """What classes of VMs are known by.

    Attributes:
        sources: what to read, sample by sample.
        class_of: of each sample.
        origin: of each sample: the path of the recording that it is from, "" for none.
        recordings: (recording, name of the class), to tell the risk from.
        too_short: paths of recordings among the samples that cannot tell it.

    >>> Given.of([VMClass("web", [b"x" * 4096])]).class_of
    [0]
    """

    sources: list[Source]
    class_of: list[int]
    origin: list[str]
    recordings: list[tuple[Trace, str]]
    too_short: list[str]

    @classmethod
    def of(cls, classes: Sequence[VMClass]) -> Given:
        """Take the classes' sources apart.

        Raises:
            PlanError: a recording cannot be a sample, or samples have fingerprints of different keys.
            SourceError: a recording that is damaged, or `traces` that are none.
        """
        found = cls([], [], [], [], [])
        keys: dict[str | None, str] = {}
        for index, each in enumerate(classes):
            for source in each.samples:
                trace = recording(source)
                taken: Sequence[Any] = [source] if trace is None else samples_of(trace)
                found.sources.extend(taken)
                found.class_of.extend([index] * len(taken))
                found.origin.extend(["" if trace is None else str(trace.path)] * len(taken))
                keys.setdefault(trace.metadata.key_id if trace else None, str(trace.path if trace else "others"))
                if trace is not None and lasts(trace):
                    found.recordings.append((trace, each.name))
                elif trace is not None:
                    found.too_short.append(str(trace.path))
            found.recordings.extend((_trace(source), each.name) for source in each.traces)
        if len(keys) > 1:
            secret = next(path for key, path in keys.items() if key is not None)
            raise PlanError(f"{secret}: its fingerprints are under a key, and cannot be compared with other samples")
        return found

    def breaking(self, table: Table, page_size: int, still: float, zeros_absent: bool) -> list[Breaking]:
        """How fast sharing breaks in each of the recordings; `table` has the samples' contents. Reads them all.

        Raises:
            PlanError: a recording is too short, or its pages are of another size. SourceError: it is damaged.
        """
        found = []
        for trace, name in self.recordings:
            if trace.page_size != page_size:
                raise PlanError(
                    f"{trace.path}: its pages have {trace.page_size:,} bytes, those of the samples {page_size:,}"
                )
            others = np.array([origin != str(trace.path) for origin in self.origin])
            # a VM of a recording that is no sample may be a sample by itself: what only one has may be its own
            least = 2 if others.all() else 1
            found.append(breaking(trace, name, still, table.held_by(others, least, page_size), zeros_absent))
        return found


def _trace(source: Any) -> Trace:
    from ksm.trace import Trace

    return source if isinstance(source, Trace) else Trace(source)

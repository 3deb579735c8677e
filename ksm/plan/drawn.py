"""Charts of a plan's samples: what their memory is made of, and who shares with whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ksm.charts import Figure, cells, labels, stacked
from ksm.plan.result import Plan

MOST_BARS = 24
"""More samples than these are shown by class."""

PARTS = (
    ("zero", "zero"),
    ("within", "shared within the VM"),
    ("between", "shared between VMs"),
    ("unique", "unique"),
)


def composition(answer: Plan) -> Figure:
    """What the samples' memory is made of; by class where there are many samples.

    >>> import ksm
    >>> web = ksm.VMClass("web", [b"a" * 4096 + bytes(4096), b"a" * 4096 + b"2" * 8192])
    >>> figure = composition(ksm.plan(web, ksm.HostSpec(ram=1 << 16), simulate=False))
    >>> figure.caption
    "80% of the samples' pages are zero or have a copy; the rest is each VM's own."
    """
    by_class = len(answer.samples) > MOST_BARS
    groups: Sequence[Any] = answer.classes if by_class else answer.samples
    names = labels([each.name for each in groups])
    amounts = [[float(getattr(each, part)) for part, _ in PARTS] for each in groups]
    kinds = [f"{each.samples} samples" if by_class else each.class_name for each in groups]
    table = [
        (name, kind, f"{each.pages:,.0f}", *(f"{amount:,.0f}" for amount in row))
        for name, kind, each, row in zip(names, kinds, groups, amounts, strict=True)
    ]
    parts = [text for _, text in PARTS]
    in_bytes = [[amount * answer.page_size for amount in row] for row in amounts]
    total = sum(each.pages for each in answer.samples)
    unique = sum(each.unique for each in answer.samples)
    note = f"{len(answer.samples)} samples are shown by class: means over the samples of each." if by_class else ""
    return Figure(
        "composition",
        "What their memory is made of",
        f"{1 - unique / max(total, 1):.0%} of the samples' pages are zero or have a copy; the rest is each VM's own.",
        stacked(names, parts, in_bytes, "touched memory"),
        ("sample" if not by_class else "class", "class" if not by_class else "of", "pages", *parts),
        table,
        note,
    )


def matrix(answer: Plan) -> Figure:
    """Of the row's pages, those whose content the column has; by class where there are many samples.

    >>> import ksm
    >>> web = ksm.VMClass("web", [b"a" * 4096 + b"1" * 4096, b"a" * 4096 + b"2" * 4096])
    >>> matrix(ksm.plan(web, ksm.HostSpec(ram=1 << 16), simulate=False)).rows[0][1:]
    ('', '50.0%')
    """
    by_class = len(answer.samples) > MOST_BARS
    pages = np.array([max(each.pages, 1) for each in answer.samples], np.float64)
    share = answer.overlap / pages[:, None]
    if by_class:
        names = [each.name for each in answer.classes]
        kinds = np.array([names.index(each.class_name) for each in answer.samples])
        share = np.array(
            [[_mean_pair(share, kinds == a, kinds == b) for b in range(len(names))] for a in range(len(names))]
        )
    else:
        names = labels([each.name for each in answer.samples], 18)
        np.fill_diagonal(share, np.nan)  # a sample shares everything with itself
    known = [[float(one) if np.isfinite(one) else None for one in row] for row in share]
    return Figure(
        "matrix",
        "Who shares with whom",
        "Of the pages of the row, those whose content the column has, too; zero pages apart.",
        cells(names, names, known, ("of the pages of", "have the contents")),
        ("of the pages of", *names),
        [(name, *("" if one is None else f"{one:.1%}" for one in row)) for name, row in zip(names, known, strict=True)],
        f"{len(answer.samples)} samples are shown by class: means over pairs of samples." if by_class else "",
    )


def _mean_pair(share: Any, rows: Any, columns: Any) -> float:
    """The mean over pairs of different samples; NaN where there is none."""
    block = share[np.ix_(rows, columns)]
    pairs = block.size - (int(rows.sum()) if (rows == columns).all() else 0)
    total = block.sum() - (np.trace(block) if (rows == columns).all() else 0.0)
    return float(total / pairs) if pairs else float("nan")

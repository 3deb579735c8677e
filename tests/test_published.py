"""What others hold KSM to: the kernel selftests' and LTP's cases, with the published figures."""

from __future__ import annotations

import pytest

from tests.published import CASES, Case, refusal, run


@pytest.mark.parametrize("executor", ["hash", "tree", "model", "kernel"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_published_figures(case: Case, executor: str) -> None:
    why = refusal(executor, case)
    if why:
        pytest.skip(why)
    rows = run(case, executor)
    assert rows
    assert [row for row in rows if not row.ok] == []

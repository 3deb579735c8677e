"""The kernel's selftests and LTP's cases, with the published figures, on the machine, the model and the kernel."""

from __future__ import annotations

import pytest

from tests.kernel.real import Unavailable
from tests.published import CASES, Case, executors, formula, refusal, run, suits

PAIRS = [(case, executor) for case in CASES for executor in executors() if not suits(executor, case)]


@pytest.mark.parametrize(("case", "executor"), PAIRS, ids=[f"{case.name}-{executor}" for case, executor in PAIRS])
def test_published(case: Case, executor: str) -> None:
    reason = refusal(executor, case)
    if reason:
        pytest.skip(reason)
    try:
        rows = run(case, executor)
    except Unavailable as error:
        pytest.skip(str(error))
    assert rows
    wrong = [f"{row.what}: published {row.expected}, got {row.got}" for row in rows if not row.ok]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("duplicates", "limit"), [(d, m) for d in range(2, 40) for m in range(2, 12)])
def test_formula_is_the_settled_state(duplicates: int, limit: int) -> None:
    """The selftest's formula and the closed form of static content are the same figures."""
    shared = duplicates // limit + (duplicates % limit >= 2)
    unshared = int(duplicates % limit == 1)
    assert formula(duplicates, limit) == (shared, duplicates - unshared - shared)

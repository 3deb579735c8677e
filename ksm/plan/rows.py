"""A plan's figures as rows of text: for the terminal, notebooks and the report page."""

from __future__ import annotations

import math

from ksm.plan.result import HostPlan, Plan
from ksm.units import binary, clock


def figures(answer: Plan, each: HostPlan) -> list[tuple[str, str]]:
    """(what, how much) for one kind of host; what is part of the row above is indented.

    >>> import ksm
    >>> answer = ksm.plan(ksm.VMClass("vm", [b"a" * 4096, b"b" * 4096]), ksm.HostSpec(ram=1 << 16), simulate=False)
    >>> figures(answer, answer.hosts[0])[0]
    ('VMs without KSM', '14')
    """
    fits, policy, numbers = each.fits, answer.policy, each.frames

    def amount(name: str) -> str:
        value = numbers[name]
        return "unknown" if value is None else binary(value)

    rows = [
        ("VMs without KSM", f"{fits.without_ksm:,}"),
        ("VMs with KSM, on average", "unknown" if fits.mean is None else f"{fits.mean:,}"),
        (f"VMs with KSM, {policy.confidence:.0%} sure", f"{fits.confident:,}"),
        (f"  and {policy.broken:.0%} of merged pages may break", f"{fits.broken:,}"),
        ("  and run=2 is survived", f"{fits.unmerged:,}"),
        (f"memory of {fits.recommended:,} VMs, unmerged", amount("without")),
        ("  merged", amount("need")),
        ("  of that, the kernel's bookkeeping", amount("bookkeeping")),
    ]
    if each.risk is not None:
        rows.append(
            ("written of merged pages a minute: median; worst", f"{each.risk.median:.2%}; {each.risk.worst:.1%}")
        )
        rows.append(("  memory if the worst is everywhere at once", binary(each.risk.need_worst)))
    for percent in each.settle.cold:
        later = each.settle.one_more[percent]
        more = clock(later) if math.isfinite(later) else "later, if ever"
        rows.append((f"{percent} % merged from cold; of one more VM", f"{clock(each.settle.cold[percent])}; {more}"))
    return rows

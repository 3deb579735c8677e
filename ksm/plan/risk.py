"""What the breaking seen in recordings means for a host that is full of such VMs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ksm.plan.needs import Needs
from ksm.plan.result import Breaking, ClassSummary, Curve, Risk


def assess(
    needs: Needs, curve: Curve, vms: int, found: Sequence[Breaking], classes: Sequence[ClassSummary]
) -> Risk | None:
    """The risk at so many VMs; None without recordings.

    Args:
        needs, curve: of the host, under the recommended rules.
        found: of all recordings of all classes.
        classes: what the samples show of them, in the order of the plan.

    >>> from ksm.plan.inputs import HostSpec
    >>> from ksm.plan.planning import needs_of
    >>> needs = needs_of([b"a" * 4096, b"a" * 4096], HostSpec(ram=1 << 16))
    >>> assess(needs, needs.curve(needs.grid()), 2, [], []) is None
    True
    """
    if not found or not vms:
        return None
    weights = needs.mix[vms] * np.array([each.pages - each.unique for each in classes])

    def over_the_mix(of: str) -> float:
        by_class = {each.name: [getattr(b, of) for b in found if b.class_name == each.name] for each in classes}
        middle = {
            name: float(np.mean(values) if of == "median" else max(values))
            for name, values in by_class.items()
            if values
        }
        other = max(middle.values())
        shares = np.array([middle.get(each.name, other) for each in classes])
        return float((weights * shares).sum() / weights.sum()) if weights.any() else 0.0

    median, worst, ever = (over_the_mix(of) for of in ("median", "worst", "ever"))
    at = np.array([vms], np.int64)
    need, need_worst, need_ever, all_of_it = (float(needs.after(at, share)[0]) for share in (0.0, worst, ever, 1.0))
    host = needs.host
    limit = host.usable + host.swap
    per_minute = (all_of_it - need) * median

    def fits(share: float) -> int:
        return needs.largest(curve.vms, lambda numbers: needs.after(numbers, share), limit)

    return Risk(
        breaking=tuple(found),
        vms=vms,
        median=median,
        worst=worst,
        ever=ever,
        need=need,
        need_worst=need_worst,
        need_ever=need_ever,
        limit=limit,
        swap_worst=max(0.0, need_worst - host.usable),
        swap_ever=max(0.0, need_ever - host.usable),
        survives_worst=need_worst <= limit,
        survives_ever=need_ever <= limit,
        fits_worst=fits(worst),
        fits_ever=fits(ever),
        minutes_to_full=max(0.0, limit - need) / per_minute if per_minute > 0 and all_of_it > limit else None,
    )

"""A picture of time and memory over the size of a fleet."""

from __future__ import annotations

from collections.abc import Sequence

from ksm.charts import LIGHT, load_altair


def picture(figures: Sequence[tuple[int, float, float]], what: str, path: str) -> None:
    """(VMs, seconds, bytes) on logarithmic axes, as SVG or PNG; `what` took the seconds."""
    altair = load_altair()
    rows = [{"VMs": vms, "seconds": seconds, "GiB": used / 2**30} for vms, seconds, used in figures]
    both = []
    for field, title, color in (
        ("seconds", f"seconds to {what}", LIGHT["blue"]),
        ("GiB", "GiB at the most", LIGHT["green"]),
    ):
        axes = {
            "x": altair.X("VMs:Q", scale=altair.Scale(type="log"), axis=altair.Axis(format="~s", tickCount=4)),
            "y": altair.Y(f"{field}:Q", scale=altair.Scale(type="log"), title=title, axis=altair.Axis(tickCount=4)),
        }
        chart = altair.Chart(altair.Data(values=rows)).encode(**axes)
        both.append(
            (chart.mark_line(color=color) + chart.mark_point(color=color, filled=True, size=60)).properties(width=300)
        )
    altair.hconcat(*both).save(path, scale_factor=2)

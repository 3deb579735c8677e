"""What a measurement comes to: a figure beside what a release must show and what the machine allows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. Without `must` it only informs; without `got`, `why_not` says why."""

    what: str
    got: float | None = None
    must: float | None = None
    aim: float | None = None
    unit: str = "times"
    less: bool = False
    """Whether less is better."""
    why_not: str | None = None
    detail: dict[str, float] = field(default_factory=dict)
    """What it is made of: seconds, pages a second, bytes."""

    @property
    def verdict(self) -> str:
        """ "aim", "must", "missed", or "" where there is no goal or no figure."""
        if self.got is None or self.must is None:
            return ""
        for name, goal in (("aim", self.aim), ("must", self.must)):
            if goal is not None and (self.got <= goal if self.less else self.got >= goal):
                return name
        return "missed"

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self) | {"verdict": self.verdict}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """What `to_dict` made."""
        return cls(**{name: value for name, value in values.items() if name != "verdict"})

"""What advice is made of: a finding, and the rules that find; each looks at an observation and speaks or is silent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ksm.observe import Observation

Level = Literal["problem", "hint", "info"]
"""Something is wrong; something could be better; how it is."""

LEVELS: tuple[Level, ...] = ("problem", "hint", "info")

KSM_RST = "https://docs.kernel.org/admin-guide/mm/ksm.html"
FILES = "/sys/kernel/mm/ksm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is going on, and what to do.

    >>> Finding(rule="stopped", level="problem", text="ksmd does not run.", source=KSM_RST).to_dict()["rule"]
    'stopped'
    """

    rule: str
    """The rule's name."""
    level: Level
    text: str
    """In sentences, with the figures."""
    source: str
    """What the rule rests on."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The figures that it rests on, by name."""
    command: str | None = None
    """A command line that would follow from it."""

    def to_dict(self) -> dict[str, Any]:
        """All of it under its names, for JSON.

        >>> Finding(rule="r", level="info", text="t.", source="s", figures={"run": 1}).to_dict()["figures"]
        {'run': 1}
        """
        return {
            "rule": self.rule,
            "level": self.level,
            "text": self.text,
            "figures": dict(self.figures),
            "command": self.command,
            "source": self.source,
        }


@dataclass(frozen=True, slots=True)
class Says:
    """What a rule answers when it has something to say.

    >>> Says("ksmd does not run.", {"run": 0}).command is None
    True
    """

    text: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    command: str | None = None
    level: Level | None = None
    """Where it is not the rule's own."""


Answer = Says | None
Rule = Callable[[Observation], "Finding | None"]


def rule(level: Level, source: str) -> Callable[[Callable[[Observation], Answer]], Rule]:
    """Make a function a rule of that level, which rests on that source.

    >>> @rule("info", "here")
    ... def example(o):
    ...     return Says("Nothing.")
    >>> example(Observation(sample=None)).text
    'Nothing.'
    """

    def make(function: Callable[[Observation], Answer]) -> Rule:
        name = function.__name__

        def apply(o: Observation) -> Finding | None:
            said = function(o)
            if said is None:
                return None
            return Finding(
                rule=name,
                level=said.level or level,
                text=said.text,
                source=source,
                figures=said.figures,
                command=said.command,
            )

        apply.__name__ = name
        apply.__doc__ = function.__doc__
        return apply

    return make


def echo(**values: int) -> str:
    """The command that writes tunables, in that order.

    >>> echo(run=2, max_page_sharing=512)
    'echo 2 > /sys/kernel/mm/ksm/run; echo 512 > /sys/kernel/mm/ksm/max_page_sharing'
    """
    return "; ".join(f"echo {value} > {FILES}/{name}" for name, value in values.items())


def restart(**values: int) -> str:
    """The command for tunables that can only change while nothing is merged: unmerge, write, run again.

    >>> restart(max_page_sharing=512).count("run")
    2
    """
    return f"{echo(run=2, **values)}; {echo(run=1)}"

"""Diagnosis: what KSM is doing on a host, a machine or in a saved observation, and what to do about it."""

from __future__ import annotations

from ksm.linux import Host
from ksm.machine import Machine
from ksm.observe import Observation, observe
from ksm.rules import LEVELS, Finding, Level, Rule, idle, risk, tuning, worth

__all__ = ["RULES", "Finding", "Level", "Rule", "advise"]

RULES: tuple[Rule, ...] = (
    idle.stopped,
    idle.unmerged,
    risk.unmerge_risk,
    idle.nothing_registered,
    idle.asleep,
    idle.not_anonymous,
    idle.no_duplicates,
    idle.numa,
    idle.first_pass,
    worth.negative_profit,
    tuning.rivals,
    tuning.advisor_limits,
    tuning.no_sleep,
    worth.losers,
    worth.wasted_effort,
    worth.volatile,
    worth.zero_pages,
    worth.chains,
    worth.metadata,
    tuning.advisor_floor,
    tuning.advisor_ceiling,
    tuning.slow,
    tuning.dear,
    tuning.huge_pages,
    risk.breaking,
    risk.swapped_copies,
    worth.saving,
    tuning.speed,
    tuning.old_kernel,
    risk.hidden,
)
"""Every rule, in the order in which findings of one level are told."""


def advise(system: Host | Machine | Observation, seconds: float = 2.0) -> list[Finding]:
    """What is going on and what follows, problems first.

    Args:
        system: a host or a machine, which is looked at for `seconds` (of a machine, simulated seconds pass), or an
            observation made before.
        seconds: how long; rules about rates are silent after a single look (0).

    Raises:
        UnsupportedError: no KSM here.
        OSError: a file cannot be read.

    >>> advise(Machine())[0].text
    'ksmd does not run (run is 0), and nothing is merged.'
    """
    o = system if isinstance(system, Observation) else observe(system, seconds, deep=True)
    found = [finding for rule in RULES if (finding := rule(o)) is not None]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))

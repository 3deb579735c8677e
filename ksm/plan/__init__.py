"""The planner: how many VMs fit on a host, how soon, at what cost, at what risk."""

from __future__ import annotations

from ksm.plan.inputs import HostSpec, Policy, VMClass
from ksm.plan.planning import plan
from ksm.plan.result import Breaking, Curve, Fits, HostPlan, Plan, Risk, Settle

__all__ = ["Breaking", "Curve", "Fits", "HostPlan", "HostSpec", "Plan", "Policy", "Risk", "Settle", "VMClass", "plan"]

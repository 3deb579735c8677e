"""The planner: how many VMs fit on a host, how soon, at what cost, at what risk."""

from __future__ import annotations

from ksm.plan.inputs import HostSpec, Policy, VMClass
from ksm.plan.planning import plan
from ksm.plan.result import Curve, Fits, HostPlan, Plan, Settle

__all__ = ["Curve", "Fits", "HostPlan", "HostSpec", "Plan", "Policy", "Settle", "VMClass", "plan"]

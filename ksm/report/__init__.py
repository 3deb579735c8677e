"""Reports: self-contained HTML pages that need no network."""

from __future__ import annotations

from ksm.report.fleet import fleet_page
from ksm.report.page import page
from ksm.report.placement import placement_page
from ksm.report.plan import plan_page

__all__ = ["fleet_page", "page", "placement_page", "plan_page"]

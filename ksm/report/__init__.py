"""Reports: self-contained HTML pages that need no network."""

from __future__ import annotations

from ksm.report.page import page
from ksm.report.plan import plan_page

__all__ = ["page", "plan_page"]

"""The files of /sys/kernel/mm/ksm: which kernel has them, what they read, what they accept."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.model.memory import fail

if TYPE_CHECKING:
    from tests.model.machine import ModelMachine

SINCE = {
    "use_zero_pages": (4, 12),
    "max_page_sharing": (4, 13),
    "stable_node_chains": (4, 13),
    "stable_node_dups": (4, 13),
    "stable_node_chains_prune_millisecs": (4, 13),
    "general_profit": (6, 4),
    "pages_scanned": (6, 6),
    "ksm_zero_pages": (6, 6),
    "pages_skipped": (6, 7),
    "smart_scan": (6, 7),
    "advisor_mode": (6, 8),
    "advisor_max_cpu": (6, 8),
    "advisor_target_scan_time": (6, 8),
    "advisor_min_pages_to_scan": (6, 8),
    "advisor_max_pages_to_scan": (6, 8),
}
DEFAULT_PAGES_TO_SCAN = 100
BITS_32, BITS_64 = 1 << 32, 1 << 64


def number(text: str, top: int, too_large: int = errno.EINVAL) -> int:
    """Parse an unsigned decimal below `top`: a leading + and one trailing newline may stand.

    >>> number("+007\\n", 1 << 32)
    7
    """
    digits = text.removesuffix("\n").removeprefix("+")
    if not digits or not (digits.isascii() and digits.isdigit()):
        fail(errno.EINVAL, repr(text))
    value = int(digits)
    if value >= top:
        fail(too_large, repr(text))
    return value


def boolean(text: str) -> int:
    """Parse by the first letters.

    >>> boolean("Yes"), boolean("off")
    (1, 0)
    """
    low = text[:2].lower()
    if low[:1] in ("y", "t", "1") or low == "on":
        return 1
    if low[:1] in ("n", "f", "0") or low == "of":
        return 0
    fail(errno.EINVAL, repr(text))


class ModelSysfs:
    """Text in, text out, with the kernel's errnos."""

    def __init__(self, machine: ModelMachine, version: tuple[int, int]) -> None:
        self._m = machine
        k = machine.engine
        self._counters: dict[str, Callable[[], int]] = {
            "pages_shared": k.pages_shared,
            "pages_sharing": k.pages_sharing,
            "pages_unshared": k.pages_unshared,
            "pages_volatile": k.pages_volatile,
            "full_scans": lambda: k.full_scans,
            "stable_node_chains": lambda: len(k.chains),
            "stable_node_dups": k.stable_node_dups,
            "general_profit": k.general_profit,
            "pages_scanned": lambda: k.pages_scanned,
            "ksm_zero_pages": k.ksm_zero_pages,
            "pages_skipped": lambda: k.pages_skipped,
        }
        self._tunables: dict[str, Callable[[], str]] = {
            "run": lambda: str(k.run),
            "pages_to_scan": lambda: str(machine.pages_to_scan),
            "sleep_millisecs": lambda: str(machine.sleep_millisecs),
            "merge_across_nodes": lambda: str(k.merge_across_nodes),
            "max_page_sharing": lambda: str(k.max_page_sharing),
            "use_zero_pages": lambda: str(k.use_zero_pages),
            "stable_node_chains_prune_millisecs": lambda: str(k.prune_millisecs),
            "smart_scan": lambda: str(k.smart_scan),
            "advisor_mode": lambda: "none [scan-time]" if machine.advisor else "[none] scan-time",
            "advisor_max_cpu": lambda: str(machine.advisor_max_cpu),
            "advisor_target_scan_time": lambda: str(machine.advisor_target_scan_time),
            "advisor_min_pages_to_scan": lambda: str(machine.advisor_min_pages_to_scan),
            "advisor_max_pages_to_scan": lambda: str(machine.advisor_max_pages_to_scan),
        }
        self.files = sorted(n for n in [*self._counters, *self._tunables] if SINCE.get(n, (0, 0)) <= version)

    def read(self, name: str) -> str:
        """What the file holds."""
        if name not in self.files:
            fail(errno.ENOENT, name)
        return (self._tunables[name]() if name in self._tunables else str(self._counters[name]())) + "\n"

    def write(self, name: str, text: str | bytes) -> None:
        """Write a tunable."""
        if name not in self.files:
            fail(errno.ENOENT, name)
        if name in self._counters:
            fail(errno.EACCES, name)
        raw = text.encode() if isinstance(text, str) else bytes(text)
        if not raw:
            return
        cut = raw[:4096].split(b"\0")[0].decode("latin-1")
        getattr(self, f"_write_{name}")(cut)

    def _write_run(self, text: str) -> None:
        k, value = self._m.engine, number(text, BITS_32)
        if value > 2:
            fail(errno.EINVAL, f"run {value}")
        if value != k.run:
            k.run = value
            if value == 2:
                try:
                    k.unmerge_everything()
                except OSError:
                    k.run = 0
                    raise

    def _write_pages_to_scan(self, text: str) -> None:
        if self._m.advisor:
            fail(errno.EINVAL, "the advisor is on")
        self._m.pages_to_scan = number(text, BITS_32)

    def _write_sleep_millisecs(self, text: str) -> None:
        self._m.sleep_millisecs = number(text, BITS_32)

    def _write_merge_across_nodes(self, text: str) -> None:
        k, value = self._m.engine, number(text, BITS_64, errno.ERANGE)
        if value > 1:
            fail(errno.EINVAL, f"merge_across_nodes {value}")
        if value != k.merge_across_nodes:
            self._empty_stable_trees()
            k.merge_across_nodes = value

    def _write_max_page_sharing(self, text: str) -> None:
        k, value = self._m.engine, number(text, 1 << 31, errno.ERANGE)
        if value < 2:
            fail(errno.EINVAL, f"max_page_sharing {value}")
        if value != k.max_page_sharing:
            self._empty_stable_trees()
            k.max_page_sharing = value

    def _empty_stable_trees(self) -> None:
        k = self._m.engine
        if k.pages_shared() or not k.sweep():
            fail(errno.EBUSY, "pages are shared")

    def _write_use_zero_pages(self, text: str) -> None:
        self._m.engine.use_zero_pages = boolean(text)

    def _write_stable_node_chains_prune_millisecs(self, text: str) -> None:
        self._m.engine.prune_millisecs = number(text, BITS_32)

    def _write_smart_scan(self, text: str) -> None:
        self._m.engine.smart_scan = boolean(text)

    def _write_advisor_mode(self, text: str) -> None:
        names = {"none": False, "scan-time": True}
        name = text.removesuffix("\n")
        if name not in names:
            fail(errno.EINVAL, repr(text))
        if names[name] != self._m.advisor:
            self._m.advisor = names[name]
            self._m.pages_to_scan = self._m.advisor_min_pages_to_scan if self._m.advisor else DEFAULT_PAGES_TO_SCAN
            self._m.advisor_previous_seconds = self._m.advisor_change = 0

    def _write_advisor_max_cpu(self, text: str) -> None:
        self._m.advisor_max_cpu = number(text, BITS_64) % BITS_32

    def _write_advisor_target_scan_time(self, text: str) -> None:
        value = number(text, BITS_64)
        if value == 0:
            fail(errno.EINVAL, "advisor_target_scan_time 0")
        self._m.advisor_target_scan_time = value

    def _write_advisor_min_pages_to_scan(self, text: str) -> None:
        self._m.advisor_min_pages_to_scan = number(text, BITS_64)

    def _write_advisor_max_pages_to_scan(self, text: str) -> None:
        self._m.advisor_max_pages_to_scan = number(text, BITS_64)

"""KSM as Prometheus metrics: a collector for prometheus-client over an `Observer`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ksm.census import ProcessSample
from ksm.errors import KsmError, UnsupportedError
from ksm.observe import Observation, Observer, Sample
from ksm.passes import PassClock
from ksm.sysfs import ADVISOR_MODES, ATTRIBUTES

if TYPE_CHECKING:
    from prometheus_client.core import Metric

# file -> (metric, what its value is divided by), where the name alone would not do: base units, _total for counters
_FILES = {
    "sleep_millisecs": ("sleep_seconds", 1000),
    "stable_node_chains_prune_millisecs": ("stable_node_chains_prune_seconds", 1000),
    "advisor_max_cpu": ("advisor_max_cpu_ratio", 100),
    "advisor_target_scan_time": ("advisor_target_scan_time_seconds", 1),
    "general_profit": ("general_profit_bytes", 1),
    "ksm_zero_pages": ("zero_pages", 1),
}
_COUNTERS = frozenset({"full_scans", "pages_scanned", "pages_skipped"})
_VMSTAT = {
    "cow_ksm": ("cow_copies", "copies of merged pages on a write or on unmerging (cow_ksm)"),
    "ksm_swpin_copy": ("swapin_copies", "pages that were merged before they were swapped and came back as copies"),
    "thp_split_page": ("huge_page_splits", "huge pages split, by KSM or others (thp_split_page)"),
}
_DERIVED = {
    "saved_bytes": "bytes saved: (pages_sharing + ksm_zero_pages) * page size",
    "metadata_bytes": "bytes that rmap items take, 64 each",
    "profit": "bytes won or lost: general_profit, or the same formula before Linux 6.4",
    "sharing_ratio": "pages_sharing / pages_shared",
    "unshared_ratio": "pages_unshared / pages_sharing",
    "volatile_share": "pages_volatile / rmap items; with smart scan skipped pages count as volatile",
    "merged_share": "(pages_shared + pages_sharing) / rmap items",
}
_DERIVED_NAMES = {"profit": "profit_bytes", "volatile_share": "volatile_ratio", "merged_share": "merged_ratio"}
_PROCESS = {
    "profit": ("profit_bytes", "bytes that a process wins or loses by KSM"),
    "ksm_merging_pages": ("merging_pages", "merged pages of a process, the kept ones included"),
    "ksm_rmap_items": ("rmap_items", "pages of a process that KSM tracks"),
    "ksm_zero_pages": ("zero_pages", "places of a process that map the zero page because of KSM"),
}
_SHORTEST = 1.0  # seconds between two looks, however often somebody asks


def _families() -> Any:
    try:
        import prometheus_client.core
    except ImportError:
        raise UnsupportedError("exporting metrics needs prometheus-client: pip install 'ksm[export]'") from None
    return prometheus_client.core


class Collector:
    """What prometheus-client asks for metrics; register it in a `CollectorRegistry`.

    Args:
        observer: what to look at.
        processes: at most so many processes get metrics of their own, those with the largest profit or loss.

    A look is shared by all who ask within a second. Threads may ask at the same time.

    >>> from ksm.machine import Machine
    >>> metrics = Collector(Observer(Machine())).collect()
    >>> next(metric for metric in metrics if metric.name == "ksm_pages_sharing").samples[0].value
    0.0
    """

    def __init__(self, observer: Observer, processes: int = 20) -> None:
        if processes < 0:
            raise ValueError(f"cannot export {processes} processes")
        self.observer = observer
        self.processes = processes
        self._core = _families()
        self._lock = threading.Lock()
        self._passes = PassClock()
        self._last: Sample | None = None
        self._metrics: list[Metric] = []

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not look."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics now; `ksm_up` 0 and nothing else where there is no KSM or it cannot be read.

        >>> from ksm.linux import Host
        >>> [m.name for m in Collector(Observer(Host("/nonexistent"))).collect()]
        ['ksm_up']
        """
        with self._lock:
            try:
                self._look()
            except (KsmError, OSError, ValueError):
                self._last, self._metrics = None, [self._gauge("up", "whether KSM could be read", 0)]
            return iter(self._metrics)

    def _look(self) -> None:
        if self._last is not None and not self._last.simulated and time.monotonic() - self._last.clock < _SHORTEST:
            return
        before, sample = self._last, self.observer.look()
        o = Observation(sample=sample) if before is None else Observation.between(before, sample)
        progress = self._passes.update(o)
        metrics = [self._gauge("up", "whether KSM could be read", 1), *self._files(sample), *self._rest(sample)]
        if progress.pass_seconds is not None:
            metrics.append(
                self._gauge("pass_seconds", "how long a pass takes, as far as is known", progress.pass_seconds)
            )
        self._last, self._metrics = sample, [*metrics, *self._of_processes(sample)]

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        metric: Metric = self._core.GaugeMetricFamily(f"ksm_{name}", text, value=float(value))
        return metric

    def _counter(self, name: str, text: str, value: float) -> Metric:
        metric: Metric = self._core.CounterMetricFamily(f"ksm_{name}", text, value=float(value))
        return metric

    def _files(self, sample: Sample) -> Iterator[Metric]:
        """Every file of /sys/kernel/mm/ksm that there is."""
        for attribute in ATTRIBUTES.values():
            name, text = attribute.name, f"{attribute.help} ({attribute.name})"
            value = sample.tunables.get(name) if attribute.writable else getattr(sample.stats, name)
            if value is None:
                continue
            if isinstance(value, str):
                modes = self._core.GaugeMetricFamily(f"ksm_{name}", text, labels=["mode"])
                for mode in dict.fromkeys((*ADVISOR_MODES, value)):
                    modes.add_metric([mode], float(mode == value))
                yield modes
                continue
            short, divisor = _FILES.get(name, (name, 1))
            make = self._counter if name in _COUNTERS else self._gauge
            yield make(short, text, value / divisor)
        other = self._core.GaugeMetricFamily("ksm_other", "files that this exporter does not know", labels=["file"])
        for name, word in sample.other.items():
            if word.lstrip("-").isdecimal():
                other.add_metric([name], float(word))
        if other.samples:
            yield other

    def _rest(self, sample: Sample) -> Iterator[Metric]:
        """What is not in those files: derived values, vmstat, ksmd, memory."""
        for key, text in _DERIVED.items():
            value = getattr(sample.stats, key)
            if value is not None:
                yield self._gauge(_DERIVED_NAMES.get(key, key), text, value)
        for key, (name, text) in _VMSTAT.items():
            if key in sample.vmstat:
                yield self._counter(name, text, sample.vmstat[key])
        if sample.ksmd_cpu_seconds is not None:
            yield self._counter("ksmd_cpu_seconds", "CPU time of ksmd", sample.ksmd_cpu_seconds)
        yield self._gauge("page_size_bytes", "bytes in a page", sample.stats.page_size)
        for name, amount in (("total", sample.memory.total), ("available", sample.memory.available)):
            if amount is not None:
                yield self._gauge(f"memory_{name}_bytes", f"memory of the host, {name}", amount)
        info = self._core.GaugeMetricFamily("ksm_kernel_info", "the kernel's release", labels=["release"])
        info.add_metric([sample.kernel], 1.0)
        yield info

    def _of_processes(self, sample: Sample) -> Iterator[Metric]:
        everybody = sample.processes
        yield self._gauge("processes", "processes that take part", len(everybody))
        losing = sum(process.stats.profit < 0 for process in everybody)
        yield self._gauge("processes_losing", "processes that cost more than they save", losing)
        unreadable = "processes of other users that could not be read"
        yield self._gauge("processes_unreadable", unreadable, sample.processes_unreadable)
        chosen = sorted(everybody, key=_weight)[: self.processes]
        for key, (name, text) in _PROCESS.items():
            metric = self._core.GaugeMetricFamily(f"ksm_process_{name}", text, labels=["pid", "name"])
            for process in chosen:
                value = getattr(process.stats, key)
                if value is not None:
                    metric.add_metric([str(process.pid), process.name], float(value))
            yield metric


def _weight(process: ProcessSample) -> tuple[int, int]:
    return -abs(process.stats.profit), process.pid

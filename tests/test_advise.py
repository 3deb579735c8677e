"""`ksm advise`: every rule on a made state, on machines, and with the running kernel brought into the state."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import ksm
import ksm.rules
from ksm.advise import RULES, Finding, advise
from ksm.census import Marked, ProcessSample
from ksm.cli import main
from ksm.constants import MADV_MERGEABLE, MADV_NOHUGEPAGE
from ksm.linux import Host, madvise
from ksm.observe import Memory, Observation, Sample, observe
from ksm.saved import to_dict
from ksm.stats import ProcessStats, Stats
from ksm.stepper import restore
from tests.test_linux import drives_the_kernel

ROOT = Path(__file__).parents[1]
Pages = npt.NDArray[np.uint8]


def process(pid: int = 7, items: int = 0, merging: int = 0, **more: Any) -> ProcessSample:
    stats = ProcessStats(
        ksm_rmap_items=items,
        ksm_merging_pages=merging,
        ksm_process_profit=merging * 4096 - 64 * items,
        ksm_mergeable=True,
    )
    return ProcessSample(pid=pid, name=f"vm{pid}", stats=stats, **more)


RUNS = {"run": 1, "pages_to_scan": 1000, "sleep_millisecs": 20, "max_page_sharing": 256, "merge_across_nodes": True,
        "use_zero_pages": True, "smart_scan": True, "advisor_mode": "none", "advisor_min_pages_to_scan": 500,
        "advisor_max_pages_to_scan": 30000, "advisor_target_scan_time": 200, "advisor_max_cpu": 70}  # fmt: skip
GOOD = Stats(
    pages_shared=1000, pages_sharing=90_000, pages_unshared=9000, pages_volatile=0, full_scans=9, general_profit=10**8,
    pages_scanned=10**6, ksm_zero_pages=0, pages_skipped=0,
)  # fmt: skip
HEALTHY = Observation(
    sample=Sample(
        kernel="6.18.0",
        tunables=RUNS,
        stats=GOOD,
        vmstat={"cow_ksm": 0, "ksm_swpin_copy": 0},
        ksmd_cpu_seconds=9.0,
        memory=Memory(total=1 << 34, available=1 << 33, swap_free=0, anonymous_huge=0),
        huge_pages="madvise",
        processes=(process(7, 50_000, 45_500), process(8, 50_000, 45_500)),
        processes_total=100,
    ),
    seconds=2.0,
    changes={"pages_scanned": 10_000, "full_scans": 0, "ksmd_cpu_seconds": 0.02, "cow_ksm": 0, "pages_sharing": 0},
)
NOTHING = Stats(full_scans=5, general_profit=0, pages_scanned=0, ksm_zero_pages=0, pages_skipped=0)


def made(
    stats: dict[str, Any] | Stats | None = None,
    tunables: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
    seconds: float = 2.0,
    **sample: Any,
) -> Observation:
    """The healthy observation with something about it changed."""
    good = HEALTHY.sample
    new = stats if isinstance(stats, Stats) else replace(good.stats, **(stats or {}))
    return Observation(
        sample=replace(good, stats=new, tunables={**RUNS, **(tunables or {})}, **sample),
        seconds=seconds,
        changes={**HEALTHY.changes, **(changes or {})},
    )


ADVISOR = {"advisor_mode": "scan-time"}
STILL = {"pages_scanned": 0}
UNTOUCHED = process(marked=Marked(size=1 << 20))
OF_FILES = process(marked=Marked(size=1 << 20, rss=1 << 19))

# rule, the state, its level, words of its text, of its command
STATES: list[tuple[str, Observation, str, str, str | None]] = [
    ("stopped", made(tunables={"run": 0}), "problem", "the 351.6 MiB it saved stay", "echo 1 > /sys/kernel/mm/ksm/run"),
    ("unmerged", made(NOTHING, {"run": 2}), "problem", "run is 2", "echo 1"),
    ("nothing_registered", made(NOTHING, changes=STILL, processes=(), processes_unreadable=1), "problem",
     "(1 process of other users could not be read.)", "ksm run -- PROGRAM"),
    ("asleep", made(tunables={"pages_to_scan": 0}, changes=STILL), "problem", "visits nothing", "pages_to_scan"),
    ("asleep", made(tunables={"sleep_millisecs": 60_000}, changes=STILL), "problem", "sleeps 1 min", "sleep_millisecs"),
    ("first_pass", made({"full_scans": 0}, processes=(process(items=5, anonymous=4096 * 10**6),)), "info",
     "0 of the two passes that merging takes", "echo 10000 > /sys/kernel/mm/ksm/pages_to_scan"),
    ("first_pass", made({"full_scans": 1}), "info", "merged in at most 20 s", "echo 10000"),
    ("not_anonymous", made(NOTHING, processes=(UNTOUCHED,)), "problem", "1.0 MiB mergeable, and none of it", None),
    ("not_anonymous", made(NOTHING, processes=(OF_FILES,)), "problem", "512.0 KiB in memory are shared or file", None),
    ("no_duplicates", made(replace(NOTHING, pages_unshared=500)), "problem", "500 pages were compared and no two are",
     "ksm estimate pid:7 pid:8"),
    ("numa", made(tunables={"merge_across_nodes": False}, nodes=2), "hint", "of the 2 NUMA nodes", "echo 2 >"),
    ("numa", made(replace(NOTHING, pages_unshared=9), {"merge_across_nodes": False}, nodes=2), "problem",
     "Nothing is merged after 5 passes", "echo 1 > /sys/kernel/mm/ksm/merge_across_nodes"),
    ("advisor_floor", made({"full_scans": 1}, {**ADVISOR, "pages_to_scan": 500}), "hint", "at its floor: 500 pages",
     "echo 2000 > /sys/kernel/mm/ksm/advisor_min_pages_to_scan"),
    ("advisor_ceiling", made({"pages_unshared": 2 * 10**6}, {**ADVISOR, "pages_to_scan": 30000}), "hint",
     "is at advisor_max_pages_to_scan (30,000)", "echo 60000"),
    ("advisor_ceiling", made({"pages_unshared": 2 * 10**6}, ADVISOR, {"ksmd_cpu_seconds": 1.3}), "hint",
     "takes 65 % of a CPU of the 70 %", "echo 90 > /sys/kernel/mm/ksm/advisor_max_cpu"),
    ("saving", HEALTHY, "info", "90,000 places share 1,000 KSM pages (sharing/shared 90.0)", None),
    ("saving", made({"ksm_zero_pages": 50}), "info", "and 50 map the zero page", None),
    ("wasted_effort", made({"pages_unshared": 10**6}, processes=(process(7, 10**6, 9),)), "hint",
     "11 for one. Most pages that are tracked and not merged: vm7 (pid 7): 999,991", None),
    ("volatile", made({"pages_volatile": 100_000}), "hint", "50 % of the tracked pages (100,000 of 200,000)", None),
    ("volatile", made({"pages_volatile": 100_000, "pages_skipped": 5}), "info", "a page that is skipped counts as",
     "echo 0 > /sys/kernel/mm/ksm/smart_scan"),
    ("chains", made({"stable_node_chains": 1, "stable_node_dups": 11}), "info", "That is little; leave it", None),
    ("chains", made({"stable_node_chains": 2, "stable_node_dups": 2002}), "hint", "2,000 KSM pages beyond",
     "echo 4096 > /sys/kernel/mm/ksm/max_page_sharing"),
    ("negative_profit", made({"general_profit": -5000}, processes=(process(9, 100, 0), process(8, 900, 0))), "problem",
     "Most of it by vm8 (pid 8) -56.2 KiB, vm9 (pid 9) -6.2 KiB", "echo 2 > /sys/kernel/mm/ksm/run"),
    ("negative_profit", made({"general_profit": -5000, "full_scans": 1}), "info", "It is early", None),
    ("losers", made(processes=(process(7, 100, 90), process(8, 6500, 100))), "hint",
     "1 of 2 processes cost more than they save, -6.2 KiB together", None),
    ("metadata", made({"pages_unshared": 600_000}), "hint", "12 % of the 351.6 MiB", None),
    ("zero_pages", made({"stable_node_chains": 1, "stable_node_dups": 2}, {"use_zero_pages": False}), "info",
     "instead of 2 KSM pages", "echo 1 > /sys/kernel/mm/ksm/use_zero_pages"),
    ("zero_pages", made({"stable_node_chains": 1, "stable_node_dups": 2000}, {"use_zero_pages": False}), "hint",
     "1 content has more than 256 copies", "echo 1 > /sys/kernel/mm/ksm/use_zero_pages"),
    ("rivals", made(tunables=ADVISOR, rivals=("ksmtuned (pid 5)",)), "problem", "fails with EINVAL", "echo none"),
    ("rivals", made(rivals=("ksmtuned (pid 5)",)), "info", "what others write does not last", None),
    ("advisor_limits", made(tunables={**ADVISOR, "advisor_min_pages_to_scan": 40_000}), "problem", "(40,000) is above",
     "echo 500 >"),
    ("advisor_limits", made(tunables={"advisor_max_pages_to_scan": 400}), "hint", "(400)", "echo 400 >"),
    ("no_sleep", made(tunables={"sleep_millisecs": 0}), "problem", "never sleeps and takes up to a whole CPU (now 1 %)",
     "echo 20 > /sys/kernel/mm/ksm/sleep_millisecs"),
    ("slow", made(tunables={"pages_to_scan": 1}, changes={"pages_scanned": 100}), "hint",
     "takes 33 min 20 s at 50 visits a second (1 pages every 20 ms)", "echo 10 > /sys/kernel/mm/ksm/pages_to_scan"),
    ("dear", made(changes={"ksmd_cpu_seconds": 1.2, "pages_scanned": 10**6}), "hint", "takes 60 % of a CPU",
     "echo 200 > /sys/kernel/mm/ksm/pages_to_scan"),
    ("dear", made(tunables=ADVISOR, changes={"ksmd_cpu_seconds": 1.2}), "hint", "60 %", "echo 10 >"),
    ("huge_pages", made(huge_pages="always"), "hint", 'transparent_hugepage is "always": now 0 B', "echo madvise"),
    ("old_kernel", made({"general_profit": None}, kernel="6.1.0-18-amd64"), "info", "profits (6.4); a count of zero",
     None),
    ("old_kernel", made(kernel="4.18.0-553.el8"), "info", "older than 5.15", None),
    ("unmerge_risk", made(memory=Memory(available=1 << 20)), "problem", "Do not write 2 to run: unmerging needs 351",
     "echo 0 > /sys/kernel/mm/ksm/run"),
    ("unmerge_risk", made(memory=Memory(available=1 << 28, swap_free=1 << 27)), "hint", "and 128.0 MiB of swap", None),
    ("breaking", made(changes={"cow_ksm": 400}), "hint", "200 copies a second (cow_ksm), of 91,000 merged pages", None),
    ("swapped_copies", made(changes={"ksm_swpin_copy": 20}), "hint", "10 pages a second come back", None),
    ("hidden", made(processes_unreadable=60, ksmd_cpu_seconds=None, processes_shown=False), "info",
     "60 of 100 processes belong to other users; ksmd cannot be seen", None),
    ("speed", HEALTHY, "info", "5,000 pages a second over 2 s, for 1.0 % of a CPU (2,000 ns a visit)", None),
]  # fmt: skip


def by_rule(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.rule: finding for finding in findings}


@pytest.mark.parametrize(
    ("rule", "o", "level", "words", "command"), STATES, ids=[f"{rule}-{k}" for k, (rule, *_) in enumerate(STATES)]
)
def test_a_rule_speaks(rule: str, o: Observation, level: str, words: str, command: str | None) -> None:
    found = by_rule(advise(o))
    assert rule in found, sorted(found)
    said = found[rule]
    assert (said.level, words in said.text) == (level, True), said
    assert said.text[0].isupper() or said.text.startswith(("ksmd", "run", "use_", "sleep", "pages", "advisor", "max_",
        "merge", "transparent", "vm", "ksmtuned")) or said.text[0].isdigit()  # fmt: skip
    assert said.text.endswith((".", ".)")) and "  " not in said.text
    assert said.source.startswith("https://") and said.figures
    assert (command in (said.command or "")) if command else said.command is None
    json.dumps(said.to_dict(), allow_nan=False)


def test_a_healthy_host_hears_no_complaints() -> None:
    assert sorted(by_rule(advise(HEALTHY))) == ["saving", "speed"]


def test_every_rule_is_asked_and_tested_and_described() -> None:
    names = [rule.__name__ for rule in RULES]
    assert len(set(names)) == len(names)
    assert set(names) == {state[0] for state in STATES}
    for module in (ksm.rules.idle, ksm.rules.worth, ksm.rules.tuning, ksm.rules.risk):
        public = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == "ksm.rules"}
        assert {name for name in public if name in names or name.islower()} - {"rule", "echo", "restart"} <= set(names)
    documented = (ROOT / "docs" / "advise.md").read_text() if (ROOT / "docs").exists() else ""
    missing = [name for name in names if documented and f"`{name}`" not in documented]
    assert not missing


def test_problems_come_first() -> None:
    levels = [f.level for f in advise(made({"pages_volatile": 10**6}, {"run": 0}, memory=Memory(available=1)))]
    assert levels == sorted(levels, key=["problem", "hint", "info"].index) and set(levels) == {
        "problem",
        "hint",
        "info",
    }


def test_one_look_is_enough_for_what_needs_no_rate() -> None:
    one = Observation(sample=HEALTHY.sample)
    assert sorted(by_rule(advise(one))) == ["saving"]


# ---- on machines ------------------------------------------------------------------------------------------------


def random_pages(n: int, seed: int = 0) -> Pages:
    return np.random.default_rng(seed).integers(0, 256, (n, 4096), dtype=np.uint8)


def guest(m: ksm.Machine, name: str, pages: Any) -> tuple[ksm.Process, int]:
    p = m.spawn(name)
    where = p.mmap(pages)
    p.madvise(where, pages.nbytes, ksm.MADV_MERGEABLE)
    return p, where


def machine_that_runs(**tunables: Any) -> ksm.Machine:
    m = ksm.Machine(ram=1 << 28, nodes=2)
    for name, value in {"pages_to_scan": 1000, "run": 1, **tunables}.items():
        setattr(m.ksm, name, value)
    return m


def machine_of_one_guest() -> ksm.Machine:
    m = machine_that_runs()
    guest(m, "unique", random_pages(1000))
    return m


def machine_of_nothing() -> ksm.Machine:
    return machine_that_runs()


def machine_untouched() -> ksm.Machine:
    m = machine_that_runs(pages_to_scan=0)
    guest(m, "vm", random_pages(10))
    return m


def machine_with_chains() -> ksm.Machine:
    m = machine_that_runs(max_page_sharing=2)
    guest(m, "vm", np.ones((500, 4096), np.uint8))
    return m


def machine_of_nodes() -> ksm.Machine:
    m = machine_that_runs(merge_across_nodes=False)
    for node in (0, 1):
        p = m.spawn(f"node {node}")
        where = p.mmap(random_pages(100), node=node)
        p.madvise(where, 100 * 4096, ksm.MADV_MERGEABLE)
    return m


def machine_with_a_loser() -> ksm.Machine:
    m = machine_that_runs()
    same = random_pages(400)
    guest(m, "twin 1", same)
    guest(m, "twin 2", same)
    guest(m, "lone", random_pages(500, 1))
    return m


def machine_in_a_hurry() -> ksm.Machine:
    m = machine_that_runs(sleep_millisecs=0)
    guest(m, "vm", random_pages(1000))
    guest(m, "vm2", random_pages(1000))
    return m


@pytest.mark.parametrize(
    ("make", "seconds", "rules"),
    [
        (lambda: ksm.Machine(), 1.0, {"stopped"}),
        (machine_of_nothing, 1.0, {"nothing_registered"}),
        (machine_untouched, 1.0, {"asleep", "first_pass"}),
        (machine_of_one_guest, 0.01, {"first_pass"}),
        (machine_of_one_guest, 10.0, {"no_duplicates", "negative_profit"}),
        (machine_with_chains, 10.0, {"chains", "zero_pages", "saving"}),
        (machine_of_nodes, 10.0, {"numa", "negative_profit"}),
        (machine_with_a_loser, 10.0, {"losers", "saving"}),
        (machine_in_a_hurry, 5.0, {"no_sleep", "saving"}),
    ],
)
def test_machines(make: Callable[[], ksm.Machine], seconds: float, rules: set[str]) -> None:
    found = set(by_rule(advise(make(), seconds)))
    assert rules <= found, found
    assert not (found - rules) & {"stopped", "unmerged", "nothing_registered", "asleep", "first_pass", "no_duplicates",
                                  "numa", "losers", "no_sleep", "chains", "unmerge_risk", "old_kernel"}  # fmt: skip


def test_a_machine_whose_saving_does_not_fit() -> None:
    m = ksm.Machine(ram=300 * 4096)
    for k in range(4):
        guest(m, f"vm{k}", random_pages(60))
    m.ksm.pages_to_scan = 1000
    m.ksm.run = 1
    m.run_for(5)
    for k in range(3):
        m.spawn(f"filler {k}").mmap(random_pages(60, k + 1))
    assert "unmerge_risk" in by_rule(advise(m, 1.0))
    with pytest.raises(MemoryError):
        m.ksm.run = 2


# ---- the command ------------------------------------------------------------------------------------------------


def test_a_saved_observation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(to_dict(made({"general_profit": -5}, processes=(process(1, 100, 0),)))))
    assert main(["advise", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Linux 6.18.0, this kernel's KSM, over 2 s:\n")
    assert "\nproblem: KSM costs more memory than it saves" in shown and "\x1b" not in shown
    assert "    echo 2 > /sys/kernel/mm/ksm/run\n" in shown
    assert all(len(line) <= 110 for line in shown.splitlines())
    assert main(["advise", str(path), "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [f["rule"] for f in findings] == [f.rule for f in advise(ksm.saved.load(path))]
    assert main(["advise", str(path), "--figures"]) == 0
    assert "[negative_profit] profit -5," in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", '{"format": "ksm-observation", "version": 1}'])
def test_a_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "f").write_text(text)
    assert main(["advise", str(tmp_path / "f")]) == 65
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["advise", str(tmp_path / "none")]) == 66
    assert main(["advise", str(tmp_path)]) != 0


def test_without_ksm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("ksm.cli.advise.Host", lambda: Host("/nonexistent"))
    assert main(["advise"]) == 69
    assert "there is no KSM here" in capsys.readouterr().err


# ---- the running kernel -----------------------------------------------------------------------------------------


class Kernel:
    """The host's KSM, alone: memory to mark, tunables to set, passes to wait for."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.ksm = host.ksm
        self.areas: list[mmap.mmap] = []

    def mark(self, pages: Pages, flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) -> mmap.mmap:
        area = mmap.mmap(-1, pages.nbytes, flags)
        madvise(area, MADV_NOHUGEPAGE)
        area[:] = pages.tobytes()
        madvise(area, MADV_MERGEABLE)
        self.areas.append(area)
        return area

    def set(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self.ksm, name, value)

    def passes(self, n: int = 5) -> None:
        """Have ksmd do n passes in a hurry, then leave it at its usual pace."""
        self.set(pages_to_scan=100_000, sleep_millisecs=1, run=1)
        last, deadline = self.ksm.full_scans + n, time.monotonic() + 20
        while self.ksm.full_scans < last:
            assert time.monotonic() < deadline, "ksmd does not finish its passes"
            time.sleep(0.005)
        self.set(sleep_millisecs=20)

    def advice(self, seconds: float = 0.25) -> dict[str, Finding]:
        return by_rule(advise(self.host, seconds))


def about(n: int) -> Any:
    """ksmd passes a page over for this time when somebody else happens to hold it."""
    return pytest.approx(n, abs=5)


def wait_for_others(host: Host, seconds: float = 60.0) -> None:
    """Others with memory registered would be in every counter; they may be about to end."""
    deadline = time.monotonic() + seconds
    while others := [f"{p.name} (pid {p.pid})" for p in host.processes() if p.pid != os.getpid()]:
        assert time.monotonic() < deadline, f"others have memory registered with KSM: {', '.join(others)}"
        time.sleep(0.2)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    host = Host()
    with host.lock(timeout=300):
        files = host.ksm
        saved = {name: files.read(name) for name in files.tunables()}
        kernel = Kernel(host)
        wait_for_others(host)
        try:
            files.write("run", "2")
            kernel.set(run=0, smart_scan=False)
            yield kernel
        finally:
            for area in kernel.areas:
                area.close()
            restore(files, saved, unmerge=True)
        assert {name: files.read(name) for name in saved} == saved


@drives_the_kernel
def test_kernel_stopped_and_unmerged(kernel: Kernel) -> None:
    found = kernel.advice(0.0)
    assert found["stopped"].figures["run"] == 0 and "unmerged" not in found
    kernel.set(run=2)
    assert "unmerged" in kernel.advice(0.0)


@drives_the_kernel
def test_kernel_nothing_registered(kernel: Kernel) -> None:
    """Shared memory: madvise says yes, and KSM takes nothing."""
    kernel.mark(np.ones((10, 4096), np.uint8), mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    kernel.set(run=1)
    found = kernel.advice()
    assert "nothing_registered" in found and "first_pass" not in found


@drives_the_kernel
def test_kernel_asleep(kernel: Kernel) -> None:
    kernel.mark(random_pages(10))
    kernel.set(pages_to_scan=0, run=1)
    assert kernel.advice()["asleep"].figures["pages_to_scan"] == 0
    kernel.set(run=0, pages_to_scan=1, sleep_millisecs=3_600_000)
    kernel.set(run=1)
    time.sleep(0.1)
    found = kernel.advice()
    assert "sleeps 1 h between" in found["asleep"].text


@drives_the_kernel
def test_kernel_first_pass_and_advisor_floor(kernel: Kernel) -> None:
    kernel.mark(random_pages(5000))
    kernel.set(pages_to_scan=50, sleep_millisecs=20, run=1)
    found = kernel.advice(0.4)
    early = found["first_pass"]
    assert early.figures["full_scans"] == 0
    assert 0 < early.figures["visits_per_second"] <= 2600
    assert early.figures["pass_seconds_at_most"] > 1.5
    kernel.set(advisor_min_pages_to_scan=50, advisor_mode="scan-time")
    found = kernel.advice()
    assert found["advisor_floor"].figures["pages_to_scan"] == 50
    kernel.set(advisor_mode="none")


@drives_the_kernel
def test_kernel_never_touched(kernel: Kernel) -> None:
    area = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    kernel.areas.append(area)
    madvise(area, MADV_MERGEABLE)
    kernel.passes(2)
    found = kernel.advice()
    assert found["not_anonymous"].figures == {
        "processes": [os.getpid()], "marked_bytes": 1 << 20, "resident_bytes": 0, "anonymous_bytes": 0,
    }  # fmt: skip


@drives_the_kernel
def test_kernel_no_duplicates_and_a_loss(kernel: Kernel) -> None:
    kernel.mark(random_pages(1000))
    kernel.passes()
    found = kernel.advice()
    assert found["no_duplicates"].figures["pages_not_merged"] == about(1000)
    assert found["negative_profit"].figures["profit"] == -64_000
    assert found["negative_profit"].figures["losers"] == [os.getpid()]


@drives_the_kernel
def test_kernel_waste_volatile_and_metadata(kernel: Kernel) -> None:
    pages = random_pages(1000)
    pages[30:60] = pages[:30]
    area = kernel.mark(pages)
    kernel.passes()
    found = kernel.advice()
    assert found["wasted_effort"].figures["pages_not_merged"] == about(940)
    metadata = found["metadata"].figures  # from files that are read one after the other, while ksmd goes on
    assert (metadata["saved_bytes"], metadata["rmap_items"]) == (30 * 4096, about(1000))
    assert metadata["metadata_bytes"] == 64 * metadata["rmap_items"]
    assert found["saving"].figures["sharing_ratio"] == 1.0
    kernel.set(run=0)
    for page in range(500, 1000):
        area[page * 4096] ^= 1
    scans = kernel.ksm.full_scans
    kernel.set(pages_to_scan=2000, sleep_millisecs=3_600_000, run=1)  # one batch, one pass
    while kernel.ksm.full_scans == scans:
        time.sleep(0.005)
    assert kernel.advice(0.0)["volatile"].figures["pages_volatile"] == about(500)


@drives_the_kernel
def test_kernel_chains(kernel: Kernel) -> None:
    kernel.set(max_page_sharing=2, use_zero_pages=False)
    kernel.mark(np.ones((400, 4096), np.uint8))
    kernel.passes()
    found = kernel.advice()
    chains = found["chains"]
    assert (chains.figures["stable_node_chains"], chains.figures["stable_node_dups"], chains.level) == (1, 200, "hint")
    assert chains.command is not None and "echo 512 > /sys/kernel/mm/ksm/max_page_sharing" in chains.command
    assert "zero_pages" in found
    subprocess.run(["sh", "-c", chains.command], check=True)
    kernel.passes()
    assert "chains" not in kernel.advice() and kernel.ksm.pages_sharing == 399, "the command does what was said"


@drives_the_kernel
def test_kernel_a_loser(kernel: Kernel) -> None:
    script = (
        "import mmap, os, sys; from ksm.linux import madvise; from ksm.constants import *\n"
        "a = mmap.mmap(-1, 500 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); madvise(a, MADV_NOHUGEPAGE)\n"
        "a[:] = os.urandom(500 * 4096); madvise(a, MADV_MERGEABLE); print('ready', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(ksm.__file__).parents[1])}
    kernel.mark(np.repeat(random_pages(20), 20, axis=0))
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd="/", env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as lone:
        assert lone.stdout is not None and lone.stdout.readline() == b"ready\n"
        kernel.passes()
        found = kernel.advice()
        assert found["losers"].figures == {"losers": [lone.pid], "profit": -500 * 64}
        lone.communicate()


@drives_the_kernel
def test_kernel_that_fights_itself(kernel: Kernel) -> None:
    """No sleep, a floor above the ceiling, and a ksmtuned beside the advisor."""
    kernel.mark(random_pages(10))
    kernel.set(sleep_millisecs=0, run=1)
    assert "no_sleep" in kernel.advice()
    kernel.set(sleep_millisecs=20, advisor_min_pages_to_scan=40_000, advisor_mode="scan-time")
    rival = os.fork()
    if rival == 0:
        ctypes.CDLL(None).prctl(15, b"ksmtuned", 0, 0, 0)
        signal.pause()
    try:
        time.sleep(0.1)
        found = kernel.advice()
    finally:
        os.kill(rival, signal.SIGKILL)
        os.waitpid(rival, 0)
    assert "advisor_limits" in found
    assert found["rivals"].figures["rivals"] == [f"ksmtuned (pid {rival})"]
    with pytest.raises(OSError, match="Invalid argument"):
        kernel.ksm.write("pages_to_scan", "100")
    kernel.set(advisor_mode="none")


@drives_the_kernel
def test_kernel_slow_and_breaking(kernel: Kernel) -> None:
    area = kernel.mark(np.repeat(random_pages(100), 30, axis=0))
    kernel.passes()
    kernel.set(pages_to_scan=1, sleep_millisecs=1000)
    slow = kernel.advice(2.2)["slow"]
    assert slow.figures["pass_seconds"] > 1800 and slow.command is not None
    kernel.set(pages_to_scan=100_000, sleep_millisecs=1)
    before = observe(kernel.host, 0).sample
    for page in range(0, 3000, 10):
        area[page * 4096] ^= 1
    time.sleep(0.2)
    seen = Observation.between(before, observe(kernel.host, 0).sample)
    per_second = by_rule(advise(seen))["breaking"].figures["cow_ksm_per_second"]
    assert per_second * seen.seconds == about(300)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@drives_the_kernel
def test_without_root(capsys: pytest.CaptureFixture[str]) -> None:
    with as_nobody():
        assert main(["advise", "--for", "10ms", "--json"]) == 0
    found = {f["rule"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert found["hidden"]["figures"]["processes_unreadable"] > 0

"""`ksm demo`: eight live processes, simulated, and then merged by the kernel itself, counters side by side."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ksm.cli.common import binary, clock, out, print_json, progress
from ksm.cli.crew import Crew, Worker
from ksm.errors import DisagreementError, KsmError, UnsupportedError
from ksm.estimate import Estimate, estimate
from ksm.linux import Host
from ksm.machine import Machine
from ksm.simulation import load
from ksm.sources import ProcessImage, Snapshot
from ksm.sysfs import Sysfs

WORKERS = 8
# What both sides run with. Smart scan is off so that every page is looked at in every pass and the counters come to
# rest; chains are never pruned, because when that happens hangs on the wall clock.
TUNABLES: Mapping[str, int] = {
    "max_page_sharing": 256,
    "use_zero_pages": 1,
    "smart_scan": 0,
    "merge_across_nodes": 1,
    "stable_node_chains_prune_millisecs": 100_000_000,
}
COUNTERS = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "ksm_zero_pages",
    "stable_node_chains",
    "stable_node_dups",
    "general_profit",
)
SINCE_START = ("full_scans", "pages_scanned", "pages_skipped")  # never reset: how far they moved is compared
PER_PROCESS = ("ksm_merging_pages", "ksm_zero_pages", "ksm_rmap_items", "ksm_process_profit")
_STILL = 3  # passes without a change that count as settled
_MOST_PASSES = 20
_PAGES_TO_SCAN = 1000  # of the simulation on the clock
_LOCK_SECONDS = 300.0

Counts = dict[str, int]


@dataclass(frozen=True, slots=True)
class Passes:
    """The counters after each pass, and each process's at the end; from ksm or from the kernel."""

    after: list[Counts]
    processes: list[Counts]
    cpu_seconds: float | None = None


@dataclass(slots=True)
class Demo:
    """Everything that a demo has found."""

    snapshots: list[Snapshot]
    settled: Estimate
    timed: dict[str, float]
    ours: Passes
    kernel: Passes | None = None
    differences: list[str] = field(default_factory=list)
    same_after_each_pass: bool | None = None
    unverified: str | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""

        def passes(found: Passes | None) -> dict[str, Any] | None:
            if found is None:
                return None
            processes = {s.name: counts for s, counts in zip(self.snapshots, found.processes, strict=True)}
            return {"counters": found.after[-1], "passes": found.after, "processes": processes}

        return {
            "tunables": dict(TUNABLES),
            "estimate": self.settled.to_dict(),
            "simulated_time": self.timed,
            "ksm": passes(self.ours),
            "kernel": passes(self.kernel),
            "same_after_each_pass": self.same_after_each_pass,
            "agree": None if self.kernel is None else not self.differences,
            "differences": self.differences,
            "unverified": self.unverified,
            "notes": self.notes,
        }


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def command(as_json: bool) -> None:
    """Start eight real processes, say what KSM will do to them, and let the kernel prove it.

    Four are web workers that opt in as a whole (prctl), four are data workers that mark their arrays (madvise). As
    root on a kernel with KSM its ksmd then scans them, alone and with equal tunables, and every counter must be the
    same; if not the exit code is 4. All tunables are put back, and everything is unmerged. Otherwise that part is
    left out.
    """
    if sys.platform != "linux":
        raise UnsupportedError("the demo reads live processes, which needs Linux")
    console = out()
    say: Callable[[str], None] = (lambda text: None) if as_json else lambda text: console.print(text, soft_wrap=True)
    found = run(say, console, as_json)
    if as_json:
        print_json(found.to_dict())
    require_agreement(found)


def require_agreement(found: Demo) -> None:
    """Raise `DisagreementError` if the kernel's counters were other ones."""
    if found.differences:
        raise DisagreementError(f"the kernel and ksm differ: {'; '.join(found.differences[:3])}")


def run(say: Callable[[str], None], console: Console, as_json: bool) -> Demo:
    """The demo: reports by `say` as it goes."""
    host = Host()
    why_not = cannot_verify(host)
    with nullcontext() if why_not else _alone(host, say) as lock, Crew(WORKERS, lock) as crew:
        say(f"Starting {WORKERS} processes: web workers that opt in by prctl, data workers that mark their arrays ...")
        crew.work()
        snapshots = [_read(worker) for worker in crew.workers]
        found = _predict(snapshots, as_json)
        found.notes = _notes(crew.workers)
        if not as_json:
            _show_prediction(found, console)
        if why_not is None:
            why_not = _others(host, crew.workers) or _not_in(crew.workers)
        if why_not is None:
            say("\nNow the kernel: its ksmd scans the same processes ...")
            found.kernel = kernel_passes(host, [worker.pid for worker in crew.workers], len(found.ours.after))
            _compare(found)
            if not as_json:
                _show_verdict(found, console)
        else:
            found.unverified = why_not
            say(f"\nNot compared with the kernel: {why_not}. The numbers above stand unverified here.")
    return found


def cannot_verify(host: Host) -> str | None:
    """Why the kernel cannot be asked, or None.

    >>> cannot_verify(Host(root="/nonexistent")) is None
    False
    """
    try:
        host.ksm.read("run")
    except KsmError as error:
        return str(error)
    if os.geteuid() != 0:
        return "driving the kernel's ksmd needs root"
    if not os.access(host.root / "run", os.W_OK):
        return f"{host.root} is read-only here"
    return None


@contextmanager
def _alone(host: Host, say: Callable[[str], None]) -> Iterator[int]:
    """Hold the host's lock, and give its descriptor; say so if somebody else has it."""
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(host.lock(0.0))
        except TimeoutError:
            say(f"Waiting for another program that works with this kernel's KSM ({host.lock_path}) ...")
            lock = stack.enter_context(host.lock(_LOCK_SECONDS))
        yield lock


def _read(worker: Worker) -> Snapshot:
    with ProcessImage(worker.pid, marked_only=worker.opted_in) as image:
        image.name = worker.name
        return Snapshot.take(image)


def _notes(workers: Sequence[Worker]) -> list[str]:
    notes = [
        "Huge pages are off in these processes (PR_SET_THP_DISABLE): since Linux 6.12 the kernel also gives back zero "
        "pages of huge pages that it splits, and no counter shows those."
    ]
    refused = sorted({worker.how for worker in workers if not worker.opted_in})
    if refused:
        notes.append(f"The kernel refused the opt-in ({', '.join(refused)}): all anonymous memory is taken.")
    return notes


# ---- ours ------------------------------------------------------------------------------------------


def _machine(snapshots: Sequence[Snapshot]) -> Machine:
    machine = Machine(kernel=os.uname().release, page_size=snapshots[0].page_size)
    for name, value in _wanted(machine.ksm).items():
        machine.ksm.write(name, str(value))
    load(machine, snapshots)
    machine.ksm.run = 1
    return machine


def _wanted(ksm: Sysfs) -> dict[str, int]:
    """The tunables that this kernel has."""
    names = ksm.names()
    return {name: value for name, value in TUNABLES.items() if name in names}


def _predict(snapshots: list[Snapshot], as_json: bool) -> Demo:
    settled = estimate(snapshots, TUNABLES["max_page_sharing"], bool(TUNABLES["use_zero_pages"]))
    timed = _machine(snapshots)
    timed.ksm.pages_to_scan = _PAGES_TO_SCAN
    goal = settled.pages_sharing + (settled.ksm_zero_pages if timed.kernel.counts_zero_pages else 0)
    saved = 0
    with progress("simulating", as_json) as show:
        while saved < goal and timed.now < 3600:
            timed.run_for(0.1)
            saved = timed.ksm.snapshot().saved_pages
            show(saved, goal)
    times = {"seconds": timed.now, "ksmd_cpu_seconds": timed.ksmd.cpu_seconds, "pages_to_scan": _PAGES_TO_SCAN}

    stepped = _machine(snapshots)
    start = time.process_time()
    after = until_still(stepped.ksm, lambda: stepped.ksmd.scan(), _MOST_PASSES)
    took = time.process_time() - start
    processes = [{name: int(p.ksm_stat[name]) for name in PER_PROCESS} for p in stepped.processes.values()]
    return Demo(snapshots, settled, times, Passes(after, processes, took))


def until_still(ksm: Sysfs, scan: Callable[[], object], most: int, least: int = 0) -> list[Counts]:
    """Passes until the counters stand still for a few; the counters after each.

    >>> machine = Machine()
    >>> machine.ksm.run = 1
    >>> len(until_still(machine.ksm, machine.ksmd.scan, 10))
    4
    """
    start = counters(ksm)
    after: list[Counts] = []
    while len(after) < most:
        scan()
        now = counters(ksm)
        after.append({name: value - start[name] if name in SINCE_START else value for name, value in now.items()})
        if len(after) >= max(least, _STILL + 1) and all(_rest(c) == _rest(after[-1]) for c in after[-_STILL - 1 :]):
            break
    return after


def counters(ksm: Sysfs) -> Counts:
    """Those of the compared counters that there are.

    >>> counters(Machine().ksm)["pages_shared"]
    0
    """
    names = ksm.names()
    return {name: int(ksm.read(name)) for name in (*COUNTERS, *SINCE_START) if name in names}


def _rest(counts: Counts) -> Counts:
    return {name: value for name, value in counts.items() if name not in SINCE_START}


# ---- the kernel's ------------------------------------------------------------------------------------


def _others(host: Host, workers: Sequence[Worker]) -> str | None:
    """Who else has memory in KSM: its pages would be counted, and unmerged at the end."""
    ours = {worker.pid for worker in workers}
    others = [f"{p.name} ({p.pid})" for p in host.processes(skip_unreadable=True) if p.pid not in ours]
    return f"KSM is in use here, by {', '.join(others[:5])}" if others else None


def _not_in(workers: Sequence[Worker]) -> str | None:
    out = [worker.how for worker in workers if not worker.opted_in]
    return f"the workers could not opt in ({out[0]})" if out else None


def kernel_passes(host: Host, pids: Sequence[int], passes: int) -> Passes:
    """Let the kernel's ksmd do passes over the workers until its counters stand still, then put everything back."""
    with host.single_step(unmerge=True) as ksmd:
        ksm = host.ksm
        ksm.write("run", "2")
        ksm.write("run", "0")
        for name, value in _wanted(ksm).items():
            ksm.write(name, str(value))
        try:
            before: float | None = host.ksmd_cpu_seconds()
        except KsmError:
            before = None
        after = until_still(ksm, ksmd.scan, max(passes, _MOST_PASSES), passes)
        spent = None if before is None else host.ksmd_cpu_seconds() - before
        stats = [host.ksm_stat(pid) for pid in pids]
        return Passes(after, [{n: int(s[n]) for n in PER_PROCESS if n in s} for s in stats], spent)


def _compare(found: Demo) -> None:
    ours, kernel = found.ours, found.kernel
    assert kernel is not None
    last, its = _rest(ours.after[-1]), _rest(kernel.after[-1])
    found.differences = [
        f"{name}: kernel {its[name]:,}, ksm {last[name]:,}" for name in last if name in its and its[name] != last[name]
    ]
    for snapshot, mine, theirs in zip(found.snapshots, ours.processes, kernel.processes, strict=True):
        found.differences += [
            f"{name} of {snapshot.name}: kernel {theirs[name]:,}, ksm {mine[name]:,}"
            for name in mine
            if name in theirs and theirs[name] != mine[name]
        ]
    found.same_after_each_pass = len(ours.after) == len(kernel.after) and all(
        all(mine[name] == theirs[name] for name in mine if name in theirs)
        for mine, theirs in zip(ours.after, kernel.after, strict=True)
    )


# ---- for people --------------------------------------------------------------------------------------


def _show_prediction(found: Demo, console: Console) -> None:
    settled = found.settled
    whole = settled.pages * settled.page_size
    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("process")
    for heading in ("mergeable", "pages", "shared", "sharing", "unshared", "zero", "profit"):
        result.add_column(heading, justify="right")
    for source in (*settled.sources, settled):
        result.add_row(
            source.name,
            binary(source.pages * source.page_size),
            f"{source.pages:,}",
            f"{source.pages_shared:,}",
            f"{source.pages_sharing:,}",
            f"{source.pages_unshared:,}",
            f"{source.ksm_zero_pages:,}",
            binary(source.general_profit),
            style="bold" if source is settled else None,
        )
    console.print(result)
    timed = found.timed
    for line in (
        f"\nEstimate: merging saves {binary(settled.saved_bytes)} of {binary(whole)}, for "
        f"{binary(settled.metadata_bytes)} of rmap items.",
        f"Simulation: with {_PAGES_TO_SCAN:,} pages every 20 ms that is there after {clock(timed['seconds'])}, "
        f"for {clock(timed['ksmd_cpu_seconds'])} of ksmd's CPU time.",
        *(f"Note: {note}" for note in found.notes),
    ):
        console.print(line, soft_wrap=True)


def _show_verdict(found: Demo, console: Console) -> None:
    kernel = found.kernel
    assert kernel is not None
    result = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("counter", "estimate", "ksm", "kernel", ""):
        result.add_column(heading, justify="left" if heading == "counter" else "right")
    mine, its = found.ours.after[-1], kernel.after[-1]
    settled = found.settled
    for name in (n for n in COUNTERS if n in its and n in mine):
        guess = f"{getattr(settled, name):,}" if hasattr(settled, name) else ""
        result.add_row(name, guess, f"{mine[name]:,}", f"{its[name]:,}", _mark(mine[name] == its[name]))
    console.print(result)
    each = Table(box=None, pad_edge=False, header_style="bold")
    each.add_column("ksm / kernel")
    for name in PER_PROCESS[:3]:
        each.add_column(name, justify="right")
    each.add_column("", justify="right")
    for snapshot, ours, theirs in zip(found.snapshots, found.ours.processes, kernel.processes, strict=True):
        cells = [f"{ours[name]:,} / {theirs[name]:,}" if name in theirs else "-" for name in PER_PROCESS[:3]]
        same = all(ours[name] == theirs[name] for name in theirs)
        each.add_row(snapshot.name, *cells, _mark(same))
    console.print()
    console.print(each)
    passes = len(kernel.after)
    if found.differences:
        verdict = f"They differ in {len(found.differences)} places."
    elif found.same_after_each_pass:
        verdict = f"Every counter is the same, after each of {passes} passes. Everything is unmerged and put back."
    else:
        verdict = f"Every counter is the same once settled, after {passes} passes. Everything is unmerged and put back."
    if kernel.cpu_seconds is not None and found.ours.cpu_seconds is not None:
        verdict += (
            f" The kernel's passes took {clock(kernel.cpu_seconds)} of CPU time, "
            f"the simulation's {clock(found.ours.cpu_seconds)}, fingerprinting apart."
        )
    console.print("\n" + verdict, soft_wrap=True)


def _mark(same: bool) -> str:
    return "same" if same else "DIFFERS"

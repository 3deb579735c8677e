"""Risk over time: how fast sharing breaks in a recording, against a plain count, and what a plan makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ksm
import ksm.trace
from ksm import HostSpec, PlanError, Policy, SourceError, VMClass
from ksm.cli import main
from ksm.keyed import Key
from ksm.plan.breaking import breaking, samples_of
from ksm.sources import ArrayImage
from ksm.trace import Trace, record

PAGE = 4096
EVERY = 20.0
Contents = list[list[int]]  # of one VM: the value of each page, step by step; -1: no page there


def pages(values: list[int], page_size: int = PAGE) -> npt.NDArray[np.uint8]:
    made = np.zeros((len(values), page_size), np.uint8)
    made[:, :8] = np.maximum(np.array(values, np.int64), 0).view(np.uint8).reshape(-1, 8)
    return made


def image(values: list[int], name: str = "", page_size: int = PAGE) -> ArrayImage:
    return ArrayImage(pages(values, page_size), name, np.array(values) >= 0)


def recorded(directory: Path, vms: list[Contents], every: float = EVERY, **options: Any) -> Trace:
    where = directory / f"{len(list(directory.iterdir()))}.trace"
    guests = {f"vm{n}": [image(values, f"vm{n}") for values in steps] for n, steps in enumerate(vms)}
    record(guests, where, every=every, **options)
    return Trace(where)


def plainly(vms: list[Contents], still: float, elsewhere: set[int]) -> tuple[list[float], list[float], float, float]:
    """(share, vm_share, merged of a VM on average, ever), page by page."""
    steps = len(vms[0])
    merged: list[set[tuple[int, int]]] = []
    for step in range(steps):
        standing = []
        for vm, contents in enumerate(vms):
            for page, value in enumerate(contents[step]):
                first = next(s for s in range(step, -1, -1) if s == 0 or contents[s - 1][page] != value)
                if value >= 0 and (first == 0 or (step - first) * EVERY >= still):
                    standing.append((vm, page, value))
        values = [value for _, _, value in standing]
        merged.append({(vm, page) for vm, page, value in standing if values.count(value) + (value in elsewhere) > 1})
    mean = float(np.mean([len(each) for each in merged]) / len(vms))
    written = [
        [(vm, page) for vm, page in merged[s - 1] if vms[vm][s][page] not in (-1, vms[vm][s - 1][page])]
        for s in range(1, steps)
    ]
    share, most = [], []
    for step in range(steps - 3):
        window = [one for each in written[step : step + 3] for one in each]
        share.append(min(1.0, len(window) / len(merged[step])) if merged[step] else 0.0)
        by_vm = max(sum(one[0] == vm for one in window) for vm in range(len(vms)))
        most.append(min(1.0, by_vm / mean) if mean else 0.0)
    ever = max(len({one for each in written for one in each if one[0] == vm}) for vm in range(len(vms)))
    return share, most, mean, min(1.0, ever / mean) if mean else 0.0


@settings(max_examples=25, deadline=None)
@given(
    vms=st.lists(
        st.lists(st.lists(st.integers(-1, 4), min_size=5, max_size=5), min_size=6, max_size=6), min_size=1, max_size=3
    ),
    still=st.sampled_from([0.0, 15.0, 30.0, 1000.0]),
    elsewhere=st.sets(st.integers(1, 4)),
)
def test_breaking_is_what_a_plain_count_finds(
    vms: list[Contents], still: float, elsewhere: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    trace = recorded(tmp_path_factory.mktemp("trace"), vms)
    found = breaking(trace, "web", still, ksm.fingerprint(pages(sorted(elsewhere))).words[:, 1])
    share, most, mean, ever = plainly(vms, still, elsewhere)
    assert found.share.tolist() == pytest.approx(share) and found.vm_share.tolist() == pytest.approx(most)
    assert found.merged == pytest.approx(mean) and found.ever == pytest.approx(ever)
    assert found.worst == max(most) and found.median == pytest.approx(float(np.median(share)))
    assert found.seconds.tolist() == [0.0, 20.0, 40.0] and found.seconds[most.index(max(most))] == found.worst_at


# ---- what a plan makes of it ----------------------------------------------------------------------


def fleet(vms: int = 4, steps: int = 8, hit: int = 40) -> list[Contents]:
    """VMs of 100 common pages and 20 of their own; the first writes to `hit` common ones in the fourth step."""
    base = [
        [[*range(1, 101), *range(1000 * (vm + 1), 1000 * (vm + 1) + 20)] for _ in range(steps)] for vm in range(vms)
    ]
    for step in range(4, steps):
        base[0][step][:hit] = range(500_000, 500_000 + hit)
    return base


def host(vms: int, swap: int = 0) -> HostSpec:
    return HostSpec(ram=vms * 120 * PAGE, swap=swap)


def test_the_worst_minute_everywhere_at_once(tmp_path: Path) -> None:
    trace = recorded(tmp_path, fleet())
    samples = [ksm.fingerprint(pages(vm[0])) for vm in fleet()]
    policy = Policy(headroom=0, broken=0)
    answer = ksm.plan(VMClass("web", samples, traces=[trace]), host(20), policy, simulate=False)
    risk = answer.hosts[0].risk
    assert risk is not None and risk.breaking[0].processes == 4
    # 100 merged pages of each VM, and 60 of the first from the fourth step on
    assert risk.breaking[0].merged == pytest.approx(100 - 40 / 4 / 2, rel=0.01)
    assert risk.worst == risk.ever == pytest.approx(40 / risk.breaking[0].merged)
    vms = risk.vms
    merged_slots = vms * 100
    frames_more = (risk.need_worst - risk.need) / PAGE
    assert frames_more == pytest.approx(min(risk.worst * merged_slots, merged_slots - 100), rel=0.02)
    assert risk.limit == 20 * 120 * PAGE and not risk.survives_worst and risk.fits_worst < vms
    assert risk.swap_worst == risk.need_worst - risk.limit > 0
    assert risk.minutes_to_full is None or risk.median == 0 or risk.minutes_to_full > 0
    swapped = ksm.plan(
        VMClass("web", samples, traces=[trace]), host(20, swap=100 * 120 * PAGE), policy, simulate=False
    ).hosts[0]
    assert swapped.risk is not None and swapped.risk.survives_worst and swapped.risk.fits_worst >= vms
    assert any("worst minute" in line for line in answer.warnings) and "worst minute" in " ".join(answer.verdict())
    told = json.loads(json.dumps(answer.to_dict()))["hosts"][0]["risk"]
    assert told["worst"] == risk.worst and len(told["breaking"][0]["seconds"]) == 5


def test_a_recording_among_the_samples_gives_both(tmp_path: Path) -> None:
    trace = recorded(tmp_path, fleet())
    assert [each.pages for each in samples_of(trace)] == [120] * 4
    for samples in ([trace], [str(trace.path)]):
        answer = ksm.plan(VMClass("web", samples), host(20), Policy(headroom=0), simulate=False)
        assert answer.classes[0].samples == 4 and answer.hosts[0].risk is not None
    assert {each.name for each in answer.samples} == {"vm0", "vm1", "vm2", "vm3"}


def test_memory_is_full_in_time(tmp_path: Path) -> None:
    """Every step writes to four of 100 merged pages in each VM: 12 % a minute."""
    vms = fleet(hit=0)
    for n, vm in enumerate(vms):
        for step in range(1, 8):
            vm[step][: 4 * step] = range(10**6 * (n + 1), 10**6 * (n + 1) + 4 * step)
    trace = recorded(tmp_path, vms)
    answer = ksm.plan(VMClass("web", [trace]), host(20), Policy(headroom=0.2, broken=0), simulate=False).hosts[0]
    risk = answer.risk
    assert risk is not None and 0.1 < risk.median < 0.2
    assert risk.minutes_to_full is not None
    room = risk.limit - risk.need
    merged = answer.frames["pages_shared"], answer.frames["pages_sharing"]
    assert risk.minutes_to_full == pytest.approx(room / PAGE / (risk.median * sum(m or 0 for m in merged)), rel=0.05)


def test_a_class_without_a_recording_breaks_like_the_others(tmp_path: Path) -> None:
    trace = recorded(tmp_path, fleet())
    other = [ksm.fingerprint(pages([*range(2001, 2101), 9000 + n])) for n in range(3)]
    classes = [VMClass("web", [trace]), VMClass("db", other)]
    answer = ksm.plan(classes, host(40), Policy(), simulate=False)
    risk = answer.hosts[0].risk
    assert risk is not None and risk.worst == pytest.approx(risk.breaking[0].worst)
    assert any("Class db" in line for line in answer.assumed)


def test_no_recording_no_risk() -> None:
    samples = [ksm.fingerprint(pages(vm[0])) for vm in fleet()]
    answer = ksm.plan(VMClass("web", samples), host(20), simulate=False)
    assert answer.hosts[0].risk is None and answer.to_dict()["hosts"][0]["risk"] is None


# ---- bad input -----------------------------------------------------------------------------------


def large(directory: Path) -> Trace:
    record({"vm": [image([1, 2], page_size=16384)] * 5}, directory / "large.trace", every=20)
    return Trace(directory / "large.trace")


def damaged(directory: Path) -> Path:
    trace = recorded(directory, fleet())
    part = next((trace.path / "pages").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-100])
    return trace.path


def lacking(directory: Path) -> Path:
    """A recording of which the later steps are there, and their pages are not."""
    trace = recorded(directory, fleet())
    for part in (trace.path / "pages").glob("part-*"):
        part.rename(part.with_name("part-00000007.parquet"))
    return trace.path


SAMPLES = [ksm.fingerprint(pages(vm[0])) for vm in fleet(2)]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda d: VMClass("web", SAMPLES, traces=[recorded(d, fleet(steps=3))]), PlanError, "covers 40 s"),
        (lambda d: VMClass("web", SAMPLES, traces=[large(d)]), PlanError, "16,384 bytes, those of the samples 4,096"),
        (lambda d: VMClass("web", [*SAMPLES, large(d)]), ValueError, "page sizes differ"),
        (lambda d: VMClass("web", SAMPLES, traces=[d / "none"]), SourceError, "no such trace"),
        (lambda d: VMClass("web", SAMPLES, traces=[d]), SourceError, "not a trace"),
        (lambda d: VMClass("web", SAMPLES, traces=[damaged(d)]), SourceError, "part-00000000.parquet"),
        (lambda d: VMClass("web", [damaged(d)]), SourceError, "part-00000000.parquet"),
        (lambda d: VMClass("web", [lacking(d)]), SourceError, "part-00000000.parquet is missing"),
        (lambda d: VMClass("web", [recorded(d, fleet(), sample=4)]), PlanError, "one content in 4"),
        (
            lambda d: VMClass("web", [*SAMPLES, recorded(d, fleet(), key=Key.from_bytes(bytes(32)))]),
            PlanError,
            "under a key",
        ),
        (lambda d: VMClass("web", SAMPLES, traces="x.trace"), PlanError, "traces must be a list"),
    ],
)
def test_bad_recordings(make: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message) as raised:
        ksm.plan(make(tmp_path), host(20), simulate=False)
    assert "\n" not in str(raised.value)


def test_sampled_and_keyed_recordings_tell_the_risk(tmp_path: Path) -> None:
    sampled = recorded(tmp_path, fleet(), sample=2)
    secret = recorded(tmp_path, fleet(), key=Key.from_bytes(bytes(32)))
    for trace in (sampled, secret):
        risk = ksm.plan(VMClass("web", SAMPLES, traces=[trace]), host(20), simulate=False).hosts[0].risk
        assert risk is not None and 0.2 < risk.worst < 0.7
    keyed = ksm.plan(VMClass("web", [secret]), host(20), simulate=False)
    assert keyed.hosts[0].risk is not None and keyed.hosts[0].risk.worst == pytest.approx(0.42, abs=0.02)


def test_a_recording_that_ended_early_says_so(tmp_path: Path) -> None:
    """As a sample it is as good as any; there is no minute to tell the risk from."""
    trace = recorded(tmp_path, fleet(steps=2))
    answer = ksm.plan(VMClass("web", [trace]), host(20), simulate=False)
    assert answer.hosts[0].risk is None and any("too short" in line for line in answer.warnings)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = recorded(tmp_path, fleet())
    raw = tmp_path / "vm.raw"
    pages(fleet()[1][0]).tofile(raw)
    assert main(["plan", str(raw), str(raw), "--trace", str(trace.path), "--ram", "8M"]) == 0
    printed = capsys.readouterr().out
    assert "written of merged pages a minute" in printed and "In the worst minute recorded" in printed
    file = tmp_path / "plan.yaml"
    file.write_text(
        f"classes: {{web: {{samples: [vm.raw, vm.raw], traces: [{trace.path.name}]}}}}\nhosts: [{{ram: 8M}}]"
    )
    assert main(["plan", "--file", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hosts"][0]["risk"]["breaking"][0]["processes"] == 4
    assert main(["plan", str(raw), "--trace", str(tmp_path), "--ram", "8M"]) == 65
    error = capsys.readouterr().err
    assert "not a trace" in error and error.count("\n") == 1

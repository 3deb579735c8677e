"""Setting tunables: what is foreseen is what the kernel answers, and nothing is left half done."""

from __future__ import annotations

import errno
import io
import json
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import ksm
import ksm.cli
import ksm.cli.tune
from ksm.errors import SyscallError, kernel_error
from ksm.linux import KSM_ROOT, FileSysfs, Host, madvise
from ksm.stepper import restore
from ksm.sysfs import ADVISOR_MODES, ATTRIBUTES, profile
from ksm.tune import Change, apply, default_of, defaults, plan_changes, range_of, tunables, value_of, warnings

ANSWERS = Path(__file__).with_name("kernel") / "data" / "sysfs_writes.json"
LONGER = 4096  # the kernel cuts a write here; the command line does not write such texts


def why_not() -> str | None:
    if sys.platform != "linux" or not Path(KSM_ROOT, "run").exists():
        return "the running kernel has no KSM"
    return None if os.geteuid() == 0 else "setting tunables needs root"


needs_kernel = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def merged_machine(kernel: str = "6.18") -> ksm.Machine:
    machine = ksm.Machine(kernel=kernel)
    process = machine.spawn("vm")
    address = process.mmap(b"x" * 4096 * 10)
    process.madvise(address, 4096 * 10, ksm.MADV_MERGEABLE)
    machine.ksm.run = 1
    machine.ksmd.scan()
    machine.ksmd.scan()
    assert machine.ksm.pages_sharing == 9
    return machine


# ---- what is foreseen ------------------------------------------------------------------------------------------


def foreseen(name: str, text: str) -> tuple[int, str | None]:
    """The errno, and what the file reads afterwards."""
    try:
        change = plan_changes(ksm.Machine().ksm, {name: text})[0]
    except SyscallError as error:
        return error.errno or 0, None
    attribute = ATTRIBUTES[name]
    number = ADVISOR_MODES.index(change.after) if attribute.kind == "mode" else int(change.after)
    return 0, attribute.format(number).strip()


def test_every_answer_that_the_kernel_gave_is_foreseen() -> None:
    """More than a thousand writes measured on a running kernel: the same errno, the same value."""
    rows = json.loads(ANSWERS.read_text())
    compared = 0
    for row in rows:
        if not row["text"] or len(row["text"]) > LONGER:
            continue
        assert foreseen(row["file"], row["text"]) == (row["errno"], row["value"] if row["errno"] == 0 else None), row
        compared += 1
    assert compared > 1000


@pytest.mark.parametrize(
    ("wanted", "number", "words"),
    [
        ({"max_page_sharing": "512"}, errno.EBUSY, "from 256 to 512 while pages are merged (pages_shared is 1)"),
        ({"merge_across_nodes": "0"}, errno.EBUSY, "`ksm tune set run=2 merge_across_nodes=0`"),
        ({"pages_to_scan": "5", "advisor_mode": "scan-time"}, errno.EINVAL, "set advisor_mode=none with it"),
        ({"max_page_sharing": "1"}, errno.EINVAL, "it takes 2 to 2^31-1"),
        ({"max_page_sharing": "2147483648"}, errno.ERANGE, "it takes 2 to 2^31-1"),
        ({"pages_to_scn": "1"}, errno.ENOENT, "is it pages_to_scan?"),
        ({"../run": "1"}, errno.ENOENT, "no such tunable"),
        ({"pages_shared": "1"}, errno.EACCES, "a counter"),
    ],
)
def test_refusals_are_explained(wanted: dict[str, str], number: int, words: str) -> None:
    machine = merged_machine()
    before = machine.ksm.tunables()
    with pytest.raises(SyscallError) as caught:
        plan_changes(machine.ksm, wanted)
    assert caught.value.errno == number and words in str(caught.value)
    assert machine.ksm.tunables() == before


def test_what_a_kernel_lacks_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"advisor_mode: it is there since Linux 6\.8, and in Linux 6\.6 it is"):
        plan_changes(ksm.Machine(kernel="6.6").ksm, {"advisor_mode": "none"}, release="Linux 6.6")
    with pytest.raises(FileNotFoundError, match="smart_scan"):
        defaults(ksm.Machine(kernel="6.6").ksm, ["smart_scan"])
    assert "smart_scan" not in [a.name for a in tunables(ksm.Machine(kernel="6.6").ksm)]


def test_the_order_makes_more_possible() -> None:
    machine = merged_machine()
    wanted = {"max_page_sharing": "4", "run": "2"}
    changes = plan_changes(machine.ksm, wanted)
    assert [change.name for change in changes] == ["run", "max_page_sharing"]
    assert apply(machine.ksm, changes) == changes
    assert (machine.ksm.run, machine.ksm.max_page_sharing, machine.ksm.pages_shared) == (2, 4, 0)
    again = plan_changes(machine.ksm, {"run": "1", "pages_to_scan": "7", "advisor_mode": "none"})
    assert [change.name for change in again] == ["advisor_mode", "pages_to_scan", "run"]
    machine.ksm.advisor_mode = "scan-time"
    apply(machine.ksm, plan_changes(machine.ksm, {"pages_to_scan": "7", "advisor_mode": "none"}))
    assert machine.ksm.pages_to_scan == 7


def test_unmerging_needs_memory() -> None:
    machine = merged_machine()
    with pytest.raises(SyscallError, match="private copies of 9 pages") as caught:
        plan_changes(machine.ksm, {"run": "2"}, mem_available=9 * 4096 - 1)
    assert caught.value.errno == errno.ENOMEM
    assert plan_changes(machine.ksm, {"run": "2"}, mem_available=9 * 4096)


def test_what_follows_is_foreseen() -> None:
    machine = ksm.Machine()
    changes = plan_changes(machine.ksm, {"advisor_mode": "scan-time", "advisor_min_pages_to_scan": "900"})
    assert changes[-1] == Change("pages_to_scan", "100", "500", follows=True)  # the least is set after the switch
    done = apply(machine.ksm, changes)
    assert done == changes and machine.ksm.pages_to_scan == 500


def test_a_failure_takes_back_what_was_written(tmp_path: Path) -> None:
    class Failing(FileSysfs):
        __slots__ = ()

        def write(self, name: str, text: str | bytes) -> None:
            if name == "use_zero_pages":
                raise kernel_error(errno.EIO, "on purpose")
            super().write(name, text)

    for name, attribute in profile("6.6").attributes.items():
        (tmp_path / name).write_text(attribute.format(attribute.default))
    files = Failing(tmp_path, 4096)
    before = files.tunables()
    changes = plan_changes(files, {"sleep_millisecs": "5", "use_zero_pages": "1", "run": "1"})
    with pytest.raises(OSError, match="on purpose"):
        apply(files, changes)
    assert files.tunables() == before


def test_warnings() -> None:
    machine = merged_machine()

    def of(**wanted: str) -> str:
        return " ".join(warnings(machine.ksm, plan_changes(machine.ksm, wanted)))

    assert of(sleep_millisecs="0").startswith("sleep_millisecs=0: ksmd takes a whole CPU")
    assert "visits nothing" in of(pages_to_scan="0")
    assert "the 9 pages saved so far stay merged" in of(run="0")
    assert "9 pages get private copies, which takes 36,864 bytes" in of(run="2")
    assert "(40000) is above" in of(advisor_mode="scan-time", advisor_min_pages_to_scan="40000")
    assert "without effect until" in of(advisor_max_cpu="5")
    assert "without effect until" not in of(advisor_max_cpu="5", advisor_mode="scan-time")
    assert of(run="1", use_zero_pages="1") == ""


def test_defaults_and_ranges() -> None:
    machine = ksm.Machine()
    assert defaults(machine.ksm) == {a.name: default_of(a) for a in tunables(machine.ksm)}
    machine.ksm.advisor_mode = "scan-time"
    machine.ksm.smart_scan = False
    apply(machine.ksm, plan_changes(machine.ksm, defaults(machine.ksm)))
    assert machine.ksm.tunables() == ksm.Machine().ksm.tunables()
    for attribute in tunables(machine.ksm):
        assert range_of(attribute)
    assert range_of(ATTRIBUTES["smart_scan"]) == "0, 1"


# ---- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host of files, with 40,000 bytes of memory left and 5 pages merged, behind the command."""
    for name, attribute in profile("6.12").attributes.items():
        (tmp_path / name).write_text(attribute.format(attribute.default))
    (tmp_path / "pages_shared").write_text("1\n")
    (tmp_path / "pages_sharing").write_text("5\n")
    (tmp_path / "meminfo").write_text("MemAvailable: 40 kB\n")
    host = Host(tmp_path, tmp_path, tmp_path / "lock")
    monkeypatch.setattr("ksm.cli.tune.Host", lambda: host)
    return host


def test_show(made_up: Host, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made_up.ksm.pages_to_scan = 5000
    assert ksm.cli.main(["tune", "show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tunable", "value", "default", "range", "since", "meaning"]
    assert any(line.split()[:3] == ["pages_to_scan", "5000*", "100"] for line in lines)
    assert any(line.split()[:3] == ["run", "0", "0"] for line in lines)
    narrow = Console(width=80, file=io.StringIO())
    monkeypatch.setattr("ksm.cli.tune.out", lambda: narrow)
    assert ksm.cli.main(["tune", "show", "stable_node_chains_prune_millisecs", "run"]) == 0
    assert narrow.file.getvalue() == (  # type: ignore[attr-defined]
        "run                                         0   default 0, 0 to 2, since 2.6.32\n"
        "    0 stops ksmd, 1 runs it, 2 stops it and unmerges everything\n"
        "stable_node_chains_prune_millisecs       2000   default 2000, 0 to 2^32-1, since 4.13\n"
        "    how often stale pages of a chain are sought\n"
    )
    assert ksm.cli.main(["tune", "show", "smart_scan", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {
        "name": "smart_scan",
        "value": "1",
        "default": "1",
        "range": "0, 1",
        "since": "6.7",
        "help": ATTRIBUTES["smart_scan"].help,
    }


def test_set_and_dry_run(made_up: Host, capsys: pytest.CaptureFixture[str]) -> None:
    before = made_up.ksm.tunables()
    assert ksm.cli.main(["tune", "set", "-n", "pages_to_scan=7", "run=1"]) == 0
    shown = capsys.readouterr().out
    assert "Nothing was written." in shown and made_up.ksm.tunables() == before
    assert ksm.cli.main(["tune", "set", "pages_to_scan=7", "run=1", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [change["name"] for change in answer["changes"]] == ["pages_to_scan", "run"]
    assert (made_up.ksm.pages_to_scan, made_up.ksm.run) == (7, 1)
    assert ksm.cli.main(["tune", "reset", "pages_to_scan"]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split() == ["pages_to_scan", "7", "100", "(default)"] and made_up.ksm.pages_to_scan == 100


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["set"], 2, "Missing argument"),
        (["set", "run"], 2, "'run' is not NAME=VALUE"),
        (["set", "run="], 2, "not NAME=VALUE"),
        (["set", "run=1", "run=0"], 2, "run is given twice"),
        (["set", "run=3"], 1, "it takes 0 to 2"),
        (["set", "max_page_sharing=9"], 1, "while pages are merged"),
        (["set", "full_scans=9"], 77, "a counter"),
        (["reset", "ruin"], 1, "is it run?"),
        (["show", "full_scans"], 77, "a counter"),
    ],
)
def test_wrong_settings(
    made_up: Host, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    before = made_up.ksm.tunables()
    got = ksm.cli.main(["tune", *arguments])
    shown = capsys.readouterr()
    assert got == code and words in shown.err and shown.out == "", (got, shown)
    assert made_up.ksm.tunables() == before


def test_unmerging_can_be_forced(made_up: Host, capsys: pytest.CaptureFixture[str]) -> None:
    (made_up.proc / "meminfo").write_text("MemAvailable: 10 kB\n")
    assert ksm.cli.main(["tune", "set", "run=2"]) == 1
    assert "the host would run out of memory" in capsys.readouterr().err
    assert ksm.cli.main(["tune", "set", "run=2", "--force"]) == 0
    assert made_up.ksm.run == 2


def test_rights(made_up: Host, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert ksm.cli.main(["tune", "set", "run=1"]) == 77
    assert "run needs root" in capsys.readouterr().err
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert ksm.cli.main(["tune", "set", "run=1"]) == 1
    assert "cannot be written here" in capsys.readouterr().err
    assert made_up.ksm.run == 0


def test_no_ksm(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksm.cli.tune.Host", lambda: Host(tmp_path))
    for arguments in (["show"], ["set", "run=1"], ["reset"]):
        assert ksm.cli.main(["tune", *arguments]) == 69
        assert capsys.readouterr().err.startswith("ksm: there is no KSM here")


# ---- the running kernel ----------------------------------------------------------------------------------------


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    host = Host()
    monkeypatch.setattr("ksm.cli.tune.Host", lambda: host)
    with host.lock():
        saved = {name: host.ksm.read(name) for name in host.ksm.tunables()}
        try:
            yield host
        finally:
            restore(host.ksm, saved)


@needs_kernel
def test_the_kernel_refuses_what_was_foreseen(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    area = mmap.mmap(-1, 20 * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    madvise(area, ksm.MADV_NOHUGEPAGE)
    np.frombuffer(area, np.uint8)[:] = 99
    madvise(area, ksm.MADV_MERGEABLE)
    before = host.ksm.max_page_sharing
    with host.single_step(unmerge=True) as ksmd:
        ksmd.scan()
        ksmd.scan()
        assert host.ksm.pages_shared > 0
        assert ksm.cli.main(["tune", "set", f"max_page_sharing={before + 1}"]) == 1
        assert "while pages are merged" in capsys.readouterr().err
        with pytest.raises(OSError, match="Device or resource busy"):
            host.ksm.max_page_sharing = before + 1
        assert ksm.cli.main(["tune", "set", f"max_page_sharing={before}"]) == 0  # the present value never fails
        capsys.readouterr()
        assert ksm.cli.main(["tune", "set", f"max_page_sharing={before + 1}", "run=2"]) == 0
        assert host.ksm.max_page_sharing == before + 1 and host.ksm.pages_shared == 0
        madvise(area, ksm.MADV_UNMERGEABLE)


@needs_kernel
def test_the_kernel_does_what_was_foreseen(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    if "advisor_mode" not in host.ksm.names():
        pytest.skip("the running kernel has no advisor")
    for wanted in (
        {"run": "0", "pages_to_scan": "123", "sleep_millisecs": "50", "use_zero_pages": "1"},
        {"advisor_mode": "scan-time"},
        {"advisor_mode": "none", "pages_to_scan": "77", "smart_scan": "off"},
        {"advisor_max_cpu": str((1 << 32) + 5)},
    ):
        foreseen = plan_changes(host.ksm, wanted)
        assert apply(host.ksm, foreseen) == foreseen
    host.ksm.advisor_mode = "scan-time"
    assert ksm.cli.main(["tune", "set", "pages_to_scan=5"]) == 1
    assert "belongs to the advisor" in capsys.readouterr().err
    with pytest.raises(OSError, match="Invalid argument"):
        host.ksm.pages_to_scan = 5
    assert ksm.cli.main(["tune", "reset", "--json"]) == 0
    assert {name: value_of(host.ksm, name) for name in host.ksm.tunables()} == defaults(host.ksm)

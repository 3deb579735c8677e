"""The attribute table, the kernel profiles, and text and typed access, checked against what a real kernel answered."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksm.errors import KernelFileNotFoundError, KernelPermissionError, kernel_error
from ksm.linux import Host
from ksm.stepper import restore
from ksm.sysfs import ADVISOR_MODES, ATTRIBUTES, Profile, StateSysfs, Sysfs, profile

GOLDEN = Path(__file__).with_name("data") / "sysfs_texts.json"
OTHERS_GOLDEN = Path(__file__).with_name("kernel") / "data" / "sysfs_writes.json"
NEWEST = profile("6.18")
TUNABLES = tuple(name for name, a in ATTRIBUTES.items() if a.writable)

_NUMBERS = """5 +5 ++5 -5 -0 + - +-5 -+5 --5 0x10 010 0010 0b1 5a 5.0 1_0 ٣ 0 1 2 3 +0 +1 00 01 10 100 256 1x 0x 5x
    2147483647 2147483648 2147483648x -2147483648 -2147483649 -2147483649x 4294967294 4294967295 4294967296 4294967297
    9223372036854775807 9223372036854775808 -9223372036854775809 18446744073709551614 18446744073709551615
    18446744073709551615x 18446744073709551616 18446744073709551617 18446744073709551616x +18446744073709551616
    -18446744073709551615 -18446744073709551616 -18446744073709551616x 99999999999999999999999"""
_WORDS = """y Y n N t T f F e E d D on ON oN of off OFF o O ox yes no true false enable disable onx offx +y
    none scan-time Scan-time [none] non nonexx scan_time"""
TEXTS: tuple[str, ...] = (
    *("", "\n", "\0", "\x005", "5\0", "5\0junk", "5\n", "5\n\n", "5\n\0", "5\0\n", "5\n\0x", "\n5", "5 ", " 5"),
    *("5\t", "5\r\n", "+1\n", "0\n", "1\n", "2\n", "1 \n", " y", "y\n\n", "o\n", "yes please"),
    *("none\n", "none\n\n", "none ", " none", "none\0", "\0none", "scan-time\n", "scan-time\0x", "scan-time\0\n"),
    *("scan-time\nx", "18446744073709551616\n", "18446744073709551616\n\n"),
    *_NUMBERS.split(),
    *_WORDS.split(),
    # sysfs cuts a write at 4096 bytes
    *("0" * 30 + "5", "0" * 4095 + "5", "0" * 4096 + "5", "0" * 4095 + "\n", "0" * 4096 + "x", "0" * 4094 + "1\n\n"),
    *("1" + "\0" * 5000, "5" * 4096),
)


class Values(dict[str, int]):
    """A backend without a machine: it remembers, and counts what it is told."""

    def __init__(self) -> None:
        super().__init__((a.name, a.default) for a in ATTRIBUTES.values())
        self.told: list[tuple[str, int]] = []
        self.busy = False

    def get(self, name: str) -> int:  # type: ignore[override]
        return self[name]

    def set(self, name: str, value: int) -> None:
        if self.busy and name in ("merge_across_nodes", "max_page_sharing"):
            raise kernel_error(errno.EBUSY, name)
        self.told.append((name, value))
        self[name] = value


def make(kernel: Profile = NEWEST) -> tuple[StateSysfs, Values]:
    values = Values()
    return StateSysfs(values, kernel), values


def answer(ksm: Sysfs, name: str, text: str | bytes) -> tuple[str | None, str]:
    """What a write gives: the errno's name, and what the file then holds."""
    failed = None
    try:
        ksm.write(name, text)
    except OSError as error:
        failed = errno.errorcode[error.errno or 0]
    return failed, ksm.read(name)


def in_turn(ksm: Sysfs, name: str, text: str) -> tuple[str | None, str]:
    """The answer from the default values; they are put back."""
    defaults = {n: ATTRIBUTES[n].format(ATTRIBUTES[n].default) for n in TUNABLES}
    try:
        return answer(ksm, name, text)
    finally:
        restore(ksm, defaults)


# ---- the table and the profiles ------------------------------------------------------------------------------


def test_every_attribute_is_an_attribute_of_sysfs() -> None:
    for name, attribute in ATTRIBUTES.items():
        assert getattr(Sysfs, name).__doc__ == attribute.help
        assert attribute.name == name
        assert attribute.minimum <= attribute.default <= attribute.maximum


@pytest.mark.parametrize(
    ("kernel", "files", "newest"),
    [
        ("5.15", 14, "max_page_sharing"),
        ("6.1", 14, "max_page_sharing"),
        ("6.4", 15, "general_profit"),
        ("6.6", 17, "ksm_zero_pages"),
        ("6.7", 19, "pages_skipped"),
        ("6.8", 24, "advisor_mode"),
        ("6.9", 24, "advisor_mode"),
        ("6.12", 24, "advisor_mode"),
        ("6.18", 24, "advisor_mode"),
        ("7.3", 24, "advisor_mode"),
    ],
)
def test_files_by_version(kernel: str, files: int, newest: str) -> None:
    known = profile(kernel)
    assert len(known.attributes) == files
    assert newest in known.attributes
    assert list(known.attributes) == [name for name in ATTRIBUTES if name in known.attributes]


def test_behaviour_by_version() -> None:
    kernels = ["5.15", "6.1", "6.6", "6.7", "6.8", "6.10", "6.11", "6.12", "6.18"]
    rules = {
        "smart_scan": "6.7",
        "advisor": "6.8",
        "gate_first": "6.11",
        "zero_giveback": "6.12",
        "process_merge_any": "6.6",
        "counts_zero_pages": "6.6",
        "merge_any_survives_exec": "6.7",
        "ksm_merging_pages_file": "6.1",
    }
    for rule, first in rules.items():
        having = [kernel for kernel in kernels if getattr(profile(kernel), rule)]
        assert having == kernels[kernels.index(first) :], rule


def test_process_files_by_version() -> None:
    assert profile("5.15").ksm_stat_fields == ()
    assert profile("6.1").ksm_stat_fields == ("ksm_rmap_items",)
    assert profile("6.4").ksm_stat_fields == ("ksm_rmap_items", "ksm_merging_pages", "ksm_process_profit")
    assert len(profile("6.12").ksm_stat_fields) == 4
    assert profile("6.18").ksm_stat_fields[-2:] == ("ksm_merge_any", "ksm_mergeable")


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("6.1.0-18-amd64", "6.1"),
        ("5.15.0-105-generic", "5.15"),
        ("6.12", "6.12"),
        ("6.12rc3", "6.12"),
        ("10.0", "10.0"),
    ],
)
def test_releases(release: str, version: str) -> None:
    assert profile(release).version == version


@pytest.mark.parametrize("release", ["5.14", "5.14.0-427.el9.x86_64", "4.18", "5.2", "", "six", "6", "v6.1", "-6.1"])
def test_no_profile(release: str) -> None:
    with pytest.raises(ValueError, match=r"5\.15|not a kernel version"):
        profile(release)


# ---- text ------------------------------------------------------------------------------------------------------


def test_a_new_machine_holds_the_defaults() -> None:
    ksm, _ = make()
    for name, attribute in ATTRIBUTES.items():
        expected = "[none] scan-time\n" if name == "advisor_mode" else f"{attribute.default}\n"
        assert ksm.read(name) == expected


@pytest.mark.parametrize("name", TUNABLES)
def test_writes_as_the_kernel_answered(name: str) -> None:
    golden = json.loads(GOLDEN.read_text("utf-8"))
    ksm, _ = make()
    for text, (failed, held) in zip(TEXTS, golden[name], strict=True):
        assert in_turn(ksm, name, text) == (failed, held), f"{name} <- {text[:40]!r}"


def test_writes_as_the_kernel_answered_another() -> None:
    """The same question, measured independently."""
    if not OTHERS_GOLDEN.exists():
        pytest.skip("tests/kernel/data/sysfs_writes.json has not been measured")
    for row in json.loads(OTHERS_GOLDEN.read_text("utf-8")):
        ksm, _ = make()
        name, text, failed, held = (row[key] for key in ("file", "text", "errno", "value"))
        wanted = errno.errorcode[failed] if isinstance(failed, int) and failed else failed or None
        got = answer(ksm, name, text)
        assert (got[0], got[1].strip()) == (wanted, str(held).strip()), f"{name} <- {text[:40]!r}"


@pytest.mark.parametrize("name", [name for name in ATTRIBUTES if name not in TUNABLES])
def test_read_only(name: str) -> None:
    ksm, values = make()
    for text in ("1", "", "x"):
        with pytest.raises(KernelPermissionError, match="read-only") as caught:
            ksm.write(name, text)
        assert caught.value.errno == errno.EACCES
    with pytest.raises(AttributeError):
        setattr(ksm, name, 1)
    assert values.told == []


def test_a_file_that_this_kernel_lacks() -> None:
    ksm, _ = make(profile("6.1"))
    for act in (lambda: ksm.read("smart_scan"), lambda: ksm.write("smart_scan", "1"), lambda: ksm.smart_scan):
        with pytest.raises(KernelFileNotFoundError, match=r"since Linux 6\.7") as caught:
            act()
        assert caught.value.errno == errno.ENOENT
    with pytest.raises(FileNotFoundError):
        ksm.write("ksm_zero_pages", "1")  # ENOENT goes before EACCES
    with pytest.raises(FileNotFoundError):
        ksm.read("no_such_file")


def test_an_unknown_attribute() -> None:
    ksm, _ = make()
    with pytest.raises(AttributeError):
        ksm.pages_shred  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError):
        ksm.pages_to_scann = 5  # type: ignore[attr-defined]


def test_booleans_by_version() -> None:
    for kernel, accepted in (("5.15", "1y"), ("6.1", "1yt"), ("6.12", "1yt"), ("6.18", "1yte")):
        ksm, _ = make(profile(kernel))
        took = [letter for letter in "1yte" if answer(ksm, "use_zero_pages", letter)[0] is None]
        assert "".join(took) == accepted


def test_busy_comes_after_the_checks() -> None:
    """As measured while pages were shared."""
    ksm, values = make()
    values.busy = True
    for text, failed in [("1", None), ("0", "EBUSY"), ("00", "EBUSY"), ("2", "EINVAL"), ("", None), ("+1\n", None)]:
        assert answer(ksm, "merge_across_nodes", text) == (failed, "1\n")
    assert answer(ksm, "merge_across_nodes", str(1 << 64))[0] == "ERANGE"
    for text, failed in [("256", None), ("300", "EBUSY"), ("1", "EINVAL"), ("-5", "EINVAL"), ("2147483648", "ERANGE")]:
        assert answer(ksm, "max_page_sharing", text) == (failed, "256\n")


def test_the_present_value_is_not_stored_again() -> None:
    ksm, values = make()
    ksm.write("sleep_millisecs", "20")
    ksm.write("run", "0")
    assert values.told == []


# ---- the advisor ------------------------------------------------------------------------------------------------


def test_the_advisor_takes_pages_to_scan() -> None:
    """The sequence, and its outcome, were measured on Linux 6.18."""
    ksm, values = make()
    ksm.write("pages_to_scan", "777")
    ksm.write("advisor_mode", "none")
    assert ksm.pages_to_scan == 777
    ksm.write("advisor_mode", "scan-time")
    assert (ksm.read("advisor_mode"), ksm.pages_to_scan) == ("none [scan-time]\n", 500)
    for text in ("500", "100", "x", "99999999999999999999999"):
        assert answer(ksm, "pages_to_scan", text) == ("EINVAL", "500\n")
    assert answer(ksm, "pages_to_scan", "") == (None, "500\n")
    ksm.write("advisor_min_pages_to_scan", "600")
    ksm.write("advisor_mode", "scan-time")
    assert ksm.pages_to_scan == 500
    ksm.write("advisor_mode", "none")
    assert ksm.pages_to_scan == 100
    for least, pages in ((4294967301, 5), (40000, 40000), (0, 0)):
        ksm.advisor_min_pages_to_scan = least
        ksm.advisor_mode = "scan-time"
        assert ksm.pages_to_scan == pages
        ksm.advisor_mode = "none"
    assert values["advisor_mode"] == 0


# ---- typed access -----------------------------------------------------------------------------------------------


def test_types() -> None:
    ksm, values = make()
    ksm.run = 1
    ksm.use_zero_pages = True
    ksm.merge_across_nodes = 0
    assert (ksm.run, ksm.use_zero_pages, ksm.merge_across_nodes) == (1, True, False)
    assert isinstance(ksm.use_zero_pages, bool)
    assert isinstance(ksm.merge_across_nodes, bool)
    assert values["use_zero_pages"] == 1
    ksm.advisor_mode = ADVISOR_MODES[1]
    assert ksm.advisor_mode == "scan-time"
    for value in (1.0, "1", None, b"1"):
        with pytest.raises(TypeError, match="run takes an int"):
            ksm.run = value  # type: ignore[assignment]
    with pytest.raises(TypeError, match="advisor_mode takes a str"):
        ksm.advisor_mode = 1  # type: ignore[assignment]
    with pytest.raises(OSError, match="run: '-1'"):
        ksm.run = -1
    with pytest.raises(OSError, match="use_zero_pages: '2'"):
        ksm.use_zero_pages = 2


def test_bytes_and_odd_text() -> None:
    ksm, _ = make()
    ksm.write("run", b"1\n")
    assert ksm.run == 1
    for text in (b"\xff", "\udcff", "é"):
        with pytest.raises(OSError, match="run") as caught:
            ksm.write("run", text)
        assert caught.value.errno == errno.EINVAL
    ksm.write("use_zero_pages", b"y\xff")
    assert ksm.use_zero_pages


def test_snapshot_and_tunables() -> None:
    ksm, values = make()
    values.update(pages_shared=2, pages_sharing=10, ksm_zero_pages=4, general_profit=-7)
    stats = ksm.snapshot()
    assert (stats.pages_shared, stats.saved_pages, stats.profit, stats.page_size) == (2, 14, -7, 4096)
    assert ksm.tunables()["advisor_mode"] == "none"
    assert ksm.tunables()["smart_scan"] is True
    assert set(ksm.tunables()) == set(TUNABLES)
    old = make(profile("5.15"))[0]
    assert old.snapshot().ksm_zero_pages is None
    assert old.snapshot().general_profit is None
    assert "smart_scan" not in old.tunables()
    assert "14 files" in repr(old)


def test_the_lock_is_held_over_a_write_and_a_snapshot() -> None:
    class Lock:
        taken = 0

        def __enter__(self) -> None:
            self.taken += 1

        def __exit__(self, *_: object) -> None:
            pass

    lock = Lock()
    ksm = StateSysfs(Values(), NEWEST, 4096, lock)
    ksm.run = 1
    ksm.snapshot()
    assert lock.taken == 2


@given(name=st.sampled_from(TUNABLES), text=st.binary(max_size=12) | st.text("0123456789+-\n\0 xynetdof", max_size=24))
def test_any_text_is_stored_or_refused(name: str, text: bytes | str) -> None:
    ksm, values = make()
    failed, _ = answer(ksm, name, text)
    assert failed in (None, "EINVAL", "ERANGE")
    assert failed is None or values == Values()
    assert ATTRIBUTES[name].minimum <= values[name] <= ATTRIBUTES[name].maximum


@given(name=st.sampled_from(TUNABLES), data=st.data())
def test_what_is_read_can_be_written(name: str, data: st.DataObject) -> None:
    attribute = ATTRIBUTES[name]
    highest = 1 if attribute.kind == "bool" else attribute.maximum
    value = data.draw(st.integers(attribute.minimum, highest))
    text = ADVISOR_MODES[value] if attribute.kind == "mode" else attribute.format(value)
    ksm, values = make()
    ksm.write(name, text)
    assert values[name] == value
    if attribute.kind != "mode":
        assert ksm.read(name) == text


# ---- the running kernel --------------------------------------------------------------------------------------------


@pytest.fixture
def real() -> Host:
    host = Host()
    if not (host.root / "advisor_mode").exists():
        pytest.skip("the running kernel has no KSM, or is older than 6.8")
    if os.geteuid() != 0:
        pytest.skip("driving the kernel's KSM needs root")
    return host


def test_the_running_kernel_answers_the_same(real: Host) -> None:
    """With KSM_MEASURE=1 the answers become the golden file."""
    ksm, _ = make(real.kernel)
    measured: dict[str, list[tuple[str | None, str]]] = {}
    with real.lock():
        saved = {name: real.ksm.read(name) for name in TUNABLES}
        try:
            restore(real.ksm, {name: ATTRIBUTES[name].format(ATTRIBUTES[name].default) for name in TUNABLES})
            for name in TUNABLES:
                measured[name] = [in_turn(real.ksm, name, text) for text in TEXTS]
        finally:
            restore(real.ksm, saved)
    if os.environ.get("KSM_MEASURE"):
        rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(answers)}" for name, answers in measured.items())
        GOLDEN.write_text("{\n" + rows + "\n}\n", "utf-8")
    for name in TUNABLES:
        for text, got in zip(TEXTS, measured[name], strict=True):
            assert in_turn(ksm, name, text) == got, f"{name} <- {text[:40]!r}"


def test_the_running_kernel_answers_the_same_to_noise(real: Host) -> None:
    """Random text to all files in one sequence, so that what one write leaves meets the next."""
    draw = random.Random(20)
    alphabet = ["0", "1", "2", "5", "9", "4294967295", "18446744073709551615", "2147483647", "+", "-", "\n", "\0", " "]
    alphabet += ["y", "n", "e", "t", "d", "o", "f", "on", "scan-time", "none"]
    ksm, values = make(real.kernel)
    with real.lock():
        saved = {name: real.ksm.read(name) for name in TUNABLES}
        try:
            restore(real.ksm, {name: ATTRIBUTES[name].format(ATTRIBUTES[name].default) for name in TUNABLES})
            for _ in range(4000):
                name = draw.choice(TUNABLES)
                text = "".join(draw.choices(alphabet, k=draw.choice((0, 1, 1, 1, 2, 2, 3, 4))))
                if name == "run" and "1" in text:
                    continue  # ksmd and its advisor would move pages_to_scan
                got = answer(real.ksm, name, text)
                assert answer(ksm, name, text) == got, f"{name} <- {text!r}"
                assert ksm.read("pages_to_scan") == real.ksm.read("pages_to_scan"), f"after {name} <- {text!r}"
        finally:
            restore(real.ksm, saved)
    assert values["pages_to_scan"] != ATTRIBUTES["pages_to_scan"].default or values.told


def test_the_running_kernel_has_the_files_of_its_profile(real: Host) -> None:
    assert set(real.kernel.attributes) - {"merge_across_nodes"} <= set(real.ksm.names())
    for name in real.ksm.names():
        if name in ATTRIBUTES:
            mode = (real.root / name).stat().st_mode
            assert bool(mode & 0o200) == ATTRIBUTES[name].writable
    for name in ("full_scans", "no_such_file"):
        with pytest.raises(OSError, match=name) as wanted:
            real.ksm.write(name, "1")
        with pytest.raises(OSError, match=name) as got:
            make(real.kernel)[0].write(name, "1")
        assert (got.value.errno, type(got.value)) == (wanted.value.errno, type(wanted.value))

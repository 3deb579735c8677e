"""`ksm top`: its lines at any size, its keys, and the program itself in a terminal, on this host and on poorer ones."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import ksm
from ksm.advise import advise
from ksm.cli import main
from ksm.cli.keys import names
from ksm.cli.screen import SORTS, Frame, History, View, lines
from ksm.linux import KSM_ROOT, Host
from ksm.observe import Memory, Observation, Sample
from ksm.passes import Progress
from ksm.saved import load
from tests.test_advise import ADVISOR, HEALTHY, made, process
from tests.test_cli import environment

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
needs_ksm = pytest.mark.skipif(not Path(KSM_ROOT, "run").exists(), reason="the running kernel has no KSM")
needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not Path(KSM_ROOT, "run").exists(),
    reason="namespaces need root, and the kernel KSM",
)


# ---- lines ------------------------------------------------------------------------------------------------------


def shown(o: Observation = HEALTHY, view: View | None = None, width: int = 80, height: int | None = 24) -> list[str]:
    history = History()
    for _ in range(30):
        history.add(o)
    frame = Frame(
        o=o,
        progress=Progress(pass_seconds=20.0, left=4.0, seen=True, settle=24.0),
        history=history,
        view=view or View(),
    )
    return [line.plain for line in lines(frame, width, height)]


def test_a_screen_says_it_all() -> None:
    o = made({"ksm_zero_pages": 256}, changes={"cow_ksm": 14, "ksm_swpin_copy": 4, "pages_skipped": 20})
    text = "\n".join(shown(o))
    for words in (
        "run 1 running", "scan 1000", "sleep 20", "advisor none", "max_sharing 256", "Linux 6.18.0", "every 2 s",
        "saved 352.6 MiB, 1.0 MiB of it zero pages, 2.2 % of RAM", "profit 95.4 MiB", "rmap items 6.1 MiB", "chains 0",
        "shared 1,000", "sharing 90,000 (90.0 a page)", "unshared 9,000", "volatile 0", "visits 5,000/s",
        "skipped 10/s", "cow_ksm 7/s", "ksm_swpin_copy 2/s", "ksmd 1.0 %", "passes 9",
        "pass ends in 4 s of 20 s", "settled in 24 s",
        "2 of 100 processes, by profit", "174.7 MiB    45,500    50,000", "vm7",
    ):  # fmt: skip
        assert words in text, words
    assert "\u2588" in text and "target" not in text
    assert "target 200  max_cpu 70  min 500  max 30000" in "\n".join(shown(made(tunables=ADVISOR), width=200))


@pytest.mark.parametrize("size", [(80, 24), (40, 10), (200, 60), (10, 3), (1, 1), (80, 5)])
@pytest.mark.parametrize("help", [False, True])
def test_any_size(size: tuple[int, int], help: bool) -> None:
    o = made(tunables=ADVISOR, processes=tuple(process(pid, 10, 5) for pid in range(500)), other={"new_file": "1"})
    result = shown(o, View(help=help), *size)
    assert len(result) <= size[1] and all(len(line) <= size[0] for line in result)
    assert len(result) == size[1]
    assert "new_file 1" in "\n".join(shown(o, height=None)) and len(shown(o, height=None)) > 500


def test_losers_are_marked_and_unknowns_said() -> None:
    bare = Sample(kernel="5.15", tunables={"run": 0}, processes=(process(5, 100, 0),), processes_unreadable=3)
    text = "\n".join(shown(Observation(sample=bare), width=120))
    for words in ("!vm5", "-6.2 KiB", "ksmd not visible", "run 0 stopped", "pass ends in -",
                  "3 unreadable without root", "visits 0/s", "cow_ksm ?", "1 cost more than they save"):  # fmt: skip
        assert words in text, words
    assert "does not show processes'" in "\n".join(shown(Observation(sample=replace(bare, processes_shown=False))))


def test_a_process_cannot_write_to_the_terminal() -> None:
    evil = replace(process(5, 10, 5), name="\x1b]0;evil\x07\x1b[2J\u202e[bold]")
    text = "\n".join(shown(made(processes=(evil,)), width=120))
    assert not {"\x1b", "\x07", "\u202e"} & set(text) and "[bold]" in text


def test_sparklines() -> None:
    history = History()
    assert history.spark("saved") == ""
    for k in range(300):
        history.add(made(changes={"cow_ksm": 2 * (k % 4)}))
    assert history.spark("cow", ascii=True, width=4) == "_-+#"
    assert len(history.spark("saved")) == 16 and len(history.values["saved"]) == 240
    assert set(History({"cow": history.values["cow"].__class__([0.0, 0.0])}).spark("cow")) == {"\u2581"}


# ---- keys -------------------------------------------------------------------------------------------------------


def pids(view: View, o: Observation) -> list[int]:
    return [p.pid for p in view.chosen(o.sample.processes)]


def test_sorting_filtering_scrolling() -> None:
    one, two, three = process(11, 100, 90), process(12, 50, 95, anonymous=5), replace(process(13, 999, 1), name="Web")
    o = made(processes=(one, two, three))
    view = View()
    assert pids(view, o) == [12, 11, 13]
    for key, order in {"m": [12, 11, 13], "i": [13, 11, 12], "a": [12, 11, 13], "n": [11, 12, 13], "d": [11, 12, 13],
                       "z": [11, 12, 13], "p": [12, 11, 13]}.items():  # fmt: skip
        assert view.press(key) and pids(view, o) == order, key
    view.press("p")
    assert pids(view, o) == [13, 11, 12], "the same key again turns it round"
    view.press("r")
    for key in ("/", "w", "e", "q", "backspace"):
        view.press(key)
    assert pids(view, o) == [13] and not view.done, "what is typed is looked for at once"
    view.press("escape")
    assert view.filter == "" and pids(view, o) == [12, 11, 13]
    for key in ("/", "1", "1", "space", "backspace", "enter"):
        view.press(key)
    assert (view.filter, pids(view, o)) == ("11", [11])
    view.press("escape")
    view.press("l")
    assert pids(view, o) == [13]
    view.press("l")
    assert not view.press("x") and view.press("resize")
    view.press("page down")
    assert view.offset == 10
    shown(o, view, 80, 24)
    assert view.offset == 0, "not beyond the end"
    view.press("space")
    assert view.paused and "PAUSED" in shown(o, view)[0]
    for _ in range(9):
        view.press("-")
    assert view.interval == 60
    view.press("q")
    assert view.done
    assert len({name for name, _ in SORTS.values()}) == len(SORTS)


def test_what_terminals_send() -> None:
    sent = "q\x1b[A\x1bOB\x1b[5~\x1b[6~\x1b[1~ \r\x7f\x1b[200~\u00e4\x01\x1b"
    assert list(names(sent)) == [
        "q", "up", "down", "page up", "page down", "home", "space", "enter", "backspace", "\u00e4", "escape",
    ]  # fmt: skip


# ---- the program, without a terminal ----------------------------------------------------------------------------


def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ksm", "top", *arguments],
        cwd="/",
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=60,
    )


@needs_ksm
def test_once_and_json(tmp_path: Path) -> None:
    done = run("--once", "-d", "200ms")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ksm top  Linux") and "\x1b" not in done.stdout
    assert run("-d", "100ms").stdout.startswith("ksm top  Linux"), "a pipe gets one look"
    saved = run("--json", "-d", "200ms")
    (tmp_path / "f").write_text(saved.stdout)
    o = load(tmp_path / "f")
    assert o.seconds >= 0.2 and o.sample.kernel == os.uname().release
    assert json.loads(saved.stdout)["counters"]["pages_shared"] == o.sample.stats.pages_shared
    assert advise(o) is not None
    pipe = '"$0" -m ksm top --once -d 100ms | head -c 5; echo " ${PIPESTATUS[0]}"'
    broken = subprocess.run(["bash", "-c", pipe, sys.executable], cwd="/", env=environment(), capture_output=True)
    assert broken.stdout in (b"ksm t 141\n", b"ksm t 0\n") and broken.stderr == b""
    with open("/dev/full", "w") as full:
        failed = subprocess.run(
            [sys.executable, "-m", "ksm", "top", "--json", "-d", "10ms"],
            cwd="/", env=environment(), stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert (failed.returncode, failed.stderr.count("\n")) == (74, 1)


def test_wrong_options_and_no_ksm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--sort", "beauty"]) == 2
    assert main(["top", "-d", "soon"]) == 2
    monkeypatch.setattr("ksm.cli.top.Host", lambda: Host("/nonexistent"))
    for arguments in ([], ["--once"], ["--json"]):
        assert main(["top", *arguments]) == 69
        assert "there is no KSM here" in capsys.readouterr().err.splitlines()[-1]


# ---- the program in a terminal ----------------------------------------------------------------------------------


class Terminal:
    """`ksm top` in a pseudo-terminal, and the screen that a viewer would see."""

    def __init__(self, *arguments: str, width: int = 80, height: int = 24, **extra: str) -> None:
        import fcntl
        import pty
        import struct
        import termios

        import pyte

        self.screen = pyte.Screen(width, height)
        self.stream = pyte.ByteStream(self.screen)
        self.master, self.slave = pty.openpty()
        self.size = lambda w, h: fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", h, w, 0, 0))
        self.size(width, height)
        self.modes = lambda: termios.tcgetattr(self.slave)
        self.before = self.modes()
        self.raw = b""
        self.program = subprocess.Popen(
            [sys.executable, "-m", "ksm", "top", *arguments],
            cwd="/",
            env=environment(**{"TERM": "xterm-256color", **extra}),
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
        )

    def text(self) -> str:
        return "\n".join(self.screen.display)

    def pump(self, seconds: float = 0.05) -> None:
        import select

        deadline = time.monotonic() + seconds
        while select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return  # nobody is at the other end any more
            self.raw += data
            self.stream.feed(data)

    def see(self, pattern: str, seconds: float = 15.0) -> str:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.text()):
            assert time.monotonic() < deadline, f"no {pattern!r} in\n{self.text()}"
            self.pump()
        return self.text()

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        deadline = time.monotonic() + 15
        while self.program.poll() is None:
            assert time.monotonic() < deadline, "it does not end"
            self.pump()
        self.pump()
        return self.program.returncode


@contextlib.contextmanager
def terminal(*arguments: str, width: int = 80, height: int = 24, **extra: str) -> Iterator[Terminal]:
    it = Terminal(*arguments, width=width, height=height, **extra)
    try:
        yield it
    finally:
        if it.program.poll() is None:
            it.program.kill()
        it.program.wait()
        for descriptor in (it.master, it.slave):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@linux_only
@needs_ksm
def test_in_a_terminal() -> None:
    with terminal("-d", "300ms") as t:
        first = t.see(r"own CPU \d").splitlines()
        assert first[0].startswith("ksm top  Linux") and "q quit" in first[23]
        t.type("m")
        t.see(r"processes, by merged")
        t.type("m")
        t.see(r"by merged reversed")
        t.type("/zzz")
        t.see(r"show names and pids with: zzz_")
        t.type("\r")
        t.see(r"0 of [\d,]+ processes, by merged reversed.* with 'zzz'")
        t.type("\x1b")
        t.pump(0.3)
        t.type("?")
        t.see(r"scroll\s*\n")
        t.type("h ")
        paused = t.see(r"PAUSED").splitlines()[0]
        t.pump(0.8)
        assert t.text().splitlines()[0] == paused, "nothing moves while paused"
        t.type(" ")
        t.see(r"every 0.3 s\s+own")
        t.screen.resize(12, 60)
        t.size(60, 12)
        os.kill(t.program.pid, signal.SIGWINCH)
        t.see(r"(?m)^p m i z a n d sort.*filter")
        assert len(t.text().splitlines()) == 12
        t.type("q")
        assert t.end() == 0
        assert t.modes() == t.before, "the terminal is as it was"
        assert t.raw.rstrip().endswith((b"\x1b[?1049l\x1b[?25h", b"\x1b[?25h\x1b[?1049l", b"\x1b[?25h"))
        assert b"\x1b[?1049l" in t.raw


@linux_only
@needs_ksm
@pytest.mark.parametrize(("way", "code"), [("ctrl-c", 0), ("SIGTERM", 143), ("gone", None)])
def test_it_ends_and_leaves_the_terminal_as_it_was(way: str, code: int | None) -> None:
    with terminal("-d", "300ms") as t:
        t.see(r"own CPU \d")
        if way == "ctrl-c":
            t.type("\x03")
        elif way == "SIGTERM":
            t.program.terminate()
        else:
            os.close(t.master)
            t.program.wait(10)
            return
        assert t.end() == code
        assert t.modes() == t.before and b"\x1b[?1049l" in t.raw


@linux_only
@needs_ksm
def test_without_colour() -> None:
    with terminal("-d", "300ms") as coloured, terminal("-d", "300ms", NO_COLOR="1") as plain:
        for t in (coloured, plain):
            t.see(r"own CPU \d")
    colours = re.compile(rb"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7]|38;)")
    assert colours.search(coloured.raw) and not colours.search(plain.raw)
    with terminal("-d", "300ms", TERM="dumb") as t:
        assert t.end() == 0
        assert b"\x1b" not in t.raw and b"ksm top" in t.raw


# ---- poorer places ----------------------------------------------------------------------------------------------

LOOK = """
import json, os, sys
from ksm.linux import Host
from ksm.observe import Observer, observe
from ksm.advise import advise
import ksm.cli.top
if sys.argv[1:] == ["nobody"]:
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
o = observe(Host(), 0.05, deep=True)
s = o.sample
print(json.dumps([s.processes_total, s.processes_unreadable, s.ksmd_cpu_seconds, [p.pid for p in s.processes],
                  [f.rule for f in advise(o)]]))
"""


def inside(*wrapper: str, user: str = "root") -> list[object]:
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", LOOK, user], cwd="/", env=environment(), capture_output=True, text=True
    )
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(f"no namespaces here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found: list[object] = json.loads(done.stdout)
    return found


@needs_root
def test_in_a_container() -> None:
    total, unreadable, cpu, _, rules = inside("unshare", "--fork", "--pid", "--mount-proc")
    assert isinstance(total, int) and total < 5 and unreadable == 0 and cpu is None
    assert isinstance(rules, list) and "hidden" in rules


@needs_root
def test_with_hidepid() -> None:
    script = 'mount -t proc -o hidepid=2 proc /proc && exec "$@"'  # a new one: remounting would change the host's
    total, unreadable, cpu, _, rules = inside("unshare", "-m", "sh", "-c", script, "sh", user="nobody")
    assert isinstance(total, int) and total < 5 and unreadable in (0, 1) and cpu is None
    assert isinstance(rules, list) and "hidden" in rules


@needs_root
def test_of_other_users() -> None:
    total, unreadable, cpu, _, rules = inside("env", user="nobody")
    assert isinstance(total, int) and isinstance(unreadable, int) and 0 < unreadable <= total and cpu is not None
    assert isinstance(rules, list) and "hidden" in rules


@needs_root
def test_with_a_sysfs_that_cannot_be_written() -> None:
    script = 'mount -o bind /sys /sys && mount -o remount,bind,ro /sys && exec "$@"'
    total, *_ = inside("unshare", "-m", "sh", "-c", script, "sh")
    assert isinstance(total, int) and total > 5


@linux_only
@needs_ksm
def test_memory_that_is_not_told() -> None:
    assert "of RAM" not in "\n".join(shown(made(memory=Memory())))
    assert ksm.Stats().saved_bytes == 0

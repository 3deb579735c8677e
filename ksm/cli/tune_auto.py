"""`ksm tune auto`: the long-running tuner as a command, with its log, its signals and its farewell."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import click

from ksm.cli.common import clock, duration
from ksm.cost import CostModel
from ksm.linux import Host
from ksm.policies import Policy, Pressure, Target, parse_conf
from ksm.tuner import LOCK_PATH, Step, Tuner

CONF = "/etc/ksmtuned.conf"


def _optional_duration(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    return None if value is None else duration(ctx, param, value)


@click.command(name="auto")
@click.option(
    "--policy",
    type=click.Choice(["pressure", "target"]),
    default="pressure",
    show_default=True,
    help="What decides: how short memory is, or a time to settle and a CPU budget.",
)
@click.option("--config", metavar="FILE", help=f"Settings of pressure.  [default: {CONF}, if it is there]")
@click.option("--settle", default="10m", callback=duration, show_default=True, help="Of target: merged within this.")
@click.option("--cpu", type=float, default=20.0, show_default=True, help="Of target: at most so many percent of a CPU.")
@click.option("--interval", callback=_optional_duration, help="Between two decisions.  [default: the policy's]")
@click.option("--for", "seconds", callback=_optional_duration, help="Stop after this time.  [default: never]")
@click.option("-n", "--dry-run", is_flag=True, help="Decide and tell, and write nothing.")
@click.option("-v", "--verbose", is_flag=True, help="Tell every decision, not only changes.")
@click.option("--log", "log_file", metavar="FILE", help="Append what is told to FILE, too.  [default: the LOGFILE set]")
@click.option("--json", "as_json", is_flag=True, help="Print every decision as a line of JSON.")
def command(
    policy: str,
    config: str | None,
    settle: float,
    cpu: float,
    interval: float | None,
    seconds: float | None,
    dry_run: bool,
    verbose: bool,
    log_file: str | None,
    as_json: bool,
) -> None:
    """Adjust the tunables as long as it runs, and put them back at the end.

    It ends by SIGTERM, SIGINT or SIGHUP, with exit code 0; SIGUSR1 asks for a decision now. A second one is
    refused. run is never set to 2: what is merged stays merged.
    """
    settings = _settings(config) if policy == "pressure" else {}
    chosen: Policy = Pressure.of(settings) if policy == "pressure" else Target(settle, cpu, cost=CostModel.of_host())
    if interval is not None:
        chosen.interval = interval
    journal = Journal(
        as_json, verbose or settings.get("DEBUG", "0") not in ("", "0"), log_file or settings.get("LOGFILE") or None
    )
    tuner = Tuner(Host(), chosen, journal.step, dry_run, LOCK_PATH)
    before = time.process_time()
    with _signals(tuner):
        with tuner:
            journal.say(f"{'dry run of ' if dry_run else ''}policy {policy}, a decision every {clock(chosen.interval)}")
            start = time.monotonic()
            tuner.run(seconds)
            gone = time.monotonic() - start
        spent = time.process_time() - before
        journal.say(
            f"stopped after {clock(gone)} and {tuner.steps:,} decisions, which took {spent:.2f} s of CPU time; "
            f"{'nothing was written' if dry_run else 'the tunables are put back'}"
        )


def _settings(config: str | None) -> dict[str, str]:
    path = Path(config or CONF)
    try:
        return parse_conf(path.read_text("utf-8"))
    except FileNotFoundError:
        if config is None:
            return {}
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@contextlib.contextmanager
def _signals(tuner: Tuner) -> Iterator[None]:
    """Signals end the tuner, or wake it; while the tunables are put back they wait."""
    handlers: dict[int, Callable[[], None]] = {
        signal.SIGTERM: tuner.stop,
        signal.SIGINT: tuner.stop,
        signal.SIGHUP: tuner.stop,
        signal.SIGUSR1: tuner.wake,
    }
    old = {number: signal.signal(number, lambda number, frame: handlers[number]()) for number in handlers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Journal:
    """What a tuner tells: to stdout, and to a file that is opened for each line, so that it can be rotated.

    A full disk is told once, on stderr, and does not end the tuner.

    >>> Journal(as_json=False, verbose=False, path=None).step(Step(seconds=5.0, note="nothing to do"))
    5 s: nothing to do
    """

    def __init__(self, as_json: bool, verbose: bool, path: str | None) -> None:
        self._json = as_json
        self._verbose = verbose
        self._path = path
        self._last_note = ""
        self._complained: set[str] = set()

    def say(self, text: str) -> None:
        """A line of words; not among lines of JSON.

        >>> Journal(as_json=False, verbose=False, path=None).say("stopped")
        stopped
        """
        if not self._json:
            self._put(text)
        else:
            self._append(text)

    def step(self, step: Step) -> None:
        """One decision, if there is something to tell."""
        text = _sentence(step)
        news = bool(step.changed) or step.note != self._last_note
        self._last_note = step.note
        if self._json:
            self._guard("stdout", lambda: _line(sys.stdout, json.dumps(step.to_dict())))
            if news or self._verbose:
                self._append(text)
        elif news or self._verbose:
            self._put(text)

    def _put(self, text: str) -> None:
        self._guard("stdout", lambda: _line(sys.stdout, text))
        self._append(text)

    def _append(self, text: str) -> None:
        path = self._path
        if path is not None:
            self._guard(path, lambda: _append_line(path, f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}"))

    def _guard(self, where: str, write: Callable[[], None]) -> None:
        try:
            write()
            self._complained.discard(where)
        except BrokenPipeError:
            raise  # nobody reads: the end
        except OSError as error:
            if where not in self._complained:
                self._complained.add(where)
                with contextlib.suppress(OSError):
                    _line(sys.stderr, f"ksm: writing {where}: {error.strerror}; the tuner goes on without it")


def _sentence(step: Step) -> str:
    parts = []
    if step.changed:
        parts.append("set " + " ".join(f"{name}={value}" for name, value in step.changed.items()))
    if step.decision is not None:
        parts.append(step.decision.why)
    if step.note:
        parts.append(step.note)
    return f"{clock(round(step.seconds, 1))}: {'; '.join(parts)}"


def _line(file: TextIO, text: str) -> None:
    """A line at once, or none of it: what a full disk did not take must not be tried again at exit."""
    file.flush()
    data = (text + "\n").encode("utf-8", "backslashreplace")
    try:
        descriptor = file.fileno()
    except (OSError, ValueError):  # no real file, as in a test
        file.write(text + "\n")
        return
    while data:
        data = data[os.write(descriptor, data) :]


def _append_line(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        data = (text + "\n").encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(descriptor, data) :]
    finally:
        os.close(descriptor)

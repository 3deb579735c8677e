"""`ksm top`: KSM on this host, live: counters, rates, ksmd, and what each process wins or loses."""

from __future__ import annotations

import contextlib
import sys
import time

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from ksm.cli.common import duration, out, print_json
from ksm.cli.keys import Keys
from ksm.cli.screen import SORTS, Frame, History, View, lines
from ksm.linux import Host
from ksm.observe import Observation, Observer, Sample, observe
from ksm.passes import PassClock, Progress
from ksm.saved import to_dict

_BY_NAME = {name: key for key, (name, _) in SORTS.items()}


@click.command()
@click.option("--interval", "-d", default="2s", callback=duration, show_default=True, help="Between two looks.")
@click.option("--sort", type=click.Choice(sorted(_BY_NAME)), default="profit", show_default=True, help="The order.")
@click.option("--reverse", is_flag=True, help="The other way round.")
@click.option("--filter", "wanted", default="", metavar="TEXT", help="Only processes with TEXT in name or pid.")
@click.option("--losers", is_flag=True, help="Only processes that cost more than they save.")
@click.option("--once", is_flag=True, help="Look for one interval, print, end; so too when stdout is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="Look for one interval, print JSON that `ksm advise` reads.")
def command(interval: float, sort: str, reverse: bool, wanted: str, losers: bool, once: bool, as_json: bool) -> None:
    """KSM on this host, live; keys sort, filter, pause and quit (h shows them).

    As root it sees every process; else those of its own user. It changes nothing.
    """
    host = Host()
    view = View(sort=_BY_NAME[sort], reverse=reverse, filter=wanted, losers_only=losers, interval=interval)
    if as_json:
        print_json(to_dict(observe(host, interval, deep=True)))
        return
    console = out()
    view.ascii = not (console.encoding or "").lower().startswith("utf")
    if once or not sys.stdout.isatty() or console.is_dumb_terminal:
        _print_once(console, host, view)
    else:
        with contextlib.suppress(EOFError, KeyboardInterrupt):  # Ctrl-C is a way to quit
            _Live(console, host, view).run()


def _print_once(console: Console, host: Host, view: View) -> None:
    o = observe(host, view.interval)
    frame = Frame(o=o, progress=PassClock().update(o), history=History(), view=view)
    for line in lines(frame, console.width, None):
        line.rstrip()
        console.print(line, soft_wrap=True)


class _Live:
    """The live screen: looks, waits for keys, draws."""

    def __init__(self, console: Console, host: Host, view: View) -> None:
        self.console = console
        self.view = view
        self.observer = Observer(host)
        self.passes = PassClock()
        self.history = History()
        self.sample: Sample = self.observer.look()
        self.o = Observation(sample=self.sample)
        self.progress: Progress = self.passes.update(self.o)
        self.own_share: float | None = None
        self._used = (time.monotonic(), time.process_time())

    def run(self) -> None:
        """Until the viewer quits."""
        with Keys() as keys, Live(console=self.console, screen=True, auto_refresh=False) as live:
            started = self.sample.clock
            next_look = started + min(0.5, self.view.interval)  # a first look at the rates comes soon
            self._draw(live)
            while not self.view.done:
                interval = self.view.interval
                pressed = [self.view.press(key) for key in keys.wait(next_look - time.monotonic())]
                if self.view.interval < interval:
                    next_look = min(next_look, time.monotonic() + self.view.interval)
                looked = False
                if time.monotonic() >= next_look:
                    next_look = time.monotonic() + self.view.interval
                    looked = not self.view.paused
                    if looked:
                        self._look()
                if looked or any(pressed):
                    self._draw(live)

    def _look(self) -> None:
        before, self.sample = self.sample, self.observer.look()
        self.o = Observation.between(before, self.sample)
        self.progress = self.passes.update(self.o)
        self.history.add(self.o)
        now = (time.monotonic(), time.process_time())
        self.own_share = (now[1] - self._used[1]) / max(1e-9, now[0] - self._used[0])
        self._used = now

    def _draw(self, live: Live) -> None:
        width, height = self.console.size
        frame = Frame(o=self.o, progress=self.progress, history=self.history, view=self.view, own_share=self.own_share)
        live.update(Text("\n").join(lines(frame, width, height)), refresh=True)

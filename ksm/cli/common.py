"""What the commands share: option types, how numbers are shown, consoles and progress."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from ksm.units import binary as binary
from ksm.units import clock as clock

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def duration(ctx: click.Context | None, param: click.Parameter | None, value: str) -> float:
    """Seconds, from 90, 90s, 10m, 1h30m or 250ms: the callback of an option.

    >>> duration(None, None, "1h30m")
    5400.0
    """
    text = value.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = float(text)
    elif re.fullmatch(r"(\d+(\.\d+)?(ms|s|m|h|d))+", text):
        seconds = sum(float(n) * _UNITS[unit] for n, _, unit in re.findall(r"(\d+(\.\d+)?)(ms|s|m|h|d)", text))
    else:
        raise click.BadParameter(f"{value!r} is not a duration, such as 90s, 10m or 1h30m", ctx, param)
    if not 0 < seconds <= 1e9:
        raise click.BadParameter(f"{value!r} is not between 0 and 1e9 seconds", ctx, param)
    return seconds


def duration_or_none(ctx: click.Context | None, param: click.Parameter | None, value: str | None) -> float | None:
    """The same for an option that may be left out.

    >>> duration_or_none(None, None, None) is None
    True
    """
    return None if value is None else duration(ctx, param, value)


def numbers(ctx: click.Context | None, param: click.Parameter | None, value: str | None) -> list[int] | None:
    """Small numbers from "0,1,0": the callback of an option.

    >>> numbers(None, None, "0,1,0")
    [0, 1, 0]
    """
    if value is None:
        return None
    if not re.fullmatch(r"\d{1,3}(,\d{1,3})*", value, re.ASCII):
        raise click.BadParameter(f"{value!r} is not a list of node numbers, such as 0,1,0", ctx, param)
    return [int(part) for part in value.split(",")]


def decorated(function: F, options: Sequence[Callable[[F], F]]) -> F:
    """The function with several options, in their order.

    >>> callable(decorated(lambda: None, ()))
    True
    """
    for decorate in reversed(options):
        function = decorate(function)
    return function


def read_options(function: F) -> F:
    """The options that say how sources are read.

    >>> callable(read_options(lambda: None))
    True
    """
    return decorated(
        function,
        (
            click.option(
                "--zeros",
                type=click.Choice(["merge", "absent"]),
                default="merge",
                show_default=True,
                help="What all-zero pages of a dump are: pages that merge, or memory never touched.",
            ),
            click.option(
                "--nodes", callback=numbers, metavar="N,N,...", help="The NUMA node of each source.  [default: 0]"
            ),
            click.option("--marked-only", is_flag=True, help="Of processes, only what is marked mergeable now."),
            click.option("--page-size", type=int, default=None, help="Of raw images.  [default: 4096]"),
            click.option("--threads", type=click.IntRange(1), default=None, help="That hash.  [default: all CPUs]"),
        ),
    )


def source_arguments(function: F) -> F:
    """SOURCE..., and what says how they are read and merged.

    >>> callable(source_arguments(lambda: None))
    True
    """
    return decorated(
        function,
        (
            click.argument("sources", nargs=-1, required=True, metavar="SOURCE..."),
            click.option("--max-page-sharing", type=int, default=256, show_default=True, help="The tunable."),
            click.option("--use-zero-pages", is_flag=True, help="The tunable: all-zero pages go to the zero page."),
            click.option("--merge-across-nodes/--no-merge-across-nodes", default=True, help="The tunable."),
            read_options,
        ),
    )


class _Console(Console):
    """A console that leaves a broken pipe to the command line; rich's own ends the program with exit code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def out() -> Console:
    """Where answers for people go; never narrower than a table needs when it is no terminal.

    >>> out().file is sys.stdout
    True
    """
    console = _Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    return console


def print_json(answer: Any) -> None:
    """An answer for programs.

    >>> print_json({"pages": 1})
    {
      "pages": 1
    }
    """
    sys.stdout.write(json.dumps(answer, indent=2) + "\n")


@contextlib.contextmanager
def progress(what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, for terminals only; yields the function to call with (done, in all).

    >>> with progress("reading", quiet=True) as show:
    ...     show(1, 2)
    """
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def write_whole(output: str, write: Callable[[str], object]) -> None:
    """All of a file or nothing: `write` is given a path beside it, which is then put in its place.

    Raises:
        OSError: it cannot be written; it is what it was before.

    >>> write_whole("answer.txt", lambda path: Path(path).write_text("42"))
    >>> Path("answer.txt").read_text()
    '42'
    """
    path = Path(output)
    try:
        handle, beside = tempfile.mkstemp(suffix=path.suffix.lower(), prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            write(beside)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(beside, 0o666 & ~umask)
            os.replace(beside, output)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, output) from error  # not the name of the file beside it, or none

"""The `ksm` command: picks a subcommand, and turns every error into one line and an exit code."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType, MappingProxyType
from typing import NoReturn

import click
from click.shell_completion import shell_complete

from ksm.cli.lazy import LazyGroup
from ksm.errors import KsmError

# name of the command and its module -> what the list of commands says about it
_COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "advise": "What KSM is doing on this host, and what to do about it.",
        "calibrate": "Measure what ksmd's work costs on this host, for simulate.",
        "completion": "Print the script that lets a shell complete this command.",
        "demo": "Show it at work on eight live processes, beside the kernel's own counters.",
        "estimate": "What KSM would save on these images or processes.",
        "export": "KSM as Prometheus metrics over HTTP.",
        "man": "Write the manual pages of all commands.",
        "fingerprint": "Write the files of VMs that `ksm fleet` works on.",
        "fleet": "Sharing across thousands of VMs.",
        "record": "Record what memory holds over time, to replay it under any tunables.",
        "formats": "The memory images and other sources that are understood.",
        "info": "What a memory image is, and what is in it.",
        "plan": "How many VMs fit on a host, from samples of their memory.",
        "report": "A plan as a page with charts and what-if controls, in one file.",
        "run": "Run a program with its memory opted in to KSM.",
        "simulate": "How KSM gets there: its counters over time.",
        "sweep": "Which tunables bring the saving how soon, and at what cost.",
        "top": "KSM on this host, live: counters, rates, ksmd, processes.",
        "tune": "Show, set and reset the tunables.",
    }
)

COMPLETE_VAR = "_KSM_COMPLETE"  # what the shells' completion scripts set

EX_USAGE = 2
EX_NOINPUT = 66
EX_SOFTWARE = 70
EX_OSERR = 71
EX_IOERR = 74
EX_NOPERM = 77
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 141  # as a program that SIGPIPE ended
TERMINATED = 128 + signal.SIGTERM


def version() -> str:
    """The version that is installed, or that none is.

    >>> bool(version())
    True
    """
    try:
        return importlib.metadata.version("ksm")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"ksm {version()}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    package="ksm.cli",
    texts=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def cli() -> None:
    """Linux Kernel Samepage Merging, exactly: estimate it, simulate it, compare it with the kernel.

    A SOURCE is a memory image (`ksm formats` lists which), pid:123, self, or qemu:NAME.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code.

    >>> main(["estimate", "/nonexistent"])
    65
    """
    try:
        previous = signal.signal(signal.SIGTERM, _terminate)
    except ValueError:  # not in the main thread
        previous = None
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _abandon_stdout()
        return BROKEN_PIPE
    except OSError as error:
        return _fail(f"writing the output: {error.strerror or error}", EX_IOERR)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        if COMPLETE_VAR in os.environ:
            return shell_complete(cli, {}, "ksm", COMPLETE_VAR, os.environ[COMPLETE_VAR])
        given = list(sys.argv[1:] if arguments is None else arguments)
        with cli.make_context("ksm", given) as context:  # not cli.main(), which has its own way with a broken pipe
            cli.invoke(context)
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        raise
    except KsmError as error:
        return _fail(_message(error), error.exit_code)
    except OSError as error:
        return _fail(_message(error), _os_exit_code(error))
    except MemoryError as error:
        return _fail(f"out of memory{f': {error}' if str(error) else ''}", EX_OSERR)
    except ValueError as error:
        return _fail(str(error), EX_USAGE)
    except Exception as error:
        if os.environ.get("KSM_TRACEBACK"):
            raise
        return _fail(f"internal error: {type(error).__name__}: {error} (KSM_TRACEBACK=1 shows where)", EX_SOFTWARE)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _os_exit_code(error: OSError) -> int:
    if isinstance(error, PermissionError):
        return EX_NOPERM
    return EX_NOINPUT if isinstance(error, FileNotFoundError) else EX_IOERR


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"ksm: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds like Ctrl-C does, so that the kernel's tunables are put back and workers end."""
    raise SystemExit(TERMINATED)


def _abandon_stdout() -> None:
    """Nobody reads it any more: keep the interpreter from complaining when it flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)

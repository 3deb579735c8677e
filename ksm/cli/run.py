"""`ksm run`: a program with all of its memory opted in to KSM, and what that saved."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys

import click

from ksm import optin
from ksm.linux import Host
from ksm.units import binary, clock, many

NOT_FOUND = 127
NOT_EXECUTABLE = 126


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--stats", is_flag=True, help="At the end say on stderr what was saved.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON, on stderr.")
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] PROGRAM [ARGS]...")
@click.pass_context
def command(ctx: click.Context, program: tuple[str, ...], stats: bool, as_json: bool) -> None:
    """Run PROGRAM with all of its memory, and its children's, opted in to KSM.

    That is prctl(PR_SET_MEMORY_MERGE), of Linux 6.4, and kept when a program is executed since 6.7. It needs no root;
    but ksmd must be running, as after `ksm tune set run=1`.

    Without --stats this process becomes the program. With it signals are passed on, and the exit code is the
    program's; if a signal ended that, it ends this too. 127 is a program that was not found, 126 one that cannot be
    executed.
    """
    optin.require_opt_in()
    sys.stdout.flush()
    try:
        if not (stats or as_json):
            optin.execute(program)
        outcome = optin.run(program, Host())
    except OSError as error:
        click.echo(f"ksm: {program[0]}: {error.strerror}", err=True)
        ctx.exit(NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE)
    if as_json:
        click.echo(json.dumps(outcome.to_dict()), err=True)
    else:
        for line in sentences(outcome):
            click.echo(f"ksm: {line}", err=True)
    if outcome.exit_code < 0:
        _end_by(-outcome.exit_code)
    ctx.exit(outcome.exit_code)


def sentences(outcome: optin.Outcome) -> list[str]:
    """What was saved, in words.

    >>> best = optin.Saving(seconds=8.0, processes=2, merging_pages=500, rmap_items=1000, profit=1984000)
    >>> sentences(optin.Outcome(optin.Saving(seconds=0.0), best, best, 2, 9.0))[0]
    'at best, after 8 s, 500 pages merged in 2 processes, 0 more with the zero page: profit 1.9 MiB'
    """
    best, last = outcome.best, outcome.last
    if not best.processes:
        return [f"it ended after {clock(outcome.seconds)}, before anything could be seen"]
    lines = [
        f"at best, after {clock(round(best.seconds, 1))}, {many(best.merging_pages, 'page')} merged in "
        f"{many(best.processes, 'process', 'processes')}, {best.zero_pages:,} more with the zero page: "
        f"profit {binary(best.profit)}",
        f"last seen {clock(round(max(0.0, outcome.seconds - last.seconds), 1))} before its end: "
        f"{last.merging_pages:,} merged of {last.rmap_items:,} that KSM tracks, profit {binary(last.profit)}; "
        f"the whole host saves {binary(last.host_saved)}, before it {binary(outcome.before.host_saved)}",
    ]
    if not outcome.scanning:
        lines.append("ksmd is not running: nothing merges before `ksm tune set run=1`")
    return lines


def _end_by(number: int) -> None:
    """End as the program did, so that whoever waits for this sees the same; without a second core dump."""
    sys.stdout.flush()
    sys.stderr.flush()
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)

"""`ksm tune`: the host's tunables, shown, set after a check, reset, and looked after by a tuner."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import click
from rich.table import Table

from ksm.cli import tune_auto
from ksm.cli.common import out, print_json
from ksm.linux import Host
from ksm.sysfs import ATTRIBUTES
from ksm.tune import (
    Change,
    apply,
    default_of,
    defaults,
    plan_changes,
    range_of,
    require_rights,
    tunables,
    value_of,
    warnings,
)

_LOCK_SECONDS = 10.0
_WIDE = 110  # columns that the table takes


@click.group(name="tune")
def command() -> None:
    """The tunables of this host's KSM, the files of /sys/kernel/mm/ksm that can be written."""


command.add_command(tune_auto.command)


@command.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def show(names: tuple[str, ...], as_json: bool) -> None:
    """Each tunable's value, default, range and meaning, and the kernel that brought it.

    A value that is not the default is marked with *.
    """
    ksm = Host().ksm
    ordinary = defaults(ksm, names)
    rows = [
        {
            "name": attribute.name,
            "value": value_of(ksm, attribute.name),
            "default": ordinary[attribute.name],
            "range": range_of(attribute),
            "since": attribute.since,
            "help": attribute.help,
        }
        for attribute in tunables(ksm)
        if attribute.name in ordinary
    ]
    if as_json:
        print_json(rows)
        return
    console = out()
    if console.width < _WIDE:
        for row in rows:
            console.print(
                f"{row['name']:34} {_marked(row):>11}  default {row['default']}, {row['range']}, since {row['since']}\n"
                f"    {row['help']}",
                soft_wrap=True,
            )
        return
    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("tunable", no_wrap=True)
    for heading in ("value", "default"):
        result.add_column(heading, justify="right", no_wrap=True)
    for heading in ("range", "since", "meaning"):
        result.add_column(heading)
    for row in rows:
        result.add_row(row["name"], _marked(row), row["default"], row["range"], row["since"], row["help"])
    console.print(result)


def _marked(row: Mapping[str, str]) -> str:
    """Its value, with a star or a space."""
    return row["value"] + ("*" if row["value"] != row["default"] else " ")


@command.command(name="set")
@click.argument("settings", nargs=-1, required=True, metavar="NAME=VALUE...")
@click.option("-n", "--dry-run", is_flag=True, help="Check and show, and write nothing.")
@click.option("--force", is_flag=True, help="Unmerge (run=2) even if the memory for it seems to be missing.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def set_(settings: tuple[str, ...], dry_run: bool, force: bool, as_json: bool) -> None:
    """Set tunables: all that is given, or, if the kernel would refuse any of it, nothing.

    What the kernel would answer is worked out first. Stopping ksmd or unmerging (run=0, run=2) is done before the
    rest, starting it (run=1) after it.
    """
    wanted = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (name and equals and value.strip()):
            raise click.UsageError(f"{setting!r} is not NAME=VALUE")
        if name in wanted:
            raise click.UsageError(f"{name} is given twice")
        wanted[name] = value
    _change(wanted, dry_run, force, as_json)


@command.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("-n", "--dry-run", is_flag=True, help="Check and show, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def reset(names: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Give the tunables named, or all of them, the kernel's defaults.

    That includes run, whose default is 0: ksmd stops, and what is merged stays merged.
    """
    _change(defaults(Host().ksm, names), dry_run, False, as_json)


def _change(wanted: Mapping[str, str], dry_run: bool, force: bool, as_json: bool) -> None:
    host = Host()
    changes = _plan(host, wanted, force)
    notes = warnings(host.ksm, changes)
    if not dry_run:
        require_rights(host, wanted)
        with host.lock(_LOCK_SECONDS):  # or a program that steps ksmd would put its own saved values back
            changes = apply(host.ksm, _plan(host, wanted, force))
    if as_json:
        print_json({"dry_run": dry_run, "changes": [c.to_dict() for c in changes], "warnings": notes})
        return
    console = out()
    console.print(change_table(changes))
    for note in (*notes, *(["Nothing was written."] if dry_run else [])):
        console.print(note, soft_wrap=True)


def _plan(host: Host, wanted: Mapping[str, str], force: bool) -> list[Change]:
    return plan_changes(host.ksm, wanted, None if force else host.mem_available, f"Linux {os.uname().release}")


def change_table(changes: Sequence[Change]) -> Table:
    """Before and after, with what the kernel changed by itself marked.

    >>> change_table([Change("run", "0", "1")]).row_count
    1
    """
    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("tunable")
    for heading in ("before", "after"):
        result.add_column(heading, justify="right")
    result.add_column("")
    for change in changes:
        remark = "follows" if change.follows else "" if change.changed else "as it was"
        mark = "(default)" if change.after == default_of(ATTRIBUTES[change.name]) else ""
        result.add_row(change.name, change.before, change.after, f"{remark} {mark}".strip())
    return result

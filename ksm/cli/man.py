"""`ksm man`: a manual page for each command, from what --help shows."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import click

from ksm.cli import cli, version
from ksm.errors import UnsupportedError


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def command(directory: Path) -> None:
    """Write the manual pages of ksm and all its commands into DIRECTORY, such as ~/.local/share/man/man1.

    They say what --help says. SOURCE_DATE_EPOCH is respected.
    """
    try:
        from click_man.core import write_man_pages  # type: ignore[import-untyped]
    except ImportError:
        raise UnsupportedError("manual pages are made with click-man: pip install 'ksm[man]'") from None
    directory.mkdir(parents=True, exist_ok=True)
    pages = described(cli, click.Context(cli))
    write_man_pages("ksm", pages, version=version(), target_dir=str(directory))


def described(command: click.Command, context: click.Context) -> click.Command:
    """A copy of a command whose subcommands are all there, each with the first sentence of its help as its name's line.

    >>> described(cli, click.Context(cli)).commands["tune"].commands["set"].short_help
    'Set tunables: all that is given, or, if the kernel would refuse any of it, nothing.'
    """
    result = copy.copy(command)
    if isinstance(command, click.Group):
        inner = {name: command.get_command(context, name) for name in command.list_commands(context)}
        result = click.Group(
            command.name,
            {name: described(one, context) for name, one in inner.items() if one is not None},
            params=command.params,
            help=command.help,
            context_settings=command.context_settings,
        )
    result.help = inspect.cleandoc(command.help or "").replace("\b\n", "")
    result.short_help = result.help.split("\n\n")[0].replace("\n", " ")
    return result

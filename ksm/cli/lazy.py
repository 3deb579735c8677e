"""A group of commands that are imported when they are run: `ksm --help` needs none of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import click
from click.shell_completion import CompletionItem


class LazyGroup(click.Group):
    """Commands by name: each is the `command` of the module of that name in a package."""

    def __init__(self, *args: object, package: str, texts: Mapping[str, str], **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.package, self.texts = package, texts

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.texts)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.texts:
            return None
        command: click.Command = importlib.import_module(f"{self.package}.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(self.texts.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(name, help=self.texts[name]) for name in self.list_commands(ctx)]
        found = [item for item in found if str(item.value).startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

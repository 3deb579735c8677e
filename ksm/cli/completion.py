"""`ksm completion`: the script that lets a shell complete this command; click's own."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ksm.cli import COMPLETE_VAR, cli
from ksm.errors import UnsupportedError


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the script with which SHELL completes commands and options of ksm.

    bash: eval "$(ksm completion bash)" in ~/.bashrc. zsh: the same with zsh in ~/.zshrc, after compinit. fish: ksm
    completion fish > ~/.config/fish/completions/ksm.fish.
    """
    found = get_completion_class(shell)
    if found is None:
        raise UnsupportedError(f"this version of click knows no completion for {shell}")
    try:
        text = found(cli, {}, "ksm", COMPLETE_VAR).source()
    except RuntimeError as error:  # it asks bash for its version
        raise UnsupportedError(str(error)) from None
    click.echo(text)

"""What is made from the commands' own descriptions: completion scripts and manual pages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import click
import pytest

import ksm
import ksm.cli
from ksm.cli import cli

MAIN = "import sys; from ksm.cli import main; sys.exit(main())"


def commands(group: click.Group, path: tuple[str, ...] = ("ksm",)) -> dict[tuple[str, ...], click.Command]:
    found: dict[tuple[str, ...], click.Command] = {path: group}
    context = click.Context(group)
    for name in group.list_commands(context):
        one = group.get_command(context, name)
        assert one is not None
        found |= commands(one, (*path, name)) if isinstance(one, click.Group) else {(*path, name): one}
    return found


@pytest.fixture
def program(tmp_path: Path) -> dict[str, str]:
    """An environment in which `ksm` is a command."""
    script = tmp_path / "bin" / "ksm"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom ksm.cli import main\nsys.exit(main())\n")
    script.chmod(0o755)
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(Path(ksm.__file__).parents[1]), "HOME": str(tmp_path)}


def output(arguments: list[str], environment: dict[str, str], text: str = "") -> str:
    done = subprocess.run(arguments, env=environment, input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- completion ------------------------------------------------------------------------------------------------

BASH = """
eval "$(ksm completion bash)"
try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _ksm_completion ksm; echo "${COMPREPLY[*]}"; }
try ksm tu
try ksm tune s
try ksm tune auto --pol
try ksm tune auto --policy t
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes(program: dict[str, str]) -> None:
    assert output(["bash", "--norc"], program, BASH).splitlines() == ["tune", "set show", "--policy", "target"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
def test_fish_completes(program: dict[str, str]) -> None:
    script = "ksm completion fish | source; complete -C 'ksm tu'; complete -C 'ksm tune s'"
    lines = output(["fish", "--no-config", "-c", script], program).splitlines()
    assert [line.split("\t")[0] for line in lines] == ["tune", "set", "show"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_takes_the_script(program: dict[str, str]) -> None:
    script = 'autoload -Uz compinit; compinit -u; eval "$(ksm completion zsh)"; print ${_comps[ksm]}'
    assert output(["zsh", "-f", "-c", script], program).strip() == "_ksm_completion"
    answers = output(
        [sys.executable, "-c", MAIN],
        program | {"_KSM_COMPLETE": "zsh_complete", "COMP_WORDS": "ksm tune s", "COMP_CWORD": "2"},
    )
    assert answers.splitlines()[:2] == ["plain", "set"]


def test_completing_imports_no_command(program: dict[str, str]) -> None:
    script = MAIN.replace(
        "sys.exit(main())",
        "main(); print([m for m in sys.modules if m.startswith('ksm.cli.') and m != 'ksm.cli.lazy'])",
    )
    environment = program | {"_KSM_COMPLETE": "bash_complete", "COMP_WORDS": "ksm ", "COMP_CWORD": "1"}
    lines = output([sys.executable, "-c", script], environment).splitlines()
    assert lines[-1] == "[]" and "plain,tune" in lines


def test_an_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert ksm.cli.main(["completion", "tcsh"]) == 2
    assert "'tcsh' is not one of" in capsys.readouterr().err


# ---- manual pages ------------------------------------------------------------------------------------------------


@pytest.fixture
def manual(tmp_path: Path) -> Path:
    assert ksm.cli.main(["man", str(tmp_path / "man1")]) == 0
    return tmp_path / "man1"


def test_every_command_has_its_page(manual: Path) -> None:
    expected = commands(cli)
    assert {path.name for path in manual.iterdir()} == {"-".join(path) + ".1" for path in expected}
    for path, command in expected.items():
        text = (manual / ("-".join(path) + ".1")).read_text().replace("\\-", "-")
        sentence = textwrap.dedent(command.help or "").split("\n\n")[0].replace("\n", " ").strip()
        assert f"{'-'.join(path)} - {sentence}\n" in text
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.opts[0] in text, (path, option)


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="no mandoc here")
def test_mandoc_reads_them(manual: Path) -> None:
    """Without a warning of its own, but for the paragraph that click-man puts after the heading COMMANDS."""
    pages = sorted(str(path) for path in manual.iterdir())
    done = subprocess.run(["mandoc", "-Tlint", "-W", "warning", *pages], capture_output=True, text=True)
    told = [line for line in done.stdout.splitlines() if "skipping paragraph macro: PP after SH" not in line]
    assert told == []
    shown = subprocess.run(["mandoc", "-Tutf8", str(manual / "ksm-tune-set.1")], capture_output=True, text=True).stdout
    assert "NAME=VALUE" in shown


def test_a_directory_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert ksm.cli.main(["man", str(tmp_path / "file")]) == 2
    assert ksm.cli.main(["man", str(tmp_path / "file" / "man1")]) != 0
    assert "Traceback" not in capsys.readouterr().err

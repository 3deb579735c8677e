"""`ksm fleet`: analyse and place thousands of VMs; what its commands share."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import click

from ksm.charts import need
from ksm.cli.common import write_whole
from ksm.cli.lazy import LazyGroup
from ksm.fleet import Tls, connect, local
from ksm.fleet.hosts import size

F = TypeVar("F", bound=Callable[..., Any])

FAILED = 65  # a source could not be read; what could be is there
PARTIAL = 3  # an answer, but not of everything that was given

_COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "analyze": "What KSM saves in the fleet as it stands, and what it could.",
        "place": "Which VMs should live together.",
    }
)


@click.group(cls=LazyGroup, package="ksm.cli.fleet", texts=_COMMANDS)
def command() -> None:
    """Sharing across thousands of VMs, from the files that `ksm fingerprint` writes."""


def byte_size(ctx: click.Context | None, param: click.Parameter | None, value: str | None) -> int | None:
    """Bytes, from 64G or 512M: the callback of an option.

    >>> byte_size(None, None, "2K")
    2048
    """
    try:
        return None if value is None else size(int(value) if value.isdigit() else value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def report_options(function: F) -> F:
    """Where the report page goes.

    >>> callable(report_options(lambda: None))
    True
    """
    page = click.option("--report", type=click.Path(dir_okay=False), metavar="PAGE.html", help="Write a page, too.")
    return page(click.option("--force", is_flag=True, help="Overwrite the page.")(function))


def check_report(path: str | None, force: bool) -> None:
    """Refuse a page that could not be written, before the work is done.

    Raises:
        click.UsageError: it is there, or is no page. UnsupportedError: what `ksm[report]` has is not installed.

    >>> check_report("fleet.pdf", False)
    Traceback (most recent call last):
    click.exceptions.UsageError: fleet.pdf: the report is a page (.html)
    """
    if path is None:
        return
    if Path(path).suffix.lower() != ".html":
        raise click.UsageError(f"{path}: the report is a page (.html)")
    if os.path.lexists(path) and not force:
        raise click.UsageError(f"{path} exists; --force overwrites it")
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    for module in ("altair", "jinja2", "vl_convert"):
        need(module)


def write_report(path: str, page: str) -> None:
    """Write a page, all of it or nothing.

    >>> write_report("page.html", "<p>")
    """
    write_whole(path, lambda beside: Path(beside).write_text(page, encoding="utf-8", newline="\n"))


def cluster_options(function: F) -> F:
    """Which Dask cluster does the work.

    >>> callable(cluster_options(lambda: None))
    True
    """
    for decorate in (
        click.option("--tls-key", type=click.Path(), help="For tls://, the key of --tls-cert."),
        click.option("--tls-cert", type=click.Path(), help="For tls://, this side's certificate."),
        click.option("--tls-ca", type=click.Path(), help="For tls://, the certificate of the CA."),
        click.option("--workers", type=click.IntRange(1), help="Processes of the local cluster.  [default: all CPUs]"),
        click.option("--scheduler", metavar="ADDRESS", help="A Dask scheduler that runs, tcp://HOST:PORT or tls://."),
    ):
        function = decorate(function)
    return function


@contextlib.contextmanager
def opened(options: Mapping[str, Any]) -> Iterator[Any]:
    """A client of the cluster that `cluster_options` ask for.

    >>> with opened({"scheduler": "127.0.0.1"}) as client:
    ...     pass
    Traceback (most recent call last):
    ValueError: '127.0.0.1' is not the address of a scheduler, such as tcp://10.0.0.1:8786
    """
    files = [options.get(name) for name in ("tls_ca", "tls_cert", "tls_key")]
    if any(files) and not all(files):
        raise click.UsageError("--tls-ca, --tls-cert and --tls-key go together")
    if options["scheduler"] is None:
        if any(files):
            raise click.UsageError("--tls-ca and the like need --scheduler tls://...")
        with local(options.get("workers")) as client:
            yield client
        return
    if options.get("workers"):
        raise click.UsageError("--workers is of the local cluster, and --scheduler names another")
    tls = Tls(*(str(path) for path in files)) if all(files) else None
    with connect(options["scheduler"], tls) as client:
        yield client

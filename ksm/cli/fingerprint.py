"""`ksm fingerprint`: the files of VMs that `ksm fleet` works on."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import click
from rich.table import Table

from ksm.cli.common import binary, out, print_json, progress
from ksm.cli.fleet import FAILED, byte_size, cluster_options, opened
from ksm.errors import KsmError, SchedulerLostError, SourceError, SyscallError, WorkersGoneError
from ksm.fleet import Vm, fingerprint_vm
from ksm.fleet.cluster import everywhere, first_done, result
from ksm.fleet.fingerprints import fingerprint_where
from ksm.keyed import Key


@dataclass
class _Outcome:
    """What was written, what was not and why, and what ended it early."""

    done: list[Vm] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    error: Exception | None = None


def _tags(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Mapping[str, str]:
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"{value!r} is not NAME=VALUE", ctx, param)
    return MappingProxyType(dict(value.split("=", 1) for value in values))


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="[NAME=]SOURCE...")
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False), metavar="DIR", help="Where to.")
@click.option("--class", "kind", default="", help="The VMs' class.")
@click.option("--host", default=None, help="The host that they run on.  [default: this one's name]")
@click.option("--node", type=click.IntRange(0), default=0, help="Its NUMA node that holds their memory.")
@click.option("--ram", callback=byte_size, default=None, help="That each was given, such as 4G.  [default: its pages]")
@click.option("--vcpus", type=click.IntRange(0), default=1, show_default=True, help="Of each.")
@click.option("--domain", default="", help="Security domain: only VMs of one may merge with each other.")
@click.option("--apart", default="", help="VMs of the same name here are kept on different hosts.")
@click.option("--pinned", is_flag=True, help="They stay where they are.")
@click.option("--tag", "tags", multiple=True, callback=_tags, metavar="NAME=VALUE", help="Anything, for other tools.")
@click.option("--key-file", type=click.Path(), help="Fingerprint under this secret: 32 random bytes or more.")
@click.option(
    "--zeros",
    type=click.Choice(["merge", "absent"]),
    default="merge",
    show_default=True,
    help="What all-zero pages of a dump are: pages that merge, or memory never touched.",
)
@click.option(
    "--lg-k", type=click.IntRange(5, 21), default=12, show_default=True, help="Sketches keep 2^this contents."
)
@click.option("--marked-only", is_flag=True, help="Of processes, only what is marked mergeable now.")
@click.option("--page-size", type=int, default=4096, show_default=True, help="Of raw images.")
@click.option("--threads", type=click.IntRange(1), default=None, help="That hash.  [default: all CPUs]")
@click.option("--force", is_flag=True, help="Replace files that are there.")
@cluster_options
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def command(sources: tuple[str, ...], output: str, as_json: bool, **options: Any) -> None:
    """Write the fingerprints and the sketch of VMs: NAME.pages.parquet and NAME.sketch.parquet in DIR.

    A SOURCE is what `ksm estimate` takes. With --scheduler, paths are those of the workers: whoever has the
    image reads it and writes DIR there.
    """
    how: dict[str, Any] = {name: options.pop(name) for name in ("lg_k", "marked_only", "threads", "force")}
    key_file = options.pop("key_file")
    how["key"] = Key.from_file(key_file) if key_file else None
    cluster = {name: options.pop(name) for name in ("scheduler", "workers", "tls_ca", "tls_cert", "tls_key")}
    host = options.pop("host")
    options["host"] = socket.gethostname() if host is None else host
    options["ram"] = options["ram"] or 0
    vms = [(source, Vm(name=name, **options)) for name, source in map(_named, sources)]
    if len({vm.name for _, vm in vms}) < len(vms):
        raise click.UsageError("two sources would have the same name: NAME=SOURCE gives others")
    if cluster["scheduler"]:
        if how["key"] and cluster["scheduler"].startswith("tcp://") and not _loopback(cluster["scheduler"]):
            raise click.UsageError("the key would travel to the workers for all to read: --key-file needs tls://")
        found = _on_workers(vms, output, how, cluster, as_json)
    else:
        found = _here(vms, output, how, as_json)
    if as_json:
        print_json({"vms": [vm.to_dict() for vm in found.done], "failed": found.failed})
    elif found.done:
        out().print(_table(found.done))
    for name, why in found.failed.items():
        click.echo(f"ksm: {name}: {why}", err=True)
    if found.error:
        raise found.error
    if found.failed:
        raise click.exceptions.Exit(FAILED)


def _loopback(scheduler: str) -> bool:
    return scheduler.removeprefix("tcp://").startswith(("127.", "localhost:", "[::1]"))


def _named(source: str) -> tuple[str, str]:
    name, equals, rest = source.partition("=")
    if equals and name and os.sep not in name and not os.path.exists(source):
        return name, rest
    return os.path.basename(source.rstrip(os.sep)) or source, source


def _here(vms: Sequence[tuple[str, Vm]], output: str, how: Mapping[str, Any], quiet: bool) -> _Outcome:
    found = _Outcome()
    for source, vm in vms:
        if found.error:
            found.failed[vm.name] = "not read"
            continue
        with progress(vm.name, quiet=quiet) as show:
            try:
                found.done.append(fingerprint_vm(source, output, vm, progress=show, **how))
            except (SourceError, SyscallError) as error:
                found.failed[vm.name] = str(error)
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    found.failed[vm.name] = f"{error.filename}: {error.strerror}"
                    continue
                found.error = error  # of the directory or its disk: the others would meet it too
    return found


def _on_workers(
    vms: Sequence[tuple[str, Vm]], output: str, how: Mapping[str, Any], cluster: Mapping[str, Any], quiet: bool
) -> _Outcome:
    found = _Outcome()
    with opened(cluster) as client, progress("fingerprinting", quiet=quiet) as show:
        seen = everywhere(client, _which, [source for source, _ in vms])
        running: dict[Any, tuple[str, Vm]] = {}
        needed = set()
        for source, vm in vms:
            having = tuple(place for place, there in seen.items() if source in there)
            if not having:
                found.failed[vm.name] = f"{source}: no worker has it"
                continue
            needed.add(having)
            arguments = (source, os.path.abspath(output), vm, dict(how))
            future = client.submit(fingerprint_where, *arguments, workers=list(having), pure=False, retries=0)
            running[future] = source, vm
        wanted = len(running)
        try:
            while running:
                for future in first_done(client, running, needed):
                    _, vm = running.pop(future)
                    try:
                        found.done.append(Vm.from_dict(result(client, future, needed)))
                    except (SchedulerLostError, WorkersGoneError):
                        running[future] = "", vm
                        raise
                    except (KsmError, OSError) as error:
                        found.failed[vm.name] = " ".join(str(error).split())
                    show(wanted - len(running), wanted)
        except (SchedulerLostError, WorkersGoneError) as error:
            found.error = error
            found.failed |= {vm.name: "not known whether it was written" for _, vm in running.values()}
        finally:
            with contextlib.suppress(Exception):
                client.cancel(list(running))
    found.done.sort(key=lambda vm: vm.name)
    return found


def _which(sources: Sequence[str]) -> list[str]:
    return [source for source in sources if os.path.exists(source)]


def _table(vms: Sequence[Vm]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("VM", "class", "host"):
        table.add_column(heading, overflow="fold")
    for heading in ("pages", "zero", "contents", "RAM"):
        table.add_column(heading, justify="right", no_wrap=True)
    for vm in vms:
        numbers = (f"{number:,}" for number in (vm.pages, vm.zero_pages, vm.contents))
        table.add_row(vm.name, vm.kind, vm.host, *numbers, binary(vm.ram))
    return table

"""`ksm fingerprint`: the files of VMs that `ksm fleet` works on."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import click
from rich.table import Table

from ksm.cli.common import binary, out, print_json, progress
from ksm.cli.fleet import FAILED, byte_size, cluster_options, opened
from ksm.errors import KsmError, SourceError
from ksm.fleet import Vm, fingerprint_vm
from ksm.fleet.cluster import everywhere, places
from ksm.fleet.fingerprints import fingerprint_where
from ksm.keyed import Key


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
        done, failed = _on_workers(vms, output, how, cluster)
    else:
        done, failed = _here(vms, output, how, as_json)
    if as_json:
        print_json({"vms": [vm.to_dict() for vm in done], "failed": failed})
    elif done:
        out().print(_table(done))
    for name, why in failed.items():
        click.echo(f"ksm: {name}: {why}", err=True)
    if failed:
        raise click.exceptions.Exit(FAILED)


def _named(source: str) -> tuple[str, str]:
    name, equals, rest = source.partition("=")
    if equals and name and os.sep not in name and not os.path.exists(source):
        return name, rest
    return os.path.basename(source.rstrip(os.sep)) or source, source


def _here(vms: Sequence[tuple[str, Vm]], output: str, how: Mapping[str, Any], quiet: bool) -> Any:
    done, failed = [], {}
    for source, vm in vms:
        with progress(vm.name, quiet=quiet) as show:
            try:
                done.append(fingerprint_vm(source, output, vm, progress=show, **how))
            except SourceError as error:
                failed[vm.name] = str(error)
    return done, failed


def _on_workers(vms: Sequence[tuple[str, Vm]], output: str, how: Mapping[str, Any], cluster: Mapping[str, Any]) -> Any:
    done, failed = [], {}
    with opened(cluster) as client:
        seen = everywhere(client, _which, [source for source, _ in vms])
        addresses = places(client)
        futures = []
        for source, vm in vms:
            having = [address for place, there in seen.items() if source in there for address in addresses[place]]
            if not having:
                failed[vm.name] = f"{source}: no worker has it"
                continue
            start = client.submit
            arguments = (source, os.path.abspath(output), vm, dict(how))
            futures.append((vm, start(fingerprint_where, *arguments, workers=having, pure=False, retries=0)))
        for vm, future in futures:
            try:
                done.append(Vm.from_dict(future.result()))
            except (KsmError, OSError) as error:
                failed[vm.name] = str(error)
    return done, failed


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

"""`ksm plan`: how many VMs fit on a host, how soon, at what cost, at what risk."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ksm.cli.common import F, binary, decorated, duration, out, print_json, progress
from ksm.errors import PlanError, UnsupportedError
from ksm.plan import HostPlan, HostSpec, Plan, Policy, VMClass, plan
from ksm.plan.rows import figures
from ksm.sysfs import profile

DOES_NOT_FIT = 3

_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size(text: Any) -> int:
    """Bytes, from 64G, 1.5GiB, 512M or a plain number.

    >>> size("64G") >> 30, size("1.5K"), size(4096)
    (64, 1536, 4096)
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?)(?:i?B)?", str(text).strip(), re.IGNORECASE | re.ASCII)
    if not found or isinstance(text, bool):
        raise PlanError(f"{text!r} is not a size, such as 64G, 512M or 4096")
    return int(float(found[1]) * _SIZES[found[2].upper()])


def share(text: Any) -> float:
    """A share, from 25% or 0.25.

    >>> share("25%"), share(0.25)
    (0.25, 0.25)
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(%?)", str(text).strip(), re.ASCII)
    if not found or isinstance(text, bool):
        raise PlanError(f"{text!r} is not a share, such as 25% or 0.25")
    return float(Decimal(found[1]) / (100 if found[2] else 1))  # 99.9 % is 0.999, not a bit more


class _Parsed(click.ParamType[Any]):
    """An option that one of the functions above reads."""

    def __init__(self, name: str, read: Any) -> None:
        self.name = name
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What the text means."""
        try:
            return self._read(value)
        except PlanError as error:
            self.fail(str(error), param, ctx)


_SIZE, _SHARE = _Parsed("size", size), _Parsed("share", share)


_OPTIONS = (
    click.option(
        "--trace", "traces", multiple=True, metavar="DIR", help="A recording that is no sample, for the risk."
    ),
    click.option("--file", "file", metavar="YAML", help="Classes of VMs, hosts and the policy from a file."),
    click.option("--ram", type=_SIZE, help="The host's memory."),
    click.option("--vm-ram", type=_SIZE, help="A VM's memory.  [default: what the largest sample has]"),
    click.option("--reserve", type=_SIZE, default="0", show_default=True, help="Kept for the host itself."),
    click.option("--vm-overhead", type=_SIZE, default="0", show_default=True, help="A VM's memory beside the guest's."),
    click.option("--swap", type=_SIZE, default="0", show_default=True, help="For when merged memory breaks."),
    click.option("--nodes", type=click.IntRange(1, 255), default=1, show_default=True, help="NUMA nodes."),
    click.option("--kernel", default="6.18", show_default=True, help="Whose rules and defaults."),
    click.option("--headroom", type=_SHARE, default="10%", show_default=True, help="Of the memory, to be left free."),
    click.option("--broken", type=_SHARE, default="25%", show_default=True, help="Of merged pages, that may break."),
    click.option("--confidence", type=_SHARE, default="90%", show_default=True, help="How sure it has to be."),
    click.option("--ksmd-cpu", type=_SHARE, default="20%", show_default=True, help="Of one CPU, that ksmd may take."),
    click.option(
        "--settle", default="30m", callback=duration, show_default=True, help="99 % merged by then, from cold."
    ),
    click.option(
        "--growth", type=_SHARE, default="0", show_default=True, help="Of untouched RAM, that VMs will yet fill."
    ),
    click.option(
        "--zeros", type=click.Choice(["merge", "absent"]), default="merge", show_default=True, help="In dumps."
    ),
    click.option("--page-size", type=click.IntRange(256), default=None, help="Of raw images.  [default: 4096]"),
    click.option("--threads", type=click.IntRange(1), default=None, help="That hash.  [default: all CPUs]"),
)


_IN_FILE = ("traces", "vm_ram", *(field.name for field in (*fields(HostSpec), *fields(Policy))))


def plan_options(function: F) -> F:
    """The options of a plan: of the host, the VMs and the policy, and how samples are read.

    >>> callable(plan_options(lambda: None))
    True
    """
    return decorated(function, _OPTIONS)


@click.command()
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@plan_options
@click.option("--require", type=click.IntRange(1), metavar="N", help="Exit 3 unless N VMs fit (over all hosts).")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def command(
    sources: tuple[str, ...],
    require: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """How many VMs fit on a host, from samples of their memory.

    Each SOURCE is a sample of one VM, all of one class: a memory image (`ksm formats` lists which), pid:123 or
    qemu:NAME; what `ksm fingerprint` wrote of VMs; or a recording of several (`ksm record`), which tells how fast
    sharing breaks, too. Classes, hosts and
    mixes are described in a YAML file. Exit code 3: fewer than --require fit.
    """
    answer = work_out(sources, options, quiet=as_json)
    if as_json:
        print_json(answer.to_dict())
    else:
        _print(answer)
        if not require:
            least = max(1, answer.fits)
            out().print("Next: ksm report with the same arguments: this as a page, with charts and what-if controls.")
            out().print(f"In CI: ksm plan ... --require {least}, which exits 3 when that no longer fits.")
    if require is not None and answer.fits < require:
        if not as_json:
            out().print(f"{require} VMs do not fit: {answer.fits} do.", soft_wrap=True)
        raise click.exceptions.Exit(DOES_NOT_FIT)


def work_out(sources: Sequence[str], options: Mapping[str, Any], quiet: bool = False) -> Plan:
    """The plan that sources and `plan_options` ask for, with progress on a terminal.

    Raises:
        click.UsageError: they contradict each other, or say too little. PlanError, SourceError, OSError: as `plan`.
    """
    if options["file"] is not None:
        if sources:
            raise click.UsageError("--file and sources exclude each other: the file says it all")
        if (beside := _given_beside_a_file()) is not None:
            raise click.UsageError(f"--file and {beside} exclude each other: say it in the file")
        classes, hosts, policy = read(options["file"])
    else:
        classes, hosts, policy = _from_options(sources, options)
    classes = _with_fingerprints(classes)
    with progress("fingerprinting", quiet=quiet) as show:
        return plan(classes, hosts, policy, page_size=options["page_size"], threads=options["threads"], progress=show)


def _with_fingerprints(classes: Sequence[VMClass]) -> list[VMClass]:
    """The classes with what `ksm fingerprint` wrote among their samples read, all of it under one key."""
    given = [str(each) for known in classes for each in known.samples]
    if not any(each.endswith(".parquet") or Path(each).is_dir() for each in given):
        return list(classes)  # the fleet takes a while to import
    from ksm.fleet.samples import is_fingerprinted, samples

    read = {path: samples([path]) for path in dict.fromkeys(given) if is_fingerprinted(path)}
    keys = {key: path for path, (_, key) in read.items()}
    if len(keys) > 1 or (any(keys) and len(read) < len(set(given))):
        secret = next(path for key, path in keys.items() if key)
        raise PlanError(f"{secret}: its fingerprints are under a key, and cannot be compared with other samples")
    return [
        replace(known, samples=[one for each in known.samples for one in read.get(str(each), ([each], ""))[0]])
        for known in classes
    ]


def _given_beside_a_file() -> str | None:
    """An option that a file has a word for, given on the command line."""
    context = click.get_current_context()
    ours = {option.name: option for option in context.command.params if isinstance(option, click.Option)}
    for name in _IN_FILE:
        if name in ours and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            return ours[name].opts[0]
    return None


def _from_options(sources: Sequence[str], options: Mapping[str, Any]) -> tuple[list[VMClass], list[HostSpec], Policy]:
    if not sources:
        raise click.UsageError("samples of VMs are needed, or --file")
    if options["ram"] is None:
        raise click.UsageError("the host's memory is needed: --ram 64G")
    of_host = {name: options[name] for name in ("ram", "reserve", "vm_overhead", "swap", "nodes", "kernel")}
    of_policy = ("headroom", "broken", "confidence", "ksmd_cpu", "settle", "growth", "zeros")
    policy = Policy(**{name: options[name] for name in of_policy})
    return (
        [VMClass("vm", list(sources), ram=options["vm_ram"], traces=options["traces"])],
        [HostSpec(**of_host)],
        policy,
    )


# ---- the YAML file -------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise PlanError(f"{value!r} must be in quotes (YAML takes 6.10 for 6.1)")
    return value


def _version(value: Any) -> str:
    profile(_text(value))  # which knows it, or says so
    return str(value)


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise PlanError(f"{value!r} is not a whole number")
    return value


def _flag(value: Any) -> bool:
    if value not in (0, 1) or isinstance(value, float):
        raise PlanError(f"{value!r} is neither true nor false")
    return bool(value)


_MOST_TEXT = 1 << 20  # letters in a file

_READ: Mapping[str, Any] = {
    **dict.fromkeys(("ram", "reserve", "vm_overhead", "swap"), size),
    **dict.fromkeys(("share", "headroom", "broken", "confidence", "ksmd_cpu", "growth"), share),
    "settle": lambda text: duration(None, None, str(text)),
    **dict.fromkeys(("count", "nodes", "max_page_sharing"), _number),
    **dict.fromkeys(("use_zero_pages", "merge_across_nodes"), _flag),
    **dict.fromkeys(("name", "zeros"), _text),
    "kernel": _version,
}


def read(file: str) -> tuple[list[VMClass], list[HostSpec], Policy]:
    """Classes, hosts and policy from a YAML file; paths of samples are relative to it and may have wildcards.

    Raises:
        PlanError: the file does not say what a plan needs, or says more.
        UnsupportedError: PyYAML is not installed.

    >>> _ = Path("plan.yaml").write_text("classes: {web: {samples: [a.raw], ram: 4G}}\\nhosts: [{ram: 64G}]")
    >>> read("plan.yaml")[0][0].ram >> 30
    4
    """
    try:
        import yaml
    except ImportError:
        raise UnsupportedError("plans in YAML need PyYAML: pip install 'ksm[plan]'") from None
    with open(file, encoding="utf-8") as text:
        try:
            node = yaml.compose(found := text.read(_MOST_TEXT + 1), yaml.SafeLoader)
            if len(found) > _MOST_TEXT:
                raise PlanError(f"{file}: more than {_MOST_TEXT >> 20} MiB, this is no plan")
            _once(file, node)
            said = yaml.safe_load(found)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            where = getattr(error, "problem_mark", None)
            line = f", line {where.line + 1}" if where is not None else ""
            raise PlanError(f"{file}{line}: not YAML") from None
    top = _mapping(file, said, {"classes", "hosts", "policy"})
    classes = []
    for name, about in _mapping(file, top.get("classes"), None).items():
        if not isinstance(name, str):
            raise PlanError(f"{file}: the class name {name!r} must be in quotes")
        values = _values(f"{file}: class {name}", about, {"samples", "traces", "ram", "share"})
        for what in ("samples", "traces"):
            listed = values.get(what, [])
            if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
                raise PlanError(f"{file}: class {name}: {what} must be a list of paths")
            values[what] = [one for each in listed for one in _found(file, each)]
        classes.append(VMClass(name, **values))
    hosts = top.get("hosts")
    if not isinstance(hosts, list) or not hosts:
        raise PlanError(f"{file}: hosts must be a list, such as [{{ram: 64G}}]")
    specs = []
    for each in hosts:
        values = _values(f"{file}: host", each, {field.name for field in fields(HostSpec)})
        if "ram" not in values:
            raise PlanError(f"{file}: a host has no ram")
        specs.append(HostSpec(**values))
    names = {field.name for field in fields(Policy)}
    return classes, specs, Policy(**_values(f"{file}: policy", top.get("policy") or {}, names))


def _once(file: str, top: Any) -> None:
    """Every key is there once; YAML itself would take the last and say nothing."""
    waiting, seen = [top], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(getattr(node, "value", None), list):
            continue
        seen.add(id(node))
        keys: set[str] = set()
        for item in node.value:
            key, value = item if isinstance(item, tuple) else (None, item)
            if key is not None and isinstance(key.value, str):
                if key.value in keys:
                    raise PlanError(f"{file}, line {key.start_mark.line + 1}: {key.value} is there twice")
                keys.add(key.value)
            waiting.append(value)


def _mapping(where: str, said: Any, known: set[str] | None) -> dict[str, Any]:
    if not isinstance(said, dict) or (not said and known is None):
        what = "a mapping of " + ", ".join(sorted(known)) if known else "classes: a mapping of names to classes"
        raise PlanError(f"{where}: there must be {what}")
    if known is not None and (unknown := [str(key) for key in said if key not in known]):
        raise PlanError(f"{where}: {unknown[0]} is not known; it can have {', '.join(sorted(known))}")
    return said


def _values(where: str, said: Any, known: set[str]) -> dict[str, Any]:
    values = {}
    for key, value in _mapping(where, said, known).items():
        if isinstance(value, list | dict) and key not in ("samples", "traces"):
            raise PlanError(f"{where}: {key} must be one value")
        try:
            values[key] = _READ[key](value) if key in _READ else value
        except (PlanError, click.BadParameter, ValueError) as error:
            raise PlanError(f"{where}: {key}: {error}") from None
    return values


def _found(file: str, sample: str) -> list[str]:
    if sample == "self" or sample.startswith(("pid:", "qemu:")):
        return [sample]
    path = str(Path(file).parent / sample)
    return sorted(glob.glob(path)) if glob.has_magic(path) else [path]


# ---- for people ----------------------------------------------------------------------------------------


def _print(answer: Plan) -> None:
    console = out()
    for each in answer.hosts:
        console.print(table(answer, each))
        console.print(_tunables(each))
    for sentence in answer.verdict():
        console.print(sentence, soft_wrap=True)
    for line in answer.warnings:
        console.print(f"Warning: {line}", soft_wrap=True)
    for line in answer.assumed:
        console.print(f"Assumed: {line}", soft_wrap=True)


def table(answer: Plan, each: HostPlan) -> Table:
    """The figures of one kind of host.

    >>> answer = plan(VMClass("vm", [b"a" * 4096, b"b" * 4096]), HostSpec(ram=1 << 16))
    >>> table(answer, answer.hosts[0]).row_count
    11
    """
    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column(f"{each.host.name}, {binary(each.host.ram)}", no_wrap=True)
    result.add_column("", justify="right", no_wrap=True)
    for row in figures(answer, each):
        result.add_row(*row)
    return result


def _tunables(each: HostPlan) -> Table:
    result = Table(box=None, pad_edge=False, header_style="bold")
    result.add_column("tunable", no_wrap=True)
    result.add_column("value", justify="right", no_wrap=True)
    result.add_column("why")
    for one in each.tunables:
        result.add_row(one.name, str(one.value), one.why)
    return result

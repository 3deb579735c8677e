"""The hosts of a fleet: what they hold and how their KSM is set."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ksm.errors import SourceError
from ksm.fleet.extras import need
from ksm.fleet.vm import MOST, Vm

MOST_NODES = 1024  # what Linux can be built for
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One host. RAM and CPUs are spread evenly over its NUMA nodes.

    >>> Host(name="h1", ram=64 << 30, nodes=2).node_ram
    34359738368
    """

    name: str
    ram: int = 0
    """Bytes; 0: not known, which analysis does not need and placement does."""
    vcpus: int = 0
    """That may be given out; 0: as many as wanted."""
    nodes: int = 1
    reserve: int = 0
    """Bytes that VMs cannot have."""
    vm_overhead: int = 0
    """Bytes that each VM takes beside its pages."""
    max_page_sharing: int = 256
    use_zero_pages: bool = False
    merge_across_nodes: bool = True

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a host needs a name")
        if not self.name.isprintable():
            raise ValueError(f"host {self.name!r}: a name that cannot be printed")
        if not 1 <= self.nodes <= MOST_NODES or not 2 <= self.max_page_sharing < 1 << 31:
            raise ValueError(f"host {self.name}: nodes is {self.nodes}, max_page_sharing {self.max_page_sharing}")
        for what in ("ram", "vcpus", "reserve", "vm_overhead"):
            if getattr(self, what) < 0:
                raise ValueError(f"host {self.name}: {what} is {getattr(self, what)}, below 0")
            if getattr(self, what) > MOST:
                raise ValueError(f"host {self.name}: {what} is {getattr(self, what)}, above {MOST}")
        if self.ram and self.reserve >= self.ram:
            raise ValueError(f"host {self.name}: nothing is left of {self.ram} bytes after a reserve of {self.reserve}")

    @property
    def node_ram(self) -> int:
        """Bytes of one NUMA node that VMs may have."""
        return (self.ram - self.reserve) // self.nodes

    @property
    def node_vcpus(self) -> int:
        """Virtual CPUs of one NUMA node; 0: as many as wanted."""
        return self.vcpus // self.nodes

    def to_dict(self) -> dict[str, Any]:
        """For JSON.

        >>> Host(name="h1").to_dict()["max_page_sharing"]
        256
        """
        return asdict(self)


def size(text: str | int) -> int:
    """Bytes, from 64G, 512M, 1.5GiB or a number.

    Raises:
        ValueError: it is none of these.

    >>> size("64G"), size(4096), size("1.5GiB")
    (68719476736, 4096, 1610612736)
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(text).strip(), re.IGNORECASE | re.ASCII)
    if not found or isinstance(text, bool):
        raise ValueError(f"{text!r} is not a size, such as 64G or 512M")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def read_hosts(path: str | os.PathLike[str]) -> list[Host]:
    """Hosts from a YAML or JSON file: a list of mappings, or a mapping of names to mappings, with `Host`'s names.

    `count: 40` in one with `name: h` makes h1 to h40. Sizes can be written as 64G.

    Raises:
        SourceError: it cannot be read, or says what is no host.

    >>> with open("hosts.yaml", "w") as file:
    ...     _ = file.write("[{name: h, count: 2, ram: 64G, nodes: 2}]")
    >>> [(host.name, host.nodes) for host in read_hosts("hosts.yaml")]
    [('h1', 2), ('h2', 2)]
    """
    yaml = need("yaml")
    where = os.fspath(path)
    try:
        with open(where, encoding="utf-8") as file:
            given = yaml.safe_load(file)
    except OSError as error:
        raise SourceError(f"{where}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SourceError(f"{where}: neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if isinstance(given, dict) and isinstance(given.get("hosts"), list | dict):
        given = given["hosts"]
    if isinstance(given, dict):
        given = [{"name": name, **about} if isinstance(about, dict) else about for name, about in given.items()]
    if not isinstance(given, list) or not given:
        raise SourceError(f"{where}: not a list of hosts")
    try:
        hosts = [host for about in given for host in _hosts(about)]
    except (ValueError, TypeError) as error:
        raise SourceError(f"{where}: {error}") from None
    names = [host.name for host in hosts]
    if len(set(names)) < len(names):
        raise SourceError(f"{where}: {next(name for name in names if names.count(name) > 1)} is there twice")
    return hosts


def _hosts(about: Any) -> Iterable[Host]:
    if not isinstance(about, Mapping):
        raise ValueError(f"{about!r} is not a host")
    values = dict(about)
    number = values.pop("count", None)
    if number is None and "name" not in values:
        raise ValueError(f"a host without a name: {about!r}")
    types = {f.name: str(f.type) for f in fields(Host)}
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{name!r} is not known of a host; these are: {', '.join(types)}, count")
        if name in ("ram", "reserve", "vm_overhead"):
            values[name] = size(value)
        elif types[name] == "str":
            values[name] = str(value)
        elif (types[name] == "bool") is not isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} is {value!r}")
    if number is None:
        return [Host(**values)]
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= 1_000_000:
        raise ValueError(f"count is {number!r}")
    name = values.pop("name", "host")
    return [Host(name=f"{name}{index}", **values) for index in range(1, number + 1)]


def hosts_of(vms: Iterable[Vm], known: Iterable[Host] = (), **tunables: Any) -> dict[str, Host]:
    """A host for each name that VMs have, by name: those that are known, and others with the default tunables.

    >>> list(hosts_of([Vm(name="a", host="h1"), Vm(name="b", host="h2", node=1)], [Host(name="h1", nodes=2)]))
    ['h1', 'h2']
    """
    result = {host.name: host for host in known}
    nodes: dict[str, int] = {}
    for vm in vms:
        name = vm.host or "(no host)"
        nodes[name] = max(nodes.get(name, 0), vm.node + 1)
    for name, number in nodes.items():
        if name not in result:
            result[name] = Host(name=name, nodes=number, **tunables)
        elif result[name].nodes < number:
            raise ValueError(f"host {name} has {result[name].nodes} NUMA nodes, and a VM stands on node {number - 1}")
    return result

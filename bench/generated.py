"""Generated fleets of any size: VMs, hosts, and sketches as `ksm fingerprint` would write them.

A VM's contents come from pools: its system's, its application's, its own. Of a shared pool each VM has a part, drawn
content by content. Hashes of contents are uniform, so a pool is drawn as hashes, and a sketch is the least of those
that a VM has, in the layout that Apache DataSketches writes: what `ksm.fleet.sketch.sketch` makes of the same contents,
in a hundredth of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ksm.fleet import Host, Vm
from ksm.fleet.sketch import LG_K, sketch

GIB = 1 << 30
PAGE = 4096
_WHOLE = 1 << 63
# The first eight bytes of any sketch that has dropped hashes: the version, flags and seed of the library in use.
_PREAMBLE = sketch(np.arange(4096, dtype=np.uint64).reshape(-1, 2) * np.uint64(0x9E3779B97F4A7C15), 5)[:8]

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Fleet:
    """VMs where they stand today, their sketches, and the hosts."""

    name: str
    vms: list[Vm]
    sketches: list[bytes]
    hosts: list[Host]

    @property
    def pages(self) -> int:
        return sum(vm.pages for vm in self.vms)


class Pool:
    """Contents that VMs have in common: their hashes, ascending."""

    def __init__(self, random: np.random.Generator, contents: int) -> None:
        self.hashes = np.sort(random.integers(1, _WHOLE, contents, dtype=np.uint64))


def made(hashes: Hashes, lg_k: int = LG_K) -> bytes:
    """The sketch of contents with these hashes below a threshold, of which there are more than it keeps."""
    least = np.sort(hashes)
    kept, theta = least[: 1 << lg_k], int(least[1 << lg_k])
    head = _PREAMBLE + len(kept).to_bytes(4, "little") + bytes(4) + theta.to_bytes(8, "little")
    return head + kept.astype("<u8").tobytes()


def contents_of(random: np.random.Generator, own: int, shared: list[tuple[Pool, float]], lg_k: int) -> bytes:
    """A VM's sketch: of each pool the part that it has, and contents of its own."""
    count = own + sum(int(part * len(pool.hashes)) for pool, part in shared)
    below = min(int(1.25 * (1 << lg_k) / count * _WHOLE) + 1, _WHOLE - 1)
    found = [random.integers(1, below, random.binomial(own, below / _WHOLE), dtype=np.uint64)]
    for pool, part in shared:
        near = pool.hashes[: np.searchsorted(pool.hashes, np.uint64(below))]
        found.append(near[random.random(len(near)) < part])
    return made(np.concatenate(found), lg_k)


def machine(
    random: np.random.Generator, shared: list[tuple[Pool, float]], lg_k: int, **about: object
) -> tuple[Vm, bytes]:
    """A VM whose pages are 10 % zero, 2 % second copies, what it has of the pools, and its own."""
    pages = int(str(about["ram"])) // PAGE
    zero, twice = pages // 10, pages // 50
    common = sum(int(part * len(pool.hashes)) for pool, part in shared)
    own = max(pages - zero - twice - common, 1)
    vm = Vm(pages=pages, zero_pages=zero, contents=own + common, **about)  # type: ignore[arg-type]
    return vm, contents_of(random, own, shared, lg_k)


def desktops(number: int, per_host: int = 12, lg_k: int = LG_K, seed: int = 1) -> Fleet:
    """Desktops of 1 GiB: three versions of a system (45 % of the pages), six sets of applications (20 %), at random."""
    random = np.random.default_rng(seed)
    systems = [Pool(random, 131_000) for _ in range(3)]
    sets = [Pool(random, 66_000) for _ in range(6)]

    def one(name: str, host: str) -> tuple[Vm, bytes]:
        system, kind = int(random.integers(3)), int(random.integers(6))
        shared = [(systems[system], 0.9), (sets[kind], 0.8)]
        return machine(random, shared, lg_k, name=name, host=host, ram=GIB, kind=f"version {system}")

    return _fleet("desktops", number, per_host, one, random)


def services(number: int, per_host: int = 12, lg_k: int = LG_K, seed: int = 2) -> Fleet:
    """Servers of 1 GiB: 6 systems (25 %), 60 applications of which few are common (30 %), at random."""
    random = np.random.default_rng(seed)
    systems = [Pool(random, 82_000) for _ in range(6)]
    applications = [Pool(random, 112_000) for _ in range(60)]
    chance = 1.0 / np.arange(1, 61)

    def one(name: str, host: str) -> tuple[Vm, bytes]:
        application = int(random.choice(60, p=chance / chance.sum()))
        shared = [(systems[application % 6], 0.8), (applications[application], 0.7)]
        return machine(random, shared, lg_k, name=name, host=host, ram=GIB, vcpus=1, kind=f"service {application}")

    return _fleet("services", number, per_host, one, random, vcpus=per_host * 4 // 3)


def tenants(number: int, per_host: int = 12, lg_k: int = LG_K, seed: int = 3) -> Fleet:
    """Three sizes of VM of 20 tenants who never share a host, replicas apart; hosts of two nodes that merge apart."""
    random = np.random.default_rng(seed)
    systems = [Pool(random, 60_000) for _ in range(4)]
    applications = [[Pool(random, 60_000) for _ in range(5)] for _ in range(20)]
    counter = iter(range(number))

    def one(name: str, host: str) -> tuple[Vm, bytes]:
        index = next(counter)
        tenant, application = index // (2 * per_host) % 20, int(random.integers(5))
        about = {
            "name": name,
            "host": host,
            "node": index // (per_host // 2) % 2,
            "ram": int(random.choice([1, 1, 1, 2, 2, 4])) * GIB,
            "kind": f"application {application}",
            "domain": f"tenant {tenant}",
            "apart": f"replicas {index // 10}" if index % 10 == 3 or index % 10 == 3 + per_host else "",
        }
        system = systems[int(random.integers(4))]
        return machine(random, [(system, 0.9), (applications[tenant][application], 0.8)], lg_k, **about)

    return _fleet("tenants", number, per_host, one, random, room=4.0, nodes=2, merge_across_nodes=False)


def strangers(number: int, per_host: int = 12, lg_k: int = LG_K, seed: int = 4) -> Fleet:
    """VMs of 1 GiB that have one system in common (15 %) and nothing else: placement can do little for them."""
    random = np.random.default_rng(seed)
    system = Pool(random, 44_000)

    def one(name: str, host: str) -> tuple[Vm, bytes]:
        return machine(random, [(system, 0.9)], lg_k, name=name, host=host, ram=GIB)

    return _fleet("strangers", number, per_host, one, random)


KINDS: dict[str, Callable[..., Fleet]] = {
    "desktops": desktops,
    "services": services,
    "tenants": tenants,
    "strangers": strangers,
}


def _fleet(
    name: str,
    number: int,
    per_host: int,
    one: Callable[[str, str], tuple[Vm, bytes]],
    random: np.random.Generator,
    room: float = 4 / 3,
    **about: object,
) -> Fleet:
    """VMs one after the other on hosts, `per_host` on each, that have so many GiB a VM."""
    found = [one(f"vm{index:06}", f"h{index // per_host}") for index in range(number)]
    count = -(-number // per_host)
    hosts = [Host(name=f"h{index}", ram=int(per_host * room) * GIB, **about) for index in range(count)]  # type: ignore[arg-type]
    return Fleet(name, [vm for vm, _ in found], [data for _, data in found], hosts)

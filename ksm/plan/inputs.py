"""What a plan starts from: classes of VMs, a host, a policy; checked when they are made."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ksm.errors import PlanError
from ksm.estimate import Source
from ksm.sysfs import profile

if TYPE_CHECKING:
    from ksm.trace import Trace

MAX_VMS = 10_000
"""No plan looks beyond so many VMs a host."""

MAX_SAMPLES = 1_024
"""No plan takes more samples."""

_MOST_SHARING = (1 << 31) - 1
_MOST = 1 << 60


def _whole(where: str, given: object, *names: str) -> None:
    """Bytes and numbers of things are whole, and none is beyond what a machine can have."""
    for name in names:
        value = getattr(given, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise PlanError(f"{where}: {name} is {value}; it must be a whole number")
        if abs(int(value)) > _MOST:
            raise PlanError(f"{where}: {name} is {int(value):.3g}; no machine has that much")


def _real(where: str, given: object, *names: str) -> None:
    """Shares and seconds are numbers."""
    for name in names:
        value = getattr(given, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise PlanError(f"{where}{name} is {value!r}; it must be a number")


def _text(where: str, given: object, *names: str) -> None:
    for name in names:
        value = getattr(given, name)
        if not isinstance(value, str) or not value.strip():
            raise PlanError(f"{where}: {name} is {value!r}; it must be a text, and not empty")


@dataclass(frozen=True, slots=True)
class VMClass:
    """VMs of one kind, shown by samples.

    Attributes:
        name: what to call it.
        samples: images, live processes, fingerprints, ...: what `ksm.estimate` takes; or recordings, of which every
            process is a sample. Drawn at random from the VMs that the plan is for; every one adds to what is known, the
            first two most.
        ram: bytes of a VM's memory; None: as much as its largest sample has pages.
        share: of the VMs, 0 to 1; None: the classes have equal shares.
        traces: recordings of such VMs (`ksm record`, paths or `ksm.trace.Trace`) that are no samples, for the risk over
            time; recordings among the samples tell it, too.

    Raises:
        PlanError: no samples; a share or a size out of range.

    >>> VMClass("web", [b"x" * 4096], ram=1 << 30).name
    'web'
    >>> VMClass("web", [])
    Traceback (most recent call last):
        ...
    ksm.errors.PlanError: class web has no samples: a plan needs one for bounds, and two for more than that
    """

    name: str
    samples: Sequence[Source | Trace]
    ram: int | None = None
    share: float | None = None
    traces: Sequence[str | os.PathLike[str] | Trace] = ()

    def __post_init__(self) -> None:
        _text("a class", self, "name")
        for what, value in (("samples", self.samples), ("traces", self.traces)):
            if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
                raise PlanError(f"class {self.name}: {what} must be a list of sources")
        if len(self.samples) == 0:
            raise PlanError(
                f"class {self.name} has no samples: a plan needs at least one, and two to say more than bounds"
            )
        if self.ram is not None:
            _whole(f"class {self.name}", self, "ram")
            if self.ram <= 0:
                raise PlanError(f"class {self.name}: a VM of {self.ram} bytes of RAM")
        if self.share is not None:
            _real(f"class {self.name}: ", self, "share")
        if self.share is not None and not (math.isfinite(self.share) and 0 < self.share <= 1):
            raise PlanError(f"class {self.name}: its share of the mix is {self.share:g}; it must be above 0, at most 1")


@dataclass(frozen=True, slots=True)
class HostSpec:
    """A host to fill with VMs, or several alike.

    Attributes:
        ram: bytes of memory.
        name: what to call it.
        count: how many hosts of this kind.
        nodes: NUMA nodes; VMs are dealt out to them evenly, each with all its memory on one.
        reserve: bytes kept for the host itself: its kernel, daemons, page cache.
        vm_overhead: bytes that a VM takes besides its guest memory: its process, page tables, device buffers.
        swap: bytes of swap; it serves only when merged memory breaks, never for a plan's usual day.
        kernel: whose rules and defaults, as `ksm.Machine` has them.

    Raises:
        PlanError: nothing is left after the reserve; numbers out of range. ValueError: a kernel that is not known.

    >>> HostSpec(ram=64 << 30, reserve=4 << 30).usable >> 30
    60
    """

    ram: int
    name: str = "host"
    count: int = 1
    nodes: int = 1
    reserve: int = 0
    vm_overhead: int = 0
    swap: int = 0
    kernel: str = "6.18"

    def __post_init__(self) -> None:
        _text("a host", self, "name")
        _text(self.name, self, "kernel")
        _whole(self.name, self, "ram", "count", "nodes", "reserve", "vm_overhead", "swap")
        if self.ram <= 0:
            raise PlanError(f"{self.name}: {self.ram} bytes of RAM")
        for what in ("reserve", "vm_overhead", "swap"):
            if getattr(self, what) < 0:
                raise PlanError(f"{self.name}: {what} is {getattr(self, what)} bytes; it cannot be negative")
        if self.reserve >= self.ram:
            raise PlanError(
                f"{self.name}: the reserve of {self.reserve} bytes leaves nothing of {self.ram} bytes of RAM"
            )
        if self.count < 1:
            raise PlanError(f"{self.name}: {self.count} hosts of this kind; there must be one or more")
        if not 1 <= self.nodes <= 255:
            raise PlanError(f"{self.name}: {self.nodes} NUMA nodes; there can be 1 to 255")
        profile(self.kernel)

    @property
    def usable(self) -> int:
        """Bytes that VMs may take: RAM less the reserve.

        >>> HostSpec(ram=8192).usable
        8192
        """
        return self.ram - self.reserve


@dataclass(frozen=True, slots=True)
class Policy:
    """What is asked of the plan, and the tunables that are given.

    Attributes:
        headroom: share of the usable memory to leave free on a usual day.
        broken: share of the merged pages that may break at once and must still fit, in all usable memory and swap.
        confidence: how sure "fits" has to be, and how wide the intervals are; 0.5 to 0.999.
        ksmd_cpu: share of one CPU that ksmd may take.
        settle: seconds within which 99 % of the saving must be there after a cold start of the whole host.
        growth: share of the RAM untouched in the samples that VMs will yet fill, with contents of their own.
        max_page_sharing, use_zero_pages, merge_across_nodes: the tunables; None lets the plan choose.
        zeros: what all-zero pages of dumps are, as in `ksm.estimate`: "merge" or "absent" (never touched).

    Raises:
        PlanError: a number out of range.

    >>> Policy(confidence=0.9).confidence
    0.9
    """

    headroom: float = 0.1
    broken: float = 0.25
    confidence: float = 0.9
    ksmd_cpu: float = 0.2
    settle: float = 1800.0
    growth: float = 0.0
    max_page_sharing: int | None = None
    use_zero_pages: bool | None = None
    merge_across_nodes: bool | None = None
    zeros: str = "merge"

    def __post_init__(self) -> None:
        _real("", self, "headroom", "broken", "confidence", "ksmd_cpu", "settle", "growth")
        for what, low, high in (
            ("headroom", 0.0, 0.99),
            ("broken", 0.0, 1.0),
            ("confidence", 0.5, 0.999),
            ("ksmd_cpu", 0.001, 0.99),
            ("growth", 0.0, 1.0),
        ):
            value = getattr(self, what)
            if not low <= value <= high:
                raise PlanError(f"{what} is {value:g}; it can be {low:g} to {high:g}")
        if not (math.isfinite(self.settle) and self.settle > 0):
            raise PlanError(f"settle is {self.settle:g} seconds; it must be above 0")
        for what in ("use_zero_pages", "merge_across_nodes"):
            if getattr(self, what) not in (None, False, True) or isinstance(getattr(self, what), float):
                raise PlanError(f"{what} is {getattr(self, what)!r}; it must be true or false")
        if self.max_page_sharing is not None:
            _whole("policy", self, "max_page_sharing")
        if self.max_page_sharing is not None and not 2 <= self.max_page_sharing <= _MOST_SHARING:
            raise PlanError(f"max_page_sharing is {self.max_page_sharing}; it can be 2 to {_MOST_SHARING}")
        if self.zeros not in ("merge", "absent"):
            raise PlanError(f"zeros is {self.zeros!r}; it can be 'merge' or 'absent'")

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON.

        >>> Policy().to_dict()["broken"]
        0.25
        """
        return asdict(self)


def shares(classes: Sequence[VMClass]) -> list[float]:
    """Each class's share of the mix; they sum to 1.

    Raises:
        PlanError: no classes, two of one name, shares for some of them only, or shares that do not sum to 1.

    >>> shares([VMClass("web", [b""], share=0.75), VMClass("db", [b""], share=0.25)])
    [0.75, 0.25]
    """
    if not classes:
        raise PlanError("no classes of VMs: there is nothing to plan")
    names = [each.name for each in classes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PlanError(f"two classes are called {twice[0]}")
    given = [each.share for each in classes if each.share is not None]
    if not given:
        return [1 / len(classes)] * len(classes)
    if len(given) < len(classes):
        without = next(each.name for each in classes if each.share is None)
        raise PlanError(f"class {without} has no share of the mix, and others have: give all of them or none")
    if abs(sum(given) - 1) > 0.001:
        listed = " + ".join(f"{share:g}" for share in given)
        raise PlanError(f"the mix does not sum to 1: {listed} = {sum(given):g}")
    return [share / sum(given) for share in given]

"""The attributes of /sys/kernel/mm/ksm: names, defaults, ranges, versions; text and typed access to them."""

from __future__ import annotations

import errno
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from operator import index
from types import MappingProxyType
from typing import Any, Literal, Protocol, overload

from ksm.errors import kernel_error
from ksm.stats import Stats

Kind = Literal["counter", "uint", "ulong", "int", "bool", "mode"]
"""What a file holds, and so how the kernel reads it: `uint` 32 bits, `ulong` 64, `int` 32 with a sign."""

ADVISOR_MODES = ("none", "scan-time")
"""The texts of `advisor_mode`; a backend holds the index."""

_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1
_LONGEST_WRITE = 4096  # sysfs takes no more of one write, on every architecture's smallest page
_NEWEST = (1 << 30, 0)


@dataclass(frozen=True, slots=True)
class Attribute:
    """One file of /sys/kernel/mm/ksm.

    >>> ATTRIBUTES["run"].default, ATTRIBUTES["run"].maximum, ATTRIBUTES["smart_scan"].since
    (0, 2, '6.7')
    """

    name: str
    default: int
    kind: Kind
    since: str
    """The first kernel that has it."""
    help: str
    """What it means, in one line."""
    minimum: int = 0
    maximum: int = _U64
    keeps_erange: bool = False
    """Whether a number beyond its type is ERANGE; other files say EINVAL."""

    @property
    def writable(self) -> bool:
        """Whether it is a tunable; opening another for writing is EACCES.

        >>> ATTRIBUTES["run"].writable, ATTRIBUTES["full_scans"].writable
        (True, False)
        """
        return self.kind != "counter"

    def parse(self, data: bytes, kernel: tuple[int, int] = _NEWEST) -> int:
        """The value that a (not empty) write of `data` means; `OSError` EINVAL or ERANGE as the kernel has it.

        `kernel` is a `Profile.number`; it decides which words are booleans.

        >>> ATTRIBUTES["run"].parse(b"+01\\n")
        1
        >>> ATTRIBUTES["max_page_sharing"].parse(b"2147483648")
        Traceback (most recent call last):
            ...
        ksm.errors.SyscallError: [Errno 34] Numerical result out of range: max_page_sharing: '2147483648'
        """
        text = data[:_LONGEST_WRITE].partition(b"\0")[0]
        value = self._number(text, kernel)
        if isinstance(value, _OutOfRange):
            raise self._refuse(errno.ERANGE if self.keeps_erange else errno.EINVAL, text)
        if value is None:
            raise self._refuse(errno.EINVAL, text)
        if self.name == "advisor_max_cpu":
            value &= _U32  # read as 64 bits, stored as 32
        if not self.minimum <= value <= self.maximum:
            raise self._refuse(errno.EINVAL, text)
        return value

    def format(self, value: int) -> str:
        """What reading the file gives while it holds `value`.

        >>> ATTRIBUTES["run"].format(2), ATTRIBUTES["advisor_mode"].format(1)
        ('2\\n', 'none [scan-time]\\n')
        """
        if self.kind == "mode":
            return " ".join(f"[{m}]" if i == value else m for i, m in enumerate(ADVISOR_MODES)) + "\n"
        return f"{value}\n"

    def _number(self, text: bytes, kernel: tuple[int, int]) -> int | _OutOfRange | None:
        if self.kind == "bool":
            return _boolean(text, kernel)
        if self.kind == "mode":
            return _mode(text)
        value = _integer(text, signed=self.kind == "int")
        fits = not isinstance(value, int) or self.kind != "int" or -(1 << 31) <= value < 1 << 31
        return value if fits else _OutOfRange()

    def _refuse(self, number: int, text: bytes) -> OSError:
        shown = text[:40].decode("utf-8", "backslashreplace")
        return kernel_error(number, f"{self.name}: {shown!r}{'...' if len(text) > 40 else ''}")


class _OutOfRange:
    """A number of digits that no 64-bit value holds, or one beyond the file's own type."""


_DIGITS = re.compile(rb"[0-9]*")


def _integer(text: bytes, signed: bool) -> int | _OutOfRange | None:
    """A decimal number: one sign, digits, one newline. Too many digits are noticed before what follows them."""
    negative = signed and text.startswith(b"-")
    rest = text[1:] if negative or text.startswith(b"+") else text
    digits = _DIGITS.match(rest)
    assert digits is not None  # the pattern matches the empty string
    if not digits[0]:
        return None
    value = int(digits[0])
    if value > _U64:
        return _OutOfRange()
    if rest[digits.end() :] not in (b"", b"\n"):
        return None
    return -value if negative else value


def _boolean(text: bytes, kernel: tuple[int, int]) -> int | None:
    """A truth value by its first letter, or two of them for on and off; the rest is not looked at."""
    head = text[:2].lower()
    if head in (b"on", b"of"):
        return int(head == b"on")
    yes, no = b"1y", b"0n"
    if kernel >= (5, 17):
        yes, no = yes + b"t", no + b"f"
    if kernel >= (6, 16):
        yes, no = yes + b"e", no + b"d"
    if head[:1] and head[:1] in yes:
        return 1
    return 0 if head[:1] and head[:1] in no else None


def _mode(text: bytes) -> int | None:
    word = text.removesuffix(b"\n").decode("latin-1")
    return ADVISOR_MODES.index(word) if word in ADVISOR_MODES else None


def _table(*rows: Attribute) -> Mapping[str, Attribute]:
    return MappingProxyType({row.name: row for row in rows})


ATTRIBUTES: Mapping[str, Attribute] = _table(
    Attribute("run", 0, "uint", "2.6.32", "0 stops ksmd, 1 runs it, 2 stops it and unmerges everything", maximum=2),
    Attribute("pages_to_scan", 100, "uint", "2.6.32", "pages visited before ksmd sleeps; the advisor's while it is on",
              maximum=_U32),
    Attribute("sleep_millisecs", 20, "uint", "2.6.32", "how long ksmd sleeps between batches", maximum=_U32),
    Attribute("merge_across_nodes", 1, "ulong", "3.9", "whether pages of different NUMA nodes merge (NUMA kernels)",
              maximum=1, keeps_erange=True),
    Attribute("max_page_sharing", 256, "int", "4.13", "how many places one KSM page may have before a second is made",
              minimum=2, maximum=(1 << 31) - 1, keeps_erange=True),
    Attribute("use_zero_pages", 0, "bool", "4.12", "whether empty pages become the kernel's zero page"),
    Attribute("stable_node_chains_prune_millisecs", 2000, "uint", "4.13", "how often stale pages of a chain are sought",
              maximum=_U32),
    Attribute("smart_scan", 1, "bool", "6.7", "whether pages that failed to merge are skipped in some passes"),
    Attribute("advisor_mode", 0, "mode", "6.8", "none, or scan-time: pages_to_scan follows a target pass time",
              maximum=len(ADVISOR_MODES) - 1),
    Attribute("advisor_max_cpu", 70, "ulong", "6.8", "the advisor's limit for ksmd, percent of a CPU", maximum=_U32),
    Attribute("advisor_target_scan_time", 200, "ulong", "6.8", "the advisor's target for a pass, in seconds",
              minimum=1),
    Attribute("advisor_min_pages_to_scan", 500, "ulong", "6.8", "pages_to_scan that the advisor starts with"),
    Attribute("advisor_max_pages_to_scan", 30000, "ulong", "6.8", "pages_to_scan that the advisor stops at"),
    Attribute("pages_shared", 0, "counter", "2.6.32", "KSM pages in use"),
    Attribute("pages_sharing", 0, "counter", "2.6.32", "further places that share them: what is saved"),
    Attribute("pages_unshared", 0, "counter", "2.6.32", "unique pages, looked at again and again"),
    Attribute("pages_volatile", 0, "counter", "2.6.32", "pages that change too fast to be placed in a tree"),
    Attribute("full_scans", 0, "counter", "2.6.32", "how often everything registered has been scanned"),
    Attribute("stable_node_chains", 0, "counter", "4.13", "contents that hit max_page_sharing"),
    Attribute("stable_node_dups", 0, "counter", "4.13", "KSM pages with the same content as another"),
    Attribute("general_profit", 0, "counter", "6.4", "bytes saved less the bytes that KSM itself takes"),
    Attribute("pages_scanned", 0, "counter", "6.6", "pages visited so far"),
    Attribute("ksm_zero_pages", 0, "counter", "6.6", "places that map the zero page because of KSM"),
    Attribute("pages_skipped", 0, "counter", "6.7", "pages skipped by smart scan so far"),
)  # fmt: skip
"""Every attribute by name, tunables first."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What a kernel version has of KSM; made by `profile`.

    >>> profile("6.6").smart_scan, profile("6.12").smart_scan
    (False, True)
    """

    version: str
    number: tuple[int, int]
    attributes: Mapping[str, Attribute]
    """The files that there are, in the order of `ATTRIBUTES`."""

    @property
    def smart_scan(self) -> bool:
        """Whether ksmd can skip pages that failed to merge (6.7).

        >>> profile("6.8").smart_scan
        True
        """
        return "smart_scan" in self.attributes

    @property
    def advisor(self) -> bool:
        """Whether there is a scan-time advisor (6.8).

        >>> profile("6.6").advisor
        False
        """
        return "advisor_mode" in self.attributes

    @property
    def counts_zero_pages(self) -> bool:
        """Whether pages merged with the zero page are counted, also in the profits (6.6).

        >>> profile("6.4").counts_zero_pages
        False
        """
        return "ksm_zero_pages" in self.attributes

    @property
    def gate_first(self) -> bool:
        """Whether the checksum is looked at before the stable tree is searched (6.11), not after.

        >>> profile("6.8").gate_first, profile("6.12").gate_first
        (False, True)
        """
        return self.number >= (6, 11)

    @property
    def passes_over_none(self) -> bool:
        """Whether PROT_NONE slots keep their KSM frames when all is unmerged, and are not found again (6.1 to 6.4).

        >>> profile("6.1").passes_over_none, profile("6.6").passes_over_none
        (True, False)
        """
        return (6, 1) <= self.number < (6, 5)

    @property
    def inherits_item_count(self) -> bool:
        """Whether fork lets the child's ksm_rmap_items start at the parent's number (before 6.12).

        >>> profile("6.8").inherits_item_count, profile("6.12").inherits_item_count
        (True, False)
        """
        return self.number < (6, 12)

    @property
    def zero_giveback(self) -> bool:
        """Whether splitting a huge page gives its all-zero pages back (6.12).

        >>> profile("6.11").zero_giveback
        False
        """
        return self.number >= (6, 12)

    @property
    def process_merge_any(self) -> bool:
        """Whether prctl(PR_SET_MEMORY_MERGE) exists (6.4).

        >>> profile("6.1").process_merge_any
        False
        """
        return self.number >= (6, 4)

    @property
    def merge_any_survives_exec(self) -> bool:
        """Whether exec keeps what PR_SET_MEMORY_MERGE set (6.7).

        >>> profile("6.6").merge_any_survives_exec
        False
        """
        return self.number >= (6, 7)

    @property
    def ksm_stat_fields(self) -> tuple[str, ...]:
        """The names in /proc/PID/ksm_stat, in its order; none before 6.1.

        >>> profile("6.1").ksm_stat_fields
        ('ksm_rmap_items',)
        """
        return tuple(name for name, since in _KSM_STAT_SINCE.items() if self.number >= since)

    @property
    def vmstat_fields(self) -> tuple[str, ...]:
        """KSM's names in /proc/vmstat.

        >>> profile("5.15").vmstat_fields, profile("6.1").vmstat_fields
        ((), ('ksm_swpin_copy', 'cow_ksm'))
        """
        return tuple(name for name, since in _VMSTAT_SINCE.items() if self.number >= since)

    @property
    def ksm_merging_pages_file(self) -> bool:
        """Whether there is /proc/PID/ksm_merging_pages (5.19).

        >>> profile("5.15").ksm_merging_pages_file
        False
        """
        return self.number >= (5, 19)


_KSM_STAT_SINCE = {
    "ksm_rmap_items": (6, 1),
    "ksm_zero_pages": (6, 6),
    "ksm_merging_pages": (6, 4),
    "ksm_process_profit": (6, 4),
    "ksm_merge_any": (6, 14),
    "ksm_mergeable": (6, 14),
}
_VMSTAT_SINCE = {"ksm_swpin_copy": (5, 18), "cow_ksm": (5, 19)}
_OLDEST = (5, 15)


def profile(kernel: str) -> Profile:
    """The profile of a kernel version or release, 5.15 or later: "6.8", "6.12.1", "6.1.0-18-amd64".

    A distribution's kernel may have more than the version it names. Raises ValueError for what is no version and
    for an older one.

    >>> profile("6.8.0-45-generic").version
    '6.8'
    >>> "advisor_mode" in profile("6.6").attributes
    False
    """
    match = re.match(r"(\d+)\.(\d+)(?![0-9])", kernel)
    if match is None:
        raise ValueError(f"{kernel!r} is not a kernel version such as '6.12'")
    number = (int(match[1]), int(match[2]))
    if number < _OLDEST:
        raise ValueError(f"kernel {kernel!r} is older than 5.15, the oldest that is known here")
    present = {name: a for name, a in ATTRIBUTES.items() if tuple(int(part) for part in a.since.split(".")) <= number}
    return Profile(f"{number[0]}.{number[1]}", number, MappingProxyType(present))


class _File:
    """Typed access to one file, as a descriptor of `Sysfs`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.__doc__ = ATTRIBUTES[name].help

    def _write(self, instance: Sysfs, value: object) -> None:
        if not hasattr(value, "__index__"):
            raise TypeError(f"{self.name} takes an int, not {type(value).__name__}")
        instance.write(self.name, str(index(value)))


class Counter(_File):
    """A read-only file: an int. Assigning is an AttributeError."""

    @overload
    def __get__(self, instance: None, owner: type[Any]) -> Counter: ...
    @overload
    def __get__(self, instance: Sysfs, owner: type[Any]) -> int: ...
    def __get__(self, instance: Sysfs | None, owner: type[Any]) -> Counter | int:
        return self if instance is None else int(instance.read(self.name))


class Number(_File):
    """A writable file with a number: an int."""

    @overload
    def __get__(self, instance: None, owner: type[Any]) -> Number: ...
    @overload
    def __get__(self, instance: Sysfs, owner: type[Any]) -> int: ...
    def __get__(self, instance: Sysfs | None, owner: type[Any]) -> Number | int:
        return self if instance is None else int(instance.read(self.name))

    def __set__(self, instance: Sysfs, value: int) -> None:
        self._write(instance, value)


class Switch(_File):
    """A writable file with 0 or 1: a bool."""

    @overload
    def __get__(self, instance: None, owner: type[Any]) -> Switch: ...
    @overload
    def __get__(self, instance: Sysfs, owner: type[Any]) -> bool: ...
    def __get__(self, instance: Sysfs | None, owner: type[Any]) -> Switch | bool:
        return self if instance is None else int(instance.read(self.name)) != 0

    def __set__(self, instance: Sysfs, value: int) -> None:
        self._write(instance, value)


class Mode(_File):
    """A writable file that lists words and has one in brackets: that word."""

    @overload
    def __get__(self, instance: None, owner: type[Any]) -> Mode: ...
    @overload
    def __get__(self, instance: Sysfs, owner: type[Any]) -> str: ...
    def __get__(self, instance: Sysfs | None, owner: type[Any]) -> Mode | str:
        if instance is None:
            return self
        text = instance.read(self.name)
        chosen = re.search(r"\[(.*?)\]", text)
        return chosen[1] if chosen else text.strip()

    def __set__(self, instance: Sysfs, value: str) -> None:
        if not isinstance(value, str):
            raise TypeError(f"{self.name} takes a str, not {type(value).__name__}")
        instance.write(self.name, value)


class Sysfs(ABC):
    """The directory /sys/kernel/mm/ksm, simulated or real: its files as text, or as typed attributes.

    Every attribute of `ATTRIBUTES` is one here. A name that is none is an AttributeError; a file that this
    kernel does not have is a FileNotFoundError with ENOENT, whether read or written. See `StateSysfs` for an example.
    """

    __slots__ = ()

    run = Number("run")
    pages_to_scan = Number("pages_to_scan")
    sleep_millisecs = Number("sleep_millisecs")
    merge_across_nodes = Switch("merge_across_nodes")
    max_page_sharing = Number("max_page_sharing")
    use_zero_pages = Switch("use_zero_pages")
    stable_node_chains_prune_millisecs = Number("stable_node_chains_prune_millisecs")
    smart_scan = Switch("smart_scan")
    advisor_mode = Mode("advisor_mode")
    advisor_max_cpu = Number("advisor_max_cpu")
    advisor_target_scan_time = Number("advisor_target_scan_time")
    advisor_min_pages_to_scan = Number("advisor_min_pages_to_scan")
    advisor_max_pages_to_scan = Number("advisor_max_pages_to_scan")
    pages_shared = Counter("pages_shared")
    pages_sharing = Counter("pages_sharing")
    pages_unshared = Counter("pages_unshared")
    pages_volatile = Counter("pages_volatile")
    full_scans = Counter("full_scans")
    stable_node_chains = Counter("stable_node_chains")
    stable_node_dups = Counter("stable_node_dups")
    general_profit = Counter("general_profit")
    pages_scanned = Counter("pages_scanned")
    ksm_zero_pages = Counter("ksm_zero_pages")
    pages_skipped = Counter("pages_skipped")

    @property
    @abstractmethod
    def page_size(self) -> int:
        """Bytes in a page of this machine."""

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The files that there are, in the order of `ATTRIBUTES`.

        >>> from ksm import Machine
        >>> Machine().ksm.names()[:3]
        ('run', 'pages_to_scan', 'sleep_millisecs')
        """

    @abstractmethod
    def read(self, name: str) -> str:
        """What the file holds, with its newline. OSError: ENOENT.

        >>> from ksm import Machine
        >>> Machine().ksm.read("advisor_mode")
        '[none] scan-time\\n'
        """

    @abstractmethod
    def write(self, name: str, text: str | bytes) -> None:
        """Write to the file, at once and from its start, as write(2) does; a str goes as UTF-8.

        OSError: ENOENT; EACCES for a read-only file; EINVAL, ERANGE or EBUSY for a value that it does not take.
        An empty text changes nothing.

        >>> from ksm import Machine
        >>> Machine().ksm.write("run", "1\\n")
        """

    def snapshot(self) -> Stats:
        """All counters at one moment, and what derives from them; a running kernel's are read one after the other.

        >>> from ksm import Machine
        >>> Machine().ksm.snapshot().saved_bytes
        0
        """
        present = set(self.names())
        counters = [f.name for f in fields(Stats) if f.name in present]
        return Stats(page_size=self.page_size, **{name: int(self.read(name)) for name in counters})

    def tunables(self) -> dict[str, int | bool | str]:
        """The present values of the writable files, typed, by name.

        >>> from ksm import Machine
        >>> Machine(kernel="5.15").ksm.tunables()["max_page_sharing"]
        256
        """
        return {name: getattr(self, name) for name in self.names() if name in ATTRIBUTES and ATTRIBUTES[name].writable}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self.names())} files>"


class Backend(Protocol):
    """What holds the values behind a `StateSysfs`: ints, with `advisor_mode` as an index into `ADVISOR_MODES`."""

    def get(self, name: str) -> int:
        """The present value of a tunable or counter."""

    def set(self, name: str, value: int) -> None:
        """Store a tunable's new value, which is in range and differs from the present one; may raise EBUSY."""


class StateSysfs(Sysfs):
    """The directory of a simulated machine: reads and checks text as the kernel does, over a `Backend`.

    `lock`, when given, is held over each write and each snapshot, which makes them atomic.

    >>> class Values(dict):
    ...     get, set = dict.__getitem__, dict.__setitem__
    >>> ksm = StateSysfs(Values((a.name, a.default) for a in ATTRIBUTES.values()), profile("6.18"))
    >>> ksm.write("run", "1\\n")
    >>> ksm.run, ksm.read("run")
    (1, '1\\n')
    >>> ksm.advisor_mode = "scan-time"
    >>> ksm.pages_to_scan
    500
    >>> ksm.write("max_page_sharing", "1")
    Traceback (most recent call last):
        ...
    ksm.errors.SyscallError: [Errno 22] Invalid argument: max_page_sharing: '1'
    """

    __slots__ = ("_backend", "_lock", "_page_size", "profile")

    def __init__(
        self,
        backend: Backend,
        profile: Profile,
        page_size: int = 4096,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        self.profile = profile
        self._backend = backend
        self._page_size = page_size
        self._lock: AbstractContextManager[object] = nullcontext() if lock is None else lock

    @property
    def page_size(self) -> int:
        return self._page_size

    def names(self) -> tuple[str, ...]:
        return tuple(self.profile.attributes)

    def _find(self, name: str) -> Attribute:
        attribute = self.profile.attributes.get(name)
        if attribute is None:
            known = ATTRIBUTES.get(name)
            hint = f"since Linux {known.since}, and this is {self.profile.version}" if known else "no such attribute"
            raise kernel_error(errno.ENOENT, f"{name}: {hint}")
        return attribute

    def read(self, name: str) -> str:
        attribute = self._find(name)
        return attribute.format(self._backend.get(name))

    def write(self, name: str, text: str | bytes) -> None:
        data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else bytes(text)
        attribute = self._find(name)
        if not attribute.writable:
            raise kernel_error(errno.EACCES, f"{name} is read-only")
        if not data:
            return
        with self._lock:
            if name == "pages_to_scan" and self._advisor_is_on():
                raise kernel_error(errno.EINVAL, "pages_to_scan belongs to the advisor while advisor_mode is scan-time")
            value = attribute.parse(data, self.profile.number)
            if value == self._backend.get(name):
                return  # the kernel, too, never fails to store what is there
            self._backend.set(name, value)
            if name == "advisor_mode":
                pages = self._backend.get("advisor_min_pages_to_scan") if value else ATTRIBUTES["pages_to_scan"].default
                self._backend.set("pages_to_scan", pages & _U32)

    def snapshot(self) -> Stats:
        with self._lock:
            return super().snapshot()

    def _advisor_is_on(self) -> bool:
        return self.profile.advisor and self._backend.get("advisor_mode") != 0

"""Changing tunables after a rehearsal: what the kernel would refuse is explained before anything is written."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from ksm.errors import SyscallError, kernel_error
from ksm.linux import Host
from ksm.sysfs import ADVISOR_MODES, ATTRIBUTES, Attribute, Profile, StateSysfs, Sysfs

_EBUSY_WHILE_SHARED = ("merge_across_nodes", "max_page_sharing")


@dataclass(frozen=True, slots=True)
class Change:
    """One tunable's value before and after, as the file's text without its newline.

    `follows` marks what the kernel changes by itself, after another write.

    >>> Change("run", "0", "1").changed, Change("run", "1", "1").changed
    (True, False)
    """

    name: str
    before: str
    after: str
    follows: bool = field(default=False, repr=False)

    @property
    def changed(self) -> bool:
        """Whether it is another value than before.

        >>> Change("advisor_mode", "none", "scan-time").changed
        True
        """
        return self.before != self.after

    def to_dict(self) -> dict[str, str | bool]:
        """For JSON.

        >>> Change("run", "0", "1").to_dict()
        {'name': 'run', 'before': '0', 'after': '1', 'follows': False}
        """
        return {"name": self.name, "before": self.before, "after": self.after, "follows": self.follows}


def value_of(ksm: Sysfs, name: str) -> str:
    """A file's value as it would be written: without the newline, and of several words the one in brackets.

    >>> from ksm import Machine
    >>> value_of(Machine().ksm, "advisor_mode"), value_of(Machine().ksm, "run")
    ('none', '0')
    """
    text = ksm.read(name)
    chosen = re.search(r"\[(.*?)\]", text)
    return chosen[1] if chosen else text.strip()


def range_of(attribute: Attribute) -> str:
    """What a tunable takes, in words.

    >>> [range_of(ATTRIBUTES[name]) for name in ("run", "advisor_mode", "max_page_sharing", "advisor_target_scan_time")]
    ['0 to 2', 'none, scan-time', '2 to 2^31-1', '1 to 2^64-1']
    """
    if attribute.kind == "mode":
        return ", ".join(ADVISOR_MODES)
    if attribute.kind == "bool" or attribute.maximum == 1:
        return "0, 1"
    bits = (attribute.maximum + 1).bit_length() - 1
    most = f"2^{bits}-1" if attribute.maximum == (1 << bits) - 1 and bits > 16 else f"{attribute.maximum:,}"
    return f"{attribute.minimum:,} to {most}"


def tunables(ksm: Sysfs) -> list[Attribute]:
    """The tunables that there are, in the order of `ksm.sysfs.ATTRIBUTES`.

    >>> from ksm import Machine
    >>> [a.name for a in tunables(Machine(kernel="5.15").ksm)][:2]
    ['run', 'pages_to_scan']
    """
    return [ATTRIBUTES[name] for name in ksm.names() if name in ATTRIBUTES and ATTRIBUTES[name].writable]


def defaults(ksm: Sysfs, names: Iterable[str] = ()) -> dict[str, str]:
    """The kernel's defaults of the tunables named, or of all: what `plan_changes` takes to put them back.

    >>> from ksm import Machine
    >>> defaults(Machine().ksm, ["max_page_sharing"])
    {'max_page_sharing': '256'}
    """
    wanted = list(names) or [attribute.name for attribute in tunables(ksm)]
    for name in wanted:
        _require_tunable(ksm, name)
    return {name: default_of(ATTRIBUTES[name]) for name in wanted}


def default_of(attribute: Attribute) -> str:
    """The kernel's default, as it would be written.

    >>> default_of(ATTRIBUTES["advisor_mode"]), default_of(ATTRIBUTES["smart_scan"])
    ('none', '1')
    """
    return ADVISOR_MODES[attribute.default] if attribute.kind == "mode" else str(attribute.default)


# ---- before -------------------------------------------------------------------------------------------------


class _Values(dict[str, int]):
    """The backend of a rehearsal: the present values, and whether pages are merged."""

    def __init__(self, ksm: Sysfs) -> None:
        super().__init__((a.name, self._number(a, value_of(ksm, a.name))) for a in tunables(ksm))
        self.pages_shared = ksm.pages_shared

    @staticmethod
    def _number(attribute: Attribute, text: str) -> int:
        return ADVISOR_MODES.index(text) if attribute.kind == "mode" else int(text)

    def get(self, name: str) -> int:  # type: ignore[override]
        return self[name]

    def set(self, name: str, value: int) -> None:
        if name in _EBUSY_WHILE_SHARED and self.pages_shared:
            raise kernel_error(errno.EBUSY, name)
        if name == "run" and value == 2:
            self.pages_shared = 0
        self[name] = value


def plan_changes(
    ksm: Sysfs, wanted: Mapping[str, str], mem_available: int | None = None, release: str = "this one"
) -> list[Change]:
    """What writing these values would do, in the order in which to write them; nothing is written.

    The writes are rehearsed on a copy of the present values that answers as the kernel does, so that a refusal is
    known before it happens. Stopping ksmd or unmerging comes first, starting it last, and `advisor_mode` before the
    rest. The changes that follow by themselves (of `pages_to_scan`, when the advisor is switched) come at the end.

    Args:
        ksm: a host's files or a machine's.
        wanted: values by the tunable's name, as text.
        mem_available: bytes there are for the private copies that `run` = 2 makes; None leaves that unchecked.
        release: what the errors call this kernel.

    Raises:
        OSError: with the kernel's errno and an explanation: ENOENT for a name that is no file, EACCES for a counter,
            EINVAL or ERANGE for a value out of range and for `pages_to_scan` under the advisor, EBUSY for
            `max_page_sharing` and `merge_across_nodes` while pages are merged, ENOMEM when `run` = 2 needs more than
            `mem_available`.

    >>> from ksm import Machine
    >>> plan_changes(Machine().ksm, {"run": "1", "max_page_sharing": "512"})
    [Change(name='max_page_sharing', before='256', after='512'), Change(name='run', before='0', after='1')]
    >>> plan_changes(Machine().ksm, {"max_page_sharing": "1"})
    Traceback (most recent call last):
        ...
    ksm.errors.SyscallError: [Errno 22] Invalid argument: max_page_sharing: '1'; it takes 2 to 2^31-1
    """
    for name in wanted:
        _require_tunable(ksm, name, release)
    values = _Values(ksm)
    before = {a.name: value_of(ksm, a.name) for a in tunables(ksm)}
    present = MappingProxyType({name: ATTRIBUTES[name] for name in ksm.names() if name in ATTRIBUTES})
    rehearsal = StateSysfs(values, Profile(release, (1 << 30, 0), present), ksm.page_size)
    order = sorted(wanted, key=lambda name: _rank(name, wanted[name]))
    for name in order:
        shared = values.pages_shared
        try:
            rehearsal.write(name, wanted[name])
        except SyscallError as error:
            raise _explained(error, name, wanted[name], before[name], shared) from None
        if shared and not values.pages_shared:
            _require_memory(ksm, mem_available)
    after = {name: value_of(rehearsal, name) for name in before}
    following = [name for name in before if name not in wanted and before[name] != after[name]]
    return [Change(name, before[name], after[name], name in following) for name in (*order, *following)]


def _rank(name: str, text: str) -> int:
    """Stop first, then the advisor, then the rest, and start last."""
    if name == "run":
        return 3 if text.strip().lstrip("+0") == "1" else 0
    return 1 if name == "advisor_mode" else 2


def _require_tunable(ksm: Sysfs, name: str, release: str = "this one") -> None:
    present = ksm.names()
    attribute = ATTRIBUTES.get(name)
    if attribute is None or name not in present:
        if attribute is not None:
            numa = ", on NUMA kernels" if name == "merge_across_nodes" else ""
            hint = f"it is there since Linux {attribute.since}{numa}, and in {release} it is not"
        else:
            close = difflib.get_close_matches(name, [a.name for a in tunables(ksm)], 1)
            hint = f"no such tunable{f'; is it {close[0]}?' if close else ''}"
        raise kernel_error(errno.ENOENT, f"{name}: {hint}")
    if not attribute.writable:
        raise kernel_error(errno.EACCES, f"{name} is a counter, which cannot be set")


def _require_memory(ksm: Sysfs, available: int | None) -> None:
    stats = ksm.snapshot()
    if available is not None and stats.saved_bytes > available:
        raise kernel_error(
            errno.ENOMEM,
            f"run=2 makes private copies of {stats.saved_pages:,} pages, {stats.saved_bytes >> 20:,} MiB, and there "
            f"are {available >> 20:,} MiB available: the host would run out of memory",
        )


def _explained(error: SyscallError, name: str, text: str, before: str, shared: int) -> SyscallError:
    """The kernel's refusal with its reason and the way round it."""
    attribute = ATTRIBUTES[name]
    if error.errno == errno.EBUSY:
        return kernel_error(
            errno.EBUSY,
            f"{name} cannot change from {before} to {text.strip()} while pages are merged (pages_shared is "
            f"{shared:,}); `ksm tune set run=2 {name}={text.strip()}` unmerges them all first, then "
            "`ksm tune set run=1` starts over",
        )
    try:
        attribute.parse(text.encode("utf-8", "surrogateescape") or b"\n")
    except SyscallError as refusal:
        return kernel_error(refusal.errno or errno.EINVAL, f"{name}: {text!r}; it takes {range_of(attribute)}")
    return kernel_error(
        errno.EINVAL,
        f"{name} belongs to the advisor while advisor_mode is scan-time; set advisor_mode=none with it, or "
        "advisor_target_scan_time instead",
    )


def warnings(ksm: Sysfs, changes: Iterable[Change]) -> list[str]:
    """What the kernel takes without a word and people should know, a sentence each.

    >>> from ksm import Machine
    >>> ksm = Machine().ksm
    >>> warnings(ksm, plan_changes(ksm, {"sleep_millisecs": "0"}))
    ['sleep_millisecs=0: ksmd takes a whole CPU for as long as anything is registered.']
    """
    changes = list(changes)
    new = {change.name: change.after for change in changes if change.changed}
    after = {a.name: value_of(ksm, a.name) for a in tunables(ksm)} | {c.name: c.after for c in changes}
    stats = ksm.snapshot()
    found = []
    if new.get("sleep_millisecs") == "0":
        found.append("sleep_millisecs=0: ksmd takes a whole CPU for as long as anything is registered.")
    if new.get("pages_to_scan") == "0":
        found.append("pages_to_scan=0: ksmd wakes up and visits nothing.")
    if new.get("run") == "0" and stats.saved_pages:
        found.append(f"run=0: ksmd stops, and the {stats.saved_pages:,} pages saved so far stay merged.")
    if new.get("run") == "2" and stats.saved_pages:
        found.append(f"run=2: {stats.saved_pages:,} pages get private copies, which takes {stats.saved_bytes:,} bytes.")
    least, most = (after.get(f"advisor_{which}_pages_to_scan") for which in ("min", "max"))
    if least is not None and most is not None and int(least) > int(most):
        found.append(f"advisor_min_pages_to_scan ({least}) is above advisor_max_pages_to_scan ({most}).")
    idle = [name for name in new if name.startswith("advisor_") and name != "advisor_mode"]
    if idle and after.get("advisor_mode") == ADVISOR_MODES[0]:
        found.append(f"{', '.join(idle)}: without effect until advisor_mode is scan-time.")
    return found


def require_rights(host: Host, names: Iterable[str]) -> None:
    """Raise the error that the first write would meet, if these files cannot be written here.

    >>> require_rights(Host("/nonexistent"), [])
    """
    for name in names:
        path = host.root / name
        if not os.access(path, os.W_OK):
            if os.geteuid() != 0:
                raise kernel_error(errno.EACCES, f"writing {path} needs root")
            raise kernel_error(errno.EROFS, f"{host.root} cannot be written here, as in a container")


# ---- and then ------------------------------------------------------------------------------------------------


def apply(ksm: Sysfs, changes: Iterable[Change]) -> list[Change]:
    """Write the changes, in order; what really is there afterwards, of each.

    If a write fails those before it are taken back (but for an unmerging) and the error is raised.

    >>> from ksm import Machine
    >>> machine = Machine()
    >>> apply(machine.ksm, plan_changes(machine.ksm, {"run": "1"}))
    [Change(name='run', before='0', after='1')]
    >>> machine.ksm.run
    1
    """
    changes = list(changes)
    done: list[Change] = []
    try:
        for change in changes:
            if not change.follows:
                ksm.write(change.name, change.after)
                done.append(change)
    except BaseException:
        for change in reversed(done):
            if change.changed:
                with contextlib.suppress(OSError):
                    ksm.write(change.name, change.before)
        raise
    return [replace(change, after=value_of(ksm, change.name)) for change in changes]

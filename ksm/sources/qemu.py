"""Running QEMU guests, found by the name that QEMU was given (-name)."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator

from ksm.errors import SourceError, UnsupportedError
from ksm.sources.process import Area, ProcessImage

_GUEST_RAM = "dc"  # VmFlags: QEMU keeps all RAM blocks, and nothing else, from being copied by fork


class QemuImage(ProcessImage):
    """The memory of a running QEMU guest: what QEMU has marked mergeable, which is guest RAM, video RAM and ROMs.

    Args:
        name: as in `-name NAME` or `-name guest=NAME,...`; libvirt gives the domain's.
        all_ram: RAM blocks whether they are marked or not (a guest with `-machine mem-merge=off`).

    Raises:
        SourceError: there is no such guest, there are several, or nothing of it is marked mergeable.
        PermissionError: it belongs to somebody else.
        UnsupportedError: this is not Linux.

    >>> QemuImage("no such guest")
    Traceback (most recent call last):
    ksm.errors.SourceError: qemu:no such guest: no running QEMU has that name
    """

    format = "QEMU guest"

    def __init__(self, name: str, all_ram: bool = False) -> None:
        if sys.platform != "linux":
            raise UnsupportedError("running guests can be read on Linux only")
        self.all_ram = all_ram
        where = f"{'qemu-ram' if all_ram else 'qemu'}:{name}"
        found = [pid for pid, guest in running() if guest == name]
        if not found:
            raise SourceError(f"{where}: no running QEMU has that name")
        if len(found) > 1:
            pids = ", ".join(f"pid:{pid}" for pid in found)
            raise SourceError(f"{where}: {len(found)} running QEMUs have that name: {pids}")
        super().__init__(found[0], marked_only=not all_ram)
        self.name = where
        if not self.segments:
            self.close()
            why = "is marked mergeable (mem-merge=off?): qemu-ram:NAME reads it all the same"
            raise SourceError(f"{where}: none of its memory {'is RAM of its own' if all_ram else why}")

    def _takes(self, area: Area) -> bool:
        return _GUEST_RAM in area.flags if self.all_ram else area.marked


def running() -> Iterator[tuple[int, str]]:
    """(pid, guest's name) of the QEMU processes of this host that have a name.

    >>> all(pid > 0 for pid, name in running())
    True
    """
    for entry in sorted(filter(str.isdigit, os.listdir("/proc")), key=int):
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                words = os.fsdecode(file.read()).split("\0")
        except OSError:
            continue  # it has ended, or is hidden
        name = guest_name(words)
        if name is not None:
            yield int(entry), name


def guest_name(words: list[str]) -> str | None:
    """The name in a QEMU command line; None if this is none, or has no name.

    >>> guest_name(["/usr/bin/qemu-system-x86_64", "-name", "guest=web,,1,debug-threads=on"])
    'web,1'
    """
    program = os.path.basename(words[0])
    if not (program.startswith("qemu") or program == "kvm"):
        return None
    for option, value in itertools.pairwise(words):
        if option in ("-name", "--name"):
            parts = [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]
            named = [part.removeprefix("guest=") for part in parts if part.startswith("guest=")]
            return named[0] if named else parts[0]
    return None

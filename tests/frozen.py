"""Small real guests: Debian's kernel and busybox in QEMU (emulated), frozen and dumped in every form that QEMU writes.

`tests.frozen_forms` compares what the readers find in these dumps; `tests.frozen_truth` lets the kernel merge guests.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.kernel import boot

_BOOT_SECONDS = 120

INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys /dev /tmp
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b insmod /qemu_fw_cfg.ko
$b mount -t tmpfs tmp /tmp
$b dd if=/dev/urandom of=/tmp/noise bs=64k count=64 2>/dev/null
$b cp /tmp/noise /tmp/again
$b dd if=/dev/zero of=/tmp/zeros bs=64k count=64 2>/dev/null
$b echo guest ready
n=0
while true; do $b sleep 0.2; n=$((n+1)); $b dd if=/dev/urandom of=/tmp/more$((n%16)) bs=64k count=1 2>/dev/null; done
"""


def missing() -> str:
    """Why no guest can be run here; empty if one can."""
    return boot.why_not() or ""


def materials(folder: Path) -> tuple[Path, Path]:
    """(kernel, initramfs): Debian's kernel, and an initramfs that is written to the folder."""
    # The module tells QEMU where the kernel's vmcoreinfo is, which makedumpfile wants.
    modules = boot.modules(boot.KERNEL, "qemu_fw_cfg")
    files = {
        "init": INIT.encode(),
        "bin/busybox": boot.busybox().read_bytes(),
        "qemu_fw_cfg.ko": modules["qemu_fw_cfg"],
    }
    initramfs = folder / "initramfs"
    if not initramfs.exists():
        initramfs.write_bytes(cpio(files))
    return boot.kernel_image(), initramfs


def cpio(files: dict[str, bytes]) -> bytes:
    """An initramfs (cpio, newc) with these files, all executable, and their directories."""
    entries = {str(parent): (0o40755, b"") for name in files for parent in list(Path(name).parents)[:-1]}
    entries |= {name: (0o100755, content) for name, content in files.items()}
    archive = b""
    for number, (name, (mode, content)) in enumerate([*entries.items(), ("TRAILER!!!", (0, b""))], 1):
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + "".join(f"{value:08x}" for value in fields).encode() + name.encode() + b"\0"
        archive += head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
    return archive


# ---- guests ----------------------------------------------------------------------------------------------


class Guest:
    """A running QEMU. A context manager: it is killed at the end.

    Args:
        merge: whether its memory is marked mergeable; then the lock on the host's KSM must be held.
        state: of a stopped guest, to come up with, frozen, instead of booting.
        huge: whether its memory may have transparent huge pages.
    """

    def __init__(
        self,
        name: str,
        where: Path,
        *,
        memory: int = 96,
        merge: bool = False,
        state: Path | None = None,
        huge: bool = True,
    ) -> None:
        self.name = name
        self.memory = memory
        kernel, initramfs = materials(where)
        self._log = where / f"{name}.log"
        qmp = where / f"{name}.qmp"
        command = ["qemu-system-x86_64", "-name", f"guest={name},debug-threads=on", "-accel", "tcg"]
        command += ["-machine", f"pc,mem-merge={'on' if merge else 'off'}", "-m", str(memory), "-nodefaults"]
        command += ["-display", "none", "-vga", "std", "-device", "vmcoreinfo", "-serial", f"file:{self._log}"]
        command += ["-qmp", f"unix:{qmp},server=on,wait=off", "-kernel", str(kernel), "-initrd", str(initramfs)]
        command += ["-append", "console=ttyS0 quiet mitigations=off"]
        command += ["-S", "-incoming", "defer"] if state else []
        # No huge pages: PR_SET_THP_DISABLE stays over exec. And if we die, so does the guest: PR_SET_PDEATHSIG.
        libc = ctypes.CDLL(None)

        def prepare() -> None:
            libc.prctl(1, 9, 0, 0, 0)
            libc.prctl(41, int(not huge), 0, 0, 0)

        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=prepare)
        self.pid = self.process.pid
        try:
            self._connect(qmp)
            if state:
                self._execute("migrate-incoming", uri=f"exec:cat {state}")
                self._migrated()
        except BaseException:
            self.close()
            raise

    def _connect(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 30
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                self._alive()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self._qmp = self._socket.makefile("rw")
        self._qmp.readline()
        self._execute("qmp_capabilities")

    def _alive(self) -> None:
        if self.process.poll() is not None:
            assert self.process.stderr is not None
            raise RuntimeError(f"QEMU ended: {self.process.stderr.read().decode()}")

    def _execute(self, command: str, **arguments: Any) -> Any:
        self._qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._qmp.flush()
        while True:
            answer = json.loads(self._qmp.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def wait_until_ready(self) -> None:
        """Wait until it has booted and runs what fills its memory."""
        deadline = time.monotonic() + _BOOT_SECONDS
        while b"guest ready" not in self._log.read_bytes():
            self._alive()
            if time.monotonic() > deadline:
                raise TimeoutError(self._log.read_text(errors="replace"))
            time.sleep(0.1)

    def freeze(self) -> None:
        """Stop its CPU."""
        self._execute("stop")

    def run(self, seconds: float) -> None:
        """Let it go on for a while, and freeze it again."""
        self._execute("cont")
        time.sleep(seconds)
        self._execute("stop")

    def pmemsave(self, path: Path, start: int, size: int) -> None:
        """Physical memory as a raw file."""
        self._execute("pmemsave", val=start, size=size, filename=str(path))

    def dump(self, path: Path, form: str) -> None:
        """dump-guest-memory in one of `dump_forms`."""
        self._execute("dump-guest-memory", paging=False, protocol=f"file:{path}", format=form)

    def dump_forms(self) -> list[str]:
        """The forms of `dump` that this QEMU was built with."""
        forms = self._execute("query-dump-guest-memory-capability")["formats"]
        return [form for form in forms if form != "win-dmp"]  # of Windows guests only

    def migrate(self, path: Path) -> None:
        """Its state as a migration stream."""
        self._execute("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self._execute("migrate", uri=f"exec:cat > {path}")
        self._migrated()

    def _migrated(self) -> None:
        while (status := self._execute("query-migrate").get("status")) not in ("completed", "failed"):
            self._alive()
            time.sleep(0.02)
        if status == "failed":
            raise RuntimeError("migration failed")

    def close(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        with contextlib.suppress(AttributeError):
            self._qmp.close()
        self._socket.close()

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def booted(name: str, where: Path, memory: int = 96) -> Iterator[Guest]:
    """A guest that has booted and is frozen; its memory is not marked mergeable."""
    with Guest(name, where, memory=memory) as guest:
        guest.wait_until_ready()
        guest.freeze()
        yield guest

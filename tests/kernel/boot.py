"""Guests: a Linux kernel in QEMU, whose only file system holds a Python program and what it needs.

Each guest is emulated, has its memory out of the host's KSM, and talks over a serial line.
"""

from __future__ import annotations

import importlib.util
import lzma
import os
import py_compile
import re
import selectors
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from tests.debian import NoPackage, unpacked

QEMU = "qemu-system-x86_64"
KERNEL = "linux-image-cloud-amd64"
"""The Debian package of the kernel that is booted unless another is named."""
BOOT_SECONDS = 120.0

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mkdir -p /run/lock
mount -t tmpfs groups /sys/fs/cgroup && mkdir /sys/fs/cgroup/memory
if ! mount -t cgroup -o memory groups /sys/fs/cgroup/memory 2>/dev/null; then
    umount /sys/fs/cgroup; mount -t cgroup2 groups /sys/fs/cgroup; echo +memory > /sys/fs/cgroup/cgroup.subtree_control
fi
for module in /modules/*; do insmod $module; done
@PROGRAM@
echo "the program has ended: $?"
poweroff -f
"""


def kernel_image(kernel: str = KERNEL) -> Path:
    """The kernel to boot: a file, or that of a Debian package."""
    if os.path.isfile(kernel):
        return Path(kernel)
    return next(unpacked(kernel).glob("boot/vmlinuz-*"))


def busybox() -> Path:
    """A static busybox."""
    return next(unpacked("busybox-static").glob("**/bin/busybox"))


def modules(kernel: str, *wanted: str) -> dict[str, bytes]:
    """Modules of a Debian kernel, decompressed, each after those it needs; names that it has not are left out."""
    found: dict[str, bytes] = {}
    for name in wanted if not os.path.isfile(kernel) else ():
        for path in unpacked(kernel).glob(f"lib/modules/**/{name}.ko*"):
            content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
            needs = re.search(rb"\0depends=([^\0]*)", content)
            found |= modules(kernel, *needs[1].decode().replace("_", "[-_]").split(",")) if needs and needs[1] else {}
            found[path.name.partition(".")[0]] = content
    return found


def why_not(kernel: str = KERNEL) -> str | None:
    """Why no guest can be booted here; None: it can be tried."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "guests have this machine's Python, and x86-64 kernels"
    missing = [tool for tool in (QEMU, "setpriv") if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)}"
    try:
        busybox()
        kernel_image(kernel)
    except NoPackage as reason:
        return str(reason)
    return None


def libraries(path: Path) -> list[Path]:
    """The shared objects that a program or shared object needs, with the loader; none for a static one."""
    done = subprocess.run(["ldd", path], capture_output=True, text=True)
    return [Path(found) for found in re.findall(r"(?:=> |^\s*)(/\S+)", done.stdout, re.MULTILINE)]


class Tree:
    """The files of a guest, collected in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("bin", "proc", "sys", "dev", "tmp", "run"):
            (root / name).mkdir()
        self.add(busybox(), Path("/bin/busybox"))

    def add(self, path: Path, to: Path | None = None) -> None:
        """A file with the shared objects it needs, each where it is on the host."""
        target = self._target(to or path)
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        if path.suffix != ".py":
            for library in libraries(path):
                self.add(library)

    def add_modules(self, contents: dict[str, bytes]) -> None:
        """Kernel modules, to be loaded in this order."""
        (self.root / "modules").mkdir()
        for number, (name, content) in enumerate(contents.items()):
            (self.root / "modules" / f"{number:02}-{name}").write_bytes(content)

    def add_python(self, module: str, source: Path) -> str:
        """This interpreter and all that `module`, found in `source`, imports; the command that runs it.

        Everything is compiled here: in an emulated guest that would take longer than all the rest.
        """
        script = f"import sys; sys.path.append({str(source)!r}); import {module}\n"
        script += "for m in list(sys.modules.values()): print(getattr(m, '__file__', None) or '')"
        python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
        done = subprocess.run([python, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
        files = {Path(line) for line in done.stdout.splitlines() if line}
        library = Path(sysconfig.get_path("stdlib"))
        for name in ("collections", "importlib", "encodings"):  # what is found by other names, or only when needed
            files |= set(library.glob(f"{name}/[_aclmu]*.py"))
        for path in sorted(files):
            self.add(path)
            if path.suffix == ".py":
                compiled = self._target(Path(importlib.util.cache_from_source(str(path))))
                py_compile.compile(
                    str(path), str(compiled), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
                )
        self.add(python)
        home = f"PYTHONHOME={sys.base_prefix} PYTHONPATH={source}"
        return f"{home} {python} -S -c 'import {module} as program; program.main()'"

    def _target(self, path: Path) -> Path:
        return self.root / path.relative_to("/")

    def archive(self, to: Path, program: str) -> None:
        """The tree as an initramfs that runs the shell command `program`."""
        script = self.root / "init"
        script.write_text(INIT.replace("@PROGRAM@", program))
        script.chmod(0o755)
        names = "\n".join(str(path.relative_to(self.root)) for path in [*self.root.rglob("*")])
        with to.open("wb") as out:
            command = [str(busybox()), "cpio", "-o", "-H", "newc"]
            subprocess.run(command, input=names.encode(), stdout=out, stderr=subprocess.PIPE, cwd=self.root, check=True)


class Guest:
    """A running guest; lines go to its program and come from it."""

    def __init__(
        self, kernel: Path, initramfs: Path, nodes: int = 1, mebibytes: int = 512, log: Path | None = None
    ) -> None:
        self._stack = ExitStack()
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ksm-guest-")))
        self.log = log or directory / "console"
        memory: list[str] = []
        for node in range(nodes):
            memory += ["-object", f"memory-backend-ram,id=m{node},merge=off,size={mebibytes // nodes}M"]
            memory += ["-numa", f"node,nodeid={node},memdev=m{node}" + ",cpus=0" * (node == 0)]
        words = "console=ttyS0 loglevel=4 panic=-1 rdinit=/init numa_balancing=disable"
        command = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-machine", "pc,mem-merge=off", "-accel", "tcg", "-cpu", "max,la57=off", "-smp", "1"]
        command += ["-m", f"{mebibytes // nodes * nodes}M", *memory]
        command += ["-kernel", str(kernel), "-initrd", str(initramfs), "-append", words]
        command += ["-serial", f"file:{self.log}", "-chardev", "stdio,id=line,signal=off", "-serial", "chardev:line"]
        # whatever becomes of us, the guest does not stay behind
        with (directory / "qemu").open("wb") as errors:
            self._qemu = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        self._errors = directory / "qemu"
        self._stack.callback(self._end)
        self._got = b""

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _end(self) -> None:
        self._qemu.kill()
        self._qemu.communicate()

    @property
    def running(self) -> bool:
        """Whether QEMU has not ended."""
        return self._qemu.poll() is None

    def send(self, line: bytes) -> None:
        """A line, with its end, to the guest's program."""
        assert self._qemu.stdin is not None
        self._qemu.stdin.write(line)
        self._qemu.stdin.flush()

    def receive(self, seconds: float = BOOT_SECONDS) -> bytes:
        """The program's next line."""
        assert self._qemu.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._qemu.stdout, selectors.EVENT_READ)
            while b"\n" not in self._got:
                if not selector.select(max(0, deadline - time.monotonic())):
                    raise TimeoutError(f"the guest said nothing for {seconds:g} s\n{self._last_words()}")
                part = os.read(self._qemu.stdout.fileno(), 1 << 16)
                if not part:
                    self._qemu.wait(10)
                    raise RuntimeError(f"the guest has ended\n{self._last_words()}")
                self._got += part
        line, _, self._got = self._got.partition(b"\n")
        return line

    def _last_words(self) -> str:
        return (self._errors.read_text() + self.log.read_text(errors="replace"))[-3000:]

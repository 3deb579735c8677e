"""A process dumped by the real CRIU: in a guest, since CRIU lags behind the kernels it runs on."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np

from tests.kernel import boot

PAGE = 4096
AREA = 0x10000000
AREA_PAGES = 256
_SECONDS = 120
_MODULES = ("nf_tables", "unix_diag", "inet_diag", "tcp_diag", "udp_diag", "netlink_diag", "af_packet_diag")

PROGRAM = """
ifconfig lo up
mkdir -p /img /var/run
/victim </dev/null >/dev/null 2>&1 &
sleep 1
CRIU dump -t $(pidof victim) -D /img -v4 -o dump.log --shell-job || tail -n 5 /img/dump.log
stty -F /dev/ttyS1 raw
tar cf /dev/ttyS1 -C /img .
sync
sleep 1
"""


def why_not() -> str | None:
    """Why it cannot be had here; None: it can be tried."""
    missing = [tool for tool in ("criu", "cc") if shutil.which(tool) is None]
    return f"no {', '.join(missing)}" if missing else boot.why_not()


def expected() -> dict[int, bytes]:
    """The pages of the area that tests/victim.c touches, by the same arithmetic."""
    found = {AREA + page * PAGE: b"k" * PAGE for page in range(120, 140)}
    found |= {AREA + page * PAGE: bytes(PAGE) for page in range(150, 160)}
    for page in range(0, 100, 2):
        state, content = 12345 + page, np.empty(PAGE, np.uint8)
        for at in range(PAGE):
            state = (state * 1103515245 + 12345) & 0xFFFFFFFF
            content[at] = state >> 16 & 0xFF
        found[AREA + page * PAGE] = content.tobytes()
    return found


def dumped(folder: Path) -> Path:
    """The directory that CRIU filled."""
    victim = folder / "victim"
    subprocess.run(["cc", "-static", "-O1", "-o", victim, Path(__file__).with_name("victim.c")], check=True)
    (folder / "root").mkdir()
    tree = boot.Tree(folder / "root")
    criu = Path(str(shutil.which("criu")))
    tree.add(criu)
    tree.add(victim, Path("/victim"))
    tree.add_modules(boot.modules(boot.KERNEL, *_MODULES))
    tree.archive(folder / "initramfs", PROGRAM.replace("CRIU", str(criu)))
    command = [boot.QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "256"]
    command += ["-machine", "pc,mem-merge=off", "-accel", "tcg", "-cpu", "qemu64"]
    command += ["-kernel", str(boot.kernel_image()), "-initrd", str(folder / "initramfs")]
    command += ["-append", "console=ttyS0 quiet panic=-1 rdinit=/init mitigations=off"]
    command += ["-serial", f"file:{folder / 'console'}", "-serial", f"file:{folder / 'images.tar'}"]
    # Should we be killed, the guest goes too.
    command = ["setpriv", "--pdeathsig", "KILL", *command]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, timeout=_SECONDS)
    images = folder / "images"
    with tarfile.open(folder / "images.tar") as archive:
        archive.extractall(images, filter="data")
    if not list(images.glob("pagemap-*.img")):
        raise RuntimeError((folder / "console").read_text(errors="replace"))
    return images

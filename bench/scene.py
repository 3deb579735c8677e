"""A host with something to see: workers that share, one that shares nothing, one that writes to what is merged.

    python bench/scene.py --for 60s -- ksm top --once
    python bench/scene.py --for 60s            # and look from another terminal

As root, on the real kernel: ksmd runs meanwhile, alone (it takes the lock), and every tunable is put back. A command
after `--` is run once the scene has been merged for a while; the scene ends with it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import ksm
from ksm.cli.common import duration
from ksm.cli.crew import Crew
from ksm.linux import Host
from ksm.stepper import restore

OTHER = """
import ctypes, mmap, os, random, sys, time
from ksm.constants import MADV_MERGEABLE, MADV_NOHUGEPAGE
from ksm.linux import madvise
name, pages, writes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)
area = mmap.mmap(-1, pages * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
madvise(area, MADV_NOHUGEPAGE)
area[:] = b"the same everywhere".ljust(4096) * pages if writes else os.urandom(pages * 4096)
madvise(area, MADV_MERGEABLE)
while True:
    time.sleep(0.02 if writes else 1000)
    for _ in range(writes // 50):
        area[random.randrange(pages) * 4096 + 100] ^= 1
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--for", dest="seconds", default=60.0, type=lambda text: duration(None, None, text))
    parser.add_argument("--settle", default=20.0, type=float, help="seconds before the command")
    parser.add_argument("--pages-to-scan", default=4000, type=int)
    parser.add_argument("command", nargs="*")
    arguments = parser.parse_args()
    host = Host()
    others: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, "PYTHONPATH": str(Path(ksm.__file__).parents[1])}
    with host.lock():
        saved = {name: host.ksm.read(name) for name in host.ksm.tunables()}
        try:
            with Crew(6) as crew:
                crew.work()
                for name, pages, writes in (("archive", 20_000, 0), ("scratch", 4000, 400)):
                    line = [sys.executable, "-c", OTHER, name, str(pages), str(writes)]
                    others.append(subprocess.Popen(line, stdout=subprocess.DEVNULL, cwd="/", env=environment))
                host.ksm.pages_to_scan, host.ksm.sleep_millisecs = arguments.pages_to_scan, 20
                host.ksm.run = 1
                if arguments.command:
                    time.sleep(arguments.settle)
                    return subprocess.run(arguments.command, timeout=arguments.seconds, check=False).returncode
                time.sleep(arguments.seconds)
                return 0
        except KeyboardInterrupt:
            return 130
        finally:
            for other in others:
                other.kill()
                other.wait()
            restore(host.ksm, saved, unmerge=True)


if __name__ == "__main__":
    sys.exit(main())

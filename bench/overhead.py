"""What watching costs: the CPU time of `ksm top` and of `ksm export` on a host with thousands of processes.

    python bench/overhead.py [--processes 2000] [--seconds 30]

The processes are real and sleep; `top` draws 80x24 into a pseudo-terminal every 2 s, the exporter is scraped every 5 s.
Each one's own CPU time, from /proc/PID/stat, divided by the time: a share of one CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import ksm

HERD = """
import os, signal, sys
for _ in range(int(sys.argv[1])):
    if os.fork() == 0: signal.pause()
print('ready', flush=True); sys.stdin.read(); os.killpg(0, signal.SIGKILL)
"""
MAIN = "import sys; from ksm.cli import main; sys.exit(main())"


@contextlib.contextmanager
def herd(number: int) -> Iterator[None]:
    command = [sys.executable, "-S", "-c", HERD, str(number)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as parent:
        try:
            assert parent.stdout is not None
            parent.stdout.readline()
            yield
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


def cpu_seconds(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def start(*arguments: str, output: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(ksm.__file__).parents[1]), "TERM": "xterm-256color"}
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments], cwd="/", env=environment, stdin=output, stdout=output, stderr=output
    )


def measured(process: subprocess.Popen[bytes], seconds: float, warm: float = 4.0) -> float:
    time.sleep(warm)
    begin, used = time.monotonic(), cpu_seconds(process.pid)
    time.sleep(seconds)
    share = (cpu_seconds(process.pid) - used) / (time.monotonic() - begin)
    process.terminate()
    process.wait()
    return share


def top(seconds: float) -> float:
    master, slave = pty.openpty()
    threading.Thread(target=swallow, args=(master,), daemon=True).start()
    try:
        return measured(start("top", output=slave), seconds)
    finally:
        os.close(slave)


def swallow(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(descriptor, 65536):
            pass


def exporter(seconds: float) -> float:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stop = threading.Event()

    def scrape() -> None:
        while not stop.wait(5.0):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read()

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        return measured(start("export", "--listen", f"127.0.0.1:{port}", output=subprocess.DEVNULL), seconds)
    finally:
        stop.set()
        scraper.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    with herd(arguments.processes):
        there = sum(name.isdecimal() for name in os.listdir("/proc"))
        print(f"{there:,} processes, {arguments.seconds:g} s each")
        print(f"ksm top, every 2 s:          {100 * top(arguments.seconds):.2f} % of a CPU")
        print(f"ksm export, scraped every 5 s: {100 * exporter(arguments.seconds):.2f} % of a CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Fuzz every reader of dumps with atheris: `python -m tests.fuzz --seconds 600 --corpus DIR [FORMAT...]`.

Each input must be read, or refused by an exception of ksm: no other exception, no crash, no hang, and no more memory
than the input justifies. What breaks that is written to the corpus as crash-*, timeout-* or oom-*; it becomes a case
of the format's tests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import criu_writer
from tests.fuzz.target import SEEDS, target

_MEMORY_MIB = 700
_TIMEOUT = 20


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"of {', '.join(SEEDS)}; default: all, in turn")
    parser.add_argument("--seconds", type=int, default=600, help="for each format")
    parser.add_argument("--corpus", type=Path, default=Path("fuzz-corpus"))
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)  # one format, in a process of its own
    given = parser.parse_args()
    if unknown := set(given.formats) - set(SEEDS):
        parser.error(f"no format {', '.join(unknown)}")
    if given.run:
        return run(given.formats[0], given.corpus, given.seconds)
    worst = 0
    for name in given.formats or SEEDS:
        folder = given.corpus / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(SEEDS[name]()):
            (folder / f"seed-{number}").write_bytes(seed)
        command = [sys.executable, "-m", "tests.fuzz", name, "--run", "--seconds", str(given.seconds)]
        started = time.monotonic()
        done = subprocess.run([*command, "--corpus", str(folder)], capture_output=True, text=True)
        runs = [line for line in done.stderr.splitlines() if line.startswith(("stat::number_of", "stat::peak"))]
        found = [path.name for kind in ("crash", "slow", "oom", "timeout") for path in folder.glob(f"{kind}-*")]
        took = f"{time.monotonic() - started:.0f} s"
        print(f"{name}: {took}, {'; '.join(runs)}, found: {', '.join(found) or 'nothing'}", flush=True)
        if done.returncode:
            print(done.stderr[-3000:], flush=True)
            worst = 1
    return worst


def run(name: str, folder: Path, seconds: int) -> int:
    """One format, until the time is up or something is found; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["ksm.sources"]):
        from ksm import sources  # noqa: F401
    scratch = tempfile.TemporaryDirectory(prefix="ksm-fuzz-", dir="/dev/shm")
    if name == "criu":  # what is beside the pagemap
        criu_writer.write(Path(scratch.name), {0: bytes(8 * 4096)}, vmas=[(0, 1 << 20, 1), (1 << 20, 1 << 21, 9)])
    fd = os.open(f"{scratch.name}/pagemap-7.img", os.O_RDWR | os.O_CREAT)

    def once(data: bytes) -> None:
        os.ftruncate(fd, 0)
        os.pwrite(fd, data, 0)
        target(f"{scratch.name}/pagemap-7.img")

    options = [f"-max_total_time={seconds}", f"-rss_limit_mb={_MEMORY_MIB}", f"-timeout={_TIMEOUT}"]
    options += ["-print_final_stats=1", "-max_len=65536", f"-artifact_prefix={folder}/", str(folder)]
    atheris.Setup([sys.argv[0], *options], once)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())

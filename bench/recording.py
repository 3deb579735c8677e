"""`python -m bench.recording`: how large a trace of real work is, and what recording it costs.

Database servers (SQLite in memory, one process each) with the same tables run transactions at a steady rate while
`ksm record` looks at them; or, with `--guests`, real QEMU guests run. The first step and the changes are told apart, a
GiB of memory and hour each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ksm.trace import Trace, record

SERVER = """
import random, sqlite3, sys, time
number, rows, rate = map(int, sys.argv[1:])
base = sqlite3.connect(":memory:")
base.execute("create table account (id integer primary key, name text, balance integer, note text)")
same, own = random.Random(0), random.Random(number)
base.executemany("insert into account values (?, ?, ?, ?)", (
    (i, f"customer {i}", same.randrange(10**6), same.randbytes(100).hex()) for i in range(rows)))
base.execute("create index by_balance on account (balance)")
base.commit()
print("ready", flush=True)
begun, done = time.monotonic(), 0
while True:
    for _ in range(10):  # most transactions are about few customers
        who = int(rows * own.random() ** 4)
        base.execute("update account set balance = balance + ? where id = ?", (own.randrange(-99, 99), who))
    base.execute("select count(*) from account where balance between ? and ?", (own.randrange(10**6), 10**6)).fetchone()
    base.commit()
    done += 1
    time.sleep(max(0.0, begun + done / rate - time.monotonic()))
"""


@contextlib.contextmanager
def servers(number: int, rows: int, rate: int) -> Iterator[list[str]]:
    """The sources of running servers that have filled their tables."""
    running: list[subprocess.Popen[str]] = []
    try:
        for index in range(number):
            command = [sys.executable, "-c", SERVER, str(index), str(rows), str(rate)]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        yield [f"pid:{process.pid}" for process in running]
    finally:
        for process in running:
            with process:
                process.kill()


@contextlib.contextmanager
def guests(number: int) -> Iterator[list[str]]:
    """The sources of running QEMU guests, Debian's kernel and a busybox that rewrites files; none is merged."""
    from tests.frozen import Guest  # which fetches Debian's packages

    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = [stack.enter_context(Guest(f"recorded{index}", place)) for index in range(number)]
        for guest in running:
            guest.wait_until_ready()
        yield [f"qemu-ram:{guest.name}" for guest in running]


def sizes(trace: Trace) -> dict[str, Any]:
    """What a trace takes: its first step and its changes, a GiB of memory (and hour) each."""
    pages = [step.row["pages"] for step in trace.steps]
    gib = sum(pages) / len(pages) * trace.page_size / (1 << 30)
    rows = first = 0
    for change in trace.changes():
        rows += len(change.pages)
        first += len(change.pages) if change.step == trace.steps[0].number else 0
    files = sum(path.stat().st_size for path in trace.path.rglob("*.parquet"))
    hours = trace.duration / 3600
    changed = sum(step.row["changed"] + step.row["appeared"] + step.row["gone"] for step in trace.steps[1:])
    return {
        "steps": len(trace.steps),
        "seconds": trace.duration,
        "gib": gib,
        "bytes": files,
        "rows": rows,
        "bytes_a_row": files / rows,
        "first_mib_per_gib": files * first / rows / gib / (1 << 20),
        "changes_mib_per_gib_hour": files * (rows - first) / rows / gib / hours / (1 << 20),
        "pages_changed_a_step": changed / (len(trace.steps) - 1),
        "cpu_ms_per_gib_step": 1000 * sum(step.row["cpu_seconds"] for step in trace.steps) / len(trace.steps) / gib,
    }


def main() -> None:
    """Run it and print what it came to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--every", type=float, default=10.0)
    parser.add_argument("--servers", type=int, default=3)
    parser.add_argument("--rows", type=int, default=400_000, help="in the table of each server")
    parser.add_argument("--rate", type=int, default=5, help="transactions a second of each server")
    parser.add_argument("--guests", type=int, default=0, help="record so many QEMU guests instead of servers")
    parser.add_argument("--keep", type=Path, help="where to put the trace; default: nowhere")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory())
        work = guests(options.guests) if options.guests else servers(options.servers, options.rows, options.rate)
        where = options.keep or Path(place, "trace")
        record(stack.enter_context(work), where, every=options.every, seconds=options.seconds, threads=1)
        found = sizes(Trace(where))
    if options.json:
        print(json.dumps(found, indent=2))
        return
    who = f"{options.guests} guests" if options.guests else f"{options.servers} servers"
    print(
        f"{found['gib']:.2f} GiB in {who}, {found['steps']} steps over {found['seconds']:.0f} s, "
        f"{found['pages_changed_a_step']:,.0f} pages changed from step to step."
    )
    print(f"The trace takes {found['bytes'] / (1 << 20):.1f} MiB, {found['bytes_a_row']:.1f} bytes a change:")
    print(f"  first step  {found['first_mib_per_gib']:.2f} MiB a GiB of memory")
    print(f"  changes     {found['changes_mib_per_gib_hour']:.1f} MiB a GiB of memory and hour")
    print(f"Reading takes {found['cpu_ms_per_gib_step']:.0f} ms of CPU time a GiB and step.")


if __name__ == "__main__":
    main()

"""`python -m tests.kernel.sysfs`: what the running kernel answers to texts written to its KSM files, into data/."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from tests.kernel.host import SYSFS
from tests.kernel.real import COUNTERS, TUNABLES, KernelSession

ANSWERS = Path(__file__).with_name("data") / "sysfs_writes.json"
DEFAULTS = {**TUNABLES, "stable_node_chains_prune_millisecs": "2000"}

_NUMBERS = (
    0,
    1,
    2,
    3,
    5,
    255,
    256,
    257,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    (1 << 32) + 1,
    1 << 63,
    (1 << 64) - 1,
    1 << 64,
)
TEXTS = (
    *map(str, [*_NUMBERS, (1 << 31) - 1, (1 << 63) - 1, (1 << 64) + 1, 10**30]),
    *("", "\n", " ", "+", "-", "+1", "++1", "-0", "-1", "01", "0001", "010", "0x10", "1e3", "1.0", "1,000", "1_0"),
    *(" 1", "1 ", "\t1", "1\n", "1\n\n", "\n1", "1 \n", "1\r\n", "1\0", "1\0junk", "1\n\0junk", "\0", "\x001", "1junk"),
    *("y", "Y", "n", "N", "t", "f", "yes", "no", "on", "ON", "off", "of", "o", "e", "d", "true", "false", "y\n", " y"),
    *(
        "none",
        "none\n",
        "none\n\n",
        " none",
        "None",
        "non",
        "none\0x",
        "scan-time",
        "scan-time\n",
        "scan_time",
        "[none]",
    ),
    *("0" * 4095 + "1", "0" * 4096 + "1", "1" + "\n" * 4095, "1" + "\0" * 4999),
)


def ask(session: KernelSession, name: str, text: str) -> dict[str, object]:
    """The errno of one write, from the defaults on, and what the file holds afterwards."""
    if name in COUNTERS:
        try:
            os.close(os.open(SYSFS / name, os.O_WRONLY))
        except OSError as error:
            return {"file": name, "text": text, "errno": error.errno, "value": "0"}
        raise AssertionError(f"{name} can be written")
    failed = 0
    try:
        session.write(name, text)
    except OSError as error:
        failed = error.errno or 0
    row = {"file": name, "text": text, "errno": failed, "value": session.read(name).strip()}
    if name == "run":
        session.write("run", "0")
    session.write("advisor_mode", "none")
    session.write(name, DEFAULTS[name])
    return row


def measure() -> list[dict[str, object]]:
    """A row for every file and text."""
    with KernelSession() as session:
        for name, value in DEFAULTS.items():
            session.write(name, value)
        rows = [ask(session, name, text) for name in sorted(TUNABLES) for text in TEXTS]
        return rows + [ask(session, name, "1") for name in sorted(COUNTERS)]


def main() -> None:
    rows = measure()
    ANSWERS.parent.mkdir(exist_ok=True)
    ANSWERS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"{len(rows):,} answers, {sum(row['errno'] == errno.EINVAL for row in rows):,} of them EINVAL, in {ANSWERS}")


if __name__ == "__main__":
    main()

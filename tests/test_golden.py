"""Golden figures: one digest for each kernel profile over a grid of programs and machines pins behaviour for good.

`python -m tests.test_golden` writes the digests anew: only when the kernel says so, with a line in the change log.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import ksm
from tests.lockstep import SWAP_BYTES, everything, generate, perform

GOLDEN = Path(__file__).parent / "data" / "golden.json"
PROFILES = ("5.15", "6.1", "6.6", "6.8", "6.12", "6.18")
MACHINES: tuple[dict[str, int], ...] = ({}, {"nodes": 2}, {"nodes": 3, "swap": 1}, {"swap": 1}, {"ram": 30})
SEEDS = range(8)


def digest(kernel: str, index: str) -> str:
    """What every operation answers, and every counter after it."""
    found = hashlib.blake2b(digest_size=16)
    for settings in MACHINES:
        nodes, swap, ram = settings.get("nodes", 1), bool(settings.get("swap")), settings.get("ram")
        for seed in SEEDS:
            machine = ksm.Machine(
                nodes=nodes, swap=swap * SWAP_BYTES, ram=None if ram is None else ram * 4096, kernel=kernel, index=index
            )
            for op in generate(seed, nodes=nodes, swap=swap, ram=ram):
                found.update(json.dumps([perform(machine, op), everything(machine)], sort_keys=True).encode())
    return found.hexdigest()


@pytest.mark.parametrize("index", ["hash", "tree"])
@pytest.mark.parametrize("kernel", PROFILES)
def test_behaviour_is_pinned(kernel: str, index: str) -> None:
    assert digest(kernel, index) == json.loads(GOLDEN.read_text())[kernel]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({kernel: digest(kernel, "tree") for kernel in PROFILES}, indent=1) + "\n")

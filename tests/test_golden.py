"""Golden figures: one digest for each kernel profile over a grid of programs and tunables pins behaviour for good."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import ksm
from tests.kernel.program import apply, generate, state

GOLDEN = Path(__file__).parent / "data" / "golden.json"
PROFILES = ("5.15", "6.1", "6.6", "6.8", "6.12", "6.18")


def digest(kernel: str, index: str) -> str:
    """What every operation of 40 programs answers and leaves in the files that every profile has."""
    found = hashlib.blake2b(digest_size=16)
    for seed in range(40):
        machine = ksm.Machine(kernel=kernel, index=index)
        for op in generate(seed)["ops"]:
            found.update(apply(machine, op).encode())
            for name in ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "full_scans"):
                found.update(machine.ksm.read(name).encode())
        if kernel == "6.18":
            found.update(json.dumps(state(machine), sort_keys=True).encode())
    return found.hexdigest()


@pytest.mark.parametrize("index", ["hash", "tree"])
@pytest.mark.parametrize("kernel", PROFILES)
def test_behaviour_is_pinned(kernel: str, index: str) -> None:
    assert digest(kernel, index) == json.loads(GOLDEN.read_text())[kernel]

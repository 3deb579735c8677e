"""Readers and damaged files: damage of every kind, the same at every run. `python -m tests.fuzz` looks for more."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests import criu_writer
from tests.fuzz.target import SEEDS, target

ODD = (0, 1, 0x7F, 0x80, 0xFF)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to four damages: bytes changed, numbers made extreme, parts cut out, doubled or cut off."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out)) if rng.random() < 0.5 else rng.randrange(min(len(out), 600))
        kind = rng.randrange(6)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            length = rng.choice((1, 2, 4, 8))
            out[at : at + length] = bytes([rng.choice(ODD)]) * length
        elif kind == 2:
            out[at : at + 8] = rng.randrange(1 << 64).to_bytes(8, rng.choice(("big", "little")))
        elif kind == 3:
            del out[at : at + rng.randrange(1, 300)]
        elif kind == 4:
            out[at:at] = out[at : at + rng.randrange(1, 300)]
        else:
            del out[max(1, at) :]
        if not out:
            out = bytearray(b"\0")
    return bytes(out)


@pytest.mark.parametrize("name", SEEDS)
def test_damaged_files(tmp_path: Path, name: str) -> None:
    """Read or refused: no other exception, no page too few or too many."""
    path = tmp_path / "pagemap-7.img"
    if name == "criu":
        criu_writer.write(tmp_path, {0: bytes(8 * 4096)}, vmas=[(0, 1 << 20, 1), (1 << 20, 1 << 21, 9)])
    rng = random.Random(name)
    seeds = SEEDS[name]()
    for seed in seeds:
        path.write_bytes(seed)
        assert target(str(path)) > 0 or seed is seeds[-1]
    read = 0
    for _ in range(300):
        path.write_bytes(damaged(rng.choice(seeds), rng))
        read += target(str(path)) > 0
    assert read  # the damage is not such that nothing is read any more

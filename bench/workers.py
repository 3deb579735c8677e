"""Real processes for `bench.plan` of kinds that nothing in `ksm.plan` was settled on; the standard library alone.

Run as a script, `workers.py KIND SEED`: it works, says "ready", and waits until its input ends.
"""

from __future__ import annotations

import json
import random
import sqlite3
import sys
import zlib
from pathlib import Path

KINDS = ("database", "cache", "index")


def database(own: random.Random) -> list[object]:
    """A table that all have, rows of its own in another, and a copy of what it asked for."""
    base = sqlite3.connect(":memory:")
    base.execute("create table article (id integer primary key, name text, price real)")
    shop = random.Random("shop")
    base.executemany(
        "insert into article values (?, ?, ?)", ((n, f"article {n}", shop.random()) for n in range(60_000))
    )
    base.execute("create table sale (article integer, customer text)")
    sales = ((own.randrange(60_000), f"customer {own.random()}") for _ in range(own.randrange(5_000, 25_000)))
    base.executemany("insert into sale values (?, ?)", sales)
    return [base, base.execute("select name, count(*) from sale join article on id = article group by id").fetchall()]


def cache(own: random.Random) -> list[object]:
    """Objects that it was asked for: few are asked for everywhere, most are asked for once in a while."""
    weights = [1 / (rank + 1) ** 0.8 for rank in range(3000)]
    asked = set(own.choices(range(3000), weights, k=own.randrange(300, 600)))
    sizes = random.Random("sizes")
    kib = [sizes.choice((4, 8, 16, 32)) for _ in range(3000)]
    return [b"".join(random.Random(f"object {n}").randbytes(kib[n] << 10) for n in (each,)) for each in sorted(asked)]


def index(own: random.Random) -> list[object]:
    """Some of the standard library's files, what they compress to, and where which word is."""
    files = sorted(Path(json.__file__).parents[1].glob("*.py"))
    texts = {path.name: path.read_bytes() for path in files if own.random() < (0.95 if len(path.name) < 10 else 0.5)}
    packed = [zlib.compress(text) for text in texts.values()]
    words: dict[str, list[int]] = {}
    for number, text in enumerate(own.sample(list(texts.values()), 20)):
        for word in text.decode(errors="replace").split():
            words.setdefault(word, []).append(number)
    return [texts, packed, words, bytearray(own.randrange(1 << 20, 3 << 20))]


def main(kind: str, seed: str) -> None:
    """Work, and wait."""
    held = globals()[kind](random.Random(f"{kind} {seed}"))
    print("ready", len(held), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])

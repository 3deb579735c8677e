"""What a guest of `bench.guests` does: it fills its memory with what its kind of guests shares, and with its own.

Runs in the guest, on the standard library alone. /guest has the kind and the seed. Files are in memory (rootfs), so
they stay, as a page cache does.
"""

from __future__ import annotations

import json
import os
import random
import time

KIB = 1 << 10
PACKAGES = 48
KINDS = ("serve", "crunch")


def package(number: int) -> bytes:
    """The files of a package: the same on all guests that have it."""
    return random.Random(f"package {number}").randbytes(192 * KIB)


def installed(own: random.Random, kind: str) -> list[int]:
    """Packages of a guest: some that all have, some that most have, some that few have; more on servers."""
    chance = [1.0] * 12 + [0.8] * 16 + [0.35] * (12 if kind == "serve" else 4) + [0.08] * 8
    return [number for number, each in enumerate(chance) if own.random() < each]


def serve(own: random.Random) -> list[object]:
    """Templates that every server has, sessions of its own users, a log, buffers that are zero again."""
    site = random.Random("site")
    templates = {f"page{n}": " ".join(f"<li>{site.random()}</li>" for _ in range(400)) for n in range(80)}
    for name, text in templates.items():
        write(f"/srv/{name}", text.encode())
    sessions = [
        {"user": own.random(), "basket": [own.randrange(10**6) for _ in range(12)], "page": f"page{own.randrange(80)}"}
        for _ in range(own.randrange(2000, 5000))
    ]
    log = "\n".join(f"{time.time():.3f} GET /{each['page']} {each['user']}" for each in sessions)
    write("/var/access.log", log.encode())
    write("/var/sessions", json.dumps(sessions).encode())
    used = [bytearray(b"x" * 64 * KIB) for _ in range(own.randrange(8, 24))]
    for each in used:
        each[:] = bytes(len(each))
    return [templates, sessions, used]


def crunch(own: random.Random) -> list[object]:
    """A data set that all have, what this one picked of it, and what it worked out."""
    data = random.Random("data").randbytes(8 << 20)
    write("/srv/data", data)
    picked = [
        data[at : at + 4 * KIB] for at in (4 * KIB * own.randrange(2048) for _ in range(own.randrange(256, 1024)))
    ]
    write("/var/picked", b"".join(picked))
    numbers = sorted(own.random() for _ in range(own.randrange(20_000, 60_000)))
    write("/var/result", json.dumps(numbers[:: own.randrange(2, 5)]).encode())
    return [data, picked, numbers]


def write(path: str, content: bytes) -> None:
    """A file, its directory made if need be."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)


def main() -> None:
    """Work, say so, and stay."""
    with open("/guest", encoding="ascii") as file:
        kind, seed = file.read().split()
    own = random.Random(f"{kind} {seed}")
    for number in installed(own, kind):
        write(f"/usr/share/package{number}", package(number))
    held = serve(own) if kind == "serve" else crunch(own)
    print(f"guest ready: {kind}, {len(held)} things", flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()

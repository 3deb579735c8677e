"""Fingerprints under a secret key: equal pages stay equal, and nobody without the key can test a guess."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from ksm.errors import SourceError
from ksm.pages import PAGE_SIZE, Fingerprints

_LEAST, _MOST = 32, 4096  # bytes in a key file
_BATCH = 1 << 16  # fingerprints between two looks for Ctrl-C


@dataclass(frozen=True, slots=True)
class Key:
    """A secret, and the public id that says which one was used.

    Attributes:
        secret: 64 bytes; not shown by `repr`.
        id: 16 hexadecimal digits, a hash of the secret. Fingerprints of different ids never compare.

    >>> Key.from_bytes(bytes(32))
    Key(id='db7566875f058f5b')
    """

    secret: bytes = field(repr=False)
    id: str = field(init=False)

    def __post_init__(self) -> None:
        if len(self.secret) != blake2b.MAX_KEY_SIZE:
            raise ValueError(f"a secret has {blake2b.MAX_KEY_SIZE} bytes, not {len(self.secret)}")
        object.__setattr__(self, "id", blake2b(self.secret, digest_size=8, person=b"ksm-key-id").hexdigest())

    @classmethod
    def from_bytes(cls, material: bytes) -> Key:
        """A key from at least 32 random bytes, of which every bit counts.

        Raises:
            ValueError: fewer bytes.

        >>> Key.from_bytes(b"short")
        Traceback (most recent call last):
        ValueError: a key of 5 bytes can be guessed; it takes at least 32 random ones
        """
        if len(material) < _LEAST:
            raise ValueError(f"a key of {len(material)} bytes can be guessed; it takes at least {_LEAST} random ones")
        return cls(blake2b(material, person=b"ksm-key").digest())

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Key:
        """The key in a file of 32 to 4096 random bytes, a newline at its end included.

        Raises:
            SourceError: no such file, too short or too long, or everybody on this host may read or change it.

        >>> with open("host.key", "wb") as file:
        ...     _ = file.write(bytes(range(32)))
        >>> os.chmod("host.key", 0o600)
        >>> Key.from_file("host.key").id
        '63e83b41bb161a31'
        """
        try:
            with open(path, "rb", opener=_without_waiting) as file:
                mode = os.fstat(file.fileno()).st_mode
                material = file.read(_MOST + 1) if stat.S_ISREG(mode) else b""
        except OSError as error:
            raise SourceError(f"{os.fspath(path)}: {error.strerror}") from None
        if not stat.S_ISREG(mode):
            raise SourceError(f"{os.fspath(path)}: a key must be a regular file")
        if os.name == "posix" and mode & stat.S_IRWXO:
            raise SourceError(f"{os.fspath(path)}: everybody on this host has access to this key (chmod o= removes it)")
        if len(material) > _MOST:
            raise SourceError(f"{os.fspath(path)}: more than {_MOST} bytes, this is no key file")
        try:
            return cls.from_bytes(material)
        except ValueError as error:
            raise SourceError(f"{os.fspath(path)}: {error}") from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe that nobody writes to


def keyed(prints: Fingerprints, key: Key, page_size: int = PAGE_SIZE) -> Fingerprints:
    """The 128-bit BLAKE2b of each fingerprint under the key. O(n), about 0.6 microseconds a page.

    It maps equal fingerprints to equal ones, and is a pseudo-random function otherwise: without the key it can be
    neither computed nor undone. Pages of zeros keep their public fingerprint, so that everything that treats them
    apart still knows them; a reader therefore sees which pages are zeros, and which pages are equal, and no more.

    Args:
        prints: as `ksm.fingerprint` gives them.
        key: the secret.
        page_size: of the pages, to know the fingerprint of zeros.

    >>> from ksm.pages import fingerprint
    >>> prints = fingerprint(b"x" * 8192 + bytes(4096))
    >>> hidden = keyed(prints, Key.from_bytes(bytes(32)))
    >>> hidden[0] == hidden[1], hidden[0] == prints[0], hidden[2] == prints[2]
    (True, False, True)
    """
    start = blake2b(key=key.secret, digest_size=16, person=b"ksm-page").copy
    words = np.empty((len(prints), 2), np.uint64)
    for at in range(0, len(prints), _BATCH):
        raw = prints.words[at : at + _BATCH].astype(">u8").tobytes()
        digests = bytearray()
        for offset in range(0, len(raw), 16):
            hashing = start()
            hashing.update(raw[offset : offset + 16])
            digests += hashing.digest()
        words[at : at + _BATCH] = np.frombuffer(digests, ">u8").reshape(-1, 2)
    zeros = prints.zeros(page_size)
    words[zeros] = prints.words[zeros]
    return Fingerprints(words, prints.present)

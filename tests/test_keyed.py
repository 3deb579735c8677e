"""Keyed fingerprints: what stays equal, what a reader cannot find out, and which key files are taken."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

import ksm
from ksm.keyed import Key, keyed

PAGES = np.random.default_rng(5).integers(0, 256, (300, 4096), dtype=np.uint8)
PAGES[100:200] = PAGES[:100]
PAGES[250:] = 0


def test_equal_pages_stay_equal_and_only_those() -> None:
    plain = ksm.fingerprint(PAGES)
    hidden = keyed(plain, Key.from_bytes(b"k" * 32))
    _, groups = np.unique(plain.words, axis=0, return_inverse=True)
    _, hidden_groups = np.unique(hidden.words, axis=0, return_inverse=True)
    assert len(np.unique(np.stack((groups.ravel(), hidden_groups.ravel())), axis=1).T) == 151
    assert len(np.unique(hidden_groups)) == 151
    assert hidden.zeros().tolist() == plain.zeros().tolist()
    assert not (hidden.words[:250] == plain.words[:250]).any()


def test_it_is_blake2b_of_the_fingerprint() -> None:
    """The construction is part of the format: another program with the key must be able to do it."""
    key = Key.from_bytes(b"k" * 32)
    secret = blake2b(b"k" * 32, person=b"ksm-key").digest()
    assert key.secret == secret and key.id == blake2b(secret, digest_size=8, person=b"ksm-key-id").hexdigest()
    plain = ksm.fingerprint(PAGES[:1])
    number = plain[0]
    assert number is not None
    digest = blake2b(number.to_bytes(16, "big"), key=secret, digest_size=16, person=b"ksm-page").digest()
    assert keyed(plain, key)[0] == int.from_bytes(digest, "big")


def test_another_key_gives_other_fingerprints() -> None:
    plain = ksm.fingerprint(PAGES[:100])
    one, two = (keyed(plain, Key.from_bytes(bytes([i]) * 32)) for i in range(2))
    assert not (one.words == two.words).any()
    assert keyed(plain, Key.from_bytes(bytes(32))) == one


def test_zero_pages_of_other_sizes_and_absent_slots() -> None:
    key = Key.from_bytes(bytes(32))
    zero = ksm.fingerprint(bytes(16384), page_size=16384)
    assert keyed(zero, key, 16384)[0] == zero[0]
    assert keyed(zero, key)[0] != zero[0]
    absent = ksm.Fingerprints(np.zeros((2, 2), np.uint64), np.array([True, False]))
    assert keyed(absent, key)[1] is None and len(keyed(absent[:0], key)) == 0


def test_repr_keeps_the_secret() -> None:
    key = Key.from_bytes(b"secret-material-of-32-bytes-----")
    assert (
        "secret-material" not in repr(key)
        and key.secret.hex()[:8] not in repr(key)
        and repr(key.secret) not in repr(key)
    )


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "host.key"
    path.write_bytes(bytes(range(32)))
    path.chmod(0o640)
    assert Key.from_file(path) == Key.from_bytes(bytes(range(32)))
    path.write_bytes(bytes(range(32)) + b"\n")
    assert Key.from_file(path) != Key.from_bytes(bytes(range(32)))


@pytest.mark.parametrize("size", [0, 31, 4097])
def test_keys_of_bad_length_are_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "host.key"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    with pytest.raises(ksm.SourceError, match=r"host\.key: .*(guessed|no key file)"):
        Key.from_file(path)


def test_keys_that_everybody_can_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "host.key"
    path.write_bytes(bytes(32))
    path.chmod(0o604)
    with pytest.raises(ksm.SourceError, match="everybody on this host"):
        Key.from_file(path)


def test_what_is_no_key_file(tmp_path: Path) -> None:
    with pytest.raises(ksm.SourceError, match="No such file"):
        Key.from_file(tmp_path / "missing")
    with pytest.raises(ksm.SourceError, match="Is a directory"):
        Key.from_file(tmp_path)
    with pytest.raises(ksm.SourceError, match="regular file"):
        Key.from_file(os.devnull)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ksm.SourceError, match="regular file"):
        Key.from_file(tmp_path / "pipe")
    with pytest.raises(ValueError, match="64 bytes"):
        Key(b"short")

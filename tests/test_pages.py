"""Pages from every kind of buffer, and their fingerprints against the xxhash package."""

from __future__ import annotations

import dataclasses
import mmap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ksm._core import fingerprint_forms, fingerprint_pages
from ksm.pages import Fingerprints, as_pages, fingerprint, zero_words

PAGE = 4096


def random_pages(n: int, size: int = PAGE, seed: int = 1) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, size), dtype=np.uint8)


def judged(pages: npt.NDArray[np.uint8]) -> list[int]:
    return [xxhash.xxh3_128_intdigest(page.tobytes()) for page in pages]


def numbers(words: npt.NDArray[np.uint64]) -> list[int]:
    return [int(high) << 64 | int(low) for high, low in words]


# ---- as_pages ----------------------------------------------------------------------------------


def shares(pages: npt.NDArray[np.uint8], buffer: Any) -> bool:
    return np.shares_memory(pages, np.frombuffer(buffer, np.uint8))


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview, lambda b: memoryview(b).cast("B", (2, PAGE))])
def test_bytes_like_is_not_copied(make: Any) -> None:
    buffer = make(random_pages(2).tobytes())
    pages = as_pages(buffer)
    assert pages.shape == (2, PAGE)
    assert pages.dtype == np.uint8
    assert shares(pages, buffer)
    assert pages.tobytes() == random_pages(2).tobytes()


@pytest.mark.parametrize(
    "dtype", ["u1", "i1", "u2", ">u4", "u8", "f8", "?", "c16", "S16", "M8[s]", [("a", "u4"), ("b", "u4")]]
)
@pytest.mark.parametrize("rows", [True, False])
def test_arrays_of_any_dtype_are_not_copied(dtype: Any, rows: bool) -> None:
    array = np.zeros(2 * PAGE // np.dtype(dtype).itemsize, dtype)
    pages = as_pages(array.reshape(2, -1) if rows else array)
    assert pages.shape == (2, PAGE)
    assert np.shares_memory(pages, array)


def test_memmap_and_mmap_are_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "guest.raw"
    path.write_bytes(random_pages(4).tobytes())
    mapped = np.memmap(path, np.uint8, "r")
    pages = as_pages(mapped)
    assert type(pages) is np.ndarray
    assert np.shares_memory(pages, mapped)
    assert not pages.flags.writeable
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as raw:
        again = as_pages(raw)
        assert np.array_equal(pages, again)
        with pytest.raises(BufferError):
            raw.close()  # it is borrowed
        del again


def test_writes_show_through() -> None:
    buffer = bytearray(PAGE)
    pages = as_pages(buffer)
    buffer[7] = 9
    assert pages[0, 7] == 9


@pytest.mark.parametrize(
    "empty", [b"", bytearray(), np.empty(0, np.uint8), np.empty((0, PAGE), np.uint8), np.empty((0, 512), "u8")]
)
def test_nothing_is_no_pages(empty: Any) -> None:
    assert as_pages(empty, PAGE).shape == (0, PAGE)
    assert len(fingerprint(empty)) == 0


def test_rows_give_the_page_size() -> None:
    assert as_pages(np.zeros((2, 65536), np.uint8)).shape == (2, 65536)
    assert as_pages(np.zeros(65536, np.uint8)).shape == (16, PAGE)
    assert as_pages(np.zeros(65536, np.uint8), 16384).shape == (4, 16384)


@pytest.mark.parametrize(
    ("buffer", "size", "error", "message"),
    [
        ("text", None, TypeError, "not str"),
        (5, None, TypeError, "not int"),
        ([1, 2], None, TypeError, "not list"),
        (np.array([None] * 512), None, TypeError, "objects"),
        (memoryview(np.array([None] * 512)), None, TypeError, "objects"),
        (np.zeros(PAGE, [("a", "O"), ("b", "u8")]), None, TypeError, "objects"),
        (b"x" * 4095, None, ValueError, "4095 bytes are not whole pages of 4096"),
        (np.zeros((2, PAGE), np.uint8)[:, ::2], None, ValueError, "contiguous"),
        (np.zeros(2 * PAGE, np.uint8)[::2], None, ValueError, "contiguous"),
        (np.zeros((PAGE, 2 * PAGE), np.uint8, order="F"), None, ValueError, "contiguous"),
        (memoryview(bytes(2 * PAGE))[::2], None, ValueError, "contiguous"),
        (np.zeros((), np.uint64), None, ValueError, "dimensions, not 0"),
        (np.zeros((2, 2, PAGE), np.uint8), None, ValueError, "dimensions, not 3"),
        (np.zeros((2, PAGE), np.uint8), 16384, ValueError, "rows of 4096 bytes are not pages of 16384"),
        (np.zeros((2, 100), np.uint8), None, ValueError, "a page of 100 bytes"),
        (bytes(PAGE), 0, ValueError, "a page of 0 bytes"),
        (bytes(PAGE), -4096, ValueError, "a page of -4096 bytes"),
        (bytes(PAGE), 128, ValueError, "a page of 128 bytes"),
        (bytes(PAGE), 4095, ValueError, "a page of 4095 bytes"),
    ],
)
def test_bad_buffers(buffer: Any, size: int | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_pages(buffer, size)


# ---- the kernels -------------------------------------------------------------------------------


@pytest.fixture(params=["best", *fingerprint_forms()])
def variant(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "best" else str(request.param)


def hashed(pages: npt.NDArray[np.uint8], variant: str | None) -> list[int]:
    """As `fingerprint_pages` does it, with and without zero flags, which must agree."""
    words = np.empty((len(pages), 2), np.uint64)
    zero = np.full(len(pages), 7, np.uint8)
    fingerprint_pages(pages, words, zero, variant)
    assert zero.tolist() == (~pages.any(axis=1)).astype(int).tolist()
    plain = np.empty_like(words)
    fingerprint_pages(pages, plain, variant=variant)
    assert np.array_equal(words, plain)
    return numbers(words)


@pytest.mark.parametrize("size", [256, 512, 1024, 2048, 4096, 16384, 65536, 272, 1040, 4112, 5008])
def test_every_form_against_xxhash(variant: str | None, size: int) -> None:
    pages = random_pages(5, size)
    pages[2] = 0
    pages[3] = 255
    assert hashed(pages, variant) == judged(pages)


@pytest.mark.parametrize("offset", range(64))
def test_unaligned(variant: str | None, offset: int) -> None:
    buffer = np.zeros(3 * PAGE + 64, np.uint8)
    buffer[:] = np.random.default_rng(offset).integers(0, 256, len(buffer))
    pages = as_pages(buffer[offset : offset + 3 * PAGE])
    assert hashed(pages, variant) == judged(pages)


@given(data=st.data(), size=st.sampled_from([256, 1024, 4096]), pattern=st.binary(min_size=1, max_size=64))
def test_any_content(data: st.DataObject, size: int, pattern: bytes) -> None:
    page = bytearray((pattern * size)[:size])
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, 255)), max_size=8)):
        page[at] = value
    pages = as_pages(page, size)
    for form in fingerprint_forms():
        assert hashed(pages, form) == judged(pages)


@pytest.mark.parametrize("at", [0, 1, 15, 16, 63, 64, 1023, 1024, 4031, 4032, 4095])
def test_one_byte_makes_a_page_not_zero(at: int) -> None:
    page = np.zeros((1, PAGE), np.uint8)
    page[0, at] = 128
    assert hashed(page, None) == judged(page)


def test_at_the_end_of_mapped_memory(variant: str | None) -> None:
    """Nothing past the last byte is read, though the prefetch runs ahead of it."""
    with mmap.mmap(-1, 4 * PAGE) as whole:
        pages = as_pages(whole)
        pages[:] = random_pages(4)
        assert hashed(pages[3:], variant) == judged(pages[3:])
        del pages


def test_a_form_that_is_not_there_is_an_error() -> None:
    missing = ({"neon", "sse2"} - set(fingerprint_forms())).pop()
    out = np.empty((1, 2), np.uint64)
    for name in (missing, "avx512", ""):
        with pytest.raises(ValueError, match=r"no .* in this build: it has .*scalar"):
            fingerprint_pages(random_pages(1), out, variant=name)


@pytest.mark.parametrize(
    ("pages", "out", "zero"),
    [
        ((2, PAGE), (1, 2), None),
        ((2, PAGE), (2, 3), None),
        ((2, PAGE), (2, 2), 1),
        ((2, 240), (2, 2), 2),
        ((2, 100), (2, 2), 2),
        ((2, 250), (2, 2), 2),
    ],
)
def test_bad_shapes(pages: Any, out: Any, zero: int | None) -> None:
    flags = None if zero is None else np.empty(zero, np.uint8)
    with pytest.raises(ValueError, match="pages"):
        fingerprint_pages(np.zeros(pages, np.uint8), np.empty(out, np.uint64), flags)


def test_bad_types() -> None:
    out = np.empty((1, 2), np.uint64)
    with pytest.raises(ValueError, match="mismatch"):
        fingerprint_pages(np.zeros((1, PAGE), np.uint16), out)
    with pytest.raises(TypeError):
        fingerprint_pages(None, out)
    with pytest.raises(TypeError):
        fingerprint_pages(random_pages(1), None)


# ---- fingerprint -------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [None, 1, 2, 3])
def test_fingerprint_is_xxh3_128(threads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksm.pages._BLOCK", 3)
    pages = random_pages(20)
    pages[4:9] = 0
    seen: list[int] = []
    found = fingerprint(pages, threads, progress=seen.append)
    assert numbers(found.words) == judged(pages)
    assert found.present is None
    assert seen == [3, 6, 9, 12, 15, 18, 20]


@pytest.mark.parametrize("size", [4096, 16384, 65536])
def test_fingerprint_of_a_page_size(size: int) -> None:
    pages = random_pages(3, size)
    assert numbers(fingerprint(pages).words) == judged(pages)
    assert numbers(fingerprint(pages.tobytes(), page_size=size).words) == judged(pages)


def test_many_blocks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksm.pages._BLOCK", 1)
    monkeypatch.setattr("ksm.pages._MOST_BLOCKS", 4)
    seen: list[int] = []
    fingerprint(random_pages(10), 2, progress=seen.append)
    assert seen == [3, 6, 9, 10]


@pytest.mark.parametrize("threads", [0, -1])
def test_bad_threads(threads: int) -> None:
    with pytest.raises(ValueError, match="threads"):
        fingerprint(bytes(PAGE), threads)


def test_progress_that_raises_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksm.pages._BLOCK", 1)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    for threads in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            fingerprint(random_pages(50), threads, progress=stop)
    assert not [t for t in threading.enumerate() if t.name.startswith("ksm-fingerprint")]


@pytest.mark.parametrize("threads", [1, 2])
def test_interrupt(threads: int, run_python: Callable[[str], str]) -> None:
    """Ctrl-C in the midst of a long run ends it at once, with KeyboardInterrupt."""
    script = f"""
import os, signal, threading, time
import numpy as np
from ksm.pages import fingerprint
pages = np.zeros((1, 1 << 27), np.uint8).repeat(2, axis=0).reshape(-1, 4096)
started = []
def once(done):
    if not started:
        started.append(done)
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:
        fingerprint(pages, {threads}, progress=once)
except KeyboardInterrupt:
    until = time.monotonic() + 10
    while any(t.name.startswith("ksm-fingerprint") for t in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.01)
    print("interrupted", *(t.name for t in threading.enumerate()))
"""
    assert run_python(script).split()[:2] == ["interrupted", "MainThread"]


def test_concurrent_callers() -> None:
    pages = random_pages(600)
    wanted = judged(pages)
    found: list[list[int]] = []
    callers = [threading.Thread(target=lambda: found.append(numbers(fingerprint(pages).words))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [wanted] * 4


@pytest.mark.parametrize("size", [256, 4096, 16384, 65536])
def test_zero_words(size: int) -> None:
    high, low = zero_words(size)
    assert int(high) << 64 | int(low) == xxhash.xxh3_128_intdigest(bytes(size))


# ---- Fingerprints ------------------------------------------------------------------------------


def some(rows: list[tuple[int, int]], present: list[bool] | None = None) -> Fingerprints:
    words = np.array(rows, np.uint64).reshape(-1, 2)
    return Fingerprints(words, None if present is None else np.array(present, np.bool_))


def test_is_frozen() -> None:
    words = np.zeros((2, 2), np.uint64)
    found = Fingerprints(words, np.ones(2, np.bool_))
    assert np.shares_memory(found.words, words)
    with pytest.raises(ValueError, match="read-only"):
        found.words[0, 0] = 1
    assert found.present is not None
    with pytest.raises(ValueError, match="read-only"):
        found.present[0] = False
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.present = None  # type: ignore[misc]
    words[0, 0] = 1  # the caller's own array stays writable
    with pytest.raises(TypeError, match="unhashable"):
        hash(found)


@pytest.mark.parametrize(
    ("words", "present", "error", "message"),
    [
        (np.zeros((2, 2), np.int64), None, TypeError, "words must be an array of uint64, not int64"),
        (np.zeros((2, 2), ">u8"), None, TypeError, "words must be an array of uint64"),
        ([[1, 2]], None, TypeError, "words must be an array of uint64, not list"),
        (np.zeros(2, np.uint64), None, ValueError, r"words must be \(n, 2\)"),
        (np.zeros((2, 3), np.uint64), None, ValueError, r"words must be \(n, 2\)"),
        (np.zeros((2, 2, 1), np.uint64), None, ValueError, r"words must be \(n, 2\)"),
        (np.zeros((2, 2), np.uint64), np.zeros(2, np.uint8), TypeError, "present must be an array of bool, not uint8"),
        (np.zeros((2, 2), np.uint64), [True, True], TypeError, "present must be an array of bool, not list"),
        (np.zeros((2, 2), np.uint64), np.zeros(3, np.bool_), ValueError, r"present must be \(2,\)"),
        (np.zeros((2, 2), np.uint64), np.zeros((2, 1), np.bool_), ValueError, r"present must be \(2,\)"),
    ],
)
def test_bad_fingerprints(words: Any, present: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Fingerprints(words, present)


def test_index_and_slices() -> None:
    found = some([(1, 2), (3, 4), (5, 6)], [True, False, True])
    assert len(found) == 3
    assert found[0] == 1 << 64 | 2
    assert found[-1] == 5 << 64 | 6
    assert found[1] is None
    with pytest.raises(IndexError):
        found[3]
    assert found[1:] == some([(0, 0), (5, 6)], [False, True])
    assert found[::2] == some([(1, 2), (5, 6)])
    assert found[np.array([True, False, False])] == some([(1, 2)])
    assert found[np.array([2, 0])] == some([(5, 6), (1, 2)])
    assert found.pages == 2


def test_equality() -> None:
    assert some([(1, 2)]) == some([(1, 2)])
    assert some([(1, 2)]) == some([(1, 2)], [True])
    assert some([(1, 2)]) != some([(1, 3)])
    assert some([(1, 2)]) != some([(1, 2)], [False])
    assert some([(9, 9)], [False]) == some([(1, 2)], [False])
    assert some([(1, 2)]) != some([(1, 2), (1, 2)])
    assert some([]) == some([])
    assert some([(1, 2)]) != "fingerprints"


def test_zeros() -> None:
    found = fingerprint(np.zeros((2, 16384), np.uint8))
    assert found.zeros(16384).tolist() == [True, True]
    assert found.zeros(4096).tolist() == [False, False]
    assert Fingerprints(found.words, np.array([False, True])).zeros(16384).tolist() == [False, True]


def test_repr_and_dict() -> None:
    found = some([(1, 2), (3, 4)], [True, False])
    assert repr(found) == "<Fingerprints: 2 pages, 1 present>"
    assert found.to_dict() == {"fingerprints": ["00000000000000010000000000000002", None]}
    page = random_pages(1)
    assert fingerprint(page).to_dict() == {"fingerprints": [xxhash.xxh3_128_hexdigest(page.tobytes())]}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=40))
def test_unique_counts_contents(rows: list[tuple[int, int, bool]]) -> None:
    found = some([(high, low) for high, low, _ in rows], [there for _, _, there in rows])
    contents, copies = found.unique()
    wanted: dict[tuple[int, int], int] = {}
    for high, low, there in rows:
        if there:
            wanted[low, high] = wanted.get((low, high), 0) + 1
    assert [(low, high) for high, low in contents.words.tolist()] == sorted(wanted)
    assert copies.tolist() == [wanted[key] for key in sorted(wanted)]
    assert copies.dtype == np.int64
    assert contents.present is None

"""The estimate against the machine, against plain counting, and against itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksm.constants import MADV_MERGEABLE
from ksm.errors import SourceError
from ksm.estimate import Estimate, estimate, snapshots
from ksm.machine import Machine
from ksm.pages import Fingerprints, fingerprint
from ksm.sources import ArrayImage

PAGE = 4096


def pages(*values: int) -> npt.NDArray[np.uint8]:
    """A page for each value, filled with it; equal values are equal pages, 0 is the zero page."""
    return np.repeat(np.array(values, np.uint8)[:, None], PAGE, axis=1)


def settle(images: list[npt.NDArray[np.uint8]], **tunables: Any) -> Machine:
    nodes = tunables.pop("nodes", [0] * len(images))
    machine = Machine(nodes=max(nodes) + 1)
    machine.ksm.smart_scan = False
    for name, value in tunables.items():
        setattr(machine.ksm, name, value)
    for index, (image, node) in enumerate(zip(images, nodes, strict=True)):
        process = machine.spawn(str(index))
        process.madvise(process.mmap(image, node=node), image.size, MADV_MERGEABLE)
    machine.ksm.run = True
    for _ in range(4):
        machine.ksmd.scan()
    return machine


def assert_same(answer: Estimate, machine: Machine) -> None:
    columns = ("pages_shared", "pages_sharing", "pages_unshared", "ksm_zero_pages", "general_profit")
    for name in (*columns, "stable_node_chains", "stable_node_dups"):
        assert getattr(answer, name) == getattr(machine.ksm, name), name
    for source, process in zip(answer.sources, machine.processes.values(), strict=True):
        stat = process.ksm_stat
        assert source.ksm_merging_pages == stat["ksm_merging_pages"]
        assert source.rmap_items == stat["ksm_rmap_items"]
        assert source.ksm_zero_pages == stat["ksm_zero_pages"]
    for name in (*columns, "pages"):
        assert sum(getattr(source, name) for source in answer.sources) == getattr(answer, name)


contents = st.lists(st.integers(0, 6), min_size=1, max_size=40)


@given(
    images=st.lists(contents, min_size=1, max_size=4),
    limit=st.integers(2, 6),
    zero=st.booleans(),
    across=st.booleans(),
)
def test_the_machine_settles_there(images: list[list[int]], limit: int, zero: bool, across: bool) -> None:
    arrays = [pages(*image) for image in images]
    nodes = [index % 2 for index in range(len(arrays))]
    tunables = {"max_page_sharing": limit, "use_zero_pages": zero, "merge_across_nodes": across}
    answer = estimate(arrays, nodes=nodes, **tunables)  # type: ignore[arg-type]
    assert_same(answer, settle(arrays, nodes=nodes, **tunables))


@given(images=st.lists(contents, min_size=1, max_size=4))
def test_duplicates_within_and_between(images: list[list[int]]) -> None:
    answer = estimate([pages(*image) for image in images])
    distinct = [len(set(image)) for image in images]
    everything = Counter(value for image in images for value in image)
    assert answer.duplicates_within == sum(map(len, images)) - sum(distinct)
    assert answer.duplicates_between == sum(distinct) - len(everything)
    assert answer.pages_sharing == sum(n - 1 for n in everything.values())  # below the limit
    assert answer.zero_pages == everything[0]


@pytest.mark.parametrize("limit", [2, 3, 256, (1 << 31) - 1])
@pytest.mark.parametrize("copies", [1, 2, 3, 255, 256, 257, 258, 511, 512, 513, 514, 600])
def test_closed_form(copies: int, limit: int) -> None:
    answer = estimate([pages(*[7] * copies)], max_page_sharing=limit)
    shared = copies // limit + (copies % limit >= 2)
    unshared = int(copies % limit == 1)
    assert (answer.pages_shared, answer.pages_unshared) == (shared, unshared)
    assert answer.pages_sharing == copies - shared - unshared


def test_which_page_is_the_odd_one() -> None:
    answer = estimate([pages(1, 1), pages(1, 1), pages(1)], max_page_sharing=2)
    assert [source.pages_unshared for source in answer.sources] == [0, 0, 1]
    assert [source.pages_shared for source in answer.sources] == [1, 1, 0]
    assert [source.pages_sharing for source in answer.sources] == [1, 1, 0]


def test_every_kind_of_source(tmp_path: Path) -> None:
    array = pages(1, 2, 2, 3)
    array.tofile(tmp_path / "raw")
    kinds: list[Any] = [
        array,
        array.tobytes(),
        bytearray(array.tobytes()),
        memoryview(array.tobytes()),
        fingerprint(array),
        ArrayImage(array),
        str(tmp_path / "raw"),
        tmp_path / "raw",
        np.memmap(tmp_path / "raw", np.uint8, "r"),
        snapshots([array])[0],
    ]
    for kind in kinds:
        assert (estimate([kind]).pages_shared, estimate([kind]).pages_sharing) == (1, 1)
        assert estimate(kind).pages == 4
    answer = estimate(kinds, names=[f"s{i}" for i in range(len(kinds))])
    assert answer.pages_shared == 3 and answer.pages_sharing == 4 * len(kinds) - 3
    assert [source.name for source in answer.sources][:2] == ["s0", "s1"]


def test_absent_slots_do_not_count() -> None:
    words = fingerprint(pages(1, 1, 1, 0)).words
    answer = estimate([Fingerprints(words, np.array([True, False, True, True]))])
    assert (answer.pages, answer.pages_shared, answer.pages_sharing, answer.pages_unshared) == (3, 1, 1, 1)
    image = ArrayImage(pages(1, 1, 1, 0), present=np.array([True, False, True, True]))
    assert estimate([image]).pages == 3


def test_zero_pages_of_a_dump(tmp_path: Path) -> None:
    pages(0, 0, 0, 1, 1).tofile(tmp_path / "dump")
    known = pages(0, 0)  # an array's pages are what they are
    merge = estimate([tmp_path / "dump", known])
    assert (merge.zero_pages, merge.zero_or_untouched, merge.pages_shared, merge.pages_sharing) == (5, 3, 2, 5)
    assert "3 all-zero pages of dumps" in merge.assumed[1] and "merge" in merge.assumed[1]
    absent = estimate([tmp_path / "dump", known], zeros="absent")
    assert (absent.pages, absent.zero_pages, absent.zero_or_untouched) == (4, 2, 3)
    assert (absent.pages_shared, absent.pages_sharing) == (2, 2)
    assert "left out" in absent.assumed[1]
    assert len(estimate([known]).assumed) == 1
    placed = estimate([tmp_path / "dump", known], use_zero_pages=True)
    assert (placed.ksm_zero_pages, placed.pages_sharing, placed.rmap_items) == (5, 1, 2)
    assert placed.saved_bytes == 6 * PAGE and placed.metadata_bytes == 128
    assert placed.general_profit == 6 * PAGE - 128


def test_colliding_low_words_are_told_apart() -> None:
    words = np.array([[1, 9], [2, 9], [1, 9], [3, 9], [2, 9], [1, 8]], np.uint64)
    answer = estimate([Fingerprints(words)])
    assert (answer.pages_shared, answer.pages_sharing, answer.pages_unshared) == (2, 2, 2)


@given(
    words=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=80),
    limit=st.integers(2, 4),
)
def test_words_that_collide_in_any_part(words: list[tuple[int, int, int]], limit: int) -> None:
    array = np.array([(high, upper << 60 | lower) for high, upper, lower in words], np.uint64)
    copies = Counter(words).values()
    answer = estimate([Fingerprints(array[: len(array) // 2]), Fingerprints(array[len(array) // 2 :])], limit)
    shared = sum(n // limit + (n % limit >= 2) for n in copies)
    unshared = sum(n % limit == 1 for n in copies)
    assert (answer.pages_shared, answer.pages_unshared) == (shared, unshared)
    assert answer.pages_sharing == len(words) - shared - unshared
    assert answer.duplicates_within + answer.duplicates_between == len(words) - len(copies)


def test_fingerprints_that_somebody_made_up() -> None:
    """Small numbers and equal halves spread over the table like any other."""
    numbers = np.arange(200_000, dtype=np.uint64)
    for words in (
        np.column_stack((numbers, np.zeros_like(numbers))),
        np.column_stack((np.zeros_like(numbers), numbers)),
        np.column_stack((numbers, numbers)),
        np.column_stack((numbers << np.uint64(40), numbers)),
    ):
        answer = estimate([Fingerprints(np.concatenate((words, words[::2])))])
        assert (answer.pages_shared, answer.pages_unshared) == (100_000, 100_000)


def test_fingerprints_with_gaps_and_many_sources() -> None:
    words = fingerprint(pages(1, 2, 1, 3)).words
    strided = Fingerprints(words[::2], np.array([True, True, False, True])[::2])
    answer = estimate([strided] * 300, max_page_sharing=7)
    assert answer.pages == 300 and answer.pages_unshared == 0
    assert (answer.stable_node_chains, answer.stable_node_dups) == (1, 43)
    assert answer.stable_node_bytes == 43 * 64
    assert [source.pages_shared for source in answer.sources[:8]] == [1, 0, 0, 0, 0, 0, 0, 1]


def test_nothing_at_all() -> None:
    answer = estimate([b""])
    assert (answer.pages, answer.saved_bytes, answer.general_profit) == (0, 0, 0)
    with pytest.raises(ValueError, match="no sources"):
        estimate([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_page_sharing": 1}, "max_page_sharing is 1"),
        ({"max_page_sharing": 1 << 31}, "max_page_sharing is 2147483648"),
        ({"zeros": "maybe"}, "zeros is 'maybe'"),
        ({"names": ["a", "b"]}, "2 names for 1 sources"),
        ({"nodes": []}, "0 nodes for 1 sources"),
        ({"threads": 0}, "threads"),
        ({"page_size": 3}, "power of two"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate([pages(1).tobytes()], **arguments)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not whole pages"):
        estimate([b"abc"])
    with pytest.raises(SourceError):
        estimate([tmp_path])
    with pytest.raises(TypeError):
        estimate([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="page sizes differ: 4096, 8192"):
        estimate([pages(1), np.zeros((2, 8192), np.uint8)])


def test_progress_and_threads() -> None:
    array = np.repeat(pages(1, 2), 5000, axis=0)
    seen: list[tuple[int, int]] = []
    one = estimate([array, array[:10]], threads=1, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 10010) and seen[-1] == (10010, 10010) and seen == sorted(seen)
    assert estimate([array, array[:10]], threads=4) == one


def test_to_dict_is_json() -> None:
    import json

    answer = estimate([pages(1, 1), pages(1)])
    again = json.loads(json.dumps(answer.to_dict()))
    assert again["pages_sharing"] == 2 and again["sources"][1]["pages_sharing"] == 1
    assert again["saved_bytes"] == answer.saved_bytes and again["name"] == "total"

"""Snapshots, and every ratio that is derived from them."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksm.stats import ProcessStats, Stats, parse_ksm_stat

# Measured on Linux 6.18: 399 equal pages of one process after two passes, max_page_sharing 256.
MEASURED = Stats(
    page_size=4096,
    pages_shared=2,
    pages_sharing=397,
    pages_unshared=0,
    pages_volatile=0,
    full_scans=2,
    stable_node_chains=1,
    stable_node_dups=2,
    general_profit=1600576,
    pages_scanned=798,
    ksm_zero_pages=0,
    pages_skipped=0,
)
MEASURED_PROCESS = {
    "ksm_rmap_items": 399,
    "ksm_zero_pages": 0,
    "ksm_merging_pages": 399,
    "ksm_process_profit": 1608768,
    "ksm_merge_any": False,
    "ksm_mergeable": True,
}
KSM_STAT = """ksm_rmap_items 399
ksm_zero_pages 0
ksm_merging_pages 399
ksm_process_profit 1608768
ksm_merge_any: no
ksm_mergeable: yes
"""


def test_a_measured_snapshot() -> None:
    s = MEASURED
    assert s.saved_pages == 397
    assert s.saved_bytes == 397 * 4096
    assert s.sharing_ratio == 198.5
    assert s.unshared_ratio == 0.0
    assert s.rmap_items == 399
    assert s.metadata_bytes == 399 * 64
    assert s.profit == s.saved_bytes - s.metadata_bytes == 1600576
    assert s.volatile_share == 0.0
    assert s.merged_share == 1.0


def test_zero_pages_are_saved_too() -> None:
    assert Stats(pages_sharing=10, ksm_zero_pages=5, page_size=16384).saved_bytes == 15 * 16384


def test_nothing_over_nothing_is_none() -> None:
    empty = Stats()
    assert empty.sharing_ratio is None
    assert empty.unshared_ratio is None
    assert empty.volatile_share is None
    assert empty.merged_share is None
    assert (empty.saved_bytes, empty.rmap_items, empty.metadata_bytes, empty.profit) == (0, 0, 0, 0)
    assert Stats(pages_unshared=7).unshared_ratio is None


def test_an_old_kernel() -> None:
    old = Stats(pages_shared=1, pages_sharing=3, pages_unshared=4, pages_volatile=2)
    assert old.ksm_zero_pages is None
    assert old.saved_pages == 3
    assert old.profit == 3 * 4096 - 10 * 64


def test_to_dict_is_json_with_everything() -> None:
    values = MEASURED.to_dict()
    assert json.loads(json.dumps(values)) == values
    properties = {name for name, value in vars(Stats).items() if isinstance(value, property)}
    assert set(values) == properties | {f.name for f in dataclasses.fields(Stats)}
    json.dumps(Stats().to_dict(), allow_nan=False)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MEASURED.pages_shared = 3  # type: ignore[misc]


COUNT = st.integers(0, 1 << 40)


@given(COUNT, COUNT, COUNT, COUNT, st.none() | COUNT)
def test_ratios_agree_with_each_other(
    shared: int, sharing: int, unshared: int, volatile: int, zero: int | None
) -> None:
    s = Stats(
        pages_shared=shared,
        pages_sharing=sharing,
        pages_unshared=unshared,
        pages_volatile=volatile,
        ksm_zero_pages=zero,
    )
    assert s.profit == s.saved_bytes - s.metadata_bytes
    if s.rmap_items:
        assert s.merged_share is not None
        assert s.volatile_share is not None
        assert s.merged_share + s.volatile_share + unshared / s.rmap_items == pytest.approx(1.0)
    if s.sharing_ratio is not None:
        assert s.sharing_ratio * shared == pytest.approx(sharing)
    json.dumps(s.to_dict(), allow_nan=False)


def test_ksm_stat_text() -> None:
    assert parse_ksm_stat(KSM_STAT) == MEASURED_PROCESS
    assert parse_ksm_stat("ksm_rmap_items 5\n") == {"ksm_rmap_items": 5}
    assert parse_ksm_stat("") == {}
    assert parse_ksm_stat("ksm_process_profit -64\n\n") == {"ksm_process_profit": -64}


def test_a_measured_process() -> None:
    p = ProcessStats.of(MEASURED_PROCESS)
    assert p.ksm_merging_pages == 399
    assert p.saved_bytes == 399 * 4096
    assert p.metadata_bytes == 399 * 64
    assert p.profit == p.saved_bytes - p.metadata_bytes == 1608768
    assert p.items_per_merged_page == 1.0
    assert p.ksm_merge_any is False
    assert p.ksm_mergeable is True


def test_a_process_of_an_old_kernel() -> None:
    p = ProcessStats.of({"ksm_rmap_items": 640, "ksm_merging_pages": 10, "new_in_7": 5})
    assert p.profit == 10 * 4096 - 640 * 64 == 0  # ksm.rst's limit: 64 items a merged page
    assert p.items_per_merged_page == 64.0
    assert p.ksm_mergeable is None
    assert ProcessStats.of({}).items_per_merged_page is None
    values = p.to_dict()
    assert json.loads(json.dumps(values)) == values
    properties = {name for name, value in vars(ProcessStats).items() if isinstance(value, property)}
    assert set(values) == properties | {f.name for f in dataclasses.fields(ProcessStats)}

"""The validator: one corrupted dump for each invariant, and the name that it gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

import ksm
from ksm.check import verify

PAGE = 4096


def busy_dump() -> dict[str, Any]:
    """A machine in the middle of a pass: plain nodes, a chain, unstable items, a zero page, a stale node."""
    m = ksm.Machine(index="tree")
    m.ksm.run = 1
    m.ksm.max_page_sharing = 2
    m.ksm.use_zero_pages = 1
    p = m.spawn()
    a = p.mmap(b"".join(bytes([n]) * PAGE for n in [1, 1, 1, 1, 2, 2, 3, 4, 5, 6, 0, 7, 7]))
    p.madvise(a, 13 * PAGE, ksm.MADV_MERGEABLE)
    m.ksmd.scan()
    m.ksmd.scan()
    m.ksmd.scan_pages(9)
    p.munmap(a + 11 * PAGE, 2 * PAGE)
    m.check()
    dump = m._engine.dump()
    kinds = {node[1] for node in dump["nodes"]}
    assert kinds == {1, 2, 3}
    assert dump["stale"] == 1
    assert any(root for root in dump["unstable_roots"])
    return dump


def put(dump: dict[str, Any], table: str, at: int, field: int, value: Any) -> None:
    row = list(dump[table][at])
    row[field] = value
    dump[table][at] = tuple(row)


def first(dump: dict[str, Any], table: str, wanted: Callable[[Any], bool]) -> int:
    return next(i for i, row in enumerate(dump[table]) if wanted(row))


def break_tree(dump: dict[str, Any]) -> None:
    root = dump["unstable_roots"][0]
    left, right, parent, _, value = dump["joined"][root]
    dump["joined"][root] = (right, left, parent, False, value)


def break_calm(dump: dict[str, Any]) -> None:
    dump["calm_valid"] = True
    put(dump, "slots", first(dump, "slots", lambda s: s[7] == 1), 11, 1)


CORRUPTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "a mapper too many": ("frame-mappers", lambda d: put(d, "frames", 0, 1, 9)),
    "a free frame in use": ("frame-mappers", lambda d: d["frames"].pop(0)),
    "a merged slot that is calm": ("calm", break_calm),
    "resident": ("resident", lambda d: d["counters"].update(resident=99)),
    "swap": ("resident", lambda d: d["counters"].update(swapped_pages=1)),
    "an anonymous zero page": (
        "slot-masks",
        lambda d: put(d, "slots", first(d, "slots", lambda s: s[3] == 2), 4, 1),
    ),
    "used": ("slot-masks", lambda d: d["spaces"][1][7].__setitem__(0, (*d["spaces"][1][7][0][:3], 63))),
    "block": ("block-order", lambda d: d["spaces"][1][7].__setitem__(0, (d["spaces"][1][7][0][0], 3, 1, 0))),
    "an item too few": ("item-count", lambda d: d["counters"].update(rmap_items=3)),
    "of the space": ("item-count", lambda d: put(d, "spaces", 1, 4, 1)),
    "zero pages": ("item-count", lambda d: d["counters"].update(ksm_zero_pages=5)),
    "merging": ("merging", lambda d: put(d, "spaces", 1, 5, 1)),
    "a node that is none": (
        "item-state",
        lambda d: put(d, "slots", first(d, "slots", lambda s: s[7] == 1), 8, 77),
    ),
    "unshared": ("unshared", lambda d: d["counters"].update(pages_unshared=77)),
    "node list": (
        "node-count",
        lambda d: put(d, "slots", first(d, "slots", lambda s: s[7] == 1), 10, 12345),
    ),
    "chain": ("chains", lambda d: put(d, "nodes", first(d, "nodes", lambda n: n[1] == 3), 3, 9)),
    "chains": ("chains", lambda d: d["counters"].update(stable_node_chains=9)),
    "stale": ("stale", lambda d: put(d, "nodes", first(d, "nodes", lambda n: n[10]), 10, 0)),
    "stale count": ("stale", lambda d: d.update(stale=5)),
    "table": ("table", lambda d: put(d, "nodes", 0, 13, False)),
    "shared": ("shared-sharing", lambda d: d["counters"].update(pages_shared=9)),
    "tree order": ("rb-order", break_tree),
    "tree colour": ("rb-shape", lambda d: put(d, "joined", d["unstable_roots"][0], 3, True)),
    "tree size": ("rb-shape", lambda d: d["stable_sizes"].__setitem__(0, 9)),
    "list": ("list", lambda d: put(d, "spaces", 1, 2, 0)),
    "cursor": ("list", lambda d: d.update(cursor=9)),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_invariant_is_named(name: str) -> None:
    invariant, corrupt = CORRUPTIONS[name]
    dump = copy.deepcopy(busy_dump())
    corrupt(dump)
    with pytest.raises(ksm.InvariantError, match=rf"^{invariant}: ") as caught:
        verify(dump)
    assert caught.value.exit_code == 70

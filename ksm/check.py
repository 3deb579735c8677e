"""The validator: walks a dump of every structure of a machine and names the invariant that is broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ksm.errors import InvariantError

# Numbers of ksm._cy.types.
_KSM_ZERO, _FIRST_FRAME = 2, 4
_IN_STABLE, _IN_UNSTABLE = 1, 2
_PLAIN, _DUP, _CHAIN, _MIGRATING = 1, 2, 3, 4
_KSM, _CACHED, _FLAG, _NO_SLOT = 4, 32, 0x8000_0000, 0xFFFF_FFFF

Dump = dict[str, Any]


def verify(dump: Dump) -> None:
    """Raise `InvariantError` with the name of the first invariant of ksm._core that `dump` breaks. O(n log n).

    >>> from ksm import Machine
    >>> verify(Machine()._engine.dump())
    """
    for check in (_frames, _blocks, _items, _nodes, _counters, _stable_trees, _unstable_trees, _calm, _list):
        check(dump)


def _fail(invariant: str, detail: str) -> None:
    raise InvariantError(f"{invariant}: {detail}")


def _frames(dump: Dump) -> None:
    mappers: Counter[int] = Counter()
    swapped: Counter[int] = Counter()
    pins: Counter[int] = Counter()
    frames = {frame[0]: frame for frame in dump["frames"]}
    for slot, _, _, frame, anon, *_rest in dump["slots"]:
        if frame >= _FIRST_FRAME:
            (mappers if anon else swapped)[frame] += 1
        elif anon:
            _fail("slot-masks", f"slot {slot} is anonymous and maps frame {frame}")
    for node in dump["nodes"]:
        if node[1] != _CHAIN:
            pins[node[2]] += 1
    for _, frame in dump["erased"]:
        pins[frame] += 1
    for id, frame in frames.items():
        if (mappers[id], swapped[id], pins[id]) != frame[1:4]:
            _fail("frame-mappers", f"frame {id} says {frame[1:4]}, found {mappers[id], swapped[id], pins[id]}")
    for id in [*mappers, *swapped, *pins]:
        if id not in frames:
            _fail("frame-mappers", f"frame {id} is referred to and free")
    resident = sum(1 for frame in frames.values() if frame[1])
    if resident != dump["counters"]["resident"]:
        _fail("resident", f"{resident} frames have a mapper, the count is {dump['counters']['resident']}")
    in_swap = sum(1 for frame in frames.values() if frame[2])
    if in_swap != dump["counters"]["swapped_pages"]:
        _fail("resident", f"{in_swap} contents are in swap, the count is {dump['counters']['swapped_pages']}")


def _blocks(dump: Dump) -> None:
    used: Counter[int] = Counter()
    for slot, _, _, frame, *_rest in dump["slots"]:
        used[slot >> 6] += frame != 0
    for mm, space in enumerate(dump["spaces"]):
        last = -64
        for id, vpn, owner, count in space[7]:
            if vpn % 64 or vpn < last + 64 or owner != mm:
                _fail("block-order", f"block {id} of space {mm} at page {vpn:#x} after {last:#x}")
            if count != used[id]:
                _fail("slot-masks", f"block {id} counts {count} slots, {used[id]} are in use")
            last = vpn


def _items(dump: Dump) -> None:
    items: Counter[int] = Counter()
    merging: Counter[int] = Counter()
    zero: Counter[int] = Counter()
    unshared = 0
    nodes = {node[0]: node for node in dump["nodes"]}
    for slot, mm, _, frame, _, _, item, state, link, *_rest in dump["slots"]:
        zero[mm] += frame == _KSM_ZERO
        if not item:
            continue
        items[mm] += 1
        if state == _IN_STABLE:
            merging[mm] += 1
            if link not in nodes or nodes[link][1] == _CHAIN:
                _fail("item-state", f"slot {slot} hangs on node {link}, which is none")
        elif state >= _IN_UNSTABLE:
            unshared += 1
            if state == dump["state"] and dump["joined"][link][4] & ~_FLAG != slot:
                _fail("item-state", f"slot {slot} is unstable node {link}, which is another's")
    for mm, space in enumerate(dump["spaces"]):
        if (items[mm], merging[mm], zero[mm]) != space[4:7]:
            name = "item-count" if items[mm] != space[4] else "merging"
            _fail(name, f"space {mm} counts {space[4:7]}, found {items[mm], merging[mm], zero[mm]}")
    counters = dump["counters"]
    if sum(items.values()) != counters["rmap_items"]:
        _fail("item-count", f"{sum(items.values())} items, the count is {counters['rmap_items']}")
    if unshared != counters["pages_unshared"]:
        _fail("unshared", f"{unshared} items, pages_unshared is {counters['pages_unshared']}")
    if sum(zero.values()) != counters["ksm_zero_pages"]:
        _fail("item-count", f"{sum(zero.values())} zero pages, ksm_zero_pages is {counters['ksm_zero_pages']}")


def _nodes(dump: Dump) -> None:
    slots = {slot[0]: slot for slot in dump["slots"]}
    nodes = {node[0]: node for node in dump["nodes"]}
    frames = {frame[0]: frame for frame in dump["frames"]}
    stale = unsettled = migrating = 0
    limit = dump["counters"]["max_page_sharing"]
    for id, kind, frame, count, first, _, _, _, candidates, _, is_stale, is_unsettled, _, found in dump["nodes"]:
        if kind == _CHAIN:
            dups = _chain(nodes, id, first)
            taking = [dup for dup in dups if 0 < nodes[dup][3] < limit]
            want = not (len(dups) >= 2 and (not taking or taking == [first]))
            if (len(dups), len(taking), int(want)) != (count, candidates, is_unsettled):
                _fail(
                    "chains", f"chain {id} says {count, candidates, is_unsettled}, found {len(dups)}, {taking}, {want}"
                )
            unsettled += is_unsettled
        else:
            listed, at, before = 0, first, _NO_SLOT
            while listed < count and at in slots:
                if slots[at][7] != _IN_STABLE or slots[at][8] != id or slots[at][10] != before:
                    _fail("node-count", f"slot {at} in the list of node {id} is not of it")
                listed, before, at = listed + 1, at, slots[at][9]
            if listed != count or (count and at != _NO_SLOT):
                _fail("node-count", f"node {id} counts {count} items, its list has {listed}")
            # a frame that swap has cached is in RAM, whether or not a slot maps it
            mapped = (frames[frame][1] > 0 or frames[frame][5] & _CACHED) and frames[frame][5] & _KSM
            if bool(is_stale) == bool(mapped):
                _fail("stale", f"node {id}, frame {frame}: stale is {is_stale}, mapped is {bool(mapped)}")
            stale += is_stale
            migrating += kind == _MIGRATING
        if not found:
            _fail("table", f"node {id} cannot be found")
    if (stale, unsettled, migrating) != (dump["stale"], dump["unsettled"], dump["migrating"]):
        _fail("stale", f"stale, unsettled, migrating: {stale, unsettled, migrating} found")


def _chain(nodes: dict[int, Any], chain: int, first: int) -> list[int]:
    dups, at, before = [], first, 0
    while at:
        if nodes[at][1] != _DUP or nodes[at][7] != chain or nodes[at][6] != before:
            _fail("chains", f"node {at} in the list of chain {chain} is not of it")
        dups.append(at)
        before, at = at, nodes[at][5]
    return dups


def _counters(dump: Dump) -> None:
    counters = dump["counters"]
    counts = [node[3] for node in dump["nodes"] if node[1] != _CHAIN]
    shared = sum(1 for count in counts if count)
    found = (shared, sum(counts) - shared)
    if found != (counters["pages_shared"], counters["pages_sharing"]):
        _fail("shared-sharing", f"found {found}")
    chains = sum(1 for node in dump["nodes"] if node[1] == _CHAIN)
    dups = sum(1 for node in dump["nodes"] if node[1] == _DUP)
    if (chains, dups) != (counters["stable_node_chains"], counters["stable_node_dups"]):
        _fail("chains", f"{chains} chains with {dups} dups found")


def _walk(nodes: Sequence[Any], root: int, visit: Callable[[int], None], name: str) -> int:
    """In-order walk of a red-black tree that verifies its shape; the number of nodes."""
    heights: set[int] = set()
    order: list[int] = []
    stack: list[tuple[int, int, int, bool]] = [(root, 0, 0, False)]
    while stack:
        at, parent, black, done = stack.pop()
        if at == 0:
            heights.add(black)
            continue
        if done:
            order.append(at)
            continue
        left, right, up, red, _ = nodes[at]
        if up != parent or (red and (parent == 0 or nodes[parent][3])):
            _fail("rb-shape", f"{name} node {at}: parent {up}, not {parent}, or two red in a row")
        black += not red
        stack += [(right, at, black, False), (at, parent, black, True), (left, at, black, False)]
    if len(heights) > 1:
        _fail("rb-shape", f"{name}: black heights {heights}")
    for at in order:
        visit(at)
    return len(order)


def _ascending(name: str, invariant: str, content: Callable[[int], bytes | None]) -> Callable[[int], None]:
    last: list[bytes] = []

    def visit(at: int) -> None:
        data = content(at)
        if data is None:
            return
        if last and last[-1] >= data:
            _fail(invariant, f"{name} node {at} does not follow its neighbour")
        last[:] = [data]

    return visit


def _stable_trees(dump: Dump) -> None:
    nodes = {node[0]: node for node in dump["nodes"]}
    frames = {frame[0]: frame for frame in dump["frames"]}
    places = dump["places"]

    def content(place: int) -> bytes | None:
        node = nodes.get(places[place][4])
        if node is None or node[1] not in (_PLAIN, _CHAIN) or node[7] != place:
            _fail("rb-order", f"stable place {place} holds no node of its own")
            raise AssertionError
        if node[1] == _CHAIN:
            if not node[4]:
                return None
            node = nodes[node[4]]
        data: bytes = frames[node[2]][7]
        return data

    for nid, root in enumerate(dump["stable_roots"]):
        linked = _walk(places, root, _ascending("stable", "rb-order", content), "stable")
        pending = sum(1 for place in dump["pending"] if nodes[places[place][4]][9] == nid)
        if linked + pending != dump["stable_sizes"][nid]:
            _fail("rb-shape", f"stable tree {nid} has {linked} + {pending} of {dump['stable_sizes'][nid]} places")


def _unstable_trees(dump: Dump) -> None:
    frames = {frame[0]: frame for frame in dump["frames"]}
    slots = {slot[0]: slot for slot in dump["slots"]}
    joined = dump["joined"]

    def content(at: int) -> bytes | None:
        value = joined[at][4]
        if dump["unstable_changed"] or not dump["cursor"]:  # between passes the trees are done with
            return None
        frame = value & ~_FLAG if value & _FLAG else slots[value][3]
        data: bytes = frames[frame][7]
        return data

    linked = sum(
        _walk(joined, root, _ascending("unstable", "rb-order", content), "unstable") for root in dump["unstable_roots"]
    )
    left = len(dump["erased"]) - dump["erased_done"]
    later = len(joined) - dump["built"]
    if dump["counters"]["pages_unshared"] and linked + later - left != sum(dump["unstable_sizes"]):
        _fail("rb-shape", f"unstable trees: {linked} linked, {later} to come, {left} to go")


def _calm(dump: Dump) -> None:
    """Slots that a pass may visit without a look: if that is said, none of them would find anything."""
    if not dump["calm_valid"]:
        return
    frames = {frame[0]: frame for frame in dump["frames"]}
    limit = dump["counters"]["max_page_sharing"]
    found = {frames[node[2]][7] for node in dump["nodes"] if node[1] != _CHAIN and not node[10] and 0 < node[3] < limit}
    for slot, _, _, frame, anon, _, item, _, _, _, _, calm in dump["slots"]:
        if not calm:
            continue
        if not anon or not item or frames[frame][5] & _KSM:
            _fail("calm", f"slot {slot} is calm, but maps no ordinary frame, or has no item")
        if frames[frame][7] in found:
            _fail("calm", f"slot {slot} is calm, and another slot or a node with room holds what it holds")
        found.add(frames[frame][7])


def _list(dump: Dump) -> None:
    spaces = dump["spaces"]
    seen: list[int] = []
    at, before = spaces[0][0], 0
    while at and len(seen) < len(spaces):
        if spaces[at][1] != before or not spaces[at][2]:
            _fail("list", f"space {at} is linked and not registered, or its neighbours disagree")
        seen.append(at)
        before, at = at, spaces[at][0]
    registered = [mm for mm, space in enumerate(spaces) if mm and space[2]]
    if sorted(seen) != registered:
        _fail("list", f"linked are {sorted(seen)}, registered {registered}")
    if dump["cursor"] and dump["cursor"] not in seen:
        _fail("list", f"the cursor is on space {dump['cursor']}, which is not linked")

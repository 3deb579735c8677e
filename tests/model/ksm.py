"""KSM itself: registered address spaces, passes, visits, the two trees, chains of equal frames."""

from __future__ import annotations

from collections.abc import Callable

from tests.model.memory import KSM_ZERO, Frame, Memory, Mm, keys_in
from tests.model.rbtree import RbNode, RbTree

ITEM_BYTES = 64
FOREVER = 2_000_000_000


class Item:
    """What KSM remembers of one scanned slot: an rmap item."""

    def __init__(self, mm: Mm, page: int) -> None:
        self.mm = mm
        self.page = page
        self.remembered: bytes | None = None  # the content hashed last; None stands for the hash 0
        self.age = 0
        self.skips = 0
        self.node: StableNode | None = None
        self.family: object | None = None  # its range's own, when it was hung on the node
        self.unshared = False  # in the unstable tree, of this pass or of the last
        self.place: RbNode[Item] | None = None  # its place there, while the tree is of this pass
        self.tree: RbTree[Item] | None = None


class StableNode:
    """One KSM frame and the items that map it. It stands in a tree, in a chain, or waits to be re-placed."""

    def __init__(self, frame: Frame, nid: int) -> None:
        self.frame = frame
        self.nid = nid  # which NUMA node's tree
        self.items: list[Item] = []
        self.chain: Chain | None = None
        self.place: RbNode[StableNode | Chain] | None = None

    @property
    def stale(self) -> bool:
        """Whether the frame has gone."""
        return not self.frame.alive


class Chain:
    """A tree entry that groups nodes of equal content; the head is `dups[0]`."""

    def __init__(self, nid: int, pruned_at: int) -> None:
        self.nid = nid
        self.pruned_at = pruned_at
        self.dups: list[StableNode] = []
        self.place: RbNode[StableNode | Chain] | None = None


Entry = StableNode | Chain


class Ksm:
    """The daemon's state and its rules. Counters are counted, not kept."""

    def __init__(self, memory: Memory, nodes: int, old_order: bool, tracks_zero: bool, has_smart_scan: bool) -> None:
        self.memory = memory
        self.old_order = old_order  # before 6.11: the stable tree is searched before the checksum gate
        self.tracks_zero = tracks_zero  # since 6.6
        self.passes_over_none = False  # whether PROT_NONE slots keep what they map, and are not found again
        # tunables
        self.run = 0
        self.merge_across_nodes = 1
        self.max_page_sharing = 256
        self.use_zero_pages = 0
        self.prune_millisecs = 2000
        self.smart_scan = 1 if has_smart_scan else 0
        self.now_ms = 0
        # the walk
        self.mms: list[Mm] = []  # registered, in list order
        self.cursor: Mm | None = None  # None: no pass under way
        self.address = 0  # the next page to look at; 0: nothing mergeable met in this mm since ksmd came to it
        self.kept = 0  # items of pages below this were met in this pass (or left alone)
        self.stable: list[RbTree[Entry]] = [RbTree() for _ in range(nodes)]
        self.unstable: list[RbTree[Item]] = [RbTree() for _ in range(nodes)]
        self.waiting: list[StableNode] = []  # taken out of a tree: their frames went to another NUMA node
        self.nodes: set[StableNode] = set()
        self.chains: set[Chain] = set()
        # counters of events
        self.full_scans = 0
        self.pages_scanned = 0
        self.pages_skipped = 0
        self.at_pass_start: Callable[[], None] = lambda: None
        self.at_pass_end: Callable[[], None] = lambda: None

    # counters of what is there

    def items(self) -> list[Item]:
        """All rmap items."""
        return [item for mm in self.mms for item in mm.items.values()]

    def pages_shared(self) -> int:
        """Nodes on which an item hangs."""
        return sum(1 for node in self.nodes if node.items)

    def pages_sharing(self) -> int:
        """Items on nodes, beyond each node's first."""
        return sum(len(node.items) - 1 for node in self.nodes if node.items)

    def pages_unshared(self) -> int:
        """Items that joined an unstable tree."""
        return sum(item.unshared for item in self.items())

    def pages_volatile(self) -> int:
        """The other items."""
        return max(0, len(self.items()) - self.pages_shared() - self.pages_sharing() - self.pages_unshared())

    def zero_pages_of(self, mm: Mm) -> int:
        """Slots of `mm` that KSM made map the zero page."""
        return sum(slot is KSM_ZERO for slot in mm.slots.values()) if self.tracks_zero else 0

    def ksm_zero_pages(self) -> int:
        """The same for all processes."""
        return sum(self.zero_pages_of(mm) for mm in self.memory.mms.values())

    def stable_node_dups(self) -> int:
        """Nodes that stand in chains."""
        return sum(len(chain.dups) for chain in self.chains)

    def general_profit(self) -> int:
        """Bytes won."""
        pages = self.pages_sharing() + self.ksm_zero_pages()
        return pages * self.memory.page_size - len(self.items()) * ITEM_BYTES

    def merging_pages_of(self, mm: Mm) -> int:
        """Items of `mm` that hang on nodes."""
        return sum(item.node is not None for item in mm.items.values())

    # registration

    def enter(self, mm: Mm) -> None:
        """Register just before the mm that ksmd is in; with no pass under way, at the end."""
        if mm.registered:
            return
        mm.registered = True
        at = len(self.mms) if self.cursor is None else self.mms.index(self.cursor)
        self.mms.insert(at, mm)

    def exit(self, mm: Mm) -> None:
        """A process ends: without items it leaves at once, else it is the next one that ksmd reaches."""
        if not mm.registered or mm is self.cursor:
            return
        self.mms.remove(mm)
        if mm.items:
            self.mms.insert(0 if self.cursor is None else self.mms.index(self.cursor) + 1, mm)
        else:
            mm.registered = False

    # unmerging

    def unmerge(self, mm: Mm, start: int, end: int) -> None:
        """Give every KSM frame and KSM-placed zero page of [start, end) a private copy; the items stay."""
        for page in mm.pages_in(start, end):
            slot, vma = mm.slots[page], mm.vma_at(page)
            assert vma is not None
            if self.passes_over_none and vma.prot == 0:
                continue
            if (isinstance(slot, Frame) and slot.merged) or (slot is KSM_ZERO and self.tracks_zero):
                self.memory.fault(mm, page, vma, True)

    def unmerge_everything(self) -> None:
        """run = 2. When memory runs out half-way, what was done stays done, and passes go on counting."""
        try:
            for mm in list(self.mms):
                if mm.alive:
                    for vma in mm.vmas:
                        if vma.mergeable:
                            self.unmerge(mm, vma.start, vma.end)
                for item in list(mm.items.values()):
                    self.drop_item(item)
                if not mm.alive:
                    self.mms.remove(mm)
                    mm.registered = False
        finally:
            self.cursor = None
            self.address = self.kept = 0
        self.full_scans = 0
        self.sweep()

    def sweep(self) -> bool:
        """Empty the stable trees of stale nodes, root by root; say whether nothing is left."""
        clean = True
        for tree in self.stable:
            while tree.root is not None:
                entry = tree.root.value
                for node in [entry] if isinstance(entry, StableNode) else list(entry.dups):
                    if node.frame.mappers:
                        clean = False
                        break
                    self.drop_node(node)
                else:
                    if isinstance(entry, Chain):
                        self.drop_chain(entry)
                    continue
                break
        for node in list(self.waiting):
            if node.frame.mappers:
                clean = False
            else:
                self.drop_node(node)
        return clean

    # the walk

    def batch(self, budget: int) -> None:
        """What ksmd does between two sleeps: at most `budget` visits, to the end of the pass at most."""
        if self.run != 1 or not self.mms:
            return
        while budget > 0:
            item = self.next_item()
            if item is None:
                return
            self.visit(item)
            self.pages_scanned += 1
            budget -= 1

    def next_item(self) -> Item | None:
        """Walk on to the next slot that is to be visited; None at the end of the pass."""
        if not self.mms:
            return None
        if self.cursor is None:
            self.start_pass()
        while self.cursor is not None:
            item = self.next_in(self.cursor)
            if item is not None:
                return item
            self.leave(self.cursor)
        self.full_scans += 1
        self.at_pass_end()
        return None

    def start_pass(self) -> None:
        """At the head of the list: forget the unstable trees (their items keep counting)."""
        self.at_pass_start()
        if not self.merge_across_nodes:
            for node in [node for node in self.waiting if node.stale]:
                self.drop_node(node)
        self.unstable = [RbTree() for _ in self.unstable]
        for item in self.items():
            item.place = item.tree = None
        self.cursor = self.mms[0]
        self.address = self.kept = 0

    def next_in(self, mm: Mm) -> Item | None:
        """The next slot of `mm` that is to be visited: a mergeable frame that smart scan lets through."""
        for vma in mm.vmas if mm.alive else []:
            if not vma.mergeable or vma.end <= self.address:
                continue
            self.address = max(self.address, vma.start)
            for page in mm.pages_in(self.address, vma.end):
                frame = mm.slots[page]
                if not isinstance(frame, Frame):
                    continue
                self.drop_items(mm, self.kept, page)
                item = mm.items.setdefault(page, Item(mm, page))
                self.address = self.kept = page + 1
                if not self.skip(item, frame):
                    return item
            self.address = vma.end
        return None

    def leave(self, mm: Mm) -> None:
        """Done with `mm`: drop what lies ahead of the last visit, unregister it if it is empty, move on."""
        if not mm.alive:
            self.address = self.kept = 0
        self.drop_items(mm, self.kept, FOREVER**2)
        after = self.mms.index(mm) + 1
        self.cursor = self.mms[after] if after < len(self.mms) else None
        if self.address == 0:
            self.mms.remove(mm)
            mm.registered = False
        self.address = self.kept = 0

    def skip(self, item: Item, frame: Frame) -> bool:
        """Smart scan: pages that did not merge for long are visited ever more rarely."""
        if not self.smart_scan or frame.merged:
            return False
        age = item.age
        item.age = min(age + 1, 255)
        if age < 3:
            return False
        if item.skips == 0:
            item.skips = 1 if age <= 3 else 2 if age <= 5 else 4 if age <= 8 else 8
            return False
        item.skips -= 1
        self.pages_skipped += 1
        self.leave_tree(item)
        return True

    # one visit

    def visit(self, item: Item) -> None:
        """Look at one slot."""
        frame = item.mm.slots[item.page]
        assert isinstance(frame, Frame)
        if frame.ksm is not None:
            node = frame.ksm
            if self.misplaced(node):
                self.replace(item, frame, node)
            elif item.node is not node:
                self.leave_tree(item)
                self.hang(item, node)
        elif self.old_order:
            found = self.search_stable(frame)
            self.leave_tree(item)
            if found is not None:
                self.merge(item, frame, found)
            elif not self.changed(item, frame) and not self.place_zero_page(item, frame):
                self.search_unstable(item, frame)
        else:
            self.leave_tree(item)
            if self.changed(item, frame) or self.place_zero_page(item, frame):
                return
            found = self.search_stable(frame)
            if found is not None:
                self.merge(item, frame, found)
            else:
                self.search_unstable(item, frame)

    def changed(self, item: Item, frame: Frame) -> bool:
        """The checksum gate: remember what the page holds; say whether that is new."""
        if item.remembered == frame.content:
            return False
        item.remembered = frame.content
        return True

    def place_zero_page(self, item: Item, frame: Frame) -> bool:
        """use_zero_pages: a page of zeros becomes a mapping of the zero page; the item stays for now."""
        if (
            not self.use_zero_pages
            or frame.merged
            or frame.content != self.memory.zero
            or not self.still_there(item, frame)
        ):
            return False
        self.memory.set_slot(item.mm, item.page, KSM_ZERO)
        return True

    def still_there(self, item: Item, frame: Frame) -> bool:
        """Split the huge page around a frame that is about to merge; its zeros may have been given back with that."""
        if frame.huge is not None:
            self.memory.split_huge(frame)
        return item.mm.slots.get(item.page) is frame

    def merge(self, item: Item, frame: Frame, node: StableNode) -> None:
        """Map the node's frame in place of `frame` and hang the item on the node."""
        if frame.orphan or not self.still_there(item, frame):
            return
        self.memory.set_slot(item.mm, item.page, node.frame, clean=True)
        self.hang(item, node)

    def hang(self, item: Item, node: StableNode) -> None:
        """One more item on a node."""
        vma = item.mm.vma_at(item.page)
        assert vma is not None
        item.node = node
        item.family = vma.families[-1]
        node.items.append(item)

    # the stable trees

    def nid(self, frame: Frame) -> int:
        """Which tree the frame belongs to."""
        return 0 if self.merge_across_nodes else frame.node

    def full(self, node: StableNode) -> bool:
        """Whether a node can take no further item; one that has lost its last item never can."""
        return not (node.items and len(node.items) < self.max_page_sharing)

    def search_stable(self, frame: Frame) -> StableNode | None:
        """The node that a visited frame merges into."""
        nid = self.nid(frame)
        while True:
            outcome = self.walk_stable(frame.content, nid, visit=True)
            if outcome is None:
                continue
            entry, shown, chosen, _, _ = outcome
            if entry is None:
                return None
            assert shown is not None
            if chosen is not None and self.misplaced(chosen):
                self.set_waiting(chosen)
                return None
            return chosen

    def walk_stable(
        self, content: bytes, nid: int, visit: bool
    ) -> tuple[Entry | None, StableNode | None, StableNode | None, RbNode[Entry] | None, bool] | None:
        """One walk from the root. None: something stale was dropped, walk again.

        Otherwise: the entry of equal content, the node that shows it, the node that can take an item; or, when there is
        none, the parent and side of the place where it would stand.
        """
        place, parent, left = self.stable[nid].root, None, False
        while place is not None:
            entry = place.value
            looked = self.look_at(entry, visit)
            if looked is None:
                return None
            entry, shown, chosen = looked
            if content == shown.frame.content:
                return entry, shown, chosen, None, False
            parent, left = place, content < shown.frame.content
            place = place.left if left else place.right
        return None, None, None, parent, left

    def look_at(self, entry: Entry, visit: bool) -> tuple[Entry, StableNode, StableNode | None] | None:
        """What a walk does at a tree entry, also at those that it only passes.

        Gives the entry (a chain may have collapsed into its node), a node that shows the content, and the node that can
        take an item. None: there was nothing but stale nodes, which are gone now.
        """
        if isinstance(entry, StableNode):
            if entry.stale:
                self.drop_node(entry)
                return None
            return entry, entry, None if self.full(entry) else entry
        prune = False
        if visit and self.now_ms >= entry.pruned_at + self.prune_millisecs:
            prune = True
            entry.pruned_at = self.now_ms
        shown: StableNode | None = None
        chosen: StableNode | None = None
        for node in list(entry.dups):
            if node.stale:
                self.drop_node(node)
                continue
            shown = shown or node
            if not self.full(node) and (chosen is None or len(node.items) > len(chosen.items)):
                chosen = node
                if not prune:
                    break
        if shown is None:
            self.drop_chain(entry)
            return None
        if len(entry.dups) == 1 and (not self.old_order or (prune and chosen is not None)):
            return self.collapse(entry), shown, chosen
        if chosen is not None and entry.dups[0] is not chosen and len(chosen.items) + 1 < self.max_page_sharing:
            entry.dups.remove(chosen)
            entry.dups.insert(0, chosen)
        return entry, chosen or shown, chosen

    def collapse(self, chain: Chain) -> StableNode:
        """A chain of one becomes that node, in the same place."""
        (node,) = chain.dups
        node.chain, node.place = None, chain.place
        assert node.place is not None
        node.place.value = node
        self.chains.remove(chain)
        return node

    def drop_chain(self, chain: Chain) -> None:
        """Take an empty chain out of its tree."""
        assert not chain.dups and chain.place is not None
        self.stable[chain.nid].erase(chain.place)
        self.chains.remove(chain)

    def unplace(self, node: StableNode) -> None:
        """Take a node out of its chain or tree (a chain left empty stays)."""
        if node in self.waiting:
            self.waiting.remove(node)
        elif node.chain is not None:
            node.chain.dups.remove(node)
        else:
            assert node.place is not None
            self.stable[node.nid].erase(node.place)
        node.chain = node.place = None

    def drop_node(self, node: StableNode) -> None:
        """Forget a stable node, with its items."""
        for item in node.items:
            item.node = None
        node.items = []
        self.unplace(node)
        node.frame.ksm = None
        self.nodes.remove(node)

    def insert_stable(self, frame: Frame) -> StableNode:
        """A frame becomes a KSM frame: a place in the tree, or in the chain of its content."""
        nid = self.nid(frame)
        node = StableNode(frame, nid)
        outcome = None
        while outcome is None:
            outcome = self.walk_stable(frame.content, nid, visit=False)
        self.put_stable(node, outcome[0], outcome[3], outcome[4])
        frame.ksm = node
        self.nodes.add(node)
        return node

    def put_stable(self, node: StableNode, entry: Entry | None, parent: RbNode[Entry] | None, left: bool) -> None:
        """Give a node its place: at the head of the chain of equal content, or below `parent`."""
        if entry is None:
            node.place = self.stable[node.nid].insert(parent, left, node)
            return
        if isinstance(entry, StableNode):
            chain = Chain(node.nid, self.now_ms)
            chain.place, entry.place = entry.place, None
            assert chain.place is not None
            chain.place.value = chain
            entry.chain = chain
            chain.dups.append(entry)
            self.chains.add(chain)
            entry = chain
        node.chain = entry
        entry.dups.insert(0, node)

    # frames on the wrong NUMA node

    def misplaced(self, node: StableNode) -> bool:
        """Whether the node stands in no tree, or in that of another NUMA node than its frame's."""
        return node in self.waiting or node.nid != self.nid(node.frame)

    def set_waiting(self, node: StableNode) -> None:
        """Take a node out of the tree until one of its slots is visited."""
        if node not in self.waiting:
            self.unplace(node)
            self.waiting.append(node)

    def replace(self, item: Item, frame: Frame, node: StableNode) -> None:
        """A KSM frame was met on the wrong NUMA node: find it a place in the right tree."""
        self.set_waiting(node)
        nid = self.nid(frame)
        outcome = None
        while outcome is None:
            outcome = self.walk_stable(frame.content, nid, visit=True)
        entry, _, chosen, parent, left = outcome
        lonely = entry is not None and len(frame.mappers) == 1
        if lonely and chosen is not None and not self.misplaced(chosen):
            # nobody else maps the frame met: its slot merges like any other
            self.leave_tree(item)
            return
        if lonely and chosen is not None:
            # the frame found has left this NUMA node in its turn: it gives up its place, and waits
            self.take_place(node, nid, chosen)
        elif not lonely:
            self.waiting.remove(node)
            node.nid = nid
            self.put_stable(node, entry, parent, left)
        if (lonely and chosen is None) or self.full(node):
            # a full node does not count as found, not even for an item that hangs on it
            self.leave_tree(item)
            if not self.old_order or not (self.changed(item, frame) or self.place_zero_page(item, frame)):
                self.search_unstable(item, frame)
        elif item.node is not node:
            self.leave_tree(item)
            self.hang(item, node)

    def take_place(self, node: StableNode, nid: int, other: StableNode) -> None:
        """A waiting node takes the place of `other`, which waits now."""
        self.waiting.remove(node)
        node.nid, node.chain, node.place = nid, other.chain, other.place
        if node.chain is not None:
            node.chain.dups.remove(other)
            node.chain.dups.insert(0, node)
        elif node.place is not None:
            node.place.value = node
        other.chain = other.place = None
        self.waiting.append(other)

    # the unstable trees

    def search_unstable(self, item: Item, frame: Frame) -> None:
        """Find a page of equal content that was visited before in this pass, or wait for one."""
        tree = self.unstable[self.nid(frame)]
        place, parent, left = tree.root, None, False
        while place is not None:
            other = place.value
            theirs = self.mergeable_frame(other)
            if theirs is None or theirs is frame:
                return
            if theirs.content == frame.content:
                if self.nid(theirs) != self.nid(frame) or frame.merged:
                    return
                self.merge_two(item, frame, other, theirs)
                return
            parent, left = place, frame.content < theirs.content
            place = place.left if left else place.right
        item.place = tree.insert(parent, left, item)
        item.tree = tree
        item.unshared = True

    def mergeable_frame(self, item: Item) -> Frame | None:
        """What an item's slot maps now, if that can merge."""
        vma = item.mm.vma_at(item.page)
        slot = item.mm.slots.get(item.page)
        if vma is None or (self.passes_over_none and vma.prot == 0):
            return None
        return slot if vma.mergeable and isinstance(slot, Frame) else None

    def merge_two(self, item: Item, frame: Frame, other: Item, theirs: Frame) -> None:
        """The visited frame becomes the KSM frame of both; the tree's item hangs on it first."""
        if frame.huge is not None and frame.huge is theirs.huge:
            self.memory.split_huge(frame)
            return
        if not self.still_there(item, frame):
            return
        if theirs.merged or not self.still_there(other, theirs):
            # the visited frame has become a KSM frame already, of nobody else: that is undone by a copy
            vma = item.mm.vma_at(item.page)
            assert vma is not None
            frame.orphan = True
            if not (self.passes_over_none and vma.prot == 0):
                self.memory.own(item.mm, item.page, vma, frame)
            return
        self.leave_tree(other)
        node = self.insert_stable(frame)
        frame.dirty = True
        frame.clean.add((item.mm, item.page))
        self.merge(other, theirs, node)
        self.hang(item, node)

    # items

    def leave_tree(self, item: Item) -> None:
        """An item leaves its node or its place in the unstable tree."""
        if item.node is not None:
            if item.node.stale:
                self.drop_node(item.node)
                return
            item.node.items.remove(item)
            item.node = None
        elif item.unshared:
            item.unshared = False
            if item.place is not None and item.tree is not None:
                item.tree.erase(item.place)
            item.place = item.tree = None

    def drop_item(self, item: Item) -> None:
        """Forget an item."""
        self.leave_tree(item)
        del item.mm.items[item.page]

    def drop_items(self, mm: Mm, start: int, end: int) -> None:
        """Forget the items of the pages of [start, end)."""
        for page in keys_in(mm.items, start, end):
            self.drop_item(mm.items[page])

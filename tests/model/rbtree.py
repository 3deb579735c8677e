"""A red-black tree by the textbook, whose shape is the point: insertion, removal by successor, replacement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class RbNode(Generic[T]):
    """One place in a tree; `value` may be exchanged without moving the place.

    >>> RbNode("a").value
    'a'
    """

    def __init__(self, value: T) -> None:
        self.value = value
        self.red = True
        self.parent: RbNode[T] | None = None
        self.left: RbNode[T] | None = None
        self.right: RbNode[T] | None = None


class RbTree(Generic[T]):
    """The caller finds the place (it knows the order), the tree keeps the balance.

    >>> tree = RbTree[int]()
    >>> places = [tree.insert_sorted(key) for key in (1, 2, 3, 4, 5)]
    >>> list(tree), tree.root.value
    ([1, 2, 3, 4, 5], 2)
    >>> tree.erase(places[1]); list(tree), tree.root.value
    ([1, 3, 4, 5], 3)
    """

    def __init__(self) -> None:
        self.root: RbNode[T] | None = None

    def __iter__(self) -> Iterator[T]:
        def walk(node: RbNode[T] | None) -> Iterator[T]:
            if node is not None:
                yield from walk(node.left)
                yield node.value
                yield from walk(node.right)

        return walk(self.root)

    def insert(self, parent: RbNode[T] | None, left: bool, value: T) -> RbNode[T]:
        """Hang `value` as the left or right child of `parent` (None: as the root), then rebalance."""
        node = RbNode(value)
        node.parent = parent
        if parent is None:
            self.root = node
        elif left:
            parent.left = node
        else:
            parent.right = node
        self._fix_insert(node)
        return node

    def insert_sorted(self, value: T) -> RbNode[T]:
        """Insert by the values' own order (for tests of this tree)."""
        parent, left, node = None, False, self.root
        while node is not None:
            parent, left = node, value < node.value  # type: ignore[operator]
            node = node.left if left else node.right
        return self.insert(parent, left, value)

    def erase(self, node: RbNode[T]) -> None:
        """Take `node` out; with two children its successor moves into its place and takes its colour."""
        removed_red = node.red
        if node.left is None:
            child, above = node.right, node.parent
            self._transplant(node, child)
        elif node.right is None:
            child, above = node.left, node.parent
            self._transplant(node, child)
        else:
            successor = node.right
            while successor.left is not None:
                successor = successor.left
            removed_red = successor.red
            child = successor.right
            if successor.parent is node:
                above = successor
            else:
                above = successor.parent
                self._transplant(successor, child)
                successor.right = node.right
                successor.right.parent = successor
            self._transplant(node, successor)
            successor.left = node.left
            successor.left.parent = successor
            successor.red = node.red
        if not removed_red:
            self._fix_erase(child, above)
        node.parent = node.left = node.right = None

    def check(self) -> None:
        """Raise AssertionError unless links, colours and black heights are right."""

        def height(node: RbNode[T] | None, parent: RbNode[T] | None) -> int:
            if node is None:
                return 1
            assert node.parent is parent
            assert not (node.red and parent is not None and parent.red)
            left, right = height(node.left, node), height(node.right, node)
            assert left == right
            return left + (not node.red)

        assert self.root is None or not self.root.red
        height(self.root, None)

    def _transplant(self, old: RbNode[T], new: RbNode[T] | None) -> None:
        if old.parent is None:
            self.root = new
        elif old is old.parent.left:
            old.parent.left = new
        else:
            old.parent.right = new
        if new is not None:
            new.parent = old.parent

    def _rotate(self, node: RbNode[T], left: bool) -> None:
        """Rotate `node` down to the left (or right); its right (or left) child comes up."""
        up = node.right if left else node.left
        assert up is not None
        inner = up.left if left else up.right
        self._transplant(node, up)
        if left:
            node.right, up.left = inner, node
        else:
            node.left, up.right = inner, node
        node.parent = up
        if inner is not None:
            inner.parent = node

    def _fix_insert(self, node: RbNode[T]) -> None:
        while node.parent is not None and node.parent.red:
            parent = node.parent
            grand = parent.parent
            assert grand is not None
            left = parent is grand.left
            uncle = grand.right if left else grand.left
            if uncle is not None and uncle.red:
                parent.red = uncle.red = False
                grand.red = True
                node = grand
                continue
            if node is (parent.right if left else parent.left):
                self._rotate(parent, left)
                node, parent = parent, node
            parent.red = False
            grand.red = True
            self._rotate(grand, not left)
        assert self.root is not None
        self.root.red = False

    def _fix_erase(self, node: RbNode[T] | None, parent: RbNode[T] | None) -> None:
        while parent is not None and (node is None or not node.red):
            left = node is parent.left
            sibling = parent.right if left else parent.left
            assert sibling is not None
            if sibling.red:
                sibling.red = False
                parent.red = True
                self._rotate(parent, left)
                sibling = parent.right if left else parent.left
                assert sibling is not None
            near, far = (sibling.left, sibling.right) if left else (sibling.right, sibling.left)
            if not (near is not None and near.red) and not (far is not None and far.red):
                sibling.red = True
                node, parent = parent, parent.parent
                continue
            if far is None or not far.red:
                assert near is not None
                near.red = False
                sibling.red = True
                self._rotate(sibling, not left)
                sibling, far = near, sibling
            sibling.red = parent.red
            parent.red = False
            assert far is not None
            far.red = False
            self._rotate(parent, left)
            node, parent = self.root, None
        if node is not None:
            node.red = False

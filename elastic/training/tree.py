"""The one binary tree in which virtual ranks' gradients are added, whoever holds which. Pure.

Leaves are the virtual ranks 0 .. V-1; the node (level l, position k) covers the leaves [k 2^l, (k+1) 2^l)
that exist. A node whose right half has no leaves is its left half, so that any V has a tree.
"""

from collections.abc import Callable, Container, Iterable, Sequence
from typing import NamedTuple, TypeVar

Sum = TypeVar("Sum")

ALIGNMENT = 16
"""Slices begin at multiples of this many elements."""


class Node(NamedTuple):
    """A subtree: the sum of its leaves, added in the tree's order, is the same number whoever computed it."""

    level: int
    position: int


def joins(forest: Container[Node], node: Node, num_leaves: int) -> tuple[list[Node], Node]:
    """Return the siblings in a forest that a subtree joins, one after another, and what it becomes so."""
    siblings = []
    while (1 << node.level) < num_leaves:
        level, position = node
        if position % 2 or (position + 1) << level < num_leaves:
            sibling = Node(level, position ^ 1)
            if sibling not in forest:
                break
            siblings.append(sibling)
        node = Node(level + 1, position // 2)
    return siblings, node


def grow(
    forest: dict[Node, Sum], node: Node, value: Sum, num_leaves: int, add: Callable[[Sum, Sum], None]
) -> None:
    """Put the sum of a subtree into a forest, and join siblings for as long as there are any.

    `add(left, right)` adds the right sum to the left one in place. The order in which subtrees come does not
    matter: each addition is that of a node's two halves.
    """
    siblings, node = joins(forest, node, num_leaves)
    for sibling in siblings:
        other = forest.pop(sibling)
        left, right = (value, other) if sibling.position % 2 else (other, value)
        add(left, right)
        value = left
    forest[node] = value


def leaves_of(node: Node, num_leaves: int) -> range:
    """Return the leaves that a subtree covers."""
    return range(node.position << node.level, min((node.position + 1) << node.level, num_leaves))


def partial_sums(leaves: Iterable[int], num_leaves: int) -> tuple[Node, ...]:
    """List the subtrees that a rank with these leaves sums up alone, from left to right.

    At most 2 log2 V for a contiguous range of leaves.
    """
    forest: dict[Node, None] = {}
    for leaf in leaves:
        grow(forest, Node(0, leaf), None, num_leaves, lambda _left, _right: None)
    return tuple(sorted(forest, key=lambda node: node.position << node.level))


def slice_length(num_elements: int, world_size: int) -> int:
    """Return how many elements of a vector each rank combines; the last slices may reach beyond its end."""
    per_rank = -(-num_elements // world_size)
    return -(-per_rank // ALIGNMENT) * ALIGNMENT


def padded_length(num_elements: int, world_sizes: Sequence[int]) -> int:
    """Return the room that the slices of a world of any of these sizes need."""
    return max(size * slice_length(num_elements, size) for size in world_sizes)

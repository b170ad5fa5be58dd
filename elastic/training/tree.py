"""The one binary tree in which virtual ranks' gradients are added, whoever holds which. Pure.

Leaves are the virtual ranks 0 .. V-1; the node (level l, position k) covers the leaves [k 2^l, (k+1) 2^l)
that exist. A node whose right half has no leaves is its left half, so that any V has a tree.
"""

from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 16
"""Slices begin at multiples of this many elements."""


class Node(NamedTuple):
    """A subtree: the sum of its leaves, added in the tree's order, is the same number whoever computed it."""

    level: int
    position: int


def place(nodes: list[Node], node: Node, num_leaves: int) -> int:
    """Put `node` behind its left neighbours, and join it with as many of them as are its siblings.

    Changes `nodes`; returns the number of additions: each joins the last two sums into the place of the
    former.
    """
    nodes.append(node)
    additions = 0
    while (1 << nodes[-1].level) < num_leaves:
        level, position = nodes[-1]
        parent = Node(level + 1, position // 2)
        if position % 2 and len(nodes) > 1 and nodes[-2] == Node(level, position - 1):
            nodes[-2:] = [parent]
            additions += 1
        elif position % 2 == 0 and (position + 1) << level >= num_leaves:
            nodes[-1] = parent
        else:
            break
    return additions


def partial_sums(leaves: range, num_leaves: int) -> tuple[Node, ...]:
    """List the subtrees that a rank with these leaves sums up alone, from left to right: at most 2 log2 V."""
    nodes: list[Node] = []
    for leaf in leaves:
        place(nodes, Node(0, leaf), num_leaves)
    return tuple(nodes)


def slice_length(num_elements: int, world_size: int) -> int:
    """Return how many elements of a vector each rank combines; the last slices may reach beyond its end."""
    per_rank = -(-num_elements // world_size)
    return -(-per_rank // ALIGNMENT) * ALIGNMENT


def padded_length(num_elements: int, world_sizes: Sequence[int]) -> int:
    """Return the room that the slices of a world of any of these sizes need."""
    return max(size * slice_length(num_elements, size) for size in world_sizes)

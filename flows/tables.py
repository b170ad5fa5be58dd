"""Tables, trees and sizes on the terminal. Knows only rich."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SPELLED = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def legible(text: str) -> str:
    """Spell control characters out, tabs and new lines aside: they would move the cursor or set colours."""
    return text.translate(_SPELLED)


def draw_table(console: Console, title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Draw a table; cells are plain text, never markup."""
    table = Table(
        *(Column(name, overflow="fold") for name in head), title=title or None, title_justify="left"
    )
    for row in rows:
        table.add_row(*(Text(legible(str(cell))) for cell in row))
    console.print(table)


def spell_bytes(num_bytes: float) -> str:
    """Spell a size for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def parse_bytes(text: str) -> int:
    """Read a size such as "1GiB", "512M" or "1000000". Raises ValueError."""
    found = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise ValueError(f"{text!r} is no size: write it like 512MiB or 2GiB")
    return int(found[1]) << UNITS[found[2].upper()]


@dataclass(frozen=True, slots=True)
class Leaf:
    """What a tree shows at the end of a path; the sizes of what is below a branch add up."""

    path: tuple[str, ...]
    text: str
    num_bytes: int


@dataclass(slots=True)
class _Branch:
    branches: dict[str, "_Branch"] = field(default_factory=dict)
    leaves: list[tuple[str, Leaf]] = field(default_factory=list)
    num_bytes: int = 0


def draw_tree(console: Console, title: str, leaves: Iterable[Leaf], joint: str = "/") -> None:
    """Draw leaves by their paths; a branch with nothing beside it is joined with the next."""
    root = _Branch()
    for leaf in leaves:
        branch = root
        branch.num_bytes += leaf.num_bytes
        for name in leaf.path[:-1]:
            branch = branch.branches.setdefault(name, _Branch())
            branch.num_bytes += leaf.num_bytes
        branch.leaves.append((leaf.path[-1], leaf))
    tree = Tree(Text(f"{title}  {spell_bytes(root.num_bytes)}"))
    _grow(tree, root, joint)
    console.print(tree)


def _grow(tree: Tree, branch: _Branch, joint: str) -> None:
    for name, leaf in branch.leaves:
        tree.add(Text(legible(f"{name}  {leaf.text}")))
    for name, child in branch.branches.items():
        path, end = _joined(name, child, joint)
        if not end.branches and len(end.leaves) == 1:
            ((last, leaf),) = end.leaves
            tree.add(Text(legible(f"{path}{joint}{last}  {leaf.text}")))
        else:
            text = Text(legible(f"{path}  {spell_bytes(end.num_bytes)}"), style="bold")
            _grow(tree.add(text), end, joint)


def _joined(name: str, branch: _Branch, joint: str) -> tuple[str, _Branch]:
    """Follow a path for as long as it does not fork."""
    while len(branch.branches) == 1 and not branch.leaves:
        ((following, branch),) = branch.branches.items()
        name += joint + following
    return name, branch

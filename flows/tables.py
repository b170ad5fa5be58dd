"""Tables and sizes on the terminal. Knows only rich."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def draw_table(console: Console, title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Draw a table; cells are plain text, never markup."""
    table = Table(*head, title=title or None, title_justify="left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console.print(table)


def spell_bytes(num_bytes: float) -> str:
    """Spell a size for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"

"""Tables on stdout, whose cells are shown as they are: brackets and `:words:` of prompts and names mean nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    title: str | None = None,
    right: Collection[str] = (),
) -> None:
    """Print a table.

    Args:
        rows: a cell for each column; a `rich.text.Text` where parts have a style.
        right: columns of numbers, which end at the same place.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None if title is None else Text(title, "table.title"), title_justify="left")
    for column in columns:
        table.add_column(Text(column), justify="right" if column in right else "left")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    Console().print(table)

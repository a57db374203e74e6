"""Progress of long work: `with_progress` shows a bar on a terminal and plain lines elsewhere.

Functions that take long have an argument `track`, so that the caller decides what shows their progress.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""`(items, what is done with them) -> the items`, such as `with_progress` and `tqdm.tqdm`."""

SECONDS_OF_SILENCE, SECONDS_BETWEEN_LINES = 2.0, 20.0
"""Seconds before the first plain line, and between later ones."""


def no_progress(items: Sequence[Any], what: str) -> Sequence[Any]:
    """Return the items: the `Track` that shows nothing."""
    del what
    return items


def with_progress(rows: Sequence[Any], what: str | Callable[[], str]) -> Iterator[Any]:
    """Yield rows and show on stderr how many are done, as a bar on a terminal and as occasional lines elsewhere.

    Args:
        rows: the work: any sequence.
        what: a description of the work, or a function that returns it anew after each row.

    Examples:
        >>> from tinymodel_jax.runtime.progress import with_progress
        >>> [row for row in with_progress([1, 2], "counting")]
        [1, 2]
    """
    words = what if callable(what) else lambda: what
    if len(rows) < 2 or not sys.stderr.isatty():
        yield from _with_lines(rows, words)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(words(), total=len(rows))
        for row in rows:
            yield row
            progress.update(bar, advance=1, description=words())


def _with_lines(rows: Sequence[Any], words: Callable[[], str]) -> Iterator[Any]:
    due = time.monotonic() + SECONDS_OF_SILENCE
    for done, row in enumerate(rows):
        if done and time.monotonic() >= due:
            print(f"{words()}: {done} of {len(rows)}", file=sys.stderr, flush=True)
            due = time.monotonic() + SECONDS_BETWEEN_LINES
        yield row

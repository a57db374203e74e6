"""`with_progress` shows the progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

SECONDS_OF_SILENCE, SECONDS_BETWEEN_LINES = 2.0, 20.0
"""Seconds before the first plain line, and between later ones."""


def with_progress(rows: Sequence[Any], what: str | Callable[[], str]) -> Iterator[Any]:
    """Yield rows and show on stderr how many are done, as a bar on a terminal and as occasional lines elsewhere.

    Args:
        what: a description of the work, or a function that returns it anew after each row.
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

"""The search over all features that commands show: read from its file or made, and what the story world adds to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinymodel_jax.commands.options import work_file
from tinymodel_jax.commands.rows import unseen_stories
from tinymodel_jax.runtime.progress import with_progress

CONTEXTS = 20
"""Top contexts of a feature that a search keeps, where no more are asked for."""

if TYPE_CHECKING:
    import numpy as np

    from tinymodel_jax.analysis.search.top_activations import TopActivations
    from tinymodel_jax.lm import FeatureReader, TinyModel


def with_search_bar(starts: Sequence[int]) -> Iterable[int]:
    """Show a progress bar of the batches of a search."""
    return with_progress(list(starts), "searching")


def search(
    reader: FeatureReader,
    rows: np.ndarray,
    out: Path | None,
    n_contexts: int = 1,
    track: Callable[[Sequence[int]], Iterable[int]] = with_search_bar,
) -> TopActivations:
    """Return the result in a file, or search and write it; a stopped search goes on.

    Args:
        out: the file; `options.prepare_output` has seen it.
        n_contexts: top contexts of a feature that are needed; a row has one.

    Raises:
        OtherWorkError: the file is of another search.
        ValueError: it is damaged, or has fewer contexts.
    """
    from tinymodel_jax.analysis.search.resumable import OtherWorkError
    from tinymodel_jax.analysis.search.top_activations import load_top_activations, search_fingerprints, top_activations

    needed = min(n_contexts, len(rows))
    if out is not None and out.exists():
        found = load_top_activations(out)
        now = {"tag": reader.site.tag, **search_fingerprints(reader, rows)}
        changed = [name for name, value in now.items() if getattr(found, name) != value]
        if changed:
            what = ", ".join(changed)
            raise OtherWorkError(f"--out {out} holds a search with another {what}; name another file, or delete it.")
        if (held := found.top.row.shape[1]) < needed:
            raise ValueError(
                f"--out {out} holds {held} contexts of a feature, not {needed}; name another file, or delete it."
            )
        return found
    work = work_file(out)
    found = top_activations(reader.lm, reader.site.tag, rows, k=max(CONTEXTS, needed), work_file=work, track=track)
    if out is not None and work is not None:
        found.save(out)
        work.unlink(missing_ok=True)  # only now: until the result is written, it is all there is of the search
    return found


def storyworld_truth(lm: TinyModel, rows: np.ndarray, limit: int) -> np.ndarray:
    """Return where each concept holds, (rows, seq, concepts), in rows of `limit` unseen stories."""
    from tinymodel_jax.bundled.storyworld import labels

    return labels(unseen_stories(lm, limit), lm.tokenizer, width=rows.shape[1], max_length=rows.shape[1])

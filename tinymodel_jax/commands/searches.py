"""The search over all features that commands show: read from its file or made, and what the story world adds to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinymodel_jax.commands.frame import with_progress
from tinymodel_jax.commands.rows import unseen_stories

if TYPE_CHECKING:
    import numpy as np

    from tinymodel_jax.analysis.top_activations import TopActivations
    from tinymodel_jax.lm import FeatureReader


def with_search_bar(starts: Sequence[int]) -> Iterable[int]:
    """Show a progress bar of the batches of a search."""
    return with_progress(list(starts), "searching")


def search(
    reader: FeatureReader,
    rows: np.ndarray,
    out: Path | None,
    track: Callable[[Sequence[int]], Iterable[int]] = with_search_bar,
) -> TopActivations:
    """Return the result in a file, or search and write it; a stopped search goes on.

    Raises:
        FileNotFoundError: the file's folder is not there.
        ValueError: the file is damaged or of another search.
    """
    from tinymodel_jax.analysis.top_activations import fingerprints, load_top_activations, top_activations

    if out is not None and out.exists():
        found = load_top_activations(out)
        now = {"tag": reader.site.tag, **fingerprints(reader, rows)}
        changed = [name for name, value in now.items() if getattr(found, name) != value]
        if changed:
            what = ", ".join(changed)
            raise ValueError(f"--out {out} holds a search with another {what}; name another file, or delete it.")
        return found
    if out is not None and not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}; make it first.")
    work = None if out is None else out.with_name(f"{out.name}.work")
    found = top_activations(reader.lm, reader.site.tag, rows, work=work, progress=track)
    if out is not None:
        found.save(out)
    return found


def storyworld_f1(reader: FeatureReader, rows: np.ndarray, limit: int) -> np.ndarray:
    """Return how well each feature tells each concept (n_features, concepts), on rows of `limit` unseen stories."""
    from tinymodel_jax.analysis.feature_queries import concept_f1
    from tinymodel_jax.bundled.storyworld import labels

    truth = labels(unseen_stories(reader.lm, limit), reader.lm.tokenizer, width=rows.shape[1], max_length=rows.shape[1])
    return concept_f1(reader, rows, truth)

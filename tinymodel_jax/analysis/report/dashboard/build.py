"""A dashboard from beginning to end: measure what its pages show, then write it, whole or not at all.

`gather` measures, `write_dashboard` writes; the second knows no model. Memory grows with features and their contexts,
not with rows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from tinymodel_jax.analysis.report.dashboard.records import (
    Facts,
    fixed_facts,
    index_columns,
    shard_records,
    text_record,
)
from tinymodel_jax.analysis.report.dashboard.shards import FOLDER, shard_name, write_data
from tinymodel_jax.analysis.report.dashboard.weights_graph import weights_graph
from tinymodel_jax.analysis.report.dashboard.windows import shown_contexts, window_activations
from tinymodel_jax.analysis.report.page import token_text, write_page
from tinymodel_jax.analysis.search.logit_effects import logit_effects
from tinymodel_jax.analysis.search.top_activations import TopActivations
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.lm import FeatureReader

A_SHARD = 64
"""Features in a file: one that is looked at loads so many."""
LOGITS, OTHERS_LOGITS = 10, 3
"""Tokens promoted and suppressed that a page lists; promoted ones of another dictionary's feature."""
TEXT_START = 12
"""Tokens by which the index names a text; one more in its data says that there are more."""
SEARCH, EFFECTS = "search.safetensors", "effects.work"
WORK = (SEARCH, f"{SEARCH}.work", EFFECTS)
"""Files of work that goes on where it was stopped: the search, and the measuring of effects."""
INDEX = "index.html"
GENERATOR = '<meta name="generator" content="tinymodel dashboard">'
"""By which its `index.html` is known."""
Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""(things to do, what is done) -> the things; shows a progress bar as they pass by."""


class Heading(NamedTuple):
    """What the pages say of the whole."""

    model: str
    site: str
    about: str
    """What kind of dictionary it is."""


def gather(
    reader: FeatureReader,
    rows: Integer[np.ndarray, "rows seq"],
    found: TopActivations,
    others: Sequence[str],
    track: Track,
) -> Facts:
    """Measure what is shown of all features besides what the search found; leave `f1` and `importance` out.

    Args:
        reader: `lm[tag]` of a whole dictionary.
        rows: what was searched.
        others: tags of dictionaries whose features may be upstream or downstream.

    Raises:
        ValueError: a tag has no dictionary.
    """
    lm, tag = reader.lm, reader.site.tag
    contexts = shown_contexts(found)
    acts = window_activations(reader, rows, contexts, track=lambda batches: track(batches, "contexts"))
    graph = weights_graph(lm, tag, others, track=lambda tags: track(tags, "weights"))
    linked = sorted({*graph.upstream, *graph.downstream})
    top = min(OTHERS_LOGITS, lm.config.d_vocab)
    promoted = {other: logit_effects(lm, other, top).promoted for other in track(linked, "logits")}
    logits = logit_effects(lm, tag, min(LOGITS, lm.config.d_vocab))
    return Facts(found, contexts, acts, logits, graph, promoted)


def text_records(reader: FeatureReader, texts: Sequence[Sequence[int]], track: Track) -> list[dict[str, Any]]:
    """Return the record of each text, given as token ids with `[BEGIN]` in front."""
    config = reader.lm.config
    return [text_record(np.asarray(ids), np.asarray(reader([ids]))[0], config) for ids in track(texts, "texts")]


def write_dashboard(
    folder: Path,
    heading: Heading,
    facts: Facts,
    rows: Integer[np.ndarray, "rows seq"],
    vocabulary: Sequence[str],
    config: ModelConfig,
    concepts: Mapping[str, str],
    texts: Sequence[dict[str, Any]],
    track: Track,
) -> None:
    """Write the pages into a folder that has none; `index.html` comes last.

    Args:
        vocabulary: text of every id.
        config: says which ids are text.
        concepts: names, in the order of `facts.f1`, and what they mean; empty without it.
        texts: `text_records`.

    Raises:
        OSError: a file cannot be written.
    """
    (folder / FOLDER).mkdir()
    n = facts.found.n_features
    write_data(folder, "vocabulary", [token_text(word) for word in vocabulary])
    for number in track(range(-(-n // A_SHARD)), "pages"):
        first = number * A_SHARD
        records = shard_records(facts, rows, config, first, min(first + A_SHARD, n))
        write_data(folder, shard_name(number), records)
    for number, record in enumerate(texts, 1):
        write_data(folder, f"text-{number}", record)
    write_data(folder, "index", _index(heading, facts, rows, concepts, texts))
    content = {"heading": heading, "found": facts.found, "n_texts": len(texts)}
    write_page(folder / INDEX, "dashboard.html.jinja", content)


def open_partial(out: Path) -> Path:
    """Return the folder `OUT.partial`, made if there is none, where a dashboard grows until it is whole.

    Pages that a stopped run left there go; what `WORK` names stays, so that the work goes on.

    Raises:
        ValueError: `out` or the folder beside it holds something else.
        OSError: it cannot be made.
    """
    if out.exists() and not _is_dashboard(out):
        raise ValueError(f"--out {out} is there and no dashboard; name another folder, or remove it.")
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    strange = sorted({path.name for path in partial.iterdir()} - {INDEX, FOLDER, *WORK})
    if strange:
        raise ValueError(f"{partial} is where the dashboard is made, but holds {strange[0]}; move that away.")
    (partial / INDEX).unlink(missing_ok=True)
    shutil.rmtree(partial / FOLDER, ignore_errors=True)
    return partial


def publish(partial: Path, out: Path) -> None:
    """Move a whole dashboard to its place, without the work files, and remove the one that was there.

    Stopped anywhere, it leaves what `open_partial` accepts again.

    Raises:
        OSError: a file cannot be moved or removed.
    """
    if out.exists():
        _remove_dashboard(out)
    os.replace(partial, out)
    for name in WORK:
        (out / name).unlink(missing_ok=True)


def _remove_dashboard(folder: Path) -> None:
    """Remove a dashboard, `index.html` last, by which it is known; a folder with other files stays."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    for name in (*WORK, INDEX):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def _is_dashboard(folder: Path) -> bool:
    """Say whether a folder is empty or holds what `publish` puts there, and nothing else."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    expected = INDEX in names and names <= {INDEX, FOLDER, *WORK}
    return not names or (expected and GENERATOR in (folder / INDEX).read_text("utf-8"))


def _index(
    heading: Heading,
    facts: Facts,
    rows: np.ndarray,
    concepts: Mapping[str, str],
    texts: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    found = facts.found
    return {
        "site": heading.site,
        "n_features": found.n_features,
        "n_tokens": found.n_tokens,
        "n_rows": found.n_rows,
        "histogram_every": found.histogram_every,
        "effect_rows": None if facts.importance is None else facts.importance.n_rows,
        "a_shard": A_SHARD,
        "concepts": [[name, meaning] for name, meaning in concepts.items()],
        "texts": [record["tokens"][: TEXT_START + 1] for record in texts],
        "text_start": TEXT_START,
        "columns": index_columns(facts, rows),
        **fixed_facts(),
    }

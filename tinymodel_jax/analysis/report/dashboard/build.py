"""Builds a dashboard: measures what its pages show, then writes the pages, which appear complete.

`gather` measures, and `write_dashboard` writes without needing the model. Memory grows with the number of features and
contexts, not with the number of rows.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
from collections.abc import Mapping, Sequence
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
from tinymodel_jax.analysis.report.dashboard.weights_graph import weights_graph
from tinymodel_jax.analysis.report.dashboard.windows import shown_contexts, window_activations
from tinymodel_jax.analysis.report.page import token_text, write_page
from tinymodel_jax.analysis.search.logit_effects import logit_effects
from tinymodel_jax.analysis.search.top_activations import TopActivations
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.lm import FeatureReader
from tinymodel_jax.runtime.progress import Track

A_SHARD = 64
"""Features per data file; opening a feature loads one file."""
LOGITS, OTHERS_LOGITS = 10, 3
"""Promoted and suppressed tokens that a page lists, for the feature and for one of another dictionary."""
TEXT_START = 12
"""Tokens of a text that the index shows; its data holds one more, to tell whether the text continues."""
SEARCH, EFFECTS = "search.safetensors", "effects.work"
WORK = (SEARCH, f"{SEARCH}.work", EFFECTS)
"""Work files, from which a stopped run resumes the search and the measurement of effects."""
REPLACED = "replaced"
"""The folder in which an older dashboard is kept while a new one takes its place."""
INDEX, FOLDER = "index.html", "data"
"""The parts of a dashboard: the page, and the folder of its data files."""
GENERATOR = '<meta name="generator" content="tinymodel dashboard">'
"""Marks the `index.html` of a dashboard."""


class Heading(NamedTuple):
    """The text of the pages' header."""

    model: str
    site: str
    about: str
    """The kind of dictionary."""
    setup: tuple[str, ...]
    """Lines of Python that make `lm`, the model with its dictionary."""


def gather(
    reader: FeatureReader,
    rows: Integer[np.ndarray, "rows seq"],
    found: TopActivations,
    others: Sequence[str],
    track: Track,
) -> Facts:
    """Measure what the pages show in addition to the result of the search; leaves `f1` and `importance` unset.

    Args:
        reader: `lm[tag]`, where the tag names no feature.
        rows: the rows that were searched.
        others: tags of dictionaries to look for upstream and downstream features in.

    Raises:
        ValueError: a site has no dictionary.
    """
    lm, tag = reader.lm, reader.site.tag
    contexts = shown_contexts(found)
    acts = window_activations(reader, rows, contexts, track=track)
    graph = weights_graph(lm, tag, others, track=track)
    linked = sorted({*graph.upstream, *graph.downstream})
    top = min(OTHERS_LOGITS, lm.config.d_vocab)
    promoted = {other: logit_effects(lm, other, top).promoted for other in track(linked, "logits")}
    logits = logit_effects(lm, tag, min(LOGITS, lm.config.d_vocab))
    return Facts(found, contexts, acts, logits, graph, promoted)


def text_records(reader: FeatureReader, texts: Sequence[Sequence[int]], track: Track) -> list[dict[str, Any]]:
    """Return the record of each text; texts are token ids that start with `[BEGIN]`."""
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
    """Write the pages into a folder without pages, `index.html` last.

    Args:
        vocabulary: text of every token id.
        config: determines which ids are text.
        concepts: names and meanings, in the order of `facts.f1`; empty if `f1` is unset.
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
        write_data(folder, f"shard-{number:04d}", records)
    for number, record in enumerate(texts, 1):
        write_data(folder, f"text-{number}", record)
    write_data(folder, "index", _index(heading, facts, rows, concepts, texts))
    content = {"heading": heading, "found": facts.found, "n_texts": len(texts)}
    write_page(folder / INDEX, "dashboard.html.jinja", content)


def write_data(folder: Path, name: str, value: Any) -> None:
    """Write `data/NAME.js` in the folder of a dashboard; a page loads it by adding a script element.

    `file://` forbids `fetch`, so the file is JavaScript with a single call: `dashboard.receive("NAME", "TEXT")`. TEXT
    is gzipped JSON in base64, so no content can be read as code.

    Raises:
        OSError: the file cannot be written.
        ValueError: a number is not finite.
    """
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    packed = base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()
    (folder / FOLDER / f"{name}.js").write_text(f'dashboard.receive("{name}","{packed}");\n', "utf-8")


def open_partial(out: Path) -> Path:
    """Return the folder `OUT.partial`, in which a dashboard is built; create it if needed.

    Pages that a stopped run left there are removed. Its work files stay, so that the run resumes. An older dashboard
    that a killed run left there goes back to `out`.

    Raises:
        ValueError: `out` or the partial folder holds other files.
        OSError: the folder cannot be created.
    """
    _require_free(out)
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    strange = sorted({path.name for path in partial.iterdir()} - {INDEX, FOLDER, REPLACED, *WORK})
    if strange:
        raise ValueError(f"{partial} is where the dashboard is built, but holds {strange[0]}; move that elsewhere.")
    if (partial / REPLACED).exists() and not out.exists():
        os.replace(partial / REPLACED, out)
    (partial / INDEX).unlink(missing_ok=True)
    for name in (FOLDER, REPLACED):
        shutil.rmtree(partial / name, ignore_errors=True)
    return partial


def publish(partial: Path, out: Path) -> None:
    """Move a finished dashboard to `out`, in place of an older one, and remove the work files.

    The older one is removed when the new one is in place; if that fails, the older one is put back. If it is
    interrupted, `open_partial` accepts what is left.

    Raises:
        ValueError: `out` holds other files by now.
        OSError: a file cannot be moved or removed.
    """
    _require_free(out)
    replaced = partial / REPLACED
    if out.exists():
        os.replace(out, replaced)
    try:
        os.replace(partial, out)
    except BaseException:
        if replaced.exists():
            os.replace(replaced, out)
        raise
    if (out / REPLACED).exists():
        shutil.rmtree(out / REPLACED)
    for name in WORK:
        (out / name).unlink(missing_ok=True)


def _require_free(out: Path) -> None:
    """Refuse a folder that holds anything but a dashboard."""
    if out.exists() and not _is_dashboard(out):
        raise ValueError(f"{out} exists and is not a dashboard; name another folder, or remove it.")


def _is_dashboard(folder: Path) -> bool:
    """Return whether a folder is empty or holds only what `publish` puts there."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    expected = INDEX in names and names <= {INDEX, FOLDER, REPLACED, *WORK}
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
        "setup": heading.setup,
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

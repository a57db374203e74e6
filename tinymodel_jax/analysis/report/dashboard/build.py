"""Measures what the pages of a dashboard show, and writes them.

`gather` measures what rows of tokens show, and `gather_links` what the weights show. The functions that write do not
need the model. Memory grows with the number of features and contexts, not with the number of rows.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from tinymodel_jax.analysis.report.dashboard.folders import FOLDER, INDEX
from tinymodel_jax.analysis.report.dashboard.records import (
    Facts,
    fixed_facts,
    index_columns,
    link_records,
    shard_records,
    text_record,
)
from tinymodel_jax.analysis.report.dashboard.weights_graph import WeightsGraph, weights_graph
from tinymodel_jax.analysis.report.dashboard.windows import shown_contexts, window_activations
from tinymodel_jax.analysis.report.page import token_text, write_page
from tinymodel_jax.analysis.search.logit_effects import logit_effects
from tinymodel_jax.analysis.search.stream_directions import is_read, is_written
from tinymodel_jax.analysis.search.top_activations import TopActivations
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.neighbours import Neighbours
from tinymodel_jax.lm import FeatureReader, TinyModel
from tinymodel_jax.runtime.progress import Track

A_SHARD = 64
"""Features per data file; opening a feature loads one file."""
LOGITS, OTHERS_LOGITS = 10, 3
"""Promoted and suppressed tokens that a page lists, for the feature and for one of another dictionary."""
GRAPHS = "graphs"
"""The data file of the attribution graphs that the features are in."""
NEIGHBOURS = 8
"""Features with the nearest decoder directions that a page lists."""
TEXT_START = 12
"""Tokens of a text that the index shows; its data holds one more, to tell whether the text continues."""


class Heading(NamedTuple):
    """The text of the pages' header."""

    model: str
    site: str
    about: str
    """The kind of dictionary."""
    setup: tuple[str, ...]
    """Lines of Python that make `lm`, the model with its dictionary."""


class LinkedTokens(NamedTuple):
    """The links of all features to those of other dictionaries."""

    graph: WeightsGraph
    promoted: Mapping[str, Int[np.ndarray, "n_features n"]]
    """The tokens that each feature of another dictionary promotes most, by the dictionary's tag."""


def gather(reader: FeatureReader, rows: Integer[np.ndarray, "rows seq"], found: TopActivations, track: Track) -> Facts:
    """Measure what the pages show in addition to the result of the search; leaves `f1` and `importance` unset.

    Args:
        reader: `lm[tag]`, where the tag names no feature.
        rows: the rows that were searched.
    """
    lm, tag, config = reader.lm, reader.site.tag, reader.dictionary.config
    contexts = shown_contexts(found)
    acts = window_activations(reader, rows, contexts, track=track)
    top, left_out = min(LOGITS, lm.config.d_vocab), []
    logits = logit_effects(lm, tag, top) if is_written(config.hook_out) else None
    if logits is None:
        left_out.append(
            f"Logit effects and downstream features are left out: a direction at {config.hook_out} does not reach the "
            "residual stream through one matrix."
        )
    if not is_read(config.hook_in):
        left_out.append(
            f"Upstream features are left out: the value at {config.hook_in} is not a linear map of the residual stream."
        )
    return Facts(found, contexts, acts, logits, _neighbours(reader.dictionary), left_out=tuple(left_out))


def promoted_tokens(lm: TinyModel, tag: str) -> Int[np.ndarray, "n_features n"]:
    """Return the tokens that each feature of a dictionary promotes most; none where it has no logit effects."""
    config = lm[tag].dictionary.config
    if not is_written(config.hook_out):
        return np.zeros((config.n_features, 0), np.int32)
    return logit_effects(lm, tag, min(OTHERS_LOGITS, lm.config.d_vocab)).promoted


def gather_links(
    lm: TinyModel,
    tag: str,
    others: Sequence[str],
    promoted: Callable[[str], Int[np.ndarray, "n_features n"]],
    track: Track,
) -> LinkedTokens:
    """Measure the links of all features of `lm[tag]` to those of other dictionaries.

    Args:
        others: tags of dictionaries to look for upstream and downstream features in.
        promoted: `promoted_tokens` of a tag; a caller with several dictionaries may keep its results.

    Raises:
        ValueError: a site has no dictionary.
    """
    graph = weights_graph(lm, tag, others, track=track)
    linked = sorted({*graph.upstream, *graph.downstream})
    return LinkedTokens(graph, {other: promoted(other) for other in track(linked, "logits")})


def text_records(reader: FeatureReader, texts: Sequence[Sequence[int]], track: Track) -> list[dict[str, Any]]:
    """Return the record of each text; texts are token ids that start with `[BEGIN]`."""
    config = reader.lm.config
    return [text_record(np.asarray(ids), np.asarray(reader([ids]))[0], config) for ids in track(texts, "texts")]


def write_measured(
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
    """Write the data files of all that was measured into a folder without data files.

    Args:
        vocabulary: text of every token id.
        config: determines which ids are text.
        concepts: names and meanings, in the order of `facts.f1`; empty if `f1` is unset.
        texts: `text_records`.

    Raises:
        OSError: a file cannot be written.
    """
    (folder / FOLDER).mkdir(parents=True)
    write_data(folder, GRAPHS, [])  # `report.graph.links` adds attribution graphs
    write_data(folder, "vocabulary", [token_text(word) for word in vocabulary])
    for number, first, last in track(_shards(facts.found.n_features), "pages"):
        write_data(folder, f"shard-{number:04d}", shard_records(facts, rows, config, first, last))
    for number, record in enumerate(texts, 1):
        write_data(folder, f"text-{number}", record)
    write_data(folder, "index", _index(heading, facts, rows, concepts, texts))


def write_links(folder: Path, links: LinkedTokens, n_features: int, track: Track) -> None:
    """Write the data files of the links, in place of older ones.

    Raises:
        OSError: a file cannot be written.
    """
    for number, first, last in track(_shards(n_features), "pages"):
        write_data(folder, f"links-{number:04d}", link_records(links.graph, links.promoted, first, last))


def write_front(folder: Path, heading: Heading, tags: Sequence[str] = ()) -> None:
    """Write the page that shows the data files of a folder.

    Args:
        tags: all dictionaries of the set that the folder belongs to; none if it is alone.

    Raises:
        OSError: a file cannot be read or written.
    """
    index = read_data(folder, "index")
    counts = {name: index[name] for name in ("n_features", "n_tokens", "n_rows")}
    write_page(folder / INDEX, "dashboard.html.jinja", {"heading": heading, "tags": tags, **counts})


def read_data(folder: Path, name: str) -> Any:
    """Return what `write_data` wrote.

    Raises:
        OSError: the file cannot be read.
    """
    text = (folder / FOLDER / f"{name}.js").read_text("utf-8")
    return json.loads(gzip.decompress(base64.b64decode(text.split('"')[3])))


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
        "left_out": facts.left_out,
        "logit_unit": None if facts.logits is None else facts.logits.unit,
        "columns": index_columns(facts, rows),
        **fixed_facts(),
    }


def _shards(n_features: int) -> list[tuple[int, int, int]]:
    """Return the number of each data file of features, and its first feature and the one after its last."""
    starts = range(0, n_features, A_SHARD)
    return [(number, first, min(first + A_SHARD, n_features)) for number, first in enumerate(starts)]


def _neighbours(dictionary: Dictionary) -> Neighbours:
    n = dictionary.config.n_features
    if n == 1:
        return Neighbours(np.zeros((1, 0), np.int32), np.zeros((1, 0), np.float32))
    return dictionary.neighbours(slice(None), min(NEIGHBOURS, n - 1))

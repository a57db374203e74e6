"""Find features in the result of a search: by the text that their top contexts peak on, or by a known concept."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from tinymodel_jax.analysis.concepts.labels import CHUNK, best_f1_of_all
from tinymodel_jax.analysis.search.activation_pass import DictionaryInputs
from tinymodel_jax.analysis.search.contexts import Contexts
from tinymodel_jax.analysis.search.top_activations import TopActivations, search_fingerprints, top_activations
from tinymodel_jax.lm import FeatureReader, TinyModel
from tinymodel_jax.lm.text import rows_of
from tinymodel_jax.model.padding import as_array
from tinymodel_jax.runtime.progress import Track, no_progress

ROWS_AT_ONCE = 8
"""Rows per device in one pass of the model."""
TOKENS_AT_ONCE = 4096
"""Tokens that are encoded together."""
ALL_COMPARED = 4096
"""Features that are scored together for `topk`, which encodes all features for every chunk."""


class FoundFeatures(NamedTuple):
    """Features whose top contexts peak on a text, best first."""

    features: Int[np.ndarray, " n"]
    """Indices of the features."""
    share: Float[np.ndarray, " n"]
    """Share of each feature's top contexts that peak on the text."""
    search: TopActivations
    """The search that they were found in, to ask about another text."""


def find_features(
    lm: TinyModel,
    tag: str,
    rows: Any,
    text: str,
    *,
    search: TopActivations | None = None,
    track: Track = no_progress,
) -> FoundFeatures:
    """Return the features of a dictionary whose top contexts peak on a text, as `tinymodel top --contains` does.

    Features are in order of the share of their top contexts whose peak token overlaps an occurrence of the text, and of
    density where shares are equal. Features with no such context are left out.

    Args:
        tag: the dictionary's site, such as M2.
        rows: stories, or token ids (rows, seq), right-padded with `[PAD]`.
        text: characters and spaces to match exactly; it may span several tokens or be part of a word.
        search: result of `top_activations` with this model and these rows, or of an earlier call; None searches the
            rows.
        track: wraps the iterator over batches of the search, for example with a progress bar.

    Raises:
        ValueError: the text is empty, no top context peaks on it, `search` is of another model, dictionary or rows, or
            as `top_activations`.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import feature_queries
        >>> lm = TinyModel("mini")
        >>> rows = ["The dog ran to the park.", "Lily saw a dog and a red ball."]
        >>> found = feature_queries.find_features(lm, "M2", rows, " dog")
        >>> len(found.features) == len(found.share), bool(found.share[0] == 1)
        (True, True)
    """
    if not text:
        raise ValueError("find_features: the text is empty; give one, such as ' happy'.")
    rows = as_array(rows_of(lm, rows))
    if search is None:
        search = top_activations(lm, tag, rows, track=track)
    else:
        _require_same(search, lm[tag], rows)
    share = share_on_text(search, rows, token_texts(lm), text)
    order = np.lexsort((-search.density, -share))
    order = order[share[order] > 0]
    if not len(order):
        raise ValueError(
            f"find_features: no top context of a feature of {search.tag} peaks on {text!r} in {len(rows):,} rows; "
            "read more rows, or try a part of the text."
        )
    return FoundFeatures(order, share[order], search)


def token_texts(lm: TinyModel) -> list[str]:
    """Return the text of every token id."""
    return [lm.tokenizer.decode([token]) for token in range(lm.config.d_vocab)]


def share_on_text(found: TopActivations, rows: Int[np.ndarray, "rows seq"], texts: list[str], text: str) -> np.ndarray:
    """Return, for each feature, the share of its top contexts that peak on `text`.

    A context counts if its peak token overlaps an occurrence of the text in its row. Characters and spaces must match
    exactly; the text may span several tokens or be part of a word.

    Args:
        texts: text of every token id (`token_texts`).
    """
    used = np.unique(found.top.row[found.top.row >= 0])
    on_text = np.zeros(rows.shape, bool)
    for row in used:
        on_text[row] = _tokens_on(text, [texts[token] for token in rows[row]])
    present = found.top.row >= 0
    hits = on_text[np.maximum(found.top.row, 0), found.top.position] & present
    return hits.sum(axis=1) / np.maximum(present.sum(axis=1), 1)


def concept_f1(
    reader: FeatureReader,
    rows: Int[np.ndarray, "rows seq"],
    truth: Bool[np.ndarray, "rows seq concepts"],
    features: Int[np.ndarray, " n"] | None = None,
    *,
    track: Track = no_progress,
) -> Float[np.ndarray, "n concepts"]:
    """Return each feature's F1 for each concept at its best threshold, as `labels.best_f1_of_all` defines it.

    Memory holds the dictionary's input at all tokens, and the activations of one chunk of features at a time.

    Args:
        reader: `lm[tag]`.
        rows: token ids, right-padded with `[PAD]`. Special tokens are not scored.
        truth: which concepts hold at each token.
        features: indices of the features to score; None scores all.
        track: wraps the iterator over chunks, for example with a progress bar.

    Examples:
        >>> from tinymodel_jax.bundled import storyworld
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import feature_queries
        >>> lm = TinyModel("mini")
        >>> told = list(storyworld.stories(seed=1, count=2))
        >>> rows = lm.tokenizer([one.text for one in told])[0]
        >>> truth = storyworld.labels(told, lm.tokenizer)
        >>> feature_queries.concept_f1(lm["M2"], rows, truth, features=[3, 304]).shape
        (2, 109)
    """
    config, real = reader.dictionary.config, reader.counts(rows)
    x, told = _inputs(reader, rows)[real], truth[real]
    chosen = np.arange(config.n_features) if features is None else features
    together = ALL_COMPARED if config.compares_features else CHUNK
    parts = [
        best_f1_of_all(_encoded(reader, x, chosen[start : start + together]), told)
        for start in track(range(0, len(chosen), together), "concepts")
    ]
    return np.concatenate(parts)


def context_window(
    rows: Int[np.ndarray, "rows seq"], contexts: Contexts, place: tuple[int, int], before: int = 12, after: int = 6
) -> tuple[list[int], int]:
    """Return the token ids around a peak, and the index of the peak among them.

    Args:
        place: feature and number of the context, as indices into the arrays of `contexts`.
    """
    row, position = int(contexts.row[place]), int(contexts.position[place])
    first = max(0, position - before)
    return [int(token) for token in rows[row, first : position + after + 1]], position - first


def _inputs(reader: FeatureReader, rows: np.ndarray) -> np.ndarray:
    """Return what the dictionary reads, (rows, seq, d_in)."""
    inputs = DictionaryInputs(reader, ROWS_AT_ONCE)
    parts = [np.asarray(inputs(rows[i : i + inputs.batch])) for i in range(0, len(rows), inputs.batch)]
    return np.concatenate(parts)[: len(rows)]


def _encoded(reader: FeatureReader, x: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return the activations of features, (tokens, features), encoding a part of the tokens at a time."""
    starts = range(0, len(x), TOKENS_AT_ONCE)
    encode = reader.dictionary.encode
    return np.concatenate(
        [np.asarray(encode(jnp.asarray(x[start : start + TOKENS_AT_ONCE]), features), np.float32) for start in starts]
    )


def _require_same(search: TopActivations, reader: FeatureReader, rows: np.ndarray) -> None:
    """Check that a search is of this dictionary, of this model below it, and of these rows."""
    now = {"tag": reader.site.tag, **search_fingerprints(reader, rows)}
    names = {"tag": "another site", "data": "other rows", "model": "another model", "dictionary": "another dictionary"}
    other = [names[name] for name, value in now.items() if getattr(search, name) != value]
    if other:
        raise ValueError(
            f"find_features: `search` is of {' and '.join(other)}; leave it out to search {reader.site.tag} of "
            "this model on these rows."
        )


def _tokens_on(text: str, tokens: list[str]) -> np.ndarray:
    """Return which tokens overlap an occurrence of the text."""
    ends = np.cumsum([len(token) for token in tokens])
    starts = ends - [len(token) for token in tokens]
    whole, found = "".join(tokens), np.zeros(len(tokens), bool)
    at = whole.find(text)
    while at >= 0:
        found |= (starts < at + len(text)) & (ends > at)
        at = whole.find(text, at + 1)
    return found

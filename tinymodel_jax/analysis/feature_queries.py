"""Finding features in a search's result: by the text that their top contexts peak on, by a concept of known truth."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from tinymodel_jax.analysis.concepts import best_f1_of_all
from tinymodel_jax.analysis.contexts import Contexts
from tinymodel_jax.analysis.top_activations import TopActivations
from tinymodel_jax.lm import FeatureReader, TinyModel

ROWS_AT_ONCE = 16


def token_texts(lm: TinyModel) -> list[str]:
    """Return the text of every id of the vocabulary."""
    return [lm.tokenizer.decode([token]) for token in range(lm.config.d_vocab)]


def share_on_text(found: TopActivations, rows: Int[np.ndarray, "rows seq"], texts: list[str], text: str) -> np.ndarray:
    """Return for each feature the share of its top contexts that peak on `text`.

    A context does if its peak token overlaps an occurrence of the text in its row, letter by letter, spaces included;
    the text may span several tokens, and be a part of a word.

    Args:
        texts: of all ids (`token_texts`).
    """
    used = np.unique(found.top.row[found.top.row >= 0])
    on_text = np.zeros(rows.shape, bool)
    for row in used:
        on_text[row] = _tokens_on(text, [texts[token] for token in rows[row]])
    present = found.top.row >= 0
    hits = on_text[np.maximum(found.top.row, 0), found.top.position] & present
    return hits.sum(axis=1) / np.maximum(present.sum(axis=1), 1)


def concept_f1(
    reader: FeatureReader, rows: Int[np.ndarray, "rows seq"], truth: Bool[np.ndarray, "rows seq concepts"]
) -> Float[np.ndarray, "n_features concepts"]:
    """Return how well each feature of `lm[tag]` tells each concept, as `concepts.best_f1_of_all`; dense in memory."""
    parts = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        ids = rows[start : start + ROWS_AT_ONCE]
        missing = ((0, ROWS_AT_ONCE - len(ids)), (0, 0))
        padded = np.pad(ids, missing, constant_values=reader.lm.config.pad_id)
        parts.append(np.asarray(reader(padded))[: len(ids)][ids < reader.lm.config.begin_id])
    return best_f1_of_all(np.concatenate(parts), truth[rows < reader.lm.config.begin_id])


def context_window(
    rows: Int[np.ndarray, "rows seq"], contexts: Contexts, place: tuple[int, int], before: int = 12, after: int = 6
) -> tuple[list[int], int]:
    """Return the ids around a peak, and the peak's place among them.

    Args:
        place: feature and number of the context, indices of `contexts`' arrays.
    """
    row, position = int(contexts.row[place]), int(contexts.position[place])
    first = max(0, position - before)
    return [int(token) for token in rows[row, first : position + after + 1]], position - first


def _tokens_on(text: str, tokens: list[str]) -> np.ndarray:
    """Say which tokens overlap an occurrence of the text."""
    ends = np.cumsum([len(token) for token in tokens])
    starts = ends - [len(token) for token in tokens]
    whole, found = "".join(tokens), np.zeros(len(tokens), bool)
    at = whole.find(text)
    while at >= 0:
        found |= (starts < at + len(text)) & (ends > at)
        at = whole.find(text, at + 1)
    return found

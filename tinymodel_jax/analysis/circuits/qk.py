"""QK attribution: an attention score, divided among pairs of sources.

Queries and keys have no biases and the stream no layer norm, so a score is bilinear in what is written to the stream:

    score = sum over sources i, j of (what i adds to the query) . (what j adds to the key) / sqrt(d_head)

With the patterns of lower layers fixed, the sum is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Float

from tinymodel_jax.analysis.circuits.freeze import frozen_pass
from tinymodel_jax.analysis.circuits.frozen import FrozenPass, Precision, exact
from tinymodel_jax.analysis.circuits.graph import label_of, token_texts
from tinymodel_jax.analysis.circuits.sources import Place, contributions, source_table
from tinymodel_jax.analysis.circuits.targets import resolve_position
from tinymodel_jax.lm import TinyModel


class Pair(NamedTuple):
    """One term of a score: a source of the query with a source of the key."""

    query: str
    """Label of the source of the query, such as `M2N123 @5`."""
    key: str
    """Label of the source of the key."""
    value: float
    """What the pair adds to the score."""


class QKAttribution(NamedTuple):
    """What each pair of sources adds to an attention score or a difference of two: `matrix`, whose sum is `score`."""

    score: float
    """Attention score before the softmax; with `versus`, the difference of two."""
    query_sources: np.ndarray
    """The sources that the query is made of, a structured array with the fields of a graph's nodes (`NODE`)."""
    key_sources: np.ndarray
    """Those of the key; with `versus`, of both keys."""
    tokens: tuple[str, ...]
    """Text of each token of the prompt."""
    query_parts: Float[np.ndarray, "query_sources d_head"]
    """What each source adds to the query, divided by sqrt(d_head)."""
    key_parts: Float[np.ndarray, "key_sources d_head"]
    """What each source adds to the key; with `versus`, to the difference of the keys."""

    @property
    def query_labels(self) -> tuple[str, ...]:
        """Name of each source of the query, such as `M2N123 @5`."""
        return tuple(label_of(source, self.tokens) for source in self.query_sources)

    @property
    def key_labels(self) -> tuple[str, ...]:
        """Name of each source of the key."""
        return tuple(label_of(source, self.tokens) for source in self.key_sources)

    @property
    def matrix(self) -> Float[np.ndarray, "query_sources key_sources"]:
        """What each pair of sources adds to the score."""
        return self.query_parts @ self.key_parts.T

    def strongest(self, n: int = 10) -> list[Pair]:
        """Return the n pairs that add or take most, without computing all pairs of a long prompt."""
        (queries, query_sizes), (keys, key_sizes) = map(_largest_first, (self.query_parts, self.key_parts))
        tried = 64
        while True:
            pairs = self.query_parts[queries[:tried]] @ self.key_parts[keys[:tried]].T
            best = np.argsort(-np.abs(pairs), axis=None, kind="stable")[:n]
            # |q . k| <= |q| |k| bounds the pairs with a source that was left out
            next_query, next_key = query_sizes[min(tried, len(queries))], key_sizes[min(tried, len(keys))]
            bound = max(next_query * key_sizes[0], query_sizes[0] * next_key)
            if bound == 0 or (len(best) == n and abs(pairs.flat[best[-1]]) >= bound):
                break
            tried *= 4
        i, j = np.unravel_index(best, pairs.shape)
        ends = self.query_sources[queries[i]], self.key_sources[keys[j]]
        names = [[label_of(source, self.tokens) for source in sources] for sources in ends]
        return [Pair(*pair) for pair in zip(*names, pairs[i, j].tolist(), strict=True)]


def _largest_first(parts: Float[np.ndarray, "n d_head"]) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of the parts by size, and the sizes in that order, followed by 0."""
    sizes = np.linalg.norm(parts, axis=1)
    order = np.argsort(-sizes, kind="stable")
    return order, np.append(sizes[order], 0)


def qk_attribution(
    lm: TinyModel,
    prompt: Any,
    layer: int,
    head: int,
    query: int,
    key: int,
    *,
    versus: int | None = None,
    dictionaries: str | Iterable[str] | None = None,
    dtype: Precision = "float64",
) -> QKAttribution:
    """Divide the score with which a head's query attends to a key among pairs of sources.

        score = sum over sources i, j of
                (what i adds to the query) . (what j adds to the key) / sqrt(d_head)

    Args:
        prompt: a text, or token ids (seq,) or (1, seq).
        layer: layer of the head, counted from 0.
        head: the head, counted from 0.
        query: position of the query; negative ones count from the end.
        key: position of the key, which is not after the query; negative ones count from the end.
        versus: another position of a key. What is divided is then the score of `key` minus the score of this one, so
            that what every key gets, such as a source that earlier heads wrote everywhere, cancels.
        dictionaries: as for `frozen_pass`.
        dtype: number format of all values and sums, "float32" or "float64".

    Raises:
        ValueError: as `frozen_pass`; the layer, the head or a position does not exist; or the key is after the query.

    Source: the QK circuit of Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import circuits
        >>> lm = TinyModel("mini")
        >>> text = "Tim saw Lily. Tim"
        >>> parts = circuits.qk_attribution(lm, text, layer=1, head=0, query=-1, key=1)
        >>> parts.matrix.shape == (len(parts.query_labels), len(parts.key_labels))
        True
        >>> bool(abs(parts.matrix.sum() - parts.score) < 1e-6)
        True
    """
    for name, number, count in (("layer", layer, lm.config.n_layers), ("head", head, lm.config.n_heads)):
        if number not in range(count):
            raise ValueError(f"qk_attribution: {name} {number!r} does not exist; the model has 0..{count - 1}.")
    frozen = frozen_pass(lm, prompt, dictionaries, dtype)
    query = resolve_position(frozen, query, "qk_attribution: query")
    keys = [resolve_position(frozen, key, "qk_attribution: key")]
    if versus is not None:
        keys.append(resolve_position(frozen, versus, "qk_attribution: versus"))
    if max(keys) > query:
        raise ValueError(f"qk_attribution: key {max(keys)} is after query {query}, which cannot see it.")
    return divided_score(lm, frozen, token_texts(lm, frozen), layer, head, query, *keys)


def divided_score(
    lm: TinyModel,
    frozen: FrozenPass,
    tokens: tuple[str, ...],
    layer: int,
    head: int,
    query: int,
    key: int,
    versus: int | None = None,
) -> QKAttribution:
    """Return `qk_attribution` of a frozen pass, in its number format. The positions count from the start."""
    attn, table = lm.params[f"blocks_{layer}"]["attn"], source_table(frozen)
    keys = [key] if versus is None else [key, versus]
    directions = [np.asarray(attn[name][head]).T for name in ("W_Q", *["W_K"] * len(keys))]
    positions = np.repeat([query, *keys], lm.config.d_head)
    with exact(cast(Precision, str(frozen.final.dtype))):
        rows = contributions(frozen, np.concatenate(directions), positions, Place(layer, "before_attn"))
    query_parts, key_parts, *others = np.split(rows.T, 1 + len(keys), axis=1)
    query_parts, key_parts = query_parts / math.sqrt(lm.config.d_head), key_parts - sum(others)
    score = float(query_parts.sum(axis=0) @ key_parts.sum(axis=0))
    of_query, of_key = query_parts.any(axis=1), key_parts.any(axis=1)
    sources = table[: len(rows.T)]
    return QKAttribution(score, sources[of_query], sources[of_key], tokens, query_parts[of_query], key_parts[of_key])

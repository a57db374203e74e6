"""Links between features by their weights: upstream and downstream features of other dictionaries, and neighbours.

A feature adds its decoder row to the residual stream, and later encoders read the stream. There is no layer norm, so
the direct weight between two features,

    W_dec[source] @ W_enc[:, target]

is exact and the same for every input: one unit of the source's activation adds it to the target's pre-activation (for
`gated`, to that of the magnitude, before `exp(r_mag)`). Indirect effects through attention and MLPs come in addition.
A dictionary of the stream itself (Ra, Rm) has downstream features, because its directions lie in the stream. It adds
nothing to the stream, so it is never upstream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinymodel_jax.block_order import READERS, STREAM, WRITERS, block_and_hook, comes_after
from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.runtime.compilation import fast_jit
from tinymodel_jax.runtime.progress import Track, no_progress

TOGETHER = 512
"""Features whose products with all others are held in memory together."""


class Links(NamedTuple):
    """The strongest links of every feature, strongest first."""

    features: Int[np.ndarray, "n_features n"]
    values: Float[np.ndarray, "n_features n"]


class WeightsGraph(NamedTuple):
    """Links of all features of one dictionary. Other dictionaries are listed by their tags."""

    neighbours: Links
    """Features of the same dictionary with the largest cosine of decoder rows."""
    upstream: dict[str, Links]
    """Features with the largest absolute direct weights."""
    downstream: dict[str, Links]
    """Features with the largest absolute direct weights."""


def weights_graph(
    lm: TinyModel,
    tag: str,
    others: Iterable[str],
    top: int = 8,
    track: Track = no_progress,
) -> WeightsGraph:
    """Return the links of all features of `lm[tag]`.

    Args:
        others: tags of dictionaries to link to; those that are neither upstream nor downstream in the forward pass
            are skipped.
        top: largest number of links of a feature to each dictionary.
        track: wraps the iterator over dictionaries, for example with a progress bar.

    Raises:
        ValueError: a site has no dictionary.
    """
    own = lm[tag].dictionary
    W_enc, W_dec = own.params["W_enc"].T, own.params["W_dec"]
    upstream, downstream = {}, {}
    for other in track(list(others), "weights"):
        dictionary = lm[other].dictionary
        n = min(top, dictionary.config.n_features)
        if writes_before(dictionary.config, own.config) and block_and_hook(dictionary.config.hook_out)[1] in WRITERS:
            upstream[other] = strongest_products(W_enc, dictionary.params["W_dec"], n)
        if writes_before(own.config, dictionary.config):
            downstream[other] = strongest_products(W_dec, dictionary.params["W_enc"].T, n)
    return WeightsGraph(neighbours(W_dec, min(top, own.config.n_features - 1)), upstream, downstream)


def writes_before(source: DictionaryConfig, target: DictionaryConfig) -> bool:
    """Return whether the residual stream contains what `source` predicts when `target` reads it."""
    written, read = source.hook_out, target.hook_in
    in_stream = block_and_hook(written)[1] in STREAM + WRITERS
    return in_stream and block_and_hook(read)[1] in STREAM + READERS and comes_after(read, written)


def neighbours(W_dec: Float[Array, "n_features d_out"], top: int) -> Links:
    """Return, for each feature, those with the most similar decoder rows, and the cosines; 0 for a zero row."""
    rows = jnp.asarray(W_dec, jnp.float32)
    length = jnp.linalg.norm(rows, axis=1, keepdims=True)
    units = rows / jnp.where(length > 0, length, 1)
    parts = [
        _closest(units[start : start + TOGETHER], units, start, top=top) for start in range(0, len(units), TOGETHER)
    ]
    return _joined(parts)


def strongest_products(A: Float[Array, "n d"], B: Float[Array, "m d"], top: int) -> Links:
    """Return, for each row of `A`, the `top` rows of `B` with the largest absolute products, and the products."""
    parts = [_largest(A[start : start + TOGETHER], B, top=top) for start in range(0, len(A), TOGETHER)]
    return _joined(parts)


def _joined(parts: Sequence[tuple[Array, Array]]) -> Links:
    features, values = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in (0, 1))
    return Links(features.astype(np.int32), values.astype(np.float32))


@partial(fast_jit, static_argnames=("top",))
def _closest(part: Array, units: Array, start: Array, *, top: int) -> tuple[Array, Array]:
    cosine = part @ units.T
    itself = jnp.arange(units.shape[0])[None, :] == (start + jnp.arange(part.shape[0]))[:, None]
    values, features = jax.lax.top_k(jnp.where(itself, -jnp.inf, cosine), top)
    return features, values


@partial(fast_jit, static_argnames=("top",))
def _largest(A: Array, B: Array, *, top: int) -> tuple[Array, Array]:
    products = A.astype(jnp.float32) @ B.astype(jnp.float32).T
    _, features = jax.lax.top_k(jnp.abs(products), top)
    return features, jnp.take_along_axis(products, features, axis=1)

"""Links between features of different dictionaries by their weights: upstream and downstream features.

A link's value is the direct weight of `analysis.search.stream_directions`: what one unit of the source's activation
adds to the target's pre-activation. A dictionary of the stream itself (Ra, Rm) has downstream features, because its
directions lie in the stream. It adds nothing to the stream, so it is never upstream.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinymodel_jax.analysis.search.stream_directions import adds_to_stream, reaches, read, written
from tinymodel_jax.dictionaries.dictionary import Dictionary
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
    """Links of all features of one dictionary, by the tags of other dictionaries."""

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
    upstream, downstream = {}, {}
    for other in track(list(others), "weights"):
        theirs = lm[other].dictionary
        n = min(top, theirs.config.n_features)
        if reaches(theirs.config, own.config) and adds_to_stream(theirs.config.hook_out):
            upstream[other] = strongest_products(_read(lm, own), _written(lm, theirs), n)
        if reaches(own.config, theirs.config):
            downstream[other] = strongest_products(_written(lm, own), _read(lm, theirs), n)
    return WeightsGraph(upstream, downstream)


def _read(lm: TinyModel, dictionary: Dictionary) -> Array:
    return read(lm, dictionary.config.hook_in, dictionary.params["W_enc"].T)


def _written(lm: TinyModel, dictionary: Dictionary) -> Array:
    return written(lm, dictionary.config.hook_out, dictionary.params["W_dec"])


def strongest_products(A: Float[Array, "n d"], B: Float[Array, "m d"], top: int) -> Links:
    """Return, for each row of `A`, the `top` rows of `B` with the largest absolute products, and the products."""
    parts = [_largest(A[start : start + TOGETHER], B, top=top) for start in range(0, len(A), TOGETHER)]
    features, values = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in (0, 1))
    return Links(features.astype(np.int32), values.astype(np.float32))


@partial(fast_jit, static_argnames=("top",))
def _largest(A: Array, B: Array, *, top: int) -> tuple[Array, Array]:
    products = A.astype(jnp.float32) @ B.astype(jnp.float32).T
    _, features = jax.lax.top_k(jnp.abs(products), top)
    return features, jnp.take_along_axis(products, features, axis=1)

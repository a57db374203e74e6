"""The features of a dictionary that are nearest to others, by the cosine of their decoder directions."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinymodel_jax.runtime.compilation import fast_jit

TOGETHER = (1, 8, 64, 512)
"""Numbers of features that are compared together with all others; memory holds that many rows of cosines."""


class Neighbours(NamedTuple):
    """The nearest features, nearest first. With one feature, the arrays have no first axis."""

    features: Int[np.ndarray, "*chosen n"]
    """Indices of the neighbours."""
    cosine: Float[np.ndarray, "*chosen n"]
    """Cosine of the two decoder directions; 0 if one of them is zero."""


def nearest_rows(W_dec: Float[Array, "n_features d_out"], chosen: Any, n: int) -> Neighbours:
    """Return the `n` rows with the largest cosine to each chosen row, which is not one of them.

    Args:
        chosen: one number of a row, or an array of them.

    Raises:
        ValueError: `n` is outside 1..n_features-1.
    """
    if not 1 <= n < len(W_dec):
        raise ValueError(f"neighbours: n={n} is outside 1..{len(W_dec) - 1}, the number of other features.")
    flat = np.atleast_1d(chosen)
    size = next((size for size in TOGETHER if size >= len(flat)), TOGETHER[-1])
    features, cosine = np.zeros((len(flat), n), np.int32), np.zeros((len(flat), n), np.float32)
    for start in range(0, len(flat), size):
        part = flat[start : start + size]
        cosines, rows = map(np.asarray, _nearest(W_dec, jnp.asarray(np.pad(part, (0, size - len(part)))), n=n))
        features[start : start + size], cosine[start : start + size] = rows[: len(part)], cosines[: len(part)]
    shape = (*np.shape(chosen), n)
    return Neighbours(features.reshape(shape), cosine.reshape(shape))


@partial(fast_jit, static_argnames=("n",))
def _nearest(W_dec: Float[Array, "n_features d_out"], chosen: Int[Array, " m"], *, n: int) -> tuple[Array, Array]:
    W = W_dec.astype(jnp.float32)
    lengths = jnp.linalg.norm(W, axis=1)
    directions = W / jnp.where(lengths > 0, lengths, 1)[:, None]
    cosines = directions[chosen] @ directions.T
    itself = chosen[:, None] == jnp.arange(len(W))
    cosines, rows = jax.lax.top_k(jnp.where(itself, -jnp.inf, cosines), n)
    return cosines, rows

"""Products of cross-layer transcoders, whose features and inputs are divided into layers.

The features of layer l, a block of equal size for each layer, read the l-th part of the input and write to the l-th
and later parts of the output. Only these blocks are multiplied. With one layer, the products are plain ones.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def read(x: Float[Array, "*batch d_in"], W_enc: Float[Array, "d n_features"]) -> Float[Array, "*batch n_features"]:
    """Return the product of each layer's part of `x` with the columns of the layer's features.

    The number of layers is d_in / d.
    """
    layers = x.shape[-1] // W_enc.shape[0]
    if layers == 1:
        return x @ W_enc
    parts = zip(jnp.split(x, layers, axis=-1), jnp.split(W_enc, layers, axis=-1), strict=True)
    return jnp.concatenate([part @ columns for part, columns in parts], axis=-1)


def read_some(
    x: Float[Array, "*batch d_in"], columns: Float[Array, "d *n"], layer: Int[Array, "*n"]
) -> Float[Array, "*batch *n"]:
    """Return the products of some features' columns with the parts of `x` of their layers."""
    layers = x.shape[-1] // columns.shape[0]
    products = jnp.stack([part @ columns for part in jnp.split(x, layers, axis=-1)])
    own = jnp.arange(layers).reshape(-1, *[1] * (products.ndim - 1)) == layer
    return jnp.sum(jnp.where(own, products, 0), axis=0)


def write(
    acts: Float[Array, "*batch n_features"], W_dec: Float[Array, "n_features d_out"], layers: int
) -> Float[Array, "*batch d_out"]:
    """Return `acts @ W_dec` without the blocks of `W_dec` that are zero."""
    if layers == 1:
        return acts @ W_dec
    rows, width = W_dec.shape[0] // layers, W_dec.shape[1] // layers
    parts = [
        acts[..., : (part + 1) * rows] @ W_dec[: (part + 1) * rows, part * width : (part + 1) * width]
        for part in range(layers)
    ]
    return jnp.concatenate(parts, axis=-1)


def is_written(n_features: int, d_out: int, layers: int) -> Bool[np.ndarray, "n_features d_out"]:
    """Return where `W_dec` may differ from zero: each feature writes to its own layer and later ones."""
    to, of = (np.arange(size) // (size // layers) for size in (d_out, n_features))
    return to >= of[:, None]


def own_part(vectors: Float[Array, "... d_in"], n_features: int, layers: int) -> Float[Array, "n_features d"]:
    """Return for each feature the part that it reads of its vector, or of the one vector of all features."""
    of_layers = jnp.broadcast_to(vectors, (n_features, vectors.shape[-1])).reshape(
        layers, n_features // layers, layers, -1
    )
    each = jnp.arange(layers)
    return of_layers[each, :, each].reshape(n_features, -1)

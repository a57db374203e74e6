"""A checksum of a tree of arrays that does not depend on how they are sharded."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32


@jax.jit
def checksum(tree: Any) -> UInt32[Array, " leaves"]:
    """Return one number a leaf: the sum of its 32-bit words, each times an odd weight of its place, modulo 2^32.

    Integer sums are the same in any order, so any sharding gives the same number; a change in a single word always
    changes it, since an odd weight has an inverse.
    """
    return jnp.stack([_leaf_checksum(leaf) for leaf in jax.tree.leaves(tree)])


def _leaf_checksum(leaf: Array) -> Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    weight = (place * np.uint32(2654435761)) | np.uint32(1)
    return jnp.sum(words * weight, dtype=jnp.uint32)

"""The largest activations of a whole batch (BatchTopK), laid out in rows of a few slots.

Exact, and without a limit on the active features of one input: an input with many of them takes several rows. The
layout has a static shape, with at most one partly filled row per input. Selections carry no gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinymodel_jax.training.sparse_rows import largest_of_all


class BatchSelection(NamedTuple):
    """Active features in rows of slots; a value of 0 is an empty slot."""

    values: Float[Array, "rows slots"]
    positions: Int[Array, "rows slots"]
    owner: Int[Array, " rows"]
    """Input that a row belongs to, in rising order; rows from `used` on belong to no input and contain only zeros."""
    used: Int[Array, ""]
    """Number of rows in use."""
    threshold: Float[Array, ""]
    """Smallest value selected."""


def select_of_batch(z: Float[Array, "batch f"], k: Int[Array, ""], k_max: int, bitwise: bool = False) -> BatchSelection:
    """Return the `k * batch` largest of non-negative `z`, for a `k` up to `k_max`. Zeros are never selected.

    Among equal values, those of lower inputs are selected first, and within an input those of lower features.

    Args:
        bitwise: as for `kth_largest`.
    """
    batch, most = z.shape[0], z.shape[0] * min(k_max, z.shape[1])
    # The n largest values lie in the n groups with the largest maxima: two searches of small arrays instead of one.
    size = 2 ** max(0, round(math.log2(z.shape[1] / k_max) / 2))  # so that both searches are about equally large
    grouped = jnp.pad(z, ((0, 0), (0, -z.shape[1] % size))).reshape(batch, -1, size)
    maxima = grouped.max(axis=-1)
    row, group = _places(largest_of_all(maxima, k * batch, bitwise)[0] & (maxima > 0), most)
    held = jnp.where((row < batch)[:, None], grouped[row, group], 0)
    kept, threshold = largest_of_all(held, k * batch, bitwise)
    entry, place = _places(kept & (held > 0), most)
    real = entry < most
    owner = jnp.where(real, row.at[entry].get(mode="fill", fill_value=batch), batch)
    position = jnp.where(real, group.at[entry].get(mode="fill", fill_value=0) * size + place, 0)
    value = held.at[entry, place].get(mode="fill", fill_value=0.0)
    return _in_rows(value, position, owner, batch, max(1, k_max // 2))._replace(threshold=threshold)


def _in_rows(value: Array, position: Array, owner: Array, batch: int, slots: int) -> BatchSelection:
    """Lay out entries, ordered by owner, in rows of slots; entries with owner `batch` are empty."""
    most = value.shape[0]
    counts = jnp.zeros(batch, jnp.int32).at[owner].add(1, mode="drop")
    rows_each = (counts + slots - 1) // slots
    first_row = jnp.cumsum(rows_each) - rows_each
    nth = jnp.arange(most, dtype=jnp.int32) - (jnp.cumsum(counts) - counts)[owner]
    n_rows = batch + most // slots
    row = jnp.where(owner < batch, first_row[owner] + nth // slots, n_rows)
    at = (row, nth % slots)
    return BatchSelection(
        values=jnp.zeros((n_rows, slots), value.dtype).at[at].set(value, mode="drop"),
        positions=jnp.zeros((n_rows, slots), jnp.int32).at[at].set(position, mode="drop"),
        owner=jnp.full(n_rows, batch, jnp.int32).at[row].set(owner, mode="drop"),
        used=jnp.sum(rows_each),
        threshold=jnp.zeros(()),
    )


def _places(mask: Array, size: int) -> tuple[Array, Array]:
    """Return row and column of the first `size` True entries in row-major order; past the last entry, the row count."""
    columns = jnp.arange(mask.shape[1], dtype=jnp.int32)
    in_row = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    before = jnp.cumsum(in_row[:, -1]) - in_row[:, -1]
    slot = jnp.where(mask, before[:, None] + in_row - 1, size)
    flat = jnp.arange(mask.shape[0], dtype=jnp.int32)[:, None] * mask.shape[1] + columns
    found = jnp.full(size, mask.size, jnp.int32).at[slot].set(flat, mode="drop")
    return found // mask.shape[1], found % mask.shape[1]

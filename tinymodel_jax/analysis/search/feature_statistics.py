"""Statistics of a dictionary's activations on a batch, as one compiled function: peaks, sums and histograms.

Features are measured in chunks, so that activations are still in the processor's cache when they are counted. On a CPU,
a histogram of all positions would take 70 % of the time of the encoder's matrix product, and the rest 10 %. So the
histogram counts every n-th position of a row, starting from one that the caller draws. Reductions run over
positions only, the axis that XLA reduces fast.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.encoding import DictionaryParams, encode, per_feature
from tinymodel_jax.runtime.compilation import fast_jit
from tinymodel_jax.runtime.rows import ONE_DEVICE, RowDevices

TOGETHER = 1024
"""Features per chunk."""
BINS = 32
FIRST_EXPONENT = -8
"""The bins of the histogram are half octaves from 2^-8 to 2^8; the first also counts all smaller activations, the last
all larger ones."""

_GROUP, _FIELDS, _FIELD_BITS = 8, 8, 4
"""Tokens counted in one word, counters per word, bits per counter; 8 tokens do not overflow 4 bits."""


class BatchStatistics(NamedTuple):
    """Statistics of a chunk of features on rows."""

    peak: Float[Array, "rows features"]
    """Largest activation of a row."""
    position: Int[Array, "rows features"]
    """First position of the peak; undefined where the peak is 0."""
    total: Float[Array, "rows features"]
    """Sum over a row."""
    active: Int[Array, "rows features"]
    """Positions of a row with an activation above 0."""
    histogram: Int[Array, "devices 32 features"]
    """Number of counted positions of each device's rows in each bin of activations."""


def encoder_parameters(params: DictionaryParams) -> dict[str, Array]:
    """Return the parameters that `encode` reads."""
    return {name: array for name, array in params.items() if name not in ("W_dec", "W_skip")}


def feature_chunks(
    params: DictionaryParams, config: DictionaryConfig, devices: RowDevices = ONE_DEVICE
) -> list[dict[str, Array]]:
    """Return the encoder's parameters in chunks of features.

    There is one chunk if the architecture compares features, if the features of layers read different inputs, or if
    features are sharded over devices.
    """
    own = per_feature(config)
    encoder = encoder_parameters(params)
    whole = config.compares_features or config.n_layers > 1 or devices.exchange
    size = config.n_features if whole else TOGETHER
    return [
        {name: a[..., start : start + size] if name in own else a for name, a in encoder.items()}
        for start in range(0, config.n_features, size)
    ]


@partial(fast_jit, static_argnames=("config", "every", "devices"))
def statistics(
    chunk: DictionaryParams,
    x: Float[Array, "rows seq d_in"],
    real: Bool[Array, "rows seq"],
    first: Int[Array, " rows"],
    *,
    config: DictionaryConfig,
    every: int,
    devices: RowDevices = ONE_DEVICE,
) -> BatchStatistics:
    """Return the statistics; the histogram counts each row's positions `first`, `first + every` and so on."""
    return devices.separately(partial(_statistics, config=config, every=every))(chunk, x, real, first)


def _statistics(
    chunk: DictionaryParams, x: Array, real: Array, first: Array, *, config: DictionaryConfig, every: int
) -> BatchStatistics:
    acts = jnp.where(real[..., None], encode(chunk, config, x).astype(jnp.float32), 0)
    peak = jnp.max(acts, axis=1)
    places = jnp.arange(acts.shape[1], dtype=jnp.int32)[None, :, None]
    position = jnp.min(jnp.where(acts == peak[:, None], places, acts.shape[1]), axis=1)
    active = jnp.sum(acts > 0, axis=1, dtype=jnp.int32)
    histogram = _histogram(_some(acts, first, every))
    return BatchStatistics(peak, position, jnp.sum(acts, axis=1), active, histogram[None])


def _some(acts: Float[Array, "rows seq features"], first: Int[Array, " rows"], every: int) -> Array:
    """Return every n-th position, padded with zeros to a multiple of the group size."""
    n = -(-acts.shape[1] // every)
    if every > 1:
        places = first[:, None] + every * jnp.arange(n, dtype=jnp.int32)
        acts = jax.vmap(lambda row, place: row.at[place].get(mode="fill", fill_value=0))(acts, places)
    return jnp.pad(acts, ((0, 0), (0, -n % _GROUP), (0, 0)))


def _histogram(acts: Float[Array, "rows seq features"]) -> Int[Array, "32 features"]:
    """Count activations above 0 by exponent and first fraction bit of their float32.

    A token adds 1 to one of eight 4-bit counters in one of four words, so XLA makes one pass per word, not one per bin.
    """
    half = jax.lax.bitcast_convert_type(acts, jnp.int32) >> 22
    bin_of = jnp.clip(half - 2 * (127 + FIRST_EXPONENT), 0, BINS - 1)
    bin_of = jnp.where(acts > 0, bin_of, BINS).astype(jnp.uint32)  # a shift beyond the word adds nothing
    rows, seq, features = acts.shape
    bin_of = bin_of.reshape(rows, seq // _GROUP, _GROUP, features)
    counts = []
    for first in range(0, BINS, _FIELDS):
        shift = _FIELD_BITS * (bin_of - jnp.uint32(first))  # wraps, far beyond the word, for smaller bins
        words = jnp.sum(jnp.uint32(1) << shift, axis=2, dtype=jnp.uint32)
        for field in range(_FIELDS):
            counted = (words >> jnp.uint32(_FIELD_BITS * field)) & jnp.uint32(2**_FIELD_BITS - 1)
            counts.append(jnp.sum(jnp.sum(counted, axis=1, dtype=jnp.uint32), axis=0, dtype=jnp.uint32))
    return jnp.stack(counts).astype(jnp.int32)

"""Metrics of a dictionary as streaming sums: add batches, divide once at the end.

The result does not depend on how the data is cut into batches (up to float32 rounding) or on the scale of the
activations. Sums are float32; the spread around the mean is merged batch by batch (Chan et al. 1983), because the
difference of two large sums would lose it where the mean is far from 0.

    explained variance = 1 - sum |y - prediction|^2 / sum |y - mean y|^2        with the mean over all the data
    L0                 = active features per position
    dead fraction      = share of the features that were never active
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary, DictionaryParams, encode, predict
from tinymodel_jax.runtime.compilation import fast_jit


class DictionaryStats(NamedTuple):
    """Sums over positions. Start with `zero_stats`, add with `update_stats`, divide with `finalize_stats`."""

    positions: Float[Array, ""]
    """Positions seen."""
    mean: Float[Array, " d_out"]
    """Mean target so far."""
    spread: Float[Array, ""]
    """Sum of squared distances of the targets from that mean."""
    error: Float[Array, ""]
    """Sum of squared distances of the predictions from the targets."""
    active: Float[Array, " n_features"]
    """Positions at which each feature was active."""


class DictionaryMetrics(NamedTuple):
    """What the sums come to; all float32 scalars but `frequency`."""

    explained_variance: Float[Array, ""]
    l0: Float[Array, ""]
    dead_fraction: Float[Array, ""]
    frequency: Float[Array, " n_features"]
    """Share of the positions at which each feature was active."""


class ReconstructionEvaluation(NamedTuple):
    """The numbers that need no language model; plain floats, as in `evaluation.DictionaryEvaluation`."""

    l0: float
    explained_variance: float
    dead_fraction: float
    tokens: int


def zero_stats(n_features: int, d_out: int) -> DictionaryStats:
    """Return the sums over no data."""
    zero = jnp.zeros(())
    return DictionaryStats(zero, jnp.zeros(d_out), zero, zero, jnp.zeros(n_features))


def update_stats(
    stats: DictionaryStats,
    target: Float[Array, "*batch d_out"],
    prediction: Float[Array, "*batch d_out"],
    acts: Float[Array, "*batch n_features"],
    mask: Bool[Array, "*batch"] | None = None,
) -> DictionaryStats:
    """Return the sums with a batch added; positions where `mask` is False (padding) do not count."""
    target, prediction = (a.astype(jnp.float32).reshape(-1, a.shape[-1]) for a in (target, prediction))
    weight = jnp.ones(target.shape[0]) if mask is None else mask.reshape(-1).astype(jnp.float32)
    count = jnp.sum(weight)
    mean = weight @ target / jnp.maximum(count, 1)
    spread = weight @ jnp.sum(jnp.square(target - mean), axis=-1)
    total = jnp.maximum(stats.positions + count, 1)
    shift = mean - stats.mean
    return DictionaryStats(
        positions=stats.positions + count,
        mean=stats.mean + shift * (count / total),
        spread=stats.spread + spread + jnp.sum(shift * shift) * (stats.positions * count / total),
        error=stats.error + weight @ jnp.sum(jnp.square(target - prediction), axis=-1),
        active=stats.active + weight @ (acts.reshape(-1, acts.shape[-1]) > 0).astype(jnp.float32),
    )


def finalize_stats(stats: DictionaryStats) -> DictionaryMetrics:
    """Return the metrics; NaN where there was no data, or no variance to explain."""
    return DictionaryMetrics(
        explained_variance=1 - stats.error / stats.spread,
        l0=jnp.sum(stats.active) / stats.positions,
        dead_fraction=jnp.where(stats.positions > 0, jnp.mean(stats.active == 0, dtype=jnp.float32), jnp.nan),
        frequency=stats.active / stats.positions,
    )


def evaluate_reconstruction(
    dictionary: Dictionary, batches: Iterable[tuple[Float[Array, "_ d_in"], Float[Array, "_ d_out"]]]
) -> ReconstructionEvaluation:
    """Measure a dictionary on (input, target) vectors alone, in one pass."""
    config = dictionary.config
    stats = zero_stats(config.n_features, config.d_out)
    for x, y in batches:
        stats = _add_vectors(stats, dictionary.params, x, y, config=config)
    found = finalize_stats(stats)
    return ReconstructionEvaluation(
        float(found.l0), float(found.explained_variance), float(found.dead_fraction), int(stats.positions)
    )


def _sum_vectors(
    stats: DictionaryStats,
    tree: DictionaryParams,
    x: Float[Array, "batch d_in"],
    y: Float[Array, "batch d_out"],
    *,
    config: DictionaryConfig,
) -> DictionaryStats:
    acts = encode(tree, config, x)
    return update_stats(stats, y, predict(tree, config, x, acts), acts)


_add_vectors = fast_jit(_sum_vectors, static_argnames=("config",))

"""Reconstruction of vectors by a dictionary: the sums that `evaluate` divides, and a measurement without a model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.encoding import DictionaryParams, encode, predict
from tinymodel_jax.runtime.compilation import fast_jit


class RowTotals(NamedTuple):
    """Sums over the counted tokens of each row."""

    tokens: Float[Array, " batch"]
    l0: Float[Array, "batch layers"]
    """Active features of each layer; only cross-layer transcoders have several."""
    error: Float[Array, "batch hook_points"]
    """Squared distance of the prediction from the target, at each hook point that the dictionary predicts."""
    variance: Float[Array, "batch hook_points"]
    """Squared distance of the target from the given mean, at each hook point."""
    cosine: Float[Array, " batch"]
    """Cosine between prediction and target; 0 where one of them is 0."""


class ReconstructionEvaluation(NamedTuple):
    """The numbers that need no language model; plain floats, as in `evaluation.DictionaryEvaluation`.

    Without tokens they are NaN; so is the explained variance of targets that are all equal.
    """

    l0: float
    """Active features per token."""
    explained_variance: float
    """1 - squared error / squared distance from the mean; at most 1."""
    dead_fraction: float
    """Share of the features that were active on none of the tokens."""
    tokens: int
    """Number of vectors that were measured."""


@partial(fast_jit, static_argnames=("config",))
def reconstruct(
    tree: DictionaryParams,
    x: Float[Array, "batch seq d_in"],
    y: Float[Array, "batch seq d_out"],
    mean: Float[Array, " d_out"],
    counted: Bool[Array, "batch seq"],
    *,
    config: DictionaryConfig,
) -> tuple[Float[Array, "batch seq d_out"], RowTotals, Float[Array, "batch n_features"]]:
    """Return the prediction, the rows' totals, and the number of each row's tokens on which each feature is active."""
    acts = encode(tree, config, x)
    prediction, y = predict(tree, config, x, acts).astype(jnp.float32), y.astype(jnp.float32)
    lengths = jnp.linalg.norm(y, axis=-1) * jnp.linalg.norm(prediction, axis=-1)
    product = jnp.sum(y * prediction, axis=-1)

    def of_parts(values: Array, parts: int) -> Array:
        return jnp.sum(values.reshape(*counted.shape, parts, -1), axis=-1, dtype=jnp.float32)

    parts = len(config.hooks_out)
    measures = RowTotals(
        tokens=jnp.ones(counted.shape),
        l0=of_parts(acts > 0, config.n_layers),
        error=of_parts(jnp.square(y - prediction), parts),
        variance=of_parts(jnp.square(y - mean), parts),
        cosine=jnp.where(lengths > 0, product / jnp.where(lengths > 0, lengths, 1), 0),
    )
    active = jnp.sum((acts > 0) & counted[..., None], axis=1, dtype=jnp.float32)
    counts = [counted.reshape(*counted.shape, *[1] * (measure.ndim - 2)) for measure in measures]
    totals = RowTotals(*(jnp.sum(jnp.where(n, m, 0), axis=1) for n, m in zip(counts, measures, strict=True)))
    return prediction, totals, active


def evaluate_reconstruction(
    dictionary: Dictionary, batches: Iterable[tuple[Float[Array, "_ d_in"], Float[Array, "_ d_out"]]]
) -> ReconstructionEvaluation:
    """Measure a dictionary on batches of (input, target) vectors, in one pass.

    Squared distances are taken from the first batch's mean and moved to the mean of all targets at the end, so that
    no digits are lost where that mean is far from 0.

    Args:
        dictionary: the dictionary to measure.
        batches: pairs of inputs (n, d_in) and targets (n, d_out); for an SAE, both are the same.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis.evaluation.reconstruction import evaluate_reconstruction
        >>> lm = TinyModel("mini")
        >>> config = lm["M2"].dictionary.config
        >>> _, kept = lm.run_with_cache("The dog ran", [config.hook_in, config.hook_out])
        >>> batch = kept[config.hook_in][0, 1:], kept[config.hook_out][0, 1:]
        >>> measured = evaluate_reconstruction(lm["M2"].dictionary, [batch])
        >>> measured.tokens, 0 < measured.l0 < 512
        (3, True)
    """
    config = dictionary.config
    sums, shift, active = np.zeros(len(RowTotals._fields)), np.zeros(config.d_out), np.zeros(config.n_features)
    centre: np.ndarray | None = None
    for x, y in batches:
        if len(x) == 0:
            continue
        if centre is None:
            first = jnp.asarray(y[0], jnp.float32)
            centre = np.asarray(first + jnp.mean(y - first, axis=0))  # exact where all targets are equal
        counted = np.ones((1, len(x)), bool)
        _, totals, found = reconstruct(dictionary.params, x[None], y[None], centre, counted, config=config)
        sums += [np.sum(measure) for measure in totals]
        active += np.asarray(found[0])
        shift += np.asarray(jnp.sum(jnp.asarray(y, jnp.float32) - centre, axis=0), np.float64)
    tokens, active_features, error, from_centre, _ = sums.tolist()
    if tokens == 0:
        return ReconstructionEvaluation(math.nan, math.nan, math.nan, tokens=0)
    variance = max(0.0, from_centre - float(shift @ shift) / tokens)  # rounding may leave it below 0
    return ReconstructionEvaluation(
        l0=active_features / tokens,
        explained_variance=1 - error / variance if variance > 0 else math.nan,
        dead_fraction=float(np.mean(active == 0)),
        tokens=int(tokens),
    )

"""Attribution: the effect of ablating each feature, estimated for all features by one backward pass.

    estimate of feature f = - sum over positions of  activation_f x (d metric / d value at hook_out) . W_dec[f]

This is activation x gradient: the first-order change of the metric when the feature is ablated. It is exact if the
layers above are linear. `sweeps.ablate` measures the change itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinymodel_jax.analysis.effects.metrics import Kind, Metric, Weights, value_from_logits
from tinymodel_jax.analysis.effects.sweep_input import activations, decoder_rows, prepare, written_per_unit
from tinymodel_jax.lm import FeatureReader, TinyModel
from tinymodel_jax.lm.dictionaries import DictionaryLike
from tinymodel_jax.model.forward import HookedModel
from tinymodel_jax.model.interventions import Add
from tinymodel_jax.runtime.compilation import fast_jit


class Attribution(NamedTuple):
    """The estimated change of the metric when each feature is ablated."""

    features: Int[np.ndarray, " n"]
    """Indices of the features."""
    change: Float[np.ndarray, " n"]
    """Estimate for each, in the metric's unit: nats, logits, or the function's unit."""


def attribute(
    lm: TinyModel,
    tag: DictionaryLike,
    tok_ids: Any,
    features: Any = None,
    *,
    metric: Metric = "loss",
    positions: Any = None,
    next_ids: Sequence[int] | None = None,
) -> Attribution:
    """Estimate the effect of ablating each feature on a metric, for all features by one backward pass.

        estimate = - sum over positions of
                   activation x (d metric / d value at hook_out) . W_dec[feature]

    The estimates are of `metric` of `sweeps.ablate`, whose arguments these are. A function must be differentiable by
    JAX. The estimate is exact if the layers above are linear.

    Raises:
        ValueError: as for `sweeps.ablate`, or the dictionary is a crosscoder.

    Source: attribution patching (Nanda 2023; Syed et al. 2023), with ablation in place of a patch.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import attribution, sweeps
        >>> lm = TinyModel("mini")
        >>> ids = lm.to_tokens("The dog ran to the park.")
        >>> estimate = attribution.attribute(lm, "M2", ids)
        >>> exact = sweeps.ablate(lm, "M2", ids)
        >>> attribution.rank_correlation(estimate.change, exact.loss) > 0.5
        True
    """
    reader = FeatureReader.of(lm, tag)
    if reader.dictionary.config.is_crosscoder:
        raise ValueError(
            f"attribution: ablating a feature of {reader.site.tag} replaces values, which no gradient at them "
            "estimates; sweeps.ablate measures it."
        )
    prepared = prepare(lm, reader.site, tok_ids, positions, next_ids, metric=metric)
    assert prepared.metric is not None
    chosen, acts = activations(reader, prepared, features)
    gradient = _gradient(
        lm.hooked(),
        jnp.asarray(prepared.ids),
        prepared.weights,
        prepared.metric.tokens,
        None if prepared.function is None else prepared.function.gradient(),
        hook_names=reader.dictionary.config.hooks_out,
        kind=prepared.metric.kind,
    )
    along = np.asarray(gradient, np.float32) @ decoder_rows(reader, chosen).T
    return Attribution(chosen, -np.einsum("nbs,bsn->n", acts * written_per_unit(reader, prepared), along))


def rank_correlation(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    """Return Spearman's rank correlation; equal values share a rank, and the result is NaN if all are equal.

    Examples:
        >>> import numpy as np
        >>> from tinymodel_jax.analysis import attribution
        >>> one, other = np.array([1.0, 2.0, 9.0]), np.array([0.1, 0.2, 0.3])
        >>> round(attribution.rank_correlation(one, other), 6)
        1.0
    """
    ranks = np.stack([_ranks(values) for values in (one, other)])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    norm = np.sqrt(np.prod((centred**2).sum(axis=1)))
    return float(centred[0] @ centred[1] / norm) if norm else float("nan")


@partial(fast_jit, static_argnames=("hook_names", "kind"))
def _gradient(
    model: HookedModel,
    tok_ids: Int[Array, "batch seq"],
    weights: Weights,
    tokens: Int[Array, "batch 2"] | None,
    of_logits: Float[Array, "batch seq d_vocab"] | None,
    *,
    hook_names: tuple[str, ...],
    kind: Kind,
) -> Float[Array, "batch seq width"]:
    """Return the gradient of a metric with respect to the values at hook points, concatenated.

    Args:
        of_logits: the gradient with respect to the logits, for a metric that is a function.
    """

    def value(added: Array) -> Array:
        parts = jnp.split(added, len(hook_names), axis=-1)
        edits = {name: Add(part) for name, part in zip(hook_names, parts, strict=True)}
        logits, _ = model.with_hooks(edits).run(tok_ids)
        return value_from_logits(kind, logits, weights, tokens) if of_logits is None else jnp.sum(logits * of_logits)

    width = len(hook_names) * model.config.d_model
    return jax.grad(value)(jnp.zeros((*tok_ids.shape, width), model.config.dtype))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks counted from 1, equal values their mean rank. `scipy.stats` has this, and takes a second to load."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]

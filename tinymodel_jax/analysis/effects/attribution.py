"""Attribution: the effect of ablating each feature, estimated for all features by one backward pass.

    estimate of feature f = - sum over positions of  activation_f x (d measure / d value at hook_out) . W_dec[f]

This is activation x gradient: the first-order change of the measure when the feature is ablated. It is exact if the
layers above are linear. `sweeps.ablate` measures the change itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinymodel_jax.analysis.effects.sweep_input import activations, prepare
from tinymodel_jax.analysis.effects.upper_layers import Weights
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.forward import HookedModel
from tinymodel_jax.model.interventions import Add
from tinymodel_jax.runtime.compilation import fast_jit

Measure = Literal["loss", "next_logprob"]


class Attribution(NamedTuple):
    """The estimated change of the measure when each feature is ablated, in nats."""

    features: Int[np.ndarray, " n"]
    change: Float[np.ndarray, " n"]


def attribute(
    lm: TinyModel,
    tag: str,
    tok_ids: Any,
    features: Any = None,
    *,
    measure: Measure = "loss",
    positions: Any = None,
    next_ids: Sequence[int] | None = None,
) -> Attribution:
    """Estimate the effect of ablating each feature on the loss or on the log-probability of `next_ids`.

    The estimates are of `loss` or `next_logprob` of `sweeps.ablate`, whose arguments these are.

    Raises:
        ValueError: as for `sweeps.ablate`, or `measure` is neither of the two.
    """
    if measure not in ("loss", "next_logprob"):
        raise ValueError(f"attribute: measure={measure!r}; it is 'loss' or 'next_logprob'.")
    prepared = prepare(lm, tag, tok_ids, positions, next_ids)
    chosen, acts = activations(lm, tag, prepared, features)
    gradient = _gradient(
        lm.hooked(),
        jnp.asarray(prepared.ids),
        prepared.weights,
        hook_name=prepared.entry.edited,
        measure=measure,
    )
    along = np.asarray(gradient, np.float32) @ np.asarray(lm[tag].dictionary.params["W_dec"], np.float32)[chosen].T
    return Attribution(chosen, -np.einsum("nbs,bsn->n", acts, along))


def rank_correlation(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    """Return Spearman's rank correlation; equal values share a rank, and the result is NaN if all are equal."""
    ranks = np.stack([_ranks(values) for values in (one, other)])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    norm = np.sqrt(np.prod((centred**2).sum(axis=1)))
    return float(centred[0] @ centred[1] / norm) if norm else float("nan")


@partial(fast_jit, static_argnames=("hook_name", "measure"))
def _gradient(
    model: HookedModel,
    tok_ids: Int[Array, "batch seq"],
    weights: Weights,
    *,
    hook_name: str,
    measure: Measure,
) -> Float[Array, "batch seq d_model"]:
    """Return the gradient of the measure with respect to the value at a hook point."""

    def value(added: Array) -> Array:
        logits, _ = model.with_hooks({hook_name: Add(added)}).run(tok_ids)
        logprobs = jax.nn.log_softmax(logits)
        ids = weights.targets if measure == "loss" else jnp.broadcast_to(weights.next_ids, tok_ids.shape)
        chosen = jnp.take_along_axis(logprobs, ids[..., None], axis=-1)[..., 0]
        return -jnp.sum(chosen * weights.loss) if measure == "loss" else jnp.sum(chosen * weights.last)

    return jax.grad(value)(jnp.zeros((*tok_ids.shape, model.config.d_model), model.config.dtype))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks counted from 1, equal values their mean rank. `scipy.stats` has this, and takes a second to load."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]

"""The compiled passes that measurements of the model are made of: over batches of rows, one number a row.

A pass with another value at a hook point goes on from the clean residual stream below it, so XLA drops the layers
before; and it takes the value as an argument, so zeros, means and every dictionary's prediction share one program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.forward import next_token_losses
from tinymodel_jax.model.hook_points import BLOCK_HOOKS
from tinymodel_jax.model.interventions import Hooks, Replace, combine
from tinymodel_jax.model.padding import bucket, check_tok_ids, pad_below, pad_right
from tinymodel_jax.model.transformer import run_with_hooks
from tinymodel_jax.runtime.compilation import fast_jit

BATCH_ROWS = 16
"""Rows of one compiled pass."""


class CleanPass(NamedTuple):
    """What the model does with a batch as it is."""

    logprobs: Float[Array, "batch seq d_vocab"]
    nats: Float[Array, " batch"]
    """Cross-entropy of each row, summed over its targets."""
    acts: dict[str, Array]


def batches_of(rows: Any, config: ModelConfig) -> list[Int[np.ndarray, "batch width"]]:
    """Return the rows in batches of one compiled shape: padded with rows of `[PAD]`, cut to the longest row's bucket.

    Raises:
        ValueError: the ids are no valid input, or there is no token to predict.
    """
    ids = check_tok_ids(rows, config)
    real = np.flatnonzero(np.any(ids != config.pad_id, axis=0))
    if not np.any(ids[:, 1:] != config.pad_id):
        raise ValueError("the rows hold no token to predict; give rows of two tokens or more.")
    width = bucket(int(real[-1]) + 1, config.n_ctx)
    ids = pad_right(ids, max(width, ids.shape[1]), config.pad_id)[:, :width]
    padded = pad_below(ids, len(ids) + -len(ids) % BATCH_ROWS, config.pad_id)
    return list(padded.reshape(-1, BATCH_ROWS, width))


def require_unspliced(lm: TinyModel, names: Sequence[str]) -> None:
    """Refuse hook points that the model's own splices replace: what is read there is a prediction already.

    Raises:
        ValueError: one is spliced.
    """
    for name in set(names) & set(lm.splice_hooks()):
        raise ValueError(
            f"the model is spliced at {name} ({', '.join(lm.spliced)}), so what is there is a prediction already; "
            "give the model without that splice."
        )


def resume_point(place: str) -> str:
    """Return the residual stream at or before a hook point of a block, from which the rest of the pass follows."""
    if not place.startswith("blocks."):
        return place
    _, layer, name = place.split(".", 2)
    after = BLOCK_HOOKS.index(name) >= BLOCK_HOOKS.index("hook_resid_mid")
    return f"blocks.{layer}.{'hook_resid_mid' if after else 'hook_resid_pre'}"


def _run_clean(
    params: Any, ids: Int[Array, "batch seq"], hooks: Hooks, *, config: ModelConfig, keep: tuple[str, ...] = ()
) -> CleanPass:
    logits, acts = run_with_hooks(params, config, ids, hooks, keep)
    return CleanPass(jax.nn.log_softmax(logits), _nats(logits, ids, config), acts)


def _sum_of_values(
    params: Any,
    ids: Int[Array, "batch seq"],
    counted: Bool[Array, "batch seq"],
    hooks: Hooks,
    *,
    config: ModelConfig,
    places: tuple[str, ...],
) -> dict[str, Float[Array, " width"]]:
    _, acts = run_with_hooks(params, config, ids, hooks, places)
    counts = counted[..., None]
    return {n: jnp.sum(jnp.where(counts, acts[n], 0), axis=(0, 1), dtype=jnp.float32) for n in places}


def _losses_against(
    params: Any,
    ids: Int[Array, "batch seq"],
    hooks: Hooks,
    clean: Float[Array, "batch seq d_vocab"],
    *,
    config: ModelConfig,
) -> Float[Array, "2 batch"]:
    """Return each row's cross-entropy and KL divergence from the clean log-probabilities, summed over its targets."""
    logits, _ = run_with_hooks(params, config, ids, hooks)
    difference = clean[:, :-1] - jax.nn.log_softmax(logits[:, :-1])
    kl = jnp.sum(jnp.exp(clean[:, :-1]) * difference, axis=-1)
    return jnp.stack([_nats(logits, ids, config), jnp.sum(jnp.where(ids[:, 1:] != config.pad_id, kl, 0), axis=1)])


def _losses_with_value(
    params: Any,
    ids: Int[Array, "batch seq"],
    hooks: Hooks,
    start: Float[Array, "batch seq d_model"],
    value: Float[Array, "batch seq width"],
    clean: Float[Array, "batch seq d_vocab"],
    *,
    config: ModelConfig,
    place: str,
) -> Float[Array, "2 batch"]:
    """As `losses_against`, of the pass that goes on from `start`, at the resume point, with a value at `place`."""
    edits = combine(hooks, {resume_point(place): Replace(start)}, {place: Replace(value)})
    return _losses_against(params, ids, edits, clean, config=config)


def _nats(logits: Array, ids: Array, config: ModelConfig) -> Float[Array, " batch"]:
    return jnp.sum(jnp.where(ids[:, 1:] != config.pad_id, next_token_losses(logits, ids), 0), axis=1)


clean_pass = fast_jit(_run_clean, static_argnames=("config", "keep"))
sum_values = fast_jit(_sum_of_values, static_argnames=("config", "places"))
losses_against = fast_jit(_losses_against, static_argnames=("config",))
losses_with_value = fast_jit(_losses_with_value, static_argnames=("config", "place"))

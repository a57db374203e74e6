"""The compiled passes that measurements of the model are made of: over batches of rows, one number a row.

A pass with another value at a hook point goes on from the clean residual stream below it, so XLA drops the layers
before; and it takes the value as an argument, so zeros, means and every dictionary's prediction share one program.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.forward import HookedModel, next_token_losses
from tinymodel_jax.model.hook_points import BLOCK_HOOKS
from tinymodel_jax.model.interventions import Replace
from tinymodel_jax.model.padding import bucket, check_tok_ids, pad_below, pad_right
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
    for name in set(names) & set(lm.hooked().hooks):
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


@partial(fast_jit, static_argnames=("keep",))
def clean_pass(model: HookedModel, ids: Int[Array, "batch seq"], *, keep: tuple[str, ...] = ()) -> CleanPass:
    """Run the model once, with its own edits only."""
    logits, acts = model.run(ids, keep)
    return CleanPass(jax.nn.log_softmax(logits), _nats(logits, ids, model.config), acts)


@partial(fast_jit, static_argnames=("places",))
def sum_values(
    model: HookedModel,
    ids: Int[Array, "batch seq"],
    counted: Bool[Array, "batch seq"],
    *,
    places: tuple[str, ...],
) -> dict[str, Float[Array, " width"]]:
    """Return the sum over the counted positions of the value at each hook point."""
    _, acts = model.run(ids, places)
    counts = counted[..., None]
    return {n: jnp.sum(jnp.where(counts, acts[n], 0), axis=(0, 1), dtype=jnp.float32) for n in places}


@fast_jit
def losses_against(
    model: HookedModel, ids: Int[Array, "batch seq"], clean: Float[Array, "batch seq d_vocab"]
) -> Float[Array, "2 batch"]:
    """Return each row's cross-entropy and KL divergence from the clean log-probabilities, summed over its targets."""
    config = model.config
    logits, _ = model.run(ids)
    difference = clean[:, :-1] - jax.nn.log_softmax(logits[:, :-1])
    kl = jnp.sum(jnp.exp(clean[:, :-1]) * difference, axis=-1)
    return jnp.stack([_nats(logits, ids, config), jnp.sum(jnp.where(ids[:, 1:] != config.pad_id, kl, 0), axis=1)])


@partial(fast_jit, static_argnames=("place",))
def losses_with_value(
    model: HookedModel,
    ids: Int[Array, "batch seq"],
    start: Float[Array, "batch seq d_model"],
    value: Float[Array, "batch seq width"],
    clean: Float[Array, "batch seq d_vocab"],
    *,
    place: str,
) -> Float[Array, "2 batch"]:
    """As `losses_against`, of the pass that goes on from `start`, at the resume point, with a value at `place`."""
    changed = model.with_hooks({resume_point(place): Replace(start)}, {place: Replace(value)})
    return losses_against(changed, ids, clean)


def _nats(logits: Array, ids: Array, config: ModelConfig) -> Float[Array, " batch"]:
    return jnp.sum(jnp.where(ids[:, 1:] != config.pad_id, next_token_losses(logits, ids), 0), axis=1)

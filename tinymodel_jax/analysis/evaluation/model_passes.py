"""The compiled passes of an evaluation: they run batches of rows and return numbers per row.

As no number is a sum over rows, devices that share the rows of a batch do not wait for each other.

A pass with another value at a hook point runs only the layers above it, from the clean residual stream. The value is an
argument, so zeros, means and the predictions of all dictionaries share one program.
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
from tinymodel_jax.model.edits import need_whole_passes
from tinymodel_jax.model.forward import HookedModel, next_token_losses
from tinymodel_jax.model.hook_points import vectors
from tinymodel_jax.model.interventions import Replace
from tinymodel_jax.model.padding import as_array, bucket, check_tok_ids, pad_below, pad_right
from tinymodel_jax.runtime.collectives import all_agree, on_all
from tinymodel_jax.runtime.compilation import fast_jit
from tinymodel_jax.runtime.rows import RowDevices, share

BATCH_ROWS = 16
"""Rows per device in one compiled pass."""


class CleanPass(NamedTuple):
    """Results of the pass with the model's own edits only."""

    logprobs: Float[Array, "batch seq d_vocab"]
    nats: Float[Array, " batch"]
    """Cross-entropy of each row, summed over its targets."""
    acts: dict[str, Array]


def batches_of(rows: Any, config: ModelConfig, devices: RowDevices) -> list[Int[np.ndarray, "batch width"]]:
    """Return this process's rows as batches of one shape for its devices.

    Rows are cut to a compiled length, and rows of `[PAD]` fill the last batch.

    Raises:
        ValueError: the ids are not valid, or there is no token to predict.
    """
    ids = np.atleast_2d(as_array(rows))
    mine = share(len(ids))
    ids = on_all(lambda: check_tok_ids(ids[mine], config, mine.start))
    if all_agree(not np.any(ids[:, 1:] != config.pad_id)):
        raise ValueError("the rows hold no token to predict; give rows of two tokens or more.")
    last = np.flatnonzero(np.any(ids != config.pad_id, axis=0))[-1:]
    width = bucket(int(last.sum()) + 1, config.n_ctx)
    ids = pad_right(ids, max(width, ids.shape[1]), config.pad_id)[:, :width]
    batch = BATCH_ROWS * devices.n
    padded = pad_below(ids, len(ids) + -len(ids) % batch, config.pad_id)
    return list(padded.reshape(-1, batch, width))


def require_unspliced(lm: TinyModel, names: Sequence[str]) -> None:
    """Refuse hook points that the model's own splices replace, because the values there are predictions already.

    Raises:
        ValueError: one is spliced.
    """
    for name in set(names) & set(lm.hooked().hooks):
        raise ValueError(
            f"the model is spliced at {name} ({', '.join(lm.spliced)}), so the value there is a prediction already; "
            "give the model without that splice."
        )


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
) -> dict[str, Float[Array, "batch width"]]:
    """Return the sum over the counted positions of each row of the value at each hook point."""
    _, acts = model.run(ids, places)
    counts = counted[..., None]
    return {n: jnp.sum(jnp.where(counts, vectors(acts[n]), 0), axis=1, dtype=jnp.float32) for n in places}


@fast_jit
def losses_against(
    model: HookedModel, ids: Int[Array, "batch seq"], clean: Float[Array, "batch seq d_vocab"]
) -> Float[Array, "2 batch"]:
    """Return each row's cross-entropy and KL divergence from the clean log-probabilities, summed over its targets."""
    return _losses(model.run(ids)[0], ids, clean, model.config)


@partial(fast_jit, static_argnames=("place",))
def losses_with_value(
    model: HookedModel,
    ids: Int[Array, "batch seq"],
    stream: Float[Array, "batch seq d_model"],
    own: Float[Array, "..."],
    other: Float[Array, "batch seq width"],
    kept: Bool[Array, "batch seq"],
    clean: Float[Array, "batch seq d_vocab"],
    *,
    place: str,
) -> Float[Array, "2 batch"]:
    """Do `losses_against` with other vectors at `place`, except where the model's own are kept.

    `stream` is the clean value at `stream_before(place)`, `own` that at `place`.
    """
    value = jnp.where(kept[..., None], vectors(own), other).reshape(own.shape)
    if place.startswith("blocks.") and not need_whole_passes(model.hooks):
        return _losses(model.unembed(model.resume_with_value(place, value, stream, ids)), ids, clean, model.config)
    return losses_against(model.with_hooks({place: Replace(value)}), ids, clean)


def _losses(logits: Array, ids: Array, clean: Array, config: ModelConfig) -> Float[Array, "2 batch"]:
    difference = clean[:, :-1] - jax.nn.log_softmax(logits[:, :-1])
    kl = jnp.sum(jnp.exp(clean[:, :-1]) * difference, axis=-1)
    return jnp.stack([_nats(logits, ids, config), jnp.sum(jnp.where(ids[:, 1:] != config.pad_id, kl, 0), axis=1)])


def _nats(logits: Array, ids: Array, config: ModelConfig) -> Float[Array, " batch"]:
    return jnp.sum(jnp.where(ids[:, 1:] != config.pad_id, next_token_losses(logits, ids), 0), axis=1)

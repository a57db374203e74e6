"""Interventions on every feature of a dictionary in few compiled calls.

Features are mapped over in chunks that fit a memory budget; in a chunk the layers below the dictionary's site are
computed once. A feature that is active nowhere on the input changes nothing, and is reported as exactly 0 without being
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinymodel_jax.compilation import fast_jit
from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.dictionary import DictionaryParams, resolve_indices
from tinymodel_jax.forward import forward_with_hooks
from tinymodel_jax.interventions import EditFeatures, Hooks, combine
from tinymodel_jax.lm import TinyModel

MEMORY = 2**28
"""Bytes that the log-probabilities of a chunk may take."""


class FeatureEffects(NamedTuple):
    """What turning each feature off changes: the value without the feature minus the value with it."""

    features: Int[np.ndarray, " n"]
    kl: Float[np.ndarray, " n"]
    """KL divergence of the next-token distribution from the model's own, nats, averaged over positions; 0 or more."""
    loss: Float[np.ndarray, " n"]
    """Change of the mean next-token loss, nats: positive where the feature helps."""
    next_logprob: Float[np.ndarray, " n"]
    """Change of the log-probability of `next_ids` after the last position: negative where the feature speaks for it."""


def ablate(
    lm: TinyModel,
    tag: str,
    tok_ids: Any,
    features: Any = None,
    *,
    next_ids: Sequence[int] | None = None,
) -> FeatureEffects:
    """Turn each feature of a dictionary off, one at a time, at all positions; its error and all others stay.

    Args:
        tag: dictionary's site, such as M2; what `lm[tag]` reads.
        tok_ids: integers (batch, seq) of full rows: every position counts.
        features: indices; None is every feature that is active somewhere.
        next_ids: a token for each row; None is the model's most likely ones.

    Raises:
        ValueError: a feature is out of range, the tag has no dictionary, or the rows are no valid input.
    """
    reader = lm[tag]
    config = reader.dictionary.config
    ids = np.atleast_2d(np.asarray(tok_ids))
    acts = np.asarray(reader(ids))
    active = np.any(acts > 0, axis=(0, 1))
    chosen = np.flatnonzero(active) if features is None else np.atleast_1d(resolve_indices(features, config.n_features))
    logprobs = np.asarray(lm(ids))
    last = logprobs[:, -1].argmax(axis=-1) if next_ids is None else np.asarray(next_ids)
    if last.shape != (len(ids),):
        raise ValueError(f"ablate: next_ids has shape {last.shape}; it names one token for each of {len(ids)} rows.")
    found = np.zeros((3, len(chosen)), np.float32)
    running = np.flatnonzero(np.isin(chosen, np.flatnonzero(active)))
    size = max(1, min(len(running), MEMORY // max(1, logprobs.nbytes)))
    for start in range(0, len(running), size):
        places = running[start : start + size]
        padded = np.resize(chosen[places], size)  # one shape for all chunks
        effects = _ablate_chunk(
            lm.params,
            reader.dictionary.params,
            jnp.asarray(ids),
            jnp.asarray(last),
            jnp.asarray(padded),
            lm.splice_hooks(),
            config=lm.config,
            dictionary_config=config,
        )
        found[:, places] = np.asarray(effects)[:, : len(places)]
    return FeatureEffects(chosen, *found)


def _effects_of_chunk(
    params: Any,
    tree: DictionaryParams,
    tok_ids: Int[Array, "batch seq"],
    next_ids: Int[Array, " batch"],
    features: Int[Array, " n"],
    splices: Hooks,
    *,
    config: ModelConfig,
    dictionary_config: DictionaryConfig,
) -> Float[Array, "3 n"]:
    def logprobs_with(hooks: Hooks) -> Array:
        logprobs, _ = forward_with_hooks(params, tok_ids, combine(splices, hooks), config=config)
        assert logprobs is not None
        return logprobs

    def measures(logprobs: Array) -> tuple[Array, Array]:
        loss = -jnp.mean(jnp.take_along_axis(logprobs[:, :-1], tok_ids[:, 1:, None], axis=-1))
        return loss, jnp.mean(jnp.take_along_axis(logprobs[:, -1], next_ids[:, None], axis=-1))

    clean = logprobs_with({})
    loss, chosen = measures(clean)

    def one(feature: Array) -> Array:
        edit = EditFeatures(tree, feature, 0.0, config=dictionary_config, scale=True)
        edited = logprobs_with({dictionary_config.hook_out: edit})
        kl = jnp.mean(jnp.sum(jnp.exp(clean) * (clean - edited), axis=-1))
        new_loss, new_chosen = measures(edited)
        return jnp.stack([kl, new_loss - loss, new_chosen - chosen])

    return jax.vmap(one, out_axes=1)(features)


_ablate_chunk = fast_jit(_effects_of_chunk, static_argnames=("config", "dictionary_config"))

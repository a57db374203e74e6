"""The compiled forward passes: log-probabilities, logits, activations, features, loss.

Functions of parameters, ids and hooks, compiled once a configuration, shape and set of asked-for names, and shared by
all models of a configuration. Each computes only what its result needs: XLA drops later layers and the unembedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.dictionaries import dictionary
from tinymodel_jax.dictionaries.dictionary import DictionaryParams
from tinymodel_jax.model.hook_points import Hook
from tinymodel_jax.model.transformer import Params, run_with_hooks
from tinymodel_jax.runtime.compilation import fast_jit

Output = Literal["logprobs", "logits", "none"]
Hooks = Mapping[str, Hook]


def forward_with_hooks(
    params: Params,
    tok_ids: Int[Array, "batch seq"],
    hooks: Hooks,
    *,
    config: ModelConfig,
    keep: tuple[str, ...] = (),
    output: Output = "logprobs",
) -> tuple[Float[Array, "batch seq d_vocab"] | None, dict[str, Array]]:
    """Return log-probabilities, logits or nothing, and the kept activations."""
    logits, acts = run_with_hooks(params, config, tok_ids, hooks, keep)
    if output == "none":
        return None, acts
    return (jax.nn.log_softmax(logits) if output == "logprobs" else logits), acts


def features_of_tokens(
    params: Params,
    dictionary_params: DictionaryParams,
    tok_ids: Int[Array, "batch seq"],
    indices: Int[Array, "..."] | None,
    hooks: Hooks,
    *,
    config: ModelConfig,
    dictionary_config: DictionaryConfig,
) -> Float[Array, "..."]:
    """Return a dictionary's activations (batch, seq, n); without the last axis for a scalar index."""
    name = dictionary_config.hook_in
    _, acts = run_with_hooks(params, config, tok_ids, hooks, (name,))
    return dictionary.encode(dictionary_params, dictionary_config, acts[name], indices)


def mean_next_token_loss(
    params: Params,
    tok_ids: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    hooks: Hooks,
    *,
    config: ModelConfig,
) -> Float[Array, ""]:
    """Return the mean cross-entropy (nats) of each token given those before it, weighted by the token's weight."""
    logits, _ = run_with_hooks(params, config, tok_ids, hooks)
    weights = weights[:, 1:]
    return jnp.sum(next_token_losses(logits, tok_ids) * weights) / jnp.sum(weights)


def next_token_losses(
    logits: Float[Array, "batch seq d_vocab"], tok_ids: Int[Array, "batch seq"]
) -> Float[Array, "batch targets"]:
    """Return the cross-entropy (nats) of each token but the first, given those before it."""
    predicted = jnp.take_along_axis(logits[:, :-1], tok_ids[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits[:, :-1], axis=-1) - predicted


forward = fast_jit(forward_with_hooks, static_argnames=("config", "keep", "output"))
features = fast_jit(features_of_tokens, static_argnames=("config", "dictionary_config"))
encode = fast_jit(dictionary.encode, static_argnames=("config",))
"""A dictionary's activations of vectors: `(params, config, x, indices=None)`."""
mean_loss = fast_jit(mean_next_token_loss, static_argnames=("config",))

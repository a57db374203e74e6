"""A model with its hooks, and its compiled passes: log-probabilities, logits, activations, features, loss.

The passes are compiled once per configuration, shape and set of names to keep, and shared by all models of a
configuration. Each computes only what its result needs: XLA removes unused layers and the unembedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from tinymodel_jax.block_order import final_stream, resumes_at, stream_before
from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.dictionaries import dictionary
from tinymodel_jax.dictionaries.encoding import DictionaryParams
from tinymodel_jax.model.edits import Replace, is_array_tree
from tinymodel_jax.model.hook_points import Hook, Hooks, apply_with_hooks, hooks_after, vectors_at
from tinymodel_jax.model.interventions import combine
from tinymodel_jax.model.transformer import KVCache, Params, Transformer, run_with_hooks
from tinymodel_jax.runtime.compilation import YNNPACK, fast_jit, ynnpack_of_rows
from tinymodel_jax.runtime.few_rows import few_rows_at_a_time

Output = Literal["logprobs", "logits", "none"]
LOGPROBS_AT_ONCE = 512
"""Positions whose logits a CPU holds at once while it computes log-probabilities."""


@struct.dataclass
class HookedModel:
    """A model with its hooks: parameters, configuration, and the edits that are part of its forward pass.

    A pytree whose leaves are the arrays of parameters and hooks. The configuration is static, so a compiled function
    takes the model as one argument. `TinyModel.hooked` makes one.
    """

    params: Params
    """Parameter tree of the model."""
    config: ModelConfig = struct.field(pytree_node=False)
    """Shape and number formats of the model."""
    hooks: Hooks = struct.field(default_factory=dict)
    """Hook name -> edit."""

    def run(
        self, tok_ids: Int[Array, "batch seq"], keep: str | Iterable[str] = ()
    ) -> tuple[Float[Array, "batch seq d_vocab"], dict[str, Array]]:
        """Return the logits and the activations to keep, as `run_with_hooks` does.

        Args:
            keep: hook points whose values are returned, as for `run_with_hooks`.
        """
        return run_with_hooks(self.params, self.config, tok_ids, self.hooks, keep)

    def resume(
        self,
        point: str,
        resid: Float[Array, "batch seq d_model"],
        tok_ids: Int[Array, "batch seq"],
        before: KVCache = (),
        keep: Iterable[str] = (),
    ) -> tuple[Float[Array, "batch seq d_model"], dict[str, Array]]:
        """Run the layers above a point; return the final residual stream and the activations to keep.

        Args:
            point: a hook point of the stream, or one whose value is added to it; only edits at later hook points act.
            resid: the stream after that point.
            tok_ids: the tokens at its positions.
            before: keys and values of earlier positions, as `Transformer.resume` takes them.
        """
        layer, at_mlp = resumes_at(point)
        return apply_with_hooks(
            Transformer(self.config),
            {"params": self.params},
            resid,
            layer,
            at_mlp,
            before,
            tok_ids=tok_ids,
            hooks=hooks_after(self.hooks, point),
            keep=keep,
            method="resume",
        )

    def resume_with_value(
        self,
        name: str,
        value: Float[Array, "..."],
        stream: Float[Array, "batch seq d_model"],
        tok_ids: Int[Array, "batch seq"],
    ) -> Float[Array, "batch seq d_model"]:
        """Return the final residual stream with another value at a block's hook point.

        Args:
            stream: the model's own value at `stream_before(name)`.
        """
        point = stream_before(name)
        if name == point:
            return self.resume(point, jnp.asarray(value, stream.dtype), tok_ids)[0]
        return self.with_hooks({name: Replace(value)}).resume(point, stream, tok_ids)[0]

    def unembed(self, resid: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_vocab"]:
        """Return the float32 logits of a final residual stream."""
        logits = Transformer(self.config).apply({"params": self.params}, resid, method="unembed")
        assert isinstance(logits, jax.Array)
        return logits

    def with_hooks(self, *hooks: Mapping[str, Hook]) -> HookedModel:
        """Return the model with more edits, which act after those it has."""
        return dataclasses.replace(self, hooks=combine(self.hooks, *hooks))


def compiled_pass(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function of a `HookedModel` as `fast_jit` does; with functions as hooks, it runs uncompiled."""
    compiled = fast_jit(function, **options)

    @wraps(function)
    def call(model: HookedModel, *args: Any, **kwargs: Any) -> Any:
        if is_array_tree(model.hooks):
            return compiled(model, *args, **kwargs)
        return function(model, *jax.tree.map(jnp.asarray, args), **kwargs)

    return call


def forward(
    model: HookedModel,
    tok_ids: Int[Array | np.ndarray, "batch seq"],
    *,
    keep: tuple[str, ...] = (),
    output: Output = "logprobs",
) -> tuple[Float[Array, "batch seq d_vocab"] | None, dict[str, Array]]:
    """Return log-probabilities, logits or nothing, and the kept activations."""
    ynnpack = "sums" if tok_ids.size > LOGPROBS_AT_ONCE else ynnpack_of_rows(tok_ids.size)
    return _compiled_forward[ynnpack](model, tok_ids, keep=keep, output=output)


def _forward(model: HookedModel, tok_ids: Array, *, keep: tuple[str, ...], output: Output) -> Any:
    final = final_stream(model.config.n_layers)
    logits, acts = model.run(tok_ids, (*keep, final))
    kept = {name: acts[name] for name in keep}
    if output == "none":
        return None, kept
    if output == "logits":
        return logits, kept

    def of_row(resid: Array) -> Array:
        # the barrier keeps the product apart from the fast sums, which would take it over
        return jax.nn.log_softmax(jax.lax.optimization_barrier(model.unembed(resid)))

    most = LOGPROBS_AT_ONCE // max(1, tok_ids.shape[1])
    return few_rows_at_a_time(of_row, acts[final], most=most), kept


_compiled_forward = {
    ynnpack: compiled_pass(_forward, static_argnames=("keep", "output"), ynnpack=ynnpack)
    for ynnpack in get_args(YNNPACK)
}


@partial(fast_jit, static_argnames=("dictionary_config",))
def features(
    model: HookedModel,
    dictionary_params: DictionaryParams,
    tok_ids: Int[Array, "batch seq"],
    indices: Int[Array, "..."] | None,
    *,
    dictionary_config: DictionaryConfig,
) -> Float[Array, "..."]:
    """Return a dictionary's activations (batch, seq, n); without the last axis for a scalar index."""
    _, acts = model.run(tok_ids, dictionary_config.hooks_in)
    x = vectors_at(acts, dictionary_config.hook_in)
    found = dictionary.encode(dictionary_params, dictionary_config, x, indices)
    acting = dictionary_config.acts_at(tok_ids)
    return jnp.where(acting.reshape(*acting.shape, *[1] * (found.ndim - 2)), found, 0)


@compiled_pass
def mean_loss(
    model: HookedModel, tok_ids: Int[Array, "batch seq"], weights: Float[Array, "batch seq"]
) -> Float[Array, ""]:
    """Return the mean cross-entropy (nats) of each token given those before it, weighted by the token's weight."""
    logits, _ = model.run(tok_ids)
    weights = weights[:, 1:]
    return jnp.sum(next_token_losses(logits, tok_ids) * weights) / jnp.sum(weights)


@compiled_pass
def token_losses(
    model: HookedModel, tok_ids: Int[Array, "batch seq"], weights: Float[Array, "batch seq"]
) -> Float[Array, "batch targets"]:
    """Return the cross-entropy (nats) of each token but the first, given those before it; 0 where its weight is 0."""
    logits, _ = model.run(tok_ids)
    return jnp.where(weights[:, 1:] != 0, next_token_losses(logits, tok_ids), 0)


def next_token_losses(
    logits: Float[Array, "batch seq d_vocab"], tok_ids: Int[Array, "batch seq"]
) -> Float[Array, "batch targets"]:
    """Return the cross-entropy (nats) of each token but the first, given those before it."""
    predicted = jnp.take_along_axis(logits[:, :-1], tok_ids[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits[:, :-1], axis=-1) - predicted


@partial(fast_jit, static_argnames=("config",))
def encode(
    params: DictionaryParams, config: DictionaryConfig, x: Float[Array, "*batch d_in"], indices: Any = None
) -> Float[Array, "..."]:
    """Return a dictionary's activations of vectors, as `dictionary.encode` does."""
    return dictionary.encode(params, config, x, indices)

"""The forward pass with gates: a node whose gate is 1 has its own value, and one whose gate is 0 the mean of its place.

    attention   z     = mean z + gate (z - mean z)                          for each head
    MLP         out   = mean out + (gates (acts - mean acts)) W_dec + gate (error - mean error)
                error = out of the MLP itself - acts W_dec - b_dec

Activations, errors, queries, keys and values are those of this pass, which the gates change. With all gates 1, it is
the model; with all gates 0, only the embeddings differ between prompts. The derivative with respect to a gate estimates
what ablating the node does. Means are taken over all positions of a place, in the prompts that a circuit is found on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from tinymodel_jax.analysis.circuits.node_sets.nodes import NodeSpace
from tinymodel_jax.analysis.circuits.node_sets.places import Aligned
from tinymodel_jax.block_order import final_stream
from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.encoding import encode
from tinymodel_jax.model.forward import HookedModel
from tinymodel_jax.model.hook_points import Hooks
from tinymodel_jax.model.padding import pad_below
from tinymodel_jax.runtime.compilation import fast_jit

TOGETHER = 32
"""Prompts in one compiled call at most."""
MEMORY = 2**28
"""Bytes that the features' activations of a call may take; its backward pass takes several times as many."""


@struct.dataclass
class LayerMeans:
    """What a layer's nodes are replaced by: means over the positions of each place, float32."""

    z: Float[Array, "places n_heads d_head"]
    """Mean of what each head reads (`attn.hook_z`)."""
    out: Float[Array, "places d_model"]
    """Mean of the MLP's output."""
    acts: Float[Array, "places n_features"]
    """Mean activation of each feature of the layer's transcoder, or of each neuron."""


class Batch(NamedTuple):
    """Some of the prompts; rows of padding fill it up."""

    tok_ids: Int[Array, "batch seq"]
    place: Int[Array, "batch seq"]
    weight: Float[Array, "batch seq"]
    """1 at the prompts' tokens, 0 in the padding."""
    last: Int[Array, " batch"]
    tokens: Int[Array, "batch 2"]
    """Tokens whose logits are compared."""


@struct.dataclass
class Gated:
    """A model with gates: everything that its passes need, apart from the gates."""

    model: HookedModel
    dictionaries: tuple[Dictionary, ...]
    space: NodeSpace = struct.field(pytree_node=False)

    def means(self, aligned: Aligned) -> tuple[LayerMeans, ...]:
        """Return the means of all nodes over some prompts."""
        totals = None
        for batch, _ in self.batches(aligned, np.zeros((len(aligned.tok_ids), 2), np.int32)):
            found = _sums(self, batch)
            totals = found if totals is None else jax.tree.map(jnp.add, totals, found)
        assert totals is not None
        counts, sums = totals
        return jax.tree.map(lambda x: x / counts.reshape(-1, *[1] * (x.ndim - 1)), sums)

    def differences(
        self, means: tuple[LayerMeans, ...], gates: np.ndarray, aligned: Aligned, tokens: Int[np.ndarray, "prompts 2"]
    ) -> Float[np.ndarray, " prompts"]:
        """Return the logit difference of each prompt."""
        found = [
            np.asarray(_differences(self, means, jnp.asarray(gates, jnp.float32), batch))[:n]
            for batch, n in self.batches(aligned, tokens)
        ]
        return np.concatenate(found)

    def slopes(
        self, means: tuple[LayerMeans, ...], gates: np.ndarray, aligned: Aligned, tokens: Int[np.ndarray, "prompts 2"]
    ) -> Float[np.ndarray, " nodes"]:
        """Return the derivative of the mean logit difference with respect to each gate."""
        given = jnp.asarray(gates, jnp.float32)
        found = [
            np.asarray(_slopes(self, means, given, batch), np.float64) for batch, _ in self.batches(aligned, tokens)
        ]
        return np.sum(found, axis=0) / len(tokens)

    def batches(self, aligned: Aligned, tokens: Int[np.ndarray, "prompts 2"]) -> Iterator[tuple[Batch, int]]:
        """Yield the prompts in batches of one shape, each with its number of prompts."""
        activations = 4 * aligned.tok_ids.shape[1] * sum(self.space.n_features)
        at_once = min(TOGETHER, len(tokens), max(1, MEMORY // activations))
        given = (aligned.tok_ids, aligned.place, aligned.real.astype(np.float32), aligned.lengths[:, None] - 1, tokens)
        for start in range(0, len(tokens), at_once):
            rows = slice(start, start + at_once)
            ids, place, weight, last, both = (jnp.asarray(pad_below(values[rows], at_once, 0)) for values in given)
            yield Batch(ids, place, weight, last[:, 0], both), len(tokens[rows])

    def hooks(self, means: tuple[LayerMeans, ...], gates: Any, place: Any) -> Hooks:
        """Return the edits that put means in place of the nodes whose gates are closed."""
        found: Hooks = {}
        for layer, (heads, features, errors) in enumerate(self.space.split(gates)):
            of_layer, dictionary = means[layer], self.dictionaries[layer]
            found[f"blocks.{layer}.attn.hook_z"] = GatedHeads(of_layer.z, heads, place)
            found[dictionary.config.hook_out] = GatedOutput(
                dictionary.params, of_layer.out, of_layer.acts, features, errors, place, config=dictionary.config
            )
        return found


@struct.dataclass
class GatedHeads:
    """The edit of `attn.hook_z`."""

    mean: Float[Array, "places n_heads d_head"]
    gates: Float[Array, "places n_heads"]
    place: Int[Array, "batch seq"]

    def __call__(self, value: Array, acts: Any) -> Array:
        del acts
        mean = self.mean[self.place]
        return mean + self.gates[self.place][..., None] * (value.astype(mean.dtype) - mean)


@struct.dataclass
class GatedOutput:
    """The edit of `hook_mlp_out`."""

    params: Any
    mean: Float[Array, "places d_model"]
    mean_acts: Float[Array, "places n_features"]
    gates: Float[Array, "places n_features"]
    error_gate: Float[Array, "places 1"]
    place: Int[Array, "batch seq"]
    config: DictionaryConfig = struct.field(pytree_node=False, kw_only=True)

    def __call__(self, value: Array, acts: Any) -> Array:
        mean = self.mean[self.place]
        moved = activations(self.params, self.config, acts) - self.mean_acts[self.place]
        W_dec = self.params["W_dec"].astype(mean.dtype)
        error = value.astype(mean.dtype) - mean - moved @ W_dec
        return mean + (self.gates[self.place] * moved) @ W_dec + self.error_gate[self.place] * error


def activations(params: Any, config: DictionaryConfig, acts: Any) -> Float[Array, "batch seq n_features"]:
    """Return a transcoder's activations, 0 at the tokens that it excludes, in float32."""
    found = encode(params, config, acts[config.hook_in]).astype(jnp.float32)
    return jnp.where(config.acts_at(acts["tok_ids"])[..., None], found, 0) if config.exclude else found


@fast_jit
def _sums(gated: Gated, batch: Batch) -> tuple[Float[Array, " places"], tuple[LayerMeans, ...]]:
    """Return the number of positions of each place, and the sums over them."""
    places = jnp.where(batch.place[..., None] == jnp.arange(gated.space.n_places), batch.weight[..., None], 0)
    blocks = [(dictionary, *_hooks_of(dictionary)) for dictionary in gated.dictionaries]
    _, kept = gated.model.run(batch.tok_ids, [name for _, *names in blocks for name in names])
    kept["tok_ids"] = batch.tok_ids

    def total(values: Array) -> Array:
        return jnp.einsum("bs...,bsp->p...", values.astype(jnp.float32), places)

    found = [
        LayerMeans(total(kept[z]), total(kept[out]), total(activations(dictionary.params, dictionary.config, kept)))
        for dictionary, z, _, out in blocks
    ]
    return places.sum(axis=(0, 1)), tuple(found)


def _hooks_of(dictionary: Dictionary) -> tuple[str, str, str]:
    block = dictionary.config.hook_out.removesuffix("hook_mlp_out")
    return f"{block}attn.hook_z", dictionary.config.hook_in, dictionary.config.hook_out


@fast_jit
def _differences(
    gated: Gated, means: tuple[LayerMeans, ...], gates: Float[Array, " nodes"], batch: Batch
) -> Float[Array, " batch"]:
    hooks = gated.hooks(means, gates, batch.place)
    final = final_stream(gated.model.config.n_layers)
    _, kept = gated.model.with_hooks(hooks).run(batch.tok_ids, final)
    rows = jnp.arange(len(batch.last))
    logits = gated.model.unembed(kept[final][rows, batch.last])
    return logits[rows, batch.tokens[:, 0]] - logits[rows, batch.tokens[:, 1]]


@fast_jit
def _slopes(
    gated: Gated, means: tuple[LayerMeans, ...], gates: Float[Array, " nodes"], batch: Batch
) -> Float[Array, " nodes"]:
    def total(gates: Array) -> Array:
        return jnp.sum(_differences(gated, means, gates, batch) * batch.weight[:, 0])  # 0 for rows of padding

    return jax.grad(total)(gates)

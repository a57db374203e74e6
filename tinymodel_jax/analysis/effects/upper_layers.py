"""What many changes at one site do to the logits: the layers above are run once a change, all else once.

One clean pass gives everything that the changes share. A change is sparse: it adds `amount x direction` to the value at
a hook point, at a few positions. Those positions alone go through the rest of the block and through the next block's
queries, keys and values; from there on all positions count that attention may reach, those from a change's first one
on, with the clean keys and values of the ones before. Nothing is approximated: attention is causal, and all else acts
on each position by itself.

There is no layer norm, so the change of the logits is the change of the final residual stream times W_U.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from tinymodel_jax.analysis.effects.kl_divergence import kl_of_changes
from tinymodel_jax.analysis.effects.stream_entry import Entry, comes_after, hooks_after
from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import DictionaryParams, encode
from tinymodel_jax.model.forward import HookedModel
from tinymodel_jax.model.hook_points import Hooks, apply_with_hooks
from tinymodel_jax.model.interventions import Replace, combine
from tinymodel_jax.model.transformer import LayerCache, Transformer
from tinymodel_jax.runtime.compilation import fast_jit


class Clean(NamedTuple):
    """What the pass without a change leaves behind."""

    entry: Float[Array, "batch seq d_model"]
    joined: Float[Array, "batch seq d_model"]
    linear: tuple[Array, ...]
    """Values at the entry's `linear_hooks`."""
    attention: tuple[Array, ...]
    """Queries, keys and values of the first block."""
    keys_values: tuple[tuple[Array, Array], ...]
    """Of each block whose attention the changes reach, (batch, seq, head, d_head)."""
    final: Float[Array, "batch seq d_model"]
    logprobs: Float[Array, "batch seq d_vocab"]
    expected: Float[Array, "batch seq d_model"]
    """Mean column of W_U, as the model computes with it, under the next-token distribution."""
    sources: tuple[Array, ...]
    """What the dictionaries that were asked for read."""


class Weights(NamedTuple):
    """How the positions count, and the tokens whose log-probabilities do."""

    real: Float[Array, "batch seq"]
    """Sums to 1."""
    loss: Float[Array, "batch seq"]
    """Of the prediction made at each position; sums to 1."""
    last: Float[Array, "batch seq"]
    """Of the last position of each row; sums to 1."""
    targets: Int[Array, "batch seq"]
    next_ids: Int[Array, "batch 1"]


class Changes(NamedTuple):
    """Some changes, as the positions at which they are not zero."""

    directions: Float[Array, "n d_model"]
    places: Int[Array, "3 places"]
    """Change, row and position of each; a change of n or more fills up the array."""
    amounts: Float[Array, " places"]


@partial(fast_jit, static_argnames=("entry", "sources"))
def clean_streams(
    model: HookedModel,
    tok_ids: Int[Array, "batch seq"],
    below: tuple[Hooks, ...],
    *,
    entry: Entry,
    sources: tuple[str, ...],
) -> Clean:
    """Run the model once.

    Args:
        below: for each of the `sources`, the hooks in front of the dictionary that reads there.
        sources: hook points that dictionaries read.
    """
    config = model.config
    linear, attention = entry.linear_hooks(config), entry.attention_hooks(config)
    blocks = range(entry.first_block, config.n_layers)
    keys_values = [(f"blocks.{layer}.attn.hook_k", f"blocks.{layer}.attn.hook_v") for layer in blocks]
    final = f"blocks.{config.n_layers - 1}.hook_resid_post"
    pairs = (name for pair in keys_values for name in pair)
    keep = {*entry.terms, entry.joined, *linear, *attention, *pairs, final, *sources}
    logits, acts = model.run(tok_ids, sorted(keep))
    logprobs = jax.nn.log_softmax(logits)

    def read(name: str, below: Hooks) -> Array:
        # spliced there itself, the dictionary reads what is not in this pass; the compiler shares the layers below
        return (
            dataclasses.replace(model, hooks=below).run(tok_ids, name)[1][name] if name in model.hooks else acts[name]
        )

    return Clean(
        entry=sum((acts[name] for name in entry.terms[1:]), acts[entry.terms[0]]),
        joined=acts[entry.joined],
        linear=tuple(acts[name] for name in linear),
        attention=tuple(acts[name] for name in attention),
        keys_values=tuple((acts[k], acts[v]) for k, v in keys_values),
        final=acts[final],
        logprobs=logprobs,
        expected=jnp.exp(logprobs) @ _unembedding(model).T,
        sources=tuple(map(read, sources, below)),
    )


@partial(fast_jit, static_argnames=("entry", "length", "readout_config", "sharding"))
def effects_of_changes(
    model: HookedModel,
    clean: Clean,
    weights: Weights,
    changes: Changes,
    readout: DictionaryParams | None,
    below_readout: Hooks,
    *,
    entry: Entry,
    length: int,
    readout_config: DictionaryConfig | None = None,
    sharding: NamedSharding | None = None,
) -> tuple[Float[Array, "3 n"], Float[Array, "n d_model"], Float[Array, "n n_read"] | None]:
    """Return KL, change of the loss and of the log-probability of `next_ids`; and the mean change over positions of the
    final stream, and of a dictionary's activations.

    Args:
        length: positions at the end of the rows that the changes may reach.
        readout: dictionary whose activations are compared; its input is the last of the clean pass's `sources`.
        below_readout: the hooks in front of it.
        sharding: spreads the changes over devices.
    """
    keep = () if readout_config is None else (readout_config.hook_in,)

    def run(hooks: Hooks) -> tuple[Array, list[Array]]:
        return _changed_pass(dataclasses.replace(model, hooks=hooks), clean, changes, entry, length, keep, sharding)

    final, values = run(model.hooks)
    upper, counted = jax.tree.map(lambda x: x[:, -length:], (clean, weights))
    effects, final_stream = _compare(
        _unembedding(model), upper, counted, final.reshape(len(changes.directions), -1, *final.shape[1:])
    )
    if readout_config is None:
        return effects, final_stream, None
    assert readout is not None
    if readout_config.hook_in in model.hooks:  # spliced there itself, as in `clean_streams`
        _, values = run(below_readout)
    before = encode(readout, readout_config, upper.sources[-1])
    after = encode(readout, readout_config, values[0]).reshape(-1, *before.shape)
    read = jnp.einsum("nbsf,bs->nf", after - before, counted.real.astype(before.dtype))
    return effects, final_stream, read


def _changed_pass(
    model: HookedModel,
    clean: Clean,
    changes: Changes,
    entry: Entry,
    length: int,
    keep: tuple[str, ...],
    sharding: NamedSharding | None,
) -> tuple[Float[Array, "rows length d_model"], list[Array]]:
    """Return the final stream and kept values of the last positions; the rows of one change after those of another."""
    config = model.config
    change, row, position = changes.places
    start = clean.joined.shape[1] - length

    def run(*resume: Any, hooks: Hooks, keep: list[str]) -> tuple[Array, dict[str, Array]]:
        return apply_with_hooks(
            Transformer(config), {"params": model.params}, *resume, hooks=hooks, keep=keep, method="resume"
        )

    def spread(changed: Array, clean: Array) -> Array:
        """Put the changed positions in place of the clean ones."""
        whole = jnp.broadcast_to(clean[:, start:], (len(changes.directions), len(clean), length, *clean.shape[2:]))
        whole = whole.at[change, row, position - start].set(changed, mode="drop")
        whole = whole.reshape(-1, *whole.shape[2:])
        return whole if sharding is None else jax.lax.with_sharding_constraint(whole, sharding)

    added = changes.amounts[:, None] * changes.directions[change]
    alone = clean.entry[row, position] + added.astype(clean.entry.dtype)
    attention = entry.attention_hooks(config)
    early = [name for name in keep if not comes_after(name, entry.joined, config)]
    # positions of several changes in one row: what attention makes of them is not used, so it is not computed
    entered = _linear_values(model, clean, changes, entry)
    _, single = run(
        alone[None],
        entry.layer,
        entry.at_mlp,
        hooks=combine(hooks_after(model.hooks, entry.edited, config), entered),
        keep=[*attention, *early, *([entry.joined] if entry.at_mlp else [])],
    )
    single = {name: value[0] for name, value in single.items()}
    stream = spread(single.get(entry.joined, alone), clean.joined)
    known = {n: Replace(spread(single[n], value)) for n, value in zip(attention, clean.attention, strict=True)}
    repeats = (len(changes.directions), 1, 1, 1)
    before = tuple(
        LayerCache.of_prompt(jnp.tile(keys[:, :start], repeats), jnp.tile(values[:, :start], repeats), start)
        for keys, values in clean.keys_values
    )
    later = combine(hooks_after(model.hooks, entry.joined, config), known)
    late = [name for name in keep if name not in early]
    final, whole = run(stream, entry.first_block, False, before, hooks=later, keep=late)
    return final, [spread(single[name], clean.sources[-1]) if name in early else whole[name] for name in keep]


def _linear_values(model: HookedModel, clean: Clean, changes: Changes, entry: Entry) -> Hooks:
    """Return edits that put the values at the changed positions in at the entry's `linear_hooks`.

    A product of each direction with the weights, not of each position; nothing where an edit stands in between.
    """
    change, row, position = changes.places
    config = model.config
    names = entry.linear_hooks(config)
    if not names or any(comes_after(names[0], hook, config) for hook in hooks_after(model.hooks, entry.edited, config)):
        return {}
    found: Hooks = {}
    for name, value in zip(names, clean.linear, strict=True):
        _, layer, part, hook = name.split(".")
        weights = model.params[f"blocks_{layer}"][part]["W_in" if part == "mlp" else f"W_{hook[-1].upper()}"]
        product = jnp.einsum("nd,dm->nm" if part == "mlp" else "nd,hdk->nhk", changes.directions, weights)
        amounts = changes.amounts.reshape(-1, *[1] * (product.ndim - 1))
        found[name] = Replace((value[row, position] + (amounts * product[change]).astype(value.dtype))[None])
    return found


def _unembedding(model: HookedModel) -> Float[Array, "d_model d_vocab"]:
    """Return W_U in float32, rounded to the dtype that the model computes in."""
    return model.params["W_U"].astype(model.config.dtype).astype(jnp.float32)


def _compare(
    W_U: Float[Array, "d_model d_vocab"],
    clean: Clean,
    weights: Weights,
    final: Float[Array, "n batch length d_model"],
) -> tuple[Float[Array, "3 n"], Float[Array, "n d_model"]]:
    """Return the three effects, and the mean change of the final stream; all is of the last `length` positions."""
    moved = final - clean.final
    rows = moved.reshape(-1, moved.shape[-1])
    logits = jnp.matmul(rows, W_U.astype(rows.dtype), preferred_element_type=jnp.float32)
    moved = moved.astype(jnp.float32)
    mean = jnp.einsum("nbsd,bsd->nbs", moved, clean.expected)
    kl = kl_of_changes(logits.reshape(*moved.shape[:-1], -1) - mean[..., None], clean.logprobs)

    def token_change(ids: Int[Array, "batch positions"]) -> Array:
        columns = jnp.broadcast_to(W_U.T[ids], moved.shape[1:])
        return jnp.einsum("nbsd,bsd->nbs", moved, columns) - mean - kl

    measured = (
        (kl, weights.real),
        (-token_change(weights.targets), weights.loss),
        (token_change(weights.next_ids), weights.last),
    )
    effects = jnp.stack([jnp.einsum("nbs,bs->n", value, weight) for value, weight in measured])
    return effects, jnp.einsum("nbsd,bs->nd", moved, weights.real)

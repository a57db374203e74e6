"""What many changes at one site do to the logits: the layers above run once per change, everything else once.

A clean pass gives what the changes share. Each change adds `amount x direction` to the value at a hook point, at a few
positions. Two refinements save work, and approximate nothing, since only attention mixes positions, and it is causal.
First, the changed positions alone go through the rest of the block and the next block's queries, keys and values; after
that, all positions from the chunk's first change on run, with the clean keys and values of earlier ones. Running those
positions from the start takes about 40 % longer on the `sparse` case of `benchmarks/sweeps.py`, 9 % on `dense`. Second,
the first weights multiply each direction, not each position; without this the cases take about 8 % and 10 % longer.

There is no layer norm, so the change of the logits is the change of the final residual stream times W_U.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from tinymodel_jax.analysis.effects.metrics import Weights
from tinymodel_jax.analysis.effects.stream_entry import Entry
from tinymodel_jax.block_order import comes_after, final_stream
from tinymodel_jax.config import DictionaryConfig, split_hooks
from tinymodel_jax.dictionaries.encoding import DictionaryParams, encode
from tinymodel_jax.model.forward import HookedModel
from tinymodel_jax.model.hook_points import Hooks, hooks_after, vectors_at
from tinymodel_jax.model.interventions import EditFeatures, Replace, at_hook_points
from tinymodel_jax.model.transformer import LayerCache
from tinymodel_jax.runtime.compilation import fast_jit

LARGE = 60.0
"""Change of a logit above which its `exp` is not computed by itself. `exp` overflows above 88, and the probability that
it multiplies may be below float32's smallest number, `exp(-87)`, so that the product would be 0."""


class Clean(NamedTuple):
    """Values of the pass without changes."""

    tok_ids: Int[Array, "batch seq"]
    entry: Float[Array, "batch seq d_model"]
    joined: Float[Array, "batch seq d_model"]
    linear: tuple[Array, ...]
    """Values at the entry's `linear_hooks`."""
    attention: tuple[Array, ...]
    """Queries, keys and values of the first block."""
    keys_values: tuple[tuple[Array, Array], ...]
    """Keys and values of each block whose attention the changes reach, (batch, seq, head, d_head)."""
    final: Float[Array, "batch seq d_model"]
    logprobs: Float[Array, "batch seq d_vocab"]
    expected: Float[Array, "batch seq d_model"]
    """Mean column of W_U (in the model's precision) under the next-token distribution."""
    sources: tuple[Array, ...]
    """Inputs of the requested dictionaries."""


class Changes(NamedTuple):
    """Changes, stored as the positions where they are not zero."""

    directions: Float[Array, "n d_model"]
    places: Int[Array, "3 places"]
    """Change, row and position of each entry; entries with a change of n or more are padding."""
    amounts: Float[Array, " places"]


class FeatureChanges(NamedTuple):
    """Changes of the activations of a dictionary that writes to several hook points; they need whole passes."""

    params: DictionaryParams
    features: Int[Array, " n"]
    amounts: Float[Array, "n batch seq"]
    """What is added to the activations; features whose amounts are all 0 are padding."""


class ChangeEffects(NamedTuple):
    """The effects of changes, one entry of the first axis (of `effects`, the second) for each."""

    effects: Float[Array, "3 n"]
    """KL, change of the loss, and change of the log-probability of `next_ids`."""
    final_stream: Float[Array, "n d_model"]
    """Change of the final stream, averaged over positions."""
    difference: Float[Array, " n"] | None = None
    """Change of a logit difference."""
    logits: Float[Array, "n batch seq d_vocab"] | None = None
    """The logits after the change."""
    read: Float[Array, "n n_read"] | None = None
    """Change of a dictionary's activations, averaged over positions."""


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
        below: for each of the `sources`, the hooks that act before the dictionary reads it.
        sources: hook points that dictionaries read, or several joined by "+".
    """
    config = model.config
    linear, attention = entry.linear_hooks(config), entry.attention_hooks(config)
    blocks = range(entry.first_block, config.n_layers)
    keys_values = [(f"blocks.{layer}.attn.hook_k", f"blocks.{layer}.attn.hook_v") for layer in blocks]
    final = final_stream(config.n_layers)
    pairs = (name for pair in keys_values for name in pair)
    read_at = (name for source in sources for name in split_hooks(source))
    keep = {*entry.terms, entry.joined, *linear, *attention, *pairs, final, *read_at}
    logits, acts = model.run(tok_ids, sorted(keep))
    logprobs = jax.nn.log_softmax(logits)

    def read(source: str, below: Hooks) -> Array:
        names, found = split_hooks(source), acts
        if not model.hooks.keys().isdisjoint(names):
            # a spliced dictionary reads a value that this pass does not have; the compiler shares the layers below
            found = dataclasses.replace(model, hooks=below).run(tok_ids, names)[1]
        return found[source] if len(names) == 1 else vectors_at(found, source)

    return Clean(
        tok_ids=tok_ids,
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


@partial(fast_jit, static_argnames=("entry", "length", "readout_config", "edited_config", "sharding"))
def effects_of_changes(
    model: HookedModel,
    clean: Clean,
    weights: Weights,
    changes: Changes | FeatureChanges,
    readout: DictionaryParams | None,
    below_readout: Hooks,
    tokens: Int[Array, "batch 2"] | None = None,
    clean_logits: Float[Array, "batch seq d_vocab"] | None = None,
    *,
    entry: Entry,
    length: int,
    readout_config: DictionaryConfig | None = None,
    edited_config: DictionaryConfig | None = None,
    sharding: NamedSharding | None = None,
) -> ChangeEffects:
    """Return the effects of changes.

    Args:
        length: positions at the end of the rows that the changes may reach; all of them for `FeatureChanges`.
        readout: dictionary whose activations are compared; its input is the last of the clean pass's `sources`.
        below_readout: the hooks that act before it reads.
        tokens: for each row, two tokens whose logits are compared; None computes nothing for them.
        clean_logits: logits of the clean pass; with them, the logits after each change are returned.
        sharding: spreads the changes over devices.
    """
    keep = () if readout_config is None else (readout_config.hook_in,)
    n = len(changes.features if isinstance(changes, FeatureChanges) else changes.directions)

    def run(hooks: Hooks) -> tuple[Array, list[Array]]:
        other = dataclasses.replace(model, hooks=hooks)
        if isinstance(changes, FeatureChanges):
            assert edited_config is not None
            return _whole_passes(other, clean.tok_ids, changes, edited_config, keep)
        return _changed_pass(other, clean, changes, entry, length, keep, sharding)

    final, values = run(model.hooks)
    upper, counted = jax.tree.map(lambda x: x[:, -length:], (clean, weights))
    effects, moved, by_logit = _compare(_unembedding(model), upper, counted, final.reshape(n, -1, *final.shape[1:]))
    found = ChangeEffects(effects, jnp.einsum("nbsd,bs->nd", moved, counted.real))
    if tokens is not None:
        columns = _unembedding(model).T[tokens]
        difference = jnp.einsum("nbsd,bd,bs->n", moved, columns[:, 0] - columns[:, 1], counted.last)
        found = found._replace(difference=difference)
    if clean_logits is not None:
        whole = jnp.broadcast_to(clean_logits, (len(moved), *clean_logits.shape))
        found = found._replace(logits=whole.at[:, :, -length:].add(by_logit))
    if readout_config is None:
        return found
    assert readout is not None
    if readout_config.hook_in in model.hooks:  # spliced there itself, as in `clean_streams`
        _, values = run(below_readout)
    before = encode(readout, readout_config, upper.sources[-1])
    after = encode(readout, readout_config, values[0]).reshape(-1, *before.shape)
    real = jnp.where(readout_config.acts_at(upper.tok_ids), counted.real, 0)
    read = jnp.einsum("nbsf,bs->nf", after - before, real.astype(before.dtype))
    return found._replace(read=read)


def _whole_passes(
    model: HookedModel,
    tok_ids: Int[Array, "batch seq"],
    changes: FeatureChanges,
    config: DictionaryConfig,
    keep: tuple[str, ...],
) -> tuple[Float[Array, "rows seq d_model"], list[Array]]:
    """Do as `_changed_pass` for features that write to several hook points, by a pass of the model for each."""
    final = final_stream(model.config.n_layers)

    def one(feature: Array, amounts: Array) -> list[Array]:
        edit = EditFeatures(changes.params, feature, amounts[..., None], amounts != 0, config=config, change="add")
        _, acts = model.with_hooks(at_hook_points(edit)).run(tok_ids, (final, *keep))
        return [acts[name] for name in (final, *keep)]

    found = jax.vmap(one)(changes.features, changes.amounts)
    rows, *values = [value.reshape(-1, *value.shape[2:]) for value in found]
    return rows, values


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
    change, row, position = changes.places
    start = clean.joined.shape[1] - length

    def spread(changed: Array, clean: Array) -> Array:
        """Put the changed positions in place of the clean ones."""
        whole = jnp.broadcast_to(clean[:, start:], (len(changes.directions), len(clean), length, *clean.shape[2:]))
        whole = whole.at[change, row, position - start].set(changed, mode="drop")
        whole = whole.reshape(-1, *whole.shape[2:])
        return whole if sharding is None else jax.lax.with_sharding_constraint(whole, sharding)

    added = changes.amounts[:, None] * changes.directions[change]
    alone = clean.entry[row, position] + added.astype(clean.entry.dtype)
    attention = entry.attention_hooks(model.config)
    early = [name for name in keep if not comes_after(name, entry.joined)]
    # positions of several changes in one row: what attention makes of them is not used, so it is not computed
    entered = _linear_values(model, clean, changes, entry)
    kept = [*attention, *early, *([entry.joined] if entry.at_mlp else [])]
    _, single = model.with_hooks(entered).resume(
        entry.point, alone[None], clean.tok_ids[row, position][None], keep=kept
    )
    single = {name: value[0] for name, value in single.items()}
    stream = spread(single.get(entry.joined, alone), clean.joined)
    known = {n: Replace(spread(single[n], value)) for n, value in zip(attention, clean.attention, strict=True)}
    repeats = (len(changes.directions), 1, 1, 1)
    before = tuple(
        LayerCache.of_prompt(jnp.tile(keys[:, :start], repeats), jnp.tile(values[:, :start], repeats), start)
        for keys, values in clean.keys_values
    )
    late = [name for name in keep if name not in early]
    tok_ids = jnp.tile(clean.tok_ids[:, start:], (len(changes.directions), 1))
    final, whole = model.with_hooks(known).resume(entry.joined, stream, tok_ids, before, keep=late)
    return final, [spread(single[name], clean.sources[-1]) if name in early else whole[name] for name in keep]


def _linear_values(model: HookedModel, clean: Clean, changes: Changes, entry: Entry) -> Hooks:
    """Return edits that put the values at the changed positions in at the entry's `linear_hooks`.

    A product of each direction with the weights, not of each position; nothing if an edit comes in between.
    """
    change, row, position = changes.places
    names = entry.linear_hooks(model.config)
    if not names or any(comes_after(names[0], hook) for hook in hooks_after(model.hooks, entry.edited)):
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
) -> tuple[Float[Array, "3 n"], Float[Array, "n batch length d_model"], Float[Array, "n batch length d_vocab"]]:
    """Return the three effects, and the changes of the final stream and of the logits at the last positions."""
    moved = final - clean.final
    rows = moved.reshape(-1, moved.shape[-1])
    logits = jnp.matmul(rows, W_U.astype(rows.dtype), preferred_element_type=jnp.float32)
    logits = logits.reshape(*moved.shape[:-1], -1)
    moved = moved.astype(jnp.float32)
    mean = jnp.einsum("nbsd,bsd->nbs", moved, clean.expected)
    kl = kl_of_changes(logits - mean[..., None], clean.logprobs)

    def token_change(ids: Int[Array, "batch positions"]) -> Array:
        columns = jnp.broadcast_to(W_U.T[ids], moved.shape[1:])
        return jnp.einsum("nbsd,bsd->nbs", moved, columns) - mean - kl

    measured = (
        (kl, weights.real),
        (-token_change(weights.targets), weights.loss),
        (token_change(weights.next_ids), weights.last),
    )
    effects = jnp.stack([jnp.einsum("nbs,bs->n", value, weight) for value, weight in measured])
    return effects, moved, logits


def kl_of_changes(
    change: Float[Array, "n batch length d_vocab"], logprobs: Float[Array, "batch length d_vocab"]
) -> Float[Array, "n batch length"]:
    """Return the KL divergence of a changed next-token distribution from the model's own, without cancellation.

    KL = log E[exp(c)] = log(1 + E[exp(c) - 1 - c]),  E over the model's own distribution; no term is negative

    Args:
        change: c, changes of the logits whose mean E[c] is 0.
    """
    mean_excess = jnp.sum(jnp.exp(logprobs) * _excess(change), axis=-1)
    kl, exact = jnp.log1p(mean_excess), jnp.isfinite(mean_excess)

    def with_large_ones() -> Array:
        whole = jax.nn.logsumexp(change + logprobs, axis=-1)
        return jnp.where(exact, kl, jnp.maximum(whole, 0))

    return jax.lax.cond(exact.all(), lambda: kl, with_large_ones)  # a second pass over the vocabulary, rarely needed


def _excess(x: Array) -> Array:
    """Return exp(x) - 1 - x, its series where the difference would cancel; infinity where x is `LARGE`."""
    terms = jnp.full_like(x, 1 / math.factorial(10))
    for n in range(9, 1, -1):
        terms = terms * x + 1 / math.factorial(n)
    return jnp.where(jnp.abs(x) < 0.5, x * x * terms, jnp.where(x < LARGE, jnp.exp(x) - 1 - x, jnp.inf))

"""Passes with values of a clean run patched into a corrupted one: many places of all layers at once.

The places are spread over the devices of this process. Metrics are compiled with the unembedding, except functions,
which get one pair's logits at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinymodel_jax.analysis.effects.metrics import Kind, Measured, Weights, value_from_logits, value_of_function
from tinymodel_jax.block_order import final_stream, stream_before
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.model.forward import HookedModel, forward
from tinymodel_jax.runtime.compilation import fast_jit
from tinymodel_jax.runtime.rows import RowDevices

MEMORY = 2**28
"""Bytes that the largest arrays of the passes that run at once may take."""
HEAD_AXIS = {f"attn.hook_{name}": 2 for name in "qkvz"} | {"attn.hook_attn_scores": 1, "attn.hook_pattern": 1}


class Pair(NamedTuple):
    """A pair of prompts, padded to a compiled length, and what is measured."""

    clean: Int[np.ndarray, "1 seq"]
    corrupted: Int[np.ndarray, "1 seq"]
    length: int
    weights: Weights
    """Of the clean prompt."""
    tokens: Int[np.ndarray, "1 2"] | None


def patched_values(
    model: HookedModel,
    devices: RowDevices,
    pair: Pair,
    measured: Measured,
    kind: str,
    places: Int[np.ndarray, "n axes"],
    at_most: int,
) -> Float[np.ndarray, "n_layers n"]:
    """Return the metric of a pair after patching each place of each layer.

    Args:
        model: as `devices.shared` returns it.
        at_most: number of places for which programs are made; more run one after the other.
    """
    limit = _places_at_once(model.config, pair.clean.shape[1], measured)
    at_once = devices.n * min(limit, -(-at_most // devices.n))
    prompts = jnp.asarray(pair.clean), jnp.asarray(pair.corrupted)
    found = [np.zeros((model.config.n_layers, 0))]
    for start in range(0, len(places), at_once):
        chunk = places[start : start + at_once]
        padded = np.concatenate([chunk, np.repeat(chunk[:1], at_once - len(chunk), axis=0)])
        streams = _patched_streams(model, *prompts, devices.rows(padded), kind=kind, devices=devices)
        found.append(np.stack([_values(model, layer, pair, measured) for layer in streams])[:, : len(chunk)])
    return np.concatenate(found, axis=1)


@partial(fast_jit, static_argnames=("kind", "devices"))
def _patched_streams(
    model: HookedModel,
    clean: Int[Array, "1 seq"],
    corrupted: Int[Array, "1 seq"],
    places: Int[Array, "n axes"],
    *,
    kind: str,
    devices: RowDevices,
) -> tuple[Float[Array, "n seq d_model"], ...]:
    """Return the final residual streams of each layer's patches."""
    return devices.separately(partial(_streams, kind=kind))((model, clean, corrupted), places)


def _streams(
    shared: tuple[HookedModel, Array, Array], places: Int[Array, "n axes"], *, kind: str
) -> tuple[Float[Array, "n seq d_model"], ...]:
    model, clean, corrupted = shared
    names = [f"blocks.{layer}.{kind}" for layer in range(model.config.n_layers)]
    kept = sorted({*names, *map(stream_before, names)})
    good, bad = (model.run(ids, kept)[1] for ids in (clean, corrupted))
    head = HEAD_AXIS.get(kind)
    axes = [1] if head is None else [head, 1 if head == 2 else 2][: places.shape[1]]

    def patched(name: str) -> Array:
        def one(place: Array) -> Array:
            shape = good[name].shape
            chosen = jnp.ones(shape, bool)
            for axis, at in zip(axes, place, strict=True):
                chosen &= jax.lax.broadcasted_iota(jnp.int32, shape, axis) == at
            value = jnp.where(chosen, good[name], bad[name])
            return model.resume_with_value(name, value, bad[stream_before(name)], corrupted)[0]

        return jax.lax.map(one, places, batch_size=len(places))

    return tuple(map(patched, names))


def values_of_both(model: HookedModel, pair: Pair, measured: Measured) -> Float[np.ndarray, "2"]:
    """Return the metric of the clean and of the corrupted run."""
    final = final_stream(model.config.n_layers)
    streams = [forward(model, ids, keep=(final,), output="none")[1][final] for ids in (pair.clean, pair.corrupted)]
    return _values(model, jnp.concatenate(streams), pair, measured)


def _values(
    model: HookedModel, streams: Float[Array, "n seq d_model"], pair: Pair, measured: Measured
) -> Float[np.ndarray, " n"]:
    """Return the metric for each of several final streams of one pair."""
    if measured.function is None:
        tokens = None if pair.tokens is None else jnp.asarray(pair.tokens)
        return np.asarray(_named_values(model, streams, pair.weights, tokens, kind=measured.kind), np.float64)
    ids = jnp.asarray(pair.clean[:, : pair.length])
    of_one = (one[None] for logits in _on_one_device(_logits(model, streams)) for one in logits[:, : pair.length])
    return np.array([float(value_of_function(measured.function, one, ids)) for one in of_one])


def _on_one_device(array: Array) -> Iterator[Array]:
    """Yield the parts of an array that is spread over devices along its first axis, in order, on the first device."""
    parts = [part for part in array.addressable_shards if part.replica_id == 0]
    for part in sorted(parts, key=lambda part: part.index[0].start or 0):
        yield jax.device_put(part.data, jax.local_devices()[0])


@fast_jit
def _logits(model: HookedModel, streams: Float[Array, "n seq d_model"]) -> Float[Array, "n seq d_vocab"]:
    return model.unembed(streams)


@partial(fast_jit, static_argnames=("kind",))
def _named_values(
    model: HookedModel,
    streams: Float[Array, "n seq d_model"],
    weights: Weights,
    tokens: Int[Array, "1 2"] | None,
    *,
    kind: Kind,
) -> Float[Array, " n"]:
    """Return a metric that is not a function; where it reads the last position, only that one is unembedded."""
    if kind != "loss":
        last = jnp.argmax(weights.last, axis=1)
        streams = streams[:, last]
        real, loss, at_last, targets = (x[:, last] for x in weights[:4])
        weights = Weights(real, loss, at_last, targets, weights.next_ids)
    logits = model.unembed(streams)
    return jax.vmap(lambda one: value_from_logits(kind, one[None], weights, tokens))(logits)


def _places_at_once(config: ModelConfig, seq: int, measured: Measured) -> int:
    """Return how many passes of one row fit in `MEMORY`, by what a block keeps of it: scores, neurons, streams."""
    whole = measured.kind in ("loss", "function")
    largest = max(2 * config.n_heads * seq + config.d_mlp + 4 * config.d_model, config.d_vocab if whole else 0)
    return max(1, MEMORY // (4 * seq * largest))

"""What is written to the residual stream of a frozen pass, and how much each source adds to what is read later.

A *source* is one thing that is written: a token's embedding, a position's embedding, a bias, an active feature at a
position, a dictionary's error at a position. A *reading* is the product of a direction with the stream, or with the
output of attention or an MLP, at one position. `contributions` divides readings among all sources. They are direct:
through residual connections, attention with its frozen patterns, and skip connections, but not through other features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tinymodel_jax.analysis.circuits.frozen import FrozenDictionary, FrozenPass, acting_only, biases
from tinymodel_jax.runtime.compilation import fast_jit

SOURCE = np.dtype(
    [("kind", "U8"), ("site", "U24"), ("layer", "i4"), ("position", "i4"), ("feature", "i4"), ("value", "f8"),
     ("bias", "f8")]
)  # fmt: skip
"""Fields of a source: `kind` is "token", "position", "bias", "feature" or "error", or "" for padding."""

TOGETHER = 64
"""Readings that one compiled call divides."""

PARTS = ("before_attn", "heads", "attn", "before_mlp", "mlp")
"""Where a layer can be read: the stream before its attention, the outputs of all heads before W_O, the output of the
attention, the stream before the MLP, the output of the MLP."""


class Place(NamedTuple):
    """Where something is read."""

    layer: int
    """n_layers, with "before_attn", for the final residual stream."""
    part: str
    """One of `PARTS`."""

    @property
    def number(self) -> int:
        """A number that grows in the order of the forward pass."""
        return len(PARTS) * self.layer + PARTS.index(self.part)


def encoder_place(dictionary: FrozenDictionary) -> Place:
    """Return the place that a dictionary's encoder reads."""
    return Place(dictionary.layer, "attn" if dictionary.part == "attn" else "before_mlp")


def source_table(frozen: FrozenPass) -> np.ndarray:
    """Return the sources of a frozen pass, of dtype `SOURCE`, in the order of the columns of `contributions`."""
    n, length = len(frozen.tok_ids), int(frozen.length)
    positions = np.where(np.arange(n) < length, np.arange(n), -1)
    tables = [
        _rows(n, "token", "hook_embed", -1, positions, np.where(positions < 0, -1, np.asarray(frozen.tok_ids))),
        _rows(n, "position", "hook_pos_embed", -1, positions, np.full(n, -1)),
    ]
    for layer in range(frozen.config.n_layers):
        tables.append(_rows(1, "bias", f"blocks.{layer}.attn.b_O", layer, np.full(1, -1), np.full(1, -1)))
        for dictionary in frozen.of_layer(layer):
            tables.extend(_dictionary_sources(dictionary, positions))
    return np.concatenate(tables)


def _dictionary_sources(dictionary: FrozenDictionary, positions: np.ndarray) -> Iterator[np.ndarray]:
    tag, layer = dictionary.tag, dictionary.layer
    active, where = np.asarray(dictionary.active), np.asarray(dictionary.where)
    features = np.asarray(dictionary.features)[where]
    table = _rows(where.size, "feature", tag, layer, np.repeat(positions, where.shape[1]), features.ravel())
    table["value"], table["bias"] = np.asarray(dictionary.acts).ravel(), np.asarray(dictionary.b_enc)[where].ravel()
    table[~active.ravel()] = np.zeros((), SOURCE)
    yield table
    errors = np.where(np.asarray(dictionary.error).any(axis=1), positions, -1)
    yield _rows(len(positions), "error", tag, layer, errors, np.full(len(positions), -1))
    yield _rows(1, "bias", f"{tag} b_dec", layer, np.full(1, -1), np.full(1, -1))


def _rows(n: int, kind: str, site: str, layer: int, positions: np.ndarray, features: np.ndarray) -> np.ndarray:
    table = np.zeros(n, SOURCE)
    table["kind"], table["site"], table["layer"] = kind, site, layer
    table["position"], table["feature"], table["value"] = positions, features, 1
    if kind != "bias":
        table[positions < 0] = np.zeros((), SOURCE)
    return table


def contributions(
    frozen: FrozenPass,
    directions: Float[np.ndarray, "b width"],
    positions: Int[np.ndarray, " b"],
    place: Place,
    *,
    responding: bool = False,
) -> Float[np.ndarray, "b sources"]:
    """Return what each source adds to the readings of directions at positions; 0 for sources after the place.

    Args:
        responding: False gives direct effects: the features in between keep their activations, and the sum over sources
            is the reading. True gives total effects: active features respond linearly to what they read, so the sum
            over all sources except features, plus that of the encoders' biases, is the reading.
    """
    directions = np.asarray(directions, frozen.final.dtype)
    found = []
    for start in range(0, len(directions), TOGETHER):
        some, where = directions[start : start + TOGETHER], positions[start : start + TOGETHER]
        missing = TOGETHER - len(some)
        some, where = np.pad(some, ((0, missing), (0, 0))), np.pad(where, (0, missing)).astype(np.int32)
        rows = _contributions(frozen, some, where, np.int32(place.number), np.bool_(responding))
        found.append(np.asarray(rows)[: TOGETHER - missing])
    return np.concatenate(found)


@fast_jit
def _contributions(
    frozen: FrozenPass,
    directions: Float[Array, "b width"],
    positions: Int[Array, " b"],
    place: Int[Array, ""],
    responding: Bool[Array, ""],
) -> Float[Array, "b sources"]:
    """Return `contributions`. Everything but shapes is traced, so that one program serves a whole graph."""

    def reading(g: Array, layer: int, part: str) -> Array:
        return g.at[jnp.arange(len(g)), positions].add(jnp.where(place == Place(layer, part).number, directions, 0))

    n_layers = frozen.config.n_layers
    nothing = jnp.zeros((len(directions), *frozen.embed.shape), directions.dtype)
    g, columns = reading(nothing, n_layers, "before_attn"), []  # the last sources first
    for layer in reversed(range(n_layers)):

        def through(g: Array, layer: int = layer) -> tuple[list[Array], Array]:
            return _through_layer(frozen, layer, g, lambda g, part: reading(g, layer, part), responding)

        def skipped(g: Array, through: Any = through) -> tuple[list[Array], Array]:
            nothing, _ = jax.eval_shape(through, g)
            return [jnp.zeros(column.shape, column.dtype) for column in nothing], g

        of_layer, g = jax.lax.cond(place > Place(layer, "before_attn").number, through, skipped, g)
        columns += of_layer
        g = reading(g, layer, "before_attn")
    columns += [jnp.einsum("bsd,sd->bs", g, embedding) for embedding in (frozen.pos_embed, frozen.embed)]
    return jnp.concatenate(columns[::-1], axis=1)


def _through_layer(
    frozen: FrozenPass, layer: int, g: Array, reading: Callable[[Array, str], Array], responding: Array
) -> tuple[list[Array], Array]:
    """Return the columns of a layer's sources, the last first, and the gradient before the layer.

    Args:
        g: gradient of the readings with respect to the stream after the layer.
        reading: gradient, part of the layer -> the gradient with the directions added, if they read there.
    """

    def through_features(dictionary: FrozenDictionary, g: Array) -> Array:
        return jax.lax.cond(responding, partial(_through_features, dictionary), jnp.zeros_like, g)

    transcoder, sae = frozen.at("mlp", layer), frozen.at("attn", layer)
    assert transcoder is not None
    of_mlp = reading(g, "mlp")
    columns = _of_dictionary(transcoder, of_mlp)
    g = reading(g, "before_mlp")
    g = g + through_features(transcoder, of_mlp)
    if transcoder.W_skip is not None:
        g = g + acting_only(transcoder, of_mlp) @ transcoder.W_skip.T
    of_attn = reading(g, "attn")
    if sae is not None:  # what it predicts is written, and its encoder alone reads the attention's output
        columns += _of_dictionary(sae, g)
        of_attn = reading(through_features(sae, g), "attn")
    columns.append(_of_bias(frozen.everywhere(frozen.b_O[layer]), of_attn))
    values = jnp.einsum("bsd,hkd->bshk", of_attn, frozen.W_O[layer])
    values = reading(values.reshape(g.shape), "heads").reshape(values.shape)
    values = jnp.einsum("hst,bshk->bthk", frozen.patterns[layer], values)
    return columns, g + jnp.einsum("bthk,hdk->btd", values, frozen.W_V[layer])


def _of_dictionary(dictionary: FrozenDictionary, g: Array) -> list[Array]:
    """Return the columns of b_dec, the errors and the features."""
    features = jnp.einsum("bsd,snd->bsn", g, dictionary.W_dec[dictionary.where]) * dictionary.acts
    errors = jnp.einsum("bsd,sd->bs", g, dictionary.error)
    return [_of_bias(biases(dictionary), g), errors, features.reshape(len(g), -1)]


def _of_bias(written: Array, g: Array) -> Array:
    return jnp.einsum("bsd,sd->b", g, written)[:, None]


def _through_features(dictionary: FrozenDictionary, g: Array) -> Array:
    """Return the gradient of a dictionary's prediction, through its active features."""
    of_acts = jnp.where(dictionary.active, jnp.einsum("bsd,snd->bsn", g, dictionary.W_dec[dictionary.where]), 0)
    return jnp.einsum("bsn,snd->bsd", of_acts, dictionary.W_enc[dictionary.where])

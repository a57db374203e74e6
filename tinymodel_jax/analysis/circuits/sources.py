"""What is written to the residual stream of a frozen pass, and how much each source adds to what is read later.

A *source* is one thing that is written: a token's embedding, a position's embedding, a bias, an active feature at a
position, a dictionary's error at a position. A *reading* is the product of a direction with the stream, or with the
output of attention or an MLP, at one position. `contributions` divides readings among all sources. They are direct:
through residual connections, attention with its frozen patterns, and skip connections, but not through other features.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinymodel_jax.analysis.circuits.frozen import FrozenDictionary, FrozenPass
from tinymodel_jax.runtime.compilation import fast_jit

SOURCE = np.dtype(
    [("kind", "U8"), ("site", "U24"), ("layer", "i4"), ("position", "i4"), ("feature", "i4"), ("value", "f8"),
     ("bias", "f8")]
)  # fmt: skip
"""Fields of a source: `kind` is "token", "position", "bias", "feature" or "error", or "" for padding."""


class Place(NamedTuple):
    """Where something is read: the output of a layer's attention or MLP, or the stream before one of them."""

    layer: int
    """n_layers for the final residual stream, which is before the attention of a layer that does not exist."""
    at: str
    """"before_attn", "heads" (outputs of all heads, before W_O), "attn", "before_mlp" or "mlp"."""


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


@partial(fast_jit, static_argnames=("place", "responding"))
def contributions(
    frozen: FrozenPass,
    directions: Float[Array, "b width"],
    positions: Int[Array, " b"],
    *,
    place: Place,
    responding: bool = False,
) -> Float[Array, "b sources"]:
    """Return what each source adds to the readings of directions at positions.

    The columns are the first ones of `source_table`; sources after `place` have none.

    Args:
        responding: False gives direct effects: the features in between keep their activations, and the sum over sources
            is the reading. True gives total effects: active features respond linearly to what they read, so the sum
            over all sources except features, plus that of the encoders' biases, is the reading.
    """
    at = positions[:, None] == jnp.arange(frozen.embed.shape[0], dtype=positions.dtype)
    g = jnp.where(at[..., None], directions[:, None], 0)
    layer, columns = place.layer, []  # the last sources first
    if place.at == "mlp":
        columns, g = _before_mlp(frozen, layer, g, jnp.zeros_like(g), responding)
    elif place.at == "attn":
        columns, g = [_of_bias(frozen, frozen.b_O[layer], g)], unattended(frozen, layer, g)
    elif place.at == "heads":
        columns, g = [jnp.zeros_like(g[:, :1, 0])], _unmixed(frozen, layer, _per_head(frozen, g))
    if place.at in ("mlp", "before_mlp"):
        more, g = _before_attention(frozen, layer, g, responding)
        columns += more
    for below in reversed(range(layer)):
        more, g = _before_mlp(frozen, below, g, g, responding)
        columns += more
        more, g = _before_attention(frozen, below, g, responding)
        columns += more
    columns += [jnp.einsum("bsd,sd->bs", g, embedding) for embedding in (frozen.pos_embed, frozen.embed)]
    return jnp.concatenate(columns[::-1], axis=1)


def _before_mlp(frozen: FrozenPass, layer: int, g: Array, around: Array, responding: bool) -> tuple[list[Array], Array]:
    """Return the columns of an MLP's sources, and the gradient before the MLP: `around` it, and through it."""
    transcoder = frozen.at("mlp", layer)
    assert transcoder is not None
    if responding:
        around = around + _through_features(transcoder, g)
    if transcoder.W_skip is not None:
        around = around + g @ transcoder.W_skip.T
    return _of_dictionary(frozen, transcoder, g), around


def _before_attention(frozen: FrozenPass, layer: int, g: Array, responding: bool) -> tuple[list[Array], Array]:
    """Return the columns of what attention writes, and the gradient before the attention."""
    sae = frozen.at("attn", layer)
    if sae is None:
        return [_of_bias(frozen, frozen.b_O[layer], g)], g + unattended(frozen, layer, g)
    columns = _of_dictionary(frozen, sae, g)
    if not responding:  # its features, b_dec and error are all that is written
        return [*columns, jnp.zeros_like(g[:, :1, 0])], g
    read = _through_features(sae, g)
    return [*columns, _of_bias(frozen, frozen.b_O[layer], read)], g + unattended(frozen, layer, read)


def _of_dictionary(frozen: FrozenPass, dictionary: FrozenDictionary, g: Array) -> list[Array]:
    """Return the columns of b_dec, the errors and the features."""
    features = jnp.einsum("bsd,snd->bsn", g, dictionary.W_dec[dictionary.where]) * dictionary.acts
    errors = jnp.einsum("bsd,sd->bs", g, dictionary.error)
    return [_of_bias(frozen, dictionary.b_dec, g), errors, features.reshape(len(g), -1)]


def _of_bias(frozen: FrozenPass, bias: Array, g: Array) -> Array:
    return jnp.einsum("bsd,sd->b", g, frozen.everywhere(bias))[:, None]


def _through_features(dictionary: FrozenDictionary, g: Array) -> Array:
    """Return the gradient of a dictionary's prediction, through its active features."""
    of_acts = jnp.where(dictionary.active, jnp.einsum("bsd,snd->bsn", g, dictionary.W_dec[dictionary.where]), 0)
    return jnp.einsum("bsn,snd->bsd", of_acts, dictionary.W_enc[dictionary.where])


def unattended(frozen: FrozenPass, layer: int, g: Float[Array, "b s d"]) -> Float[Array, "b t d"]:
    """Return the gradient of `attended`: `g` times the heads' output matrices, patterns and value matrices."""
    return _unmixed(frozen, layer, jnp.einsum("bsd,hkd->bhsk", g, frozen.W_O[layer]))


def _unmixed(frozen: FrozenPass, layer: int, z: Float[Array, "b h s k"]) -> Float[Array, "b t d"]:
    values = jnp.einsum("hst,bhsk->bhtk", frozen.patterns[layer], z)
    return jnp.einsum("bhtk,hdk->btd", values, frozen.W_V[layer])


def _per_head(frozen: FrozenPass, g: Float[Array, "b s width"]) -> Float[Array, "b h s k"]:
    return jnp.swapaxes(g.reshape(*g.shape[:2], frozen.config.n_heads, -1), 1, 2)

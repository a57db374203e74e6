"""The frozen pass: one prompt with its attention patterns, active features and errors held fixed.

There is no layer norm, so with the patterns fixed the residual stream is a linear function of what is written to it:
embeddings, biases, each feature's activation times its decoder row, and the errors of the dictionaries. The
pre-activation of a feature is a linear function of the stream.

A `FrozenPass` contains everything that these sums are made of. Streams and activations are computed again in the chosen
number format, so that the sums hold to its rounding. Patterns, active features and the outputs of MLPs are those of the
model's own pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.forward import forward
from tinymodel_jax.model.hook_points import as_names
from tinymodel_jax.model.padding import check_tok_ids, pad_to_bucket
from tinymodel_jax.runtime.compilation import fast_jit

NEURONS = "neurons"
"""In place of dictionaries: the features are the MLPs' neurons, and there are no errors."""
Part = Literal["attn", "mlp"]
Precision = Literal["float32", "float64"]


@struct.dataclass
class FrozenDictionary:
    """The active features of one dictionary on one prompt, and its error.

    Axes: `u` features active at some position, `n` features active at one position, `s` positions; all padded.
    """

    tag: str = struct.field(pytree_node=False)
    layer: int = struct.field(pytree_node=False)
    part: Part = struct.field(pytree_node=False)
    """Whose output it predicts."""
    neurons: bool = struct.field(pytree_node=False)
    """Whether it is an MLP itself, which has no error."""
    features: Int[Array, " u"]
    """Numbers of the features in the dictionary; -1 in the padding."""
    W_enc: Float[Array, "u d"]
    b_enc: Float[Array, " u"]
    """The pre-activation of a zero input."""
    W_dec: Float[Array, "u d"]
    b_dec: Float[Array, " d"]
    W_skip: Float[Array, "d d"] | None
    where: Int[Array, "s n"]
    """The active features of each position, as indices into `features`."""
    active: Bool[Array, "s n"]
    """Which entries of `where` are not padding."""
    acts: Float[Array, "s n"]
    """Their activations, which equal their pre-activations; 0 in the padding."""
    error: Float[Array, "s d"]
    """The model's value less the prediction; 0 where that is only the rounding of the model's own pass."""


@struct.dataclass
class FrozenPass:
    """The frozen pass of one prompt. Axes: `l` layers, `h` heads, `s` and `t` positions (padded), `d`, `k` d_head."""

    config: ModelConfig = struct.field(pytree_node=False)
    length: Int[Array, ""]
    """Tokens of the prompt; everything that is written at the other positions is 0."""
    tok_ids: Int[Array, " s"]
    embed: Float[Array, "s d"]
    pos_embed: Float[Array, "s d"]
    patterns: Float[Array, "l h s t"]
    W_V: Float[Array, "l h d k"]
    W_O: Float[Array, "l h k d"]
    b_O: Float[Array, "l d"]
    dictionaries: tuple[FrozenDictionary, ...]
    """In the order of the forward pass: one of each layer's MLP, and those of attention outputs."""
    final: Float[Array, "s d"]
    """The final residual stream."""

    def of_layer(self, layer: int) -> tuple[FrozenDictionary, ...]:
        """Return the dictionaries of a layer, in the order of the forward pass."""
        return tuple(d for d in self.dictionaries if d.layer == layer)

    def everywhere(self, bias: Float[Array, " d"]) -> Float[Array, "s d"]:
        """Return a bias at each of the prompt's positions."""
        return jnp.where(jnp.arange(len(self.embed))[:, None] < self.length, bias, 0)

    def at(self, part: Part, layer: int) -> FrozenDictionary | None:
        """Return the dictionary of the output of a layer's attention or MLP."""
        return next((d for d in self.dictionaries if (d.part, d.layer) == (part, layer)), None)


@contextlib.contextmanager
def exact(dtype: Precision) -> Iterator[None]:
    """Compute in a number format inside the block: float64 needs JAX's switch, float32 full matrix products."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        yield


def frozen_pass(
    lm: TinyModel, prompt: Any, dictionaries: str | Iterable[str] | None = None, dtype: Precision = "float64"
) -> FrozenPass:
    """Run the model on one prompt, and freeze its patterns, active features and errors.

    Args:
        prompt: a text, or token ids (seq,) or (1, seq).
        dictionaries: tags of the dictionaries that divide values into features: transcoders of MLPs (`M`, `T`) and SAEs
            of attention outputs (`A`). Layers without a tag of a transcoder take `M`. "neurons" divides the MLPs into
            their neurons instead. Dictionaries that are spliced into the model are always included.
        dtype: number format of all values and sums, "float32" or "float64".

    Raises:
        ValueError: the prompt is not one row of token ids, a layer has no transcoder, or the value that a dictionary
            reads is not a linear function of what is written to the residual stream.
    """
    if dtype not in ("float32", "float64"):
        raise ValueError(f"circuits: dtype={dtype!r}; it must be 'float32' or 'float64'.")
    ids = check_tok_ids(lm.to_tokens(prompt), lm.config)
    if len(ids) != 1:
        raise ValueError(f"circuits: got {len(ids)} prompts; give one.")
    sites = _sites(lm, dictionaries)
    padded, length = pad_to_bucket(ids, lm.config)
    hooks = ("attn.hook_pattern", "hook_attn_out", "mlp.hook_post", "hook_mlp_out")
    keep = tuple(f"blocks.{layer}.{hook}" for layer in range(lm.config.n_layers) for hook in hooks)
    _, kept = forward(lm.hooked(), padded, keep=keep, output="none")
    acts = {name: np.asarray(value[0], np.float32) for name, value in kept.items()}
    with exact(dtype):
        found = [_active(lm, padded, length, acts, *site, dtype) for site in sites]
        return _with_values(_unvalued(lm, np.asarray(padded[0]), length, acts, tuple(found), dtype))


def _sites(lm: TinyModel, dictionaries: str | Iterable[str] | None) -> list[tuple[Part, int, str]]:
    """Return the part, layer and tag of each dictionary, in the order of the forward pass."""
    neurons = dictionaries == NEURONS
    given = [] if dictionaries is None or neurons else as_names(dictionaries)
    found: dict[tuple[int, Part], str] = {}
    for site in [Site.whole(tag, "circuits: ") for tag in (*given, *lm.spliced)]:
        if site.kind not in ("M", "T", "A"):
            raise ValueError(
                f"circuits: {site.tag!r} cuts the residual stream, or does not read a linear function of it; use "
                "transcoders of MLPs (M, T) and SAEs of attention outputs (A), and splice no others."
            )
        part: Part = "attn" if site.kind == "A" else "mlp"
        if found.setdefault((site.layer, part), site.tag) != site.tag:
            raise ValueError(f"circuits: {found[site.layer, part]} and {site.tag} predict the same value; use one.")
    for layer in range(lm.config.n_layers):
        found.setdefault((layer, "mlp"), NEURONS if neurons else f"M{layer}")
    return [(part, layer, tag) for (layer, part), tag in sorted(found.items())]


def _active(
    lm: TinyModel,
    padded: np.ndarray,
    length: int,
    acts: dict[str, np.ndarray],
    part: Part,
    layer: int,
    tag: str,
    dtype: Precision,
) -> FrozenDictionary:
    """Return a dictionary's active features, with the model's value in place of `error`, and without `acts`."""
    neurons = tag == NEURONS
    if neurons:
        tag, found = f"L{layer} MLP", acts[f"blocks.{layer}.mlp.hook_post"]
    else:
        found = np.asarray(lm[tag](padded)[0], np.float32)
    active = found > 0
    active[length:] = False
    used = np.flatnonzero(active.any(axis=0))
    counts = active.sum(axis=1)
    n_used, n_active = _rounded_up(len(used), 64), _rounded_up(int(counts.max()), 8)
    if neurons:
        W_enc, b_enc, W_dec, b_dec, W_skip = _neurons(lm.params[f"blocks_{layer}"]["mlp"], used)
    else:
        W_enc, b_enc, W_dec, b_dec, W_skip = linear_parts(lm[tag].dictionary, used)
    where = np.zeros((len(found), n_active), np.int32)
    order = np.argsort(~active[:, used], axis=1, kind="stable")[:, :n_active]
    where[:, : order.shape[1]] = order
    value = acts[f"blocks.{layer}.{'hook_attn_out' if part == 'attn' else 'hook_mlp_out'}"].copy()
    value[length:] = 0
    rows = (0, n_used - len(used))
    return FrozenDictionary(
        tag=tag,
        layer=layer,
        part=part,
        neurons=neurons,
        features=jnp.asarray(np.pad(used.astype(np.int32), rows, constant_values=-1)),
        W_enc=jnp.asarray(np.pad(W_enc, (rows, (0, 0))), dtype),
        b_enc=jnp.asarray(np.pad(b_enc, rows), dtype),
        W_dec=jnp.asarray(np.pad(W_dec, (rows, (0, 0))), dtype),
        b_dec=jnp.asarray(b_dec, dtype),
        W_skip=None if W_skip is None else jnp.asarray(W_skip, dtype),
        where=jnp.asarray(where),
        active=jnp.asarray(np.arange(n_active) < counts[:, None]),
        acts=jnp.zeros(where.shape, dtype),
        error=jnp.asarray(value, dtype),
    )


def _neurons(mlp: Any, used: np.ndarray) -> tuple[Any, ...]:
    mlp = {name: np.asarray(array, np.float64) for name, array in mlp.items()}
    return mlp["W_in"][:, used].T, mlp["b_in"][used], mlp["W_out"][used], mlp["b_out"], None


def linear_parts(dictionary: Dictionary, used: np.ndarray) -> tuple[Any, ...]:
    """Return W_enc, b_enc, W_dec, b_dec and W_skip of features that are active: their activations are linear."""
    params, config = dictionary.params, dictionary.config
    W_enc = np.asarray(params["W_enc"][:, used], np.float64).T
    b_dec = np.asarray(params["b_dec"], np.float64)
    gated = config.architecture == "gated"
    if gated:
        W_enc = W_enc * np.exp(np.asarray(params["r_mag"], np.float64)[used])[:, None]
    b_enc = np.asarray(params["b_mag" if gated else "b_enc"], np.float64)[used]
    if config.subtract_b_dec:
        b_enc = b_enc - W_enc @ b_dec
    W_skip = np.asarray(params["W_skip"], np.float64) if config.skip else None
    return W_enc, b_enc, np.asarray(params["W_dec"][used], np.float64), b_dec, W_skip


def _unvalued(
    lm: TinyModel,
    ids: np.ndarray,
    length: int,
    acts: dict[str, np.ndarray],
    found: tuple[FrozenDictionary, ...],
    dtype: Precision,
) -> FrozenPass:
    """Return the pass without the final stream."""
    real = (np.arange(len(ids)) < length)[:, None]
    layers = range(lm.config.n_layers)
    attn = [lm.params[f"blocks_{layer}"]["attn"] for layer in layers]
    embed = jnp.asarray(np.asarray(lm.params["W_E"], np.float32)[ids] * real, dtype)
    return FrozenPass(
        config=lm.config,
        length=jnp.array(length),
        tok_ids=jnp.asarray(ids),
        embed=embed,
        pos_embed=jnp.asarray(np.asarray(lm.params["W_pos"], np.float32)[: len(ids)] * real, dtype),
        patterns=jnp.asarray(np.stack([acts[f"blocks.{layer}.attn.hook_pattern"] for layer in layers]) * real, dtype),
        W_V=jnp.asarray(np.stack([a["W_V"] for a in attn]), dtype),
        W_O=jnp.asarray(np.stack([a["W_O"] for a in attn]), dtype),
        b_O=jnp.asarray(np.stack([a["b_O"] for a in attn]), dtype),
        dictionaries=found,
        final=jnp.zeros_like(embed),
    )


@fast_jit
def _with_values(frozen: FrozenPass) -> FrozenPass:
    """Compute the stream from what is written to it, and the activations and errors on the way."""
    stream, found = frozen.embed + frozen.pos_embed, []
    for layer in range(frozen.config.n_layers):
        written = attended(frozen, layer, stream) + frozen.everywhere(frozen.b_O[layer])
        sae, transcoder = frozen.at("attn", layer), frozen.at("mlp", layer)
        if sae is not None:
            found.append(_valued(frozen, sae, written))
            written = prediction(frozen, found[-1], written) + found[-1].error
        stream = stream + written
        assert transcoder is not None
        found.append(_valued(frozen, transcoder, stream))
        stream = stream + prediction(frozen, found[-1], stream) + found[-1].error
    return dataclasses.replace(frozen, dictionaries=tuple(found), final=stream)


def _valued(frozen: FrozenPass, dictionary: FrozenDictionary, read: Array) -> FrozenDictionary:
    valued = dataclasses.replace(dictionary, acts=encoded(dictionary, read))
    value = dictionary.error
    error = jnp.zeros_like(value) if dictionary.neurons else value - prediction(frozen, valued, read)
    size, whole = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (error, value))
    rounding = 16 * float(jnp.finfo(frozen.config.dtype).eps)
    return dataclasses.replace(valued, error=jnp.where(size > rounding * whole, error, 0))


def attended(frozen: FrozenPass, layer: int, stream: Float[Array, "s d"]) -> Float[Array, "s d"]:
    """Return what the heads of a layer write, without the bias."""
    values = jnp.einsum("td,hdk->htk", stream, frozen.W_V[layer])
    return jnp.einsum("hst,htk,hkd->sd", frozen.patterns[layer], values, frozen.W_O[layer])


def encoded(dictionary: FrozenDictionary, read: Float[Array, "s d"]) -> Float[Array, "s n"]:
    """Return the pre-activations of the active features, given what the encoder reads."""
    pre = jnp.einsum("sd,snd->sn", read, dictionary.W_enc[dictionary.where]) + dictionary.b_enc[dictionary.where]
    return jnp.where(dictionary.active, pre, 0)


def prediction(frozen: FrozenPass, dictionary: FrozenDictionary, read: Float[Array, "s d"]) -> Float[Array, "s d"]:
    """Return a dictionary's prediction, given what it reads."""
    written = jnp.einsum("sn,snd->sd", dictionary.acts, dictionary.W_dec[dictionary.where])
    written = written + frozen.everywhere(dictionary.b_dec)
    return written if dictionary.W_skip is None else written + read @ dictionary.W_skip


def _rounded_up(n: int, multiple: int) -> int:
    return max(-(-n // multiple), 1) * multiple

"""`frozen_pass`: run a model on a prompt, and freeze its patterns, active features and errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinymodel_jax.analysis.circuits.frozen import (
    FrozenDictionary,
    FrozenPass,
    Part,
    Precision,
    encoded,
    exact,
    prediction,
    run_frozen,
)
from tinymodel_jax.analysis.circuits.neurons import NEURONS, dictionary_at, is_neurons, neurons_tag
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.linear import require_linear_encoder, require_no_copy
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.forward import encode, forward
from tinymodel_jax.model.hook_points import as_names
from tinymodel_jax.model.padding import check_tok_ids, pad_to_bucket
from tinymodel_jax.runtime.compilation import fast_jit

_ROUNDING = 16 * float(np.finfo(np.float32).eps)
"""An error below this share of the model's value is the rounding of the model's own pass in float32."""


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
        ValueError: the prompt is not one row with a token, a layer has no transcoder, the value that a dictionary reads
            is not a linear function of what is written to the residual stream, or a spliced dictionary is not the
            attached one.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import circuits
        >>> lm = TinyModel("mini")
        >>> frozen = circuits.frozen_pass(lm, "The dog ran")
        >>> int(frozen.length), len(frozen.dictionaries)
        (4, 4)
    """
    if dtype not in ("float32", "float64"):
        raise ValueError(f"circuits: dtype={dtype!r}; it must be 'float32' or 'float64'.")
    ids = check_tok_ids(lm.to_tokens(prompt), lm.config)
    if len(ids) != 1:
        raise ValueError(f"circuits: got {len(ids)} prompts; give one.")
    ids = ids[:, : int((ids != lm.config.pad_id).sum())]
    if not ids.size:
        raise ValueError(f"circuits: the prompt {prompt!r:.80} has no tokens; give a text, or ids that are not [PAD].")
    sites = _sites(lm, dictionaries)
    padded, length = pad_to_bucket(ids, lm.config)
    hooks = ("attn.hook_pattern", "hook_attn_out", "mlp.hook_post", "hook_mlp_out")
    keep = [f"blocks.{layer}.{hook}" for layer in range(lm.config.n_layers) for hook in hooks]
    keep += [lm[tag].dictionary.config.hook_in for _, _, tag in sites if not is_neurons(tag)]
    _, kept = forward(lm.hooked(), padded, keep=tuple(dict.fromkeys(keep)), output="none")
    acts = {name: np.asarray(value[0], np.float32) for name, value in kept.items()}
    with exact(dtype):
        found = [_active(lm, padded, length, acts, *site, dtype) for site in sites]
        unvalued = _unvalued(lm, np.asarray(padded[0]), length, acts, tuple(found), dtype)
        return _with_values(unvalued, exact_tags=tuple(tag for _, _, tag in sites if _is_written(lm, tag)))


def _sites(lm: TinyModel, dictionaries: str | Iterable[str] | None) -> list[tuple[Part, int, str]]:
    """Return the part, layer and tag of each dictionary, in the order of the forward pass."""
    only_neurons = dictionaries == NEURONS
    given = [] if dictionaries is None or only_neurons else as_names(dictionaries)
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
        found.setdefault((layer, "mlp"), neurons_tag(layer) if only_neurons else f"M{layer}")
    for tag in lm.spliced:
        _require_as_attached(lm, tag)
    for config in (lm[tag].dictionary.config for tag in found.values() if not is_neurons(tag)):
        require_linear_encoder(config, "circuits")
        require_no_copy(config, "circuits")
    return [(part, layer, tag) for (layer, part), tag in sorted(found.items())]


def _is_written(lm: TinyModel, tag: str) -> bool:
    """Whether the model writes the prediction itself, so that there is no error where the dictionary acts."""
    splice: Any = None if is_neurons(tag) else lm.hooked().hooks.get(lm[tag].dictionary.config.hook_out)
    return is_neurons(tag) or (tag in lm.spliced and not splice.include_error)


def _require_as_attached(lm: TinyModel, tag: str) -> None:
    dictionary = lm[tag].dictionary
    splice: Any = lm.hooked().hooks[dictionary.config.hook_out]
    same = splice.config == dictionary.config and all(
        a is b for a, b in zip(jax.tree.leaves(splice.params), jax.tree.leaves(dictionary.params), strict=True)
    )
    if not same:
        raise ValueError(
            f"circuits: the dictionary {tag} that is spliced into the model excludes other tokens than the "
            f"attached one or has other parameters; splice it as it is attached: lm.splice({tag!r})."
        )


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
    dictionary = dictionary_at(lm, tag)
    acting = (np.arange(padded.shape[1]) < length) & dictionary.config.acts_at(padded[0])
    found = acts[f"blocks.{layer}.mlp.hook_post"] if is_neurons(tag) else _activations(lm, padded, acts, tag)
    active = (found > 0) & acting[:, None]
    used = np.flatnonzero(active.any(axis=0))
    counts = active.sum(axis=1)
    n_used, n_active = _rounded_up(len(used), 64), _rounded_up(int(counts.max()), 8)
    W_enc, b_enc, W_dec, b_dec, W_skip = linear_parts(dictionary, used)
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
        features=jnp.asarray(np.pad(used.astype(np.int32), rows, constant_values=-1)),
        W_enc=jnp.asarray(np.pad(W_enc, (rows, (0, 0))), dtype),
        b_enc=jnp.asarray(np.pad(b_enc, rows), dtype),
        W_dec=jnp.asarray(np.pad(W_dec, (rows, (0, 0))), dtype),
        b_dec=jnp.asarray(b_dec, dtype),
        W_skip=None if W_skip is None else jnp.asarray(W_skip, dtype),
        acting=jnp.asarray(acting),
        where=jnp.asarray(where),
        active=jnp.asarray(np.arange(n_active) < counts[:, None]),
        acts=jnp.zeros(where.shape, dtype),
        error=jnp.asarray(value, dtype),
    )


def _activations(lm: TinyModel, padded: np.ndarray, acts: dict[str, np.ndarray], tag: str) -> np.ndarray:
    """Return the activations (s, n_features), also where the dictionary does not act."""
    dictionary = lm[tag].dictionary
    if tag in lm.spliced and not dictionary.config.is_transcoder:  # the kept value is the prediction
        return np.asarray(lm[tag](padded)[0])
    return np.asarray(encode(dictionary.params, dictionary.config, acts[dictionary.config.hook_in]))


def linear_parts(dictionary: Dictionary, used: np.ndarray) -> tuple[Any, ...]:
    """Return W_enc, b_enc, W_dec, b_dec and W_skip of features that are active: their activations are linear."""
    config = dictionary.config
    params = {name: np.asarray(array) for name, array in dictionary.params.items()}  # NumPy indexes without compiling
    W_enc, W_dec = params["W_enc"][:, used].T.astype(np.float64), params["W_dec"][used].astype(np.float64)
    b_dec = params["b_dec"].astype(np.float64)
    gated = config.architecture == "gated"
    if gated:
        W_enc = W_enc * np.exp(params["r_mag"][used].astype(np.float64))[:, None]
    b_enc = params["b_mag" if gated else "b_enc"][used].astype(np.float64)
    if config.subtract_b_dec:
        b_enc = b_enc - W_enc @ b_dec
    return W_enc, b_enc, W_dec, b_dec, params["W_skip"].astype(np.float64) if config.skip else None


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


@partial(fast_jit, static_argnames=("exact_tags",))
def _with_values(frozen: FrozenPass, *, exact_tags: tuple[str, ...]) -> FrozenPass:
    """Compute activations, errors and the final stream.

    Args:
        exact_tags: dictionaries without errors where they act.
    """

    def valued(dictionary: FrozenDictionary, read: Array) -> FrozenDictionary:
        """Return a dictionary in which the model's value stands for the error, with its activations and its error."""
        with_acts, value = dataclasses.replace(dictionary, acts=encoded(dictionary, read)), dictionary.error
        error = value - prediction(with_acts, read)
        size, whole = (jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (error, value))
        kept = size > _ROUNDING * whole
        if dictionary.tag in exact_tags:
            kept &= ~dictionary.acting[:, None]
        return dataclasses.replace(with_acts, error=jnp.where(kept, error, 0))

    final, found, _ = run_frozen(frozen, valued)
    return dataclasses.replace(frozen, dictionaries=tuple(found), final=final)


def _rounded_up(n: int, least: int) -> int:
    """Return the next of least x 1, 2, 3, 4, 6, 8, 12, 16, …, so that prompts share their compiled programs."""
    power = least
    while power < n:
        power *= 2
    return power * 3 // 4 if n <= power * 3 // 4 and power > 2 * least else power

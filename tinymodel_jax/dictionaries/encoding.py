"""What a sparse dictionary computes: pure functions of a parameter tree, for six architectures.

x     = (x - mean) / size                        if the input is normalized, else x itself
pre   = (x - b_dec if subtract_b_dec else x) @ W_enc + b_enc
acts  = relu: max(pre, 0)                        topk: relu of the k largest of a position
        jumprelu: pre where pre > max(threshold, 0)   batch_topk: the same with one threshold for all features
        gated: relu(x @ W_enc * exp(r_mag) + b_mag) where x @ W_enc + b_gate > 0
        groupmax: relu of the largest of each of k groups of neighbouring features
out   = acts @ W_dec + b_dec                     an SAE that normalizes its input: * size + mean
        (+ input @ W_skip)

A crosscoder is an SAE whose input is the concatenation of several hook points' values. In a cross-layer transcoder,
each layer's features read their own part of the input, and the entries of W_dec for earlier layers are zero
(`layers.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.layers import read, read_some, write

DictionaryParams = Mapping[str, Any]
Indices = Any
"""Features to compute: None for all, an int (drops the feature axis), or a slice, list or array of ints."""

LAYER_NORM_EPSILON = 1e-5
"""Added to the standard deviation. Source: SAELens."""


def param_shapes(config: DictionaryConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every parameter of a dictionary."""
    d_in, d_out, features = config.d_in, config.d_out, config.n_features
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in // config.n_layers, features)}
    shapes |= {"W_dec": (features, d_out), "b_dec": (d_out,)}
    if config.architecture == "gated":
        shapes |= {"b_gate": (features,), "b_mag": (features,), "r_mag": (features,)}
    else:
        shapes["b_enc"] = (features,)
    if config.architecture in ("jumprelu", "batch_topk"):
        shapes["threshold"] = (features,) if config.architecture == "jumprelu" else ()
    if config.skip:
        shapes["W_skip"] = (d_in, d_out)
    return shapes


def per_feature(config: DictionaryConfig) -> tuple[str, ...]:
    """Return the names of the encoder's parameters with one entry per feature, on the last axis."""
    own = ("W_enc", "b_enc", "b_gate", "b_mag", "r_mag")
    return (*own, "threshold") if config.architecture == "jumprelu" else own


def pre_activations(
    params: DictionaryParams, config: DictionaryConfig, x: Float[Array, "*batch d_in"], indices: Indices = None
) -> Float[Array, "..."]:
    """Return the encoder's linear output at the given features; for `gated`, without biases.

    With `normalize="constant_norm"`, an input of zeros stays as it is.
    """
    dtype = config.dtype
    x = x.astype(dtype)
    if config.normalize != "none":
        size, mean = size_and_mean(config, x)
        added = LAYER_NORM_EPSILON if config.normalize == "layer_norm" else 0
        x = (x - mean) / jnp.where(size + added > 0, size + added, 1)
    if config.subtract_b_dec:
        x = x - params["b_dec"].astype(dtype)
    columns = _columns(params["W_enc"], indices).astype(dtype)
    if indices is None:
        pre = read(x, columns)
    elif config.n_layers > 1:
        pre = read_some(x, columns, jnp.asarray(indices) // config.features_per_layer)
    else:
        pre = x @ columns
    return pre if config.architecture == "gated" else pre + _columns(params["b_enc"], indices).astype(dtype)


def size_and_mean(
    config: DictionaryConfig, x: Float[Array, "*batch d_in"]
) -> tuple[Float[Array, "*batch 1"], Float[Array, "*batch 1"]]:
    """Return what `normalize` divides an input by and subtracts from it before that.

    `layer_norm`: the standard deviation with Bessel's correction, and the mean. `constant_norm`: norm / sqrt(d_in), and
    0. Source: SAELens.
    """
    of_layer = config.normalize == "layer_norm"
    mean = jnp.mean(x, axis=-1, keepdims=True) if of_layer else jnp.zeros((*x.shape[:-1], 1), x.dtype)
    squares = jnp.sum(jnp.square(x - mean), axis=-1, keepdims=True) / max(config.d_in - of_layer, 1)
    positive = squares > 0  # the root's slope at 0 is infinite
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0), mean


def encode(
    params: DictionaryParams, config: DictionaryConfig, x: Float[Array, "*batch d_in"], indices: Indices = None
) -> Float[Array, "..."]:
    """Return the feature activations of `x`.

    With `indices`, only these features are computed, except for `topk` and `groupmax`, which compare features. Indices
    are not checked here; `resolve_indices` checks them outside of compiled code.
    """
    if config.compares_features:
        assert config.k is not None
        keep = keep_top_k if config.architecture == "topk" else keep_largest_of_groups
        of_layers = pre_activations(params, config, x).reshape(*x.shape[:-1], config.n_layers, -1)
        return _columns(keep(of_layers, config.k).reshape(*x.shape[:-1], -1), indices)
    pre = pre_activations(params, config, x, indices)
    if config.architecture == "relu":
        return jax.nn.relu(pre)
    if config.architecture == "gated":
        b_gate, b_mag, r_mag = (_columns(params[n], indices).astype(pre.dtype) for n in ("b_gate", "b_mag", "r_mag"))
        return jnp.where(pre + b_gate > 0, jax.nn.relu(pre * jnp.exp(r_mag) + b_mag), 0)
    threshold = params["threshold"].astype(pre.dtype)
    if config.architecture == "jumprelu":
        threshold = _columns(threshold, indices)
    return jnp.where(pre > jax.nn.relu(threshold), pre, 0)


def decode(
    params: DictionaryParams, config: DictionaryConfig, acts: Float[Array, "*batch n_features"]
) -> Float[Array, "*batch d_out"]:
    """Return `acts @ W_dec + b_dec`, the prediction without what needs the input: see `predict`."""
    dtype = config.dtype
    return write(acts.astype(dtype), params["W_dec"].astype(dtype), config.n_layers) + params["b_dec"].astype(dtype)


def reconstruct(
    params: DictionaryParams, config: DictionaryConfig, x: Float[Array, "*batch d_in"]
) -> Float[Array, "*batch d_out"]:
    """Return the prediction for `x`, as `predict` does."""
    return predict(params, config, x, encode(params, config, x))


def predict(
    params: DictionaryParams,
    config: DictionaryConfig,
    x: Float[Array, "*batch d_in"],
    acts: Float[Array, "*batch n_features"],
) -> Float[Array, "*batch d_out"]:
    """Return the prediction for `x`, whose feature activations are `acts`.

    An SAE's `normalize` is undone, and the skip connection added.
    """
    prediction = decode(params, config, acts)
    if config.rescales_output:
        size, mean = size_and_mean(config, x.astype(config.dtype))
        prediction = prediction * size + mean
    if config.skip:
        prediction = prediction + x.astype(config.dtype) @ params["W_skip"].astype(config.dtype)
    return prediction


def first_layers(params: DictionaryParams, config: DictionaryConfig, n: int) -> tuple[dict[str, Any], DictionaryConfig]:
    """Return the first layers of a cross-layer transcoder, which are one themselves (or, if n is 1, a transcoder)."""
    kept, own, d_out = n * config.features_per_layer, per_feature(config), n * config.d_out // config.n_layers
    found = {name: array[..., :kept] if name in own else array for name, array in params.items()}
    found |= {"W_dec": params["W_dec"][:kept, :d_out], "b_dec": params["b_dec"][:d_out]}
    changes: dict[str, Any] = {"hook_in": "+".join(config.hooks_in[:n]), "hook_out": "+".join(config.hooks_out[:n])}
    sizes = {"d_in": n * config.d_in // config.n_layers, "d_out": d_out, "n_features": kept}
    return found, dataclasses.replace(config, **changes, **sizes)


def predict_part(
    params: DictionaryParams, config: DictionaryConfig, x: Float[Array, "*batch d_in"], part: int
) -> Float[Array, "*batch d"]:
    """Return the prediction of one of the hook points of `hook_out`.

    Args:
        x: what a crosscoder reads; of a cross-layer transcoder, the inputs of the layers up to that of the hook point.
    """
    if len(config.hooks_out) == 1:
        return reconstruct(params, config, x)
    if config.n_layers > 1:
        params, config = first_layers(params, config, part + 1)
    width = config.d_out // len(config.hooks_out)
    return reconstruct(params, config, x)[..., part * width : (part + 1) * width]


def keep_top_k(pre: Float[Array, "*batch n_features"], k: int) -> Float[Array, "*batch n_features"]:
    """Zero all but the `k` largest values of the last axis (ties go to the lower index), then apply ReLU."""
    values, positions = jax.lax.top_k(pre, k)
    return jnp.put_along_axis(jnp.zeros_like(pre), positions, jax.nn.relu(values), axis=-1, inplace=False)


def keep_largest_of_groups(pre: Float[Array, "*batch n_features"], k: int) -> Float[Array, "*batch n_features"]:
    """Zero all but the largest value of each of `k` groups of neighbouring features, then apply ReLU.

    Of equal values, the first is kept. Source: sparsify.
    """
    groups = pre.reshape(*pre.shape[:-1], k, -1)
    largest = jnp.argmax(groups, axis=-1, keepdims=True)
    kept = jnp.arange(groups.shape[-1]) == largest
    return jnp.where(kept, jax.nn.relu(groups), 0).reshape(pre.shape)


def _columns(array: Array, indices: Indices) -> Array:
    return array if indices is None else array[..., indices]

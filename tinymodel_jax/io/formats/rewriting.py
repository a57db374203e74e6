"""The same dictionary with other parameters or in another architecture: what a format has no room for is folded.

Every function here keeps activations and predictions, up to rounding. Arrays are NumPy's, computed in float64 and
returned in their own number format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinymodel_jax.dictionaries.dictionary import Dictionary

Params = dict[str, np.ndarray]


def in_float32(dictionary: Dictionary) -> Dictionary:
    """Return a dictionary with all parameters in float32, or in float64 if one is: this rounds nothing."""
    arrays = {name: np.asarray(array) for name, array in dictionary.params.items()}
    dtype = np.result_type(np.float32, *arrays.values())
    return Dictionary(dictionary.config, {name: array.astype(dtype) for name, array in arrays.items()})


def with_b_dec_subtracted(dictionary: Dictionary, subtracted: bool) -> Dictionary:
    """Return a dictionary whose encoder reads `x - b_dec`, or `x`; the difference goes into the encoder's biases."""
    config = dictionary.config
    if config.subtract_b_dec == subtracted:
        return dictionary
    w = _float64(dictionary.params)
    shift = w["b_dec"] @ w["W_enc"] * (1 if subtracted else -1)
    changed = {name: w[name] + shift for name in ("b_enc", "b_gate") if name in w}
    if "b_mag" in w:
        changed["b_mag"] = w["b_mag"] + shift * np.exp(w["r_mag"])
    return _changed(dictionary, changed, subtract_b_dec=subtracted)


def as_jumprelu(dictionary: Dictionary) -> Dictionary:
    """Return a relu, batch_topk or gated dictionary as a jumprelu one, with thresholds of 0 or more.

    A gated feature is active where `x @ W_enc + b_gate > 0`, which is `x @ W_enc * gain + b_mag > b_mag - b_gate gain`.

    Raises:
        ValueError: the architecture compares features.
    """
    config, w = dictionary.config, _float64(dictionary.params)
    if config.compares_features:
        raise ValueError(f"a {config.architecture} dictionary compares features, which jumprelu does not.")
    threshold = w.get("threshold", np.zeros(()))
    if config.architecture == "gated":
        gain = np.exp(w["r_mag"])
        encoder = {"W_enc": w["W_enc"] * gain, "b_enc": w["b_mag"]}
        threshold = w["b_mag"] - w["b_gate"] * gain
    else:
        encoder = {}
    changed = {**encoder, "threshold": np.broadcast_to(np.maximum(threshold, 0), config.n_features)}
    gone = ("b_gate", "b_mag", "r_mag")
    kept = Dictionary(config, {name: a for name, a in dictionary.params.items() if name not in gone})
    return _changed(kept, changed, architecture="jumprelu", k=None)


def rescaled(params: Mapping[str, Any], factors: np.ndarray) -> Params:
    """Return parameters whose activations are multiplied by a factor above 0 per feature, and decoder rows divided."""
    w = _float64(params)
    one_each = ("b_enc", "b_gate", "b_mag", "threshold")
    changed = {name: w[name] * factors for name in one_each if name in w}
    changed |= {"W_enc": w["W_enc"] * factors, "W_dec": w["W_dec"] / factors[:, None]}
    return _in_formats(params, changed)


def decoder_norms(params: Mapping[str, Any]) -> np.ndarray:
    """Return the norms of decoder rows, 1 for rows of zeros."""
    norms = np.linalg.norm(np.asarray(params["W_dec"], np.float64), axis=1)
    return np.where(norms > 0, norms, 1)


def _changed(dictionary: Dictionary, changed: Mapping[str, np.ndarray], **fields: Any) -> Dictionary:
    params = _in_formats(dictionary.params, changed)
    return Dictionary(dataclasses.replace(dictionary.config, **fields), params)


def _in_formats(params: Mapping[str, Any], changed: Mapping[str, np.ndarray]) -> Params:
    """Return parameters with some changed, in the number formats that they had; new ones in W_enc's."""
    known = {name: np.asarray(array) for name, array in params.items()}
    default = known["W_enc"].dtype
    return known | {n: a.astype(known[n].dtype if n in known else default) for n, a in changed.items()}


def _float64(params: Mapping[str, Any]) -> Params:
    return {name: np.asarray(array).astype(np.float64) for name, array in params.items()}

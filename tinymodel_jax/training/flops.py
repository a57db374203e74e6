"""Floating-point operations of training, and the peak rates of devices."""

from __future__ import annotations

from typing import Any

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe

_DENSE_BF16_PEAK = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
"""Part of a device's name -> dense bfloat16 peak in FLOP/s, from the makers' data sheets; the first match counts."""


def training_flops_per_token(config: ModelConfig, seq: int) -> float:
    """Return the floating-point operations per token, forward and backward: 6 per matrix parameter, plus attention.

    Attention counts the causal half of scores and mixtures, 12 · n_layers · d_model · seq / 2.
    """
    matrices = config.n_layers * (4 * config.d_model**2 + 2 * config.d_model * config.d_mlp)
    matrices += config.d_model * config.d_vocab
    return 6.0 * matrices + 6.0 * config.n_layers * config.d_model * seq


def peak_flops(device: Any) -> float | None:
    """Return a device's dense bfloat16 peak in FLOP/s; None if it is unknown."""
    return next((peak for name, peak in _DENSE_BF16_PEAK.items() if name in device.device_kind), None)


def dictionary_flops_per_vector(recipe: DictionaryRecipe, d_in: int, d_out: int, layers: int = 1) -> float:
    """Return the floating-point operations of training a dictionary on one vector.

    Dense training takes two products with the encoder (it needs no gradient for the input) and three with the decoder.
    topk and batch_topk need all features only in the encoder's forward product. A cross-layer transcoder of several
    layers is dense; each feature reads one part of the input and writes on average to (layers + 1) / 2 of the output.
    """
    if layers > 1:
        return 2.0 * recipe.n_features * (2 * d_in / layers + 3 * d_out * (layers + 1) / (2 * layers))
    if recipe.takes_k:
        return 2.0 * d_in * recipe.n_features + 2.0 * (recipe.k or 0) * (d_in + 3 * d_out)
    return 2.0 * recipe.n_features * (2 * d_in + 3 * d_out)

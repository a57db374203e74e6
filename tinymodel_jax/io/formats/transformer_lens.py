"""A language model as TransformerLens stores it: a configuration, and a state dict with `HookedTransformer`'s names.

TransformerLens 4 has no `HookedTransformer`; its `convert_tl_checkpoint` reads the same state dict. Arrays are NumPy
arrays in their number format, shared where possible. What a TinyModel cannot represent is refused by its name; nothing
is folded, dropped or guessed.

Source: transformer_lens 3.9.0 (config/, components/) and 4.3.0 (config/, utilities/tl_checkpoint_conversion.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.io.convert import model_tensors
from tinymodel_jax.io.data_files import read_json_object
from tinymodel_jax.number_formats import DTYPES
from tinymodel_jax.params import require_shapes
from tinymodel_jax.runtime.atomic_files import replace_file

_PREFIXES = {"W_E": "embed", "W_pos": "pos_embed", "W_U": "unembed", "b_U": "unembed"}
"""The parameters whose names differ, and what comes before them in TransformerLens."""
_ATTENTION_BIASES = ("b_Q", "b_K", "b_V")
"""Parameters of an attention layer, (head, d_head), that a TinyModel does not have: they are zero."""
_BUFFERS = (".mask", ".IGNORE")
"""Endings of the state dict's entries that are not parameters; their shapes differ between versions."""

_DEFAULTS = {
    "act_fn": "relu",
    "normalization_type": "LN",
    "positional_embedding_type": "standard",
    "attention_dir": "causal",
    "use_attn_scale": True,
    "attn_scale": -1.0,
    "n_heads": -1,
    "d_vocab_out": -1,
    "d_mlp": None,
}
"""TransformerLens's values for the fields that a configuration leaves out."""
_ONLY = {
    "act_fn": "relu",
    "normalization_type": None,
    "positional_embedding_type": "standard",
    "attention_dir": "causal",
    "use_attn_scale": True,
}
"""The fields that choose between kinds of models, and the kind that a TinyModel is."""
_SIZES = ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "n_ctx", "d_vocab")
_LIMIT = 1e9
"""Numbers of a configuration are below it; larger ones do not fit into floating point, or into memory."""
_WITHOUT_EFFECT = {
    *("model_name", "original_architecture", "architecture", "device", "n_devices", "dtype", "seed", "eps", "n_params"),
    *("init_mode", "init_weights", "initializer_range", "trust_remote_code", "from_checkpoint", "attn_implementation"),
    *("default_prepend_bos", "default_padding_side", "decoder_start_token_id", "tie_word_embeddings"),
    *("use_hook_mlp_in", "use_attn_in", "use_attn_result", "use_split_qkv_input", "use_hook_tokens"),
}
"""Fields that do not change the function that a model of these kinds computes from its state dict and token ids."""
_WITHOUT_EFFECT_PREFIXES = ("checkpoint_", "tokenizer_", "rotary_", "NTK_", "yarn_")
"""Beginnings of other such fields; the last three are about rotary embeddings."""


def to_transformer_lens(config: ModelConfig, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the configuration (JSON-ready) and the state dict of a model.

    The state dict has no buffers, so `load_state_dict(…, strict=False)` loads it. The biases of queries, keys and
    values, which a TinyModel does not have, are zero.

    Args:
        params: flat: `blocks.0.attn.W_Q` -> array.

    Raises:
        ValueError: the model has JumpReLU neurons.
    """
    if config.mlp_activation != "relu":
        raise ValueError(
            f"TransformerLens has no neurons with mlp_activation={config.mlp_activation!r}; it holds 'relu' models."
        )
    state: dict[str, np.ndarray] = {}
    for tensor in model_tensors(config):
        state[_their_name(tensor.name)] = np.asarray(params[tensor.name], order="C")
        if tensor.name.endswith("attn.b_O"):
            attn, dtype = tensor.name.removesuffix("b_O"), state[tensor.name].dtype
            state |= {attn + bias: np.zeros((config.n_heads, config.d_head), dtype) for bias in _ATTENTION_BIASES}
    sizes = {name: getattr(config, name) for name in _SIZES}
    return {**sizes, **_ONLY, "attn_scale": math.sqrt(config.d_head), "use_hook_mlp_in": True}, state


def from_transformer_lens(
    config: Mapping[str, Any], state: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Return the configuration and the flat parameters of a model that TransformerLens stores.

    Args:
        config: the fields of its configuration, as `model.cfg.to_dict()` gives them; a field that is left out has
            TransformerLens's default.
        state: its state dict, of NumPy arrays or PyTorch tensors on the CPU. Buffers are ignored.

    Raises:
        ValueError: the configuration or the state dict has what a TinyModel cannot represent, parameters are missing,
            unexpected or of the wrong shape, or NumPy cannot read a tensor. The message names all of them.
    """
    found = _model_config({**_DEFAULTS, **config})
    arrays = _arrays({str(name): array for name, array in state.items() if not str(name).endswith(_BUFFERS)})
    blocks = {match[1] for name in arrays if (match := re.match(r"blocks\.(\d+)\.", name))}
    if found.n_layers != len(blocks):
        raise ValueError(
            f"the configuration states n_layers={found.n_layers}, and the state dict has {len(blocks)} blocks."
        )
    biases = {
        f"blocks.{layer}.attn.{bias}": (found.n_heads, found.d_head)
        for layer in range(found.n_layers)
        for bias in _ATTENTION_BIASES
    }
    ours = {_their_name(tensor.name): tensor for tensor in model_tensors(found)}
    present = {name: shape for name, shape in biases.items() if name in arrays}
    require_shapes(arrays, {name: tensor.shape for name, tensor in ours.items()} | present, "TransformerLens's names")
    wrong = [f"{name} holds {array.dtype.name}" for name, array in arrays.items() if array.dtype.name not in DTYPES]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}; expected one of {', '.join(DTYPES)}.")
    nonzero = [name for name in present if np.any(arrays[name])]
    if nonzero:
        raise ValueError(
            f"{', '.join(nonzero)}: biases of queries, keys and values that are not zero; a TinyModel has none. "
            "TransformerLens folds value biases with fold_value_biases=True; the other two have no place."
        )
    return found, {tensor.name: arrays[name] for name, tensor in ours.items()}


def is_transformer_lens(state: Mapping[Any, Any]) -> bool:
    """Whether a state dict has TransformerLens's names."""
    return "embed.W_E" in state


def config_path(weights: Path) -> Path:
    """Return where the configuration of a file of weights is: beside it, with the ending .json."""
    return weights.with_suffix(".json")


def read_config(weights: Path) -> dict[str, Any]:
    """Read the configuration beside a file of weights.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a JSON object.
    """
    path = config_path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"{weights} has TransformerLens's names, but its configuration {path} does not exist. Write there what "
            "json.dumps(model.cfg.to_dict(), default=str) returns."
        )
    return read_json_object(path)


def write_config(config: Mapping[str, Any], weights: Path) -> None:
    """Write the configuration beside a file of weights."""
    replace_file(config_path(weights), (json.dumps(config, indent=2) + "\n").encode())


def _arrays(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays, wrong = {}, []
    for name, array in state.items():
        try:
            arrays[name] = np.asarray(array)
        except (TypeError, RuntimeError, ValueError) as error:  # of PyTorch: bfloat16, a GPU, gradients
            wrong.append(f"{name}: {error}")
    if wrong:
        raise ValueError(
            f"NumPy cannot read {len(wrong)} of {len(state)} tensors of the state dict; the first is {wrong[0]:.200}; "
            "give the state_dict() of model.cpu().float()."
        )
    return arrays


def _their_name(name: str) -> str:
    return f"{_PREFIXES[name]}.{name}" if name in _PREFIXES else name


def _model_config(given: Mapping[str, Any]) -> ModelConfig:
    """Return our configuration; refuse every field that asks for something else, all in one message."""
    fields = _with_sizes(given)
    problems = [f"{name}={fields[name]!r:.80} (only {only!r})" for name, only in _ONLY.items() if fields[name] != only]
    problems += _wrong_sizes(fields)
    problems += [f"{name}={value!r:.80}" for name, value in fields.items() if not _has_no_effect(name, value)]
    if problems:
        raise ValueError(f"a TinyModel cannot represent this model of TransformerLens: {'; '.join(problems)}.")
    return ModelConfig(**{name: fields[name] for name in _SIZES if name != "d_head"})


def _with_sizes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with the sizes that TransformerLens derives from others."""
    fields, d_model, d_head = dict(given), given.get("d_model"), given.get("d_head")
    if isinstance(d_model, int):
        if fields["n_heads"] == -1 and isinstance(d_head, int) and d_head:
            fields["n_heads"] = d_model // d_head
        if fields["d_mlp"] is None:
            fields["d_mlp"] = 4 * d_model
    kinds: dict[str, Any] = dict.fromkeys(_SIZES, int) | {"attn_scale": int | float}
    values: dict[str, Any] = {name: fields.get(name) for name in kinds}
    wrong = [n for n, value in values.items() if not isinstance(value, kinds[n]) or not abs(value) < _LIMIT]
    if wrong:
        shown = ", ".join(f"{name}={values[name]!r:.80}" for name in wrong)
        raise ValueError(f"a configuration of TransformerLens needs numbers below {_LIMIT:.0e} for {shown}.")
    return fields


def _wrong_sizes(fields: Mapping[str, Any]) -> list[str]:
    problems = []
    d_head, scale = fields["d_head"], fields["attn_scale"]
    if fields["n_heads"] * d_head != fields["d_model"]:
        problems.append(f"d_head={d_head!r} (only d_model / n_heads)")
    if scale != -1 and not math.isclose(scale, math.sqrt(abs(d_head)), rel_tol=1e-6):
        problems.append(f"attn_scale={scale!r} (only sqrt(d_head))")
    if fields["d_vocab_out"] not in (-1, fields["d_vocab"]):
        problems.append(f"d_vocab_out={fields['d_vocab_out']!r} (only d_vocab)")
    return problems


def _has_no_effect(name: str, value: Any) -> bool:
    """Whether a field is checked elsewhere, never matters, or is off: None, False, or -1 for a number."""
    if name in {*_SIZES, *_DEFAULTS, *_WITHOUT_EFFECT} or name.startswith(_WITHOUT_EFFECT_PREFIXES):
        return True
    return value is None or value is False or value == -1

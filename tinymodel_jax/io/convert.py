"""The tensors of the reference's checkpoints and ours: names, shapes and the order of axes.

Arrays are NumPy, views of the checkpoint's where possible, and keep their number format. A converted model is a flat
dict with names such as `blocks.0.attn.W_Q`. Sizes are inferred from the shapes, and every key and shape is checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.number_formats import DTYPES

PUBLISHED_D_MODEL, PUBLISHED_N_HEADS = 768, 16

_DICTIONARY_MODULES = {
    "attn_sae": "A",
    "transcoder": "M",
    "mlp_sae": "Mo",
    "res_pre_attn_sae": "Ra",
    "res_pre_mlp_sae": "Rm",
}
"""The reference's module name of a dictionary registered in a model -> kind of site here."""
_DICTIONARY_KEY = re.compile(rf"torso\.(\d+)\.({'|'.join(_DICTIONARY_MODULES)})\.(.+)")


class TensorMap(NamedTuple):
    """How one tensor of a reference checkpoint corresponds to one parameter."""

    name: str
    """Our name, such as `blocks.0.attn.W_Q`."""
    key: str
    """The reference's key, such as `torso.0.attn.Q.weight`."""
    torch_shape: tuple[int, ...]
    split: tuple[int, ...]
    """Shape of the reference's tensor with its head axis split, or its leading 1 dropped."""
    axes: tuple[int, ...]
    """Transposition that turns `split` into our shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of our parameter."""
        return tuple(self.split[axis] for axis in self.axes)

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        """Return our parameter, a view if possible, for a reference tensor."""
        return tensor.reshape(self.split).transpose(self.axes)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Return the reference tensor for our parameter."""
        return array.transpose(np.argsort(self.axes)).reshape(self.torch_shape)


class ConvertedModel(NamedTuple):
    """A language model from a reference file, with the dictionaries registered in it (tag -> dictionary)."""

    config: ModelConfig
    params: dict[str, np.ndarray]
    dictionaries: dict[str, Dictionary]


def model_tensors(config: ModelConfig) -> list[TensorMap]:
    """Return every tensor of a ReLU model, in the order of the reference's state dict."""
    d, h, k, m = config.d_model, config.n_heads, config.d_head, config.d_mlp
    tensors = [
        TensorMap("W_pos", "pos_embed", (1, config.n_ctx, d), (config.n_ctx, d), (0, 1)),
        _plain("W_E", "embed.weight", config.d_vocab, d),
    ]
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}", f"torso.{layer}"
        for letter in "QKV":
            key = f"{theirs}.attn.{letter}.weight"
            tensors.append(TensorMap(f"{ours}.attn.W_{letter}", key, (d, d), (h, k, d), (0, 2, 1)))
        tensors += [
            TensorMap(f"{ours}.attn.W_O", f"{theirs}.attn.O.weight", (d, d), (d, h, k), (1, 2, 0)),
            _plain(f"{ours}.attn.b_O", f"{theirs}.attn.O.bias", d),
            _linear(f"{ours}.mlp.W_in", f"{theirs}.mlp.read_in.weight", m, d),
            _plain(f"{ours}.mlp.b_in", f"{theirs}.mlp.read_in.bias", m),
            _linear(f"{ours}.mlp.W_out", f"{theirs}.mlp.write_out.weight", d, m),
            _plain(f"{ours}.mlp.b_out", f"{theirs}.mlp.write_out.bias", d),
        ]
    return [
        *tensors,
        _linear("W_U", "lm_head.weight", config.d_vocab, d),
        _plain("b_U", "lm_head.bias", config.d_vocab),
    ]


def dictionary_tensors(n_features: int, d_in: int, d_out: int) -> list[TensorMap]:
    """Return every tensor of a reference dictionary file."""
    return [
        _linear("W_enc", "encoder.weight", n_features, d_in),
        _plain("b_enc", "encoder.bias", n_features),
        _linear("W_dec", "decoder.weight", d_out, n_features),
        _plain("b_dec", "decoder.bias", d_out),
    ]


def convert_model(state: Mapping[str, Any], n_heads: int | None = None) -> ConvertedModel:
    """Convert a reference state dict; sizes are inferred from the shapes.

    Args:
        n_heads: number of attention heads, which cannot be inferred from shapes; by default 16 for the published
            d_model of 768.

    Raises:
        ValueError: the dict does not hold a language model; tensors are missing, unexpected or have the wrong shape or
            type, and the message names all of them; or `n_heads` is needed.
    """
    dictionary_state = {key: value for key, value in state.items() if _DICTIONARY_KEY.fullmatch(str(key))}
    model_state = {key: value for key, value in state.items() if key not in dictionary_state}
    config = _infer_config(model_state, n_heads)
    params = _convert(model_state, model_tensors(config), "language model")
    return ConvertedModel(config, params, _registered_dictionaries(dictionary_state, config))


def convert_dictionary(state: Mapping[str, Any], site: Site) -> Dictionary:
    """Convert a reference dictionary file for its site; the parameters are NumPy arrays.

    Raises:
        ValueError: as `convert_model`.
    """
    encoder, decoder = _shape(state, "encoder.weight", 2), _shape(state, "decoder.weight", 2)
    if encoder is None or decoder is None:
        raise ValueError(
            "not a dictionary: expected the tensors encoder.weight (features, width), encoder.bias, decoder.weight, "
            f"decoder.bias; got {_listed(state)}."
        )
    tensors = dictionary_tensors(encoder[0], encoder[1], decoder[0])
    params = _convert(state, tensors, f"dictionary of {encoder[0]} features")
    return Dictionary(DictionaryConfig(site.hook_in, site.hook_out, encoder[1], decoder[0], encoder[0]), params)


def export_model(config: ModelConfig, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the reference's state dict of a model, in the reference's order of keys.

    Raises:
        ValueError: the reference only has ReLU MLPs that are four times as wide as the residual stream.
    """
    if config.mlp_activation != "relu":
        raise ValueError(f"export: mlp_activation={config.mlp_activation!r}; the reference's neurons are ReLU only.")
    if config.d_mlp != 4 * config.d_model:
        raise ValueError(
            f"export: d_mlp={config.d_mlp} is not 4 * d_model = {4 * config.d_model}, "
            "the only width that the reference's MLPs have."
        )
    return {t.key: np.ascontiguousarray(t.to_torch(params[t.name])) for t in model_tensors(config)}


def _plain(name: str, key: str, *shape: int) -> TensorMap:
    return TensorMap(name, key, shape, shape, tuple(range(len(shape))))


def _linear(name: str, key: str, rows: int, columns: int) -> TensorMap:
    return TensorMap(name, key, (rows, columns), (rows, columns), (1, 0))


def _infer_config(state: Mapping[str, Any], n_heads: int | None) -> ModelConfig:
    embed, positions = _shape(state, "embed.weight", 2), _shape(state, "pos_embed", 3)
    read_in = _shape(state, "torso.0.mlp.read_in.weight", 2)
    if embed is None or positions is None or read_in is None:
        raise ValueError(
            "not a TinyModel language model: expected the tensors pos_embed (1, context, width), embed.weight "
            f"(vocabulary, width), torso.0.mlp.read_in.weight (neurons, width), …; got {_listed(state)}."
        )
    if n_heads is None and embed[1] != PUBLISHED_D_MODEL:
        raise ValueError(
            f"n_heads is needed: shapes do not show it, and the width {embed[1]} is not the published "
            f"{PUBLISHED_D_MODEL} (which has {PUBLISHED_N_HEADS}). Give n_heads."
        )
    layers = [int(match[1]) for key in state if (match := re.match(r"torso\.(\d{1,4})\.", str(key)))]
    return ModelConfig(
        n_layers=max(layers) + 1,
        d_model=embed[1],
        n_heads=PUBLISHED_N_HEADS if n_heads is None else n_heads,
        d_mlp=read_in[0],
        n_ctx=positions[1],
        d_vocab=embed[0],
    )


def _convert(state: Mapping[str, Any], tensors: list[TensorMap], what: str) -> dict[str, np.ndarray]:
    expected = {t.key: t for t in tensors}
    problems = [f"missing {t.key} {t.torch_shape}" for t in tensors if t.key not in state]
    problems += [f"unexpected {key!r}" for key in state if key not in expected]
    for key, t in expected.items():
        value = state.get(key)
        if key in state and not isinstance(value, np.ndarray):
            problems.append(f"{key} is a {type(value).__name__}, not a tensor")
        elif isinstance(value, np.ndarray) and value.shape != t.torch_shape:
            problems.append(f"{key} has shape {value.shape}, expected {t.torch_shape}")
        elif isinstance(value, np.ndarray) and value.dtype.name not in DTYPES:
            problems.append(f"{key} holds {value.dtype.name}, expected one of {', '.join(DTYPES)}")
    if problems:
        raise ValueError(f"this is not a complete {what}: {'; '.join(problems)}.")
    return {t.name: t.from_torch(state[t.key]) for t in tensors}


def _registered_dictionaries(state: Mapping[str, Any], config: ModelConfig) -> dict[str, Dictionary]:
    groups: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        match = _DICTIONARY_KEY.fullmatch(key)
        assert match is not None
        groups.setdefault(f"{_DICTIONARY_MODULES[match[2]]}{int(match[1])}", {})[match[3]] = value
    converted = {}
    for tag, tensors in groups.items():
        site = Site.parse(tag)[0]
        if site.layer >= config.n_layers:
            raise ValueError(f"dictionary at layer {site.layer} of a model with {config.n_layers} layers.")
        converted[tag] = convert_dictionary(tensors, site)
    return converted


def _shape(state: Mapping[str, Any], key: str, ndim: int) -> tuple[int, ...] | None:
    value = state.get(key)
    return value.shape if isinstance(value, np.ndarray) and value.ndim == ndim else None


def _listed(state: Mapping[str, Any], most: int = 8) -> str:
    names = [str(key) for key in state]
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return (", ".join(names[:most]) + more) if names else "nothing"

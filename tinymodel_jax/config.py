"""Configurations: the shapes of a model or a dictionary, and the hook points of a dictionary.

They are frozen, hashable and validated once, so they can be static arguments of compiled functions. They convert to
JSON and back without loss. Weights and training options are elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from tinymodel_jax.json_config import JsonConfig
from tinymodel_jax.number_formats import dtype_name

TrainedArchitecture = Literal["relu", "topk", "batch_topk", "jumprelu", "gated"]
"""An architecture that this package trains."""
Architecture = Literal["relu", "topk", "batch_topk", "jumprelu", "gated", "groupmax"]
Normalization = Literal["none", "layer_norm", "constant_norm"]
MLPActivation = Literal["relu", "jumprelu"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
TRAINED_ARCHITECTURES: tuple[TrainedArchitecture, ...] = get_args(TrainedArchitecture)


@dataclass(frozen=True)
class ModelConfig(JsonConfig):
    """Shape and number formats of one TinyModel transformer. The defaults are the published 44M model's.

    Source: the reference's published checkpoints (noanabeshima/tiny_model).

    Examples:
        >>> from tinymodel_jax import ModelConfig
        >>> ModelConfig().n_params
        43896592
        >>> ModelConfig(n_layers=2, d_model=64, n_heads=4, d_mlp=256, d_vocab=1024).d_head
        16
    """

    n_layers: int = 4
    """Number of transformer blocks."""
    d_model: int = 768
    """Width of the residual stream."""
    n_heads: int = 16
    """Attention heads per layer; must divide `d_model`."""
    d_mlp: int = 3072
    """Hidden neurons of each MLP."""
    n_ctx: int = 256
    """Maximum sequence length, in tokens, including `[BEGIN]`."""
    d_vocab: int = 10_000
    """Vocabulary size; the last four ids are `[BEGIN] [END] [PAD] [UNK]`."""
    dtype: str = "float32"
    """Number format of the computation; log-probabilities and losses are always float32."""
    param_dtype: str = "float32"
    """Number format of the stored parameters."""
    mlp_activation: MLPActivation = "relu"
    """Activation function of the neurons; with `jumprelu`, each neuron has its own threshold."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        object.__setattr__(self, "param_dtype", dtype_name(self.param_dtype))
        if self.mlp_activation not in get_args(MLPActivation):
            raise ValueError(
                f"ModelConfig: mlp_activation {self.mlp_activation!r} is unknown; "
                f"choose one of {', '.join(get_args(MLPActivation))}."
            )
        for name in ("n_layers", "d_model", "n_heads", "d_mlp", "n_ctx", "d_vocab"):
            _require_positive("ModelConfig", name, getattr(self, name))
        if self.d_vocab < 5:
            raise ValueError(
                f"ModelConfig: d_vocab={self.d_vocab} must be 5 or more: a token and the four special ones."
            )
        if self.d_model % self.n_heads:
            raise ValueError(
                f"ModelConfig: n_heads={self.n_heads} does not divide d_model={self.d_model}; "
                f"choose one of {[n for n in range(1, self.d_model + 1) if self.d_model % n == 0]}."
            )

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def begin_id(self) -> int:
        """Id of `[BEGIN]`, the first token of every story."""
        return self.d_vocab - 4

    @property
    def end_id(self) -> int:
        """Id of `[END]`."""
        return self.d_vocab - 3

    @property
    def pad_id(self) -> int:
        """Id of `[PAD]`."""
        return self.d_vocab - 2

    @property
    def unk_id(self) -> int:
        """Id of `[UNK]`."""
        return self.d_vocab - 1

    def named_tokens(self, tokens: str | int | Iterable[str | int]) -> tuple[int, ...]:
        """Return the ids of tokens given as ids or as the names `begin`, `end` and `unk`.

        Raises:
            ValueError: one is neither.
        """
        special = {"begin": self.begin_id, "end": self.end_id, "unk": self.unk_id}
        given = [tokens] if isinstance(tokens, str | int) else list(tokens)
        wrong = [token for token in given if token not in special and token not in range(self.d_vocab)]
        if wrong:
            raise ValueError(
                f"tokens to exclude: {', '.join(map(repr, wrong))}; give ids, 0..{self.d_vocab - 1}, or "
                f"{', '.join(map(repr, special))}."
            )
        return tuple(special[token] if isinstance(token, str) else int(token) for token in given)

    def is_text(self, ids: Any) -> Any:
        """Say whether an id, or each id of an array, is text: any token but `[BEGIN]`, `[END]` and `[PAD]`."""
        return (ids < self.begin_id) | (ids == self.unk_id)

    @property
    def n_params(self) -> int:
        """Number of parameters; 43,896,592 for the published model."""
        attention = 4 * self.d_model**2 + self.d_model
        mlp = 2 * self.d_model * self.d_mlp + self.d_mlp + self.d_model
        mlp += self.d_mlp if self.mlp_activation == "jumprelu" else 0
        embeddings = (self.d_vocab + self.n_ctx) * self.d_model
        return embeddings + self.n_layers * (attention + mlp) + self.d_vocab * (self.d_model + 1)


@dataclass(frozen=True)
class DictionaryConfig(JsonConfig):
    """Shape, architecture and placement of one sparse dictionary.

    A dictionary is a sparse autoencoder (SAE) when `hook_in == hook_out`, a transcoder otherwise. Several hook points,
    joined by "+" in the order of the forward pass, make a crosscoder, which is an SAE of their concatenated values, or
    a cross-layer transcoder: feature i is of layer `i // features_per_layer`, reads only the layer's hook point of
    `hook_in`, and writes to that of `hook_out` and to those of later layers.

    Source: transcoders, Dunefsky et al. 2024; with a skip connection, Paulo et al. 2025; crosscoders, Lindsey et al.
    2024; cross-layer transcoders, Ameisen et al. 2025. Architectures: `topk`, Gao et al. 2024; `batch_topk`, Bussmann
    et al. 2024; `jumprelu` and `gated`, Rajamanoharan et al. 2024; `groupmax`, sparsify.

    Examples:
        >>> from tinymodel_jax import DictionaryConfig
        >>> hook = "blocks.0.hook_resid_pre"
        >>> config = DictionaryConfig(hook, hook, d_in=128, d_out=128, n_features=512, architecture="topk", k=16)
        >>> config.is_transcoder
        False
    """

    hook_in: str
    """Hook point the encoder reads, or several joined by "+"."""
    hook_out: str
    """Hook point the decoder predicts, or several; equal to `hook_in` for an SAE."""
    d_in: int
    """Width of what the encoder reads: of all hook points together."""
    d_out: int
    """Width of what the decoder predicts: of all hook points together."""
    n_features: int
    """Dictionary size, in features."""
    architecture: Architecture = "relu"
    """Activation function: which pre-activations become active features."""
    k: int | None = None
    """Active features per position (`topk`: exactly, `batch_topk`: on average in training, `groupmax`: one of each of k
    groups of neighbouring features); None for the others. In a cross-layer transcoder, `topk` and `groupmax` count the
    features of each layer."""
    skip: bool = False
    """Whether the prediction includes a linear map of the input, `x @ W_skip`."""
    normalize: Normalization = "none"
    """What is done to each input vector before `b_dec` is subtracted, and undone on an SAE's prediction: `layer_norm`
    subtracts its mean and divides by its standard deviation, `constant_norm` gives it the norm sqrt(d_in)."""
    subtract_b_dec: bool = False
    """Whether the encoder reads `x - b_dec`, as in some other libraries; the published dictionaries read `x`."""
    exclude: tuple[int, ...] = ()
    """Token ids at whose positions the dictionary was not trained and does not act: its features are inactive there, a
    splice keeps the value, and statistics leave the position out."""
    dtype: str = "float32"
    """Number format of encode and decode; bfloat16 rounding switches features on and off near their threshold."""
    param_dtype: str = "float32"
    """Number format of the stored parameters."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        object.__setattr__(self, "param_dtype", dtype_name(self.param_dtype))
        for name in ("d_in", "d_out", "n_features"):
            _require_positive("DictionaryConfig", name, getattr(self, name))
        for name, known in (("architecture", ARCHITECTURES), ("normalize", get_args(Normalization))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"DictionaryConfig: {name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}."
                )
        self._check_hook_points()
        self._check_k()
        object.__setattr__(self, "exclude", _token_ids("DictionaryConfig: exclude", self.exclude))
        if not self.is_transcoder and self.d_in != self.d_out:
            raise ValueError(
                f"DictionaryConfig: an SAE reads and predicts the same hook point {self.hook_in!r}, "
                f"so d_in={self.d_in} and d_out={self.d_out} must be equal."
            )
        if self.subtract_b_dec and self.d_in != self.d_out:
            raise ValueError(f"DictionaryConfig: subtract_b_dec needs d_in == d_out, got {self.d_in} and {self.d_out}.")

    @property
    def is_transcoder(self) -> bool:
        """Whether the dictionary predicts a different hook point from the one it reads."""
        return self.hook_in != self.hook_out

    @property
    def compares_features(self) -> bool:
        """Whether a feature's activation depends on other features, so that none can be computed alone."""
        return self.architecture in ("topk", "groupmax")

    @property
    def rescales_output(self) -> bool:
        """Whether features write different amounts at different inputs: whether it is an SAE that normalizes."""
        return self.normalize != "none" and not self.is_transcoder

    @property
    def hooks_in(self) -> tuple[str, ...]:
        """The hook points that `hook_in` joins."""
        return split_hooks(self.hook_in)

    @property
    def hooks_out(self) -> tuple[str, ...]:
        """The hook points that `hook_out` joins."""
        return split_hooks(self.hook_out)

    @property
    def is_crosscoder(self) -> bool:
        """Whether the dictionary is an SAE of several hook points."""
        return len(self.hooks_in) > 1 and not self.is_transcoder

    @property
    def n_layers(self) -> int:
        """Number of layers that a cross-layer transcoder's features are divided into; 1 for all other dictionaries."""
        return len(self.hooks_in) if self.is_transcoder else 1

    @property
    def features_per_layer(self) -> int:
        """Features of each layer of a cross-layer transcoder; all of them for other dictionaries."""
        return self.n_features // self.n_layers

    def acts_at(self, tok_ids: Any) -> Any:
        """Return a mask of the shape of `tok_ids`: the tokens at which the dictionary acts."""
        acting = np.ones(np.shape(tok_ids), bool)
        for excluded in self.exclude:
            acting = acting & (tok_ids != excluded)
        return acting

    def _check_k(self) -> None:
        takes_k = self.architecture in ("topk", "batch_topk", "groupmax")
        if takes_k != (self.k is not None):
            wants = f"needs k, 1 to n_features={self.n_features}" if takes_k else f"takes no k, got k={self.k}"
            raise ValueError(f"DictionaryConfig: architecture {self.architecture!r} {wants}.")
        if self.k is None:
            return
        _require_positive("DictionaryConfig", "k", self.k)
        if self.k > self.n_features:
            raise ValueError(f"DictionaryConfig: k={self.k} is outside 1..n_features={self.n_features}.")
        if self.architecture == "groupmax" and self.features_per_layer % self.k:
            raise ValueError(f"DictionaryConfig: n_features={self.n_features} do not divide into k={self.k} groups.")
        if self.architecture == "topk" and self.k > self.features_per_layer:
            raise ValueError(
                f"DictionaryConfig: k={self.k} is above {self.features_per_layer}, the features of each of the "
                f"{self.n_layers} layers; topk keeps k of each layer."
            )

    def _check_hook_points(self) -> None:
        ins, outs = self.hooks_in, self.hooks_out
        if len(ins) != len(outs):
            raise ValueError(
                f"DictionaryConfig: hook_in joins {len(ins)} hook points and hook_out {len(outs)}; a cross-layer "
                "transcoder predicts one for each that it reads."
            )
        for name, size, divisor in (
            ("d_in", self.d_in, len(ins)),
            ("d_out", self.d_out, len(outs)),
            ("n_features", self.n_features, self.n_layers),
        ):
            if size % divisor:
                raise ValueError(
                    f"DictionaryConfig: {name}={size} is not a multiple of {divisor}, the number of hook points of "
                    f"{self.hook_in!r:.80}; all have the same width, and as many features."
                )
        given = [name for name in ("skip", "normalize", "subtract_b_dec") if getattr(self, name) not in (False, "none")]
        if self.n_layers > 1 and given:
            raise ValueError(f"DictionaryConfig: a cross-layer transcoder takes no {', '.join(given)}.")


def split_hooks(name: str) -> tuple[str, ...]:
    """Return the hook points that a name joins by "+", such as `blocks.0.hook_mlp_in+blocks.1.hook_mlp_in`.

    The value there is that of all of them, concatenated along the last axis. A single hook point is one by itself.
    """
    return tuple(name.split("+"))


def _token_ids(name: str, given: Any) -> tuple[int, ...]:
    """Return token ids, which may come from JSON, in order and each once."""
    items = list(given) if isinstance(given, Iterable) else [given]
    ids = {item for item in items if isinstance(item, int) and not isinstance(item, bool) and item >= 0}
    if len(ids) < len(set(map(repr, items))):
        raise ValueError(f"{name}={given!r:.80}; expected token ids, such as (9996,).")
    return tuple(sorted(ids))


def _require_positive(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{owner}: {name}={value!r} must be a whole number of 1 or more.")

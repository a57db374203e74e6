"""`Dictionary`: an SAE or a transcoder, as a tree of parameters with its configuration.

The functions that it computes are in `encoding.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Float

from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.encoding import (
    DictionaryParams,
    Indices,
    decode,
    encode,
    param_shapes,
    per_feature,
    reconstruct,
)
from tinymodel_jax.dictionaries.layers import is_written
from tinymodel_jax.dictionaries.neighbours import Neighbours, nearest_rows
from tinymodel_jax.params import own_array, require_shapes, require_tree, uniform_fan_in


@struct.dataclass(eq=False)  # compared by identity, so that `jax.jit(dictionary.encode)` works
class Dictionary:
    """An SAE or transcoder with the hook points that it reads and predicts; a pytree of its parameters.

    A dictionary from `from_pretrained` or `from_params` is called directly. `Dictionary(config)` has no parameters; use
    it like a Linen module, through `init` and `apply`.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> lm = TinyModel("mini")
        >>> dictionary = lm["M1"].dictionary
        >>> _, kept = lm.run_with_cache("The dog ran", dictionary.config.hook_in, return_logprobs=False)
        >>> x = kept[dictionary.config.hook_in]
        >>> acts = dictionary.encode(x)
        >>> acts.shape, dictionary.decode(acts).shape
        ((1, 4, 511), (1, 4, 128))
    """

    config: DictionaryConfig = struct.field(pytree_node=False)
    """Shape, architecture and hook points."""
    params: dict[str, Any] = struct.field(default_factory=dict)
    """Parameters by name: `W_enc` (d_in, n_features), `W_dec` (n_features, d_out), `b_dec`, and the architecture's."""

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """Return the prediction of the value at `hook_out`.

        Args:
            x: value at `hook_in`; the values of several hook points are concatenated.

        Raises:
            ValueError: `x` has another width than d_in.

        Examples:
            >>> import jax.numpy as jnp
            >>> from tinymodel_jax import TinyModel
            >>> dictionary = TinyModel("mini")["M2"].dictionary
            >>> dictionary(jnp.ones((1, 4, 128))).shape
            (1, 4, 128)
        """
        return reconstruct(self._known_params(), self.config, _of_width(x, "x", "d_in", self.config.d_in))

    def encode(self, x: Float[Array, "*batch d_in"], indices: Indices = None) -> Float[Array, "..."]:
        """Return the feature activations of `x`.

        Args:
            indices: features to compute: None for all, a slice, a list or array, or an int, which drops the last axis.

        Raises:
            ValueError: `x` has another width than d_in, or an index is out of range.

        Examples:
            >>> import jax.numpy as jnp
            >>> from tinymodel_jax import TinyModel
            >>> dictionary = TinyModel("mini")["M2"].dictionary
            >>> x = jnp.ones((1, 4, 128))
            >>> dictionary.encode(x).shape, dictionary.encode(x, [3, 5]).shape, dictionary.encode(x, 3).shape
            ((1, 4, 512), (1, 4, 2), (1, 4))
        """
        x = _of_width(x, "x", "d_in", self.config.d_in)
        return encode(self._known_params(), self.config, x, resolve_indices(indices, self.config.n_features))

    def decode(self, acts: Float[Array, "*batch n_features"]) -> Float[Array, "*batch d_out"]:
        """Return `acts @ W_dec + b_dec`.

        Only `__call__` adds what needs the input: the skip connection, and an SAE's undoing of `normalize`.

        Raises:
            ValueError: `acts` has another width than n_features.

        Examples:
            >>> import jax.numpy as jnp
            >>> from tinymodel_jax import TinyModel
            >>> dictionary = TinyModel("mini")["M2"].dictionary
            >>> nothing_active = dictionary.decode(jnp.zeros(512))
            >>> bool((nothing_active == dictionary.params["b_dec"]).all())
            True
        """
        acts = _of_width(acts, "acts", "n_features", self.config.n_features)
        return decode(self._known_params(), self.config, acts)

    @classmethod
    def from_params(cls, config: DictionaryConfig, params: DictionaryParams) -> Dictionary:
        """Build a dictionary from its parameters, which are converted to JAX arrays of `config.param_dtype`.

        Raises:
            ValueError: an argument is of another type, or parameters are missing, unexpected or of the wrong shape.

        Examples:
            >>> import numpy as np
            >>> from tinymodel_jax import Dictionary, DictionaryConfig
            >>> hook = "blocks.1.hook_resid_pre"
            >>> config = DictionaryConfig(hook, hook, d_in=8, d_out=8, n_features=16)
            >>> biases = {"b_enc": np.zeros(16), "b_dec": np.zeros(8)}
            >>> Dictionary.from_params(config, {"W_enc": np.ones((8, 16)), "W_dec": np.ones((16, 8)), **biases})
            Dictionary(blocks.1.hook_resid_pre -> blocks.1.hook_resid_pre, relu, 16 features)
        """
        DictionaryConfig.require(config, "Dictionary.from_params")
        require_tree(params)
        expected = param_shapes(config)
        require_shapes(params, expected, f"a {config.architecture} dictionary")
        return cls(config, {name: own_array(params[name], config.param_dtype) for name in expected})

    @classmethod
    def from_directions(cls, hook_name: str, directions: Any) -> Dictionary:
        """Build a `relu` SAE without biases whose encoder columns and decoder rows are the given directions.

        A feature's activation is `max(0, direction @ x)`. With `np.eye(width)` the features are the coordinates there:
        at `blocks.1.mlp.hook_post`, the neurons of layer 1.

        Args:
            hook_name: hook point of a block, such as `blocks.1.mlp.hook_post`; heads are concatenated.
            directions: numbers (n, width).

        Raises:
            ValueError: the directions are not a table of finite numbers with at least one row.

        Examples:
            >>> import numpy as np
            >>> from tinymodel_jax import Dictionary
            >>> neurons = Dictionary.from_directions("blocks.1.mlp.hook_post", np.eye(512))
            >>> neurons.config.n_features, neurons.config.architecture
            (512, 'relu')
        """
        rows = np.asarray(directions)
        if rows.ndim != 2 or not rows.size or rows.dtype.kind not in "fiu" or not np.isfinite(rows).all():
            raise ValueError(
                f"from_directions: got {rows.dtype} values of shape {rows.shape}; pass finite numbers (n, width)."
            )
        config = DictionaryConfig(hook_name, hook_name, rows.shape[1], rows.shape[1], len(rows))
        zeros = {"b_enc": np.zeros(len(rows)), "b_dec": np.zeros(rows.shape[1])}
        return cls.from_params(config, {"W_enc": rows.T, "W_dec": rows, **zeros})

    @classmethod
    def from_pretrained(cls, path_or_name: str | os.PathLike[str], site: str | None = None) -> Dictionary:
        """Load a dictionary.

        Args:
            path_or_name: a folder written by `save_pretrained`, a file with the reference's names (`.pt`,
                `.safetensors`), what SAELens, dictionary_learning, sparsify or circuit-tracer wrote (recognized by its
                content, docs/reference/files.md), one of these on the hub (`hub:OWNER/NAME/PATH`, with `@REVISION`
                where needed), or the tag of a published dictionary.
            site: the dictionary's tag, such as "M2". Files that store no site need it.

        Raises:
            FileNotFoundError: the file, folder or published dictionary was not found; the message says what was tried.
            ValueError: it does not hold a complete dictionary, is not for `site`, or needs one.

        Examples:
            >>> from tinymodel_jax import Dictionary, TinyModel
            >>> TinyModel("mini")["M2"].dictionary.save_pretrained("M2")
            >>> Dictionary.from_pretrained("M2").config.n_features
            512
        """
        from tinymodel_jax.io.artifacts import load_dictionary  # loading is a layer above

        return load_dictionary(path_or_name, site)

    def init(self, key: Array, x: Any = None) -> dict[str, Any]:
        """Return `{"params": initial parameters}`, as a Linen module does. `x` is ignored.

        Examples:
            >>> import jax
            >>> from tinymodel_jax import Dictionary, DictionaryConfig
            >>> config = DictionaryConfig("x", "x", d_in=8, d_out=8, n_features=16)
            >>> variables = Dictionary(config).init(jax.random.key(0))
            >>> variables["params"]["W_enc"].shape
            (8, 16)
        """
        del x
        return dict(_InitialParams(self.config).init(key))

    def apply(self, variables: Mapping[str, Any], *args: Any, method: str = "__call__", **kwargs: Any) -> Array:
        """Call a method with the parameters of `variables`, as a Linen module does.

        Args:
            variables: `{"params": …}`, as `init` returns it.
            method: name of the method; positional and keyword arguments (`args`, `kwargs`) are passed on to it.

        Examples:
            >>> import jax, jax.numpy as jnp
            >>> from tinymodel_jax import Dictionary, DictionaryConfig
            >>> dictionary = Dictionary(DictionaryConfig("x", "x", d_in=8, d_out=8, n_features=16))
            >>> variables = dictionary.init(jax.random.key(0))
            >>> dictionary.apply(variables, jnp.ones((3, 8)), method="encode").shape
            (3, 16)
        """
        return getattr(Dictionary(self.config, variables["params"]), method)(*args, **kwargs)

    def with_features(self, indices: Indices) -> Dictionary:
        """Return a dictionary with only these features, in the given order.

        Its predictions lack the contributions of all other features.

        Raises:
            ValueError: no features are given, or fewer than `k`, an index is out of range or repeated, the
                architecture is groupmax, whose groups would change, or the features of a cross-layer transcoder would
                change their layer.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> lm = TinyModel("mini")
            >>> lm["M2"].dictionary.with_features(slice(64)).config.n_features
            64
        """
        if self.config.architecture == "groupmax":
            raise ValueError("with_features: a groupmax dictionary compares all features of a group; keep it whole.")
        chosen = np.atleast_1d(resolve_indices(indices, self.config.n_features))
        if not chosen.size or len(np.unique(chosen)) < len(chosen):
            raise ValueError(f"with_features: got {indices!r:.80}; give one or more features, each once.")
        layers = np.arange(self.config.n_layers)
        if not np.array_equal(chosen // self.config.features_per_layer, layers.repeat(len(chosen) // len(layers))):
            raise ValueError(
                f"with_features: of a cross-layer transcoder of {len(layers)} layers, give as many features of each "
                "layer, in the order of the layers."
            )
        own = per_feature(self.config)
        kept = {name: array[..., chosen] if name in own else array for name, array in self.params.items()}
        kept["W_dec"] = self.params["W_dec"][chosen]
        return Dictionary.from_params(dataclasses.replace(self.config, n_features=len(chosen)), kept)

    def neighbours(self, feature: Indices, n: int = 10) -> Neighbours:
        """Return the nearest features by the cosine of their decoder directions, nearest first.

        Args:
            feature: an int, which gives arrays (n,), or a list or slice of m features, which gives (m, n).
            n: number of neighbours of each feature, which is not one of them.

        Raises:
            ValueError: a feature or `n` is out of range.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> lm = TinyModel("mini")
            >>> near = lm["M2"].dictionary.neighbours(304, n=3)
            >>> near.features.shape, bool(near.cosine[0] >= near.cosine[1])
            ((3,), True)
        """
        W_dec, chosen = self._known_params()["W_dec"], resolve_indices(feature, self.config.n_features)
        return nearest_rows(W_dec, np.arange(len(W_dec)) if chosen is None else chosen, n)

    def save_pretrained(self, directory: str | os.PathLike[str], format: str | None = None) -> None:
        """Write `dictionary.safetensors` and `config.json`, which `from_pretrained` reads, or another library's files.

        Args:
            format: `saelens`, `dictionary_learning`, `sparsify`, `circuit-tracer`, or `tinymodel-pt`, the reference's
                file; its library computes the same from it.

        Raises:
            ValueError: the format is unknown or has no room for the dictionary, or the folder holds something else.

        Examples:
            >>> import os
            >>> from tinymodel_jax import TinyModel
            >>> TinyModel("mini")["M2"].dictionary.save_pretrained("M2")
            >>> sorted(os.listdir("M2"))
            ['config.json', 'dictionary.safetensors']
        """
        from tinymodel_jax.io.artifacts import save_dictionary  # saving is a layer above

        save_dictionary(self, directory, format)

    def push_to_hub(
        self, address: str, *, license: str | None = None, private: bool | None = None, format: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes, and a card, in one commit; return its address.

        `from_pretrained` of the address that is returned loads exactly this upload.

        Args:
            address: OWNER/NAME/PATH, a folder of a repository, with @BRANCH for another branch than main. The
                repository and the branch are created if they do not exist.
            license: the dictionary's licence for the card, in the hub's spelling, such as "mit"; None states none.
            private: whether a new repository is private; None takes the owner's default.
            format: another library's, as in `save_pretrained`, unless it is one file. Of "circuit-tracer", whose folder
                holds a file for each layer, the address of this layer's file is returned.

        Raises:
            ModuleNotFoundError: `huggingface_hub` is not installed.
            OSError: the upload failed, and changed no file.
            ValueError: as `TinyModel.push_to_hub` and `save_pretrained`.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> dictionary = TinyModel("mini")["M2"].dictionary
            >>> dictionary.push_to_hub("me/my-model/dictionaries/M2", license="mit")  # doctest: +SKIP
        """
        from tinymodel_jax.io.hub.upload import push_dictionary  # the hub is a layer above

        return push_dictionary(self, address, license, private, format)

    def _known_params(self) -> dict[str, Any]:
        if not self.params:
            raise ValueError(
                "this Dictionary holds no parameters: load one with Dictionary.from_pretrained(path), "
                "or give some with Dictionary.from_params(config, params)."
            )
        return self.params

    def __repr__(self) -> str:
        cfg = self.config
        return f"Dictionary({cfg.hook_in} -> {cfg.hook_out}, {cfg.architecture}, {cfg.n_features} features)"


class _InitialParams(nn.Module):
    """Linen module that draws a dictionary's initial parameters."""

    config: DictionaryConfig

    @nn.compact
    def __call__(self) -> None:
        for name, shape in param_shapes(self.config).items():
            self.param(name, _initializer(name, self.config), shape, self.config.param_dtype)


def require_finite(params: DictionaryParams, what: str) -> None:
    """Check that parameters are finite. Traced arrays and arrays of several processes are not checked.

    Raises:
        ValueError: parameters contain NaN or infinity; the message names all of them.
    """
    known = {name: array for name, array in params.items() if not isinstance(array, Tracer)}
    here = {name: np.asarray(array) for name, array in known.items() if getattr(array, "is_fully_addressable", True)}
    bad = {name: array.size - np.count_nonzero(np.isfinite(array)) for name, array in here.items()}
    if any(bad.values()):
        named = ", ".join(f"{n} in {name}" for name, n in bad.items() if n)
        raise ValueError(
            f"{what} has values that are NaN or infinite ({named}), which would make results NaN. "
            "Use an earlier version of it, or train it again."
        )


def resolve_indices(indices: Indices, n_features: int) -> Any:
    """Check feature indices; return None, an int32 scalar or a 1-D int32 array. Traced indices are returned unchanged.

    Raises:
        ValueError: an index is not an integer, or is outside -n_features..n_features-1.
    """
    if indices is None or isinstance(indices, Tracer):
        return indices
    if isinstance(indices, slice):
        return np.arange(n_features, dtype=np.int32)[indices]
    array = np.asarray(indices)
    if array.size == 0 and array.ndim == 1:
        array = array.astype(np.int32)
    if array.ndim > 1 or array.dtype.kind not in "iu":
        got = f"{array.dtype} values of shape {array.shape}" if array.ndim else repr(indices)
        raise ValueError(f"indices: got {got}; expected an int, a slice, or a flat list of ints.")
    outside = array[(array < -n_features) | (array >= n_features)]
    if outside.size:
        raise ValueError(f"feature {outside.flat[0]} is out of range; the dictionary has features 0..{n_features - 1}.")
    return (array % n_features).astype(np.int32)


def _of_width(array: Any, name: str, size_name: str, size: int) -> Array:
    array = jnp.asarray(array)
    if array.ndim < 1 or array.shape[-1] != size:
        raise ValueError(f"{name} has shape {array.shape}; its last axis must be {size_name}={size}.")
    return array


def _initializer(name: str, config: DictionaryConfig) -> nn.initializers.Initializer:
    if name in ("W_enc", "b_enc"):
        return uniform_fan_in(config.d_in // config.n_layers)
    if name in ("W_dec", "b_dec"):
        draw = uniform_fan_in(config.n_features)
        if name == "W_dec" and config.n_layers > 1:
            written = is_written(config.n_features, config.d_out, config.n_layers)
            return lambda *args: jnp.where(written, draw(*args), 0)
        return draw
    return nn.initializers.zeros

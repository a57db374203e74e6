"""Parameter trees: names, shapes, initial values, and TransformerLens-shaped views."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import Initializer
from jaxtyping import Array, Float


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree as `{"blocks.0.attn.W_Q": array, …}`."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= {f"{name.replace('blocks_', 'blocks.')}.{rest}": leaf for rest, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested tree of `flatten`'s output."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, leaf = name.replace("blocks.", "blocks_").split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


def require_tree(params: Any) -> None:
    """Require a mapping of parameters, not the variables that Flax wraps around it.

    Raises:
        ValueError: it is not a mapping, or it is `{"params": parameters}`.
    """
    if not isinstance(params, Mapping) or set(params) == {"params"}:
        got = "{'params': …}" if isinstance(params, Mapping) else f"a {type(params).__name__}"
        raise ValueError(
            f"params is {got}; expected names and arrays: the variables['params'] of a Flax module's init."
        )


def require_shapes(arrays: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Require exactly the expected names and shapes.

    Raises:
        ValueError: parameters are missing, unexpected or of the wrong shape; the message names all of them.
    """
    problems = [f"missing {name!r} {shape}" for name, shape in expected.items() if name not in arrays]
    problems += [f"unexpected {name!r}" for name in arrays if name not in expected]
    problems += [
        f"{name!r} has shape {tuple(arrays[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in arrays and tuple(arrays[name].shape) != shape
    ]
    if problems:
        raise ValueError(f"parameters do not fit {what}: {'; '.join(problems)}.")


def own_array(array: Any, dtype: Any) -> Array:
    """Return a JAX array; a NumPy array is copied, since it may change or map a file that is deleted later.

    NumPy converts it, because `jnp.array` would compile a program for every shape.
    """
    return array.astype(dtype) if isinstance(array, jax.Array) else jax.device_put(np.array(array, dtype))


class ParamsModule(nn.Module):
    """A Flax module that traces an initializer only where a parameter is missing.

    `nn.Module.param` traces it on every call, to compare shapes, which takes a quarter of the time of tracing a pass.
    """

    @nn.nowrap
    def param(self, name: str, init_fn: Callable[..., Any], *init_args: Any, **options: Any) -> Any:
        """Return the parameter, or make it with `init_fn(key, shape, dtype)`.

        Raises:
            flax.errors.ScopeParamShapeError: it has another shape.
        """
        if self.has_variable("params", name):
            value = self.get_variable("params", name)
            if np.shape(value) == init_args[0]:
                return value
        return super().param(name, init_fn, *init_args, **options)


def uniform_fan_in(fan_in: int) -> Initializer:
    """Return an initializer that draws uniformly from ± 1/sqrt(fan_in), as the reference's linear layers do."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class WeightViews:
    """TransformerLens names for a model's parameters, stacked over layers."""

    params: Mapping[str, Any]

    def _stacked(self, module: str, name: str) -> Array:
        layers = sum(key.startswith("blocks_") for key in self.params)
        return jnp.stack([self.params[f"blocks_{layer}"][module][name] for layer in range(layers)])

    @property
    def W_E(self) -> Float[Array, "d_vocab d_model"]:
        """Token embeddings."""
        return self.params["W_E"]

    @property
    def W_pos(self) -> Float[Array, "n_ctx d_model"]:
        """Position embeddings."""
        return self.params["W_pos"]

    @property
    def W_Q(self) -> Float[Array, "layer head d_model d_head"]:
        """Query maps."""
        return self._stacked("attn", "W_Q")

    @property
    def W_K(self) -> Float[Array, "layer head d_model d_head"]:
        """Key maps."""
        return self._stacked("attn", "W_K")

    @property
    def W_V(self) -> Float[Array, "layer head d_model d_head"]:
        """Value maps."""
        return self._stacked("attn", "W_V")

    @property
    def W_O(self) -> Float[Array, "layer head d_head d_model"]:
        """Output maps of the heads."""
        return self._stacked("attn", "W_O")

    @property
    def b_O(self) -> Float[Array, "layer d_model"]:
        """Biases of the attention outputs."""
        return self._stacked("attn", "b_O")

    @property
    def W_in(self) -> Float[Array, "layer d_model d_mlp"]:
        """Input maps of the MLPs; column n is what neuron n reads."""
        return self._stacked("mlp", "W_in")

    @property
    def b_in(self) -> Float[Array, "layer d_mlp"]:
        """Biases of the neurons."""
        return self._stacked("mlp", "b_in")

    @property
    def W_out(self) -> Float[Array, "layer d_mlp d_model"]:
        """Output maps of the MLPs; row n is what neuron n writes."""
        return self._stacked("mlp", "W_out")

    @property
    def b_out(self) -> Float[Array, "layer d_model"]:
        """Biases of the MLP outputs."""
        return self._stacked("mlp", "b_out")

    @property
    def W_U(self) -> Float[Array, "d_model d_vocab"]:
        """Unembedding."""
        return self.params["W_U"]

    @property
    def b_U(self) -> Float[Array, " d_vocab"]:
        """Biases of the logits."""
        return self.params["b_U"]

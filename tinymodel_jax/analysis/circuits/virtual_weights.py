"""Virtual weights: how strongly each feature of one dictionary drives each feature of a later one, without any prompt.

    direct          written(W_dec)[source] @ read(W_enc)[:, target]
    through a head  written(W_dec)[source] @ W_V @ W_O @ read(W_enc)[:, target]

One unit of the source's activation adds this to the target's pre-activation: directly at the same position, or at every
position that reads it through the head, times the attention pattern. There is no layer norm, so the weights are exact,
and the same for every input. For `gated` targets, the pre-activation is that of the magnitude.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinymodel_jax.analysis.search.stream_directions import reaches, read, written
from tinymodel_jax.block_order import block_and_hook, comes_after
from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.linear import require_fixed_directions, require_linear_encoder
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.runtime.compilation import fast_jit

TOGETHER = 512
"""Features whose products with all others are held in memory together."""


class Links(NamedTuple):
    """The strongest links of every feature, strongest first."""

    features: Int[np.ndarray, "n_features n"]
    """For each feature of the source, indices of features of the target."""
    values: Float[np.ndarray, "n_features n"]
    """Weight of each link: what one unit of the source's activation adds to the target's pre-activation."""


def virtual_weights(
    lm: TinyModel, source: str, target: str, through: tuple[int, int] | None = None, top: int = 10
) -> Links:
    """Return the features of a later dictionary with the largest absolute weights, for each feature of a source.

        direct          written(W_dec)[source] @ read(W_enc)[:, target]
        through a head  written(W_dec)[source] @ W_V @ W_O @ read(W_enc)[:, target]

    `written` and `read` map directions at the dictionaries' hook points to directions of the residual stream.

    Args:
        source: tag of a dictionary of the model, such as "M0".
        target: tag of a later one, such as "M2".
        through: layer and head whose value and output matrices lie between; None for the direct weight. An SAE of an
            attention's output, such as "A2", is only reached through the heads of its own layer.
        top: links per feature, at most the features of the target.

    Raises:
        ValueError: what the source writes is not in what the target reads, the head does not lie between, or
            a dictionary normalizes its input.

    Source: virtual weights (Elhage et al. 2021); between transcoders, Dunefsky et al. 2024.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import circuits
        >>> lm = TinyModel("mini")
        >>> links = circuits.virtual_weights(lm, "M0", "M2", top=3)
        >>> links.features.shape
        (428, 3)
    """
    own, theirs = lm[source].dictionary, lm[target].dictionary
    of_heads = through is not None and _reads_heads(theirs)
    if not (of_heads or reaches(own.config, theirs.config)):
        raise ValueError(
            f"virtual_weights: what {source} writes is not in the residual stream that {target} reads; name a source "
            "that writes to the stream and a target that reads it later, or a head with through=(layer, head)."
        )
    require_fixed_directions(own.config, "virtual_weights")
    require_linear_encoder(theirs.config, "virtual_weights")
    if not top >= 1:
        raise ValueError(f"virtual_weights: top={top}; it must be at least 1.")
    directions = rows_written(lm, own)
    if through is not None:
        directions = _through_head(lm, own, theirs, directions, through)
    rows = _encoder_rows(theirs) if of_heads else rows_read(lm, theirs)
    return strongest_products(directions, rows, min(top, theirs.config.n_features))


def are_fixed(source: DictionaryConfig, target: DictionaryConfig) -> bool:
    """Whether the weights are the same for every input: whether nothing between the two features is normalized."""
    return not source.rescales_output and target.normalize == "none"


def rows_written(lm: TinyModel, dictionary: Dictionary) -> Float[Array, "n_features d_model"]:
    """Return what one unit of each feature adds to the residual stream."""
    return written(lm, dictionary.config.hook_out, dictionary.params["W_dec"])


def rows_read(lm: TinyModel, dictionary: Dictionary) -> Float[Array, "n_features d_model"]:
    """Return the direction of the residual stream that each feature's pre-activation reads."""
    return read(lm, dictionary.config.hook_in, _encoder_rows(dictionary))


def _encoder_rows(dictionary: Dictionary) -> Float[Array, "n_features d_in"]:
    encoders = dictionary.params["W_enc"].T
    gated = dictionary.config.architecture == "gated"
    return encoders * jnp.exp(dictionary.params["r_mag"])[:, None] if gated else encoders


def _reads_heads(dictionary: Dictionary) -> bool:
    """Whether a dictionary reads what the heads of a layer write, before it is added to the stream."""
    return block_and_hook(dictionary.config.hook_in)[1] == "hook_attn_out"


def strongest_products(A: Float[Array, "n d"], B: Float[Array, "m d"], top: int) -> Links:
    """Return, for each row of `A`, the `top` rows of `B` with the largest absolute products, and the products."""
    parts = [_largest(A[start : start + TOGETHER], B, top=top) for start in range(0, len(A), TOGETHER)]
    features, values = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in (0, 1))
    return Links(features.astype(np.int32), values.astype(np.float32))


def _through_head(
    lm: TinyModel, own: Dictionary, theirs: Dictionary, directions: Array, through: tuple[int, int]
) -> Array:
    if np.shape(through) != (2,):
        raise ValueError(f"virtual_weights: through={through!r}; give (layer, head).")
    layer, head = through
    if layer not in range(lm.config.n_layers) or head not in range(lm.config.n_heads):
        raise ValueError(
            f"virtual_weights: through={through}; layers are 0..{lm.config.n_layers - 1} and heads "
            f"0..{lm.config.n_heads - 1}."
        )
    hooks = f"blocks.{layer}.hook_attn_in", f"blocks.{layer}.hook_attn_out"
    hook_in = theirs.config.hook_in
    follows = hook_in == hooks[1] if _reads_heads(theirs) else comes_after(hook_in, hooks[1])
    if not (comes_after(hooks[0], own.config.hook_out) and follows):
        raise ValueError(
            f"virtual_weights: the attention of layer {layer} is not between {own.config.hook_out} and "
            f"{theirs.config.hook_in}; name a layer that is."
        )
    attn = lm.params[f"blocks_{layer}"]["attn"]
    return directions @ attn["W_V"][head] @ attn["W_O"][head]


@partial(fast_jit, static_argnames=("top",))
def _largest(A: Array, B: Array, *, top: int) -> tuple[Array, Array]:
    products = A.astype(jnp.float32) @ B.astype(jnp.float32).T
    _, features = jax.lax.top_k(jnp.abs(products), top)
    return features, jnp.take_along_axis(products, features, axis=1)

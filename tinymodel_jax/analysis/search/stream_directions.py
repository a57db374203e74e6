"""Directions at hook points as directions of the residual stream: what features add to it, and what they read of it.

There is no layer norm, so where one matrix at most lies between a hook point and the stream, a direction there is a
direction of the stream, the same for every input.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymodel_jax.block_order import READERS, STREAM, WRITERS, block_and_hook, comes_after
from tinymodel_jax.config import DictionaryConfig, split_hooks
from tinymodel_jax.lm import TinyModel

WRITTEN = (*STREAM, *WRITERS, "attn.hook_z", "mlp.hook_post")
"""Hook points whose value is the stream, is added to it, or is added after W_O or W_out."""
READ = (*STREAM, *READERS, "attn.hook_q", "attn.hook_k", "attn.hook_v", "mlp.hook_pre")
"""Hook points whose value is the stream, or a linear map of it (W_Q, W_K, W_V, W_in)."""


def is_written(hook_out: str) -> bool:
    """Whether what a dictionary predicts at a hook point reaches the stream through one matrix at most.

    Of several hook points, joined by "+", all must.
    """
    return all(block_and_hook(name)[1] in WRITTEN for name in split_hooks(hook_out))


def is_read(hook_in: str) -> bool:
    """Whether the value at a hook point is the stream, or a linear map of it."""
    return block_and_hook(hook_in)[1] in READ


def adds_to_stream(hook_out: str) -> bool:
    """Whether a value at a hook point is added to the stream, rather than being the stream."""
    return is_written(hook_out) and block_and_hook(hook_out)[1] not in STREAM


def reaches(source: DictionaryConfig, target: DictionaryConfig) -> bool:
    """Whether the residual stream contains what `source` predicts when `target` reads it; both of one hook point."""
    written_at, read_at = source.hook_out, target.hook_in
    if len(source.hooks_out) > 1 or len(target.hooks_in) > 1:
        return False
    return is_written(written_at) and is_read(read_at) and comes_after(read_at, written_at)


def written(lm: TinyModel, hook_out: str, directions: Float[Array, "n width"]) -> Float[Array, "n d_model"]:
    """Return what directions at a hook point, such as decoder rows, add to the residual stream.

    Rows of several hook points, joined by "+", add up where the values are added to the stream. Where they are the
    stream, a row takes the place of earlier ones, as an edit of a crosscoder does.

    Raises:
        ValueError: the value there does not reach the stream through one matrix.
    """
    if not is_written(hook_out):
        raise ValueError(f"{hook_out} does not reach the residual stream through one matrix; {', '.join(WRITTEN)} do.")
    if len(names := split_hooks(hook_out)) > 1:
        total = jnp.zeros((len(directions), lm.config.d_model), directions.dtype)
        for name, rows in zip(names, jnp.split(directions, len(names), axis=-1), strict=True):
            own = written(lm, name, rows)
            total = own if block_and_hook(name)[1] in STREAM else total + own
        return total
    layer, hook = block_and_hook(hook_out)
    block = lm.params[f"blocks_{layer}"]
    if hook == "attn.hook_z":
        return directions @ block["attn"]["W_O"].reshape(-1, lm.config.d_model)
    return directions @ block["mlp"]["W_out"] if hook == "mlp.hook_post" else directions


def read(lm: TinyModel, hook_in: str, directions: Float[Array, "n width"]) -> Float[Array, "n d_model"]:
    """Return the directions of the residual stream whose products with it are those of directions at a hook point.

    The constant that a bias (`b_in`) adds to the products is left out.

    Args:
        directions: for example encoder columns, one per row.

    Raises:
        ValueError: the value there is not a linear map of the stream.
    """
    if not is_read(hook_in):
        raise ValueError(f"{hook_in} is not a linear map of the residual stream; {', '.join(READ)} are.")
    layer, hook = block_and_hook(hook_in)
    block = lm.params[f"blocks_{layer}"]
    if hook.startswith("attn."):
        W = block["attn"][f"W_{hook[-1].upper()}"]  # (head, d_model, d_head)
        return directions @ W.transpose(0, 2, 1).reshape(-1, lm.config.d_model)
    return directions @ block["mlp"]["W_in"].T if hook == "mlp.hook_pre" else directions

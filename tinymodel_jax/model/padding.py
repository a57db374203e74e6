"""Token ids from callers: checks, padding to one of a few lengths, and cutting of results to the original length.

Attention is causal and padding is on the right, so a position's values do not depend on it. A row that starts with
`[BEGIN]` or `[PAD]` and has `[PAD]` before a token is an error. In other rows `[PAD]` is an id like any other, as in
the reference, so that the model can be run on arbitrary ids. At most six lengths are ever compiled for a batch size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tinymodel_jax.config import ModelConfig


def is_traced(*values: Any) -> bool:
    """Whether a value holds a tracer, so that the caller is inside `jit`, `grad` or `vmap`."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def check_tok_ids(tok_ids: Any, config: ModelConfig, first_row: int = 0) -> np.ndarray:
    """Return token ids as an int32 array (batch, seq); 1-D ids are a batch of one.

    Args:
        first_row: number of the first row, for messages about a part of the caller's rows.

    Raises:
        ValueError: wrong rank or type, a sequence longer than the context, an id outside the vocabulary, or `[PAD]`
            before a token in a row that starts with `[BEGIN]` or `[PAD]`.
    """
    ids = as_array(tok_ids)
    if ids.dtype.kind == "U":
        raise ValueError(
            "tok_ids: got text where ids are expected; lm.to_tokens(texts) turns a text or a list of texts into ids, "
            "without ids among the texts."
        )
    huge = [value for value in ids.flat if isinstance(value, int)] if ids.dtype.kind == "O" else []
    if huge:  # beyond what NumPy's integers hold
        raise ValueError(f"tok_ids: id {max(huge, key=abs)} is outside the vocabulary 0..{config.d_vocab - 1}.")
    if ids.size == 0 and ids.dtype.kind == "f":
        ids = ids.astype(np.int32)  # NumPy's type for an empty list
    if ids.ndim == 1:
        ids = ids[None]
    check_shape(ids, config)
    outside = np.argwhere((ids < 0) | (ids >= config.d_vocab))
    if len(outside):
        row, column = outside[0]
        raise ValueError(
            f"tok_ids: id {ids[row, column]} at row {first_row + row}, position {column} is outside the vocabulary "
            f"0..{config.d_vocab - 1} ({len(outside)} such ids)."
        )
    _require_right_padding(ids, config, first_row)
    return ids.astype(np.int32)


def batch_of(tok_ids: Any, config: ModelConfig) -> Any:
    """Return token ids as (batch, seq). The values of traced ids are unknown, so they are not checked.

    Raises:
        ValueError: as `check_tok_ids`; for traced ids, only a wrong type or shape.
    """
    if not is_traced(tok_ids):
        return check_tok_ids(tok_ids, config)
    ids = tok_ids[None] if getattr(tok_ids, "ndim", None) == 1 else tok_ids
    check_shape(ids, config)
    return ids


def _require_right_padding(ids: np.ndarray, config: ModelConfig, first_row: int) -> None:
    is_pad = ids == config.pad_id
    is_story = is_pad[:, :1] | (ids[:, :1] == config.begin_id)
    wrong = np.argwhere(is_pad[:, :-1] & ~is_pad[:, 1:] & is_story)
    if len(wrong):
        row, column = wrong[0]
        rows = len(np.unique(wrong[:, 0]))
        raise ValueError(
            f"tok_ids: row {first_row + row} has [PAD] (id {config.pad_id}) at position {column}, before a token"
            f"{f' ({rows} such rows)' if rows > 1 else ''}. Pad on the right: the row's tokens first, then [PAD]."
        )


def as_array(tok_ids: Any) -> np.ndarray:
    """Return token ids as an array; a memory-mapped array stays memory-mapped.

    Raises:
        ValueError: rows differ in length.
    """
    try:
        return np.asarray(tok_ids)
    except ValueError as error:
        raise ValueError(
            "tok_ids: rows of different lengths; pad them (the tokenizer does) to (batch, seq)."
        ) from error


def check_shape(ids: Any, config: ModelConfig) -> None:
    """Check the type, rank and length of token ids, traced or not. Values are not checked.

    Raises:
        ValueError: as `check_tok_ids`.
    """
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"tok_ids: got {ids.dtype} values; give integers of shape (batch, seq), or a list of texts.")
    if ids.ndim != 2:
        raise ValueError(
            f"tok_ids: got shape {ids.shape}; expected (batch, seq), and for the methods of TinyModel also (seq,)."
        )
    if ids.shape[1] > config.n_ctx:
        raise ValueError(
            f"tok_ids: sequences of {ids.shape[1]} tokens; the model's context is {config.n_ctx}. Cut them."
        )


@functools.cache
def bucket_lengths(n_ctx: int) -> tuple[int, ...]:
    """Return the lengths that are compiled: a few powers of two, three quarters of the context, the context."""
    powers = [n_ctx >> shift for shift in (4, 3, 2, 1) if n_ctx >> shift]
    return tuple(sorted({*powers, -(-3 * n_ctx // 4), n_ctx}))


def bucket(length: int, n_ctx: int) -> int:
    """Return the smallest compiled length that holds `length` tokens."""
    return next(size for size in bucket_lengths(n_ctx) if size >= length)


def feature_bucket(n: int, n_features: int) -> int:
    """Return the number of features that is compiled for `n` of a dictionary's features: a power of 8, or all."""
    size = 8
    while size < n:
        size *= 8
    return max(n, min(size, n_features))  # indices that repeat may be more than all


def pad_right(ids: np.ndarray, width: int, pad_id: int) -> np.ndarray:
    """Pad rows of ids on the right to a width."""
    return np.pad(ids, ((0, 0), (0, width - ids.shape[1])), constant_values=pad_id)


def pad_to_bucket(tok_ids: Any, config: ModelConfig) -> tuple[Any, int]:
    """Return token ids as (batch, compiled length), and their original length. Traced ids are not padded.

    Raises:
        ValueError: as `check_tok_ids`.
    """
    ids = batch_of(tok_ids, config)
    length = ids.shape[1]
    return (ids if is_traced(ids) else pad_right(ids, bucket(length, config.n_ctx), config.pad_id)), length


def target_weights(tok_ids: Any, length: int, attn_mask: Any, config: ModelConfig) -> Any:
    """Return the weight of each token as a target of the loss, (batch, compiled length); 0 in the padding.

    Args:
        tok_ids: (batch, compiled length) ids, the first `length` of each row the caller's.
        attn_mask: (batch, length), the weights of the tokens, where `[PAD]` always gets 0. None: 1, but 0 at `[END]`.

    Raises:
        ValueError: mask and ids differ in shape, or all weights are 0.
    """
    given = tok_ids[:, :length] if is_traced(tok_ids) else np.asarray(tok_ids)[:, :length]
    mask = (given != config.end_id) if attn_mask is None else attn_mask
    mask = mask if is_traced(mask) else np.asarray(mask)
    if mask.shape != given.shape:
        raise ValueError(f"attn_mask has shape {mask.shape}, tok_ids {given.shape}; they must agree.")
    numpy = jnp if is_traced(given, mask) else np  # outside of a trace, jnp compiles a program for every length
    mask = numpy.where(given != config.pad_id, mask, np.zeros((), mask.dtype))
    if not is_traced(mask) and not np.any(mask[:, 1:]):
        raise ValueError("loss: no token to predict; give at least two tokens per row, and a mask that is not all 0.")
    return numpy.pad(mask, ((0, 0), (0, tok_ids.shape[1] - length))).astype(np.float32)


def pad_below(ids: np.ndarray, n_rows: int, pad_id: int) -> np.ndarray:
    """Add rows of padding up to a number of rows, so that batches have one compiled shape."""
    return np.pad(ids, ((0, n_rows - len(ids)), (0, 0)), constant_values=pad_id)


def cut(array: jax.Array, axes: Iterable[int], length: int) -> jax.Array:
    """Cut axes of a result back to `length`."""
    index = [slice(None)] * array.ndim
    for axis in axes:
        index[axis] = slice(length)
    if all(array.shape[axis] == length for axis in axes):
        return array
    if not is_traced(array) and array.devices() == {jax.devices("cpu")[0]}:
        # JAX compiles a slicing program for every length; on the CPU, a NumPy view needs none.
        return jax.device_put(np.asarray(array)[tuple(index)])
    return array[tuple(index)]

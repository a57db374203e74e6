"""Causal attention for passes whose scores and pattern nobody looks at.

On CPUs, and everywhere for long contexts, no (batch, head, query, key) array is made: queries are taken in blocks, each
against the keys up to the end of its part of the context. So most scores above the diagonal are not computed, and
memory grows with the context, not with its square. Derivatives, forward and reverse, compute the pattern again from the
softmax's normalizers instead of keeping it. Accelerators compute all scores of a short context at once, which the TPU
compiler estimates to be faster (`docs/results/tpu.md`).

Source: FlashAttention-2 (Dao 2023, sections 3.1 and 3.2): the normalizers that are kept, and the gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinymodel_jax.runtime.few_rows import few_rows_at_a_time

BLOCK = 64
"""Queries in a block."""
PARTS = 4
"""Parts of the context, each with its own end of the keys; more of them compute less above the diagonal, but compile
longer."""
BLOCK_BYTES = 1 << 21
"""Size of the scores that are computed at once on a CPU: about a core's second-level cache."""
LONG = 1024
"""Keys from which on accelerators use blocks too, to save memory."""


def worthwhile(q: Float[Array, "batch query n_heads d_head"], k: Float[Array, "batch key n_heads d_head"]) -> bool:
    """Whether `causal_attention` is faster than the form with hook points, which makes up to five arrays of scores."""
    batch, n_queries, n_heads, _ = q.shape
    return 4 * batch * n_heads * n_queries * k.shape[1] >= BLOCK_BYTES


def causal_attention(
    q: Float[Array, "batch query n_heads d_head"],
    k: Float[Array, "batch key n_heads d_head"],
    v: Float[Array, "batch key n_heads d_head"],
) -> Float[Array, "batch query n_heads d_head"]:
    """Return the values, weighted by the softmax of the scores, of each query and head.

    The queries are at the last positions of the keys, and see the keys up to their own. A score that overflows gives
    NaN.
    """
    others = _all_at_once if k.shape[1] < LONG else _by_blocks
    return jax.lax.platform_dependent(q, k, v, cpu=_by_blocks, default=others)


def _all_at_once(q: Array, k: Array, v: Array) -> Array:
    """Return the result of all rows by the whole array of scores."""
    scores = _scores(k.shape[1] - q.shape[1], *(jnp.swapaxes(x, 1, 2) for x in (q, k)))
    pattern = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqt,bthk->bqhk", pattern, v)


@jax.custom_jvp
def _by_blocks(q: Array, k: Array, v: Array) -> Array:
    """Return the result of all rows by blocks of queries."""
    return _of_rows(_attend, q, k, v)[0]


@_by_blocks.defjvp
def _jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    z, normalizers = _of_rows(_attend, *primals)
    tangent = _of_rows(jax.checkpoint(_tangent, prevent_cse=False), *primals, z, normalizers, *tangents)
    return z, tangent


def _of_rows(function: Callable[..., Any], *arrays: Array) -> Any:
    """Apply a function of a row's queries, keys and other arrays to every row."""
    _, _, n_heads, _ = arrays[0].shape
    most = BLOCK_BYTES // (4 * n_heads * BLOCK * arrays[1].shape[1])
    return few_rows_at_a_time(function, *arrays, most=most)


def _attend(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Return the result of one row, (query, head, d_head), and the log of the softmax's normalizers, (head, query)."""
    q, k, v = map(_by_head, (q, k, v))
    result, normalizers = _in_blocks(_attend_block, (q,), (k, v))
    return _by_head(result).astype(v.dtype), normalizers


def _attend_block(first: Array, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    scores = _scores(first, q, k)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    result = _product("hqt,htk->hqk", weights.astype(v.dtype), v) / total
    return result, (largest + jnp.log(total))[..., 0]


def _tangent(
    q: Array, k: Array, v: Array, z: Array, normalizers: Array, dq: Array, dk: Array, dv: Array
) -> Float[Array, "query n_heads d_head"]:
    """Return the change of a row's result for changes of its queries, keys and values."""
    q, k, v, z, dq, dk, dv = map(_by_head, (q, k, v, z, dq, dk, dv))
    (change,) = _in_blocks(_tangent_block, (q, z, normalizers, dq), (k, v, dk, dv))
    return _by_head(change).astype(z.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)  # the transpose computes the pattern again
def _tangent_block(
    first: Array, q: Array, z: Array, normalizers: Array, dq: Array, k: Array, v: Array, dk: Array, dv: Array
) -> tuple[Array]:
    pattern = jnp.exp(_scores(first, q, k) - normalizers[..., None])
    dscores = _product("hqk,htk->hqt", dq, k) + _product("hqk,htk->hqt", q, dk)
    weighted = pattern * (dscores / math.sqrt(q.shape[-1]))
    through_pattern = _product("hqt,htk->hqk", weighted.astype(v.dtype), v)
    through_total = jnp.sum(weighted, axis=-1, keepdims=True) * z
    through_values = _product("hqt,htk->hqk", pattern.astype(v.dtype), dv)
    return (through_pattern - through_total + through_values,)


def _in_blocks(
    function: Callable[..., tuple[Array, ...]], queries: Sequence[Array], keys: Sequence[Array]
) -> list[Array]:
    """Apply a function to every block of queries and the keys before its part's end; join the results.

    Args:
        function: of a block's first position, its `queries` and the `keys`; returns arrays (head, query, …).
        queries: arrays (head, query, …), of the last positions.
        keys: arrays (head, key, …).
    """
    n_queries = queries[0].shape[1]
    before = keys[0].shape[1] - n_queries
    size = min(BLOCK, n_queries)
    n_blocks = -(-n_queries // size)
    queries = [jnp.pad(x, [(0, 0), (0, n_blocks * size - n_queries)] + [(0, 0)] * (x.ndim - 2)) for x in queries]
    blocks = [jnp.moveaxis(x.reshape(x.shape[0], n_blocks, size, *x.shape[2:]), 1, 0) for x in queries]
    results = []
    for part in np.array_split(np.arange(n_blocks), min(PARTS, n_blocks)):
        seen = [x[:, : before + size * (part[-1] + 1)] for x in keys]
        in_part = (before + size * jnp.asarray(part), *(x[part[0] : part[-1] + 1] for x in blocks))
        results.append(jax.lax.map(lambda block, seen=seen: function(*block, *seen), in_part))
    joined = (jnp.moveaxis(jnp.concatenate(x), 0, 1) for x in zip(*results, strict=True))
    return [x.reshape(x.shape[0], -1, *x.shape[3:])[:, :n_queries] for x in joined]


def _scores(
    first: Array | int, q: Float[Array, "*batch n_heads query d_head"], k: Float[Array, "*batch n_heads key d_head"]
) -> Float[Array, "*batch n_heads query key"]:
    """Return the scores of queries at positions from `first`, with minus infinity for keys that they do not see."""
    scores = _product("...qk,...tk->...qt", q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(scores > -jnp.inf, scores, jnp.nan)  # so that an overflow is seen, and not taken for a mask
    visible = jnp.arange(k.shape[-2]) <= first + jnp.arange(q.shape[-2])[:, None]
    return jnp.where(visible, scores, -jnp.inf)


def _by_head(x: Array) -> Array:
    """Swap the first two axes: positions and heads."""
    return jnp.swapaxes(x, 0, 1)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

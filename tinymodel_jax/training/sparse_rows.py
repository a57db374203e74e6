"""Exact top-k selection, and products with only the selected rows, with sparse gradients.

A TopK dictionary uses k of its F decoder rows per input, so gathering these rows to decode, and scattering gradients to
them, replaces five of six dense products. Results equal those of the dense products up to the order of summation.
Selections carry no gradient. With `rowwise`, loops over small blocks end after the first `used` rows, which is several
times faster on a CPU; otherwise there is one large gather or scatter, for accelerators. Both give the same results if
the values of later rows are 0.

Axes: `b` input, `l` prefix of a Matryoshka dictionary (1 otherwise), `k` slot, `f` feature, `d` width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

_BLOCK = 8
"""Inputs per iteration of a gathering loop; their rows (8 x 32 x 768 floats) fit a core's cache."""


def top_k(
    values: Float[Array, "b f"], k: int, two_stage: bool = False
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Return the `k` largest of each row, largest first, and their positions; ties go to the lower position.

    Args:
        two_stage: first find the k groups with the largest maxima, then search only those. On a CPU this is 2 to 3
            times faster than `lax.top_k`, which is used if F has no suitable divisor.
    """
    group = _group_size(values.shape[-1], k) if two_stage else 1
    if group == 1:
        values, positions = jax.lax.top_k(values, k)
        return values, positions
    grouped = values.reshape(values.shape[0], -1, group)
    _, groups = jax.lax.top_k(grouped.max(axis=-1), k)
    groups = jnp.sort(groups, axis=-1)  # so that ties still go to the lower position
    candidates = jnp.take_along_axis(grouped, groups[:, :, None], axis=1).reshape(values.shape[0], -1)
    best, slots = jax.lax.top_k(candidates, k)
    positions = jnp.take_along_axis(groups, slots // group, axis=1) * group + slots % group
    return best, positions


def top_k_of_shards(values: Float[Array, "b f"], k: int, mesh: Mesh) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """Return the same as `top_k`, for rows sharded over `data` and columns over `model`.

    Every device searches its own part, and only the results are exchanged. Columns that `model` does not divide are
    replicated.
    """
    rows = P("data", None)
    if values.shape[1] % mesh.shape["model"]:
        search_whole = functools.partial(jax.lax.top_k, k=k)
        return jax.shard_map(search_whole, mesh=mesh, in_specs=rows, out_specs=[rows, rows], check_vma=False)(values)

    def search(part: Array) -> tuple[Array, Array]:
        best, positions = jax.lax.top_k(part, min(k, part.shape[-1]))
        positions = positions + jax.lax.axis_index("model") * part.shape[-1]
        best, positions = (jax.lax.all_gather(a, "model", axis=1, tiled=True) for a in (best, positions))
        best, slots = jax.lax.top_k(best, k)
        return best, jnp.take_along_axis(positions, slots, axis=1)

    run = jax.shard_map(search, mesh=mesh, in_specs=P("data", "model"), out_specs=(rows, rows), check_vma=False)
    return run(values)


def kept_of_rows(
    values: Float[Array, "b f"], best: Float[Array, "b n"], positions: Int[Array, "b n"], k: Int[Array, ""] | int
) -> Bool[Array, "b f"]:
    """Return a mask of the `k` largest of each row, never more; ties go to the lower position.

    Args:
        best, positions: the `n` largest of each row, as `top_k` returns them; `k` is at most `n`.
    """
    nth = jnp.broadcast_to(jnp.asarray(k - 1), (values.shape[0], 1))
    limit, last = (jnp.take_along_axis(a, nth, axis=1) for a in (best, positions))
    return (values > limit) | ((values == limit) & (jnp.arange(values.shape[1]) <= last))


def largest_of_all(
    values: Float[Array, "b f"], rank: Int[Array, ""], bitwise: bool = False
) -> tuple[Bool[Array, "b f"], Float[Array, ""]]:
    """Return a mask of the `rank` largest of non-negative `values`, never more, and the smallest of them.

    Ties go to the lower row, and within a row to the lower position.

    Args:
        bitwise: as for `kth_largest`.
    """
    if not bitwise:
        # Otherwise a TPU's first pass is part of the product that computes the values, which then stores 15 masks.
        values = jax.lax.optimization_barrier(values)
    smallest = kth_largest(values, rank, bitwise)
    above, tied = values > smallest, values == smallest
    room = rank - jnp.sum(above, dtype=jnp.int32)
    until = jnp.cumsum(jnp.sum(tied, axis=1, dtype=jnp.int32))
    rows = jnp.arange(values.shape[0])[:, None]
    row = jnp.sum(until <= room)  # where the room ends
    tied_there = jnp.sum(tied & (rows == row), axis=0, dtype=jnp.int32)
    left = room - jnp.max(jnp.where(until <= room, until, 0))
    fits = (rows < row) | ((rows == row) & (jnp.cumsum(tied_there) <= left))
    return above | (tied & fits), smallest


def kth_largest(values: Float[Array, "*shape"], rank: Int[Array, ""], bitwise: bool = False) -> Float[Array, ""]:
    """Return the `rank`-th largest of non-negative `values` (rank 1 is the maximum), exactly.

    The bits of non-negative floats are in the same order as the floats, so counting the values that reach a number
    finds the result digit by digit, from the highest, without sorting.

    Args:
        bitwise: find one bit per pass over the values, in 31 passes with one count each, which is 5 times faster on
            CPUs. Otherwise 8 passes with 15 counts each find four bits per pass, which saves accelerators memory
            traffic, and devices that share the values 23 of 31 exchanges.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    width = 1 if bitwise else 4

    def next_digit(i: Array, found: Array) -> Array:
        # The last digit overlaps the one before it. Digits that would exceed that one count too few values.
        unit = jnp.left_shift(jnp.int32(1), jnp.maximum(31 - width * (i.astype(jnp.int32) + 1), 0))
        counts = [jnp.sum(bits >= found + digit * unit, dtype=jnp.int32) for digit in range(1, 2**width)]
        return found + unit * jnp.sum(jnp.stack(counts) >= rank, dtype=jnp.int32)

    # Unrolled, because a loop would read a copy of the values.
    found = jax.lax.fori_loop(0, -(-31 // width), next_digit, jnp.int32(0), unroll=not bitwise)
    return jax.lax.bitcast_convert_type(found, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def selected_values(
    x: Float[Array, "b d"],
    W: Float[Array, "f d"],
    bias: Float[Array, " f"],
    values: Float[Array, "b k"],
    positions: Int[Array, "b k"],
    used: Int[Array, ""],
    rowwise: bool,
) -> Float[Array, "b k"]:
    """Return `values`, which are `x @ W.T + bias` at `positions`, with gradients to `W` and `bias` only.

    A value of 0 is an empty slot or an inactive feature and passes no gradient. `x` is data and gets none.
    """
    del x, W, bias, positions, used, rowwise
    return values


def _selected_values_fwd(x, W, bias, values, positions, used, rowwise):
    out = selected_values(x, W, bias, values, positions, used, rowwise)
    return out, (x, W, bias, values, positions, used)


def _selected_values_bwd(rowwise, saved, gradient):
    x, W, bias, values, positions, used = saved
    gradient = jnp.where(values > 0, gradient, 0)
    W_gradient = scatter_rows(gradient[:, None, :], positions, x[:, None, :], used, W.shape[0], rowwise)
    bias_gradient = jnp.zeros_like(bias).at[positions].add(gradient)
    return jnp.zeros_like(x), W_gradient, bias_gradient, jnp.zeros_like(values), None, None


selected_values.defvjp(_selected_values_fwd, _selected_values_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def gather_decode(
    weights: Float[Array, "b l k"],
    positions: Int[Array, "b k"],
    W: Float[Array, "f d"],
    used: Int[Array, ""],
    rowwise: bool,
) -> Float[Array, "b l d"]:
    """Return `out[b, l] = sum over k of weights[b, l, k] * W[positions[b, k]]`."""
    return _with_rows("blk,bkd->bld", weights, positions, W, used, rowwise)


def _gather_decode_fwd(weights, positions, W, used, rowwise):
    return gather_decode(weights, positions, W, used, rowwise), (weights, positions, W, used)


def _gather_decode_bwd(rowwise, saved, gradient):
    weights, positions, W, used = saved
    weights_gradient = _with_rows("bld,bkd->blk", gradient, positions, W, used, rowwise)
    return weights_gradient, None, scatter_rows(weights, positions, gradient, used, W.shape[0], rowwise), None


gather_decode.defvjp(_gather_decode_fwd, _gather_decode_bwd)


def scatter_rows(
    weights: Float[Array, "b l k"],
    positions: Int[Array, "b k"],
    vectors: Float[Array, "b l d"],
    used: Int[Array, ""],
    n_rows: int,
    rowwise: bool,
) -> Float[Array, "f d"]:
    """Return zeros with `weights[b, l, k] * vectors[b, l]` added to row `positions[b, k]`, for all b, l and k."""
    zero = jnp.zeros((n_rows, vectors.shape[-1]), vectors.dtype)
    if not rowwise:
        return zero.at[positions].add(jnp.einsum("blk,bld->bkd", weights, vectors))

    def add_one(b: Array, total: Array) -> Array:
        return total.at[positions[b]].add(jnp.einsum("lk,ld->kd", weights[b], vectors[b]))

    return jax.lax.fori_loop(0, used, add_one, zero)


def _with_rows(equation: str, left: Array, positions: Array, W: Array, used: Array, rowwise: bool) -> Array:
    """Return the einsum of `left` with the rows of `W` at `positions`, over their common leading axis."""
    if not rowwise:
        return jnp.einsum(equation, left, W[positions])
    n = left.shape[0]
    size = next(size for size in range(_BLOCK, 0, -1) if n % size == 0)

    def one_block(i: Array, out: Array) -> Array:
        left_block, where = (jax.lax.dynamic_slice_in_dim(a, i * size, size) for a in (left, positions))
        block = jnp.einsum(equation, left_block, W[where])
        return jax.lax.dynamic_update_slice_in_dim(out, block, i * size, axis=0)

    shape = jax.eval_shape(lambda: jnp.einsum(equation, left, jnp.zeros((*positions.shape, W.shape[1]), W.dtype)))
    return jax.lax.fori_loop(0, (used + size - 1) // size, one_block, jnp.zeros(shape.shape, shape.dtype))


def _group_size(n: int, k: int) -> int:
    """Return the divisor of `n` nearest to the one that balances both stages; 1 if one stage is as good."""
    ideal = (n / k) ** 0.5
    fitting = [g for g in range(2, n // k + 1) if n % g == 0 and ideal / 2 <= g <= ideal * 2]
    return min(fitting, key=lambda g: abs(g - ideal), default=1) if n // k >= 8 else 1

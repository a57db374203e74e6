"""How fast this device multiplies and reads, measured in XLA: no implementation of the same work can be much faster."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Rates(NamedTuple):
    """Measured limits of a device."""

    flops: float
    """FLOP/s of a large square matrix product."""
    read: float
    """Bytes/s of a matrix-vector product, which reads the matrix once."""

    def floor(self, flops: float, read: float) -> float:
        """Return the seconds below which work cannot be done: its products or its bytes, whichever take longer."""
        return max(flops / self.flops, read / self.read)

    def described(self) -> str:
        """Return the rates as text."""
        return f"{self.flops / 1e9:,.0f} GFLOP/s in products, {self.read / 1e9:,.1f} GB/s read"


def measured_rates(size: int = 4096, rows: int = 768, columns: int = 196_608, dtype: str = "float32") -> Rates:
    """Return the best rates of this process's default device.

    Args:
        size: rows and columns of the operands of the product.
        rows: of the float32 matrix that is read; it is larger than caches, 600 MB by default.
        columns: of that matrix.
        dtype: number format of the product.
    """
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    square = jnp.asarray(rng.standard_normal((size, size), np.float32), dtype)
    matrix, vector = jnp.ones((rows, columns)), jnp.ones(rows)
    return Rates(2 * size**3 / _fastest(square, square, 5), matrix.nbytes / _fastest(vector, matrix, 10))


def _fastest(left: Any, right: Any, rounds: int) -> float:
    """Return the seconds of the fastest product, over rounds and over the ways in which XLA multiplies here."""
    import jax

    from tinymodel_jax.runtime.compilation import fast_compiler_options

    programs = [jax.jit(jax.numpy.matmul, compiler_options=options) for options in ({}, fast_compiler_options())]
    for program in programs:
        program(left, right).block_until_ready()
    return min(_seconds(program, left, right) for _ in range(rounds) for program in programs)


def _seconds(program: Callable[..., Any], left: Any, right: Any) -> float:
    start = time.perf_counter()
    program(left, right).block_until_ready()
    return time.perf_counter() - start

"""A function of one row, applied to the rows of arrays in small groups on a CPU, whose caches are small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import Array


def few_rows_at_a_time(function: Callable[..., Any], *arrays: Array, most: int) -> Any:
    """Return `jax.vmap(function)(*arrays)`, computed at most `most` rows at once where JAX has one device, a CPU.

    Elsewhere, all rows are computed at once: accelerators want large arrays, and several devices, of this process or of
    others, may share the rows.
    """
    together = jax.vmap(function)
    batch = arrays[0].shape[0]
    size = max((n for n in range(1, min(most, batch) + 1) if batch % n == 0), default=1)
    if size == batch or jax.device_count() > 1:
        return together(*arrays)

    def in_groups(*arrays: Array) -> Any:
        return jax.lax.map(lambda row: function(*row), arrays, batch_size=size)

    return jax.lax.platform_dependent(*arrays, cpu=in_groups, default=together)

"""Initial distributions of the parameters, shared by the transformer and the dictionaries."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer


def uniform_fan_in(fan_in: int) -> Initializer:
    """Initializer that is uniform within ± 1/sqrt(fan_in), as the reference's linear layers are."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init

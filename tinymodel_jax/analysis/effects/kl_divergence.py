"""KL divergence of a changed next-token distribution from the model's own: without cancellation, and without overflow.

KL of a position = log E[exp(c)],  c = change - E[change],  E over the model's own next-token distribution
                 = log(1 + E[exp(c) - 1 - c]),  the same without cancellation: no term is negative
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LARGE = 60.0
"""Change of a logit from which on exp of it is not taken by itself: it overflows from 88 on, and what it multiplies may
be smaller than float32 holds (exp(-87)), so that the product would be 0 where it is not."""


def kl_of_changes(
    change: Float[Array, "n batch length d_vocab"], logprobs: Float[Array, "batch length d_vocab"]
) -> Float[Array, "n batch length"]:
    """Return log E[exp(change)] of changes of mean 0: exact to rounding when small, and finite when large."""
    mean_excess = jnp.sum(jnp.exp(logprobs) * _excess(change), axis=-1)
    kl, exact = jnp.log1p(mean_excess), jnp.isfinite(mean_excess)

    def with_large_ones() -> Array:
        whole = jax.nn.logsumexp(change + logprobs, axis=-1)
        return jnp.where(exact, kl, jnp.maximum(whole, 0))

    return jax.lax.cond(exact.all(), lambda: kl, with_large_ones)  # a second pass over the vocabulary, rarely made


def _excess(x: Array) -> Array:
    """Return exp(x) - 1 - x, its series where the difference would cancel; infinity where x is `LARGE`."""
    terms = jnp.full_like(x, 1 / math.factorial(10))
    for n in range(9, 1, -1):
        terms = terms * x + 1 / math.factorial(n)
    return jnp.where(jnp.abs(x) < 0.5, x * x * terms, jnp.where(x < LARGE, jnp.exp(x) - 1 - x, jnp.inf))

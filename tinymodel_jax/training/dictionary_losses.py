"""The terms of a dictionary's training loss, as pure functions over activation arrays.

Arrays are float32 and scaled as the recipe specifies. Axes: `b` input, `l` Matryoshka prefix (1 for a plain
dictionary), `f` feature, `d` width.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TINY = 1e-20
"""Added below square roots and to divisors that may be 0, small enough to change no float32 result."""


def row_norms(rows: Float[Array, "f d"]) -> Float[Array, " f"]:
    """Return the Euclidean norm of every row, with a gradient of 0 at 0."""
    return jnp.sqrt(jnp.sum(rows * rows, axis=-1) + TINY)


def squared_error(target: Float[Array, "b d"], prediction: Float[Array, "b l d"]) -> Float[Array, ""]:
    """Return the squared error, summed over the width, averaged over inputs and prefixes."""
    return jnp.mean(jnp.sum(jnp.square(target[:, None, :] - prediction), axis=-1))


def variance(target: Float[Array, "b d"]) -> Float[Array, ""]:
    """Return the squared distance of targets from their mean, summed over the width, averaged over inputs."""
    return jnp.mean(jnp.sum(jnp.square(target - jnp.mean(target, axis=0)), axis=-1))


def l1_penalty(acts: Float[Array, "b f"], weights: Float[Array, " f"]) -> Float[Array, ""]:
    """Return `sum over f of weights * acts`, averaged over inputs; weights: decoder norms times prefix shares."""
    return jnp.mean(acts, axis=0) @ weights


def log_penalty(acts: Float[Array, "b f"], norms: Float[Array, " f"], shares: Float[Array, " f"]) -> Float[Array, ""]:
    """Return `sum over f of shares * log(1 + norms * acts)`, averaged over inputs."""
    return jnp.mean(jnp.log1p(acts * norms), axis=0) @ shares


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def jump(z: Float[Array, "b f"], threshold: Float[Array, " f"], bandwidth: float) -> Float[Array, "b f"]:
    """Return `z` where it exceeds the threshold, else 0.

    Gradient to z through the active values only; to the threshold the straight-through estimate
    `-threshold / bandwidth * [|z - threshold| < bandwidth / 2]`. Source: Rajamanoharan et al. 2024 (JumpReLU), eq. 11.
    """
    del bandwidth
    return jnp.where(z > threshold, z, 0)


def _jump_fwd(z, threshold, bandwidth):
    return jump(z, threshold, bandwidth), (z, threshold)


def _jump_bwd(bandwidth, saved, gradient):
    z, threshold = saved
    near = _near(z, threshold, bandwidth)
    return jnp.where(z > threshold, gradient, 0), -threshold / bandwidth * jnp.sum(near * gradient, axis=0)


jump.defvjp(_jump_fwd, _jump_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def mean_l0(z: Float[Array, "b f"], threshold: Float[Array, " f"], bandwidth: float) -> Float[Array, ""]:
    """Return the number of features above their threshold, averaged over inputs.

    Gradient to the threshold only: `-1 / bandwidth * [|z - threshold| < bandwidth / 2]`, averaged over inputs.
    Source: Rajamanoharan et al. 2024 (JumpReLU), eq. 12.
    """
    del bandwidth
    return jnp.sum(jnp.mean(z > threshold, axis=0, dtype=jnp.float32))


def _mean_l0_fwd(z, threshold, bandwidth):
    return mean_l0(z, threshold, bandwidth), (z, threshold)


def _mean_l0_bwd(bandwidth, saved, gradient):
    z, threshold = saved
    return jnp.zeros_like(z), -gradient / bandwidth * jnp.mean(_near(z, threshold, bandwidth), axis=0)


mean_l0.defvjp(_mean_l0_fwd, _mean_l0_bwd)


def target_l0_loss(l0: Float[Array, ""], target: Float[Array, ""]) -> Float[Array, ""]:
    """Return `(l0 / target - 1)^2`."""
    return jnp.square(l0 / target - 1)


def aux_loss(residual: Float[Array, "b d"], prediction: Float[Array, "b d"]) -> Float[Array, ""]:
    """Return the share of the residual's variance that dead features leave: `|e - prediction|^2 / |e - mean e|^2`.

    `b_dec` is not added, because it is already subtracted from the residual. Source: Gao et al. 2024, appendix A.2.
    """
    error = jnp.mean(jnp.sum(jnp.square(residual - prediction), axis=-1))
    return error / (variance(residual) + TINY)


def prefix_shares(widths: Int[Array, " l"], n_features: int) -> Float[Array, " f"]:
    """Return for every feature the share of prefixes that contain it."""
    return jnp.mean(jnp.arange(n_features)[:, None] < widths, axis=-1, dtype=jnp.float32)


def random_widths(key: Array, n_prefixes: int, n_features: int) -> Int[Array, " l"]:
    """Draw prefix sizes, log-uniform between 1 and `n_features`; the last is `n_features` itself."""
    drawn = jnp.exp(jax.random.uniform(key, (n_prefixes,)) * jnp.log(jnp.float32(n_features)))
    return jnp.clip(jnp.ceil(drawn).astype(jnp.int32), 1, n_features).at[-1].set(n_features)


def decode_prefixes(
    acts: Float[Array, "b f"], W_dec: Float[Array, "f d"], widths: tuple[int, ...] | Int[Array, " l"]
) -> Float[Array, "b l d"]:
    """Return `acts[:, :w] @ W_dec[:w]` for every prefix size w.

    Sizes in a tuple cost one product in total. Sizes in an array cost one product each, because they are not known at
    compile time.
    """
    if isinstance(widths, tuple):
        edges = (0, *widths)
        parts = [acts[:, i:j] @ W_dec[i:j] for i, j in itertools.pairwise(edges)]
        return jnp.cumsum(jnp.stack(parts, axis=1), axis=1) if len(parts) > 1 else parts[0][:, None]
    features = jnp.arange(acts.shape[-1])
    one = jax.checkpoint(
        lambda width: jnp.where(features < width, acts, 0) @ W_dec
    )  # otherwise every masked copy is kept
    return jnp.moveaxis(jax.lax.map(one, widths), 0, 1)


def _near(z: Array, threshold: Array, bandwidth: float) -> Array:
    return (jnp.abs(z - threshold) < bandwidth / 2).astype(z.dtype)

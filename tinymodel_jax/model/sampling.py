"""How the next token is chosen from logits: options and their checks, temperature, top-k and top-p, and the draw.

Every row has its own random numbers, so a row's text does not depend on the rest of the batch. `same_noise` gives all
rows those of the first, so that rows of one prompt differ only by what is done to the model.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Method = Literal["greedy", "sample", "filtered"]
"""How the next token is chosen: the largest logit, or a draw from all tokens, or a draw after top-k and top-p."""

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
"""Smallest and largest normal float32 number. Compiled programs treat smaller numbers as 0."""


class Sampling(NamedTuple):
    """Sampling options as scalar arrays, so that changing them does not recompile."""

    temperature: Any
    """Divides the logits; unused by `greedy`."""
    top_k: Any
    """Tokens kept, largest logits first; used by `filtered` only."""
    top_p: Any
    """Tokens kept until their probabilities reach this sum; used by `filtered` only."""
    seed: Any
    """Step s of row r draws from `fold_in(fold_in(key(seed), r), s)`."""
    same_noise: Any
    """Whether all rows draw as row 0 does."""

    @functools.partial(jax.jit, static_argnames="n_rows")
    def row_keys(self, n_rows: int) -> Array:
        """Return the random key of each row."""
        rows = jnp.where(self.same_noise, 0, jnp.arange(n_rows))
        return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.seed), rows)


def prepare(
    d_vocab: int, temperature: float, top_k: int | None, top_p: float | None, seed: int, same_noise: bool
) -> tuple[Method, Sampling]:
    """Return the method and the options as arrays. A temperature that float32 rounds to 0 or a subnormal is greedy."""
    is_greedy = temperature < _SMALLEST
    method: Method = "greedy" if is_greedy else "sample" if top_k is None and top_p is None else "filtered"
    return method, Sampling(
        np.float32(temperature),
        np.int32(min(top_k or d_vocab, d_vocab)),
        np.float32(1 if top_p is None else top_p),
        np.uint32(seed),
        np.bool_(same_noise),
    )


@functools.partial(jax.jit, static_argnames="method")
def choose(
    logits: Float[Array, "batch d_vocab"], step: Int[Array, ""], row_keys: Array, sampling: Sampling, method: Method
) -> Int[Array, " batch"]:
    """Return the next token of every row, the step-th that is chosen.

    Compiled, so that a program that chooses at two places traces and lowers it once.
    """
    if method == "greedy":
        return _largest(logits)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    if method == "filtered":
        logits = keep_likely(logits, sampling.top_k, sampling.top_p)
    keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
    return jax.vmap(jax.random.categorical)(keys, logits)


def keep_likely(
    logits: Float[Array, "batch d_vocab"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "batch d_vocab"]:
    """Set to -inf all but the `top_k` largest logits and, of these, the fewest that reach probability `top_p`.

    Ties with the last kept logit are kept. Source: nucleus sampling, Holtzman et al. 2020, §3.1.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    ordered = jnp.where(rank < top_k, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = ((before < top_p) | (top_p >= 1)) & (rank < top_k)  # the sum before a rare token may round to 1
    smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)


def _largest(logits: Float[Array, "batch d_vocab"]) -> Int[Array, " batch"]:
    """Return `argmax` over the last axis, as two plain reductions, which XLA vectorizes on a CPU."""
    last = logits.shape[-1] - 1
    is_largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_largest, jnp.arange(last + 1), last), axis=-1)


def check_options(n_toks: int, temperature: float, top_k: int | None, top_p: float | None, seed: int) -> None:
    """Check the options of `continue_in_steps`.

    Raises:
        ValueError: at least one is out of range; all of them are named.
    """
    problems = []
    if not (_is_whole(n_toks) and n_toks >= 0):
        problems.append(f"n_toks={n_toks!r} must be a whole number, 0 or more")
    if not _is_number(temperature):
        problems.append(f"temperature={temperature!r} must be a number")
    elif not temperature >= 0:  # nor NaN
        problems.append(f"temperature={temperature!r} must be 0 (greedy) or more")
    elif temperature > _LARGEST:
        problems.append(f"temperature={temperature!r} must be at most {_LARGEST:.4g}, the largest float32")
    if top_k is not None and not (_is_whole(top_k) and top_k >= 1):
        problems.append(f"top_k={top_k!r} must be a whole number, 1 or more")
    if top_p is not None and not _is_number(top_p):
        problems.append(f"top_p={top_p!r} must be a number")
    elif top_p is not None and not 0 < top_p <= 1:
        problems.append(f"top_p={top_p!r} must be above 0 and at most 1")
    elif top_p is not None and top_p < _SMALLEST:
        problems.append(f"top_p={top_p!r} is 0 in float32; top_k=1 takes the most likely token")
    if not (_is_whole(seed) and 0 <= seed < 2**32):
        problems.append(f"seed={seed!r} must be a whole number, 0 to {2**32 - 1}")
    if problems:
        raise ValueError(f"generate: {'; '.join(problems)}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """Whether a value is one real number of Python, NumPy or JAX; `True` and `"0.8"` are not."""
    return _is_whole(value) or (np.ndim(value) == 0 and jnp.issubdtype(np.asarray(value).dtype, np.floating))

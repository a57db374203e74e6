"""Generation: one prefill of the prompts, then one compiled loop that decodes one token per row at a time with a cache.

Prompts of different lengths run in one batch. Hooks apply in both phases, so spliced models generate through their
dictionaries. This module handles token ids, not text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.model.forward import HookedModel
from tinymodel_jax.model.hook_points import apply_with_hooks
from tinymodel_jax.model.padding import bucket, pad_right
from tinymodel_jax.model.transformer import KVCache, LayerCache, Params, Transformer
from tinymodel_jax.runtime.compilation import fast_jit

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


class _State(NamedTuple):
    step: Int[Array, ""]
    """Number of tokens chosen so far."""
    tokens: Int[Array, "batch capacity"]
    lengths: Int[Array, " batch"]
    """Tokens of each row, prompt included."""
    done: Bool[Array, " batch"]
    cache: KVCache


def continue_prompts(
    model: HookedModel,
    prompts: np.ndarray,
    n_toks: int = 50,
    temperature: float = 0.8,
    end_id: int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Continue rows of ids, right-padded with `[PAD]`; return them as long as the longest row.

    Args:
        n_toks: maximum number of tokens to add to each row; a row also stops when the context is full.
        temperature: divisor of the logits; 0, or a number that float32 rounds to 0 or a subnormal, is greedy.
        end_id: token after which a row stops; it is kept. A prompt that ends with it stays unchanged. None: no stop.
        top_k: sample from the k largest logits only; None for all.
        top_p: sample from the fewest tokens whose probabilities reach this sum; None for all.
        seed: seed of the draws, 0 to 2**32 - 1; step s of row r draws from `fold_in(fold_in(key(seed), r), s)`.

    Raises:
        ValueError: a row has no tokens, or an option is out of range.
    """
    config = model.config
    check_options(n_toks, temperature, top_k, top_p, seed)
    if prompts.size == 0 or (prompts == config.pad_id).all(axis=1).any():
        raise ValueError("generate: a prompt has no tokens; every row needs at least one, usually [BEGIN].")
    lengths = prompts.shape[1] - np.argmax((prompts != config.pad_id)[:, ::-1], axis=1)
    longest = int(lengths.max())
    width = bucket(longest, config.n_ctx)
    capacity = bucket(min(longest + n_toks, config.n_ctx), config.n_ctx)
    is_greedy = temperature < _SMALLEST
    method: Method = "greedy" if is_greedy else "sample" if top_k is None and top_p is None else "filtered"
    sampling = Sampling(
        np.float32(temperature),
        np.int32(min(top_k or config.d_vocab, config.d_vocab)),
        np.float32(1 if top_p is None else top_p),
    )
    tokens, new_lengths = _generate(
        model,
        pad_right(prompts[:, :longest], max(width, capacity), config.pad_id),
        lengths.astype(np.int32),
        np.int32(min(n_toks, config.n_ctx)),
        np.int32(-1 if end_id is None else end_id),
        sampling,
        jax.random.key(seed),
        method=method,
        prompt_width=width,
    )
    return np.asarray(tokens)[:, : int(np.max(new_lengths))]


@partial(fast_jit, static_argnames=("method", "prompt_width"))
def _generate(
    model: HookedModel,
    tokens: Int[Array, "batch capacity"],
    lengths: Int[Array, " batch"],
    n_toks: Int[Array, ""],
    end_id: Int[Array, ""],
    sampling: Sampling,
    key: Array,
    *,
    method: Method,
    prompt_width: int,
) -> tuple[Int[Array, "batch capacity"], Int[Array, " batch"]]:
    """Continue every row; return the filled rows and their new lengths.

    Args:
        tokens: prompts, padded with `config.pad_id`; the width limits the prompt plus its continuation.
        lengths: tokens of each prompt, at least 1 and at most `prompt_width`.
        n_toks: maximum number of tokens to add to each row.
        end_id: token after which a row is finished; -1 for none.
        key: random key; row r draws from `fold_in(key, r)`.
        prompt_width: leading columns of `tokens` that hold the prompts.
    """
    config, transformer = model.config, Transformer(model.config)
    loop_params = jax.lax.optimization_barrier(_as_matrices(model.params))
    rows = jnp.arange(tokens.shape[0])
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)

    def choose(logits: Array, step: Array) -> Array:
        if method == "greedy":
            return _largest(logits).astype(tokens.dtype)
        logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
        if method == "filtered":
            logits = keep_likely(logits, sampling.top_k, sampling.top_p)
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, step)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(tokens.dtype)

    def append(state: _State, logits: Array) -> _State:
        position = jnp.minimum(state.lengths, tokens.shape[1] - 1)
        token = jnp.where(state.done, state.tokens[rows, position], choose(logits, state.step))
        lengths = jnp.where(state.done, state.lengths, state.lengths + 1)
        done = state.done | (token == end_id) | (lengths >= config.n_ctx)
        return _State(state.step + 1, state.tokens.at[rows, position].set(token), lengths, done, state.cache)

    def advance(state: _State) -> _State:
        last = state.lengths - 1
        (logits, cache), _ = apply_with_hooks(
            transformer,
            {"params": _as_heads(loop_params, config)},
            state.tokens[rows, last],
            last,
            state.cache,
            hooks=model.hooks,
            method="decode",
        )
        return append(state._replace(cache=cache), logits)

    def unfinished(state: _State) -> Array:
        return (state.step < n_toks) & ~jnp.all(state.done)

    logits, cache = _prefill(model, tokens, lengths, prompt_width)
    ended = tokens[rows, lengths - 1] == end_id
    done = ended | (lengths >= config.n_ctx) | (n_toks < 1)
    start = append(_State(jnp.int32(0), tokens, lengths, done, cache), logits)
    end = jax.lax.while_loop(unfinished, advance, start)
    return end.tokens, end.lengths


def strip_padding(row: np.ndarray, pad_id: int) -> np.ndarray:
    """Return a row of ids without the `[PAD]`s at its end."""
    return row[: len(row) - int(np.argmax(row[::-1] != pad_id))]


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
    """Check the options of `continue_prompts`.

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


def _prefill(
    model: HookedModel, tokens: Int[Array, "batch capacity"], lengths: Int[Array, " batch"], prompt_width: int
) -> tuple[Float[Array, "batch d_vocab"], KVCache]:
    """Return the logits after each prompt, and the cache with the prompts' keys and values."""
    n_layers, capacity = model.config.n_layers, tokens.shape[1]
    final = f"blocks.{n_layers - 1}.hook_resid_post"
    names = [(f"blocks.{layer}.attn.hook_k", f"blocks.{layer}.attn.hook_v") for layer in range(n_layers)]
    keep = (final, *(name for pair in names for name in pair))
    _, acts = model.run(tokens[:, :prompt_width], keep)
    last = jnp.take_along_axis(acts[final], (lengths - 1)[:, None, None], axis=1)[:, 0]
    return model.unembed(last), tuple(LayerCache.of_prompt(acts[k], acts[v], capacity) for k, v in names)


def _as_matrices(params: Params) -> Any:
    """Reshape W_Q, W_K and W_V to (d_model, n_heads * d_head), the matrix operands that decoding multiplies by.

    This is done before the loop and undone inside it, at no cost. Otherwise XLA would transpose for every token.
    """
    return _map_query_key_value(lambda w: w.swapaxes(0, 1).reshape(w.shape[1], -1), params)


def _as_heads(params: Params, config: ModelConfig) -> Any:
    """Undo `_as_matrices`."""
    return _map_query_key_value(lambda w: w.reshape(w.shape[0], config.n_heads, -1).swapaxes(0, 1), params)


def _map_query_key_value(function: Callable[[Array], Array], params: Params) -> Any:
    def convert(path: Any, leaf: Array) -> Array:
        return function(leaf) if path[-1].key in ("W_Q", "W_K", "W_V") else leaf

    return jax.tree_util.tree_map_with_path(convert, params)

"""Generation: one prefill of the prompts, then a compiled loop that decodes one token per row at a time with a cache.

Prompts of different lengths run in one batch. Spliced models generate through their dictionaries, and edits act on the
prompt, on the generated tokens, or on both. This module handles token ids, not text.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tinymodel_jax.block_order import final_stream
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.model.edits import can_be_padded, edits_after_prompt, is_array_tree, pad_edits
from tinymodel_jax.model.forward import HookedModel
from tinymodel_jax.model.hook_points import Hook, apply_with_hooks, require_edits, require_hook_names
from tinymodel_jax.model.padding import bucket, is_traced, pad_right
from tinymodel_jax.model.sampling import Method, Sampling, check_options, choose, prepare
from tinymodel_jax.model.transformer import KVCache, LayerCache, Params, Transformer
from tinymodel_jax.runtime.compilation import YNNPACK, fast_jit, ynnpack_of_rows

EditedPositions = Literal["all", "prompt", "generated"]
"""Where edits act during generation: on the prompt, on the generated tokens, or on both."""


class Continued(NamedTuple):
    """Rows of ids, continued so far."""

    tok_ids: np.ndarray
    """(batch, seq) ids, right-padded with `[PAD]` to the longest row."""
    logprobs: np.ndarray | None
    """(batch, seq) log-probability (nats) of each generated token; NaN at the prompt and at the padding."""
    done: np.ndarray
    """(batch,) whether the row gets no more tokens."""


class _State(NamedTuple):
    step: Int[Array, ""]
    """Number of tokens chosen so far."""
    tokens: Int[Array, "batch capacity"]
    lengths: Int[Array, " batch"]
    """Tokens of each row, prompt included."""
    done: Bool[Array, " batch"]
    cache: KVCache
    logprobs: Float[Array, "batch capacity"] | None
    """Log-probability of each generated token, NaN elsewhere; None if they are not asked for."""


def continue_in_steps(
    model: HookedModel,
    prompts: np.ndarray,
    n_toks: int = 50,
    temperature: float = 0.8,
    end_id: int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    *,
    hooks: Mapping[str, Hook] | None = None,
    positions: EditedPositions = "all",
    same_noise: bool = False,
    return_logprobs: bool = False,
    every: int | None = None,
) -> Iterator[Continued]:
    """Continue rows of ids, right-padded with `[PAD]`; yield them, as long as the longest row.

    Args:
        n_toks: maximum number of tokens to add to each row; a row also stops when the context is full.
        temperature: divisor of the logits; 0, or a number that float32 rounds to 0 or a subnormal, is greedy.
        end_id: token after which a row stops; it is kept. A prompt that ends with it stays unchanged. None: no stop.
        top_k: sample from the k largest logits only; None for all.
        top_p: sample from the fewest tokens whose probabilities reach this sum; None for all.
        seed: seed of the draws, 0 to 2**32 - 1; step s of row r draws from `fold_in(fold_in(key(seed), r), s)`.
        hooks: edits that act besides those of the model. Their masks and their arrays over positions are those of the
            prompts.
        positions: where these edits act. At generated tokens they act without their masks. The edits of the model act
            everywhere.
        same_noise: every row draws the random numbers of row 0.
        return_logprobs: also compute the log-probability of each generated token, before temperature, top-k and top-p.
        every: yield after the first token and then whenever this many tokens were added. None: yield at the end only.

    Raises:
        ValueError: a row has no tokens, an option is out of range, or an edit does not fit the prompts, or has values
            for the prompt's positions only while `positions` is not "prompt".
    """
    config = model.config
    check_options(n_toks, temperature, top_k, top_p, seed)
    if prompts.size == 0 or (prompts == config.pad_id).all(axis=1).any():
        raise ValueError("generate: a prompt has no tokens; every row needs at least one, usually [BEGIN].")
    lengths = prompts.shape[1] - np.argmax((prompts != config.pad_id)[:, ::-1], axis=1)
    n_toks, longest = min(n_toks, config.n_ctx), int(lengths.max())
    seen = prompts.shape[1] if hooks else longest  # columns of padding count for the shapes of edits
    width = bucket(seen, config.n_ctx) if can_be_padded(hooks or {}) else seen
    capacity = max(width, bucket(min(longest + n_toks, config.n_ctx), config.n_ctx))
    at_prompt, afterwards = _with_edits(model, hooks or {}, positions, prompts.shape, width)
    method, sampling = prepare(config.d_vocab, temperature, top_k, top_p, seed, same_noise)
    end = np.int32(-1 if end_id is None else end_id)
    make_programs = _shared_programs if is_array_tree((at_prompt, afterwards)) else _programs
    programs = make_programs(ynnpack_of_rows(len(prompts)))
    at_prompt, afterwards = _with_static_functions(at_prompt), _with_static_functions(afterwards)
    tokens = pad_right(prompts[:, :seen], capacity, config.pad_id)
    inputs = (tokens, lengths.astype(np.int32), np.int32(n_toks), end, sampling)
    options: dict[str, Any] = {"method": method, "prompt_width": width, "with_logprobs": return_logprobs}
    if every is None:
        yield _read(programs.whole(at_prompt, afterwards, *inputs, **options))
        return
    state = programs.start(at_prompt, *inputs, **options)
    for step in range(1, n_toks, every):
        yield (reached := _read(state))
        if reached.done.all():
            return
        until = np.int32(min(step + every, n_toks))
        state = programs.advance(afterwards, state, until, end, sampling, method=method)
    yield _read(state)


def strip_padding(row: np.ndarray, pad_id: int) -> np.ndarray:
    """Return a row of ids without the `[PAD]`s at its end."""
    return row[: len(row) - int(np.argmax(row[::-1] != pad_id))]


def _with_edits(
    model: HookedModel, hooks: Mapping[str, Hook], positions: EditedPositions, shape: tuple[int, ...], width: int
) -> tuple[HookedModel, HookedModel]:
    """Return the model with the edits of the prompts, and with those of the generated tokens."""
    if positions not in get_args(EditedPositions):
        raise ValueError(f"generate: positions={positions!r} must be 'all', 'prompt' or 'generated'.")
    require_edits(hooks)
    require_hook_names(hooks, model.config)
    if is_traced(hooks):
        raise ValueError(
            "generate runs compiled programs of its own: call it outside of jit, vmap and grad. For several edits in "
            "one call, give each row of the batch its own value, such as (batch, 1, d_model)."
        )
    batch, seq = shape
    at_prompt = afterwards = model
    if positions != "generated":
        at_prompt = model.with_hooks(pad_edits(hooks, model.config, (batch, seq), width))
    if positions != "prompt":
        afterwards = model.with_hooks(edits_after_prompt(hooks, model.config, batch))
    return at_prompt, afterwards


def _with_static_functions(model: HookedModel) -> HookedModel:
    """Make edits that are functions part of the program, since only arrays are arguments of one."""

    def static(leaf: Any) -> Any:
        return leaf if is_array_tree(leaf) else jax.tree_util.Partial(lambda value, acts: leaf(value, acts))

    return dataclasses.replace(model, hooks=jax.tree.map(static, model.hooks))


def _read(state: _State) -> Continued:
    longest = int(np.asarray(state.lengths).max())
    logprobs = None if state.logprobs is None else np.array(state.logprobs)[:, :longest]
    return Continued(np.array(state.tokens)[:, :longest], logprobs, np.array(state.done))


class _Programs(NamedTuple):
    """`_whole`, `_start` and `_advance`, not compiled yet."""

    whole: Callable[..., _State]
    start: Callable[..., _State]
    advance: Callable[..., _State]


def _programs(ynnpack: YNNPACK) -> _Programs:
    compiled = functools.partial(fast_jit, ynnpack=ynnpack)
    of_prompt = ("method", "prompt_width", "with_logprobs")
    return _Programs(
        compiled(functools.partial(_whole), static_argnames=of_prompt),
        compiled(functools.partial(_start), static_argnames=of_prompt),
        compiled(functools.partial(_advance), static_argnames=("method",), donate_argnames=("state",)),
    )


_shared_programs = functools.cache(_programs)
"""The programs of all edits that are arrays. A function as an edit is traced in a program of its call."""


def _whole(
    at_prompt: HookedModel,
    afterwards: HookedModel,
    tokens: Int[Array, "batch capacity"],
    lengths: Int[Array, " batch"],
    n_toks: Int[Array, ""],
    end_id: Int[Array, ""],
    sampling: Sampling,
    *,
    method: Method,
    prompt_width: int,
    with_logprobs: bool,
) -> _State:
    """Run `_start` and `_advance` in one program, which is loaded sooner than two."""
    options: dict[str, Any] = {"prompt_width": prompt_width, "with_logprobs": with_logprobs}
    state = _start(at_prompt, tokens, lengths, n_toks, end_id, sampling, method=method, **options)
    return _advance(afterwards, state, n_toks, end_id, sampling, method=method)


def _start(
    model: HookedModel,
    tokens: Int[Array, "batch capacity"],
    lengths: Int[Array, " batch"],
    n_toks: Int[Array, ""],
    end_id: Int[Array, ""],
    sampling: Sampling,
    *,
    method: Method,
    prompt_width: int,
    with_logprobs: bool,
) -> _State:
    """Run the prompts and choose the first token of every row.

    Args:
        tokens: prompts, padded with `config.pad_id`; the width limits the prompt plus its continuation.
        lengths: tokens of each prompt, at least 1 and at most `prompt_width`.
        end_id: token after which a row is finished; -1 for none.
        prompt_width: leading columns of `tokens` that hold the prompts.
    """
    rows = jnp.arange(len(tokens))
    logits, cache = _prefill(model, tokens, lengths, prompt_width)
    ended = tokens[rows, lengths - 1] == end_id
    done = ended | (lengths >= model.config.n_ctx) | (n_toks < 1)
    logprobs = jnp.full(tokens.shape, jnp.nan, jnp.float32) if with_logprobs else None
    state = _State(jnp.int32(0), tokens, lengths, done, cache, logprobs)
    return _append(state, logits, sampling.row_keys(len(tokens)), end_id, sampling, method, model.config.n_ctx)


def _advance(
    model: HookedModel, state: _State, until: Int[Array, ""], end_id: Array, sampling: Sampling, *, method: Method
) -> _State:
    """Add tokens to every row that is not finished, until `until` tokens have been chosen in all."""
    config, transformer = model.config, Transformer(model.config)
    loop_params = jax.lax.optimization_barrier(_as_matrices(model.params))
    rows = jnp.arange(len(state.tokens))
    row_keys = sampling.row_keys(len(state.tokens))

    def add_token(state: _State) -> _State:
        last = state.lengths - 1
        (logits, cache), _ = apply_with_hooks(
            transformer,
            {"params": _as_heads(loop_params, config)},
            state.tokens[rows, last],
            last,
            state.cache,
            tok_ids=state.tokens[rows, last][:, None],
            hooks=model.hooks,
            method="decode",
        )
        return _append(state._replace(cache=cache), logits, row_keys, end_id, sampling, method, config.n_ctx)

    def unfinished(state: _State) -> Array:
        return (state.step < until) & ~jnp.all(state.done)

    return jax.lax.while_loop(unfinished, add_token, state)


def _append(
    state: _State,
    logits: Float[Array, "batch d_vocab"],
    row_keys: Array,
    end_id: Array,
    sampling: Sampling,
    method: Method,
    n_ctx: int,
) -> _State:
    """Choose the next token of every row that is not finished."""
    rows = jnp.arange(len(logits))
    position = jnp.minimum(state.lengths, state.tokens.shape[1] - 1)
    chosen = choose(logits, state.step, row_keys, sampling, method).astype(state.tokens.dtype)
    token = jnp.where(state.done, state.tokens[rows, position], chosen)
    logprobs = state.logprobs
    if logprobs is not None:
        new = logits[rows, token] - jax.nn.logsumexp(logits, axis=-1)
        logprobs = logprobs.at[rows, position].set(jnp.where(state.done, logprobs[rows, position], new))
    lengths = jnp.where(state.done, state.lengths, state.lengths + 1)
    done = state.done | (token == end_id) | (lengths >= n_ctx)
    return _State(state.step + 1, state.tokens.at[rows, position].set(token), lengths, done, state.cache, logprobs)


def _prefill(
    model: HookedModel, tokens: Int[Array, "batch capacity"], lengths: Int[Array, " batch"], prompt_width: int
) -> tuple[Float[Array, "batch d_vocab"], KVCache]:
    """Return the logits after each prompt, and the cache with the prompts' keys and values."""
    n_layers, capacity = model.config.n_layers, tokens.shape[1]
    final = final_stream(n_layers)
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

"""Activation patching: which values of a clean run restore its answer when they are put into a corrupted run.

For each kind of hook point, every layer and position is patched by itself, or every layer and head where there are
heads. One compiled program per kind runs as many patches at once as memory allows. The effect of a patch is normalised,
0 for the corrupted run and 1 for the clean one, over all pairs of prompts:

    effect = sum of (metric patched - metric corrupted) / sum of (metric clean - metric corrupted)

A metric is the same function of the logits in every run: its tokens, such as the targets of `"loss"` and the `tok_ids`
of a function, are those of the clean prompt. Source: the convention of TransformerLens' `patching` (denoising).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinymodel_jax.analysis.effects import PATCHED_HOOKS
from tinymodel_jax.analysis.effects.metrics import (
    Kind,
    Measured,
    Metric,
    Weights,
    check_metric,
    value_from_logits,
    value_of_function,
    weights_of,
)
from tinymodel_jax.analysis.evaluation.row_sums import margin_of_ratio
from tinymodel_jax.block_order import BLOCK_HOOKS, stream_before
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.forward import HookedModel, forward
from tinymodel_jax.model.padding import bucket, check_tok_ids, pad_right
from tinymodel_jax.runtime.compilation import fast_jit
from tinymodel_jax.runtime.progress import Track, no_progress

MEMORY = 2**28
"""Bytes that the largest arrays of the passes that run at once may take."""
_HEAD_AXIS = {f"attn.hook_{name}": 2 for name in "qkvz"} | {"attn.hook_attn_scores": 1, "attn.hook_pattern": 1}


class Patched(NamedTuple):
    """The effects of patching one kind of hook point."""

    kind: str
    """Name inside a block, such as `hook_resid_pre`."""
    axis: Literal["position", "head", "head and position"]
    """Meaning of the axes of `effects` after the first."""
    effects: Float[np.ndarray, "n_layers *places"]
    """1 where patching restores the clean answer, 0 where it changes nothing; other values are possible."""
    half_width: Float[np.ndarray, "n_layers *places"]
    """Half-width of the 95 % confidence interval over pairs, NaN for a single pair: 1.96 standard errors of the ratio
    of sums (`row_sums`), which is too narrow with fewer than a few dozen pairs."""


class Patching(NamedTuple):
    """The effects of patching each kind of hook point, and the metric of the two runs."""

    tables: tuple[Patched, ...]
    clean: float
    """Metric of the clean runs, averaged over pairs, before it is normalised: nats, logits, or the function's unit."""
    corrupted: float


class _Pair(NamedTuple):
    """A pair of prompts, padded to a compiled length, and what is measured."""

    clean: Int[np.ndarray, "1 seq"]
    corrupted: Int[np.ndarray, "1 seq"]
    length: int
    weights: Weights
    """Of the clean prompt."""
    tokens: Int[np.ndarray, "1 2"] | None


def patch(
    lm: TinyModel,
    clean: Any,
    corrupted: Any,
    kinds: str | Sequence[str] = PATCHED_HOOKS,
    *,
    metric: Metric,
    next_ids: Sequence[int] | None = None,
    each_position: bool = False,
    track: Track = no_progress,
) -> Patching:
    """Patch values of the clean run into the corrupted run, for one pair of prompts or several.

    Args:
        clean, corrupted: a text or row of token ids each, or as many of both: a list of texts, or ids (pairs, seq),
            right-padded. Both prompts of a pair have equal length. Different pairs have too, unless only heads are
            patched.
        kinds: one or more names of hook points inside a block; `attn.hook_*` are patched by heads, the others by
            positions.
        metric: `"loss"`, `"next_logprob"`, a `logit_difference(a, b)`, or a function `(logits, tok_ids) -> (batch,)`,
            which gets one pair at a time (see `metrics`).
        next_ids: one token per pair, for `"next_logprob"`; None is the most likely token after the clean prompt.
        each_position: patch every head at every position by itself, for scores and patterns every query position.
        track: wraps the iterator over kinds, for example with a progress bar.

    Raises:
        ValueError: the prompts of a pair differ in length, pairs do where positions are patched, a kind does not exist,
            the metric does not fit, or it is the same in both runs, or not finite.
    """
    kinds = list(dict.fromkeys([kinds] if isinstance(kinds, str) else kinds))
    _check_kinds(kinds)
    rows, lengths = _rows(lm, clean, corrupted)
    by_position = [kind for kind in kinds if each_position or kind not in _HEAD_AXIS]
    if by_position and len(set(lengths)) > 1:
        raise ValueError(
            f"patch: pairs have {min(lengths)} to {max(lengths)} tokens, so their positions do not correspond for "
            f"{', '.join(by_position)}; give pairs of one length, or patch heads only, such as kinds='attn.hook_z'."
        )
    measured = check_metric(lm, metric, len(lengths))
    pairs = _pairs(lm, rows, lengths, measured, next_ids)
    ends = np.array([_ends(lm.hooked(), pair, measured) for pair in pairs])
    differences = ends[:, 0] - ends[:, 1]
    _check_ends(ends, differences)
    tables = []
    for kind in track(kinds, "patching"):
        values = np.stack([_patch_kind(lm.hooked(), pair, measured, kind, each_position) for pair in pairs])
        effects, half_width = _ratio(values - ends[:, 1].reshape(-1, *[1] * (values.ndim - 1)), differences)
        axis = "position" if kind not in _HEAD_AXIS else "head and position" if each_position else "head"
        tables.append(Patched(kind, axis, effects, half_width))
    return Patching(tuple(tables), *ends.mean(axis=0).tolist())


def _ratio(above: Float[np.ndarray, "pairs *places"], below: Float[np.ndarray, " pairs"]) -> tuple[Any, Any]:
    """Return the ratio of the sums over pairs, and its margin."""
    n, total = len(below), below.sum()
    ratio = above.sum(axis=0) / total
    if n < 2:
        return ratio, np.full_like(ratio, np.nan)
    residual = above - ratio * below.reshape(-1, *[1] * (above.ndim - 1))
    return ratio, margin_of_ratio((residual**2).sum(axis=0), total, n)


def _check_ends(ends: Float[np.ndarray, "pairs 2"], differences: Float[np.ndarray, " pairs"]) -> None:
    if not np.isfinite(ends).all():
        clean, corrupted = ends[np.flatnonzero(~np.isfinite(ends).all(axis=1))[0]]
        raise ValueError(
            f"patch: the model's output on these prompts is not finite (metric {clean}, {corrupted}); look for "
            "NaN and infinity in lm.params, or take another checkpoint."
        )
    if abs(differences.mean()) < 1e-6 <= abs(differences).max():
        raise ValueError(
            "patch: the differences of the metric between clean and corrupted prompts cancel over the pairs; order "
            "every pair so that the metric is larger on the clean prompt, or give logit_difference a token per pair."
        )
    if abs(differences.mean()) < 1e-6:
        raise ValueError(
            f"patch: both prompts give the same metric, {ends[:, 0].mean():.6f}; there is nothing to restore. Choose "
            "a metric that differs between the clean and the corrupted prompt."
        )


def _patch_kind(
    model: HookedModel, pair: _Pair, measured: Measured, kind: str, each_position: bool
) -> Float[np.ndarray, "n_layers *places"]:
    """Return the metric of one pair after each patch."""
    config = model.config
    places = [config.n_heads] if kind in _HEAD_AXIS else []
    by_position = each_position or not places
    places += [pair.length] if by_position else []
    index = np.indices(places).reshape(len(places), -1).T
    width = pair.clean.shape[1]
    at_most = len(index) // pair.length * width if by_position else len(index)  # one program for similar lengths
    at_once = min(_places_at_once(config, width, measured), at_most)
    found = []
    for start in range(0, len(index), at_once):
        chunk = index[start : start + at_once]
        padded = np.concatenate([chunk, np.repeat(chunk[:1], at_once - len(chunk), axis=0)])
        streams = _patched_streams(
            model, jnp.asarray(pair.clean), jnp.asarray(pair.corrupted), jnp.asarray(padded), kind=kind
        )
        values = [_values(model, layer, pair, measured) for layer in streams]
        found.append(np.stack(values)[:, : len(chunk)])
    return np.concatenate(found, axis=1).reshape(config.n_layers, *places)


@partial(fast_jit, static_argnames=("kind",))
def _patched_streams(
    model: HookedModel,
    clean: Int[Array, "1 seq"],
    corrupted: Int[Array, "1 seq"],
    places: Int[Array, "n axes"],
    *,
    kind: str,
) -> tuple[Float[Array, "n seq d_model"], ...]:
    """Return the final residual streams of each layer's patches."""
    names = [f"blocks.{layer}.{kind}" for layer in range(model.config.n_layers)]
    kept = sorted({*names, *map(stream_before, names)})
    good, bad = (model.run(ids, kept)[1] for ids in (clean, corrupted))
    head = _HEAD_AXIS.get(kind)
    axes = [1] if head is None else [head, 1 if head == 2 else 2][: places.shape[1]]

    def patched(name: str) -> Array:
        def one(place: Array) -> Array:
            shape = good[name].shape
            chosen = jnp.ones(shape, bool)
            for axis, at in zip(axes, place, strict=True):
                chosen &= jax.lax.broadcasted_iota(jnp.int32, shape, axis) == at
            value = jnp.where(chosen, good[name], bad[name])
            return model.resume_with_value(name, value, bad[stream_before(name)], corrupted)[0]

        return jax.lax.map(one, places, batch_size=len(places))

    return tuple(map(patched, names))


def _ends(model: HookedModel, pair: _Pair, measured: Measured) -> Float[np.ndarray, "2"]:
    """Return the metric of the clean and of the corrupted run."""
    final = f"blocks.{model.config.n_layers - 1}.hook_resid_post"
    streams = [forward(model, ids, keep=(final,), output="none")[1][final] for ids in (pair.clean, pair.corrupted)]
    return _values(model, jnp.concatenate(streams), pair, measured)


def _values(
    model: HookedModel, streams: Float[Array, "n seq d_model"], pair: _Pair, measured: Measured
) -> Float[np.ndarray, " n"]:
    """Return the metric for each of several final streams of one pair."""
    if measured.function is None:
        tokens = None if pair.tokens is None else jnp.asarray(pair.tokens)
        return np.asarray(_named_values(model, streams, pair.weights, tokens, kind=measured.kind), np.float64)
    logits = _logits(model, streams)[:, : pair.length]
    ids = jnp.asarray(pair.clean[:, : pair.length])
    return np.array([float(value_of_function(measured.function, one[None], ids)) for one in logits])


@fast_jit
def _logits(model: HookedModel, streams: Float[Array, "n seq d_model"]) -> Float[Array, "n seq d_vocab"]:
    return model.unembed(streams)


@partial(fast_jit, static_argnames=("kind",))
def _named_values(
    model: HookedModel,
    streams: Float[Array, "n seq d_model"],
    weights: Weights,
    tokens: Int[Array, "1 2"] | None,
    *,
    kind: Kind,
) -> Float[Array, " n"]:
    """Return a metric that is not a function; where it reads the last position, only that one is unembedded."""
    if kind != "loss":
        last = jnp.argmax(weights.last, axis=1)
        streams = streams[:, last]
        real, loss, at_last, targets = (x[:, last] for x in weights[:4])
        weights = Weights(real, loss, at_last, targets, weights.next_ids)
    logits = model.unembed(streams)
    return jax.vmap(lambda one: value_from_logits(kind, one[None], weights, tokens))(logits)


def _places_at_once(config: ModelConfig, seq: int, measured: Measured) -> int:
    """Return how many passes of one row fit in `MEMORY`, by what a block keeps of it: scores, neurons, streams."""
    whole = measured.kind in ("loss", "function")
    largest = max(2 * config.n_heads * seq + config.d_mlp + 4 * config.d_model, config.d_vocab if whole else 0)
    return max(1, MEMORY // (4 * seq * largest))


def _rows(lm: TinyModel, clean: Any, corrupted: Any) -> tuple[list[np.ndarray], list[int]]:
    """Return the rows of both kinds of prompts, and the length of each pair."""
    rows = [check_tok_ids(lm.to_tokens(ids), lm.config) for ids in (clean, corrupted)]
    if len(rows[0]) != len(rows[1]) or not rows[0].size:
        shapes = " and ".join(str(ids.shape) for ids in rows)
        raise ValueError(f"patch: the prompts have shapes {shapes}; expected one row or more, as many of each kind.")
    real = [ids != lm.config.pad_id for ids in rows]
    lengths = [mask.sum(axis=1) for mask in real]
    inside = [
        row
        for n, mask in zip(lengths, real, strict=True)
        for row in np.flatnonzero(~mask[:, 0] | (mask.shape[1] - mask[:, ::-1].argmax(axis=1) != n))
    ]
    if inside:
        raise ValueError(f"patch: row {inside[0]} holds [PAD] before a token, or nothing else; leave [PAD] to the end.")
    apart = np.flatnonzero(lengths[0] != lengths[1])
    if len(apart):
        first = apart[0]
        raise ValueError(
            f"patch: the prompts of pair {first} have {lengths[0][first]} and {lengths[1][first]} tokens; they need "
            "equal length, so that positions correspond. Choose words of as many tokens."
        )
    return rows, lengths[0].tolist()


def _pairs(
    lm: TinyModel, rows: list[np.ndarray], lengths: list[int], measured: Measured, next_ids: Sequence[int] | None
) -> list[_Pair]:
    config = lm.config
    if next_ids is not None and measured.kind != "next_logprob":
        raise ValueError("patch: next_ids are the tokens of metric='next_logprob'; leave it out with another metric.")
    if next_ids is not None and np.shape(next_ids) != (len(lengths),):
        raise ValueError(
            f"patch: next_ids has shape {np.shape(next_ids)}; expected one token for each of {len(lengths)} pairs."
        )
    found = []
    for i, length in enumerate(lengths):
        width = bucket(length, config.n_ctx)
        good, bad = (pad_right(ids[i : i + 1, :length], width, config.pad_id) for ids in rows)
        if next_ids is not None:
            token = next_ids[i]
        elif measured.kind == "next_logprob":
            token = int(np.asarray(lm(good[:, :length]))[0, -1].argmax())
        else:
            token = 0  # not measured
        real = np.arange(width)[None] < length
        weights = weights_of(good, real, [token], config.d_vocab)
        tokens = None if measured.tokens is None else measured.tokens[i : i + 1]
        found.append(_Pair(good, bad, length, weights, tokens))
    return found


def _check_kinds(kinds: Sequence[str]) -> None:
    unknown = [kind for kind in kinds if kind not in BLOCK_HOOKS]
    if unknown or not kinds:
        raise ValueError(
            f"patch: kinds are hook points of a block, got {', '.join(unknown) or 'none'}; "
            f"all: {', '.join(BLOCK_HOOKS)}."
        )

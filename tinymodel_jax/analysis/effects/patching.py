"""Activation patching: which values of a clean run restore its answer when they are put into a corrupted run.

For each kind of hook point, every layer and position is patched by itself, or every layer and head where there are
heads. One compiled call per kind runs as many patches at once as memory allows. The effect of a patch is normalised, 0
for the corrupted run and 1 for the clean one:

    effect = (metric patched - metric corrupted) / (metric clean - metric corrupted)

metric: logit of the answer minus logit of a wrong answer at the last position; without a wrong answer, the answer's
log-probability. Source: the convention of TransformerLens' `patching` (denoising).
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
from tinymodel_jax.block_order import BLOCK_HOOKS, stream_before
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.forward import HookedModel
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
    axis: Literal["position", "head"]
    """Meaning of the second axis of `effects`."""
    effects: Float[np.ndarray, "n_layers n"]
    """1 where patching restores the clean answer, 0 where it changes nothing; other values are possible."""


class Patching(NamedTuple):
    """The effects of patching each kind of hook point, and the metric of the two runs."""

    tables: tuple[Patched, ...]
    clean: float
    """Metric of the clean run, before it is normalised: nats or logits."""
    corrupted: float


def patch(
    lm: TinyModel,
    clean: Any,
    corrupted: Any,
    kinds: str | Sequence[str] = PATCHED_HOOKS,
    *,
    answer: int,
    wrong: int | None = None,
    track: Track = no_progress,
) -> Patching:
    """Patch values of the clean run into the corrupted run.

    Args:
        clean, corrupted: token ids of equal length, one row each, without padding.
        kinds: one or more names of hook points inside a block; `attn.hook_*` are patched by heads, the others by
            positions.
        answer: token that the clean run gives after the last position.
        wrong: token that the corrupted run gives; without it, the answer's log-probability is measured.
        track: wraps the iterator over kinds, for example with a progress bar.

    Raises:
        ValueError: the prompts differ in length or hold `[PAD]`, a kind does not exist, both answers are one token, or
            the metric is the same in both runs, or not finite.
    """
    rows, length = _rows(lm, clean, corrupted)
    kinds = [kinds] if isinstance(kinds, str) else kinds
    _check_kinds(kinds)
    tokens = _tokens(answer, wrong, lm.config.d_vocab)
    model, tables, ends = lm.hooked(), [], np.zeros(2, np.float32)
    for kind in track(list(dict.fromkeys(kinds)), "patching"):
        at_once = _places_at_once(lm.config, rows[0].shape[1])
        effects, ends = _patch_kind(
            model,
            rows,
            jnp.asarray(length - 1),
            jnp.asarray(tokens),
            kind=kind,
            at_once=at_once,
        )
        ends = np.asarray(ends)
        if not np.isfinite(ends).all():
            raise ValueError(
                f"patch: the model's output on these prompts is not finite (metric {ends[0]}, {ends[1]}); look for "
                "NaN and infinity in lm.params, or take another checkpoint."
            )
        if abs(ends[0] - ends[1]) < 1e-6:
            raise ValueError(
                f"patch: both prompts give the same metric, {ends[0]:.6f}; there is nothing to restore. Choose an "
                "answer that the clean prompt gives and the corrupted one does not."
            )
        axis = "head" if kind in _HEAD_AXIS else "position"
        tables.append(Patched(kind, axis, np.asarray(effects)[:, : None if axis == "head" else length]))
    return Patching(tuple(tables), float(ends[0]), float(ends[1]))


@partial(fast_jit, static_argnames=("kind", "at_once"))
def _patch_kind(
    model: HookedModel,
    rows: tuple[Int[Array, "1 seq"], Int[Array, "1 seq"]],
    last: Int[Array, ""],
    tokens: Int[Array, " tokens"],
    *,
    kind: str,
    at_once: int,
) -> tuple[Float[Array, "n_layers n"], Float[Array, "2"]]:
    """Return the normalised effects, and the metric of the clean and the corrupted run."""
    n_layers = model.config.n_layers
    names = [f"blocks.{layer}.{kind}" for layer in range(n_layers)]
    final = f"blocks.{n_layers - 1}.hook_resid_post"

    def measure(resid: Array) -> Array:
        return _metric(model.unembed(resid[0, last]), tokens)

    kept = {*names, *map(stream_before, names), final}
    good, bad = (model.run(ids, sorted(kept))[1] for ids in rows)
    clean, corrupted = measure(good[final]), measure(bad[final])
    axis = _HEAD_AXIS.get(kind, 1)

    def patched(name: str) -> Array:
        def one(place: Array) -> Array:
            chosen = jnp.expand_dims(places == place, [i for i in range(good[name].ndim) if i != axis])
            value = jnp.where(chosen, good[name], bad[name])
            return measure(model.resume_with_value(name, value, bad[stream_before(name)], rows[1]))

        places = jnp.arange(good[name].shape[axis])
        return jax.lax.map(one, places, batch_size=min(at_once, len(places)))

    effects = jnp.stack([patched(name) for name in names])
    return (effects - corrupted) / (clean - corrupted), jnp.stack([clean, corrupted])


def _places_at_once(config: ModelConfig, seq: int) -> int:
    """Return how many passes of one row fit in `MEMORY`, by what a block keeps of it: scores, neurons, streams."""
    return max(1, MEMORY // (4 * seq * (2 * config.n_heads * seq + config.d_mlp + 4 * config.d_model)))


def _metric(logits: Float[Array, " d_vocab"], tokens: Int[Array, " tokens"]) -> Float[Array, ""]:
    if len(tokens) == 2:
        return logits[tokens[0]] - logits[tokens[1]]
    return jax.nn.log_softmax(logits)[tokens[0]]


def _rows(lm: TinyModel, clean: Any, corrupted: Any) -> tuple[tuple[Array, Array], int]:
    """Return both prompts, padded to a compiled length, and their own length."""
    rows = [check_tok_ids(lm.to_tokens(ids), lm.config) for ids in (clean, corrupted)]
    if any(len(ids) != 1 for ids in rows) or rows[0].shape != rows[1].shape or not rows[0].size:
        shapes = " and ".join(str(ids.shape) for ids in rows)
        raise ValueError(
            f"patch: the prompts have shapes {shapes}; expected one row each of equal length, so that positions "
            "correspond. Choose words of as many tokens."
        )
    if any((ids == lm.config.pad_id).any() for ids in rows):
        raise ValueError("patch: a prompt holds [PAD], which the model would read as a word; leave padding out.")
    length = rows[0].shape[1]
    padded = [pad_right(ids, bucket(length, lm.config.n_ctx), lm.config.pad_id) for ids in rows]
    return (jnp.asarray(padded[0]), jnp.asarray(padded[1])), length


def _check_kinds(kinds: Sequence[str]) -> None:
    unknown = [kind for kind in kinds if kind not in BLOCK_HOOKS]
    if unknown or not kinds:
        raise ValueError(
            f"patch: kinds are hook points of a block, got {', '.join(unknown) or 'none'}; "
            f"all: {', '.join(BLOCK_HOOKS)}."
        )


def _tokens(answer: int, wrong: int | None, d_vocab: int) -> np.ndarray:
    tokens = np.asarray([answer] if wrong is None else [answer, wrong])
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or (tokens < 0).any() or (tokens >= d_vocab).any():
        raise ValueError(f"patch: answer {answer!r}, wrong {wrong!r}; they are token ids, 0..{d_vocab - 1}.")
    if answer == wrong:
        raise ValueError(f"patch: answer and wrong are the same token, {answer}; they must differ, or leave wrong out.")
    return tokens.astype(np.int32)

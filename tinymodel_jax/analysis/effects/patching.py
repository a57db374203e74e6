"""Activation patching: which values of a clean run restore its answer when they are put into a corrupted run.

For each kind of hook point, every layer and position is patched by itself, or every layer and head where there are
heads. One compiled program per kind runs as many patches at once as memory allows. All devices of all processes are
used: processes divide the list of pairs and places, and each spreads its places over its devices. The effect of a patch
is normalised, 0 for the corrupted run and 1 for the clean one, over all pairs of prompts:

    effect = sum of (metric patched - metric corrupted) / sum of (metric clean - metric corrupted)

A metric is the same function of the logits in every run: its tokens, such as the targets of `"loss"` and the `tok_ids`
of a function, are those of the clean prompt. Source: the convention of TransformerLens' `patching` (denoising).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from tinymodel_jax.analysis.effects import PATCHED_HOOKS
from tinymodel_jax.analysis.effects.metrics import Measured, Metric, check_metric, weights_of
from tinymodel_jax.analysis.effects.patched_passes import HEAD_AXIS, Pair, patched_values, values_of_both
from tinymodel_jax.analysis.evaluation.row_sums import margin_of_ratio
from tinymodel_jax.block_order import BLOCK_HOOKS
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.forward import HookedModel
from tinymodel_jax.model.padding import bucket, check_tok_ids, pad_right
from tinymodel_jax.runtime.collectives import gathered
from tinymodel_jax.runtime.progress import Track, no_progress
from tinymodel_jax.runtime.rows import RowDevices, row_devices, share


class Patched(NamedTuple):
    """The effects of patching one kind of hook point."""

    kind: str
    """Name inside a block, such as `hook_resid_pre`."""
    axis: Literal["position", "head", "head and position"]
    """Meaning of the axes of `effects` after the first."""
    effects: Float[np.ndarray, "n_layers *places"]
    """Normalised effect: 1 where patching restores the clean answer, 0 where it changes nothing; other values are
    possible."""
    half_width: Float[np.ndarray, "n_layers *places"]
    """Half-width of the 95 % confidence interval over pairs, NaN for a single pair: 1.96 standard errors of the ratio
    of sums (`row_sums`), which is too narrow with fewer than a few dozen pairs."""


class Patching(NamedTuple):
    """The effects of patching each kind of hook point, and the metric of the two runs."""

    tables: tuple[Patched, ...]
    """One for each of the `kinds`, in their order."""
    clean: float
    """Metric of the clean runs, averaged over pairs, before it is normalised: nats, logits, or the function's unit."""
    corrupted: float
    """Metric of the corrupted runs, likewise."""


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

        effect = sum of (patched - corrupted) / sum of (clean - corrupted)    of the metric

    Args:
        clean: one prompt, as a text or a row of token ids; or several, as a list of texts or ids (pairs, seq),
            right-padded.
        corrupted: as many prompts in the same form. Both prompts of a pair have the same number of tokens.
            Different pairs do, too, unless only heads are patched.
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

    Source: the convention of TransformerLens' `patching` (denoising).

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import logit_difference, patching
        >>> lm = TinyModel("mini")
        >>> metric = logit_difference(" Lily", " Tim")
        >>> clean, corrupted = "Lily and Ben ran. Then Lily", "Tim and Ben ran. Then Tim"
        >>> result = patching.patch(lm, clean, corrupted, "hook_resid_pre", metric=metric)
        >>> result.tables[0].axis, result.tables[0].effects.shape
        ('position', (4, 9))
    """
    kinds = list(dict.fromkeys([kinds] if isinstance(kinds, str) else kinds))
    _check_kinds(kinds)
    rows, lengths = _rows(lm, clean, corrupted)
    by_position = [kind for kind in kinds if each_position or kind not in HEAD_AXIS]
    if by_position and len(set(lengths)) > 1:
        raise ValueError(
            f"patch: pairs have {min(lengths)} to {max(lengths)} tokens, so their positions do not correspond for "
            f"{', '.join(by_position)}; give pairs of one length, or patch heads only, such as kinds='attn.hook_z'."
        )
    measured = check_metric(lm, metric, len(lengths))
    pairs = _pairs(lm, rows, lengths, measured, next_ids)
    mine = [values_of_both(lm.hooked(), pair, measured) for pair in pairs[share(len(pairs))]]
    ends = np.concatenate(gathered(np.reshape(mine, (-1, 2))))
    differences = ends[:, 0] - ends[:, 1]
    _check_ends(ends, differences)
    devices = row_devices(lm.hooked())
    model = devices.shared(lm.hooked())
    tables = []
    for kind in track(kinds, "patching"):
        values = _patch_kind(model, devices, pairs, measured, kind, each_position)
        effects, half_width = _ratio(values - ends[:, 1].reshape(-1, *[1] * (values.ndim - 1)), differences)
        axis = "position" if kind not in HEAD_AXIS else "head and position" if each_position else "head"
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
    model: HookedModel, devices: RowDevices, pairs: Sequence[Pair], measured: Measured, kind: str, each_position: bool
) -> Float[np.ndarray, "pairs n_layers *places"]:
    """Return the metric of every pair after each patch. This process measures a part of all pairs' places."""
    config = model.config
    axes, padded = ([config.n_heads],) * 2 if kind in HEAD_AXIS else ([], [])
    if each_position or not axes:  # pairs have one length
        axes, padded = [*axes, pairs[0].length], [*padded, pairs[0].clean.shape[1]]
    places = np.indices(axes).reshape(len(axes), -1).T
    parts = min(len(pairs), jax.process_count()), jax.process_count()
    at_most = -(-math.prod(padded) * parts[0] // parts[1])  # one program for similar lengths
    mine, found = share(len(pairs) * len(places)), []
    for i, pair in enumerate(pairs):
        part = places[max(0, mine.start - i * len(places)) : max(0, mine.stop - i * len(places))]
        found.append(patched_values(model, devices, pair, measured, kind, part, at_most))
    values = np.concatenate(gathered(np.concatenate(found, axis=1).T))
    return np.moveaxis(values.reshape(len(pairs), *axes, config.n_layers), -1, 1)


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
) -> list[Pair]:
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
        found.append(Pair(good, bad, length, weights, tokens))
    return found


def _check_kinds(kinds: Sequence[str]) -> None:
    unknown = [kind for kind in kinds if kind not in BLOCK_HOOKS]
    if unknown or not kinds:
        raise ValueError(
            f"patch: kinds are hook points of a block, got {', '.join(unknown) or 'none'}; "
            f"all: {', '.join(BLOCK_HOOKS)}."
        )

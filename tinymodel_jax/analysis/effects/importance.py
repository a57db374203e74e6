"""Causal importance of the features of a dictionary: the effect of ablating each one, over a data set.

Every feature is ablated on every row where it is active (`sweeps.ablate`); on other rows its effect is exactly 0. Rows
without a token to predict, such as a lone `[BEGIN]`, are left out, as in `evaluate`. The state is sums over rows, so an
interrupted measurement can resume; several processes take turns at the rows, and each spreads the features of its row
over its devices. Confidence intervals are those of the mean over rows: plus or minus `NORMAL_95`
standard errors, which is rough for features that are active on few rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tinymodel_jax.analysis.effects.sweeps import ablate
from tinymodel_jax.analysis.evaluation.row_sums import NORMAL_95
from tinymodel_jax.analysis.search.resumable import Progress, fingerprint, fingerprints
from tinymodel_jax.lm import FeatureReader, TinyModel
from tinymodel_jax.lm.dictionaries import DictionaryLike
from tinymodel_jax.lm.text import rows_of
from tinymodel_jax.model.padding import bucket, check_tok_ids
from tinymodel_jax.runtime.collectives import SharedTimer, summed
from tinymodel_jax.runtime.progress import Track, no_progress
from tinymodel_jax.runtime.rows import rows_of_turn, turns

SAVE_SECONDS = 20.0
_MEASURES = ("kl", "loss")


class MeanEffect(NamedTuple):
    """A mean over rows per feature with its 95 % confidence interval, `mean - half_width` to `mean + half_width`."""

    mean: Float[np.ndarray, " n_features"]
    """Mean over rows, in nats; NaN for features without a row to average over."""
    half_width: Float[np.ndarray, " n_features"]
    """1.96 standard errors of the mean, in nats; NaN for features with fewer than two rows."""


class CausalImportance(NamedTuple):
    """The effects of ablating each feature of a dictionary, in nats."""

    n_rows: int
    """Number of rows with a token to predict."""
    active_rows: Int[np.ndarray, " n_features"]
    """Number of rows on which the feature is active."""
    kl: MeanEffect
    """KL divergence in nats per position, averaged over the rows where the feature is active."""
    loss: MeanEffect
    """Change of the loss in nats, averaged over the rows where the feature is active; positive if the feature helps."""
    kl_all: MeanEffect
    """KL divergence in nats averaged over all `n_rows`, which gives frequent features more weight."""
    loss_all: MeanEffect
    """Change of the loss in nats averaged over all `n_rows`."""
    final_stream: Float[np.ndarray, "n_features d_model"]
    """`FeatureEffects.final_stream`, averaged over the rows where the feature is active; 0 if there are none."""

    def order(self) -> Int[np.ndarray, " n_features"]:
        """Return the features in order of importance, the KL over all rows; the most important first."""
        return np.argsort(-self.kl_all.mean, kind="stable")


def causal_importance(
    lm: TinyModel,
    tag: DictionaryLike,
    rows: Any,
    *,
    work_file: Path | None = None,
    track: Track = no_progress,
) -> CausalImportance:
    """Ablate every feature of a dictionary on every row, and average the effects over the rows.

    Args:
        tag: the dictionary's tag, such as M2, or `lm["M2"]`, or a `Dictionary`.
        rows: stories, or token ids (rows, seq), right-padded with `[PAD]`, which is not counted. Rows without a token
            to predict are left out.
        work_file: file that stores the sums so far; a call with the same arguments resumes from it. Delete it once you
            have the result.
        track: wraps the iterator over the remaining rows, for example with a progress bar; with several processes, over
            the turns of each.

    Raises:
        ValueError: no row has a token to predict, the rows do not fit the model, the tag has no dictionary, or
            `work_file` belongs to another measurement.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import importance
        >>> lm = TinyModel("mini")
        >>> rows = ["The dog ran to the park.", "Lily saw a red ball."]
        >>> measured = importance.causal_importance(lm, "M2", rows)
        >>> measured.n_rows, measured.order().shape
        (2, (512,))
    """
    ids = _rows_with_targets(lm, rows)
    if not ids.size:
        raise ValueError("causal_importance: no row holds a token to predict; give at least one of two tokens or more.")
    reader = FeatureReader.of(lm, tag, "causal_importance: ")
    progress = None if work_file is None else Progress(work_file, importance_key(lm, reader, ids))
    saved = None if progress is None else progress.load()
    sums = _zeros(reader.dictionary.config.n_features, lm.config.d_model)
    sums |= {} if saved is None else saved.arrays
    rounds, timer = turns(0 if saved is None else saved.done, len(ids), batch=1), SharedTimer(SAVE_SECONDS)
    for turn in track(rounds, "effects"):
        for row in ids[rows_of_turn(turn, len(ids), batch=1)]:
            _add_row(sums, lm, reader, row)
        if progress is not None and timer.is_due():
            progress.save(summed(sums), min(turn + rounds.step, len(ids)))
    sums = summed(sums)
    if progress is not None:
        progress.save(sums, len(ids))
    return _finish(sums, len(ids))


def importance_key(lm: TinyModel, tag: DictionaryLike, rows: Any) -> dict[str, Any]:
    """Return what the numbers depend on, as JSON values: the site, and fingerprints of rows, model and dictionary."""
    reader = FeatureReader.of(lm, tag, "causal_importance: ")
    sums = sorted(_zeros(0, 0))  # a work file of a version that sums other things does not fit
    found = fingerprints(reader, lm.hooked())
    return {"site": reader.site.tag, "rows": fingerprint(_rows_with_targets(lm, rows)), "sums": sums, **found}


def _rows_with_targets(lm: TinyModel, rows: Any) -> Int[np.ndarray, "rows seq"]:
    ids = check_tok_ids(rows_of(lm, rows), lm.config)
    return ids[np.any(ids[:, 1:] != lm.config.pad_id, axis=1)]


def _zeros(n_features: int, d_model: int) -> dict[str, np.ndarray]:
    sums = {f"{name}_{power}": np.zeros(n_features) for name in _MEASURES for power in ("sum", "squares")}
    stream = np.zeros((n_features, d_model), np.float32)
    return {"active_rows": np.zeros(n_features, np.int64), "final_stream_sum": stream, **sums}


def _add_row(sums: dict[str, np.ndarray], lm: TinyModel, reader: FeatureReader, row: np.ndarray) -> None:
    real = np.flatnonzero(row != lm.config.pad_id)
    width = bucket(int(real[-1]) + 1, lm.config.n_ctx)
    effects = ablate(lm, reader, row[None, :width])
    sums["active_rows"][effects.features] += 1
    sums["final_stream_sum"][effects.features] += effects.final_stream
    for name in _MEASURES:
        values = getattr(effects, name).astype(np.float64)
        sums[f"{name}_sum"][effects.features] += values
        sums[f"{name}_squares"][effects.features] += values**2


def _finish(sums: dict[str, np.ndarray], n_rows: int) -> CausalImportance:
    active = sums["active_rows"]
    everywhere = np.full_like(active, n_rows)
    over = {
        suffix: {name: _mean(sums[f"{name}_sum"], sums[f"{name}_squares"], count) for name in _MEASURES}
        for suffix, count in (("", active), ("_all", everywhere))
    }
    named = {f"{name}{suffix}": effect for suffix, found in over.items() for name, effect in found.items()}
    stream = sums["final_stream_sum"] / np.maximum(active, 1)[:, None].astype(np.float32)
    return CausalImportance(n_rows, active, **named, final_stream=stream)


def _mean(total: np.ndarray, squares: np.ndarray, count: np.ndarray) -> MeanEffect:
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
        variance = np.maximum(squares - count * mean**2, 0) / (count - 1)
        return MeanEffect(mean, np.where(count > 1, NORMAL_95 * np.sqrt(variance / count), np.nan))

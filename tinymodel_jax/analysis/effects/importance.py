"""How much each feature of a dictionary matters to the model: the effect of turning it off, over a data set.

Every feature is ablated on every row where it is active (`sweeps.ablate`); where it is not, its effect is exactly 0.
A row without a token to predict, as of a lone `[BEGIN]`, counts in no mean, as in `evaluate`. Sums over rows, so the
work can be stopped and go on. Confidence intervals are of the mean over rows, which stand for
stories: `NORMAL_95` standard errors to either side, which is rough where a feature was active on few rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tinymodel_jax.analysis.effects.sweeps import ablate
from tinymodel_jax.analysis.evaluation.row_sums import NORMAL_95
from tinymodel_jax.analysis.search.resumable import Progress, fingerprint, fingerprints
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.padding import bucket, check_tok_ids

SAVE_SECONDS = 20.0
_MEASURES = ("kl", "loss")


class MeanEffect(NamedTuple):
    """A mean for each feature, and its 95 % confidence interval: `mean - half_width` to `mean + half_width`."""

    mean: Float[np.ndarray, " n_features"]
    """NaN where there is nothing to average."""
    half_width: Float[np.ndarray, " n_features"]
    """NaN where there are fewer than two rows."""


class CausalImportance(NamedTuple):
    """What turning off each feature of a dictionary does, nats."""

    n_rows: int
    """Rows with a token to predict."""
    active_rows: Int[np.ndarray, " n_features"]
    """Rows on which the feature is active."""
    kl: MeanEffect
    """KL divergence a position, averaged over the rows where the feature is active."""
    loss: MeanEffect
    """Change of the loss, averaged over the rows where the feature is active: positive where the feature helps."""
    kl_all: MeanEffect
    """KL divergence averaged over all `n_rows`: frequent features weigh more."""
    loss_all: MeanEffect
    """Change of the loss averaged over all `n_rows`."""
    final_stream: Float[np.ndarray, "n_features d_model"]
    """`FeatureEffects.final_stream`, averaged over the rows where the feature is active; 0 where there is none."""

    def order(self) -> Int[np.ndarray, " n_features"]:
        """Return the features by their KL over all rows, the most important first."""
        return np.argsort(-self.kl_all.mean, kind="stable")


def causal_importance(
    lm: TinyModel,
    tag: str,
    rows: Any,
    *,
    work_file: Path | None = None,
    track: Callable[[list[int]], Iterable[int]] = iter,
) -> CausalImportance:
    """Ablate every feature on every row.

    Args:
        rows: token ids (rows, seq), right-padded with `[PAD]`, which counts nowhere; rows without a token to predict
            are left out.
        work_file: where to save what is done; there, the work goes on. Delete it when the result is kept.
        track: sees the rows left to do pass by, to show a progress bar.

    Raises:
        ValueError: no row holds a token to predict, they do not fit the model, the tag has no dictionary, or the file
            is of other work.
    """
    ids = check_tok_ids(rows, lm.config)
    ids = ids[np.any(ids[:, 1:] != lm.config.pad_id, axis=1)]
    if not ids.size:
        raise ValueError("causal_importance: no row holds a token to predict; give at least one of two tokens or more.")
    dictionary = lm[tag].dictionary
    progress = None if work_file is None else Progress(work_file, _key(lm, tag, ids))
    saved = None if progress is None else progress.load()
    sums = _zeros(dictionary.config.n_features, lm.config.d_model) if saved is None else saved.arrays
    written = time.monotonic()
    for row in track(list(range(0 if saved is None else saved.done, len(ids)))):
        _add_row(sums, lm, tag, ids[row])
        if progress is not None and time.monotonic() - written > SAVE_SECONDS:
            progress.save(sums, row + 1)
            written = time.monotonic()
    if progress is not None:
        progress.save(sums, len(ids))
    return _finish(sums, len(ids))


def _zeros(n_features: int, d_model: int) -> dict[str, np.ndarray]:
    sums = {f"{name}_{power}": np.zeros(n_features) for name in _MEASURES for power in ("sum", "squares")}
    stream = np.zeros((n_features, d_model), np.float32)
    return {"active_rows": np.zeros(n_features, np.int64), "final_stream_sum": stream, **sums}


def _add_row(sums: dict[str, np.ndarray], lm: TinyModel, tag: str, row: np.ndarray) -> None:
    real = np.flatnonzero(row != lm.config.pad_id)
    width = bucket(int(real[-1]) + 1, lm.config.n_ctx)
    effects = ablate(lm, tag, row[None, :width])
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


def _key(lm: TinyModel, tag: str, ids: np.ndarray) -> dict[str, Any]:
    sums = sorted(_zeros(0, 0))  # a work file of a version that sums other things does not fit
    return {"site": tag, "rows": fingerprint(ids), "sums": sums, **fingerprints(lm[tag], lm.hooked())}

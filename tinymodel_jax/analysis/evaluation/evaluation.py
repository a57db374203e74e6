"""Evaluation of dictionaries: reconstruction, sparsity, and the loss of the language model that runs through them.

Dictionaries of several sites are measured together. One pass of the model gives the clean activations. Each dictionary
then adds only its encoding and a pass through the layers above its site. Sums over rows are added batch by batch and
divided at the end; confidence intervals are over rows (`row_sums.py`).

    explained variance = 1 - Σ |y - prediction|² / Σ |y - mean y|²
    CE recovered       = (CE zero-ablated - CE spliced) / (CE zero-ablated - CE clean)

There are two passes over the rows; the first computes the mean of y, which explained variance and mean-ablation need.
`[PAD]` and rows without a token to predict are excluded. Measures of reconstruction also exclude `[BEGIN]`, which has
the same vector in every story, by default, and the tokens that a dictionary excludes, where splices and ablations keep
the value. Cross-entropy and KL are over the positions that have a next token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tinymodel_jax.analysis.evaluation.model_passes import (
    batches_of,
    clean_pass,
    losses_with_value,
    require_unspliced,
    sum_values,
)
from tinymodel_jax.analysis.evaluation.reconstruction import RowTotals, reconstruct
from tinymodel_jax.analysis.evaluation.row_sums import RowSums
from tinymodel_jax.block_order import stream_before
from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.sites import require_site
from tinymodel_jax.lm import FeatureReader, TinyModel
from tinymodel_jax.lm.text import rows_of
from tinymodel_jax.model.forward import HookedModel
from tinymodel_jax.model.hook_points import require_hook_names, vector_width, vectors
from tinymodel_jax.runtime.progress import Track, no_progress

DENSITY_EDGES = np.arange(-6, 0.01, 0.5)
"""Edges of the bins of `density_histogram`: log10 of the share of tokens on which a feature is active."""


class Ablation(NamedTuple):
    """Where zeros or means take a value's place: at a hook point, except at excluded tokens."""

    place: str
    exclude: tuple[int, ...]


class DictionaryEvaluation(NamedTuple):
    """One dictionary's numbers; plain floats, and two arrays at the end."""

    l0: float
    """Active features per token."""
    explained_variance: float
    """1 - squared error / squared distance from the mean."""
    mse: float
    """Mean squared error per coordinate."""
    cosine: float
    """Cosine between prediction and value, averaged over tokens; 0 where one of them is 0."""
    dead_fraction: float
    """Share of the features that were active on none of the tokens; on few tokens, rare features count as dead."""
    ce_clean: float
    """Cross-entropy of the model, nats."""
    ce_spliced: float
    """Cross-entropy with the dictionary's prediction in place, nats."""
    ce_zero_ablated: float
    """Cross-entropy with zeros in place, nats."""
    ce_mean_ablated: float
    """Cross-entropy with the mean over the counted tokens in place, nats."""
    ce_recovered: float
    """Share of what zero-ablation loses that the dictionary keeps."""
    kl: float
    """KL divergence of the spliced model's next-token distribution from the clean one's, nats."""
    tokens: int
    """Number of tokens that the measures of reconstruction are averaged over."""
    margins: dict[str, float]
    """Name of a number above -> half-width of its 95 % confidence interval over rows; NaN for a single row."""
    frequency: Float[np.ndarray, " n_features"]
    """Share of the tokens on which each feature was active."""


_QUANTITIES = (*RowTotals._fields, "targets", "clean", "spliced", "kl", "zeroed", "averaged")
_RATIOS = {
    "l0": ("l0", "tokens"),
    "cosine": ("cosine", "tokens"),
    "ce_clean": ("clean", "targets"),
    "ce_spliced": ("spliced", "targets"),
    "ce_zero_ablated": ("zeroed", "targets"),
    "ce_mean_ablated": ("averaged", "targets"),
    "ce_recovered": (("zeroed", "spliced"), ("zeroed", "clean")),
    "kl": ("kl", "targets"),
}


def evaluate(
    lm: TinyModel,
    dictionaries: Sequence[Dictionary | FeatureReader | str] | Dictionary | FeatureReader | str,
    rows: Any,
    *,
    count_begin: bool = False,
    track: Track = no_progress,
) -> list[DictionaryEvaluation]:
    """Measure each dictionary by itself in the model, all on the same tokens; they may be of several sites.

    Args:
        lm: the model; its splices, if any, are part of the clean pass.
        dictionaries: one or several tags of the model's dictionaries (`"M2"`), results of `lm[tag]`, or `Dictionary`s.
        rows: stories, or integers (rows, seq), right-padded with `[PAD]`; a row is one unit of the confidence
            intervals.
        count_begin: include `[BEGIN]` in L0, explained variance, MSE, cosine and frequencies.
        track: wraps the iterator over batches, for example with a progress bar.

    Raises:
        ValueError: a dictionary's hook points or widths do not fit the model, or the model is spliced at one of them;
            the ids are not valid; or there is no token to predict or to measure.
    """
    resolved = _resolve(lm, dictionaries)
    for dictionary in resolved:
        _check_fits(dictionary.config, lm)
    batches = batches_of(rows_of(lm, rows), lm.config)
    model = lm.hooked()
    means = _means(model, batches, {_ablation(d.config) for d in resolved}, count_begin, track)
    sums = [RowSums(_QUANTITIES) for _ in resolved]
    active = [np.zeros(d.config.n_features) for d in resolved]
    for ids in track(batches, "measuring"):
        has_targets = np.any(ids[:, 1:] != lm.config.pad_id, axis=1)
        for i, (totals, found) in enumerate(_measure_batch(model, resolved, means, ids, count_begin)):
            sums[i].add(totals, where=has_targets)
            active[i] += np.asarray(found)
    return [_divide(s, a, d.config.d_out) for s, a, d in zip(sums, active, resolved, strict=True)]


def density_histogram(frequency: Float[np.ndarray, " n_features"]) -> tuple[list[int], int]:
    """Return the number of features in each bin of `DENSITY_EDGES` (the first has all below it), and of dead ones."""
    alive = frequency[frequency > 0]
    logs = np.clip(np.log10(alive), DENSITY_EDGES[0], 0)
    return np.histogram(logs, DENSITY_EDGES)[0].tolist(), int(len(frequency) - len(alive))


def numbers_of(evaluation: Any) -> dict[str, float]:
    """Return the single numbers of an evaluation, by name."""
    return {name: value for name, value in evaluation._asdict().items() if isinstance(value, int | float)}


def _resolve(lm: TinyModel, given: Any) -> list[Dictionary]:
    """Return the dictionaries that tags, readers or dictionaries name."""
    found: list[Any] = []
    single = isinstance(given, str | FeatureReader | Dictionary | Mapping) or not isinstance(given, Iterable)
    items: Any = [given] if single else given
    for item in items:
        reader = lm[item] if isinstance(item, str) else item
        if isinstance(reader, FeatureReader) and reader.feature is not None:
            raise ValueError(
                f"evaluate measures whole dictionaries; got feature {reader.feature} of {reader.site.tag}. "
                f"Give {reader.site.tag!r}."
            )
        found.append(reader.dictionary if isinstance(reader, FeatureReader) else reader)
        if not isinstance(found[-1], Dictionary):
            raise ValueError(
                f"evaluate takes a tag such as 'M2', lm['M2'] or a Dictionary, or a list; got a {type(item).__name__}."
            )
    return found


def _check_fits(config: DictionaryConfig, lm: TinyModel) -> None:
    names = (config.hook_in, config.hook_out)
    require_site(*names)
    require_hook_names(names, lm.config)
    require_unspliced(lm, names)
    for name, width in zip(names, (config.d_in, config.d_out), strict=True):
        expected = vector_width(name, lm.config)
        if width != expected:
            raise ValueError(
                f"evaluate: a dictionary is {width} wide at {name}, where the model is {expected}; "
                "give dictionaries of this model."
            )


def _ablation(config: DictionaryConfig) -> Ablation:
    return Ablation(config.hook_out, config.exclude)


def _means(
    model: HookedModel, batches: list[np.ndarray], ablations: set[Ablation], begin: bool, track: Track
) -> dict[Ablation, Float[np.ndarray, " d_out"]]:
    """Return the mean of the value over the tokens that each ablation counts."""
    sums: dict[Ablation, Any] = dict.fromkeys(sorted(ablations), 0.0)
    tokens = dict.fromkeys(sums, 0)
    places = {exclude: tuple(a.place for a in sums if a.exclude == exclude) for exclude in {a.exclude for a in sums}}
    for ids in track(batches, "taking means"):
        for exclude, named in places.items():
            counted = _counted(ids, model.config, begin, exclude)
            found = sum_values(model, ids, counted, places=named)
            for ablation in (Ablation(place, exclude) for place in named):
                sums[ablation] = sums[ablation] + np.asarray(found[ablation.place], np.float64)
                tokens[ablation] += int(counted.sum())
    if not all(tokens.values()):
        raise ValueError(
            "evaluate: the rows hold only [BEGIN] or other tokens that are not counted; give rows with more tokens."
        )
    return {ablation: (total / tokens[ablation]).astype(np.float32) for ablation, total in sums.items()}


def _measure_batch(
    model: HookedModel,
    dictionaries: Sequence[Dictionary],
    means: Mapping[Ablation, np.ndarray],
    ids: Int[np.ndarray, "batch seq"],
    begin: bool,
) -> Iterator[tuple[dict[str, Any], Array]]:
    """Yield, for each dictionary, the rows' totals of each quantity, and on how many tokens each feature is active."""
    config = model.config
    needed = {name for d in dictionaries for name in (d.config.hook_in, d.config.hook_out)}
    keep = tuple(sorted(needed | {stream_before(ablation.place) for ablation in means}))
    clean = clean_pass(model, ids, keep=keep)

    def with_value(at: Ablation, value: Any) -> Array:
        """Run the layers above with another value at a place, except at excluded tokens."""
        clean_value, stream = clean.acts[at.place], clean.acts[stream_before(at.place)]
        kept = np.isin(ids, at.exclude)
        return losses_with_value(model, ids, stream, clean_value, value, kept, clean.logprobs, place=at.place)

    def with_vector(at: Ablation, vector: np.ndarray) -> np.ndarray:
        shape = (*ids.shape, len(vector))
        return np.asarray(with_value(at, np.broadcast_to(vector, shape)))[0]

    ablated = {at: [with_vector(at, v) for v in (np.zeros_like(mean), mean)] for at, mean in means.items()}
    shared = {"targets": np.sum(ids[:, 1:] != config.pad_id, axis=1), "clean": clean.nats}
    for dictionary in dictionaries:
        at, x = _ablation(dictionary.config), vectors(clean.acts[dictionary.config.hook_in])
        y, mean, counted = vectors(clean.acts[at.place]), means[at], _counted(ids, config, begin, at.exclude)
        prediction, totals, active = reconstruct(dictionary.params, x, y, mean, counted, config=dictionary.config)
        spliced, kl = np.asarray(with_value(at, prediction))
        zeroed, averaged = ablated[at]
        found = {**shared, "spliced": spliced, "kl": kl, "zeroed": zeroed, "averaged": averaged}
        yield totals._asdict() | found, active


def _divide(sums: RowSums, active: np.ndarray, width: int) -> DictionaryEvaluation:
    found = {name: sums.ratio(*pair) for name, pair in _RATIOS.items()}
    unexplained, error, tokens = sums.ratio("error", "variance"), sums.ratio("error", "tokens"), sums.total("tokens")
    margins = {name: estimate.margin for name, estimate in found.items()}
    return DictionaryEvaluation(
        **{name: estimate.value for name, estimate in found.items()},
        explained_variance=1 - unexplained.value,
        mse=error.value / width,
        dead_fraction=float(np.mean(active == 0)),
        tokens=int(tokens),
        margins=margins | {"explained_variance": unexplained.margin, "mse": error.margin / width},
        frequency=active / max(tokens, 1),
    )


def _counted(
    ids: np.ndarray, config: ModelConfig, begin: bool, exclude: tuple[int, ...]
) -> Bool[np.ndarray, "batch seq"]:
    # rows without a token to predict are excluded, so that all numbers are over the same rows
    real = (ids != config.pad_id) & np.any(ids[:, 1:] != config.pad_id, axis=1, keepdims=True)
    excluded = exclude if begin else (*exclude, config.begin_id)
    return real & ~np.isin(ids, excluded)

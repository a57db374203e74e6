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

All devices of all processes are used: each process measures a part of the rows, which its devices share, and each has
the result (`runtime/rows.py`).

A cross-layer transcoder replaces all its MLP outputs in one pass. A crosscoder replaces the value of one hook point at
a time, by its reconstruction from the clean pass; its cross-entropies and KL are averages over its hook points.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tinymodel_jax.analysis.evaluation.batch_losses import Ablation, BatchLosses, ablations_of, sites_of
from tinymodel_jax.analysis.evaluation.model_passes import (
    batches_of,
    clean_pass,
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
from tinymodel_jax.model.hook_points import read_ahead, require_hook_names, require_widths, vector_width, vectors_at
from tinymodel_jax.runtime.collectives import summed
from tinymodel_jax.runtime.progress import Track, no_progress
from tinymodel_jax.runtime.rows import RowDevices, row_devices

DENSITY_EDGES = np.arange(-6, 0.01, 0.5)
"""Edges of the bins of `density_histogram`: log10 of the share of tokens on which a feature is active."""


class DictionaryEvaluation(NamedTuple):
    """One dictionary's numbers: plain floats, two tables by name, and an array."""

    l0: float
    """Active features per token."""
    explained_variance: float
    """1 - squared error / squared distance from the mean; at most 1."""
    mse: float
    """Mean squared error per coordinate, in squared units of the activations."""
    cosine: float
    """Cosine between prediction and value, averaged over tokens; 0 where one of them is 0."""
    dead_fraction: float
    """Share of the features that were active on none of the tokens; on few tokens, rare features count as dead."""
    ce_clean: float
    """Cross-entropy of the model, nats per predicted token."""
    ce_spliced: float
    """Cross-entropy with the dictionary's prediction in place, nats per predicted token."""
    ce_zero_ablated: float
    """Cross-entropy with zeros in place, nats per predicted token."""
    ce_mean_ablated: float
    """Cross-entropy with the mean over the counted tokens in place, nats per predicted token."""
    ce_recovered: float
    """Share of what zero-ablation loses that the dictionary keeps; 1 if the loss does not change."""
    kl: float
    """KL divergence of the spliced model's next-token distribution from the clean one's, nats per predicted token."""
    tokens: int
    """Number of tokens that the measures of reconstruction are averaged over."""
    margins: dict[str, float]
    """Name of a number above -> half-width of its 95 % confidence interval over rows; NaN for a single row."""
    sites: dict[str, dict[str, float]]
    """For crosscoders and cross-layer transcoders: tag of each site that they join -> the numbers of the site. A
    crosscoder's are those above that depend on the prediction, a cross-layer transcoder's L0 and explained variance."""
    frequency: Float[np.ndarray, " n_features"]
    """Share of the tokens on which each feature was active."""


_QUANTITIES = (*RowTotals._fields, "targets", "clean", "spliced", "kl", "zeroed", "averaged")
_OF_CROSSCODERS, _OF_LAYERS = ("error", "variance", "spliced", "kl", "zeroed", "averaged"), ("error", "variance", "l0")
"""Quantities that are also summed for each site that a crosscoder, or a cross-layer transcoder, joins."""
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

        explained variance = 1 - Σ |y - prediction|² / Σ |y - mean y|²
        CE recovered       = (CE zero-ablated - CE spliced) / (CE zero-ablated - CE clean)

    Measures of reconstruction leave out `[PAD]`, the tokens that a dictionary excludes and, unless `count_begin` is
    set, `[BEGIN]`.

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

    Returns:
        The numbers of each dictionary, in the order given.

    Source: CE recovered is the loss recovered of Rajamanoharan et al. 2024 (gated sparse autoencoders).

    Examples:
        >>> from tinymodel_jax import TinyModel, evaluate
        >>> lm = TinyModel("mini")
        >>> rows = ["The dog ran to the park.", "Lily saw a red ball."]
        >>> (measured,) = evaluate(lm, "M2", rows)
        >>> measured.ce_clean < measured.ce_zero_ablated, 0 < measured.explained_variance < 1
        (True, True)
    """
    resolved = _resolve(lm, dictionaries)
    for dictionary in resolved:
        _check_fits(dictionary.config, lm)
    devices = row_devices(lm.hooked(), resolved)
    model, resolved = devices.shared((lm.hooked(), resolved))
    batches = batches_of(rows_of(lm, rows), lm.config, devices)
    ablations = {at for d in resolved for at in ablations_of(d.config)}
    means = _means(model, devices, batches, ablations, count_begin, track)
    sums = [RowSums((*_QUANTITIES, *_of_sites(d.config))) for d in resolved]
    active = [np.zeros(d.config.n_features) for d in resolved]
    for ids in track(batches, "measuring"):
        has_targets = np.any(ids[:, 1:] != lm.config.pad_id, axis=1)
        for i, (totals, found) in enumerate(_measure_batch(model, devices, resolved, means, ids, count_begin)):
            sums[i].add(totals, where=has_targets)
            active[i] += np.asarray(found).sum(axis=0)
    for of_dictionary in sums:
        of_dictionary.add_other_processes()
    active = summed({str(i): found for i, found in enumerate(active)}).values()
    return [_divide(s, a, d.config) for s, a, d in zip(sums, active, resolved, strict=True)]


def density_histogram(frequency: Float[np.ndarray, " n_features"]) -> tuple[list[int], int]:
    """Return how many features are active on which share of the tokens.

    Args:
        frequency: share of the tokens on which each feature is active, as in `DictionaryEvaluation`.

    Returns:
        Number of features in each bin of log10 of the frequency (12 bins from -6 to 0; the first counts all below),
        and number of dead features.

    Examples:
        >>> import numpy as np
        >>> from tinymodel_jax.analysis.evaluation.evaluation import density_histogram
        >>> counts, dead = density_histogram(np.array([0.0, 0.005, 0.02, 0.5]))
        >>> counts[-6:], dead
        ([0, 1, 1, 0, 0, 1], 1)
    """
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
    require_site(config.hook_in, config.hook_out)
    names = (*config.hooks_in, *config.hooks_out)
    require_hook_names(names, lm.config)
    require_unspliced(lm, names)
    if read_ahead(lm.hooked().hooks):
        raise ValueError(
            f"evaluate: the model is spliced with a crosscoder (spliced: {', '.join(lm.spliced)}), which reads a pass "
            "of its own; evaluate in the model without it."
        )
    require_widths(config, lm.config, "evaluate")


def _of_sites(config: DictionaryConfig) -> list[str]:
    """Return the names of the quantities of single sites."""
    names = _OF_CROSSCODERS if config.is_crosscoder else _OF_LAYERS
    return [f"{name} {tag}" for tag in sites_of(config) for name in names]


def _means(
    model: HookedModel,
    devices: RowDevices,
    batches: list[np.ndarray],
    ablations: set[Ablation],
    begin: bool,
    track: Track,
) -> dict[Ablation, Float[np.ndarray, " d_out"]]:
    """Return the mean of the value over the tokens that each ablation counts."""
    order = sorted(ablations)  # the same on every process
    sums = {at: np.zeros(vector_width(at.place, model.config) or 0) for at in order}
    tokens = dict.fromkeys(order, 0)
    places = {exclude: tuple(a.place for a in sums if a.exclude == exclude) for exclude in {a.exclude for a in sums}}
    for ids in track(batches, "taking means"):
        for exclude, named in places.items():
            counted = _counted(ids, model.config, begin, exclude)
            found = sum_values(model, devices.rows(ids), devices.rows(counted), places=named)
            for ablation in (Ablation(place, exclude) for place in named):
                sums[ablation] += np.asarray(found[ablation.place]).sum(axis=0, dtype=np.float64)
                tokens[ablation] += int(counted.sum())
    counts = summed({"tokens": np.array(list(tokens.values()))})["tokens"]
    if not counts.all():
        raise ValueError(
            "evaluate: the rows hold only [BEGIN] or other tokens that are not counted; give rows with more tokens."
        )
    totals = summed({str(i): total for i, total in enumerate(sums.values())}).values()
    return {at: (total / n).astype(np.float32) for at, total, n in zip(order, totals, counts, strict=True)}


def _measure_batch(
    model: HookedModel,
    devices: RowDevices,
    dictionaries: Sequence[Dictionary],
    means: Mapping[Ablation, np.ndarray],
    ids: Int[np.ndarray, "batch seq"],
    begin: bool,
) -> Iterator[tuple[dict[str, Any], Array]]:
    """Yield, for each dictionary, the rows' totals of each quantity, and each row's number of tokens per feature."""
    config = model.config
    needed = {name for d in dictionaries for name in (*d.config.hooks_in, *d.config.hooks_out)}
    keep = tuple(sorted(needed | {stream_before(ablation.place) for ablation in means}))
    clean = clean_pass(model, devices.rows(ids), keep=keep)
    losses = BatchLosses(model, ids, clean, means, devices)
    shared = {"targets": np.sum(ids[:, 1:] != config.pad_id, axis=1), "clean": clean.nats}
    for dictionary in dictionaries:
        x, y = (vectors_at(clean.acts, hook) for hook in (dictionary.config.hook_in, dictionary.config.hook_out))
        mean = np.concatenate([means[at] for at in ablations_of(dictionary.config)])
        counted = devices.rows(_counted(ids, config, begin, dictionary.config.exclude))
        prediction, totals, active = reconstruct(dictionary.params, x, y, mean, counted, config=dictionary.config)
        yield _of_rows(totals, dictionary.config) | shared | losses.of(dictionary, prediction), active


def _of_rows(totals: RowTotals, config: DictionaryConfig) -> dict[str, Any]:
    """Return the rows' totals of each quantity, of single sites as well."""
    arrays = {name: np.asarray(value) for name, value in totals._asdict().items()}
    found: dict[str, Any] = {name: a if a.ndim == 1 else a.sum(axis=1) for name, a in arrays.items()}
    for part, tag in enumerate(sites_of(config)):
        found |= {f"{name} {tag}": a[:, part] for name, a in arrays.items() if a.ndim > 1 and a.shape[1] > 1}
    return found


def _divide(sums: RowSums, active: np.ndarray, config: DictionaryConfig) -> DictionaryEvaluation:
    found = {name: sums.ratio(*pair) for name, pair in _RATIOS.items()}
    unexplained, error, tokens = sums.ratio("error", "variance"), sums.ratio("error", "tokens"), sums.total("tokens")
    margins = {name: estimate.margin for name, estimate in found.items()}
    return DictionaryEvaluation(
        **{name: estimate.value for name, estimate in found.items()},
        explained_variance=1 - unexplained.value,
        mse=error.value / config.d_out,
        dead_fraction=float(np.mean(active == 0)),
        tokens=int(tokens),
        margins=margins | {"explained_variance": unexplained.margin, "mse": error.margin / config.d_out},
        sites={tag: _of_site(sums, tag, config) for tag in sites_of(config)},
        frequency=active / max(tokens, 1),
    )


def _of_site(sums: RowSums, tag: str, config: DictionaryConfig) -> dict[str, float]:
    """Return the numbers of one of the sites that a crosscoder or cross-layer transcoder joins."""

    def ratio(above: str, below: str) -> float:
        return sums.ratio(f"{above} {tag}", f"{below} {tag}" if below == "variance" else below).value

    explained = {"explained_variance": 1 - ratio("error", "variance")}
    if config.n_layers > 1:
        return {"l0": ratio("l0", "tokens"), **explained}
    names = {"ce_spliced": "spliced", "ce_zero_ablated": "zeroed", "ce_mean_ablated": "averaged", "kl": "kl"}
    zeroed, spliced = f"zeroed {tag}", f"spliced {tag}"
    recovered = sums.ratio((zeroed, spliced), (zeroed, "clean")).value
    return explained | {name: ratio(of, "targets") for name, of in names.items()} | {"ce_recovered": recovered}


def _counted(
    ids: np.ndarray, config: ModelConfig, begin: bool, exclude: tuple[int, ...]
) -> Bool[np.ndarray, "batch seq"]:
    # rows without a token to predict are excluded, so that all numbers are over the same rows
    real = (ids != config.pad_id) & np.any(ids[:, 1:] != config.pad_id, axis=1, keepdims=True)
    excluded = exclude if begin else (*exclude, config.begin_id)
    return real & ~np.isin(ids, excluded)

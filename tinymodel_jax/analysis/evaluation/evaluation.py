"""How good dictionaries are: reconstruction, sparsity, and what the language model loses when it runs through them.

Dictionaries of any sites are measured together. One pass of the model gives the clean activations; each dictionary then
costs its own encoding and the layers above its site, which start from the clean values below it. Sums over rows are
added batch by batch and divided once, with intervals over rows (`row_sums.py`).

    explained variance = 1 - Σ |y - prediction|² / Σ |y - mean y|²
    CE recovered       = (CE zero-ablated - CE spliced) / (CE zero-ablated - CE clean)

Two passes over the rows: the first takes the mean of y, which explained variance and mean-ablation need. `[PAD]` counts
nowhere, nor does a row without a token to predict. `[BEGIN]`, which has the same vector in every story, counts in no
measure of reconstruction unless asked for; cross-entropy and KL are over the positions whose next token is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tinymodel_jax.analysis.evaluation.model_passes import (
    batches_of,
    clean_pass,
    losses_with_value,
    require_unspliced,
    resume_point,
    sum_values,
)
from tinymodel_jax.analysis.evaluation.row_sums import RowSums
from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary, DictionaryParams, encode, predict
from tinymodel_jax.dictionaries.sites import require_site
from tinymodel_jax.lm import FeatureReader, TinyModel
from tinymodel_jax.model.forward import HookedModel
from tinymodel_jax.model.hook_points import hook_width, require_hook_names
from tinymodel_jax.runtime.compilation import fast_jit

Track = Callable[[list[Any], str], Iterable[Any]]
"""Yields the batches it is given, and may show how many are done: `(batches, what is done) -> batches`."""

DENSITY_EDGES = np.arange(-6, 0.01, 0.5)
"""Edges of the bins of `density_histogram`: log10 of the share of tokens on which a feature is active."""


class DictionaryEvaluation(NamedTuple):
    """One dictionary's numbers; plain floats, and two arrays at the end."""

    l0: float
    """Active features a token."""
    explained_variance: float
    """1 - squared error / squared distance from the mean."""
    mse: float
    """Squared error of one coordinate, on average."""
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
    """Tokens that the measures of reconstruction are over."""
    margins: dict[str, float]
    """Name of a number above -> half-width of its 95 % confidence interval over rows; NaN for a single row."""
    frequency: Float[np.ndarray, " n_features"]
    """Share of the tokens on which each feature was active."""


_RECONSTRUCTION = ("tokens", "l0", "error", "variance", "cosine")
_MODEL = ("targets", "clean", "spliced", "kl", "zeroed", "averaged")
_RATIOS = {
    "l0": ("l0", "tokens"),
    "cosine": ("cosine", "tokens"),
    "ce_clean": ("clean", "targets"),
    "ce_spliced": ("spliced", "targets"),
    "ce_zero_ablated": ("zeroed", "targets"),
    "ce_mean_ablated": ("averaged", "targets"),
    "ce_recovered": ("zeroed - spliced", "zeroed - clean"),
    "kl": ("kl", "targets"),
}


def evaluate(
    lm: TinyModel,
    dictionaries: Sequence[Dictionary | FeatureReader | str] | Dictionary | FeatureReader | str,
    rows: Any,
    *,
    count_begin: bool = False,
    track: Track = lambda batches, _: batches,
) -> list[DictionaryEvaluation]:
    """Measure each dictionary, alone in the model, on the same tokens; several sites may be mixed.

    Args:
        lm: the model; its splices, if any, are part of what "clean" means.
        dictionaries: tags of the model's dictionaries (`"M2"`), what `lm[tag]` returns, or dictionaries; or one.
        rows: integers (rows, seq), right-padded with `[PAD]`; a row is one unit of the confidence intervals.
        count_begin: let `[BEGIN]` count in L0, explained variance, MSE, cosine and frequencies.
        track: shows the progress over batches.

    Raises:
        ValueError: a dictionary's hook points or widths are not the model's, or the model is spliced at one of them;
            the ids are no valid input; or there is no token to predict, or none that counts.
    """
    resolved = _resolve(lm, dictionaries)
    places = tuple(dict.fromkeys(d.config.hook_out for d in resolved))
    for dictionary in resolved:
        _check_fits(dictionary.config, lm)
    batches = batches_of(rows, lm.config)
    model = lm.hooked()
    means = _means(model, batches, places, count_begin, track)
    sums = [RowSums((*_RECONSTRUCTION, *_MODEL)) for _ in resolved]
    active = [np.zeros(d.config.n_features) for d in resolved]
    for ids in track(batches, "measuring"):
        has_targets = np.any(ids[:, 1:] != lm.config.pad_id, axis=1)
        for i, (totals, found) in enumerate(_measure_batch(model, resolved, means, ids, count_begin)):
            sums[i].add(np.stack(totals, axis=1)[has_targets])
            active[i] += np.asarray(found)
    return [_divide(s, a, d.config.d_out) for s, a, d in zip(sums, active, resolved, strict=True)]


def density_histogram(frequency: Float[np.ndarray, " n_features"]) -> tuple[list[int], int]:
    """Return the number of features in each bin of `DENSITY_EDGES`, those below the first in it, and the dead ones."""
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
        if width != hook_width(name, lm.config):
            raise ValueError(
                f"evaluate: a dictionary is {width} wide at {name}, where the model is {hook_width(name, lm.config)}; "
                "give dictionaries of this model."
            )


def _means(
    model: HookedModel, batches: list[np.ndarray], places: tuple[str, ...], begin: bool, track: Track
) -> dict[str, Float[np.ndarray, " d_out"]]:
    """Return the mean over the counted tokens of the value at each place."""
    sums: dict[str, Any] = dict.fromkeys(places, 0.0)
    tokens = 0
    for ids in track(batches, "taking means"):
        counted = _counted(ids, model.config, begin)
        found = sum_values(model, ids, counted, places=places)
        sums = {place: sums[place] + np.asarray(found[place], np.float64) for place in places}
        tokens += int(counted.sum())
    if not tokens:
        raise ValueError("evaluate: the rows hold [BEGIN] alone, which does not count; give rows with other tokens.")
    return {place: (total / tokens).astype(np.float32) for place, total in sums.items()}


def _measure_batch(
    model: HookedModel,
    dictionaries: Sequence[Dictionary],
    means: Mapping[str, np.ndarray],
    ids: Int[np.ndarray, "batch seq"],
    begin: bool,
) -> Iterator[tuple[list[np.ndarray], Array]]:
    """Yield, for each dictionary, each quantity's totals of the rows and the tokens that each feature was active on."""
    config, counted = model.config, _counted(ids, model.config, begin)
    needed = {name for d in dictionaries for name in (d.config.hook_in, d.config.hook_out)}
    keep = tuple(sorted(needed | {resume_point(place) for place in means}))
    clean = clean_pass(model, ids, keep=keep)

    def with_value(place: str, value: Any) -> Array:
        start = clean.acts[resume_point(place)]
        return losses_with_value(model, ids, start, value, clean.logprobs, place=place)

    def with_vector(place: str, vector: np.ndarray) -> np.ndarray:
        shape = (*ids.shape, len(vector))
        return np.asarray(with_value(place, np.broadcast_to(vector, shape)))[0]

    ablated = {place: [with_vector(place, v) for v in (np.zeros_like(mean), mean)] for place, mean in means.items()}
    targets = np.sum(ids[:, 1:] != config.pad_id, axis=1)
    for dictionary in dictionaries:
        place, x = dictionary.config.hook_out, clean.acts[dictionary.config.hook_in]
        y, mean = clean.acts[place], means[place]
        prediction, totals, active = _reconstruct(dictionary.params, x, y, mean, counted, config=dictionary.config)
        spliced = with_value(place, prediction)
        found = [*np.asarray(totals), targets, np.asarray(clean.nats), *np.asarray(spliced), *ablated[place]]
        yield found, active


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


def _counted(ids: np.ndarray, config: ModelConfig, begin: bool) -> Bool[np.ndarray, "batch seq"]:
    # a row without a token to predict counts nowhere, so that all numbers are over the same rows
    real = (ids != config.pad_id) & np.any(ids[:, 1:] != config.pad_id, axis=1, keepdims=True)
    return real if begin else real & (ids != config.begin_id)


@partial(fast_jit, static_argnames=("config",))
def _reconstruct(
    tree: DictionaryParams,
    x: Float[Array, "batch seq d_in"],
    y: Float[Array, "batch seq d_out"],
    mean: Float[Array, " d_out"],
    counted: Bool[Array, "batch seq"],
    *,
    config: DictionaryConfig,
) -> tuple[Float[Array, "batch seq d_out"], Float[Array, "5 batch"], Float[Array, " n_features"]]:
    """Return the prediction, the totals of `_RECONSTRUCTION`, and the tokens that each feature was active on."""
    acts = encode(tree, config, x)
    prediction, y = predict(tree, config, x, acts).astype(jnp.float32), y.astype(jnp.float32)
    lengths = jnp.linalg.norm(y, axis=-1) * jnp.linalg.norm(prediction, axis=-1)
    product = jnp.sum(y * prediction, axis=-1)
    measures = jnp.stack(
        [
            jnp.ones(counted.shape),
            jnp.sum(acts > 0, axis=-1, dtype=jnp.float32),
            jnp.sum(jnp.square(y - prediction), axis=-1),
            jnp.sum(jnp.square(y - mean), axis=-1),
            jnp.where(lengths > 0, product / jnp.where(lengths > 0, lengths, 1), 0),
        ]
    )
    active = jnp.sum((acts > 0) & counted[..., None], axis=(0, 1), dtype=jnp.float32)
    return prediction, jnp.sum(jnp.where(counted, measures, 0), axis=-1), active

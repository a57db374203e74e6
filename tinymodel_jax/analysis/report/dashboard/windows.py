"""The contexts that a dashboard shows for each feature, and the feature's activations around their peaks.

This takes another pass over the rows that hold a shown context. Where the architecture allows it, only the context's
own feature is encoded, and only in its window; `topk` has to compare all features of a position. Memory grows with
features x contexts, not with rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from tinymodel_jax.analysis.search.activation_pass import DictionaryInputs
from tinymodel_jax.analysis.search.contexts import Contexts
from tinymodel_jax.analysis.search.feature_statistics import encoder_parameters
from tinymodel_jax.analysis.search.top_activations import TopActivations
from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.encoding import DictionaryParams, encode, per_feature
from tinymodel_jax.lm import FeatureReader
from tinymodel_jax.model import forward
from tinymodel_jax.runtime.compilation import fast_jit
from tinymodel_jax.runtime.progress import Track, no_progress

BEFORE, AFTER = 12, 6
"""Tokens shown before and after a peak."""
TOP, BANDS, OF_A_BAND = 12, 5, 4
"""Contexts shown: top contexts, and from each band of the sampled contexts."""
TOGETHER = 512
"""Windows that are encoded together."""


def shown_contexts(found: TopActivations) -> Contexts:
    """Return the contexts shown for each feature: `TOP` columns, then `OF_A_BAND` for each band.

    The contexts of a band are evenly spaced in it. Missing contexts have row -1.
    """
    n = TOP + BANDS * OF_A_BAND
    shown = Contexts(*(np.full((found.n_features, n), fill, dtype) for fill, dtype in _EMPTY))
    top = min(TOP, found.top.row.shape[1])
    for field, kept in zip(shown, found.top, strict=True):
        field[:, :top] = kept[:, :top]
    sampled = (found.sampled.row >= 0).sum(axis=1)
    for count in np.unique(sampled[sampled > 0]):
        alike = np.flatnonzero(sampled == count)
        for band, columns in enumerate(np.array_split(np.arange(count), BANDS)):  # as `found.bands`
            chosen = columns[_evenly(len(columns))]
            place = slice(TOP + band * OF_A_BAND, TOP + band * OF_A_BAND + len(chosen))
            for field, kept in zip(shown, found.sampled, strict=True):
                field[alike, place] = kept[alike][:, chosen]
    return shown


def window_positions(contexts: Contexts, seq: int) -> Int[np.ndarray, "*contexts window"]:
    """Return the positions around each peak; -1 for positions outside the row."""
    around = np.arange(-BEFORE, AFTER + 1, dtype=np.int32)
    places = contexts.position[..., None] + around
    inside = (places >= 0) & (places < seq) & (contexts.row[..., None] >= 0)
    return np.where(inside, places, -1)


def window_activations(
    reader: FeatureReader,
    rows: Integer[np.ndarray, "rows seq"],
    contexts: Contexts,
    *,
    batch: int = 8,
    track: Track = no_progress,
) -> Float[np.ndarray, "n_features contexts window"]:
    """Return the activation of each context's feature around its peak; 0 at special tokens and outside the row.

    Args:
        rows: the rows that were searched.
        batch: rows per device in one pass.
        track: wraps the iterator over batches, for example with a progress bar.
    """
    inputs = DictionaryInputs(reader, batch)
    places = window_positions(contexts, rows.shape[1])
    acts = np.zeros(places.shape, np.float32)
    feature, number = np.nonzero(contexts.row >= 0)
    of_row = contexts.row[feature, number]
    order = np.argsort(of_row, kind="stable")
    used, firsts = np.unique(of_row[order], return_index=True)
    bounds = np.append(firsts, len(order))  # where each row's contexts start in `order`
    measure = _measure_of(inputs.dictionary, inputs.config)
    for start in track(range(0, len(used), inputs.batch), "contexts"):
        numbers = used[start : start + inputs.batch]
        ids = rows[numbers]
        pairs = order[bounds[start] : bounds[start + len(numbers)]]
        f, n = feature[pairs], number[pairs]
        in_batch, around = np.searchsorted(numbers, of_row[pairs]), places[f, n]
        real = (around >= 0) & reader.counts(ids[in_batch[:, None], around])
        acts[f, n] = np.where(real, measure(inputs(ids), f, in_batch, around), 0)
    return acts


_EMPTY = ((0, np.float32), (-1, np.int32), (0, np.int32))


def _evenly(size: int) -> Int[np.ndarray, " n"]:
    """Return `OF_A_BAND` evenly spaced indices below `size`, including first and last; all if there are fewer."""
    return np.unique(np.linspace(0, size - 1, OF_A_BAND).astype(int)) if size else np.zeros(0, int)


def _by_feature(params: DictionaryParams, config: DictionaryConfig) -> dict[str, Array]:
    """Return the encoder with features on the first axis of parameters with one entry per feature."""
    own, encoder = per_feature(config), encoder_parameters(params)
    return {name: jnp.moveaxis(array, -1, 0) if name in own else array for name, array in encoder.items()}


def _measure_of(params: DictionaryParams, config: DictionaryConfig) -> Callable[..., np.ndarray]:
    """Return a function of (x, features, rows of x, positions) that computes the features' activations there."""
    if config.compares_features:

        def compared(x: Array, features: np.ndarray, in_batch: np.ndarray, places: np.ndarray) -> np.ndarray:
            acts = np.asarray(forward.encode(params, config, x))
            return acts[in_batch[:, None], places, features[:, None]]

        return compared
    return functools.partial(_of_pairs, _by_feature(params, config), config)


def _of_pairs(
    encoder: DictionaryParams,
    config: DictionaryConfig,
    x: Float[Array, "rows seq d_in"],
    features: Int[np.ndarray, " pairs"],
    in_batch: Int[np.ndarray, " pairs"],
    places: Int[np.ndarray, "pairs window"],
) -> Float[np.ndarray, "pairs window"]:
    """Return the activations of features at positions of rows of the batch; undefined at position -1."""
    found = []
    for start in range(0, len(features), TOGETHER):
        part = [array[start : start + TOGETHER] for array in (features, in_batch, places)]
        size = len(part[0])
        padded = [np.resize(array, (TOGETHER, *array.shape[1:])) for array in part]  # one shape for all parts
        found.append(np.asarray(_encode_pairs(encoder, x, *padded, config=config))[:size])
    return np.concatenate(found)


@partial(fast_jit, static_argnames=("config",))
def _encode_pairs(
    encoder: DictionaryParams,
    x: Float[Array, "rows seq d_in"],
    features: Int[Array, " pairs"],
    in_batch: Int[Array, " pairs"],
    places: Int[Array, "pairs window"],
    *,
    config: DictionaryConfig,
) -> Float[Array, "pairs window"]:
    own = per_feature(config)

    def one(feature: Array, window: Array) -> Array:
        alone = {name: array[feature][..., None] if name in own else array for name, array in encoder.items()}
        return encode(alone, config, window)[..., 0]

    return jax.vmap(one)(features, x[in_batch[:, None], places])

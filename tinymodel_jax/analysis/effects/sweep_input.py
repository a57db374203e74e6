"""The checked inputs of a sweep: rows of tokens with their clean pass, and features with their activations.

Wrong arguments are refused here, with a message of one line, before the sweep starts. Rows are padded to one of a few
lengths, so that prompts of many lengths share compiled programs; `[PAD]` is excluded from all averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from tinymodel_jax.analysis.effects.metrics import (
    FunctionValue,
    Measured,
    Metric,
    Weights,
    check_metric,
    last_positions,
    weights_of,
)
from tinymodel_jax.analysis.effects.stream_entry import Entry, entry_of
from tinymodel_jax.analysis.effects.upper_layers import Clean, clean_streams
from tinymodel_jax.block_order import comes_after
from tinymodel_jax.dictionaries.dictionary import resolve_indices
from tinymodel_jax.dictionaries.encoding import size_and_mean
from tinymodel_jax.dictionaries.sites import Site, require_layer
from tinymodel_jax.lm import FeatureReader, TinyModel
from tinymodel_jax.lm.dictionaries import DictionaryLike
from tinymodel_jax.model.edits import need_whole_passes
from tinymodel_jax.model.forward import encode
from tinymodel_jax.model.hook_points import read_ahead
from tinymodel_jax.model.padding import bucket, check_tok_ids, pad_right


class SweepInput(NamedTuple):
    """A prompt, its clean pass, and the weights of its positions."""

    ids: Int[np.ndarray, "batch seq"]
    mask: Bool[np.ndarray, "batch seq"]
    """Where the intervention acts."""
    clean: Clean
    entry: Entry
    """Where changes enter the residual stream: at the first hook point that the site's dictionary writes to."""
    weights: Weights
    readout: FeatureReader | None
    metric: Measured | None
    function: FunctionValue | None
    """If the metric is a function, its value in the clean pass."""


def prepare(
    lm: TinyModel,
    site: Site,
    tok_ids: Any,
    positions: Any = None,
    next_ids: Sequence[int] | None = None,
    readout: DictionaryLike | None = None,
    metric: Metric | None = None,
) -> SweepInput:
    """Check the arguments of a sweep at a site, and run the clean pass.

    Raises:
        ValueError: the layer does not exist, or an argument does not fit the rows.
    """
    require_layer(site, lm.config)
    given = check_tok_ids(lm.to_tokens(tok_ids), lm.config)
    ids = pad_right(given, bucket(given.shape[1], lm.config.n_ctx), lm.config.pad_id)
    real = ids != lm.config.pad_id
    if not ids.size or not real.any(axis=1).all():
        raise ValueError("a row has no token; every row needs at least one that is not [PAD].")
    entry = entry_of(site.parts[0].hook_out)
    hooks = lm.hooked().hooks
    if read_ahead(hooks) or (not site.joined and need_whole_passes(hooks)):
        raise ValueError(
            f"a sweep at {site.tag} runs parts of passes, and the splices of {', '.join(lm.spliced)} need whole "
            "passes; sweep the model without the crosscoder or cross-layer transcoder."
        )
    measured = None if metric is None else check_metric(lm, metric, len(ids))
    reader = None if readout is None else FeatureReader.of(lm, readout, "readout ")
    if reader is not None and reader.site.joined:
        raise ValueError(f"readout {reader.site.tag!r} reads several hook points; name a dictionary of one.")
    if reader is not None and not comes_after(reader.dictionary.config.hook_in, entry.edited):
        raise ValueError(
            f"readout {reader.site.tag!r} reads {reader.dictionary.config.hook_in}, and {site.tag} writes to "
            f"{entry.edited}: a readout must come later in the forward pass; name a later site."
        )
    read_by = (site,) if reader is None else (site, reader.site)
    clean = clean_streams(
        lm.hooked(),
        jnp.asarray(ids),
        tuple(lm.hooked(before=site).hooks for site in read_by),
        entry=entry,
        sources=tuple(site.hook_in for site in read_by),
    )
    if not np.isfinite(np.asarray(clean.expected)[real]).all():
        raise ValueError(
            "the model's own next-token probabilities are not finite on these rows, so there is nothing to "
            "compare with; look for NaN and infinity in lm.params, or take another checkpoint."
        )
    mask = real & np.pad(_mask(positions, given.shape), ((0, 0), (0, ids.shape[1] - given.shape[1])))
    if next_ids is None:
        next_ids = np.asarray(clean.logprobs)[np.arange(len(ids)), last_positions(real)].argmax(axis=-1)
    weights = weights_of(ids, real, next_ids, lm.config.d_vocab)
    function = None if measured is None else measured.function
    value = None if function is None else FunctionValue.of(function, given, lm.hooked().unembed(clean.final))
    return SweepInput(ids, mask, clean, entry, weights, reader, measured, value)


def activations(
    reader: FeatureReader, prepared: SweepInput, features: Any
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n batch seq"]]:
    """Return the chosen features and their activations where the intervention acts.

    Raises:
        ValueError: a feature is out of range, or an activation is not finite.
    """
    dictionary = reader.dictionary
    n_features = dictionary.config.n_features
    indices = None if features is None else np.atleast_1d(resolve_indices(features, n_features))
    acts = np.asarray(encode(dictionary.params, dictionary.config, prepared.clean.sources[0], indices), np.float32)
    acts = np.moveaxis(np.where(acting_mask(reader, prepared)[..., None], acts, 0), -1, 0)
    overflown = np.flatnonzero(~np.isfinite(acts).all(axis=(1, 2)))
    if len(overflown):
        first = overflown[0] if indices is None else indices[overflown[0]]
        raise ValueError(
            f"the activation of feature {first} of {reader.site.tag} is too large for float32 ({len(overflown)} such "
            "features); name other features, or a dictionary with smaller weights."
        )
    if indices is not None:
        return indices, acts
    active = np.flatnonzero(acts.any(axis=(1, 2)))
    return active, acts[active]


def acting_mask(reader: FeatureReader, prepared: SweepInput) -> Bool[np.ndarray, "batch seq"]:
    """Return where the intervention acts and the dictionary does."""
    return prepared.mask & reader.dictionary.config.acts_at(prepared.ids)


def written_per_unit(reader: FeatureReader, prepared: SweepInput) -> Any:
    """Return the multiple of its decoder row that one unit of a feature writes, (batch, seq); 1 is everywhere 1.

    For features that write to several hook points it is 1, because they are edited, not their rows added.
    """
    config = reader.dictionary.config
    if not config.rescales_output or reader.site.joined:
        return 1
    return np.asarray(size_and_mean(config, prepared.clean.sources[0].astype(np.float32))[0][..., 0])


def decoder_rows(reader: FeatureReader, features: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n width"]:
    """Return the directions that features write."""
    return np.asarray(reader.dictionary.params["W_dec"], np.float32)[features]


def _mask(positions: Any, shape: tuple[int, ...]) -> np.ndarray:
    if positions is None:
        return np.ones(shape, bool)
    mask = np.asarray(positions)
    if mask.dtype != bool or mask.shape not in (shape, shape[1:], (1, shape[1])):
        raise ValueError(
            f"positions holds {mask.dtype} values, shape {mask.shape}; expected a boolean mask of shape {shape[1:]} "
            f"or {shape}: np.isin(np.arange(seq), numbers) makes one of numbers of positions."
        )
    return np.broadcast_to(mask, shape)


def finite(name: str, numbers: Any, ndim: int) -> Float[np.ndarray, "*axes"]:
    """Return numbers as a float32 array of at most `ndim` axes.

    Raises:
        ValueError: there are none, one is not a finite number, or there are more axes.
    """
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
            array = np.asarray(numbers, np.float32)
    except (TypeError, ValueError):
        array = np.full(1, np.nan, np.float32)
    if array.ndim > ndim or array.size == 0 or not np.isfinite(array).all():
        expected = "a finite number" if ndim == 0 else "a finite number or a flat list of them"
        raise ValueError(f"{name}={numbers!r:.80}; expected {expected}.")
    return array


def as_vectors(vectors: Any, features: Any, width: int) -> Float[np.ndarray, "n width"]:
    """Return vectors as a float32 array.

    Raises:
        ValueError: they are not finite numbers of that shape, or features are given as well.
    """
    if features is not None:
        raise ValueError("features and vectors cannot be combined: vectors take the place of decoder directions.")
    try:
        array = np.asarray(vectors, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"vectors must be numbers of shape (n, {width}): {error}.") from error
    if array.ndim != 2 or array.shape[1] != width or not np.isfinite(array).all():
        raise ValueError(f"vectors has shape {array.shape}; expected finite numbers of shape (n, {width}).")
    return array

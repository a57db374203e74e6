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

from tinymodel_jax.analysis.effects.stream_entry import Entry, entry_of
from tinymodel_jax.analysis.effects.upper_layers import Clean, Weights, clean_streams
from tinymodel_jax.block_order import comes_after
from tinymodel_jax.dictionaries.dictionary import resolve_indices
from tinymodel_jax.dictionaries.sites import Site, require_layer
from tinymodel_jax.lm import FeatureReader, TinyModel
from tinymodel_jax.model.forward import encode
from tinymodel_jax.model.padding import bucket, check_tok_ids, pad_right


class SweepInput(NamedTuple):
    """A prompt, its clean pass, and the weights of its positions."""

    ids: Int[np.ndarray, "batch seq"]
    mask: Bool[np.ndarray, "batch seq"]
    """Where the intervention acts."""
    clean: Clean
    entry: Entry
    weights: Weights
    readout: FeatureReader | None


def prepare(
    lm: TinyModel,
    tag: str,
    tok_ids: Any,
    positions: Any = None,
    next_ids: Sequence[int] | None = None,
    readout: str | None = None,
) -> SweepInput:
    """Check the arguments of a sweep at a site, and run the clean pass.

    Raises:
        ValueError: a tag names a feature or no dictionary, or an argument does not fit the rows.
    """
    site = Site.whole(tag)
    require_layer(site, lm.config)
    given = check_tok_ids(lm.to_tokens(tok_ids), lm.config)
    ids = pad_right(given, bucket(given.shape[1], lm.config.n_ctx), lm.config.pad_id)
    real = ids != lm.config.pad_id
    if not ids.size or not real.any(axis=1).all():
        raise ValueError("a row has no token; every row needs at least one that is not [PAD].")
    entry = entry_of(site.hook_out)
    reader = None if readout is None else lm[Site.whole(readout, "readout ").tag]
    if reader is not None and not comes_after(reader.dictionary.config.hook_in, entry.edited):
        raise ValueError(
            f"readout {readout!r} reads {reader.dictionary.config.hook_in}, and {tag} writes to {entry.edited}: a "
            "readout must come later in the forward pass; name a later site."
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
    weights = _weights(ids, real, clean, next_ids)
    return SweepInput(ids, mask, clean, entry, weights, reader)


def _weights(ids: np.ndarray, real: np.ndarray, clean: Clean, next_ids: Sequence[int] | None) -> Weights:
    last = real.shape[1] - 1 - real[:, ::-1].argmax(axis=1)
    rows = np.arange(len(ids))
    chosen = np.asarray(np.asarray(clean.logprobs)[rows, last].argmax(axis=-1) if next_ids is None else next_ids)
    vocabulary = clean.logprobs.shape[-1]
    if chosen.shape != (len(ids),):
        raise ValueError(f"next_ids has shape {chosen.shape}; expected one token for each of {len(ids)} rows.")
    if chosen.dtype.kind not in "iu" or (chosen < 0).any() or (chosen >= vocabulary).any():
        raise ValueError(f"next_ids={chosen.tolist()!r:.80} must be token ids, 0..{vocabulary - 1}.")
    targets, predicted = np.roll(ids, -1, axis=1), np.roll(real, -1, axis=1)
    predicted[:, -1] = False
    at_last = np.arange(ids.shape[1]) == last[:, None]
    shares = [mask.astype(np.float32) / max(1, mask.sum()) for mask in (real, predicted, at_last)]
    return Weights(*map(jnp.asarray, (*shares, targets, chosen.astype(np.int32)[:, None])))


def activations(
    lm: TinyModel, tag: str, prepared: SweepInput, features: Any
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n batch seq"]]:
    """Return the chosen features and their activations where the intervention acts.

    Raises:
        ValueError: a feature is out of range, the tag has no dictionary, or an activation is not finite.
    """
    dictionary = lm[tag].dictionary
    n_features = dictionary.config.n_features
    indices = None if features is None else np.atleast_1d(resolve_indices(features, n_features))
    acts = np.asarray(encode(dictionary.params, dictionary.config, prepared.clean.sources[0], indices), np.float32)
    acts = np.moveaxis(np.where(acting_mask(lm, tag, prepared)[..., None], acts, 0), -1, 0)
    overflown = np.flatnonzero(~np.isfinite(acts).all(axis=(1, 2)))
    if len(overflown):
        first = overflown[0] if indices is None else indices[overflown[0]]
        raise ValueError(
            f"the activation of feature {first} of {tag} is too large for float32 ({len(overflown)} such "
            "features); name other features, or a dictionary with smaller weights."
        )
    if indices is not None:
        return indices, acts
    active = np.flatnonzero(acts.any(axis=(1, 2)))
    return active, acts[active]


def acting_mask(lm: TinyModel, tag: str, prepared: SweepInput) -> Bool[np.ndarray, "batch seq"]:
    """Return where the intervention acts and the dictionary does."""
    acting = lm[tag].dictionary.config.acts_at(prepared.ids)
    return prepared.mask if acting is None else prepared.mask & acting


def decoder_rows(lm: TinyModel, tag: str, features: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n width"]:
    """Return the directions that features write."""
    return np.asarray(lm[tag].dictionary.params["W_dec"], np.float32)[features]


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

"""Interventions on every feature of a dictionary, one at a time, in few compiled calls.

Row `f` of a result is what `lm.run_with_hooks` with the one edit of feature `f` gives. All three kinds add `amount x
direction` at the dictionary's `hook_out`; its error and all other features stay. A feature whose amounts are all zero,
as of one that is active nowhere and turned off, changes nothing, and is reported as exactly 0 without being run.

Features are run in chunks of similar first position, and only from there on (`upper_layers`); with several devices, a
chunk's features are spread over them. `[PAD]` counts nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from tinymodel_jax.analysis.upper_layers import (
    Changes,
    Clean,
    Entry,
    Weights,
    clean_pass,
    comes_after,
    effects_of_changes,
    entry_of,
)
from tinymodel_jax.compilation import fast_jit
from tinymodel_jax.dictionary import Dictionary, encode, resolve_indices
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.padding import check_tok_ids
from tinymodel_jax.sites import Site

MEMORY, ACCELERATOR_MEMORY = 2**24, 2**30
"""Bytes that the logits of a chunk may take; on two cores 2**23 to 2**27 take the same core-seconds."""
LENGTHS = 8
"""Numbers of last positions that a row length is compiled for, at most."""
READOUT_TOP = 20
"""Features of the readout dictionary that are reported for each intervention."""


class FeatureEffects(NamedTuple):
    """What each intervention changes: the value with it minus the value without.

    The numbers have the shape (n,) of `features`, or (n, strengths) where `steer` was given several.
    """

    features: Int[np.ndarray, " n"]
    kl: Float[np.ndarray, "n *strengths"]
    """KL divergence of the next-token distribution from the model's own, nats, averaged over positions; 0 or more."""
    loss: Float[np.ndarray, "n *strengths"]
    """Change of the mean next-token loss, nats: positive where the feature helps and was turned off."""
    next_logprob: Float[np.ndarray, "n *strengths"]
    """Change of the log-probability of `next_ids` after the last position, averaged over rows, nats."""
    readout_features: Int[np.ndarray, "n *strengths top"] | None = None
    """Features of the readout dictionary that change most, the most changed first."""
    readout_changes: Float[np.ndarray, "n *strengths top"] | None = None
    """Change of their activation, averaged over positions."""


class _Prepared(NamedTuple):
    """A prompt, its clean pass, and how its positions count."""

    ids: np.ndarray
    mask: np.ndarray
    """(batch, seq), where the intervention acts."""
    clean: Clean
    entry: Entry
    weights: Weights
    readout: Dictionary | None


def ablate(
    lm: TinyModel,
    tag: str,
    tok_ids: Any,
    features: Any = None,
    *,
    positions: Any = None,
    next_ids: Sequence[int] | None = None,
    readout: str | None = None,
) -> FeatureEffects:
    """Turn each feature of a dictionary off.

    Args:
        tag: dictionary's site, such as M2; what `lm[tag]` reads.
        tok_ids: integers (batch, seq), right-padded.
        features: indices; None is every feature that is active where `positions` allows.
        positions: boolean mask, (seq,) or (batch, seq), of where the intervention acts; None is everywhere.
        next_ids: a token for each row; None is the model's most likely ones.
        readout: site of another dictionary, further up, whose features' changes are reported.

    Raises:
        ValueError: a feature is out of range, the tag has no dictionary, or an argument does not fit the rows.
    """
    prepared = _prepare(lm, tag, tok_ids, positions, next_ids, readout)
    chosen, acts = _activations(lm, tag, prepared, features)
    return _sweep(lm, prepared, chosen, _decoder_rows(lm, tag, chosen), -acts)


def clamp(
    lm: TinyModel,
    tag: str,
    tok_ids: Any,
    value: float,
    features: Any = None,
    *,
    positions: Any = None,
    next_ids: Sequence[int] | None = None,
    readout: str | None = None,
) -> FeatureEffects:
    """Hold the activation of each feature at a value, also where it is inactive; arguments as `ablate`."""
    held = _finite("value", value, ndim=0)
    prepared = _prepare(lm, tag, tok_ids, positions, next_ids, readout)
    chosen, acts = _activations(lm, tag, prepared, features)
    return _sweep(lm, prepared, chosen, _decoder_rows(lm, tag, chosen), prepared.mask * (held - acts))


def steer(
    lm: TinyModel,
    tag: str,
    tok_ids: Any,
    strengths: float | Sequence[float],
    features: Any = None,
    *,
    vectors: Any = None,
    positions: Any = None,
    next_ids: Sequence[int] | None = None,
    readout: str | None = None,
) -> FeatureEffects:
    """Add `strength x decoder direction` of each feature, or `strength x vector`, where the dictionary writes.

    Args:
        strengths: one, or several, which then are the last axis of the result.
        vectors: (n, width) to add instead of decoder directions, at the same hook point; no dictionary is needed then.

    The others as `ablate`.
    """
    amounts = _finite("strengths", strengths, ndim=1)
    prepared = _prepare(lm, tag, tok_ids, positions, next_ids, readout)
    if vectors is None:
        chosen, _ = _activations(lm, tag, prepared, features)
        directions = _decoder_rows(lm, tag, chosen)
    else:
        directions = _vectors(vectors, features, lm.config.d_model)
        chosen = np.arange(len(directions))
    added = np.broadcast_to(
        prepared.mask * amounts[..., None, None], (len(chosen), *amounts.shape, *prepared.ids.shape)
    )
    return _sweep(lm, prepared, chosen, directions, added)


def _prepare(
    lm: TinyModel, tag: str, tok_ids: Any, positions: Any, next_ids: Sequence[int] | None, readout: str | None
) -> _Prepared:
    site, feature = Site.parse(tag)
    if feature is not None:
        raise ValueError(f"sweep: {tag!r} names a feature; name the site, {site.tag!r}, and features=[{feature}].")
    ids = check_tok_ids(tok_ids, lm.config)
    real = ids != lm.config.pad_id
    if not real.any(axis=1).all() or ids.shape[1] == 0:
        raise ValueError("sweep: a row has no token; every row needs at least one that is not [PAD].")
    entry = entry_of(site.hook_out)
    reader = None if readout is None else lm[readout]
    if reader is not None and not comes_after(reader.dictionary.config.hook_in, entry.edited, lm.config):
        raise ValueError(
            f"readout {readout!r} reads {reader.dictionary.config.hook_in}, which {tag} does not change; "
            "name a site that the forward pass meets later."
        )
    sources = (site.hook_in,) if reader is None else (site.hook_in, reader.dictionary.config.hook_in)
    clean = clean_pass(lm.params, jnp.asarray(ids), lm.splice_hooks(), config=lm.config, entry=entry, sources=sources)
    mask = real & _mask(positions, ids.shape)
    weights = _weights(ids, real, clean, next_ids)
    return _Prepared(ids, mask, clean, entry, weights, None if reader is None else reader.dictionary)


def _weights(ids: np.ndarray, real: np.ndarray, clean: Clean, next_ids: Sequence[int] | None) -> Weights:
    last = real.shape[1] - 1 - real[:, ::-1].argmax(axis=1)
    rows = np.arange(len(ids))
    chosen = np.asarray(clean.logprobs[rows, last].argmax(axis=-1) if next_ids is None else next_ids)
    vocabulary = clean.logprobs.shape[-1]
    if chosen.shape != (len(ids),):
        raise ValueError(f"sweep: next_ids has shape {chosen.shape}; it names one token for each of {len(ids)} rows.")
    if chosen.dtype.kind not in "iu" or (chosen < 0).any() or (chosen >= vocabulary).any():
        raise ValueError(f"sweep: next_ids={chosen.tolist()!r:.80} must be token ids, 0..{vocabulary - 1}.")
    targets, predicted = np.roll(ids, -1, axis=1), np.roll(real, -1, axis=1)
    predicted[:, -1] = False
    at_last = np.arange(ids.shape[1]) == last[:, None]
    shares = [mask.astype(np.float32) / max(1, mask.sum()) for mask in (real, predicted, at_last)]
    return Weights(*map(jnp.asarray, (*shares, targets, chosen.astype(np.int32))))


def _activations(lm: TinyModel, tag: str, prepared: _Prepared, features: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the chosen features and their activations where the intervention acts, (n, batch, seq)."""
    dictionary = lm[tag].dictionary
    n_features = dictionary.config.n_features
    indices = None if features is None else np.atleast_1d(resolve_indices(features, n_features))
    acts = np.asarray(_encode(dictionary.params, dictionary.config, prepared.clean.sources[0], indices), np.float32)
    acts = np.moveaxis(acts * prepared.mask[..., None], -1, 0)
    if indices is not None:
        return indices, acts
    active = np.flatnonzero(acts.any(axis=(1, 2)))
    return active, acts[active]


def _decoder_rows(lm: TinyModel, tag: str, features: np.ndarray) -> np.ndarray:
    return np.asarray(lm[tag].dictionary.params["W_dec"], np.float32)[features]


def _sweep(
    lm: TinyModel,
    prepared: _Prepared,
    features: np.ndarray,
    directions: Float[np.ndarray, "n d_model"],
    amounts: Float[np.ndarray, "n *strengths batch seq"],
) -> FeatureEffects:
    """Run each feature with each of its strengths; shape the results alike."""
    shape = amounts.shape[:-2]
    flat = amounts.reshape(-1, *amounts.shape[-2:])
    of_item = np.repeat(np.arange(len(directions)), len(flat) // max(1, len(directions)))
    found = np.zeros((3, len(flat)), np.float32)
    top = 0 if prepared.readout is None else min(READOUT_TOP, prepared.readout.config.n_features)
    changed, by = np.zeros((len(flat), top), np.int32), np.zeros((len(flat), top), np.float32)
    for items, size, length in _chunks(flat, lm.config.d_vocab):
        changes = _changes(directions[of_item[items]], flat[items], size, length)
        effects, moved = _run(lm, prepared, changes, length)
        found[:, items] = np.asarray(effects)[:, : len(items)]
        if moved is not None:
            order = np.argsort(-np.abs(moved[: len(items)]), axis=-1, kind="stable")[:, :top]
            changed[items], by[items] = order, np.take_along_axis(moved[: len(items)], order, axis=-1)
    read = () if prepared.readout is None else (changed.reshape(*shape, top), by.reshape(*shape, top))
    return FeatureEffects(features, *found.reshape(3, *shape), *read)


def _chunks(amounts: Float[np.ndarray, "n batch seq"], d_vocab: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yield the interventions of each chunk, the compiled number that holds them, and the last positions they need.

    Those that start early come first, so that a chunk's positions differ little.
    """
    somewhere = (amounts != 0).any(axis=1)
    first = np.where(somewhere.any(axis=1), somewhere.argmax(axis=1), -1)
    left = np.argsort(first, kind="stable")[np.count_nonzero(first < 0) :]
    batch, seq = amounts.shape[1:]
    step, devices = -(-seq // LENGTHS), len(jax.devices())
    memory = MEMORY if jax.default_backend() == "cpu" else ACCELERATOR_MEMORY * devices
    while len(left):
        length = min(seq, -(-(seq - int(first[left[0]])) // step) * step)
        most = max(1, memory // (4 * d_vocab * batch * length))
        size = min(most, 1 << (len(left) - 1).bit_length())
        size = -(-size // devices) * devices
        yield left[:size], size, length
        left = left[size:]


def _changes(directions: np.ndarray, amounts: Float[np.ndarray, "n batch seq"], size: int, length: int) -> Changes:
    """Lay out a chunk in arrays of few shapes."""
    places = np.argwhere(amounts).T.astype(np.int32)
    capacity = size * amounts.shape[1] * length
    while capacity // 4 >= places.shape[1]:
        capacity //= 4
    missing = capacity - places.shape[1]
    filled = np.pad(places, ((0, 0), (0, missing)))
    filled[0, places.shape[1] :] = size
    values = np.pad(amounts[tuple(places)], (0, missing)).astype(np.float32)
    rows = np.pad(directions, ((0, size - len(directions)), (0, 0))).astype(np.float32)
    return Changes(*map(jnp.asarray, (rows, filled, values)))


def _run(lm: TinyModel, prepared: _Prepared, changes: Changes, length: int) -> tuple[Any, np.ndarray | None]:
    dictionary = prepared.readout
    effects, moved = effects_of_changes(
        lm.params,
        prepared.clean,
        prepared.weights,
        changes,
        lm.splice_hooks(),
        None if dictionary is None else dictionary.params,
        config=lm.config,
        entry=prepared.entry,
        length=length,
        readout_config=None if dictionary is None else dictionary.config,
        sharding=_over_devices(),
    )
    return effects, None if moved is None else np.asarray(moved)


def _over_devices() -> NamedSharding | None:
    devices = np.array(jax.devices())
    return None if len(devices) == 1 else NamedSharding(Mesh(devices, ("features",)), PartitionSpec("features"))


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


def _finite(name: str, numbers: Any, ndim: int) -> np.ndarray:
    """Return numbers as a float32 array of at most `ndim` axes."""
    try:
        array = np.asarray(numbers, np.float32)
    except (TypeError, ValueError):
        array = np.full(1, np.nan, np.float32)
    if array.ndim > ndim or array.size == 0 or not np.isfinite(array).all():
        expected = "a finite number" if ndim == 0 else "a finite number or a flat list of them"
        raise ValueError(f"sweep: {name}={numbers!r:.80}; expected {expected}.")
    return array


def _vectors(vectors: Any, features: Any, width: int) -> np.ndarray:
    if features is not None:
        raise ValueError("sweep: features and vectors do not go together; vectors are added as they are.")
    array = np.asarray(vectors, np.float32)
    if array.ndim != 2 or array.shape[1] != width or not np.isfinite(array).all():
        raise ValueError(f"sweep: vectors has shape {array.shape}; expected finite numbers of shape (n, {width}).")
    return array


_encode = fast_jit(encode, static_argnames=("config",))

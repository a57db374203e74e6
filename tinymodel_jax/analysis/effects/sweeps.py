"""Interventions on every feature of a dictionary, one at a time, in few compiled calls.

Entry `f` of a result equals that of `lm.run_with_hooks` with the edit of feature `f` alone. All three kinds add
`amount x direction` at the dictionary's `hook_out`; the dictionary's error and all other features remain. A feature
whose amounts are all zero, such as an inactive one that is ablated, is not run, and its effect is exactly 0.

The features of crosscoders and cross-layer transcoders write to several hook points, so each of them takes a pass of
the whole model. Other features are run in chunks of similar first position, and only from there on (`upper_layers`);
with several devices, a chunk's features are spread over them. `[PAD]` is excluded from all averages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from tinymodel_jax.analysis.effects.metrics import Metric
from tinymodel_jax.analysis.effects.sweep_input import (
    SweepInput,
    acting_mask,
    activations,
    as_vectors,
    decoder_rows,
    finite,
    prepare,
    written_per_unit,
)
from tinymodel_jax.analysis.effects.upper_layers import ChangeEffects, Changes, FeatureChanges, effects_of_changes
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import FeatureReader, TinyModel
from tinymodel_jax.lm.dictionaries import DictionaryLike
from tinymodel_jax.runtime.progress import Track, no_progress
from tinymodel_jax.runtime.rows import row_devices

MEMORY, SMALL = 2**28, 2**24
"""Bytes that the logits (or a readout's activations) of a chunk may take, and those below which dividing it further
saves nothing."""
CHUNKS = 8
"""Number of chunks to divide interventions into where that saves work: each runs only on the positions it needs."""
LENGTHS = 8
"""Maximum number of programs per row length, each for another number of last positions."""
READOUT_TOP = 20
"""Features of the readout dictionary that are reported for each intervention."""


class FeatureEffects(NamedTuple):
    """The change caused by each intervention: the value with it minus the value without it.

    Arrays have the shape (n,) of `features`, or (n, strengths) if `steer` was called with several strengths.
    Averages are over all tokens but `[PAD]`.
    """

    features: Int[np.ndarray, " n"]
    """Indices of the features; with `vectors`, those of the vectors."""
    kl: Float[np.ndarray, "n *strengths"]
    """KL divergence of the next-token distribution from the model's own, nats, averaged over positions; 0 or more."""
    loss: Float[np.ndarray, "n *strengths"]
    """Change of the mean next-token loss, nats; positive if a feature that helps is ablated."""
    next_logprob: Float[np.ndarray, "n *strengths"]
    """Change of the log-probability of `next_ids` after the last position, averaged over rows, nats."""
    final_stream: Float[np.ndarray, "n *strengths d_model"]
    """Change of the last layer's residual stream, averaged over positions. Times W_U, it is the mean change of the
    logits, as there is no layer norm. `logit_effects.strongest_tokens` names the tokens that it moves most."""
    readout_features: Int[np.ndarray, "n *strengths top"] | None = None
    """Indices of the 20 features of the readout dictionary that change most, the most changed first; None without a
    readout."""
    readout_changes: Float[np.ndarray, "n *strengths top"] | None = None
    """Change of their activations, averaged over positions."""
    metric: Float[np.ndarray, "n *strengths"] | None = None
    """Change of the requested metric in its unit, averaged over rows (`"loss"`: over all predicted tokens); None if
    none is requested."""


def ablate(
    lm: TinyModel,
    tag: DictionaryLike,
    tok_ids: Any,
    features: Any = None,
    *,
    positions: Any = None,
    next_ids: Sequence[int] | None = None,
    readout: DictionaryLike | None = None,
    metric: Metric | None = None,
    track: Track = no_progress,
) -> FeatureEffects:
    """Set each feature of a dictionary to zero, one at a time.

    Args:
        lm: the model; its splices are part of the pass with and without the intervention.
        tag: the dictionary's tag, such as M2, or `lm["M2"]`, or a `Dictionary`.
        tok_ids: a text, a list of texts, or token ids (batch, seq) or (seq,), right-padded.
        features: indices (n,); None is every feature that is active at the selected positions.
        positions: boolean mask, (seq,) or (batch, seq), of where to intervene; None is all positions.
        next_ids: one token per row, whose log-probability is measured; None is the model's most likely token.
        readout: a later dictionary, named in the same ways; report which of its features change most.
        metric: also report the change of `"loss"`, `"next_logprob"`, a `logit_difference(a, b)`, or a function
            `(logits, tok_ids) -> (batch,)`, which is called for every intervention (see `metrics`).
        track: wraps the iterator over chunks of features, for example with a progress bar.

    Raises:
        ValueError: a feature is out of range, the tag has no dictionary, an argument does not fit the rows, or an
            effect is not finite.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import sweeps
        >>> lm = TinyModel("mini")
        >>> effects = sweeps.ablate(lm, "M2", lm.to_tokens("The dog ran to the"))
        >>> bool((effects.kl > -1e-6).all()), len(effects.features) == len(effects.loss)
        (True, True)
    """
    reader = FeatureReader.of(lm, tag)
    prepared = prepare(lm, reader.site, tok_ids, positions, next_ids, readout, metric)
    chosen, acts = activations(reader, prepared, features)
    return _sweep(lm, prepared, chosen, _written(reader, chosen), -acts * written_per_unit(reader, prepared), track)


def clamp(
    lm: TinyModel,
    tag: DictionaryLike,
    tok_ids: Any,
    value: float,
    features: Any = None,
    *,
    positions: Any = None,
    next_ids: Sequence[int] | None = None,
    readout: DictionaryLike | None = None,
    metric: Metric | None = None,
    track: Track = no_progress,
) -> FeatureEffects:
    """Hold each feature at a value, including where it is inactive.

    Args:
        value: the activation that each feature gets at the selected positions.

    Other arguments as for `ablate`.

    Raises:
        ValueError: as for `ablate`, or the value is not finite.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import sweeps
        >>> lm = TinyModel("mini")
        >>> effects = sweeps.clamp(lm, "M2", "The dog ran to the", 2.0, features=[3, 304])
        >>> effects.kl.shape
        (2,)
    """
    held = finite("value", value, ndim=0)
    reader = FeatureReader.of(lm, tag)
    prepared = prepare(lm, reader.site, tok_ids, positions, next_ids, readout, metric)
    chosen, acts = activations(reader, prepared, features)
    amounts = acting_mask(reader, prepared) * (held - acts) * written_per_unit(reader, prepared)
    return _sweep(lm, prepared, chosen, _written(reader, chosen), amounts, track)


def steer(
    lm: TinyModel,
    tag: DictionaryLike,
    tok_ids: Any,
    strengths: float | Sequence[float],
    features: Any = None,
    *,
    vectors: Any = None,
    positions: Any = None,
    next_ids: Sequence[int] | None = None,
    readout: DictionaryLike | None = None,
    metric: Metric | None = None,
    track: Track = no_progress,
) -> FeatureEffects:
    """Add `strength x decoder direction` of each feature, or `strength x vector`, at the dictionary's `hook_out`.

    For an SAE that normalizes its input, directions are multiplied by the input's size.

    Directions of features are added where the dictionary acts, so not at tokens that it excludes.

    Args:
        strengths: one strength, or several, which become the last axis of the result.
        vectors: (n, d_model), added instead of decoder directions, at all tokens; the site then needs no dictionary.

    Other arguments as for `ablate`.

    Raises:
        ValueError: as for `ablate`; strengths or vectors are not finite; both vectors and features are given; or
            vectors are given for a site of several hook points.

    Source: activation addition (Turner et al. 2023).

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import sweeps
        >>> lm = TinyModel("mini")
        >>> effects = sweeps.steer(lm, "M2", "The dog ran to the", [1.0, 4.0], features=[304])
        >>> effects.kl.shape, bool(effects.kl[0, 0] < effects.kl[0, 1])
        ((1, 2), True)
    """
    amounts = finite("strengths", strengths, ndim=1)
    reader = None if vectors is not None and isinstance(tag, str) else FeatureReader.of(lm, tag)
    site = Site.whole(str(tag)) if reader is None else reader.site
    if vectors is not None and site.joined:
        raise ValueError(f"steer: vectors are added at one hook point; {site.tag!r} joins {len(site.joined)}.")
    prepared = prepare(lm, site, tok_ids, positions, next_ids, readout, metric)
    if vectors is None:
        assert reader is not None
        chosen, _ = activations(reader, prepared, features)
        written = _written(reader, chosen)
        mask = acting_mask(reader, prepared) * written_per_unit(reader, prepared)
    else:
        written, mask = as_vectors(vectors, features, lm.config.d_model), prepared.mask
        chosen = np.arange(len(written))
    added = np.broadcast_to(mask * amounts[..., None, None], (len(chosen), *amounts.shape, *prepared.ids.shape))
    return _sweep(lm, prepared, chosen, written, added, track)


def _written(reader: FeatureReader, features: Int[np.ndarray, " n"]) -> np.ndarray | FeatureReader:
    """Return the directions that features write, or the reader itself if they write to several hook points."""
    return reader if reader.site.joined else decoder_rows(reader, features)


def _sweep(
    lm: TinyModel,
    prepared: SweepInput,
    features: np.ndarray,
    written: np.ndarray | FeatureReader,
    amounts: Float[np.ndarray, "n *strengths batch seq"],
    track: Track,
) -> FeatureEffects:
    """Run each feature with each of its strengths, and return results of the same shape.

    Args:
        written: directions (n, d_model) to add, or the dictionary whose activations are edited.
    """
    shape = amounts.shape[:-2]
    flat = amounts.reshape(-1, *amounts.shape[-2:])
    of_item = np.repeat(np.arange(len(features)), len(flat) // max(1, len(features)))
    found, of_metric = np.zeros((3, len(flat)), np.float32), np.zeros(len(flat), np.float32)
    streams = np.zeros((len(flat), lm.config.d_model), np.float32)
    n_read = 0 if prepared.readout is None else prepared.readout.dictionary.config.n_features
    top, widest = min(READOUT_TOP, n_read), max(lm.config.d_vocab, n_read)
    changed, by = np.zeros((len(flat), top), np.int32), np.zeros((len(flat), top), np.float32)
    for items, size, length in track(list(_chunks(flat, widest)), "sweeping"):
        if isinstance(written, FeatureReader):
            changes, length = _feature_changes(written, features[of_item[items]], flat[items], size), flat.shape[-1]
        else:
            changes = _changes(written[of_item[items]], flat[items], size, length)
        one = _run(lm, prepared, changes, length, written.dictionary if isinstance(written, FeatureReader) else None)
        found[:, items] = np.asarray(one.effects)[:, : len(items)]
        streams[items] = np.asarray(one.final_stream)[: len(items)]
        of_metric[items] = _metric_changes(prepared, one, len(items))
        overflown = items[~np.isfinite([*found[:, items], of_metric[items]]).all(axis=0)]
        if len(overflown):
            raise ValueError(
                f"sweep: the change by feature {features[of_item[overflown[0]]]} is too large for float32: "
                "an effect is not finite; take smaller values, or leave the feature out."
            )
        if one.read is not None:
            moved = np.asarray(one.read)[: len(items)]
            order = np.argsort(-np.abs(moved), axis=-1, kind="stable")[:, :top]
            changed[items], by[items] = order, np.take_along_axis(moved, order, axis=-1)
    read = (None, None) if prepared.readout is None else (changed.reshape(*shape, top), by.reshape(*shape, top))
    kl, loss, next_logprob = found.reshape(3, *shape)
    metric = None if prepared.metric is None else of_metric.reshape(shape)
    streams = streams.reshape(*shape, lm.config.d_model)
    return FeatureEffects(features, kl, loss, next_logprob, streams, *read, metric)


def _chunks(amounts: Float[np.ndarray, "n batch seq"], widest: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yield the interventions of each chunk, the compiled number that holds them, and the last positions they need.

    Those that start early come first, so that a chunk's positions differ little. `widest` is the largest
    number of values per position: the size of the vocabulary or of a larger readout dictionary.
    """
    somewhere = (amounts != 0).any(axis=1)
    first = np.where(somewhere.any(axis=1), somewhere.argmax(axis=1), -1)
    left = np.argsort(first, kind="stable")[np.count_nonzero(first < 0) :]
    batch, seq = amounts.shape[1:]
    step = -(-seq // LENGTHS)
    size = _chunk_size(len(left), 4 * widest * batch * seq, row_devices().n)
    for start in range(0, len(left), size):
        items = left[start : start + size]
        yield items, size, min(seq, -(-(seq - int(first[items[0]])) // step) * step)


def _chunk_size(n: int, nbytes: int, devices: int) -> int:
    """Return how many of `n` interventions, each with logits of `nbytes`, make a chunk; a multiple of the devices."""
    wanted = max(-(-n // CHUNKS), min(n, SMALL // nbytes))
    allowed = max(1, MEMORY * (1 if jax.default_backend() == "cpu" else devices) // nbytes)
    size = min(_power_of_two(wanted), allowed)
    return -(-size // devices) * devices


def _power_of_two(n: int) -> int:
    """Return the smallest power of two that is `n` or more."""
    return 1 << max(0, n - 1).bit_length()


def _changes(directions: np.ndarray, amounts: Float[np.ndarray, "n batch seq"], size: int, length: int) -> Changes:
    """Return a chunk as arrays of one of a few shapes."""
    places = np.argwhere(amounts).T.astype(np.int32)
    capacity = size * amounts.shape[1] * length
    while capacity // 8 >= places.shape[1]:
        capacity //= 8
    missing = capacity - places.shape[1]
    filled = np.pad(places, ((0, 0), (0, missing)))
    filled[0, places.shape[1] :] = size
    values = np.pad(amounts[tuple(places)], (0, missing)).astype(np.float32)
    rows = np.pad(directions, ((0, size - len(directions)), (0, 0))).astype(np.float32)
    return Changes(*map(jnp.asarray, (rows, filled, values)))


def _feature_changes(
    reader: FeatureReader, features: np.ndarray, amounts: Float[np.ndarray, "n batch seq"], size: int
) -> FeatureChanges:
    missing = size - len(features)
    filled = np.pad(amounts, ((0, missing), (0, 0), (0, 0))).astype(np.float32)
    return FeatureChanges(
        reader.dictionary.params, jnp.asarray(np.pad(features, (0, missing)), jnp.int32), jnp.asarray(filled)
    )


def _run(
    lm: TinyModel, prepared: SweepInput, changes: Changes | FeatureChanges, length: int, edited: Dictionary | None
) -> ChangeEffects:
    reader, metric = prepared.readout, prepared.metric
    dictionary = None if reader is None else reader.dictionary
    return effects_of_changes(
        lm.hooked(),
        prepared.clean,
        prepared.weights,
        changes,
        None if dictionary is None else dictionary.params,
        {} if reader is None else lm.hooked(before=reader.site).hooks,
        None if metric is None else metric.tokens,
        None if prepared.function is None else prepared.function.logits,
        entry=prepared.entry,
        length=length,
        readout_config=None if dictionary is None else dictionary.config,
        edited_config=None if edited is None else edited.config,
        sharding=_over_devices(),
    )


def _metric_changes(prepared: SweepInput, found: ChangeEffects, n: int) -> Float[np.ndarray, " n"] | float:
    """Return the changes of the requested metric by the first `n` changes of a chunk; 0 if none is requested."""
    if prepared.metric is None:
        return 0.0
    if prepared.function is not None:
        assert found.logits is not None
        return prepared.function.changes(found.logits[:n])
    named = {"loss": found.effects[1], "next_logprob": found.effects[2], "logit_difference": found.difference}
    return np.asarray(named[prepared.metric.kind])[:n]


def _over_devices() -> NamedSharding | None:
    mesh = row_devices().mesh
    return None if mesh is None else NamedSharding(mesh, PartitionSpec("data"))

"""One pass over rows of tokens: what is kept of a dictionary's activations, and how a batch is added to it.

`DictionaryInputs` runs the model, `ActivationPass` measures a batch on the devices, and `Sums` adds it up on the host.
Several processes take turns at the batches, and bring their sums together when they are saved and at the end.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, Integer

from tinymodel_jax.analysis.search.coactivation import active_features, n_bytes, of_sampled_tokens, sampled_tokens
from tinymodel_jax.analysis.search.contexts import (
    Contexts,
    at_random,
    by_value,
    keep_first,
    no_contexts,
    of_all_processes,
    uniform,
)
from tinymodel_jax.analysis.search.feature_statistics import BINS, BatchStatistics, feature_chunks, statistics
from tinymodel_jax.analysis.search.resumable import Progress
from tinymodel_jax.lm import FeatureReader
from tinymodel_jax.lm.collection import BatchedPass
from tinymodel_jax.model.hook_points import vectors_at
from tinymodel_jax.model.padding import check_tok_ids, pad_below
from tinymodel_jax.runtime.collectives import SharedTimer, gathered, settled, summed
from tinymodel_jax.runtime.progress import Track
from tinymodel_jax.runtime.rows import rows_of_turn, turns

SAVE_EVERY = 60.0
"""Seconds between two saves of the work file."""


class MeasuredBatch(NamedTuple):
    """The measurements of one batch. JAX may still be computing the arrays."""

    first: int
    """Number of the batch's first row."""
    n_rows: int
    chunks: list[BatchStatistics]
    """One entry per chunk of features, in order; rows beyond `n_rows` are padding."""
    sampled: Bool[np.ndarray, "rows seq"]
    """The tokens that are sampled for co-activation."""
    active: list[Array]
    """Which features are active at them, as `active_features` returns it."""


class DictionaryInputs(BatchedPass):
    """Computes what a dictionary reads. The rows of a batch are spread over the devices of this process.

    Args:
        per_device: rows per device in one pass of the model.
    """

    def __init__(self, reader: FeatureReader, per_device: int):
        self.config, self.counts = reader.dictionary.config, reader.counts
        params = reader.dictionary.params
        super().__init__(reader.lm.hooked(before=reader.site), self.config.hooks_in, per_device, params)
        self.dictionary = self.devices.shared(params)

    def __call__(self, tok_ids: Integer[np.ndarray, "rows seq"]) -> Array:
        """Return the inputs, (batch, seq, d_in); rows beyond the given ones are padding."""
        return vectors_at(self.run(tok_ids), self.config.hook_in)


class ActivationPass:
    """Measures batches of rows.

    Args:
        share: probability with which a token is sampled for co-activation.
        every: the histogram counts one position in `every`.
    """

    def __init__(self, inputs: DictionaryInputs, rows: np.ndarray, *, share: float, every: int, seed: int):
        self.inputs, self.rows, self.share, self.every, self.seed = inputs, rows, share, every, seed
        self.chunks = feature_chunks(inputs.dictionary, inputs.config, inputs.devices)

    def turns(self, first: int) -> range:
        """Return the row at which each turn starts, from a row that is not measured yet (see `rows.turns`)."""
        return turns(first, len(self.rows), self.inputs.batch)

    def measure(self, turn: int) -> MeasuredBatch | None:
        """Start measuring this process's batch of a turn, without waiting for the result; None if it has no rows.

        Raises:
            ValueError: an id is not valid for the model.
        """
        inputs = self.inputs
        mine = rows_of_turn(turn, len(self.rows), inputs.batch)
        if mine.start == mine.stop:
            return None
        first = mine.start
        tok_ids = check_tok_ids(self.rows[mine], inputs.model.config, first)
        x, n_rows = inputs(tok_ids), len(tok_ids)
        padded = pad_below(tok_ids, inputs.batch, inputs.model.config.pad_id)
        real = inputs.counts(padded)
        drawn = (uniform(self.seed, np.arange(first, first + inputs.batch)) * self.every).astype(np.int32)
        counted, drawn = inputs.devices.rows((real, drawn))
        options = {"config": inputs.config, "every": self.every, "devices": inputs.devices}
        found = [
            settled(statistics(chunk, x, counted, drawn, **options), inputs.devices.exchange) for chunk in self.chunks
        ]
        sampled = sampled_tokens(real, first, self.share, self.seed)
        active = active_features(inputs.dictionary, inputs.config, x, sampled, inputs.devices)
        return MeasuredBatch(first, n_rows, found, sampled, active)


@dataclasses.dataclass
class Sums:
    """What is kept of all rows measured so far."""

    histogram: Int[np.ndarray, "32 n_features"]
    active: Int[np.ndarray, " n_features"]
    total: np.ndarray
    """(n_features,) float64."""
    top: Contexts
    sampled: Contexts
    together: list[np.ndarray]
    """Which features are active at each sampled token: parts of shape (tokens, bytes), one bit per feature."""
    together_row: list[np.ndarray]
    """Row of each sampled token, in parts; -1 where it was measured before the search was resumed."""

    @staticmethod
    def zero(n_features: int, k: int, n_sampled: int) -> Sums:
        """Return the sums before any row is measured."""
        return Sums(
            np.zeros((BINS, n_features), np.int64),
            np.zeros(n_features, np.int64),
            np.zeros(n_features),
            no_contexts(n_features, k),
            no_contexts(n_features, n_sampled),
            [np.zeros((0, n_bytes(n_features)), np.uint8)],
            [np.zeros(0, np.int64)],
        )

    def add(self, batch: MeasuredBatch, seed: int) -> None:
        """Add a batch of this process. Batches must be added in the order of their rows."""
        peak, position, total, active = (
            np.concatenate([np.asarray(chunk[field]) for chunk in batch.chunks], axis=1)[: batch.n_rows]
            for field in range(4)
        )
        histograms = [np.asarray(chunk.histogram).sum(axis=0) for chunk in batch.chunks]
        self.histogram += np.concatenate(histograms, axis=1)
        self.active += active.sum(axis=0)
        for row in total:
            self.total += row  # row by row, so that the rounding does not depend on the batch
        rows = np.arange(batch.first, batch.first + batch.n_rows)
        keep_first(self.top, peak, position, rows, by_value)
        keep_first(self.sampled, peak, position, rows, at_random(seed))
        self.together.append(of_sampled_tokens(batch.active, batch.sampled, len(self.total)))
        self.together_row.append(batch.first + np.nonzero(batch.sampled)[0])

    def of_all_processes(self, seed: int) -> Sums:
        """Return the sums of all rows that the processes have measured, on each of them; all must call this."""
        if jax.process_count() == 1:
            return self
        counted = summed({name: getattr(self, name) for name in ("histogram", "active", "total")})
        row = np.concatenate(gathered(np.concatenate(self.together_row)))
        order = np.argsort(row, kind="stable")
        together = np.concatenate(gathered(np.concatenate(self.together)))
        contexts = of_all_processes(self.top, by_value), of_all_processes(self.sampled, at_random(seed))
        return Sums(
            **counted, top=contexts[0], sampled=contexts[1], together=[together[order]], together_row=[row[order]]
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by name, for a work file."""
        found = {name: getattr(self, name) for name in ("histogram", "active", "total")}
        found["together"] = np.concatenate(self.together)
        return found | named_contexts("top", self.top) | named_contexts("sampled", self.sampled)

    @staticmethod
    def of_arrays(arrays: dict[str, np.ndarray]) -> Sums:
        """Return the sums whose `arrays()` were saved."""
        top, sampled = contexts_named("top", arrays), contexts_named("sampled", arrays)
        together, before = arrays["together"], np.full(len(arrays["together"]), -1)
        return Sums(arrays["histogram"], arrays["active"], arrays["total"], top, sampled, [together], [before])


def run_pass(measuring: ActivationPass, sums: Sums, first: int, saved: Progress | None, track: Track) -> None:
    """Measure this process's part of the rows from `first` on; each batch is added while the next one is computed."""
    measured, timer = None, SharedTimer(SAVE_EVERY)
    for turn in track(measuring.turns(first), "search"):
        ahead = measuring.measure(turn)
        if measured is not None:
            sums.add(measured, measuring.seed)
        measured = ahead
        if saved is not None and timer.is_due():
            so_far = sums.of_all_processes(measuring.seed)  # without the batches that are still being computed
            saved.save(so_far.arrays(), turn)
    if measured is not None:
        sums.add(measured, measuring.seed)


def named_contexts(name: str, contexts: Contexts) -> dict[str, np.ndarray]:
    """Return the fields of contexts as `{"top.value": array, …}`."""
    return {f"{name}.{field}": array for field, array in contexts._asdict().items()}


def contexts_named(name: str, arrays: dict[str, np.ndarray]) -> Contexts:
    """Return the contexts that `named_contexts` gave names to."""
    return Contexts(*(arrays[f"{name}.{field}"] for field in Contexts._fields))

"""One pass over rows of tokens: what is kept of a dictionary's activations, and how a batch is added to it.

`DictionaryInputs` runs the model, `ActivationPass` measures a batch on the devices, and `Sums` adds it up on the host.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int, Integer

from tinymodel_jax.analysis.search.coactivation import active_features, n_bytes, of_sampled_tokens, sampled_tokens
from tinymodel_jax.analysis.search.contexts import Contexts, at_random, by_value, keep_first, no_contexts, uniform
from tinymodel_jax.analysis.search.feature_statistics import BINS, BatchStatistics, feature_chunks, statistics
from tinymodel_jax.lm import FeatureReader
from tinymodel_jax.lm.collection import BatchedPass
from tinymodel_jax.model.hook_points import vectors_at
from tinymodel_jax.model.padding import check_tok_ids, pad_below


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

    def measure(self, first: int) -> MeasuredBatch:
        """Start measuring the batch whose first row is `first`, without waiting for the result.

        Raises:
            ValueError: an id is not valid for the model.
        """
        inputs = self.inputs
        tok_ids = check_tok_ids(self.rows[first : first + inputs.batch], inputs.model.config, first)
        x, n_rows = inputs(tok_ids), len(tok_ids)
        padded = pad_below(tok_ids, inputs.batch, inputs.model.config.pad_id)
        real = inputs.counts(padded)
        drawn = (uniform(self.seed, np.arange(first, first + inputs.batch)) * self.every).astype(np.int32)
        counted, drawn = inputs.devices.rows((real, drawn))
        options = {"config": inputs.config, "every": self.every, "devices": inputs.devices}
        found = [inputs.devices.settled(statistics(chunk, x, counted, drawn, **options)) for chunk in self.chunks]
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
        )

    def add(self, batch: MeasuredBatch, seed: int) -> None:
        """Add a batch. Batches must be added in the order of their rows."""
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

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by name, for a work file."""
        found = {name: getattr(self, name) for name in ("histogram", "active", "total")}
        found["together"] = np.concatenate(self.together)
        return found | named_contexts("top", self.top) | named_contexts("sampled", self.sampled)

    @staticmethod
    def of_arrays(arrays: dict[str, np.ndarray]) -> Sums:
        """Return the sums whose `arrays()` were saved."""
        top, sampled = contexts_named("top", arrays), contexts_named("sampled", arrays)
        return Sums(arrays["histogram"], arrays["active"], arrays["total"], top, sampled, [arrays["together"]])


def named_contexts(name: str, contexts: Contexts) -> dict[str, np.ndarray]:
    """Return the fields of contexts as `{"top.value": array, …}`."""
    return {f"{name}.{field}": array for field, array in contexts._asdict().items()}


def contexts_named(name: str, arrays: dict[str, np.ndarray]) -> Contexts:
    """Return the contexts that `named_contexts` gave names to."""
    return Contexts(*(arrays[f"{name}.{field}"] for field in Contexts._fields))

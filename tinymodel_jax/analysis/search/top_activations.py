"""What every feature of a dictionary reacts to, from one streaming pass over rows of tokens.

Top contexts, a sample of contexts at all levels, density, a histogram of activations, and the features that are active
together. Memory does not grow with the number of tokens. Batches, devices and interruptions do not change the result
(up to float32 rounding of the activations). `[BEGIN]`, `[END]` and `[PAD]` do not count; `[UNK]` is a word of the text.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tinymodel_jax.analysis.search.activation_pass import (
    ActivationPass,
    DictionaryInputs,
    Sums,
    contexts_named,
    named_contexts,
)
from tinymodel_jax.analysis.search.coactivation import partners_of_all
from tinymodel_jax.analysis.search.contexts import Contexts
from tinymodel_jax.analysis.search.feature_statistics import BINS, FIRST_EXPONENT
from tinymodel_jax.analysis.search.resumable import Progress, fingerprint, fingerprints
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.dictionary import resolve_indices
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import FeatureReader, TinyModel
from tinymodel_jax.model.padding import as_array
from tinymodel_jax.runtime.atomic_files import replace_file
from tinymodel_jax.runtime.paths import user_path

EDGES = 2.0 ** (np.arange(BINS + 1) // 2 + FIRST_EXPONENT) * np.where(np.arange(BINS + 1) % 2, 1.5, 1.0)
"""Edges of the histogram's bins, 2^-8, 1.5 * 2^-8, 2^-7 … 2^8; the first bin has all below too, the last all above."""
QUANTILES = (0.1, 0.5, 0.9, 0.99)
"""Shares of a feature's active tokens at which its activation is shown."""
SAVE_EVERY = 60.0
"""Seconds between two states of the work file."""
COACTIVATION_TOKENS = 8192
"""Tokens, about, that co-activation is counted on."""
HISTOGRAM_TOKENS = 1 << 16
"""Tokens, about, that the histogram is of where there are more than twice as many."""


@dataclasses.dataclass(frozen=True)
class TopActivations:
    """The features of one dictionary on some rows; arrays hold all features. Made by `top_activations`.

    Rows are numbered from 0 in the order given: `rows[contexts.row, contexts.position]` is the token at a peak.
    """

    tag: str
    """The dictionary's site."""
    data: str
    """`resumable.fingerprint` of the rows."""
    model: str
    """Fingerprint of what computes the dictionary's input."""
    dictionary: str
    """Fingerprint of the dictionary."""
    n_rows: int
    n_tokens: int
    """Tokens that counted."""
    histogram: Int[np.ndarray, "n_features 32"]
    """Tokens with an activation above 0, by its size; `EDGES` are the bins'. Of one token in `histogram_every`."""
    histogram_every: int
    active: Int[np.ndarray, " n_features"]
    """Tokens at which each feature is active."""
    total: Float[np.ndarray, " n_features"]
    """Sum of the activations."""
    top: Contexts
    """The rows with the largest peaks, largest first."""
    sampled: Contexts
    """Uniform sample of the rows at which a feature is active, largest peak first; `bands` cuts it by quantiles."""
    partners: Int[np.ndarray, "n_features p"]
    """Features whose activity correlates most with each one's, best first; -1 where there are fewer."""
    correlation: Float[np.ndarray, "n_features p"]
    """Correlation (phi) of the activity of each with its partner; 0 where there is none, NaN where it is undefined: of
    a feature that is active at all sampled tokens, or at none."""

    @property
    def n_features(self) -> int:
        """Features of the dictionary."""
        return len(self.total)

    @property
    def density(self) -> Float[np.ndarray, " n_features"]:
        """Share of the tokens at which each feature is active."""
        return self.active / self.n_tokens

    @property
    def mean(self) -> Float[np.ndarray, " n_features"]:
        """Mean activation over the tokens at which each feature is active; 0 if there is none."""
        return self.total / np.maximum(self.active, 1)

    @property
    def largest(self) -> Float[np.ndarray, " n_features"]:
        """Largest activation; 0 if there is none."""
        return self.top.value[:, 0]

    def quantile(self, share: float) -> Float[np.ndarray, " n_features"]:
        """Return the activation that `share` of a feature's active tokens lie below; 0 for a feature that has none.

        From the histogram, evenly spread in a bin: off by less than a factor of 1.5 from 2^-8 to 2^8, besides what
        sampling adds. The mean for a feature that is active, but at none of the histogram's tokens.

        Raises:
            ValueError: `share` is outside 0..1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"quantile: {share!r} is outside 0..1.")
        below = np.cumsum(self.histogram, axis=1)
        wanted = share * below[:, -1:]
        bin_of = np.argmax(below >= np.maximum(wanted, 1e-9), axis=1)
        inside = np.take_along_axis(self.histogram, bin_of[:, None], axis=1)[:, 0]
        before = np.take_along_axis(below, bin_of[:, None], axis=1)[:, 0] - inside
        part = (wanted[:, 0] - before) / np.maximum(inside, 1)
        value = EDGES[bin_of] + part * (EDGES[bin_of + 1] - EDGES[bin_of])
        return np.where(below[:, -1] > 0, np.minimum(value, self.largest), self.mean)

    def bands(self, feature: int, n: int = 5) -> list[Contexts]:
        """Return the sampled contexts of a feature in `n` bands of equal size, that of the largest peaks first.

        Band i holds peaks from quantile 1 - (i+1)/n to 1 - i/n of all rows at which the feature is active.

        Raises:
            ValueError: the feature is out of range, or `n` is below 1.
        """
        resolve_indices(feature, self.n_features)
        if n < 1:
            raise ValueError(f"bands: n={n} must be 1 or more.")
        count = int(np.sum(self.sampled.row[feature] >= 0))
        parts = np.array_split(np.arange(count), n)
        return [Contexts(*(field[feature][None, part] for field in self.sampled)) for part in parts]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all; `load_top_activations` reads it.

        Raises:
            OSError: it cannot be written.
        """
        arrays = {name: np.ascontiguousarray(array) for name, array in _arrays(self).items()}
        names = ("tag", "data", "model", "dictionary", "n_rows", "n_tokens", "histogram_every")
        facts = {name: getattr(self, name) for name in names}
        replace_file(user_path(path), save(arrays, {"top_activations": json.dumps(facts)}))


def top_activations(
    lm: TinyModel,
    tag: str,
    rows: Any,
    *,
    k: int = 20,
    n_sampled: int = 40,
    n_partners: int = 10,
    seed: int = 0,
    batch: int = 8,
    work_file: Path | None = None,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> TopActivations:
    """Search rows of tokens for what the features of a dictionary react to.

    Args:
        tag: dictionary's site, such as M2; what `lm[tag]` reads.
        rows: integers (rows, seq), padded with `[PAD]`; may map a file, of which a batch is read at a time.
        k: top contexts of each feature.
        n_sampled: contexts of each feature that are sampled from all rows at which it is active.
        n_partners: co-active features of each, counted on a sample of about 8,192 tokens.
        seed: of the samples.
        batch: rows of a device in one pass; the devices of this process share the rows.
        work_file: file that holds the state of the work, so that the same call goes on; delete it when the result is
            kept. None: no file.
        track: wraps the batches' numbers, to show how many are done.

    Raises:
        ValueError: the site has no dictionary, the tag names a feature, no token counts, a count is below 1, the seed
            is out of range, rows are no valid input, or `work_file` is of another search.
    """
    rows = as_array(rows)
    reader = lm[Site.whole(tag, "top_activations: ").tag]
    _check(rows, seed, k=k, n_sampled=n_sampled, n_partners=n_partners, batch=batch)
    n_tokens = _count_tokens(rows, lm.config)
    if not n_tokens:
        raise ValueError(f"top_activations: {len(rows)} rows hold no token that counts; give rows of stories.")
    sums, first = Sums.zero(reader.dictionary.config.n_features, k, n_sampled), 0
    prints, saved = search_fingerprints(reader, rows), None
    if work_file is not None:
        options = {"k": k, "n_sampled": n_sampled, "n_partners": n_partners, "seed": seed}
        saved = Progress(work_file, {"site": reader.site.tag, **prints, **options})
        if (before := saved.load()) is not None:
            sums, first = Sums.of_arrays(before.arrays), before.done
    every, share = max(1, n_tokens // HISTOGRAM_TOKENS), COACTIVATION_TOKENS / n_tokens
    inputs = DictionaryInputs(reader, batch)
    measuring = ActivationPass(inputs, rows, share=share, every=every, seed=seed)
    run_pass(measuring, sums, range(first, len(rows), inputs.batch), saved, track)
    if saved is not None:
        saved.save(sums.arrays(), len(rows))
    counts = {"n_rows": len(rows), "n_tokens": n_tokens, "histogram_every": every}
    facts = {"tag": reader.site.tag, **counts, **prints}
    return _result(facts, sums, n_partners)


def search_fingerprints(reader: FeatureReader, rows: np.ndarray) -> dict[str, str]:
    """Return what a search's result depends on besides its options: the fields `data`, `model` and `dictionary`.

    Args:
        reader: `lm[tag]`.
    """
    return {"data": fingerprint(rows), **fingerprints(reader, reader.lm.hooked(before=reader.site))}


def load_top_activations(path: str | os.PathLike[str]) -> TopActivations:
    """Read what `TopActivations.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or another file.
    """
    path = user_path(path)
    try:
        with safe_open(path, "numpy") as file:
            facts = json.loads((file.metadata() or {})["top_activations"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        contexts = {name: contexts_named(name, arrays) for name in ("top", "sampled")}
        plain = {name: array for name, array in arrays.items() if "." not in name}
        return TopActivations(**facts, **contexts, **plain)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no file of tinymodel top ({error}); make it anew.") from error


def _arrays(found: TopActivations) -> dict[str, np.ndarray]:
    plain = {name: getattr(found, name) for name in ("histogram", "active", "total", "partners", "correlation")}
    return plain | named_contexts("top", found.top) | named_contexts("sampled", found.sampled)


def _check(rows: np.ndarray, seed: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"top_activations: {name}={count} must be 1 or more.")
    if not 0 <= seed < 2**64:
        raise ValueError(f"top_activations: seed={seed} must be 0 to 2**64 - 1.")
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"top_activations: rows have shape {rows.shape}; give token ids (rows, seq), one row or more.")


def _count_tokens(rows: np.ndarray, config: ModelConfig) -> int:
    """Return how many tokens are text, reading a part of the rows at a time."""
    return sum(int(np.sum(config.is_text(rows[start : start + 4096]))) for start in range(0, len(rows), 4096))


def run_pass(
    measuring: ActivationPass,
    sums: Sums,
    starts: Sequence[int],
    saved: Progress | None,
    track: Callable[[Sequence[int]], Iterable[int]],
) -> None:
    """Measure the batches; each is taken in while the next one is computed."""
    measured, when = None, time.monotonic()
    for start in track(starts):
        ahead = measuring.measure(start)
        if measured is not None:
            sums.take_in(measured, measuring.seed)
        measured = ahead
        if saved is not None and time.monotonic() - when > SAVE_EVERY:
            saved.save(sums.arrays(), start)  # without the batch that is being computed
            when = time.monotonic()
    if measured is not None:
        sums.take_in(measured, measuring.seed)


def _result(facts: dict[str, Any], sums: Sums, n_partners: int) -> TopActivations:
    order = np.argsort(-sums.sampled.value, axis=1, kind="stable")
    sampled = Contexts(*(np.take_along_axis(field, order, axis=1) for field in sums.sampled))
    partners, correlation = partners_of_all(np.concatenate(sums.together), len(sums.total), n_partners)
    return TopActivations(
        **facts,
        histogram=np.ascontiguousarray(sums.histogram.T),
        active=sums.active,
        total=sums.total,
        top=sums.top,
        sampled=sampled,
        partners=partners,
        correlation=correlation,
    )

"""What every feature of a dictionary reacts to, from one streaming pass over rows of tokens.

The search finds top contexts, a sample of contexts at all levels of activation, density, a histogram of activations,
and features that are active together. Memory does not grow with the number of tokens. Batch size, devices and
interruptions do not change the result, up to float32 rounding of the activations. `[BEGIN]`, `[END]` and `[PAD]` do not
count as tokens; `[UNK]` does.
"""

from __future__ import annotations

import dataclasses
import json
import os
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
    run_pass,
)
from tinymodel_jax.analysis.search.coactivation import partners_of_all
from tinymodel_jax.analysis.search.contexts import Contexts
from tinymodel_jax.analysis.search.feature_statistics import BINS, FIRST_EXPONENT
from tinymodel_jax.analysis.search.resumable import Progress, fingerprint_of_rows, fingerprints
from tinymodel_jax.dictionaries.dictionary import resolve_indices
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import FeatureReader, TinyModel
from tinymodel_jax.lm.text import rows_of
from tinymodel_jax.model.padding import as_array
from tinymodel_jax.runtime.atomic_files import replace_file
from tinymodel_jax.runtime.collectives import summed
from tinymodel_jax.runtime.paths import user_path
from tinymodel_jax.runtime.progress import Track, no_progress
from tinymodel_jax.runtime.rows import rows_of_turn, turns

EDGES = 2.0 ** (np.arange(BINS + 1) // 2 + FIRST_EXPONENT) * np.where(np.arange(BINS + 1) % 2, 1.5, 1.0)
"""Edges of the histogram's bins: 2^-8, 1.5 * 2^-8, 2^-7 … 2^8. The first bin also counts all smaller activations, the
last all larger ones."""
QUANTILES = (0.1, 0.5, 0.9, 0.99)
"""Quantiles of a feature's activations that commands and pages show."""
COUNTED_TOGETHER = 4096
"""Rows whose tokens are counted together."""
COACTIVATION_TOKENS = 8192
"""About how many tokens co-activation is counted on."""
HISTOGRAM_TOKENS = 1 << 16
"""About how many tokens the histogram counts if the rows hold more than twice as many."""


@dataclasses.dataclass(frozen=True)
class TopActivations:
    """What the features of one dictionary react to, as `top_activations` finds it. Arrays hold all features.

    Rows are numbered from 0 in the order given: `rows[contexts.row, contexts.position]` is the token at a peak.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import top_activations
        >>> lm = TinyModel("mini")
        >>> found = top_activations.top_activations(lm, "M2", ["The dog ran to the woods."])
        >>> found.n_features, found.density.shape, bool((found.mean <= found.largest).all())
        (512, (512,), True)
    """

    tag: str
    """Tag of the dictionary's site, such as `M2`."""
    data: str
    """Fingerprint of the rows."""
    model: str
    """Fingerprint of the model, with its splices, that computes the dictionary's input."""
    dictionary: str
    """Fingerprint of the dictionary."""
    n_rows: int
    """Number of rows."""
    n_tokens: int
    """Number of tokens, without `[BEGIN]`, `[END]` and `[PAD]`."""
    histogram: Int[np.ndarray, "n_features 32"]
    """Number of active tokens in each bin of activations. Bins reach from 2^-8 to 2^8, two for each doubling; the first
    also counts all smaller activations, the last all larger ones."""
    histogram_every: int
    """The histogram counts one token in `histogram_every`."""
    active: Int[np.ndarray, " n_features"]
    """Number of tokens at which each feature is active."""
    total: Float[np.ndarray, " n_features"]
    """Sum of the activations."""
    top: Contexts
    """The rows with the largest peaks, largest first."""
    sampled: Contexts
    """Uniform sample of the rows on which a feature is active, largest peak first; `bands` divides it by quantile."""
    partners: Int[np.ndarray, "n_features p"]
    """Features whose activity correlates most with that of each feature, best first; -1 where there are fewer."""
    correlation: Float[np.ndarray, "n_features p"]
    """Correlation (phi) of the activity of each feature and its partner. 0 where there is no partner; NaN for a feature
    that is active at all sampled tokens or at none, where phi is undefined."""

    @property
    def n_features(self) -> int:
        """Number of features of the dictionary."""
        return len(self.total)

    @property
    def density(self) -> Float[np.ndarray, " n_features"]:
        """Share of the tokens at which each feature is active."""
        return self.active / self.n_tokens

    @property
    def mean(self) -> Float[np.ndarray, " n_features"]:
        """Mean activation over the tokens at which each feature is active; 0 for a feature that is never active."""
        return self.total / np.maximum(self.active, 1)

    @property
    def largest(self) -> Float[np.ndarray, " n_features"]:
        """Largest activation; 0 for a feature that is never active."""
        return self.top.value[:, 0]

    def quantile(self, share: float) -> Float[np.ndarray, " n_features"]:
        """Return the `share` quantile of each feature's activations above 0; 0 for a feature that is never active.

        It is interpolated in the histogram. From 2^-8 to 2^8, the error is below a factor of 1.5, plus that of
        sampling. A feature that is active, but at none of the tokens that the histogram counts, gets its mean.

        Args:
            share: quantile between 0 and 1; 0.5 is the median.

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
        """Return the sampled contexts of a feature in `n` bands of equal size, largest peaks first.

        Band i holds the peaks from quantile 1 - (i+1)/n to 1 - i/n over the rows on which the feature is active.

        Args:
            feature: index of the feature.
            n: number of bands.

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
        """Write one safetensors file, atomically. `load_top_activations` reads it.

        Args:
            path: the file, in a folder that exists.

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
    track: Track = no_progress,
) -> TopActivations:
    """Search rows of tokens for what the features of a dictionary react to.

    Args:
        tag: the dictionary's site, such as M2.
        rows: stories, or token ids (rows, seq), padded with `[PAD]`. A memory-mapped array is read one batch at a
            time.
        k: number of top contexts per feature.
        n_sampled: number of contexts per feature that are sampled from all rows on which it is active.
        n_partners: number of co-active features per feature, counted on a sample of about 8,192 tokens.
        seed: seed of the samples.
        batch: rows per device in one pass; the rows are spread over the devices of this process.
        work_file: file to save the state of the search in. The same call resumes from it. Delete it once the result is
            saved. None saves nothing.
        track: wraps the iterator over batches, for example with a progress bar.

    Raises:
        ValueError: the site has no dictionary, the tag names a feature, the rows hold no text, a count is below 1, the
            seed is out of range, the rows are not valid input, or `work_file` belongs to a different search.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import top_activations
        >>> lm = TinyModel("mini")
        >>> rows = ["The dog ran to the woods.", "Lily saw a red ball."]
        >>> found = top_activations.top_activations(lm, "M2", rows, k=2)
        >>> found.n_rows, found.top.value.shape
        (2, (512, 2))
    """
    rows = as_array(rows_of(lm, rows))
    reader = lm[Site.whole(tag, "top_activations: ").tag]
    _check(rows, seed, k=k, n_sampled=n_sampled, n_partners=n_partners, batch=batch)
    n_tokens = _count_tokens(rows, reader)
    if not n_tokens:
        raise ValueError(f"top_activations: {len(rows)} rows hold only special tokens; pass rows of stories.")
    sums, first = Sums.zero(reader.dictionary.config.n_features, k, n_sampled), 0
    prints, saved = search_fingerprints(reader, rows), None
    if work_file is not None:
        options = {"k": k, "n_sampled": n_sampled, "n_partners": n_partners, "seed": seed}
        saved = Progress(work_file, {"site": reader.site.tag, **prints, **options})
        if (before := saved.load()) is not None:
            first = before.done
            sums = Sums.of_arrays(before.arrays) if before.arrays else sums
    every, share = max(1, n_tokens // HISTOGRAM_TOKENS), COACTIVATION_TOKENS / n_tokens
    inputs = DictionaryInputs(reader, batch)
    measuring = ActivationPass(inputs, rows, share=share, every=every, seed=seed)
    run_pass(measuring, sums, first, saved, track)
    sums = sums.of_all_processes(seed)
    if saved is not None:
        saved.save(sums.arrays(), len(rows))
    counts = {"n_rows": len(rows), "n_tokens": n_tokens, "histogram_every": every}
    facts = {"tag": reader.site.tag, **counts, **prints}
    return _result(facts, sums, n_partners)


def search_fingerprints(reader: FeatureReader, rows: np.ndarray) -> dict[str, str]:
    """Return fingerprints of what a search depends on besides its options: `data`, `model` and `dictionary`.

    Args:
        reader: `lm[tag]`.
    """
    return {"data": fingerprint_of_rows(rows), **fingerprints(reader, reader.lm.hooked(before=reader.site))}


def load_top_activations(path: str | os.PathLike[str]) -> TopActivations:
    """Read what `TopActivations.save` wrote.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is damaged, or not the result of a search.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import top_activations
        >>> lm = TinyModel("mini")
        >>> found = top_activations.top_activations(lm, "M2", ["The dog ran to the woods."])
        >>> found.save("M2.safetensors")
        >>> top_activations.load_top_activations("M2.safetensors").n_rows
        1
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
        raise ValueError(
            f"{path} is damaged or not a result of `tinymodel top` ({error}); run the search again."
        ) from error


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
        raise ValueError(
            f"top_activations: rows have shape {rows.shape}; pass token ids (rows, seq), at least one row."
        )


def _count_tokens(rows: np.ndarray, reader: FeatureReader) -> int:
    """Return the number of tokens that count, reading a part of the rows at a time."""
    parts = (rows_of_turn(turn, len(rows), COUNTED_TOGETHER) for turn in turns(0, len(rows), COUNTED_TOGETHER))
    mine = sum(int(np.sum(reader.counts(rows[part]))) for part in parts)
    return int(summed({"tokens": np.array(mine)})["tokens"])


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

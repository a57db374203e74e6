"""What every feature of a dictionary reacts to, from one streaming pass over rows of tokens.

Top contexts, a sample of contexts at all levels, density, a histogram of activations, and the features that are active
together. Memory does not grow with the number of tokens. Batches, devices and interruptions do not change the result
(up to float32 rounding of the activations). Special tokens (`[BEGIN]`, `[END]`, `[PAD]`) do not count.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tinymodel_jax.analysis.contexts import Contexts
from tinymodel_jax.atomic_files import replace_file

BINS = 32
EDGES = 2.0 ** (np.arange(BINS + 1) / 2 - 8)
"""Edges of the histogram's bins, half octaves from 2^-8 to 2^8; the first bin also has all below, the last all above."""


@dataclasses.dataclass(frozen=True)
class TopActivations:
    """The features of one dictionary on some rows; arrays hold all features. Made by `top_activations`.

    Rows are numbered from 0 in the order given: `rows[contexts.row, contexts.position]` is the token at a peak.
    """

    tag: str
    """The dictionary's site."""
    data: str
    """`resumable.fingerprint` of the rows."""
    n_rows: int
    n_tokens: int
    """Tokens that counted."""
    histogram: Int[np.ndarray, "n_features 32"]
    """Tokens with an activation above 0, by its size; `EDGES` are the bins'."""
    total: Float[np.ndarray, " n_features"]
    """Sum of the activations."""
    top: Contexts
    """The rows with the largest peaks, largest first."""
    sampled: Contexts
    """Uniform sample of the rows at which a feature is active, largest peak first; `bands` cuts it by quantiles."""
    partners: Int[np.ndarray, "n_features p"]
    """Features most often active together with each, best first; -1 where there are fewer."""
    correlation: Float[np.ndarray, "n_features p"]
    """Correlation (phi) of the activity of each with its partner; 0 where there is none."""

    @property
    def n_features(self) -> int:
        """Features of the dictionary."""
        return len(self.total)

    @property
    def active(self) -> Int[np.ndarray, " n_features"]:
        """Tokens at which each feature is active."""
        return self.histogram.sum(axis=1)

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

        From the histogram, evenly spread on the logarithmic scale in a bin, so within half an octave of the truth.

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
        return np.where(self.active > 0, np.minimum(EDGES[bin_of] * 2 ** (part / 2), self.largest), 0)

    def bands(self, feature: int, n: int = 5) -> list[Contexts]:
        """Return the sampled contexts of a feature in `n` bands of equal size, that of the largest peaks first.

        Band i holds peaks from quantile 1 - (i+1)/n to 1 - i/n of all rows at which the feature is active.
        """
        count = int(np.sum(self.sampled.row[feature] >= 0))
        parts = np.array_split(np.arange(count), n)
        return [Contexts(*(field[feature][None, part] for field in self.sampled)) for part in parts]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all; `load_top_activations` reads it.

        Raises:
            OSError: it cannot be written.
        """
        arrays = {name: np.ascontiguousarray(array) for name, array in _arrays(self).items()}
        facts = {"tag": self.tag, "data": self.data, "n_rows": self.n_rows, "n_tokens": self.n_tokens}
        replace_file(Path(path), save(arrays, {"top_activations": json.dumps(facts)}))


def load_top_activations(path: str | os.PathLike[str]) -> TopActivations:
    """Read what `TopActivations.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or another file.
    """
    try:
        with safe_open(path, "numpy") as file:
            facts = json.loads((file.metadata() or {})["top_activations"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        contexts = {
            name: Contexts(*(arrays.pop(f"{name}.{field}") for field in Contexts._fields))
            for name in ("top", "sampled")
        }
        return TopActivations(**facts, **contexts, **arrays)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged or no file of tinymodel top ({error}); make it anew.") from error


def _arrays(found: TopActivations) -> dict[str, np.ndarray]:
    plain = {name: getattr(found, name) for name in ("histogram", "total", "partners", "correlation")}
    for name in ("top", "sampled"):
        plain |= {f"{name}.{field}": array for field, array in getattr(found, name)._asdict().items()}
    return plain

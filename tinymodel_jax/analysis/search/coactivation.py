"""Which features are active together, on a sample of tokens, in memory that does not grow with the number of tokens.

Counting all pairs of 25,000 features takes 2.5 GB and, on all tokens, many times the work of the encoder. So the pairs
are counted on a sample of tokens, and exactly there. The correlation is the phi coefficient over the n sampled tokens,

    phi = (n n_ij - n_i n_j) / sqrt(n_i (n - n_i) n_j (n - n_j))

with n_i the tokens at which feature i is active and n_ij those of both. It is undefined (0 / 0) for a feature that is
active at all of them, or at none. Pairs that met at fewer than `MET` tokens are left out: two features active once
would have phi 1. The sample is thinned where counting would take more than `PAIRS`: with `COACTIVATION_TOKENS` of it,
that takes more than 256 active features per token on average.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from scipy import sparse

from tinymodel_jax.analysis.search.contexts import uniform
from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import DictionaryParams, encode
from tinymodel_jax.runtime.compilation import fast_jit

MET = 3
PAIRS = 2**29
"""Pairs of active features that are counted, about; seconds of work."""
AS_ONE = 256
"""Pairs of any features that a matrix product counts in the time that a sparse one takes for a pair of active ones."""
AT_ONCE = 64
"""Tokens that are encoded together."""
FEATURES_AT_ONCE = 256
"""Features whose pairs are counted together."""


def sampled_places(real: Bool[np.ndarray, "rows seq"], first: int, share: float, seed: int) -> Int[np.ndarray, " n"]:
    """Return the places in the flattened rows that belong to the sample.

    Args:
        real: which tokens count.
        first: number of the first row in the data.
        share: probability of each, decided by a hash of row and position.
    """
    row_of = np.arange(first, first + len(real))[:, None]
    chosen = uniform(seed, row_of, np.arange(real.shape[1])) < share
    return np.flatnonzero(chosen & real)


def active_features(
    params: DictionaryParams, config: DictionaryConfig, x: Float[Array, "rows seq d_in"], places: Int[np.ndarray, " n"]
) -> list[Array]:
    """Return which features are active at places of the flattened rows, a bit each, `AT_ONCE` places at a time.

    The last array is longer than what is left of the places. Does not wait for the result.
    """
    padded = np.resize(places, -(-len(places) // AT_ONCE) * AT_ONCE).reshape(-1, AT_ONCE)
    return [_active(params, x, part.astype(np.int32), config=config) for part in padded]


def n_bytes(n_features: int) -> int:
    """Return how many bytes hold a bit for each feature."""
    return -(-n_features // 8)


def partners_of_all(
    bits: UInt8[np.ndarray, "tokens bytes"], n_features: int, n: int
) -> tuple[Int[np.ndarray, "n_features n"], Float[np.ndarray, "n_features n"]]:
    """Return the `n` features whose activity correlates most with each, and phi; -1 and 0 where there are fewer.

    Phi is NaN where it is undefined: for a feature that is active at all tokens, or at none.
    """
    active, table = _counted(np.unpackbits(bits, axis=1, count=n_features).view(bool))
    alone = active.sum(axis=0).astype(np.float64)
    partners, correlation = np.full((n_features, n), -1, np.int32), np.zeros((n_features, n), np.float32)
    correlation[(alone == 0) | (alone == len(active))] = np.nan
    for start in range(0, n_features, FEATURES_AT_ONCE):
        together = sparse.csr_matrix(table[:, start : start + FEATURES_AT_ONCE].T @ table)
        for feature in range(start, min(start + FEATURES_AT_ONCE, n_features)):
            span = slice(*together.indptr[feature - start : feature - start + 2])
            others, phi = _correlations(feature, together.indices[span], together.data[span], alone, len(active))
            if len(phi) > n:
                likely = phi >= np.partition(phi, -n)[-n]
                others, phi = others[likely], phi[likely]
            best = np.lexsort((others, -phi))[:n]
            partners[feature, : len(best)], correlation[feature, : len(best)] = others[best], phi[best]
    return partners, correlation


def _counted(active: Bool[np.ndarray, "tokens n_features"]) -> tuple[Bool[np.ndarray, "some n_features"], Any]:
    """Return the tokens that are counted, evenly spread, and the same as a matrix: sparse where that counts faster."""
    of_active, of_any = np.square(active.sum(axis=1, dtype=float)).sum(), active.size * active.shape[1] / AS_ONE
    active = active[:: max(1, math.ceil(min(of_active, of_any) / PAIRS))]
    return active, sparse.csc_matrix(active, dtype=np.float32) if of_active < of_any else active.astype(np.float32)


def _correlations(
    feature: int, others: np.ndarray, met: np.ndarray, alone: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the features that correlate above 0 with one, and phi."""
    enough = (met >= MET) & (others != feature)
    others, met = others[enough], met[enough].astype(np.float64)
    i, j = alone[feature], alone[others]
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = (n * met - i * j) / np.sqrt(i * (n - i) * j * (n - j))
    positive = phi > 0  # which NaN, where phi is undefined, is not
    return others[positive], phi[positive].astype(np.float32)


def _bits(
    params: DictionaryParams, x: Float[Array, "rows seq d_in"], places: Int[Array, " n"], *, config: DictionaryConfig
) -> UInt8[Array, "n bytes"]:
    return jnp.packbits(encode(params, config, x.reshape(-1, x.shape[-1])[places]) > 0, axis=1)


_active = fast_jit(_bits, static_argnames=("config",))

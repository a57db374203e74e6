"""Which features are active together, from a sample of tokens, in memory that neither tokens nor pairs make grow.

Counting all pairs of 25,000 features takes 2.5 GB and, on all tokens, many times the work of the encoder. So the pairs
are counted on a sample of tokens, and of each token the strongest `STRONGEST` features count as active: all of them,
unless more are. The correlation is the phi coefficient over the n sampled tokens,

    phi = (n n_ij - n_i n_j) / sqrt(n_i (n - n_i) n_j (n - n_j))

with n_i the tokens at which feature i is active and n_ij those of both. Unlike n_ij / n_i it is 0 for a feature that is
active everywhere. Pairs that met at fewer than `MET` tokens are left out: two features active once would have phi 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import sparse

from tinymodel_jax.analysis.contexts import uniform
from tinymodel_jax.compilation import fast_jit
from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionary import DictionaryParams, encode

STRONGEST = 64
MET = 3
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
    """Return the strongest active features at places of the flattened rows, (`AT_ONCE`, strongest) at a time.

    -1 where fewer are active; the last array is longer than what is left of the places. Does not wait for the result.
    """
    padded = np.resize(places, -(-len(places) // AT_ONCE) * AT_ONCE).reshape(-1, AT_ONCE)
    return [_strongest(params, x, part.astype(np.int32), config=config) for part in padded]


def partners_of_all(
    active: Int[np.ndarray, "tokens strongest"], n_features: int, n: int
) -> tuple[Int[np.ndarray, "n_features n"], Float[np.ndarray, "n_features n"]]:
    """Return the `n` features whose activity correlates most with each, and phi; -1 and 0 where there are fewer."""
    tokens, places = np.nonzero(active >= 0)
    ones = np.ones(len(tokens), np.float32)
    table = sparse.csc_matrix((ones, (tokens, active[tokens, places])), shape=(len(active), n_features))
    alone = np.asarray(table.sum(axis=0), np.float64).ravel()
    partners, correlation = np.full((n_features, n), -1, np.int32), np.zeros((n_features, n), np.float32)
    for start in range(0, n_features, FEATURES_AT_ONCE):
        together = (table[:, start : start + FEATURES_AT_ONCE].T @ table).tocsr()
        for feature in range(start, start + together.shape[0]):
            span = slice(*together.indptr[feature - start : feature - start + 2])
            others, phi = _correlations(feature, together.indices[span], together.data[span], alone, len(active))
            best = np.lexsort((others, -phi))[:n]
            partners[feature, : len(best)], correlation[feature, : len(best)] = others[best], phi[best]
    return partners, correlation


def _correlations(
    feature: int, others: np.ndarray, met: np.ndarray, alone: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the features that correlate above 0 with one, and phi."""
    enough = (met >= MET) & (others != feature)
    others, met = others[enough], met[enough].astype(np.float64)
    i, j = alone[feature], alone[others]
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = (n * met - i * j) / np.sqrt(i * (n - i) * j * (n - j))
    positive = phi > 0  # also not NaN, where one is active everywhere
    return others[positive], phi[positive].astype(np.float32)


def _strongest_active(
    params: DictionaryParams, x: Float[Array, "rows seq d_in"], places: Int[Array, " n"], *, config: DictionaryConfig
) -> Int[Array, "n strongest"]:
    acts = encode(params, config, x.reshape(-1, x.shape[-1])[places])
    values, features = jax.lax.top_k(acts, min(STRONGEST, config.n_features))
    return jnp.where(values > 0, features, -1)


_strongest = fast_jit(_strongest_active, static_argnames=("config",))

"""Which features are active together, on a sample of tokens, in memory that does not grow with the number of tokens.

Counting all pairs of 25,000 features would take 2.5 GB and, on all tokens, many times the work of the encoder. So pairs
are counted exactly, but on a sample of the tokens. The correlation is the phi coefficient over the n sampled tokens,

    phi = (n n_ij - n_i n_j) / sqrt(n_i (n - n_i) n_j (n - n_j))

where n_i is the number of tokens at which feature i is active, and n_ij the number at which both are. Phi is undefined
(0 / 0) for a feature that is active at all sampled tokens or at none. Pairs that are active together at fewer than
`TOGETHER` tokens are left out, because two features that are each active once would have phi 1. If there are more than
`PAIRS` pairs to count, the sample is thinned. With `COACTIVATION_TOKENS` tokens, this happens when more than 256
features are active per token on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from scipy import sparse

from tinymodel_jax.analysis.search.contexts import uniform
from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.encoding import DictionaryParams, encode
from tinymodel_jax.runtime.collectives import settled
from tinymodel_jax.runtime.compilation import fast_jit
from tinymodel_jax.runtime.rows import RowDevices

TOGETHER = 3
"""Smallest number of tokens at which a pair must be active together."""
PAIRS = 2**29
"""About how many pairs of active features are counted at most; this takes seconds."""
DENSE_SPEEDUP = 256
"""Pairs that a dense matrix product counts in the time that a sparse one takes for one pair."""
TOKENS_AT_ONCE = 64
"""Tokens that are encoded together."""
FEATURES_AT_ONCE = 256
"""Features whose pairs are counted together."""


def sampled_tokens(real: Bool[np.ndarray, "rows seq"], first: int, share: float, seed: int) -> Bool[Any, "rows seq"]:
    """Return which tokens are sampled.

    Args:
        real: which tokens count.
        first: number of the first row in the data.
        share: probability of sampling a token, decided by a hash of row and position.
    """
    row_of = np.arange(first, first + len(real))[:, None]
    return real & (uniform(seed, row_of, np.arange(real.shape[1])) < share)


def active_features(
    params: DictionaryParams,
    config: DictionaryConfig,
    x: Float[Array, "rows seq d_in"],
    sampled: Bool[np.ndarray, "rows seq"],
    devices: RowDevices,
) -> list[Array]:
    """Return which features are active at the sampled tokens, one bit per feature, without waiting for the result.

    Each array (devices, `TOKENS_AT_ONCE`, bytes) holds the next tokens of every device's rows. There are as many arrays
    as the device with the most tokens needs; the others' tokens are padded.
    """
    positions = [np.flatnonzero(own) for own in np.split(sampled, devices.n)]
    n_parts = -(-max(map(len, positions)) // TOKENS_AT_ONCE)
    padded = np.zeros((len(positions), n_parts, TOKENS_AT_ONCE), np.int32)
    for own, places in zip(padded.reshape(len(positions), -1), positions, strict=True):
        own[: len(places)] = places
    parts = (padded[:, part] for part in range(n_parts))
    return [settled(_active(params, x, part, config=config, devices=devices), devices.exchange) for part in parts]


def of_sampled_tokens(
    active: Sequence[Array], sampled: Bool[np.ndarray, "rows seq"], n_features: int
) -> UInt8[np.ndarray, "tokens bytes"]:
    """Return what `active_features` measured at the sampled tokens, in their order, without the padding."""
    if not active:
        return np.zeros((0, n_bytes(n_features)), np.uint8)
    found = np.concatenate([np.asarray(part) for part in active], axis=1)
    n_tokens = sampled.reshape(len(found), -1).sum(axis=1)
    return found[np.arange(found.shape[1]) < n_tokens[:, None]]


def n_bytes(n_features: int) -> int:
    """Return the number of bytes that hold one bit per feature."""
    return -(-n_features // 8)


def partners_of_all(
    bits: UInt8[np.ndarray, "tokens bytes"], n_features: int, n: int
) -> tuple[Int[np.ndarray, "n_features n"], Float[np.ndarray, "n_features n"]]:
    """Return, for each feature, the `n` features whose activity correlates most with its own, and phi.

    Where there are fewer than `n`, the index is -1 and phi 0. Phi is NaN for a feature that is active at all tokens
    or at none.
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
    """Return evenly spread tokens to count, and the same as a matrix, sparse if that is faster."""
    of_active, of_any = np.square(active.sum(axis=1, dtype=float)).sum(), active.size * active.shape[1] / DENSE_SPEEDUP
    active = active[:: max(1, math.ceil(min(of_active, of_any) / PAIRS))]
    return active, sparse.csc_matrix(active, dtype=np.float32) if of_active < of_any else active.astype(np.float32)


def _correlations(
    feature: int, others: np.ndarray, met: np.ndarray, alone: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the features whose phi with `feature` is above 0, and phi."""
    enough = (met >= TOGETHER) & (others != feature)
    others, met = others[enough], met[enough].astype(np.float64)
    i, j = alone[feature], alone[others]
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = (n * met - i * j) / np.sqrt(i * (n - i) * j * (n - j))
    positive = phi > 0  # False for NaN, where phi is undefined
    return others[positive], phi[positive].astype(np.float32)


@partial(fast_jit, static_argnames=("config", "devices"))
def _active(
    params: DictionaryParams,
    x: Float[Array, "rows seq d_in"],
    positions: Int[Array, "devices n"],
    *,
    config: DictionaryConfig,
    devices: RowDevices,
) -> UInt8[Array, "devices n bytes"]:
    def of_device(params: DictionaryParams, x: Array, positions: Array) -> Array:
        return jnp.packbits(encode(params, config, x.reshape(-1, x.shape[-1])[positions[0]]) > 0, axis=1)[None]

    return devices.separately(of_device)(params, x, positions)

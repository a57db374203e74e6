"""Contexts of features: for each feature, the few rows that rank first, kept while rows stream past.

A row gives a feature one context: the peak activation, at the first position that reaches it. So the top contexts of a
feature come from different rows. Ties go to the earlier row, and a rank depends only on the context itself, so batches
and interruptions do not change what is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tinymodel_jax.runtime.collectives import gathered

Rank = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(values, row numbers) -> ranks, all of one shape; the largest ranks are kept."""


class Contexts(NamedTuple):
    """Contexts of every feature, in order of rank. Each is a row of the data, and the token in it where the feature
    peaks."""

    value: Float[np.ndarray, "n_features n"]
    """Activation at the peak; 0 where the feature has fewer contexts."""
    row: Int[np.ndarray, "n_features n"]
    """Row of the data; -1 where there is none."""
    position: Int[np.ndarray, "n_features n"]
    """Position of the peak in the row."""


def no_contexts(n_features: int, n: int) -> Contexts:
    """Return empty contexts with room for `n` per feature."""
    shape = (n_features, n)
    return Contexts(np.zeros(shape, np.float32), np.full(shape, -1, np.int32), np.zeros(shape, np.int32))


def keep_first(
    kept: Contexts,
    peaks: Float[np.ndarray, "rows n_features"],
    positions: Int[np.ndarray, "rows n_features"],
    rows: Int[np.ndarray, " rows"],
    rank: Rank,
) -> None:
    """Update the kept contexts with those of further rows, which must come after all earlier ones.

    Re-sorts only the features that gained a context: after the first rows, these are few.
    """
    new_rows = np.broadcast_to(rows[:, None], peaks.shape).astype(np.int32)
    floor = _ranks(kept.value[:, -1], kept.row[:, -1], rank)
    features = np.flatnonzero((_ranks(peaks, new_rows, rank) > floor).any(axis=0))
    new = (peaks[:, features].T, new_rows[:, features].T, positions[:, features].T)
    pool = [np.concatenate([old[features], more], axis=1) for old, more in zip(kept, new, strict=True)]
    order = np.argsort(-_ranks(pool[0], pool[1], rank), axis=1, kind="stable")[:, : kept.value.shape[1]]
    for old, all_of_them in zip(kept, pool, strict=True):
        old[features] = np.take_along_axis(all_of_them, order, axis=1)


def of_all_processes(kept: Contexts, rank: Rank) -> Contexts:
    """Return the contexts that rank first of those that the processes kept, on each of them; all must call this."""
    pool = Contexts(*(np.concatenate(gathered(field.T)).T for field in kept))
    order = np.lexsort((pool.row, -_ranks(pool.value, pool.row, rank)))[:, : kept.value.shape[1]]
    return Contexts(*(np.take_along_axis(field, order, axis=1) for field in pool))


def by_value(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rank contexts by activation."""
    del rows
    return values


def at_random(seed: int) -> Rank:
    """Return a rank that keeps a uniform sample of the rows on which a feature is active."""
    return lambda values, rows: uniform(seed, rows)


def uniform(seed: int, *numbers: np.ndarray) -> Float[np.ndarray, "..."]:
    """Return a draw from [0, 1) for each tuple of integers: a hash, so it does not depend on order or batches.

    Source: the finalizer of SplitMix64 (Steele, Lea and Flood 2014), applied once per number.
    """
    state = np.uint64(seed)
    with np.errstate(over="ignore"):
        for number in numbers:
            state = _mix(state ^ (np.asarray(number).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
    return np.asarray((state >> np.uint64(11)) * 2.0**-53)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _ranks(values: np.ndarray, rows: np.ndarray, rank: Rank) -> np.ndarray:
    """Return ranks; inactive and missing contexts rank last."""
    return np.where(values > 0, rank(values, rows), -np.inf)

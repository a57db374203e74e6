"""Ratios of sums over stories, with confidence intervals that take a story, not a token, as the independent unit.

The tokens of a story depend on each other, so an interval from single tokens would be too narrow. What is added up are
totals of rows, a vector z_i of several quantities for row i; a measure is a ratio of two of their combinations:

    r = Σ a·z_i / Σ b·z_i            such as nats / targets, or (zero-ablated - spliced) / (zero-ablated - clean)
    e_i = (a - r b)·z_i
    margin = 1.96 sqrt(n / (n - 1) Σ e_i²) / |Σ b·z_i|

Source: the ratio estimator and its linearised variance, Cochran, Sampling Techniques (1977), section 6. Only Σ z_i and
Σ z_i z_iᵀ are kept, so rows stream through. The interval is a large-sample one: of a few dozen rows it is too narrow.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

NORMAL_95 = 1.959964
"""Half-width of the interval that holds 95 % of a standard normal variable."""


class Estimate(NamedTuple):
    """A measure and the half-width of its 95 % confidence interval; NaN where it is not defined."""

    value: float
    margin: float


class RowSums:
    """Sums over rows of named quantities, in float64."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._place = {name: i for i, name in enumerate(names)}
        self._rows = 0
        self._sum = np.zeros(len(names))
        self._products = np.zeros((len(names), len(names)))

    def add(self, totals: Float[np.ndarray, "rows quantities"]) -> None:
        """Add the totals of more rows, in the order of the names."""
        totals = totals.astype(np.float64)
        self._rows += len(totals)
        self._sum += totals.sum(axis=0)
        self._products += totals.T @ totals

    def total(self, name: str) -> float:
        """Return the sum of a quantity over all rows."""
        return float(self._sum[self._place[name]])

    def ratio(self, above: str, below: str) -> Estimate:
        """Return the ratio of two combinations, each a quantity (`"nats"`) or a difference (`"zeroed - clean"`)."""
        a, b = self._combination(above), self._combination(below)
        bottom = float(b @ self._sum)
        if bottom == 0:
            return Estimate(math.nan, math.nan)
        value = float(a @ self._sum) / bottom
        if self._rows < 2:
            return Estimate(value, math.nan)
        residual = a - value * b
        squares = max(0.0, float(residual @ self._products @ residual))  # rounding may leave it below 0
        return Estimate(value, NORMAL_95 * math.sqrt(self._rows / (self._rows - 1) * squares) / abs(bottom))

    def _combination(self, text: str) -> np.ndarray:
        weights = np.zeros(len(self._place))
        for sign, name in zip((1, -1), text.split(" - "), strict=False):
            weights[self._place[name]] += sign
        return weights

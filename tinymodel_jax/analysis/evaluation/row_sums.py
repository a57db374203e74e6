"""Ratios of sums over stories, with confidence intervals whose independent unit is the story, not the token.

The tokens of a story depend on each other, so an interval from single tokens would be too narrow. The sums here
are over rows, with a vector z_i of totals for row i. A measure is a ratio of two combinations of these totals:

    r = Σ a·z_i / Σ b·z_i            such as nats / targets, or (zero-ablated - spliced) / (zero-ablated - clean)
    e_i = (a - r b)·z_i
    margin = 1.96 sqrt(n / (n - 1) Σ e_i²) / |Σ b·z_i|

Source: the ratio estimator and its linearised variance, Cochran, Sampling Techniques (1977), section 6. Only Σ z_i and
Σ z_i z_iᵀ are kept, so rows stream through. The interval assumes many rows; with a few dozen it is too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped

from tinymodel_jax.runtime.collectives import summed

NORMAL_95 = 1.959964
"""Half-width of the interval that holds 95 % of a standard normal variable."""


class Estimate(NamedTuple):
    """A measure and the half-width of its 95 % confidence interval; NaN where it is not defined."""

    value: float
    """The measure, in its unit."""
    margin: float
    """Half-width of the interval, in the same unit."""


Quantity = str | tuple[str, str]
"""A quantity by its name, or the difference of two."""


class RowSums:
    """Sums over rows of named quantities, in float64."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._rows = 0
        self._sum = np.zeros(len(names))
        self._products = np.zeros((len(names), len(names)))

    def add(self, totals: Mapping[str, Shaped[Any, " rows"]], where: Bool[np.ndarray, " rows"] | None = None) -> None:
        """Add the totals of rows; with a mask, only of the rows where it is true."""
        columns = np.stack([np.asarray(totals[name], np.float64) for name in self._names], axis=1)
        columns = columns if where is None else columns[where]
        self._rows += len(columns)
        self._sum += columns.sum(axis=0)
        self._products += columns.T @ columns

    def add_other_processes(self) -> None:
        """Add the sums of all other processes, which must call this, too."""
        found = summed({"rows": np.array(self._rows), "sum": self._sum, "products": self._products})
        self._rows, self._sum, self._products = int(found["rows"]), found["sum"], found["products"]

    def total(self, name: str) -> float:
        """Return the sum of a quantity over all rows."""
        return float(self._sum[self._names.index(name)])

    def ratio(self, above: Quantity, below: Quantity) -> Estimate:
        """Return the ratio of two quantities or differences of quantities, such as `("zeroed", "clean")`."""
        a, b = self._weights(above), self._weights(below)
        bottom = float(b @ self._sum)
        if bottom == 0:
            return Estimate(math.nan, math.nan)
        value = float(a @ self._sum) / bottom
        if self._rows < 2:
            return Estimate(value, math.nan)
        residual = a - value * b
        squares = max(0.0, float(residual @ self._products @ residual))  # rounding may leave it below 0
        return Estimate(value, float(margin_of_ratio(squares, bottom, self._rows)))

    def _weights(self, quantity: Quantity) -> np.ndarray:
        plus, minus = (quantity, None) if isinstance(quantity, str) else quantity
        return np.array([(name == plus) - (name == minus) for name in self._names], np.float64)


def margin_of_ratio(squares: Any, below: float, n_rows: int) -> Any:
    """Return the half-width of the 95 % interval of a ratio of sums over rows.

    Args:
        squares: sum over rows of the squared residuals, `above - ratio * below` of the row.
        below: the sum below the line.
        n_rows: number of rows, 2 or more.
    """
    return NORMAL_95 * np.sqrt(n_rows / (n_rows - 1) * squares) / abs(below)

"""Ratios over rows: their values, and how often their intervals hold the truth."""

import math

import numpy as np
import pytest

from tinymodel_jax.analysis.evaluation.row_sums import RowSums


def stories(rng: np.random.Generator, count: int) -> np.ndarray:
    """Columns of nats, targets, zeroed: lengths of stories differ, and the tokens of a story share a difficulty."""
    targets = rng.integers(5, 60, count).astype(float)
    difficulty = rng.gamma(4, 0.5, count)  # mean 2
    noise = rng.normal(size=count) * np.sqrt(targets) * 0.3
    return np.stack([difficulty * targets + noise, targets, (difficulty + 3) * targets + noise], axis=1)


def named(totals: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(("nats", "targets", "zeroed"), totals.T, strict=True))


def test_a_ratio_is_that_of_the_sums_however_they_were_added():
    totals = stories(np.random.default_rng(0), 100)
    whole, parts = RowSums(("nats", "targets", "zeroed")), RowSums(("nats", "targets", "zeroed"))
    whole.add(named(totals))
    for part in np.split(totals, [1, 40]):
        parts.add(named(part))
    assert whole.ratio("nats", "targets").value == pytest.approx(totals[:, 0].sum() / totals[:, 1].sum())
    np.testing.assert_allclose(parts.ratio("nats", "targets"), whole.ratio("nats", "targets"))
    assert whole.ratio(("zeroed", "nats"), "targets").value == pytest.approx(3)
    assert whole.ratio(("zeroed", "nats"), "targets").margin == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("above", "below", "truth"), [("nats", "targets", 2), ("zeroed", "targets", 5), ("nats", ("zeroed", "nats"), 2 / 3)]
)
def test_about_95_of_100_intervals_hold_the_truth(above, below, truth):
    rng, held = np.random.default_rng(1), 0
    for _ in range(1000):
        sums = RowSums(("nats", "targets", "zeroed"))
        sums.add(named(stories(rng, 200)))
        found = sums.ratio(above, below)
        held += abs(found.value - truth) <= found.margin
    # 1,000 draws of probability 0.95 have a standard deviation of 6.9; three of them either way.
    assert 929 <= held <= 971


def test_an_interval_from_single_tokens_would_be_too_narrow():
    """The same totals, split into independent tokens, give intervals that hold the truth far less often."""
    totals = stories(np.random.default_rng(2), 200)
    by_row, by_token = RowSums(("nats", "targets", "zeroed")), RowSums(("nats", "targets", "zeroed"))
    by_row.add(named(totals))
    by_token.add(named(np.repeat(totals / totals[:, 1:2], totals[:, 1].astype(int), axis=0)))
    one, other = by_row.ratio("nats", "targets"), by_token.ratio("nats", "targets")
    assert one.value == pytest.approx(other.value)
    assert one.margin > 3 * other.margin


def test_without_rows_or_with_one_what_is_unknown_is_not_a_number():
    sums = RowSums(("nats", "targets"))
    assert all(map(math.isnan, sums.ratio("nats", "targets")))
    sums.add({"nats": np.array([3.0]), "targets": np.array([2.0])})
    value, margin = sums.ratio("nats", "targets")
    assert value == 1.5
    assert math.isnan(margin)

"""Attributions are the derivative of what turning a feature off does."""

import jax
import numpy as np
import pytest
from conftest import as_users_run_it

from tinymodel_jax.analysis.effects import sweeps
from tinymodel_jax.analysis.effects.attribution import attribute, rank_correlation
from tinymodel_jax.analysis.effects.metrics import logit_difference
from tinymodel_jax.model import interventions


def probability_of_five(logits, ids):
    """Return the probability of token 5, averaged over positions that are real in all rows."""
    return jax.nn.softmax(logits, axis=-1)[:, 2:6, 5].mean(axis=-1)


@pytest.mark.parametrize(
    ("tag", "metric"),
    [
        ("Ra1", "loss"),
        ("A1", "next_logprob"),
        ("M0", logit_difference(4, [1, 2, 3])),
        ("M0", probability_of_five),
    ],
)
def test_they_are_finite_differences_also_of_rows_of_different_lengths(lm, tok_ids, tag, metric):
    lm, ends = lm.splice(["Rm1"]), np.array([11, 8, 6])
    real = np.arange(11) < ends[:, None]
    ids = np.where(real, tok_ids, lm.config.pad_id)
    found = attribute(lm, tag, ids, metric=metric, next_ids=[1, 2, 3])
    step = 5e-3  # less than to the next kink: at 1 % more of a feature another ReLU has turned
    for place in np.argsort(-np.abs(found.change))[:3]:
        feature = int(found.features[place])

        def value(factor: float, feature: int = feature) -> float:
            hooks = interventions.scale_features(lm[tag].dictionary, feature, factor)
            logprobs = np.asarray(lm.run_with_hooks(ids, hooks)[0], np.float64)
            at_end = logprobs[[0, 1, 2], ends - 1]
            if metric == "next_logprob":
                return float(at_end[[0, 1, 2], [1, 2, 3]].mean())
            if metric is probability_of_five:
                return float(np.exp(logprobs[:, 2:6, 5]).mean())
            if metric != "loss":
                return float((at_end[:, 4] - at_end[[0, 1, 2], [1, 2, 3]]).mean())
            return -float(np.take_along_axis(logprobs[:, :-1], ids[:, 1:, None], axis=-1)[real[:, 1:]].mean())

        slope = (value(1 - step) - value(1 + step)) / (2 * step)
        assert found.change[place] == pytest.approx(slope, rel=2e-2, abs=1e-4)


def test_at_the_last_layer_s_output_the_rank_of_the_estimate_is_that_of_the_effect(lm, tok_ids):
    estimate = attribute(lm, "M1", tok_ids, metric="next_logprob")
    effect = sweeps.ablate(lm, "M1", tok_ids)
    np.testing.assert_array_equal(estimate.features, effect.features)
    assert rank_correlation(estimate.change, effect.next_logprob) > 0.8


def test_rank_correlation_sees_order_only_and_shares_the_ranks_of_ties():
    values = np.array([3.0, 1.0, 2.0, 5.0])
    assert rank_correlation(values, np.exp(values)) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)
    assert rank_correlation(np.array([0.0, 1, 1, 2]), np.arange(4.0)) == pytest.approx(4.5 / 22.5**0.5)
    assert np.isnan(rank_correlation(np.ones(3), np.arange(3.0)))


def test_an_unknown_metric_is_refused(lm, tok_ids):
    with as_users_run_it(), pytest.raises(ValueError, match="metric='kl'; expected 'loss', 'next_logprob', logit_diff"):
        attribute(lm, "M1", tok_ids, metric="kl")  # pyright: ignore[reportArgumentType]

"""A dictionary's metrics: what they are for known dictionaries, and what they must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinymodel_jax.analysis.evaluation.metrics import DictionaryMetrics, finalize_stats, update_stats, zero_stats

F32 = 1e-5


@pytest.fixture(scope="module")
def data():
    key = jax.random.key(0)
    target = jax.random.normal(key, (64, 8)) + 30  # a mean far from 0, as a residual stream has
    prediction = target + 0.3 * jax.random.normal(jax.random.fold_in(key, 1), target.shape)
    acts = jax.nn.relu(jax.random.normal(jax.random.fold_in(key, 2), (64, 12)) - 1).at[:, 3].set(0)
    return target, prediction, acts


def measure(target, prediction, acts, mask=None) -> DictionaryMetrics:
    return finalize_stats(update_stats(zero_stats(acts.shape[-1], target.shape[-1]), target, prediction, acts, mask))


def test_metrics_equal_their_formulas_in_float64(data):
    target, prediction, acts = (np.asarray(a, np.float64) for a in data)
    found = measure(*data)
    explained = 1 - ((target - prediction) ** 2).sum() / ((target - target.mean(axis=0)) ** 2).sum()
    assert found.explained_variance == pytest.approx(explained, abs=F32)
    assert found.l0 == pytest.approx((acts > 0).sum(axis=1).mean(), abs=F32)
    assert found.dead_fraction == pytest.approx(1 / 12)
    np.testing.assert_allclose(found.frequency, (acts > 0).mean(axis=0), atol=F32)


def test_a_perfect_dictionary_explains_everything_and_the_mean_nothing(data):
    target, _, acts = data
    assert measure(target, target, acts).explained_variance == 1
    mean = jnp.broadcast_to(target.mean(axis=0), target.shape)
    assert measure(target, mean, acts).explained_variance == pytest.approx(0, abs=F32)


def test_explained_variance_does_not_depend_on_the_scale(data):
    target, prediction, acts = data
    assert measure(target * 1000, prediction * 1000, acts).explained_variance == pytest.approx(
        float(measure(*data).explained_variance), abs=F32
    )


@pytest.mark.parametrize("cuts", [[32], [1], [5, 9, 60]])
def test_metrics_do_not_depend_on_how_the_data_is_batched(data, cuts):
    stats = zero_stats(12, 8)
    for target, prediction, acts in zip(*(np.split(np.asarray(a), cuts) for a in data), strict=True):
        stats = update_stats(stats, jnp.asarray(target), jnp.asarray(prediction), jnp.asarray(acts))
    for split, whole in zip(finalize_stats(stats), measure(*data), strict=True):
        np.testing.assert_allclose(split, whole, atol=F32)


def test_masked_positions_do_not_count(data):
    target, prediction, acts = (a.reshape(4, 16, -1) for a in data)
    mask = jnp.arange(16) < jnp.array([[16], [3], [0], [9]])
    spoiled = jnp.where(mask[..., None], prediction, 1e6)
    for masked, kept in zip(
        measure(target, spoiled, acts, mask), measure(*(a[mask] for a in (target, prediction, acts))), strict=True
    ):
        np.testing.assert_allclose(masked, kept, atol=F32)


def test_metrics_of_no_data_are_not_numbers():
    found = finalize_stats(zero_stats(3, 2))
    assert all(bool(jnp.isnan(value).all()) for value in found)

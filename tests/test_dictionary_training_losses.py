"""Every term of the dictionary loss against a closed form or an independent sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinymodel_jax.training import dictionary_losses as losses

F32 = 1e-5


def test_squared_error_sums_over_the_width_and_averages_over_inputs_and_prefixes():
    target = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    prediction = jnp.array([[[0.0, 0.0], [1.0, 2.0]], [[3.0, 4.0], [3.0, 2.0]]])
    assert losses.squared_error(target, prediction) == pytest.approx((5 + 0 + 0 + 4) / 4)


def test_l1_penalty_weighs_activations_by_decoder_norms():
    acts, rows = jnp.array([[1.0, 2.0], [0.0, 4.0]]), jnp.array([[3.0, 4.0], [0.0, 0.5]])
    assert losses.l1_penalty(acts, losses.row_norms(rows)) == pytest.approx((1 * 5 + 6 * 0.5) / 2)


def test_log_penalty_is_the_log_of_one_plus_weighted_activations():
    acts, norms, shares = jnp.array([[1.0, 0.0], [3.0, 2.0]]), jnp.array([2.0, 0.5]), jnp.array([1.0, 0.5])
    assert losses.log_penalty(acts, norms, shares) == pytest.approx((np.log(3) + np.log(7) + 0.5 * np.log(2)) / 2)


def test_a_zero_row_has_norm_zero_and_a_finite_gradient():
    gradient = jax.grad(lambda rows: losses.row_norms(rows).sum())(jnp.array([[0.0, 0.0], [3.0, 4.0]]))
    np.testing.assert_allclose(gradient, [[0, 0], [0.6, 0.8]], atol=F32)


def test_jump_passes_what_exceeds_the_threshold_and_estimates_the_thresholds_gradient():
    z, threshold = jnp.array([[0.9, 3.0], [1.04, 0.0], [5.0, 2.0]]), jnp.array([1.0, 2.0])
    upstream = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    out, pull = jax.vjp(lambda z, t: losses.jump(z, t, 0.1), z, threshold)
    np.testing.assert_allclose(np.asarray(out), [[0, 3], [1.04, 0], [5, 0]])
    z_gradient, threshold_gradient = pull(upstream)
    np.testing.assert_allclose(z_gradient, [[0, 2], [3, 0], [5, 0]])
    # only 1.04 (first feature) and 2.0 (second) lie within 0.05 of the threshold: -theta / 0.1 * upstream
    np.testing.assert_allclose(threshold_gradient, [-1 / 0.1 * 3, -2 / 0.1 * 6], rtol=F32)


def test_mean_l0_counts_features_and_estimates_the_thresholds_gradient():
    z, threshold = jnp.array([[0.98, 3.0], [1.04, 0.0]]), jnp.array([1.0, 2.0])
    l0, gradients = jax.value_and_grad(lambda z, t: losses.mean_l0(z, t, 0.1), argnums=(0, 1))(z, threshold)
    assert l0 == 1.0
    np.testing.assert_array_equal(gradients[0], np.zeros((2, 2)))
    np.testing.assert_allclose(gradients[1], [-1 / 0.1, 0], rtol=F32)  # both inputs near the first threshold


def test_the_threshold_estimate_is_the_gradient_of_the_expected_l0():
    """For uniform z the expected number above theta falls by the density of z: the estimate must agree."""
    z = jnp.linspace(0, 4, 200_001)[:, None]  # density 1/4
    gradient = jax.grad(lambda t: losses.mean_l0(z, t, 0.2))(jnp.array([1.0]))
    np.testing.assert_allclose(gradient, [-0.25], rtol=1e-3)


def test_target_l0_loss_is_the_squared_relative_distance():
    assert losses.target_l0_loss(jnp.float32(30), jnp.float32(20)) == pytest.approx(0.25)


def test_aux_loss_is_the_share_of_the_residuals_variance_left():
    residual = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]) + 7
    zero = jnp.zeros((4, 2))
    # predicting nothing leaves variance 10 and four times the squared mean, 98
    assert losses.aux_loss(residual, zero) == pytest.approx((10 + 4 * 98) / 10, rel=F32)
    assert losses.aux_loss(residual, zero + 7) == pytest.approx(1, rel=F32)
    assert losses.aux_loss(residual, residual) == 0
    scaled = losses.aux_loss(residual * 100, zero + 700)
    assert scaled == pytest.approx(1, rel=F32)


def test_variance_does_not_depend_on_the_mean():
    target = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    assert losses.variance(target) == pytest.approx(10 / 4, rel=F32)
    assert losses.variance(target + 50) == pytest.approx(10 / 4, rel=1e-3)


def test_prefix_shares_say_in_how_many_prefixes_a_feature_is():
    np.testing.assert_allclose(losses.prefix_shares(jnp.array([1, 3, 4]), 4), [1, 2 / 3, 2 / 3, 1 / 3], rtol=F32)


def test_random_widths_are_between_one_and_all_end_with_all_and_reach_every_scale():
    draws = np.stack([losses.random_widths(jax.random.key(seed), 5, 1000) for seed in range(200)])
    assert (draws[:, -1] == 1000).all()
    assert draws.min() >= 1
    assert draws.max() <= 1000
    shares = [((draws[:, :-1] > low) & (draws[:, :-1] <= 10 * low)).mean() for low in (1, 10, 100)]
    np.testing.assert_allclose(shares, [1 / 3, 1 / 3, 1 / 3], atol=0.06)  # log-uniform: a third for each decade


@pytest.mark.parametrize("drawn", [False, True])
def test_decode_prefixes_uses_only_the_first_features_of_each_prefix(drawn):
    acts, W_dec = jax.random.normal(jax.random.key(0), (5, 9)), jax.random.normal(jax.random.key(1), (9, 4))
    widths = (2, 3, 9)

    def decode(acts, W_dec):
        return losses.decode_prefixes(acts, W_dec, jnp.array(widths) if drawn else widths)

    def plain(acts, W_dec):
        return jnp.stack([acts[:, :w] @ W_dec[:w] for w in widths], axis=1)

    upstream = jax.random.normal(jax.random.key(2), (5, 3, 4))
    out, pull = jax.vjp(decode, acts, W_dec)
    wanted, wanted_pull = jax.vjp(plain, acts, W_dec)
    np.testing.assert_allclose(np.asarray(out), wanted, atol=F32)
    for found, want in zip(pull(upstream), wanted_pull(upstream), strict=True):
        np.testing.assert_allclose(found, want, atol=F32)

"""The KL divergence of changed logits equals that of float64, however small or large the changes are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from tinymodel_jax.analysis.effects.upper_layers import kl_of_changes

F32 = 1e-5
compiled = jax.jit(kl_of_changes)


def in_float64(change: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the change without its mean, and the KL divergence by its definition."""
    logprobs = logprobs - logsumexp(logprobs)
    changed = logprobs + change
    changed = changed - logsumexp(changed)
    return change - np.exp(logprobs) @ change, float(np.exp(logprobs) @ (logprobs - changed))


def found(change: np.ndarray, logprobs: np.ndarray) -> float:
    one, other = (jnp.asarray(array, jnp.float32) for array in (change, logprobs))
    return float(compiled(one[None, None, None], other[None, None])[0, 0, 0])


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 20.0, 60.0, 100.0, 1000.0])
def test_changes_of_every_size(size):
    rng = np.random.default_rng(0)
    for _ in range(20):
        logprobs = rng.normal(size=50) * 20
        logprobs -= logsumexp(logprobs)
        change, expected = in_float64(rng.normal(size=50) * size, logprobs)
        assert found(change, logprobs) == pytest.approx(expected, rel=F32, abs=F32 * size**2)


@pytest.mark.parametrize("logprob", [-59.0, -61.0, -80.0, -88.0, -120.0])
@pytest.mark.parametrize("above", [-30.0, -1.0, 0.0, 0.6, 30.0])
def test_a_token_that_the_model_excluded_is_raised(logprob, above):
    """Its probability, and even exp of the log-probability, may be 0 in float32."""
    logprobs = np.array([0.0, logprob])
    change, expected = in_float64(np.array([0.0, above - logprob]), logprobs)
    assert found(change, logprobs) == pytest.approx(expected, rel=F32, abs=1e-7)


def test_what_is_not_finite_stays_so():
    assert np.isnan(found(np.array([0.0, np.nan]), np.log([0.5, 0.5])))

"""Direct logit effects are what a feature's direction adds to the logits, past later layers."""

import numpy as np
import pytest
from conftest import as_users_run_it

from tinymodel_jax import interventions
from tinymodel_jax.analysis import logit_effects as module
from tinymodel_jax.analysis.logit_effects import logit_effects


@pytest.mark.parametrize("tag", ["M1", "Ra1", "A1"])
def test_tokens_are_sorted_by_the_centred_product(lm, tag, monkeypatch):
    monkeypatch.setattr(module, "TOGETHER", 5)
    found = logit_effects(lm, tag, top=4)
    effects = np.asarray(lm[tag].dictionary.params["W_dec"]) @ np.asarray(lm.params["W_U"])
    effects = effects - effects.mean(axis=1, keepdims=True)
    order = effects.argsort(axis=1)
    np.testing.assert_array_equal(found.features, np.arange(12))
    np.testing.assert_array_equal(found.promoted, order[:, ::-1][:, :4])
    np.testing.assert_array_equal(found.suppressed, order[:, :4])
    np.testing.assert_allclose(found.promoted_effect, np.take_along_axis(effects, found.promoted, 1), rtol=1e-4)
    np.testing.assert_allclose(found.suppressed_effect, np.take_along_axis(effects, found.suppressed, 1), rtol=1e-4)


def test_in_the_last_layer_it_is_the_whole_effect(lm, tok_ids):
    """Nothing comes after the last MLP: clamping the feature 1 higher moves the centred logits by the effect."""
    dictionary = lm["M1"].dictionary
    found = logit_effects(lm, "M1", top=23, features=np.array([5]))
    name = dictionary.config.hook_out
    steered, _ = lm.run_with_hooks(tok_ids, interventions.steer(name, dictionary.params["W_dec"][5]))
    moved = np.asarray(steered - lm(tok_ids))
    moved = moved - moved.mean(axis=-1, keepdims=True)
    expected = np.broadcast_to(found.promoted_effect[0], (*tok_ids.shape, 23))
    np.testing.assert_allclose(moved[..., found.promoted[0]], expected, atol=1e-4)


def test_bad_input_is_one_line(lm):
    with as_users_run_it():
        with pytest.raises(ValueError, match=r"feature 12 is out of range"):
            logit_effects(lm, "M1", features=np.array([12]))
        with pytest.raises(ValueError, match=r"top=24 is outside 1\.\.23"):
            logit_effects(lm, "M1", top=24)

"""Direct logit effects are what a feature's direction adds to the logits, past later layers."""

import numpy as np
import pytest
from conftest import as_users_run_it, make_dictionary
from oracle import forward

from tinymodel_jax.analysis.search import logit_effects as module
from tinymodel_jax.analysis.search.logit_effects import logit_effects
from tinymodel_jax.params import flatten


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
    edits = {dictionary.config.hook_out: lambda value, seen: value + np.asarray(dictionary.params["W_dec"][5])}
    steered, plain = (forward(flatten(lm.params), lm.config, tok_ids, edit)[0] for edit in (edits, None))
    moved = steered - plain
    moved = moved - moved.mean(axis=-1, keepdims=True)
    expected = np.broadcast_to(found.promoted_effect[0], (*tok_ids.shape, 23))
    np.testing.assert_allclose(moved[..., found.promoted[0]], expected, atol=1e-4)


def test_features_heads_errors_embeddings_and_biases_add_up_to_the_logits(lm, tok_ids):
    """There is no layer norm, so what each part writes to the stream, times W_U, is its share of every logit."""
    lm.attach("M0", make_dictionary("blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out", seed=3))
    names = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.hook_z", "hook_mlp_in", "hook_mlp_out")]
    _, kept = lm.run_with_cache(tok_ids, names)
    acts, W_O, b_O = {name: np.asarray(array) for name, array in kept.items()}, np.asarray(lm.W_O), np.asarray(lm.b_O)
    written = {"tokens": np.asarray(lm.W_E)[tok_ids], "positions": np.asarray(lm.W_pos)[: tok_ids.shape[1]]}
    for layer in range(2):
        dictionary, block = lm[f"M{layer}"].dictionary, f"blocks.{layer}"
        for head in range(2):
            written[f"head {layer}.{head}"] = acts[f"{block}.attn.hook_z"][:, :, head] @ W_O[layer, head]
        written[f"attention bias {layer}"] = b_O[layer]
        features, W_dec = np.asarray(lm[f"M{layer}"](tok_ids)), np.asarray(dictionary.params["W_dec"])
        for feature in range(12):
            written[f"feature {layer}.{feature}"] = features[..., feature, None] * W_dec[feature]
        written[f"decoder bias {layer}"] = np.asarray(dictionary.params["b_dec"])
        written[f"error {layer}"] = acts[f"{block}.hook_mlp_out"] - np.asarray(dictionary(kept[f"{block}.hook_mlp_in"]))
    shares = {name: np.asarray(value @ np.asarray(lm.W_U), np.float64) for name, value in written.items()}
    total = sum(shares.values()) + np.asarray(lm.b_U, np.float64)
    np.testing.assert_allclose(total, lm.logits(tok_ids), rtol=1e-4, atol=1e-4)
    moved = [name for name, share in shares.items() if np.abs(share).max() > 1e-2]
    assert sum(name.startswith("feature") for name in moved) > 12
    assert {"tokens", "positions", "head 0.0", "head 1.1", "error 0", "error 1", "decoder bias 1"} <= {*moved}


def test_one_feature_may_be_named_alone(lm):
    alone, listed = logit_effects(lm, "M1", 3, 2), logit_effects(lm, "M1", 3, np.array([2]))
    for one, other in zip(alone, listed, strict=True):
        np.testing.assert_array_equal(one, other)


def test_bad_input_is_one_line(lm):
    with as_users_run_it():
        with pytest.raises(ValueError, match=r"feature 12 is out of range"):
            logit_effects(lm, "M1", features=np.array([12]))
        with pytest.raises(ValueError, match=r"top=24 is outside 1\.\.23"):
            logit_effects(lm, "M1", top=24)
        with pytest.raises(ValueError, match=r"'M1N5' names a feature; name the site, 'M1'"):
            logit_effects(lm, "M1N5")

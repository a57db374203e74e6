"""SAEs that normalize their input: their features write more where the input is larger, in edits, splices and sweeps.

Analyses that follow linear maps refuse them, and SAEs with a skip connection.
"""

import numpy as np
import oracle
import pytest
from conftest import as_users_run_it, make_dictionary
from oracle import F32, assert_close, error_of

from tinymodel_jax.analysis import circuits
from tinymodel_jax.analysis.effects import sweeps
from tinymodel_jax.analysis.effects.attribution import attribute
from tinymodel_jax.analysis.effects.direct_logit_attribution import direct_logit_attribution
from tinymodel_jax.analysis.evaluation.sparse_lm import export_sparse_lm
from tinymodel_jax.analysis.report.dashboard.weights_graph import weights_graph
from tinymodel_jax.analysis.search.logit_effects import logit_effects
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.model import interventions
from tinymodel_jax.training.dictionary_recipe import recipe_preset
from tinymodel_jax.training.warm_start import require_fit

HOOK = "blocks.1.hook_resid_mid"


@pytest.fixture(params=["layer_norm", "constant_norm"])
def normalized(request, lm):
    """The tiny model with a normalizing SAE at Rm1."""
    lm.attach("Rm1", make_dictionary(HOOK, HOOK, 3, normalize=request.param, subtract_b_dec=True))
    return lm


def size(x, normalize):
    """Return what an input is divided by."""
    return np.std(x, axis=-1, ddof=1) if normalize == "layer_norm" else np.linalg.norm(x, axis=-1) / 4


def test_the_change_of_an_activation_is_written_at_the_size_of_the_input(normalized, tok_ids):
    dictionary = normalized["Rm1"].dictionary
    config, params = dictionary.config, dictionary.params
    edit = interventions.clamp(dictionary, [2, 5], 1.5)
    x = np.asarray(normalized.run_with_cache(tok_ids, HOOK)[1][HOOK], np.float64)
    change = 1.5 - oracle.encode(params, config, x)[..., [2, 5]]
    written = change @ np.asarray(params["W_dec"], np.float64)[[2, 5]] * size(x, config.normalize)[..., None]
    assert_close(normalized.run_with_hooks(tok_ids, edit, [HOOK])[1][HOOK], x + written, F32)
    through = normalized.splice("Rm1").run_with_hooks(tok_ids, edit, [HOOK])[1][HOOK]
    assert_close(through, oracle.reconstruct(params, config, x) + written, F32)


def test_logit_effects_are_those_at_an_input_of_size_1(lm, tok_ids):
    hook = "blocks.1.hook_mlp_out"  # nothing comes after it
    dictionary = make_dictionary(hook, hook, 3, normalize="layer_norm")
    lm.attach("Mo1", dictionary)
    found = logit_effects(lm, "Mo1", lm.config.d_vocab, 5)
    assert found.unit == "one unit of activation at an input of size 1"
    edit = interventions.clamp(dictionary, 5, 1.5)
    (clean, kept), (edited, _) = (lm.run_with_hooks(tok_ids, hooks, [hook]) for hooks in ({}, edit))
    x = np.asarray(kept[hook], np.float64)
    change = 1.5 - oracle.encode(dictionary.params, dictionary.config, x)[..., 5]
    moved = np.asarray(edited, np.float64) - np.asarray(clean)
    moved = moved - moved.mean(axis=-1, keepdims=True)
    expected = (change * size(x, "layer_norm"))[..., None] * found.promoted_effect[0]
    np.testing.assert_allclose(moved[..., found.promoted[0]], expected, atol=1e-4)


def test_sweeps_and_attributions_are_those_of_the_edits(normalized, tok_ids):
    row, dictionary = tok_ids[:1], normalized["Rm1"].dictionary
    effects = sweeps.ablate(normalized, "Rm1", row, metric="loss")
    held = sweeps.clamp(normalized, "Rm1", row, 0.7, effects.features, metric="loss")
    estimate = attribute(normalized, "Rm1", row, effects.features)
    assert effects.metric is not None
    assert held.metric is not None
    for place, feature in list(enumerate(effects.features.tolist()))[:3]:

        def loss(edit, *amount, feature=feature):
            return float(normalized.loss(row, hooks=edit(dictionary, feature, *amount)))

        clean, step = float(normalized.loss(row)), 5e-3
        assert effects.metric[place] == pytest.approx(loss(interventions.ablate) - clean, abs=1e-5)
        assert held.metric[place] == pytest.approx(loss(interventions.clamp, 0.7) - clean, abs=1e-5)
        factors = (1 - step, 1 + step)
        low, high = (loss(interventions.scale_features, factor) for factor in factors)
        assert estimate.change[place] == pytest.approx((low - high) / (2 * step), rel=2e-2, abs=2e-4)


@pytest.mark.usefixtures("no_type_checks")
def test_what_follows_linear_maps_refuses_it_by_name(normalized, tok_ids):
    says = "the dictionary that reads blocks.1.hook_resid_mid divides its input by its size (normalize="
    for call in (
        lambda: direct_logit_attribution(normalized, tok_ids, [1], "Rm1"),
        lambda: circuits.virtual_weights(normalized, "Rm1", "M1"),
        lambda: circuits.virtual_weights(normalized, "M0", "Rm1"),
    ):
        assert says in error_of(call)
    graph = weights_graph(normalized, "Rm1", ["M0", "M1"])
    assert graph.upstream == graph.downstream == {}
    config = normalized["Rm1"].dictionary.config
    recipe = recipe_preset("house", "relu", 12, 10, sparsity=1.0)
    assert "it normalizes its input" in error_of(lambda: require_fit(config, recipe, 16, 16))


@pytest.mark.usefixtures("no_type_checks")
def test_a_transcoder_that_normalizes_is_neither_frozen_nor_an_mlp(lm, tok_ids):
    lm.attach("M1", make_dictionary("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out", normalize="layer_norm"))
    assert "circuits: the dictionary that reads blocks.1.hook_mlp_in" in error_of(
        lambda: circuits.attribution_graph(lm, tok_ids[0])
    )
    assert "it normalizes its input (normalize='layer_norm')" in error_of(lambda: export_sparse_lm(lm, ["M1"]))
    assert "so its pre-activations are not linear" in error_of(lambda: circuits.virtual_weights(lm, "M0", "M1"))


def test_an_sae_with_a_skip_connection_is_spliced_and_not_divided(lm, tok_ids):
    for tag in ("A1", "Mo1"):
        site = Site.whole(tag)
        lm.attach(tag, make_dictionary(site.hook_in, site.hook_out, skip=True))
    through = lm.splice("Mo1").run_with_cache(tok_ids, "blocks.1.hook_mlp_out")[1]["blocks.1.hook_mlp_out"]
    value = lm.run_with_cache(tok_ids, "blocks.1.hook_mlp_out")[1]["blocks.1.hook_mlp_out"]
    dictionary = lm["Mo1"].dictionary
    assert_close(through, oracle.reconstruct(dictionary.params, dictionary.config, value), F32)
    with as_users_run_it():
        for call in (
            lambda: direct_logit_attribution(lm, tok_ids, [1], "Mo1"),
            lambda: circuits.attribution_graph(lm, tok_ids[0], dictionaries=["A1"]),
        ):
            assert "has a skip connection, so it predicts a part of the value from the value itself" in error_of(call)

"""The sparse model: its evaluation equals that of the spliced model, and so does the exported model."""

import dataclasses

import numpy as np
import pytest
from conftest import as_users_run_it, make_dictionary

from tinymodel_jax import TinyModel
from tinymodel_jax.analysis.evaluation.sparse_lm import evaluate_sparse_model, export_sparse_lm
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.io.convert import export_model
from tinymodel_jax.params import flatten

F32 = 1e-5


def transcoder(layer: int, seed: int, **options) -> Dictionary:
    return make_dictionary(f"blocks.{layer}.hook_mlp_in", f"blocks.{layer}.hook_mlp_out", seed, **options)


def with_transcoders(lm: TinyModel, *options: dict) -> TinyModel:
    lm = lm.splice([])
    for layer, chosen in enumerate(options):
        lm.attach(f"M{layer}", transcoder(layer, layer, **chosen))
    return lm


KINDS = {
    "relu": {},
    "jumprelu": {"architecture": "jumprelu"},
    "batch_topk": {"architecture": "batch_topk", "k": 3},
    "gated": {"architecture": "gated"},
    "subtract_b_dec": {"architecture": "jumprelu", "subtract_b_dec": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_model_is_the_spliced_one_and_its_neurons_are_features(lm, tok_ids, kind):
    lm = with_transcoders(lm, KINDS[kind], {**KINDS[kind], "n_features": 20})
    sparse = export_sparse_lm(lm)
    spliced = lm.splice(["M0", "M1"])
    np.testing.assert_allclose(sparse(tok_ids), spliced(tok_ids), atol=F32)
    assert sparse.config.d_mlp == 20
    assert sparse.config.mlp_activation == ("relu" if kind == "relu" else "jumprelu")
    neurons = sparse.run_with_cache(tok_ids, "blocks.1.mlp.hook_post")[1]["blocks.1.mlp.hook_post"]
    features = np.asarray(spliced["M1"](tok_ids))
    np.testing.assert_allclose(neurons, features, atol=F32)
    assert 0 < (features > 0).mean() < 1
    silent = sparse.run_with_cache(tok_ids, "blocks.0.mlp.hook_post")[1]["blocks.0.mlp.hook_post"][..., 12:]
    assert silent.shape[-1] == 8
    assert not np.any(silent)


def test_thresholds_are_per_neuron_and_layers_without_a_transcoder_stay(lm, tok_ids):
    lm = with_transcoders(lm, {"architecture": "jumprelu"}, {})
    sparse = export_sparse_lm(lm, ["M0"])
    np.testing.assert_allclose(sparse(tok_ids), lm.splice("M0")(tok_ids), atol=F32)
    assert sparse.config.d_mlp == lm.config.d_mlp
    assert np.asarray(sparse.params["blocks_0"]["mlp"]["threshold"])[:12].std() > 0
    assert not np.any(sparse.params["blocks_1"]["mlp"]["threshold"])
    both = export_sparse_lm(lm)
    np.testing.assert_allclose(both(tok_ids), lm.splice(["M0", "M1"])(tok_ids), atol=F32)


def test_it_is_saved_loaded_and_generates_as_any_model(lm, tok_ids, tmp_path):
    lm = with_transcoders(lm, {"architecture": "batch_topk", "k": 3}, {})
    sparse = export_sparse_lm(lm)
    sparse.save_pretrained(tmp_path / "sparse")
    again = TinyModel(tmp_path / "sparse")
    assert again.config == sparse.config
    np.testing.assert_array_equal(again(tok_ids), sparse(tok_ids))
    greedy = {"n_toks": 4, "temperature": 0.0}
    np.testing.assert_array_equal(
        again.generate_ids(tok_ids, **greedy), lm.splice(["M0", "M1"]).generate_ids(tok_ids, **greedy)
    )
    assert sum(leaf.size for leaf in flatten(sparse.params).values()) == sparse.config.n_params


def test_the_bundled_transcoders_make_a_model_that_tells_the_spliced_model_s_story():
    lm = TinyModel("mini")
    sparse = export_sparse_lm(lm)
    spliced = lm.splice(["M0", "M1", "M2", "M3"])
    ids = np.asarray(lm.tokenizer(["Once upon a time there was a dog.", "Mia went to the lake."])[0])
    np.testing.assert_allclose(sparse(ids), spliced(ids), rtol=F32, atol=F32)  # down to -20
    assert sparse.generate("Once upon a time", 20, 0.0) == spliced.generate("Once upon a time", 20, 0.0)


def test_one_whole_dictionary_a_layer_is_exported(lm, tok_ids):
    lm.attach("T1", transcoder(1, 7))
    np.testing.assert_array_equal(export_sparse_lm(lm, "M1")(tok_ids), export_sparse_lm(lm, ["M1"])(tok_ids))
    with as_users_run_it():
        with pytest.raises(ValueError, match="M1 and T1 are dictionaries of one MLP"):
            export_sparse_lm(lm, ["M1", "T1"])
        with pytest.raises(ValueError, match="'M1N5' names a feature; name the site, 'M1'"):
            export_sparse_lm(lm, ["M1N5"])
        half = TinyModel.from_params(dataclasses.replace(lm.config, dtype="bfloat16"), lm.params)
        half.attach("M1", transcoder(1, 7))
        with pytest.raises(ValueError, match="computes in bfloat16"):
            export_sparse_lm(half, "M1")


def test_sites_of_the_sparse_model_may_be_one_tag_but_not_spliced_already(lm, tok_ids):
    assert evaluate_sparse_model(lm, tok_ids, "M1") == evaluate_sparse_model(lm, tok_ids, ["M1"])
    with as_users_run_it(), pytest.raises(ValueError, match=r"spliced at blocks\.1\.hook_mlp_out"):
        evaluate_sparse_model(lm.splice("M1"), tok_ids, "M1")
    with as_users_run_it(), pytest.raises(ValueError, match="no site is named"):
        evaluate_sparse_model(lm, tok_ids, [])


def test_what_is_no_neuron_is_refused(lm):
    with as_users_run_it():
        for options, says in (({"architecture": "topk", "k": 3}, "k largest"), ({"skip": True}, "skip connection")):
            with pytest.raises(ValueError, match=says):
                export_sparse_lm(with_transcoders(lm, options, {}))
        with pytest.raises(ValueError, match="'A1' is not a transcoder of an MLP"):
            export_sparse_lm(lm, ["A1"])
        with pytest.raises(ValueError, match="spliced at M0"):
            export_sparse_lm(lm.splice("M0"))
        sparse = export_sparse_lm(with_transcoders(lm, {"architecture": "jumprelu"}, {}))
        with pytest.raises(ValueError, match="ReLU only"):
            export_model(sparse.config, {})
        with pytest.raises(ValueError, match="mlp_activation 'gelu' is unknown"):
            dataclasses.replace(lm.config, mlp_activation="gelu")


def test_the_sparse_model_is_measured_as_the_facade_measures_it(lm, tok_ids):
    found = evaluate_sparse_model(lm, tok_ids)
    spliced = lm.splice(["M0", "M1"])
    clean, through = np.asarray(lm(tok_ids)), np.asarray(spliced(tok_ids))
    kl = (np.exp(clean) * (clean - through)).sum(axis=-1)[:, :-1].mean()
    assert found.ce_clean == pytest.approx(float(lm.loss(tok_ids)), abs=F32)
    assert found.ce_sparse == pytest.approx(float(spliced.loss(tok_ids)), abs=F32)
    assert found.kl == pytest.approx(kl, abs=F32)
    assert found.ce_with_errors == pytest.approx(found.ce_clean, abs=F32)
    assert found.kl_with_errors == pytest.approx(0, abs=F32)
    expected = (found.ce_zero_ablated - found.ce_sparse) / (found.ce_zero_ablated - found.ce_clean)
    assert found.ce_recovered == pytest.approx(expected, rel=F32)
    assert set(found.margins) == set(found._fields) - {"margins"}

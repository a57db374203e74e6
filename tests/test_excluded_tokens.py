"""Tokens that a dictionary excludes: features are inactive, splices keep the value, statistics leave them out."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_dictionary
from oracle import F32, assert_close, error_of

from tinymodel_jax.analysis.effects import sweeps
from tinymodel_jax.analysis.evaluation import evaluate, export_sparse_lm
from tinymodel_jax.analysis.search.top_activations import top_activations
from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.model import interventions

EXCLUDED = (3, 19)
"""An id of text, and `[BEGIN]`."""
TAGS = ("Rm1", "M1")


@pytest.fixture
def ids(tok_ids) -> np.ndarray:
    ids = tok_ids.copy()
    ids[:, 0], ids[:, 5] = 19, 3
    return ids


def excluding(lm, tag: str) -> Dictionary:
    """Attach the model's dictionary again, with excluded tokens."""
    dictionary = lm[tag].dictionary
    lm.attach(tag, Dictionary.from_params(dataclasses.replace(dictionary.config, exclude=EXCLUDED), dictionary.params))
    return lm[tag].dictionary


def by_hand(lm, ids, dictionary, change):
    """Run the model with the value at `hook_out` changed by `change(x, y)`, except at excluded tokens."""
    config = dictionary.config
    acting = ~np.isin(ids, EXCLUDED)[..., None]

    def hook(value, acts):
        x = acts[config.hook_in] if config.is_transcoder else value
        return jnp.where(acting, change(x, value), value)

    return lm.run_with_hooks(ids, {config.hook_out: hook})[0]


@pytest.mark.parametrize("tag", TAGS)
def test_features_are_inactive_there(lm, ids, tag):
    before = np.asarray(lm[tag](ids))
    excluding(lm, tag)
    acting = ~np.isin(ids, EXCLUDED)
    assert before[~acting].any()
    assert_close(lm[tag](ids), np.where(acting[..., None], before, 0), F32)
    assert_close(lm[f"{tag}N2"](ids), np.where(acting, before[..., 2], 0), F32)


@pytest.mark.parametrize("tag", TAGS)
def test_a_splice_keeps_the_value_there(lm, ids, tag):
    everywhere = np.asarray(lm.splice(tag)(ids))
    dictionary = excluding(lm, tag)
    expected = by_hand(lm, ids, dictionary, lambda x, y: dictionary(x))
    assert_close(lm.splice(tag)(ids), expected, F32)
    assert_close(lm.run_with_hooks(ids, interventions.splice(dictionary))[0], expected, F32)
    assert_close(lm.splice(tag, exclude=())(ids), everywhere, F32)


def test_a_splice_may_exclude_other_tokens_than_the_dictionary(lm, ids):
    expected = lm.splice("M1", exclude=[19])(ids)
    assert_close(lm.splice("M1", exclude="begin")(ids), expected, F32)
    assert np.abs(np.asarray(expected) - np.asarray(lm.splice("M1")(ids))).max() > 1e-3
    assert "'start'; give ids, 0..22, or 'begin'" in error_of(lambda: lm.splice("M1", exclude=["start"]))
    assert "23; give ids" in error_of(lambda: lm.splice("M1", exclude=23))


@pytest.mark.usefixtures("no_type_checks")
def test_an_edit_that_splices_takes_ids_and_names_what_takes_names(lm, ids):
    dictionary = lm["M1"].dictionary
    expected = lm.splice("M1", exclude="begin")(ids)
    for exclude in (19, [19], np.array([19])):
        assert_close(lm.run_with_hooks(ids, interventions.splice(dictionary, exclude=exclude))[0], expected, F32)
    name: Any = "begin"
    error = error_of(lambda: interventions.splice(dictionary, exclude=name))
    assert "exclude='begin' is the name of a token" in error
    assert "lm.config.begin_id, or call lm.splice" in error


@pytest.mark.parametrize("tag", TAGS)
def test_edits_of_features_change_nothing_there(lm, ids, tag):
    dictionary = excluding(lm, tag)
    W_dec = dictionary.params["W_dec"][jnp.array([2])]
    expected = by_hand(lm, ids, dictionary, lambda x, y: y + (1.5 - dictionary.encode(x, [2])) @ W_dec)
    assert_close(lm.run_with_hooks(ids, interventions.clamp(dictionary, 2, 1.5))[0], expected, F32)


@pytest.mark.parametrize("tag", TAGS)
def test_steering_by_a_feature_adds_nothing_there(lm, ids, tag):
    dictionary = excluding(lm, tag)
    direction = dictionary.params["W_dec"][2]
    expected = by_hand(lm, ids, dictionary, lambda x, y: y + 1.5 * direction)
    assert_close(lm.run_with_hooks(ids, interventions.steer_features(dictionary, 2, 1.5))[0], expected, F32)
    everywhere = lm.run_with_hooks(ids, interventions.steer(dictionary.config.hook_out, 1.5 * direction))[0]
    assert np.abs(np.asarray(everywhere) - np.asarray(expected)).max() > 1e-3


@pytest.mark.parametrize("tag", TAGS)
def test_a_spliced_model_keeps_the_value_there_whatever_is_edited_elsewhere(lm, ids, tag):
    dictionary = excluding(lm, tag)
    spliced = lm.splice(tag)
    acts = np.asarray(lm[tag](ids)).copy()
    acts[..., 2] = 1.5
    expected = by_hand(lm, ids, dictionary, lambda x, y: dictionary.decode(jnp.asarray(acts)))
    assert_close(spliced.run_with_hooks(ids, interventions.clamp(dictionary, 2, 1.5))[0], expected, F32)


@pytest.mark.parametrize("tag", TAGS)
def test_sweeps_equal_edits_of_one_feature(lm, ids, tag):
    dictionary = excluding(lm, tag)
    spliced = lm.splice("Ra1")
    for found, edit in (
        (sweeps.steer(spliced, tag, ids, 2.0, [1, 4]), lambda f: interventions.steer_features(dictionary, f, 2.0)),
        (sweeps.ablate(spliced, tag, ids, [1, 4]), lambda f: interventions.ablate(dictionary, f)),
        (sweeps.clamp(spliced, tag, ids, 2.0, [1, 4]), lambda f: interventions.clamp(dictionary, f, 2.0)),
    ):
        clean = float(spliced.loss(ids, np.ones_like(ids)))
        for feature, change in zip((1, 4), found.loss, strict=True):
            logprobs = np.asarray(spliced.run_with_hooks(ids, edit(feature))[0])
            nats = -np.take_along_axis(logprobs[:, :-1], ids[:, 1:, None], axis=-1).mean()
            assert change == pytest.approx(nats - clean, abs=1e-5)


def test_sweeps_run_through_splices_that_exclude(lm, ids):
    excluding(lm, "M1")
    spliced, dictionary = lm.splice("M1"), lm["A1"].dictionary
    clean = np.asarray(spliced(ids))
    found = sweeps.ablate(spliced, "A1", ids, [0, 3])
    for feature, kl in zip((0, 3), found.kl, strict=True):
        edited = np.asarray(spliced.run_with_hooks(ids, interventions.ablate(dictionary, feature))[0])
        assert kl == pytest.approx((np.exp(clean) * (clean - edited)).sum(-1).mean(), abs=1e-6)


@pytest.mark.parametrize("tag", TAGS)
def test_an_evaluation_leaves_them_out_as_the_splice_does(lm, ids, tag):
    dictionary = excluding(lm, tag)
    (found,) = evaluate(lm, tag, ids, count_begin=True)
    config, counted = dictionary.config, ~np.isin(ids, EXCLUDED)
    acts = lm.run_with_cache(ids, [config.hook_in, config.hook_out])[1]
    x, y = (jnp.asarray(np.asarray(acts[name])[counted]) for name in (config.hook_in, config.hook_out))
    error, spread = jnp.square(y - dictionary(x)).sum(), jnp.square(y - y.mean(axis=0)).sum()
    assert found.explained_variance == pytest.approx(float(1 - error / spread), rel=1e-4)
    assert found.l0 == pytest.approx(float((dictionary.encode(x) > 0).sum(axis=1).mean()), rel=1e-5)
    assert found.tokens == counted.sum()
    every = np.ones_like(ids)
    assert found.ce_spliced == pytest.approx(float(lm.splice(tag).loss(ids, every)), rel=1e-5)
    for ablated, value in ((found.ce_zero_ablated, 0.0), (found.ce_mean_ablated, y.mean(axis=0))):
        logprobs = np.asarray(by_hand(lm, ids, dictionary, lambda x, y, value=value: value + 0 * y))
        nats = -np.take_along_axis(logprobs[:, :-1], ids[:, 1:, None], axis=-1).mean()
        assert ablated == pytest.approx(float(nats), rel=1e-5)


def test_dictionaries_that_exclude_other_tokens_are_measured_as_alone(lm, ids):
    plain = lm["M1"].dictionary
    (alone,) = evaluate(lm, plain, ids)
    excluded = excluding(lm, "M1")
    together = evaluate(lm, [plain, excluded], ids)
    assert together[0].ce_mean_ablated == pytest.approx(alone.ce_mean_ablated)
    assert together[1].ce_mean_ablated == pytest.approx(evaluate(lm, excluded, ids)[0].ce_mean_ablated)
    assert together[0].tokens > together[1].tokens


def test_top_activations_leave_them_out(lm, ids):
    excluding(lm, "M1")
    found = top_activations(lm, "M1", ids, k=1)
    acts = np.asarray(lm["M1"](ids))
    assert found.n_tokens == (~np.isin(ids, EXCLUDED)).sum()
    assert_close(found.top.value[:, 0], acts.max(axis=(0, 1)), F32)


def test_generation_keeps_the_value_there(lm, ids):
    excluding(lm, "M1")
    spliced = lm.splice("M1")
    rows = ids[:, :4]
    for _ in range(5):
        chosen = np.asarray(spliced(rows))[:, -1].argmax(axis=-1)
        rows = np.concatenate([rows, chosen[:, None]], axis=1).astype(np.int32)
    assert spliced.generate_ids(ids[:, :4], 5, 0.0, False).tolist() == rows.tolist()


def test_they_are_saved_with_the_dictionary(lm, tmp_path):
    excluding(lm, "M1").save_pretrained(tmp_path)
    assert Dictionary.from_pretrained(tmp_path).config.exclude == EXCLUDED


def test_a_transcoder_that_excludes_tokens_is_not_an_mlp(lm):
    lm.attach("M0", make_dictionary("blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out", exclude=(19,)))
    assert "does not act at the tokens (19,)" in error_of(lambda: export_sparse_lm(lm, "M0"))


@pytest.mark.parametrize("wrong", ["begin", (-1,), (True,), (1.5,), 3.0])
def test_a_configuration_takes_ids_only(wrong, no_type_checks):
    error = error_of(lambda: DictionaryConfig("a", "a", 2, 2, 2, exclude=wrong))
    assert "expected token ids" in error

"""Edits of features in models that run through dictionaries change what the splice decodes, and nothing else.

The oracle is a dictionary's own arithmetic: activations of what it reads, changed by hand, decoded.
"""

import dataclasses

import jax
import numpy as np
import oracle
import pytest
from conftest import make_dictionary
from oracle import F32, assert_close, error_of

from tinymodel_jax.analysis.effects import sweeps
from tinymodel_jax.config import ARCHITECTURES
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model import interventions
from tinymodel_jax.model.interventions import combine
from tinymodel_jax.model.transformer import run_with_hooks

TAGS = ("Ra1", "A1", "Rm1", "M1", "Mo1")
MASK = np.arange(11) % 3 == 0


def decoded(dictionary, acts):
    return acts @ np.asarray(dictionary.params["W_dec"], np.float64) + np.asarray(dictionary.params["b_dec"])


def after_edits(lm: TinyModel, tag: str, ids, *edits):
    """Return what a spliced model writes at a site with edits."""
    name = lm[tag].dictionary.config.hook_out
    return lm.splice(tag).run_with_hooks(ids, combine(*edits), [name])[1][name]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tag", ["Rm1", "M1"])
def test_turning_every_feature_off_leaves_the_bias_of_the_decoder(lm, tok_ids, tag, architecture):
    k = 3 if architecture in ("topk", "batch_topk", "groupmax") else None
    site = Site.parse(tag)[0]
    dictionary = make_dictionary(site.hook_in, site.hook_out, architecture=architecture, k=k)
    lm.attach(tag, dictionary)
    left = after_edits(lm, tag, tok_ids, interventions.ablate(dictionary, range(12)))
    assert_close(left, np.broadcast_to(dictionary.params["b_dec"], left.shape), F32)


@pytest.mark.parametrize("tag", TAGS)
def test_edits_act_one_after_the_other_on_the_activations_that_the_splice_decodes(lm, tok_ids, tag):
    dictionary = lm[tag].dictionary
    acts = np.asarray(lm[tag](tok_ids), np.float64)
    kept = after_edits(
        lm,
        tag,
        tok_ids,
        interventions.scale_features(dictionary, [2, 3], 0.5),
        interventions.scale_features(dictionary, [3, 4], 0.5, MASK),
        interventions.clamp(dictionary, [4, 5], 1.5),
        interventions.ablate(dictionary, 5, MASK),
    )
    acts[..., 2:4] *= 0.5
    acts[:, MASK, 3:5] *= 0.5
    acts[..., 4:6] = 1.5
    acts[:, MASK, 5] = 0
    assert_close(kept, decoded(dictionary, acts), F32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_splice_that_keeps_its_error_leaves_the_value_exactly_as_it_was(lm, tok_ids, dtype):
    model = TinyModel.from_params(dataclasses.replace(lm.config, dtype=dtype), lm.params)
    for tag in ("M0", "Ra1", "A1", "Rm1", "M1", "Mo1"):
        model.attach(tag, lm.dictionaries[tag])
    for switches in ({}, {"detach_error": False}, {"detach_pred": True}):
        spliced = model.splice(model.dictionary_tags, include_error=True, **switches)
        np.testing.assert_array_equal(spliced.logits(tok_ids), model.logits(tok_ids))


@pytest.mark.parametrize("tag", ["Ra1", "M1"])
def test_an_edit_of_a_splice_that_keeps_its_error_changes_the_value_by_the_decoder_alone(lm, tok_ids, tag):
    dictionary, name = lm[tag].dictionary, lm[tag].dictionary.config.hook_out
    acts = np.asarray(lm[tag](tok_ids))
    hooks = interventions.clamp(dictionary, 3, 2.0)
    found = lm.splice(tag, include_error=True).run_with_hooks(tok_ids, hooks, [name])[1][name]
    change = (2.0 - acts[..., 3:4]) @ np.asarray(dictionary.params["W_dec"])[3:4]
    assert_close(found, np.asarray(lm.run_with_cache(tok_ids, name)[1][name]) + change, F32)


@pytest.mark.parametrize("tag", ["A1", "M1"])
def test_edits_and_splices_of_one_dictionary_may_be_combined_in_any_order(lm, tok_ids, tag):
    dictionary = lm[tag].dictionary
    edit, splice = interventions.ablate(dictionary, range(6)), interventions.splice([dictionary])
    name, ids = dictionary.config.hook_out, jax.numpy.asarray(tok_ids)
    first, last = (
        run_with_hooks(lm.params, lm.config, ids, hooks, (name,))[1][name]
        for hooks in (combine(edit, splice), combine(splice, edit))
    )
    acts = np.asarray(lm[tag](tok_ids), np.float64)
    acts[..., :6] = 0
    assert_close(first, decoded(dictionary, acts), F32)
    assert_close(last, first, F32)


def test_edits_of_a_transcoder_build_on_each_other_in_a_model_without_splices(lm, tok_ids):
    dictionary, name = lm["M1"].dictionary, "blocks.1.hook_mlp_out"
    halved = interventions.scale_features(dictionary, range(12), 0.5)
    quarter = interventions.scale_features(dictionary, range(12), 0.25)
    twice, once = (lm.run_with_hooks(tok_ids, hooks, [name])[1][name] for hooks in (combine(halved, halved), quarter))
    assert_close(twice, once, F32)


def test_a_chain_keeps_which_edits_share_a_dictionary_when_it_is_an_argument_of_compiled_code(lm, tok_ids):
    dictionary = lm["A1"].dictionary
    hooks = combine(interventions.ablate(dictionary, 3), interventions.clamp(dictionary, 3, 1.0))
    spliced = lm.splice("A1")
    traced = jax.jit(lambda hooks: spliced.run_with_hooks(tok_ids, hooks)[0])(hooks)
    assert_close(traced, spliced.run_with_hooks(tok_ids, interventions.clamp(dictionary, 3, 1.0))[0], F32)


def test_another_dictionary_at_a_spliced_site_reads_what_the_splice_read(lm, tok_ids):
    other, name = make_dictionary("blocks.1.hook_resid_mid", "blocks.1.hook_resid_mid", 20), "blocks.1.hook_resid_mid"
    value = np.asarray(lm.run_with_cache(tok_ids, name)[1][name])
    found = after_edits(lm, "Rm1", tok_ids, interventions.ablate(other, range(12)))
    change = oracle.encode(other.params, other.config, value) @ np.asarray(other.params["W_dec"])
    prediction = oracle.reconstruct(lm["Rm1"].dictionary.params, lm["Rm1"].dictionary.config, value)
    assert_close(found, prediction - change, F32)


def test_a_feature_reader_reads_what_edits_of_a_spliced_model_read(lm, tok_ids):
    for tag in TAGS:
        spliced = lm.splice(TAGS)
        name = spliced[tag].dictionary.config.hook_out
        before = spliced.hooked(before=Site.parse(tag)[0]).hooks
        hooks = combine(before, interventions.splice([spliced[tag].dictionary]))
        _, acts = run_with_hooks(lm.params, lm.config, jax.numpy.asarray(tok_ids), hooks, (name,))
        assert_close(acts[name], decoded(spliced[tag].dictionary, np.asarray(spliced[tag](tok_ids))), F32)


@pytest.mark.parametrize("spliced", ["Ra1", "Rm1", "Mo1", "M1"])
def test_a_readout_of_a_spliced_site_reads_what_the_splice_reads(lm, tok_ids, spliced):
    through, row = lm.splice(spliced), tok_ids[:1]
    effects = sweeps.clamp(through, "M0", row, 1.5, [4], readout=spliced)
    reader = through[spliced].dictionary
    hooks = interventions.clamp(lm["M0"].dictionary, 4, 1.5)
    values = lm.run_with_hooks(row, hooks, [reader.config.hook_in])[1][reader.config.hook_in]
    change = np.asarray(reader.encode(values) - through[spliced](row)).mean(axis=(0, 1))
    assert effects.readout_features is not None
    assert effects.readout_changes is not None
    assert_close(effects.readout_changes[0], change[effects.readout_features[0]], F32)
    assert np.abs(change).max() > 1e-2


def test_a_feature_edit_reads_what_an_edit_before_it_put_in_place(lm, tok_ids):
    dictionary, name = lm["Mo1"].dictionary, "blocks.1.hook_mlp_out"
    other = np.random.default_rng(0).normal(size=(3, 11, 16)).astype(np.float32)
    hooks = combine(
        interventions.ablate(dictionary, 5), interventions.patch(name, other), interventions.ablate(dictionary, 3)
    )
    acts = oracle.encode(dictionary.params, dictionary.config, other)[..., 3:4]
    expected = other - acts * np.asarray(dictionary.params["W_dec"])[3]
    assert_close(lm.run_with_hooks(tok_ids, hooks, name)[1][name], expected, F32)


def test_a_splice_reads_a_steered_value(lm, tok_ids):
    dictionary, name = lm["Mo1"].dictionary, "blocks.1.hook_mlp_out"
    vector = np.random.default_rng(0).normal(size=16).astype(np.float32)
    edit, steer = interventions.ablate(dictionary, 5), interventions.steer(name, vector)
    value = lm.run_with_hooks(tok_ids, combine(edit, steer), name)[1][name]
    hooks = combine(edit, steer, interventions.splice(dictionary))
    expected = oracle.reconstruct(dictionary.params, dictionary.config, value)
    assert_close(lm.run_with_hooks(tok_ids, hooks, name)[1][name], expected, F32)


def test_a_second_splice_predicts_what_the_first_one_wrote(lm, tok_ids):
    name = "blocks.1.hook_mlp_out"
    first, second = make_dictionary(name, name, 20), make_dictionary(name, name, 21)
    value = np.asarray(lm.run_with_cache(tok_ids, name)[1][name])
    for dictionary in (first, second):
        value = oracle.reconstruct(dictionary.params, dictionary.config, value)
    found = lm.run_with_hooks(tok_ids, interventions.splice([first, second]), name)[1][name]
    assert_close(found, value, F32)


def test_a_splice_that_lets_no_gradient_through_lets_the_edits_gradient_through(lm, tok_ids):
    dictionary, name = lm["A1"].dictionary, "blocks.1.hook_attn_out"
    splice = interventions.splice(dictionary, detach_pred=True)

    def total(amount, edit_first):
        edit = interventions.clamp(dictionary, 3, amount)
        hooks = combine(edit, splice) if edit_first else combine(splice, edit)
        return lm.run_with_hooks(tok_ids, hooks, name)[1][name].sum()

    slope = 33 * float(dictionary.params["W_dec"][3].sum())  # of 3 rows of 11 positions
    for edit_first in (False, True):
        assert_close(jax.grad(total)(1.0, edit_first), slope, F32)


def test_what_a_model_returns_for_a_tag_is_accepted_as_a_dictionary(lm, tok_ids):
    dictionary, reader = lm.dictionaries["M1"], lm["M1"]
    for make in (
        lambda given: interventions.ablate(given, [1, 2]),
        lambda given: interventions.clamp(given, 3, 2.0),
        lambda given: interventions.scale_features(given, 3, 0.5),
        interventions.splice,
        lambda given: interventions.splice([given, lm["A1"]]),
    ):
        of_reader, of_dictionary = (lm.run_with_hooks(tok_ids, make(given))[0] for given in (reader, dictionary))
        np.testing.assert_array_equal(of_reader, of_dictionary)
    message = error_of(lambda: interventions.ablate(lm["M1N5"], 5))
    assert "expected a whole dictionary, got feature 5 of M1; give lm['M1']" in message

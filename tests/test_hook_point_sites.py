"""Dictionaries at hook points without a tag of their own, named as the hook point is."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_dictionary
from oracle import F32, assert_close, error_of

from tinymodel_jax.analysis.effects import sweeps
from tinymodel_jax.analysis.evaluation import evaluate
from tinymodel_jax.analysis.search.logit_effects import logit_effects
from tinymodel_jax.analysis.search.top_activations import top_activations
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model import interventions
from tinymodel_jax.model.hook_points import vector_width

NAMES = ("blocks.0.attn.hook_q", "blocks.1.attn.hook_z", "blocks.0.hook_mlp_in", "blocks.1.mlp.hook_post")
NAMES += ("blocks.0.hook_resid_post", "blocks.0.hook_attn_in")


def attached(lm: TinyModel, name: str) -> Dictionary:
    """Attach a random SAE at a hook point."""
    width = vector_width(name, lm.config)
    lm.attach(name, make_dictionary(name, name, d_in=width, d_out=width))
    return lm[name].dictionary


def by_hand(lm: TinyModel, ids, name: str, change):
    """Run the model with the vectors at a hook point changed by a function of them."""

    def hook(value, acts):
        del acts
        return change(value.reshape(*value.shape[:2], -1)).reshape(value.shape)

    return lm.run_with_hooks(ids, {name: hook})[0]


@pytest.mark.parametrize("name", NAMES)
def test_it_reads_and_replaces_the_vectors_there(lm, tok_ids, name):
    dictionary = attached(lm, name)
    value = lm.run_with_cache(tok_ids, name)[1][name]
    assert_close(lm[name](tok_ids), dictionary.encode(value.reshape(*tok_ids.shape, -1)), F32)
    assert_close(lm.splice(name)(tok_ids), by_hand(lm, tok_ids, name, dictionary), F32)
    assert np.abs(np.asarray(lm.splice(name)(tok_ids) - lm(tok_ids))).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_edits_of_its_features_move_the_value_along_the_decoder(lm, tok_ids, name):
    dictionary = attached(lm, name)

    def change(x):
        return x + (1.5 - dictionary.encode(x, [2])) @ dictionary.params["W_dec"][2:3]

    edited = lm.run_with_hooks(tok_ids, interventions.clamp(dictionary, 2, 1.5))[0]
    assert_close(edited, by_hand(lm, tok_ids, name, change), F32)


@pytest.mark.parametrize("name", NAMES)
def test_its_evaluation_is_that_of_its_vectors(lm, tok_ids, name):
    dictionary = attached(lm, name)
    (found,) = evaluate(lm, name, tok_ids, count_begin=True)
    x = np.asarray(lm.run_with_cache(tok_ids, name)[1][name], np.float64).reshape(tok_ids.size, -1)
    error = np.square(x - np.asarray(dictionary(jnp.asarray(x, jnp.float32)))).sum()
    assert found.explained_variance == pytest.approx(1 - error / np.square(x - x.mean(0)).sum(), rel=1e-4)
    counted = tok_ids != lm.config.pad_id
    assert found.ce_spliced == pytest.approx(float(lm.splice(name).loss(tok_ids, counted)), rel=1e-5)
    zeroed = by_hand(lm, tok_ids, name, lambda x: 0 * x)
    nats = -np.take_along_axis(np.asarray(zeroed)[:, :-1], tok_ids[:, 1:, None], axis=-1)
    assert found.ce_zero_ablated == pytest.approx(float(nats.mean()), rel=1e-5)


def test_top_activations_are_those_of_a_plain_pass(lm, tok_ids):
    name = NAMES[1]
    attached(lm, name)
    found = top_activations(lm, name, tok_ids, k=1)
    acts = np.asarray(lm[name](tok_ids))
    assert_close(found.top.value[:, 0], acts.max(axis=(0, 1)), F32)


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_z", "blocks.1.mlp.hook_post", "blocks.1.hook_resid_post"])
def test_its_logit_effects_are_what_one_unit_adds_to_the_logits(lm, name):
    dictionary = attached(lm, name)
    tok_ids = np.array([[18, 3, 4]])
    hooks = [interventions.clamp(dictionary, 5, value) for value in (0.0, 1.0)]
    if name.endswith("hook_z"):  # keep the MLP as it is, so that the direct path is the only one
        mlp_out = lm.run_with_cache(tok_ids, "blocks.1.hook_mlp_out")[1]["blocks.1.hook_mlp_out"]
        hooks = [interventions.combine(edit, interventions.patch("blocks.1.hook_mlp_out", mlp_out)) for edit in hooks]
    before, after = (np.asarray(lm.run_with_hooks(tok_ids, edit)[0])[0, -1] for edit in hooks)
    moved = after - before
    found = logit_effects(lm, name, top=lm.config.d_vocab, features=5)
    expected = np.sort(moved - moved.mean())[::-1]
    assert_close(found.promoted_effect[0], expected, F32)


def test_sweeps_and_logit_effects_refuse_what_reaches_the_stream_through_weights(lm, tok_ids):
    attached(lm, NAMES[0])
    assert "neither the residual stream nor added to it" in error_of(lambda: sweeps.ablate(lm, NAMES[0], tok_ids))
    assert "has no direct effect on the logits" in error_of(lambda: logit_effects(lm, NAMES[0]))


def test_a_saved_dictionary_returns_to_its_hook_point(lm, tmp_path):
    attached(lm, NAMES[1]).save_pretrained(tmp_path / "z")
    assert Dictionary.from_pretrained(tmp_path / "z").config.hook_in == NAMES[1]
    lm.attach(NAMES[1], tmp_path / "z")
    assert "from blocks.1.attn.hook_z to blocks.1.attn.hook_z" in error_of(lambda: lm.attach("A1", tmp_path / "z"))


def test_splices_act_in_the_order_of_the_forward_pass(lm, tok_ids):
    for name in (NAMES[3], NAMES[1]):
        attached(lm, name)
    assert lm.splice([NAMES[3], "M1", NAMES[1], "A1"]).spliced == (NAMES[1], "A1", NAMES[3], "M1")
    spliced = lm.splice(NAMES[1])
    assert_close(
        spliced["A1"](tok_ids),
        lm["A1"].dictionary.encode(
            spliced.run_with_cache(tok_ids, "blocks.1.hook_attn_out")[1]["blocks.1.hook_attn_out"]
        ),
        F32,
    )

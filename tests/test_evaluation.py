"""Measuring dictionaries in the model: what CE recovered and the other numbers are for known dictionaries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinymodel_jax.analysis.evaluation import evaluate_at_site, evaluate_reconstruction
from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.sites import Site
from tinymodel_jax.training.site_activations import draw_tokens, site_vectors
from tinymodel_jax.transformer import Transformer, run_with_hooks

WIDTH, VOCAB, F32 = 8, 20, 1e-4
CONFIG = ModelConfig(n_layers=2, d_model=WIDTH, n_heads=2, d_mlp=16, n_ctx=12, d_vocab=VOCAB)
PAD = CONFIG.pad_id


@pytest.fixture(scope="module")
def params():
    tree = Transformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: 3 * leaf, tree)


@pytest.fixture(scope="module")
def tok_ids():
    ids = np.random.default_rng(0).integers(0, VOCAB - 4, (6, 12)).astype(np.int32)
    ids[::2, 7:] = PAD
    return jnp.asarray(ids)


def sae(tag: str, W_enc, W_dec, b_dec) -> Dictionary:
    site = Site.parse(tag)[0]
    config = DictionaryConfig(site.hook_in, site.hook_out, WIDTH, WIDTH, W_enc.shape[1], architecture="relu")
    return Dictionary.from_params(
        config, {"W_enc": W_enc, "b_enc": jnp.zeros(W_enc.shape[1]), "W_dec": W_dec, "b_dec": b_dec}
    )


def identity(tag: str) -> Dictionary:
    """An SAE that reconstructs exactly: relu(x) and relu(-x) of every coordinate."""
    both = jnp.concatenate([jnp.eye(WIDTH), -jnp.eye(WIDTH)], axis=1)
    return sae(tag, both, both.T, jnp.zeros(WIDTH))


def nothing(tag: str) -> Dictionary:
    """An SAE that predicts zero everywhere."""
    return sae(tag, jnp.zeros((WIDTH, 3)), jnp.zeros((3, WIDTH)), jnp.zeros(WIDTH))


@pytest.mark.parametrize("tag", ["A0", "Ra1", "Rm0", "Mo1"])
def test_a_perfect_dictionary_recovers_everything_and_an_empty_one_nothing(params, tok_ids, tag):
    perfect, empty = evaluate_at_site(params, CONFIG, [identity(tag), nothing(tag)], [tok_ids])
    assert perfect.ce_recovered == pytest.approx(1, abs=F32)
    assert perfect.explained_variance == pytest.approx(1, abs=F32)
    assert perfect.ce_spliced == pytest.approx(perfect.ce_clean, abs=F32)
    assert perfect.l0 == pytest.approx(WIDTH)
    assert empty.ce_recovered == pytest.approx(0, abs=F32)
    assert empty.ce_spliced == pytest.approx(empty.ce_zero_ablated, abs=F32)
    assert (empty.l0, empty.dead_fraction) == (0, 1)
    assert perfect.tokens == empty.tokens == (tok_ids != PAD).sum()


def test_the_numbers_are_those_of_the_facade(params, tok_ids):
    lm = TinyModel.from_params(CONFIG, params)
    dictionary = sae(
        "Rm0", jax.random.normal(jax.random.key(1), (WIDTH, 30)), 0.1 * jnp.ones((30, WIDTH)), jnp.ones(WIDTH)
    )
    (found,) = evaluate_at_site(params, CONFIG, [dictionary], [tok_ids])
    mask = (tok_ids != PAD).astype(np.float32)
    lm.attach("Rm0", dictionary)
    assert found.ce_clean == pytest.approx(float(lm.loss(tok_ids, mask)), abs=F32)
    assert found.ce_spliced == pytest.approx(float(lm.splice("Rm0").loss(tok_ids, mask)), abs=F32)
    acts = np.asarray(lm["Rm0"](tok_ids))[mask > 0]
    assert found.l0 == pytest.approx((acts > 0).sum(axis=1).mean(), abs=F32)
    assert found.dead_fraction == pytest.approx((acts == 0).all(axis=0).mean(), abs=F32)


def test_how_the_stories_are_batched_and_what_padding_holds_change_nothing(params, tok_ids):
    dictionary = identity("A1")
    (whole,) = evaluate_at_site(params, CONFIG, [dictionary], [tok_ids])
    more_padding = jnp.full((2, 12), PAD, jnp.int32)
    (parts,) = evaluate_at_site(
        params, CONFIG, [dictionary], [tok_ids[:2], tok_ids[2:4], jnp.concatenate([tok_ids[4:], more_padding])]
    )
    assert parts == pytest.approx(whole, abs=F32)


def test_dictionaries_of_two_sites_and_no_tokens_are_refused(params, tok_ids):
    with pytest.raises(ValueError, match="not one"):
        evaluate_at_site(params, CONFIG, [identity("A0"), identity("A1")], [tok_ids])
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate_at_site(params, CONFIG, [identity("A0")], [jnp.full((1, 5), PAD, jnp.int32)])


def test_reconstruction_alone_needs_no_model():
    x = jax.random.normal(jax.random.key(0), (50, WIDTH))
    found = evaluate_reconstruction(identity("A0"), [(x[:20], x[:20]), (x[20:], x[20:])])
    assert found.explained_variance == pytest.approx(1, abs=F32)
    assert (found.l0, found.dead_fraction, found.tokens) == (WIDTH, 0, 50)


def test_tokens_are_drawn_once_each_never_padding_and_come_again_when_there_are_too_few(tok_ids):
    real = np.flatnonzero(np.asarray(tok_ids).reshape(-1) != PAD)
    drawn = np.asarray(draw_tokens(tok_ids, PAD, 20, jax.random.key(0)))
    assert len(set(drawn.tolist())) == 20
    assert set(drawn.tolist()) <= set(real.tolist())
    assert drawn.tolist() != np.asarray(draw_tokens(tok_ids, PAD, 20, jax.random.key(1))).tolist()
    many = np.asarray(draw_tokens(tok_ids, PAD, 2 * len(real), jax.random.key(0)))
    np.testing.assert_array_equal(np.sort(many), np.repeat(real, 2))


def test_the_vectors_of_all_sites_are_the_activations_at_the_same_tokens(params, tok_ids):
    sites = [Site("M", 0), Site("A", 1)]
    key = jax.random.key(3)
    found = site_vectors(params, CONFIG, tok_ids, sites, 10, key)
    places = draw_tokens(tok_ids, PAD, 10, key)
    names = ("blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out", "blocks.1.hook_attn_out")
    _, acts = run_with_hooks(params, CONFIG, tok_ids, keep=names)
    flat = {name: acts[name].reshape(-1, WIDTH)[places] for name in names}
    np.testing.assert_allclose(found["M0"].x, flat[names[0]], atol=1e-6)
    np.testing.assert_allclose(np.asarray(found["M0"].y), flat[names[1]], atol=1e-6)
    np.testing.assert_allclose(found["A1"].x, flat[names[2]], atol=1e-6)
    assert found["A1"].y is None

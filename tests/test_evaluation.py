"""Measuring dictionaries in the model: what CE recovered and the other numbers are for known dictionaries."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_users_run_it, random_params
from conftest import param_shapes as model_shapes

from tinymodel_jax.analysis.evaluation import DictionaryEvaluation, evaluate, model_passes
from tinymodel_jax.analysis.evaluation.reconstruction import evaluate_reconstruction, reconstruct
from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.encoding import param_shapes
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.interventions import Scale
from tinymodel_jax.model.transformer import run_with_hooks
from tinymodel_jax.training.site_activations import draw_tokens, site_vectors

WIDTH, VOCAB, F32 = 8, 20, 1e-4
CONFIG = ModelConfig(n_layers=2, d_model=WIDTH, n_heads=2, d_mlp=16, n_ctx=12, d_vocab=VOCAB)
PAD = CONFIG.pad_id


@pytest.fixture(scope="module")
def params():
    return random_params(model_shapes(CONFIG), 0, scale=0.35)


@pytest.fixture(scope="module")
def tok_ids():
    ids = np.random.default_rng(0).integers(0, VOCAB - 4, (6, 12)).astype(np.int32)
    ids[::2, 7:] = PAD
    ids[:, 0] = CONFIG.begin_id
    return ids


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


def transcoder(tag: str, n_features: int, seed: int, **options) -> Dictionary:
    site = Site.parse(tag)[0]
    config = DictionaryConfig(site.hook_in, site.hook_out, WIDTH, WIDTH, n_features, **options)
    return Dictionary.from_params(config, random_params(param_shapes(config), seed))


@pytest.fixture(scope="module")
def model(params) -> TinyModel:
    return TinyModel.from_params(CONFIG, params)


def mean_of_counted(lm: TinyModel, tok_ids, name: str) -> np.ndarray:
    values = np.asarray(lm.run_with_cache(tok_ids, name)[1][name], np.float64)
    return values[(tok_ids != PAD) & (tok_ids != CONFIG.begin_id)].mean(axis=0)


def assert_equal_evaluations(found, expected, tolerance=F32):
    for name in DictionaryEvaluation._fields:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=tolerance), name


def test_a_perfect_dictionary_recovers_everything_and_an_empty_one_nothing(model, tok_ids):
    tags = ("A0", "Ra1", "Rm0", "Mo1")
    found = evaluate(model, [make(tag) for tag in tags for make in (identity, nothing)], tok_ids)
    for perfect, empty in zip(found[::2], found[1::2], strict=True):
        assert perfect.ce_recovered == pytest.approx(1, abs=F32)
        assert perfect.explained_variance == pytest.approx(1, abs=F32)
        assert (perfect.cosine, perfect.mse, perfect.kl) == pytest.approx((1, 0, 0), abs=F32)
        assert perfect.ce_spliced == pytest.approx(perfect.ce_clean, abs=F32)
        assert perfect.l0 == pytest.approx(WIDTH)
        assert empty.ce_recovered == pytest.approx(0, abs=F32)
        assert empty.ce_spliced == pytest.approx(empty.ce_zero_ablated, abs=F32)
        assert (empty.l0, empty.dead_fraction, empty.cosine) == (0, 1, 0)
        assert perfect.tokens == empty.tokens == ((tok_ids != PAD) & (tok_ids != CONFIG.begin_id)).sum()


def test_the_mean_explains_nothing_and_is_what_mean_ablation_puts_in_place(model, tok_ids):
    tags = ("A1", "Rm0")
    means = [mean_of_counted(model, tok_ids, Site.parse(tag)[0].hook_out) for tag in tags]
    predictors = [
        sae(tag, jnp.zeros((WIDTH, 3)), jnp.zeros((3, WIDTH)), jnp.asarray(mean, jnp.float32))
        for tag, mean in zip(tags, means, strict=True)
    ]
    for found in evaluate(model, predictors, tok_ids):
        assert found.explained_variance == pytest.approx(0, abs=F32)
        assert found.ce_spliced == pytest.approx(found.ce_mean_ablated, abs=F32)
        assert found.kl > 0.01


@pytest.mark.parametrize("count_begin", [False, True])
def test_the_numbers_are_those_of_the_facade(model, tok_ids, count_begin):
    lm = model.splice([])
    dictionary = transcoder("M0", 30, 1)
    (found,) = evaluate(lm, [dictionary], tok_ids, count_begin=count_begin)
    real = tok_ids != PAD
    counted = real if count_begin else real & (tok_ids != CONFIG.begin_id)
    lm.attach("M0", dictionary)
    spliced = lm.splice("M0")
    assert found.ce_clean == pytest.approx(float(lm.loss(tok_ids, real)), abs=F32)
    assert found.ce_spliced == pytest.approx(float(spliced.loss(tok_ids, real)), abs=F32)
    clean, through = np.asarray(lm(tok_ids)), np.asarray(spliced(tok_ids))
    kl = (np.exp(clean) * (clean - through)).sum(axis=-1)[:, :-1]
    assert found.kl == pytest.approx(kl[real[:, 1:]].mean(), abs=F32)
    _, acts = lm.run_with_cache(tok_ids, [dictionary.config.hook_in, dictionary.config.hook_out])
    x, y = (acts[name][counted] for name in (dictionary.config.hook_in, dictionary.config.hook_out))
    features, prediction, y = np.asarray(dictionary.encode(x)), np.asarray(dictionary(x)), np.asarray(y)
    assert found.tokens == len(x)
    assert found.l0 == pytest.approx((features > 0).sum(axis=1).mean(), abs=F32)
    assert found.dead_fraction == pytest.approx((features == 0).all(axis=0).mean(), abs=F32)
    np.testing.assert_allclose(found.frequency, (features > 0).mean(axis=0), atol=F32)
    assert found.mse == pytest.approx(((y - prediction) ** 2).mean(), rel=F32)
    explained = 1 - ((y - prediction) ** 2).sum() / ((y - y.mean(axis=0)) ** 2).sum()
    assert found.explained_variance == pytest.approx(explained, rel=F32)
    cosine = (y * prediction).sum(axis=1) / np.linalg.norm(y, axis=1) / np.linalg.norm(prediction, axis=1)
    assert found.cosine == pytest.approx(cosine.mean(), abs=F32)


@pytest.mark.slow
def test_dictionaries_of_all_sites_together_measure_as_each_alone(model, tok_ids):
    dictionaries = [identity("Ra0"), transcoder("M0", 9, 2), nothing("Mo0"), transcoder("M0", 9, 3), identity("A1")]
    together = evaluate(model, dictionaries, tok_ids)
    for dictionary, found in zip(dictionaries, together, strict=True):
        assert_equal_evaluations(found, *evaluate(model, [dictionary], tok_ids), tolerance=1e-6)


def test_a_dictionary_is_named_by_its_tag_its_reader_or_itself(model, tok_ids):
    model.attach("M1", transcoder("M1", 24, 3))
    (expected,) = evaluate(model, [model["M1"].dictionary], tok_ids)
    for given in ("M1", ["M1"], model["M1"], [model["M1"]], model["M1"].dictionary):
        (found,) = evaluate(model, given, tok_ids)
        assert_equal_evaluations(found, expected)


def test_how_the_stories_are_batched_and_what_padding_holds_change_nothing(model, tok_ids, monkeypatch):
    dictionary = transcoder("M1", 20, 4)
    (whole,) = evaluate(model, [dictionary], tok_ids)
    monkeypatch.setattr(model_passes, "BATCH_ROWS", 4)
    padded = np.concatenate([tok_ids[:3], np.full((2, 12), PAD), tok_ids[3:]])
    assert_equal_evaluations(evaluate(model, [dictionary], padded)[0], whole)


def test_a_spliced_model_is_measured_as_it_is(model, tok_ids):
    lm = model.splice([])
    lm.attach("M0", transcoder("M0", 20, 5))
    spliced = lm.splice("M0")
    (found,) = evaluate(spliced, [identity("A1")], tok_ids)
    assert found.ce_clean == pytest.approx(float(spliced.loss(tok_ids, tok_ids != PAD)), abs=F32)
    assert found.ce_recovered == pytest.approx(1, abs=F32)
    below = evaluate(spliced, [nothing("Ra0")], tok_ids)[0]  # the splice comes after it
    zero, _ = spliced.run_with_hooks(tok_ids, {"blocks.0.hook_resid_pre": Scale(0.0)})
    losses = -np.take_along_axis(np.asarray(zero)[:, :-1], tok_ids[:, 1:, None], axis=-1)[..., 0]
    assert below.ce_zero_ablated == pytest.approx(losses[tok_ids[:, 1:] != PAD].mean(), abs=F32)


def test_every_number_is_over_the_same_rows(model, tok_ids):
    dictionary = transcoder("M1", 20, 4)
    alone = np.full((1, 12), PAD, np.int32)
    alone[0, 0] = 3  # counted as a token, but without one to predict
    (found,) = evaluate(model, [dictionary], np.concatenate([tok_ids, alone]))
    assert found.l0 == pytest.approx(found.frequency.sum(), rel=1e-6)
    assert_equal_evaluations(found, *evaluate(model, [dictionary], tok_ids), tolerance=1e-6)


def test_a_bfloat16_model_s_means_are_summed_in_float32(params, tok_ids):
    lm = TinyModel.from_params(dataclasses.replace(CONFIG, dtype="bfloat16"), params)
    ids, name = np.tile(tok_ids, (3, 1))[:16], "blocks.1.hook_attn_out"
    counted = ids != PAD
    values = np.asarray(lm.run_with_cache(ids, name)[1][name], np.float64)[counted]
    found = model_passes.sum_values(lm.hooked(), ids, counted, places=(name,))[name]
    np.testing.assert_allclose(np.asarray(found).sum(axis=0), values.sum(axis=0), rtol=1e-5, atol=1e-4)


def test_a_dictionary_of_another_width_or_where_the_model_is_spliced_is_refused(model, tok_ids):
    config = DictionaryConfig("blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out", WIDTH, 6, 5)
    narrow = Dictionary.from_params(config, random_params(param_shapes(config), 0))
    lm = model.splice([])
    lm.attach("M0", transcoder("M0", 20, 5))
    with as_users_run_it():
        with pytest.raises(ValueError, match=r"d_out=6, but blocks\.0\.hook_mlp_out is 8 wide"):
            evaluate(model, [narrow], tok_ids)
        with pytest.raises(ValueError, match=r"spliced at blocks\.0\.hook_mlp_out \(M0\)"):
            evaluate(lm.splice("M0"), [lm["M0"].dictionary], tok_ids)


def test_rows_without_a_token_to_predict_and_unknown_places_are_refused(model):
    with as_users_run_it():
        with pytest.raises(ValueError, match="no token to predict"):
            evaluate(model, [identity("A0")], np.full((1, 5), PAD))
        with pytest.raises(ValueError, match=r"hold only \[BEGIN\]"):
            evaluate(model, [identity("A0")], np.full((1, 2), CONFIG.begin_id))
        with pytest.raises(ValueError, match=r"unknown hook points in a 2-layer model: 'blocks\.7"):
            evaluate(model, [identity("A7")], np.ones((1, 5), np.int32))


def test_reconstruction_alone_needs_no_model():
    x = jax.random.normal(jax.random.key(0), (50, WIDTH))
    found = evaluate_reconstruction(identity("A0"), [(x[:20], x[:20]), (x[20:], x[20:])])
    assert found.explained_variance == pytest.approx(1, abs=F32)
    assert (found.l0, found.dead_fraction, found.tokens) == (WIDTH, 0, 50)


@pytest.mark.parametrize("cuts", [[32], [1], [5, 9, 60]])
@pytest.mark.parametrize("scale", [1, 1000])
def test_reconstruction_alone_equals_its_formulas_in_float64_however_it_is_batched(cuts, scale):
    x = scale * (30 + jax.random.normal(jax.random.key(0), (64, WIDTH)))  # a mean far from 0, as in a residual stream
    y = x + 0.3 * scale * jax.random.normal(jax.random.key(1), x.shape)
    found = evaluate_reconstruction(identity("A0"), list(zip(jnp.split(x, cuts), jnp.split(y, cuts), strict=True)))
    target, error = np.asarray(y, np.float64), np.asarray(y, np.float64) - np.asarray(x, np.float64)
    explained = 1 - (error**2).sum() / ((target - target.mean(axis=0)) ** 2).sum()
    assert found.explained_variance == pytest.approx(explained, abs=F32)


@pytest.mark.parametrize("cuts", [[], [1], [5, 9, 60]])
@pytest.mark.parametrize("scale", [1, 3, 1e-3])
def test_targets_that_are_all_equal_have_no_variance_to_explain(cuts, scale):
    x = jnp.split(jax.random.normal(jax.random.key(0), (64, WIDTH)), cuts)
    y = jnp.split(jnp.broadcast_to(scale * jnp.linspace(0.1, 90.7, WIDTH), (64, WIDTH)), cuts)
    found = evaluate_reconstruction(identity("A0"), list(zip(x, y, strict=True)))
    assert np.isnan(found.explained_variance)
    assert (found.l0, found.dead_fraction, found.tokens) == (WIDTH, 0, 64)


def test_reconstruction_of_no_vectors_is_not_a_number():
    nothing_read = jnp.zeros((0, WIDTH))
    for batches in ([], [(nothing_read, nothing_read)]):  # none, and an empty one
        *numbers, tokens = evaluate_reconstruction(identity("A0"), batches)
        assert np.isnan(numbers).all()
        assert tokens == 0


def test_a_batch_of_no_vectors_changes_nothing():
    x = jax.random.normal(jax.random.key(0), (50, WIDTH))
    y = x + 1
    assert evaluate_reconstruction(identity("A0"), [(x[:0], y[:0]), (x, y)]) == evaluate_reconstruction(
        identity("A0"), [(x, y)]
    )


def test_what_is_at_uncounted_positions_does_not_count(tok_ids):
    dictionary = transcoder("M0", 30, 1)
    x, y = jax.random.normal(jax.random.key(0), (2, *tok_ids.shape, WIDTH))
    counted, mean = jnp.asarray(tok_ids != PAD), jnp.zeros(WIDTH)
    spoiled = [jnp.where(counted[..., None], values, jnp.nan) for values in (x, y)]
    _, *expected = reconstruct(dictionary.params, x, y, mean, counted, config=dictionary.config)
    _, *found = reconstruct(dictionary.params, *spoiled, mean, counted, config=dictionary.config)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_tokens_are_drawn_once_each_never_padding_and_come_again_when_there_are_too_few(tok_ids):
    real = np.flatnonzero(np.asarray(tok_ids).reshape(-1) != PAD)
    drawn = np.asarray(draw_tokens(jnp.asarray(tok_ids), (PAD,), 20, jax.random.key(0)))
    assert len(set(drawn.tolist())) == 20
    assert set(drawn.tolist()) <= set(real.tolist())
    assert drawn.tolist() != np.asarray(draw_tokens(jnp.asarray(tok_ids), (PAD,), 20, jax.random.key(1))).tolist()
    others = np.asarray(draw_tokens(jnp.asarray(tok_ids), (PAD, int(tok_ids[0, 1])), 20, jax.random.key(0)))
    assert PAD not in tok_ids.reshape(-1)[others]
    assert tok_ids[0, 1] not in tok_ids.reshape(-1)[others]
    many = np.asarray(draw_tokens(jnp.asarray(tok_ids), (PAD,), 2 * len(real), jax.random.key(0)))
    np.testing.assert_array_equal(np.sort(many), np.repeat(real, 2))


def test_the_vectors_of_all_sites_are_the_activations_at_the_same_tokens(params, tok_ids):
    sites = [Site("M", 0), Site("A", 1)]
    key = jax.random.key(3)
    found = site_vectors(params, CONFIG, jnp.asarray(tok_ids), sites, 10, key)
    places = draw_tokens(jnp.asarray(tok_ids), (PAD,), 10, key)
    names = ("blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out", "blocks.1.hook_attn_out")
    _, acts = run_with_hooks(params, CONFIG, jnp.asarray(tok_ids), keep=names)
    flat = {name: acts[name].reshape(-1, WIDTH)[places] for name in names}
    np.testing.assert_allclose(found["M0"].x, flat[names[0]], atol=1e-6)
    np.testing.assert_allclose(np.asarray(found["M0"].y), flat[names[1]], atol=1e-6)
    np.testing.assert_allclose(found["A1"].x, flat[names[2]], atol=1e-6)
    assert found["A1"].y is None

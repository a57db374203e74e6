"""`TinyModel` against NumPy, and what users can rely on: compilations, hooks, splices, folders."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import make_dictionary, param_shapes, random_params
from oracle import BF16, F32, Tolerance, assert_close, forward, log_softmax, next_token_loss

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model import interventions
from tinymodel_jax.model.hook_points import hook_names
from tinymodel_jax.model.transformer import Transformer, run_with_hooks
from tinymodel_jax.params import flatten
from tinymodel_jax.runtime.compilation import fast_compiler_options

# The model against NumPy


def test_a_pass_equals_numpy_s_whatever_the_length(lm, config):
    flat = flatten(lm.params)
    ids = np.random.default_rng(3).integers(0, 23, (2, config.n_ctx))
    expected, values = forward(flat, config, ids)
    for length in range(1, config.n_ctx + 1):
        assert_close(lm(ids[:, :length]), log_softmax(expected[:, :length]), F32)
    logprobs, acts = lm.run_with_cache(ids[:, :7])  # computed at length 8, and cut
    assert tuple(acts) == hook_names(config)
    assert_close(logprobs, log_softmax(expected[:, :7]), F32)
    for name, act in acts.items():
        square = name.endswith(("scores", "pattern"))
        assert_close(act, values[name][:, :, :7, :7] if square else values[name][:, :7], F32)


def test_one_sequence_may_come_without_a_batch_axis(lm, tok_ids):
    np.testing.assert_array_equal(lm(tok_ids[0]), lm(tok_ids[:1]))
    assert lm["M0N3"](tok_ids[0].tolist()).shape == (1, 11)


def test_no_tokens_give_no_positions(lm):
    assert lm([]).shape == (1, 0, 23)
    assert lm(np.zeros((0, 4), int)).shape == (0, 4, 23)


def test_right_padding_changes_nothing_before_it(lm, tok_ids):
    padded = np.pad(tok_ids, ((0, 0), (0, 5)), constant_values=lm.config.pad_id)
    assert_close(lm(padded)[:, :11], lm(tok_ids), F32)


@pytest.mark.parametrize("mask", [None, "list", "array", "bool"])
def test_the_loss_is_the_mean_over_the_tokens_that_count(lm, tok_ids, mask):
    weights = np.ones(tok_ids.shape, int)
    if mask is not None:
        weights[1, 4:] = 0
    given = {None: None, "list": weights.tolist(), "array": weights, "bool": weights.astype(bool)}[mask]
    logits, _ = forward(flatten(lm.params), lm.config, tok_ids)
    assert_close(lm.loss(tok_ids, given), next_token_loss(logits, tok_ids, weights), F32)


@pytest.mark.parametrize("is_function", [False, True])
def test_the_loss_of_each_token_under_edits_is_minus_its_log_probability(lm, tok_ids, is_function):
    name = "blocks.0.hook_mlp_out"
    hooks = {name: lambda value, acts: value * 3} if is_function else interventions.scale(name, 3.0, tok_ids % 2 == 0)
    logprobs = np.asarray(lm.run_with_hooks(tok_ids, hooks)[0])[:, :-1]
    expected = -np.take_along_axis(logprobs, tok_ids[:, 1:, None], axis=-1)[..., 0]
    mask = np.ones(tok_ids.shape)
    mask[1, 4:] = 0
    counted = mask[:, 1:] > 0
    losses = lm.loss(tok_ids, mask, hooks, per_token=True)
    assert_close(losses, np.where(counted, expected, 0), F32)
    assert_close(lm.loss(tok_ids, mask, hooks), expected[counted].mean(), F32)
    assert not np.allclose(losses, lm.loss(tok_ids, mask, per_token=True))


def test_the_loss_has_a_gradient_with_respect_to_an_edit(lm, tok_ids):
    def loss(factor):
        return lm.loss(tok_ids, hooks=interventions.scale("blocks.0.hook_mlp_out", factor))

    slope = (loss(1.01) - loss(0.99)) / 0.02
    np.testing.assert_allclose(jax.grad(loss)(1.0), slope, rtol=0.01, atol=1e-4)


def test_activations_equal_the_dictionary_s_on_the_site_s_input(lm, tok_ids):
    _, values = forward(flatten(lm.params), lm.config, tok_ids)
    for tag in ("M0", "Rm1"):
        dictionary = lm.dictionaries[tag]
        expected = oracle.encode(dictionary.params, dictionary.config, values[dictionary.config.hook_in])
        assert_close(lm[tag](tok_ids), expected, F32)
        assert_close(lm[f"{tag}.4"](tok_ids), expected[..., 4], F32)
        assert_close(lm[tag](tok_ids, indices=[3, -1]), expected[..., [3, -1]], F32)


# jit, grad, vmap


def test_its_methods_work_inside_jit_vmap_and_grad(lm, tok_ids):
    ids = jnp.asarray(tok_ids)
    expected = lm(tok_ids)
    assert_close(jax.jit(lm)(ids), expected, F32)
    assert_close(jax.vmap(lambda row: lm(row[None])[0])(ids), expected, F32)
    assert_close(jax.jit(lambda shift: lm(tok_ids) + shift)(jnp.float32(1)), expected + 1, F32)
    assert_close(jax.jit(lm["M0"])(ids), lm["M0"](tok_ids), F32)

    def loss(params):
        return TinyModel.from_params(lm.config, params).loss(tok_ids)

    def loss_by_hand(params):
        logprobs = TinyModel.from_params(lm.config, params)(tok_ids)
        return -jnp.take_along_axis(logprobs[:, :-1], ids[:, 1:, None], axis=-1).mean()

    by_hand = flatten(jax.jit(jax.grad(loss_by_hand))(lm.params))
    for name, grad in flatten(jax.jit(jax.grad(loss))(lm.params)).items():
        oracle.assert_gradient_close(grad, by_hand[name])


def test_the_gradient_flows_through_an_edit_into_its_vector(lm, tok_ids):
    @jax.jit
    def loss(vector):
        return lm.run_with_hooks(tok_ids, interventions.steer("blocks.1.hook_mlp_out", vector))[0][..., 0].sum()

    zero, direction = jnp.zeros(16), jnp.linspace(-1, 1, 16)
    slope = jnp.vdot(jax.grad(loss)(zero), direction)
    step = 1e-2  # float32: rounding of the sum, 1e-5, over 2e-2, and h² of the third derivative
    assert_close(slope, (loss(direction * step) - loss(-direction * step)) / (2 * step), Tolerance(5e-3, 5e-3))


# Compilations


def test_every_length_up_to_256_compiles_at_most_six_programs(compilations):
    config = ModelConfig(n_layers=1, d_model=8, n_heads=2, d_mlp=8, n_ctx=256, d_vocab=17)
    lm = TinyModel.from_params(config, random_params(param_shapes(config), 0))
    ids = np.random.default_rng(0).integers(0, 13, (1, 256))
    fast_compiler_options()  # compiles a trivial program, once per process
    with compilations() as compiled:
        for length in range(1, 257):
            assert jax.block_until_ready(lm(ids[:, :length])).shape == (1, length, 17)
    assert 1 <= compiled.value <= 6
    again = TinyModel.from_params(ModelConfig(**config.to_dict()), random_params(param_shapes(config), 1))
    with compilations() as compiled:
        for length in (1, 100, 256):
            jax.block_until_ready(again(ids[:, :length]))
    assert compiled.value == 0, "an equal configuration shares the compiled functions"


def test_the_other_reads_compile_for_few_lengths_too(compilations):
    config = ModelConfig(n_layers=1, d_model=8, n_heads=1, d_mlp=8, n_ctx=16, d_vocab=17)
    lm = TinyModel.from_params(config, random_params(param_shapes(config), 0))
    lm.attach("Ra0", make_dictionary("any", "any", d_in=8, d_out=8))
    ids = np.random.default_rng(0).integers(0, 13, (1, 16))
    for read in (lm["Ra0"], lm["Ra0N3"], lm.loss, lambda ids: lm.residual(ids, 0)):
        with compilations() as compiled:
            for length in range(2, 17):
                jax.block_until_ready(read(ids[:, :length]))
        assert compiled.value <= 6


def test_features_of_other_indices_compile_nothing(lm, tok_ids, compilations):
    for tag, indices in (("M0N3", None), ("M0", [1, 2, 3])):
        lm[tag](tok_ids, indices)
    with compilations() as compiled:
        lm["M0N7"](tok_ids)
        lm["M0"](tok_ids, indices=5)
        lm["M0"](tok_ids, indices=slice(0, 9, 3))
    assert compiled.value == 0


def test_a_compiled_model_never_ignores_a_hook(lm, tok_ids):
    """One model runs the same ids with one edit after another at a hook point; each equals NumPy's result."""
    flat, name, scale = flatten(lm.params), "blocks.0.hook_mlp_out", [1.0]
    vector = np.linspace(-1, 1, 16)
    steps = [
        ({}, {}),
        (interventions.steer(name, jnp.asarray(vector, jnp.float32)), {name: lambda v, seen: v + vector}),
        (interventions.steer(name, jnp.asarray(-vector, jnp.float32)), {name: lambda v, seen: v - vector}),
        (interventions.scale(name, 0.5), {name: lambda v, seen: v * 0.5}),
        (interventions.patch(name, 0.5), {name: lambda v, seen: np.full_like(v, 0.5)}),
        ({name: lambda v, acts: v * 2}, {name: lambda v, seen: v * 2}),
        ({name: lambda v, acts: v * scale[0]}, {name: lambda v, seen: v * scale[0]}),
        ({}, {}),
    ]
    for hooks, edits in steps:
        for factor in (1.0, 3.0):
            scale[0] = factor  # a plain function is called on every pass
            expected, values = forward(flat, lm.config, tok_ids, edits)
            logprobs, acts = lm.run_with_hooks(tok_ids, hooks, keep=[name])
            assert_close(logprobs, log_softmax(expected), F32)
            assert_close(acts[name], values[name], F32)
    assert_close(lm(tok_ids), log_softmax(forward(flat, lm.config, tok_ids)[0]), F32)


def test_kept_activations_come_in_the_order_asked_for(lm, tok_ids):
    names = ["blocks.1.hook_mlp_out", "hook_embed", "blocks.0.attn.hook_z"]
    assert list(lm.run_with_cache(tok_ids, names)[1]) == names
    assert list(lm.run_with_hooks(tok_ids, {}, names)[1]) == names


def test_no_hooks_may_be_none(lm, tok_ids):
    logprobs, acts = lm.run_with_hooks(tok_ids, None, keep="hook_embed")
    np.testing.assert_array_equal(logprobs, lm(tok_ids))
    assert list(acts) == ["hook_embed"]


def test_hooks_and_splices_act_together_splices_first(lm, tok_ids):
    name, dictionary = "blocks.1.hook_mlp_out", lm.dictionaries["Mo1"]
    expected, _ = forward(
        flatten(lm.params),
        lm.config,
        tok_ids,
        {name: lambda v, seen: oracle.reconstruct(dictionary.params, dictionary.config, v) * 2},
    )
    logprobs, _ = lm.splice("Mo1").run_with_hooks(tok_ids, interventions.scale(name, 2.0))
    assert_close(logprobs, log_softmax(expected), F32)


# Dictionaries


def test_splicing_returns_another_model_and_leaves_this_one_alone(lm, tok_ids):
    before = np.asarray(lm(tok_ids))
    spliced = lm.splice(["M1", "A1"])
    assert (spliced.spliced, lm.spliced) == (("A1", "M1"), ())
    np.testing.assert_array_equal(lm(tok_ids), before)
    assert np.abs(spliced(tok_ids) - before).max() > 0.01
    lm.attach("A1", make_dictionary("any", "any", 9))
    after = np.asarray(spliced(tok_ids))
    np.testing.assert_array_equal(spliced(tok_ids), after)
    assert spliced.dictionaries["A1"] is not lm.dictionaries["A1"]


def test_splicing_again_adds_sites_and_changes_switches(lm, tok_ids):
    twice = lm.splice("M1").splice(["Ra1", "M1"], include_error=True)
    assert twice.spliced == ("Ra1", "M1")
    assert_close(twice(tok_ids), lm(tok_ids), F32)
    assert_close(lm.splice("M1").splice("A1")(tok_ids), lm.splice(["A1", "M1"])(tok_ids), F32)


def test_a_read_of_a_spliced_site_is_the_dictionary_s_input_not_its_output(lm, tok_ids):
    assert_close(lm.splice("Mo1")["Mo1"](tok_ids), lm["Mo1"](tok_ids), F32)
    assert np.abs(lm.splice("M1")["Mo1"](tok_ids) - lm["Mo1"](tok_ids)).max() > 0.01


def test_a_residual_is_read_before_the_site_s_own_splice(lm, tok_ids):
    assert_close(lm.splice("Ra1").residual(tok_ids, 1), lm.residual(tok_ids, 1), F32)
    assert np.abs(lm.splice("Ra1").residual(tok_ids, 2) - lm.residual(tok_ids, 2)).max() > 0.01


def test_a_dictionary_takes_the_place_where_it_is_attached(lm, tok_ids):
    lm.attach("M1", make_dictionary("elsewhere", "nowhere", 7))
    assert lm.dictionaries["M1"].config.hook_in == "blocks.1.hook_mlp_in"
    assert lm.dictionaries["M1"].config.hook_out == "blocks.1.hook_mlp_out"
    assert lm["M1"](tok_ids).shape == (3, 11, 12)


# Folders


def test_a_saved_model_loads_as_the_same_model(lm, tok_ids, tmp_path):
    lm.save_pretrained(tmp_path / "lm")
    again = TinyModel(tmp_path / "lm")
    assert again.config == lm.config
    np.testing.assert_array_equal(again(tok_ids), lm(tok_ids))
    np.testing.assert_array_equal(again["M1"](tok_ids), lm["M1"](tok_ids))
    assert again.dictionaries.keys() == {"M1"}, "the others are loaded when they are used"
    assert again.dictionary_tags == ("M0", "Ra1", "A1", "Rm1", "M1", "Mo1")
    again.attach("A0", make_dictionary("any", "any"))
    assert again.dictionary_tags == ("A0", "M0", "Ra1", "A1", "Rm1", "M1", "Mo1")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_model_and_its_readers_can_be_pickled_and_copied(lm, tok_ids, tmp_path, copied):
    lm.save_pretrained(tmp_path / "lm")
    saved = TinyModel(tmp_path / "lm").splice("M1")  # M1 is loaded, the others are not
    again = copied(saved)
    assert (again.config, again.spliced) == (saved.config, ("M1",))
    np.testing.assert_array_equal(again(tok_ids), saved(tok_ids))
    np.testing.assert_array_equal(again["A1"](tok_ids), saved["A1"](tok_ids))
    np.testing.assert_array_equal(copied(lm["M0N3"])(tok_ids), lm["M0N3"](tok_ids))


def test_a_training_run_s_folder_holds_its_model_in_a_folder_of_that_name(lm, tok_ids, tmp_path):
    lm.save_pretrained(tmp_path / "run" / "model")
    np.testing.assert_array_equal(TinyModel(str(tmp_path / "run"))(tok_ids), lm(tok_ids))


def test_a_saved_model_may_be_loaded_for_bfloat16(lm, tok_ids, tmp_path):
    lm.save_pretrained(tmp_path / "lm")
    half = TinyModel(tmp_path / "lm", dtype=jnp.bfloat16)
    assert half.config.dtype == "bfloat16"
    assert half(tok_ids).dtype == jnp.float32
    assert_close(half(tok_ids), lm(tok_ids), BF16)


def test_its_repr_says_what_it_is(lm):
    assert repr(lm) == f"TinyModel(2 layers, d_model 16, {lm.config.n_params:,} parameters)"
    assert repr(lm.splice(["M1", "A1"])).endswith("parameters, spliced: A1, M1)")


def test_parameters_of_a_fresh_transformer_make_a_model():
    config = ModelConfig(n_layers=1, d_model=8, n_heads=1, d_mlp=8, n_ctx=4, d_vocab=17)
    variables = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    logprobs = TinyModel.from_params(config, variables["params"])([[1, 2, 3, 4]])
    assert_close(np.exp(np.asarray(logprobs, np.float64)).sum(-1), np.ones((1, 4)), F32)


def test_padding_is_never_a_target_of_the_loss_and_end_only_where_the_mask_counts_it(lm, tok_ids):
    pad, end = lm.config.pad_id, lm.config.end_id
    ids = np.where(np.arange(11) < [[11], [8], [6]], tok_ids, pad)
    ids[1, 7] = end
    logits = np.asarray(lm.logits(ids))
    without_end = next_token_loss(logits, ids, (ids != pad) & (ids != end))
    with_end = next_token_loss(logits, ids, ids != pad)
    masks = [(None, without_end), *((np.ones(ids.shape, kind), with_end) for kind in (float, bool, np.int32))]
    for mask, expected in masks:
        assert_close(lm.loss(ids, mask), expected, F32)
        assert_close(jax.jit(lm.loss)(ids, mask), expected, F32)


def test_one_sequence_is_a_batch_of_one_inside_transformations_too(lm, tok_ids):
    row = tok_ids[0]
    for call in (lm, lm.loss, lm["M0"], lambda ids: lm.run_with_hooks(ids, {})[0]):
        assert_close(jax.jit(call)(row), call(row), F32)
        assert_close(jax.vmap(call)(jnp.asarray(tok_ids))[0], call(row), F32)
    assert_close(lm.loss(row, np.ones(11)), lm.loss(row), F32)


def test_a_string_is_one_name_to_keep(lm, tok_ids):
    for kept in (lm.run_with_hooks(tok_ids, {}, "hook_embed")[1], lm.run_with_cache(tok_ids, "hook_embed")[1]):
        assert list(kept) == ["hook_embed"]
    _, acts = run_with_hooks(lm.params, lm.config, jnp.asarray(tok_ids), keep="hook_embed")
    assert list(acts) == ["hook_embed"]

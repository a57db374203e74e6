"""Flat names and stacked views of the parameters."""

from unittest import mock

import jax
import numpy as np
import pytest
from conftest import param_shapes, random_params
from flax import errors
from oracle import error_of

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.io.convert import model_tensors
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.transformer import Transformer
from tinymodel_jax.params import flatten, unflatten


def test_flat_names_are_the_converter_s_names(config, params):
    assert set(flatten(params)) == {tensor.name for tensor in model_tensors(config)}


def test_flattening_and_unflattening_give_the_same_tree():
    shapes = param_shapes(ModelConfig(n_layers=11, d_model=4, n_heads=2, d_mlp=3, n_ctx=5, d_vocab=7))
    tree = random_params(shapes, 0)
    again = unflatten(flatten(tree))
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, tree))


def test_weight_views_are_the_parameters_stacked_over_layers_in_order():
    config = ModelConfig(n_layers=11, d_model=4, n_heads=2, d_mlp=3, n_ctx=5, d_vocab=7)
    flat = flatten(random_params(param_shapes(config), 0))
    lm = TinyModel.from_params(config, unflatten(flat))
    for name in ("W_E", "W_pos", "W_U", "b_U"):
        np.testing.assert_array_equal(getattr(lm, name), flat[name])
    modules = {"attn": ("W_Q", "W_K", "W_V", "W_O", "b_O"), "mlp": ("W_in", "b_in", "W_out", "b_out")}
    for module, names in modules.items():
        for name in names:
            view = getattr(lm, name)
            assert view.shape[0] == 11
            for layer in range(11):
                np.testing.assert_array_equal(view[layer], flat[f"blocks.{layer}.{module}.{name}"])


def test_weight_views_have_transformer_lens_shapes(config, params):
    lm = TinyModel.from_params(config, params)
    assert lm.W_Q.shape == lm.W_K.shape == lm.W_V.shape == (2, 2, 16, 8)
    assert lm.W_O.shape == (2, 2, 8, 16)
    assert (lm.W_in.shape, lm.W_out.shape) == ((2, 16, 32), (2, 32, 16))
    assert (lm.W_E.shape, lm.W_pos.shape, lm.W_U.shape) == ((23, 16), (16, 16), (16, 23))


def test_parameters_that_do_not_fit_are_all_named(config, params):
    wrong = {**params, "W_U": params["W_U"].T, "W_extra": params["b_U"]}
    del wrong["W_E"]
    message = error_of(lambda: TinyModel.from_params(config, wrong))
    assert "missing 'W_E' (23, 16)" in message
    assert "unexpected 'W_extra'" in message
    assert "'W_U' has shape (23, 16), expected (16, 23)" in message


def test_a_pass_does_not_trace_the_initializers_of_parameters_that_exist(config, params, monkeypatch):
    draws = mock.Mock(wraps=jax.random.uniform)
    monkeypatch.setattr(jax.random, "uniform", draws)
    ids = jax.ShapeDtypeStruct((1, 4), np.int32)
    jax.eval_shape(Transformer(config).apply, {"params": params}, ids)
    assert not draws.called
    jax.eval_shape(Transformer(config).init, jax.random.key(0), ids)
    assert draws.called


def test_a_parameter_of_another_shape_is_refused(config, params):
    wrong = {**params, "W_pos": params["W_pos"][:, :-1]}
    with pytest.raises(errors.ScopeParamShapeError, match="W_pos"):
        Transformer(config).apply({"params": wrong}, np.zeros((1, 4), np.int32))


def test_making_a_model_and_a_dictionary_of_numpy_arrays_compiles_no_program(compilations):
    config = ModelConfig(n_layers=1, d_model=6, n_heads=2, d_mlp=5, n_ctx=9, d_vocab=13)
    arrays = jax.tree.map(np.array, random_params(param_shapes(config), 0))
    with compilations() as compiled:
        lm = TinyModel.from_params(config, arrays)
        lm.attach("Rm0", Dictionary.from_directions("blocks.0.hook_resid_mid", np.eye(6)))
    assert compiled.value == 0
    arrays["W_E"][:] = 0
    assert np.abs(lm.W_E).min() > 0

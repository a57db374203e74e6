"""Training that starts from a finished dictionary."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_users_run_it, make_dictionary

from tinymodel_jax.config import TRAINED_ARCHITECTURES
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.training import (
    ActivationStatistics,
    DictionaryRecipe,
    finalize,
    init_state,
    start_from,
    train_on_arrays,
)
from tinymodel_jax.training.dictionary_state import DictionaryTrainState

pytestmark = pytest.mark.usefixtures("standard_promotion")
F32 = 1e-4
FEATURES, WIDTH = 12, 16


def recipe_of(architecture: Any, **changes: Any) -> DictionaryRecipe:
    k = {"k": 3} if architecture in ("topk", "batch_topk") else {}
    return DictionaryRecipe(architecture, FEATURES, 10, **{**k, **changes})


def vectors(seed: int, scale: float = 1.0) -> jax.Array:
    return scale * (1 + jax.random.normal(jax.random.key(seed), (64, WIDTH)))


def started(recipe: DictionaryRecipe, dictionary: Dictionary, out: str = "y") -> DictionaryTrainState:
    """Return the state that a training from `dictionary` starts with, on activations of other scales."""
    zero = ActivationStatistics.zero(WIDTH)
    targets = None if out == "x" else zero.update(vectors(1, scale=7.0))
    state = init_state(jax.random.key(0), recipe, zero.update(vectors(0, scale=0.2)), targets)
    found = start_from(state, recipe, dictionary)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert [leaf.shape for leaf in jax.tree.leaves(found)] == [leaf.shape for leaf in jax.tree.leaves(state)]
    return found


def begun(recipe: DictionaryRecipe, dictionary: Dictionary, out: str = "y") -> Dictionary:
    """Return the dictionary that a training from `dictionary` starts as."""
    return Dictionary.from_params(*finalize(started(recipe, dictionary, out), recipe, "x", out))


def test_both_rows_of_a_feature_start_with_the_same_norm() -> None:
    params = started(recipe_of("relu"), make_dictionary("x", "y")).params
    encoder, decoder = (np.linalg.norm(params[name], axis=1) for name in ("W_enc_T", "W_dec"))
    np.testing.assert_allclose(encoder, decoder, rtol=F32)


@pytest.mark.parametrize("architecture", TRAINED_ARCHITECTURES)
@pytest.mark.parametrize("skip", [False, True])
def test_a_training_starts_as_the_dictionary_on_activations_of_any_scale(architecture: str, skip: bool) -> None:
    k = {"k": 3} if architecture in ("topk", "batch_topk") else {}
    dictionary = make_dictionary("x", "y", architecture=architecture, skip=skip, **k)
    unit = dictionary.params["W_dec"] / jnp.linalg.norm(dictionary.params["W_dec"], axis=1, keepdims=True)
    if architecture in ("topk", "batch_topk"):  # they choose by activations times norms
        dictionary = Dictionary.from_params(dictionary.config, {**dictionary.params, "W_dec": unit})
    found, x = begun(recipe_of(architecture, skip=skip), dictionary), vectors(2)
    np.testing.assert_allclose(found(x), dictionary(x), rtol=F32, atol=F32)
    assert found.config == dictionary.config
    assert float((dictionary.encode(x) > 0).mean()) > 0.01


@pytest.mark.parametrize(("there", "here"), [("relu", "jumprelu"), ("batch_topk", "jumprelu"), ("jumprelu", "relu")])
@pytest.mark.parametrize("subtracted", [(True, False), (False, True)])
def test_another_recipe_starts_from_the_same_pre_activations(
    there: str, here: str, subtracted: tuple[bool, bool]
) -> None:
    k = {"k": 3} if there == "batch_topk" else {}
    dictionary = make_dictionary("x", "x", architecture=there, subtract_b_dec=subtracted[0], **k)
    found = begun(recipe_of(here, subtract_b_dec=subtracted[1]), dictionary, out="x")
    x, size = vectors(2), jnp.linalg.norm(dictionary.params["W_dec"], axis=1)
    wanted, got = dictionary, found
    if here == "relu":  # without thresholds, more features are active
        plain = dataclasses.replace(dictionary.config, architecture="relu", k=None)
        wanted = Dictionary.from_params(plain, {n: a for n, a in dictionary.params.items() if n != "threshold"})
    np.testing.assert_allclose(got.encode(x), wanted.encode(x) * size, rtol=F32, atol=F32)
    np.testing.assert_allclose(got(x), wanted(x), rtol=F32, atol=F32)


def test_gated_dictionaries_start_with_another_subtraction() -> None:
    dictionary = make_dictionary("x", "x", architecture="gated", subtract_b_dec=True)
    found, x = begun(recipe_of("gated"), dictionary, out="x"), vectors(2)
    np.testing.assert_allclose(found(x), dictionary(x), rtol=F32, atol=F32)


def test_features_without_weights_stay_finite() -> None:
    dictionary = make_dictionary("x", "y")
    params = {**dictionary.params, "W_enc": dictionary.params["W_enc"].at[:, 0].set(0)}
    params["W_dec"] = params["W_dec"].at[1].set(0)
    found = begun(recipe_of("relu"), Dictionary.from_params(dictionary.config, params))
    assert all(bool(jnp.isfinite(array).all()) for array in found.params.values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_features": 24}, "n_features is 12 there and 24 here"),
        ({"architecture": "gated"}, "a gated dictionary cannot start from a relu one"),
        ({"skip": False}, "it has a skip connection, and the recipe has none"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], says: str) -> None:
    dictionary = make_dictionary("x", "y", skip=True)
    with pytest.raises(ValueError, match=says):
        begun(dataclasses.replace(recipe_of("relu", skip=True), **changes), dictionary)


@pytest.mark.usefixtures("no_type_checks")
def test_a_training_starts_from_what_a_model_returns_for_a_tag_and_not_from_a_path() -> None:
    dictionary, recipe = make_dictionary("x", "y", skip=True), recipe_of("relu", skip=True)
    reader: Any = types.SimpleNamespace(dictionary=dictionary, feature=None)
    jax.tree.map(np.testing.assert_array_equal, begun(recipe, reader).params, begun(recipe, dictionary).params)
    path: Any = "runs/M1"
    with pytest.raises(ValueError, match=r"got 'runs/M1'; .* Dictionary\.from_pretrained\(path\) loads one"):
        train_on_arrays(np.asarray(vectors(0)), recipe=recipe_of("relu"), init_from=path)


def test_a_training_on_arrays_goes_on_from_a_dictionary_and_leaves_it_as_it_is() -> None:
    x = np.asarray(vectors(0))
    recipe = dataclasses.replace(recipe_of("gated", learning_rate=1e-3), batch_size=32, steps=3)
    with as_users_run_it():
        first, _ = train_on_arrays(x, recipe=recipe)
        before = first(jnp.asarray(x))
        still, _ = train_on_arrays(x, recipe=dataclasses.replace(recipe, learning_rate=1e-20), init_from=first)
        on, history = train_on_arrays(x, recipe=recipe, init_from=first)
    np.testing.assert_allclose(first(jnp.asarray(x)), before)
    np.testing.assert_allclose(still(jnp.asarray(x)), before, rtol=F32, atol=F32)
    assert not np.allclose(on(jnp.asarray(x)), before, rtol=F32, atol=F32)
    assert len(history["loss"]) == 3

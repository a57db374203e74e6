"""Training of crosscoders and cross-layer transcoders, against plain dictionaries and products by hand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle import F32, assert_close, error_of

from tinymodel_jax.config import TRAINED_ARCHITECTURES
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.layers import is_written
from tinymodel_jax.training.dictionary_forward import execution_for, loss_and_gradient
from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe, recipe_preset
from tinymodel_jax.training.dictionary_state import ActivationStatistics, finalize, init_state
from tinymodel_jax.training.dictionary_step import settle_threshold, train_step
from tinymodel_jax.training.warm_start import start_from

pytestmark = pytest.mark.usefixtures("standard_promotion")
LAYERS, WIDTH, FEATURES, ROWS = 3, 8, 18, 64
SCALES = np.repeat([1.0, 5.0, 0.2], WIDTH)
"""The hook points' values have very different norms."""
WRITTEN = is_written(FEATURES, LAYERS * WIDTH, LAYERS)


def rows(seed: int, count: int = ROWS) -> jax.Array:
    values = jax.random.normal(jax.random.key(seed), (count, LAYERS * WIDTH)) + 0.3
    return values * jnp.asarray(SCALES, jnp.float32)


def recipe_of(architecture: Any, **changes: Any) -> DictionaryRecipe:
    knobs: dict[str, Any] = {"k": 3} if architecture in ("topk", "batch_topk") else {"sparsity": 0.1}
    options = {"batch_size": ROWS, "learning_rate": 1e-2, "encoder_norm": 0.5, "decoder_norm": 0.5}
    return DictionaryRecipe(architecture, FEATURES, 20, **{**knobs, **options, **changes})


def statistics(*arrays: jax.Array, parts: int = LAYERS) -> list[ActivationStatistics]:
    return [ActivationStatistics.zero(array.shape[1], parts).update(array) for array in arrays]


def trained(recipe: DictionaryRecipe, *arrays: jax.Array, steps: int = 4, parts: int = LAYERS, **options: Any) -> Any:
    """Return the state after some steps on the same batch."""
    optimizer = options.get("optimizer")
    state = init_state(jax.random.key(0), recipe, *statistics(*arrays, parts=parts), optimizer=optimizer)
    step = jax.jit(functools.partial(train_step, recipe=recipe, **options))
    for _ in range(steps):
        state, _ = step(state, recipe.hyper(), *arrays)
    return state


def test_each_hook_points_vectors_are_scaled_to_the_square_root_of_their_width() -> None:
    (found,) = statistics(x := rows(0))
    norms = np.linalg.norm((np.asarray(x) * found.scale).reshape(ROWS, LAYERS, WIDTH), axis=-1)
    np.testing.assert_allclose(norms.mean(axis=0), WIDTH**0.5, rtol=1e-5)


@pytest.mark.parametrize("architecture", TRAINED_ARCHITECTURES)
def test_a_crosscoder_trains_as_an_sae_of_the_scaled_vectors(architecture: Any) -> None:
    x = rows(0)
    (found,) = statistics(x)
    crosscoder = trained(recipe_of(architecture), x)
    sae = trained(recipe_of(architecture, scale_inputs=False), x * found.scale, parts=1)
    jax.tree.map(lambda one, other: assert_close(one, other, F32), crosscoder.params, sae.params)
    of_all = Dictionary.from_params(*finalize(crosscoder, recipe_of(architecture), "a+b+c", "a+b+c"))
    plain = Dictionary.from_params(*finalize(sae, recipe_of(architecture), "x", "x"))
    unit = jnp.mean(found.scale)
    acts = of_all.encode(x)
    np.testing.assert_array_equal(acts > 0, plain.encode(x * found.scale) > 0)
    assert_close(acts * unit, plain.encode(x * found.scale), F32)
    assert_close(of_all(x) * found.scale, plain(x * found.scale), F32)


def test_one_hook_point_trains_as_before() -> None:
    x = rows(0)
    one = trained(recipe_of("topk"), x, parts=1)
    assert one.scale_in.shape == ()
    assert finalize(one, recipe_of("topk"), "x", "x")[0].n_layers == 1


@pytest.mark.parametrize("architecture", ["relu", "gated", "jumprelu", "batch_topk"])
def test_the_gradient_is_that_of_a_transcoder_without_the_other_layers_entries(architecture: Any) -> None:
    x, y = rows(0), rows(1)
    recipe = recipe_of(architecture)
    state = init_state(jax.random.key(0), recipe, *statistics(x, y))
    arguments = recipe, execution_for(recipe), recipe.hyper(), x * state.scale_in, y * state.scale_out, (FEATURES,)
    outcome, gradient = jax.jit(lambda params: loss_and_gradient(params, *arguments))(state.params)
    own = np.arange(LAYERS * WIDTH) // WIDTH == (np.arange(FEATURES) // (FEATURES // LAYERS))[:, None]
    tiled = jnp.where(own, jnp.tile(state.params["W_enc_T"], (1, LAYERS)), 0)
    whole = {**state.params, "W_enc_T": tiled}
    expected, dense = jax.jit(lambda params: loss_and_gradient(params, *arguments))(whole)
    assert_close(outcome.loss, expected.loss, F32)
    assert outcome.l0 == expected.l0
    blocks = np.asarray(dense["W_enc_T"])[own].reshape(FEATURES, WIDTH)
    expected_gradient = {**dense, "W_enc_T": blocks, "W_dec": jnp.where(WRITTEN, dense["W_dec"], 0)}
    jax.tree.map(lambda one, other: assert_close(one, other, F32), gradient, expected_gradient)


@pytest.mark.parametrize("architecture", TRAINED_ARCHITECTURES)
def test_a_finished_transcoder_computes_what_training_computed(architecture: Any) -> None:
    x, y = rows(0), rows(1)
    recipe = recipe_of(architecture)
    state = trained(recipe, x, y)
    state = settle_threshold(state, recipe.hyper(), x, 0, recipe=recipe)
    dictionary = Dictionary.from_params(*finalize(state, recipe, "a+b+c", "d+e+f"))
    arguments = recipe, execution_for(recipe), recipe.hyper(), x * state.scale_in, y * state.scale_out, (FEATURES,)
    outcome, _ = loss_and_gradient(state.params, *arguments)
    active = np.asarray(dictionary.encode(x)) > 0
    kept = active.mean(axis=0).sum() * ROWS  # the one on the threshold is not above it
    assert outcome.l0 * ROWS - kept == pytest.approx(1 if architecture == "batch_topk" else 0, abs=1e-3)
    if architecture == "topk":
        assert active.reshape(ROWS, LAYERS, -1).sum(axis=-1).max() == 3
    if architecture != "batch_topk":
        assert_close(dictionary(x) * state.scale_out, y * state.scale_out - outcome.residual, F32)
    again = start_from(init_state(jax.random.key(1), recipe, *statistics(x * 3, y)), recipe, dictionary)
    restarted = Dictionary.from_params(*finalize(again, recipe, "a+b+c", "d+e+f"))
    jax.tree.map(lambda one, other: assert_close(one, other, F32), restarted.params, dictionary.params)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("batch_topk", {"aux_coefficient": 1.0, "dead_after": 1, "aux_features": 12}),
        ("topk", {"aux_coefficient": 1.0, "dead_after": 1}),
        ("gated", {"reinit_every": 2, "dead_after": 1, "reservoir_size": 32}),
        ("topk", {"reinit_every": 2, "dead_after": 1, "reservoir_size": 32}),
    ],
)
def test_features_never_write_to_earlier_layers(architecture: Any, options: Any) -> None:
    state = trained(recipe_of(architecture, **options), rows(0), rows(1), steps=6)
    W_dec, start = np.asarray(state.params["W_dec"]), trained(recipe_of(architecture), rows(0), rows(1), steps=0)
    np.testing.assert_array_equal(W_dec[~WRITTEN], 0)
    assert (W_dec != start.params["W_dec"])[WRITTEN].any()
    assert np.isfinite(W_dec).all()


def test_a_transcoder_of_unscaled_vectors_computes_what_training_computed() -> None:
    x, y, recipe = rows(0), rows(1), recipe_of("relu", scale_inputs=False)
    state = trained(recipe, x, y)
    dictionary = Dictionary.from_params(*finalize(state, recipe, "a+b+c", "d+e+f"))
    outcome, _ = loss_and_gradient(state.params, recipe, execution_for(recipe), recipe.hyper(), x, y, (FEATURES,))
    assert_close(dictionary(x), y - outcome.residual, F32)


def test_an_optimizer_with_noise_leaves_the_zeros() -> None:
    noisy = optax.chain(optax.add_noise(1.0, 0.5, 0), optax.sgd(0.1))
    state = trained(recipe_of("relu"), rows(0), rows(1), optimizer=noisy)
    np.testing.assert_array_equal(np.asarray(state.params["W_dec"])[~WRITTEN], 0)


def test_recipes_that_do_not_suit_a_cross_layer_transcoder_are_refused() -> None:
    pair = statistics(rows(0), rows(1))

    def refused(recipe: DictionaryRecipe) -> str:
        return error_of(lambda: init_state(jax.random.key(0), recipe, *pair))

    assert "takes no skip" in refused(recipe_of("relu", skip=True))
    assert "takes no Matryoshka prefixes" in refused(recipe_of("relu", prefix_widths=(6, 18)))
    assert "k above the 6 features of a layer" in refused(recipe_of("topk", k=7))
    assert "aux_features below the number of layers, 3" in refused(recipe_of("relu", aux_features=2))
    assert "(17) that 3 layers do not divide" in refused(DictionaryRecipe("relu", 17, 20, sparsity=0.1))
    narrow = recipe_of("relu")
    other = Dictionary.from_params(*finalize(trained(narrow, rows(0), steps=0), narrow, "a+b+c", "a+b+c"))
    message = error_of(lambda: start_from(init_state(jax.random.key(0), narrow, *pair), narrow, other))
    assert "the number of layers is 1 there and 3 here" in message


@pytest.mark.slow
def test_planted_features_that_span_layers_are_found() -> None:
    """Each of 48 features is read at its layer, and written there and at all later ones along directions of its own."""
    layers, width, features, count = 3, 24, 48, 20_000
    random = np.random.default_rng(0)
    layer = np.arange(features) // (features // layers)
    reads, writes = random.normal(size=(features, width)), random.normal(size=(features, layers, width))
    reads /= np.linalg.norm(reads, axis=1, keepdims=True)
    writes /= np.linalg.norm(writes, axis=2, keepdims=True)
    writes *= (np.arange(layers) >= layer[:, None])[..., None]
    amounts = (random.random((count, features)) < 3 / features) * (1 + random.random((count, features)))
    x = np.stack([amounts[:, layer == each] @ reads[layer == each] for each in range(layers)], axis=1).reshape(
        count, -1
    )
    y = np.einsum("nf,fld->nld", amounts, writes).reshape(count, -1)
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    recipe = recipe_preset("house", "batch_topk", features, 800, k=4, learning_rate=1e-2, batch_size=512)
    zero = [ActivationStatistics.zero(layers * width, layers) for _ in range(2)]
    state = init_state(jax.random.key(0), recipe, *(one.update(a) for one, a in zip(zero, (x, y), strict=True)))
    step = jax.jit(functools.partial(train_step, recipe=recipe), donate_argnums=0)
    for i in range(recipe.steps):
        picked = jax.random.randint(jax.random.key(i), (512,), 0, count)
        state, metrics = step(state, recipe.hyper(), x[picked], y[picked])
    assert metrics["explained_variance"] > 0.95  # pyright: ignore[reportPossiblyUnboundVariable]
    rows_found = np.array(state.params["W_dec"] / state.scale_out)
    rows_found /= np.linalg.norm(rows_found, axis=1, keepdims=True)
    wanted = writes.reshape(features, -1) / np.linalg.norm(writes.reshape(features, -1), axis=1, keepdims=True)
    cosines = wanted @ rows_found.T
    same_layer = layer[:, None] == layer
    assert np.where(same_layer, cosines, 0).max(axis=1).mean() > 0.9

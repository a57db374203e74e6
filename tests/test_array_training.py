"""`train_on_arrays`: its public name, bad rows, the L0 of short trainings, a loss and an optimizer of the caller's."""

import dataclasses
import functools
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from conftest import as_users_run_it

from tinymodel_jax import training
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.training import DictionaryRecipe, finalize, init_state, recipe_preset, train_on_arrays, train_step
from tinymodel_jax.training.array_training import array_statistics, require_finite_rows
from tinymodel_jax.training.data import batch_indices
from tinymodel_jax.training.dictionary_forward import execution_for
from tinymodel_jax.training.dictionary_step import settle_threshold, settle_thresholds, stack_members

pytestmark = pytest.mark.usefixtures("standard_promotion")
RECIPE = recipe_preset("house", "topk", 8, 2, k=2, batch_size=4)


@functools.cache
def planted(rows: int = 4000) -> np.ndarray:
    """Sums of about 3 of 64 directions."""
    random = np.random.default_rng(0)
    amounts = (random.random((rows, 64)) < 3 / 64) * (1 + random.random((rows, 64)))
    return (amounts @ random.normal(size=(64, 16))).astype(np.float32)


def test_the_names_of_the_documentation_are_functions_and_load_when_they_are_used() -> None:
    assert all(callable(getattr(training, name)) for name in dir(training))
    assert {"DictionaryRecipe", "finalize", "init_state", "recipe_preset", "train_on_arrays", "train_step"} <= {
        *dir(training)
    }
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        training.trian  # noqa: B018


@pytest.mark.parametrize("which", ["x", "y"])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.nan, np.float32),
        (np.inf, np.float64),
        (-np.inf, np.float16),
        (np.nan, ml_dtypes.bfloat16),
        (-1e300, np.float64),
        (1e25, np.float32),
    ],
)
def test_a_row_that_is_not_finite_is_named(which: str, value: float, dtype: Any) -> None:
    arrays = {name: planted(40).astype(dtype) for name in ("x", "y")}
    arrays[which][23, 5] = value
    says = rf"^train_on_arrays: {which}: row 23 \(the first is 0\) contains .+ Leave the row out"
    with as_users_run_it(), pytest.raises(ValueError, match=says):
        train_on_arrays(arrays["x"], arrays["y"], recipe=RECIPE)


def test_a_mapped_file_is_checked_in_parts(tmp_path: Path) -> None:
    array = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float16, (200_000, 256))
    array[199_999, 0] = np.nan
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^x\.npy: row 199999 "):
        require_finite_rows(mapped, "x.npy")
    assert tracemalloc.get_traced_memory()[1] < mapped.nbytes / 2
    tracemalloc.stop()


def test_a_training_that_diverges_on_finite_data_speaks_of_the_learning_rate() -> None:
    recipe = recipe_preset("house", "topk", 8, 30, k=2, batch_size=4, learning_rate=1e38)
    with (
        as_users_run_it(),
        pytest.raises(ValueError, match=r"is \S+ at step \d+, on finite data; try a lower learning_rate"),
    ):
        train_on_arrays(planted(40), recipe=recipe)


def short(steps: int, k: int) -> DictionaryRecipe:
    return recipe_preset("house", "batch_topk", 128, steps, k=k, batch_size=128)


@pytest.mark.parametrize(
    ("steps", "k"),
    [(20, 4), *(pytest.param(steps, k, marks=pytest.mark.slow) for steps, k in ((20, 32), (80, 4), (320, 32)))],
)
def test_batch_topk_has_its_l0_after_a_training_of_any_length(steps: int, k: int) -> None:
    dictionary, history = train_on_arrays(planted(), recipe=short(steps, k))
    assert history["l0"][-1] == pytest.approx(k, rel=0.01)
    assert float((dictionary.encode(jnp.asarray(planted())) > 0).sum(axis=1).mean()) == pytest.approx(k, rel=0.1)


def test_the_thresholds_of_a_sweep_are_those_of_its_members() -> None:
    recipe, x = short(20, 8), jnp.asarray(planted()[:128])
    states = [init_state(jax.random.key(seed), recipe, array_statistics(planted(), 0)) for seed in (0, 1)]
    step = jax.jit(functools.partial(train_step, recipe=recipe))
    states = [step(state, recipe.hyper(), x)[0] for state in states]
    hypers = [recipe.hyper(k=3), recipe.hyper(k=8)]
    settle = jax.jit(functools.partial(settle_threshold, recipe=recipe))
    alone = [settle(state, hyper, x, 0) for state, hyper in zip(states, hypers, strict=True)]
    for mapped in (True, False):
        execution = execution_for(recipe, "cpu")._replace(map_members=mapped)
        settle_all = jax.jit(functools.partial(settle_thresholds, recipe=recipe, execution=execution))
        together = settle_all(stack_members(states), stack_members(hypers), x, 0)
        np.testing.assert_allclose(together.threshold, [state.threshold for state in alone], rtol=1e-6)
    for state, k in zip(alone, (3, 8), strict=True):
        _, params = finalize(state._replace(threshold=state.threshold * (1 - 1e-6)), recipe, "x", "x")
        pre = x @ params["W_enc"] + params["b_enc"]
        assert float((pre > params["threshold"]).sum(axis=1).mean()) == pytest.approx(k, abs=0.01)


def test_batches_are_counted_alike_in_the_threshold() -> None:
    recipe = short(20, 8)
    state = init_state(jax.random.key(0), recipe, array_statistics(planted(), 0))._replace(threshold=jnp.float32(99))
    parts, single = np.split(planted()[:384], 3), []
    for i, part in enumerate(parts):
        state = settle_threshold(state, recipe.hyper(), jnp.asarray(part), i, recipe=recipe)
        single.append(settle_threshold(state, recipe.hyper(), jnp.asarray(part), 0, recipe=recipe).threshold)
    assert float(state.threshold) == pytest.approx(np.mean(single), rel=1e-5)
    other = init_state(jax.random.key(0), RECIPE, array_statistics(planted(), 0))
    assert settle_threshold(other, RECIPE.hyper(), jnp.asarray(parts[0]), 0, recipe=RECIPE) is other


# A loss term and an optimizer of the caller's


def penalty(x: Any, y: Any, activations: Any, reconstruction: Any) -> Any:
    return 0.3 * jnp.mean(jnp.sum(activations, axis=1))


def relu(**changes: Any) -> DictionaryRecipe:
    return DictionaryRecipe("relu", 24, 12, batch_size=64, learning_rate=1e-2, **changes)


def assert_same_training(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    for name, array in wanted[0].params.items():
        np.testing.assert_allclose(found[0].params[name], array, rtol=tolerance, atol=tolerance, err_msg=name)
    np.testing.assert_allclose(found[1]["loss"], wanted[1]["loss"], rtol=tolerance)


def test_a_penalty_given_as_an_extra_loss_trains_as_the_recipes_own() -> None:
    own = train_on_arrays(planted(400), recipe=relu(), extra_loss=penalty)
    assert_same_training(own, train_on_arrays(planted(400), recipe=relu(sparsity=0.3)))
    assert own[1]["extra_loss"][0] == pytest.approx(own[1]["loss"][0] - own[1]["reconstruction"][0], rel=1e-4)
    without = train_on_arrays(planted(400), recipe=relu())
    assert "extra_loss" not in without[1]
    assert own[1]["l0"][-1] < without[1]["l0"][-1]


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_an_extra_loss_sees_the_batch_as_the_finished_dictionary_computes_it(architecture: str) -> None:
    recipe = recipe_preset("house", architecture, 24, 1, k=3, batch_size=64)  # type: ignore[arg-type]
    seen = []

    def look(*given: Any) -> Any:
        jax.debug.callback(lambda *arrays: seen.append([np.asarray(array) for array in arrays]), *given)
        return jnp.zeros(())

    x, y = planted(64), planted(64)[:, ::-1].copy()
    state = init_state(jax.random.key(0), recipe, array_statistics(x, 0), array_statistics(y, 0))
    step = functools.partial(train_step, recipe=recipe)
    after, metrics = jax.jit(functools.partial(step, extra_loss=look))(state, recipe.hyper(), x, y)
    wanted, found = jax.jit(step)(state, recipe.hyper(), x, y)
    assert metrics["loss"] == pytest.approx(float(found["loss"]), rel=1e-5)
    for name, array in wanted.params.items():
        np.testing.assert_allclose(after.params[name], array, rtol=1e-4, atol=1e-6, err_msg=name)
    seen_x, seen_y, activations, reconstruction = seen[0]
    np.testing.assert_allclose(seen_x, x * state.scale_in, rtol=1e-6)
    np.testing.assert_allclose(seen_y, y * state.scale_out, rtol=1e-6)
    threshold = float(metrics["threshold"]) * (1 - 1e-5)
    config, params = finalize(state._replace(threshold=jnp.float32(threshold)), recipe, "x", "y")
    finished = Dictionary.from_params(config, params)
    np.testing.assert_allclose(activations / state.scale_out, finished.encode(jnp.asarray(x)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reconstruction / state.scale_out, finished(jnp.asarray(x)), rtol=1e-4, atol=1e-5)


def test_plain_descent_instead_of_adam_is_the_loop_by_hand() -> None:
    recipe, x = relu(sparsity=0.3, clip_norm=None), planted(400)
    found, history = train_on_arrays(x, recipe=recipe, optimizer=optax.sgd(1e-3))
    assert "learning_rate" not in history
    state = init_state(jax.random.key(0), recipe, array_statistics(x, 0))
    params = state.params

    def loss(params: Any, batch: Any) -> Any:
        acts = jax.nn.relu(batch @ params["W_enc_T"].T + params["b_enc"])
        error = jnp.sum((batch - acts @ params["W_dec"] - params["b_dec"]) ** 2, axis=1)
        return jnp.mean(error + 0.3 * acts @ jnp.linalg.norm(params["W_dec"], axis=1))

    gradient = jax.jit(jax.grad(loss))
    for i in range(recipe.steps):
        batch = x[batch_indices(len(x), recipe.batch_size, 0, i)] * state.scale_in
        params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient(params, batch))
    wanted = finalize(state._replace(params=params), recipe, "x", "x")[1]
    for name, array in wanted.items():
        np.testing.assert_allclose(found.params[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_recipes_adam_given_as_an_optimizer_trains_alike_and_forgets_dead_features_moments() -> None:
    recipe = dataclasses.replace(relu(sparsity=0.3, clip_norm=None), batch_size=2, dead_after=2)
    recipe = dataclasses.replace(recipe, reinit_every=4, reservoir_size=8)
    given = train_on_arrays(planted(400), recipe=recipe, optimizer=optax.adam(1e-2))
    wanted = train_on_arrays(planted(400), recipe=recipe)
    assert wanted[1]["dead_fraction"].max() > 0, "nothing is re-initialised, and the test shows nothing"
    assert_same_training(given, wanted, 1e-3)


def test_a_state_of_another_optimizer_is_an_error_that_says_what_to_do() -> None:
    recipe, x = relu(), planted(64)
    state = init_state(jax.random.key(0), recipe, array_statistics(x, 0))
    with pytest.raises(ValueError, match="another optimizer; make it with init_state"):
        train_step(state, recipe.hyper(), jnp.asarray(x), recipe=recipe, optimizer=optax.sgd(1e-3))


def test_a_dictionary_knows_the_site_that_its_arrays_come_from() -> None:
    x = planted(40)
    sae, _ = train_on_arrays(x, recipe=RECIPE, site="Rm2")
    transcoder, _ = train_on_arrays(x, x, recipe=RECIPE, site="M2")
    assert (sae.config.hook_in, sae.config.hook_out) == ("blocks.2.hook_resid_mid",) * 2
    assert (transcoder.config.hook_in, transcoder.config.hook_out) == ("blocks.2.hook_mlp_in", "blocks.2.hook_mlp_out")


@pytest.mark.parametrize(
    ("tag", "with_targets", "message"),
    [
        ("M2", False, "site='M2' is not that of an SAE, as y is not given, at one hook point"),
        ("Rm2", True, "site='Rm2' is not that of a transcoder, as y is given"),
        ("Ra0+Ra1", False, "is not that of an SAE"),
        ("M2N5", True, "site='M2N5' names a feature"),
    ],
)
def test_a_site_that_does_not_fit_the_arrays_is_an_error(tag: str, with_targets: bool, message: str) -> None:
    x = planted(40)
    with pytest.raises(ValueError, match=message):
        train_on_arrays(x, x if with_targets else None, recipe=RECIPE, site=tag)


def test_progress_passes_through_the_callers_track() -> None:
    seen = []

    def track(items: Any, what: str) -> Any:
        for item in items:
            seen.append((item, what))
            yield item

    train_on_arrays(planted(40), recipe=RECIPE, track=track)
    assert seen == [(0, "training"), (1, "training")]

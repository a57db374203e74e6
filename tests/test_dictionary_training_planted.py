"""Training on data whose features are known: they are found, dead features come back, every knob moves L0."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_users_run_it

from tinymodel_jax.config import TrainedArchitecture
from tinymodel_jax.training.array_training import train_on_arrays
from tinymodel_jax.training.data import batch_indices
from tinymodel_jax.training.dead_features import add_aux_gradient, reinitialise_dead, update_reservoir
from tinymodel_jax.training.dictionary_forward import execution_for
from tinymodel_jax.training.dictionary_losses import aux_loss
from tinymodel_jax.training.dictionary_recipe import recipe_preset
from tinymodel_jax.training.dictionary_state import ActivationStatistics, empty_reservoir, init_state
from tinymodel_jax.training.dictionary_step import train_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
WIDTH, FEATURES, ACTIVE = 32, 64, 3


@functools.cache
def planted(rows=20_000):
    """Sums of about 3 of 64 known directions, each with an amount between 1 and 2."""
    random = np.random.default_rng(0)
    directions = random.normal(size=(FEATURES, WIDTH))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    amounts = (random.random((rows, FEATURES)) < ACTIVE / FEATURES) * (1 + random.random((rows, FEATURES)))
    return (amounts @ directions).astype(np.float32), directions


@functools.cache
def compiled_step(recipe):
    return jax.jit(functools.partial(train_step, recipe=recipe))


def recipe_for(architecture, steps=1000, **changes):
    fields = {"learning_rate": 1e-2, "batch_size": 512} | changes
    return recipe_preset("house", architecture, FEATURES, steps, **fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "knobs"),
    [
        ("relu", {"sparsity": 1.0}),
        ("topk", {"k": 3}),
        ("batch_topk", {"k": 4}),
        ("jumprelu", {"target_l0": 3.0}),
        ("gated", {"sparsity": 1.0, "target_l0": 3.0}),
    ],
)
def test_the_planted_features_are_found(architecture, knobs):
    x, directions = planted()
    dictionary, history = train_on_arrays(x, recipe=recipe_for(architecture, **knobs))
    rows = np.asarray(dictionary.params["W_dec"])
    assert (directions @ rows.T).max(axis=1).mean() > 0.9
    assert history["loss"].shape == (1000,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "less", "more"),
    [
        ("relu", {"sparsity": 3.0}, {"sparsity": 0.3}),
        ("gated", {"sparsity": 5.0}, {"sparsity": 1.0}),
        ("topk", {"k": 2}, {"k": 6}),
        ("batch_topk", {"k": 2}, {"k": 6}),
        ("jumprelu", {"target_l0": 2.0}, {"target_l0": 6.0}),
        ("jumprelu", {"target_l0": None, "sparsity": 1.0}, {"target_l0": None, "sparsity": 0.1}),
    ],
)
def test_every_architectures_knob_moves_l0(architecture, less, more):
    x, _ = planted()
    l0 = []
    for knobs in (less, more):
        dictionary, _ = train_on_arrays(x, recipe=recipe_for(architecture, 500, **knobs))
        l0.append(float((dictionary.encode(jnp.asarray(x[:2000])) > 0).sum(axis=1).mean()))
    assert l0[1] > 1.5 * l0[0] > 0
    if architecture in ("topk", "batch_topk"):
        np.testing.assert_allclose(l0, [2, 6], rtol=0.1)


@pytest.mark.slow
def test_a_transcoder_explains_far_more_than_the_mean():
    x, directions = planted()
    y = np.maximum(x @ directions.T[:, :20] - 0.5, 0) @ np.random.default_rng(1).normal(size=(20, 10)) + 5
    for skip in (False, True):
        dictionary, _ = train_on_arrays(x, y, recipe=recipe_for("topk", k=4, skip=skip))
        error = np.square(np.asarray(dictionary(jnp.asarray(x[:2000]))) - y[:2000]).sum()
        assert 1 - error / np.square(y[:2000] - y.mean(axis=0)).sum() > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["relu", "gated"])
@pytest.mark.parametrize("target", [3.0, 6.0])
def test_the_controller_reaches_its_target(architecture, target):
    recipe = recipe_for(architecture, 2000, sparsity=1.0, target_l0=target, learning_rate=3e-3)
    _, history = train_on_arrays(planted()[0], recipe=recipe)
    assert history["l0"][-20:].mean() == pytest.approx(target, rel=0.1)


def train_with_half_dead(architecture, **changes):
    """Train from a state half of whose features can never be active, and say how that ends."""
    x = jnp.asarray(planted()[0])
    recipe = recipe_for(architecture, 800, dead_after=20 * 512, **changes)
    state = init_state(jax.random.key(0), recipe, ActivationStatistics.zero(WIDTH).update(x))
    half = jnp.arange(FEATURES) < FEATURES // 2
    spoiled = {"b_enc": jnp.where(half, -10.0, state.params["b_enc"])}
    if architecture == "topk":  # positive now and then, as AuxK needs, but never among the largest
        spoiled = {
            n: state.params[n] * jnp.where(half, 1e-3, 1).reshape(s) for n, s in (("b_enc", -1), ("W_enc_T", (-1, 1)))
        }
    state = state._replace(params=state.params | spoiled)
    step = compiled_step(recipe)
    dead, metrics = [], {}
    for i in range(recipe.steps):
        state, metrics = step(state, recipe.hyper(), x[batch_indices(len(x), 512, 0, i)])
        dead.append(float(metrics["dead_fraction"]))
    return max(dead), dead[-1], float(metrics["reconstruction"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "without", "cure"),
    [
        ("topk", {"k": 3, "aux_coefficient": 0.0}, {"aux_coefficient": 1 / 32}),
        ("topk", {"k": 3, "aux_coefficient": 0.0}, {"reinit_every": 100, "reservoir_size": 200}),
        ("relu", {"sparsity": 1.0, "reinit_every": None}, {"reinit_every": 100, "reservoir_size": 200}),
    ],
    ids=["AuxK", "re-initialised TopK", "re-initialised ReLU"],
)
def test_dead_features_come_back_and_the_loss_is_better(architecture, without, cure):
    _, left, loss = train_with_half_dead(architecture, **without)
    assert left > 0.2
    most_cured, left_cured, loss_cured = train_with_half_dead(architecture, **(without | cure))
    assert most_cured > 0.2
    assert left_cured < 0.05
    assert loss_cured < 0.9 * loss


def small_state(architecture: TrainedArchitecture = "topk", transcoder=False, **changes):
    x = 5 + jax.random.normal(jax.random.key(0), (40, 6))
    fields = {"k": 2} if architecture == "topk" else {}
    fields |= {"dead_after": 100, "reinit_every": 10, "reservoir_size": 8}
    recipe = recipe_preset("house", architecture, 12, 10, **(fields | changes))
    own = ActivationStatistics.zero(6).update(x)
    return recipe, init_state(jax.random.key(1), recipe, own, own if transcoder else None), x * own.scale


@pytest.mark.parametrize("transcoder", [False, True])
@pytest.mark.parametrize("subtract_b_dec", [False, True])
@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu", "gated"])
def test_a_reinitialised_feature_writes_a_share_of_the_residual_of_its_input(architecture, subtract_b_dec, transcoder):
    recipe, state, x = small_state(architecture, transcoder, subtract_b_dec=subtract_b_dec and not transcoder)
    residual = jax.random.normal(jax.random.key(2), (40, 6))
    assert state.reservoir is not None
    reservoir = update_reservoir(state.reservoir, x, residual, jax.random.key(3))
    silent = jnp.where(jnp.isin(jnp.arange(12), jnp.array([2, 7])), 100, 0)
    moments = jax.tree.map(jnp.ones_like, state.moments)
    before = state._replace(reservoir=reservoir, silent_for=silent, moments=moments)
    after = reinitialise_dead(before, recipe, is_sae=not transcoder)
    params = after.params
    shares = []
    for turn, feature in enumerate((2, 7)):
        own_x, own_residual = reservoir.x[turn], reservoir.residual[turn]
        read = own_x - params["b_dec"] if recipe.subtract_b_dec else own_x
        bias = params["b_mag" if architecture == "gated" else "b_enc"][feature]
        act = read @ params["W_enc_T"][feature] + bias
        written = act * params["W_dec"][feature]
        shares.append(written @ own_residual / (own_residual @ own_residual))
        np.testing.assert_allclose(written, shares[-1] * own_residual, atol=1e-4)
        np.testing.assert_allclose(jnp.linalg.norm(params["W_dec"][feature]), 0.1, rtol=1e-4)
    np.testing.assert_allclose(shares[0], shares[1], rtol=1e-3)
    assert 0.05 < shares[0] <= 1
    others = jnp.array([i for i in range(12) if i not in (2, 7)])
    for name in ("W_enc_T", "W_dec"):
        np.testing.assert_array_equal(params[name][others], before.params[name][others])
        for moment in (after.moments.mu, after.moments.nu):
            rows = optax.tree.get(moment, name)
            np.testing.assert_array_equal(rows.sum(axis=1), jnp.where(silent > 0, 0, 6))
    np.testing.assert_array_equal(after.silent_for, np.zeros(12))
    assert after.reservoir is not None
    assert (after.reservoir.priority == -jnp.inf).all()


@pytest.mark.parametrize("transcoder", [False, True])
def test_many_reinitialised_features_do_not_make_the_reconstruction_worse(transcoder):
    recipe, state, x = small_state("relu", transcoder, dead_after=1)
    outlier = 20 * (x[:1] - state.mean_in) + state.mean_in  # where every feature with a similar direction is active
    x = jnp.concatenate([x, outlier])
    residual = x - state.mean_in
    assert state.reservoir is not None
    reservoir = update_reservoir(state.reservoir, x, residual, jax.random.key(3))
    before = state._replace(reservoir=reservoir, silent_for=jnp.ones(12, jnp.int32))
    params = reinitialise_dead(before, recipe, is_sae=not transcoder).params
    written = jax.nn.relu(reservoir.x @ params["W_enc_T"].T + params["b_enc"]) @ params["W_dec"]
    assert jnp.sum((reservoir.residual - written) ** 2) < 1.001 * jnp.sum(reservoir.residual**2)


@pytest.mark.parametrize(("done", "revived"), [(79, True), (89, False)])
def test_no_feature_is_reinitialised_when_the_learning_rate_decays(done, revived):
    recipe, state, x = small_state("relu", dead_after=1000)
    recipe = dataclasses.replace(recipe, steps=100, decay_fraction=0.2, warmup_steps=0)
    never = state.params | {"b_enc": state.params["b_enc"].at[3].set(-1e6)}
    state = state._replace(params=never, silent_for=state.silent_for.at[3].set(1000), step=jnp.int32(done))
    after, _ = compiled_step(recipe)(state, recipe.hyper(), x / state.scale_in)
    assert (int(after.silent_for[3]) == 0) == revived
    assert (float(after.params["b_enc"][3]) > -1e5) == revived


def test_features_beyond_what_the_reservoir_holds_stay_dead():
    recipe, state, x = small_state()
    assert state.reservoir is not None
    reservoir = update_reservoir(state.reservoir, x[:3], x[:3], jax.random.key(0))
    state = state._replace(reservoir=reservoir, silent_for=jnp.full(12, 100))
    after = reinitialise_dead(state, recipe, is_sae=True)
    np.testing.assert_array_equal(after.silent_for, [0] * 3 + [100] * 9)


def test_the_reservoir_samples_in_proportion_to_squared_error():
    recipe, _, _ = small_state(reservoir_size=1)
    x = jnp.eye(3)
    residual = jnp.sqrt(jnp.array([1.0, 2.0, 5.0]))[:, None] * jnp.ones((3, 1))

    def sample(key):
        first = update_reservoir(empty_reservoir(recipe, 3, 1), x[:2], residual[:2], jax.random.fold_in(key, 0))
        return update_reservoir(first, x[2:], residual[2:], jax.random.fold_in(key, 1)).x[0]

    drawn = jax.vmap(sample)(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(drawn.mean(axis=0), np.array([1, 2, 5]) / 8, atol=0.03)


def test_aux_gradient_is_that_of_the_dead_features_predicting_the_residual():
    recipe, state, x = small_state(subtract_b_dec=True, aux_features=5, aux_k=2)
    params, residual = state.params, jax.random.normal(jax.random.key(2), (40, 6))
    dead = jnp.isin(jnp.arange(12), jnp.array([1, 4, 9]))

    def loss(params):
        acts = jnp.where(dead, jax.nn.relu((x - state.params["b_dec"]) @ params["W_enc_T"].T + params["b_enc"]), 0)
        z = acts * jnp.linalg.norm(state.params["W_dec"], axis=1)
        acts = jnp.where(z >= jnp.sort(z, axis=1)[:, -2:-1], acts, 0)  # the two largest of an input
        return 3 * aux_loss(residual, acts @ params["W_dec"])

    zero = jax.tree.map(jnp.zeros_like, params)
    execution = execution_for(recipe)
    found, value = add_aux_gradient(
        zero, params, recipe, execution, dead, x, residual, jnp.float32(3), jax.random.key(0)
    )
    wanted = jax.grad(loss)(params)
    assert 3 * value == pytest.approx(float(loss(params)), rel=1e-5)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-5)
    assert jnp.abs(found["W_enc_T"][4]).max() > 0


def test_without_dead_features_there_is_no_aux_loss():
    recipe, state, x = small_state()
    gradient = jax.tree.map(jnp.ones_like, state.params)
    none = jnp.zeros(12, bool)
    found, loss = add_aux_gradient(
        gradient, state.params, recipe, execution_for(recipe), none, x, x, jnp.float32(1), jax.random.key(0)
    )
    assert loss == 0
    assert all((leaf == 1).all() for leaf in found.values())


@pytest.mark.slow
def test_memory_mapped_activations_train_the_same_dictionary_twice(tmp_path):
    np.save(tmp_path / "x.npy", planted()[0][:1000].astype(np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    recipe = recipe_for("topk", 5, k=3)
    first, second = (train_on_arrays(mapped, recipe=recipe, seed=1)[0].params for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize(
    ("x_shape", "y_shape", "problem"),
    [((5,), None, r"x has shape \(5,\)"), ((0, 3), None, r"\(0, 3\)"), ((5, 3), (4, 3), "x has 5 rows and y has 4")],
)
def test_arrays_that_do_not_fit_are_refused(x_shape, y_shape, problem):
    y = None if y_shape is None else np.zeros(y_shape)
    with as_users_run_it(), pytest.raises(ValueError, match=problem):
        train_on_arrays(np.zeros(x_shape), y, recipe=recipe_for("topk", 5, k=3))

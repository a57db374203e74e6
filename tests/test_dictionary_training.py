"""Training dictionaries: the step, sweeps, and the dictionary that comes out of a state."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import as_users_run_it

from tinymodel_jax.config import TRAINED_ARCHITECTURES
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.training.dictionary_forward import Execution, execution_for, loss_and_gradient
from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe, recipe_preset
from tinymodel_jax.training.dictionary_state import ActivationStatistics, DictionaryTrainState, finalize, init_state
from tinymodel_jax.training.dictionary_step import learning_rate_share, member_of, stack_members, sweep_step, train_step

F32 = 1e-5
pytestmark = pytest.mark.usefixtures("standard_promotion")
WIDTH, FEATURES, BATCH = 8, 24, 64


def small_recipe(architecture, **changes) -> DictionaryRecipe:
    fields = {"learning_rate": 3e-3, "batch_size": BATCH} | ({"k": 4} if architecture in ("topk", "batch_topk") else {})
    if architecture == "jumprelu":
        fields |= {"target_l0": 5.0}
    if architecture in ("relu", "gated"):
        fields |= {"sparsity": 0.3}
    return recipe_preset("house", architecture, FEATURES, 100, **(fields | changes))


def batch(seed=0, width=WIDTH):
    return 3 * jax.random.normal(jax.random.key(seed), (BATCH, width)) + jnp.linspace(-1, 2, width)


def statistics(x):
    return ActivationStatistics.zero(x.shape[1]).update(x)


def start(recipe, x, y=None, seed=0) -> DictionaryTrainState:
    return init_state(jax.random.key(seed), recipe, statistics(x), None if y is None else statistics(y))


@functools.cache
def compiled(function, recipe, execution=None):
    fixed = {"recipe": recipe, "execution": execution or execution_for(recipe)}
    if function is loss_and_gradient:
        fixed["widths"] = (recipe.n_features,)
    return jax.jit(functools.partial(function, **fixed))


def train(recipe, state, steps, x=None, y=None, hyper=None):
    step, hyper, metrics = compiled(train_step, recipe), hyper or recipe.hyper(), {}
    for i in range(steps):
        xs = batch(i + 1) if x is None else x
        state, metrics = step(state, hyper, xs, y)
    return state, metrics


def assert_trees_close(found, wanted, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


def test_statistics_scale_the_mean_norm_to_the_root_of_the_width():
    x = batch()
    found = statistics(x[:20]).update(x[20:])
    np.testing.assert_allclose(found.mean, x.mean(axis=0), atol=F32)
    assert jnp.linalg.norm(x * found.scale, axis=1).mean() == pytest.approx(WIDTH**0.5, rel=F32)
    assert ActivationStatistics.zero(3).update(jnp.zeros((4, 3))).scale == 1


@pytest.mark.parametrize("architecture", TRAINED_ARCHITECTURES)
def test_training_starts_at_the_mean_with_a_tied_encoder(architecture):
    recipe = small_recipe(architecture, encoder_norm=0.7, decoder_norm=0.2)
    state = start(recipe, batch())
    np.testing.assert_allclose(state.params["W_enc_T"], 3.5 * state.params["W_dec"], rtol=F32)
    np.testing.assert_allclose(jnp.linalg.norm(state.params["W_dec"], axis=1), 0.2, rtol=F32)
    bias = state.params["b_gate" if architecture == "gated" else "b_enc"]
    np.testing.assert_allclose(state.params["W_enc_T"] @ state.mean_in + bias, 0, atol=F32)
    np.testing.assert_allclose(state.params["b_dec"], state.mean_in, atol=F32)


def test_a_transcoder_starts_with_independent_directions_of_the_norms_of_the_recipe():
    x, y = batch(), batch(1)
    params = start(small_recipe("topk", encoder_norm=0.7, decoder_norm=0.2), x, y).params
    np.testing.assert_allclose(jnp.linalg.norm(params["W_enc_T"], axis=1), 0.7, rtol=F32)
    np.testing.assert_allclose(jnp.linalg.norm(params["W_dec"], axis=1), 0.2, rtol=F32)
    assert jnp.abs(jnp.sum(params["W_enc_T"] * params["W_dec"], axis=1)).mean() < 0.5 * 0.7 * 0.2


def test_a_recipe_stored_without_norms_starts_as_it_did():
    stored = small_recipe("topk").to_dict()
    del stored["encoder_norm"], stored["decoder_norm"]
    recipe = DictionaryRecipe.from_dict(stored)
    assert (recipe.encoder_norm, recipe.decoder_norm) == (0.1, 0.1)
    params = start(recipe, batch()).params
    np.testing.assert_array_equal(params["W_enc_T"], params["W_dec"])


@pytest.mark.parametrize("scale_inputs", [True, False])
def test_a_state_that_a_step_may_overwrite_holds_no_array_twice(scale_inputs):
    state = start(small_recipe("topk", scale_inputs=scale_inputs), batch())
    after = jax.jit(lambda state: state._replace(step=state.step + 1), donate_argnums=0)(state)
    assert int(after.step) == 1


@pytest.mark.parametrize("norms", [{}, {"encoder_norm": 0.3, "decoder_norm": 2.0}])
def test_a_jumprelu_dictionary_starts_near_its_target(norms):
    x = jax.random.normal(jax.random.key(0), (2000, 64))
    recipe = recipe_preset("house", "jumprelu", 1000, 10, target_l0=30.0, **norms)
    state = start(recipe, x)
    scaled = x * state.scale_in
    outcome, _ = compiled(loss_and_gradient, recipe)(state.params, hyper=recipe.hyper(), x=scaled, y=scaled)
    assert 20 < outcome.l0 < 40


def test_the_step_is_adam_on_the_clipped_gradient_with_the_scheduled_rate():
    recipe = small_recipe("relu", beta1=0.5, beta2=0.9375, warmup_steps=4, decay_fraction=0.5, reinit_every=None)
    x = batch()
    state = wanted = start(recipe, x)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(0.5, 0.9375))
    moments = adam.init(wanted.params)
    for i in range(6):
        scaled = x * state.scale_in
        hyper = recipe.hyper(sparsity=recipe.sparsity * min(1, (i + 1) / recipe.sparsity_warmup_steps))
        _, gradient = compiled(loss_and_gradient, recipe)(wanted.params, hyper=hyper, x=scaled, y=scaled)
        updates, moments = adam.update(gradient, moments)
        rate = 3e-3 * min(1, (i + 1) / 4)
        wanted = wanted._replace(params=jax.tree.map(lambda p, u, r=rate: p - r * u, wanted.params, updates))
        state, metrics = compiled(train_step, recipe)(state, recipe.hyper(), x)
        assert metrics["learning_rate"] == pytest.approx(rate)
    assert_trees_close(state.params, wanted.params, F32)
    assert state.step == 6


def test_thresholds_move_at_their_own_multiple_of_the_learning_rate():
    x = batch()
    one, four = (small_recipe("jumprelu", threshold_rate=rate) for rate in (1.0, 4.0))
    before = start(one, x)
    before = before._replace(params=before.params | {"threshold": jnp.full(FEATURES, 0.3)})
    slow, fast = (compiled(train_step, recipe)(before, recipe.hyper(), x)[0].params for recipe in (one, four))
    moved = slow["threshold"] - before.params["threshold"]
    assert jnp.abs(moved).max() > 1e-5
    np.testing.assert_allclose(fast["threshold"] - before.params["threshold"], 4 * moved, atol=1e-6)
    for name in ("W_enc_T", "W_dec", "b_enc", "b_dec"):
        np.testing.assert_array_equal(fast[name], slow[name])


def test_the_learning_rate_warms_up_stays_and_decays():
    recipe = small_recipe("relu", warmup_steps=10, decay_fraction=0.2, final_learning_rate=0.1)
    shares = [float(learning_rate_share(jnp.int32(i), recipe)) for i in (0, 4, 9, 50, 80, 90, 100)]
    np.testing.assert_allclose(shares, [0.1, 0.5, 1, 1, 1, 0.55, 0.1], atol=F32)


def test_the_decay_ends_where_it_should_under_a_warm_up_of_any_length():
    for warmup in (0, 95, 100, 1000):
        recipe = small_recipe("relu", warmup_steps=warmup, decay_fraction=0.2, final_learning_rate=0.1)
        rise = [min(1, (i + 1) / max(min(warmup, 100), 1)) for i in range(101)]
        line = [min(1, 0.1 + 0.9 * (100 - i) / 20) for i in range(101)]
        shares = jax.vmap(functools.partial(learning_rate_share, recipe=recipe))(jnp.arange(101))
        np.testing.assert_allclose(shares, np.minimum(rise, line), atol=F32)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TRAINED_ARCHITECTURES)
def test_rescaling_encoder_and_decoder_reciprocally_changes_nothing(architecture):
    recipe, x = small_recipe(architecture), batch()
    state, _ = train(recipe, start(recipe, x), 30)
    factor = jnp.exp(jax.random.normal(jax.random.key(5), (FEATURES,)))
    rescaled = {"W_dec": state.params["W_dec"] * factor[:, None], "W_enc_T": state.params["W_enc_T"] / factor[:, None]}
    rescaled |= {n: state.params[n] / factor for n in ("b_enc", "b_gate", "b_mag") if n in state.params}
    outcomes = [
        compiled(loss_and_gradient, recipe, execution)(params, hyper=recipe.hyper(), x=x, y=x)[0]
        for params in (state.params, state.params | rescaled)
        for execution in (Execution(True, True, True), Execution(False, False, False))
    ]
    for outcome in outcomes[1:]:
        assert_trees_close(outcome, outcomes[0], 1e-4)


KINDS = ("SAE that subtracts b_dec", "transcoder", "transcoder with skip")


@pytest.mark.parametrize("kind", ["SAE", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)])
@pytest.mark.parametrize("architecture", TRAINED_ARCHITECTURES)
def test_a_dictionary_learns_and_finished_gives_what_training_gave_on_unscaled_activations(architecture, kind):
    changes = {"subtract_b_dec": kind.endswith("b_dec"), "skip": kind.endswith("skip")}
    recipe, x = small_recipe(architecture, **changes), batch()
    y = jnp.tanh(x) @ jax.random.normal(jax.random.key(9), (WIDTH, 6)) * 40 if "transcoder" in kind else None
    state, first = train(recipe, start(recipe, x, y), 1, x=x, y=y)
    state, last = train(recipe, state, 59, x=x, y=y)
    assert last["reconstruction"] < 0.8 * first["reconstruction"]
    assert all(np.isfinite(value) for value in last.values())

    target = x * state.scale_in if y is None else y * state.scale_out
    outcome, _ = compiled(loss_and_gradient, recipe)(state.params, hyper=recipe.hyper(), x=x * state.scale_in, y=target)
    if architecture == "batch_topk":  # its threshold in use is a running mean; give it this batch's, just below
        state = state._replace(threshold=outcome.threshold * (1 - 1e-4))
    config, params = finalize(state, recipe, "here", "here" if y is None else "there")
    dictionary = Dictionary.from_params(config, params)
    residual = ((x if y is None else y) - dictionary(x)) * state.scale_out
    np.testing.assert_allclose(residual, outcome.residual, atol=2e-4)
    assert (dictionary.encode(x) > 0).sum(axis=1).mean() == pytest.approx(float(outcome.l0), abs=0.02)
    np.testing.assert_allclose(jnp.linalg.norm(params["W_dec"], axis=1), 1, rtol=F32)
    assert config.k == recipe.k
    assert not jnp.any(dictionary.params.get("threshold", jnp.zeros(())) < 0)


@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["map", "vmap"])
@pytest.mark.parametrize("architecture", TRAINED_ARCHITECTURES)
def test_every_member_of_a_sweep_equals_its_solo_run_and_order_does_not_matter(architecture, mapping):
    recipe = small_recipe(architecture, reinit_every=40, dead_after=20 * BATCH, reservoir_size=50)
    if architecture == "relu":
        recipe = small_recipe(architecture, sparsity=1.0, target_l0=6.0, random_prefixes=3)
    own = {"k": (4, 2)} if recipe.takes_k else {"sparsity": (0.5, 2.0)}
    changes = [{"learning_rate": rate} | {name: v[i] for name, v in own.items()} for i, rate in enumerate((1e-3, 3e-3))]
    hypers, x = [recipe.hyper(**change) for change in changes], batch()
    states = [start(recipe, x, seed=seed) for seed in (0, 1)]
    mapped = mapping == "map"
    execution = execution_for(recipe, ks=[int(k) for k in own.get("k", ())])
    execution = execution if mapped else execution._replace(map_members=False, on_cpu=False, slots=())
    together, backwards = stack_members(states), stack_members(states[::-1])
    step = compiled(sweep_step, recipe, execution)
    metrics = {}
    for i in range(100):
        together, metrics = step(together, stack_members(hypers), batch(i + 1))
        backwards, _ = step(backwards, stack_members(hypers[::-1]), batch(i + 1))
    for i in (0, 1):
        solo, solo_metrics = train(recipe, states[i], 100, hyper=hypers[i])
        assert_trees_close(member_of(together, i).params, solo.params, 1e-4)
        assert_trees_close(member_of(metrics, i), solo_metrics, 1e-3)
        assert_trees_close(member_of(backwards, 1 - i).params, member_of(together, i).params, F32)


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_the_backend_chooses_the_mapping_and_the_products(backend):
    execution = execution_for(small_recipe("topk"), backend)
    assert execution == Execution(
        sparse=backend != "tpu", on_cpu=backend == "cpu", map_members=backend == "cpu", bitwise=backend == "cpu"
    )
    assert not execution_for(small_recipe("relu"), backend).sparse


@pytest.mark.slow
def test_a_mapped_sweep_selects_only_as_many_features_as_each_member_has():
    recipe, x = small_recipe("topk", k=6), batch()
    hypers = stack_members([recipe.hyper(k=k) for k in (1, 4, 6)])
    states = stack_members([start(recipe, x)] * 3)
    execution = execution_for(recipe, "cpu", ks=(6, 1, 4, 4))
    assert execution.slots == (1, 4, 6)
    assert execution_for(recipe, "gpu", ks=(1, 4, 6)).slots == ()
    own, own_metrics = compiled(sweep_step, recipe, execution)(states, hypers, x)
    largest, metrics = compiled(sweep_step, recipe, execution._replace(slots=()))(states, hypers, x)
    np.testing.assert_allclose(own_metrics["l0"], [1, 4, 6], rtol=F32)
    assert_trees_close(own.params, largest.params, F32)
    assert_trees_close(own_metrics, metrics, F32)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["relu", "topk", "batch_topk", "jumprelu"])
@pytest.mark.parametrize("prefixes", [{"prefix_widths": (6, 12, FEATURES)}, {"random_prefixes": 4}])
def test_matryoshka_prefixes_explain_more_than_those_of_a_plain_dictionary(architecture, prefixes):
    x = batch(0)
    explained = []
    for changes in ({}, prefixes):
        recipe = small_recipe(architecture, **changes)
        state, _ = train(recipe, start(recipe, x), 300, x=x)
        config, params = finalize(state, recipe, "x", "x")
        acts = Dictionary.from_params(config, params).encode(x)
        first = acts[:, :6] @ params["W_dec"][:6] + params["b_dec"]
        explained.append(1 - jnp.square(x - first).sum() / jnp.square(x - x.mean(axis=0)).sum())
    assert explained[1] > explained[0] + 0.1


def test_a_recipe_survives_json():
    recipe = small_recipe("topk", prefix_widths=(6, FEATURES))
    again = DictionaryRecipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert hash(again) == hash(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TRAINED_ARCHITECTURES)
def test_the_reference_preset_trains_every_architecture(architecture):
    narrow = {"sparsity": 0.3} if architecture in ("relu", "gated") else {}
    recipe, x = recipe_preset("reference", architecture, 64, 40, **narrow), batch(0)
    state = start(recipe, x)
    first = compiled(train_step, recipe)(state, recipe.hyper(), x)[1]["reconstruction"]
    _, metrics = train(recipe, state, 40, x=x)
    assert metrics["reconstruction"] < first
    assert all(np.isfinite(value) for value in metrics.values())


def test_the_reference_preset_is_what_the_published_configurations_say():
    recipe = recipe_preset("reference", "relu", 25_000, 10_000)
    assert (recipe.beta1, recipe.beta2, recipe.learning_rate, recipe.penalty) == (0.5, 0.9375, 2**-10, "log")
    assert (recipe.reinit_every, recipe.reservoir_size) == (800, 5_000)


def test_a_wrong_recipe_names_everything_that_is_wrong():
    with as_users_run_it(), pytest.raises(ValueError, match="DictionaryRecipe: ") as error:
        DictionaryRecipe("topk", 10, steps=0, k=11, beta1=1.0, prefix_widths=(4, 3), sparsity=1.0)
    for problem in (
        "steps=0",
        "k=11 is outside 1..n_features=10",
        "beta1=1.0",
        "prefix_widths=(4, 3)",
        "set k",
    ):
        assert problem in str(error.value)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"architecture": "swish"}, "architecture 'swish' cannot be trained"),
        ({"architecture": "topk"}, "'topk' needs a k"),
        ({"k": 3}, "'relu' takes no k"),
        ({"target_l0": 3.0}, "target_l0 needs a sparsity coefficient"),
        ({"aux_coefficient": 0.1}, "for relu use reinit_every"),
        ({"architecture": "gated", "random_prefixes": 3}, "gated takes no Matryoshka prefixes"),
        ({"random_prefixes": 3, "prefix_widths": (2, 10)}, "exclude each other"),
        ({"penalty": "l2"}, "penalty 'l2' is unknown"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(changes, problem):
    with as_users_run_it(), pytest.raises(ValueError, match="DictionaryRecipe: ") as error:
        DictionaryRecipe(**({"architecture": "relu", "n_features": 10, "steps": 5} | changes))
    assert problem in str(error.value)


def test_a_sweep_over_what_cannot_vary_is_refused():
    with as_users_run_it():
        with pytest.raises(ValueError, match="'beta1' cannot vary"):
            small_recipe("relu").hyper(beta1=0.5)
        with pytest.raises(ValueError, match=r"k=5 is outside 1\.\.4"):
            small_recipe("topk").hyper(k=5)
        with pytest.raises(ValueError, match="target_l0 needs a recipe with a target_l0"):
            small_recipe("relu").hyper(target_l0=5.0)
        with pytest.raises(ValueError, match="preset 'best' is unknown"):
            recipe_preset("best", "relu", 10, 10)


def test_options_of_the_other_kind_of_dictionary_are_refused():
    x = batch()
    with pytest.raises(ValueError, match="skip=True needs a transcoder"):
        start(small_recipe("relu", skip=True), x)
    with pytest.raises(ValueError, match="subtract_b_dec=True needs an SAE"):
        start(small_recipe("relu", subtract_b_dec=True), x, x)

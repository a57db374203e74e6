"""Edits of the forward pass against the same edits made by hand in the NumPy model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import make_dictionary
from oracle import F32, assert_close, error_of, forward

from tinymodel_jax.config import ARCHITECTURES
from tinymodel_jax.model import interventions
from tinymodel_jax.model.interventions import Add, Chain, EditFeatures, Replace, Scale, Splice, combine
from tinymodel_jax.model.transformer import run_with_hooks
from tinymodel_jax.params import flatten

RNG = np.random.default_rng(11)
VECTOR = RNG.normal(size=16)
ROW_MASK = RNG.random(11) < 0.5
MASK = RNG.random((3, 11)) < 0.5
PLACES = ["hook_embed", "blocks.0.hook_resid_mid", "blocks.1.hook_attn_in", "blocks.0.mlp.hook_post"]

run_compiled = jax.jit(run_with_hooks, static_argnames=("config", "keep"))


def f32(value):
    return jnp.asarray(value, jnp.float32)


@pytest.fixture
def check(params, config, tok_ids):
    """Compare logits and one kept activation with the NumPy model under the same edits."""

    def compare(hooks, edits, keep=()):
        logits, acts = run_compiled(params, config, jnp.asarray(tok_ids), hooks, tuple(keep))
        expected, values = forward(flatten(params), config, tok_ids, edits)
        assert_close(logits, expected, F32)
        for name in keep:
            assert_close(acts[name], values[name], F32)
        plain, _ = forward(flatten(params), config, tok_ids)
        assert np.abs(expected - plain).max() > 1e-2, "the edit changes nothing, so the test shows nothing"

    return compare


def where(mask, edited, value):
    """Take `edited` at the positions where the mask, (seq,) or (batch, seq), is true."""
    mask = np.broadcast_to(mask, value.shape[:2])
    out = value.copy()
    for row in range(value.shape[0]):
        for position in range(value.shape[1]):
            if mask[row, position]:
                out[row, position] = edited[row, position]
    return out


@pytest.mark.parametrize("positions", [None, ROW_MASK, MASK, ROW_MASK.tolist()])
@pytest.mark.parametrize("name", PLACES)
def test_steering_adds_a_vector_at_the_positions(check, name, positions):
    vector = np.resize(VECTOR, 32 if name.endswith("post") else 16)
    mask = True if positions is None else np.asarray(positions, bool)
    check(
        interventions.steer(name, f32(vector), positions),
        {name: lambda value, seen: where(mask, value + vector, value)},
        keep=(name,),
    )


def test_patching_puts_another_run_s_value_in_place(check, params, config, tok_ids):
    name = "blocks.0.hook_attn_out"
    _, other = forward(flatten(params), config, (tok_ids + 1) % 19)
    hooks = interventions.patch(name, f32(other[name]), MASK)
    check(hooks, {name: lambda value, seen: where(MASK, other[name], value)}, keep=(name,))


def test_patching_broadcasts_one_value(check):
    name = "blocks.0.hook_mlp_out"
    check(interventions.patch(name, 0.5), {name: lambda value, seen: np.full_like(value, 0.5)}, keep=(name,))


def test_scaling_by_zero_ablates_a_head(check):
    name, factor = "blocks.1.attn.hook_z", np.array([[0.0], [1.0]])
    check(
        interventions.scale(name, f32(factor), MASK), {name: lambda v, seen: where(MASK, v * factor, v)}, keep=(name,)
    )


@pytest.mark.parametrize("mask", [ROW_MASK, MASK])
def test_at_the_pattern_positions_are_those_of_the_query(check, mask):
    name = "blocks.0.attn.hook_pattern"

    def edit(value, seen):
        return where(mask, (value * 0.5).swapaxes(1, 2), value.swapaxes(1, 2)).swapaxes(1, 2)

    check(interventions.scale(name, 0.5, mask), {name: edit}, keep=(name,))


@pytest.mark.parametrize(
    "mask", [np.ones(10, bool), np.ones((2, 11), bool), np.ones((3, 1), bool), np.ones((3, 11, 16, 2), bool), True]
)
def test_a_mask_of_another_shape_is_an_error_that_names_both_shapes(params, config, tok_ids, mask):
    hooks = interventions.scale("blocks.0.hook_mlp_out", 0.0, mask)
    message = error_of(lambda: run_with_hooks(params, config, jnp.asarray(tok_ids), hooks))
    assert f"positions has shape {np.shape(mask)}, the value that is edited (3, 11, 16)" in message
    assert "(seq,) or (batch, seq)" in message


@pytest.mark.parametrize("name", ["blocks.0.hook_mlp_out", "blocks.0.attn.hook_pattern"])
@pytest.mark.parametrize("positions", [[3], 3, np.arange(11), MASK.astype(int), MASK.astype(np.float32)])
def test_positions_by_number_are_refused_also_where_they_would_fit(params, config, tok_ids, name, positions):
    for run in (run_with_hooks, run_compiled):
        message = error_of(
            lambda run=run: run(params, config, jnp.asarray(tok_ids), interventions.scale(name, 0.0, positions))
        )
        assert f"shape {np.shape(positions)}; expected a boolean mask of shape (seq,) or (batch, seq)" in message


@pytest.mark.parametrize("edit", [interventions.steer, interventions.patch, interventions.scale])
@pytest.mark.parametrize("shape", [(8,), (3, 10, 16), (2, 11, 16), (1, 3, 11, 16)])
def test_an_array_that_does_not_fit_is_an_error_that_names_the_place_and_both_shapes(
    params, config, tok_ids, edit, shape
):
    hooks = edit("blocks.0.hook_mlp_out", jnp.ones(shape))
    for run in (run_with_hooks, run_compiled):
        message = error_of(lambda run=run: run(params, config, jnp.asarray(tok_ids), hooks))
        assert "the hook at 'blocks.0.hook_mlp_out': " in message
        assert f"has shape {shape}, the value that is edited (3, 11, 16)" in message


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    "call",
    [
        lambda tag: interventions.ablate(tag, [3]),
        lambda tag: interventions.clamp(tag, [3], 1.0),
        lambda tag: interventions.splice([tag]),
    ],
)
def test_a_tag_in_place_of_a_dictionary_is_an_error_that_says_where_they_are(call):
    message = error_of(lambda: call("M3"))
    assert "expected a dictionary, got 'M3'; lm['M3'] is the one of a model" in message
    assert "Dictionary.from_pretrained(path) loads one" in message


def changed(dictionary, features, new):
    """Return an edit that sets activations and adds the change along the decoder's directions."""
    w_dec = np.asarray(dictionary.params["W_dec"], np.float64)

    def edit(value, seen):
        source = seen[dictionary.config.hook_in] if dictionary.config.is_transcoder else value
        old = oracle.encode(dictionary.params, dictionary.config, source)
        after = old.copy()
        for feature in features:
            after[..., feature] = new(old[..., feature])
        return value + (after - old) @ w_dec

    return edit


SITES = [("blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out"), ("blocks.1.hook_resid_mid", "blocks.1.hook_resid_mid")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("hook_in", "hook_out"), SITES)
def test_clamping_sets_features_and_leaves_all_else(check, architecture, hook_in, hook_out):
    k = 3 if architecture in ("topk", "batch_topk", "groupmax") else None
    dictionary = make_dictionary(hook_in, hook_out, architecture=architecture, k=k)
    hooks = interventions.clamp(dictionary, [2, -1], 1.5)
    check(hooks, {hook_out: changed(dictionary, [2, 11], lambda old: 1.5)}, keep=(hook_out,))


@pytest.mark.parametrize(("hook_in", "hook_out"), SITES)
def test_ablating_and_scaling_features_multiply_their_activations(check, hook_in, hook_out):
    dictionary = make_dictionary(hook_in, hook_out, 1)
    check(interventions.ablate(dictionary, [0, 3, 5]), {hook_out: changed(dictionary, [0, 3, 5], lambda old: 0 * old)})
    hooks = interventions.scale_features(dictionary, slice(0, 6), -2.0)
    check(hooks, {hook_out: changed(dictionary, range(6), lambda old: -2 * old)})


def test_clamping_takes_one_value_a_feature_and_a_mask(check):
    dictionary = make_dictionary(*SITES[0], 2)

    def edit(value, seen):
        both = changed(dictionary, [4], lambda old: 1.0)(value, seen) + changed(dictionary, [7], lambda old: 2.0)(
            value, seen
        )
        return where(MASK, both - value, value)

    check(interventions.clamp(dictionary, [4, 7], f32([1.0, 2.0]), MASK), {SITES[0][1]: edit})


def test_a_sweep_over_features_is_one_vmapped_call(params, config, tok_ids, compilations):
    dictionary, ids = make_dictionary(*SITES[0], 3), jnp.asarray(tok_ids)

    def ablated(feature):
        edit = EditFeatures(dictionary.params, feature, 0.0, config=dictionary.config, change="scale")
        return run_with_hooks(params, config, ids, {SITES[0][1]: edit})[0]

    features = jax.block_until_ready(jnp.arange(12))
    sweep = jax.jit(jax.vmap(ablated))
    with compilations() as compiled:
        together = sweep(features)
        assert compiled.value == 1
    for feature in range(12):
        hooks = interventions.ablate(dictionary, feature)
        assert_close(together[feature], run_compiled(params, config, ids, hooks)[0], F32)


@pytest.mark.parametrize("include_error", [False, True])
@pytest.mark.parametrize(("hook_in", "hook_out"), SITES)
def test_splicing_replaces_the_value_by_the_prediction(
    params, config, tok_ids, check, hook_in, hook_out, include_error
):
    dictionary = make_dictionary(hook_in, hook_out, 4, skip=hook_in != hook_out)
    hooks = interventions.splice([dictionary], include_error=include_error)

    def predicted(value, seen):
        return oracle.reconstruct(dictionary.params, dictionary.config, seen.get(hook_in, value))

    if include_error:
        logits, _ = run_compiled(params, config, jnp.asarray(tok_ids), hooks)
        assert_close(logits, forward(flatten(params), config, tok_ids)[0], F32)
    else:
        check(hooks, {hook_out: predicted}, keep=(hook_out,))


def test_a_splice_s_switches_decide_where_gradients_flow():
    """For y = prediction(x) + error(x): d prediction and d error are known by hand for a one-feature dictionary."""
    dictionary = make_dictionary("a", "a", d_in=1, d_out=1, n_features=1)
    params = {"W_enc": f32([[2.0]]), "b_enc": f32([1.0]), "W_dec": f32([[3.0]]), "b_dec": f32([0.5])}
    slope = 6.0  # of the prediction 3 (2 x + 1) + 0.5 where the feature is active; the error's is 1, its pred detached

    def gradient(**switches):
        edit = Splice(params, config=dictionary.config, **switches)
        value, grad = jax.value_and_grad(lambda x: edit(x, {})[0])(f32([2.0]))
        assert float(value) == (2.0 if switches["include_error"] else 15.5)
        return float(grad[0])

    assert gradient(include_error=False) == slope
    assert gradient(include_error=False, detach_pred=True) == 0
    assert gradient(include_error=True) == slope
    assert gradient(include_error=True, detach_error=False) == slope + 1
    assert gradient(include_error=True, detach_error=False, detach_pred=True) == 1
    assert gradient(include_error=True, detach_pred=True) == 0


def test_edits_of_one_place_act_in_the_order_they_are_combined(check):
    name = "blocks.0.hook_resid_mid"
    add, double = interventions.steer(name, f32(VECTOR)), interventions.scale(name, 2.0)
    check(combine(add, double), {name: lambda value, seen: (value + VECTOR) * 2}, keep=(name,))
    check(combine(double, add), {name: lambda value, seen: value * 2 + VECTOR}, keep=(name,))


def test_combining_keeps_single_edits_and_flattens_nothing_twice():
    add, double = Add(f32(VECTOR)), Scale(2.0)
    merged = combine({"a": add}, {"b": double}, {"a": double}, {})
    assert merged == {"a": Chain((add, double), readers=(0, 1)), "b": double}
    assert combine() == {}


def test_a_transcoder_reads_the_input_of_the_same_edited_pass(check):
    dictionary = make_dictionary(*SITES[0], 5)
    hooks = combine(interventions.steer(SITES[0][0], f32(VECTOR)), interventions.splice([dictionary]))
    edits = {
        SITES[0][0]: lambda value, seen: value + VECTOR,
        SITES[0][1]: lambda value, seen: oracle.reconstruct(dictionary.params, dictionary.config, seen[SITES[0][0]]),
    }
    check(hooks, edits)


def test_edits_are_trees_of_arrays():
    edit = Replace(f32(VECTOR), f32(MASK))
    assert len(jax.tree.leaves(edit)) == 2
    doubled = jax.tree.map(lambda leaf: leaf * 2, edit)
    assert_close(doubled.value, VECTOR * 2, F32)
    assert isinstance(doubled, Replace)


def test_a_feature_that_does_not_exist_is_an_error():
    dictionary = make_dictionary(*SITES[0])
    assert "feature 12 is out of range" in error_of(lambda: interventions.ablate(dictionary, 12))


KNOCKED_OUT = np.where(np.arange(11) == 0, -np.inf, 0)


def attention_gradient(params, config, tok_ids, name, *more):
    """Differentiate a logit by a factor on the values at a hook point of the last block's attention."""

    def logit(factor):
        hooks = combine(*more, interventions.scale(f"blocks.1.attn.{name}", factor))
        return run_compiled(params, config, jnp.asarray(tok_ids), hooks)[0][0, -1, 5]

    return float(jax.grad(logit)(1.0))


def test_scores_have_the_gradient_of_the_queries_that_they_are_linear_in(params, config, tok_ids):
    by_scores, by_queries = (attention_gradient(params, config, tok_ids, f"hook_{n}") for n in ("attn_scores", "q"))
    assert abs(by_queries) > 1e-4
    assert_close(by_scores, by_queries, F32)


def test_gradients_are_finite_where_an_earlier_edit_masks_keys(params, config, tok_ids):
    masked = interventions.steer("blocks.1.attn.hook_attn_scores", KNOCKED_OUT)
    by_scores, by_queries = (
        attention_gradient(params, config, tok_ids, f"hook_{n}", masked) for n in ("attn_scores", "q")
    )
    assert_close(by_scores, by_queries, F32)


@pytest.mark.parametrize("masked", [-np.inf, -1e9, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("cut", [4, 11])
def test_a_query_that_sees_no_key_attends_to_nothing(check, masked, cut):
    scores, pattern = "blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_pattern"
    hidden = np.arange(11) < cut  # from every query, so that the first `cut` queries see no key

    def shares(value, seen):
        kept = value * ~hidden
        return kept / np.where(kept.sum(-1, keepdims=True) > 0, kept.sum(-1, keepdims=True), 1)

    check(interventions.steer(scores, f32(np.where(hidden, masked, 0))), {pattern: shares}, keep=(pattern,))


def test_gradients_are_finite_where_a_query_sees_no_key(params, config, tok_ids):
    hooks = interventions.steer("blocks.0.attn.hook_attn_scores", f32(KNOCKED_OUT))

    def loss(tree):
        return jnp.mean(run_with_hooks(tree, config, jnp.asarray(tok_ids), hooks)[0] ** 2)

    gradients = flatten(jax.jit(jax.grad(loss))(params))
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    assert np.any(gradients["blocks.0.attn.W_Q"])


@pytest.mark.parametrize("name", ["hook_attn_scores", "hook_pattern"])
@pytest.mark.parametrize("edit", [Add(f32(3.0)), Replace(f32(0.3)), Scale(f32(-2.0)), Scale(f32(0.0))])
def test_no_edit_lets_a_query_attend_to_a_later_key(params, config, tok_ids, name, edit):
    hooks = {f"blocks.0.attn.{name}": edit}
    ids = jnp.asarray(tok_ids)
    logits, _ = run_compiled(params, config, ids, hooks)
    changed, _ = run_compiled(params, config, ids.at[:, -1].set((ids[:, -1] + 1) % 19), hooks)
    assert_close(changed[:, :-1], logits[:, :-1], F32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hooks_get_finite_scores_after_an_edit_too(params, config, tok_ids, dtype):
    def record(value, acts):
        found.extend([value, acts.get("blocks.0.attn.hook_attn_scores", value)])
        return value

    found = []
    masked = interventions.steer("blocks.0.attn.hook_attn_scores", jnp.asarray(KNOCKED_OUT, dtype))
    recorded = ({f"blocks.0.attn.{name}": record} for name in ("hook_attn_scores", "hook_pattern"))
    half = dataclasses.replace(config, dtype=dtype)
    logits, _ = run_with_hooks(params, half, jnp.asarray(tok_ids), combine(masked, *recorded))
    assert len(found) == 4
    assert all(np.isfinite(np.asarray(value, np.float32)).all() for value in (*found, logits))


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_scores_that_are_not_numbers_are_not_hidden(params, config, tok_ids, broken):
    hooks = interventions.steer("blocks.0.attn.hook_attn_scores", f32(np.full(11, broken)))
    assert not np.isfinite(run_compiled(params, config, jnp.asarray(tok_ids), hooks)[0]).any()


def test_factors_of_several_features_may_be_a_list(lm, tok_ids):
    dictionary = lm.dictionaries["M0"]
    of_array = lm.run_with_hooks(tok_ids, interventions.scale_features(dictionary, [1, 2], np.array([0.5, 2.0])))[0]
    for factors in ([0.5, 2.0], (0.5, 2.0)):
        of_list = lm.run_with_hooks(tok_ids, interventions.scale_features(dictionary, [1, 2], factors))[0]
        np.testing.assert_array_equal(of_list, of_array)

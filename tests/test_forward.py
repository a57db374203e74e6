"""The compiled passes: loss, gradients and an optimizer step against the reference, and what each program computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OUR_KIND
from oracle import (
    F32,
    GOLDEN,
    Tolerance,
    assert_close,
    assert_gradient_close,
    forward,
    log_softmax,
    next_token_loss,
    program_of,
)

from tinymodel_jax.io.convert import model_tensors
from tinymodel_jax.model import forward as passes
from tinymodel_jax.model import interventions
from tinymodel_jax.model.forward import HookedModel
from tinymodel_jax.model.interventions import Splice
from tinymodel_jax.params import flatten, unflatten

STEP = Tolerance(2e-6, 1e-4)
"""After one optimizer step, which is 1e-3 large whatever the gradient's size."""


def loss_of(params, ids, config, hooks=None):
    return passes.mean_loss(HookedModel(params, config, hooks or {}), ids, jnp.ones(ids.shape, jnp.float32))


def as_torch(params, config):
    """Return a parameter tree under the reference's keys, in its order and shapes."""
    flat = flatten(params)
    return {t.key: t.to_torch(np.asarray(flat[t.name])) for t in model_tensors(config)}


@pytest.fixture(scope="module")
def golden_ids(golden):
    return jnp.asarray(golden("lm_outputs.npz")["tok"], jnp.int32)


@pytest.mark.parametrize(("output", "expected"), [("logprobs", log_softmax), ("logits", lambda logits: logits)])
def test_the_output_is_what_was_asked_for(params, config, tok_ids, output, expected):
    logits, values = forward(flatten(params), config, tok_ids)
    keep = ("blocks.1.attn.hook_z",)
    got, acts = passes.forward(HookedModel(params, config), jnp.asarray(tok_ids), keep=keep, output=output)
    assert_close(got, expected(logits), F32)
    assert_close(acts[keep[0]], values[keep[0]], F32)


def test_no_output_means_no_unembedding(params, config, tok_ids):
    keep = ("blocks.1.hook_resid_post",)
    got, acts = passes.forward(HookedModel(params, config), jnp.asarray(tok_ids), keep=keep, output="none")
    assert got is None
    assert list(acts) == list(keep)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_mean_of_the_next_token_s_negative_log_probability(params, config, tok_ids, weighted):
    weights = np.random.default_rng(0).random(tok_ids.shape) if weighted else np.ones(tok_ids.shape)
    logits, _ = forward(flatten(params), config, tok_ids)
    loss = passes.mean_loss(HookedModel(params, config), jnp.asarray(tok_ids), jnp.asarray(weights, jnp.float32))
    assert_close(loss, next_token_loss(logits, tok_ids, weights), F32)


def test_the_loss_counts_neither_padding_nor_what_follows_it(params, config, tok_ids):
    weights = np.ones(tok_ids.shape, np.float32)
    weights[:, 7:] = 0
    other = tok_ids.copy()
    other[:, 7:] = 21
    losses = [
        passes.mean_loss(HookedModel(params, config), jnp.asarray(ids), jnp.asarray(weights))
        for ids in (tok_ids, other)
    ]
    np.testing.assert_array_equal(*losses)
    assert_close(losses[0], next_token_loss(forward(flatten(params), config, tok_ids[:, :7])[0], tok_ids[:, :7]), F32)


@pytest.fixture(scope="module")
def loss_and_gradients(shared_golden_lm, golden_ids):
    return jax.value_and_grad(loss_of)(shared_golden_lm.params, golden_ids, shared_golden_lm.config)


def test_loss_and_gradients_equal_the_reference_s(golden_lm, golden, loss_and_gradients):
    expected, (loss, grads) = golden("lm_grads_adamw.npz"), loss_and_gradients
    assert_close(loss, expected["loss"], GOLDEN)
    grads = as_torch(grads, golden_lm.config)
    for name in expected.files:
        if name.startswith("grad/"):
            assert_gradient_close(grads[name.removeprefix("grad/")], expected[name])
    norms = [np.linalg.norm(grad.astype(np.float64)) for grad in grads.values()]
    assert_gradient_close(norms, expected["grad_l2/all"])


def test_an_adamw_step_on_our_gradients_is_the_reference_s(golden_lm, golden, golden_ids, loss_and_gradients):
    """Decoupled weight decay, Loshchilov and Hutter 2019, Algorithm 2, by hand for the first step."""
    expected, config = golden("lm_grads_adamw.npz"), golden_lm.config
    rate, beta1, beta2, epsilon, decay = 1e-3, 0.9, 0.95, 1e-8, 0.1
    after = {}
    grads = flatten(loss_and_gradients[1])
    for name, value in flatten(golden_lm.params).items():
        grad, value = np.asarray(grads[name], np.float64), np.asarray(value, np.float64)
        mean, square = (1 - beta1) * grad / (1 - beta1), (1 - beta2) * grad**2 / (1 - beta2)
        after[name] = value * (1 - rate * decay) - rate * mean / (np.sqrt(square) + epsilon)
    stepped = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), unflatten(after))
    torch_names = as_torch(stepped, config)
    for name in expected.files:
        if name.startswith("after/"):
            assert_close(torch_names[name.removeprefix("after/")], expected[name], STEP)
    assert_close(loss_of(stepped, golden_ids, config), expected["loss_after_1_adamw"], GOLDEN)


SPLICED = [f"{tag}|err={e}|detach_error={de}|detach_pred={dp}" for tag in ("A1", "T1", "M1") for e, de, dp in (
    (0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1),
)] + [f"{tag}|err=0|detach_error=0|detach_pred=0" for tag in ("Ra1", "Rm1")]  # fmt: skip


def test_the_spliced_gradients_are_all_compared(golden):
    assert {name.split("/")[0] for name in golden("splice.npz").files if "/grad/" in name} == set(SPLICED)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow) if case.startswith(("T1", "M1|err=1")) else case for case in SPLICED],
)
def test_gradients_through_a_spliced_dictionary_equal_the_reference_s(
    golden_lm, golden_dictionaries, golden, golden_ids, case
):
    """With all switches of the reference, whose straight-through hook never fires."""
    theirs, *switches = case.split("|")
    error, detach_error, detach_pred = (bool(int(switch[-1])) for switch in switches)
    dictionary = golden_dictionaries[f"{OUR_KIND[theirs[:-1]]}{theirs[-1]}"]

    def loss(params, dictionary_params):
        edit = Splice(
            dictionary_params,
            config=dictionary.config,
            include_error=error,
            detach_error=detach_error,
            detach_pred=detach_pred,
        )
        return loss_of(params, golden_ids, golden_lm.config, {dictionary.config.hook_out: edit})

    with jax.disable_jit():  # twenty programs would take longer to compile
        grads, own = jax.grad(loss, argnums=(0, 1))(golden_lm.params, dictionary.params)
    grads = as_torch(grads, golden_lm.config)
    grads["pos_embed"] = grads["pos_embed"][:, : golden_ids.shape[1]]
    grads |= {f"{theirs}.encoder.bias": own["b_enc"], f"{theirs}.decoder.bias": own["b_dec"]}
    expected = golden("splice.npz")
    names = [name for name in expected.files if name.startswith(f"{case}/grad/")]
    assert len(names) == 7
    for name in names:
        assert_gradient_close(grads[name.removeprefix(f"{case}/grad/")], expected[name])


def test_features_are_read_without_later_layers_and_without_the_unembedding(lm, tok_ids):
    ids, dictionary, config = jnp.asarray(tok_ids), lm.dictionaries["M0"], lm.config

    def read(indices):
        options = {"dictionary_config": dictionary.config}
        return program_of(passes.features, lm.hooked(), dictionary.params, ids, indices, **options)

    (one, computed), (every, _) = read(np.int32(7)), read(None)
    whole, _ = program_of(passes.forward, lm.hooked(), ids)
    tokens, d, m, seq = tok_ids.size, config.d_model, config.d_mlp, tok_ids.shape[1]
    attention = 2 * tokens * (4 * d * d + 2 * seq * d)
    elementwise = 20 * tokens * config.n_heads * seq  # masks and softmax: about 20 operations per score
    # Only the first attention runs, and only the requested column of the encoder.
    assert one == pytest.approx(attention + elementwise + 2 * tokens * d, rel=0.15)
    assert every - one == pytest.approx(2 * tokens * d * 11, rel=0.15)
    assert whole > 2 * attention + 2 * 2 * tokens * 2 * d * m
    assert not [line for line in computed if f",{config.d_vocab}]" in line or f",{m}]" in line]


def test_one_program_serves_all_edits_of_a_kind(params, config, tok_ids, compilations):
    ids = jnp.asarray(tok_ids)
    vectors = [jax.block_until_ready(jnp.full(16, value)) for value in (0.5, 1.0)]
    kinds = {
        "add": [interventions.steer("blocks.0.hook_mlp_out", vector) for vector in vectors],
        "other place": [interventions.steer("blocks.1.hook_mlp_out", vector) for vector in vectors],
        "scale": [interventions.scale("blocks.0.hook_mlp_out", factor) for factor in (0.0, 0.5)],
        "none": [{}, {}],
    }
    cases = [(hooks, ()) for hooks in kinds.values()] + [(kinds["add"], ("blocks.1.hook_resid_mid",))]
    results = []
    for hooks, keep in cases:
        with compilations() as compiled:
            results += [passes.forward(HookedModel(params, config, hook), ids, keep=keep)[0] for hook in hooks]
            assert compiled.value <= 1  # 0 if another test has compiled the same
    values = [np.asarray(result).tobytes() for result in results]
    assert len(set(values)) == 7  # two edits of each of three kinds, and none; with `keep` they are the same again

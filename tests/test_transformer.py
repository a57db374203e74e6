"""The transformer against NumPy float64 and the reference, and its behaviour under jit, grad and vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import N_HEADS, param_shapes, random_params
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    BF16,
    F32,
    GOLDEN,
    assert_close,
    assert_gradient_close,
    forward,
    next_token_loss,
    program_of,
)

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.model import interventions
from tinymodel_jax.model.hook_points import hook_names
from tinymodel_jax.model.transformer import LayerCache, Transformer, run_with_hooks
from tinymodel_jax.params import flatten

REFERENCE_NAMES = {
    "res_attn": "hook_resid_pre",
    "attn.qs": "attn.hook_q",
    "attn.ks": "attn.hook_k",
    "attn.vs": "attn.hook_v",
    "attn.head_writeouts": "attn.hook_z",
    "attn.attn_out": "hook_attn_out",
    "res_mlp": "hook_resid_mid",
    "mlp.act": "mlp.hook_post",
    "mlp.mlp_out": "hook_mlp_out",
    "res_final": "hook_resid_post",
}
"""Hook points of the reference and ours; its q, k, v and z are (batch, head, position, d_head)."""
SAME_VALUE = {"hook_attn_in": "hook_resid_pre", "hook_mlp_in": "hook_resid_mid"}


run_compiled = jax.jit(run_with_hooks, static_argnames=("config", "keep"))
decode_compiled = jax.jit(
    lambda params, config, *args: Transformer(config).apply({"params": params}, *args, method="decode"),
    static_argnums=(1,),
)


def logits_of(params, config, tok_ids, hooks=None):
    return run_compiled(params, config, jnp.asarray(tok_ids), hooks)[0]


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(n_layers=1, d_model=1, n_heads=1, d_mlp=1, n_ctx=1, d_vocab=5),
        ModelConfig(n_layers=2, d_model=3, n_heads=3, d_mlp=4, n_ctx=5, d_vocab=7),
        ModelConfig(n_layers=3, d_model=6, n_heads=2, d_mlp=9, n_ctx=8, d_vocab=9),
    ],
    ids=str,
)
def test_logits_and_every_hook_point_equal_numpy_s(config):
    params = random_params(param_shapes(config), 0)
    ids = np.random.default_rng(0).integers(0, config.d_vocab, (2, config.n_ctx))
    logits, acts = run_compiled(params, config, jnp.asarray(ids), keep=hook_names(config))
    expected, values = forward(flatten(params), config, ids)
    assert_close(logits, expected, F32)
    for name in hook_names(config):
        assert_close(acts[name], values[name], F32)


@pytest.mark.parametrize("layer", range(4))
def test_hook_points_equal_the_reference_s(golden_lm, golden, layer):
    values = golden("lm_hooks.npz")
    names = {ours: f"torso.{layer}.{theirs}" for theirs, ours in REFERENCE_NAMES.items()}
    if layer < 3:  # stored once: it is what the next block starts with
        names["hook_resid_post"] = f"torso.{layer + 1}.res_attn"
    ids = jnp.asarray(golden("lm_outputs.npz")["tok"][:1], jnp.int32)
    keep = tuple(f"blocks.{layer}.{name}" for name in (*names, *SAME_VALUE))
    _, acts = run_compiled(golden_lm.params, golden_lm.config, ids, keep=keep)
    for ours, theirs in names.items():
        expected = values[theirs]
        assert_close(
            acts[f"blocks.{layer}.{ours}"], expected.swapaxes(1, 2) if expected.ndim == 4 else expected, GOLDEN
        )
    for twin, name in SAME_VALUE.items():
        np.testing.assert_array_equal(acts[f"blocks.{layer}.{twin}"], acts[f"blocks.{layer}.{name}"])


def test_patterns_are_causal_and_sum_to_one(params, config, tok_ids):
    name = "blocks.1.attn.hook_pattern"
    _, acts = run_compiled(params, config, jnp.asarray(tok_ids), keep=(name,))
    assert_close(acts[name].sum(-1), np.ones((3, 2, 11)), F32)
    assert not np.triu(acts[name], 1).any()


@settings(max_examples=10)
@given(st.data())
def test_a_later_token_changes_nothing_before_it(params, config, data):
    ids = np.array(data.draw(st.lists(st.integers(0, 22), min_size=8, max_size=8)))
    position = data.draw(st.integers(1, 7))
    other = ids.copy()
    other[position] = (other[position] + data.draw(st.integers(1, 22))) % 23
    before, after = (logits_of(params, config, row[None])[0] for row in (ids, other))
    np.testing.assert_array_equal(before[:position], after[:position])
    assert np.abs(before[position] - after[position]).max() > 1e-3


def test_without_hooks_the_program_is_the_plain_forward_pass(params, config, tok_ids):
    ids, model = jnp.asarray(tok_ids), Transformer(config)
    plain = jax.make_jaxpr(lambda p, i: model.apply({"params": p}, i))(params, ids)
    hooked = jax.make_jaxpr(lambda p, i: run_with_hooks(p, config, i)[0])(params, ids)
    assert str(hooked) == str(plain)
    expected = jax.jit(model.apply)({"params": params}, ids)
    np.testing.assert_array_equal(logits_of(params, config, ids), expected)


def test_what_is_not_kept_is_not_computed(params, config, tok_ids):
    def keeping(*names):
        return program_of(lambda p, i: run_with_hooks(p, config, i, keep=names)[1], params, jnp.asarray(tok_ids))

    (first, _), (second, computed) = keeping("blocks.0.hook_mlp_in"), keeping("blocks.1.hook_mlp_in")
    whole, all_computed = program_of(lambda p, i: run_with_hooks(p, config, i)[0], params, jnp.asarray(tok_ids))
    # From one block's MLP to the next one's is a block's work; what comes after, unembedding included, is dropped.
    tokens, d, seq = tok_ids.size, config.d_model, tok_ids.shape[1]
    assert second - first == pytest.approx(2 * tokens * (4 * d * d + 2 * d * config.d_mlp + 2 * seq * d), rel=0.15)
    assert whole - second > 2 * tokens * d * (2 * config.d_mlp + config.d_vocab)
    vocabulary = f",{config.d_vocab}]"
    assert [line for line in all_computed if vocabulary in line]
    assert not [line for line in computed if vocabulary in line]


def test_thirty_two_edits_under_vmap_equal_thirty_two_calls(params, config, tok_ids):
    ids = jnp.asarray(tok_ids)
    vectors = jnp.asarray(np.random.default_rng(2).normal(size=(32, 16)), jnp.float32)
    masks = jnp.asarray(np.random.default_rng(3).random((32, 11)) < 0.5)

    @jax.jit
    def edited(vector, mask):
        return logits_of(params, config, ids, interventions.steer("blocks.0.hook_resid_mid", vector, mask))

    together = jax.jit(jax.vmap(edited))(vectors, masks)
    assert together.shape == (32, 3, 11, 23)
    for row in range(32):
        assert_close(together[row], edited(vectors[row], masks[row]), F32)
    assert np.abs(together[0] - together[1]).max() > 0.1


@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.0.hook_resid_mid", "blocks.1.hook_mlp_in", "blocks.1.attn.hook_z"]
)
def test_the_gradient_with_respect_to_an_edit_equals_finite_differences(params, config, tok_ids, name):
    """Central differences in float64: their own error is h² ≈ 1e-10 of the loss's third derivative."""
    ids, flat = jnp.asarray(tok_ids), flatten(params)
    vector = np.random.default_rng(4).normal(size=8 if name.endswith("hook_z") else 16) * 0.1

    def loss(vector):
        logprobs = jax.nn.log_softmax(logits_of(params, config, ids, interventions.steer(name, vector)))
        return -jnp.take_along_axis(logprobs[:, :-1], ids[:, 1:, None], axis=-1).mean()

    def oracle(vector):
        logits, _ = forward(flat, config, tok_ids, {name: lambda value, seen: value + vector})
        return next_token_loss(logits, tok_ids)

    step = 1e-5
    directions = np.eye(len(vector)) * step
    expected = [(oracle(vector + d) - oracle(vector - d)) / (2 * step) for d in directions]
    assert_gradient_close(jax.jit(jax.grad(loss))(jnp.asarray(vector, jnp.float32)), expected)


def test_editing_what_a_sublayer_reads_leaves_the_stream_alone(params, config, tok_ids):
    flat, vector = flatten(params), np.linspace(-1, 1, 16)
    results = {}
    for name in ("blocks.0.hook_resid_mid", "blocks.0.hook_mlp_in"):
        hooks = interventions.steer(name, jnp.asarray(vector, jnp.float32))
        results[name], _ = forward(flat, config, tok_ids, {name: lambda value, seen: value + vector})
        assert_close(logits_of(params, config, tok_ids, hooks), results[name], F32)
    assert np.abs(np.subtract(*results.values())).max() > 0.1


def test_decoding_token_by_token_equals_the_whole_forward_pass(params, config):
    ids = jnp.asarray(np.random.default_rng(5).integers(0, 23, (3, config.n_ctx)), jnp.int32)
    nothing = jnp.zeros((3, 0, config.n_heads, config.d_head))
    cache = tuple(LayerCache.of_prompt(nothing, nothing, config.n_ctx) for _ in range(config.n_layers))
    whole = logits_of(params, config, ids)
    for position in range(config.n_ctx):
        logits, cache = decode_compiled(params, config, ids[:, position], jnp.full(3, position), cache)
        assert_close(logits, whole[:, position], F32)


def test_rows_may_decode_at_positions_of_their_own(params, config):
    ids = jnp.asarray(np.random.default_rng(6).integers(0, 23, (2, 6)), jnp.int32)
    keep = tuple(f"blocks.{layer}.attn.hook_{kv}" for layer in range(2) for kv in "kv")
    whole, acts = run_compiled(params, config, ids, keep=keep)
    # What stands in the slots from a row's position on must not matter: it is the cache of other tokens.
    cache = tuple(
        LayerCache.of_prompt(acts[f"blocks.{layer}.attn.hook_k"], acts[f"blocks.{layer}.attn.hook_v"], 8)
        for layer in range(2)
    )
    positions = jnp.array([2, 5])
    logits, _ = decode_compiled(params, config, ids[jnp.arange(2), positions], positions, cache)
    assert_close(logits, whole[jnp.arange(2), positions], F32)


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits(params, config, tok_ids):
    half = ModelConfig(**{**config.to_dict(), "dtype": "bfloat16"})
    logits, acts = run_compiled(params, half, jnp.asarray(tok_ids), keep=hook_names(half))
    assert logits.dtype == jnp.float32
    assert {str(act.dtype) for act in acts.values()} == {"bfloat16"}
    expected = logits_of(params, config, tok_ids)
    assert_close(logits, expected, BF16)
    assert np.abs(logits - expected).max() > 1e-3


def test_initialization_has_the_shapes_and_spreads_that_the_docstrings_promise():
    config = ModelConfig(n_layers=1, d_model=128, n_heads=4, d_mlp=256, n_ctx=64, d_vocab=300, param_dtype="bfloat16")
    variables = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    flat, shapes = flatten(variables["params"]), flatten(param_shapes(config))
    assert {name: (a.shape, a.dtype) for name, a in flat.items()} == {n: (s.shape, s.dtype) for n, s in shapes.items()}
    assert {str(array.dtype) for array in flat.values()} == {"bfloat16"}
    assert sum(array.size for array in flat.values()) == config.n_params
    # Standard deviations of at least 4,000 draws: known to sqrt(1 / 8000), about 1 percent.
    uniform = 1 / np.sqrt(3)
    expected = {
        "W_E": 1e-4,
        "W_pos": 1e-4,
        "W_U": uniform / np.sqrt(128),
        "blocks.0.attn.W_Q": np.sqrt(2 / (128 + 32)),
        "blocks.0.attn.W_K": np.sqrt(2 / (128 + 32)),
        "blocks.0.attn.W_V": uniform / np.sqrt(128),
        "blocks.0.mlp.W_in": uniform / np.sqrt(128),
        "blocks.0.mlp.W_out": uniform / np.sqrt(256),
        "blocks.0.attn.W_O": uniform / np.sqrt(128),
    }
    for name, spread in expected.items():
        assert np.std(np.asarray(flat[name], np.float64)) == pytest.approx(spread, rel=0.05), name
    assert not np.asarray(flat["blocks.0.attn.b_O"], np.float32).any()


def test_the_golden_model_has_the_sizes_it_was_made_with(golden_lm):
    assert golden_lm.config == ModelConfig(4, 64, N_HEADS, 256, 32, 211)

"""Attention in blocks of queries: the values and derivatives of the softmax, and hooks still see scores and pattern."""

from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinymodel_jax import ModelConfig, interventions
from tinymodel_jax.model import causal_attention as module
from tinymodel_jax.model import forward
from tinymodel_jax.model.causal_attention import _all_at_once, causal_attention, worthwhile
from tinymodel_jax.model.interventions import combine
from tinymodel_jax.model.transformer import Transformer, run_with_hooks

CONFIG = ModelConfig(n_layers=1, d_model=32, n_heads=8, d_mlp=8, d_vocab=20, n_ctx=512)
PATTERN = "blocks.0.attn.hook_pattern"
N_QUERIES, N_KEYS = 150, 170


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Compute the same with the whole array of scores."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    visible = np.arange(n_keys) <= np.arange(n_keys - n_queries, n_keys)[:, None]
    scores = jnp.einsum("bqhk,bthk->bhqt", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhqt,bthk->bqhk", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf)), v)


@pytest.fixture
def qkv() -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = [(3, n, 2, 8) for n in (N_QUERIES, N_KEYS, N_KEYS)]
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def total(attention, q, k, v):
    return jnp.sum(jnp.sin(attention(q, k, v)))


def gradient(attention, *qkv):
    return jax.grad(partial(total, attention), (0, 1, 2))(*qkv)


DERIVED = {
    "value": lambda attention, q, k, v: attention(q, k, v),
    "gradient": gradient,
    "forward derivative": lambda attention, q, k, v: jax.jvp(attention, (q, k, v), (q + 1, k * 2, v - 1))[1],
    "derivative of the gradient": lambda attention, q, k, v: jax.jvp(
        partial(gradient, attention), (q, k, v), (q + 1, k * 2, v - 1)
    )[1],
    "gradient under vmap": lambda attention, q, k, v: jax.vmap(partial(gradient, attention), (0, None, 0))(
        jnp.stack([q, 2 * q]), k, jnp.stack([v, 3 * v])
    ),
}


@pytest.fixture(params=["one row at a time", "all rows at once"])
def rows_at_once(request, monkeypatch) -> None:
    if request.param == "one row at a time":
        monkeypatch.setattr(module, "BLOCK_BYTES", 1)


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize("derived", DERIVED)
@pytest.mark.parametrize("attention", [causal_attention, _all_at_once], ids=["blocks", "accelerators"])
def test_the_values_and_derivatives_are_those_of_the_softmax(derived, attention, qkv):
    found, expected = (jax.jit(partial(DERIVED[derived], f))(*qkv) for f in (attention, softmax_attention))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * float(jnp.max(jnp.abs(other))))


@pytest.mark.parametrize("attention", [causal_attention, _all_at_once], ids=["blocks", "accelerators"])
def test_a_score_that_overflows_gives_nan_and_leaves_other_rows_alone(attention, qkv):
    q, k, v = qkv
    found = attention(q.at[1].multiply(1e30), k.at[1].multiply(1e30), v)
    assert bool(jnp.isnan(found[1]).any())
    np.testing.assert_array_equal(found[::2], attention(q, k, v)[::2])


@pytest.fixture(scope="module")
def params():
    return Transformer(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]


@pytest.fixture(scope="module")
def tok_ids() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (1, 300), 0, 16)


def test_the_model_uses_blocks_and_gives_the_logits_of_a_pass_whose_pattern_is_read(params, tok_ids):
    heads = jnp.zeros((1, 300, CONFIG.n_heads, CONFIG.d_model // CONFIG.n_heads))
    assert worthwhile(heads, heads)
    assert not worthwhile(heads[:, :64], heads[:, :64])
    with mock.patch.object(module, "causal_attention", wraps=causal_attention) as used:
        blocks, _ = run_with_hooks(params, CONFIG, tok_ids)
        whole, acts = run_with_hooks(params, CONFIG, tok_ids, keep=(PATTERN,))
    used.assert_called_once()
    np.testing.assert_allclose(blocks, whole, rtol=0, atol=1e-6)
    np.testing.assert_allclose(acts[PATTERN].sum(-1), 1, rtol=1e-5)


def test_functions_may_edit_the_pattern_and_read_it_later(params, tok_ids):
    def read(value, acts):
        return value + acts[PATTERN][0, 0, 100, 100]

    first = acts_at_z(params, tok_ids, {PATTERN: lambda pattern, acts: jnp.zeros_like(pattern).at[..., 0].set(1)})
    np.testing.assert_allclose(first, np.broadcast_to(first[:, :1], first.shape), atol=1e-7)
    plain = acts_at_z(params, tok_ids, {})
    z = "blocks.0.attn.hook_z"
    read_later = acts_at_z(params, tok_ids, {z: read})
    assert not np.allclose(read_later, plain)
    in_chain = acts_at_z(params, tok_ids, combine({z: interventions.Scale(1.0)}, {z: read}))
    np.testing.assert_allclose(in_chain, read_later, atol=1e-6)


def acts_at_z(params, tok_ids, hooks):
    _, acts = run_with_hooks(params, CONFIG, tok_ids, hooks, keep=("blocks.0.attn.hook_z",))
    return acts["blocks.0.attn.hook_z"]


def test_memory_grows_with_the_context_and_not_with_its_square(params):
    def temporaries(n_toks: int) -> int:
        tok_ids = jax.ShapeDtypeStruct((4, n_toks), np.int32)
        loss = jax.grad(lambda params, tok_ids: jnp.mean(run_with_hooks(params, CONFIG, tok_ids)[0]))
        memory: Any = jax.jit(loss).lower(params, tok_ids).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert temporaries(512) < 2.3 * temporaries(256)


def test_log_probabilities_of_groups_of_rows_are_those_of_all_rows(params, monkeypatch):
    ids = jax.random.randint(jax.random.key(2), (6, 9), 0, 16)
    monkeypatch.setattr(forward, "LOGPROBS_AT_ONCE", 2 * ids.shape[1])
    logprobs, _ = forward.forward(forward.HookedModel(params, CONFIG), ids)
    logits, _ = forward.forward(forward.HookedModel(params, CONFIG), ids, output="logits")
    assert logprobs is not None
    assert logits is not None
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(logits), rtol=0, atol=1e-6)

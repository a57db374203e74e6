"""Edits of passes of many lengths: few programs, and the results of the exact length."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import make_dictionary, param_shapes, random_params
from oracle import F32, assert_close, error_of, forward, log_softmax

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model import interventions
from tinymodel_jax.model.edits import Add
from tinymodel_jax.model.hook_points import hook_names, value_shape
from tinymodel_jax.model.transformer import run_with_hooks
from tinymodel_jax.params import flatten

LENGTHS = range(5, 45)
MLP_OUT, Z, SCORES, PATTERN = (
    "blocks.0.hook_mlp_out",
    "blocks.1.attn.hook_z",
    "blocks.0.attn.hook_attn_scores",
    "blocks.0.attn.hook_pattern",
)


@pytest.fixture(scope="module")
def long_lm():
    """Two layers with a context of 256, which compiles lengths 16, 32, 64, 128, 192 and 256."""
    config = ModelConfig(n_layers=2, d_model=16, n_heads=2, d_mlp=32, n_ctx=256, d_vocab=23)
    model = TinyModel.from_params(config, random_params(param_shapes(config), 0))
    model.attach("M0", make_dictionary("x", "y", 1, n_features=20))
    model.attach("Mo0", make_dictionary("x", "x", 2, n_features=20, architecture="topk", k=4))
    return model


def masked(mask, edited, value, axis=1):
    """Take `edited` where the mask (batch, seq) or (seq,) is true; positions are on the axis."""
    shape = [1] * value.ndim
    mask = np.atleast_2d(mask)
    shape[0], shape[axis] = mask.shape
    return np.where(mask.reshape(shape), edited, value)


def vector_at_some_positions(rng, n, lm):
    vector, mask = rng.normal(size=16).astype(np.float32), rng.random(n) < 0.5
    mask = [mask, mask[None], None][n % 3]
    hooks = interventions.steer(MLP_OUT, vector, mask)
    return hooks, {MLP_OUT: lambda v, seen: masked(True if mask is None else mask, v + vector, v)}


def vector_at_every_position(rng, n, lm):
    vectors, mask = jax.device_put(rng.normal(size=(2, n, 16)).astype(np.float32)), rng.random((2, n)) < 0.5
    hooks = interventions.patch(MLP_OUT, vectors, mask)
    return hooks, {MLP_OUT: lambda v, seen: masked(mask, np.asarray(vectors), v)}


def heads(rng, n, lm):
    factors, mask = rng.normal(size=(n, 2, 1)).astype(np.float32), rng.random(n) < 0.5
    return interventions.scale(Z, factors, mask), {Z: lambda v, seen: masked(mask, v * factors, v)}


def attention(rng, n, lm):
    added, pattern = (rng.normal(size=(2, n, n)).astype(np.float32) for _ in range(2))
    mask, seen_keys = rng.random((2, n)) < 0.5, np.tri(n, dtype=bool)
    hooks = interventions.combine(interventions.steer(SCORES, added), interventions.patch(PATTERN, pattern, mask))
    return hooks, {
        SCORES: lambda v, seen: np.where(seen_keys, v + added, -1e9),
        PATTERN: lambda v, seen: np.where(seen_keys, masked(mask, pattern, v, axis=2), 0),
    }


def _changed(dictionary, reads, change):
    """Return the NumPy edit that changes a dictionary's activations of the value that `reads` returns."""

    def edit(value, seen):
        old = oracle.encode(dictionary.params, dictionary.config, reads(value, seen))
        return value + (change(old.copy()) - old) @ np.asarray(dictionary.params["W_dec"], np.float64)

    return edit


def clamped_features(rng, n, lm):
    dictionary, chosen = lm.dictionaries["M0"], rng.permutation(20)[: n % 5 + 1]
    values, mask = rng.normal(size=len(chosen)).astype(np.float32), rng.random(n) < 0.5

    def change(acts):
        acts[..., chosen] = masked(mask, np.broadcast_to(values, (2, n, len(chosen))), acts[..., chosen])
        return acts

    hooks = interventions.clamp(dictionary, chosen, values, mask)
    return hooks, {MLP_OUT: _changed(dictionary, lambda v, seen: seen["blocks.0.hook_mlp_in"], change)}


def features_by_factors_of_every_position(rng, n, lm):
    dictionary, chosen = lm.dictionaries["Mo0"], rng.permutation(20)[: n % 5 + 1].tolist()
    factors, last = rng.normal(size=(2, n, len(chosen))).astype(np.float32), 19

    def change(acts):
        acts[..., chosen] *= factors
        acts[..., last] = 0
        return acts

    scaled = interventions.scale_features(dictionary, chosen, factors)
    hooks = interventions.combine(scaled, interventions.ablate(dictionary, last))
    return hooks, {MLP_OUT: _changed(dictionary, lambda v, seen: v, change)}


@pytest.mark.parametrize(
    "kind",
    [
        vector_at_some_positions,
        vector_at_every_position,
        heads,
        attention,
        clamped_features,
        features_by_factors_of_every_position,
    ],
)
def test_forty_lengths_with_an_edit_each_compile_four_programs_and_equal_numpy(long_lm, compilations, kind):
    rng, flat = np.random.default_rng(3), flatten(long_lm.params)
    results = []
    with compilations() as compiled:
        for n in LENGTHS:
            ids = rng.integers(0, 19, (2, n))
            hooks, edits = kind(rng, n, long_lm)
            results.append((ids, edits, *long_lm.run_with_hooks(ids, hooks, [MLP_OUT, PATTERN])))
    assert compiled.value <= 4
    for ids, edits, logprobs, acts in results:
        expected, values = forward(flat, long_lm.config, ids, edits)
        assert_close(logprobs, log_softmax(expected), F32)
        assert_close(acts[MLP_OUT], values[MLP_OUT], F32)
        assert_close(np.tril(acts[PATTERN]), np.tril(values[PATTERN]), F32)


def test_a_number_of_features_for_which_a_program_exists_compiles_nothing(long_lm, compilations):
    ids = np.arange(1, 14)[None]
    every = long_lm["M0"](ids)
    long_lm["M0"](ids, indices=[3])
    with compilations() as compiled:
        found = [long_lm["M0"](ids, indices=list(range(n))) for n in (0, 2, 5, 8)]
    assert compiled.value == 0
    for acts in found:  # products with fewer columns may be rounded differently
        assert_close(acts, every[..., : acts.shape[-1]], F32)
    repeated = long_lm["M0"](ids, indices=[3] * 30)
    assert_close(repeated, np.repeat(every[..., 3:4], 30, axis=-1), F32)


@pytest.mark.parametrize("length", [1, 3, 256])
def test_the_shortest_and_the_longest_prompts_are_edited_as_without_padding(long_lm, length):
    ids = np.random.default_rng(length).integers(0, 19, (2, length))
    values = np.random.default_rng(0).normal(size=(2, length, 16)).astype(np.float32)
    hooks = interventions.patch(MLP_OUT, values, np.arange(length) % 2 == 0)
    expected, _ = run_with_hooks(long_lm.params, long_lm.config, jnp.asarray(ids), hooks)
    assert_close(long_lm.run_with_hooks(ids, hooks)[0], log_softmax(np.asarray(expected)), F32)


def test_an_edit_may_be_a_function_beside_edits_and_sees_the_exact_length(long_lm):
    lengths = []

    def record(value, acts):
        lengths.append(value.shape[1])
        return value

    hooks = interventions.combine(interventions.steer(MLP_OUT, np.ones((7, 16), np.float32)), {MLP_OUT: record})
    long_lm.run_with_hooks(np.arange(7), hooks)
    assert lengths == [7]


@pytest.mark.parametrize(
    ("hooks", "says"),
    [
        (interventions.steer(MLP_OUT, np.ones((8, 16))), "has shape (8, 16), the value that is edited (1, 7, 16)"),
        (
            interventions.scale(MLP_OUT, 0.0, np.ones(8, bool)),
            "positions has shape (8,), the value that is edited (1, 7, 16)",
        ),
        (interventions.patch(PATTERN, np.ones((8, 8))), "has shape (8, 8), the value that is edited (1, 2, 7, 7)"),
        (interventions.scale(PATTERN, 0.0, np.ones((1, 8), bool)), "positions has shape (1, 1, 8), the value that is"),
    ],
)
def test_an_array_of_the_padded_length_does_not_fit(long_lm, hooks, says):
    message = error_of(lambda: long_lm.run_with_hooks(np.arange(7), hooks))
    assert says in message
    assert f"the hook at '{next(iter(hooks))}': " in message


def test_the_shapes_of_values_are_known_without_a_pass(lm, tok_ids):
    _, acts = lm.run_with_cache(tok_ids)
    for name in hook_names(lm.config):
        assert value_shape(name, lm.config, *tok_ids.shape) == acts[name].shape, name


def test_a_mask_of_heads_at_positions_is_padded_at_positions(long_lm):
    ids, mask = np.arange(7)[None], np.random.default_rng(0).random((1, 7, 2)) < 0.5
    expected, _ = forward(
        flatten(long_lm.params), long_lm.config, ids, {Z: lambda v, seen: np.where(mask[..., None], v + 1.0, v)}
    )
    assert_close(long_lm.run_with_hooks(ids, {Z: Add(1.0, mask)})[0], log_softmax(expected), F32)

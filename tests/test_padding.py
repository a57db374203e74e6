"""Checks of token ids, the compiled lengths, and the cutting of results to the original length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import error_of

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.model.padding import bucket, bucket_lengths, check_tok_ids, cut, is_traced, pad_right


@given(st.integers(1, 5000))
def test_every_length_has_a_compiled_length_and_there_are_at_most_six(n_ctx):
    lengths = bucket_lengths(n_ctx)
    assert len(lengths) <= 6
    assert max(lengths) == n_ctx
    for length in {0, 1, n_ctx // 3, n_ctx // 2 + 1, n_ctx - 1, n_ctx} - {-1}:
        padded = bucket(length, n_ctx)
        assert length <= padded in lengths
        assert all(size < length for size in lengths if size < padded)


@pytest.mark.parametrize(
    "ids",
    [
        [[1, 2, 3]],
        [1, 2, 3],
        (1, 2, 3),
        np.array([[1, 2, 3]], np.uint8),
        np.array([[1, 2, 3]], np.int64),
        jnp.array([[1, 2, 3]]),
        [jnp.array(1), np.int16(2), 3],
    ],
)
def test_ids_may_come_in_any_integer_form(config, ids):
    checked = check_tok_ids(ids, config)
    assert checked.dtype == np.int32
    np.testing.assert_array_equal(checked, [[1, 2, 3]])


@pytest.mark.parametrize(("ids", "shape"), [([], (1, 0)), ([[], []], (2, 0)), (np.zeros((0, 3), int), (0, 3))])
def test_no_tokens_and_no_rows_are_fine(config, ids, shape):
    assert check_tok_ids(ids, config).shape == shape


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([[1, 2, 23]], "id 23 at row 0, position 2 is outside the vocabulary 0..22"),
        ([[1, 2], [3, -1]], "id -1 at row 1, position 1 is outside the vocabulary 0..22"),
        ([[30, 2, -5]], "(2 such ids)"),
        (np.array([2**63], np.uint64), "id 9223372036854775808"),
        ([1, 2**70], "id 1180591620717411303424 is outside the vocabulary 0..22"),
        ([-(2**70)], "id -1180591620717411303424 is outside the vocabulary 0..22"),
        (np.zeros((2, 17), int), "sequences of 17 tokens; the model's context is 16"),
        ([[1.0, 2.0]], "got float64 values; give integers"),
        (np.zeros((2, 3), np.float32), "got float32 values"),
        ([True, False], "got bool values"),
        ("Once upon a time", "got text where ids are expected; lm.to_tokens(texts) turns a text"),
        (["Once", "In"], "got text where ids are expected"),
        (None, "give integers of shape"),
        (3, "got shape (); expected (batch, seq)"),
        ([[[1]]], "got shape (1, 1, 1); expected (batch, seq)"),
        ([[1, 2], [3]], "rows of different lengths; pad them"),
    ],
)
def test_bad_ids_are_named_with_what_would_be_right(config, ids, says):
    assert says in error_of(lambda: check_tok_ids(ids, config))


def test_padding_stands_on_the_right():
    np.testing.assert_array_equal(pad_right(np.array([[1, 2], [3, 4]]), 4, 9), [[1, 2, 9, 9], [3, 4, 9, 9]])


def test_cutting_keeps_the_leading_entries_of_the_axes():
    array = jnp.arange(2 * 4 * 4).reshape(2, 4, 4)
    np.testing.assert_array_equal(cut(array, (1, 2), 3), np.asarray(array)[:, :3, :3])
    assert isinstance(cut(array, (1,), 3), jax.Array)
    assert cut(array, (1, 2), 4) is array


def test_cutting_costs_no_compilation_on_the_cpu(compilations):
    if jax.default_backend() != "cpu":
        pytest.skip("elsewhere a slice is a program")
    arrays = [jax.block_until_ready(jnp.zeros((2, 64))) for _ in range(2)]
    with compilations() as compiled:
        for length in range(1, 64):
            jax.block_until_ready(cut(arrays[0], (1,), length))
    assert compiled.value == 0


def test_cutting_works_on_traced_values():
    np.testing.assert_array_equal(jax.jit(lambda x: cut(x, (0,), 2))(jnp.arange(5)), [0, 1])


def test_tracers_are_found_inside_trees():
    found = []
    jax.make_jaxpr(lambda x: found.append((is_traced({"a": [1, x]}), is_traced(3, [x]))))(1.0)
    assert found == [(True, True)]
    assert not is_traced({"a": jnp.ones(3)}, None, 1)


def test_arbitrary_ids_may_hold_padding_within_as_in_the_reference():
    config = ModelConfig(n_layers=1, d_model=8, n_heads=1, d_mlp=8, n_ctx=16, d_vocab=23)
    ids = [[3, config.pad_id, 4], [3, 4, config.pad_id]]
    assert check_tok_ids(ids, config).tolist() == ids

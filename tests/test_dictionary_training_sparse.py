"""The sparse way of TopK and BatchTopK: selections against sorting, products and gradients against dense ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodel_jax.training.batch_selection import select_of_batch
from tinymodel_jax.training.dictionary_forward import Execution, loss_and_gradient
from tinymodel_jax.training.dictionary_recipe import recipe_preset
from tinymodel_jax.training.dictionary_state import ActivationStatistics, init_state
from tinymodel_jax.training.sparse_rows import (
    gather_decode,
    kth_largest,
    largest_of_all,
    scatter_rows,
    selected_values,
    top_k,
)

F32 = 1e-5


@pytest.mark.parametrize(("n", "k"), [(1024, 32), (100, 4), (97, 5), (64, 64), (250, 1)])
def test_two_stage_top_k_equals_lax_top_k(n, k):
    values = jax.random.normal(jax.random.key(n), (7, n))
    for found, want in zip(top_k(values, k, two_stage=True), jax.lax.top_k(values, k), strict=True):
        np.testing.assert_array_equal(found, want)


def test_two_stage_top_k_gives_ties_to_the_lower_position():
    values = jax.random.randint(jax.random.key(0), (20, 256), 0, 5).astype(jnp.float32)
    np.testing.assert_array_equal(top_k(values, 8, two_stage=True)[1], jax.lax.top_k(values, 8)[1])


@given(data=st.data())
def test_the_largest_of_a_batch_are_never_more_and_ties_go_to_the_lower_place(data):
    values = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=24, max_size=24))
    z, rank = np.array(values, np.float32).reshape(4, 6), data.draw(st.integers(1, 24))
    kept = sorted(range(24), key=lambda i: (-z.ravel()[i], i))[:rank]
    mask, smallest = jax.jit(largest_of_all)(jnp.asarray(z), jnp.int32(rank))
    np.testing.assert_array_equal(np.flatnonzero(mask), sorted(kept))
    assert smallest == z.ravel()[kept].min()


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_equal_activations_are_kept_by_one_rule_however_it_is_computed(architecture):
    twins, larger, rows = [3, 4, 9, 15, 16, 23], 20, 3
    recipe = recipe_preset("house", architecture, 24, 10, k=5, batch_size=rows)
    state = init_state(jax.random.key(0), recipe, ActivationStatistics.zero(4).update(jnp.ones((1, 4))))
    W = jnp.zeros((24, 4)).at[jnp.array(twins), 0].set(1.0).at[larger, 1].set(2.0)
    params = state.params | {"W_enc_T": W, "W_dec": jnp.ones((24, 4)), "b_enc": jnp.zeros(24), "b_dec": jnp.zeros(4)}
    x, kept = jnp.ones((rows, 4)), {}
    for k in (5, 3):
        kept[k] = np.zeros((rows, 24))
        places = [(row, twin) for row in range(rows) for twin in twins][: (k - 1) * rows]
        if architecture == "topk":
            places = [(row, twin) for row in range(rows) for twin in twins[: k - 1]]
        kept[k][tuple(np.transpose(places))] = 1
        kept[k][:, larger] = 2
    for execution in (Execution(True, True, True), Execution(True, False, False), Execution(False, False, False)):
        compute = jax.jit(functools.partial(loss_and_gradient, recipe=recipe, execution=execution, widths=(24,)))
        for k, acts in kept.items():
            outcome, _ = compute(params, hyper=recipe.hyper(k=k), x=x, y=x)
            assert outcome.l0 == k
            np.testing.assert_array_equal(outcome.fired, acts.any(axis=0))
            np.testing.assert_allclose(outcome.residual[:, 0], 1 - acts.sum(axis=1), atol=F32)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=20)
def test_the_selection_of_a_batch_with_ties_equals_sorting_all_of_it(data):
    n, k_max = 24, 6
    values = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 2.5]), min_size=4 * n, max_size=4 * n))
    z, k = np.array(values, np.float32).reshape(4, n), data.draw(st.integers(1, k_max))
    found = jax.jit(select_of_batch, static_argnums=2)(jnp.asarray(z), jnp.int32(k), k_max)
    kept = sorted(range(4 * n), key=lambda i: (-z.ravel()[i], i))[: 4 * k]
    wanted = np.zeros(4 * n)
    wanted[kept] = z.ravel()[kept]
    laid_out = np.zeros((5, n))
    np.add.at(laid_out, (np.asarray(found.owner)[:, None], np.asarray(found.positions)), np.asarray(found.values))
    np.testing.assert_array_equal(laid_out[:4].ravel(), wanted)


@pytest.mark.parametrize(("size", "bitwise"), [(1, False), (30, True), (30, False)])  # each is compiled separately
@given(data=st.data())
def test_kth_largest_equals_sorting(size, bitwise, data):
    values = data.draw(st.lists(st.floats(0, 1e6, width=32), min_size=size, max_size=size))
    rank = data.draw(st.integers(1, size))
    found = jax.jit(kth_largest, static_argnums=2)(jnp.array(values, jnp.float32), jnp.int32(rank), bitwise)
    assert float(found) == np.sort(np.array(values, np.float32))[-rank]


@pytest.mark.parametrize("bitwise", [True, False])
def test_every_rank_is_found_among_ties_subnormals_zeros_and_the_largest_numbers(bitwise):
    numbers = np.array([0, 1, 2, 15, 16, 2**23 - 1, 2**23, 2**23 + 1, 2**30 - 1, 2**30, 0x7F7FFFFF, 0x7F800000])
    bits = np.random.default_rng(0).choice(numbers.astype(np.int32), (8, 9))
    bits[0] = 0
    search = jax.jit(jax.vmap(functools.partial(kth_largest, bitwise=bitwise), in_axes=(None, 0)))
    found = search(jnp.asarray(bits.view(np.float32)), jnp.arange(1, bits.size + 1))
    # compared as bits, because a CPU may read subnormal numbers as zero
    np.testing.assert_array_equal(np.asarray(found).view(np.int32), np.sort(bits.ravel())[::-1])


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0], ids=["even", "uneven", "one input takes nearly all"])
@pytest.mark.parametrize(("n", "k"), [(37, 3), (100, 1), (16, 16), (1000, 7)])
def test_the_selection_of_a_batch_equals_sorting_all_of_it(n, k, spread):
    z = jax.nn.relu(jax.random.normal(jax.random.key(n), (16, n)))
    z = z * jnp.exp(spread * jnp.linspace(0, 1, 16))[:, None]
    limit = np.sort(np.asarray(z).ravel())[-k * 16]
    wanted = np.where((z >= limit) & (z > 0), z, 0)
    for k_max in {k, min(2 * k, n)}:
        found = select_of_batch(z, jnp.int32(k), k_max)
        assert found.threshold == limit
        laid_out = np.zeros((17, n))  # row 16 receives the values without an input, which must be zeros
        np.add.at(laid_out, (np.asarray(found.owner)[:, None], np.asarray(found.positions)), np.asarray(found.values))
        np.testing.assert_array_equal(laid_out[:16], wanted)
        assert not laid_out[16].any()
        assert not found.values[int(found.used) :].any()
        assert (np.diff(found.owner) >= 0).all()


def test_an_input_may_hold_every_active_feature_of_the_batch():
    z = jnp.zeros((8, 40)).at[3].set(jnp.arange(1.0, 41.0))
    found = select_of_batch(z, jnp.int32(5), 5)
    assert np.count_nonzero(found.values) == 40
    assert set(np.asarray(found.owner[: int(found.used)])) == {3}


@pytest.mark.parametrize("rowwise", [True, False])
@pytest.mark.parametrize("batch", [5, 16])
def test_sparse_products_and_their_gradients_equal_dense_ones(rowwise, batch):
    keys = jax.random.split(jax.random.key(0), 5)
    weights, W = jax.random.normal(keys[0], (batch, 2, 3)), jax.random.normal(keys[1], (9, 4))
    positions = jax.random.randint(keys[2], (batch, 3), 0, 9)
    upstream, used = jax.random.normal(keys[3], (batch, 2, 4)), jnp.int32(batch)
    one_hot = jax.nn.one_hot(positions, 9)

    out, pull = jax.vjp(lambda w, W: gather_decode(w, positions, W, used, rowwise), weights, W)
    wanted, wanted_pull = jax.vjp(lambda w, W: jnp.einsum("blk,bkf,fd->bld", w, one_hot, W), weights, W)
    np.testing.assert_allclose(np.asarray(out), wanted, atol=F32)
    for found, want in zip(pull(upstream), wanted_pull(upstream), strict=True):
        np.testing.assert_allclose(found, want, atol=F32)

    scattered = scatter_rows(weights, positions, upstream, used, 9, rowwise)
    np.testing.assert_allclose(scattered, jnp.einsum("blk,bkf,bld->fd", weights, one_hot, upstream), atol=F32)


@pytest.mark.parametrize("rowwise", [True, False])
def test_selected_values_pass_gradient_to_the_encoder_where_they_are_active(rowwise):
    keys = jax.random.split(jax.random.key(0), 3)
    x, W, bias = jax.random.normal(keys[0], (8, 4)), jax.random.normal(keys[1], (9, 4)), jnp.linspace(-1, 1, 9)
    positions = jax.random.permutation(keys[2], 9)[:3] + jnp.zeros((8, 1), jnp.int32)
    upstream = jnp.arange(24.0).reshape(8, 3)

    def dense_values(W, bias):
        return jnp.take_along_axis(jax.nn.relu(x @ W.T + bias), positions, axis=1)

    values, wanted_pull = jax.vjp(dense_values, W, bias)
    out, pull = jax.vjp(lambda W, b: selected_values(x, W, b, values, positions, jnp.int32(8), rowwise), W, bias)
    np.testing.assert_array_equal(out, values)
    for found, want in zip(pull(upstream), wanted_pull(upstream), strict=True):
        np.testing.assert_allclose(found, want, atol=1e-4)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
@pytest.mark.parametrize(
    "matryoshka", [None, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fixed", "random"))]
)
@pytest.mark.parametrize("subtract_b_dec", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sparse_and_dense_steps_have_the_same_loss_and_gradient(architecture, matryoshka, subtract_b_dec):
    x = jax.random.normal(jax.random.key(0), (24, 12)) * jnp.linspace(0.1, 5, 24)[:, None] + 1
    recipe = recipe_preset("house", architecture, 40, 10, k=6, subtract_b_dec=subtract_b_dec)
    statistics = ActivationStatistics.zero(12).update(x)
    params = init_state(jax.random.key(1), recipe, statistics).params
    widths = {None: (40,), "fixed": (10, 40), "random": jnp.array([7, 3, 40])}[matryoshka]
    wanted = None
    for sparse, on_cpu in ((False, False), (False, True), (True, False), (True, True)):
        execution = Execution(sparse=sparse, on_cpu=on_cpu, map_members=True)
        found = loss_and_gradient(params, recipe, execution, recipe.hyper(k=4), x, x, widths)
        wanted = wanted or found
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
    assert wanted is not None
    assert wanted[0].l0 == pytest.approx(4)

"""The language model's training step, against the reference's gradients and AdamW, and against itself."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.io.convert import convert_model, model_tensors
from tinymodel_jax.io.torch_files import load_torch_file
from tinymodel_jax.model.transformer import Params
from tinymodel_jax.params import flatten, unflatten
from tinymodel_jax.training.lm_step import (
    LMOptimizer,
    LMState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    summed_loss,
    train_step,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")

DATA = Path(__file__).parent / "data"
TINY = ModelConfig(n_layers=1, d_model=16, n_heads=2, d_mlp=32, n_ctx=12, d_vocab=29)


@functools.cache
def first_params() -> Params:
    return init_state(jax.random.key(0), TINY, optax.identity()).params


@pytest.fixture(scope="module")
def golden() -> tuple[ModelConfig, Params, Any, Any]:
    converted = convert_model(load_torch_file(DATA / "lm_f32_zip.pt"), n_heads=4)
    params = jax.tree.map(jnp.asarray, unflatten(converted.params))
    return converted.config, params, np.load(DATA / "lm_grads_adamw.npz"), np.load(DATA / "lm_outputs.npz")["tok"]


def test_gradients_and_an_adamw_step_are_the_references(golden: Any) -> None:
    config, params, vectors, tok = golden
    tok_ids = jnp.asarray(tok, jnp.int32)
    slope = jax.jit(jax.value_and_grad(summed_loss, has_aux=True), static_argnums=1)
    (loss, count), gradients = slope(params, config, tok_ids, None)
    np.testing.assert_allclose(loss / count, vectors["loss"], rtol=1e-5)
    ours = flatten(jax.tree.map(lambda g: np.asarray(g / count), gradients))
    tensors = {t.key: t for t in model_tensors(config)}
    checked = 0
    for name in vectors.files:
        if name.startswith("grad/"):
            expected = vectors[name]
            got = tensors[name.removeprefix("grad/")].to_torch(ours[tensors[name.removeprefix("grad/")].name])
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
            checked += 1
    assert checked > 3
    optimizer = optax.adamw(1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    means = jax.tree.map(lambda g: g / count, gradients)
    updates, _ = jax.jit(optimizer.update)(means, optimizer.init(params), params)
    after = flatten(jax.tree.map(np.asarray, optax.apply_updates(params, updates)))
    for name in vectors.files:
        if name.startswith("after/"):
            t = tensors[name.removeprefix("after/")]
            np.testing.assert_allclose(t.to_torch(after[t.name]), vectors[name], rtol=1e-4, atol=2e-6)


def make_step(optimizer: LMOptimizer, steps: int, **options: Any) -> tuple[Any, LMState]:
    transformation = make_optimizer(optimizer, steps)
    step = functools.partial(
        train_step,
        config=TINY,
        optimizer=transformation,
        schedule=learning_rate_schedule(optimizer, steps),
        **options,
    )
    return jax.jit(step), LMState(jnp.zeros((), jnp.int32), first_params(), transformation.init(first_params()))


def rows(count: int, seed: int = 0) -> jax.Array:
    ids = np.random.default_rng(seed).integers(0, TINY.d_vocab - 4, (count, TINY.n_ctx))
    lengths = np.random.default_rng(seed + 1).integers(4, TINY.n_ctx + 1, count)
    return jnp.asarray(np.where(np.arange(TINY.n_ctx) < lengths[:, None], ids, TINY.pad_id), jnp.int32)


@pytest.mark.slow
def test_training_on_one_batch_learns_it_by_heart() -> None:
    step, state = make_step(LMOptimizer(learning_rate=1e-2, warmup_steps=5), 150)
    batch, losses = rows(4), []
    for _ in range(150):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(TINY.d_vocab), rel=0.1)
    assert losses[-1] < 0.1


def test_micro_batches_change_nothing() -> None:
    optimizer = LMOptimizer(learning_rate=1e-2, warmup_steps=2)
    whole, state = make_step(optimizer, 10)
    parts, _ = make_step(optimizer, 10, micro_batches=4)
    expected, expected_metrics = whole(state, rows(8))
    got, got_metrics = parts(state, rows(8))
    assert float(got_metrics["loss"]) == pytest.approx(float(expected_metrics["loss"]), rel=1e-6)
    assert float(got_metrics["tokens"]) == float(expected_metrics["tokens"])
    # Adam's first step is about the gradient's sign, which may flip where it is nearly zero: compare the moments.
    for a, b in zip(jax.tree.leaves(got.optimizer), jax.tree.leaves(expected.optimizer), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_padding_neither_counts_nor_matters() -> None:
    params = first_params()
    batch = rows(4)
    wider = jnp.pad(batch[:, :8], ((0, 0), (0, 4)), constant_values=TINY.pad_id)
    run = jax.jit(summed_loss, static_argnums=(1, 3))
    loss, count = run(params, TINY, batch[:, :8], TINY.pad_id)
    wide_loss, wide_count = run(params, TINY, wider, TINY.pad_id)
    assert float(count) == float(wide_count) == float(np.sum(np.asarray(batch)[:, 1:8] != TINY.pad_id))
    np.testing.assert_allclose(wide_loss, loss, rtol=1e-6)


def test_wsd_rises_stays_and_falls_to_zero() -> None:
    rate = learning_rate_schedule(LMOptimizer(learning_rate=1.0, warmup_steps=10, decay_fraction=0.2), 100)
    assert float(rate(jnp.int32(0))) == pytest.approx(0.1)
    assert float(rate(jnp.int32(9))) == pytest.approx(1.0)
    assert float(rate(jnp.int32(79))) == pytest.approx(1.0)
    assert float(rate(jnp.int32(90))) == pytest.approx(0.5)
    assert float(rate(jnp.int32(99))) == pytest.approx(0.05)


def test_cosine_ends_at_a_tenth() -> None:
    rate = learning_rate_schedule(LMOptimizer(learning_rate=1.0, schedule="cosine", warmup_steps=10), 110)
    assert float(rate(jnp.int32(60))) == pytest.approx(0.55)
    assert float(rate(jnp.int32(110))) == pytest.approx(0.1)


@pytest.mark.parametrize(("steps", "warmup"), [(110, 100), (60, 200), (60, 60), (100, 81), (1000, 10), (5, 0)])
@pytest.mark.parametrize("decay_fraction", [0.2, 0.5, 1.0])
def test_wsd_ends_on_its_line_to_zero_whatever_the_warm_up(steps: int, warmup: int, decay_fraction: float) -> None:
    options = LMOptimizer(learning_rate=1.0, warmup_steps=warmup, decay_fraction=decay_fraction)
    rates = np.asarray(learning_rate_schedule(options, steps)(jnp.arange(steps + 1)))
    decay = int(decay_fraction * steps)
    line = np.minimum(1, (steps - np.arange(steps + 1)) / decay)
    rise = np.minimum(1, (np.arange(steps + 1) + 1) / max(min(warmup, steps), 1))
    np.testing.assert_allclose(rates, np.minimum(rise, line), atol=1e-6)
    assert rates[-2] == pytest.approx(1 / decay, abs=1e-6)


@pytest.mark.parametrize(("steps", "warmup"), [(110, 100), (60, 200), (60, 60), (1000, 10)])
def test_cosine_ends_near_a_tenth_whatever_the_warm_up(steps: int, warmup: int) -> None:
    rate = learning_rate_schedule(LMOptimizer(learning_rate=1.0, schedule="cosine", warmup_steps=warmup), steps)
    assert float(rate(jnp.int32(steps))) == pytest.approx(0.1)
    assert float(rate(jnp.int32(steps - 1))) < 0.13
    assert float(rate(jnp.int32(0))) == pytest.approx(1 / min(warmup, steps))


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_weight_decay_touches_matrices_only(method: Literal["adamw", "muon"]) -> None:
    optimizer = make_optimizer(LMOptimizer(method, learning_rate=1.0, warmup_steps=0, weight_decay=0.5), 10)
    params = first_params()
    zero = jax.tree.map(jnp.zeros_like, params)
    updates: Any = jax.jit(optimizer.update)(zero, optimizer.init(params), params)[0]
    for name, update in flatten(updates).items():
        moves = name.split(".")[-1] in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_U")
        expected = -0.5 * flatten(params)[name] if moves else np.zeros(update.shape)
        np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_muon_takes_steps_of_one_size_in_every_direction_that_a_matrix_has() -> None:
    settings = LMOptimizer("muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=1e9)
    optimizer = make_optimizer(settings, 10)
    params = first_params()
    gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
    updates: Any = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0]
    update, gradient = updates["blocks_0"], gradients["blocks_0"]
    matrices: dict[str, Callable[[Any], np.ndarray]] = {  # rows read, columns write; the heads of a layer together
        "attn/W_Q": lambda x: np.moveaxis(x, 1, 0).reshape(16, 16),
        "attn/W_O": lambda x: x.reshape(16, 16),
        "mlp/W_in": np.asarray,
        "mlp/W_out": np.asarray,
    }
    for path, as_matrix in matrices.items():
        part, name = path.split("/")
        step, slope = as_matrix(update[part][name]), as_matrix(gradient[part][name])
        sizes = np.linalg.svd(step, compute_uv=False) / (0.2 * np.sqrt(max(step.shape)))
        # Five steps of Newton and Schulz bring singular values of 0.01 to 1, relative to the norm, to 0.7 to 1.2.
        assert np.all((sizes[:-1] > 0.6) & (sizes[:-1] < 1.25)), path
        assert np.sum(step * slope) < 0, "downhill"
    assert np.abs(update["attn"]["b_O"]).max() == pytest.approx(1.0, rel=0.5), "Adam's first step"


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 0.0},
        {"warmup_steps": -1},
        {"decay_fraction": 2.0},
        {"beta2": 1.0},
        {"clip_norm": 0.0},
    ],
)
def test_impossible_settings_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        LMOptimizer(**values)

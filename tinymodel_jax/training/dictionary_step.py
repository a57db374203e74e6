"""One training step of a dictionary or of a whole sweep, as pure functions of a state and a batch.

`train_step` and `sweep_step` are not compiled here; call them inside the compiled function that computes the
activations. The step does everything on the device: scaling, loss, gradient clipping, Adam, schedules, AuxK, counting
and re-initialising dead features, the controller, and the threshold of batch_topk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from tinymodel_jax.dictionaries.layers import is_written
from tinymodel_jax.training.dead_features import (
    add_aux_gradient,
    dead_mask,
    reinitialise_dead,
    update_reservoir,
)
from tinymodel_jax.training.dictionary_forward import (
    Execution,
    ExtraLoss,
    Outcome,
    execution_for,
    loss_and_gradient,
    weighted_activations,
)
from tinymodel_jax.training.dictionary_losses import TINY, random_widths, variance
from tinymodel_jax.training.dictionary_recipe import DictionaryHyper, DictionaryRecipe
from tinymodel_jax.training.dictionary_state import DictionaryTrainState, TrainParams, layers_of
from tinymodel_jax.training.sparse_rows import kth_largest

THRESHOLD_RATE, THRESHOLD_SHARE = 0.01, 0.05
"""Weight of the newest batch in the running mean of batch_topk's threshold; early on, the mean spans the last 5 %."""
THRESHOLD_BATCHES, THRESHOLD_INPUTS = 16, 8192
"""The threshold of a finished batch_topk dictionary is a mean over at least this many batches and inputs."""
MAX_SILENCE = 1 << 30
"""Largest count of inputs since a feature was active."""

Metrics = dict[str, Array]


def train_step(
    state: DictionaryTrainState,
    hyper: DictionaryHyper,
    x: Float[Array, "batch d_in"],
    y: Float[Array, "batch d_out"] | None = None,
    *,
    recipe: DictionaryRecipe,
    execution: Execution | None = None,
    extra_loss: ExtraLoss | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[DictionaryTrainState, Metrics]:
    """Take one step on a batch of unscaled activations. Every row counts, so remove padding first.

    Args:
        state: state of `init_state` or of the step before.
        hyper: numbers of `recipe.hyper()`.
        x: activation vectors.
        y: targets of a transcoder; None trains an SAE on `x`.
        recipe: what the state was made with.
        execution: how to compute the step; None chooses for JAX's default backend.
        extra_loss: a function `(x, y, activations, reconstruction)` of the scaled batch, whose scalar is added to the
            loss: see `ExtraLoss`. Its coefficients can be traced.
        optimizer: any optax transformation instead of the recipe's clipping, Adam and learning rate; it must have made
            the state, too (`init_state(..., optimizer=optimizer)`).

    Returns:
        The next state, and float32 scalars of this batch before the update: `loss`, `reconstruction` (squared error of
        scaled targets, summed over the width), `sparsity` (that loss before its coefficient), `sparsity_coefficient`,
        `aux` (share of the residual's variance that dead features leave; 0 if none is dead), `l0`,
        `explained_variance` (around the batch's mean), `dead_fraction`, `gradient_norm`, `learning_rate`, `threshold`.
        With `extra_loss`, also `extra_loss`; with `optimizer`, `learning_rate` is left out.

    Raises:
        ValueError: the state was made for another optimizer.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from tinymodel_jax.training import ActivationStatistics, init_state, recipe_preset, train_step
        >>> recipe = recipe_preset("house", "topk", n_features=32, steps=10, k=4)
        >>> x = jax.random.normal(jax.random.key(0), (64, 8))
        >>> state = init_state(jax.random.key(1), recipe, ActivationStatistics.zero(8).update(x))
        >>> state, metrics = jax.jit(train_step, static_argnames="recipe")(state, recipe.hyper(), x, recipe=recipe)
        >>> int(state.step), float(metrics["l0"])
        (1, 4.0)
    """
    execution = execution or execution_for(recipe)
    keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step), 3)
    scaled_x = x.astype(jnp.float32) * state.scale_in
    scaled_y = scaled_x if y is None else y.astype(jnp.float32) * state.scale_out
    coefficient = hyper.sparsity * state.sparsity_factor * _ramp(state.step, recipe.sparsity_warmup_steps)
    widths = recipe.prefix_widths or (recipe.n_features,)
    if recipe.random_prefixes is not None:
        widths = random_widths(keys[0], recipe.random_prefixes, recipe.n_features)

    in_force = hyper._replace(sparsity=coefficient)
    outcome, gradient = loss_and_gradient(
        state.params, recipe, execution, in_force, scaled_x, scaled_y, widths, extra_loss
    )
    dead, aux = dead_mask(state, recipe), jnp.zeros(())
    aux_weight = recipe.aux_coefficient * variance(scaled_y)
    if recipe.aux_coefficient:
        gradient, aux = add_aux_gradient(
            gradient, state.params, recipe, execution, dead, scaled_x, outcome.residual, aux_weight, keys[1]
        )
    rate = hyper.learning_rate * learning_rate_share(state.step, recipe)
    if optimizer is None:
        params, moments = _adam(state, recipe, gradient, rate)
    else:
        params, moments = _update(state, optimizer, gradient)
    if "threshold" in params:
        params["threshold"] = jnp.maximum(params["threshold"], 0)
    metrics = {
        "loss": outcome.loss + aux_weight * aux,
        "reconstruction": outcome.reconstruction,
        "sparsity": outcome.sparsity,
        "sparsity_coefficient": coefficient,
        "aux": aux,
        "l0": outcome.l0,
        "explained_variance": _explained(outcome.residual, scaled_y),
        "dead_fraction": jnp.mean(dead, dtype=jnp.float32),
        "gradient_norm": optax.tree.norm(gradient),
        "learning_rate": rate,
        "threshold": outcome.threshold,
    }
    if optimizer is not None:
        del metrics["learning_rate"]
    if extra_loss is not None:
        metrics["extra_loss"] = outcome.extra
    state = _count(state, recipe, hyper, outcome, x.shape[0])._replace(params=params, moments=moments)
    if recipe.reinit_every is not None:
        state = _offer_and_reinitialise(state, recipe, scaled_x, outcome.residual, keys[2], is_sae=y is None)
    return state._replace(step=state.step + 1), metrics


def sweep_step(
    states: DictionaryTrainState,
    hypers: DictionaryHyper,
    x: Float[Array, "batch d_in"],
    y: Float[Array, "batch d_out"] | None = None,
    *,
    recipe: DictionaryRecipe,
    execution: Execution | None = None,
) -> tuple[DictionaryTrainState, Metrics]:
    """Take one step of every member of a sweep on the same batch; members do not affect each other.

    Args:
        states: `stack_members` of the members' states, all at the same step.
        hypers: `stack_members` of their `DictionaryHyper`s.
        execution: as for `train_step`.

    Returns:
        The stacked next states and metrics, each metric with an axis of members.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from tinymodel_jax.training import ActivationStatistics, init_state, recipe_preset
        >>> from tinymodel_jax.training import stack_members, sweep_step
        >>> recipe = recipe_preset("house", "topk", n_features=32, steps=10, k=4)
        >>> x = jax.random.normal(jax.random.key(0), (64, 8))
        >>> state = init_state(jax.random.key(1), recipe, ActivationStatistics.zero(8).update(x))
        >>> hypers = stack_members([recipe.hyper(k=k) for k in (2, 4)])
        >>> states, metrics = sweep_step(stack_members([state, state]), hypers, x, recipe=recipe)
        >>> metrics["l0"].tolist()
        [2.0, 4.0]
    """
    execution = execution or execution_for(recipe)
    step = states.step[0]  # the same for all members, so that what happens every n steps stays a branch under vmap

    def member(state: DictionaryTrainState, hyper: DictionaryHyper) -> tuple[DictionaryTrainState, Metrics]:
        state = state._replace(step=step)
        return train_step(state, hyper, x, y, recipe=recipe, execution=execution)

    return _of_members(member, execution, states, hypers)


def settle_threshold(
    state: DictionaryTrainState,
    hyper: DictionaryHyper,
    x: Float[Array, "batch d_in"],
    counted: Int[Array, ""] | int,
    *,
    recipe: DictionaryRecipe,
) -> DictionaryTrainState:
    """Average a batch into the threshold of a trained batch_topk dictionary.

    The running mean of training lags behind while the dictionary changes quickly, as in a short training, and would
    keep too many features. Call this with `threshold_batches` batches before `finalize`. Other architectures are
    unchanged.

    Args:
        state: state after the last `train_step`.
        hyper: as for `train_step`.
        x: activation vectors.
        counted: number of batches averaged before; 0 starts again.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from tinymodel_jax.training import ActivationStatistics, init_state, recipe_preset, settle_threshold
        >>> recipe = recipe_preset("house", "batch_topk", n_features=32, steps=10, k=4)
        >>> x = jax.random.normal(jax.random.key(0), (64, 8))
        >>> state = init_state(jax.random.key(1), recipe, ActivationStatistics.zero(8).update(x))
        >>> state = settle_threshold(state, recipe.hyper(), x, 0, recipe=recipe)
        >>> bool(state.threshold > 0)
        True
    """
    if recipe.architecture != "batch_topk":
        return state
    z = weighted_activations(state.params, recipe, x.astype(jnp.float32) * state.scale_in)
    found = kth_largest(z, hyper.k * x.shape[0])
    before = jnp.asarray(counted, jnp.float32)
    return state._replace(threshold=(state.threshold * before + found) / (before + 1))


def threshold_batches(batch_size: int) -> int:
    """Return how many batches to pass to `settle_threshold`.

    Examples:
        >>> from tinymodel_jax.training import threshold_batches
        >>> threshold_batches(4096) * 4096
        65536
    """
    return max(THRESHOLD_BATCHES, -(-THRESHOLD_INPUTS // batch_size))


def settle_thresholds(
    states: DictionaryTrainState,
    hypers: DictionaryHyper,
    x: Float[Array, "batch d_in"],
    counted: Int[Array, ""] | int,
    *,
    recipe: DictionaryRecipe,
    execution: Execution,
) -> DictionaryTrainState:
    """Apply `settle_threshold` to every member of a sweep."""
    return _of_members(
        lambda state, hyper: settle_threshold(state, hyper, x, counted, recipe=recipe), execution, states, hypers
    )


def _of_members(member: Callable[..., Any], execution: Execution, *stacked: Any) -> Any:
    if execution.map_members:
        return jax.lax.map(lambda each: member(*each), stacked)
    return jax.vmap(member, spmd_axis_name="sweep" if execution.mesh is not None else None)(*stacked)


def stack_members(members: list[Any]) -> Any:
    """Stack trees of equal shapes along a new leading axis of members.

    Examples:
        >>> from tinymodel_jax.training import recipe_preset, stack_members
        >>> recipe = recipe_preset("house", "topk", n_features=32, steps=10, k=8)
        >>> stack_members([recipe.hyper(k=k) for k in (2, 4, 8)]).k.tolist()
        [2, 4, 8]
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def member_of(stacked: Any, index: int | Int[Array, ""]) -> Any:
    """Return one member of stacked trees; a traced index is compiled once for all members.

    Args:
        stacked: trees that `stack_members` stacked.
        index: number of the member.

    Examples:
        >>> from tinymodel_jax.training import member_of, recipe_preset, stack_members
        >>> recipe = recipe_preset("house", "topk", n_features=32, steps=10, k=8)
        >>> hypers = stack_members([recipe.hyper(k=k) for k in (2, 4, 8)])
        >>> int(member_of(hypers, 1).k)
        4
    """
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def learning_rate_share(step: Array, recipe: DictionaryRecipe) -> Float[Array, ""]:
    """Return the learning rate as a share of the largest: linear warm-up, constant, linear decay at the end.

    Where warm-up and decay overlap, the lower of the two applies.
    """
    rise = _ramp(step, min(recipe.warmup_steps, recipe.steps))
    decay_steps = recipe.decay_fraction * recipe.steps
    if not decay_steps:
        return rise
    left = jnp.clip((recipe.steps - step.astype(jnp.float32)) / decay_steps, 0, 1)
    return jnp.minimum(rise, recipe.final_learning_rate + (1 - recipe.final_learning_rate) * left)


def _ramp(step: Array, steps: int) -> Array:
    return jnp.minimum((step.astype(jnp.float32) + 1) / max(steps, 1), 1)


def _adam(
    state: DictionaryTrainState, recipe: DictionaryRecipe, gradient: TrainParams, rate: Array
) -> tuple[TrainParams, Any]:
    """Return the parameters and moments after an Adam step on the clipped gradient."""
    if recipe.clip_norm is not None:
        shrink = jnp.minimum(1, recipe.clip_norm / (optax.tree.norm(gradient) + TINY))
        gradient = jax.tree.map(lambda g: g * shrink, gradient)
    adam = optax.scale_by_adam(recipe.beta1, recipe.beta2)
    updates, moments = adam.update(gradient, state.moments)  # type: ignore[arg-type]
    rates = {name: rate * (recipe.threshold_rate if name == "threshold" else 1) for name in state.params}
    return jax.tree.map(lambda p, u, r: p - r * u, state.params, updates, rates), moments


def _update(
    state: DictionaryTrainState, optimizer: optax.GradientTransformation, gradient: TrainParams
) -> tuple[TrainParams, Any]:
    """Return the parameters and the optimizer's state after a step of the caller's optimizer."""
    expected = jax.eval_shape(optimizer.init, state.params)
    if jax.tree.structure(expected) != jax.tree.structure(state.moments):
        raise ValueError(
            "train_step: the state was made for another optimizer; make it with init_state(..., optimizer=optimizer)."
        )
    updates, moments = optimizer.update(gradient, state.moments, state.params)  # type: ignore[arg-type]
    params: TrainParams = optax.apply_updates(state.params, updates)  # type: ignore[arg-type,assignment]
    if (layers := layers_of(params, state.mean_in.size)) > 1:  # Adam's updates are 0 where gradients always are
        written = is_written(len(params["W_dec"]), params["W_dec"].shape[1], layers)
        params["W_dec"] = jnp.where(written, params["W_dec"], 0)
    return params, moments


def _count(
    state: DictionaryTrainState, recipe: DictionaryRecipe, hyper: DictionaryHyper, outcome: Outcome, batch: int
) -> DictionaryTrainState:
    """Update the counts of silent inputs, the controller, and batch_topk's threshold."""
    silent_for = jnp.where(outcome.fired, 0, jnp.minimum(state.silent_for + batch, MAX_SILENCE))
    factor = state.sparsity_factor
    if recipe.is_controlled:
        distance = jnp.log(jnp.maximum(outcome.l0, 1e-3) / hyper.target_l0)
        moved = factor * jnp.exp(recipe.controller_rate * jnp.clip(distance, -1, 1))
        factor = jnp.where(state.step >= recipe.sparsity_warmup_steps, moved, factor)
    rate = jnp.maximum(THRESHOLD_RATE, 1 / (1 + THRESHOLD_SHARE * state.step.astype(jnp.float32)))
    threshold = state.threshold + rate * (outcome.threshold - state.threshold)
    return state._replace(silent_for=silent_for, sparsity_factor=factor, threshold=threshold)


def _offer_and_reinitialise(
    state: DictionaryTrainState, recipe: DictionaryRecipe, x: Array, residual: Array, key: Array, is_sae: bool
) -> DictionaryTrainState:
    assert state.reservoir is not None
    assert recipe.reinit_every is not None
    state = state._replace(reservoir=update_reservoir(state.reservoir, x, residual, key))
    done = state.step + 1
    early_enough = done <= (1 - recipe.decay_fraction) * recipe.steps  # later, a new feature could no longer learn
    due = (done % recipe.reinit_every == 0) & early_enough
    return jax.lax.cond(due, lambda s: reinitialise_dead(s, recipe, is_sae), lambda s: s, state)


def _explained(residual: Array, target: Array) -> Array:
    spread = jnp.sum(jnp.square(target - jnp.mean(target, axis=0)))
    return 1 - jnp.sum(residual * residual) / (spread + TINY)

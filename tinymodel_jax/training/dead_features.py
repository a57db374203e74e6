"""Reviving dead features: AuxK gradients, and re-initialisation from badly reconstructed inputs.

A feature is dead after `dead_after` inputs without activation. AuxK trains dead features to predict the residual of the
others. Re-initialisation points each dead feature at a badly reconstructed input and resets its optimizer moments.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tinymodel_jax.dictionaries.layers import is_written, own_part, read, write
from tinymodel_jax.training import dictionary_losses as losses
from tinymodel_jax.training.dictionary_forward import Execution, effective_bias, largest
from tinymodel_jax.training.dictionary_losses import TINY
from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe
from tinymodel_jax.training.dictionary_state import (
    DictionaryTrainState,
    Reservoir,
    TrainParams,
    empty_reservoir,
    layers_of,
)
from tinymodel_jax.training.sparse_rows import kept_of_rows


def dead_mask(state: DictionaryTrainState, recipe: DictionaryRecipe) -> Bool[Array, " n_features"]:
    """Return which features are dead."""
    return state.silent_for >= recipe.dead_after


def add_aux_gradient(
    gradient: TrainParams,
    params: TrainParams,
    recipe: DictionaryRecipe,
    execution: Execution,
    dead: Bool[Array, " n_features"],
    x: Float[Array, "batch d_in"],
    residual: Float[Array, "batch d_out"],
    weight: Float[Array, ""],
    key: Array,
) -> tuple[TrainParams, Float[Array, ""]]:
    """Return the gradient plus `weight` times AuxK's, and AuxK's loss as a share of the residual's variance.

    Uses at most `aux_features` dead features, drawn at random if there are more, of which the `aux_k` largest are
    active on each input. This takes products with `aux_features` rows instead of a second search over all features. The
    encoder gets gradient; the residual does not.
    """
    width, layers = residual.shape[-1], layers_of(params, x.shape[-1])
    size = min(recipe.aux_features or 2 * width, recipe.n_features) // layers * layers
    active = min(recipe.aux_k or max(1, width // 8), size)

    def with_aux() -> tuple[TrainParams, Array]:
        lots = jnp.where(dead, jax.random.uniform(key, dead.shape), -1.0).reshape(layers, -1)
        drawn, rows = jax.lax.top_k(lots, size // layers)
        rows = (rows + lots.shape[1] * jnp.arange(layers)[:, None]).reshape(-1)  # as many of each layer, in order
        drawn = drawn.reshape(-1)
        chosen = {name: params[name][rows] for name in ("W_enc_T", "W_dec", "b_enc")}

        def loss_of(chosen: TrainParams) -> Array:
            bias = effective_bias(chosen | {"b_dec": params["b_dec"]}, recipe)
            acts = jnp.where(drawn >= 0, jax.nn.relu(read(x, chosen["W_enc_T"].T) + bias), 0)
            z = jax.lax.stop_gradient(acts * losses.row_norms(chosen["W_dec"]))
            acts = jnp.where(kept_of_rows(z, *largest(z, active, execution), active), acts, 0)
            return losses.aux_loss(residual, write(acts, chosen["W_dec"], layers))

        loss, extra = jax.value_and_grad(loss_of)(chosen)
        return gradient | {name: gradient[name].at[rows].add(weight * g) for name, g in extra.items()}, loss

    return jax.lax.cond(jnp.any(dead), with_aux, lambda: (gradient, jnp.zeros(())))


def update_reservoir(
    reservoir: Reservoir, x: Float[Array, "batch d_in"], residual: Float[Array, "batch d_out"], key: Array
) -> Reservoir:
    """Return the reservoir updated with a batch.

    Weighted sampling without replacement from all inputs since the reservoir was emptied. Source: Efraimidis & Spirakis
    2006, algorithm A-ES (in logarithms).
    """
    error = jnp.sum(residual * residual, axis=-1)
    chance = jax.random.uniform(key, error.shape, minval=jnp.finfo(jnp.float32).tiny)
    offered = Reservoir(jnp.log(chance) / (error + TINY), x, residual)
    together = jax.tree.map(lambda *parts: jnp.concatenate(parts), reservoir, offered)
    _, kept = jax.lax.top_k(together.priority, reservoir.priority.size)
    return jax.tree.map(lambda leaf: leaf[kept], together)


def reinitialise_dead(state: DictionaryTrainState, recipe: DictionaryRecipe, is_sae: bool) -> DictionaryTrainState:
    """Re-initialise every dead feature from an input of the reservoir, zero its moments, and empty the reservoir.

    The new decoder row points along that input's residual and has the mean norm of the living rows. An SAE's encoder
    also reads along the residual. A transcoder's encoder reads along the input, with an activation that reaches zero
    halfway to the mean input. A cross-layer transcoder's feature reads the input of its layer, and writes to the parts
    of the residual that its layer reaches.

    On its input, a feature writes a share of the residual. The share is the same for all features: the largest, up to
    1, at which together they do not increase the error on the reservoir. Without this limit, hundreds of features,
    which are also active on each other's inputs and all active on far outliers, would make the reconstruction much
    worse. If the reservoir has fewer inputs than there are dead features, the rest stay dead
    until the next re-initialisation.
    """
    assert state.reservoir is not None
    params, reservoir = state.params, state.reservoir
    dead = dead_mask(state, recipe)
    turn = jnp.cumsum(dead) - 1  # the n-th dead feature takes the n-th input
    source = jnp.clip(turn, 0, reservoir.priority.size - 1)
    chosen = dead & (turn < reservoir.priority.size) & (reservoir.priority[source] > -jnp.inf)
    alive_norm = jnp.sum(jnp.where(dead, 0, losses.row_norms(params["W_dec"]))) / jnp.maximum(jnp.sum(~dead), 1)
    norm = jnp.where(jnp.any(~dead), alive_norm, 1.0)

    x, residual, mean_in = reservoir.x[source], reservoir.residual[source], state.mean_in
    layers = layers_of(params, mean_in.size)
    if layers > 1:
        x, mean_in = (own_part(vectors, recipe.n_features, layers) for vectors in (x, mean_in))
        residual = jnp.where(is_written(recipe.n_features, residual.shape[-1], layers), residual, 0)
    size = losses.row_norms(residual)
    direction = residual / size[:, None]
    if is_sae:
        reads = direction
    else:
        distance = losses.row_norms(x - mean_in)
        reads = (2 * size / (distance * distance))[:, None] * (x - mean_in)
    bias = size - jnp.sum(reads * x, axis=-1)
    share = _bearable_share(
        reservoir, jnp.where(chosen[:, None], reads, 0), jnp.where(chosen, bias, 0), direction, recipe
    )
    size, reads, bias = share * size, share * reads, share * bias
    fresh = {"W_enc_T": reads / norm, "W_dec": direction * norm}
    fresh |= dict.fromkeys(("b_enc", "b_gate", "b_mag"), bias / norm)
    fresh |= {"r_mag": jnp.zeros_like(size), "threshold": size / 2}
    if recipe.subtract_b_dec:
        shift = reads @ params["b_dec"] / norm
        fresh |= {name: fresh[name] + shift for name in ("b_enc", "b_gate", "b_mag")}

    def replace(tree: TrainParams, values: TrainParams | None) -> TrainParams:
        return tree | {
            name: _where_rows(chosen, 0 if values is None else values[name], leaf)
            for name, leaf in tree.items()
            if name in fresh
        }

    moments = jax.tree.map(
        lambda part: replace(part, None) if _is_of_params(part, params) else part,
        state.moments,
        is_leaf=lambda part: _is_of_params(part, params),
    )
    return state._replace(
        params=replace(params, fresh),
        moments=moments,
        silent_for=jnp.where(chosen, 0, state.silent_for),
        reservoir=empty_reservoir(recipe, reservoir.x.shape[-1], residual.shape[-1]),
    )


def _bearable_share(reservoir: Reservoir, reads: Array, bias: Array, rows: Array, recipe: DictionaryRecipe) -> Array:
    """Return the largest factor, up to 1, on features' activations that adds no error on the reservoir's inputs."""
    held = reservoir.priority > -jnp.inf
    acts, layers = jax.nn.relu(read(reservoir.x, reads.T) + bias), reservoir.x.shape[-1] // reads.shape[-1]
    if recipe.architecture == "topk":  # which never has more than k active
        k, of_layers = recipe.k or 1, acts.reshape(-1, recipe.n_features // layers)
        kept = kept_of_rows(of_layers, *jax.lax.top_k(of_layers, k), k).reshape(acts.shape)
        acts = jnp.where(kept, acts, 0)
    together = write(acts, rows, layers)
    together, residual = (jnp.where(held[:, None], a, 0) for a in (together, reservoir.residual))
    return jnp.clip(2 * jnp.sum(together * residual) / (jnp.sum(together * together) + TINY), 0, 1)


def _is_of_params(part: object, params: TrainParams) -> bool:
    """Whether a part of an optimizer's state holds one array for every parameter, as moments do."""
    return (
        isinstance(part, dict)
        and part.keys() == params.keys()
        and all(jnp.shape(part[name]) == leaf.shape for name, leaf in params.items())
    )


def _where_rows(chosen: Array, new: Array | int, old: Array) -> Array:
    return jnp.where(chosen.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

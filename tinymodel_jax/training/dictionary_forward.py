"""A dictionary's predictions, loss and gradients in training: dense for all architectures, or sparse for TopK.

Both give the same numbers. Active features are chosen by activations weighted with the norm of their decoder row, so
scaling a feature's decoder up and its encoder down by the same factor changes nothing. The activation itself is not
weighted: it multiplies the unnormalised decoder row.

    pre  = (x - b_dec if subtract_b_dec else x) @ W_enc_T.T + b_enc         z = pre * |W_dec row|
    topk: acts = relu(pre) for the k largest z of an input
    batch_topk: acts = relu(pre) for the k * batch largest z of the whole batch
        (among equal z, lower inputs and then lower features are kept)
    jumprelu: acts = pre where z > threshold        relu, gated: as in `tinymodel_jax.dictionaries.dictionary`

Cross-layer transcoders are always dense. Their topk keeps k of each layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from tinymodel_jax.dictionaries.layers import read, write
from tinymodel_jax.training import dictionary_losses as losses
from tinymodel_jax.training.batch_selection import BatchSelection, select_of_batch
from tinymodel_jax.training.dictionary_recipe import DictionaryHyper, DictionaryRecipe
from tinymodel_jax.training.dictionary_state import TrainParams, layers_of
from tinymodel_jax.training.sparse_rows import (
    gather_decode,
    kept_of_rows,
    largest_of_all,
    selected_values,
    top_k,
    top_k_of_shards,
)

Widths = tuple[int, ...] | Int[Array, " l"]
"""Sizes of the nested dictionaries: fixed (a tuple) or drawn for this step (an array)."""

ExtraLoss = Callable[[Array, Array, Array, Array], Array]
"""`(x, y, activations, reconstruction) -> a scalar` that is added to the loss: scaled inputs `(batch, d_in)`, scaled
targets `(batch, d_out)` (an SAE's inputs), activations times the norms of their decoder rows `(batch, n_features)`, and
the prediction of `y` by all features."""


class Execution(NamedTuple):
    """How to compute a step, as static choices that all give the same numbers. `execution_for` makes them."""

    sparse: bool
    """Whether topk and batch_topk decode only the selected rows."""
    on_cpu: bool
    """Whether gathers and scatters loop over a few rows at a time, and top-k has two stages."""
    map_members: bool
    """Whether a sweep computes its members one after the other in the compiled step instead of batched."""
    mesh: Mesh | None = None
    """Devices that inputs, features and members are sharded over; None for one device."""
    slots: tuple[int, ...] = ()
    """Numbers of features that a step may select, in rising order. A step uses the smallest that is at least its `k`,
    so that members of a mapped sweep do not pay for the largest `k`. Empty: only the recipe's k."""
    bitwise: bool = False
    """Whether batch_topk finds its threshold one bit per pass over the activations instead of four."""


class Outcome(NamedTuple):
    """Results of a forward pass."""

    loss: Float[Array, ""]
    reconstruction: Float[Array, ""]
    sparsity: Float[Array, ""]
    """The sparsity loss before its coefficient; 0 for topk and batch_topk."""
    l0: Float[Array, ""]
    fired: Bool[Array, " n_features"]
    residual: Float[Array, "batch d_out"]
    threshold: Float[Array, ""]
    """Smallest weighted activation that was kept (batch_topk; 0 for others)."""
    extra: Float[Array, ""]
    """The caller's own term of the loss; 0 without one."""


def execution_for(
    recipe: DictionaryRecipe, backend: str | None = None, mesh: Mesh | None = None, ks: Iterable[int] = ()
) -> Execution:
    """Choose how to compute a step on a backend (default: JAX's default backend, or the mesh's).

    On CPUs and GPUs, topk and batch_topk decode by gathering rows. Dense products are used on TPUs, whose gathers are
    slow, and when features are sharded or batch_topk compares inputs on several devices. A single CPU maps over the
    members of a sweep, which measured faster than batching them, and CPUs find batch_topk's threshold one bit per pass.
    Only the CPU choices are measured.

    Args:
        ks: the members' k in a sweep. Only topk on one CPU uses them: batch_topk's loops end early by themselves.
    """
    backend = backend or (jax.default_backend() if mesh is None else mesh.devices.flat[0].platform)
    alone = mesh is None or mesh.size == 1
    near = mesh is None or (mesh.shape["model"] == 1 and (recipe.architecture == "topk" or mesh.shape["data"] == 1))
    on_one_cpu = backend == "cpu" and alone
    return Execution(
        sparse=recipe.takes_k and backend != "tpu" and near,
        on_cpu=on_one_cpu,
        map_members=on_one_cpu,
        mesh=None if alone else mesh,
        slots=tuple(sorted(set(ks))) if on_one_cpu and recipe.architecture == "topk" else (),
        bitwise=backend == "cpu",
    )


def loss_and_gradient(
    params: TrainParams,
    recipe: DictionaryRecipe,
    execution: Execution,
    hyper: DictionaryHyper,
    x: Float[Array, "batch d_in"],
    y: Float[Array, "batch d_out"],
    widths: Widths,
    extra_loss: ExtraLoss | None = None,
) -> tuple[Outcome, TrainParams]:
    """Return the outcome of a forward pass on scaled `x` and `y`, and the gradient of its loss (without AuxK).

    `hyper.sparsity` is this step's coefficient, after warm-up and controller. With `extra_loss`, which reads all
    activations, and for a cross-layer transcoder, the forward pass is dense.
    """
    is_sparse = recipe.takes_k and execution.sparse and layers_of(params, x.shape[-1]) == 1
    if extra_loss is not None or not is_sparse:
        gradient, outcome = jax.grad(_dense_outcome, has_aux=True)(
            params, recipe, execution, hyper, x, y, widths, extra_loss
        )
        return outcome, gradient

    def sparse(slots: int) -> tuple[Outcome, TrainParams]:
        selection = select(params, recipe, execution, hyper.k, x, slots)
        gradient, outcome = jax.grad(_sparse_outcome, has_aux=True)(params, recipe, execution, selection, x, y, widths)
        return outcome, gradient

    assert recipe.k is not None
    slots = execution.slots or (recipe.k,)
    fewest = jnp.searchsorted(jnp.asarray(slots), hyper.k)
    return jax.lax.switch(fewest, [functools.partial(sparse, n) for n in slots])


def select(
    params: TrainParams,
    recipe: DictionaryRecipe,
    execution: Execution,
    k: Int[Array, ""],
    x: Float[Array, "batch d_in"],
    slots: int,
) -> BatchSelection:
    """Choose the active features of topk or batch_topk, for a `k` up to `slots`. Carries no gradient."""
    norms, z = losses.row_norms(params["W_dec"]), weighted_activations(params, recipe, x)
    if recipe.architecture == "batch_topk":
        selection = select_of_batch(z, k, slots, execution.bitwise)
    else:
        best, positions = largest(z, slots, execution)
        kept = jnp.where(jnp.arange(slots) < k, best, 0)
        inputs = jnp.arange(x.shape[0], dtype=jnp.int32)
        selection = BatchSelection(kept, positions, inputs, jnp.int32(x.shape[0]), jnp.zeros(()))
    return selection._replace(values=selection.values / norms[selection.positions])


def weighted_activations(
    params: TrainParams, recipe: DictionaryRecipe, x: Float[Array, "batch d_in"]
) -> Float[Array, "batch f"]:
    """Return positive pre-activations times decoder norms, by which topk and batch_topk choose active features."""
    linear = read(x, params["W_enc_T"].T) + effective_bias(params, recipe)
    return jax.nn.relu(linear) * losses.row_norms(params["W_dec"])


def effective_bias(params: TrainParams, recipe: DictionaryRecipe) -> Float[Array, " n_features"]:
    """Return the encoder's bias with the subtracted `b_dec` folded in, which saves a product."""
    bias = params["b_enc"] if recipe.architecture != "gated" else jnp.zeros(params["W_enc_T"].shape[0])
    return bias - params["W_enc_T"] @ params["b_dec"] if recipe.subtract_b_dec else bias


def _sparse_outcome(params, recipe, execution, selection, x, y, widths) -> tuple[Array, Outcome]:
    positions, used, rowwise = selection.positions, selection.used, execution.on_cpu
    per_input = recipe.architecture == "topk"  # then row i of the selection is input i
    inputs = x if per_input else x.at[selection.owner].get(mode="clip")
    bias = effective_bias(params, recipe)
    values: Array = selected_values(  # type: ignore[assignment]
        inputs, params["W_enc_T"], bias, selection.values, positions, used, rowwise
    )
    in_prefix = positions[:, None, :] < jnp.asarray(widths)[:, None]
    prefix_values = jnp.where(in_prefix, values[:, None, :], 0)
    decoded: Array = gather_decode(  # type: ignore[assignment]
        prefix_values, positions, params["W_dec"], used, rowwise
    )
    if not per_input:
        total = jnp.zeros((x.shape[0], *decoded.shape[1:]))
        decoded = total.at[selection.owner].add(decoded, mode="drop", indices_are_sorted=True)
    prediction = _predict(params, recipe, x, decoded)
    reconstruction, residual = losses.squared_error(y, prediction), _residual(y, prediction)
    active = selection.values > 0
    fired = jnp.zeros(recipe.n_features, bool).at[positions].max(active)
    l0 = jnp.sum(active, dtype=jnp.float32) / x.shape[0]
    zero = jnp.zeros(())
    outcome = Outcome(reconstruction, reconstruction, zero, l0, fired, residual, selection.threshold, extra=zero)
    return reconstruction, outcome


def _dense_outcome(params, recipe, execution, hyper, x, y, widths, extra_loss) -> tuple[Array, Outcome]:
    norms = losses.row_norms(params["W_dec"])
    shares = losses.prefix_shares(jnp.asarray(widths), recipe.n_features)
    layers = layers_of(params, x.shape[-1])
    linear = read(x, params["W_enc_T"].T) + effective_bias(params, recipe)
    gate_loss, threshold, extra = jnp.zeros(()), jnp.zeros(()), jnp.zeros(())
    if recipe.architecture in ("relu", "gated"):
        if recipe.architecture == "relu":
            acts = penalised = jax.nn.relu(linear)
        else:
            penalised = jax.nn.relu(linear + params["b_gate"])
            acts = jax.nn.relu(linear * jnp.exp(params["r_mag"]) + params["b_mag"])
            acts = jnp.where(penalised > 0, acts, 0)
            gate_loss = _gate_loss(params, recipe, penalised, x, y, layers)
            # magnitudes can compensate for a smaller decoder, so a penalty on its norm would shrink it without limit
            norms = jax.lax.stop_gradient(norms)
        if recipe.penalty == "l1":
            sparsity = losses.l1_penalty(penalised, norms * shares)
        else:
            sparsity = losses.log_penalty(penalised, norms, shares)
    elif recipe.architecture == "jumprelu":
        norms = jax.lax.stop_gradient(norms)  # they cancel in the activations and only scale the threshold
        z = linear * norms
        jumped: Array = losses.jump(z, params["threshold"], recipe.bandwidth)  # type: ignore[assignment]
        acts = jumped / norms
        l0: Array = losses.mean_l0(z, params["threshold"], recipe.bandwidth)  # type: ignore[assignment]
        sparsity = l0
        if recipe.target_l0 is not None:
            sparsity = losses.variance(y) * losses.target_l0_loss(l0, hyper.target_l0)
    else:
        z = jax.lax.stop_gradient(jax.nn.relu(linear) * norms)
        kept, threshold = _kept(z, recipe, execution, hyper.k, layers)
        acts = jnp.where(kept, jax.nn.relu(linear), 0)
        sparsity = jnp.zeros(())
    if layers > 1:
        decoded = write(acts, params["W_dec"], layers)[:, None]
    else:
        decoded = losses.decode_prefixes(acts, params["W_dec"], widths)
    prediction = _predict(params, recipe, x, decoded)
    reconstruction = losses.squared_error(y, prediction)
    if extra_loss is not None:
        extra = extra_loss(x, y, acts * norms, prediction[:, -1])
    counts = jnp.sum(acts > 0, axis=0, dtype=jnp.int32)
    l0 = jnp.sum(counts) / x.shape[0]
    loss = reconstruction + hyper.sparsity * sparsity + gate_loss if not recipe.takes_k else reconstruction
    loss = loss if extra_loss is None else loss + extra
    residual = _residual(y, prediction)
    return loss, Outcome(loss, reconstruction, sparsity, l0, counts > 0, residual, threshold, extra)


def _kept(z, recipe: DictionaryRecipe, execution: Execution, k: Array, layers: int) -> tuple[Array, Array]:
    """Return which weighted activations are kept, and the smallest of them (0 except for batch_topk)."""
    if recipe.architecture == "batch_topk":
        return largest_of_all(z, k * z.shape[0], execution.bitwise)
    of_layers = z.reshape(-1, recipe.n_features // layers)
    kept = kept_of_rows(of_layers, *largest(of_layers, recipe.k or 0, execution), k)
    return kept.reshape(z.shape), jnp.zeros(())


def largest(z: Array, k: int, execution: Execution) -> tuple[Array, Array]:
    """Return the `k` largest of each row and their positions, for any sharding of rows and columns."""
    if execution.mesh is None:
        return top_k(z, k, execution.on_cpu)
    return top_k_of_shards(z, k, execution.mesh)


def _predict(params, recipe: DictionaryRecipe, x: Array, decoded: Array) -> Array:
    """Return the predictions of all prefixes."""
    prediction = decoded + params["b_dec"]
    return prediction + (x @ params["W_skip"])[:, None, :] if recipe.skip else prediction


def _residual(y: Array, prediction: Array) -> Array:
    """Return the residual of the whole dictionary, without a gradient."""
    return jax.lax.stop_gradient(y - prediction[:, -1])


def _gate_loss(params, recipe: DictionaryRecipe, gate: Array, x: Array, y: Array, layers: int) -> Array:
    """Return the error of a prediction from the gate's activations and a frozen decoder.

    This gives the gate a gradient. Source: Rajamanoharan et al. 2024 (Gated SAEs), eq. 8.
    """
    frozen = jax.lax.stop_gradient(params)
    prediction = write(gate, frozen["W_dec"], layers) + frozen["b_dec"]
    if recipe.skip:
        prediction = prediction + x @ frozen["W_skip"]
    return losses.squared_error(y, prediction[:, None, :])

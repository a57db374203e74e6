"""One training step of the language model, as a pure function `(state, tok_ids) -> (state, metrics)`.

AdamW or Muon with warm-up, decay and clipping. The loss is the mean next-token cross-entropy over targets that are not
`[PAD]`. Gradients accumulated over micro-batches have the same sum. Parameters and moments are always float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.model.transformer import Transformer

Initialization = Literal["reference", "wide"]
"""`reference`: as published, embeddings normal(1e-4). `wide`: embeddings normal(0.3), positions normal(0.1)."""
_WIDE = {"W_E": 0.3, "W_pos": 0.1}
_MUON_AXES = {
    **dict.fromkeys(("W_Q", "W_K", "W_V"), MuonDimensionNumbers(reduction_axis=1, output_axis=(0, 2))),
    "W_O": MuonDimensionNumbers(reduction_axis=(0, 1), output_axis=2),
    **dict.fromkeys(("W_in", "W_out"), MuonDimensionNumbers(reduction_axis=0, output_axis=1)),
}
Schedule = Callable[[Any], Any]
"""Step number to learning rate."""


@dataclass(frozen=True)
class LMOptimizer:
    """The optimizer and its schedule.

    Examples:
        >>> from tinymodel_jax.training import lm_step
        >>> lm_step.LMOptimizer(method="muon", schedule="cosine").learning_rate
        0.001
    """

    method: Literal["adamw", "muon"] = "adamw"
    """`muon` makes the updates of attention and MLP matrices orthogonal, and uses AdamW for all other parameters."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """After the warm-up: constant, then linear to zero over the last `decay_fraction`; or half a cosine to a tenth."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from zero, limited to the length of the training."""
    decay_fraction: float = 0.2
    """Share of all steps in which `wsd` decays, and the smallest share in which `cosine` does, after a long warm-up."""
    beta1: float = 0.9
    """Decay of the gradient's mean (0.95 for Muon's)."""
    beta2: float = 0.95
    """Decay of the squared gradient's mean."""
    weight_decay: float = 0.1
    """Decoupled weight decay, applied to matrices but not to embeddings and biases."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)!r} must be {wants}"
            for name, good, wants in (
                ("method", self.method in ("adamw", "muon"), "'adamw' or 'muon'"),
                ("learning_rate", self.learning_rate > 0, "above 0"),
                ("schedule", self.schedule in ("wsd", "cosine"), "'wsd' or 'cosine'"),
                ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
                ("decay_fraction", 0 <= self.decay_fraction <= 1, "0 to 1"),
                ("beta1", 0 <= self.beta1 < 1, "0 up to but not 1"),
                ("beta2", 0 <= self.beta2 < 1, "0 up to but not 1"),
                ("weight_decay", self.weight_decay >= 0, "0 or more"),
                ("clip_norm", self.clip_norm > 0, "above 0"),
            )
            if not good
        ]
        if problems:
            raise ValueError(f"optimizer: {'; '.join(problems)}.")


class LMState(NamedTuple):
    """All that a step changes; with the step number, all that resuming needs."""

    step: Int[Array, ""]
    """Steps done."""
    params: Any
    """Parameter tree of the model."""
    optimizer: Any
    """State of the optax transformation."""


def learning_rate_schedule(optimizer: LMOptimizer, steps: int) -> Schedule:
    """Return the learning rate as a function of the step, 0 … steps - 1: the lower of warm-up and decay.

    A warm-up that overlaps the decay, or is longer than the training, does not delay the decay.

    Args:
        optimizer: a `LMOptimizer`.
        steps: length of the training (steps).

    Examples:
        >>> from tinymodel_jax.training import lm_step
        >>> rate = lm_step.learning_rate_schedule(lm_step.LMOptimizer(warmup_steps=10), steps=100)
        >>> [round(float(rate(step)), 4) for step in (0, 50, 90)]
        [0.0001, 0.001, 0.0005]
    """
    peak, warmup = optimizer.learning_rate, min(optimizer.warmup_steps, steps)
    decay = max(int(optimizer.decay_fraction * steps), 1)
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    if optimizer.schedule == "cosine":
        start = min(warmup, steps - decay)
        fall = optax.join_schedules(
            [optax.constant_schedule(peak), optax.cosine_decay_schedule(peak, steps - start, 0.1)], [start]
        )
    else:
        fall = optax.linear_schedule(peak, 0.0, decay, steps - decay)
    return lambda step: jnp.minimum(rise(step), fall(step))


def make_optimizer(optimizer: LMOptimizer, steps: int) -> optax.GradientTransformation:
    """Return the optax transformation.

    Args:
        optimizer: a `LMOptimizer`.
        steps: length of the training (steps).

    Examples:
        >>> import jax.numpy as jnp
        >>> from tinymodel_jax.training import lm_step
        >>> adamw = lm_step.make_optimizer(lm_step.LMOptimizer(), steps=10)
        >>> updates, _ = adamw.update({"w": jnp.ones(2)}, adamw.init({"w": jnp.ones(2)}), {"w": jnp.ones(2)})
        >>> bool((updates["w"] < 0).all())
        True
    """
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        _muon(optimizer)
        if optimizer.method == "muon"
        else optax.scale_by_adam(optimizer.beta1, optimizer.beta2, eps=1e-8),
        optax.add_decayed_weights(optimizer.weight_decay, mask=_decayed),
        optax.scale_by_learning_rate(learning_rate_schedule(optimizer, steps)),
    )


def _muon(optimizer: LMOptimizer) -> optax.GradientTransformation:
    """Return the direction of Muon's updates, scaled to the size of AdamW's, so that one learning rate suits both.

    The matrices of a layer's heads are treated as one matrix. Source: Jordan et al., Muon (2024); the size from
    Liu et al., Muon is Scalable for LLM Training (2025), section 2.2.
    """
    return optax.contrib.muon(
        -1.0,  # a direction, not a step: the schedule and its sign come later
        consistent_rms=0.2,
        adam_b1=optimizer.beta1,
        adam_b2=optimizer.beta2,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: _MUON_AXES.get(path[-1].key), params
        ),
    )


def init_state(
    key: Array,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    initialization: Initialization = "reference",
) -> LMState:
    """Return the state before the first step.

    Without layer norm, the `reference` embeddings of 1e-4 make the residual stream almost zero at first, so `wide`
    learns faster.

    Args:
        key: key of the random draws.
        optimizer: the optax transformation, such as that of `make_optimizer`.
        initialization: `reference`, as the original draws its parameters, or `wide`, with larger embeddings.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from tinymodel_jax import ModelConfig
        >>> from tinymodel_jax.training import lm_step
        >>> config = ModelConfig(n_layers=1, d_model=16, n_heads=2, d_mlp=32, n_ctx=8, d_vocab=32)
        >>> adamw = lm_step.make_optimizer(lm_step.LMOptimizer(), steps=10)
        >>> state = lm_step.init_state(jax.random.key(0), config, adamw)
        >>> state.params["W_E"].shape
        (32, 16)
    """
    params: Any = Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    if initialization == "wide":
        for number, (name, scale) in enumerate(_WIDE.items()):
            leaf = params[name]
            params[name] = scale * jax.random.normal(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)
    return LMState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def summed_loss(
    params: Any, config: ModelConfig, tok_ids: Int[Array, "batch seq"], ignored_id: int | None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the summed next-token cross-entropy (nats), and the number of targets in it.

    Args:
        ignored_id: targets with this id are left out, usually `config.pad_id`; None counts all targets.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from tinymodel_jax import ModelConfig
        >>> from tinymodel_jax.training import lm_step
        >>> config = ModelConfig(n_layers=1, d_model=16, n_heads=2, d_mlp=32, n_ctx=8, d_vocab=32)
        >>> adamw = lm_step.make_optimizer(lm_step.LMOptimizer(), steps=10)
        >>> state = lm_step.init_state(jax.random.key(0), config, adamw)
        >>> loss, tokens = lm_step.summed_loss(state.params, config, jnp.ones((2, 8), jnp.int32), config.pad_id)
        >>> round(float(loss / tokens), 2), float(tokens)
        (3.27, 14.0)
    """
    logits: Any = Transformer(config).apply({"params": params}, tok_ids)
    # The last position has no target. It gets weight 0 instead of being cut off, because logits are the largest array
    # of a step, and slicing them copies them in both directions.
    targets = jnp.roll(tok_ids, -1, axis=1)
    counted = jnp.broadcast_to(jnp.arange(tok_ids.shape[1]) < tok_ids.shape[1] - 1, targets.shape)
    if ignored_id is not None:
        counted &= targets != ignored_id
    losses = _cross_entropy(logits, targets)
    return jnp.sum(losses * counted), jnp.sum(counted, dtype=jnp.float32)


def _cross_entropy(logits: Float[Array, "batch seq v"], targets: Int[Array, "batch seq"]) -> Float[Array, "batch seq"]:
    """Return -log_softmax at the targets. A masked sum chooses them: to gather them, a TPU would copy all logits."""
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], shifted, 0), axis=-1)
    return jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)) - chosen


def train_step(
    state: LMState,
    tok_ids: Int[Array, "batch seq"],
    *,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    micro_batches: int = 1,
    computed_on: Any = None,
    updated_on: Any = None,
) -> tuple[LMState, dict[str, Array]]:
    """Take one step; the metrics are `loss` (nats), `gradient_norm` before clipping, `learning_rate`, `tokens`.

    Args:
        state: state of `init_state` or of the step before.
        tok_ids: a batch of rows; `[PAD]` is never a target.
        optimizer: the optax transformation that made the state.
        schedule: learning rate by step, which only goes into the metrics.
        micro_batches: number of parts of the batch, computed one after the other to save memory; must divide the batch.
        computed_on: tree of the parameters' shardings during the computation; None if these are as stored.
        updated_on: tree of their shardings, and those of the gradients, during the optimizer's update; None if these
            are as stored.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from tinymodel_jax import ModelConfig
        >>> from tinymodel_jax.training import lm_step
        >>> config = ModelConfig(n_layers=1, d_model=16, n_heads=2, d_mlp=32, n_ctx=8, d_vocab=32)
        >>> adamw = lm_step.make_optimizer(lm_step.LMOptimizer(), steps=10)
        >>> state = lm_step.init_state(jax.random.key(0), config, adamw)
        >>> rate = lm_step.learning_rate_schedule(lm_step.LMOptimizer(), steps=10)
        >>> ids = jnp.ones((2, 8), jnp.int32)
        >>> state, metrics = lm_step.train_step(state, ids, config=config, optimizer=adamw, schedule=rate)
        >>> int(state.step), sorted(metrics)
        (1, ['gradient_norm', 'learning_rate', 'loss', 'tokens'])
    """
    # Otherwise, for parameters that are stored sharded over `data`, XLA splits the products along these shards and
    # exchanges the activations, which are far larger than the parameters.
    params = _placed(state.params, computed_on)

    def gradient(part: Array) -> Any:
        loss, gradients = jax.value_and_grad(summed_loss, has_aux=True)(params, config, part, config.pad_id)
        return loss, _placed(gradients, updated_on)

    def add(total: Any, part: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(part)), None

    if micro_batches == 1:
        total = gradient(tok_ids)
    else:
        # Every micro_batches-th row belongs to the same part, so that each part has rows of every device.
        parts = tok_ids.reshape(-1, micro_batches, tok_ids.shape[1]).swapaxes(0, 1)
        start = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, parts[0]))
        total, _ = jax.lax.scan(add, start, parts)
    (loss, tokens), gradients = total
    gradients = jax.tree.map(lambda g: g / tokens, gradients)
    params = _placed(state.params, updated_on)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, params)
    metrics = {
        "loss": loss / tokens,
        "gradient_norm": optax.tree.norm(gradients),
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        "tokens": tokens,
    }
    return LMState(state.step + 1, optax.apply_updates(params, updates), optimizer_state), metrics


def _placed(tree: Any, where: Any) -> Any:
    return tree if where is None else jax.lax.with_sharding_constraint(tree, where)


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim > 1 and path[-1].key not in ("W_E", "W_pos"), params
    )

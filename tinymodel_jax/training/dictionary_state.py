"""The state of a dictionary's training: how it starts, and the dictionary that it becomes.

The state is a tree of arrays with everything that a step reads besides its batch. So a saved state resumes a run
bit-exactly, and states stacked along a leading axis form a sweep. The first axis of every feature parameter is the
features' (the encoder is stored transposed, as `W_enc_T`), so gradients and re-initialisation update whole rows.
`finalize` returns a dictionary for unscaled activations that computes what training computed. Only batch_topk differs:
it keeps activations above a fixed threshold instead of the largest of a batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, UInt32

from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.encoding import DictionaryParams
from tinymodel_jax.training.dictionary_losses import TINY, row_norms
from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe

TrainParams = dict[str, Array]


class ActivationStatistics(NamedTuple):
    """Sums over activation vectors, for the mean and the scale of training inputs; `update` adds a batch."""

    vectors: Float[Array, ""]
    """Number of vectors."""
    sum: Float[Array, " d"]
    """Sum of the vectors."""
    norm_sum: Float[Array, ""]
    """Sum of their Euclidean norms."""

    @classmethod
    def zero(cls, width: int) -> ActivationStatistics:
        """Return the statistics of no vectors."""
        return cls(jnp.zeros(()), jnp.zeros(width), jnp.zeros(()))

    def update(self, x: Float[Array, "batch d"]) -> ActivationStatistics:
        """Return the statistics with a batch of vectors added."""
        x = x.astype(jnp.float32)
        norms = jnp.sqrt(jnp.sum(x * x, axis=-1))
        return ActivationStatistics(self.vectors + x.shape[0], self.sum + x.sum(axis=0), self.norm_sum + norms.sum())

    @property
    def mean(self) -> Float[Array, " d"]:
        """Mean vector."""
        return self.sum / jnp.maximum(self.vectors, 1)

    @property
    def scale(self) -> Float[Array, ""]:
        """Factor that makes the mean norm the square root of the width; 1 if all vectors are 0."""
        mean_norm = self.norm_sum / jnp.maximum(self.vectors, 1)
        return jnp.where(mean_norm > 0, self.sum.shape[0] ** 0.5 / jnp.where(mean_norm > 0, mean_norm, 1), 1)


class Reservoir(NamedTuple):
    """A sample of inputs, drawn without replacement with probability proportional to their squared error."""

    priority: Float[Array, " size"]
    """Sampling key, log(uniform) / squared error: the largest are kept; -inf marks an empty slot."""
    x: Float[Array, "size d_in"]
    """Scaled inputs."""
    residual: Float[Array, "size d_out"]
    """Residuals of their scaled targets at the step when they were drawn."""


class DictionaryTrainState(NamedTuple):
    """Everything that one training step passes to the next. In a sweep, every leaf has a leading axis of members."""

    params: TrainParams
    """`W_enc_T [F, d_in]`, `W_dec [F, d_out]`, `b_dec [d_out]`, and by architecture `b_enc`, `threshold`, `b_gate`,
    `b_mag`, `r_mag` (all `[F]`) and `W_skip [d_in, d_out]`; float32, for scaled inputs."""
    moments: Any
    """Adam's step count and moments (`optax.ScaleByAdamState`), or the state of the caller's own optimizer."""
    step: Int[Array, ""]
    """Steps done."""
    mean_in: Float[Array, " d_in"]
    """Mean scaled input, computed before training."""
    scale_in: Float[Array, ""]
    """Factor from activations to training inputs."""
    scale_out: Float[Array, ""]
    """Factor from targets to training targets."""
    silent_for: Int[Array, " n_features"]
    """Inputs since each feature was last active."""
    sparsity_factor: Float[Array, ""]
    """The controller's factor on the sparsity coefficient; 1 without a controller."""
    threshold: Float[Array, ""]
    """batch_topk: mean of the smallest weighted activation kept, which the finished dictionary uses as its threshold. A
    running mean during training; `settle_threshold` recomputes it for the finished dictionary."""
    reservoir: Reservoir | None
    """Inputs to re-initialise dead features from; None if the recipe does not re-initialise any."""
    key: UInt32[Array, "..."]
    """Key data of the random key; every step folds its number into it."""


def init_state(
    key: Key[Array, ""],
    recipe: DictionaryRecipe,
    statistics_in: ActivationStatistics,
    statistics_out: ActivationStatistics | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
) -> DictionaryTrainState:
    """Return the state before the first step.

    Encoder and decoder rows are random directions of the recipe's norms. A feature of an SAE has the same direction in
    both; a transcoder's directions are independent. Encoder biases make every pre-activation 0 at the mean input, and
    `b_dec` is the mean target.

    Args:
        statistics_out: statistics of a transcoder's targets; None makes an SAE.
        optimizer: the one that `train_step` gets, if it is not the recipe's Adam.

    Raises:
        ValueError: the recipe has a skip connection for an SAE, or `subtract_b_dec` for a transcoder.
    """
    is_sae = statistics_out is None
    if is_sae and recipe.skip:
        raise ValueError("init_state: skip=True needs a transcoder (give targets): an SAE would copy its input.")
    if not is_sae and recipe.subtract_b_dec:
        raise ValueError("init_state: subtract_b_dec=True needs an SAE (no targets): b_dec is a target's mean.")
    statistics_out = statistics_in if statistics_out is None else statistics_out
    # two separate arrays of ones, because donated buffers may not occur twice in a state
    scale_in = statistics_in.scale if recipe.scale_inputs else jnp.ones(())
    scale_out = statistics_out.scale if recipe.scale_inputs else jnp.ones(())
    mean_in = statistics_in.mean * scale_in
    params = _init_params(key, recipe, mean_in, statistics_out.mean * scale_out, is_sae)
    return DictionaryTrainState(
        params=params,
        moments=(optimizer or optax.scale_by_adam()).init(params),  # type: ignore[arg-type]
        step=jnp.zeros((), jnp.int32),
        mean_in=mean_in,
        scale_in=scale_in,
        scale_out=scale_out,
        silent_for=jnp.zeros(recipe.n_features, jnp.int32),
        sparsity_factor=jnp.ones(()),
        threshold=jnp.zeros(()),
        reservoir=None if recipe.reinit_every is None else empty_reservoir(recipe, mean_in.size, params["b_dec"].size),
        key=jax.random.key_data(key),
    )


def finalize(
    state: DictionaryTrainState, recipe: DictionaryRecipe, hook_in: str, hook_out: str, k: int | None = None
) -> tuple[DictionaryConfig, DictionaryParams]:
    """Fold scales and decoder norms into the parameters of a `Dictionary`, whose decoder rows have norm 1.

    Its activations are then in units of the target. Features keep their order, so the prefixes of a Matryoshka
    dictionary are its first features.

    Args:
        state: state of one member.
        hook_in, hook_out: hook points of the inputs and the targets; equal for an SAE.
        k: the member's k if the sweep varies it; None takes the recipe's.
    """
    params = state.params
    norms = row_norms(params["W_dec"])
    gain = norms / state.scale_out
    folded = {
        "W_enc": (params["W_enc_T"] * (gain * state.scale_in)[:, None]).T,
        "W_dec": params["W_dec"] / norms[:, None],
        "b_dec": params["b_dec"] / state.scale_out,
    }
    folded |= {name: params[name] * gain for name in ("b_enc", "b_gate", "b_mag") if name in params}
    if recipe.architecture == "gated":
        folded["r_mag"] = params["r_mag"]
    if recipe.architecture == "jumprelu":
        folded["threshold"] = jnp.maximum(params["threshold"], 0) / state.scale_out
    if recipe.architecture == "batch_topk":
        folded["threshold"] = jnp.maximum(state.threshold, 0) / state.scale_out
    if recipe.skip:
        folded["W_skip"] = params["W_skip"] * (state.scale_in / state.scale_out)
    config = DictionaryConfig(
        hook_in=hook_in,
        hook_out=hook_out,
        d_in=params["W_enc_T"].shape[1],
        d_out=params["W_dec"].shape[1],
        n_features=recipe.n_features,
        architecture=recipe.architecture,
        k=recipe.k if k is None else k,
        skip=recipe.skip,
        subtract_b_dec=recipe.subtract_b_dec,
    )
    return config, folded


def empty_reservoir(recipe: DictionaryRecipe, d_in: int, d_out: int) -> Reservoir:
    """Return an empty reservoir."""
    size = recipe.reservoir_size
    return Reservoir(jnp.full(size, -jnp.inf), jnp.zeros((size, d_in)), jnp.zeros((size, d_out)))


def _init_params(key: Array, recipe: DictionaryRecipe, mean_in: Array, mean_out: Array, is_sae: bool) -> TrainParams:
    features, written, read = recipe.n_features, jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    W_dec = _directions(written, features, mean_out.size, recipe.decoder_norm)
    W_enc_T = _directions(written if is_sae else read, features, mean_in.size, recipe.encoder_norm)
    params = {"W_enc_T": W_enc_T, "W_dec": W_dec, "b_dec": mean_out}
    bias = jnp.zeros(features) if recipe.subtract_b_dec else -W_enc_T @ mean_in
    if recipe.architecture == "gated":
        params |= {"b_gate": bias, "b_mag": jnp.copy(bias), "r_mag": jnp.zeros(features)}
    else:
        params |= {"b_enc": bias}
    if recipe.architecture == "jumprelu":
        params |= {"threshold": jnp.full(features, _first_threshold(recipe), jnp.float32)}
    if recipe.skip:
        params |= {"W_skip": jnp.zeros((mean_in.size, mean_out.size))}
    return params


def _first_threshold(recipe: DictionaryRecipe) -> Array:
    """Return the threshold that the target number of features would exceed if pre-activations were normal.

    Scaled inputs have about unit variance in every direction, so the standard deviation of weighted pre-activations is
    the product of the rows' norms. At a threshold of 0, half of all features would start active and the target-L0 loss
    would dominate.
    """
    share = min(0.5, (recipe.target_l0 or recipe.n_features / 20) / recipe.n_features)
    return recipe.encoder_norm * recipe.decoder_norm * jax.scipy.special.ndtri(jnp.float32(1 - share))


def _directions(key: Array, rows: int, width: int, norm: float) -> Array:
    normal = jax.random.normal(key, (rows, width))
    return norm * normal / jnp.sqrt(jnp.sum(normal * normal, axis=-1, keepdims=True) + TINY)

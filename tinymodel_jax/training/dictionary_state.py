"""The state of a dictionary's training: how it starts, and the dictionary that it becomes.

The state is a tree of arrays with everything that a step reads besides its batch. So a saved state resumes a run
bit-exactly, and states stacked along a leading axis form a sweep. The first axis of every feature parameter is the
features' (the encoder is stored transposed, as `W_enc_T`), so gradients and re-initialisation update whole rows.
`finalize` returns a dictionary for unscaled activations that computes what training computed. Only batch_topk differs:
it keeps activations above a fixed threshold instead of the largest of a batch.

Crosscoders and cross-layer transcoders are trained by the same functions on the concatenated vectors of several hook
points, each with a scale of its own: statistics of n parts make one. With targets, they make a cross-layer transcoder,
whose encoder rows have the width of one part. So `layers_of` tells the number of layers from the shapes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, UInt32

from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.encoding import DictionaryParams
from tinymodel_jax.dictionaries.layers import is_written, own_part, read
from tinymodel_jax.training.dictionary_losses import TINY, row_norms
from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe

TrainParams = dict[str, Array]


class ActivationStatistics(NamedTuple):
    """Sums over activation vectors, for the mean and the scale of training inputs; `update` adds a batch.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tinymodel_jax.training import ActivationStatistics
        >>> statistics = ActivationStatistics.zero(4).update(jnp.ones((3, 4)))
        >>> float(statistics.vectors), statistics.mean.tolist(), float(statistics.scale)
        (3.0, [1.0, 1.0, 1.0, 1.0], 1.0)
    """

    vectors: Float[Array, ""]
    """Number of vectors."""
    sum: Float[Array, " d"]
    """Sum of the vectors."""
    norm_sum: Float[Array, "*parts"]
    """Sum of their Euclidean norms; of each part if the vectors concatenate those of several hook points."""

    @classmethod
    def zero(cls, width: int, parts: int = 1) -> ActivationStatistics:
        """Return the statistics of no vectors.

        Args:
            width: width of the vectors.
            parts: number of hook points whose vectors are concatenated.
        """
        return cls(jnp.zeros(()), jnp.zeros(width), jnp.zeros(() if parts == 1 else parts))

    def update(self, x: Float[Array, "batch d"]) -> ActivationStatistics:
        """Return the statistics with a batch of vectors added."""
        x = x.astype(jnp.float32)
        of_parts = x.reshape(len(x), *self.norm_sum.shape, -1)
        norms = jnp.sqrt(jnp.sum(of_parts * of_parts, axis=-1))
        return ActivationStatistics(
            self.vectors + x.shape[0], self.sum + x.sum(axis=0), self.norm_sum + norms.sum(axis=0)
        )

    @property
    def parts(self) -> int:
        """Number of hook points whose vectors are concatenated."""
        return self.norm_sum.size

    @property
    def mean(self) -> Float[Array, " d"]:
        """Mean vector."""
        return self.sum / jnp.maximum(self.vectors, 1)

    @property
    def scale(self) -> Float[Array, "*d"]:
        """Factor that makes the mean norm the square root of the width; 1 if all vectors are 0.

        With several parts, each has its own, and the result is a vector of factors.
        """
        width = self.sum.shape[0] // self.parts
        mean_norm = self.norm_sum / jnp.maximum(self.vectors, 1)
        scale = jnp.where(mean_norm > 0, width**0.5 / jnp.where(mean_norm > 0, mean_norm, 1), 1)
        return scale if scale.ndim == 0 else jnp.repeat(scale, width)


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
    """`W_enc_T [F, d_in]` (`[F, d_in / layers]` of a cross-layer transcoder), `W_dec [F, d_out]`, `b_dec [d_out]`, and
    by architecture `b_enc`, `threshold`, `b_gate`, `b_mag`, `r_mag` (all `[F]`) and `W_skip [d_in, d_out]`; float32,
    for scaled inputs."""
    moments: Any
    """Adam's step count and moments (`optax.ScaleByAdamState`), or the state of the caller's own optimizer."""
    step: Int[Array, ""]
    """Steps done."""
    mean_in: Float[Array, " d_in"]
    """Mean scaled input, computed before training."""
    scale_in: Float[Array, "*d_in"]
    """Factor from activations to training inputs; a vector if they concatenate several hook points'."""
    scale_out: Float[Array, "*d_out"]
    """Factor from targets to training targets; a vector if they concatenate several hook points'."""
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


def layers_of(params: TrainParams, d_in: int) -> int:
    """Return the number of layers of a cross-layer transcoder, 1 for other dictionaries.

    Args:
        d_in: width of the inputs.
    """
    return d_in // params["W_enc_T"].shape[-1]


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
        statistics_in: statistics of the inputs.
        statistics_out: statistics of a transcoder's targets; None makes an SAE.
        optimizer: the one that `train_step` gets, if it is not the recipe's Adam.

    Raises:
        ValueError: the recipe has a skip connection for an SAE, or `subtract_b_dec` for a transcoder, or does not suit
            a cross-layer transcoder.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from tinymodel_jax.training import ActivationStatistics, init_state, recipe_preset
        >>> recipe = recipe_preset("house", "topk", n_features=32, steps=10, k=4)
        >>> x = jax.random.normal(jax.random.key(0), (64, 8))
        >>> state = init_state(jax.random.key(1), recipe, ActivationStatistics.zero(8).update(x))
        >>> state.params["W_dec"].shape, int(state.step)
        ((32, 8), 0)
    """
    is_sae = statistics_out is None
    layers = 1 if is_sae else statistics_in.parts
    if layers > 1:
        _require_layers(recipe, layers)
    if is_sae and recipe.skip:
        raise ValueError("init_state: skip=True needs a transcoder (give targets): an SAE would copy its input.")
    if not is_sae and recipe.subtract_b_dec:
        raise ValueError("init_state: subtract_b_dec=True needs an SAE (no targets): b_dec is a target's mean.")
    statistics_out = statistics_in if statistics_out is None else statistics_out
    # two separate arrays of ones, because donated buffers may not occur twice in a state
    scale_in = statistics_in.scale if recipe.scale_inputs else jnp.ones(())
    scale_out = statistics_out.scale if recipe.scale_inputs else jnp.ones(())
    mean_in = statistics_in.mean * scale_in
    params = _init_params(key, recipe, mean_in, statistics_out.mean * scale_out, is_sae, layers)
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

    Its activations are then in units of the target. With several hook points, the rows have norm 1 where each hook
    point is in units of its own mean norm, relative to the mean over the hook points; so activations are selected as in
    training. Features keep their order, so the prefixes of a Matryoshka
    dictionary are its first features.

    Args:
        state: state of one member.
        hook_in: hook point of the inputs. Several are joined by "+".
        hook_out: hook point of the targets; equal to `hook_in` for an SAE.
        k: the member's k if the sweep varies it; None takes the recipe's.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from tinymodel_jax.training import ActivationStatistics, finalize, init_state, recipe_preset
        >>> recipe = recipe_preset("house", "topk", n_features=32, steps=10, k=4)
        >>> x = jax.random.normal(jax.random.key(0), (64, 8))
        >>> state = init_state(jax.random.key(1), recipe, ActivationStatistics.zero(8).update(x))
        >>> from tinymodel_jax import Dictionary
        >>> dictionary = Dictionary.from_params(*finalize(state, recipe, "x", "x"))
        >>> dictionary.encode(x).shape
        (64, 32)
    """
    params = state.params
    norms, scale_out = row_norms(params["W_dec"]), jnp.mean(state.scale_out)
    gain = norms / scale_out
    folded = {
        "W_enc": (params["W_enc_T"] * (gain[:, None] * scales_read(state))).T,
        "W_dec": params["W_dec"] / norms[:, None] * (scale_out / state.scale_out),
        "b_dec": params["b_dec"] / state.scale_out,
    }
    folded |= {name: params[name] * gain for name in ("b_enc", "b_gate", "b_mag") if name in params}
    if recipe.architecture == "gated":
        folded["r_mag"] = params["r_mag"]
    if recipe.architecture == "jumprelu":
        folded["threshold"] = jnp.maximum(params["threshold"], 0) / scale_out
    if recipe.architecture == "batch_topk":
        folded["threshold"] = jnp.maximum(state.threshold, 0) / scale_out
    if recipe.skip:
        folded["W_skip"] = params["W_skip"] * (state.scale_in / state.scale_out)
    config = DictionaryConfig(
        hook_in=hook_in,
        hook_out=hook_out,
        d_in=state.mean_in.size,
        d_out=params["W_dec"].shape[1],
        n_features=recipe.n_features,
        architecture=recipe.architecture,
        k=recipe.k if k is None else k,
        skip=recipe.skip,
        subtract_b_dec=recipe.subtract_b_dec,
    )
    return config, folded


def scales_read(state: DictionaryTrainState) -> Array:
    """Return the factors from activations to training inputs as the encoder rows read them."""
    rows, layers = state.params["W_enc_T"], layers_of(state.params, state.mean_in.size)
    one = layers == 1 or state.scale_in.ndim == 0
    return state.scale_in if one else own_part(state.scale_in, len(rows), layers)


def empty_reservoir(recipe: DictionaryRecipe, d_in: int, d_out: int) -> Reservoir:
    """Return an empty reservoir."""
    size = recipe.reservoir_size
    return Reservoir(jnp.full(size, -jnp.inf), jnp.zeros((size, d_in)), jnp.zeros((size, d_out)))


def _require_layers(recipe: DictionaryRecipe, layers: int) -> None:
    """Check that a recipe suits a cross-layer transcoder."""
    options = {
        "skip": recipe.skip,
        "Matryoshka prefixes": recipe.n_prefixes > 1,
        f"a k above the {recipe.n_features // layers} features of a layer": recipe.architecture == "topk"
        and (recipe.k or 0) > recipe.n_features // layers,
        f"aux_features below the number of layers, {layers}": 0 < (recipe.aux_features or layers) < layers,
        f"a number of features ({recipe.n_features}) that {layers} layers do not divide": recipe.n_features % layers,
    }
    if found := [name for name, given in options.items() if given]:
        raise ValueError(f"init_state: a cross-layer transcoder takes no {', '.join(found)}.")


def _init_params(
    key: Array, recipe: DictionaryRecipe, mean_in: Array, mean_out: Array, is_sae: bool, layers: int
) -> TrainParams:
    features, of_decoder, of_encoder = recipe.n_features, jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    W_dec = _directions(of_decoder, features, mean_out.size, recipe.decoder_norm, layers)
    W_enc_T = _directions(of_decoder if is_sae else of_encoder, features, mean_in.size // layers, recipe.encoder_norm)
    params = {"W_enc_T": W_enc_T, "W_dec": W_dec, "b_dec": mean_out}
    bias = jnp.zeros(features) if recipe.subtract_b_dec else -read(mean_in, W_enc_T.T)
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


def _directions(key: Array, rows: int, width: int, norm: float, layers: int = 1) -> Array:
    """Return random rows of a norm, with zeros where the features of later layers do not write."""
    normal = jax.random.normal(key, (rows, width))
    normal = normal if layers == 1 else jnp.where(is_written(rows, width, layers), normal, 0)
    return norm * normal / jnp.sqrt(jnp.sum(normal * normal, axis=-1, keepdims=True) + TINY)

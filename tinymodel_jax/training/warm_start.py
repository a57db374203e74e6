"""Start a dictionary's training from a finished dictionary: the inverse of `finalize`.

The state computes what the dictionary computes, for the scales of the new activations. The dictionary can be another
site's, trained on other data or with another recipe; only its sizes must fit. Moments, counts and schedules start anew.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.readers import Reader, dictionary_of
from tinymodel_jax.training.dictionary_losses import row_norms
from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe
from tinymodel_jax.training.dictionary_state import DictionaryTrainState, TrainParams, layers_of, scales_read

SMALLEST_NORM = 1e-3
"""Smallest initial norm of a decoder row."""


def require_fit(config: DictionaryConfig, recipe: DictionaryRecipe, d_in: int, d_out: int, layers: int = 1) -> None:
    """Check that a training with this recipe can start from a dictionary.

    Args:
        d_in, d_out: widths of the inputs and the targets.
        layers: those of a cross-layer transcoder.

    Raises:
        ValueError: sizes differ, only one of the two is gated, the recipe lacks the dictionary's skip connection, or
            the dictionary normalizes its input.
    """
    problems = [
        f"{name} is {there} there and {here} here"
        for name, there, here in (
            ("n_features", config.n_features, recipe.n_features),
            ("the input's width", config.d_in, d_in),
            ("the target's width", config.d_out, d_out),
            ("the number of layers", config.n_layers, layers),
        )
        if there != here
    ]
    if (config.architecture == "gated") != (recipe.architecture == "gated"):
        problems.append(f"a {recipe.architecture} dictionary cannot start from a {config.architecture} one")
    if config.normalize != "none":
        problems.append(f"it normalizes its input (normalize={config.normalize!r}), which training does not")
    if config.skip and not recipe.skip:
        problems.append("it has a skip connection, and the recipe has none")
    if problems:
        raise ValueError(f"the dictionary to start from does not fit: {'; '.join(problems)}.")


def start_from(
    state: DictionaryTrainState, recipe: DictionaryRecipe, dictionary: Dictionary | Reader
) -> DictionaryTrainState:
    """Return the state of `init_state` with the parameters of a dictionary or of what `lm[tag]` returns.

    How a feature's scale is divided between encoder and decoder does not change the dictionary: both rows get the same
    norm. Thresholds carry over where both architectures have them, and jumprelu's are 0 otherwise. A recipe with a skip
    connection starts it at 0, if the dictionary has none.

    Args:
        state: state of `init_state`, for the same recipe.
        dictionary: dictionary of the same sizes, or `lm["M2"]`.

    Raises:
        ValueError: it is not a dictionary, or as `require_fit`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from tinymodel_jax.training import ActivationStatistics, finalize, init_state, recipe_preset, start_from
        >>> recipe = recipe_preset("house", "topk", n_features=32, steps=10, k=4)
        >>> x = jax.random.normal(jax.random.key(0), (64, 8))
        >>> state = init_state(jax.random.key(1), recipe, ActivationStatistics.zero(8).update(x))
        >>> from tinymodel_jax import Dictionary
        >>> dictionary = Dictionary.from_params(*finalize(state, recipe, "x", "x"))
        >>> start_from(state, recipe, dictionary).params["W_dec"].shape
        (32, 8)
    """
    dictionary = dictionary_of(dictionary)
    before, config = state.params, dictionary.config
    d_in = state.mean_in.size
    require_fit(config, recipe, d_in, before["W_dec"].shape[1], layers_of(before, d_in))
    given = {name: jnp.asarray(array, jnp.float32) for name, array in dictionary.params.items()}
    encoder_rows, decoder_rows = given["W_enc"].T / scales_read(state), given["W_dec"] * state.scale_out
    size = row_norms(decoder_rows)
    norms = jnp.maximum(jnp.sqrt(row_norms(encoder_rows) * size), SMALLEST_NORM)
    gain = size / norms
    params = {
        "W_enc_T": encoder_rows * gain[:, None],
        "W_dec": decoder_rows / gain[:, None],
        "b_dec": given["b_dec"] * state.scale_out,
    }
    params |= {name: given[name] * gain for name in ("b_enc", "b_gate", "b_mag") if name in given}
    if "r_mag" in given:
        params["r_mag"] = jnp.copy(given["r_mag"])  # a step that donates its state must not take the dictionary's array
    subtracted = int(config.subtract_b_dec) - int(recipe.subtract_b_dec)
    shift = subtracted * (params["W_enc_T"] @ (given["b_dec"] * state.scale_in)) if subtracted else 0
    params |= _shifted(params, shift)
    threshold = jnp.maximum(given.get("threshold", jnp.zeros(())), 0) * size
    if recipe.architecture == "jumprelu":
        params["threshold"] = threshold
    if recipe.skip:
        params["W_skip"] = before["W_skip"]
        if config.skip:
            params["W_skip"] = given["W_skip"] * (state.scale_out / state.scale_in)
    return state._replace(params=params, threshold=jnp.mean(threshold))


def _shifted(params: TrainParams, shift: Array | int) -> TrainParams:
    """Return the biases for an encoder whose linear output is larger by `shift`."""
    found = {name: params[name] - shift for name in ("b_enc", "b_gate") if name in params}
    return found | ({"b_mag": params["b_mag"] - shift * jnp.exp(params["r_mag"])} if "b_mag" in params else {})

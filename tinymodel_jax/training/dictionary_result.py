"""From a training state to a dictionary that reads and predicts unscaled activations.

The result's decoder rows have norm 1, so that its activations are in units of the target, and it gives the numbers that
training gave; only batch_topk differs, which keeps what exceeds one threshold instead of the largest of a batch.
"""

from __future__ import annotations

import jax.numpy as jnp

from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import DictionaryParams
from tinymodel_jax.training.dictionary_losses import row_norms
from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe
from tinymodel_jax.training.dictionary_state import DictionaryTrainState


def finalize(
    state: DictionaryTrainState, recipe: DictionaryRecipe, hook_in: str, hook_out: str, k: int | None = None
) -> tuple[DictionaryConfig, DictionaryParams]:
    """Fold scales and decoder norms into the parameters of a `Dictionary`.

    Features keep their order, so the prefixes of a Matryoshka dictionary are its first features.

    Args:
        state: one member's state.
        hook_in, hook_out: where the dictionary reads and what it predicts; equal for an SAE.
        k: the member's own k, where a sweep varied it; None is the recipe's.
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

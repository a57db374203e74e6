"""Direct logit effects: which next tokens a feature's decoder direction promotes and suppresses.

    effect = W_dec @ W_U, minus its mean over the vocabulary (which the softmax ignores)

The effect is direct: it follows the path from the dictionary's output to the unembedding and skips all later layers.
There is no layer norm, so it is exact: one unit of activation adds it to the logits at every input. An SAE that
normalizes its input writes in proportion to the input's size; its effects are those at an input of size 1. They are
defined where `hook_out` is the residual stream or is added
to it, and for the outputs of heads and neurons (`attn.hook_z`, `mlp.hook_post`), which W_O and W_out map to the stream.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinymodel_jax.analysis.search.stream_directions import WRITTEN, is_written, written
from tinymodel_jax.dictionaries.dictionary import resolve_indices
from tinymodel_jax.dictionaries.encoding import Indices
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.runtime.compilation import fast_jit

UNIT = "one unit of activation"
UNIT_AT_SIZE_1 = f"{UNIT} at an input of size 1"
"""Of an SAE that normalizes its input: elsewhere the effect is multiplied by the size that the input is divided by."""
TOGETHER = 512
"""Features whose effects on all logits are held in memory together."""


class LogitEffects(NamedTuple):
    """The tokens that each feature promotes and suppresses most, strongest first."""

    features: Int[np.ndarray, " n"]
    """Indices of the features."""
    promoted: Int[np.ndarray, "n top"]
    """Ids of the tokens whose logits each feature raises most."""
    promoted_effect: Float[np.ndarray, "n top"]
    """Their effects, in logits per `unit`."""
    suppressed: Int[np.ndarray, "n top"]
    """Ids of the tokens whose logits each feature lowers most."""
    suppressed_effect: Float[np.ndarray, "n top"]
    """Their effects, in logits per `unit`."""
    unit: str = UNIT
    """What has these effects, in words: `UNIT`, or `UNIT_AT_SIZE_1` for an SAE that normalizes its input."""


def logit_effects(lm: TinyModel, tag: str, top: int = 10, features: Indices = None) -> LogitEffects:
    """Return the direct effect of features on the logits.

        effect of feature f on token t = (what W_dec[f] adds to the stream) . W_U[:, t]

    Args:
        tag: the dictionary's site, such as M2.
        top: number of tokens promoted, and of tokens suppressed.
        features: one index or several; None takes all.

    Raises:
        ValueError: the site has no dictionary or no direct effect, the tag names a feature, a feature is out of range,
            or `top` is outside 1..d_vocab.

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; exact without layer norm.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import logit_effects
        >>> lm = TinyModel("mini")
        >>> effects = logit_effects.logit_effects(lm, "M3", top=3, features=304)
        >>> effects.promoted.shape
        (1, 3)
        >>> lm.to_str_tokens(effects.promoted[0])
        [' hur', ' She', ' He']
    """
    dictionary = lm[Site.whole(tag, "logit_effects: ").tag].dictionary
    if not 1 <= top <= lm.config.d_vocab:
        raise ValueError(f"logit_effects: top={top} is outside 1..{lm.config.d_vocab}, the vocabulary.")
    wanted = slice(None) if features is None else features
    chosen = np.atleast_1d(resolve_indices(wanted, dictionary.config.n_features))
    if not is_written(hook_out := dictionary.config.hook_out):
        raise ValueError(
            f"logit_effects: {hook_out} has no direct effect on the logits; it is defined at {', '.join(WRITTEN)}."
        )
    directions = written(lm, hook_out, dictionary.params["W_dec"][chosen])
    unit = UNIT_AT_SIZE_1 if dictionary.config.rescales_output else UNIT
    return LogitEffects(chosen, *strongest_tokens(lm, directions, top), unit)


def logit_histogram(
    lm: TinyModel, tag: str, features: Indices, n_bins: int
) -> tuple[Int[np.ndarray, "n bins"], Float[np.ndarray, "n bins"]]:
    """Return, for each feature, how many tokens' logit effects lie in each of equal bins, and the bins' centres.

    The bins of a feature reach from its smallest to its largest effect, in logits per unit of activation. Those of an
    SAE that normalizes its input are at an input of size 1.

    Args:
        tag: the dictionary's site, such as M2.
        features: one index or several; None takes all.
        n_bins: number of bins.

    Raises:
        ValueError: as `logit_effects`.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import logit_effects
        >>> lm = TinyModel("mini")
        >>> counts, centres = logit_effects.logit_histogram(lm, "M2", [5, 17], n_bins=20)
        >>> counts.shape, counts.sum(axis=1)  # every token of the vocabulary is in one bin
        ((2, 20), array([1024, 1024]))
    """
    dictionary = lm[Site.whole(tag, "logit_histogram: ").tag].dictionary
    chosen = np.atleast_1d(resolve_indices(features, dictionary.config.n_features))
    counts, centres = np.zeros((len(chosen), n_bins), np.int64), np.zeros((len(chosen), n_bins))
    for start in range(0, len(chosen), TOGETHER):
        part = dictionary.params["W_dec"][chosen[start : start + TOGETHER]]
        effects = np.asarray(_effects(written(lm, dictionary.config.hook_out, part), lm.params["W_U"]))
        for row, of_feature in enumerate(effects, start):
            counts[row], edges = np.histogram(of_feature, n_bins)
            centres[row] = (edges[1:] + edges[:-1]) / 2
    return counts, centres


def strongest_tokens(
    lm: TinyModel, directions: Float[Any, "n d_model"], top: int = 10
) -> tuple[Int[np.ndarray, "n top"], Float[np.ndarray, "n top"], Int[np.ndarray, "n top"], Float[np.ndarray, "n top"]]:
    """Return the tokens that directions of the final residual stream promote and suppress most, and by how many logits.

    Args:
        directions: for example decoder rows, or the `final_stream` of a sweep, whose logits are mean changes.
        top: number of tokens promoted, and of tokens suppressed.

    Returns:
        Promoted tokens, their logits, suppressed tokens, their logits; strongest first.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis.search.logit_effects import strongest_tokens
        >>> lm = TinyModel("mini")
        >>> directions = lm["M3"].dictionary.params["W_dec"][:4]
        >>> promoted, logits, _, _ = strongest_tokens(lm, directions, top=3)
        >>> promoted.shape, logits.shape
        ((4, 3), (4, 3))
    """
    starts = range(0, len(directions), TOGETHER)
    parts = (_strongest(jnp.asarray(directions[i : i + TOGETHER]), lm.params["W_U"], top=top) for i in starts)
    up, promoted, down, suppressed = np.concatenate([np.zeros((4, 0, top)), *map(np.stack, parts)], axis=1)
    return promoted.astype(np.int32), up.astype(np.float32), suppressed.astype(np.int32), down.astype(np.float32)


@partial(fast_jit, static_argnames=("top",))
def _strongest(
    W_dec: Float[Array, "n d_model"], W_U: Float[Array, "d_model d_vocab"], *, top: int
) -> tuple[Array, Array, Array, Array]:
    effects = _effects(W_dec, W_U)
    up, promoted = jax.lax.top_k(effects, top)
    down, suppressed = jax.lax.top_k(-effects, top)
    return up, promoted, -down, suppressed


@fast_jit
def _effects(W_dec: Float[Array, "n d_model"], W_U: Float[Array, "d_model d_vocab"]) -> Float[Array, "n d_vocab"]:
    effects = W_dec.astype(jnp.float32) @ W_U.astype(jnp.float32)
    return effects - jnp.mean(effects, axis=-1, keepdims=True)

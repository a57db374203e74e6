"""How far a total effect holds: the smallest change of a source at which a feature switches on or off.

With the attention patterns fixed, the ReLUs of the features are the only nonlinearities. While the same features are
active, each pre-activation is a linear function of how much of a source is written:

    pre(delta) = pre + delta * slope        for a source written 1 + delta times

so the first feature that switches is known in closed form, for every architecture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinymodel_jax.analysis.circuits.freeze import frozen_pass
from tinymodel_jax.analysis.circuits.frozen import FrozenDictionary, FrozenPass, biases, encoded, exact, run_frozen
from tinymodel_jax.analysis.circuits.neurons import dictionary_at
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.runtime.compilation import fast_jit


class ValidityRadius(NamedTuple):
    """The range of delta in which a source, written 1 + delta times, has its linear total effect."""

    below: float
    """Negative: the first feature switches here when less of the source is written; -inf if none does."""
    above: float
    """Positive: the first feature switches here when more of the source is written; inf if none does."""
    switches_below: str
    """The feature that switches at `below`, such as `M2N123 @5`; empty if none does."""
    switches_above: str
    """The feature that switches at `above`; empty if none does."""


def validity_radius(
    lm: TinyModel, prompt: Any, source: np.void, *, dictionaries: str | Iterable[str] | None = None
) -> ValidityRadius:
    """Return how far the write of a source can change before a feature that is computed after it switches on or off.

        pre(delta) = pre + delta * slope        for a source written 1 + delta times

    Patterns and errors are held, features respond. Within the range, the change of any reading is delta times the
    source's total effect. Computed in float64.

    Args:
        prompt: a text, or token ids (seq,) or (1, seq), as `attribution_graph` was given it.
        source: one of `graph.nodes` that is written to the stream: a token, position, bias, feature or error.
        dictionaries: as for `frozen_pass`.

    Raises:
        ValueError: as `frozen_pass`, or the source is not written in this prompt's pass.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import circuits
        >>> lm = TinyModel("mini")
        >>> graph = circuits.attribution_graph(lm, "The dog ran", " to", max_nodes=60)
        >>> radius = circuits.validity_radius(lm, "The dog ran", graph.nodes[2])
        >>> radius.below < 0 < radius.above
        True
    """
    if not isinstance(source, np.void):
        raise ValueError(f"validity_radius: source {source!r:.80} is not a node; give one of graph.nodes.")
    frozen = frozen_pass(lm, prompt, dictionaries, "float64")
    with exact("float64"):
        written, place = _write(frozen, source)
        if not np.asarray(written).any():
            raise ValueError(
                f"validity_radius: {source['kind']} {source['site']} is not written at position {source['position']}; "
                "choose a source of this prompt's graph."
            )
        reads, slopes = ([np.asarray(x) for x in found] for found in _moved(frozen, written, place=place))
    none = [(np.inf, "")]
    moving = list(zip(frozen.dictionaries, reads, slopes, strict=True))
    above, below = (
        min(none + [_first_switch(lm, frozen, d, read, sign * change) for d, read, change in moving])
        for sign in (1, -1)
    )
    return ValidityRadius(-below[0], above[0], below[1], above[1])


def _write(frozen: FrozenPass, source: np.void) -> tuple[Array, tuple[int, str]]:
    """Return what a source writes, (s, d), and the layer and the part of it that writes."""
    kind, site, layer, position = (source[name].item() for name in ("kind", "site", "layer", "position"))
    at = (jnp.arange(len(frozen.embed)) == position)[:, None]
    if kind in ("token", "position"):
        return jnp.where(at, frozen.embed if kind == "token" else frozen.pos_embed, 0), (-1, "embed")
    if kind == "bias" and site.endswith("attn.b_O"):
        return frozen.everywhere(frozen.b_O[layer]), (layer, "b_O")
    for dictionary in frozen.of_layer(layer):
        place = layer, dictionary.part
        if (kind, site) == ("bias", f"{dictionary.tag} b_dec"):
            return biases(dictionary), place
        if (kind, site) == ("error", dictionary.tag):
            return jnp.where(at, dictionary.error, 0), place
        if (kind, site) == ("feature", dictionary.tag):
            chosen = dictionary.features[dictionary.where] == source["feature"].item()
            acts = jnp.where(chosen & dictionary.active & at, dictionary.acts, 0)
            return jnp.einsum("sn,snd->sd", acts, dictionary.W_dec[dictionary.where]), place
    raise ValueError(
        f"validity_radius: {kind} {site!r} is not written to the stream; choose a source of the graph, "
        "and give the `dictionaries` that the graph was made with."
    )


@partial(fast_jit, static_argnames=("place",))
def _moved(frozen: FrozenPass, written: Array, *, place: tuple[int, str]) -> tuple[list[Array], list[Array]]:
    """Return what each dictionary reads, and the slope of that: its change with `written` while features respond."""

    def respond(dictionary: FrozenDictionary, read: Array) -> FrozenDictionary:
        return dataclasses.replace(dictionary, acts=encoded(dictionary, read))

    def reads(delta: Array) -> list[Array]:
        return run_frozen(frozen, respond, lambda *part: delta * written if part == place else 0.0)[2]

    return jax.jvp(reads, (jnp.zeros((), written.dtype),), (jnp.ones((), written.dtype),))


def _first_switch(
    lm: TinyModel, frozen: FrozenPass, dictionary: FrozenDictionary, read: np.ndarray, change: np.ndarray
) -> tuple[float, str]:
    """Return the smallest positive delta at which a feature switches, and that feature; inf if none does."""
    length = int(frozen.length)
    margins = _margins(lm, dictionary, read[:length], change[:length])
    config = dictionary_at(lm, dictionary.tag).config
    if config.compares_features:
        groups, kept = (1, config.k or 0) if config.architecture == "topk" else (config.k or 0, 1)
        pre, slope = (array.reshape(length * groups, -1) for array in margins[0])
        at = _until_ranks_change(pre, slope, kept).reshape(length, -1)
    else:
        at = _until_sign_changes(margins)
    at[~np.asarray(dictionary.acting)[:length]] = np.inf
    position, feature = np.unravel_index(np.argmin(at), at.shape)
    first = float(at[position, feature])
    return first, f"{dictionary.tag}N{feature} @{position}" if np.isfinite(first) else ""


def _margins(
    lm: TinyModel, dictionary: FrozenDictionary, x: np.ndarray, dx: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the numbers that are positive where a feature is active (all of them), (s, features), and their slopes."""
    own = dictionary_at(lm, dictionary.tag)
    params = {name: np.asarray(array, np.float64) for name, array in own.params.items()}
    if own.config.subtract_b_dec:
        x = x - params["b_dec"]
    pre, slope = x @ params["W_enc"], dx @ params["W_enc"]
    if own.config.architecture == "gated":
        scale = np.exp(params["r_mag"])
        return [(pre + params["b_gate"], slope), (pre * scale + params["b_mag"], slope * scale)]
    return [(pre + params["b_enc"] - np.maximum(params.get("threshold", 0), 0), slope)]


def _until_sign_changes(margins: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the smallest delta > 0 at which `all margins positive` becomes true or false; inf if it never does."""
    start, end = np.zeros_like(margins[0][0]), np.full_like(margins[0][0], np.inf)
    for margin, slope in margins:  # every margin is positive from `start` to `end`
        with np.errstate(divide="ignore", invalid="ignore"):
            zero = -margin / slope
        rising = (margin <= 0) & (slope > 0)
        start = np.maximum(start, np.where(margin > 0, 0, np.where(rising, zero, np.inf)))
        end = np.minimum(end, np.where((margin > 0) & (slope < 0), zero, np.inf))
    active = start == 0
    return np.where(active, end, np.where(start < end, start, np.inf))


def _until_ranks_change(pre: np.ndarray, slope: np.ndarray, k: int) -> np.ndarray:
    """Return the smallest delta > 0 at which a feature enters or leaves the positive ones among the k largest."""
    found = np.full(pre.shape, np.inf)
    for position, (values, slopes) in enumerate(zip(pre, slope, strict=True)):
        order = np.argsort(-values, kind="stable")
        active = order[:k][values[order[:k]] > 0]
        others = np.setdiff1d(order, active)
        found[position, active] = _until_sign_changes([(values[active], slopes[active])])
        if len(active) < k:
            found[position, others] = _until_sign_changes([(values[others], slopes[others])])
        else:  # one of them has to overtake an active one
            gaps = values[active] - values[others, None], slopes[active] - slopes[others, None]
            found[position, others] = _until_sign_changes([gaps]).min(axis=1)
    return found

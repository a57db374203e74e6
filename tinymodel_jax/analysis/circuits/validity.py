"""How far a total effect holds: the smallest change of a source at which a feature switches on or off.

With the attention patterns fixed, the ReLUs of the features are the only nonlinearities. While the same features are
active, each pre-activation is a linear function of how much of a source is written:

    pre(delta) = pre + delta * slope        for a source written 1 + delta times

so the first feature that switches is known in closed form, for every architecture.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinymodel_jax.analysis.circuits.frozen import (
    FrozenDictionary,
    FrozenPass,
    attended,
    exact,
    frozen_pass,
    prediction,
)
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


def validity_radius(
    lm: TinyModel, prompt: Any, source: np.void, *, dictionaries: str | Iterable[str] | None = None
) -> ValidityRadius:
    """Return how far the write of a source can change before a feature of a later layer switches on or off.

    Patterns and errors are held, features respond. Within the range, the change of any reading is delta times the
    source's total effect. Computed in float64.

    Args:
        source: one of `graph.nodes` that is written to the stream: a token, position, bias, feature or error.
        dictionaries: as for `frozen_pass`.

    Raises:
        ValueError: as `frozen_pass`, or the source is not written in this prompt's pass.
    """
    frozen = frozen_pass(lm, prompt, dictionaries, "float64")
    with exact("float64"):
        written, place = _write(frozen, source)
        if not np.asarray(written).any():
            raise ValueError(
                f"validity_radius: {source['kind']} {source['site']} is not written at position {source['position']}; "
                "choose a source of this prompt's graph."
            )
        reads = [tuple(map(np.asarray, read)) for read in _moved(frozen, written, place=place)]
    none = [(np.inf, "")]
    moving = list(zip(frozen.dictionaries, reads, strict=True))
    above, below = (
        min(none + [_first_switch(lm, frozen, d, read, sign * change) for d, (read, change) in moving])
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
            return frozen.everywhere(dictionary.b_dec), place
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
def _moved(frozen: FrozenPass, written: Array, *, place: tuple[int, str]) -> list[tuple[Array, Array]]:
    """Return what each dictionary reads, and the change of that with `written`, while the same features are active."""

    def added(layer: int, part: str) -> Array:
        return written if place == (layer, part) else jnp.zeros_like(written)

    reads = []
    stream, moved = frozen.embed + frozen.pos_embed, added(-1, "embed")
    for layer in range(frozen.config.n_layers):
        value = attended(frozen, layer, stream) + frozen.everywhere(frozen.b_O[layer])
        change = attended(frozen, layer, moved) + added(layer, "b_O")
        sae, transcoder = frozen.at("attn", layer), frozen.at("mlp", layer)
        assert transcoder is not None
        if sae is not None:
            reads.append((value, change))
            value, change = _responded(frozen, sae, value, change)
        stream, moved = stream + value, moved + change + added(layer, "attn")
        reads.append((stream, moved))
        value, change = _responded(frozen, transcoder, stream, moved)
        stream, moved = stream + value, moved + change + added(layer, "mlp")
    return reads


def _responded(frozen: FrozenPass, dictionary: FrozenDictionary, read: Array, change: Array) -> tuple[Array, Array]:
    """Return the value that a dictionary leaves in the model, and its change when what it reads changes."""
    of_acts = jnp.einsum("sd,snd->sn", change, dictionary.W_enc[dictionary.where])
    of_acts = jnp.where(dictionary.active, of_acts, 0)
    moved = jnp.einsum("sn,snd->sd", of_acts, dictionary.W_dec[dictionary.where])
    if dictionary.W_skip is not None:
        moved = moved + change @ dictionary.W_skip
    return prediction(frozen, dictionary, read) + dictionary.error, moved


def _first_switch(
    lm: TinyModel, frozen: FrozenPass, dictionary: FrozenDictionary, read: np.ndarray, change: np.ndarray
) -> tuple[float, str]:
    """Return the smallest positive delta at which a feature switches, and that feature; inf if none does."""
    length = int(frozen.length)
    margins = _margins(lm, dictionary, read[:length], change[:length])
    if len(margins) == 1 and _takes_top_k(lm, dictionary):
        at = _until_ranks_change(*margins[0], lm[dictionary.tag].dictionary.config.k or 0)
    else:
        at = _until_sign_changes(margins)
    if not dictionary.neurons:
        acts = lm[dictionary.tag].dictionary.config.acts_at(np.asarray(frozen.tok_ids)[None, :length])
        at[~np.asarray(acts)[0]] = np.inf  # where the dictionary does not act
    position, feature = np.unravel_index(np.argmin(at), at.shape)
    first = float(at[position, feature])
    return first, f"{dictionary.tag}N{feature} @{position}" if np.isfinite(first) else ""


def _takes_top_k(lm: TinyModel, dictionary: FrozenDictionary) -> bool:
    return not dictionary.neurons and lm[dictionary.tag].dictionary.config.architecture == "topk"


def _margins(
    lm: TinyModel, dictionary: FrozenDictionary, x: np.ndarray, dx: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the numbers that are positive where a feature is active (all of them), (s, features), and their slopes."""
    if dictionary.neurons:
        mlp = lm.params[f"blocks_{dictionary.layer}"]["mlp"]
        params = {name: np.asarray(array, np.float64) for name, array in mlp.items()}
        threshold = np.maximum(params.get("threshold", 0), 0)
        return [(x @ params["W_in"] + params["b_in"] - threshold, dx @ params["W_in"])]
    own = lm[dictionary.tag].dictionary
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

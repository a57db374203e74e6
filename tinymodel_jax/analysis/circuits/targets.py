"""Targets of an attribution graph: logits, a logit difference, a feature, or a direction at a hook point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from tinymodel_jax.analysis.circuits.freeze import linear_parts
from tinymodel_jax.analysis.circuits.frozen import FrozenPass
from tinymodel_jax.analysis.circuits.graph import AttributionGraph, texts_of
from tinymodel_jax.analysis.circuits.sources import Place, encoder_place
from tinymodel_jax.analysis.effects.metrics import LogitDifference
from tinymodel_jax.block_order import block_and_hook, final_stream
from tinymodel_jax.dictionaries.dictionary import resolve_indices
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.lm.text import token_ids
from tinymodel_jax.model.hook_points import hook_width, require_hook_names

MOST_LIKELY = 0.95
"""The default targets are the most likely next tokens, up to this probability in all."""
MOST_TARGETS = 10
"""The default targets are at most this many."""
_PLACES = {
    "hook_resid_pre": "before_attn",
    "hook_attn_in": "before_attn",
    "attn.hook_q": "before_attn",
    "attn.hook_k": "before_attn",
    "attn.hook_v": "before_attn",
    "attn.hook_z": "heads",
    "hook_attn_out": "attn",
    "hook_resid_mid": "before_mlp",
    "hook_mlp_in": "before_mlp",
    "mlp.hook_pre": "before_mlp",
    "hook_mlp_out": "mlp",
    "hook_resid_post": "before_attn",
}
"""Hook points whose value is a linear function of the stream, and where that is read."""


@dataclass(frozen=True, eq=False)
class DirectionTarget:
    """A direction at a hook point, made by `direction`."""

    hook: str
    """Full name of the hook point."""
    vector: Any
    """Coefficients, (d,), or (n_heads, d_head) at the hook points of heads."""
    position: int
    """Position in the prompt; negative ones count from the end."""


@dataclass(frozen=True)
class FeatureTarget:
    """A feature's pre-activation, made by `feature`."""

    tag: str
    """Tag of the feature, such as "M2N123"."""
    position: int
    """Position in the prompt; negative ones count from the end."""


def direction(hook: str, vector: Any, position: int = -1) -> DirectionTarget:
    """Return the target `vector · value at a hook point`, at a position (negative ones count from the end).

    Args:
        hook: full name of a hook point whose value is linear in the residual stream, such as
            `blocks.2.hook_resid_pre`.
        vector: (d,), or (n_heads, d_head) at the hook points of heads.
        position: position in the prompt.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import circuits
        >>> lm = TinyModel("mini")
        >>> target = circuits.direction("blocks.3.hook_resid_post", lm.W_U[:, 5])
        >>> graph = circuits.attribution_graph(lm, "The dog ran", target, max_nodes=50)
        >>> len(graph.tokens)
        4
    """
    return DirectionTarget(hook, vector, position)


def feature(tag: str, position: int = -1) -> FeatureTarget:
    """Return the target that is the pre-activation of a feature, at a position (negative ones count from the end).

    Args:
        tag: tag of the feature, such as "M2N123".
        position: position in the prompt.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import circuits
        >>> lm = TinyModel("mini")
        >>> target = circuits.feature("M2N304", position=2)
        >>> graph = circuits.attribution_graph(lm, "The dog ran", target, max_nodes=50)
        >>> [label for label in graph.labels if label.startswith("M2N304")]
        ['M2N304 @2']
    """
    return FeatureTarget(tag, position)


class Target(NamedTuple):
    """One number that a graph explains: the product of a direction with what is read at a place, plus a bias."""

    kind: str
    """"logit", "feature" or "direction"."""
    site: str
    layer: int
    position: int
    feature: int
    """Feature, or id of the token."""
    place: Place
    direction: Float[np.ndarray, " width"]
    bias: float
    weight: float
    """Share of the graph's influence that starts here."""
    name: str = ""
    """The tokens of a logit or of a difference; empty for others, whose label says all."""


def resolve(lm: TinyModel, frozen: FrozenPass, targets: Any) -> list[Target]:
    """Return the targets that a user named.

    Args:
        targets: None for the most likely next tokens, or one of these, or a list of them: a token's id, a text of one
            token such as " Lily", a `logit_difference`, a `feature` or a `direction`.

    Raises:
        ValueError: a target does not exist in this model or prompt.
    """
    if targets is None:
        return _most_likely(lm, frozen)
    given = targets if isinstance(targets, list | tuple) else [targets]
    if not given:
        raise ValueError("attribution_graph: targets is empty; name at least one, or None for the most likely tokens.")
    found = [_resolved(lm, frozen, target) for target in given]
    return [target._replace(weight=1 / len(found)) for target in found]


def _most_likely(lm: TinyModel, frozen: FrozenPass) -> list[Target]:
    last = np.asarray(frozen.final)[int(frozen.length) - 1]
    logits = last @ np.asarray(lm.params["W_U"], last.dtype) + np.asarray(lm.params["b_U"], last.dtype)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")[:MOST_TARGETS]
    chosen = order[: int(np.searchsorted(p[order].cumsum(), MOST_LIKELY)) + 1]
    return [_logit(lm, frozen, int(i))._replace(weight=float(p[i] / p[chosen].sum())) for i in chosen]


def _resolved(lm: TinyModel, frozen: FrozenPass, target: Any) -> Target:
    if isinstance(target, FeatureTarget):
        return _feature(lm, frozen, target)
    if isinstance(target, DirectionTarget):
        return _direction(lm, frozen, target)
    if isinstance(target, LogitDifference):
        return _difference(lm, frozen, target)
    if isinstance(target, str) and _names_feature(target):
        raise ValueError(
            f"attribution_graph: {target!r} names a feature; as a target, give circuits.feature({target!r}, position)."
        )
    if isinstance(target, str | int | np.integer):
        return _logit(lm, frozen, int(token_ids(lm, target)[0]))
    raise ValueError(
        f"attribution_graph: target {target!r:.80} is a {type(target).__name__}; expected a token's id or text, "
        "logit_difference(a, b), circuits.feature(tag, position) or circuits.direction(hook, vector, position)."
    )


def _names_feature(text: str) -> bool:
    try:
        return Site.parse(text)[1] is not None
    except ValueError:
        return False


def _logit(lm: TinyModel, frozen: FrozenPass, token: int) -> Target:
    W_U, b_U = np.asarray(lm.params["W_U"][:, token], np.float64), float(lm.params["b_U"][token])
    layers = lm.config.n_layers
    name = f"logit {texts_of(lm, [token])[0]!r}"
    last, place = int(frozen.length) - 1, Place(layers, "before_attn")
    return Target("logit", "logits", layers, last, token, place, W_U, b_U, 1.0, name)


def _difference(lm: TinyModel, frozen: FrozenPass, target: LogitDifference) -> Target:
    a, b = token_ids(lm, target.a), token_ids(lm, target.b)
    if len(a) > 1 or len(b) > 1:
        raise ValueError(f"attribution_graph: {target} has several tokens on a side; a graph is of one row: give one.")
    if a[0] == b[0]:
        raise ValueError(f"attribution_graph: {target} names one token twice, so the difference is 0; name two tokens.")
    one, other = _logit(lm, frozen, int(a[0])), _logit(lm, frozen, int(b[0]))
    site = final_stream(lm.config.n_layers)
    difference = {"direction": one.direction - other.direction, "bias": one.bias - other.bias}
    return one._replace(kind="direction", site=site, feature=-1, name=f"{one.name} - {other.name}", **difference)


def _feature(lm: TinyModel, frozen: FrozenPass, target: FeatureTarget) -> Target:
    site, number = Site.parse(target.tag)
    dictionary = next((d for d in frozen.dictionaries if d.tag == site.tag), None)
    if number is None or dictionary is None:
        raise ValueError(
            f"attribution_graph: {target.tag!r} is not a feature of this graph's dictionaries "
            f"({', '.join(d.tag for d in frozen.dictionaries)}); name one of their features. A neuron is the direction "
            "circuits.direction('blocks.L.mlp.hook_pre', one_hot)."
        )
    own = lm[site.tag].dictionary
    W_enc, b_enc, *_ = linear_parts(own, resolve_indices([number], own.config.n_features))
    position = resolve_position(frozen, target.position)
    place = encoder_place(dictionary)
    return Target("feature", site.tag, site.layer, position, number, place, W_enc[0], float(b_enc[0]), 1.0)


def _direction(lm: TinyModel, frozen: FrozenPass, target: DirectionTarget) -> Target:
    require_hook_names([target.hook], lm.config)
    layer, hook = block_and_hook(target.hook) if target.hook.startswith("blocks.") else (-1, target.hook)
    if hook not in _PLACES:
        raise ValueError(
            f"attribution_graph: a direction cannot be at {target.hook}; the hook points of a block that are linear "
            f"functions of the residual stream are: {', '.join(_PLACES)}."
        )
    if hook == "hook_attn_out" and f"A{layer}" in lm.spliced:
        raise ValueError(
            f"attribution_graph: the model has the prediction of the spliced A{layer} at {target.hook}; give the "
            f"direction at blocks.{layer}.hook_resid_mid, or name features of A{layer}."
        )
    vector = np.asarray(target.vector, np.float64)
    heads = hook.startswith("attn.")
    shape = (lm.config.n_heads, lm.config.d_head) if heads else (hook_width(target.hook, lm.config),)
    if vector.shape != shape:
        raise ValueError(f"attribution_graph: the direction at {target.hook} has shape {vector.shape}; give {shape}.")
    if not np.isfinite(vector).all() or not vector.any():
        raise ValueError(f"attribution_graph: the direction at {target.hook} is 0 or not finite; give another vector.")
    block, bias = lm.params[f"blocks_{layer}"], 0.0
    if hook in ("attn.hook_q", "attn.hook_k", "attn.hook_v"):
        W = np.asarray(block["attn"][f"W_{hook[-1].upper()}"], np.float64)
        vector = np.einsum("hdk,hk->d", W, vector)
    elif hook == "mlp.hook_pre":
        bias = float(np.asarray(block["mlp"]["b_in"], np.float64) @ vector)
        vector = np.asarray(block["mlp"]["W_in"], np.float64) @ vector
    place = Place(layer + 1 if hook == "hook_resid_post" else layer, _PLACES[hook])
    position = resolve_position(frozen, target.position)
    return Target("direction", target.hook, layer, position, -1, place, vector.ravel(), bias, 1.0)


def target_names(lm: TinyModel, graph: AttributionGraph, targets: Any = None) -> list[str]:
    """Return a name for each target of a graph: a token's text, both tokens of a difference, or the node's label.

    Args:
        targets: what `attribution_graph` was given.

    Raises:
        ValueError: the graph has another number of targets.
    """
    numbers = np.flatnonzero(graph.weights > 0).tolist()
    one = targets is not None and not isinstance(targets, list | tuple)
    given = [None] * len(numbers) if targets is None else [targets] if one else list(targets)
    if len(given) != len(numbers):
        raise ValueError(f"the graph has {len(numbers)} targets; got {len(given)}. Give those it was made with.")
    return [_name(lm, graph, number, target) for number, target in zip(numbers, given, strict=True)]


def _name(lm: TinyModel, graph: AttributionGraph, number: int, target: Any) -> str:
    if isinstance(target, LogitDifference):
        one, other = texts_of(lm, [int(token_ids(lm, side)[0]) for side in (target.a, target.b)])
        return f"“{one}” − “{other}”"
    node = graph.nodes[number]
    return texts_of(lm, [int(node["feature"])])[0] if node["kind"] == "logit" else graph.labels[number]


def resolve_position(frozen: FrozenPass, position: int, asker: str = "attribution_graph: position") -> int:
    """Return a position counted from the start.

    Raises:
        ValueError: it is outside the prompt.
    """
    length = int(frozen.length)
    if position not in range(-length, length):
        raise ValueError(f"{asker} {position!r} is outside the prompt; it has 0..{length - 1}.")
    return position % length

"""Edits of the forward pass: steer, patch, scale, splice dictionaries in, ablate and clamp their features.

Each function returns hooks (hook name -> edit) for `run_with_hooks`; `combine` merges several. An edit is a pytree of
arrays that is called with `(value, acts)`. N edits stacked with `vmap` are N interventions in one compiled call, and
gradients flow through an edit's arrays. `lm["M2"]` is accepted as a dictionary. Only this module and `edits.py` know
both the transformer and dictionaries.

An edit of features acts on the value that a splice of the dictionary reads: the value before the first splice of an
SAE at that hook point. It changes the activations that earlier edits left, and adds its change after all splices there.
In a model that is spliced with a dictionary, edits therefore change the activations that the splice decodes.

An edit of a crosscoder's or cross-layer transcoder's features acts at every hook point that they write to. A crosscoder
reads hook points that come later than those it writes, so its activations are those of a first pass, which has all
other edits. Where its features change, the value becomes that of the first pass plus the change.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from tinymodel_jax.dictionaries.dictionary import Dictionary, resolve_indices
from tinymodel_jax.dictionaries.readers import Reader, dictionary_of
from tinymodel_jax.dictionaries.sites import require_site
from tinymodel_jax.model.edit_arrays import boolean_mask
from tinymodel_jax.model.edits import Add, Chain, EditFeatures, Replace, Scale, Splice
from tinymodel_jax.model.hook_points import Hook, Hooks, is_scores, position_axes, require_edits
from tinymodel_jax.model.padding import is_traced


def steer(hook_name: str, vector: Any, positions: Any = None) -> Hooks:
    """Add `vector` (…, width) to the value at a hook point.

    Args:
        hook_name: one of `hook_names`, such as `blocks.1.hook_mlp_out`.
        positions: a boolean mask of shape (seq,) or (batch, seq) of where to edit; None is all positions. At attention
            scores and patterns, it selects query positions.

    Raises:
        ValueError: during the pass, if the vector does not broadcast to the value, or `positions` is not a mask that
            fits it.

    Examples:
        >>> from tinymodel_jax import TinyModel, interventions
        >>> lm = TinyModel("mini")
        >>> hooks = interventions.steer("blocks.1.hook_mlp_out", 3 * lm["M1"].dictionary.params["W_dec"][304])
        >>> lm("The dog").shape == lm.run_with_hooks("The dog", hooks)[0].shape
        True
        >>> list(hooks)
        ['blocks.1.hook_mlp_out']
    """
    return {hook_name: Add(vector, _mask_at(hook_name, positions))}


def patch(hook_name: str, value: Any, positions: Any = None) -> Hooks:
    """Replace the value at a hook point, for example by that of another prompt (activation patching).

    Args:
        hook_name: one of `hook_names`.
        value: numbers that broadcast to the value, (batch, seq, …).
        positions: as for `steer`.

    Raises:
        ValueError: as `steer`.

    Examples:
        >>> from tinymodel_jax import TinyModel, interventions
        >>> lm = TinyModel("mini")
        >>> _, clean = lm.run_with_cache("The dog ran", "blocks.1.hook_mlp_out")
        >>> hooks = interventions.patch("blocks.1.hook_mlp_out", clean["blocks.1.hook_mlp_out"])
        >>> _, kept = lm.run_with_hooks("The cat ran", hooks, keep="blocks.1.hook_mlp_out")
        >>> bool((kept["blocks.1.hook_mlp_out"] == clean["blocks.1.hook_mlp_out"]).all())
        True
    """
    return {hook_name: Replace(value, _mask_at(hook_name, positions))}


def scale(hook_name: str, factor: Any, positions: Any = None) -> Hooks:
    """Multiply the value at a hook point. 0 ablates it; a (n_heads, 1) factor at `attn.hook_z` scales heads.

    Args:
        hook_name: one of `hook_names`.
        factor: a number, or numbers that broadcast to the value.
        positions: as for `steer`.

    Raises:
        ValueError: as `steer`.

    Examples:
        >>> from tinymodel_jax import TinyModel, interventions
        >>> lm = TinyModel("mini")
        >>> hooks = interventions.scale("blocks.1.hook_mlp_out", 0.0)
        >>> _, kept = lm.run_with_hooks("The dog ran", hooks, keep="blocks.1.hook_mlp_out")
        >>> float(abs(kept["blocks.1.hook_mlp_out"]).max())
        0.0
    """
    return {hook_name: Scale(factor, _mask_at(hook_name, positions))}


def ablate(dictionary: Dictionary | Reader, features: Any, positions: Any = None) -> Hooks:
    """Set features of a dictionary to zero. Its error and all other features remain.

    Args:
        dictionary: a `Dictionary`, or `lm["M2"]`.
        features: one index or several; slice(None) is all features.
        positions: as for `steer`.

    Raises:
        ValueError: features are missing, named twice or out of range; or, during the pass, an array does not broadcast
            to the value.

    Examples:
        >>> from tinymodel_jax import TinyModel, interventions
        >>> lm = TinyModel("mini")
        >>> hooks = interventions.ablate(lm["M2"], slice(None))
        >>> logprobs, _ = lm.run_with_hooks("The dog ran", hooks)
        >>> bool((logprobs != lm("The dog ran")).any())
        True
    """
    return scale_features(dictionary, features, 0.0, positions)


def scale_features(dictionary: Dictionary | Reader, features: Any, factor: Any, positions: Any = None) -> Hooks:
    """Multiply the activations of features by a factor.

    Args:
        dictionary: a `Dictionary`, or `lm["M2"]`.
        features: one index or several; slice(None) is all features.
        factor: a number, or numbers that broadcast to (batch, seq, features).
        positions: as for `steer`.

    Raises:
        ValueError: as `ablate`.

    Examples:
        >>> from tinymodel_jax import TinyModel, interventions
        >>> lm = TinyModel("mini")
        >>> hooks = interventions.scale_features(lm["M2"], slice(None), 2.0)
        >>> logprobs, _ = lm.run_with_hooks("The dog ran", hooks)
        >>> bool((logprobs != lm("The dog ran")).any())
        True
    """
    return _edit_features(dictionary, features, factor, positions, "scale")


def clamp(dictionary: Dictionary | Reader, features: Any, value: Any, positions: Any = None) -> Hooks:
    """Set the activations of features to a value, including where they are inactive.

    Args:
        dictionary: a `Dictionary`, or `lm["M2"]`.
        features: one index or several; slice(None) is all features.
        value: new activation: a number, or numbers that broadcast to (batch, seq, features).
        positions: as for `steer`.

    Raises:
        ValueError: as `ablate`.

    Examples:
        >>> from tinymodel_jax import TinyModel, interventions
        >>> lm = TinyModel("mini")
        >>> hooks = interventions.clamp(lm["M2"], 304, 5.0)
        >>> logprobs, _ = lm.run_with_hooks("The dog ran", hooks)
        >>> bool((logprobs != lm("The dog ran")).any())
        True
    """
    return _edit_features(dictionary, features, value, positions, "set")


def steer_features(dictionary: Dictionary | Reader, features: Any, strength: Any, positions: Any = None) -> Hooks:
    """Add `strength x decoder direction` of features, as if their activations were higher by `strength`.

    Nothing is added at tokens that the dictionary excludes; `steer` adds a vector at every token.

    Args:
        dictionary: a `Dictionary`, or `lm["M2"]`.
        features: one index or several; slice(None) is all features.
        strength: change of the activation: a number, or numbers that broadcast to (batch, seq, features).
        positions: as for `steer`.

    Raises:
        ValueError: as `ablate`.

    Examples:
        >>> from tinymodel_jax import TinyModel, interventions
        >>> lm = TinyModel("mini")
        >>> hooks = interventions.steer_features(lm["M2"], 304, 2.0)
        >>> logprobs, _ = lm.run_with_hooks("The dog ran", hooks)
        >>> bool((logprobs != lm("The dog ran")).any())
        True
    """
    return _edit_features(dictionary, features, strength, positions, "add")


def splice(
    dictionaries: Dictionary | Reader | Iterable[Dictionary | Reader],
    include_error: bool = False,
    detach_error: bool = True,
    detach_pred: bool = False,
    exclude: int | Iterable[int] | None = None,
) -> Hooks:
    """Run the model through dictionaries. Those that replace the same value act in the given order.

    Args:
        dictionaries: one or several `Dictionary` or `lm[tag]`.
        include_error: add the reconstruction error back: values remain, and gradients flow through the dictionary.
        detach_error: stop the gradient through the error.
        detach_pred: stop the gradient through the prediction.
        exclude: token ids at whose positions the value stays; None takes those that the dictionary was trained without.

    Raises:
        ValueError: `exclude` is not made of ids, or as `ablate`.

    Examples:
        >>> from tinymodel_jax import TinyModel, interventions
        >>> lm = TinyModel("mini")
        >>> hooks = interventions.splice(lm["M2"])
        >>> logprobs, _ = lm.run_with_hooks("The dog ran", hooks)
        >>> bool(abs(logprobs - lm.splice("M2")("The dog ran")).max() < 1e-3)
        True
    """
    switches = {"include_error": include_error, "detach_error": detach_error, "detach_pred": detach_pred}
    given = [dictionaries] if isinstance(dictionaries, Dictionary | Reader | str) else dictionaries
    found = [_at_hook_points(one) for one in given]
    excluded = {} if exclude is None else {"exclude": _ids(exclude)}
    configs = [dataclasses.replace(d.config, **excluded) for d in found]
    pairs = zip(found, configs, strict=True)
    return combine(*(at_hook_points(Splice(d.params, config=config, **switches)) for d, config in pairs))


def at_hook_points(edit: Splice | EditFeatures) -> Hooks:
    """Return the hooks of a dictionary's edit: one for each hook point that the dictionary predicts.

    Examples:
        >>> from tinymodel_jax import TinyModel, interventions
        >>> from tinymodel_jax.model.edits import Splice
        >>> dictionary = TinyModel("mini")["M2"].dictionary
        >>> list(interventions.at_hook_points(Splice(dictionary.params, config=dictionary.config)))
        ['blocks.2.hook_mlp_out']
    """
    return {name: dataclasses.replace(edit, part=part) for part, name in enumerate(edit.config.hooks_out)}


def combine(*hooks: Mapping[str, Hook]) -> Hooks:
    """Merge hooks. Edits of one hook point act in order.

    Edits and splices of one dictionary act on the same activations only if they contain the same array objects. Combine
    them before `jit`, which turns an array that is passed twice into two.

    Args:
        hooks: hooks that the functions here return, or your own {hook name: edit}.

    Examples:
        >>> from tinymodel_jax import TinyModel, interventions
        >>> lm = TinyModel("mini")
        >>> splice, double = interventions.splice(lm["M1"]), interventions.scale("blocks.1.hook_mlp_out", 2.0)
        >>> hooks = interventions.combine(splice, double)
        >>> list(hooks), len(hooks["blocks.1.hook_mlp_out"].edits)
        (['blocks.1.hook_mlp_out'], 2)
    """
    merged: dict[str, list[Hook]] = {}
    for group in hooks:
        require_edits(group)
        for name, edit in group.items():
            merged.setdefault(name, []).append(edit)
    return {name: edits[0] if len(edits) == 1 else _chain(edits, is_scores(name)) for name, edits in merged.items()}


def _chain(edits: list[Hook], of_scores: bool) -> Chain:
    """Return one chain of the edits, in which nested chains are flattened."""
    flat: list[tuple[Hook, Any]] = []
    for edit in edits:
        inner = edit if isinstance(edit, Chain) else Chain((edit,))
        flat += [(e, (id(edit), r)) for e, r in zip(inner.edits, inner.readers or range(len(inner.edits)), strict=True)]
    flat.sort(key=lambda pair: bool(getattr(pair[0], "reads_ahead", ())))  # they build on the others' values
    readers: list[int] = []
    for edit, mark in flat:
        same = (r for r, (other, m) in zip(readers, flat, strict=False) if m == mark or _same_dictionary(other, edit))
        readers.append(next(same, len(readers)))
    return Chain(tuple(edit for edit, _ in flat), readers=tuple(readers), of_scores=of_scores)


def _same_dictionary(one: Hook, other: Hook) -> bool:
    """Return whether both edits contain the same array objects of one dictionary."""
    if not (isinstance(one, Splice | EditFeatures) and isinstance(other, Splice | EditFeatures)):
        return False
    leaves = zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=False)
    configs = (dataclasses.replace(edit.config, exclude=()) for edit in (one, other))
    return operator.eq(*configs) and all(a is b for a, b in leaves)


def _edit_features(
    given: Dictionary | Reader, features: Any, amount: Any, positions: Any, change: Literal["set", "scale", "add"]
) -> Hooks:
    dictionary = _at_hook_points(given)
    config = dictionary.config
    indices = resolve_indices(features, config.n_features)
    if indices is None:
        raise ValueError("features is None; name one feature or more, or slice(None) for all.")
    if not is_traced(indices) and len(np.unique(indices)) < np.size(indices):
        raise ValueError("features: one is named twice, and would be edited twice; name each once.")
    _refuse_words(positions)
    return at_hook_points(EditFeatures(dictionary.params, indices, amount, positions, config=config, change=change))


def _at_hook_points(given: Dictionary | Reader) -> Dictionary:
    """Return the dictionary after checking that its hook points are those of a model."""
    dictionary = dictionary_of(given)
    require_site(dictionary.config.hook_in, dictionary.config.hook_out)
    return dictionary


def _refuse_words(positions: Any) -> None:
    """Refuse the values that `positions` of `lm.generate` takes, before a pass does."""
    if isinstance(positions, str):
        raise ValueError(
            f"positions={positions!r}: an edit takes a boolean mask of shape (seq,) or (batch, seq); "
            f"lm.generate(…, hooks=…, positions={positions!r}) takes 'all', 'prompt' or 'generated'."
        )


def _ids(exclude: Any) -> tuple[int, ...]:
    exclude = exclude.tolist() if hasattr(exclude, "tolist") else exclude
    given: list[Any] = list(exclude) if isinstance(exclude, Iterable) and not isinstance(exclude, str) else [exclude]
    names = [one for one in given if isinstance(one, str)]
    if names:
        raise ValueError(
            f"splice: exclude={names[0]!r} is the name of a token, whose id only a model knows; give ids, such as "
            "exclude=lm.config.begin_id, or call lm.splice, which takes names."
        )
    return tuple(one.tolist() if hasattr(one, "tolist") else one for one in given)


def _mask_at(hook_name: str, positions: Any) -> Any:
    """Add a head axis to the mask if the value has heads before positions."""
    _refuse_words(positions)
    if positions is None or position_axes(hook_name) == (1,):
        return positions
    mask = boolean_mask(positions)
    return (mask[None] if mask.ndim < 2 else mask)[:, None]

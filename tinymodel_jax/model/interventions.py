"""Edits of the forward pass: steer, patch, scale, splice dictionaries in, ablate and clamp their features.

Each function returns hooks (hook name -> edit) for `run_with_hooks`; `combine` merges several. An edit is a pytree of
arrays that is called with `(value, acts)`: N edits stacked under `vmap` are N interventions in one compiled call, and
gradients flow through an edit's arrays. The transformer and the dictionaries meet only here.

Edits of features act on what the dictionary's splice reads: the value before the first splice of an SAE at that hook
point. Each changes the activations that the edits before it left, and adds its change after all splices there. So in a
model that is spliced with a dictionary, edits change what the splice decodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinymodel_jax.dictionaries.dictionary import Dictionary, resolve_indices
from tinymodel_jax.dictionaries.sites import require_site
from tinymodel_jax.model.edits import Add, Chain, EditFeatures, Replace, Scale, Splice, boolean_mask
from tinymodel_jax.model.hook_points import Hook, Hooks, is_scores, position_axes, require_edits
from tinymodel_jax.model.padding import is_traced


def steer(hook_name: str, vector: Any, positions: Any = None) -> Hooks:
    """Add `vector` (…, width) to the value at a hook point, at all positions or where the mask is true.

    Args:
        positions: here and below, a boolean mask of shape (seq,) or (batch, seq); of the query at scores and pattern.

    Raises:
        ValueError: when it runs: the vector does not broadcast to the value, or `positions` is no such mask.
    """
    return {hook_name: Add(vector, _mask_at(hook_name, positions))}


def patch(hook_name: str, value: Any, positions: Any = None) -> Hooks:
    """Replace the value at a hook point, such as by the same value from another prompt (activation patching)."""
    return {hook_name: Replace(value, _mask_at(hook_name, positions))}


def scale(hook_name: str, factor: Any, positions: Any = None) -> Hooks:
    """Multiply the value at a hook point; 0 ablates it, a (n_heads, 1) factor at `attn.hook_z` ablates heads."""
    return {hook_name: Scale(factor, _mask_at(hook_name, positions))}


def ablate(dictionary: Dictionary, features: Any, positions: Any = None) -> Hooks:
    """Set features of a dictionary to zero, leaving its error and all other features as they are."""
    return scale_features(dictionary, features, 0.0, positions)


def scale_features(dictionary: Dictionary, features: Any, factor: Any, positions: Any = None) -> Hooks:
    """Multiply the activations of features by a factor."""
    return _edit_features(dictionary, features, factor, positions, scale=True)


def clamp(dictionary: Dictionary, features: Any, value: Any, positions: Any = None) -> Hooks:
    """Set the activations of features to a value, whatever the input."""
    return _edit_features(dictionary, features, value, positions, scale=False)


def splice(
    dictionaries: Dictionary | Iterable[Dictionary],
    include_error: bool = False,
    detach_error: bool = True,
    detach_pred: bool = False,
) -> Hooks:
    """Run the model through dictionaries; those that replace the same value act in the given order."""
    switches = {"include_error": include_error, "detach_error": detach_error, "detach_pred": detach_pred}
    given = [dictionaries] if isinstance(dictionaries, Dictionary | str) else dictionaries
    dictionaries = [_require_dictionary(dictionary) for dictionary in given]
    edits = ({d.config.hook_out: Splice(d.params, config=d.config, **switches)} for d in dictionaries)
    return combine(*edits)


def combine(*hooks: Mapping[str, Hook]) -> Hooks:
    """Merge hooks; several edits of one hook point act one after the other.

    Edits and splices of one dictionary act on the same activations, as long as they hold the very same arrays: combine
    them before `jit`, which makes two of what is passed twice.
    """
    merged: dict[str, list[Hook]] = {}
    for group in hooks:
        require_edits(group)
        for name, edit in group.items():
            merged.setdefault(name, []).append(edit)
    return {name: edits[0] if len(edits) == 1 else _chain(edits, is_scores(name)) for name, edits in merged.items()}


def _chain(edits: list[Hook], of_scores: bool) -> Chain:
    """Return one chain of the edits, and of those in the chains among them."""
    flat: list[tuple[Hook, Any]] = []
    for edit in edits:
        inner = edit if isinstance(edit, Chain) else Chain((edit,))
        flat += [(e, (id(edit), r)) for e, r in zip(inner.edits, inner.readers or range(len(inner.edits)), strict=True)]
    readers: list[int] = []
    for edit, mark in flat:
        same = (r for r, (other, m) in zip(readers, flat, strict=False) if m == mark or _same_dictionary(other, edit))
        readers.append(next(same, len(readers)))
    return Chain(tuple(edit for edit, _ in flat), readers=tuple(readers), of_scores=of_scores)


def _same_dictionary(one: Hook, other: Hook) -> bool:
    """Whether both edits hold the same arrays of one dictionary."""
    if not (isinstance(one, Splice | EditFeatures) and isinstance(other, Splice | EditFeatures)):
        return False
    leaves = zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=False)
    return one.config == other.config and all(a is b for a, b in leaves)


def _edit_features(dictionary: Dictionary, features: Any, amount: Any, positions: Any, *, scale: bool) -> Hooks:
    config = _require_dictionary(dictionary).config
    indices = resolve_indices(features, config.n_features)
    if indices is None:
        raise ValueError("features is None; name one feature or more, or slice(None) for all.")
    if not is_traced(indices) and len(np.unique(indices)) < np.size(indices):
        raise ValueError("features: one is named twice, and would be edited twice; name each once.")
    edit = EditFeatures(dictionary.params, indices, amount, positions, config=config, scale=scale)
    return {config.hook_out: edit}


def _require_dictionary(dictionary: Any) -> Dictionary:
    if not isinstance(dictionary, Dictionary):
        raise ValueError(
            f"expected a Dictionary, got {dictionary!r:.80}; lm['M1'].dictionary is the one of a model at M1, and "
            "Dictionary.from_pretrained(path) loads one."
        )
    require_site(dictionary.config.hook_in, dictionary.config.hook_out)
    return dictionary


def _mask_at(hook_name: str, positions: Any) -> Any:
    """Give the mask a head axis where heads come before positions."""
    heads_first = position_axes(hook_name) != (1,)
    return jnp.atleast_2d(boolean_mask(positions))[:, None] if heads_first and positions is not None else positions

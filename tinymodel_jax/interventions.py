"""Edits of the forward pass: steer, patch, scale, splice dictionaries in, ablate and clamp their features.

Each function returns hooks (hook name -> edit) for `run_with_hooks`; `combine` merges several. An edit is a pytree of
arrays that is called with `(value, acts)`: N edits stacked under `vmap` are N interventions in one compiled call, and
gradients flow through an edit's arrays. The transformer and the dictionaries meet only here.

A dictionary reads a value once in a pass: before any splice of an SAE at that hook point. Splices and edits of the same
dictionary share that reading, in whatever order they are combined, and each edit changes the activations that the
edits before it left. So in a model that is spliced with a dictionary, edits change exactly what the splice decodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array

from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionary import (
    Dictionary,
    encode,
    reconstruct,
    resolve_indices,
)
from tinymodel_jax.hook_points import Hook, position_axes
from tinymodel_jax.padding import is_traced
from tinymodel_jax.sites import require_site

Hooks = dict[str, Hook]
Acts = Mapping[str, Array]


@struct.dataclass
class Add:
    """Add a vector (broadcast to the value) at the positions."""

    vector: Any
    positions: Any = None

    def __call__(self, value: Array, acts: Acts) -> Array:
        del acts
        return _where(self.positions, value + _fitting(self.vector, value), value)


@struct.dataclass
class Replace:
    """Put another value (broadcast) in place of the model's at the positions."""

    value: Any
    positions: Any = None

    def __call__(self, value: Array, acts: Acts) -> Array:
        del acts
        new = jnp.asarray(_fitting(self.value, value), value.dtype)
        return _where(self.positions, jnp.broadcast_to(new, value.shape), value)


@struct.dataclass
class Scale:
    """Multiply by a factor (broadcast) at the positions; 0 ablates."""

    factor: Any
    positions: Any = None

    def __call__(self, value: Array, acts: Acts) -> Array:
        del acts
        return _where(self.positions, value * _fitting(self.factor, value), value)


@dataclasses.dataclass
class Reading:
    """What one dictionary reads in one pass, and what edits made of its activations."""

    source: Array
    """Value that the encoder reads."""
    edited: list[tuple[Array, Array]] = dataclasses.field(default_factory=list)
    """Features (n,) of each edit so far, and their new activations (batch, seq, n)."""
    change: Any = 0.0
    """What the edits so far added to the value at `hook_out`."""

    def activations(self, edit: EditFeatures, features: Array) -> Array:
        """Return the activations (batch, seq, n) of features, as the edits so far left them."""
        acts = encode(edit.params, edit.config, self.source, features)
        for changed, new in self.edited:
            same = features[:, None] == changed
            acts = jnp.where(same.any(axis=1), new @ same.T.astype(new.dtype), acts)
        return acts


@struct.dataclass
class EditFeatures:
    """Change some features of a dictionary by their decoder directions; everything else, error included, stays.

    Adds `(new - old activation) @ W_dec[features]` to the value at the dictionary's `hook_out`.
    """

    params: Any
    features: Any
    """(n,) feature ids; may be a traced array, so that a sweep over features is one vmapped call."""
    amount: Any
    """New activation, or the factor on the old one; broadcast against (batch, seq, n)."""
    positions: Any = None
    config: DictionaryConfig = struct.field(pytree_node=False, kw_only=True)
    scale: bool = struct.field(pytree_node=False, kw_only=True)
    """Whether `amount` is a factor on the old activation rather than the new activation."""

    def __call__(self, value: Array, acts: Acts) -> Array:
        return self.edit(value, Reading(_source(self.config, value, acts)))

    def edit(self, value: Array, reading: Reading) -> Array:
        """Return the edited value, and note the new activations in the reading."""
        features = jnp.atleast_1d(jnp.asarray(self.features))
        old = reading.activations(self, features)
        new = old * self.amount if self.scale else jnp.broadcast_to(jnp.asarray(self.amount, old.dtype), old.shape)
        new = _where(self.positions, new, old)
        change = ((new - old) @ self.params["W_dec"][features].astype(old.dtype)).astype(value.dtype)
        reading.edited.append((features, new))
        reading.change += change
        return value + change


@struct.dataclass
class Splice:
    """Put a dictionary's prediction in place of the value it predicts."""

    params: Any
    config: DictionaryConfig = struct.field(pytree_node=False, kw_only=True)
    include_error: bool = struct.field(pytree_node=False, default=False, kw_only=True)
    """Add the reconstruction error back, so that the value stays the same and only gradients change."""
    detach_error: bool = struct.field(pytree_node=False, default=True, kw_only=True)
    """Let no gradient through the error term."""
    detach_pred: bool = struct.field(pytree_node=False, default=False, kw_only=True)
    """Let no gradient through the dictionary."""

    def __call__(self, value: Array, acts: Acts) -> Array:
        return self.edit(value, Reading(_source(self.config, value, acts)))

    def edit(self, value: Array, reading: Reading) -> Array:
        """Return the prediction, with the changes that edits noted in the reading."""
        prediction = reconstruct(self.params, self.config, reading.source).astype(value.dtype) + reading.change
        if self.detach_pred:
            prediction = jax.lax.stop_gradient(prediction)
        if not self.include_error:
            return prediction
        error = value - jax.lax.stop_gradient(prediction)
        return prediction + (jax.lax.stop_gradient(error) if self.detach_error else error)


@struct.dataclass
class Chain:
    """Several edits of one hook point, applied one after the other."""

    edits: tuple[Any, ...]
    readers: tuple[int, ...] | None = struct.field(pytree_node=False, default=None, kw_only=True)
    """For each edit, the index of the first edit of the same dictionary; None where they have none in common."""

    def __call__(self, value: Array, acts: Acts) -> Array:
        unspliced, readings = None, {}
        for i, (reader, edit) in enumerate(zip(self.readers or range(len(self.edits)), self.edits, strict=True)):
            value = _above_minus_infinity(value) if i else value
            if not isinstance(edit, Splice | EditFeatures):
                value = edit(value, acts)
                continue
            here = value if unspliced is None else unspliced
            reading = readings.setdefault(reader, Reading(_source(edit.config, here, acts)))
            if isinstance(edit, Splice) and not edit.config.is_transcoder:
                unspliced = here
            value = edit.edit(value, reading)
        return value


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
    dictionaries: Iterable[Dictionary],
    include_error: bool = False,
    detach_error: bool = True,
    detach_pred: bool = False,
) -> Hooks:
    """Run the model through dictionaries; those that replace the same value act in the given order."""
    switches = {"include_error": include_error, "detach_error": detach_error, "detach_pred": detach_pred}
    dictionaries = [_require_dictionary(dictionary) for dictionary in dictionaries]
    edits = ({d.config.hook_out: Splice(d.params, config=d.config, **switches)} for d in dictionaries)
    return combine(*edits)


def combine(*hooks: Mapping[str, Hook]) -> Hooks:
    """Merge hooks; several edits of one hook point act one after the other.

    Edits and splices of one dictionary, the same arrays, act on the same activations.
    """
    merged: dict[str, list[Hook]] = {}
    for group in hooks:
        for name, edit in group.items():
            merged.setdefault(name, []).append(edit)
    return {name: edits[0] if len(edits) == 1 else _chain(edits) for name, edits in merged.items()}


def _chain(edits: list[Hook]) -> Chain:
    """Return one chain of the edits, and of those in the chains among them."""
    flat: list[tuple[Hook, Any]] = []
    for edit in edits:
        inner = edit if isinstance(edit, Chain) else Chain((edit,))
        flat += [(e, (id(edit), r)) for e, r in zip(inner.edits, inner.readers or range(len(inner.edits)), strict=True)]
    readers: list[int] = []
    for edit, mark in flat:
        same = (r for r, (other, m) in zip(readers, flat, strict=False) if m == mark or _same_dictionary(other, edit))
        readers.append(next(same, len(readers)))
    return Chain(tuple(edit for edit, _ in flat), readers=tuple(readers))


def _same_dictionary(one: Hook, other: Hook) -> bool:
    """Whether both edits are of one dictionary: of the same arrays, which compiled code could not tell."""
    if not (isinstance(one, Splice | EditFeatures) and isinstance(other, Splice | EditFeatures)):
        return False
    leaves = zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=False)
    return one.config == other.config and all(a is b for a, b in leaves)


def _source(config: DictionaryConfig, value: Array, acts: Acts) -> Array:
    return acts[config.hook_in] if config.is_transcoder else value


def _above_minus_infinity(value: Array) -> Array:
    """Return what the next edit gets: masked scores stay finite, since 0 times infinity is NaN, in gradients too."""
    return jnp.maximum(value, jnp.finfo(value.dtype).min)


def _edit_features(dictionary: Dictionary, features: Any, amount: Any, positions: Any, *, scale: bool) -> Hooks:
    config = _require_dictionary(dictionary).config
    indices = resolve_indices(features, config.n_features)
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
    return jnp.atleast_2d(_boolean(positions))[:, None] if heads_first and positions is not None else positions


def _boolean(positions: Any) -> Array:
    """Return the mask as an array; numbers are refused, since they may count positions or be 0s and 1s."""
    mask = jnp.asarray(positions)
    if mask.dtype != bool:
        raise ValueError(
            f"positions holds {mask.dtype} values, shape {mask.shape}; expected a boolean mask of shape (seq,) or "
            "(batch, seq): np.isin(np.arange(seq), numbers) for numbers of positions, mask == 1 for 0s and 1s."
        )
    return mask


def _fitting(operand: Any, value: Array) -> Any:
    """Return what is added, multiplied or put in place, if it broadcasts to the value's shape."""
    operand = jnp.asarray(operand) if isinstance(operand, list | tuple) else operand
    shape = jnp.shape(operand)
    padded = (1,) * (value.ndim - len(shape)) + shape
    if len(padded) != value.ndim or any(n not in (1, size) for n, size in zip(padded, value.shape, strict=True)):
        raise ValueError(
            f"the edit's array has shape {shape}, the value that is edited {value.shape}; it must broadcast to that."
        )
    return operand


def _where(positions: Any, edited: Array, value: Array) -> Array:
    """Return `edited` where the mask is true, `value` elsewhere; the mask covers the leading axes of both."""
    if positions is None:
        return edited
    mask = jnp.atleast_2d(_boolean(positions))
    covered = value.shape[: mask.ndim]
    fits = len(covered) == mask.ndim and covered[-1] == mask.shape[-1]
    if not fits or any(m not in (1, n) for m, n in zip(mask.shape, covered, strict=True)):
        raise ValueError(
            f"positions has shape {jnp.asarray(positions).shape}, the value that is edited {value.shape}; "
            "expected a boolean mask of shape (seq,) or (batch, seq)."
        )
    return jnp.where(mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim)), edited, value)

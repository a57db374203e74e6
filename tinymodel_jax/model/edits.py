"""The edits of the forward pass: pytrees of arrays that are called with `(value, acts)` and return the new value.

The functions of `interventions.py` build them. In a chain of edits, a `Reading` stores what a dictionary reads, so that
its splice and the edits of its features act on the same activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array

from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import encode, reconstruct
from tinymodel_jax.model.hook_points import masked_score, vectors
from tinymodel_jax.model.padding import is_traced

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
    """Replace the value by another one (broadcast) at the positions."""

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
    """The input of a dictionary, and its activations after the edits so far."""

    source: Array
    """Value that the encoder reads."""
    edited: list[tuple[Array, Array]] = dataclasses.field(default_factory=list)
    """For each edit so far, its features (n,) and their new activations (batch, seq, n)."""
    change: Any = 0.0
    """Sum of what the edits so far added to the value at `hook_out`, in the dictionary's dtype."""

    def activations(self, edit: EditFeatures, features: Array) -> Array:
        """Return the activations (batch, seq, n) of features after the edits so far."""
        acts = encode(edit.params, edit.config, self.source, features)
        for changed, new in self.edited:
            same = features[:, None] == changed
            acts = jnp.where(same.any(axis=1), new[..., same.argmax(axis=1)], acts)
        return acts


@struct.dataclass
class EditFeatures:
    """Change features of a dictionary along their decoder directions. The error and all other features remain.

    Adds `(new - old activation) @ W_dec[features]` to the value at the dictionary's `hook_out`.
    """

    params: Any
    features: Any
    """(n,) feature indices; they may be traced, so that a sweep over features is one vmapped call."""
    amount: Any
    """New activation, or factor of the old one; broadcasts to (batch, seq, n)."""
    positions: Any = None
    config: DictionaryConfig = struct.field(pytree_node=False, kw_only=True)
    scale: bool = struct.field(pytree_node=False, kw_only=True)
    """Whether `amount` is a factor of the old activation rather than the new activation."""

    def __call__(self, value: Array, acts: Acts) -> Array:
        return self.edit(value, Reading(_source(self.config, value, acts)))

    def edit(self, value: Array, reading: Reading) -> Array:
        """Return the edited value, and record the new activations in the reading."""
        features = jnp.atleast_1d(jnp.asarray(self.features))
        old = reading.activations(self, features)
        amount = _fitting(self.amount, old, "the activations of its features")
        new = old * amount if self.scale else jnp.broadcast_to(jnp.asarray(amount, old.dtype), old.shape)
        new = _where(self.positions, new, old)
        change = (new - old) @ self.params["W_dec"][features].astype(old.dtype)
        reading.edited.append((features, new))
        reading.change += change
        return value + change.astype(value.dtype).reshape(value.shape)


@struct.dataclass
class Splice:
    """Replace the value that a dictionary predicts by its prediction."""

    params: Any
    config: DictionaryConfig = struct.field(pytree_node=False, kw_only=True)
    include_error: bool = struct.field(pytree_node=False, default=False, kw_only=True)
    """Add the reconstruction error back, so that the value remains and only gradients change."""
    detach_error: bool = struct.field(pytree_node=False, default=True, kw_only=True)
    """Stop the gradient through the error term."""
    detach_pred: bool = struct.field(pytree_node=False, default=False, kw_only=True)
    """Stop the gradient through the dictionary."""

    def __call__(self, value: Array, acts: Acts) -> Array:
        return self.edit(value, Reading(_source(self.config, value, acts)))

    def edit(self, value: Array, reading: Reading) -> Array:
        """Return the prediction plus the changes that edits recorded in the reading."""
        prediction = reconstruct(self.params, self.config, reading.source)
        if self.detach_pred:
            prediction = jax.lax.stop_gradient(prediction)
        prediction = (prediction + reading.change).astype(value.dtype).reshape(value.shape)
        if not self.include_error:
            return prediction
        # prediction + (value - prediction) would round; this adds an exact 0 whose gradient is the prediction's
        value = jax.lax.stop_gradient(value) if self.detach_error else value
        return value + (prediction - jax.lax.stop_gradient(prediction))


@struct.dataclass
class Chain:
    """Several edits of one hook point, applied in order."""

    edits: tuple[Any, ...]
    readers: tuple[int, ...] | None = struct.field(pytree_node=False, default=None, kw_only=True)
    """For each edit, the index of the first edit of the same dictionary; None if no two edits share a dictionary."""
    of_scores: bool = struct.field(pytree_node=False, default=False, kw_only=True)
    """Whether the value is attention scores, whose minus infinities (masked keys) become finite for the next edit."""

    def __call__(self, value: Array, acts: Acts) -> Array:
        unspliced: Array | None = None  # the value before the first splice of an SAE
        readings: dict[int, Reading] = {}
        for reader, edit in zip(self.readers or range(len(self.edits)), self.edits, strict=True):
            if isinstance(edit, Splice | EditFeatures):
                if reader not in readings:
                    # a second splice predicts what the first one wrote; edits change what the splice decodes
                    here = value if unspliced is None or isinstance(edit, Splice) else unspliced
                    readings[reader] = Reading(_source(edit.config, here, acts))
                if isinstance(edit, Splice) and not edit.config.is_transcoder and unspliced is None:
                    unspliced = value
                value = edit.edit(value, readings[reader])
                continue
            value = edit(value, acts)
            value = jnp.maximum(value, masked_score(value.dtype)) if self.of_scores else value
            if unspliced is None:  # SAEs read the edited value; transcoders read another hook point's
                readings = {r: known for r, known in readings.items() if self.edits[r].config.is_transcoder}
        return value


def _source(config: DictionaryConfig, value: Array, acts: Acts) -> Array:
    return vectors(acts[config.hook_in] if config.is_transcoder else value)


def boolean_mask(positions: Any) -> Any:
    """Return the mask as an array. Numbers are refused, because they may be position numbers or 0s and 1s."""
    mask = jnp.asarray(positions) if is_traced(positions) else np.asarray(positions)
    if mask.dtype != bool:
        raise ValueError(
            f"positions holds {mask.dtype} values, shape {mask.shape}; expected a boolean mask of shape (seq,) or "
            "(batch, seq): np.isin(np.arange(seq), numbers) for numbers of positions, mask == 1 for 0s and 1s."
        )
    return mask


def _fitting(operand: Any, value: Array, named: str = "the value that is edited") -> Any:
    """Return the operand of an edit after checking that it is numeric and broadcasts to the value's shape."""
    if isinstance(operand, list | tuple):
        operand = (jnp if is_traced(operand) else np).asarray(operand)
    is_array = isinstance(operand, jax.Array | np.ndarray | np.generic) and operand.dtype.kind not in "OUS"
    if not is_array and not isinstance(operand, int | float):
        raise ValueError(f"the edit holds {operand!r:.80}; expected a number or an array of numbers.")
    shape = jnp.shape(operand)
    padded = (1,) * (value.ndim - len(shape)) + shape
    if len(padded) != value.ndim or any(n not in (1, size) for n, size in zip(padded, value.shape, strict=True)):
        raise ValueError(f"the edit's array has shape {shape}, {named} {value.shape}; it must broadcast to that.")
    return operand


def _where(positions: Any, edited: Array, value: Array) -> Array:
    """Return `edited` where the mask is true, `value` elsewhere; the mask covers the leading axes of both."""
    if positions is None:
        return edited
    mask = jnp.atleast_2d(boolean_mask(positions))
    covered = value.shape[: mask.ndim]
    fits = len(covered) == mask.ndim and covered[-1] == mask.shape[-1]
    if not fits or any(m not in (1, n) for m, n in zip(mask.shape, covered, strict=True)):
        raise ValueError(
            f"positions has shape {jnp.asarray(positions).shape}, the value that is edited {value.shape}; "
            "expected a boolean mask of shape (seq,) or (batch, seq)."
        )
    return jnp.where(mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim)), edited, value)

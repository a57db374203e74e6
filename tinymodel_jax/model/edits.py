"""The edits of the forward pass: pytrees of arrays that are called with `(value, acts)` and return the new value.

The functions of `interventions.py` build them. In a chain of edits, a `Reading` stores what a dictionary reads, so that
its splice and the edits of its features act on the same activations.

`pad_edits` pads the arrays of edits like the ids of a pass, so that edits for other lengths need no other programs.
`edits_after_prompt` makes the edits of the tokens that are generated after a prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array

from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.dictionaries.encoding import predict_part, size_and_mean
from tinymodel_jax.model.edit_arrays import AfterPrompt, Padding, fitting, where
from tinymodel_jax.model.hook_points import (
    Hook,
    Hooks,
    masked_score,
    naming_the_hook,
    position_axes,
    value_shape,
)
from tinymodel_jax.model.padding import feature_bucket, is_traced
from tinymodel_jax.model.readings import Acts, Drift, Reading, drift_of, reading_of, reads_ahead, reads_the_value


def pad_edits(hooks: Mapping[str, Any], config: ModelConfig, shape: tuple[int, int], width: int) -> Hooks:
    """Return edits for token ids that are padded on the right to a width; the padding is not edited.

    The number of features in an edit is rounded up as well. Call this outside of a trace.

    Args:
        hooks: edits; functions among them are returned as they are.
        shape: (batch, seq) of the ids without padding.

    Raises:
        ValueError: an edit does not fit the value without padding.
    """
    return _fitted(hooks, lambda name: Padding(value_shape(name, config, *shape), position_axes(name), width))


def edits_after_prompt(hooks: Mapping[str, Any], config: ModelConfig, batch: int) -> Hooks:
    """Return edits for the tokens after prompts, one per row at a time: without the masks, which cover the prompts.

    Raises:
        ValueError: an array has a value for each position of the prompt, so none for later tokens, or does not fit.
    """
    return _fitted(hooks, lambda name: AfterPrompt(value_shape(name, config, batch, 1), position_axes(name), 1))


def _fitted(hooks: Mapping[str, Any], padding_at: Callable[[str], Padding]) -> Hooks:
    fitted = {}
    for name, edit in hooks.items():
        with naming_the_hook(name):
            fitted[name] = _padded(edit, padding_at(name))
    return fitted


def _padded(edit: Any, padding: Padding) -> Any:
    """Return the edit for the padded value; a function is returned as it is."""
    return edit.padded(padding) if isinstance(edit, OwnEdit | Chain) else edit


def can_be_padded(hooks: Mapping[str, Hook]) -> bool:
    """Whether all hooks are edits of this module, whose arrays `pad_edits` knows, and none of them is traced."""
    return not is_traced(hooks) and all(isinstance(edit, OwnEdit) for edit in _single_edits(hooks))


def need_whole_passes(hooks: Mapping[str, Hook]) -> bool:
    """Whether an edit is of a crosscoder or cross-layer transcoder, so that no pass can resume in the middle."""
    edits = (edit for edit in _single_edits(hooks) if isinstance(edit, EditFeatures | Splice))
    return any(len(edit.config.hooks_in) > 1 for edit in edits)


def _single_edits(hooks: Mapping[str, Hook]) -> list[Hook]:
    return [part for edit in hooks.values() for part in (edit.edits if isinstance(edit, Chain) else (edit,))]


def is_array_tree(tree: Any) -> bool:
    """Whether all leaves of a tree are arrays or numbers, so that compiled functions take it as an argument."""
    return all(isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float) for leaf in jax.tree.leaves(tree))


@struct.dataclass
class Add:
    """Add a vector (broadcast to the value) at the positions.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from tinymodel_jax import TinyModel, run_with_hooks
        >>> from tinymodel_jax.model.edits import Add
        >>> lm = TinyModel("mini")
        >>> ids, vectors = lm.to_tokens("The dog"), jnp.eye(128)[:3]
        >>> logits_of = lambda v: run_with_hooks(lm.params, lm.config, ids, {"blocks.1.hook_mlp_out": Add(v)})[0]
        >>> jax.vmap(logits_of)(vectors).shape
        (3, 1, 3, 1024)
    """

    vector: Any
    """Numbers that broadcast to the value."""
    positions: Any = None
    """Mask (seq,) or (batch, seq); None is all positions."""

    def __call__(self, value: Array, acts: Acts) -> Array:
        del acts
        return where(self.positions, value + fitting(self.vector, value.shape), value)

    def padded(self, padding: Padding) -> Add:
        """Return the edit for the padded value."""
        return Add(padding.operand(self.vector), padding.mask(self.positions))


@struct.dataclass
class Replace:
    """Replace the value by another one (broadcast) at the positions.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tinymodel_jax.model.edits import Replace
        >>> Replace(3.0)(jnp.ones(2), {}).tolist()
        [3.0, 3.0]
    """

    value: Any
    """Numbers that broadcast to the value."""
    positions: Any = None
    """Mask (seq,) or (batch, seq); None is all positions."""

    def __call__(self, value: Array, acts: Acts) -> Array:
        del acts
        new = jnp.asarray(fitting(self.value, value.shape), value.dtype)
        return where(self.positions, jnp.broadcast_to(new, value.shape), value)

    def padded(self, padding: Padding) -> Replace:
        """Return the edit for the padded value."""
        return Replace(padding.operand(self.value), padding.mask(self.positions))


@struct.dataclass
class Scale:
    """Multiply by a factor (broadcast) at the positions; 0 ablates.

    Examples:
        >>> import jax.numpy as jnp
        >>> from tinymodel_jax.model.edits import Scale
        >>> Scale(0.5)(jnp.ones(2), {}).tolist()
        [0.5, 0.5]
    """

    factor: Any
    """A number, or numbers that broadcast to the value."""
    positions: Any = None
    """Mask (seq,) or (batch, seq); None is all positions."""

    def __call__(self, value: Array, acts: Acts) -> Array:
        del acts
        return where(self.positions, value * fitting(self.factor, value.shape), value)

    def padded(self, padding: Padding) -> Scale:
        """Return the edit for the padded value."""
        return Scale(padding.operand(self.factor), padding.mask(self.positions))


@struct.dataclass
class EditFeatures:
    """Change features of a dictionary along their decoder directions. The error and all other features remain.

    Adds `(new - old activation) @ W_dec[features]` to the value at the dictionary's `hook_out`, times the size of its
    input for an SAE that normalizes it.

    Examples:
        >>> from tinymodel_jax import TinyModel, interventions
        >>> lm = TinyModel("mini")
        >>> edit = interventions.clamp(lm["M2"], [3, 304], 5.0)["blocks.2.hook_mlp_out"]
        >>> edit.change, edit.features.tolist()
        ('set', [3, 304])
    """

    params: Any
    features: Any
    """(n,) feature indices; they may be traced, so that a sweep over features is one vmapped call.

    An index of n_features changes nothing; `padded` fills up with it.
    """
    amount: Any
    """New activation, factor of the old one or number added to it; broadcasts to (batch, seq, n)."""
    positions: Any = None
    """Mask (seq,) or (batch, seq); None is all positions."""
    config: DictionaryConfig = struct.field(pytree_node=False, kw_only=True)
    change: Literal["set", "scale", "add"] = struct.field(pytree_node=False, kw_only=True)
    """What `amount` does to the old activation."""
    part: int = struct.field(pytree_node=False, default=0, kw_only=True)
    """Which of the hook points of the dictionary's `hook_out` is edited."""

    def __call__(self, value: Array, acts: Acts) -> Array:
        return self.edit(value, reading_of(self, value, acts, drift_of(self, value, acts)), acts)

    @property
    def reads_ahead(self) -> tuple[str, ...]:
        """Hook points whose values of a first pass are read."""
        return reads_ahead(self.config)

    def edit(self, value: Array, reading: Reading, acts: Acts) -> Array:
        """Return the edited value, and record the new activations in the reading."""
        features = jnp.atleast_1d(jnp.asarray(self.features))
        old = reading.activations(self, features)
        amount = fitting(self.amount, old.shape, "the activations of its features")
        amount = jnp.broadcast_to(jnp.asarray(amount, old.dtype), old.shape)
        new = {"set": amount, "scale": old * amount, "add": old + amount}[self.change]
        new = jnp.where(features < self.config.n_features, where(self.positions, new, old), old)
        new = where(_acting(self.config, acts), new, old)
        change = (new - old) @ self._rows(features).astype(old.dtype)
        if self.config.rescales_output:
            change = change * size_and_mean(self.config, reading.source.astype(old.dtype))[0]
        reading.edited.append((features, new))
        reading.change += change
        if reading.drift is not None:
            change = change - reading.drift.take(self._acts_on(features, (old != 0) | (new != 0), acts))
        return value + change.astype(value.dtype).reshape(value.shape)

    def _acts_on(self, features: Array, active: Array, acts: Acts) -> Array:
        """Return where the edit acts on features that are active before or after it, (batch, seq, 1).

        Activations that it happens to leave unchanged count, so that gradients are those of a small change.
        """
        active = active & (features < self.config.n_features)
        active = where(self.positions, active, jnp.zeros_like(active))
        active = where(_acting(self.config, acts), active, jnp.zeros_like(active))
        return jnp.any(active, axis=-1, keepdims=True)

    def _rows(self, features: Array) -> Array:
        """Return what the features write to the part; features of later layers of a cross-layer transcoder write 0."""
        width = self.config.d_out // len(self.config.hooks_out)
        return self.params["W_dec"][features][:, self.part * width : (self.part + 1) * width]

    def padded(self, padding: Padding) -> EditFeatures:
        """Return the edit for the padded value, with the number of features rounded up."""
        features = np.atleast_1d(self.features)
        n, n_features = len(features), self.config.n_features
        added = (0, feature_bucket(n, n_features) - n)
        padding = dataclasses.replace(padding, shape=(*padding.shape[:2], n))
        amount = padding.operand(self.amount, "the activations of its features")
        if np.ndim(amount) and np.shape(amount)[-1] == n:
            amount = np.pad(np.asarray(amount), [(0, 0)] * (np.ndim(amount) - 1) + [added])
        features = np.pad(features, added, constant_values=n_features)
        return dataclasses.replace(self, features=features, amount=amount, positions=padding.mask(self.positions))


@struct.dataclass
class Splice:
    """Replace the value that a dictionary predicts by its prediction.

    Examples:
        >>> from tinymodel_jax import TinyModel, interventions
        >>> lm = TinyModel("mini")
        >>> interventions.splice(lm["M2"], include_error=True)["blocks.2.hook_mlp_out"].include_error
        True
    """

    params: Any
    config: DictionaryConfig = struct.field(pytree_node=False, kw_only=True)
    include_error: bool = struct.field(pytree_node=False, default=False, kw_only=True)
    """Add the reconstruction error back, so that the value remains and only gradients change."""
    detach_error: bool = struct.field(pytree_node=False, default=True, kw_only=True)
    """Stop the gradient through the error term."""
    detach_pred: bool = struct.field(pytree_node=False, default=False, kw_only=True)
    """Stop the gradient through the dictionary."""
    part: int = struct.field(pytree_node=False, default=0, kw_only=True)
    """Which of the hook points of the dictionary's `hook_out` is replaced."""

    def __call__(self, value: Array, acts: Acts) -> Array:
        return self.edit(value, reading_of(self, value, acts, drift_of(self, value, acts)), acts)

    @property
    def reads_ahead(self) -> tuple[str, ...]:
        """Hook points whose values of a first pass are read."""
        return reads_ahead(self.config)

    def edit(self, value: Array, reading: Reading, acts: Acts) -> Array:
        """Return the prediction plus the changes that edits recorded in the reading."""
        prediction = predict_part(self.params, self.config, reading.source, self.part)
        if self.detach_pred:
            prediction = jax.lax.stop_gradient(prediction)
        prediction = (prediction + reading.change).astype(value.dtype).reshape(value.shape)
        prediction = where(_acting(self.config, acts), prediction, value)
        if not self.include_error:
            if reading.drift is not None:
                reading.drift.left = jnp.zeros_like(reading.drift.left)
            return prediction
        # prediction + (value - prediction) would round; this adds an exact 0 whose gradient is the prediction's
        value = jax.lax.stop_gradient(value) if self.detach_error else value
        return value + (prediction - jax.lax.stop_gradient(prediction))

    def padded(self, padding: Padding) -> Splice:
        """Return the splice itself, which reads and writes every position alike."""
        del padding
        return self


@struct.dataclass
class Chain:
    """Several edits of one hook point, applied in order; those that read ahead come last.

    Examples:
        >>> from tinymodel_jax import TinyModel, interventions
        >>> lm = TinyModel("mini")
        >>> hook = "blocks.1.hook_mlp_out"
        >>> hooks = interventions.combine(interventions.scale(hook, 2.0), interventions.steer(hook, 1.0))
        >>> [type(edit).__name__ for edit in hooks[hook].edits]
        ['Scale', 'Add']
    """

    edits: tuple[Any, ...]
    """The edits, in order."""
    readers: tuple[int, ...] | None = struct.field(pytree_node=False, default=None, kw_only=True)
    """For each edit, the index of the first edit of the same dictionary; None if no two edits share a dictionary."""
    of_scores: bool = struct.field(pytree_node=False, default=False, kw_only=True)
    """Whether the value is attention scores, whose minus infinities (masked keys) become finite for the next edit."""

    def __call__(self, value: Array, acts: Acts) -> Array:
        unspliced: Array | None = None  # the value before the first splice of an SAE
        readings: dict[int, Reading] = {}
        drift: Drift | None = None  # one for all crosscoders, which build on the same first pass
        for reader, edit in zip(self.readers or range(len(self.edits)), self.edits, strict=True):
            if isinstance(edit, Splice | EditFeatures):
                if reader not in readings:
                    # a second splice predicts what the first one wrote; edits change what the splice decodes
                    here = value if unspliced is None or isinstance(edit, Splice) else unspliced
                    drift = drift or drift_of(edit, value, acts)
                    readings[reader] = reading_of(edit, here, acts, drift)
                if isinstance(edit, Splice) and reads_the_value(edit.config) and unspliced is None:
                    unspliced = value
                value = edit.edit(value, readings[reader], acts)
                continue
            value = edit(value, acts)
            value = jnp.maximum(value, masked_score(value.dtype)) if self.of_scores else value
            if unspliced is None:  # SAEs read the edited value; transcoders read another hook point's
                readings = {r: known for r, known in readings.items() if not reads_the_value(self.edits[r].config)}
        return value

    @property
    def reads_ahead(self) -> tuple[str, ...]:
        """Hook points whose values of a first pass are read."""
        return tuple(name for edit in self.edits for name in getattr(edit, "reads_ahead", ()))

    @property
    def before_reading_ahead(self) -> Chain | None:
        """The edits that the first pass has; None if there are none."""
        n = sum(not getattr(edit, "reads_ahead", ()) for edit in self.edits)
        readers = None if self.readers is None else self.readers[:n]
        return dataclasses.replace(self, edits=self.edits[:n], readers=readers) if n else None

    def padded(self, padding: Padding) -> Chain:
        """Return the chain of the padded edits."""
        return dataclasses.replace(self, edits=tuple(_padded(edit, padding) for edit in self.edits))


OwnEdit = Add | Replace | Scale | EditFeatures | Splice


def _acting(config: DictionaryConfig, acts: Acts) -> Array | None:
    """Return where the dictionary acts; None if at all tokens, because edits called by hand then need no `tok_ids`."""
    return config.acts_at(acts["tok_ids"]) if config.exclude else None

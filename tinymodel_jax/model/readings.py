"""What the dictionary of an edit reads in a pass, and what the edits before it changed.

A splice and the edits of a dictionary's features share a `Reading`, so that they act on the same activations. An SAE
reads the value that is edited, a transcoder hook points that the pass has met, and a crosscoder a first pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array

from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.encoding import encode, first_layers
from tinymodel_jax.model.hook_points import in_first_pass, vectors, vectors_at

Acts = Mapping[str, Array]


@runtime_checkable
class DictionaryEdit(Protocol):
    """A splice, or an edit of features."""

    @property
    def params(self) -> Any: ...
    @property
    def config(self) -> DictionaryConfig: ...
    @property
    def part(self) -> int: ...


@dataclasses.dataclass
class Drift:
    """What earlier hook points of crosscoders changed in the value at a hook point, as far as it is still there.

    A crosscoder has a decoder row for each of its hook points. Along the residual stream, a change at one hook point
    arrives at the next, where the feature has a row of its own. So that the two do not add up, a feature that changes
    there is changed in the value of the first pass: the drift is taken away.
    """

    left: Array
    """Value minus that of the first pass, as vectors."""

    def take(self, where_to: Array) -> Array:
        """Return the drift at some positions, 0 elsewhere; it is then no longer there."""
        taken = jnp.where(where_to, self.left, 0)
        self.left = jnp.where(where_to, 0, self.left)
        return taken


@dataclasses.dataclass
class Reading:
    """The input of a dictionary, and its activations after the edits so far."""

    source: Array
    """Value that the encoder reads; of a cross-layer transcoder, the inputs of the layers that write to the value."""
    edited: list[tuple[Array, Array]] = dataclasses.field(default_factory=list)
    """For each edit so far, its features (n,) and their new activations (batch, seq, n)."""
    change: Any = 0.0
    """Sum of what the edits so far added to the value at `hook_out`, in the dictionary's dtype."""
    drift: Drift | None = None
    """For crosscoders."""

    def activations(self, edit: DictionaryEdit, features: Array) -> Array:
        """Return the activations (batch, seq, n) of features after the edits so far."""
        params, config = edit.params, edit.config
        if config.n_layers > 1:
            params, config = first_layers(params, config, edit.part + 1)
        acts = encode(params, config, self.source, features)
        for changed, new in self.edited:
            same = features[:, None] == changed
            acts = jnp.where(same.any(axis=1), new[..., same.argmax(axis=1)], acts)
        return acts


def reads_the_value(config: DictionaryConfig) -> bool:
    """Whether a dictionary reads the value that it predicts, as SAEs of one hook point do."""
    return not (config.is_transcoder or config.is_crosscoder)


def reads_ahead(config: DictionaryConfig) -> tuple[str, ...]:
    """Return the hook points whose values of a first pass a dictionary reads: those of a crosscoder."""
    return config.hooks_in if config.is_crosscoder else ()


def reading_of(edit: DictionaryEdit, value: Array, acts: Acts, drift: Drift | None) -> Reading:
    """Return the input of an edit's dictionary in a pass; `value` is what an SAE of one hook point reads."""
    config = edit.config
    if config.is_crosscoder:
        return Reading(vectors_at(acts, "+".join(map(in_first_pass, config.hooks_in))), drift=drift)
    if not config.is_transcoder:
        return Reading(vectors(value))
    names = config.hooks_in[: edit.part + 1]
    if missing := [name for name in names if name not in acts]:
        raise ValueError(
            f"a cross-layer transcoder reads {missing[0]}, which a pass that resumes at a later layer does not compute."
        )
    return Reading(vectors_at(acts, "+".join(names)))


def drift_of(edit: DictionaryEdit, value: Array, acts: Acts) -> Drift | None:
    """Return the drift of the value that a crosscoder edits; None for other dictionaries."""
    if not edit.config.is_crosscoder:
        return None
    first = acts[in_first_pass(edit.config.hooks_out[edit.part])]
    return Drift(vectors(value).astype(edit.config.dtype) - vectors(first).astype(edit.config.dtype))

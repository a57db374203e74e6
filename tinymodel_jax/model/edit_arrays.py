"""The arrays of edits: their checks against the value that is edited, masks of positions, and padding.

Vectors, values and factors are aligned with the last axes of the value, masks of positions with its first axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinymodel_jax.model.padding import is_traced


@dataclasses.dataclass(frozen=True)
class Padding:
    """How a value is padded: along its position axes, on the right, to a width."""

    shape: tuple[int, ...]
    """Shape of the value without padding."""
    axes: tuple[int, ...]
    """Its position axes."""
    width: int

    def operand(self, operand: Any, named: str = "the value that is edited") -> Any:
        """Check and pad an array that broadcasts to the value."""
        operand = fitting(operand, self.shape, named)
        return self._pad(operand, [axis - len(self.shape) for axis in self.axes])

    def mask(self, positions: Any) -> np.ndarray | None:
        """Check and pad a mask of positions; return it with the value's batch size, False in the padding."""
        mask = np.ones((1,) * len(self.shape), bool) if positions is None else mask_of(positions, self.shape)
        n_axes = self.axes[0] + 1 if positions is None else max(np.ndim(positions), self.axes[0] + 1)
        sizes = {axis: self.shape[axis] for axis in (0, self.axes[0])}
        mask = np.broadcast_to(mask, [sizes.get(axis, size) for axis, size in enumerate(mask.shape)])
        return self._pad(mask.reshape(mask.shape[:n_axes]), self.axes)

    def _pad(self, array: Any, axes: Iterable[int]) -> Any:
        """Pad the axes that run over all positions; others broadcast, or do not exist."""
        room = [(0, 0)] * np.ndim(array)
        for axis in axes:
            if -len(room) <= axis < len(room) and np.shape(array)[axis] == self.shape[axis]:
                room[axis] = (0, self.width - self.shape[axis])
        return np.pad(np.asarray(array), room) if any(after for _, after in room) else array


class AfterPrompt(Padding):
    """The value at one token after a prompt, for which arrays over the prompt's positions have no value."""

    def operand(self, operand: Any, named: str = "the value that is edited") -> Any:
        """Check an array that broadcasts to the value at every position."""
        given = np.shape(operand)
        if any(len(given) + axis >= 0 and given[axis] > 1 for axis in (axis - len(self.shape) for axis in self.axes)):
            raise ValueError(
                f"the edit's array has shape {given}, with a value for each position of the prompt and none for "
                "generated tokens; positions='prompt' edits the prompt only."
            )
        return super().operand(operand, named)

    def mask(self, positions: Any) -> None:
        """Return no mask: those of the prompt do not cover later tokens, which are all edited."""
        given = () if positions is None else boolean_mask(positions).shape
        if any(size > 1 for axis, size in enumerate(given) if len(given) > 1 and axis not in (0, self.axes[0])):
            raise ValueError(
                f"positions has shape {given}, a mask of heads at the positions of the prompt; only "
                "positions='prompt' of generate takes one."
            )


def boolean_mask(positions: Any) -> Any:
    """Return the mask as an array. Numbers are refused, because they may be position numbers or 0s and 1s."""
    mask = jnp.asarray(positions) if is_traced(positions) else np.asarray(positions)
    if mask.dtype != bool:
        raise ValueError(
            f"positions holds {mask.dtype} values, shape {mask.shape}; expected a boolean mask of shape (seq,) or "
            "(batch, seq): np.isin(np.arange(seq), numbers) for numbers of positions, mask == 1 for 0s and 1s."
        )
    return mask


def fitting(operand: Any, shape: tuple[int, ...], named: str = "the value that is edited") -> Any:
    """Return the operand of an edit after checking that it is numeric and broadcasts to a shape."""
    if isinstance(operand, list | tuple):
        operand = (jnp if is_traced(operand) else np).asarray(operand)
    is_array = isinstance(operand, jax.Array | np.ndarray | np.generic) and operand.dtype.kind not in "OUS"
    if not is_array and not isinstance(operand, int | float):
        raise ValueError(f"the edit holds {operand!r:.80}; expected a number or an array of numbers.")
    given = jnp.shape(operand)
    padded = (1,) * (len(shape) - len(given)) + given
    if len(padded) != len(shape) or any(n not in (1, size) for n, size in zip(padded, shape, strict=True)):
        rows = given[0] if shape[0] == 1 and len(given) == len(shape) else 1
        repeat = f" For {rows} rows, repeat the prompt: [prompt] * {rows}." if rows > 1 else ""
        raise ValueError(f"the edit's array has shape {given}, {named} {shape}; it must broadcast to that.{repeat}")
    return operand


def where(positions: Any, edited: Array, value: Array) -> Array:
    """Return `edited` where the mask is true, `value` elsewhere; the mask covers the leading axes of both."""
    return edited if positions is None else jnp.where(mask_of(positions, value.shape), edited, value)


def mask_of(positions: Any, shape: tuple[int, ...]) -> Any:
    """Return the mask with as many axes as a value of a shape, after checking that it fits."""
    mask = boolean_mask(positions)
    given = mask.shape
    mask = mask[None] if mask.ndim == 1 else mask
    covered = shape[: mask.ndim]
    fits = mask.ndim > 1 and len(covered) == mask.ndim and covered[-1] == mask.shape[-1]
    if not fits or any(m not in (1, n) for m, n in zip(mask.shape, covered, strict=True)):
        raise ValueError(
            f"positions has shape {given}, the value that is edited {shape}; "
            "expected a boolean mask of shape (seq,) or (batch, seq)."
        )
    return mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim))

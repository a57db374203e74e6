"""Prompts with aligned positions: which position of one prompt corresponds to which position of another.

A *place* is a group of positions that are treated alike in all prompts. Prompts of equal length need no names: every
position is a place. Otherwise the caller names positions, one per prompt, such as the position of a name and the last
position; all other positions together are the place "other".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.padding import bucket, check_tok_ids, pad_right

OTHER = "other"
"""The place of all positions that have no name."""
Places = Mapping[str, int | Sequence[int] | np.ndarray]
"""Name -> its position: one per prompt, or one for all; negative ones count from the prompt's last token."""


class Aligned(NamedTuple):
    """Prompts, padded to a compiled length, and the place of each position."""

    tok_ids: Int[np.ndarray, "prompts seq"]
    lengths: Int[np.ndarray, " prompts"]
    place: Int[np.ndarray, "prompts seq"]
    """Index into `names`; 0 in the padding, which nothing reads."""
    names: tuple[str, ...]

    @property
    def real(self) -> Bool[np.ndarray, "prompts seq"]:
        """Which positions are not padding."""
        return np.arange(self.tok_ids.shape[1]) < self.lengths[:, None]


def align(lm: TinyModel, prompts: Any, places: Places | None) -> Aligned:
    """Return prompts with the place of each of their positions.

    Args:
        prompts: a list of texts, or token ids (prompts, seq), right-padded.
        places: see `Places`; None for prompts of equal length.

    Raises:
        ValueError: there is no prompt, one has `[PAD]` before a token, or `places` does not fit the prompts.
    """
    ids = check_tok_ids(lm.to_tokens(prompts), lm.config)
    real = ids != lm.config.pad_id
    lengths = real.sum(axis=1)
    wrong = np.flatnonzero((lengths == 0) | (real != (np.arange(ids.shape[1]) < lengths[:, None])).any(axis=1))
    if not len(ids) or len(wrong):
        which = f"prompt {wrong[0]} has [PAD] before a token, or no token" if len(wrong) else "got no prompts"
        raise ValueError(f"circuits: {which}; give one prompt or more, right-padded.")
    width = bucket(int(lengths.max()), lm.config.n_ctx)
    ids = pad_right(ids[:, : int(lengths.max())], width, lm.config.pad_id)
    if places is None:
        if lengths.min() != lengths.max():
            raise ValueError(
                f"circuits: the prompts have {lengths.min()} to {lengths.max()} tokens, so their positions do not "
                "correspond; give prompts of one length, or name positions: places={'name': [3, 5], 'end': -1}."
            )
        numbers = np.arange(width) * (np.arange(width) < lengths[0])
        return Aligned(ids, lengths, np.broadcast_to(numbers, ids.shape), tuple(map(str, range(lengths[0]))))
    return Aligned(ids, lengths, _numbered(places, lengths, width), (*places, OTHER))


def _numbered(places: Places, lengths: Int[np.ndarray, " prompts"], width: int) -> Int[np.ndarray, "prompts seq"]:
    """Return the number of each position's place."""
    if not places or OTHER in places:
        raise ValueError(
            f"circuits: places has the names {', '.join(places) or '(none)'}; name one position or more, none of them "
            f"{OTHER!r}, which is the place of all positions without a name."
        )
    found = np.full((len(lengths), width), -1, np.int32)
    for number, (name, given) in enumerate(places.items()):
        at = np.asarray(given)
        if at.dtype.kind not in "iu" or at.shape not in ((), lengths.shape):
            raise ValueError(
                f"circuits: places[{name!r}] has {at.dtype} values of shape {at.shape}; give one position, or one for "
                f"each of {len(lengths)} prompts."
            )
        at = np.broadcast_to(at, lengths.shape)
        outside = np.flatnonzero((at < -lengths) | (at >= lengths))
        if len(outside):
            row = outside[0]
            raise ValueError(
                f"circuits: places[{name!r}] is {at[row]} for prompt {row}, which has positions 0..{lengths[row] - 1}."
            )
        rows = np.arange(len(lengths))
        at = np.where(at < 0, at + lengths, at)
        taken = np.flatnonzero(found[rows, at] >= 0)
        if len(taken):
            other = list(places)[found[taken[0], at[taken[0]]]]
            raise ValueError(
                f"circuits: places {other!r} and {name!r} are both position {at[taken[0]]} of prompt {taken[0]}; leave "
                "such prompts out."
            )
        found[rows, at] = number
    found[(found < 0) & (np.arange(width) < lengths[:, None])] = len(places)
    return np.maximum(found, 0)

"""Stories to token ids, a batch at a time: the work of `prepare`'s worker processes.

Guarantees: batches are pure and in order, so that the ids do not depend on the number of workers; the choice of
held-out stories depends only on a story's contents and the seed, so that all copies of a story are in the same split.
Reading the source and writing the result happen elsewhere.
"""

from __future__ import annotations

import hashlib
import reprlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tinymodel_jax.text.prompts_and_stories import refuse_divider, story_ids
from tinymodel_jax.text.tokenizer import Tokenizer, clean_text, keep_story
from tinymodel_jax.training.data_folder import ID_DTYPE, SPLITS


class Batch(NamedTuple):
    """Consecutive rows of a source."""

    split: str
    first: int
    """Number of the first row, from 1, in its split of the source."""
    rows: Sequence[Any]
    """Stories, or lists of ids."""


@dataclass
class Counts:
    """How many rows were read and what became of them: `tokens` and `stories` by split, `left_out` by reason."""

    read: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    stories: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        """Add the counts of other rows to these."""
        self.read += other.read
        self.tokens.update(other.tokens)
        self.stories.update(other.stories)
        self.left_out.update(other.left_out)


class Encoded(NamedTuple):
    """The result of a batch."""

    ids: dict[str, bytearray]
    """Little-endian uint16, by split."""
    counts: Counts


class _Story(NamedTuple):
    content: bytes
    """What decides whether the story is held out."""
    ids: Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Encoder:
    """How stories become ids."""

    source: str
    """Name of the source, for errors."""
    tokenizer: Tokenizer
    row_length: int
    packed: bool
    """Whether the ids are one stream; otherwise each row holds one story."""
    valid_fraction: float | None
    """Share of the stories to hold out; None: each stays in the split it was read from."""
    seed: int

    def encode(self, batch: Batch) -> Encoded:
        """Return the ids of a batch.

        Raises:
            ValueError: a row is neither a story nor a list of ids, or holds a special token or an id outside the
                vocabulary. The message gives the row's number.
        """
        ids, counts = {split: bytearray() for split in SPLITS}, Counts(read=len(batch.rows))
        for number, row in enumerate(batch.rows, batch.first):
            story = self._from_text(row, number) if isinstance(row, str) else self._from_ids(row, number)
            if isinstance(story, str):
                counts.left_out[story] += 1
                continue
            split = self._split(story.content, batch.split)
            ids[split] += self._row_bytes(story.ids)
            counts.stories[split] += 1
            counts.tokens[split] += len(story.ids)
        return Encoded(ids, counts)

    def _from_text(self, text: str, number: int) -> _Story | str:
        """Return the story, or why it is left out."""
        where = f"{self.source}, story {number}"
        try:
            content = text.encode()
        except UnicodeEncodeError:  # the reader makes a lone surrogate of a byte that is not UTF-8
            raise ValueError(f"{where} is not valid Unicode text; correct or remove it.") from None
        refuse_divider(text, where)
        if not keep_story(text):
            return "refused"
        if not clean_text(text).strip():
            return "empty"
        return _Story(content, story_ids(self.tokenizer, text, self._most_ids, where))

    def _from_ids(self, row: Any, number: int) -> _Story | str:
        """Return the ids without the padding at their end, or why the row is left out."""
        where, pad = f"{self.source}, row {number}", self.tokenizer.pad_id
        try:
            ids = np.array(array("q", row))  # raises where NumPy would convert
        except (TypeError, OverflowError):
            found = "neither text nor ids (null or missing)" if row is None else reprlib.repr(row)
            raise ValueError(f"{where} holds {found}; 'text' must be a string, 'tok_ids' a list of integers.") from None
        if (outside := ids[(ids < 0) | (ids >= self.tokenizer.vocab_size)]).size:
            raise ValueError(
                f"{where} holds the id {outside[0]}; the tokenizer has ids 0 to {self.tokenizer.vocab_size - 1}. Use "
                "the tokenizer that the ids were made with."
            )
        ids = ids[: np.max(np.flatnonzero(ids != pad), initial=-1) + 1].astype(ID_DTYPE)
        if (ids == pad).any():
            raise ValueError(
                f"{where} has [PAD] (id {pad}) before a token. Pad on the right, or leave padding out: prepare adds it."
            )
        return _Story(ids.tobytes(), ids[: self._most_ids]) if ids.size else "empty"

    @property
    def _most_ids(self) -> int | None:
        """How many ids of a story are kept."""
        return None if self.packed else self.row_length

    def _row_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        padding = 0 if self.packed else self.row_length - len(ids)
        return np.asarray(ids, ID_DTYPE).tobytes() + ID_DTYPE.type(self.tokenizer.pad_id).tobytes() * padding

    def _split(self, content: bytes, read_from: str) -> str:
        if self.valid_fraction is None:
            return read_from
        digest = hashlib.blake2b(content, digest_size=8, key=self.seed.to_bytes(8, "little")).digest()
        return "valid" if int.from_bytes(digest, "little") < self.valid_fraction * 2**64 else "train"

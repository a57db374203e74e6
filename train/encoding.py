"""Stories to token ids, a batch at a time: what the worker processes of `prepare` do.

Rely on: pure and in order, so that the ids do not depend on how many workers there are; the choice of held-out stories
depends on a story's contents and the seed alone, so that copies of a story never lie on both sides. Reading the source
and writing the result happen elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tinymodel_jax.text.prompts_and_stories import refuse_divider, story_ids
from tinymodel_jax.text.tokenizer import Tokenizer, clean_text, keep_story
from tinymodel_jax.training.data_folder import ID_DTYPE, SPLITS


class Batch(NamedTuple):
    """Consecutive rows of a source."""

    split: str
    first: int
    """Row number of the first, from 0, in the split of the source."""
    column: pa.Array
    """Texts, or lists of ids."""


class Encoded(NamedTuple):
    """What came of a batch. Dictionaries are by the split that the stories went to."""

    split: str
    read: int
    """Rows of the batch."""
    ids: dict[str, bytes]
    """Little-endian uint16."""
    tokens: dict[str, int]
    stories: dict[str, int]
    left_out: dict[str, int]


@dataclass(frozen=True)
class Encoder:
    """How stories become ids."""

    source: str
    """Name of the source, for errors."""
    tokenizer: Tokenizer
    row_length: int
    packed: bool
    """Whether the ids are one stream; otherwise a row a story."""
    valid_fraction: float | None
    """Share of the stories to hold out; None: each stays in the split it was read from."""
    seed: int

    def encode(self, batch: Batch) -> Encoded:
        """Return the ids of a batch.

        Raises:
            ValueError: a row is no story, or holds a special token or an id that is not in the vocabulary; its number
                is given.
        """
        is_text = pa.types.is_string(batch.column.type) or pa.types.is_large_string(batch.column.type)
        self._require_no_nulls(batch)
        kept, stories, left_out = self._encode_texts(batch) if is_text else self._encode_lists(batch)
        split_of = [self._split(content, batch.split) for content in kept]
        ids, tokens = {}, {}
        for split in SPLITS:
            chosen = [story for story, its_split in zip(stories, split_of, strict=True) if its_split == split]
            joined = np.concatenate([np.zeros(0, ID_DTYPE), *chosen]).astype(ID_DTYPE)
            ids[split] = joined.tobytes()
            tokens[split] = int(np.count_nonzero(joined != self.tokenizer.pad_id))
        counts = {split: split_of.count(split) for split in SPLITS}
        return Encoded(batch.split, len(batch.column), ids, tokens, counts, left_out)

    def _encode_texts(self, batch: Batch) -> tuple[list[bytes], Sequence[np.ndarray], dict[str, int]]:
        texts = self._texts(batch)
        for number, text in enumerate(texts, batch.first + 1):
            refuse_divider(text, f"{self.source}, story {number}")
        sound = [(number, text) for number, text in enumerate(texts, batch.first + 1) if keep_story(text)]
        kept = [(number, text) for number, text in sound if clean_text(text).strip()]
        left_out = {"refused": len(texts) - len(sound), "empty": len(sound) - len(kept)}
        cut = None if self.packed else self.row_length
        rows = [
            np.array(story_ids(self.tokenizer, text, cut, f"{self.source}, story {number}"), ID_DTYPE)
            for number, text in kept
        ]
        return [text.encode("utf-8") for _, text in kept], rows if self.packed else self._padded(rows), left_out

    def _encode_lists(self, batch: Batch) -> tuple[list[bytes], Sequence[np.ndarray], dict[str, int]]:
        lengths, values = self._flatten(batch)
        outside = np.flatnonzero((values < 0) | (values >= self.tokenizer.vocab_size))
        if outside.size:
            number = batch.first + 1 + int(np.searchsorted(np.cumsum(lengths), outside[0], side="right"))
            raise ValueError(
                f"{self.source}, row {number} holds the id {values[outside[0]]}; the tokenizer has ids 0 to "
                f"{self.tokenizer.vocab_size - 1}. Use the tokenizer that the ids were made with."
            )
        pad = self.tokenizer.pad_id
        all_rows = np.split(values.astype(ID_DTYPE), np.cumsum(lengths)[:-1])
        rows = [row[: np.max(np.flatnonzero(row != pad), initial=-1) + 1] for row in all_rows]
        for number, row in enumerate(rows, batch.first + 1):
            if (row == pad).any():
                raise ValueError(
                    f"{self.source}, row {number} has [PAD] (id {pad}) before a token. Pad on the right, or leave "
                    "padding out: prepare adds it."
                )
        kept = [row for row in rows if row.size]
        contents = [row.tobytes() for row in kept]
        left_out = {"refused": 0, "empty": len(rows) - len(kept)}
        return contents, kept if self.packed else self._padded(kept), left_out

    def _padded(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return rows of `row_length`, cut or padded on the right."""
        matrix = np.full((len(rows), self.row_length), self.tokenizer.pad_id, ID_DTYPE)
        for place, row in zip(matrix, rows, strict=True):
            place[: row.size] = row[: self.row_length]
        return list(matrix)

    def _flatten(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Return the lengths of the lists, and their values in a row."""
        kind = batch.column.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not (is_list and pa.types.is_integer(kind.value_type)):
            raise ValueError(f"{self.source}: rows hold {kind}, expected 'text' as str or 'tok_ids' as list of int.")
        flat = pc.call_function("list_flatten", [batch.column])
        if flat.null_count:
            raise ValueError(f"{self.source}: an id among the rows from {batch.first + 1} on is null.")
        lengths = pc.call_function("list_value_length", [batch.column])
        return lengths.to_numpy(zero_copy_only=False), flat.to_numpy(zero_copy_only=False)

    def _texts(self, batch: Batch) -> list[str]:
        try:
            return batch.column.to_pylist()
        except UnicodeDecodeError:  # the readers do not look at every byte
            raw = batch.column.cast(pa.large_binary()).to_pylist()
            number = batch.first + next(i for i, text in enumerate(raw, 1) if not _is_utf8(text))
            raise ValueError(f"{self.source}, story {number} is not valid UTF-8; mend or remove it.") from None

    def _require_no_nulls(self, batch: Batch) -> None:
        if batch.column.null_count:
            number = batch.first + 1 + int(np.flatnonzero(batch.column.is_null().to_numpy(zero_copy_only=False))[0])
            raise ValueError(f"{self.source}, row {number} has no text or ids (null or missing); mend or remove it.")

    def _split(self, content: bytes, read_from: str) -> str:
        if self.valid_fraction is None:
            return read_from
        digest = hashlib.blake2b(content, digest_size=8, key=self.seed.to_bytes(8, "little")).digest()
        return "valid" if int.from_bytes(digest, "little") < self.valid_fraction * 2**64 else "train"


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True

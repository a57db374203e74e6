"""Prompts and stories as token ids: one `[BEGIN]` in front, `[END]` after a whole story, no other special tokens.

All prompts and stories are encoded here, so the ids of a text depend on the text alone. Calling the tokenizer follows
the reference's rules instead: `[END]` depends on the other texts of the batch, and a second `[BEGIN]` may be added.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from tinymodel_jax.text.tokenizer import Tokenizer

_DIVIDER = "<|endoftext|>"


def refuse_divider(line: str, name: str) -> None:
    """Refuse the divider of multi-line stories in a file that holds one story per line.

    Args:
        name: what to call the line in the error message.

    Raises:
        ValueError: the line is `<|endoftext|>` alone.
    """
    if line.startswith(_DIVIDER) and line.strip() == _DIVIDER:
        raise ValueError(
            f"{name} is {_DIVIDER!r}, which divides stories of several lines, but a .txt file holds one story per "
            "line. Use the .jsonl form of the data."
        )


def prompt_ids(tokenizer: Tokenizer, text: str, name: str = "the prompt") -> list[int]:
    """Return `[BEGIN]` and the ids of a text. The text may begin with the literal `[BEGIN]`, as decoded ids do.

    Args:
        name: what to call the text in error messages.

    Raises:
        TypeError: the text is not a str.
        ValueError: it holds a further `[BEGIN]`, an `[END]` or a `[PAD]`.
    """
    ids = tokenizer.encode(text, max_length=None)
    if ids[:1] == [tokenizer.begin_id]:
        ids = ids[1:]
    special = {tokenizer.begin_id: "[BEGIN]", tokenizer.end_id: "[END]", tokenizer.pad_id: "[PAD]"}
    if found := [token for id_, token in special.items() if id_ in ids]:
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise ValueError(
            f"{name} {shown!r} holds {' and '.join(found)}; the only special token that a text may hold is a "
            "[BEGIN] in front. Remove what is there, or give token ids instead of text."
        )
    return [tokenizer.begin_id, *ids]


def prompt_rows(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> Int32[np.ndarray, "prompts seq"]:
    """Return prompts as rows, padded with `[PAD]` to the longest.

    Raises:
        TypeError: as `prompt_ids`.
        ValueError: as `prompt_ids`, or a prompt has more than `max_length` tokens.
    """
    rows = [prompt_ids(tokenizer, text) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) > max_length:
            raise ValueError(
                f"the prompt {text[:30]!r}… has {len(row)} tokens with [BEGIN]; the context is {max_length}. "
                "Shorten it."
            )
    return _padded(rows, max(map(len, rows), default=0), tokenizer.pad_id)


def story_ids(tokenizer: Tokenizer, text: str, max_length: int | None, name: str = "the story") -> list[int]:
    """Return `[BEGIN]`, the ids of a story and `[END]`, cut to `max_length`; a story that is cut has no `[END]`.

    Raises:
        TypeError, ValueError: as `prompt_ids`.
    """
    return [*prompt_ids(tokenizer, text, name), tokenizer.end_id][:max_length]


def story_rows(
    tokenizer: Tokenizer, texts: Sequence[str], max_length: int, width: int | None = None, name: str = "story"
) -> Int32[np.ndarray, "stories seq"]:
    """Return stories as rows, padded with `[PAD]` to the longest or to `width`.

    Args:
        max_length: maximum number of tokens per row, including special ones.
        name: what to call a text in error messages, before its number, which starts at 1.

    Raises:
        TypeError, ValueError: as `prompt_ids`.
    """
    rows = [story_ids(tokenizer, text, max_length, f"{name} {number}") for number, text in enumerate(texts, 1)]
    return _padded(rows, width or max(map(len, rows), default=0), tokenizer.pad_id)


def _padded(rows: Sequence[Sequence[int]], width: int, pad_id: int) -> np.ndarray:
    padded = np.full((len(rows), width), pad_id, np.int32)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return padded

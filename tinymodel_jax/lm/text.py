"""Text as token ids, and back. `TinyModel` has these functions as methods, with the names of TransformerLens.

All methods and analyses that take token ids also take text. A prompt becomes `[BEGIN]` and its ids (`to_tokens`). A
story, in functions that read rows of data, becomes `[BEGIN]`, its ids and `[END]`, cut to the context (`rows_of`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from jaxtyping import Int32

from tinymodel_jax.text.prompts_and_stories import prompt_rows, story_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tinymodel_jax.lm.tiny_model import TinyModel


def to_tokens(lm: TinyModel, text: Any, prepend_bos: bool = True) -> Any:
    """Return the token ids of texts: int32 (batch, seq), right-padded with `[PAD]`. Token ids are returned unchanged.

    Args:
        text: one text, which gives a batch of one, or a list of texts.
        prepend_bos: start each row with `[BEGIN]`. A text may also start with the literal `[BEGIN]`.

    Raises:
        ValueError: a text does not fit the context or holds another special token, or the model has no tokenizer.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> lm = TinyModel("mini")
        >>> lm.to_tokens(["The dog ran", "The dog"]).shape
        (2, 4)
        >>> lm.to_tokens("The dog", prepend_bos=False).shape
        (1, 2)
    """
    if not _is_text(text):
        return text
    rows = prompt_rows(lm.tokenizer, [text] if isinstance(text, str) else list(text), lm.config.n_ctx)
    return rows if prepend_bos else rows[:, 1:]


def to_str_tokens(lm: TinyModel, text_or_ids: Any, prepend_bos: bool = True) -> list[Any]:
    """Return the text of each token: a list of str, or a list of such lists for several texts or rows of ids.

    Args:
        text_or_ids: one text or several; ids (seq,), (1, seq) or (batch, seq), whose special tokens are included.
        prepend_bos: start the tokens of a text with `[BEGIN]`.

    Raises:
        ValueError: as `to_tokens`, or an id is not in the vocabulary.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> lm = TinyModel("mini")
        >>> lm.to_str_tokens("The dog ran")
        ['[BEGIN]', 'The', ' dog', ' ran']
    """
    if _is_text(text_or_ids) and not isinstance(text_or_ids, str):
        return [to_str_tokens(lm, text, prepend_bos) for text in text_or_ids]
    rows = np.asarray(to_tokens(lm, text_or_ids, prepend_bos))
    found: list[Any] = [lm.tokenizer.decode(row[:, None]) for row in np.atleast_2d(rows)]
    return found[0] if len(found) == 1 else found


def to_string(lm: TinyModel, tok_ids: Any) -> str | list[str]:
    """Return the text of an id or of ids (seq,), or a list of texts for (batch, seq); special tokens are included.

    Raises:
        ValueError: an id is not in the vocabulary.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> lm = TinyModel("mini")
        >>> lm.to_string(lm.to_tokens("The dog ran"))
        ['[BEGIN]The dog ran']
    """
    return lm.tokenizer.decode(tok_ids)


def to_single_token(lm: TinyModel, text: str) -> int:
    """Return the id of a text that is one token, such as `" dog"` with its space.

    Raises:
        ValueError: the text is not one token.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> lm = TinyModel("mini")
        >>> lm.to_string(lm.to_single_token(" dog"))
        ' dog'
    """
    ids = lm.tokenizer.encode(text, max_length=None)
    if len(ids) != 1:
        pieces = ", ".join(repr(lm.tokenizer.decode([i])) for i in ids)
        raise ValueError(f"{text!r} is {len(ids)} tokens ({pieces}); name one, as ' dog' with its space.")
    return ids[0]


def token_ids(lm: TinyModel, tokens: Any) -> Int32[np.ndarray, " tokens"]:
    """Return the ids of tokens that are named by their id or their text, alone or in a list.

    Raises:
        ValueError: there is none, a text is not one token, or an id is not in the vocabulary.
    """
    given = [tokens] if isinstance(tokens, str) or np.ndim(tokens) == 0 else list(tokens)
    found = np.array([to_single_token(lm, token) if isinstance(token, str) else token for token in given])
    if found.ndim != 1 or found.dtype.kind not in "iu" or (found < 0).any() or (found >= lm.config.d_vocab).any():
        raise ValueError(
            f"tokens={tokens!r:.80}; expected one or more ids, 0..{lm.config.d_vocab - 1}, or texts of one token."
        )
    return found.astype(np.int32)


def rows_of(lm: TinyModel, rows: Any) -> Any:
    """Return stories as rows of token ids, `[BEGIN] story [END]` cut to the context; ids are returned unchanged.

    Args:
        rows: one story or several, or token ids.

    Raises:
        ValueError: a story holds a special token, or the model has no tokenizer.
    """
    if not _is_text(rows):
        return rows
    return story_rows(lm.tokenizer, [rows] if isinstance(rows, str) else list(rows), lm.config.n_ctx)


def _is_text(value: Any) -> TypeGuard[str | Sequence[str]]:
    """Whether a value is a text, or a list, tuple or array of nothing but texts."""
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype.kind in "UO"):
        return len(value) > 0 and all(isinstance(item, str) for item in value)
    return isinstance(value, str)

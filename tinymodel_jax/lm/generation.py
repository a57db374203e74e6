"""Generation: text in, text out, or ids in, ids out. `TinyModel` has these functions as methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tinymodel_jax.model.generate import continue_prompts, strip_padding
from tinymodel_jax.model.padding import check_tok_ids
from tinymodel_jax.text.prompts_and_stories import prompt_rows

if TYPE_CHECKING:
    from tinymodel_jax.lm.tiny_model import TinyModel


def generate(
    lm: TinyModel,
    prompt: str | Sequence[str],
    n_toks: int = 50,
    temperature: float = 0.8,
    break_on_end: bool = True,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str | list[str]:
    """Continue a prompt, or several in one batch; return prompts and continuations as text.

    Args:
        prompt: one text or several. `[BEGIN]` is put in front of a text that does not start with it; other special
            tokens are errors, so remove the `[END]` of a finished story to continue it.
        n_toks: maximum number of tokens to add; a row also stops when the context is full.
        temperature: divisor of the logits; 0 takes the most likely token.
        break_on_end: stop a row at `[END]`, which stays in the text.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the smallest set of most likely tokens whose probabilities sum to this.
        seed: seed of the random draws, 0 to 2**32 - 1. Each row of a batch draws differently.

    Raises:
        ValueError: a prompt is longer than the context, is not a text, or holds `[END]`, `[PAD]` or a second
            `[BEGIN]`; or an option is out of range.
    """
    if not isinstance(prompt, Iterable):
        raise ValueError(f"generate takes a text or a list of texts, got {prompt!r:.80}.")
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts:
        return []
    ids = prompt_rows(lm.tokenizer, texts, lm.config.n_ctx)
    out = generate_ids(lm, ids, n_toks, temperature, break_on_end, top_k=top_k, top_p=top_p, seed=seed)
    stories = [str(lm.tokenizer.decode(strip_padding(row, lm.config.pad_id)[1:])) for row in out]
    return stories[0] if isinstance(prompt, str) else stories


def generate_ids(
    lm: TinyModel,
    tok_ids: Any,
    n_toks: int = 50,
    temperature: float = 0.8,
    break_on_end: bool = True,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Continue rows of token ids; return int32 (batch, prompt + generated), right-padded with `[PAD]`.

    Rows may be right-padded with `[PAD]`; each is continued after its last real token. A row that ends with
    `[END]`, which the tokenizer puts after the shorter rows of a batch, is finished unless `break_on_end=False`.
    The options are those of `generate`.
    """
    ids = check_tok_ids(lm.to_tokens(tok_ids), lm.config)
    end_id = lm.config.end_id if break_on_end else None
    return continue_prompts(lm.hooked(), ids, n_toks, temperature, end_id, top_k, top_p, seed)

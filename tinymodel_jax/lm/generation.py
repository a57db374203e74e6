"""Generation: text in, text out, or ids in, ids out. `TinyModel` has these functions as methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinymodel_jax.model.generate import EditedPositions, continue_in_steps, strip_padding
from tinymodel_jax.model.hook_points import Hook
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
    hooks: Mapping[str, Hook] | None = None,
    positions: EditedPositions = "all",
    same_noise: bool = False,
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
        hooks: hook name -> edit, as `run_with_hooks` takes them. A (batch, 1, width) array gives each row its own
            value; for several values on one prompt, repeat the prompt: `[prompt] * 5`.
        positions: where the edits act: on the `"prompt"`, on the `"generated"` tokens, or on `"all"`. Masks and arrays
            over positions are those of the prompts, `[BEGIN]` included and padded to the longest. At generated tokens,
            edits act without their masks; an array over positions has no value there and needs `"prompt"`. Splices act
            everywhere.
        same_noise: all rows draw the same random numbers, so that rows of one prompt differ by the edit only.

    Raises:
        ValueError: a prompt is longer than the context, is not a text, or holds `[END]`, `[PAD]` or a second
            `[BEGIN]`; an option is out of range; or an edit does not fit the prompts.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> lm = TinyModel("mini")
        >>> lm.generate("Once upon a time", n_toks=5, temperature=0)
        'Once upon a time, there was a young'
        >>> stories = lm.generate(["The dog", "The cat"], n_toks=5, seed=1)
        >>> [len(lm.to_str_tokens(story)) for story in stories]
        [8, 8]
    """
    if not isinstance(prompt, Iterable):
        raise ValueError(f"generate takes a text or a list of texts, got {prompt!r:.80}.")
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts:
        return []
    ids = prompt_rows(lm.tokenizer, texts, lm.config.n_ctx)
    options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "seed": seed}
    edits: dict[str, Any] = {"hooks": hooks, "positions": positions, "same_noise": same_noise}
    out = generate_ids(lm, ids, n_toks, temperature, break_on_end, **options, **edits)
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
    hooks: Mapping[str, Hook] | None = None,
    positions: EditedPositions = "all",
    same_noise: bool = False,
    return_logprobs: bool = False,
) -> Any:
    """Continue rows of token ids; return int32 (batch, prompt + generated), right-padded with `[PAD]`.

    Rows may be right-padded with `[PAD]`; each is continued after its last real token. A row that ends with
    `[END]`, which the tokenizer puts after the shorter rows of a batch, is finished unless `break_on_end=False`.

    Args:
        return_logprobs: also return float32 log-probabilities in nats, of the shape of the ids: that of each generated
            token under the edited model, before temperature, top-k and top-p; NaN at the prompt and at `[PAD]`.

    The other options are those of `generate`.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> lm = TinyModel("mini")
        >>> ids, logprobs = lm.generate_ids("Once upon a time", n_toks=5, temperature=0, return_logprobs=True)
        >>> ids.shape == logprobs.shape
        True
    """
    ids = check_tok_ids(lm.to_tokens(tok_ids), lm.config)
    end_id = lm.config.end_id if break_on_end else None
    edits: dict[str, Any] = {"hooks": hooks, "positions": positions, "same_noise": same_noise}
    steps = continue_in_steps(
        lm.hooked(), ids, n_toks, temperature, end_id, top_k, top_p, seed, **edits, return_logprobs=return_logprobs
    )
    (end,) = steps
    return end.tok_ids if end.logprobs is None else (end.tok_ids, end.logprobs)

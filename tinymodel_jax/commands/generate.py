"""`tinymodel generate`."""

from __future__ import annotations

from pathlib import Path

from tinymodel_jax.commands.frame import print_json
from tinymodel_jax.commands.inputs import Prompts, read_prompts, shown, token_rows
from tinymodel_jax.commands.options import Model, ModelOptions, require_positive


def generate(
    prompts: Prompts = (),
    *,
    model: Model = ModelOptions(),
    n_toks: int = 50,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stories: Path | None = None,
    limit: int = 8,
    prompt_toks: int = 16,
    ids: bool = False,
    json: bool = False,
) -> None:
    """Continue prompts.

    Args:
        prompts: texts to continue, all in one batch. Remove the [END] of a finished story first.
        n_toks: largest number of tokens to add.
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the smallest set of tokens whose probabilities sum to this.
        seed: seed of the sampling.
        stories: file of stories to continue: .jsonl with "text", or .txt with one story per line; also .gz.
        limit: largest number of stories to read.
        prompt_toks: length of the prompt taken from each story, [BEGIN] included.
        ids: read prompts as token ids, such as "9996 51 56", and print ids.
        json: print one JSON object per line.
    """
    texts, from_file = read_prompts(prompts, stories, limit, ids)
    require_positive("--prompt-toks", prompt_toks)
    from tinymodel_jax.model.generate import check_options, strip_padding  # JAX loads here, not for --help

    check_options(n_toks, temperature, top_k, top_p, seed)
    lm = model.load()
    rows = [*token_rows(lm, texts), *(row[:prompt_toks] for row in token_rows(lm, from_file))]
    width = max(map(len, rows))
    padded = [[*row, *[lm.config.pad_id] * (width - len(row))] for row in rows]
    out = lm.generate_ids(padded, n_toks, temperature, top_k=top_k, top_p=top_p, seed=seed)
    for row, continued in zip(rows, out, strict=True):
        kept = strip_padding(continued, lm.config.pad_id).tolist()
        if json:
            print_json({"prompt": shown(lm, row, ids), "text": shown(lm, kept, ids), "tok_ids": kept})
        else:
            print(shown(lm, kept, ids))

"""`tinymodel generate`."""

from __future__ import annotations

from pathlib import Path

from tinymodel_jax.commands.frame import print_json
from tinymodel_jax.commands.prompts import Prompts, load_lm, read_prompts, shown, token_rows


def generate(
    prompts: Prompts = (),
    *,
    model: str = "tiny_model",
    n_toks: int = 50,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stories: Path | None = None,
    limit: int = 8,
    prompt_toks: int = 16,
    ids: bool = False,
    n_heads: int | None = None,
    json: bool = False,
) -> None:
    """Continue prompts.

    Args:
        prompts: texts to continue, all in one batch; a finished story has to lose its [END] first.
        model: published name, folder, or file (.pt, .safetensors) with the reference's names.
        n_toks: tokens to add at most.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the fewest tokens whose probabilities reach this sum.
        seed: of the random draws.
        stories: file of stories (.jsonl with "text", .txt with a story a line, also .gz) whose beginnings to continue.
        limit: stories to read at most.
        prompt_toks: tokens of each story that make its prompt, [BEGIN] included; no [END] follows a short one.
        ids: prompts are token ids, as "9996 51 56", and so is the answer.
        n_heads: attention heads of a file whose width is not the published 768.
        json: print a JSON object a line.
    """
    given, told = read_prompts(prompts, stories, limit, ids)
    if prompt_toks < 1:
        raise ValueError(f"--prompt-toks {prompt_toks} must be 1 or more.")
    from tinymodel_jax.model.generate import check_options, strip_padding  # JAX loads here, not for --help

    check_options(n_toks, temperature, top_k, top_p, seed)
    lm = load_lm(model, n_heads)
    rows = [*token_rows(lm, given), *(row[:prompt_toks] for row in token_rows(lm, told))]
    width = max(map(len, rows))
    padded = [[*row, *[lm.config.pad_id] * (width - len(row))] for row in rows]
    out = lm.generate_ids(padded, n_toks, temperature, top_k=top_k, top_p=top_p, seed=seed)
    for row, continued in zip(rows, out, strict=True):
        kept = strip_padding(continued, lm.config.pad_id).tolist()
        if json:
            print_json({"prompt": shown(lm, row, ids), "text": shown(lm, kept, ids), "tok_ids": kept})
        else:
            print(shown(lm, kept, ids))

"""`tinymodel generate`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tinymodel_jax.commands.frame import print_json
from tinymodel_jax.commands.inputs import Prompts, read_prompts, shown, token_rows
from tinymodel_jax.commands.options import Model, ModelOptions, require_positive
from tinymodel_jax.dictionaries.sites import Site

if TYPE_CHECKING:
    from tinymodel_jax.lm import TinyModel
    from tinymodel_jax.model.generate import Continued
    from tinymodel_jax.model.hook_points import Hooks

STREAMED_TOKENS = 4
"""Tokens between two updates on a terminal."""
FeatureEdits = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="M2N5=1")]
Features = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="M2N5")]
Amounts = Mapping[str, Mapping[int, float]]
"""Site -> feature -> number."""


def generate(
    prompts: Prompts = (),
    *,
    model: Model = ModelOptions(),
    n_toks: int = 50,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    steer: FeatureEdits = (),
    ablate: Features = (),
    clamp: FeatureEdits = (),
    stories: Path | None = None,
    limit: int = 8,
    prompt_toks: int = 16,
    ids: bool = False,
    json: bool = False,
) -> None:
    """Continue prompts. On a terminal, the text is printed as it is generated.

    --steer, --ablate and --clamp edit features of the model's dictionaries at every token that the dictionary does not
    exclude; each may be repeated.

    Args:
        prompts: texts to continue, all in one batch. Remove the [END] of a finished story first.
        n_toks: largest number of tokens to add.
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the smallest set of tokens whose probabilities sum to this.
        seed: seed of the sampling, 0 to 4294967295; the same seed gives the same text.
        steer: add a number times a feature's decoder direction, as if its activation were higher by that number.
        ablate: set a feature's activation to zero.
        clamp: set a feature's activation to a number, also where it is inactive.
        stories: file of stories to continue: .jsonl with "text", or .txt with one story per line; also .gz.
        limit: largest number of stories to read.
        prompt_toks: length of the prompt taken from each story, [BEGIN] included.
        ids: read each prompt as token ids, such as "9996 51 56" with [BEGIN] first, and print ids instead of text.
        json: print one JSON object per line: prompt, text, tok_ids.
    """
    texts, from_file = read_prompts(prompts, stories, limit, ids)
    require_positive("--prompt-toks", prompt_toks)
    for given in ablate:
        if "=" in given:
            raise ValueError(
                f"--ablate {given}: an ablation sets the activation to 0 and takes no number; give "
                f"--ablate {given.partition('=')[0]}, or --clamp {given}."
            )
    added, held = _parse({"--steer": steer}), _parse({"--clamp": clamp, "--ablate": ablate})
    from tinymodel_jax.model.generate import continue_in_steps, strip_padding  # JAX loads here, not for --help
    from tinymodel_jax.model.padding import check_tok_ids
    from tinymodel_jax.model.sampling import check_options

    check_options(n_toks, temperature, top_k, top_p, seed)
    lm = model.load()
    rows = [*token_rows(lm, texts), *(row[:prompt_toks] for row in token_rows(lm, from_file))]
    width = max(map(len, rows))
    padded = check_tok_ids([[*row, *[lm.config.pad_id] * (width - len(row))] for row in rows], lm.config)
    options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "seed": seed, "hooks": _hooks(lm, added, held)}
    streams = sys.stdout.isatty() and not json
    every = STREAMED_TOKENS if streams else None
    steps = continue_in_steps(lm.hooked(), padded, n_toks, temperature, lm.config.end_id, every=every, **options)
    if streams:
        return _print_as_it_grows(lm, steps, ids)
    (end,) = steps
    for row, continued in zip(rows, end.tok_ids, strict=True):
        kept = strip_padding(continued, lm.config.pad_id).tolist()
        if json:
            print_json({"prompt": shown(lm, row, ids), "text": shown(lm, kept, ids), "tok_ids": kept})
        else:
            print(shown(lm, kept, ids))


def _print_as_it_grows(lm: TinyModel, steps: Iterable[Continued], ids: bool) -> None:
    """Print the rows one after the other, each as far as it is known."""
    from tinymodel_jax.model.generate import strip_padding

    row = printed = 0
    last: Continued | None = None

    def print_more(step: Continued, is_complete: bool) -> None:
        nonlocal printed
        text = shown(lm, strip_padding(step.tok_ids[row], lm.config.pad_id).tolist(), ids)
        text = text if is_complete else text.rstrip("\ufffd")  # a character whose other bytes are still to come
        print(text[printed:], end="\n" if is_complete else "", flush=True)
        printed = len(text)

    for last in steps:
        while row < len(last.done) - 1 and last.done[row]:
            print_more(last, True)
            row, printed = row + 1, 0
        print_more(last, False)
    while last is not None and row < len(last.done):
        print_more(last, True)
        row, printed = row + 1, 0


def _parse(given: Mapping[str, Sequence[str]]) -> dict[str, dict[int, float]]:
    """Return the numbers of features given to options as `M2N5=1`, or as `M2N5` to `--ablate`, which sets 0.

    Raises:
        ValueError: a text has another form, or a feature is named twice.
    """
    found: dict[str, dict[int, float]] = {}
    for option, text in ((option, text) for option, texts in given.items() for text in texts):
        tag, number = (text, 0.0) if option == "--ablate" else _tag_and_number(option, text)
        try:
            site, feature = Site.parse(tag)
        except ValueError as error:
            raise ValueError(f"{option} {text}: {error}") from error
        if feature is None:
            raise ValueError(f"{option} {text}: {tag} is a whole dictionary; name a feature, such as {tag}N123.")
        if feature in found.setdefault(site.tag, {}):
            raise ValueError(f"{option} {text}: {tag} is named twice; give each feature one value.")
        found[site.tag][feature] = number
    return found


def _tag_and_number(option: str, text: str) -> tuple[str, float]:
    tag, _, number = text.rpartition("=")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if not tag or not math.isfinite(amount):
        raise ValueError(f"{option} {text}: expected a feature and a number, such as M2N123=4.0.")
    return tag, amount


def _hooks(lm: TinyModel, added: Amounts, held: Amounts) -> Hooks:
    """Return the edits: activations are set first, and then increased.

    Raises:
        ValueError: a site has no dictionary, or the dictionary lacks a feature.
    """
    import numpy as np

    from tinymodel_jax.model import interventions

    edits = []
    for edit, sites in ((interventions.clamp, held), (interventions.steer_features, added)):
        for site, amounts in sites.items():
            for feature in amounts:
                lm[f"{site}N{feature}"]  # checks the feature
            values = np.array([*amounts.values()], np.float32)
            edits.append(edit(lm[site].dictionary, [*amounts], values))
    return interventions.combine(*edits)

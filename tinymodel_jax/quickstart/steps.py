"""The first four steps: a story, the features behind its words, a sweep over them, and one turned off and one up.

Each shows a screen of text and returns what the page shows of it.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from rich.console import Console

from tinymodel_jax.analysis.effects import sweeps
from tinymodel_jax.analysis.report.charts import bars
from tinymodel_jax.analysis.report.page import token_text
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.generate import continue_prompts
from tinymodel_jax.model.interventions import ablate, clamp
from tinymodel_jax.quickstart.named_features import NAMED_FROM, SITE, Named
from tinymodel_jax.runtime.progress import with_progress
from tinymodel_jax.text.prompts_and_stories import prompt_ids

PROMPT = "Once upon a time"
STORY_TOKENS, CONTINUATION_TOKENS = 250, 40
TURNED_UP = "plot."
"""Concepts, of whose features the one is turned up that changes the next word most."""
STRONG = 0.9
"""Quantile of its activations where it is active, at which that feature is held."""


def tell(lm: TinyModel, seed: int, console: Console) -> list[int]:
    """Return the ids of a story without special tokens."""
    console.rule("1 · The bundled model tells a story")
    begin = prompt_ids(lm.tokenizer, PROMPT)
    row = lm.generate_ids([begin], STORY_TOKENS, 0.6, seed=seed)[0]
    story = [int(i) for i in row if lm.config.is_text(i)]
    console.print(lm.tokenizer.decode(story), markup=False, highlight=False)
    return story


def open_place(lm: TinyModel, story: list[int]) -> int:
    """Return the place after the first paragraph, where the plot is open; without one, a quarter into the story."""
    ends = [place for place, token in enumerate(story) if "\n" in lm.tokenizer.decode([token])]
    quarter = max(1, len(story) // 4)
    return ends[0] + 1 if ends and ends[0] < 2 * quarter else quarter


def show_features(
    lm: TinyModel, story: list[int], acts: np.ndarray, named: Named, console: Console
) -> list[list[tuple[int, float]]]:
    """Return the strongest features of each token of the story, whose activations are `acts`."""
    telling = acts * -np.log(np.clip(named.density, 1e-4, 1))  # features that are active everywhere say little
    strongest = [
        [(int(f), float(row[f])) for f in np.argsort(-weight, kind="stable")[:5] if row[f] > 0]
        for row, weight in zip(acts, telling, strict=True)
    ]
    console.print(
        f"The features of {SITE} that are most active on the first words, weighted by how rare they are, and the "
        "concept that each tells best (F1):"
    )
    for token, found in list(zip(story, strongest, strict=True))[:14]:
        texts = [named.label(f) for f, _ in found[:3]]
        word = repr(lm.tokenizer.decode([token]))
        console.print(f"  {word:<12} {' · '.join(texts)}", markup=False, highlight=False, soft_wrap=True)
    return strongest


def sweep(lm: TinyModel, prompt: list[int], named: Named, console: Console) -> dict[str, Any]:
    """Turn off every active feature on the prompt, one at a time, and chart what that does to the next word."""
    console.rule("3 · Which features matter for the next word")
    row = [lm.config.begin_id, *prompt]
    start = time.monotonic()
    token = int(np.asarray(lm([row]))[0, -1].argmax())
    text = token_text(lm.tokenizer.decode([token]))
    console.print(f"…{lm.tokenizer.decode(prompt)[-90:]!r} goes on with {text!r}.", markup=False)
    console.print("Turning off every active feature, one at a time (compiling takes most of it) …")
    effects = sweeps.ablate(lm, SITE, [row], next_ids=[token])
    seconds = time.monotonic() - start
    order = np.argsort(effects.next_logprob)
    chosen = [*order[:9], *order[-3:]]
    values = {named.label(int(effects.features[i])): float(effects.next_logprob[i]) for i in chosen}
    console.print(f"{len(order)} features turned off one at a time, in few compiled calls, {seconds:.1f} s.")
    console.print(f"What that does to the log-probability of {text!r}:", markup=False, highlight=False)
    for name, value in values.items():
        console.print(f"  {value:+.3f} nats  {name}", markup=False, highlight=False)
    return {
        "n_active": len(order),
        "seconds": seconds,
        "token": text,
        "strongest": effects.features[order[0]],
        "chart": bars(
            values, f"change of the log-probability of {text!r} (nats)", "What turning each feature off does"
        ),
    }


def edit_features(lm: TinyModel, prompt: list[int], named: Named, off: int, console: Console) -> dict[str, Any]:
    """Continue the prompt as it is, with a feature off, and with one turned up."""
    console.rule("4 · One feature off, one turned up")
    row = np.array([[lm.config.begin_id, *prompt]], np.int32)
    up, value = _feature_to_turn_up(lm, row, named, off)
    dictionary = lm[SITE].dictionary
    hooks = {
        "as it is": {},
        f"feature {off} off": ablate(dictionary, off),
        f"feature {up} up": clamp(dictionary, up, value),
    }
    titles = {
        "as it is": "The model as it is",
        f"feature {off} off": f"Feature {named.label(off)} turned off: it mattered most for the next word",
        f"feature {up} up": f"Feature {named.label(up)} held at {value:.1f}, which it seldom exceeds",
    }
    runs, probabilities = [], []
    for short, edit in with_progress(list(hooks.items()), "continuing the story"):
        out = continue_prompts(lm.hooked().with_hooks(edit), row, CONTINUATION_TOKENS, 0.0, lm.config.end_id)
        text = lm.tokenizer.decode([int(i) for i in out[0, row.shape[1] :] if lm.config.is_text(i)])
        runs.append({"short": short, "title": titles[short], "text": text.replace("\n", " ↵ ").strip()})
        probabilities.append(np.exp(np.asarray(lm.run_with_hooks(row, edit)[0])[0, -1]))
    for run in runs:
        console.print(f"[bold]{run['title']}[/bold]")
        console.print(f"  {run['text']}", markup=False, highlight=False)
    likely = np.argsort(-np.max(probabilities, axis=0))[:6]
    return {
        "prompt_end": lm.tokenizer.decode(prompt)[-90:],
        "runs": runs,
        "next": [
            {"token": token_text(lm.tokenizer.decode([int(i)])), "probabilities": [float(p[i]) for p in probabilities]}
            for i in likely
        ],
    }


def _feature_to_turn_up(lm: TinyModel, row: np.ndarray, named: Named, other: int) -> tuple[int, float]:
    """Return a feature of those that name a concept of `TURNED_UP`, and its `STRONG` activation.

    It is the one that, held there, changes the next word most.
    """
    free = np.arange(len(named.f1)) != other
    wanted = free & (named.f1 >= NAMED_FROM) & np.char.startswith(named.concept, TURNED_UP)
    candidates = np.flatnonzero(wanted).tolist() or [int(np.where(free, named.f1, -1).argmax())]
    values = [
        float(np.quantile(acts[acts > 0], STRONG)) for acts in (named.acts[..., f][named.real] for f in candidates)
    ]
    tried = with_progress(list(zip(candidates, values, strict=True)), "trying features to turn up")
    held = [float(sweeps.clamp(lm, SITE, row, value, feature).kl[0]) for feature, value in tried]
    most = int(np.argmax(held))
    return candidates[most], values[most]

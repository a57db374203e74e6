"""The six steps of `tinymodel quickstart`: each prints a screen of text, and returns what the page shows.

They use the package as any program would, so they can be read as an example.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from rich.console import Console

from tinymodel_jax.analysis.concepts.labels import NAMED_FROM, concepts_of_units
from tinymodel_jax.analysis.concepts.recovery import concept_table, n_found, recover_concepts
from tinymodel_jax.analysis.effects import sweeps
from tinymodel_jax.analysis.evaluation.evaluation import evaluate
from tinymodel_jax.analysis.report.charts import bars, heat_map, training_curve
from tinymodel_jax.analysis.report.page import token_text
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.interventions import ablate, clamp
from tinymodel_jax.runtime.compilation import fast_compiler_options
from tinymodel_jax.runtime.progress import with_progress
from tinymodel_jax.text.prompts_and_stories import prompt_ids, story_rows
from tinymodel_jax.training.data import batch_indices
from tinymodel_jax.training.dictionary_recipe import recipe_preset
from tinymodel_jax.training.dictionary_state import ActivationStatistics, finalize, init_state
from tinymodel_jax.training.dictionary_step import train_step
from tinymodel_jax.training.site_activations import site_vectors

PROMPT = "Once upon a time"
STORY_TOKENS, CONTINUATION_TOKENS = 250, 40
SITE = "Rm2"
"""Site whose features are shown: an SAE of the residual stream."""
TURNED_UP = "plot."
"""Prefix of the concepts among whose features one is turned up: the one that changes the next word most."""
STRONG = 0.9
"""Quantile of that feature's activations, where it is active, at which it is held."""
TRAINED = "M2"
"""Site at which the transcoder is trained."""
SHORT_TRAINING_RATE = 6e-3
"""Its learning rate: 260 steps explain more at this one than at the recipe's 4e-3 (benchmarks/RESULTS.md)."""
JUST_NOW = "trained just now"
"""Name of the trained transcoder, next to the bundled one."""


@dataclass(frozen=True)
class Amounts:
    """How much a run reads and trains on; the defaults train for about a minute on two CPU cores."""

    labelled: int = 120
    """Stories on which features are named and concepts are scored."""
    held_out: int = 64
    """Stories on which the trained dictionary is measured."""
    trained_stories: int = 6_000
    """Stories on which it is trained."""
    steps: int = 260
    """Training steps."""
    batch: int = 4096
    """Tokens per step."""
    stories_per_step: int = 22
    """Stories from which these tokens are drawn."""
    scored: tuple[str, ...] = ("Rm0", "Rm1", "Rm3", TRAINED)
    """Dictionaries in which concepts are looked for, besides that of `SITE`; `TRAINED` is one of them."""


@dataclass
class Named:
    """Features of a dictionary, with the concepts that they detect on labelled stories."""

    tok_ids: np.ndarray
    """(stories, seq)."""
    acts: np.ndarray
    """(stories, seq, features)."""
    real: np.ndarray
    """(stories, seq): whether the token is text."""
    concept: list[str]
    """(features): the concept that each feature detects best."""
    f1: np.ndarray
    """(features): its F1, on the same stories (nothing is held out)."""
    density: np.ndarray
    """(features): share of the tokens at which each is active."""

    def label(self, feature: int) -> str:
        """Return the feature's number, with its concept and F1 if the F1 is high enough."""
        f1 = self.f1[feature]
        return f"{feature} {self.concept[feature]} ({f1:.2f})" if f1 >= NAMED_FROM else f"{feature} (no name)"


def tell(lm: TinyModel, seed: int, console: Console) -> list[int]:
    """Return the ids of a story without special tokens."""
    console.rule("1 · The bundled model tells a story")
    begin = prompt_ids(lm.tokenizer, PROMPT)
    row = lm.generate_ids([begin], STORY_TOKENS, 0.6, seed=seed)[0]
    story = [int(i) for i in row if lm.config.is_text(i)]
    console.print(lm.tokenizer.decode(story), markup=False, highlight=False)
    return story


def name_features(lm: TinyModel, labelled: Sequence[storyworld.Story], console: Console) -> Named:
    """Find the concept that each feature of `SITE` detects best, on stories with known concepts at every token."""
    console.rule("2 · What the features mean")
    tok_ids = full_rows(lm, [story.text for story in labelled])
    truth = storyworld.labels(labelled, lm.tokenizer, width=tok_ids.shape[1])
    reader = lm[SITE]
    starts = with_progress(range(0, len(labelled), 12), "reading labelled stories")
    acts = np.concatenate([np.asarray(reader(tok_ids[start : start + 12])) for start in starts])
    real = lm.config.is_text(tok_ids)
    best, f1 = concepts_of_units(acts[real], truth[real])
    names = list(storyworld.CONCEPTS)
    return Named(tok_ids, acts, real, [names[i] for i in best], f1, (acts[real] > 0).mean(axis=0))


def open_place(lm: TinyModel, story: list[int]) -> int:
    """Return the position after the first paragraph, where the plot is open, or else a quarter into the story."""
    ends = [position for position, token in enumerate(story) if "\n" in lm.tokenizer.decode([token])]
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
        "concept that each detects best (F1):"
    )
    for token, found in list(zip(story, strongest, strict=True))[:14]:
        texts = [named.label(f) for f, _ in found[:3]]
        word = repr(lm.tokenizer.decode([token]))
        console.print(f"  {word:<12} {' · '.join(texts)}", markup=False, highlight=False, soft_wrap=True)
    return strongest


def sweep(lm: TinyModel, prompt: list[int], named: Named, console: Console) -> dict[str, Any]:
    """Turn off every active feature on the prompt, one at a time, and chart the effect on the next word."""
    console.rule("3 · Which features matter for the next word")
    row = [lm.config.begin_id, *prompt]
    start = time.monotonic()
    token = int(np.asarray(lm([row]))[0, -1].argmax())
    text = token_text(lm.tokenizer.decode([token]))
    console.print(f"…{lm.tokenizer.decode(prompt)[-90:]!r} continues with {text!r}.", markup=False)
    console.print("Turning off every active feature, one at a time (most of the time is compilation) …")
    effects = sweeps.ablate(lm, SITE, [row], next_ids=[token])
    seconds = time.monotonic() - start
    order = np.argsort(effects.next_logprob)
    chosen = [*order[:9], *order[-3:]]
    values = {named.label(int(effects.features[i])): float(effects.next_logprob[i]) for i in chosen}
    console.print(f"{len(order)} features turned off one at a time, in a few compiled calls, in {seconds:.1f} s.")
    console.print(f"Effect on the log-probability of {text!r}:", markup=False, highlight=False)
    for name, value in values.items():
        console.print(f"  {value:+.3f} nats  {name}", markup=False, highlight=False)
    return {
        "n_active": len(order),
        "seconds": seconds,
        "token": text,
        "strongest": effects.features[order[0]],
        "chart": bars(
            values, f"change of the log-probability of {text!r} (nats)", "The effect of turning each feature off"
        ),
    }


def edit_features(lm: TinyModel, prompt: list[int], named: Named, off: int, console: Console) -> dict[str, Any]:
    """Continue the prompt with the model unchanged, with one feature off, and with one turned up."""
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
        f"feature {up} up": f"Feature {named.label(up)} held at {value:.1f}, which it rarely exceeds",
    }
    runs, probabilities = [], []
    for short, edit in with_progress(list(hooks.items()), "continuing the story"):
        out = lm.generate_ids(row, CONTINUATION_TOKENS, 0.0, hooks=edit)
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


def train_transcoder(lm: TinyModel, amounts: Amounts, seed: int, console: Console) -> dict[str, Any]:
    """Train a transcoder at `TRAINED` from scratch, and compare it with the bundled one."""
    console.rule("5 · A transcoder from scratch")
    site, bundled = lm[TRAINED].site, lm[TRAINED].dictionary
    numbers = with_progress(range(amounts.trained_stories), "telling stories")
    texts = [storyworld.story(seed + 1, number).text for number in numbers]
    data = full_rows(lm, texts)
    recipe = recipe_preset(
        "house",
        "batch_topk",
        bundled.config.n_features,
        amounts.steps,
        k=bundled.config.k,
        batch_size=amounts.batch,
        learning_rate=SHORT_TRAINING_RATE,
    )

    def vectors(step: Any, rows: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), step)
        return site_vectors(lm.params, lm.config, rows, [site], amounts.batch, key)[TRAINED]

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=fast_compiler_options())
    def step(state: Any, rows: Any) -> Any:
        x, y = vectors(state.step, rows)
        return train_step(state, recipe.hyper(), x, y, recipe=recipe)

    first = vectors(0, data[batch_indices(len(data), amounts.stories_per_step, seed, amounts.steps)])
    statistics = [ActivationStatistics.zero(part.shape[1]).update(part) for part in first]
    state = init_state(jax.random.key(seed), recipe, *statistics)
    history: list[dict[str, float]] = []
    start = time.monotonic()
    for i in with_progress(range(amounts.steps), lambda: _how_it_stands(history)):
        state, metrics = step(state, data[batch_indices(len(data), amounts.stories_per_step, seed, i)])
        history.append({name: float(metrics[name]) for name in ("explained_variance", "l0", "dead_fraction")})
    seconds = time.monotonic() - start
    trained = Dictionary.from_params(*finalize(state, recipe, site.hook_in, site.hook_out))
    sentence = (
        f"{amounts.steps} steps of {amounts.batch:,} tokens took {seconds:.0f} s: a batch_topk transcoder of "
        f"{recipe.n_features} features at {TRAINED}, k {recipe.k}, with the recipe house and a "
        f"learning rate of {recipe.learning_rate:g}."
    )
    console.print(sentence)
    held_out = full_rows(
        lm, [s.text for s in storyworld.stories(0, amounts.held_out, storyworld.FIRST_UNSEEN + amounts.labelled)]
    )
    evaluations = evaluate(lm, [trained, bundled], held_out, track=with_progress)
    curve = training_curve(
        range(1, amounts.steps + 1), [h["explained_variance"] for h in history], [h["l0"] for h in history]
    )
    rows = [{"name": name, **e._asdict()} for name, e in zip((JUST_NOW, "bundled"), evaluations, strict=True)]
    return {"sentence": sentence, "chart": curve, "rows": rows, "dictionary": trained}


def count_concepts(
    lm: TinyModel,
    scored: Sequence[str],
    labelled: Sequence[storyworld.Story],
    training: dict[str, Any] | None,
    console: Console,
) -> dict[str, Any]:
    """Count the concepts that dictionaries, neurons and random directions found."""
    console.rule("6 · How many of the known concepts were found")
    others = {tag: lm[tag].dictionary for tag in scored}
    if training is not None:
        others[JUST_NOW] = training["dictionary"]
    found = [
        *recover_concepts(lm, labelled, [SITE], track=with_progress),
        *recover_concepts(lm, labelled, others, baselines=False, track=with_progress),
    ]
    if training is not None:
        concepts = {recovery.name: n_found(recovery) for recovery in found}
        for row in training["rows"]:
            row["concepts"] = concepts[JUST_NOW if row["name"] == JUST_NOW else TRAINED]
            console.print(
                f"{row['name']}: L0 {row['l0']:.1f}, explained variance {row['explained_variance']:.3f}, "
                f"CE recovered {row['ce_recovered']:.3f}, {row['dead_fraction']:.1%} dead, {row['concepts']} of "
                f"{len(storyworld.CONCEPTS)} concepts with F1 of 0.8 or more",
                highlight=False,
            )
    counts = [{"name": recovery.name, "found": n_found(recovery)} for recovery in found]
    console.print("Concepts found, F1 of 0.8 or more: ", end="", highlight=False)
    console.print("; ".join(f"{count['name']} {count['found']}" for count in counts), highlight=False)
    console.print(
        "Transcoders (M) explain what an MLP does, not what the stream holds, so they find fewer.", highlight=False
    )
    chart = heat_map(*concept_table(found), "F1 of the best unit")
    return {"counts": counts, "chart": chart}


def full_rows(lm: TinyModel, texts: Sequence[str]) -> np.ndarray:
    """Return token ids (texts, n_ctx), padded with `[PAD]`."""
    return story_rows(lm.tokenizer, texts, lm.config.n_ctx, width=lm.config.n_ctx)


def _feature_to_turn_up(lm: TinyModel, row: np.ndarray, named: Named, other: int) -> tuple[int, float]:
    """Return the feature to turn up and the activation at which to hold it.

    Among the features that detect a concept of `TURNED_UP`, each held at its `STRONG` quantile, it is the one that
    changes the next word most.
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


def _how_it_stands(history: list[dict[str, float]]) -> str:
    if not history:
        return "compiling"
    return f"training, L0 {history[-1]['l0']:.1f}, explained variance {history[-1]['explained_variance']:.3f}"

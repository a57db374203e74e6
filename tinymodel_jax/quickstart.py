"""`tinymodel quickstart`: the bundled model at work, a dictionary trained before your eyes, and a page about both.

Offline and seeded. One function a step, each of which shows a screen of text; what they found goes into one page.
Everything here uses the package as anyone would: read it as an example.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress, track

from tinymodel_jax.analysis import sweeps
from tinymodel_jax.analysis.concept_recovery import Recovery, n_found, recover_concepts
from tinymodel_jax.analysis.concepts import concepts_of_units
from tinymodel_jax.analysis.evaluation import DictionaryEvaluation, evaluate_at_site
from tinymodel_jax.analysis.report.charts import bars, heat_map, training_curve
from tinymodel_jax.analysis.report.page import token_text, write_page
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.compilation import fast_compiler_options
from tinymodel_jax.dictionary import Dictionary
from tinymodel_jax.generate import continue_prompts
from tinymodel_jax.interventions import ablate, clamp
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.training.data import batch_indices
from tinymodel_jax.training.dictionary_recipe import recipe_preset
from tinymodel_jax.training.dictionary_result import finalize
from tinymodel_jax.training.dictionary_state import ActivationStatistics, init_state
from tinymodel_jax.training.dictionary_step import train_step
from tinymodel_jax.training.site_activations import site_vectors

SITE, TRAINED = "Rm2", "M2"
"""Whose features are shown, an SAE of the residual stream; and where a transcoder is trained."""
SCORED = ("Rm0", "Rm1", "Rm3", "M2")
"""What else concepts are looked for in."""
PROMPT = "Once upon a time"
STORY_TOKENS, CONTINUATION_TOKENS = 250, 40
LABELLED, HELD_OUT, FIRST_LABELLED = 120, 64, 1_000_000
"""Stories that features are named on, and that dictionaries are measured on; far from those that were trained on."""
TRAINED_STORIES, STEPS, BATCH, STORIES_A_STEP = 6_000, 260, 4096, 22
"""What the transcoder is trained on, a minute's worth on two CPU cores."""
TURNED_UP = ("feeling.bad", "word.sadness", "word.fear", "feeling.good", "word.joy")
"""Concepts, of which the one that a feature tells best is turned up."""
UP_FACTOR = 2.0
"""Times its mean activation where it is active on the labelled stories."""
COMMANDS = (
    'tinymodel generate --model mini "Once upon a time"',
    'tinymodel features --model mini --site Rm2 "Once upon a time, a fox was sad"',
    "python -m train prepare storyworld data/mini --tokenizer mini --row-length 256 && python -m train dictionaries "
    "--sites M0,M1 --k 8,16,32 --n-features 1024 --steps 1000 --data data/mini --out runs/mine",
)


@dataclass
class Named:
    """What is known of a dictionary's features from labelled stories."""

    tok_ids: np.ndarray
    """(stories, seq)."""
    acts: np.ndarray
    """(stories, seq, features)."""
    real: np.ndarray
    """(stories, seq): whether the token is not special."""
    concept: list[str]
    """Of each feature: the concept that its activity tells best."""
    f1: np.ndarray
    """How well."""
    density: np.ndarray
    """Share of the tokens at which each is active."""


def run_quickstart(out: Path, seed: int, train: bool, console: Console, options: str = "") -> Path:
    """Show every step, and return the path of the page.

    Args:
        out: folder for the page.
        seed: of the story and of the trained dictionary.
        train: train a transcoder, which takes about a minute on two CPU cores.
        options: how the command was called, for the page.
    """
    lm = TinyModel("mini")
    story = _tell(lm, seed, console)
    named = _name_features(lm, console)
    tokens = _show_features(lm, story, named, console)
    prompt = story[: _open_place(lm, story)]
    sweep = _sweep(lm, prompt, named, console)
    edit = _edit(lm, prompt, named, int(sweep["strongest"]), console)
    training = _train_transcoder(lm, seed, console) if train else None
    concepts = _recover(lm, training, console)
    shown = _interesting(named, tokens)
    content = {
        "model": f"{lm!r:.80}, trained on the story world",
        "site": SITE,
        "site_words": f"a sparse autoencoder of {named.acts.shape[2]} features of the residual stream in layer 2",
        "options": options,
        "prompt": PROMPT,
        "concept_stories": LABELLED,
        "tokens": [token_text(lm.tokenizer.decode([i])) for i in story],
        "edit": edit,
        "sweep": sweep,
        "training": training and {key: training[key] for key in ("sentence", "chart", "rows")},
        "concepts": concepts,
        "n_concepts": len(storyworld.CONCEPTS),
        "features": [_describe(lm, named, feature) for feature in shown],
        "commands": COMMANDS,
        "data": _page_data(named, tokens, story, lm),
    }
    path = out / "quickstart.html"
    write_page(path, "quickstart.html.jinja", content)
    console.rule("Done")
    console.print(f"The page: [bold]{path.resolve()}[/bold]  (open it in a browser; it needs no network)")
    console.print("Next:", *COMMANDS, sep="\n  ", highlight=False, markup=False, soft_wrap=True)
    return path


def _tell(lm: TinyModel, seed: int, console: Console) -> list[int]:
    """Return the ids of a story without special tokens."""
    console.rule("1 · The bundled model tells a story")
    begin = [lm.config.begin_id, *lm.tokenizer.encode(PROMPT)]
    row = lm.generate_ids([begin], STORY_TOKENS, 0.6, seed=seed)[0]
    special = (lm.config.begin_id, lm.config.end_id, lm.config.pad_id)
    story = [int(i) for i in row if i not in special]
    console.print(lm.tokenizer.decode(story), markup=False, highlight=False)
    return story


def _open_place(lm: TinyModel, story: list[int]) -> int:
    """Return the place in the first half of the story, after its beginning, where the next word is the most open."""
    logprobs = np.asarray(lm([[lm.config.begin_id, *story]]))[0, 1:]
    entropy = -np.sum(np.exp(logprobs) * logprobs, axis=-1)
    first = min(30, len(story) // 4)
    return first + int(entropy[first - 1 : max(first, len(story) // 2)].argmax())


def _name_features(lm: TinyModel, console: Console) -> Named:
    """Look at every feature on stories whose every token has its truth."""
    console.rule("2 · What the features stand for")
    told = list(storyworld.stories(seed=0, count=LABELLED, first=FIRST_LABELLED))
    tok_ids, _ = lm.tokenizer([story.text for story in told])
    tok_ids = np.pad(tok_ids, ((0, 0), (0, lm.config.n_ctx - tok_ids.shape[1])), constant_values=lm.config.pad_id)
    truth = storyworld.labels(told, lm.tokenizer, width=tok_ids.shape[1])
    reader = lm[SITE]
    starts = track(range(0, LABELLED, 12), description="reading labelled stories", console=console, transient=True)
    acts = np.concatenate([np.asarray(reader(tok_ids[start : start + 12])) for start in starts])
    real = ~np.isin(tok_ids, [lm.config.begin_id, lm.config.end_id, lm.config.pad_id])
    best, f1 = concepts_of_units(acts[real], truth[real])
    names = list(storyworld.CONCEPTS)
    return Named(tok_ids, acts, real, [names[i] for i in best], f1, (acts[real] > 0).mean(axis=0))


def _show_features(lm: TinyModel, story: list[int], named: Named, console: Console) -> list[list[tuple[int, float]]]:
    """Return the strongest features of each token of the story."""
    acts = np.asarray(lm[SITE]([[lm.config.begin_id, *story]]))[0, 1:]
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
        texts = [f"{f} {named.concept[f]} ({named.f1[f]:.2f})" for f, _ in found[:3]]
        word = repr(lm.tokenizer.decode([token]))
        console.print(f"  {word:<12} {' · '.join(texts)}", markup=False, highlight=False, soft_wrap=True)
    return strongest


def _sweep(lm: TinyModel, prompt: list[int], named: Named, console: Console) -> dict[str, Any]:
    """Turn off every active feature on the prompt, one at a time, and chart what that does to the next word."""
    console.rule("3 · Which features matter for the next word")
    row = [lm.config.begin_id, *prompt]
    start = time.monotonic()
    token = int(np.asarray(lm([row]))[0, -1].argmax())
    effects = sweeps.ablate(lm, SITE, [row], next_ids=[token])
    seconds = time.monotonic() - start
    order = np.argsort(effects.next_logprob)
    chosen = [*order[:9], *order[-3:]]
    text = token_text(lm.tokenizer.decode([token]))
    values = {
        f"{effects.features[i]}: {named.concept[effects.features[i]]}": float(effects.next_logprob[i]) for i in chosen
    }
    console.print(f"…{lm.tokenizer.decode(prompt)[-90:]!r} goes on with {text!r}.", markup=False)
    console.print(f"{len(order)} active features turned off one at a time, in one compiled call, {seconds:.1f} s:")
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


def _edit(lm: TinyModel, prompt: list[int], named: Named, off: int, console: Console) -> dict[str, Any]:
    """Continue the prompt as it is, with a feature off, and with one turned up."""
    console.rule("4 · One feature off, one turned up")
    up = _feature_to_turn_up(named, off)
    values = named.acts[..., up][named.real]
    value = UP_FACTOR * float(values[values > 0].mean())
    dictionary = lm[SITE].dictionary
    hooks = {
        "as it is": {},
        f"feature {off} off": ablate(dictionary, off),
        f"feature {up} up": clamp(dictionary, up, value),
    }
    titles = {
        "as it is": "The model as it is",
        f"feature {off} off": f"Feature {off} ({named.concept[off]}) turned off: it mattered most for the next word",
        f"feature {up} up": f"Feature {up} ({named.concept[up]}) held at {value:.1f}, {UP_FACTOR:g} × its mean",
    }
    row = np.array([[lm.config.begin_id, *prompt]], np.int32)
    runs, probabilities = [], []
    for short, edit in hooks.items():
        out = continue_prompts(lm.params, lm.config, row, CONTINUATION_TOKENS, 0.0, end_id=lm.config.end_id, hooks=edit)
        text = lm.tokenizer.decode([int(i) for i in out[0, row.shape[1] :] if i < lm.config.d_vocab - 4])
        runs.append({"short": short, "title": titles[short], "text": text.replace("\n", " ↵ ").strip()})
        probabilities.append(np.exp(np.asarray(lm.run_with_hooks(row, edit)[0])[0, -1]))
        console.print(f"[bold]{titles[short]}[/bold]")
        console.print(f"  {runs[-1]['text']}", markup=False, highlight=False)
    likely = np.argsort(-np.max(probabilities, axis=0))[:6]
    return {
        "prompt_end": lm.tokenizer.decode(prompt)[-90:],
        "runs": runs,
        "next": [
            {"token": token_text(lm.tokenizer.decode([int(i)])), "probabilities": [float(p[i]) for p in probabilities]}
            for i in likely
        ],
    }


def _feature_to_turn_up(named: Named, other: int) -> int:
    """Return the feature that tells a concept of `TURNED_UP` best, or any concept where none tells one of them."""
    wanted = np.isin(named.concept, TURNED_UP)
    free = np.arange(len(named.f1)) != other
    return int(np.argmax(np.where(free & (wanted if (free & wanted).any() else True), named.f1, -1)))


def _train_transcoder(lm: TinyModel, seed: int, console: Console) -> dict[str, Any]:
    """Train a transcoder at the same site from scratch, and measure it beside the bundled one."""
    console.rule("5 · A transcoder from scratch")
    site, bundled = lm[TRAINED].site, lm[TRAINED].dictionary
    told = storyworld.stories(seed=seed + 1, count=TRAINED_STORIES)
    texts = [s.text for s in track(told, "telling stories", TRAINED_STORIES, console=console, transient=True)]
    data = _pad(lm, lm.tokenizer(texts)[0])
    recipe = recipe_preset(
        "house", "batch_topk", bundled.config.n_features, STEPS, k=bundled.config.k, batch_size=BATCH
    )

    def vectors(step: Any, rows: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), step)
        return site_vectors(lm.params, lm.config, rows, [site], BATCH, key)[TRAINED]

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=fast_compiler_options())
    def step(state: Any, rows: Any) -> Any:
        x, y = vectors(state.step, rows)
        return train_step(state, recipe.hyper(), x, y, recipe=recipe)

    first = vectors(0, data[batch_indices(len(data), STORIES_A_STEP, seed, STEPS)])
    statistics = [ActivationStatistics.zero(part.shape[1]).update(part) for part in first]
    state = init_state(jax.random.key(seed), recipe, *statistics)
    history, start = [], time.monotonic()
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("compiling", total=STEPS)
        for i in range(STEPS):
            state, metrics = step(state, data[batch_indices(len(data), STORIES_A_STEP, seed, i)])
            history.append({name: float(metrics[name]) for name in ("explained_variance", "l0", "dead_fraction")})
            now = history[-1]
            progress.update(bar, advance=1, description=f"L0 {now['l0']:.1f}  EV {now['explained_variance']:.3f}")
    seconds = time.monotonic() - start
    trained = Dictionary.from_params(*finalize(state, recipe, site.hook_in, site.hook_out))
    sentence = (
        f"{STEPS} steps of {BATCH:,} tokens took {seconds:.0f} s: a batch_topk transcoder of {recipe.n_features} "
        f"features at {TRAINED}, k {recipe.k}, by the recipe house."
    )
    console.print(sentence)
    held_out = _pad(lm, lm.tokenizer([s.text for s in storyworld.stories(0, HELD_OUT, FIRST_LABELLED + LABELLED)])[0])
    batches = [jax.device_put(held_out[i : i + 16]) for i in range(0, HELD_OUT, 16)]
    evaluations = evaluate_at_site(lm.params, lm.config, [trained, bundled], batches)
    curve = training_curve(range(1, STEPS + 1), [h["explained_variance"] for h in history], [h["l0"] for h in history])
    rows = [_row(name, e) for name, e in zip(("trained just now", "bundled"), evaluations, strict=True)]
    return {"sentence": sentence, "chart": curve, "rows": rows, "dictionary": trained}


def _row(name: str, found: DictionaryEvaluation) -> dict[str, Any]:
    return {
        "name": name,
        "l0": found.l0,
        "explained_variance": found.explained_variance,
        "ce_recovered": found.ce_recovered,
        "dead_fraction": found.dead_fraction,
    }


def _pad(lm: TinyModel, tok_ids: np.ndarray) -> np.ndarray:
    missing = lm.config.n_ctx - tok_ids.shape[1]
    return np.pad(tok_ids, ((0, 0), (0, missing)), constant_values=lm.config.pad_id)


def _recover(lm: TinyModel, training: dict[str, Any] | None, console: Console) -> dict[str, Any]:
    """Count the concepts that dictionaries, neurons and random directions found."""
    console.rule("6 · How many of the known concepts were found")
    told = list(storyworld.stories(seed=0, count=LABELLED, first=FIRST_LABELLED))
    with console.status("scoring every feature, neuron and random direction"):
        found = [*recover_concepts(lm, told, [SITE]), *recover_concepts(lm, told, SCORED, baselines=False)]
        if training is not None:
            other = lm.splice([])
            other.attach(TRAINED, training["dictionary"])
            mine = recover_concepts(other, told, [TRAINED], baselines=False)[0]._replace(name="trained just now")
            found.append(mine)
            counts = {"trained just now": n_found(mine), "bundled": n_found(_named(found, TRAINED))}
            for row in training["rows"]:
                row["concepts"] = counts[row["name"]]
                console.print(
                    f"{row['name']}: L0 {row['l0']:.1f}, explained variance {row['explained_variance']:.3f}, "
                    f"CE recovered {row['ce_recovered']:.3f}, {row['dead_fraction']:.1%} dead, {row['concepts']} of "
                    f"{len(storyworld.CONCEPTS)} concepts with F1 of 0.8 or more",
                    highlight=False,
                )
    counts = [{"name": recovery.name, "found": n_found(recovery)} for recovery in found]
    console.print("; ".join(f"{count['name']}: {count['found']}" for count in counts), highlight=False)
    table = np.stack([recovery.scores.f1 for recovery in found], axis=1)
    order = np.argsort(-np.nan_to_num(table).max(axis=1), kind="stable")
    names = list(storyworld.CONCEPTS)
    chart = heat_map(table[order], [names[i] for i in order], [r.name for r in found], "F1 of the best unit")
    return {"counts": counts, "chart": chart}


def _named(found: list[Recovery], name: str) -> Recovery:
    return next(recovery for recovery in found if recovery.name == name)


def _interesting(named: Named, tokens: list[list[tuple[int, float]]], count: int = 24) -> list[int]:
    """Return features of the story that tell a concept well, one a concept first."""
    present = {feature for found in tokens for feature, _ in found}
    ordered = sorted(present, key=lambda f: -named.f1[f])
    first = {named.concept[f]: f for f in reversed(ordered)}
    chosen = sorted(first.values(), key=lambda f: -named.f1[f])
    return [*chosen, *(f for f in ordered if f not in chosen)][:count]


def _describe(lm: TinyModel, named: Named, feature: int) -> dict[str, Any]:
    """Return a feature's card: its concept, the tokens it is strongest on, and its top contexts."""
    acts = np.where(named.real, named.acts[..., feature], 0)
    top, where = [], np.argsort(-acts.max(axis=1), kind="stable")[:4]
    largest = max(float(acts.max()), 1e-9)
    for row in where:
        peak = int(acts[row].argmax())
        window = [i for i in range(max(1, peak - 14), min(acts.shape[1], peak + 9)) if named.real[row, i]]
        top.append(
            [
                {
                    "text": token_text(lm.tokenizer.decode([int(named.tok_ids[row, i])])),
                    "strength": float(acts[row, i]) / largest,
                }
                for i in window
            ]
        )
    totals = np.bincount(named.tok_ids.ravel(), acts.ravel(), minlength=lm.config.d_vocab)
    strongest = [repr(token_text(lm.tokenizer.decode([int(i)]))) for i in np.argsort(-totals)[:6] if totals[i] > 0]
    return {
        "id": feature,
        "concept": named.concept[feature],
        "f1": float(named.f1[feature]),
        "density": float(named.density[feature]),
        "description": f"{storyworld.CONCEPTS[named.concept[feature]]}. Most activity on: {', '.join(strongest)}",
        "contexts": top,
    }


def _page_data(named: Named, tokens: list[list[tuple[int, float]]], story: list[int], lm: TinyModel) -> dict[str, Any]:
    """Return what the page's script needs: each token's features, and where each of those is active in the story."""
    acts = np.asarray(lm[SITE]([[lm.config.begin_id, *story]]))[0, 1:]
    present = sorted({feature for found in tokens for feature, _ in found})
    features = {
        feature: {
            "concept": named.concept[feature],
            "f1": round(float(named.f1[feature]), 3),
            "activity": {int(i): round(float(acts[i, feature]), 3) for i in np.flatnonzero(acts[:, feature])},
        }
        for feature in present
    }
    return {"tokens": [[(f, round(a, 3)) for f, a in found] for found in tokens], "features": features}

"""Name copying in the bundled model: circuits of several sizes, what their nodes are, and why the head looks there.

    python benchmarks/name_copying.py --pictures docs/results

The circuits are found on some stories of the story world and scored on others; nothing in the package was trained on
either. With `--pictures`, it draws the pictures of docs/results/name-copying.md.
"""

import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from machine import describe_machine
from matplotlib.figure import Figure

from tinymodel_jax import TinyModel
from tinymodel_jax.analysis import circuits, logit_difference
from tinymodel_jax.analysis.circuits.graph import token_texts
from tinymodel_jax.analysis.circuits.qk import divided_score
from tinymodel_jax.analysis.report.charts import ACCENT, SECOND, save_figure
from tinymodel_jax.analysis.search.feature_queries import concept_f1
from tinymodel_jax.analysis.search.logit_effects import logit_effects
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.text.prompts_and_stories import story_rows

FOUND_ON = storyworld.FIRST_UNSEEN + 100_000
"""First story on which circuits are found; they are scored on the stories from `FIRST_UNSEEN` on."""
SIZES = (1, 3, 10, 30)
LABELLED = 100
"""Stories on which the concepts of features are measured."""
LAYER, HEAD = 3, 5


class Prompts(NamedTuple):
    """Questions about names, as arguments of `circuits.find` and `circuits.score`."""

    questions: list[storyworld.Question]
    tok_ids: np.ndarray
    metric: Any
    places: dict[str, Any]


def main(find_on: int = 64, score_on: int = 200, explained: int = 16, pictures: Path | None = None) -> None:
    """Measure and print.

    Args:
        find_on: stories on which the circuits are found.
        score_on: stories on which they are scored.
        explained: stories whose attention scores are divided.
        pictures: folder for `name_copying.png` and `name_copying_qk.png`.
    """
    print("  ".join(f"{name}: {value}" for name, value in describe_machine().items()))
    lm = TinyModel("mini")
    given, unseen = asked(lm, find_on, FOUND_ON), asked(lm, score_on, storyworld.FIRST_UNSEEN)
    scores: dict[str, dict[int, circuits.CircuitScore]] = {"features": {}, "neurons": {}}
    circuit = None
    for units, dictionaries in (("features", None), ("neurons", "neurons")):
        for size in SIZES:
            start = time.perf_counter()
            found = circuits.find(lm, *given[1:3], size, places=given.places, dictionaries=dictionaries)
            seconds = time.perf_counter() - start
            score = circuits.score(lm, found, *unseen[1:3], places=unseen.places)
            scores[units][size] = score
            print(f"{size} nodes, {units}: {described(score)}; found in {seconds:.0f} s", flush=True)
            circuit = found if units == "features" else circuit
    assert circuit is not None
    meaning = meanings(lm, circuit)
    for node, label in zip(circuit.nodes, circuit.labels, strict=True):
        print(f"{label:18}  {node['effect']:+.2f}  {'; '.join(meaning.get(label, ()))}")
    looks = why_it_looks_there(lm, unseen, explained)
    for side, parts in looks.items():
        print(side, {name: [round(value, 2) for value in values] for name, values in parts.items()})
    if pictures is not None:
        save_figure(circuit_figure(scores, circuit, meaning), pictures / "name_copying.png", dpi=110)
        save_figure(score_figure(looks), pictures / "name_copying_qk.png", dpi=110)


def asked(lm: TinyModel, count: int, first: int) -> Prompts:
    """Return questions about names in the stories from `first` on."""
    questions = list(storyworld.questions("name", 0, count, first))
    names = [len(lm.to_tokens(one.text[: one.source])[0]) - 1 for one in questions]
    metric = logit_difference([one.answer for one in questions], [one.wrong for one in questions])
    return Prompts(questions, lm.to_tokens([one.text for one in questions]), metric, {"name": names, "end": -1})


def described(score: circuits.CircuitScore) -> str:
    """Return a score as one line."""
    (faithful, margin), (complete, other), random = score.faithfulness, score.completeness, score.random
    drawn = sorted(estimate.value for estimate in random)
    return (
        f"faithfulness {faithful:.3f} ± {margin:.3f}, completeness {complete:.3f} ± {other:.3f}, random sets "
        f"{np.median(drawn):.3f} (median), {drawn[-1]:.3f} (best of {len(drawn)}); logit difference {score.model:.2f} "
        f"in the model, {score.circuit:.2f} of the circuit, {score.complement:.2f} without it, {score.nothing:.2f} "
        "without any node"
    )


def meanings(lm: TinyModel, circuit: circuits.Circuit) -> dict[str, tuple[str, str]]:
    """Return, for each feature of a circuit, the tokens that it promotes most and its best concept with the F1."""
    told = list(storyworld.stories(0, LABELLED, storyworld.FIRST_UNSEEN))
    rows = story_rows(lm.tokenizer, [story.text for story in told], lm.config.n_ctx)
    truth = storyworld.labels(told, lm.tokenizer, width=rows.shape[1], max_length=lm.config.n_ctx)
    found = {}
    for node, label in zip(circuit.nodes, circuit.labels, strict=True):
        if node["kind"] == "feature":
            tag, feature = str(node["site"]), int(node["index"])
            f1 = concept_f1(lm[tag], rows, truth, np.array([feature]))[0]
            promoted = lm.to_str_tokens(logit_effects(lm, tag, 5, feature).promoted[0])
            concept = f"{list(storyworld.CONCEPTS)[f1.argmax()]} {f1.max():.2f}"
            found[label] = ", ".join(text.strip() for text in promoted), concept
    return found


def why_it_looks_there(lm: TinyModel, prompts: Prompts, count: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Divide the head's score among sources: at the name, and averaged over all other keys, mean over stories.

    Returns: "key" and "query": kind of source -> what it adds to both scores; and "attention" to the name and the rest.
    """
    found: dict[str, dict[str, Counter[str]]] = {s: {"name": Counter(), "others": Counter()} for s in ("key", "query")}
    attention = []
    pattern = f"blocks.{LAYER}.attn.hook_pattern"
    for question, name in zip(prompts.questions[:count], prompts.places["name"], strict=False):
        frozen = circuits.frozen_pass(lm, question.text, dtype="float32")
        tokens, query = token_texts(lm, frozen), int(frozen.length) - 1
        _, kept = lm.run_with_cache(question.text, [pattern], return_logprobs=False)
        attention.append(float(kept[pattern][0, HEAD, query, name]))
        for key in range(query + 1):
            score = divided_score(lm, frozen, tokens, LAYER, HEAD, query, key)
            to = "name" if key == name else "others"
            share = 1 / count / (1 if key == name else query)
            matrix = score.matrix * share
            for source, value in zip(score.key_sources, matrix.sum(axis=0), strict=True):
                found["key"][to][kind_of(source, key)] += value
            for source, value in zip(score.query_sources, matrix.sum(axis=1), strict=True):
                found["query"][to][kind_of(source, query)] += value
    looks = {
        side: {kind: (float(of["name"][kind]), float(of["others"][kind])) for kind, _ in of["name"].most_common()}
        for side, of in found.items()
    }
    mean = float(np.mean(attention))
    return {**looks, "attention": {"name": (mean, 1 - mean)}}


def kind_of(source: np.void, here: int) -> str:
    """Return what a source is called in the picture."""
    kind = str(source["kind"])
    if kind == "feature":
        return f"features of {source['site']}"
    if kind in ("bias", "error"):
        return {"bias": "biases", "error": "errors"}[kind]
    return f"{'token' if kind == 'token' else 'position'} {'here' if source['position'] == here else 'before'}"


def circuit_figure(
    scores: dict[str, dict[int, circuits.CircuitScore]], circuit: circuits.Circuit, meaning: dict[str, tuple[str, str]]
) -> Figure:
    """Draw faithfulness by size, and the effects of the largest circuit's nodes."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(1, 1.15))
    for (units, of_size), colour in zip(scores.items(), (ACCENT, SECOND), strict=True):
        values = [of_size[size].faithfulness for size in SIZES]
        shares, margins = [one.value for one in values], [one.margin for one in values]
        curves.errorbar(SIZES, shares, yerr=margins, marker="o", capsize=3, color=colour, label=f"heads and {units}")
    drawn = [[one.value for one in scores["features"][size].random] for size in SIZES]
    curves.plot(
        SIZES, np.median(drawn, axis=1), marker="o", color="grey", label="random sets of the same kinds, median"
    )
    curves.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    curves.set(
        xscale="log", xlabel="nodes of the circuit", ylabel="faithfulness on unseen stories, 95 %", ylim=(-0.05, 1.15)
    )
    curves.set_xticks(SIZES, [str(size) for size in SIZES])
    curves.minorticks_off()
    curves.legend(fontsize=8)
    effects = circuit.nodes["effect"]
    labels = [f"{meaning[label][0]}   {label}" if label in meaning else label for label in circuit.labels]
    bars.barh(range(len(effects)), np.abs(effects), color=[ACCENT if value > 0 else SECOND for value in effects])
    bars.set_yticks(range(len(effects)), labels, fontsize=7)
    bars.invert_yaxis()
    bars.set(xscale="log", xlabel="effect on the logit difference (orange: negative)")
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def score_figure(looks: dict[str, dict[str, tuple[float, float]]]) -> Figure:
    """Draw what the sources of the key and of the query add to the head's scores."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, side in zip(figure.subplots(1, 2), ("key", "query"), strict=True):
        parts = looks[side]
        rows = np.arange(len(parts))
        name, others = np.array(list(parts.values())).T
        axes.barh(rows - 0.2, name, height=0.4, color=ACCENT, label=f"score at the name ({name.sum():.1f})")
        axes.barh(rows + 0.2, others, height=0.4, color="silver", label=f"mean score elsewhere ({others.sum():.1f})")
        axes.set_yticks(rows, list(parts), fontsize=8)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(xlabel="part of the score of L3H5, from the last position", title=f"sources of the {side}")
        axes.legend(fontsize=8, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    tyro.cli(main)

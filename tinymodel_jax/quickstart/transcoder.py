"""A transcoder trained from scratch in a minute, by the same steps as `python -m train dictionaries` takes."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console

from tinymodel_jax.analysis.evaluation.evaluation import evaluate
from tinymodel_jax.analysis.report.charts import training_curve
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.quickstart.named_features import full_rows
from tinymodel_jax.runtime.compilation import fast_compiler_options
from tinymodel_jax.runtime.progress import with_progress
from tinymodel_jax.training.data import batch_indices
from tinymodel_jax.training.dictionary_recipe import recipe_preset
from tinymodel_jax.training.dictionary_state import ActivationStatistics, finalize, init_state
from tinymodel_jax.training.dictionary_step import train_step
from tinymodel_jax.training.site_activations import site_vectors

TRAINED = "M2"
"""Where the transcoder is trained."""
JUST_NOW = "trained just now"
"""What it is called beside the bundled one."""


@dataclass(frozen=True)
class Amounts:
    """How much a run looks at and trains on; by default a minute's training on two CPU cores."""

    labelled: int = 120
    """Stories that features are named on and concepts are looked for in."""
    held_out: int = 64
    """Stories that the trained dictionary is measured on."""
    trained_stories: int = 6_000
    """Stories that it is trained on."""
    steps: int = 260
    """Its training steps."""
    batch: int = 4096
    """Tokens a step."""
    stories_a_step: int = 22
    """Stories that these are drawn from."""


def train_transcoder(lm: TinyModel, amounts: Amounts, seed: int, console: Console) -> dict[str, Any]:
    """Train a transcoder at `TRAINED` from scratch, and measure it beside the bundled one."""
    console.rule("5 · A transcoder from scratch")
    site, bundled = lm[TRAINED].site, lm[TRAINED].dictionary
    numbers = with_progress(range(amounts.trained_stories), "telling stories")
    texts = [storyworld.story(seed + 1, number).text for number in numbers]
    data = full_rows(lm, texts)
    recipe = recipe_preset(
        "house", "batch_topk", bundled.config.n_features, amounts.steps, k=bundled.config.k, batch_size=amounts.batch
    )

    def vectors(step: Any, rows: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), step)
        return site_vectors(lm.params, lm.config, rows, [site], amounts.batch, key)[TRAINED]

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=fast_compiler_options())
    def step(state: Any, rows: Any) -> Any:
        x, y = vectors(state.step, rows)
        return train_step(state, recipe.hyper(), x, y, recipe=recipe)

    first = vectors(0, data[batch_indices(len(data), amounts.stories_a_step, seed, amounts.steps)])
    statistics = [ActivationStatistics.zero(part.shape[1]).update(part) for part in first]
    state = init_state(jax.random.key(seed), recipe, *statistics)
    history: list[dict[str, float]] = []
    start = time.monotonic()
    for i in with_progress(range(amounts.steps), lambda: _how_it_stands(history)):
        state, metrics = step(state, data[batch_indices(len(data), amounts.stories_a_step, seed, i)])
        history.append({name: float(metrics[name]) for name in ("explained_variance", "l0", "dead_fraction")})
    seconds = time.monotonic() - start
    trained = Dictionary.from_params(*finalize(state, recipe, site.hook_in, site.hook_out))
    sentence = (
        f"{amounts.steps} steps of {amounts.batch:,} tokens took {seconds:.0f} s: a batch_topk transcoder of "
        f"{recipe.n_features} features at {TRAINED}, k {recipe.k}, by the recipe house."
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


def _how_it_stands(history: list[dict[str, float]]) -> str:
    if not history:
        return "compiling"
    return f"training, L0 {history[-1]['l0']:.1f}, explained variance {history[-1]['explained_variance']:.3f}"

"""How well TopK SAEs reconstruct after equal steps, by this package and by the installed peers.

    python benchmarks/quality.py [--steps 100 300] [--json FILE]

All train on the same activations of the bundled model at one site, in batches of the same order, and one evaluator
(`evaluate`) measures the results on stories that none trained on. The peers (PyPI `sae-lens`, `dictionary-learning`,
`eai-sparsify`) run with their own defaults and matched; `quality_peers.py` says what that means. The seconds per step
include compilation, and compare only on a quiet machine.
"""

import dataclasses
import functools
import importlib
import importlib.util
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import quality_peers
import tyro
from machine import describe_machine
from rich.console import Console
from rich.table import Table

from tinymodel_jax import collect_activations
from tinymodel_jax.analysis.evaluation.evaluation import evaluate
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.commands.frame import USER_PATHS
from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.text.prompts_and_stories import story_rows
from tinymodel_jax.training import recipe_preset, train_on_arrays
from tinymodel_jax.training.data import batch_indices

OURS = "tinymodel_jax"
PEERS: dict[str, tuple[str, Callable[..., Dictionary]]] = {
    "SAELens": ("sae_lens", quality_peers.saelens),
    "dictionary_learning": ("dictionary_learning", quality_peers.dictionary_learning),
    "sparsify": ("sparsify", quality_peers.sparsify),
}
"""The module that each peer needs, and the function that trains with it."""
PACKAGES = ("sae-lens", "dictionary-learning", "eai-sparsify")


class Result(NamedTuple):
    """One trained dictionary's numbers."""

    contender: str
    steps: int
    seconds: float
    """Of the whole training."""
    explained_variance: float
    ce_recovered: float
    dead_fraction: float
    l0: float


def main(
    steps: tuple[int, ...] = (100, 300, 1000, 3000),
    site: str = "Rm2",
    n_features: int = 1024,
    k: int = 16,
    batch_size: int = 2048,
    stories: int = 4000,
    held_out: int = 150,
    seed: int = 0,
    only: tuple[str, ...] = (),
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", metavar="FILE")] = None,
) -> None:
    """Train TopK SAEs with this package and its peers, and measure them.

    Args:
        steps: lengths of the trainings.
        site: residual-stream or attention site whose activations are reconstructed.
        n_features: features of each dictionary.
        k: active features per vector.
        batch_size: vectors per step.
        stories: stories whose activations are trained on.
        held_out: further stories to measure on.
        seed: seed of the first weights and of the order of the vectors.
        only: contenders to run; all that are installed if none is named.
        json_file: file to write all numbers to.
    """
    console, lm = Console(), TinyModel("mini")
    hook = lm[site].site.hook_in
    texts = [story.text for story in storyworld.stories(1, stories)]
    x = collect_activations(lm, texts, hook).acts[hook]
    measured = story_rows(
        lm.tokenizer,
        [story.text for story in storyworld.stories(0, held_out, storyworld.FIRST_UNSEEN)],
        lm.config.n_ctx,
        width=lm.config.n_ctx,
    )
    results: list[Result] = []
    for length in steps:
        for name, train in contenders(x, length, n_features, k, batch_size, hook, seed).items():
            if only and name not in only:
                continue
            start = time.perf_counter()
            dictionary = train()
            seconds = time.perf_counter() - start
            found = evaluate(lm, dictionary, measured)[0]
            numbers = found.explained_variance, found.ce_recovered, found.dead_fraction, found.l0
            results.append(Result(name, length, seconds, *map(float, numbers)))
            console.print("  ".join(map(" ".join, zip(COLUMNS, cells(results[-1]), strict=True))), highlight=False)
    machine = describe_machine(PACKAGES)
    for fact, value in machine.items():
        console.print(f"{fact}: {value}", highlight=False)
    console.print(as_table(results))
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine, "results": [r._asdict() for r in results]}, indent=2))


def contenders(
    x: np.ndarray, steps: int, n_features: int, k: int, batch_size: int, hook: str, seed: int
) -> dict[str, Callable[[], Dictionary]]:
    """Return the function that trains for `steps` steps, by contender that is installed."""

    def batches(step: int) -> np.ndarray:
        return x[batch_indices(len(x), batch_size, seed, step)]

    def ours() -> Dictionary:
        recipe = recipe_preset("house", "topk", n_features, steps, k=k, batch_size=batch_size)
        trained, _ = train_on_arrays(x, recipe=recipe, seed=seed)
        return Dictionary.from_params(placed(trained, hook), trained.params)

    def seeded(train: Callable[..., Dictionary], matched: bool) -> Dictionary:
        random.seed(seed)
        np.random.seed(seed)
        importlib.import_module("torch").manual_seed(seed)
        return train(batches, steps, n_features, k, hook, matched)

    found: dict[str, Callable[[], Dictionary]] = {OURS: ours}
    for name, (module, train) in PEERS.items():
        if importlib.util.find_spec(module) is not None:
            found[name] = functools.partial(seeded, train, False)
            found[f"{name}, matched"] = functools.partial(seeded, train, True)
    return found


def placed(dictionary: Dictionary, hook: str) -> DictionaryConfig:
    """Return a dictionary's configuration at a hook point of the model."""
    return dataclasses.replace(dictionary.config, hook_in=hook, hook_out=hook)


COLUMNS = ("steps", "contender", "explained variance", "CE recovered", "dead", "L0", "ms per step")


def cells(r: Result) -> list[str]:
    """Return a result as the cells of `COLUMNS`."""
    numbers = f"{r.explained_variance:.3f}", f"{r.ce_recovered:.3f}", f"{r.dead_fraction:.1%}", f"{r.l0:.1f}"
    return [str(r.steps), r.contender, *numbers, f"{1e3 * r.seconds / r.steps:.0f}"]


def as_table(results: list[Result]) -> Table:
    """Return all results as a table."""
    table = Table(*COLUMNS)
    for result in results:
        table.add_row(*cells(result))
    return table


if __name__ == "__main__":
    tyro.cli(main, registry=USER_PATHS)

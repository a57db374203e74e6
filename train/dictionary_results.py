"""The results of a finished dictionary run: the dictionaries, their metrics, and a plot of sparsity against quality.

OUT/dictionaries/M0/            one folder per dictionary (M0_k=16_seed=1 in a sweep): config.json,
                                dictionary.safetensors, training.json
OUT/sweep.json                  settings and metrics of every dictionary
OUT/pareto.png                  L0 against explained variance and, with a language model, against CE recovered
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tinymodel_jax.analysis.evaluation.evaluation import numbers_of
from tinymodel_jax.analysis.report.charts import save_figure
from tinymodel_jax.analysis.report.plots import plot_pareto
from tinymodel_jax.commands.evaluate import print_dictionaries, say_units
from tinymodel_jax.commands.frame import finite_or_none
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.runtime.atomic_files import replace_file
from tinymodel_jax.runtime.collectives import is_first, on_first, settled
from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe
from tinymodel_jax.training.dictionary_state import DictionaryTrainState, finalize
from tinymodel_jax.training.dictionary_step import member_of
from train.run_files import local_folder
from train.run_folder import versions
from train.sweep import Sweep

if TYPE_CHECKING:
    from train.activations import ActivationSource

HELD_OUT = ("l0", "explained_variance", "ce_recovered")
"""Results of a quick evaluation that `metrics.jsonl` records, with `held_out_` before their name."""


def write_results(
    out: epath.Path,
    settings: Mapping[str, Any],
    source: ActivationSource,
    states: Mapping[str, DictionaryTrainState],
    sweep: Sweep,
) -> None:
    """Evaluate and write every dictionary, write `sweep.json` and `pareto.png`, and print a table.

    Args:
        out: folder to write to.
        settings: the run's, with the number of steps done as `steps`.
    """
    found = finished_dictionaries(source, states, sweep)
    evaluations = source.evaluate([dictionary for _, _, dictionary in found])
    records, written = [], []
    for (name, index, dictionary), evaluation in zip(found, evaluations, strict=True):
        member = sweep.members[index]
        folder = f"{name}_{member.name}" if member.name else name
        record = {
            "folder": f"dictionaries/{folder}",
            "site": name,
            "settings": dict(member.values),
            "results": _finite(numbers_of(evaluation)),
            "margins": _finite(getattr(evaluation, "margins", {})),
            "sites": {tag: _finite(numbers) for tag, numbers in getattr(evaluation, "sites", {}).items()},
        }
        records.append(record)
        written.append((dictionary, record, member.recipe(sweep.recipes[name])))

    def publish() -> None:
        content = {
            "format": "tinymodel_jax/sweep",
            "format_version": 1,
            "steps": settings["steps"],
            "dictionaries": records,
        }
        with local_folder(out) as folder:
            for dictionary, record, recipe in written:
                _write_dictionary(folder / record["folder"], dictionary, settings, record, recipe)
            replace_file(folder / "sweep.json", _json(content))
            save_figure(plot_pareto(records), folder / "pareto.png", dpi=150)

    on_first(publish)
    if is_first():
        _print_table(records, out)


def held_out_metrics(
    source: ActivationSource, states: Mapping[str, DictionaryTrainState], sweep: Sweep
) -> dict[str, dict[str, np.ndarray]]:
    """Return numbers of the unfinished dictionaries on a part of the held-out data, for `metrics.jsonl`.

    batch_topk's threshold is the running mean of training. Place -> name, such as `held_out_l0` -> an array of members;
    a number that is not finite for some member is left out.
    """
    found = finished_dictionaries(source, states, sweep)
    evaluations = source.evaluate([dictionary for _, _, dictionary in found], quick=True)
    of_places: dict[str, list[dict[str, float]]] = {}
    for (name, _, _), evaluation in zip(found, evaluations, strict=True):
        of_places.setdefault(name, []).append(numbers_of(evaluation))
    metrics: dict[str, dict[str, np.ndarray]] = {}
    for place, members in of_places.items():
        arrays = {name: np.array([member[name] for member in members]) for name in HELD_OUT if name in members[0]}
        metrics[place] = {f"held_out_{name}": array for name, array in arrays.items() if np.isfinite(array).all()}
    return metrics


def finished_dictionaries(
    source: ActivationSource, states: Mapping[str, DictionaryTrainState], sweep: Sweep
) -> list[tuple[str, int, Dictionary]]:
    """Return (place, number of the member, dictionary) of all states as they are now."""
    found = []
    for name, place in source.places.items():
        for index, member in enumerate(sweep.members):
            state = _one_member(states[name], index)
            config, params = finalize(state, member.recipe(sweep.recipes[name]), place.hook_in, place.hook_out)
            config = dataclasses.replace(config, exclude=place.exclude)
            found.append((name, index, Dictionary.from_params(config, params)))
    return found


def _one_member(stacked: DictionaryTrainState, index: int) -> DictionaryTrainState:
    """Return a member's state, replicated on every device; a dictionary is smaller than its training state."""
    sharding = stacked.step.sharding
    assert isinstance(sharding, NamedSharding)
    return settled(jax.jit(member_of, out_shardings=NamedSharding(sharding.mesh, P()))(stacked, index))


def _write_dictionary(
    folder: Path,
    dictionary: Dictionary,
    settings: Mapping[str, Any],
    record: Mapping[str, Any],
    recipe: DictionaryRecipe,
) -> None:
    dictionary.save_pretrained(folder)
    names = ("model", "arrays", "data", "stories", "data_seed", "init_from")
    origin = {key: settings[key] for key in names if key in settings}
    content = {
        "format": "tinymodel_jax/dictionary_training",
        "format_version": 1,
        "site": record["site"],
        **origin,
        "seed": record["settings"]["seed"],
        "recipe": recipe.to_dict(),
        "results": record["results"],
        "versions": versions(),
    }
    replace_file(folder / "training.json", _json(content))


def _print_table(records: Sequence[Mapping[str, Any]], out: epath.Path) -> None:
    named = [{**record, "name": Path(record["folder"]).name} for record in records]
    print_dictionaries(named, "held-out data")
    if "ce_clean" in records[0]["results"]:
        say_units(with_margins=True)
    print(f"all numbers: {out / 'sweep.json'}")


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: finite_or_none(value) for name, value in numbers.items()}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()

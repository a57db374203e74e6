"""The results of a finished dictionary run: the dictionaries, their metrics, and a plot of sparsity against quality.

OUT/dictionaries/M0/            one folder per dictionary (M0_k=16_seed=1 in a sweep): config.json,
                                dictionary.safetensors, training.json
OUT/sweep.json                  settings and metrics of every dictionary
OUT/pareto.png                  L0 against explained variance and, with a language model, against CE recovered
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tinymodel_jax.analysis.evaluation.evaluation import numbers_of
from tinymodel_jax.analysis.report.charts import plot_pareto
from tinymodel_jax.commands.frame import finite_or_none, print_table
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.runtime.atomic_files import replace_file
from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe
from tinymodel_jax.training.dictionary_state import DictionaryTrainState, finalize
from tinymodel_jax.training.dictionary_step import member_of
from train.hosts import is_first, on_first, settled
from train.run_files import local_folder
from train.run_folder import versions
from train.sweep import Sweep

if TYPE_CHECKING:
    from train.activations import ActivationSource
    from train.run import Run

SHOWN = ("l0", "explained_variance", "ce_recovered", "dead_fraction")


def write_results(run: Run, source: ActivationSource, states: Mapping[str, DictionaryTrainState], sweep: Sweep) -> None:
    """Evaluate and write every dictionary, write `sweep.json` and `pareto.png`, and print a table."""
    out, (recipes, members) = run.folder, sweep
    names = [(name, index) for name in source.places for index in range(len(members))]
    dictionaries = []
    for name, index in names:
        state, place = _one_member(states[name], index), source.places[name]
        finished = finalize(state, members[index].recipe(recipes[name]), place.hook_in, place.hook_out)
        dictionaries.append(Dictionary.from_params(*finished))
    records, written = [], []
    for (name, index), dictionary, evaluation in zip(names, dictionaries, source.evaluate(dictionaries), strict=True):
        member = members[index]
        folder = f"{name}_{member.name}" if member.name else name
        record = {
            "folder": f"dictionaries/{folder}",
            "site": name,
            "settings": dict(member.values),
            "results": {key: finite_or_none(value) for key, value in numbers_of(evaluation).items()},
        }
        records.append(record)
        written.append((dictionary, record, member.recipe(recipes[name])))

    def publish() -> None:
        content = {
            "format": "tinymodel_jax/sweep",
            "format_version": 1,
            "steps": run.settings["steps"],
            "dictionaries": records,
        }
        with local_folder(out) as folder:
            for dictionary, record, recipe in written:
                _write_dictionary(folder / record["folder"], dictionary, run.settings, record, recipe)
            replace_file(folder / "sweep.json", _json(content))
            plot_pareto(records, folder / "pareto.png")

    on_first(publish)
    if is_first():
        _print_table(records, out)


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
    origin = {key: settings[key] for key in ("model", "arrays", "data", "stories", "data_seed") if key in settings}
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
    shown = [key for key in SHOWN if key in records[0]["results"]]
    rows = []
    for record in records:
        values = [record["results"][key] for key in shown]
        cells = [
            "-" if v is None else f"{v:.1f}" if k == "l0" else f"{v:.4f}" for k, v in zip(shown, values, strict=True)
        ]
        rows.append([Path(record["folder"]).name, *cells])
    print_table(["dictionary", *(key.replace("_", " ") for key in shown)], rows, title=f"{out / 'sweep.json'}")


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()

"""Write what a run has trained so far: `python -m train export RUN`.

It reads a checkpoint of a run that is still going on, was stopped, or has finished, and writes what the run would write
if it finished at that step: dictionaries with their measurements, or a language model. It takes no lock, and changes
nothing in RUN; it only adds the folder RUN/export, unless `-o` names another. The folder of a run is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from etils import epath

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.runtime.collectives import say, warn
from tinymodel_jax.training.data import open_data
from tinymodel_jax.training.lm_step import LMOptimizer
from tinymodel_jax.training.sharding import make_mesh
from train import dictionaries, lm
from train.activations import ActivationOptions, open_activations
from train.checkpoints import Checkpoints
from train.dictionary_results import write_results
from train.run_folder import as_json, run_settings
from train.sweep import recorded_sweep


def export(
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    *,
    step: int | None = None,
    out: Annotated[str | None, tyro.conf.arg(aliases=["-o"], help_behavior_hint="(default: RUN/export/STEP)")] = None,
) -> None:
    """Write the dictionaries or the model of a run that is still going on, or was stopped.

    Args:
        run: folder of a run of `train lm` or `train dictionaries`, or its address.
        step: step whose checkpoint to read; by default the newest. A run keeps its last three checkpoints.
        out: folder to write to, or gs://…; not that of a run.
    """
    folder = epath.Path(os.path.expanduser(run))
    place = None if out is None else epath.Path(os.path.expanduser(out))
    settings = run_settings(folder)
    if place is not None and (place / "config.json").exists():
        raise ValueError(f"--out {out} holds a run, a model or a dictionary (there is a config.json); choose another.")
    if "source" not in settings:
        raise ValueError(f"{folder} was started by an earlier version, which did not record where its data is.")
    write = {"lm": _export_lm, "dictionaries": _export_dictionaries}[settings["kind"]]
    write(folder, settings, step, place)


def _export_dictionaries(
    folder: epath.Path, settings: Mapping[str, Any], step: int | None, place: epath.Path | None
) -> None:
    recorded = {name: value for name, value in settings["source"].items() if value is not None}
    files = {name: Path(recorded[name]) for name in ("activations", "targets") if name in recorded}
    mesh = make_mesh("data=1", jax.devices()[:1])
    source, origin = open_activations(ActivationOptions(**{**recorded, **files}), mesh)
    changed = [name for name in ("places", "data") if as_json(origin.get(name)) != settings.get(name)]
    if changed:
        raise ValueError(f"the {' and '.join(changed)} of {folder} are not those that the run was started with.")
    sweep = recorded_sweep(settings)
    program = dictionaries.compiled(source, sweep, mesh)
    states, done = _restore(folder, program.abstract, step)
    place = place or folder / "export" / str(done)
    say(f"{folder}: step {done} of {settings['steps']}; writing to {place}")
    states = dictionaries.settle(program, source, states, sweep, done)
    write_results(place, {**settings, "steps": done}, source, states, sweep)


def _export_lm(folder: epath.Path, settings: Mapping[str, Any], step: int | None, place: epath.Path | None) -> None:
    config = ModelConfig.from_dict(settings["model"])
    mesh = make_mesh("data=1", jax.devices()[:1])
    optimizer = LMOptimizer(**settings["optimizer"])
    program = lm.compiled(config, optimizer, settings["steps"], settings["micro_batches"], mesh, fsdp=False)
    state, done = _restore(folder, program.abstract, step)
    place = place or folder / "export" / str(done)
    lm.publish(config, state.params, _data_folder(settings), place / "model")
    say(f"{folder}: step {done} of {settings['steps']}; the model is in {place / 'model'}")


def _data_folder(settings: Mapping[str, Any]) -> Path | None:
    """Return the folder of a run's data, which has the tokenizer; None with a warning if it is gone."""
    try:
        return open_data(settings["source"]["data"]).folder
    except (OSError, ValueError) as error:
        warn(f"the model is written without its tokenizer: {error}")
        return None


def _restore(folder: epath.Path, like: Any, step: int | None) -> tuple[Any, int]:
    """Return the state of the newest checkpoint, or of that of `step`, and its step."""
    if not (folder / "checkpoints").exists():
        raise FileNotFoundError(f"{folder} has no checkpoint yet; the run writes one every --save-every steps.")
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    try:
        there = checkpoints.steps
        if step is not None and step not in there:
            found = ", ".join(map(str, there)) or "none yet"
            raise FileNotFoundError(f"{folder} has no checkpoint of step {step}; it has {found}.")
        state, done = checkpoints.restore(like, there if step is None else [step])
    finally:
        checkpoints.close()
    if state is None:
        raise FileNotFoundError(f"{folder} has no checkpoint that can be read; wait for the run's next one.")
    return state, done

"""Train dictionaries: `python -m train dictionaries --model MODEL --sites M0,A1 --data DATA --out OUT …`.

The language model runs inside the compiled step, once for all sites, and every combination of the comma-separated
lists is trained on the same activations. `--activations X.npy` trains on the vectors in a file instead. The same
command resumes a stopped run bit-exactly. Read it from top to bottom: options, mesh, activations and compiled functions
in `dictionaries`; then, in `_train`, one loop that steps, logs and saves.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinymodel_jax.analysis.search.resumable import fingerprint
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.io.data_files import DICTIONARY_FILE
from tinymodel_jax.io.hub.addresses import pinned
from tinymodel_jax.runtime.collectives import say, settled
from tinymodel_jax.runtime.compilation import fast_compiler_options
from tinymodel_jax.runtime.hosts import ONE_PROCESS, Hosts, join_hosts
from tinymodel_jax.training.data_folder import open_data
from tinymodel_jax.training.dictionary_forward import execution_for
from tinymodel_jax.training.dictionary_state import ActivationStatistics, DictionaryTrainState
from tinymodel_jax.training.dictionary_step import (
    learning_rate_share,
    settle_thresholds,
    stack_members,
    sweep_step,
    threshold_batches,
)
from tinymodel_jax.training.flops import dictionary_flops_per_vector
from tinymodel_jax.training.sharding import DICTIONARY_RULES, abstract_arrays, axes_in_use, make_mesh, shardings
from tinymodel_jax.training.warm_start import require_fit, start_from
from train.activations import ActivationOptions, ActivationSource, Place, open_activations
from train.compile_for import devices_for, report_step
from train.dictionary_results import held_out_metrics, write_results
from train.publication import NOT_PUBLISHED, Publication, push_dictionaries, require_publication
from train.run import Run, open_run
from train.run_folder import has_begun, recorded_options, run_settings
from train.sweep import Sweep, SweepOptions, init_members, make_sweep
from train.trackers import NO_TRACKING, Tracking, require_trackers

MODEL_SITES = ActivationOptions()
STATISTICS_BATCHES = 16
"""Batches from which the mean and the scale of the activations are computed."""
RECORDED = ("loss", "l0", "explained_variance", "dead_fraction", "sparsity_coefficient", "gradient_norm")
"""Metrics of a step that `metrics.jsonl` records, for every member."""

States = dict[str, DictionaryTrainState]
"""Place -> the stacked states of its sweep."""


def dictionaries(
    *,
    steps: int,
    sweep: tyro.conf.OmitArgPrefixes[SweepOptions],
    source: tyro.conf.OmitArgPrefixes[ActivationOptions] = MODEL_SITES,
    out: str | None = None,
    init_from: Path | None = None,
    save_every: int = 1000,
    eval_every: int = 1000,
    mesh: str = "",
    compile_for: str | None = None,
    tracking: tyro.conf.OmitArgPrefixes[Tracking] = NO_TRACKING,
    publication: tyro.conf.OmitArgPrefixes[Publication] = NOT_PUBLISHED,
    hosts: tyro.conf.OmitArgPrefixes[Hosts] = ONE_PROCESS,
) -> None:
    """Train dictionaries on activations of a language model or of files, or resume a stopped run.

    The options k, l1, target-l0, learning-rate and seed take comma-separated lists: all combinations are trained at
    once, in one compiled step.

    Args:
        steps: training steps; more than before lengthen a run.
        sweep: dictionaries to train.
        source: activations to train on.
        out: folder of the run, or gs://…: dictionaries go to OUT/dictionaries, their metrics to OUT/sweep.json.
        init_from: folder or hub:OWNER/NAME/PATH of a finished dictionary (not of a run) of the same sizes, from which
            every dictionary starts.
        save_every: steps between checkpoints.
        eval_every: steps between evaluations on held-out data (L0, explained variance, CE recovered).
        mesh: device mesh, such as data=2,model=4 or sweep=8; by default all devices are on data.
        compile_for: TPU slice, such as v5e:2x4: only compile the step for it and report memory, collectives and
            estimated time.
        tracking: trackers that show the metrics in addition to OUT/metrics.jsonl.
        publication: repository on the hub that gets the finished dictionaries.
        hosts: processes of the run; each runs this same command.
    """
    join_hosts(hosts, "train")
    require_trackers(tracking)
    require_publication(publication)
    if min(steps, save_every, eval_every) < 1:
        raise ValueError(f"--steps {steps}, --save-every {save_every} and --eval-every {eval_every} must be 1 or more.")
    start = None if init_from is None else _finished(init_from)
    source = dataclasses.replace(source, model=pinned(source.model))
    devices = make_mesh(mesh, devices_for(compile_for))
    activations, origin = open_activations(source, devices, only_compiled=compile_for is not None)
    planned = make_sweep(sweep, activations.places, _planned_steps(out, steps), source.batch_size)
    trained = planned.of_length(steps)
    if start is not None:
        _require_fit(start, trained, activations.places, init_from)
    program = compiled(activations, trained, devices)
    if compile_for is not None:
        arguments = program.abstract, activations.context, activations.abstract_batch
        report_step(program.step, arguments, devices, _flops_per_vector(activations, trained) * source.batch_size)
        return
    if out is None:
        raise ValueError("give --out, the run's folder.")
    settings = {
        "kind": "dictionaries",
        **origin,
        "recipes": {name: shared.to_dict() for name, shared in planned.recipes.items()},
        "members": [dict(member.values) for member in trained.members],
        "init_from": None if start is None else fingerprint(*(array for _, array in sorted(start.params.items()))),
        "steps": steps,
        "eval_every": eval_every,
        "mesh": axes_in_use(devices),
        "save_every": save_every,
        "source": recorded_options(source),
    }
    may_change = ("save_every", "eval_every", "mesh", "held_out_stories", "source")
    with open_run(out, settings, may_change, tracking) as run:
        _train(run, activations, program, trained, start)
        if run.is_finished:
            push_dictionaries(publication, run.folder, open_data(source.data).meta if source.data else None)


def _finished(init_from: Path) -> Dictionary:
    """Load the dictionary that `--init-from` names.

    Raises:
        ValueError: the folder is a run.
        FileNotFoundError, ValueError: as `Dictionary.from_pretrained`.
    """
    if has_begun(epath.Path(init_from)):
        found = sorted(path.parent for path in init_from.glob(f"dictionaries/*/{DICTIONARY_FILE}"))
        instead = f"name one of its dictionaries, such as {found[0]}" if found else "finish it first"
        raise ValueError(f"--init-from {init_from} is a folder of a run; {instead}.")
    return Dictionary.from_pretrained(init_from)


def _require_fit(start: Dictionary, sweep: Sweep, places: Mapping[str, Place], init_from: Path | None) -> None:
    for name, place in places.items():
        try:
            require_fit(start.config, sweep.recipes[name], place.d_in, place.d_out, place.layers)
        except ValueError as error:
            raise ValueError(f"--init-from {init_from}, {name}: {error}") from None


def _planned_steps(out: str | None, steps: int) -> int:
    """Return the number of steps that a run's recipes are planned for: that of its first start.

    A run that is lengthened keeps the step counts of its recipes, such as the warm-up; only its schedules end later.
    """
    folder = epath.Path(os.path.expanduser(out or ""))
    if out is None or not has_begun(folder):
        return steps
    recipes = run_settings(folder).get("recipes") or {"": {"steps": steps}}  # of another kind of run: refused later
    return next(iter(recipes.values()))["steps"]


def _train(run: Run, source: ActivationSource, program: Program, sweep: Sweep, start: Dictionary | None = None) -> None:
    say(sweep.describe())
    states = run.restore(program.abstract)
    if states is None:
        states = program.init(first_statistics(source))
        if start is not None:
            states = _started_from(start, program, states, sweep)
    shared = next(iter(sweep.recipes.values()))
    run.say_lengthened(
        lambda length, step: (
            shared.learning_rate * learning_rate_share(jnp.int32(step), dataclasses.replace(shared, steps=length))
        )
    )
    run.say_epochs(source.steps_per_epoch, source.rows_are)
    for done, batch in run.steps(source.make_batch, _flops_per_vector(source, sweep), Description(), "vectors"):
        states, metrics = settled(program.step(states, source.context, batch))
        if done % run.settings["eval_every"] == 0:
            held_out = held_out_metrics(source, states, sweep)
            metrics = {name: {**found, **held_out[name]} for name, found in metrics.items()}
        run.log(done, {"tokens": source.batch_size, **metrics})
        if run.must_save(done):
            run.save(done, states)
    if not run.is_finished:
        return
    say(f"{run.folder}: {run.done} steps done, {run.speed()}")
    states = settle(program, source, states, sweep, run.done)
    write_results(run.folder, run.settings, source, states, sweep)


class Program(NamedTuple):
    """A run's compiled functions and the shardings of its state.

    The mesh may consist of absent devices: `--compile-for` compiles the same step that a run executes.
    """

    step: Callable[..., tuple[States, dict[str, Any]]]
    """(states, context, batch) -> (next states, metrics): a language model pass, then a step of every member."""
    settle: Callable[..., States]
    """(states after the last step, context, batch, step of the batch, batches before) -> states whose batch_topk
    thresholds include that batch."""
    init: Callable[..., States]
    """Statistics of every place -> the states before the first step."""
    abstract: States
    """Shapes, number formats and shardings of the states."""


def compiled(source: ActivationSource, sweep: Sweep, mesh: Mesh) -> Program:
    """Return the run's compiled functions; nothing is computed yet."""
    recipes, members = sweep
    ks = {int(member.values["k"]) for member in members if "k" in member.values}
    hypers = {name: stack_members([m.hyper(shared) for m in members]) for name, shared in recipes.items()}
    init = functools.partial(_init, sweep=sweep)
    shapes = jax.eval_shape(init, jax.eval_shape(lambda: _no_statistics(source.places)))
    placed = {name: shardings(state, DICTIONARY_RULES, mesh) for name, state in shapes.items()}

    def step(states: States, context: Any, batch: Any) -> tuple[States, dict[str, Any]]:
        done = next(iter(states.values())).step[0]
        after, metrics = {}, {}
        for name, (x, y) in source.vectors(context, batch, done).items():
            execution = execution_for(recipes[name], mesh=mesh, ks=ks)
            after[name], found = sweep_step(states[name], hypers[name], x, y, recipe=recipes[name], execution=execution)
            metrics[name] = {metric: found[metric] for metric in RECORDED}
        return after, metrics

    def settle(states: States, context: Any, batch: Any, step: Any, counted: Any) -> States:
        after = {}
        for name, (x, _) in source.vectors(context, batch, step).items():
            execution = execution_for(recipes[name], mesh=mesh)
            after[name] = settle_thresholds(
                states[name], hypers[name], x, counted, recipe=recipes[name], execution=execution
            )
        return after

    options = fast_compiler_options(mesh.devices.flat[0].platform)
    compile_step = functools.partial(jax.jit, donate_argnums=0, compiler_options=options)
    return Program(
        step=compile_step(step, out_shardings=(placed, NamedSharding(mesh, P()))),
        settle=compile_step(settle, out_shardings=placed),
        init=jax.jit(init, out_shardings=placed),
        abstract=abstract_arrays(shapes, placed),
    )


def first_statistics(source: ActivationSource) -> dict[str, Any]:
    """Return the statistics of every place over the first batches.

    Raises:
        ValueError: activations are NaN or infinite.
    """

    @functools.partial(jax.jit, compiler_options=fast_compiler_options())
    def add(statistics: dict[str, Any], context: Any, batch: Any, step: Any) -> dict[str, Any]:
        vectors = source.vectors(context, batch, step, split=False)
        return {
            name: (ins.update(vectors[name].x), None if outs is None else outs.update(vectors[name].y))
            for name, (ins, outs) in statistics.items()
        }

    statistics = _no_statistics(source.places)
    for step in range(STATISTICS_BATCHES):
        statistics = add(statistics, source.context, source.make_batch(step), jnp.int32(step))
    finite = jax.jit(lambda tree: [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])
    bad = [name for name, pair in statistics.items() if not all(finite(pair))]
    if bad:
        raise ValueError(
            f"the activations at {', '.join(bad)} are NaN or infinite, so no dictionary can be trained on them; "
            "choose a language model whose parameters and outputs are finite."
        )
    return statistics


def _started_from(start: Dictionary, program: Program, states: States, sweep: Sweep) -> States:
    """Return the states with the parameters of a dictionary, in every member."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, program.abstract)

    def begin(states: States, start: Dictionary) -> States:
        return {
            name: jax.vmap(functools.partial(start_from, recipe=sweep.recipes[name], dictionary=start))(state)
            for name, state in states.items()
        }

    return jax.jit(begin, out_shardings=placed)(states, start)


def _no_statistics(places: Mapping[str, Place]) -> dict[str, Any]:
    zero = ActivationStatistics.zero
    return {
        name: (zero(place.d_in, place.parts), None if place.is_sae else zero(place.d_out, place.parts))
        for name, place in places.items()
    }


def _init(statistics: dict[str, Any], sweep: Sweep) -> States:
    return {name: init_members(sweep.recipes[name], sweep.members, *pair) for name, pair in statistics.items()}


def settle(program: Program, source: ActivationSource, states: States, sweep: Sweep, done: int) -> States:
    """Return the states after `done` steps with finished batch_topk thresholds, computed on the batches after those."""
    shared = next(iter(sweep.recipes.values()))
    if shared.architecture != "batch_topk":
        return states
    for counted in range(threshold_batches(shared.batch_size)):
        step = done + counted
        batch = source.make_batch(step)
        states = settled(program.settle(states, source.context, batch, np.int32(step), np.int32(counted)))
    return states


def _flops_per_vector(source: ActivationSource, sweep: Sweep) -> float:
    of_members = sum(
        dictionary_flops_per_vector(sweep.recipes[name], place.d_in, place.d_out, place.layers)
        for name, place in source.places.items()
    )
    return source.flops_per_vector + len(sweep.members) * of_members


class Description:
    """A step's metrics in a few words: those of the first member of the first places, and their last evaluation."""

    def __init__(self) -> None:
        """Start without an evaluation."""
        self._held_out: dict[str, str] = {}

    def __call__(self, line: Mapping[str, Any]) -> str:
        """Return the words for a line of `metrics.jsonl`."""
        names = [name for name in line if isinstance(line[name], Mapping)]
        texts = []
        for name in names[:3]:
            values = {metric: members[0] for metric, members in line[name].items()}
            if "held_out_l0" in values:
                self._held_out[name] = f" (held out: {_numbers(values, 'held_out_')})"
            texts.append(f"{name} {_numbers(values)}{self._held_out.get(name, '')}")
        more = sum(len(line[n]["l0"]) for n in names) - len(texts)
        return "  ".join(texts) + (f"  (+{more})" if more else "")


def _numbers(values: Mapping[str, float], prefix: str = "") -> str:
    shown = {"l0": ("L0", ".1f"), "explained_variance": ("EV", ".3f"), "ce_recovered": ("CE recovered", ".3f")}
    found = {name: values[prefix + name] for name in shown if prefix + name in values}
    return " ".join(f"{shown[name][0]} {value:{shown[name][1]}}" for name, value in found.items())

"""Train dictionaries: `python -m train dictionaries --model MODEL --sites M0,A1 --data DATA --out OUT …`.

The language model runs inside the compiled step, once for all sites, and every combination of the comma lists is
trained on the same activations. The same command again goes on where the last one stopped, to the bit. Or, with
`--activations X.npy`, on activations of one's own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinymodel_jax.compilation import fast_compiler_options
from tinymodel_jax.config import Architecture
from tinymodel_jax.io.artifacts import parse_site
from tinymodel_jax.training.data import open_data
from tinymodel_jax.training.dictionary_forward import execution_for
from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe
from tinymodel_jax.training.dictionary_state import ActivationStatistics, DictionaryTrainState
from tinymodel_jax.training.dictionary_step import stack_members, sweep_step
from tinymodel_jax.training.flops import dictionary_flops_per_vector, peak_flops
from tinymodel_jax.training.sharding import DICTIONARY_RULES, make_mesh, shardings
from train.activation_sources import ActivationSource, ArrayActivations, ModelActivations, Place
from train.dictionary_results import write_results
from train.loop import run_steps
from train.progress import TrainingProgress
from train.run_folder import Checkpoints, MetricsLog, open_run_folder
from train.sweep import Member, init_members, parse_members, site_recipe

STATISTICS_BATCHES = 16
"""Batches that the mean and the scale of the activations are taken from."""
RECORDED = ("loss", "l0", "explained_variance", "dead_fraction", "sparsity_coefficient", "gradient_norm")
"""What `metrics.jsonl` keeps of a step's metrics, of every member."""

States = dict[str, DictionaryTrainState]


def dictionaries(
    *,
    out: Path,
    n_features: int,
    steps: int,
    architecture: Architecture = "batch_topk",
    model: str = "mini",
    sites: str = "",
    data: str | None = None,
    activations: Path | None = None,
    targets: Path | None = None,
    recipe: str = "house",
    k: str | None = None,
    l1: str | None = None,
    target_l0: str | None = None,
    learning_rate: str | None = None,
    seed: str = "0",
    skip: bool = False,
    matryoshka: str | None = None,
    random_prefixes: int | None = None,
    batch_size: int = 4096,
    stories: int | None = None,
    dead_after: int | None = None,
    data_seed: int = 0,
    held_out_stories: int = 512,
    save_every: int = 1000,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    mesh: str = "",
) -> None:
    """Train dictionaries on activations of a language model or of files, or go on with a run that was stopped.

    k, l1, target-l0, learning-rate and seed take comma lists: every combination is trained, in one compiled step.

    Args:
        out: run's folder; the dictionaries are in OUT/dictionaries, their numbers in OUT/sweep.json and OUT/pareto.png.
        n_features: size of every dictionary.
        steps: training steps.
        architecture: activation function.
        model: language model: a published name or a folder.
        sites: comma list of places, such as M0,M1,A0: a kind (A, M, T, Mo, Ra, Rm) and a layer.
        data: folder written by `python -m train prepare`.
        activations: .npy file (rows, width) to train on instead of a model's sites.
        targets: .npy file (rows, width) that a transcoder of --activations predicts.
        recipe: house, reference, or a .json file with fields of DictionaryRecipe.
        k: active features a vector, of topk and batch_topk.
        l1: coefficient of the sparsity loss, of relu, gated and jumprelu.
        target_l0: active features a vector to aim at, of relu, gated and jumprelu.
        learning_rate: largest learning rate.
        seed: of the initial parameters; the order of the data is that of --data-seed.
        skip: train a linear skip connection beside the features, of transcoders.
        matryoshka: comma list of the sizes of nested dictionaries; the last is n-features.
        random_prefixes: number of nested dictionaries whose sizes are drawn anew each step.
        batch_size: vectors a step.
        stories: stories a step that the vectors are drawn from; by default as many as it takes.
        dead_after: vectors for which a dead feature was silent.
        data_seed: of the order of the stories, and of the tokens drawn from them.
        held_out_stories: stories that the finished dictionaries are measured on, at most.
        save_every: steps between checkpoints.
        dtype: number format of the language model; auto is bfloat16 on an accelerator, float32 on a CPU.
        mesh: devices, as data=2,model=4 or sweep=8; by default all of them on data.
    """
    if min(steps, save_every, batch_size, held_out_stories) < 1:
        raise ValueError("--steps, --save-every, --batch-size and --held-out-stories must be 1 or more.")
    device_mesh = make_mesh(mesh)
    if batch_size % device_mesh.shape["data"]:
        raise ValueError(f"--batch-size {batch_size} must be a multiple of {device_mesh.shape['data']}, the data axis.")
    source, origin = _open_source(
        model, sites, data, activations, targets, batch_size, stories, data_seed, held_out_stories, dtype, device_mesh
    )
    members = parse_members({"l1": l1, "k": k, "target_l0": target_l0, "learning_rate": learning_rate, "seed": seed})
    changes: dict[str, Any] = {"batch_size": batch_size, "skip": skip}
    options = {"prefix_widths": _widths(matryoshka), "random_prefixes": random_prefixes, "dead_after": dead_after}
    changes |= {name: value for name, value in options.items() if value is not None}
    recipes = {
        name: site_recipe(recipe, architecture, n_features, steps, place.d_in, members, **changes)
        for name, place in source.places.items()
    }
    program = build_program(source, recipes, members, device_mesh)
    run = {
        "kind": "dictionaries",
        **origin,
        "recipes": {name: shared.to_dict() for name, shared in recipes.items()},
        "members": [dict(member.values) for member in members],
        "steps": steps,
        "data_seed": data_seed,
        "mesh": {axis: size for axis, size in device_mesh.shape.items() if size > 1},
        "save_every": save_every,
    }
    open_run_folder(out, run, may_change=("save_every", "mesh", "held_out_stories"))
    checkpoints = Checkpoints(out / "checkpoints")
    try:
        _train(run, source, program, recipes, members, out, device_mesh, checkpoints)
    finally:
        checkpoints.close()


class Program(NamedTuple):
    """The compiled functions of a run, and where its state lives."""

    step: Callable[..., tuple[States, dict[str, Any]]]
    """(states, context, batch) -> (states, metrics)."""
    init: Callable[..., States]
    """Statistics of every place -> the states before the first step."""
    abstract: States
    """Shapes, number formats and shardings of the states."""


def build_program(
    source: ActivationSource, recipes: Mapping[str, DictionaryRecipe], members: list[Member], mesh: Mesh
) -> Program:
    """Return the run's compiled functions; nothing is computed yet."""
    hypers = {name: stack_members([m.hyper(shared) for m in members]) for name, shared in recipes.items()}
    init = functools.partial(_init, recipes=recipes, members=members)
    statistics = jax.eval_shape(lambda: _no_statistics(source.places))
    shapes = jax.eval_shape(init, statistics)
    placed = {name: shardings(state, DICTIONARY_RULES, mesh) for name, state in shapes.items()}

    def step(states: States, context: Any, batch: Any) -> tuple[States, dict[str, Any]]:
        done = next(iter(states.values())).step[0]
        after, metrics = {}, {}
        for name, vectors in source.vectors(context, batch, done).items():
            execution = execution_for(recipes[name], mesh=mesh)
            after[name], found = sweep_step(
                states[name], hypers[name], vectors.x, vectors.y, recipe=recipes[name], execution=execution
            )
            metrics[name] = {metric: found[metric] for metric in RECORDED}
        return after, metrics

    return Program(
        step=jax.jit(
            step,
            out_shardings=(placed, NamedSharding(mesh, P())),
            donate_argnums=0,
            compiler_options=fast_compiler_options(),
        ),
        init=jax.jit(init, out_shardings=placed),
        abstract=jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, placed
        ),
    )


def _train(
    run: dict[str, Any],
    source: ActivationSource,
    program: Program,
    recipes: dict[str, DictionaryRecipe],
    members: list[Member],
    out: Path,
    mesh: Mesh,
    checkpoints: Checkpoints,
) -> None:
    steps = run["steps"]
    states = checkpoints.restore(program.abstract)
    if states is None:
        states = program.init(_statistics(source))
    first_step = int(next(iter(states.values())).step[0])
    checkpoints.forget_after(first_step)
    log = MetricsLog(out / "metrics.jsonl", first_step)

    shared = next(iter(recipes.values()))
    widths = [(place.d_in, place.d_out) for place in source.places.values()]
    flops = source.flops_per_vector + len(members) * sum(dictionary_flops_per_vector(shared, *pair) for pair in widths)
    peak = peak_flops(mesh.devices.flat[0])
    progress = TrainingProgress(first_step, steps, flops, peak * mesh.size if peak else None, _describe)

    def step(states: States, batch: Any) -> tuple[States, dict[str, Any]]:
        after, metrics = program.step(states, source.context, batch)
        return after, {"tokens": shared.batch_size, **metrics}

    states, finished = run_steps(
        step,
        states,
        source.make_batch,
        first_step=first_step,
        steps=steps,
        save_every=run["save_every"],
        observe=lambda done, states: {},
        log=log,
        checkpoints=checkpoints,
        progress=progress,
    )
    if not finished:
        done = int(next(iter(states.values())).step[0])
        print(f"stopped at step {done} of {steps}; the same command goes on from there")
        return
    speed = f"{progress.tokens_per_second():,.0f} vectors/s" if first_step < steps else "nothing left to do"
    print(f"{out}: {steps} steps done, {speed}")
    write_results(out, run, source, states, recipes, members)


def _open_source(
    model: str,
    sites: str,
    data: str | None,
    activations: Path | None,
    targets: Path | None,
    batch_size: int,
    stories: int | None,
    seed: int,
    held_out_stories: int,
    dtype: str,
    mesh: Mesh,
) -> tuple[ActivationSource, dict[str, Any]]:
    """Return where activations come from, and what the run's configuration says of it."""
    if activations is not None:
        if sites or data is not None:
            raise ValueError("--activations takes the place of --sites and --data; give one or the other.")
        arrays = ArrayActivations(activations, targets, batch_size=batch_size, seed=seed, mesh=mesh)
        names = {"activations": activations.name, "targets": targets.name if targets else None}
        return arrays, {"arrays": names, "places": _described(arrays.places)}
    if targets is not None:
        raise ValueError("--targets belongs to --activations; a model's site has its own targets.")
    if not sites or data is None:
        raise ValueError("give --sites and --data, or --activations.")
    from tinymodel_jax.lm import TinyModel

    chosen = [parse_site(tag) for tag in sites.split(",")]
    if len({site.tag for site in chosen}) < len(chosen):
        raise ValueError(f"--sites {sites!r} names a site twice.")
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    lm = TinyModel(model, dtype=dtype)
    outside = [site.tag for site in chosen if site.layer >= lm.config.n_layers]
    if outside:
        raise ValueError(f"--sites {','.join(outside)}: the model's layers are 0..{lm.config.n_layers - 1}.")
    token_data = open_data(data)
    found = ModelActivations(
        lm.config,
        lm.params,
        chosen,
        token_data,
        batch_size=batch_size,
        stories=stories,
        seed=seed,
        held_out_stories=held_out_stories,
        mesh=mesh,
    )
    origin = {
        "model": {"name": model, "config": lm.config.to_dict()},
        "places": _described(found.places),
        "data": token_data.fingerprint,
        "stories": found.stories,
        "held_out_stories": held_out_stories,
    }
    return found, origin


def _described(places: Mapping[str, Place]) -> dict[str, Any]:
    return {name: dataclasses.asdict(place) for name, place in places.items()}


def _widths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not all(part.isdecimal() for part in text.split(",")):
        raise ValueError(f"--matryoshka {text!r} is no comma list of sizes.")
    return tuple(map(int, text.split(",")))


def _no_statistics(places: Mapping[str, Place]) -> dict[str, Any]:
    return {
        name: (
            ActivationStatistics.zero(place.d_in),
            None if place.is_sae else ActivationStatistics.zero(place.d_out),
        )
        for name, place in places.items()
    }


def _statistics(source: ActivationSource) -> dict[str, Any]:
    """Return the statistics of every place over the first batches."""

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
    return statistics


def _init(statistics: dict[str, Any], *, recipes: Mapping[str, DictionaryRecipe], members: list[Member]) -> States:
    return {name: init_members(recipes[name], members, *pair) for name, pair in statistics.items()}


def _describe(line: Mapping[str, Any]) -> str:
    """Return the first members' numbers of the first places."""
    names = [name for name in line if isinstance(line[name], Mapping)]
    texts = [f"{n} L0 {line[n]['l0'][0]:.1f} EV {line[n]['explained_variance'][0]:.3f}" for n in names[:3]]
    more = sum(len(line[n]["l0"]) for n in names) - len(texts)
    return "  ".join(texts) + (f"  (+{more})" if more else "")

"""Train dictionaries: `python -m train dictionaries --model MODEL --sites M0,A1 --data DATA --out OUT …`.

The language model runs inside the compiled step, once for all sites, and every combination of the comma lists is
trained on the same activations. The same command again goes on where the last one stopped, to the bit. Or, with
`--activations X.npy`, on activations of one's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinymodel_jax.config import Architecture, ModelConfig
from tinymodel_jax.io.artifacts import parse_site
from tinymodel_jax.training.data import open_data
from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe
from tinymodel_jax.training.flops import dictionary_flops_per_vector, peak_flops
from tinymodel_jax.training.sharding import make_mesh
from tinymodel_jax.transformer import Transformer
from train.activation_sources import ActivationSource, ArrayActivations, ModelActivations, Place
from train.compile_for import report_step, topology_devices
from train.dictionary_program import Program, States, build_program, first_statistics
from train.dictionary_results import write_results
from train.hosts import ONE_PROCESS, Hosts, join_hosts, say, stop_requests
from train.loop import run_steps
from train.presets import PRESETS
from train.progress import TrainingProgress
from train.run_folder import Checkpoints, MetricsLog, open_run_folder
from train.sweep import Member, parse_members, site_recipe
from train.trackers import NO_TRACKING, Tracking, open_trackers, require_trackers


def dictionaries(
    *,
    out: str | None = None,
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
    compile_for: str | None = None,
    tracking: tyro.conf.OmitArgPrefixes[Tracking] = NO_TRACKING,
    hosts: tyro.conf.OmitArgPrefixes[Hosts] = ONE_PROCESS,
) -> None:
    """Train dictionaries on activations of a language model or of files, or go on with a run that was stopped.

    k, l1, target-l0, learning-rate and seed take comma lists: every combination is trained, in one compiled step.

    Args:
        out: run's folder, or gs://…: the dictionaries are in OUT/dictionaries, their numbers in OUT/sweep.json.
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
        compile_for: TPU slice, such as v5e:2x4: compile the step for it, say what that gives, and stop. --model may
            then be a preset of `python -m train lm`; without --data, stories have 128 tokens.
        tracking: what shows the metrics beside OUT/metrics.jsonl.
        hosts: the run's processes, each of which runs this same command.
    """
    join_hosts(hosts)
    require_trackers(tracking)
    if min(steps, save_every, batch_size, held_out_stories) < 1:
        raise ValueError("--steps, --save-every, --batch-size and --held-out-stories must be 1 or more.")
    device_mesh = make_mesh(mesh, None if compile_for is None else topology_devices(compile_for))
    if batch_size % device_mesh.shape["data"]:
        raise ValueError(f"--batch-size {batch_size} must be a multiple of {device_mesh.shape['data']}, the data axis.")
    if activations is not None:
        source, origin = _arrays(activations, targets, sites, data, batch_size, data_seed, device_mesh)
    else:
        source, origin = _model_sites(
            model, sites, data, targets, batch_size, stories, data_seed, held_out_stories, dtype, device_mesh
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
    flops = source.flops_per_vector + len(members) * sum(
        dictionary_flops_per_vector(recipes[name], place.d_in, place.d_out) for name, place in source.places.items()
    )
    if compile_for is not None:
        _report(program, source, flops * batch_size, device_mesh)
        return
    if out is None:
        raise ValueError("give --out, the run's folder.")
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
    folder = epath.Path(out)
    with stop_requests() as stop_requested:
        open_run_folder(folder, run, may_change=("save_every", "mesh", "held_out_stories"))
        checkpoints = Checkpoints(folder / "checkpoints")
        try:
            _train(
                run,
                source,
                program,
                recipes,
                members,
                folder,
                device_mesh,
                flops,
                checkpoints,
                tracking,
                stop_requested,
            )
        finally:
            checkpoints.close()


def _report(program: Program, source: ActivationSource, flops: float, mesh: Mesh) -> None:
    everywhere = NamedSharding(mesh, P())
    context = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), source.context
    )
    report_step(program.step, (program.abstract, context, source.abstract_batch), mesh, flops)


def _train(
    run: dict[str, Any],
    source: ActivationSource,
    program: Program,
    recipes: dict[str, DictionaryRecipe],
    members: list[Member],
    out: epath.Path,
    mesh: Mesh,
    flops: float,
    checkpoints: Checkpoints,
    tracking: Tracking,
    stop_requested: Callable[[], bool],
) -> None:
    steps, batch_size = run["steps"], next(iter(recipes.values())).batch_size
    states = checkpoints.restore(program.abstract)
    if states is None:
        states = program.init(first_statistics(source))
    first_step = int(next(iter(states.values())).step[0])
    checkpoints.forget_after(first_step)
    log = MetricsLog(out / "metrics.jsonl", first_step, open_trackers(tracking, out, run, first_step))
    peak = peak_flops(mesh.devices.flat[0])
    progress = TrainingProgress(first_step, steps, flops, peak * mesh.size if peak else None, _describe)

    def step(states: States, batch: Any) -> tuple[States, dict[str, Any]]:
        after, metrics = program.step(states, source.context, batch)
        return after, {"tokens": batch_size, **metrics}

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
        stop_requested=stop_requested,
    )
    if not finished:
        done = int(next(iter(states.values())).step[0])
        say(f"stopped at step {done} of {steps}; the same command goes on from there")
        return
    speed = f"{progress.tokens_per_second():,.0f} vectors/s" if first_step < steps else "nothing left to do"
    say(f"{out}: {steps} steps done, {speed}")
    write_results(out, run, source, states, recipes, members)


def _arrays(
    x: Path, y: Path | None, sites: str, data: str | None, batch_size: int, seed: int, mesh: Mesh
) -> tuple[ActivationSource, dict[str, Any]]:
    """Return the activations of files, and what the run's configuration says of them."""
    if sites or data is not None:
        raise ValueError("--activations takes the place of --sites and --data; give one or the other.")
    found = ArrayActivations(x, y, batch_size=batch_size, seed=seed, mesh=mesh)
    names = {"activations": x.name, "targets": y.name if y else None}
    return found, {"arrays": names, "places": _described(found.places)}


def _model_sites(
    model: str,
    sites: str,
    data: str | None,
    targets: Path | None,
    batch_size: int,
    stories: int | None,
    seed: int,
    held_out_stories: int,
    dtype: str,
    mesh: Mesh,
) -> tuple[ActivationSource, dict[str, Any]]:
    """Return the activations of a model's sites, and what the run's configuration says of them."""
    if targets is not None:
        raise ValueError("--targets belongs to --activations; a model's site has its own targets.")
    present = mesh.devices.flat[0] in jax.devices()
    if not sites or (data is None and present):
        raise ValueError("give --sites and --data, or --activations.")
    chosen = [parse_site(tag) for tag in sites.split(",")]
    if len({site.tag for site in chosen}) < len(chosen):
        raise ValueError(f"--sites {sites!r} names a site twice.")
    if dtype == "auto":
        dtype = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    config, params = _load_model(model, dtype, mesh, present)
    outside = [site.tag for site in chosen if site.layer >= config.n_layers]
    if outside:
        raise ValueError(f"--sites {','.join(outside)}: the model's layers are 0..{config.n_layers - 1}.")
    token_data = None if data is None else open_data(data)
    found = ModelActivations(
        config,
        params,
        chosen,
        token_data,
        batch_size=batch_size,
        stories=stories,
        seed=seed,
        held_out_stories=held_out_stories,
        mesh=mesh,
    )
    origin = {
        "model": {"name": model, "config": config.to_dict()},
        "places": _described(found.places),
        "data": token_data.fingerprint if token_data else None,
        "stories": found.stories,
        "held_out_stories": held_out_stories,
    }
    return found, origin


def _load_model(model: str, dtype: str, mesh: Mesh, present: bool) -> tuple[ModelConfig, Any]:
    """Return a language model's configuration and its parameters on the mesh, or their shapes if it is elsewhere."""
    if not present and model in PRESETS:
        config = dataclasses.replace(PRESETS[model].model, dtype=dtype)
        key, ids = jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
        return config, jax.eval_shape(Transformer(config).init, key, ids)["params"]
    from tinymodel_jax.lm import TinyModel

    lm = TinyModel(model, dtype=dtype)
    return lm.config, jax.device_put(lm.params, NamedSharding(mesh, P())) if present else lm.params


def _described(places: Mapping[str, Place]) -> dict[str, Any]:
    return {name: dataclasses.asdict(place) for name, place in places.items()}


def _widths(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not all(part.isdecimal() for part in text.split(",")):
        raise ValueError(f"--matryoshka {text!r} is no comma list of sizes.")
    return tuple(map(int, text.split(",")))


def _describe(line: Mapping[str, Any]) -> str:
    """Return the first members' numbers of the first places."""
    names = [name for name in line if isinstance(line[name], Mapping)]
    texts = [f"{n} L0 {line[n]['l0'][0]:.1f} EV {line[n]['explained_variance'][0]:.3f}" for n in names[:3]]
    more = sum(len(line[n]["l0"]) for n in names) - len(texts)
    return "  ".join(texts) + (f"  (+{more})" if more else "")

"""Train dictionaries: `python -m train dictionaries --model MODEL --sites M0,A1 --data DATA --out OUT …`.

The language model runs inside the compiled step, once for all sites, and every combination of the comma lists is
trained on the same activations. The same command again goes on where the last one stopped, to the bit. Or, with
`--activations X.npy`, on activations of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinymodel_jax.training.flops import dictionary_flops_per_vector, peak_flops
from train.activation_options import ActivationOptions, open_activations
from train.activation_sources import ActivationSource
from train.compile_for import report_step
from train.devices import open_mesh
from train.dictionary_program import Program, States, build_program, first_statistics, settle_all
from train.dictionary_results import write_results
from train.hosts import ONE_PROCESS, Hosts, join_hosts, say
from train.loop import OpenRun, open_run, run_steps
from train.progress import TrainingProgress
from train.run_folder import MetricsLog
from train.sweep import Sweep, SweepOptions, make_sweep
from train.trackers import NO_TRACKING, Tracking, open_trackers, require_trackers

MODEL_SITES = ActivationOptions()


def dictionaries(
    *,
    steps: int,
    sweep: tyro.conf.OmitArgPrefixes[SweepOptions],
    source: tyro.conf.OmitArgPrefixes[ActivationOptions] = MODEL_SITES,
    out: str | None = None,
    save_every: int = 1000,
    mesh: str = "",
    compile_for: str | None = None,
    tracking: tyro.conf.OmitArgPrefixes[Tracking] = NO_TRACKING,
    hosts: tyro.conf.OmitArgPrefixes[Hosts] = ONE_PROCESS,
) -> None:
    """Train dictionaries on activations of a language model or of files, or go on with a run that was stopped.

    k, l1, target-l0, learning-rate and seed take comma lists: every combination is trained, in one compiled step.

    Args:
        steps: training steps.
        sweep: the dictionaries.
        source: the activations that they are trained on.
        out: run's folder, or gs://…: the dictionaries are in OUT/dictionaries, their numbers in OUT/sweep.json.
        save_every: steps between checkpoints.
        mesh: devices, as data=2,model=4 or sweep=8; by default all of them on data.
        compile_for: TPU slice, such as v5e:2x4: compile the step for it, say what that gives, and stop.
        tracking: what shows the metrics beside OUT/metrics.jsonl.
        hosts: the run's processes, each of which runs this same command.
    """
    join_hosts(hosts)
    require_trackers(tracking)
    if min(steps, save_every) < 1:
        raise ValueError(f"--steps {steps} and --save-every {save_every} must be 1 or more.")
    device_mesh = open_mesh(mesh, compile_for)
    activations, origin = open_activations(source, device_mesh)
    trained = make_sweep(sweep, activations.places, steps, source.batch_size)
    program = build_program(activations, trained.recipes, trained.members, device_mesh)
    flops = activations.flops_per_vector + len(trained.members) * sum(
        dictionary_flops_per_vector(trained.recipes[name], place.d_in, place.d_out)
        for name, place in activations.places.items()
    )
    if compile_for is not None:
        _report(program, activations, flops * source.batch_size, device_mesh)
        return
    if out is None:
        raise ValueError("give --out, the run's folder.")
    settings = {
        "kind": "dictionaries",
        **origin,
        "recipes": {name: shared.to_dict() for name, shared in trained.recipes.items()},
        "members": [dict(member.values) for member in trained.members],
        "steps": steps,
        "mesh": {axis: size for axis, size in device_mesh.shape.items() if size > 1},
        "save_every": save_every,
    }
    with open_run(out, settings, may_change=("save_every", "mesh", "held_out_stories")) as run:
        _train(run, activations, program, trained, device_mesh, flops, tracking)


def _report(program: Program, source: ActivationSource, flops: float, mesh: Mesh) -> None:
    everywhere = NamedSharding(mesh, P())
    context = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), source.context
    )
    report_step(program.step, (program.abstract, context, source.abstract_batch), mesh, flops)


def _train(
    run: OpenRun,
    source: ActivationSource,
    program: Program,
    sweep: Sweep,
    mesh: Mesh,
    flops: float,
    tracking: Tracking,
) -> None:
    steps, batch_size = run.settings["steps"], next(iter(sweep.recipes.values())).batch_size
    states = run.checkpoints.restore(program.abstract)
    if states is None:
        states = program.init(first_statistics(source))
    first_step = int(next(iter(states.values())).step[0])
    run.checkpoints.forget_after(first_step)
    trackers = open_trackers(tracking, run.folder, run.settings, first_step)
    log = MetricsLog(run.folder / "metrics.jsonl", first_step, trackers)
    peak = peak_flops(mesh.devices.flat[0])
    progress = TrainingProgress(first_step, steps, flops, peak * mesh.size if peak else None, _describe)

    def step(states: States, batch: Any) -> tuple[States, dict[str, Any]]:
        after, metrics = program.step(states, source.context, batch)
        return after, {"tokens": batch_size, **metrics}

    states, finished = run_steps(
        run,
        step,
        states,
        source.make_batch,
        first_step=first_step,
        observe=lambda done, states: {},
        log=log,
        progress=progress,
    )
    if not finished:
        done = int(next(iter(states.values())).step[0])
        say(f"stopped at step {done} of {steps}; the same command goes on from there")
        return
    speed = f"{progress.tokens_per_second():,.0f} vectors/s" if first_step < steps else "nothing left to do"
    say(f"{run.folder}: {steps} steps done, {speed}")
    write_results(run, source, settle_all(program, source, states, sweep.recipes), sweep)


def _describe(line: Mapping[str, Any]) -> str:
    """Return the first members' numbers of the first places."""
    names = [name for name in line if isinstance(line[name], Mapping)]
    texts = [f"{n} L0 {line[n]['l0'][0]:.1f} EV {line[n]['explained_variance'][0]:.3f}" for n in names[:3]]
    more = sum(len(line[n]["l0"]) for n in names) - len(texts)
    return "  ".join(texts) + (f"  (+{more})" if more else "")

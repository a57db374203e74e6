"""Train the language model: `python -m train lm --preset tiny_model --data DATA --out OUT`.

Read it from top to bottom: options, mesh, data and compiled functions in `lm`; then, in `_train`, one loop that steps,
evaluates, logs and saves. The same command again resumes a stopped run bit-exactly. SIGTERM and Ctrl-C save and stop.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.io.artifacts import save_model
from tinymodel_jax.io.default_tokenizer import saved_tokenizer
from tinymodel_jax.model.forward import HookedModel
from tinymodel_jax.model.generate import continue_in_steps
from tinymodel_jax.params import flatten
from tinymodel_jax.runtime.collectives import is_first, on_first, say, settled
from tinymodel_jax.runtime.compilation import fast_compiler_options
from tinymodel_jax.runtime.hosts import ONE_PROCESS, Hosts, join_hosts
from tinymodel_jax.training.data import TokenData, batch_indices, open_data
from tinymodel_jax.training.data_folder import DEFAULT_ROW_LENGTH
from tinymodel_jax.training.flops import training_flops_per_token
from tinymodel_jax.training.lm_step import (
    Initialization,
    LMOptimizer,
    LMState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    summed_loss,
    train_step,
)
from tinymodel_jax.training.sharding import (
    LM_FSDP_RULES,
    LM_RULES,
    STEP_RULES,
    abstract_arrays,
    axes_in_use,
    make_mesh,
    rows_on_devices,
    shardings,
)
from train.compile_for import devices_for, report_step
from train.presets import (
    AS_PRESET,
    PRESET_SIZES,
    DType,
    OptimizerOptions,
    Preset,
    PresetName,
    SizeOptions,
    chosen_preset,
    number_format,
    of_presets,
    sized_preset,
)
from train.publication import NOT_PUBLISHED, Publication, push_model, require_publication
from train.run import Run, open_run
from train.run_files import local_folder
from train.run_folder import whole_path
from train.trackers import NO_TRACKING, Tracking, require_trackers

HELD_OUT_ROWS = 512
SAMPLE_TOKENS = 60
_WHOLE_PRODUCTS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
"""Option of the TPU compiler. Otherwise, it splits the products that compute scattered gradients into rings of small
ones, which its own estimate makes a fifth slower (docs/results/tpu.md)."""
MAY_CHANGE = ("save_every", "eval_every", "mesh", "fsdp", "shard_optimizer", "source")


def lm(
    preset: PresetName,
    *,
    data: str | None = None,
    out: str | None = None,
    sizes: tyro.conf.OmitArgPrefixes[SizeOptions] = PRESET_SIZES,
    steps: Annotated[int | None, of_presets(lambda preset: preset.steps)] = None,
    batch_size: Annotated[int | None, of_presets(lambda preset: preset.batch_size)] = None,
    micro_batches: int = 1,
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerOptions] = AS_PRESET,
    initialization: Annotated[Initialization | None, of_presets(lambda preset: preset.initialization)] = None,
    dtype: DType = "auto",
    seed: int = 0,
    save_every: int = 1000,
    eval_every: int = 500,
    mesh: str = "",
    fsdp: bool = False,
    shard_optimizer: bool = False,
    compile_for: str | None = None,
    tracking: tyro.conf.OmitArgPrefixes[Tracking] = NO_TRACKING,
    publication: tyro.conf.OmitArgPrefixes[Publication] = NOT_PUBLISHED,
    hosts: tyro.conf.OmitArgPrefixes[Hosts] = ONE_PROCESS,
) -> None:
    """Train a language model, or resume a stopped run.

    Args:
        preset: model sizes and training settings; the options below change single settings.
        data: folder written by `python -m train prepare`.
        out: folder of the run, or gs://…; the finished model is in OUT/model, and TinyModel(OUT) loads it.
        sizes: sizes of the model that differ from the preset's.
        steps: training steps; more than before lengthen a run.
        batch_size: rows per step, over all devices.
        micro_batches: parts into which a batch is split, computed one after the other to save memory.
        optimizer: settings that differ from the preset's optimizer.
        initialization: initial weights: reference, as published, or wide, with larger embeddings.
        dtype: number format of the computation; auto is bfloat16 on an accelerator, float32 on a CPU.
        seed: seed of the initial weights and of the order of the rows.
        save_every: steps between checkpoints.
        eval_every: steps between evaluations (held-out loss and a sample).
        mesh: device mesh, such as data=4,model=2; by default all devices are on data.
        fsdp: also shard parameters and optimizer state over the data axis.
        shard_optimizer: shard only the optimizer state over the data axis; updated parameters are gathered.
        compile_for: TPU slice, such as v5e:2x4: only compile the step for it and report memory, collectives and
            estimated time. Rows have 128 tokens unless --data is given; --out is not used.
        tracking: trackers that show the metrics in addition to OUT/metrics.jsonl.
        publication: repository on the hub that gets the finished model.
        hosts: processes of the run; each runs this same command.
    """
    join_hosts(hosts, "train")
    require_trackers(tracking)
    require_publication(publication)
    sized_preset(preset, sizes)  # an error here comes before anything is read
    token_data = None if data is None else open_data(data)
    devices = make_mesh(mesh, devices_for(compile_for))
    chosen = chosen_preset(
        preset,
        sizes,
        token_data,
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        initialization=initialization,
        dtype=number_format(dtype, devices),
    )
    _check_numbers(chosen.batch_size, micro_batches, devices, save_every, eval_every, seed)
    of_preset = (chosen.model, chosen.optimizer, chosen.steps)
    program = compiled(*of_preset, micro_batches, devices, fsdp, chosen.initialization, shard_optimizer)
    if compile_for is not None:
        _report_compiled(program, chosen, token_data, devices)
        return
    if token_data is None or out is None:
        raise ValueError("give --data, a folder written by `python -m train prepare`, and --out, the run's folder.")
    settings = {"kind": "lm", "preset": preset, **_preset_settings(chosen), "micro_batches": micro_batches}
    settings |= {"seed": seed, "eval_every": eval_every, "data": token_data.fingerprint, "mesh": axes_in_use(devices)}
    settings |= {"fsdp": fsdp, "shard_optimizer": shard_optimizer, "save_every": save_every}
    with open_run(out, settings | {"source": {"data": whole_path(data)}}, MAY_CHANGE, tracking) as run:
        say(chosen.describe())
        _train(run, chosen.model, program, token_data, devices)
        if run.is_finished:
            push_model(publication, run.folder, token_data.meta)


def _report_compiled(program: Program, chosen: Preset, token_data: TokenData | None, devices: Mesh) -> None:
    """Compile the step for a batch, and report what it needs."""
    shape = (chosen.batch_size, token_data.row_length if token_data else DEFAULT_ROW_LENGTH)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=program.rows)
    flops = training_flops_per_token(chosen.model, shape[1]) * math.prod(shape)
    report_step(program.step, (program.abstract, rows), devices, flops)


def _preset_settings(chosen: Preset) -> dict[str, Any]:
    """Return the part of a run's settings that its preset determines."""
    return {
        "model": chosen.model.to_dict(),
        "optimizer": dataclasses.asdict(chosen.optimizer),
        "initialization": chosen.initialization,
        "steps": chosen.steps,
        "batch_size": chosen.batch_size,
    }


def _train(run: Run, config: ModelConfig, program: Program, data: TokenData, devices: Mesh) -> None:
    steps, batch_size, seed, eval_every = (run.settings[n] for n in ("steps", "batch_size", "seed", "eval_every"))
    held_out_loss = _held_out_loss(config, data, program, devices, batch_size)
    gather = _gatherer(devices)

    def make_batch(step: int) -> jax.Array:
        indices = batch_indices(len(data.train), batch_size, seed, step)
        return rows_on_devices(data.train, indices, program.rows, np.int32)

    state = run.restore(program.abstract)
    if state is None:
        state = program.init(jax.random.key(seed))
    optimizer = LMOptimizer(**run.settings["optimizer"])
    run.say_lengthened(lambda length, step: learning_rate_schedule(optimizer, length)(step))
    run.say_epochs(len(data.train) / batch_size, "the prepared rows")
    flops_per_token = training_flops_per_token(config, data.row_length)
    for done, batch in run.steps(make_batch, flops_per_token, lambda line: f"loss {line['loss']:.4f}"):
        state, metrics = settled(program.step(state, batch))
        if done % eval_every == 0 or done == steps:
            sample = _sample(config, data, gather(state.params), done)
            metrics = {**metrics, **held_out_loss(state.params), **sample}
        run.log(done, metrics)
        if run.must_save(done):
            run.save(done, state)
    if not run.is_finished:
        return
    params, model = gather(state.params), run.folder / "model"
    on_first(lambda: publish(config, params, data.folder, model))
    say(f"{run.folder}: {steps} steps done, {run.speed()}; the model is in {model}")


class Program(NamedTuple):
    """A run's compiled functions and the shardings of its arrays.

    The mesh may consist of absent devices: `--compile-for` compiles the same step that a run executes.
    """

    step: Callable[[LMState, Any], tuple[LMState, dict[str, Any]]]
    """(state, rows) -> (next state, metrics)."""
    init: Callable[[jax.Array], LMState]
    """Key -> the state before the first step."""
    abstract: LMState
    """Shapes, number formats and shardings of the state."""
    rows: NamedSharding
    """Sharding of a batch."""


def compiled(
    config: ModelConfig,
    optimizer: LMOptimizer,
    steps: int,
    micro_batches: int,
    mesh: Mesh,
    fsdp: bool,
    initialization: Initialization = "reference",
    shard_optimizer: bool = False,
) -> Program:
    """Return the run's compiled functions; nothing is computed yet."""
    rows = NamedSharding(mesh, P("data", None))
    transformation = make_optimizer(optimizer, steps)
    init = functools.partial(init_state, config=config, optimizer=transformation, initialization=initialization)
    shapes = jax.eval_shape(init, jax.random.key(0))
    whole, split = (shardings(shapes.params, rules, mesh) for rules in (LM_RULES, LM_FSDP_RULES))
    of_optimizer = (*(LM_FSDP_RULES if fsdp or shard_optimizer else LM_RULES), *STEP_RULES)
    placed = shapes._replace(
        step=NamedSharding(mesh, P()),
        params=split if fsdp else whole,
        optimizer=shardings(shapes.optimizer, of_optimizer, mesh),
    )
    step = functools.partial(
        train_step,
        config=config,
        optimizer=transformation,
        schedule=learning_rate_schedule(optimizer, steps),
        micro_batches=micro_batches,
        computed_on=whole,
        updated_on=split if shard_optimizer else None,
    )
    platform = mesh.devices.flat[0].platform
    options = _WHOLE_PRODUCTS if platform == "tpu" and (fsdp or shard_optimizer) else fast_compiler_options(platform)
    return Program(
        step=jax.jit(
            step,
            in_shardings=(placed, rows),
            out_shardings=(placed, NamedSharding(mesh, P())),
            donate_argnums=0,
            compiler_options=options,
        ),
        init=jax.jit(init, out_shardings=placed),
        abstract=abstract_arrays(shapes, placed),
        rows=rows,
    )


def _check_numbers(
    batch_size: int, micro_batches: int, mesh: Mesh, save_every: int, eval_every: int, seed: int
) -> None:
    parts = mesh.shape["data"] * micro_batches
    if batch_size < 1 or micro_batches < 1 or batch_size % parts:
        raise ValueError(
            f"--batch-size {batch_size} must be a multiple of {parts}: "
            f"{mesh.shape['data']} devices on data x {micro_batches} micro-batches."
        )
    if min(save_every, eval_every) < 1:
        raise ValueError(f"--save-every {save_every} and --eval-every {eval_every} must be 1 or more.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed}: seeds are 0 to {2**32 - 1}.")


def _held_out_loss(
    config: ModelConfig, data: TokenData, program: Program, mesh: Mesh, batch_size: int
) -> Callable[[Any], dict[str, jax.Array]]:
    """Return a function of the parameters: the mean loss over the first held-out rows, if the data has any."""
    rows = np.asarray(data.valid[:HELD_OUT_ROWS], np.int32)
    missing = -len(rows) % batch_size  # rows of [PAD] fill the last batch and add nothing to the sums
    rows = np.concatenate([rows, np.full((missing, rows.shape[1]), config.pad_id, np.int32)])
    batches = [
        jax.make_array_from_callback(part.shape, program.rows, lambda index, part=part: part[index])
        for part in rows.reshape(-1, batch_size, rows.shape[1])
    ]
    placed = jax.tree.map(lambda leaf: leaf.sharding, program.abstract.params)
    loss = jax.jit(
        lambda params, tok_ids: summed_loss(params, config, tok_ids, config.pad_id),
        in_shardings=(placed, program.rows),
        out_shardings=NamedSharding(mesh, P()),
        compiler_options=fast_compiler_options(),
    )

    def held_out(params: Any) -> dict[str, jax.Array]:
        sums = np.array([jax.device_get(loss(params, batch)) for batch in batches]).reshape(-1, 2).sum(axis=0)
        return {"held_out_loss": sums[0] / sums[1]} if len(batches) else {}

    return held_out


def _gatherer(mesh: Mesh) -> Callable[[Any], Any]:
    """Return a function that gathers sharded arrays whole onto one device of every process."""
    gather = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
    return lambda tree: jax.tree.map(lambda array: array.addressable_data(0), settled(gather(tree)))


def _sample(config: ModelConfig, data: TokenData, params: Any, step: int) -> dict[str, str]:
    """Return a story sampled from the model, on the first process: text if the data has a tokenizer, ids otherwise."""
    if not is_first():
        return {}
    begin = np.array([[config.begin_id]], np.int32)
    (end,) = continue_in_steps(HookedModel(params, config), begin, SAMPLE_TOKENS, 0.8, config.end_id, seed=step)
    ids = end.tok_ids[0, 1:]
    tokenizer = saved_tokenizer(data.folder)
    return {"sample": str(tokenizer.decode(ids)) if tokenizer else " ".join(map(str, ids))}


def publish(config: ModelConfig, params: Any, data: Path | None, place: epath.Path) -> None:
    """Write a model's folder, with the tokenizer of the data's folder, if it has one."""
    arrays = {name: np.asarray(array) for name, array in flatten(params).items()}
    with local_folder(place) as folder:
        save_model(dataclasses.replace(config, dtype="float32"), arrays, folder, saved_tokenizer(data))

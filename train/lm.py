"""Train the language model: `python -m train lm --preset tiny_model --data DATA --out OUT`.

The same command again goes on where the last one stopped, to the bit. One honest loop: mesh, data, state, step, log,
checkpoint. SIGTERM and Ctrl-C save and stop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

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
from tinymodel_jax.model.generate import continue_prompts
from tinymodel_jax.params import flatten
from tinymodel_jax.runtime.compilation import fast_compiler_options
from tinymodel_jax.training.data import TokenData, batch_indices, open_data
from tinymodel_jax.training.data_folder import DEFAULT_ROW_LENGTH
from tinymodel_jax.training.flops import peak_flops, training_flops_per_token
from tinymodel_jax.training.lm_step import (
    Initialization,
    LMOptimizer,
    LMState,
    summed_loss,
)
from tinymodel_jax.training.sharding import rows_on_devices
from train.compile_for import report_step
from train.devices import DType, number_format, open_mesh
from train.hosts import ONE_PROCESS, Hosts, is_first, join_hosts, on_first, say, settled
from train.lm_program import Program, build_program
from train.loop import OpenRun, open_run, run_steps
from train.presets import AS_PRESET, PRESETS, OptimizerOptions, PresetName
from train.progress import TrainingProgress
from train.run_files import local_folder
from train.run_folder import MetricsLog
from train.trackers import NO_TRACKING, Tracking, open_trackers, require_trackers

HELD_OUT_ROWS = 512
SAMPLE_TOKENS = 60


def lm(
    preset: PresetName,
    *,
    data: str | None = None,
    out: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    micro_batches: int = 1,
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerOptions] = AS_PRESET,
    initialization: Initialization | None = None,
    dtype: DType = "auto",
    seed: int = 0,
    save_every: int = 1000,
    eval_every: int = 500,
    mesh: str = "",
    fsdp: bool = False,
    compile_for: str | None = None,
    tracking: tyro.conf.OmitArgPrefixes[Tracking] = NO_TRACKING,
    hosts: tyro.conf.OmitArgPrefixes[Hosts] = ONE_PROCESS,
) -> None:
    """Train a language model, or go on with a run that was stopped.

    Args:
        preset: sizes and recipe; the options below replace single settings of it.
        data: folder written by `python -m train prepare`.
        out: run's folder, or gs://…; the finished model is in OUT/model, and TinyModel(OUT) loads it.
        steps: training steps.
        batch_size: rows a step, over all devices.
        micro_batches: parts of a batch that are computed one after the other, to save memory.
        optimizer: what replaces settings of the preset's optimizer.
        initialization: of the weights: reference, as published, or wide, with larger embeddings; by default the
            preset's.
        dtype: number format of the computation; auto is bfloat16 on an accelerator, float32 on a CPU.
        seed: of the initial weights and of the order of the rows.
        save_every: steps between checkpoints.
        eval_every: steps between held-out losses and samples.
        mesh: devices, as data=4,model=2; by default all of them on data.
        fsdp: split parameters and optimizer state over the data axis too.
        compile_for: TPU slice, such as v5e:2x4: compile the step for it, say what that gives, and stop. Without --data,
            rows have 128 tokens; --out is not used.
        tracking: what shows the metrics beside OUT/metrics.jsonl.
        hosts: the run's processes, each of which runs this same command.
    """
    join_hosts(hosts)
    require_trackers(tracking)
    token_data = None if data is None else open_data(data)
    device_mesh = open_mesh(mesh, compile_for)
    dtype_name = number_format(dtype, device_mesh)
    config, adamw, batch_size, steps = _resolve(preset, token_data, steps, batch_size, optimizer, dtype_name)
    _check_batch(batch_size, micro_batches, device_mesh)
    initialization = initialization or PRESETS[preset].initialization
    program = build_program(config, adamw, steps, micro_batches, device_mesh, fsdp, initialization)
    if compile_for is not None:
        _report(program, config, batch_size, token_data.row_length if token_data else DEFAULT_ROW_LENGTH, device_mesh)
        return
    if token_data is None or out is None:
        raise ValueError("give --data, a folder written by `python -m train prepare`, and --out, the run's folder.")
    _check_run(save_every, eval_every, seed)
    settings = {
        "kind": "lm",
        "preset": preset,
        "model": config.to_dict(),
        "optimizer": dataclasses.asdict(adamw),
        "initialization": initialization,
        "steps": steps,
        "batch_size": batch_size,
        "micro_batches": micro_batches,
        "seed": seed,
        "eval_every": eval_every,
        "data": token_data.fingerprint,
        "mesh": {axis: size for axis, size in device_mesh.shape.items() if size > 1},
        "fsdp": fsdp,
        "save_every": save_every,
    }
    with open_run(out, settings, may_change=("save_every", "mesh", "fsdp")) as run:
        _train(run, config, program, token_data, device_mesh, tracking)


def _report(program: Program, config: ModelConfig, batch_size: int, row_length: int, mesh: Mesh) -> None:
    rows = jax.ShapeDtypeStruct((batch_size, row_length), jnp.int32, sharding=program.rows)
    flops = training_flops_per_token(config, row_length) * batch_size * row_length
    report_step(program.step, (program.abstract, rows), mesh, flops)


def _train(
    run: OpenRun, config: ModelConfig, program: Program, data: TokenData, mesh: Mesh, tracking: Tracking
) -> None:
    steps, seed, batch_size = (run.settings[name] for name in ("steps", "seed", "batch_size"))
    state = run.checkpoints.restore(program.abstract)
    if state is None:
        state = program.init(jax.random.key(seed))
    first_step = int(state.step)
    run.checkpoints.forget_after(first_step)
    trackers = open_trackers(tracking, run.folder, run.settings, first_step)
    log = MetricsLog(run.folder / "metrics.jsonl", first_step, trackers)

    placed = jax.tree.map(lambda leaf: leaf.sharding, program.abstract.params)
    held_out = _held_out_loss(config, data, placed, mesh, batch_size)
    gather = _gatherer(mesh)
    sample = _sampler(config, data, gather)

    def make_batch(number: int) -> jax.Array:
        indices = batch_indices(len(data.train), batch_size, seed, number)
        return rows_on_devices(data.train, indices, program.rows, np.int32)

    flops = training_flops_per_token(config, data.row_length)
    peak = peak_flops(jax.devices()[0])
    progress = TrainingProgress(first_step, steps, flops, peak * mesh.size if peak else None, _describe)

    def observe(done: int, state: LMState) -> dict[str, Any]:
        if done % run.settings["eval_every"] and done != steps:
            return {}
        return {**held_out(state.params), **sample(state.params, done)}

    state, finished = run_steps(
        run,
        program.step,
        state,
        make_batch,
        first_step=first_step,
        observe=observe,
        log=log,
        progress=progress,
    )
    if not finished:
        say(f"stopped at step {int(state.step)} of {steps}; the same command goes on from there")
        return
    params = gather(state.params)
    on_first(lambda: _publish(config, params, data, run.folder / "model"))
    speed = f"{progress.tokens_per_second():,.0f} tokens/s" if first_step < steps else "nothing left to do"
    say(f"{run.folder}: {steps} steps done, {speed}; the model is in {run.folder / 'model'}")


def _resolve(
    preset: PresetName,
    data: TokenData | None,
    steps: int | None,
    batch_size: int | None,
    optimizer: OptimizerOptions,
    dtype: str,
) -> tuple[ModelConfig, LMOptimizer, int, int]:
    """Return the preset with the given options in it, and the data's vocabulary where the preset leaves it open."""
    chosen = PRESETS[preset]
    model = chosen.model
    if data is not None:
        if chosen.any_vocabulary:
            model = dataclasses.replace(model, d_vocab=data.vocab_size)
        elif model.d_vocab != data.vocab_size:
            raise ValueError(
                f"--preset {preset} has {model.d_vocab} ids, the data {data.vocab_size}; prepare it with its tokenizer."
            )
        if data.row_length > model.n_ctx:
            raise ValueError(
                f"the data has rows of {data.row_length} tokens, --preset {preset} a context of {model.n_ctx}."
            )
    given = {name: value for name, value in dataclasses.asdict(optimizer).items() if value is not None}
    steps = chosen.steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"--steps {steps} must be 1 or more.")
    return (
        dataclasses.replace(model, dtype=dtype),
        dataclasses.replace(chosen.optimizer, **given),
        chosen.batch_size if batch_size is None else batch_size,
        steps,
    )


def _check_batch(batch_size: int, micro_batches: int, mesh: Mesh) -> None:
    parts = mesh.shape["data"] * micro_batches
    if batch_size < 1 or micro_batches < 1 or batch_size % parts:
        raise ValueError(
            f"--batch-size {batch_size} must be a multiple of {parts}: "
            f"{mesh.shape['data']} devices on data x {micro_batches} micro-batches."
        )


def _check_run(save_every: int, eval_every: int, seed: int) -> None:
    if min(save_every, eval_every) < 1:
        raise ValueError(f"--save-every {save_every} and --eval-every {eval_every} must be 1 or more.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed}: seeds are 0 to {2**32 - 1}.")


def _held_out_loss(
    config: ModelConfig, data: TokenData, placed: Any, mesh: Mesh, batch_size: int
) -> Callable[[Any], dict[str, jax.Array]]:
    """Return the mean loss over the first held-out rows, if there are any, as a function of the parameters."""
    rows = np.asarray(data.valid[:HELD_OUT_ROWS], np.int32)
    missing = -len(rows) % batch_size  # rows of [PAD] fill the last batch and count nothing
    rows = np.concatenate([rows, np.full((missing, rows.shape[1]), config.pad_id, np.int32)])
    where = NamedSharding(mesh, P("data", None))
    batches = [
        jax.make_array_from_callback(part.shape, where, lambda index, part=part: part[index])
        for part in rows.reshape(-1, batch_size, rows.shape[1])
    ]
    loss = jax.jit(
        lambda params, tok_ids: summed_loss(params, config, tok_ids, config.pad_id),
        in_shardings=(placed, where),
        out_shardings=NamedSharding(mesh, P()),
        compiler_options=fast_compiler_options(),
    )

    def held_out(params: Any) -> dict[str, jax.Array]:
        sums = np.array([jax.device_get(loss(params, batch)) for batch in batches]).reshape(-1, 2).sum(axis=0)
        return {"held_out_loss": sums[0] / sums[1]} if len(batches) else {}

    return held_out


def _gatherer(mesh: Mesh) -> Callable[[Any], Any]:
    """Return a function that brings whole arrays together, on one device of every process."""
    gather = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
    return lambda tree: jax.tree.map(lambda array: array.addressable_data(0), settled(gather(tree)))


def _sampler(
    config: ModelConfig, data: TokenData, gather: Callable[[Any], Any]
) -> Callable[[Any, int], dict[str, str]]:
    """Return a function that tells a story, on the first process: text where the data has a tokenizer, else ids."""
    tokenizer = saved_tokenizer(data.folder)

    def sample(params: Any, step: int) -> dict[str, str]:
        whole = gather(params)
        if not is_first():
            return {}
        begin = np.array([[config.begin_id]], np.int32)
        ids = continue_prompts(HookedModel(whole, config), begin, SAMPLE_TOKENS, 0.8, config.end_id, seed=step)[0, 1:]
        return {"sample": str(tokenizer.decode(ids)) if tokenizer else " ".join(map(str, ids))}

    return sample


def _publish(config: ModelConfig, params: Any, data: TokenData, place: epath.Path) -> None:
    arrays = {name: np.asarray(array) for name, array in flatten(params).items()}
    with local_folder(place) as folder:
        save_model(dataclasses.replace(config, dtype="float32"), arrays, folder, saved_tokenizer(data.folder))


def _describe(line: Mapping[str, Any]) -> str:
    return f"loss {line['loss']:.4f}"

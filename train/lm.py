"""Train the language model: `python -m train lm --preset tiny_model --data DATA --out OUT`.

The same command again goes on where the last one stopped, to the bit. One honest loop: mesh, data, state, step, log,
checkpoint. SIGTERM and Ctrl-C save and stop.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinymodel_jax.compilation import fast_compiler_options
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.generate import continue_prompts
from tinymodel_jax.io.artifacts import save_model
from tinymodel_jax.io.default_tokenizer import saved_tokenizer
from tinymodel_jax.training.data import TokenData, host_batch, open_data
from tinymodel_jax.training.flops import peak_flops, training_flops_per_token
from tinymodel_jax.training.lm_step import (
    LMOptimizer,
    LMState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    summed_loss,
    train_step,
)
from tinymodel_jax.training.sharding import LM_FSDP_RULES, LM_RULES, make_mesh, shardings
from tinymodel_jax.weights import flatten
from train.loop import run_steps
from train.presets import PRESETS, PresetName
from train.progress import TrainingProgress
from train.run_folder import Checkpoints, MetricsLog, open_run_folder

HELD_OUT_ROWS = 512
SAMPLE_TOKENS = 60


def lm(
    preset: PresetName,
    *,
    data: str,
    out: Path,
    steps: int | None = None,
    batch_size: int | None = None,
    micro_batches: int = 1,
    learning_rate: float | None = None,
    schedule: Literal["wsd", "cosine"] | None = None,
    warmup_steps: int | None = None,
    weight_decay: float | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    seed: int = 0,
    save_every: int = 1000,
    eval_every: int = 500,
    mesh: str = "",
    fsdp: bool = False,
) -> None:
    """Train a language model, or go on with a run that was stopped.

    Args:
        preset: sizes and recipe; the options below replace single settings of it.
        data: folder written by `python -m train prepare`.
        out: run's folder; the finished model is in OUT/model, and TinyModel(OUT) loads it.
        steps: training steps.
        batch_size: rows a step, over all devices.
        micro_batches: parts of a batch that are computed one after the other, to save memory.
        learning_rate: peak learning rate.
        schedule: wsd (constant, then linear to zero) or cosine.
        warmup_steps: steps in which the learning rate rises.
        weight_decay: decoupled weight decay of the matrices.
        dtype: number format of the computation; auto is bfloat16 on an accelerator, float32 on a CPU.
        seed: of the initial weights and of the order of the rows.
        save_every: steps between checkpoints.
        eval_every: steps between held-out losses and samples.
        mesh: devices, as data=4,model=2; by default all of them on data.
        fsdp: split parameters and optimizer state over the data axis too.
    """
    token_data = open_data(data)
    config, optimizer, batch_size, steps = _resolve(
        preset, token_data, steps, batch_size, learning_rate, schedule, warmup_steps, weight_decay, dtype
    )
    device_mesh = make_mesh(mesh)
    _check_batch(batch_size, micro_batches, device_mesh)
    if min(save_every, eval_every) < 1:
        raise ValueError(f"--save-every {save_every} and --eval-every {eval_every} must be 1 or more.")
    run = {
        "kind": "lm",
        "preset": preset,
        "model": config.to_dict(),
        "optimizer": dataclasses.asdict(optimizer),
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
    open_run_folder(out, run, may_change=("save_every", "mesh", "fsdp"))
    checkpoints = Checkpoints(out / "checkpoints")
    try:
        _train(run, config, optimizer, token_data, out, device_mesh, fsdp, checkpoints)
    finally:
        checkpoints.close()


def _train(
    run: dict[str, Any],
    config: ModelConfig,
    optimizer: LMOptimizer,
    data: TokenData,
    out: Path,
    mesh: Mesh,
    fsdp: bool,
    checkpoints: Checkpoints,
) -> None:
    steps, seed, batch_size = run["steps"], run["seed"], run["batch_size"]
    rows, replicated = NamedSharding(mesh, P("data", None)), NamedSharding(mesh, P())
    transformation = make_optimizer(optimizer, steps)
    init = functools.partial(init_state, config=config, optimizer=transformation)
    abstract = jax.eval_shape(init, jax.random.key(seed))
    placed = shardings(abstract, LM_FSDP_RULES if fsdp else LM_RULES, mesh)

    # The state: the newest whole checkpoint, else a new one, made where it will live.
    like = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract, placed
    )
    state = checkpoints.restore(like)
    if state is None:
        state = jax.jit(init, out_shardings=placed)(jax.random.key(seed))
    first_step = int(state.step)
    checkpoints.forget_after(first_step)
    log = MetricsLog(out / "metrics.jsonl", first_step)

    schedule = learning_rate_schedule(optimizer, steps)
    step = jax.jit(
        functools.partial(
            train_step,
            config=config,
            optimizer=transformation,
            schedule=schedule,
            micro_batches=run["micro_batches"],
        ),
        in_shardings=(placed, rows),
        out_shardings=(placed, replicated),
        donate_argnums=0,
        compiler_options=fast_compiler_options(),
    )
    held_out = _held_out_loss(config, data, placed.params, mesh, batch_size)
    sample = _sampler(config, data)

    def make_batch(number: int) -> jax.Array:
        mine = host_batch(data, batch_size, seed, number, jax.process_index(), jax.process_count())
        return jax.make_array_from_process_local_data(rows, mine)

    flops = training_flops_per_token(config, data.row_length)
    peak = peak_flops(jax.devices()[0])
    progress = TrainingProgress(first_step, steps, flops, peak * mesh.size if peak else None, _describe)

    def observe(done: int, state: LMState) -> dict[str, Any]:
        if done % run["eval_every"] and done != steps:
            return {}
        return {**held_out(state.params), **sample(state.params, done)}

    state, finished = run_steps(
        step,
        state,
        make_batch,
        first_step=first_step,
        steps=steps,
        save_every=run["save_every"],
        observe=observe,
        log=log,
        checkpoints=checkpoints,
        progress=progress,
    )
    if not finished:
        print(f"stopped at step {int(state.step)} of {steps}; the same command goes on from there")
        return
    _publish(config, state, data, out, run)
    speed = f"{progress.tokens_per_second():,.0f} tokens/s" if first_step < steps else "nothing left to do"
    print(f"{out}: {steps} steps done, {speed}; the model is in {out / 'model'}")


def _resolve(
    preset: PresetName,
    data: TokenData,
    steps: int | None,
    batch_size: int | None,
    learning_rate: float | None,
    schedule: Any,
    warmup_steps: int | None,
    weight_decay: float | None,
    dtype: str,
) -> tuple[ModelConfig, LMOptimizer, int, int]:
    """Return the preset with the given options in it, and the data's vocabulary where the preset leaves it open."""
    chosen = PRESETS[preset]
    model = chosen.model
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
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    options = {
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup_steps": warmup_steps,
        "weight_decay": weight_decay,
    }
    given = {name: value for name, value in options.items() if value is not None}
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


def _sampler(config: ModelConfig, data: TokenData) -> Callable[[Any, int], dict[str, str]]:
    """Return a function that tells a story: text where the data has a tokenizer, else ids.

    Several processes hold parts of the parameters each and tell none.
    """
    tokenizer = saved_tokenizer(data.folder)

    def sample(params: Any, step: int) -> dict[str, str]:
        if jax.process_count() > 1:
            return {}
        begin = np.array([[config.begin_id]], np.int32)
        ids = continue_prompts(params, config, begin, SAMPLE_TOKENS, 0.8, config.end_id, seed=step)[0, 1:]
        return {"sample": str(tokenizer.decode(ids)) if tokenizer else " ".join(map(str, ids))}

    return sample


def _publish(config: ModelConfig, state: LMState, data: TokenData, out: Path, run: dict[str, Any]) -> None:
    """Write OUT/model."""
    gathered = jax.jit(lambda tree: tree, out_shardings=NamedSharding(_mesh_of(state), P()))(state.params)
    if jax.process_index() == 0:
        params = {name: np.asarray(array) for name, array in flatten(gathered).items()}
        tokenizer = saved_tokenizer(data.folder)
        save_model(dataclasses.replace(config, dtype="float32"), params, out / "model", tokenizer)


def _describe(line: Mapping[str, Any]) -> str:
    return f"loss {line['loss']:.4f}"


def _mesh_of(state: LMState) -> Mesh:
    sharding = state.step.sharding
    assert isinstance(sharding, NamedSharding)
    assert isinstance(sharding.mesh, Mesh)
    return sharding.mesh

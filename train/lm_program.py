"""The compiled functions of a language model's run: its step, its first state, and where their arrays live.

Built for the devices of a mesh, whether they are there or, with `--compile-for`, known to the compiler only: what a run
executes and what is compiled for another machine is the same step. Nothing is computed here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.runtime.compilation import fast_compiler_options
from tinymodel_jax.training.lm_step import (
    Initialization,
    LMOptimizer,
    LMState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    train_step,
)
from tinymodel_jax.training.sharding import LM_FSDP_RULES, LM_RULES, abstract_arrays, shardings


class Program(NamedTuple):
    """The compiled functions of a run, and where its arrays live."""

    step: Callable[[LMState, Any], tuple[LMState, dict[str, Any]]]
    """(state, rows) -> (state, metrics)."""
    init: Callable[[jax.Array], LMState]
    """Key -> the state before the first step."""
    abstract: LMState
    """Shapes, number formats and shardings of the state."""
    rows: NamedSharding
    """Of a batch."""


def build_program(
    config: ModelConfig,
    optimizer: LMOptimizer,
    steps: int,
    micro_batches: int,
    mesh: Mesh,
    fsdp: bool,
    initialization: Initialization = "reference",
) -> Program:
    """Return the run's compiled functions; nothing is computed yet."""
    rows = NamedSharding(mesh, P("data", None))
    transformation = make_optimizer(optimizer, steps)
    init = functools.partial(init_state, config=config, optimizer=transformation, initialization=initialization)
    shapes = jax.eval_shape(init, jax.random.key(0))
    placed = shardings(shapes, LM_FSDP_RULES if fsdp else LM_RULES, mesh)
    step = functools.partial(
        train_step,
        config=config,
        optimizer=transformation,
        schedule=learning_rate_schedule(optimizer, steps),
        micro_batches=micro_batches,
        computed_on=shardings(shapes, LM_RULES, mesh).params,
    )
    return Program(
        step=jax.jit(
            step,
            in_shardings=(placed, rows),
            out_shardings=(placed, NamedSharding(mesh, P())),
            donate_argnums=0,
            compiler_options=fast_compiler_options(mesh.devices.flat[0].platform),
        ),
        init=jax.jit(init, out_shardings=placed),
        abstract=abstract_arrays(shapes, placed),
        rows=rows,
    )

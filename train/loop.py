"""The loop of a training run: step after step, metrics on disk, checkpoints, and a clean stop when asked for one.

Shared by the programs; what a step computes, where its arrays live and what is done with the result is theirs. Rely on:
metrics of a step are where they belong before a checkpoint of it is begun; SIGTERM and Ctrl-C, at any of several
processes, finish the step, save and return; a loss that is not finite ends the run before anything of it is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from tinymodel_jax.training.data import prefetch
from train.hosts import settled
from train.progress import TrainingProgress
from train.run_folder import Checkpoints, MetricsLog

State = TypeVar("State")


def run_steps(
    step: Callable[[State, Any], tuple[State, Mapping[str, Any]]],
    state: State,
    make_batch: Callable[[int], Any],
    *,
    first_step: int,
    steps: int,
    save_every: int,
    observe: Callable[[int, State], Mapping[str, Any]],
    log: MetricsLog,
    checkpoints: Checkpoints,
    progress: TrainingProgress,
    stop_requested: Callable[[], bool],
) -> tuple[State, bool]:
    """Run steps `first_step` … `steps` - 1; return the state, and whether all of them were done.

    Args:
        step: (state, batch) -> (state, metrics), compiled; may reuse the old state's memory.
        make_batch: step -> batch on the devices; called ahead of time.
        save_every: steps between checkpoints; the last step, done or stopped at, is saved too.
        observe: (steps done, state) -> what is measured beside the step's own metrics, mostly nothing.
        log: closed at the end, as is `progress`.
        stop_requested: what `stop_requests` gives; entered before anything is compiled, where an exception in a signal
            handler would crash the compiler.

    Raises:
        ValueError: a loss is not finite; the step is named.
        OSError: metrics or a checkpoint cannot be written.
    """
    pending: list[tuple[int, dict[str, Any]]] = []

    def write_metrics() -> None:
        for number, metrics in pending:
            line = {"step": number, **jax.tree.map(_plain, jax.device_get(metrics))}
            _require_finite(line, number)
            log.append([line])
            progress.update(number, line)
        pending.clear()

    try:
        for number, batch in prefetch(make_batch, first_step, steps):
            state, metrics = settled(step(state, batch))
            done = number + 1
            metrics = {**metrics, **observe(done, state)}
            write_metrics()  # of the step before, while this one runs
            pending.append((done, metrics))
            stops = stop_requested()
            if stops or done % save_every == 0 or done == steps:
                write_metrics()
                log.publish()
                checkpoints.save(done, state)
            if stops:
                return state, done == steps
    finally:
        progress.close()
        log.close()
    return state, True


def _require_finite(line: Mapping[str, Any], step: int) -> None:
    for path, value in jax.tree_util.tree_leaves_with_path(line):
        names = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        if "loss" in names and not math.isfinite(value):
            whose = " of " + " member ".join(name for name in names if name != "loss") if len(names) > 1 else ""
            raise ValueError(
                f"the loss{whose} is {value} at step {step}; the last good checkpoint is kept. "
                "A lower --learning-rate with another --out may train."
            )


def _plain(value: Any) -> Any:
    """Return a number, or a list of them (7 digits: float32 has no more), for JSON; counts without a decimal point."""
    if isinstance(value, str):
        return value
    number = np.asarray(value)
    if number.ndim:
        return [float(f"{one:.7g}") for one in number.ravel()]
    number = float(number)
    return int(number) if number.is_integer() and abs(number) > 1 else number

"""The loop of a training run: step after step, metrics on disk, checkpoints, and a clean stop when asked for one.

Shared by the programs; what a step computes, where its arrays live and what is done with the result is theirs. Rely on:
metrics of a step are on disk before a checkpoint of it is begun; SIGTERM and Ctrl-C finish the step, save and return; a
loss that is not finite ends the run before anything of it is saved.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np

from tinymodel_jax.training.data import prefetch
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
) -> tuple[State, bool]:
    """Run steps `first_step` … `steps` - 1; return the state, and whether all of them were done.

    Args:
        step: (state, batch) -> (state, metrics), compiled; may reuse the old state's memory.
        make_batch: step -> batch on the devices; called ahead of time.
        save_every: steps between checkpoints; the last step, done or stopped at, is saved too.
        observe: (steps done, state) -> what is measured beside the step's own metrics, mostly nothing.

    Raises:
        ValueError: a loss is not finite; the step is named.
        OSError: metrics or a checkpoint cannot be written.
    """
    stop = threading.Event()
    pending: list[tuple[int, dict[str, Any]]] = []

    def write_metrics() -> None:
        for number, metrics in pending:
            line = {"step": number, **jax.tree.map(_plain, jax.device_get(metrics))}
            _require_finite(line, number)
            log.append([line])
            progress.update(number, line)
        pending.clear()

    try:
        with _stopping_on_signals(stop):
            for number, batch in prefetch(make_batch, first_step, steps):
                state, metrics = step(state, batch)
                done = number + 1
                metrics = {**metrics, **observe(done, state)}
                write_metrics()  # of the step before, while this one runs
                pending.append((done, metrics))
                if done % save_every == 0 or done == steps or stop.is_set():
                    write_metrics()
                    checkpoints.save(done, state)
                if stop.is_set():
                    return state, done == steps
    finally:
        progress.close()
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
    """Return an array as JSON numbers; counts without a decimal point."""
    if isinstance(value, str):
        return value
    number = np.asarray(value)
    if number.ndim:
        return number.astype(float).tolist()
    number = float(number)
    return int(number) if number.is_integer() and abs(number) > 1 else number


@contextmanager
def _stopping_on_signals(stop: threading.Event) -> Iterator[None]:
    """While inside, SIGTERM and SIGINT ask the loop to stop after its step; a second one is Python's own again."""
    before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: Any) -> None:
        del frame
        stop.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""The loop of a training run: step after step, metrics on disk, checkpoints, and a clean stop when asked for one.

Shared by the programs; what a step computes, where its arrays live and what is done with the result is theirs. Rely on:
metrics of a step are where they belong before a checkpoint of it is begun; SIGTERM and Ctrl-C, at any of several
processes, finish the step, save and return; a loss or gradient that is not finite ends the run before anything of it is
saved.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from etils import epath

from tinymodel_jax.training.data import prefetch
from train.hosts import on_first, settled, stop_requests
from train.progress import TrainingProgress
from train.run_files import write_file
from train.run_folder import Checkpoints, MetricsLog, open_run_folder
from train.run_lock import held_folder

State = TypeVar("State")
_TIME_FILE = "time.json"


class OpenRun(NamedTuple):
    """A run whose folder is open."""

    folder: epath.Path
    settings: Mapping[str, Any]
    """What its `config.json` says; `steps` and `save_every` are among it."""
    checkpoints: Checkpoints
    stop_requested: Callable[[], bool]
    """What `stop_requests` gives."""


@contextmanager
def open_run(out: str, settings: Mapping[str, Any], may_change: Sequence[str]) -> Iterator[OpenRun]:
    """Open a run's folder, and hear signals: an exception in a handler would crash a compilation.

    Args:
        settings, may_change: as `open_run_folder`, whose errors these are, beside those of `held_folder`.
    """
    folder = epath.Path(os.path.expanduser(out))
    with stop_requests() as stop_requested, held_folder(folder):
        open_run_folder(folder, settings, may_change)
        checkpoints = Checkpoints(folder / "checkpoints")
        try:
            yield OpenRun(folder, settings, checkpoints, stop_requested)
        finally:
            checkpoints.close()


def run_steps(
    run: OpenRun,
    step: Callable[[State, Any], tuple[State, Mapping[str, Any]]],
    state: State,
    make_batch: Callable[[int], Any],
    *,
    first_step: int,
    observe: Callable[[int, State], Mapping[str, Any]],
    log: MetricsLog,
    progress: TrainingProgress,
) -> tuple[State, bool]:
    """Run the steps from `first_step` on; return the state, and whether all of them were done.

    A checkpoint is saved every `save_every` steps, and of the last step, done or stopped at.

    Args:
        step: (state, batch) -> (state, metrics), compiled; may reuse the old state's memory.
        make_batch: step -> batch on the devices; called ahead of time.
        observe: (steps done, state) -> what is measured beside the step's own metrics, mostly nothing.
        log: closed at the end, as is `progress`.

    Raises:
        ValueError: a loss or a gradient is not finite; the step is named.
        OSError: metrics or a checkpoint cannot be written.
    """
    steps, save_every = run.settings["steps"], run.settings["save_every"]
    pending: list[tuple[int, dict[str, Any]]] = []
    started, before = time.monotonic(), trained_seconds(run.folder) if first_step else 0.0

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
            stops = run.stop_requested()
            if stops or done % save_every == 0 or done == steps:
                write_metrics()
                log.publish()
                on_first(lambda: _write_seconds(run.folder, before, time.monotonic() - started))
                run.checkpoints.save(done, state)
            if stops:
                return state, done == steps
    finally:
        progress.close()
        log.close()
    return state, True


def trained_seconds(out: epath.PathLike) -> float | None:
    """Return how long a run trained up to its last checkpoint, in all its sittings; what lies between does not count.

    None where that is not known: there is no checkpoint, or an earlier version began the run.
    """
    path = epath.Path(out) / _TIME_FILE
    return json.loads(path.read_text())["seconds"] if path.exists() else None


def _write_seconds(folder: epath.Path, before: float | None, now: float) -> None:
    if before is not None:
        write_file(folder / _TIME_FILE, json.dumps({"seconds": round(before + now, 1)}).encode() + b"\n")


def _require_finite(line: Mapping[str, Any], step: int) -> None:
    """Check the loss, and the gradient's norm, which is not finite in the last step before the parameters are not."""
    for path, value in jax.tree_util.tree_leaves_with_path(line):
        names = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        what = next((name for name in ("loss", "gradient_norm") if name in names), None)
        if what is not None and not math.isfinite(value):
            whose = " of " + " member ".join(name for name in names if name != what) if len(names) > 1 else ""
            raise ValueError(
                f"the {what.replace('_', ' ')}{whose} is {value} at step {step}; the last good checkpoint is kept. "
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

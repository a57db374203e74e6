"""A training run: its folder, steps, metrics, progress and checkpoints, and how it stops.

    with open_run(out, settings, may_change=(), tracking=tracking) as run:
        state = run.restore(abstract)
        if state is None:
            state = init()
        for done, batch in run.steps(make_batch, flops_per_token, describe):
            state, metrics = step(state, batch)
            run.log(done, metrics)
            if run.must_save(done):
                run.save(done, state)
        if run.is_finished: …

The metrics up to a step are on disk before the step's checkpoint is written. SIGTERM and Ctrl-C, sent to any process of
the run, end the loop after the current step and save it. A loss or gradient that is not finite raises an error before
that step is saved.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from etils import epath

from tinymodel_jax.runtime.collectives import on_first, say
from tinymodel_jax.training.data import prefetch
from train.checkpoints import Checkpoints
from train.progress import TrainingProgress
from train.run_files import write_file
from train.run_folder import MetricsLog, open_run_folder
from train.run_lock import held_folder
from train.stop import stop_requests
from train.trackers import NO_TRACKING, Tracking, open_trackers

_TIME_FILE = "time.json"


@contextmanager
def open_run(
    out: str, settings: Mapping[str, Any], may_change: Sequence[str], tracking: Tracking = NO_TRACKING
) -> Iterator[Run]:
    """Lock and open a run's folder, and handle SIGTERM and Ctrl-C until the block ends.

    The handlers only set a flag, because an exception in a handler would crash a compilation.

    Args:
        settings, may_change: as in `open_run_folder`.
        tracking: trackers that show the metrics in addition to `metrics.jsonl`.

    Raises:
        ValueError, OSError: as `open_run_folder` and `held_folder`.
    """
    folder = epath.Path(os.path.expanduser(out))
    with stop_requests() as stop_requested, held_folder(folder):
        lengthened_from = open_run_folder(folder, settings, may_change)
        run = Run(folder, settings, Checkpoints(folder / "checkpoints"), stop_requested, tracking, lengthened_from)
        try:
            yield run
        finally:
            run.close()


class Run:
    """A run whose folder is open."""

    def __init__(
        self,
        folder: epath.Path,
        settings: Mapping[str, Any],
        checkpoints: Checkpoints,
        stop_requested: Callable[[], bool],
        tracking: Tracking = NO_TRACKING,
        lengthened_from: int | None = None,
    ) -> None:
        """Prepare to run `settings["steps"]` steps, with a checkpoint every `settings["save_every"]`.

        Args:
            stop_requested: the function that `stop_requests` yields.
            lengthened_from: result of `open_run_folder`.
        """
        self.folder, self.settings = folder, settings
        self.done = 0
        """Steps done."""
        self._checkpoints, self._stop_requested, self._tracking = checkpoints, stop_requested, tracking
        self._lengthened_from = lengthened_from
        self._stopping = False
        self._log: MetricsLog | None = None
        self._progress: TrainingProgress | None = None
        self._pending: tuple[int, Mapping[str, Any]] | None = None

    def restore(self, like: Any) -> Any | None:
        """Return the state of the newest undamaged checkpoint, shaped and sharded as `like`; None if there is none.

        Cuts the metrics after that checkpoint's step. Call this once, before `steps`.
        """
        state, self.done = self._checkpoints.restore(like)
        self._checkpoints.forget_after(self.done)
        trackers = open_trackers(self._tracking, self.folder, self.settings, self.done)
        self._log = MetricsLog(self.folder / "metrics.jsonl", self.done, trackers)
        return state

    def steps(
        self,
        make_batch: Callable[[int], Any],
        flops_per_token: float,
        describe: Callable[[Mapping[str, Any]], str],
        unit: str = "tokens",
    ) -> Iterator[tuple[int, Any]]:
        """Yield (steps done after this one, batch) for every remaining step.

        Args:
            make_batch: number of the step, from 0 -> batch on the devices; called ahead of time.
            flops_per_token: floating-point operations per token; the metrics of a step count its `tokens`.
            describe: a step's metrics -> a few words for the progress; called for every step, in order.
            unit: what the speed counts.
        """
        steps = self.settings["steps"]
        self._started = time.monotonic()
        self._seconds_before = trained_seconds(self.folder) if self.done else 0.0
        self._progress = TrainingProgress(self.done, steps, flops_per_token, describe, unit)
        for number, batch in prefetch(make_batch, self.done, steps):
            yield number + 1, batch
            if self._stopping:
                break
        self._close_log()
        if not self.is_finished:
            say(f"stopped at step {self.done} of {steps}; the same command resumes there")

    def say_lengthened(self, learning_rate: Callable[[int, int], Any]) -> None:
        """Say that a run has more steps than at its last start, and what became of its learning rate.

        Args:
            learning_rate: (length of a run, number of a step from 0) -> the learning rate planned for it.
        """
        before, now = self._lengthened_from, self.settings["steps"]
        if before is None:
            return
        last, following = learning_rate(before, max(self.done, 1) - 1), learning_rate(now, self.done)
        say(
            f"lengthened from {before} to {now} steps; the learning rate's schedule now ends at step {now}: "
            f"{float(last):.3g} in step {self.done}, {float(following):.3g} in step {self.done + 1}"
        )

    def say_epochs(self, steps_per_epoch: float, what: str) -> None:
        """Say, once per start, which epoch a run is in or reaches, if it reads its data more than once.

        Args:
            steps_per_epoch: steps in which every row is read once.
            what: the data, such as "the prepared rows".
        """
        steps = self.settings["steps"]
        if self.is_finished or steps <= steps_per_epoch:
            return
        epoch = int(self.done // steps_per_epoch) + 1
        begun = f"step {self.done + 1} is in epoch {epoch}" if epoch > 1 else ""
        later = f"epoch 2 begins at step {int(steps_per_epoch) + 1}"
        say(f"{what} repeat: {begun or later}, and {steps} steps read them {steps / steps_per_epoch:.1f} times")

    def log(self, done: int, metrics: Mapping[str, Any]) -> None:
        """Record a step's metrics, and note whether a stop was requested. Call this once after each step.

        The metrics are written one call later, so that the devices need not wait.

        Raises:
            ValueError: a loss or a gradient is not finite; the message names the step.
            OSError: the metrics cannot be written.
        """
        self._write_metrics()
        self.done, self._pending = done, (done, metrics)
        self._stopping = self._stop_requested()

    def must_save(self, done: int) -> bool:
        """Return whether to save after the logged step: every `save_every` steps, at the end, and before a stop."""
        return self._stopping or done % self.settings["save_every"] == 0 or self.is_finished

    def save(self, done: int, state: Any) -> None:
        """Write all metrics up to this step, then start to write its checkpoint.

        Raises:
            ValueError, OSError: as `log`.
        """
        assert self._log is not None
        self._write_metrics()
        self._log.publish()
        on_first(self._write_seconds)
        self._checkpoints.save(done, state)

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return self.done == self.settings["steps"]

    def speed(self) -> str:
        """Return the mean speed as text, for the last line that a program prints."""
        if self._progress is None or not self._progress.seen:
            return "nothing left to do"
        return self._progress.speed()

    def close(self) -> None:
        """Close the metrics and wait until the last checkpoint is written."""
        try:
            self._close_log()
        finally:
            self._checkpoints.close()

    def _close_log(self) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._log is not None:
            log, self._log = self._log, None
            log.close()

    def _write_metrics(self) -> None:
        if self._pending is None:
            return
        assert self._log is not None
        assert self._progress is not None
        (step, metrics), self._pending = self._pending, None
        line = {"step": step, **jax.tree.map(_plain, jax.device_get(metrics))}
        _require_finite(line, step)
        self._log.append([line])
        self._progress.update(step, line)

    def _write_seconds(self) -> None:
        if self._seconds_before is not None:
            seconds = round(self._seconds_before + time.monotonic() - self._started, 1)
            write_file(self.folder / _TIME_FILE, json.dumps({"seconds": seconds}).encode() + b"\n")


def trained_seconds(out: epath.PathLike) -> float | None:
    """Return how many seconds a run has trained up to its last checkpoint, without the time it was stopped.

    None if that is unknown: the run has no checkpoint, or an earlier version started it.
    """
    path = epath.Path(out) / _TIME_FILE
    return json.loads(path.read_text())["seconds"] if path.exists() else None


def _require_finite(line: Mapping[str, Any], step: int) -> None:
    """Check the loss, and the gradient norm, which stops being finite one step before the parameters do."""
    for path, value in jax.tree_util.tree_leaves_with_path(line):
        names = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        what = next((name for name in ("loss", "gradient_norm") if name in names), None)
        if what is not None and not math.isfinite(value):
            whose = " of " + " member ".join(name for name in names if name != what) if len(names) > 1 else ""
            raise ValueError(
                f"the {what.replace('_', ' ')}{whose} is {value} at step {step}; the last good checkpoint is kept. "
                "Try a lower --learning-rate, with another --out."
            )


def _plain(value: Any) -> Any:
    """Return a number or a list of numbers for JSON: counts as integers, lists with 7 digits, all that float32 has."""
    if isinstance(value, str):
        return value
    number = np.asarray(value)
    if number.ndim:
        return [float(f"{one:.7g}") for one in number.ravel()]
    number = float(number)
    return int(number) if number.is_integer() and abs(number) > 1 else number

"""What a training run shows while it goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tinymodel_jax.runtime.collectives import is_first
from tinymodel_jax.training.flops import peak_flops

SECONDS_BETWEEN_LINES = 20.0


class TrainingProgress:
    """A progress bar on a terminal, or a line every 20 s elsewhere: metrics, speed, share of the devices' peak."""

    def __init__(
        self,
        first_step: int,
        steps: int,
        flops_per_token: float,
        describe: Callable[[Mapping[str, Any]], str],
        unit: str = "tokens",
    ) -> None:
        """Show the bar; the arguments are those of `Run.steps`."""
        self._steps, self._flops_per_token, self._words, self._unit = steps, flops_per_token, describe, unit
        peak = peak_flops(jax.devices()[0])
        self._peak = None if peak is None else peak * jax.device_count()
        self._started = self._updated = self._line_at = time.monotonic()
        self._timed_tokens = 0.0
        self.seen = 0
        """Steps shown."""
        self._bar = None
        self._shown = is_first()
        if self._shown and sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("compiling", total=steps, completed=first_step)
        elif self._shown and first_step < steps:
            print(f"compiling; then step {first_step + 1}/{steps}", file=sys.stderr, flush=True)

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the state after `step` steps."""
        self.seen += 1
        self._updated = now = time.monotonic()
        if self.seen == 1:  # the first step compiles; speed counts from there
            self._started = now
        else:
            self._timed_tokens += metrics["tokens"]
        described = self._describe(metrics)  # at every step: the words may be about an earlier one, too
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=described)
        elif self._shown and (now - self._line_at > SECONDS_BETWEEN_LINES or step == self._steps):
            self._line_at = now
            print(f"step {step}/{self._steps}  {described}", file=sys.stderr, flush=True)

    def tokens_per_second(self) -> float:
        """Return the mean speed since the first step was done."""
        return self._timed_tokens / max(self._updated - self._started, 1e-9)

    def speed(self) -> str:
        """Return that speed with its unit."""
        return f"{self.tokens_per_second():,.0f} {self._unit}/s"

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()

    def _describe(self, metrics: Mapping[str, Any]) -> str:
        speed = self.tokens_per_second()
        share = f"  {speed * self._flops_per_token / self._peak:.0%} of peak" if self._peak else ""
        return f"{self._words(metrics)}  {self.speed()}{share}"

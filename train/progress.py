"""What a training run shows while it runs: a bar on a terminal, a plain line now and then when piped.

Rely on: only the first of several processes shows anything. What is shown is recorded elsewhere.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train.hosts import is_first

SECONDS_BETWEEN_LINES = 20.0


class TrainingProgress:
    """What a program says of a step, tokens a second, share of the accelerator's peak when known, time left."""

    def __init__(
        self,
        first_step: int,
        steps: int,
        flops_per_token: float,
        peak_flops: float | None,
        describe: Callable[[Mapping[str, Any]], str],
    ) -> None:
        """Start the bar.

        Args:
            flops_per_token: floating-point operations of one of the `tokens` that a step's metrics count.
            peak_flops: of all devices together, FLOP/s; None where it is not known.
            describe: a step's metrics -> the few words that stand before the speed.
        """
        self._steps = steps
        self._flops_per_token, self._peak, self._words = flops_per_token, peak_flops, describe
        self._started = self._updated = self._line_at = time.monotonic()
        self._timed_tokens = 0.0
        self._seen = 0
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
        self._seen += 1
        if self._seen == 1:  # the first step compiles; speed counts from there
            self._started = time.monotonic()
        else:
            self._timed_tokens += metrics["tokens"]
        self._updated = now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self._describe(metrics))
        elif self._shown and (now - self._line_at > SECONDS_BETWEEN_LINES or step == self._steps):
            self._line_at = now
            print(f"step {step}/{self._steps}  {self._describe(metrics)}", file=sys.stderr, flush=True)

    def tokens_per_second(self) -> float:
        """Return the mean speed since the first step was done."""
        return self._timed_tokens / max(self._updated - self._started, 1e-9)

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()

    def _describe(self, metrics: Mapping[str, Any]) -> str:
        speed = self.tokens_per_second()
        share = f"  {speed * self._flops_per_token / self._peak:.0%} of peak" if self._peak else ""
        return f"{self._words(metrics)}  {speed:,.0f} tokens/s{share}"

"""TensorBoard and Weights & Biases: optional trackers that show the lines of `metrics.jsonl` as curves.

Neither package is imported unless its option is given. A resumed run continues its curves from the step it restored:
TensorBoard hides the points after that step, and W&B skips steps that it already has. `metrics.jsonl` remains the
record; nothing is read back from the trackers.
"""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from etils import epath

from tinymodel_jax.runtime.collectives import is_first
from tinymodel_jax.training.data_folder import is_remote

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""Option (and extra in pyproject.toml) -> package that it needs."""


@dataclass(frozen=True)
class Tracking:
    """Trackers that show a run's metrics in addition to `metrics.jsonl`."""

    tensorboard: bool = False
    """write the metrics for TensorBoard to OUT/tensorboard"""
    wandb: str | None = None
    """send the metrics to this Weights & Biases project"""


NO_TRACKING = Tracking()


class Tracker(Protocol):
    """A service that shows metrics."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Show a line of `metrics.jsonl`."""
        ...

    def close(self) -> None:
        """Send everything that was logged."""
        ...


def require_trackers(tracking: Tracking) -> None:
    """Check that the packages of the given options are installed.

    Raises:
        ImportError: one is missing.
    """
    for option, asked in (("tensorboard", tracking.tensorboard), ("wandb", tracking.wandb is not None)):
        if asked:
            _load(option)


def open_trackers(tracking: Tracking, out: epath.PathLike, config: Mapping[str, Any], first_step: int) -> list[Tracker]:
    """Return the trackers that the options name; none except on the first process.

    Args:
        out: folder of the run.
        config: configuration that W&B shows.
        first_step: steps already done.
    """
    if not is_first():
        return []
    trackers: list[Tracker] = []
    if tracking.tensorboard:
        trackers.append(_TensorBoard(epath.Path(out) / "tensorboard", first_step))
    if tracking.wandb is not None:
        trackers.append(_WandB(epath.Path(out), tracking.wandb, config))
    return trackers


def flat_metrics(value: Any, name: str = "") -> Iterator[tuple[str, float | str]]:
    """Yield (name, value) of every number and text: `{"M1": {"loss": [2.5, 3]}}` gives M1/loss/0 and M1/loss/1."""
    if isinstance(value, Mapping | list):
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        for part, inside in parts:
            yield from flat_metrics(inside, f"{name}/{part}" if name else str(part))
    else:
        yield name, value


class _TensorBoard:
    def __init__(self, folder: epath.Path, first_step: int) -> None:
        # Without the suffix, two files started in the same second would have the same name.
        self._writer = _load("tensorboard").SummaryWriter(
            str(folder), purge_step=first_step + 1, filename_suffix=f".{first_step}"
        )

    def log(self, line: Mapping[str, Any]) -> None:
        for name, value in flat_metrics(line):
            if isinstance(value, str):
                self._writer.add_text(name, value, line["step"])
            elif name != "step":
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, out: epath.Path, project: str, config: Mapping[str, Any]) -> None:
        identity = out / "wandb_id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        self._run = _load("wandb").init(
            project=project,
            name=out.name,
            id=identity.read_text(),
            resume="allow",
            config=dict(config),
            dir=None if is_remote(out) else str(out),
        )

    def log(self, line: Mapping[str, Any]) -> None:
        self._run.log({name: value for name, value in flat_metrics(line) if name != "step"}, step=line["step"])

    def close(self) -> None:
        self._run.finish()


def _load(option: str) -> Any:
    package = _PACKAGES[option]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"--{option} needs the package {package}, which cannot be loaded ({error}); "
            f"install it: pip install -e '.[{option}]'"
        ) from error

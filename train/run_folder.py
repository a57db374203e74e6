"""A training run's folder: its configuration, metrics and checkpoints, always in a state that the run can resume from.

    OUT/config.json     settings of the run at its last start, and the package versions of its first
    OUT/metrics.jsonl   one line per step, the same bytes whether or not the run was interrupted
    OUT/time.json       seconds of training up to the last checkpoint
    OUT/checkpoints/    the last three states (train/checkpoints.py)
    OUT/run.lock        exists while a run uses the folder (train/run_lock.py)
    OUT/model/          the finished model

Metrics up to a step are on disk before that step's checkpoint is written, and a resumed run cuts off the metrics after
the step it restored. A checkpoint that cannot be read, or whose checksum is wrong, is skipped for the one before it.
OUT may be an address (`gs://…`). Object stores cannot append, so there `metrics.jsonl` is copied whole before every
checkpoint and at the end. In a run of several processes, every process writes its part of the checkpoints, and the
first process writes everything else.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

import tinymodel_jax
from tinymodel_jax.runtime.collectives import is_first, on_first, warn
from tinymodel_jax.runtime.paths import user_path
from tinymodel_jax.training.data_folder import is_remote
from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe
from train.run_files import send, write_file, writing
from train.run_lock import LOCK_FILE
from train.trackers import Tracker

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def open_run_folder(out: epath.PathLike, config: Mapping[str, Any], may_change: Iterable[str] = ()) -> int | None:
    """Write the configuration; check that it resumes that of an earlier start, which may have had fewer `steps`.

    Returns:
        The number of steps before, if there are more now and the run has begun; None on processes after the first.

    Args:
        out: folder, or an address such as `gs://bucket/folder`.
        may_change: names of settings that do not affect the results and may differ when the run is resumed, or be
            missing from a run of an earlier version.

    Raises:
        ValueError: the folder holds a run with another configuration (the differences are listed), or other files.
        OSError: the folder cannot be written.
    """
    found: list[int | None] = []
    on_first(lambda: found.append(_open(epath.Path(out), config, may_change)))
    return found[0] if found else None


def run_settings(out: epath.PathLike) -> dict[str, Any]:
    """Return the settings of a run, as `open_run_folder` wrote them.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: its configuration cannot be read, or is that of something else.
    """
    path = epath.Path(out) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{out} is not the folder of a training run (there is no config.json).")
    return _read(path)


def as_json(value: Any) -> Any:
    """Return a value as JSON stores it, with lists instead of tuples, to compare it with what a folder has."""
    return json.loads(json.dumps(value))


def recorded_options(options: Any) -> dict[str, Any]:
    """Return a dataclass of options for a run's settings, with whole paths instead of those of existing files."""
    return {name: whole_path(value) for name, value in dataclasses.asdict(options).items()}


def whole_path(value: Any) -> Any:
    """Return the absolute path of an existing file or folder as text, any other path or text as it is."""
    if not isinstance(value, str | Path):
        return value
    there = value and not is_remote(value) and user_path(value).exists()
    return str(user_path(value).absolute()) if there else str(value)


def versions() -> dict[str, str]:
    """Return the versions of the packages that can affect the results."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"tinymodel_jax": tinymodel_jax.__version__, "python": sys.version.split()[0], **packages}


class MetricsLog:
    """`metrics.jsonl`: one JSON object per step, in order, each exactly once. Only the first process writes it."""

    def __init__(self, path: epath.PathLike, steps_done: int, trackers: Sequence[Tracker] = ()) -> None:
        """Open the log and cut off the lines after step `steps_done`.

        Args:
            trackers: get every line that is added, and are closed with the log.

        Raises:
            ValueError: lines before that step are missing.
            OSError: the log cannot be written.
        """
        self._path, self._trackers = epath.Path(path), trackers
        on_first(lambda: self._open(steps_done))

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines; they are on this machine's disk when this returns."""
        if not is_first():
            return
        lines = list(lines)
        with writing(self._path), open(self._local, "ab") as file:
            file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        for tracker in self._trackers:
            for line in lines:
                tracker.log(line)

    def publish(self) -> None:
        """Copy the log to its object store, if it is in one."""
        if not is_first() or not is_remote(self._path):
            return
        with writing(self._path):
            send(self._local, self._path)

    def close(self) -> None:
        """Publish the log and close it."""
        if not is_first():
            return
        for tracker in self._trackers:
            tracker.close()
        self.publish()
        if is_remote(self._path):
            self._local.unlink()

    def _open(self, steps_done: int) -> None:
        kept = self._path.read_bytes().splitlines(keepends=True)[:steps_done] if self._path.exists() else []
        if len(kept) < steps_done or (kept and not kept[-1].endswith(b"\n")):
            raise ValueError(
                f"{self._path} has {len(kept)} of the {steps_done} lines that its checkpoint needs; "
                "restore the file or start a new run."
            )
        write_file(self._path, b"".join(kept))
        self._local = Path(self._path)
        if is_remote(self._path):
            with tempfile.NamedTemporaryFile(prefix="metrics-", suffix=".jsonl", delete=False) as file:
                file.write(b"".join(kept))
            self._local = Path(file.name)


def _open(out: epath.Path, config: Mapping[str, Any], may_change: Iterable[str]) -> int | None:
    path, lengthened = out / "config.json", None
    content = {"format": "tinymodel_jax/run", "format_version": 1, **config, "versions": versions()}
    content = as_json(content)
    if path.exists():
        before = _read(path)
        if has_begun(out):
            lengthened = _resumed(out, before, content, may_change)
            content["versions"] = before.get("versions")
        if content == before:
            return None
    elif out.exists() and any(found.name != LOCK_FILE for found in out.iterdir()):
        raise ValueError(
            f"{out} holds files that are not a training run (there is no config.json); choose an empty folder."
        )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())
    return lengthened


def _resumed(
    out: epath.Path, before: Mapping[str, Any], now: Mapping[str, Any], may_change: Iterable[str]
) -> int | None:
    """Check that a run may be resumed with the settings of now; return its number of steps before if there are more."""
    lengthened = before["steps"] if now.get("steps", 0) > before.get("steps", 0) else None
    if "recipes" in before:  # fields that an earlier version did not have are at their defaults
        parsed = {name: DictionaryRecipe.from_dict(fields) for name, fields in before["recipes"].items()}
        before = {**before, "recipes": as_json({name: recipe.to_dict() for name, recipe in parsed.items()})}
    left_out = {*may_change, "format_version", "versions"} | (set() if lengthened is None else {"steps"})
    changed = _differences(before, now, left_out)
    if changed:
        raise ValueError(
            f"{out} holds a run with another configuration: {'; '.join(changed)}. "
            "Repeat its options to resume it, or choose another --out."
        )
    if before.get("versions") != now["versions"]:
        then = before.get("versions")
        warn(f"{out} was started with other versions ({then}); the numbers may differ in their last bits.")
    return lengthened


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); choose another --out.") from error
    if not isinstance(content, dict) or content.get("format") != "tinymodel_jax/run":
        raise ValueError(f"{path} is not a training run's configuration; choose another --out.")
    return content


def has_begun(out: epath.Path) -> bool:
    """Whether the run has done a step; before that, another configuration may replace its own."""
    metrics = out / "metrics.jsonl"
    return metrics.exists() and metrics.stat().length > 0


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], left_out: Collection[str]) -> list[str]:
    """Return `name: old -> new` for every setting that differs; names of nested settings are joined by dots.

    An empty list equals a setting that an earlier version did not record.
    """
    was, new = (
        _settings({name: value for name, value in one.items() if name not in left_out}) for one in (before, now)
    )
    names = dict.fromkeys((*was, *new))
    return [f"{name}: {was.get(name)!r} -> {new.get(name)!r}" for name in names if was.get(name) != new.get(name)]


def _settings(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    given = ((key, inside) for key, inside in value.items() if inside != [])
    parts = (_settings(inside, f"{name}.{key}" if name else str(key)) for key, inside in given)
    return {key: inside for part in parts for key, inside in part.items()}

"""A training run's folder: its configuration, metrics and checkpoints, in a state from which the run can go on.

    OUT/config.json     what was asked for, resolved, and the versions that ran it
    OUT/metrics.jsonl   one line a step, the same bytes whether or not the run was interrupted
    OUT/checkpoints/    Orbax; written in the background, the last few kept
    OUT/model/          the published artifact, once the run is done

The order that makes it safe: metrics up to a step are on disk before that step's checkpoint is written, and a run that
goes on cuts off the metrics after the step it restored. A checkpoint that cannot be read, or whose checksum is not that
of what was saved, is skipped for the one before it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import tinymodel_jax
from tinymodel_jax.atomic_files import replace_file
from tinymodel_jax.training.checksum import checksum

CHECKPOINTS_KEPT = 3
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def open_run_folder(out: Path, config: Mapping[str, Any], may_change: Iterable[str] = ()) -> None:
    """Write the configuration, or check that an interrupted run had the same.

    Args:
        may_change: names of settings that do not touch the numbers, and may differ when the run goes on.

    Raises:
        ValueError: the folder holds a run with another configuration (the difference is listed), or other files.
    """
    path = out / "config.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out wants a folder.")
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} holds files but no run of ours (no config.json); choose an empty folder.")
        out.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            content = {"format": "tinymodel_jax/run", "format_version": 1, **config, "versions": versions()}
            replace_file(path, (json.dumps(content, indent=2) + "\n").encode())
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); choose another --out.") from error
    if not isinstance(before, dict) or before.get("format") != "tinymodel_jax/run":
        raise ValueError(f"{path} is no training run's; choose another --out.")
    now = json.loads(json.dumps(config))
    fixed = [name for name in {**before, **now} if name not in (*may_change, "format", "format_version", "versions")]
    changed = [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in fixed if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{out} holds a run with another configuration: {'; '.join(changed)}. "
            "Repeat its options to go on, or choose another --out."
        )
    if before.get("versions") != versions():
        warn(
            f"{out} was started with other versions ({before.get('versions')}); "
            "the numbers may differ in their last bits."
        )


def versions() -> dict[str, str]:
    """Return the versions of the packages whose code makes the numbers."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"tinymodel_jax": tinymodel_jax.__version__, "python": sys.version.split()[0], **packages}


def warn(message: str) -> None:
    """Print a warning for the user as one line on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class MetricsLog:
    """`metrics.jsonl`: one JSON object a step, in order, none twice and none lost."""

    def __init__(self, path: Path, steps_done: int) -> None:
        """Open the log and cut off what follows step `steps_done`.

        Raises:
            ValueError: lines before that step are missing.
        """
        self._path = path
        kept = path.read_bytes().splitlines(keepends=True)[:steps_done] if path.exists() else []
        if len(kept) < steps_done or (kept and not kept[-1].endswith(b"\n")):
            raise ValueError(
                f"{path} has {len(kept)} of the {steps_done} lines that its checkpoint needs; restore it or start anew."
            )
        replace_file(path, b"".join(kept))

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines; they are on disk when this returns."""
        with open(self._path, "ab") as file:
            file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


class Checkpoints:
    """The last few states of a run; saving goes on in the background while the run does."""

    def __init__(self, folder: Path) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=CHECKPOINTS_KEPT, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: Any) -> None:
        """Start saving a state; raise what an earlier save met, such as a full disk."""
        numbers = np.asarray(checksum(state)).tolist()
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), checksum=ocp.args.JsonSave(numbers))
        self._manager.save(step, args=arguments)

    def restore(self, like: Any) -> Any | None:
        """Return the newest state that is whole, shaped and sharded as `like`; None if there is none.

        Every one that is not whole is named in a warning.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                arguments = ocp.args.Composite(state=ocp.args.StandardRestore(like), checksum=ocp.args.JsonRestore())
                restored: Any = self._manager.restore(step, args=arguments)
                if np.asarray(checksum(restored.state)).tolist() == restored.checksum:
                    return restored.state
                reason = "its checksum is wrong"
            except Exception as error:  # whatever a damaged file makes Orbax, TensorStore or JSON raise
                reason = " ".join(str(error).split())[:200]
            warn(f"checkpoint of step {step} is damaged and skipped: {reason}")
        return None

    def forget_after(self, step: int) -> None:
        """Delete checkpoints that follow `step`: they are damaged, and the run will write them anew."""
        for later in [s for s in self._manager.all_steps() if s > step]:
            self._manager.delete(later)

    def close(self) -> None:
        """Wait until everything is saved."""
        self._manager.wait_until_finished()
        self._manager.close()

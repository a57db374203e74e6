"""The checkpoints of a run: Orbax folders, written in the background, each with a checksum of its state."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tinymodel_jax.runtime.collectives import all_agree, warn
from tinymodel_jax.training.data_folder import is_remote
from tinymodel_jax.training.sharding import checksum
from train.run_files import words, writing

CHECKPOINTS_KEPT = 3


class Checkpoints:
    """The last few states of a run, saved in the background."""

    def __init__(self, folder: epath.PathLike, read_only: bool = False) -> None:
        """Open the folder; create it if it does not exist.

        Args:
            read_only: change nothing, so that another process may write to the folder.

        Raises:
            OSError: the folder cannot be written.
        """
        self._folder = epath.Path(folder) if is_remote(folder) else epath.Path(Path(folder).absolute())
        # When a folder cannot be created in the background, threads wait for it for minutes.
        folders_first = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else CHECKPOINTS_KEPT,
            enable_async_checkpointing=not read_only,
            async_options=folders_first,
            read_only=read_only,
            create=not read_only,  # this and the interval are what Orbax sets, with a warning
            save_interval_steps=0 if read_only else 1,
        )
        self._quiet, self._failed = _QuietLibraries(), False
        with writing(self._folder):
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, state: Any) -> None:
        """Start saving a state.

        Raises:
            OSError: this or an earlier save failed, on a full disk for example.
        """
        numbers = np.asarray(checksum(state)).tolist()
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), checksum=ocp.args.JsonSave(numbers))
        with self._saving():
            self._manager.save(step, args=arguments)

    @property
    def steps(self) -> list[int]:
        """Steps that there are checkpoints of, in rising order."""
        return sorted(self._manager.all_steps())

    def restore(self, like: Any, steps: Sequence[int] | None = None) -> tuple[Any | None, int]:
        """Return the newest undamaged state, shaped and sharded as `like`, and its step; None and 0 if there is none.

        A warning names every damaged checkpoint. All processes return the same state.

        Args:
            steps: only the checkpoints of these steps.
        """
        for step in reversed(self.steps if steps is None else steps):
            restored, reason = self._read(step, like)
            if not all_agree(not reason):
                reason = reason or "another process cannot read its part"
            elif np.asarray(checksum(restored.state)).tolist() == restored.checksum:
                return restored.state, step
            else:
                reason = "its checksum is wrong"
            warn(f"checkpoint of step {step} is damaged and skipped: {reason}")
        return None, 0

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints after `step`: they are damaged, and the run will write them again."""
        for later in [s for s in self._manager.all_steps() if s > step]:
            self._manager.delete(later)

    def close(self) -> None:
        """Wait until everything is saved. Do not wait after a failed save, because other saves may then never end.

        Raises:
            OSError: the last save failed.
        """
        if self._failed:
            return  # and keep the loggers silent: messages about the failure arrive until the process ends
        with self._saving():
            self._manager.wait_until_finished()
            self._manager.close()
        self._quiet.close()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Wait for the previous save. Orbax itself waits for minutes if it failed in one of several processes."""
        try:
            with writing(self._folder):
                while self._manager.is_saving_in_progress() and self._quiet.failure is None:
                    time.sleep(0.01)
                if self._quiet.failure is not None:
                    raise self._quiet.failure
                yield
        except OSError:
            self._failed = True
            raise

    def _read(self, step: int, like: Any) -> tuple[Any, str]:
        """Return the content of a checkpoint and an empty text, or None and why it cannot be read."""
        try:
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(like), checksum=ocp.args.JsonRestore())
            return self._manager.restore(step, args=arguments), ""
        except Exception as error:  # Orbax, TensorStore and JSON raise many kinds for damaged files
            return None, words(error)


class _QuietLibraries:
    """Silences Orbax, asyncio and TensorStore, which print pages about a failed save that raises an error anyway."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        """The exception that ended the thread in which Orbax saves."""
        self._loggers, self._hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
        sys.unraisablehook = self._without_echoes
        for logger in self._loggers:
            logger.addFilter(self._swallow)

    def close(self) -> None:
        """Restore their loggers."""
        sys.unraisablehook = self._hook
        for logger in self._loggers:
            logger.removeFilter(self._swallow)

    def _swallow(self, record: logging.LogRecord) -> bool:
        if record.threadName == "async_save" and record.exc_info:
            self.failure = record.exc_info[1]
        return False

    def _without_echoes(self, unraisable: Any) -> None:
        # TensorStore raises this for writes that end after the first failure
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook(unraisable)

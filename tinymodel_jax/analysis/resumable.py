"""Work that goes on where it was stopped: a file with the arrays so far, how much is done, and what of.

A long analysis saves what it has now and then; started again with the same key it goes on from there. The key says
what the numbers depend on (model, dictionary, data, options), so that a file never continues another computation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tinymodel_jax.atomic_files import replace_file


class Saved(NamedTuple):
    """What a work file held."""

    arrays: dict[str, np.ndarray]
    done: int
    """Units of work (rows, features; the caller's) that the arrays stand for."""


class Progress:
    """The work file of one computation.

    Args:
        path: the file; its folder must exist when something is saved.
        key: what the result depends on, by name; values that JSON holds. `fingerprint` shortens arrays.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]):
        self.path = path
        self.key = json.loads(json.dumps(dict(key)))

    def load(self) -> Saved | None:
        """Return what was saved; None where there is no file.

        Raises:
            ValueError: the file is of other work, or damaged.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "numpy") as file:
                metadata = file.metadata() or {}
                key, done = json.loads(metadata["key"]), int(metadata["done"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged or no work file ({error}); delete it to start anew.") from error
        changed = [name for name in sorted({*key, *self.key}) if key.get(name) != self.key.get(name)]
        if changed:
            what = ", ".join(_change(name, key, self.key) for name in changed)
            raise ValueError(
                f"{self.path} holds work on other input; changed: {what}. Ask for the same, or delete it to start anew."
            )
        return Saved(arrays, done)

    def save(self, arrays: Mapping[str, np.ndarray], done: int) -> None:
        """Put the arrays in the file's place at once; whoever is stopped meanwhile keeps the file before.

        Raises:
            OSError: it cannot be written.
        """
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        replace_file(self.path, save(contiguous, {"key": json.dumps(self.key), "done": str(done)}))

    def finish(self) -> None:
        """Delete the file: the work is done, and its result is elsewhere."""
        self.path.unlink(missing_ok=True)


def fingerprint(*arrays: Any) -> str:
    """Return 16 hex digits that change when a bit, a shape or a type of the arrays does (SHA-256)."""
    digest = hashlib.sha256()
    for array in arrays:
        values = np.ascontiguousarray(array)
        digest.update(f"{values.dtype.str} {values.shape}\n".encode())
        digest.update(values.view(np.uint8).data if values.size else b"")
    return digest.hexdigest()[:16]


def _change(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return f"{name} (was {before.get(name)!r:.40}, now {now.get(name)!r:.40})"

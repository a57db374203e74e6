"""Work files: an analysis that was stopped resumes from the arrays it saved.

A long analysis saves its arrays from time to time. Called again with the same key, it resumes from them. The key lists
everything the numbers depend on (model, dictionary, data, options), so a file never resumes a different computation. A
finished analysis keeps its file, in case the result cannot be saved. Delete the file once the result is saved.

Several processes share one file, which the first of them reads and writes: it holds the results of all rows so far. Any
number of processes can resume.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tinymodel_jax.lm import FeatureReader
from tinymodel_jax.model.forward import HookedModel
from tinymodel_jax.runtime.atomic_files import replace_file
from tinymodel_jax.runtime.collectives import gathered, is_first, of_first, on_all, on_first
from tinymodel_jax.runtime.paths import user_path


class OtherWorkError(ValueError):
    """A work file or a saved result belongs to a different computation."""


class Saved(NamedTuple):
    """The content of a work file."""

    arrays: dict[str, np.ndarray]
    done: int
    """Finished units of work; the caller decides what a unit is, such as a row or a feature."""


class Progress:
    """The work file of one computation. With several processes, all of them call its methods.

    Args:
        path: the file; its folder must exist when `save` is called.
        key: what the result depends on, as JSON values by name; `fingerprint` turns arrays into short strings.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]):
        self.path = user_path(path)
        self.key = json.loads(json.dumps(dict(key)))

    def load(self) -> Saved | None:
        """Return what was saved, or None if there is no file. Only the first process gets the arrays, others none.

        Raises:
            OtherWorkError: the file belongs to a different computation.
            ValueError: the file is damaged.
        """
        saved = on_all(lambda: self._read() if is_first() else None, "the first process")
        done = of_first(-1 if saved is None else saved.done)
        return None if done < 0 else saved or Saved({}, done)

    def _read(self) -> Saved | None:
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "numpy") as file:
                metadata = file.metadata() or {}
                key, done = json.loads(metadata["key"]), int(metadata["done"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.path} is damaged or not a work file ({error}); delete it to start over."
            ) from error
        changed = [name for name in sorted({*key, *self.key}) if key.get(name) != self.key.get(name)]
        if changed:
            what = ", ".join(_change(name, key, self.key) for name in changed)
            raise OtherWorkError(
                f"{self.path} holds work on different input; changed: {what}. Use the same input, or delete the "
                "file to start over."
            )
        return Saved(arrays, done)

    def save(self, arrays: Mapping[str, np.ndarray], done: int) -> None:
        """Replace the file in one step; if this is interrupted, the previous file stays.

        Args:
            arrays: of all processes together; only the first process's are written.
            done: finished units of all processes.

        Raises:
            OSError: it cannot be written.
        """
        facts = {"key": json.dumps(self.key), "done": str(done)}
        on_first(lambda: replace_file(self.path, save(_contiguous(arrays), facts)))


def _contiguous(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def fingerprint(*arrays: Any) -> str:
    """Return 16 hex digits of a SHA-256 over the values, shapes and types of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        values = np.ascontiguousarray(array)
        digest.update(f"{values.dtype.str} {values.shape}\n".encode())
        digest.update(values.view(np.uint8).data if values.size else b"")
    return digest.hexdigest()[:16]


def fingerprint_of_rows(rows: np.ndarray) -> str:
    """Return the fingerprint of rows of tokens that several processes divide; only the first one reads them all."""
    mine = np.array([int(fingerprint(rows), 16) if is_first() else 0], np.uint64)
    return f"{int(gathered(mine)[0][0]):016x}"


def fingerprints(reader: FeatureReader, model: HookedModel) -> dict[str, str]:
    """Return the fields `model` and `dictionary` of a key, for results that depend on both.

    Args:
        reader: `lm[tag]`.
        model: the model with those hooks that affect the result.
    """
    dictionary = reader.dictionary
    return {
        "model": _fingerprint_of((model.params, model.hooks), model.config),
        "dictionary": _fingerprint_of(dictionary.params, dictionary.config),
    }


def _fingerprint_of(tree: Any, config: Any) -> str:
    """Return a fingerprint of a tree's arrays, its structure (including a splice's switches) and a configuration."""
    leaves, structure = jax.tree.flatten(tree)
    words = f"{dataclasses.asdict(config)} {structure}"
    return fingerprint(np.frombuffer(words.encode(), np.uint8), *leaves)


def _change(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return f"{name} (was {before.get(name)!r:.40}, now {now.get(name)!r:.40})"

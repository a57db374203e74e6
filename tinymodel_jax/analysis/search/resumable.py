"""Work that goes on where it was stopped: a file with the arrays so far, how much is done, and what of.

A long analysis saves what it has now and then; started again with the same key it goes on from there. The key says
what the numbers depend on (model, dictionary, data, options), so that a file never continues another computation. The
file stays when all is done, for whoever cannot write the result at once: delete it when the result is kept.
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
from tinymodel_jax.runtime.paths import user_path


class OtherWorkError(ValueError):
    """A file of work or of its result stands for another computation than the one that was asked for."""


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
        self.path = user_path(path)
        self.key = json.loads(json.dumps(dict(key)))

    def load(self) -> Saved | None:
        """Return what was saved; None where there is no file.

        Raises:
            OtherWorkError: the file is of other work.
            ValueError: it is damaged.
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
            raise OtherWorkError(
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


def fingerprint(*arrays: Any) -> str:
    """Return 16 hex digits that change when a bit, a shape or a type of the arrays does (SHA-256)."""
    digest = hashlib.sha256()
    for array in arrays:
        values = np.ascontiguousarray(array)
        digest.update(f"{values.dtype.str} {values.shape}\n".encode())
        digest.update(values.view(np.uint8).data if values.size else b"")
    return digest.hexdigest()[:16]


def fingerprints(reader: FeatureReader, model: HookedModel) -> dict[str, str]:
    """Return what numbers about a dictionary in its model depend on: fields `model` and `dictionary` of a key.

    Args:
        reader: `lm[tag]`.
        model: the model, with the splices that the numbers see.
    """
    dictionary = reader.dictionary
    return {
        "model": _fingerprint_of((model.params, model.hooks), model.config),
        "dictionary": _fingerprint_of(dictionary.params, dictionary.config),
    }


def _fingerprint_of(tree: Any, config: Any) -> str:
    """Return a fingerprint of a tree's arrays, its structure (a splice's switches are in it), and a configuration."""
    leaves, structure = jax.tree.flatten(tree)
    words = f"{dataclasses.asdict(config)} {structure}"
    return fingerprint(np.frombuffer(words.encode(), np.uint8), *leaves)


def _change(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return f"{name} (was {before.get(name)!r:.40}, now {now.get(name)!r:.40})"

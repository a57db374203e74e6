"""Files of numbers and settings: safetensors, JSON and YAML, read with errors of one line and written atomically."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import yaml
from safetensors.numpy import load_file, save_file

from tinymodel_jax.runtime.atomic_files import replaced
from tinymodel_jax.runtime.paths import user_path

Result = TypeVar("Result")
DICTIONARY_FILE = "dictionary.safetensors"
"""The weights in this package's folder of a dictionary."""


def read_tensors(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Return the tensors of a `.safetensors` file, or of a PyTorch file: name -> array.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or does not hold tensors, as in `load_torch_file`.
    """
    path = user_path(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    from tinymodel_jax.io.torch_files import load_torch_file  # PyTorch's format

    return load_torch_file(path)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file.

    Raises:
        FileNotFoundError, ValueError: as `read_tensors`.
        PermissionError: the file may not be read.
    """
    with _opened_safetensors(path):
        return load_file(path)


def tensor_names(path: Path) -> set[str]:
    """Return the names of the tensors of a safetensors file, reading its header only.

    Raises:
        FileNotFoundError, PermissionError, ValueError: as `read_safetensors`.
    """
    with _opened_safetensors(path), safetensors.safe_open(path, "numpy") as file:
        return set(file.keys())


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the values of a JSON file that holds one object.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected a JSON object of settings.")
    return values


def read_yaml_object(path: Path) -> dict[str, Any]:
    """Return the values of a YAML file that holds one mapping.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    try:
        values = yaml.safe_load(path.read_bytes())
    # PyYAML raises more than its own errors: for dates, numbers and tags that do not exist, and for deep nesting
    except (OSError, yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged or not YAML: {reason:.200}; write or download it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected a mapping of settings.")
    return values


def write_safetensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Write a safetensors file atomically."""
    with replaced_tensors(tensors, path):
        pass


@contextlib.contextmanager
def replaced_tensors(tensors: Mapping[str, Any], path: Path) -> Iterator[None]:
    """Write a safetensors file next to its destination, and move it there at the end unless the block raises."""
    # Written without copies in memory: a published dictionary is 154 MB.
    with replaced(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        # np.ascontiguousarray would add an axis to a scalar
        try:
            save_file({name: np.asarray(array, order="C") for name, array in tensors.items()}, temporary)
        except safetensors.SafetensorError as error:  # raised when the disk is full
            raise OSError(str(error)) from error
        temporary.chmod(mode)  # save_file makes the file readable for its owner only
        yield


@contextlib.contextmanager
def _opened_safetensors(path: Path) -> Iterator[None]:
    """Name the file in errors that the block raises while reading it."""
    with path.open("rb"):  # safetensors says that a file that may not be read does not exist
        pass
    try:
        yield
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({error}); write or download it again."
        ) from error


def about(path: Path, read: Callable[[], Result]) -> Result:
    """Call `read`; put the path in front of the message of a ValueError."""
    try:
        return read()
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from error

"""Folders of models and dictionaries: the names of their files, and `config.json`, which says what they hold."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinymodel_jax.io.data_files import about, read_json_object
from tinymodel_jax.runtime.atomic_files import replace_file
from tinymodel_jax.runtime.paths import user_path

FORMAT_VERSION = 1
MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"
TOKENIZER_FILES = ("tokenizer.json", "token_table.json")
DICTIONARIES = "dictionaries"
"""The folder, in that of a model, that holds its dictionaries by tag."""


def own_folder(kind: str, directory: str | os.PathLike[str]) -> Path:
    """Make the folder; refuse one with the configuration of something else, which would be overwritten."""
    folder = named_folder(kind, directory)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / CONFIG_FILE).exists():
        try:
            config_values(kind, folder / CONFIG_FILE)
        except ValueError as error:
            raise ValueError(f"{error} Nothing was written; choose another folder.") from error
    return folder


def named_folder(kind: str, directory: Any) -> Path:
    """Return the path of a folder to write, which may not exist yet.

    Raises:
        ValueError: it is not a path, or is that of a file.
    """
    folder = named_path(kind, directory)
    if folder.is_file():
        raise ValueError(f"a {kind} is saved to a folder, and {folder} is a file. Nothing was written; name a folder.")
    return folder


def named_path(kind: str, path: Any) -> Path:
    """Return the path at which to save something.

    Raises:
        ValueError: it is not a path.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"a {kind} is saved to a folder, got {path!r:.80}; name one, '.' for the current one.")
    return user_path(path)


def write_config(kind: str, values: Mapping[str, Any], folder: Path) -> None:
    """Write the configuration of a model or a dictionary."""
    content = {"format": f"tinymodel_jax/{kind}", "format_version": FORMAT_VERSION, **values}
    replace_file(folder / CONFIG_FILE, (json.dumps(content, indent=2) + "\n").encode())


def read_config(kind: str, config_class: Any, folder: Path) -> Any:
    """Read the configuration of a model or a dictionary.

    Raises:
        ValueError: it cannot be read, or describes something else.
    """
    path = folder / CONFIG_FILE
    values = config_values(kind, path)
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version!r}; this release reads {FORMAT_VERSION}.")
    return about(path, lambda: config_class.from_dict(values))


def config_values(kind: str, path: Path) -> dict[str, Any]:
    """Return the values of a configuration file of this kind."""
    values = read_json_object(path)
    found = values.pop("format", None)
    if found != f"tinymodel_jax/{kind}":
        raise ValueError(f"{path} describes {found!r}, expected 'tinymodel_jax/{kind}'.")
    return values

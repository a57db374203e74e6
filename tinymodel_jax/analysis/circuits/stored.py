"""Folders that hold a graph or a circuit: arrays in `NAME.safetensors`, everything else in `NAME.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def stored(folder: str | os.PathLike[str], name: str) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Yield the content of both files, and report what the block misses in them as damage.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: the files are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder).expanduser()
    missing = [file for file in (f"{name}.safetensors", f"{name}.json") if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} holds no {name} ({', '.join(missing)} not found); {name}.save(folder) writes one."
        )
    try:
        yield json.loads((folder / f"{name}.json").read_text("utf-8")), load_file(folder / f"{name}.safetensors")
    except (KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds a damaged {name} ({error}); save it again.") from error

"""Files of named tensors that come from PyTorch: `.pt`, or safetensors where the name ends so.

One place for all that reads either. Rely on: no file is run, and a damaged one gives a ValueError of one line that
starts with the path. What the names mean is not looked at here.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load_file

from tinymodel_jax.io.torch_files import TensorEntry, TorchFileSummary, describe_torch_file, load_torch_file
from tinymodel_jax.runtime.paths import user_path

SAFETENSORS = ".safetensors"


def load_state_file(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Read a state dict: {name: array}. A `.pt` file as `load_torch_file`, whose errors these are."""
    return read_safetensors(path) if user_path(path).suffix == SAFETENSORS else load_torch_file(path)


def describe_state_file(path: str | os.PathLike[str]) -> TorchFileSummary:
    """Say what is in a file, as `describe_torch_file`; a safetensors file has the form `safetensors`."""
    path = user_path(path)
    if path.suffix != SAFETENSORS:
        return describe_torch_file(path)
    entries = (
        TensorEntry(name, array.shape, array.dtype.name, name, array.nbytes, is_view=False)
        for name, array in read_safetensors(path).items()
    )
    return TorchFileSummary("safetensors", path.stat().st_size, (), (), tuple(entries))


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the arrays of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    path = user_path(path)
    try:
        return load_file(path)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); write or download it again.") from error

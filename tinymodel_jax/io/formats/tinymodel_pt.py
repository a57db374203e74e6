"""Files of the reference, `.pt` or `.safetensors`: a relu dictionary, without its site."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save

from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.io.convert import dictionary_tensors
from tinymodel_jax.io.formats.rewriting import with_b_dec_subtracted
from tinymodel_jax.io.torch_files import save_torch_file
from tinymodel_jax.runtime.atomic_files import replace_file


def write(dictionary: Dictionary, path: Path) -> None:
    """Write a file with the reference's names; `b_dec` that the encoder subtracts is folded into its bias.

    Raises:
        ValueError: the reference has no room for the dictionary, or the name ends in neither .pt nor .safetensors.
    """
    config = dictionary.config
    if path.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"{path}: the name of the reference's file must end in .pt or .safetensors.")
    for fits, what in (
        (config.architecture == "relu", f"dictionaries are relu, not {config.architecture}"),
        (not config.skip, "dictionaries have no skip connection"),
        (config.normalize == "none", f"dictionaries do not normalize their input ({config.normalize})"),
        (not config.exclude, f"dictionaries do not leave out tokens {config.exclude}"),
    ):
        if not fits:
            raise ValueError(f"the reference's {what}; format='saelens' has room for it. Nothing was written.")
    params = with_b_dec_subtracted(dictionary, False).params
    tensors = {
        tensor.key: np.ascontiguousarray(tensor.to_torch(np.asarray(params[tensor.name])))
        for tensor in dictionary_tensors(config.n_features, config.d_in, config.d_out)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        save_torch_file(tensors, path)
    else:
        replace_file(path, save(tensors))

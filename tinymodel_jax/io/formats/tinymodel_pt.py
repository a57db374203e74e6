"""Files of the reference, `.pt` or `.safetensors`: a relu dictionary, without its site."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save

from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.io.convert import dictionary_tensors
from tinymodel_jax.io.formats.rewriting import with_b_dec_subtracted
from tinymodel_jax.io.formats.stored import require_room
from tinymodel_jax.io.torch_files import save_torch_file
from tinymodel_jax.runtime.atomic_files import replace_file


def write(dictionary: Dictionary, path: Path) -> None:
    """Write a file with the reference's names; `b_dec` that the encoder subtracts is folded into its bias.

    Raises:
        ValueError: the reference has no room for the dictionary, or the name ends in neither .pt nor .safetensors.
    """
    config = dictionary.config
    if path.suffix not in (".pt", ".safetensors") or path.is_dir():
        raise ValueError(f"{path}: give the name of a file that ends in .pt or .safetensors. Nothing was written.")
    others = f"format={'sparsify' if config.architecture == 'groupmax' else 'saelens'!r} has room for it"
    require_room(
        "the reference's dictionaries",
        (
            (config.architecture == "relu", f"are relu, not {config.architecture}; {others}"),
            (not config.skip, f"have no skip connection; {others}"),
            (config.normalize == "none", f"do not normalize their input ({config.normalize}); {others}"),
            (not config.exclude, f"do not leave out tokens {config.exclude}; {others}"),
        ),
    )
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

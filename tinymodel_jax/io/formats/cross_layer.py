"""Cross-layer transcoders of circuit-tracer: `W_enc_{l}.safetensors` and `W_dec_{l}.safetensors` for each layer.

The layers are numbered from 0; each reads its MLP's input and writes to the MLP outputs from its own layer on. relu, or
jumprelu with a threshold for each feature. Source: circuit-tracer 0.5.0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.io.data_files import read_safetensors, read_yaml_object
from tinymodel_jax.io.formats import circuit_tracer
from tinymodel_jax.io.formats.stored import Stored, numbers

CONFIG = "W_enc_0.safetensors"
"""The file that every folder of the format has."""


def recognizes(path: Path) -> bool:
    """Whether a path is a folder of a cross-layer transcoder."""
    return path.is_dir() and (path / CONFIG).is_file()


def read(folder: Path) -> Stored:
    """Read a folder; the site is that of the MLPs of all its layers.

    Raises:
        FileNotFoundError: the file of a layer is missing.
        ValueError: a file is damaged, tensors are missing, unexpected or of the wrong shape, or a threshold is below 0,
            which lets negative activations through; or a config.yaml beside them states another activation.
    """
    layers = len(list(folder.glob("W_enc_*.safetensors")))
    found = [_layer(folder, layer) for layer in range(layers)]
    n_features, width = found[0]["W_enc"].shape if found[0]["W_enc"].ndim == 2 else (0, 0)
    W_dec = np.zeros((layers * n_features, layers * width), found[0]["W_dec"].dtype)
    for layer, tensors in enumerate(found):
        shapes = {"W_enc": (n_features, width), "b_enc": (n_features,), "b_dec": (width,)}
        shapes |= {"threshold": (n_features,)} if "threshold" in found[0] else {}
        shapes |= {"W_dec": (n_features, layers - layer, width)}
        got = {name: array.shape for name, array in tensors.items()}
        if got != shapes:
            raise ValueError(f"{folder}: the tensors of layer {layer} of {layers} are {got}; expected {shapes}.")
        W_dec[layer * n_features : (layer + 1) * n_features, layer * width :] = tensors["W_dec"].reshape(n_features, -1)
    params = {name: np.concatenate([tensors[name] for tensors in found]) for name in found[0] if name != "W_dec"}
    params |= {"W_enc": params["W_enc"].T, "W_dec": W_dec}
    circuit_tracer.require_positive_jumps(params, folder)
    config = folder / circuit_tracer.CONFIG
    if config.is_file():
        circuit_tracer.require_activation(read_yaml_object(config), "threshold" in params, config)
    sites = [Site("M", layer) for layer in range(layers)]
    site = Site.join(sites) if layers > 1 else sites[0]
    fields = {"architecture": "jumprelu" if "threshold" in params else "relu"}
    return Stored(fields, params, (folder, folder), hooks=(site.hook_in, site.hook_out), is_transcoder=True)


def _layer(folder: Path, layer: int) -> dict[str, np.ndarray]:
    """Return the tensors of a layer, without its number in their names."""
    found = {}
    for part, names in (("W_enc", ("W_enc", "b_enc", "b_dec")), ("W_dec", ("W_dec",))):
        path = folder / f"{part}_{layer}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {path.name}; the layers are numbered from 0 without a gap.")
        tensors = read_safetensors(path)
        optional = ("threshold",) if part == "W_enc" and f"threshold_{layer}" in tensors else ()
        found |= numbers(tensors, {f"{name}_{layer}": name for name in (*names, *optional)}, path)
    return found

"""Folders of sparsify: `cfg.json` and `sae.safetensors` of one hook point; its folder is named by the module.

`multi_topk` is an option of training: features and predictions are those of the k largest, also where sparsify's own
`forward` returns the reconstruction by 4k. Source: sparsify 1.3.3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.io.data_files import about, read_json_object, read_safetensors
from tinymodel_jax.io.formats.hook_names import between, of_module
from tinymodel_jax.io.formats.rewriting import with_b_dec_subtracted
from tinymodel_jax.io.formats.stored import (
    Stored,
    flag,
    numbers,
    pair_in,
    require_room,
    require_stated,
    whole,
    write_pair,
)

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
ARCHITECTURES = ("topk", "groupmax")
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def recognizes(path: Path) -> bool:
    """Whether a path is a folder with sparsify's two files, or the second of them."""
    return all(file.is_file() for file in pair_in(path, CONFIG, WEIGHTS))


def read(path: Path) -> Stored:
    """Read a folder, which may be named by its weights.

    Raises:
        ValueError: a file is damaged, or the two do not fit.
    """
    path, weights = pair_in(path, CONFIG, WEIGHTS)
    folder = path.parent
    settings = read_json_object(path)
    architecture = settings.get("activation", "topk")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: activation {architecture!r:.80} is unknown; this package reads topk and groupmax.")
    skip, transcode = (
        about(path, lambda n=name: flag(settings, n, False)) for name in ("skip_connection", "transcode")
    )
    names = {**_NAMES, "W_skip": "W_skip"} if skip else _NAMES
    tensors = read_safetensors(weights)
    params = numbers(tensors, names, weights)
    params["W_enc"] = params["W_enc"].T
    if skip:
        params["W_skip"] = params["W_skip"].T
    stated = {"d_in": settings.get("d_in"), "d_out": settings.get("d_in"), "n_features": _n_features(settings)}
    require_stated(stated, params, path, weights)
    fields = {
        "architecture": architecture,
        "k": about(path, lambda: whole(settings.get("k", 32), "k")),  # sparsify's default
        "skip": skip,
        "subtract_b_dec": not transcode,
    }
    hookpoint = folder.parent.name if folder.name.startswith("seed") else folder.name
    return Stored(
        fields,
        params,
        (path, weights),
        hooks=between(settings.get("hook_in"), settings.get("hook_out")),
        guess=of_module(hookpoint, transcode),
        is_transcoder=transcode,
    )


def write(dictionary: Dictionary, folder: Path) -> None:
    """Write a folder that sparsify loads and computes the same with.

    The hook points are added to `cfg.json`, where sparsify ignores them.

    Raises:
        ValueError: sparsify has no room for the dictionary; the message names what has.
    """
    config = dictionary.config
    others = "SAELens or dictionary_learning" if config.architecture != "gated" or config.is_transcoder else "SAELens"
    require_room(
        "sparsify",
        (
            (config.architecture in ARCHITECTURES, f"has topk and groupmax, not {config.architecture}; use {others}"),
            (config.d_in == config.d_out, f"has equal widths only, not {config.d_in} and {config.d_out}"),
            (
                config.normalize == "none",
                f"does not normalize inputs ({config.normalize}); SAELens does, for topk SAEs",
            ),
            (not config.exclude, f"cannot leave out tokens {config.exclude}; SAELens can, for topk SAEs"),
        ),
    )
    written = with_b_dec_subtracted(dictionary, not config.is_transcoder)
    params = {name: np.asarray(array) for name, array in written.params.items()}
    tensors = {theirs: params[ours] for theirs, ours in _NAMES.items()} | {"encoder.weight": params["W_enc"].T}
    if config.skip:
        tensors["W_skip"] = params["W_skip"].T
    settings: dict[str, Any] = {
        "activation": config.architecture,
        "expansion_factor": max(1, config.n_features // config.d_in),
        "normalize_decoder": False,
        "num_latents": config.n_features,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": config.skip,
        "transcode": config.is_transcoder,
        "d_in": config.d_in,
        "hook_in": config.hook_in,
        "hook_out": config.hook_out,
    }
    write_pair(folder, (CONFIG, settings), (WEIGHTS, tensors))


def _n_features(settings: dict[str, Any]) -> int | None:
    """Return the stated number of features: `num_latents`, or if that is 0 the multiple of the width."""
    stated, width, factor = (settings.get(name) for name in ("num_latents", "d_in", "expansion_factor"))
    if stated:
        return stated
    return width * factor if isinstance(width, int) and isinstance(factor, int) else None

"""The options that say which activations a dictionary run trains on, and the source that they open."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.model.transformer import Transformer
from tinymodel_jax.training.data import open_data
from train.activation_sources import ActivationSource, ArrayActivations, ModelActivations
from train.devices import DType, is_present, number_format
from train.presets import PRESETS


@dataclass(frozen=True)
class ActivationOptions:
    """What a run's vectors are: a language model's at some sites, or those of files."""

    model: str = "mini"
    """language model: a published name or a folder; with --compile-for, a preset of `python -m train lm` too"""
    sites: str = ""
    """comma list of places, such as M0,M1,A0: a kind (A, M, T, Mo, Ra, Rm) and a layer"""
    data: str | None = None
    """folder written by `python -m train prepare`; without it, --compile-for takes stories of 128 tokens"""
    activations: Path | None = None
    """.npy file (rows, width) to train on instead of a model's sites"""
    targets: Path | None = None
    """.npy file (rows, width) that a transcoder of --activations predicts"""
    batch_size: int = 4096
    """vectors a step"""
    stories: int | None = None
    """stories a step that the vectors are drawn from; by default as many as it takes"""
    data_seed: int = 0
    """of the order of the stories, and of the tokens drawn from them"""
    held_out_stories: int = 512
    """stories that the finished dictionaries are measured on, at most"""
    dtype: DType = "auto"
    """number format of the language model; auto is bfloat16 on an accelerator, float32 on a CPU"""


def open_activations(options: ActivationOptions, mesh: Mesh) -> tuple[ActivationSource, dict[str, Any]]:
    """Return the source of a run's activations, and what the run's configuration says of it.

    Raises:
        ValueError: the options do not fit together, the model, the data or the mesh.
        FileNotFoundError: there is no such model or data.
    """
    if min(options.batch_size, options.held_out_stories) < 1:
        raise ValueError("--batch-size and --held-out-stories must be 1 or more.")
    if options.stories is not None and options.stories < 1:
        raise ValueError(f"--stories {options.stories} must be 1 or more.")
    if not 0 <= options.data_seed < 2**32:
        raise ValueError(f"--data-seed {options.data_seed}: seeds are 0 to {2**32 - 1}.")
    parts = mesh.shape["data"]
    if options.batch_size % parts:
        raise ValueError(f"--batch-size {options.batch_size} must be a multiple of {parts}, the data axis.")
    source, origin = _arrays(options, mesh) if options.activations is not None else _model_sites(options, mesh)
    places = {name: dataclasses.asdict(place) for name, place in source.places.items()}
    return source, {**origin, "places": places, "data_seed": options.data_seed}


def _arrays(options: ActivationOptions, mesh: Mesh) -> tuple[ActivationSource, dict[str, Any]]:
    assert options.activations is not None
    if options.sites or options.data is not None:
        raise ValueError("--activations takes the place of --sites and --data; give one or the other.")
    if options.stories is not None:
        raise ValueError("--stories belongs to --sites: the rows of --activations come from no stories.")
    found = ArrayActivations(
        options.activations, options.targets, batch_size=options.batch_size, seed=options.data_seed, mesh=mesh
    )
    names = {"activations": options.activations.name, "targets": options.targets.name if options.targets else None}
    return found, {"arrays": names}


def _model_sites(options: ActivationOptions, mesh: Mesh) -> tuple[ActivationSource, dict[str, Any]]:
    if options.targets is not None:
        raise ValueError("--targets belongs to --activations; a model's site has its own targets.")
    if not options.sites or (options.data is None and is_present(mesh)):
        raise ValueError("give --sites and --data, or --activations.")
    sites = [Site.whole(tag, "--sites ") for tag in options.sites.split(",")]
    if len({site.tag for site in sites}) < len(sites):
        raise ValueError(f"--sites {options.sites!r} names a site twice.")
    config, params = _load_model(options.model, number_format(options.dtype, mesh), mesh)
    outside = [site.tag for site in sites if site.layer >= config.n_layers]
    if outside:
        raise ValueError(f"--sites {','.join(outside)}: the model's layers are 0..{config.n_layers - 1}.")
    data = None if options.data is None else open_data(options.data)
    found = ModelActivations(
        config,
        params,
        sites,
        data,
        batch_size=options.batch_size,
        stories=options.stories,
        seed=options.data_seed,
        held_out_stories=options.held_out_stories,
        mesh=mesh,
    )
    origin = {
        "model": {"name": options.model, "config": config.to_dict()},
        "data": data.fingerprint if data else None,
        "stories": found.stories,
        "held_out_stories": options.held_out_stories,
    }
    return found, origin


def _load_model(model: str, dtype: str, mesh: Mesh) -> tuple[ModelConfig, Any]:
    """Return a language model's configuration and its parameters on the mesh, or their shapes if it is elsewhere."""
    if not is_present(mesh) and model in PRESETS:
        config = dataclasses.replace(PRESETS[model].model, dtype=dtype)
        key, ids = jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
        return config, jax.eval_shape(Transformer(config).init, key, ids)["params"]
    from tinymodel_jax.lm import TinyModel

    lm = TinyModel(model, dtype=dtype)
    return lm.config, jax.device_put(lm.params, NamedSharding(mesh, P())) if is_present(mesh) else lm.params

"""Transcoder sets, one transcoder per layer, read and written whole as circuit-tracer has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tinymodel_jax.dictionaries.dictionary import Dictionary, require_finite
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.io.formats import circuit_tracer
from tinymodel_jax.io.formats.choose import folder_for, writable
from tinymodel_jax.io.formats.stored import placed
from tinymodel_jax.runtime.paths import user_path


def load_transcoder_set(folder: str | Path) -> dict[str, Dictionary]:
    """Return the transcoders of a set, by tag, from the lowest layer.

    Raises:
        FileNotFoundError: the folder has no config.yaml, or lacks a layer's file.
        ValueError: a file is damaged or not of a transcoder set, a parameter is not finite, or its hook points are
            not those of a site here.

    Examples:
        >>> from tinymodel_jax import TinyModel, load_transcoder_set, save_transcoder_set
        >>> lm = TinyModel("mini")
        >>> save_transcoder_set({tag: lm[tag].dictionary for tag in ("M2", "M3")}, "transcoders")
        >>> list(load_transcoder_set("transcoders"))
        ['M2', 'M3']
    """
    folder = user_path(folder)
    found = {}
    for path in circuit_tracer.layers(folder).values():
        stored = placed(circuit_tracer.read(path), None)
        require_finite(stored.params, f"the dictionary {path}")
        config = stored.config
        found[Site.at(config.hook_in, config.hook_out).tag] = Dictionary.from_params(config, stored.params)
    return found


def save_transcoder_set(dictionaries: Mapping[str, Dictionary], folder: str | Path) -> None:
    """Write transcoders as a set, which circuit-tracer loads if they are of layers 0, 1, … without a gap.

    Args:
        dictionaries: tag -> transcoder; all have as many features, and a skip connection or none.

    Raises:
        ValueError: the format has no room for one of them, its tag is that of another site, two are of one layer, they
            differ in hook points, numbers of features or skip connections, or the folder holds something else or other
            layers, which would be mistaken for this set's.

    Examples:
        >>> import os
        >>> from tinymodel_jax import TinyModel, save_transcoder_set
        >>> lm = TinyModel("mini")
        >>> save_transcoder_set({tag: lm[tag].dictionary for tag in ("M2", "M3")}, "transcoders")
        >>> sorted(os.listdir("transcoders"))
        ['config.yaml', 'layer_2.safetensors', 'layer_3.safetensors']
    """
    path = folder_for("circuit-tracer", folder)
    found = []
    for tag, dictionary in dictionaries.items():
        site, config = Site.whole(tag, "save_transcoder_set: "), dictionary.config
        found.append(circuit_tracer.as_layer(writable(dictionary, "circuit-tracer")))
        if (site.hook_in, site.hook_out) != (config.hook_in, config.hook_out):
            raise ValueError(
                f"save_transcoder_set: {tag!r} is given a transcoder from {config.hook_in} to {config.hook_out}. "
                "Nothing was written; give each the tag of its site."
            )
    circuit_tracer.write_set(found, path)

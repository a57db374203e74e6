"""The formats of dictionaries: which one a path has, found by its content, and which one to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.io.config_files import named_folder, named_path
from tinymodel_jax.io.data_files import DICTIONARY_FILE
from tinymodel_jax.io.formats import circuit_tracer, cross_layer, dictionary_learning, saelens, sparsify, tinymodel_pt
from tinymodel_jax.io.formats.names import FORMATS, Format, LibraryFormat
from tinymodel_jax.io.formats.rewriting import in_float32
from tinymodel_jax.io.formats.stored import Stored, listed, placed

OURS = "this package"


class _Reader(NamedTuple):
    recognizes: Callable[[Path], bool]
    read: Callable[[Path], Stored]
    config: str
    """File of settings, which a folder of the format always has."""


_READERS: dict[str, _Reader] = {
    "circuit-tracer (cross-layer)": _Reader(cross_layer.recognizes, cross_layer.read, cross_layer.CONFIG),
    "saelens": _Reader(saelens.recognizes, saelens.read, saelens.CONFIG),
    "sparsify": _Reader(sparsify.recognizes, sparsify.read, sparsify.CONFIG),
    "dictionary_learning": _Reader(
        dictionary_learning.recognizes, dictionary_learning.read, dictionary_learning.CONFIG
    ),
    "circuit-tracer": _Reader(circuit_tracer.recognizes, circuit_tracer.read, circuit_tracer.CONFIG),
}
_WRITERS: dict[Format, Callable[[Dictionary, Path], None]] = {
    "saelens": saelens.write,
    "sparsify": sparsify.write,
    "dictionary_learning": dictionary_learning.write,
    "circuit-tracer": circuit_tracer.write,
    "tinymodel-pt": tinymodel_pt.write,
}


def format_of(path: Path) -> str | None:
    """Return the name of another library's format that a file or folder has, or None."""
    return next((name for name, reader in _READERS.items() if reader.recognizes(path)), None)


def read_as(path: Path, site: Site | None) -> Dictionary | None:
    """Read a dictionary of another library; None if the path holds none.

    A folder may also be that of a run, with one dictionary in its folders. Arrays stay NumPy's.

    Args:
        site: where the dictionary belongs, if the files do not say; of a transcoder set, the layer to read.

    Raises:
        ValueError: the files are damaged, contradict each other, hold what this package cannot represent, or do not
            say the site; or several dictionaries are found. The message names the file.
    """
    name = format_of(path)
    if name is None:
        return _read_inside(path, site) if path.is_dir() else None
    if name == "circuit-tracer" and path.is_dir():
        path = _layer(path, site)
    return placed(_READERS[name].read(path), site)


def write_as(dictionary: Dictionary, path: Any, name: Any) -> None:
    """Write a dictionary in another library's format.

    Args:
        path: a folder, or for `tinymodel-pt` a file.

    Raises:
        ValueError: the format is unknown or has no room for the dictionary, or the folder holds something else.
    """
    if name not in FORMATS:
        raise ValueError(f"format {name!r:.80} is unknown; choose one of {', '.join(FORMATS)}.")
    place = named_path("dictionary", path) if name == "tinymodel-pt" else folder_for(name, path)
    _WRITERS[name](writable(dictionary, name), place)


def folder_for(name: LibraryFormat, path: Any) -> Path:
    """Return the path of a folder to write in a format.

    Raises:
        ValueError: it is not a path, is that of a file, or the folder holds something else.
    """
    folder = named_folder("dictionary", path)
    if not require_no_other(folder, name) and (folder / _READERS[name].config).exists():
        raise ValueError(
            f"{folder} holds a {_READERS[name].config} of something else. Nothing was written; choose another folder."
        )
    return folder


def require_no_other(folder: Path, owner: str) -> bool:
    """Return whether a folder holds a dictionary of its owner: `OURS`, or the name of a format.

    Raises:
        ValueError: it holds a dictionary of another.
    """
    holders = [OURS] if (folder / DICTIONARY_FILE).exists() else []
    holders += [name for name in [format_of(folder)] if name is not None]
    for holder in holders:
        if holder != owner:
            raise ValueError(f"{folder} holds a dictionary of {holder}. Nothing was written; choose another folder.")
    return bool(holders)


def writable(dictionary: Dictionary, name: Format) -> Dictionary:
    """Return a dictionary in float32, in which a library computes what this package does.

    Raises:
        ValueError: it has several hook points.
    """
    config = dictionary.config
    if len(config.hooks_in) > 1:
        kind = "crosscoders" if config.is_crosscoder else "cross-layer transcoders"
        raise ValueError(
            f"format {name!r} is not written for {kind}. Nothing was written; save_pretrained without format= keeps "
            "all hook points."
        )
    return in_float32(dictionary)


def _read_inside(path: Path, site: Site | None) -> Dictionary | None:
    found = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and format_of(folder)]
    if len(found) > 1:
        names = listed(folder.name for folder in found)
        raise ValueError(f"{path} holds {len(found)} dictionaries: {names}. Give the folder of one of them.")
    return read_as(found[0], site) if found else None


def _layer(folder: Path, site: Site | None) -> Path:
    """Return the file of a site's layer in a transcoder set."""
    files = circuit_tracer.layers(folder)
    if site is None and len(files) > 1:
        raise ValueError(
            f"{folder} is a set of {len(files)} transcoders; give site=, such as 'M0', or load all with "
            "load_transcoder_set(folder)."
        )
    layer = next(iter(files)) if site is None else site.layer
    if layer not in files:
        raise ValueError(f"{folder} has no transcoder of layer {layer}; its layers are {listed(files)}.")
    return files[layer]

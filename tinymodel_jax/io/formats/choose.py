"""The formats of dictionaries: which one a path has, found by its content, and which one to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.io.data_files import DICTIONARY_FILE
from tinymodel_jax.io.formats import circuit_tracer, cross_layer, dictionary_learning, saelens, sparsify, tinymodel_pt
from tinymodel_jax.io.formats.stored import Stored, listed, placed

Format = Literal["saelens", "dictionary_learning", "sparsify", "circuit-tracer", "tinymodel-pt"]
FORMATS: tuple[Format, ...] = get_args(Format)


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
_WRITERS: dict[str, Callable[[Dictionary, Path], None]] = {
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


def write_as(dictionary: Dictionary, path: Path, name: str) -> None:
    """Write a dictionary in another library's format.

    Raises:
        ValueError: the format is unknown or has no room for the dictionary, or the folder holds something else.
    """
    if name not in _WRITERS:
        raise ValueError(f"format {name!r} is unknown; choose one of {', '.join(FORMATS)}.")
    if len(dictionary.config.hooks_in) > 1:
        kind = "crosscoders" if dictionary.config.is_crosscoder else "cross-layer transcoders"
        raise ValueError(f"format {name!r} is not written for {kind}; leave format= out, for this package's own.")
    if name in _READERS:
        found = "this package" if (path / DICTIONARY_FILE).exists() else format_of(path)
        if found != name and (found is not None or (path / _READERS[name].config).exists()):
            what = f"a dictionary of {found}" if found else f"a {_READERS[name].config} of something else"
            raise ValueError(f"{path} holds {what}. Nothing was written; choose another folder.")
    _WRITERS[name](dictionary, path)


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

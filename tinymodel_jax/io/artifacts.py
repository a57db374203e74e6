"""Folders of published models and dictionaries: safetensors for the numbers, JSON for the configuration.

    MODEL/       config.json  model.safetensors  tokenizer.json  token_table.json  dictionaries/TAG/
    DICTIONARY/  config.json  dictionary.safetensors

Also resolves the names and paths that users give. Arrays are read as NumPy arrays in the file's number format.
Checkpoints of training runs have a different format, which is not read here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinymodel_jax.bundled import MINI
from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary, require_finite
from tinymodel_jax.dictionaries.sites import NO_SITE, Site
from tinymodel_jax.io.config_files import (
    CONFIG_FILE,
    DICTIONARIES,
    MODEL_FILE,
    TOKENIZER_FILES,
    named_folder,
    own_folder,
    read_config,
    write_config,
)
from tinymodel_jax.io.convert import ConvertedModel, convert_dictionary, convert_model, model_tensors
from tinymodel_jax.io.data_files import (
    DICTIONARY_FILE,
    about,
    read_safetensors,
    read_tensors,
    write_safetensors,
)
from tinymodel_jax.io.formats import transformer_lens
from tinymodel_jax.io.formats.names import LIBRARIES
from tinymodel_jax.io.formats.stored import listed, require_undone
from tinymodel_jax.io.hub.addresses import HubAddress
from tinymodel_jax.params import require_shapes
from tinymodel_jax.runtime.paths import user_path

if TYPE_CHECKING:
    from tinymodel_jax.text.tokenizer import Tokenizer


class ModelFiles(NamedTuple):
    """A language model as read from disk."""

    config: ModelConfig
    params: dict[str, np.ndarray]
    """Flat: `blocks.0.attn.W_Q` -> array."""
    dictionaries: dict[str, Dictionary | Path | str]
    """Tag -> dictionary that came with the model, its folder, or its address on the hub."""
    directory: Path | None
    """Folder that may hold a tokenizer; None for a file."""


def save_model(
    config: ModelConfig,
    params: Mapping[str, Any],
    directory: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    dictionaries: Mapping[str, Dictionary] | None = None,
) -> None:
    """Write a model's folder. Each file replaces an earlier one only when it is complete.

    Args:
        params: flat: `blocks.0.attn.W_Q` -> array.

    Raises:
        ValueError: the tokenizer's vocabulary size differs, or the folder holds another model's files, which would be
            overwritten or mistaken for this model's.
    """
    if tokenizer is not None:
        require_vocabulary(tokenizer, config)
    folder = own_folder("model", directory)
    _refuse_leftovers(folder, tokenizer is not None, dictionaries or {})
    write_safetensors(params, folder / MODEL_FILE)
    write_config("model", config.to_dict(), folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for tag, dictionary in (dictionaries or {}).items():
        save_dictionary(dictionary, folder / DICTIONARIES / tag)


def load_model(name_or_path: str | os.PathLike[str], n_heads: int | None = None) -> ModelFiles:
    """Read a model by its published name, folder, training run's folder, file as in `read_model_file`, or address.

    Of a model on the hub (`hub:OWNER/NAME`), dictionaries are downloaded when they are used.

    Raises:
        FileNotFoundError: the name or path does not exist; the message lists what would work.
        ValueError: the file or folder does not hold a model, or the name is empty.
    """
    address = HubAddress.of(name_or_path)
    if address is not None:
        from tinymodel_jax.io.hub.folders import download_model  # the network part loads when it is needed

        path, address = download_model(address)
    else:
        path = MINI if name_or_path == "mini" else _named("model", name_or_path)
    if path.is_file():
        config, params, dictionaries = read_model_file(path, n_heads)
        return ModelFiles(config, params, dict(dictionaries), None)
    if not path.is_dir():
        from tinymodel_jax.io.hub import published

        path = published.model_folder(str(name_or_path))
    folder = next(
        (p for p in (path, path / "model") if (p / CONFIG_FILE).is_file() and (p / MODEL_FILE).is_file()), None
    )
    if folder is None:
        raise FileNotFoundError(
            f"{path} holds no model: looked for {CONFIG_FILE} and {MODEL_FILE} there and in its folder 'model'. "
            "A folder of save_pretrained, a training run's folder or a reference .pt file would work."
        )
    if n_heads is not None:
        raise ValueError(f"n_heads={n_heads} is for files; {folder / CONFIG_FILE} already states the number of heads.")
    return _load_model_folder(folder, address)


def read_model_file(path: str | os.PathLike[str], n_heads: int | None = None) -> ConvertedModel:
    """Read a language model from one file: with the reference's names, or with TransformerLens's.

    Args:
        n_heads: as in `convert_model`; a file with TransformerLens's names has it in the configuration beside it.

    Raises:
        FileNotFoundError: the file, or the configuration beside it, does not exist.
        ValueError: the file does not hold a language model that a TinyModel can represent.
    """
    address = HubAddress.of(path)
    if address is None:
        path = user_path(path)
    else:
        from tinymodel_jax.io.hub.folders import download_model

        path = download_model(address).path
    tensors = read_tensors(path)
    if not transformer_lens.is_transformer_lens(tensors):
        return about(path, lambda: convert_model(tensors, n_heads))
    fields = transformer_lens.read_config(path)
    if n_heads is not None:
        raise ValueError(f"n_heads={n_heads}: {transformer_lens.config_path(path)} already states the number of heads.")
    config, params = about(path, lambda: transformer_lens.from_transformer_lens(fields, tensors))
    return ConvertedModel(config, params, {})


def require_model_params(config: ModelConfig, params: Mapping[str, Any]) -> None:
    """Check the names and shapes of a flat parameter dict.

    Raises:
        ValueError: parameters are missing, unexpected or of the wrong shape; the message names all of them.
    """
    shapes: dict[str, tuple[int, ...]] = {tensor.name: tensor.shape for tensor in model_tensors(config)}
    if config.mlp_activation == "jumprelu":  # a parameter that the reference's files cannot hold
        shapes |= {f"blocks.{layer}.mlp.threshold": (config.d_mlp,) for layer in range(config.n_layers)}
    require_shapes(params, shapes, "the configuration")


def require_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Check that a tokenizer has as many ids as the model.

    Raises:
        ValueError: the numbers differ, or it is not a tokenizer.
    """
    if not hasattr(tokenizer, "vocab_size"):
        raise ValueError(f"the tokenizer is {tokenizer!r:.80}; Tokenizer.from_pretrained(folder) loads one.")
    if tokenizer.vocab_size != config.d_vocab:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary {config.d_vocab}.")


def save_dictionary(dictionary: Dictionary, directory: str | os.PathLike[str], format: str | None = None) -> None:
    """Write a dictionary's folder, or the files of another format; see `Dictionary.save_pretrained`.

    Each file replaces an earlier one only when it is complete.

    Raises:
        ValueError: the folder holds something else, or the format is unknown or has no room for the dictionary.
    """
    from tinymodel_jax.io.formats.choose import OURS, require_no_other, write_as  # other libraries' formats

    if format is not None:
        write_as(dictionary, directory, format)
        return
    require_no_other(named_folder("dictionary", directory), OURS)
    folder = own_folder("dictionary", directory)
    write_safetensors(dictionary.params, folder / DICTIONARY_FILE)
    write_config("dictionary", dictionary.config.to_dict(), folder)


def load_dictionary(path_or_name: str | os.PathLike[str], site: str | Site | None = None) -> Dictionary:
    """Read a dictionary from its folder, a file, another library's folder, or the hub; see `Dictionary`.

    Raises:
        FileNotFoundError: the path or tag does not exist; the message lists what would work.
        ValueError: the file or folder does not hold a dictionary or is for another site, a file is given without a
            site, or a parameter is not finite.
    """
    place = Site.whole(site) if isinstance(site, str) else site
    stored = read_dictionary(path_or_name, place)
    require_finite(stored.params, f"the dictionary {os.fspath(path_or_name)}")
    if place is None:
        return Dictionary.from_params(stored.config, stored.params)
    require_place(stored.config, place, path_or_name)
    return Dictionary.from_params(config_at(stored.config, place), stored.params)


def read_dictionary(path_or_name: str | os.PathLike[str], site: Site | None = None) -> Dictionary:
    """Do as `load_dictionary`, but keep the file's NumPy arrays and number format, and check nothing."""
    path = _named("dictionary", path_or_name, site)
    if path.exists() and not (path / DICTIONARY_FILE).is_file():
        from tinymodel_jax.io.formats.choose import read_as  # other libraries' formats

        other = read_as(path, site)
        if other is not None:
            return other
    if path.is_file():
        if site is None:
            raise ValueError(f"{path}: a file does not store the site of its dictionary; give site=, such as 'M2'.")
        return about(path, lambda: convert_dictionary(read_tensors(path), site))
    if not path.is_dir():
        from tinymodel_jax.io.hub import published

        path = published.dictionary_folder(str(path_or_name))
    if not (path / DICTIONARY_FILE).is_file():
        raise FileNotFoundError(
            f"{path} holds no dictionary: it has neither {DICTIONARY_FILE} nor all files of a format of "
            f"{', '.join(LIBRARIES)} (docs/reference/files.md). It holds "
            f"{listed(sorted(p.name for p in path.iterdir()))}."
        )
    config = read_config("dictionary", DictionaryConfig, path)
    return Dictionary(config, read_safetensors(path / DICTIONARY_FILE))


def config_at(config: DictionaryConfig, site: Site) -> DictionaryConfig:
    """Return the configuration with the hook points of a site.

    Raises:
        ValueError: an SAE that normalizes its input, and undoes this on its output, would become a transcoder, which
            does not; or the other way round.
    """
    at = DictionaryConfig.from_dict({**config.to_dict(), "hook_in": site.hook_in, "hook_out": site.hook_out})
    require_undone(at.normalize, config.is_transcoder, at.is_transcoder)
    return at


def _named(kind: str, name_or_path: Any, site: Site | None = None) -> Path:
    if not isinstance(name_or_path, str | os.PathLike) or not os.fspath(name_or_path):
        raise ValueError(f"give the path or published name of a {kind}, got {name_or_path!r:.80}.")
    address = HubAddress.of(name_or_path)
    if address is None:
        return user_path(name_or_path)
    from tinymodel_jax.io.hub.folders import download_dictionary

    return download_dictionary(address, site)


def require_place(config: DictionaryConfig, place: Site, given: str | os.PathLike[str]) -> None:
    """Check that a stored dictionary is for a site, or for none.

    Args:
        given: what names the dictionary, for the message.

    Raises:
        ValueError: it is for another site.
    """
    own, hooks = (config.hook_in, config.hook_out), (place.hook_in, place.hook_out)
    if own != hooks and not set(own) <= NO_SITE:
        raise ValueError(
            f"{os.fspath(given)} is a dictionary from {own[0]} to {own[1]}; {place.tag!r} is from {hooks[0]} to "
            f"{hooks[1]}. Give its own site, or move it deliberately in Python: "
            f"lm.attach({place.tag!r}, Dictionary.from_pretrained({os.fspath(given)!r}))."
        )


def _load_model_folder(folder: Path, address: HubAddress | None) -> ModelFiles:
    config = read_config("model", ModelConfig, folder)
    params = read_safetensors(folder / MODEL_FILE)
    about(folder / MODEL_FILE, lambda: require_model_params(config, params))
    found = _dictionaries_in(folder, DICTIONARY_FILE if address is None else CONFIG_FILE)
    places = {p.name: p if address is None else str(address.joined(DICTIONARIES, p.name)) for p in found}
    return ModelFiles(config, params, {**places}, folder)


def _dictionaries_in(folder: Path, file: str) -> list[Path]:
    """Return the folders of a model's dictionaries, those that have this file."""
    return sorted(p for p in (folder / DICTIONARIES).glob("*") if (p / file).is_file())


def _refuse_leftovers(folder: Path, has_tokenizer: bool, dictionaries: Mapping[str, Any]) -> None:
    """Refuse a folder where parts of an earlier model would remain and be mistaken for the new model's."""
    found = [p.name for p in _dictionaries_in(folder, DICTIONARY_FILE)]
    left = [f"{DICTIONARIES}/{tag}" for tag in found if tag not in dictionaries]
    if not has_tokenizer:
        left += [name for name in TOKENIZER_FILES if (folder / name).exists()]
    if left:
        raise ValueError(
            f"{folder} holds parts of another model that this one lacks: {', '.join(left)}. Nothing was written; "
            "delete them or choose another folder."
        )

"""Which files of a repository belong to a model or a dictionary, so that only these are downloaded."""

from __future__ import annotations

import glob
from pathlib import Path

from tinymodel_jax.io.config_files import CONFIG_FILE, DICTIONARIES, MODEL_FILE, TOKENIZER_FILES, config_values
from tinymodel_jax.io.formats import circuit_tracer, saelens, transformer_lens
from tinymodel_jax.io.hub.addresses import Download, HubAddress, download

SETTINGS = (CONFIG_FILE, saelens.CONFIG, circuit_tracer.CONFIG)
"""The file of settings of a dictionary, in any of the formats."""
_SETTINGS = ("*.json", "*.yaml")
_DICTIONARY_KINDS = (*_SETTINGS, "*.safetensors", "*.pt")
"""Files of a folder that may belong to a dictionary, in any of the formats."""


def download_model(address: HubAddress) -> Download:
    """Download a model's folder, but of its dictionaries only the configurations; or a model's file.

    Raises:
        FileNotFoundError, ModuleNotFoundError, OSError: as `download`.
        ValueError: it is another program's model, which is refused before its weights are downloaded.
    """
    found = download(address, [CONFIG_FILE, f"{DICTIONARIES}/*/{CONFIG_FILE}"])
    if found.path.is_file():
        _download_beside(found, [transformer_lens.config_path(found.path).name])
        return found
    if (found.path / CONFIG_FILE).is_file():
        config_values("model", found.path / CONFIG_FILE)
    download(found.address, [CONFIG_FILE, MODEL_FILE, *TOKENIZER_FILES])
    return found


def download_dictionary(address: HubAddress) -> Path:
    """Download a dictionary's folder or file.

    Raises:
        FileNotFoundError, ModuleNotFoundError, OSError, ValueError: as `download`.
    """
    found = download(address, _DICTIONARY_KINDS, ["*/*"])
    if found.path.is_file():
        _download_beside(found, _SETTINGS)
    return found.path


def local_dictionaries(folder: Path) -> Path:
    """Return a folder of one or several dictionaries; download it first if it is an address on the hub."""
    address = HubAddress.of(folder)
    return folder if address is None else download(address, _DICTIONARY_KINDS, ["*/*/*"]).path


def _download_beside(file: Download, patterns: tuple[str, ...] | list[str]) -> None:
    """Download the settings that lie beside a file, if there are any."""
    folder = file.address._replace(path=file.address.path.rpartition("/")[0])
    download(folder, [glob.escape(file.path.name), *patterns], ["*/*"])

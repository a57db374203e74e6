"""Which files of a repository belong to a model or a dictionary, so that only these are downloaded."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.io.config_files import CONFIG_FILE, DICTIONARIES, MODEL_FILE, TOKENIZER_FILES, config_values
from tinymodel_jax.io.data_files import DICTIONARY_FILE
from tinymodel_jax.io.formats import circuit_tracer, dictionary_learning, saelens, sparsify, transformer_lens
from tinymodel_jax.io.formats.choose import format_of
from tinymodel_jax.io.hub.addresses import Download, HubAddress, download

SETTINGS = (CONFIG_FILE, saelens.CONFIG, circuit_tracer.CONFIG)
"""The file of settings of a dictionary, in any of the formats."""
_BESIDE = (*SETTINGS, saelens.SCALER)
_DICTIONARY_FILES = (
    *_BESIDE,
    *(DICTIONARY_FILE, saelens.WEIGHTS, sparsify.WEIGHTS, dictionary_learning.WEIGHTS),
    *("W_enc_*.safetensors", "W_dec_*.safetensors"),  # a cross-layer transcoder
)
"""Files of one dictionary, in any of the formats; those of a transcoder set's layers are chosen by its settings."""


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


def download_dictionary(address: HubAddress, site: Site | None) -> Path:
    """Download a dictionary's folder or file; of a transcoder set, the file of the site's layer.

    Raises:
        FileNotFoundError, ModuleNotFoundError, OSError: as `download`.
        ValueError: as `download`; or it is a transcoder set, and no site is given.
    """
    found = download(address, _DICTIONARY_FILES, ["*/*"])
    if found.path.is_file():
        _download_beside(found, _BESIDE)
        return found.path
    own = (found.path / DICTIONARY_FILE).is_file()
    return found.path if own or format_of(found.path) != "circuit-tracer" else _download_layer(found, site)


def local_dictionaries(folder: Path) -> Path:
    """Return a folder of one or several dictionaries; download it first if it is an address on the hub."""
    address = HubAddress.of(folder)
    files = [*_DICTIONARY_FILES, circuit_tracer.LAYERS]
    inside = [f"*/{name}" for name in files]
    return folder if address is None else download(address, [*files, *inside], ["*/*/*"]).path


def _download_layer(found: Download, site: Site | None) -> Path:
    """Download a layer of a transcoder set; the whole set if its settings list files, which may have any name."""
    if "transcoders:" in (found.path / circuit_tracer.CONFIG).read_text("utf-8", "ignore"):
        return download(found.address, [circuit_tracer.CONFIG, "*.safetensors"], ["*/*"]).path
    if site is None:
        raise ValueError(
            f"{found.address} is a transcoder set; give site=, such as 'M0', or the address of the file of one layer, "
            "such as layer_0.safetensors."
        )
    return download(found.address.joined(circuit_tracer.layer_file(site.layer)), []).path


def _download_beside(file: Download, patterns: Sequence[str]) -> None:
    """Download the settings that lie beside a file, if there are any."""
    folder = file.address._replace(path=file.address.path.rpartition("/")[0])
    download(folder, [glob.escape(file.path.name), *patterns], ["*/*"])

"""Options that several commands share: a model, its dictionaries, files to write; checked before anything is loaded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tinymodel_jax.dictionaries.sites import Site

if TYPE_CHECKING:
    from tinymodel_jax.dictionaries.dictionary import Dictionary
    from tinymodel_jax.lm import TinyModel

OutFile = Annotated[Path | None, tyro.conf.arg(aliases=["-o"])]
"""A file to write, `--out` or `-o`."""

MetricName = Literal["loss", "next_logprob"]
"""Metrics that need no tokens, for `--metric`."""
TokenPair = tuple[str, str]
"""Both tokens of `--logit-difference`."""


@dataclass(frozen=True)
class ModelOptions:
    """Which language model a command runs."""

    name: Annotated[str, tyro.conf.arg(name="model")] = "tiny_model"
    """published name (downloaded once), `mini` (bundled, no network), folder, file with the reference's names, or
    hub:OWNER/NAME."""
    n_heads: int | None = None
    """attention heads, for a file whose width is not the published 768."""

    def load(self) -> TinyModel:
        """Load the model; JAX loads here, not for `--help`."""
        from tinymodel_jax.lm import TinyModel

        return TinyModel(self.name, n_heads=self.n_heads)


@dataclass(frozen=True)
class ModelAndDictionaryOptions(ModelOptions):
    """Which language model a command runs, with which dictionary."""

    dictionary: Path | None = None
    """folder, file or hub:OWNER/NAME/PATH of a dictionary to use at the site, instead of the model's own or the
    published one."""

    def load_with_dictionary(self, site: Site) -> TinyModel:
        """Load the model, and attach the dictionary if one is given.

        Raises:
            FileNotFoundError: the dictionary does not exist.
            ValueError: no dictionary is given, and the model has none at the site.
        """
        if self.dictionary is not None and is_missing(self.dictionary):
            raise FileNotFoundError(f"--dictionary {self.dictionary} does not exist.")
        lm = self.load()
        if self.dictionary is not None:
            lm.attach(site.tag, self.dictionary)
        elif site.layer < lm.config.n_layers:
            try:
                lm[site.tag]
            except FileNotFoundError as error:
                raise FileNotFoundError(_with_option(error)) from error
            except ValueError as error:
                raise ValueError(_with_option(error)) from error
        return lm

    def python(self, site: Site) -> tuple[str, ...]:
        """Return the lines of Python that do as `load_with_dictionary`, and name the model `lm`."""
        heads = "" if self.n_heads is None else f", n_heads={self.n_heads}"
        lines = ("from tinymodel_jax import TinyModel", f"lm = TinyModel({quoted(self.name)}{heads})")
        return (
            lines if self.dictionary is None else (*lines, f"lm.attach({quoted(site.tag)}, {quoted(self.dictionary)})")
        )


Model = Annotated[ModelOptions, tyro.conf.arg(name="")]
ModelAndDictionary = Annotated[ModelAndDictionaryOptions, tyro.conf.arg(name="")]


def is_missing(path: Path) -> bool:
    """Whether a path does not exist on this machine, and is not an address on the hub."""
    from tinymodel_jax.io.hub.addresses import HubAddress

    return HubAddress.of(path) is None and not path.exists()


def quoted(text: object) -> str:
    """Return a text as Python, in double quotes."""
    return json.dumps(str(text), ensure_ascii=False)


def _with_option(error: Exception) -> str:
    return f"{error} For this command: --dictionary PATH."


def require_positive(option: str, number: int) -> None:
    """Refuse a count below 1.

    Raises:
        ValueError: it is.
    """
    if number < 1:
        raise ValueError(f"{option} {number} must be 1 or more.")


def check_metric_options(metric: MetricName | None, logit_difference: TokenPair | None) -> None:
    """Refuse two metrics, and the difference of a token and itself.

    Raises:
        ValueError: it is one of these.
    """
    if logit_difference is None:
        return
    if metric is not None:
        raise ValueError(f"--logit-difference cannot be combined with --metric {metric}; give one of them.")
    if logit_difference[0] == logit_difference[1]:
        raise ValueError(
            f"--logit-difference: both tokens are {logit_difference[0]!r}, so the difference is always 0; give two "
            "different tokens."
        )


def parse_sites(option: str, text: str) -> list[str]:
    """Return the tags of a list such as `M0, A1`, without repeats.

    Raises:
        ValueError: one is not a tag, or names a feature.
    """
    tags = dict.fromkeys(tag.strip() for tag in text.split(",") if tag.strip())
    for tag in tags:
        Site.whole(tag, f"{option} ")
    return list(tags)


def dictionary_folders(folder: Path) -> list[Path]:
    """Return the folder if it holds a dictionary, of this package or another library, otherwise those in it that do.

    Args:
        folder: also an address on the hub, which is downloaded.

    Raises:
        FileNotFoundError: the folder does not exist, or holds no dictionary.
        NotADirectoryError: it is a file.
    """
    from tinymodel_jax.io.data_files import DICTIONARY_FILE
    from tinymodel_jax.io.formats.choose import format_of
    from tinymodel_jax.io.hub.folders import local_dictionaries

    folder = local_dictionaries(folder)
    if folder.is_file():
        raise NotADirectoryError(
            f"--dictionaries {folder} is a file; name a dictionary's folder, or a folder of such folders."
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"--dictionaries {folder} does not exist.")
    folders = [folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())]
    found = [path for path in folders if (path / DICTIONARY_FILE).is_file() or format_of(path)]
    if not found:
        raise FileNotFoundError(
            f"--dictionaries {folder} holds no dictionary: there is no {DICTIONARY_FILE} in it, nor the files of a "
            "dictionary of another library (docs/reference/files.md)."
        )
    return [folder] if found[0] == folder else found


def named_dictionaries(lm: TinyModel, tags: Sequence[str], folders: Sequence[Path]) -> list[tuple[str, Dictionary]]:
    """Return dictionaries that fit the model, each with a name.

    The name is the tag or the folder's name; where two folders have the same name, the folder's path.

    Raises:
        ValueError: a tag has no dictionary, or one does not fit the model.
    """
    from tinymodel_jax.dictionaries.dictionary import Dictionary
    from tinymodel_jax.lm import FeatureReader

    named = [(lm[tag].site.tag, lm[tag].dictionary) for tag in tags]
    names = [*tags, *(folder.name for folder in folders)]
    for folder in folders:
        fitting = FeatureReader.of(lm, Dictionary.from_pretrained(folder)).dictionary
        name = folder.name if names.count(folder.name) == 1 else str(folder)
        named.append((name, fitting))
    return named


def prepare_output(option: str, path: Path | None) -> None:
    """Make the folder of a file that is written at the end of a command.

    Raises:
        OSError: the folder cannot be made or written to.
        ValueError: the path is a folder.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file, such as {path / 'NAME'}.")
    make_output_folder(option, path.parent)


def prepare_json_output(option: str, path: Path | None) -> None:
    """Do as `prepare_output`, and require the suffix .json: the plots get the same name with .png.

    Raises:
        OSError, ValueError: as `prepare_output`; or the file has another suffix.
    """
    if path is not None and path.suffix != ".json" and not path.is_dir():
        raise ValueError(f"{option} {path}: give the name of a .json file; the plots get the same name with .png.")
    prepare_output(option, path)


def make_output_folder(option: str, folder: Path) -> None:
    """Make a folder for files that are written at the end of a command.

    Raises:
        OSError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"{option}: the folder {folder} cannot be made: {error.strerror}.") from error
    try:
        with tempfile.NamedTemporaryFile(dir=folder):  # a named one: some file systems refuse the others
            pass
    except OSError as error:
        raise type(error)(f"{option}: the folder {folder} cannot be written to: {error.strerror}.") from error


def work_file(out: Path | None) -> Path | None:
    """Return the file, `OUT.work`, that keeps the state of unfinished work on `out`."""
    return None if out is None else out.with_name(f"{out.name}.work")

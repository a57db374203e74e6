"""The dictionaries that a command measures: the model's own by their tags, and those of folders by their names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinymodel_jax.dictionaries.dictionary import Dictionary
    from tinymodel_jax.lm import TinyModel


def dictionary_folders(folder: Path) -> list[Path]:
    """Return the folder if it holds a dictionary, else those in it that do.

    Raises:
        FileNotFoundError: there is no such folder, or no dictionary in it.
        NotADirectoryError: it is a file.
    """
    from tinymodel_jax.io.artifacts import DICTIONARY_FILE

    if folder.is_file():
        raise NotADirectoryError(
            f"--dictionaries {folder} is a file; name a dictionary's folder, or a folder of such folders."
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"--dictionaries {folder}: there is no such folder.")
    found = [f for f in (folder, *sorted(folder.iterdir())) if (f / DICTIONARY_FILE).is_file()]
    if not found:
        raise FileNotFoundError(f"--dictionaries {folder} holds no dictionary: there is no {DICTIONARY_FILE} in it.")
    return [folder] if found[0] == folder else found


def named_dictionaries(lm: TinyModel, tags: Sequence[str], folders: Sequence[Path]) -> list[tuple[str, Dictionary]]:
    """Return dictionaries that fit the model; those of folders are named by their folder, by its path if two agree.

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

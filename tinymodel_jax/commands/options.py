"""Options that several commands have: files to write, lists of sites; checked before anything is loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tinymodel_jax.dictionaries.sites import Site


def prepare_output(option: str, path: Path | None) -> None:
    """Make the folder of a file that is written in the end.

    Raises:
        OSError: the folder cannot be made or written to.
        ValueError: the file is a folder.
    """
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file, such as {path / 'NAME'}.")
    make_output_folder(option, path.parent)


def make_output_folder(option: str, folder: Path) -> None:
    """Make a folder for what is written in the end.

    Raises:
        OSError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"{option}: the folder {folder} cannot be made: {error.strerror}.") from error
    _try_a_file(option, folder)


def prepare_json_output(option: str, path: Path | None) -> None:
    """Do as `prepare_output`, and refuse a file that is not named as JSON: its plots have the same name.

    Raises:
        OSError, ValueError: as `prepare_output`; or the file has another suffix.
    """
    if path is not None and path.suffix != ".json" and not path.is_dir():
        raise ValueError(f"{option} {path}: give the name of a .json file; the plots get the same name with .png.")
    prepare_output(option, path)


def check_dictionary(path: Path | None) -> None:
    """Refuse a --dictionary that is not there.

    Raises:
        FileNotFoundError: there is no such folder or file.
    """
    if path is not None and not path.exists():
        raise FileNotFoundError(f"--dictionary {path}: there is no such folder or file.")


def work_file(out: Path | None) -> Path | None:
    """Return where the state of work is kept whose result goes to `out`: `OUT.work`."""
    return None if out is None else out.with_name(f"{out.name}.work")


def parse_sites(option: str, text: str) -> list[str]:
    """Return the tags of a list such as `M0, A1`, each once.

    Raises:
        ValueError: one is no tag, or names a feature.
    """
    tags = dict.fromkeys(tag.strip() for tag in text.split(",") if tag.strip())
    for tag in tags:
        Site.whole(tag, f"{option} ")
    return list(tags)


def _try_a_file(option: str, folder: Path) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=folder):  # a named one: some file systems refuse the others
            pass
    except OSError as error:
        raise type(error)(f"{option}: the folder {folder} cannot be written to: {error.strerror}.") from error

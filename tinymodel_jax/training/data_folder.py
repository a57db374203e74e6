"""The folder of prepared token ids: its files, its description, and how it is opened.

    DATA/        data.json  train.bin  valid.bin  [tokenizer.json  token_table.json]

Rely on: `train.bin` and `valid.bin` are little-endian uint16 matrices (rows, row_length), mapped into memory and never
loaded whole; a folder that is missing, unfinished, damaged or something else is one error. Nothing is written here:
that is the work of `python -m train prepare`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt16

from tinymodel_jax.runtime.paths import user_path

FORMAT = "tinymodel_jax/data"
FORMAT_VERSION = 1
DESCRIPTION_FILE = "data.json"
SPLITS = ("train", "valid")
DEFAULT_ROW_LENGTH = 128
"""Tokens a row of the reference's data set."""
ID_DTYPE = np.dtype("<u2")
"""Number format of the ids on disk."""
MAX_VOCAB = 1 << 16


@dataclass(frozen=True)
class DataMeta:
    """What a prepared folder holds and what it was made of: `data.json`. The same source gives the same bytes."""

    row_length: int
    """Tokens a row."""
    vocab_size: int
    """Every id is below this."""
    packed: bool
    """Whether rows are cut from one stream of stories; otherwise a row holds one story, padded with `[PAD]`."""
    rows: dict[str, int]
    """Rows of each split."""
    tokens: dict[str, int]
    """Ids of each split that are not `[PAD]`."""
    stories: dict[str, int]
    """Stories of each split."""
    left_out: dict[str, int]
    """Stories in neither split: `refused` by `keep_story`, or `empty`."""
    source: str
    """Name of what was read, without folders."""
    source_fingerprint: str
    """SHA-256 of the files' contents, or the hub's commit."""
    tokenizer_fingerprint: str
    """`Tokenizer.fingerprint`."""
    limit: int | None
    """Stories read at most from each split of the source; None: all."""
    valid_fraction: float | None
    """Share of stories held out; None: the source has a validation split of its own."""
    seed: int
    """Of the choice of held-out stories."""

    def to_json(self) -> str:
        """Return the text of `data.json`."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> DataMeta:
        """Read the text of a `data.json`.

        Raises:
            ValueError: it is no such text, or damaged; `where` names it in the message.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is damaged ({error}); prepare the data again.") from error
        _check_description(content, where)
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: content[name] for name in names})

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of `data.json`: equal when source, tokenizer and options are."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclass(frozen=True)
class TokenData:
    """A prepared folder, open for reading."""

    train: UInt16[np.ndarray, "rows row_length"]
    """Rows to train on."""
    valid: UInt16[np.ndarray, "held_out row_length"]
    """Held-out rows; there may be none."""
    meta: DataMeta
    folder: Path
    """Where it is on this machine, for the tokenizer saved in it."""

    @property
    def row_length(self) -> int:
        """Tokens a row."""
        return self.meta.row_length

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""
        return self.meta.vocab_size

    @property
    def fingerprint(self) -> str:
        """Of source, tokenizer and options together; see `DataMeta`."""
        return self.meta.fingerprint


def open_data(path: str | os.PathLike[str]) -> TokenData:
    """Map a prepared folder into memory. One elsewhere (`gs://…`) is first copied to the cache, once.

    Raises:
        FileNotFoundError: there is no prepared folder, or it was not finished.
        ValueError: the folder holds something else, or is damaged.
    """
    folder = _local_copy(os.fspath(path)) if is_remote(path) else user_path(path)
    meta = _read_meta(folder, path)
    _check_sizes(folder, meta)
    matrices = {split: _matrix(folder / f"{split}.bin", meta.rows[split], meta.row_length) for split in SPLITS}
    return TokenData(matrices["train"], matrices["valid"], meta, folder)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address such as `gs://bucket/folder`."""
    return "://" in os.fspath(path)


def _matrix(path: Path, rows: int, row_length: int) -> np.ndarray:
    if rows == 0:
        return np.zeros((0, row_length), ID_DTYPE)  # an empty file cannot be mapped
    return np.memmap(path, ID_DTYPE, "r", shape=(rows, row_length))


def _read_meta(folder: Path, asked: str | os.PathLike[str]) -> DataMeta:
    file = folder / DESCRIPTION_FILE
    if not file.is_file():
        if partial_folder(folder).exists():
            raise FileNotFoundError(f"preparing {asked} was not finished; run the same prepare command again.")
        what = "is no prepared data: it has no data.json" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{asked} {what}; make it with: python -m train prepare SRC {asked}")
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}); prepare the data again.") from error
    return DataMeta.from_json(text, str(file))


def _check_description(content: Any, where: str) -> None:
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{where} describes {found!r}, expected {FORMAT!r}; give a folder of python -m train prepare.")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{where} has format version {version!r}; this release reads {FORMAT_VERSION}.")
    names = [field.name for field in dataclasses.fields(DataMeta)]
    problems = [f"{name!r} is missing" for name in names if name not in content]
    problems += [f"{name!r} is unknown" for name in content if name not in (*names, "format", "format_version")]
    problems += [
        f"{name} is {content[name]!r}"
        for name in ("row_length", "vocab_size")
        if name in content and not _is_count(content[name], 1)
    ]
    problems += [
        f"{name} is {content[name]!r}"
        for name in ("rows", "tokens", "stories")
        if name in content and not _is_counts(content[name])
    ]
    if problems:
        raise ValueError(f"{where} is damaged: {'; '.join(problems)}. Prepare the data again.")


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_counts(value: object) -> bool:
    return isinstance(value, Mapping) and set(value) == set(SPLITS) and all(map(_is_count, value.values()))


def _check_sizes(folder: Path, meta: DataMeta) -> None:
    problems = []
    for split in SPLITS:
        file, expected = folder / f"{split}.bin", meta.rows[split] * meta.row_length * ID_DTYPE.itemsize
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            problems.append(f"{file.name} is missing")
        elif size != expected:
            rows = f"{meta.rows[split]} rows of {meta.row_length}"
            problems.append(f"{file.name} has {size} bytes, {rows} take {expected}")
    if problems:
        raise ValueError(f"{folder} is damaged: {'; '.join(problems)}. Prepare or copy the data again.")


def partial_folder(folder: Path) -> Path:
    """Return where an unfinished preparation of a folder is kept: beside it."""
    folder = folder.absolute()
    return folder.parent / f"{folder.name}.partial"


def _local_copy(address: str) -> Path:
    """Copy a prepared folder to the cache, unless it is there; `data.json` tells which it is."""
    from etils import epath  # an extra, needed for addresses only

    from tinymodel_jax.io.hub import cache_folder

    remote = epath.Path(address)
    if not (remote / DESCRIPTION_FILE).exists():
        raise FileNotFoundError(f"{address} is no prepared data: it has no data.json.")
    key = hashlib.sha256((remote / DESCRIPTION_FILE).read_bytes()).hexdigest()
    folder = cache_folder() / "data" / key
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{key[:8]}.", dir=folder.parent))
    try:
        for file in remote.iterdir():
            with file.open("rb") as source, open(temporary / file.name, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
        with contextlib.suppress(FileExistsError):  # another process may have been quicker
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder

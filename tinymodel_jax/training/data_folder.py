"""The folder of prepared token ids: its files, its description, and how it is opened.

    DATA/        data.json  train.bin  valid.bin  [tokenizer.json  token_table.json]

Guarantees: `train.bin` and `valid.bin` are little-endian uint16 matrices (rows, row_length), mapped into memory and
never loaded whole; a folder that is missing, unfinished, damaged or of another kind is one error. `python -m train
prepare` writes the folder; this file only reads it.
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
"""Tokens per row in the data set of the original model."""
ID_DTYPE = np.dtype("<u2")
"""Data type of the ids on disk."""
MAX_VOCAB = 1 << 16


@dataclass(frozen=True)
class DataMeta:
    """What a prepared folder contains and how it was made: the content of `data.json`."""

    row_length: int
    """Tokens per row."""
    vocab_size: int
    """Every id is below this."""
    packed: bool
    """Whether rows are cut from one stream of stories; otherwise a row holds one story, padded with `[PAD]`."""
    rows: dict[str, int]
    """Number of rows in each split."""
    tokens: dict[str, int]
    """Ids in each split that are not `[PAD]`."""
    stories: dict[str, int]
    """Number of stories in each split."""
    left_out: dict[str, int]
    """Number of stories in neither split, by reason: `refused` by `keep_story`, or `empty`."""
    source: str
    """Name of the source, without folders."""
    source_fingerprint: str
    """SHA-256 of the files' contents, or the hub's commit."""
    tokenizer_fingerprint: str
    """`Tokenizer.fingerprint`."""
    limit: int | None
    """Maximum number of stories read from each split of the source; None: all."""
    valid_fraction: float | None
    """Share of stories held out; None: the source's own validation split was used."""
    seed: int
    """Seed of the choice of held-out stories."""

    def to_json(self) -> str:
        """Return the text of `data.json`."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> DataMeta:
        """Read the text of a `data.json`.

        Raises:
            ValueError: the text is damaged or describes something else. The message calls it `where`.
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
        """SHA-256 of `data.json`, in hexadecimal: equal if source, tokenizer and options are equal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclass(frozen=True)
class TokenData:
    """A prepared folder that is open for reading."""

    train: UInt16[np.ndarray, "rows row_length"]
    """Rows to train on."""
    valid: UInt16[np.ndarray, "held_out row_length"]
    """Held-out rows, possibly none."""
    meta: DataMeta
    """How it was prepared: the content of `data.json`."""
    folder: Path
    """Location on this machine. The tokenizer is saved there, too."""

    @property
    def row_length(self) -> int:
        """Tokens per row."""
        return self.meta.row_length

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""
        return self.meta.vocab_size

    @property
    def fingerprint(self) -> str:
        """`DataMeta.fingerprint`."""
        return self.meta.fingerprint


def open_data(path: str | os.PathLike[str]) -> TokenData:
    """Map a prepared folder into memory. A folder at an address (`gs://…`) is first copied to the cache, once.

    Raises:
        FileNotFoundError: there is no prepared folder, or its preparation was not finished.
        ValueError: the folder contains something else, or is damaged.

    Examples:
        >>> from tinymodel_jax.training import open_data
        >>> data = open_data("data")  # written by `python -m train prepare`
        >>> data.train.shape == (data.meta.rows["train"], data.row_length)
        True
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
        what = "is not prepared data (it has no data.json)" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{asked} {what}; make it with: python -m train prepare SRC {asked}")
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}); prepare the data again.") from error
    return DataMeta.from_json(text, str(file))


def _check_description(content: Any, where: str) -> None:
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{where} describes {found!r}, expected {FORMAT!r}; give a folder made by python -m train prepare."
        )
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
    """Return the folder that holds the files of an unfinished preparation, beside `folder`."""
    folder = folder.absolute()
    return folder.parent / f"{folder.name}.partial"


def _local_copy(address: str) -> Path:
    """Copy a prepared folder to the cache, unless it is there. The hash of `data.json` identifies it."""
    from etils import epath  # an extra, needed for addresses only

    from tinymodel_jax.io.hub.published import cache_folder

    remote = epath.Path(address)
    if not (remote / DESCRIPTION_FILE).exists():
        raise FileNotFoundError(f"{address} is not prepared data (it has no data.json).")
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
        with contextlib.suppress(OSError):  # another process may have made it by now
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder

"""What `prepare` reads: stories, or rows of token ids, from local files, the hub, or the bundled story world.

Guarantees: rows come in order, one at a time; the same contents have the same fingerprint wherever they are stored;
anything unreadable raises one error that says where it is. Local files need no network. The rows themselves are checked
in `encoding.py`.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tinymodel_jax.bundled import STORY_WORLD, storyworld

T = TypeVar("T")
Row = Any
"""A story as a str, or a list of token ids. Anything else is refused when it is encoded."""

STORY_WORLD_SEED = 0
"""Seed of the stories to train on. A model that was trained on them has not seen the stories of other seeds."""
STORY_WORLD_STORIES = 100_000
"""Stories to read when no limit is given: the story world is endless."""
HUB_PREFIX = "hub:"
COLUMNS = ("tok_ids", "text")
"""Fields that hold the rows. The first one that a source has is read."""
_TABLE_ROWS = 2048
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "valid"),
}


@dataclass(frozen=True)
class Source:
    """An opened source."""

    name: str
    """Name of the source, without folders."""
    fingerprint: str
    """SHA-256 of the files' contents, the hub's commit, or a SHA-256 of the story world."""
    splits: Mapping[str, Iterator[Row]]
    """Rows of `train`, and of `valid` if the source has a validation split. Each can be read once."""
    default_limit: int | None = None
    """Rows to read when no limit is given; None: all."""


def open_source(src: str) -> Source:
    """Open the source that the user named.

    Raises:
        FileNotFoundError: the file or data set does not exist, or the hub cannot be reached.
        ValueError: files of this kind cannot be read.
    """
    if src == STORY_WORLD:
        rows = (storyworld.story(STORY_WORLD_SEED, index).text for index in itertools.count())
        return Source(STORY_WORLD, storyworld.fingerprint(), {"train": rows}, STORY_WORLD_STORIES)
    if src.startswith(HUB_PREFIX):
        return _open_hub(src)
    src = os.path.expanduser(src)
    path = Path(src)
    if path.is_dir():
        return _open_folder(src, path)
    files = [path] if path.is_file() else sorted(file for file in map(Path, glob.glob(src)) if file.is_file())
    if not files:
        raise FileNotFoundError(f"{src} does not exist. {_allowed()}.")
    name = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    return _open_files(src, name, {"train": files})


def _allowed() -> str:
    return (
        f"SRC may be {STORY_WORLD}, {HUB_PREFIX}OWNER/NAME, a file ({', '.join(_READERS)}), a glob of files, or a "
        "folder whose file names say train and valid"
    )


def _open_folder(src: str, folder: Path) -> Source:
    """Open the files of a folder whose names, or folders' names, say train or valid. Other files are not read."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and _ending(file))
    split_of = {file: _named_split(file.relative_to(folder)) for file in files}
    found = {split: [file for file in files if split_of[file] == split] for split in ("train", "valid")}
    if not found["train"]:
        others = ", ".join(sorted(file.name for file in files)[:5]) or "no file that can be read"
        raise ValueError(
            f"{src} holds no file whose name says train; it has {others}. Name files by a glob in quotes, such as "
            f"'{folder / '*.jsonl'}'. {_allowed()}."
        )
    return _open_files(src, folder.resolve().name, {split: chosen for split, chosen in found.items() if chosen})


def _named_split(file: Path) -> str | None:
    """Return the split that a path names last, in a word by itself: `train-00.jsonl`, `validation/00.jsonl`."""
    words = re.findall("[a-z]+", file.as_posix().lower())
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), None)


def _open_files(src: str, name: str, files: Mapping[str, list[Path]]) -> Source:
    every = [file for chosen in files.values() for file in chosen]
    readers = {_READERS.get(_ending(file)) for file in every}
    read = readers.pop()
    if read is None or readers:
        raise ValueError(f"{src}: files must have one of the endings {', '.join(_READERS)}, all of one kind.")
    splits = {split: itertools.chain.from_iterable(map(read, chosen)) for split, chosen in files.items()}
    return Source(name, _contents(every), splits)


def _open_hub(src: str) -> Source:
    from datasets import load_dataset
    from huggingface_hub import HfApi

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs what it raises, which is reported here
    repository = src.removeprefix(HUB_PREFIX)
    try:
        commit = HfApi().dataset_info(repository).sha
        found: Any = load_dataset(repository, revision=commit, streaming=True)
    except Exception as error:  # the hub's, the library's, the network's, or a malformed name
        raise FileNotFoundError(
            f"{src} cannot be opened: {_words(error)} Check the name and the network. {_allowed()}."
        ) from None
    if "train" not in found:
        raise ValueError(f"{src} has no training split; it has {', '.join(found)}.")
    valid = next((name for name in ("validation", "valid") if name in found), None)
    named = {"train": found["train"], **({"valid": found[valid]} if valid else {})}
    tables = {split: rows.with_format("arrow").iter(_TABLE_ROWS) for split, rows in named.items()}
    return Source(src, str(commit), {split: _table_rows(tables[split], src) for split in tables})


def _text_rows(file: Path) -> Iterator[str]:
    """Yield the lines of a text file. A byte that is not UTF-8 becomes a lone surrogate."""
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8", errors="surrogateescape") as lines:
        for line in _readable(lines, f"{file}", "line"):
            yield line.rstrip("\n")


def _json_rows(file: Path) -> Iterator[Row]:
    column = None
    for number, line in enumerate(_text_rows(file), 1):
        if line.strip():
            record = _json_object(line, f"{file}, line {number}")
            column = column or _column(record, f"{file}")
            yield record.get(column)


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); correct or remove it.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}; correct or remove it.")
    return value


def _parquet_rows(file: Path) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    def tables() -> Iterator[Any]:
        with ParquetFile(file) as opened:
            yield from opened.iter_batches(_TABLE_ROWS)

    return _table_rows(tables(), f"{file}")


def _table_rows(tables: Iterable[Any], where: str) -> Iterator[Row]:
    """Yield the rows of Arrow tables or record batches."""

    def columns(table: Any) -> dict[str, Any]:
        return {name: table[name].to_pylist() if name in COLUMNS else None for name in table.schema.names}

    for named in _readable(map(columns, tables), where, "table"):
        yield from named[_column(named, where)]


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_rows,
    ".jsonl.gz": _json_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
    ".txt.gz": _text_rows,
}
"""File ending -> its reader."""


def _readable(items: Iterable[T], where: str, what: str) -> Iterator[T]:
    """Yield the items; turn any error of a reader or the network into one ValueError."""
    done = 0
    try:
        for item in items:
            yield item
            done += 1
    except Exception as error:
        raise ValueError(f"{where} cannot be read after {what} {done}: {_words(error)}") from error


def _column(names: Iterable[str], where: str) -> str:
    column = next((name for name in COLUMNS if name in names), None)
    if column is None:
        raise ValueError(
            f"{where} has the fields {', '.join(names) or 'none'}; stories are in 'text', ids in 'tok_ids'."
        )
    return column


def _ending(file: Path) -> str:
    return next((ending for ending in _READERS if file.name.endswith(ending)), "")


def _contents(files: list[Path]) -> str:
    """Return the SHA-256 of the files' own SHA-256, in order."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _words(error: Exception) -> str:
    """Return the first line of what an error says, as a sentence."""
    return (str(error).partition("\n")[0].rstrip(".") or type(error).__name__) + "."

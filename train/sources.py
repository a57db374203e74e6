"""What `prepare` reads: stories, or rows of token ids, from local files or the hub, through the `datasets` library, and
the stories of the bundled story world, which are told as they are read.

Rely on: rows come in order and a batch at a time, from any row on; the same contents have the same fingerprint wherever
they lie; whatever cannot be read is one error that says where. Local files need no network, and nothing is kept in a
cache. What the rows mean is not looked at here.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from tinymodel_jax.bundled import storyworld

STORY_WORLD = "storyworld"
STORY_WORLD_SEED = 0
"""Seed of the stories to train on; those of another seed are new to what was trained."""
STORY_WORLD_STORIES = 100_000
"""How many of them are read where no limit is given."""
HUB_PREFIX = "hub:"
ENDINGS = {".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet", ".txt": "text", ".txt.gz": "text"}
"""File ending -> the reader of the `datasets` library."""
COLUMNS = ("tok_ids", "text")
"""Where rows are found; the first that a source has."""
_SOURCES = (
    f"SRC may be {STORY_WORLD}, {HUB_PREFIX}OWNER/NAME, a file ({', '.join(ENDINGS)}), a glob of files, or a folder "
    "whose file names say train and valid"
)
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev"), "valid"),
}


@dataclass(frozen=True)
class StoryWorld:
    """The stories of `STORY_WORLD_SEED`, told as they are read."""

    fingerprint: str
    """Of the grammar and its stories."""
    name: str = STORY_WORLD
    splits: tuple[str, ...] = ("train",)
    default_limit: int = STORY_WORLD_STORIES
    """Rows to read where no limit is given: the stories have no end."""

    def read(self, split: str, first: int, limit: int | None, batch_size: int) -> Iterator[pa.Array]:
        """Yield the texts, `batch_size` at a time, from story `first` to story `limit`, or without end."""
        for start in itertools.count(first, batch_size):
            count = batch_size if limit is None else min(batch_size, limit - start)
            if count <= 0:
                return
            yield pa.array([story.text for story in storyworld.stories(STORY_WORLD_SEED, count, start)])


@dataclass(frozen=True)
class StoredRows:
    """Files, or a data set of the hub."""

    name: str
    """What it is called, without folders."""
    fingerprint: str
    """SHA-256 of the files' contents, or the hub's commit."""
    splits: dict[str, Any]
    """`train`, and `valid` if the source has a validation split of its own: `datasets.IterableDataset`."""
    files: tuple[Path, ...]
    """Local files; none for the hub."""
    default_limit: None = None
    """All rows are read where no limit is given."""

    def read(self, split: str, first: int, limit: int | None, batch_size: int) -> Iterator[pa.Array]:
        """Yield the texts or lists of ids of a split, `batch_size` at a time, from row `first` to row `limit`.

        Raises:
            ValueError: something cannot be read, or the rows have neither `text` nor `tok_ids`.
        """
        rows = self.splits[split].skip(first)
        tables = (rows if limit is None else rows.take(max(0, limit - first))).iter(batch_size)
        while True:
            try:
                with _quiet_library():
                    table = next(tables, None)
            except Exception as error:  # whatever the readers and the network raise
                otherwise = f"{self.name} cannot be read after row {first}: {_words(error)} Run the same command again."
                raise ValueError(_first_problem(self.files) or otherwise) from error
            if table is None:
                return
            column = next((name for name in COLUMNS if name in table.column_names), None)
            if column is None:
                found = ", ".join(table.column_names) or "none"
                raise ValueError(f"{self.name} has the fields {found}; stories are in 'text', ids in 'tok_ids'.")
            first += len(table)
            # A slice of the file's block would take the whole block along to another process.
            yield pa.concat_arrays(table[column].chunks)


Source = StoryWorld | StoredRows
"""Something to read, opened."""


def open_source(src: str) -> Source:
    """Open what the user named.

    Raises:
        FileNotFoundError: there is no such file, or the hub lacks it or cannot be reached.
        ValueError: it is of no kind that can be read, or empty.
    """
    if src == STORY_WORLD:
        return StoryWorld(storyworld.fingerprint())
    if src.startswith(HUB_PREFIX):
        return _open_hub(src)
    src = os.path.expanduser(src)
    path = Path(src)
    if path.is_dir():
        return _open_folder(src, path)
    files = [path] if path.is_file() else sorted(file for file in map(Path, glob.glob(src)) if file.is_file())
    if not files:
        raise FileNotFoundError(f"{src}: there is no such file. {_SOURCES}.")
    name = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    return _open_files(src, name, {"train": files})


def _open_folder(src: str, folder: Path) -> StoredRows:
    """Open the files of a folder whose names, or folders' names, say train or valid; no other is touched."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and _ending(file))
    split_of = {file: _named_split(file.relative_to(folder)) for file in files}
    found = {split: [file for file in files if split_of[file] == split] for split in ("train", "valid")}
    if not found["train"]:
        others = ", ".join(sorted(file.name for file in files)[:5]) or "no file to read"
        raise ValueError(
            f"{src} holds no file whose name says train; it has {others}. Name files by a glob in quotes, such as "
            f"'{folder / '*.jsonl'}'. {_SOURCES}."
        )
    return _open_files(src, folder.resolve().name, {split: chosen for split, chosen in found.items() if chosen})


def _open_files(src: str, name: str, files: dict[str, list[Path]]) -> StoredRows:
    """Open local files, by their split."""
    every = [file for chosen in files.values() for file in chosen]
    kinds = {ENDINGS.get(_ending(file)) for file in every}
    if None in kinds or len(kinds) > 1:
        raise ValueError(f"{src}: files must have one of the endings {', '.join(ENDINGS)}, all of one kind.")
    data_files = {split: [str(file) for file in chosen] for split, chosen in files.items()}
    return StoredRows(name, _contents(every), _splits(src, every, kinds.pop(), data_files=data_files), tuple(every))


def _named_split(file: Path) -> str | None:
    """Return the split that a path names last, in a word by itself: `train-00.jsonl`, `validation/00.jsonl`."""
    words = re.findall("[a-z]+", file.as_posix().lower())
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), None)


def _open_hub(src: str) -> StoredRows:
    from huggingface_hub import HfApi

    repository = src.removeprefix(HUB_PREFIX)
    try:
        commit = HfApi().dataset_info(repository).sha
    except Exception as error:  # the hub's, the network's, or a malformed name
        raise FileNotFoundError(
            f"{src} cannot be opened: {_words(error)} Check the name and the network. {_SOURCES}."
        ) from None
    # All reading is of this commit, so that a run that goes on reads what the interrupted one did.
    return StoredRows(src, str(commit), _splits(src, (), repository, revision=commit), ())


def _splits(src: str, files: Sequence[Path], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Open what the arguments name to `datasets.load_dataset`; return its splits."""
    from datasets import load_dataset

    try:
        with _quiet_library():
            found = load_dataset(*args, **kwargs, streaming=True)
    except StopIteration:  # how the library takes an empty file
        raise ValueError(f"{src} is empty.") from None
    except Exception as error:  # the library raises what its readers and the network do
        raise ValueError(_first_problem(files) or f"{src} cannot be opened: {_words(error)}") from error
    if "train" not in found:
        raise ValueError(f"{src} has no training split; it has {', '.join(found)}.")
    valid = next((name for name in ("validation", "valid") if name in found), None)
    named = {"train": found["train"], **({"valid": found[valid]} if valid else {})}
    return {name: rows.with_format("arrow") for name, rows in named.items()}


def _ending(file: Path) -> str:
    return next((ending for ending in ENDINGS if file.name.endswith(ending)), "")


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


def _first_problem(files: Sequence[Path]) -> str | None:
    """Return what is wrong with the first line that is no JSON object, in files that should have them."""
    for file in files:
        if ENDINGS.get(_ending(file)) == "json" and (problem := _first_bad_line(file)) is not None:
            return f"{file}, {problem}; mend or remove it."
    return None


def _first_bad_line(path: Path) -> str | None:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                value = json.loads(line) if line.strip() else {}
                if not isinstance(value, dict):
                    return f"line {number}: expected a JSON object, got {type(value).__name__}"
                json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        return f"line {number}: not valid JSON ({error})"
    except (OSError, EOFError) as error:
        return f"after line {number}: {error}"
    return None


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """Keep `datasets` from logging what is about to be raised and explained."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)

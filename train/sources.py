"""What `prepare` reads: stories, or rows of token ids, from local files or the hub, through the `datasets` library.

Rely on: rows come in order and a batch at a time, from any row on; the same contents have the same fingerprint wherever
they lie; whatever cannot be read is one error that says where. Local files need no network, and nothing is kept in a
cache. What the rows mean is not looked at here.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

HUB_PREFIX = "hub:"
ENDINGS = {".jsonl": "json", ".jsonl.gz": "json", ".parquet": "parquet", ".txt": "text", ".txt.gz": "text"}
"""File ending -> the reader of the `datasets` library."""
COLUMNS = ("tok_ids", "text")
"""Where rows are found; the first that a source has."""
_SOURCES = (
    f"SRC may be {HUB_PREFIX}OWNER/NAME, a file ({', '.join(ENDINGS)}), a glob of files, or a folder whose file names "
    "say train and valid"
)


@dataclass(frozen=True)
class Source:
    """Something to read, opened."""

    name: str
    """What it is called, without folders."""
    fingerprint: str
    """SHA-256 of the files' contents, or the hub's commit."""
    splits: dict[str, Any]
    """`train`, and `valid` if the source has a validation split of its own: `datasets.IterableDataset`."""
    files: tuple[Path, ...]
    """Local files; none for the hub."""

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


def open_source(src: str) -> Source:
    """Open what the user named.

    Raises:
        FileNotFoundError: there is no such file, or the hub lacks it or cannot be reached.
        ValueError: it is of no kind that can be read, or empty.
    """
    if src.startswith(HUB_PREFIX):
        return _open_hub(src)
    path = Path(src)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _ending(file))
        if not files:
            raise ValueError(f"{src} holds no file to read. {_SOURCES}.")
        return Source(path.resolve().name, _contents(files), _splits(src, files, str(path)), tuple(files))

    files = [path] if path.is_file() else sorted(file for file in map(Path, glob.glob(src)) if file.is_file())
    if not files:
        raise FileNotFoundError(f"{src}: there is no such file. {_SOURCES}.")
    kinds = {ENDINGS.get(_ending(file)) for file in files}
    if None in kinds or len(kinds) > 1:
        raise ValueError(f"{src}: files must have one of the endings {', '.join(ENDINGS)}, all of one kind.")
    name = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    splits = _splits(src, files, kinds.pop(), data_files={"train": [str(file) for file in files]})
    return Source(name, _contents(files), splits, tuple(files))


def _open_hub(src: str) -> Source:
    from huggingface_hub import HfApi

    repository = src.removeprefix(HUB_PREFIX)
    try:
        commit = HfApi().dataset_info(repository).sha
    except Exception as error:  # the hub's, the network's, or a malformed name
        raise FileNotFoundError(
            f"{src} cannot be opened: {_words(error)} Check the name and the network. {_SOURCES}."
        ) from error
    # All reading is of this commit, so that a run that goes on reads what the interrupted one did.
    return Source(src, str(commit), _splits(src, (), repository, revision=commit), ())


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

"""Prepare training data: `python -m train prepare SRC DEST`. Stories become a folder that `open_data` reads.

    python -m train prepare hub:noanabeshima/TinyStoriesV2 data/stories     # tokenizes 2.7 M stories
    python -m train prepare hub:noanabeshima/TinyModelTokIds data/published # the published rows of ids
    python -m train prepare 'stories/*.jsonl.gz' data/mine --limit 100000
    python -m train prepare storyworld data/mini --tokenizer mini --row-length 256   # the bundled generator's stories

About 8,000 stories/s on two CPU cores. Rely on: the same source, tokenizer and options give the same bytes, whatever
the number of workers and however often the work was interrupted; DEST appears when it is complete. The same command
again goes on where the last one stopped, or says that all is done. No tokenizer is trained here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from tinymodel_jax.bundled import storyworld
from tinymodel_jax.io.default_tokenizer import default_tokenizer, saved_tokenizer
from tinymodel_jax.io.hub import cache_folder
from tinymodel_jax.runtime.paths import user_path
from tinymodel_jax.text.tokenizer import Tokenizer
from tinymodel_jax.training.data import MAX_SEED
from tinymodel_jax.training.data_folder import (
    DEFAULT_ROW_LENGTH,
    DESCRIPTION_FILE,
    ID_DTYPE,
    MAX_VOCAB,
    SPLITS,
    DataMeta,
    is_remote,
    partial_folder,
)
from train.draft import Draft
from train.encoding import Batch, Encoder
from train.sources import Source, open_source
from train.workers import encode_all, with_progress

DEFAULT_VALID_FRACTION = 0.01
BATCH_STORIES = 2048
"""Stories a worker encodes at a time; an interruption loses the few batches in the making."""

_NOT_COMPARED = ("source",)  # a file may be renamed


def prepare(
    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    *,
    limit: int | None = None,
    tokenizer: str = "tiny_model",
    row_length: int = DEFAULT_ROW_LENGTH,
    pack: bool = False,
    valid_fraction: float | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Turn stories into a folder of token ids to train on.

    Args:
        src: storyworld, hub:OWNER/NAME, a file (.jsonl, .jsonl.gz, .parquet, .txt, .txt.gz), a glob in quotes, or a
            folder.
        dest: folder to make; may be gs://….
        limit: stories read at most from each split of the source; by default 100,000 of storyworld, else all.
        tokenizer: tiny_model, mini (the story world's), or a folder with a saved tokenizer or GPT-2's files.
        row_length: tokens a row.
        pack: cut one stream of stories into rows, instead of a story a row.
        valid_fraction: share of stories held out, 0.01 unless the source has a validation split of its own.
        seed: of the choice of held-out stories.
        workers: processes; by default as many as CPU cores.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    _check_numbers(limit, row_length, valid_fraction, seed, workers)
    dest = os.path.expanduser(dest)
    _require_free(dest)
    found = load_tokenizer(tokenizer)
    source = open_source(src)
    limit = source.default_limit if limit is None else limit
    if valid_fraction is None and "valid" not in source.splits:
        valid_fraction = DEFAULT_VALID_FRACTION
    if valid_fraction is not None:
        valid_fraction = float(valid_fraction)  # a whole number has another text in data.json
    settings = {
        "source": source.name,
        "source_fingerprint": source.fingerprint,
        "tokenizer_fingerprint": found.fingerprint,
        "vocab_size": found.vocab_size,
        "row_length": row_length,
        "packed": pack,
        "limit": limit,
        "valid_fraction": valid_fraction,
        "seed": seed,
    }
    meta = _finished(dest, settings)
    if meta is not None:
        print(f"{dest} is already done: {_summary(meta)}")
        return
    folder = _upload_folder(dest) if is_remote(dest) else Path(dest).absolute()
    if _finished(folder, settings) is None:
        encoder = Encoder(source.name, found, row_length, pack, valid_fraction, seed)
        _build(source, encoder, folder, settings, workers)
    if is_remote(dest):
        _upload(folder, dest)
    meta = _finished(dest, settings)
    assert meta is not None
    print(f"{dest}: {_summary(meta)}")


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that an option `--tokenizer` names.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its vocabulary is too large for 16-bit ids.
    """
    if name == "tiny_model":
        found = default_tokenizer()
    elif name == "mini":
        found = storyworld.tokenizer()
    elif user_path(name).exists():
        found = saved_tokenizer(user_path(name)) or Tokenizer.from_gpt2(name)
    else:
        raise FileNotFoundError(
            f"tokenizer {name!r}: neither tiny_model nor mini nor a folder with a saved tokenizer or GPT-2's files."
        )
    if found.vocab_size > MAX_VOCAB:
        raise ValueError(f"tokenizer {name!r} has {found.vocab_size} ids; prepared data holds at most {MAX_VOCAB}.")
    return found


def _build(source: Source, encoder: Encoder, folder: Path, settings: dict[str, Any], workers: int) -> None:
    """Make the folder, going on with an earlier draft of it."""

    def require_same(earlier: Mapping[str, Any]) -> None:
        _require_same(earlier, settings, f"{partial_folder(folder)} is the beginning of another preparation")

    with Draft(folder, settings, require_same) as draft:
        journal = draft.journal
        # Without a fraction to hold out, the source's own validation split is read, too.
        splits = SPLITS if encoder.valid_fraction is None else SPLITS[:1]
        batches = (
            batch for split in splits for batch in _batches(source, split, journal.read[split], settings["limit"])
        )
        for encoded in with_progress(encode_all(batches, encoder, workers), sum(journal.read.values())):
            draft.add(encoded)
        if journal.stories["train"] == 0:
            draft.discard()
            raise ValueError(f"{source.name} has no story to train on: {_counts(journal.read, journal)}.")

        pad = ID_DTYPE.type(encoder.tokenizer.pad_id).tobytes()
        row_bytes = encoder.row_length * ID_DTYPE.itemsize
        draft.fill_row(row_bytes, pad)
        rows = {split: journal.size[split] // row_bytes for split in SPLITS}
        meta = DataMeta(
            rows=rows, tokens=journal.tokens, stories=journal.stories, left_out=journal.left_out, **settings
        )

        def add_files(data: Path) -> None:
            encoder.tokenizer.save_pretrained(data)
            (data / DESCRIPTION_FILE).write_text(meta.to_json(), "utf-8")

        draft.finish(add_files)


def _batches(source: Source, split: str, first: int, limit: int | None) -> Iterator[Batch]:
    for column in source.read(split, first, limit, BATCH_STORIES):
        yield Batch(split, first, column)
        first += len(column)


def _check_numbers(limit: int | None, row_length: int, valid_fraction: float | None, seed: int, workers: int) -> None:
    problems = []
    if limit is not None and limit < 1:
        problems.append(f"--limit must be 1 or more, got {limit}")
    if row_length < 2:
        problems.append(f"--row-length must be 2 or more, got {row_length}")
    if valid_fraction is not None and not 0 <= valid_fraction < 1:
        problems.append(f"--valid-fraction must be at least 0 and below 1, got {valid_fraction}")
    if not 0 <= seed <= MAX_SEED:
        problems.append(f"--seed must be 0 to {MAX_SEED}, got {seed}")
    if workers < 1:
        problems.append(f"--workers must be 1 or more, got {workers}")
    if problems:
        raise ValueError(f"{'; '.join(problems)}.")


def _require_free(dest: str) -> None:
    """Refuse a destination that holds anything but prepared data."""
    if is_remote(dest):
        return
    path = Path(dest)
    if path.is_dir() and any(path.iterdir()) and not (path / DESCRIPTION_FILE).is_file():
        raise FileExistsError(f"{dest} holds something that is no prepared data; choose another DEST.")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{dest} is a file; choose another DEST.")


def _finished(dest: str | Path, settings: Mapping[str, Any]) -> DataMeta | None:
    """Return the description of a finished folder, if it is there; refuse one made with other settings."""
    from etils import epath

    file = epath.Path(dest) / DESCRIPTION_FILE
    if not file.exists():
        return None
    meta = DataMeta.from_json(file.read_text(), str(file))
    _require_same({name: getattr(meta, name) for name in settings}, settings, f"{dest} was prepared otherwise")
    if not is_remote(str(dest)):
        shutil.rmtree(partial_folder(Path(dest)), ignore_errors=True)  # of a process interrupted after the renaming
    return meta


def _require_same(earlier: Mapping[str, Any], settings: Mapping[str, Any], what: str) -> None:
    differences = [
        f"{name} {_short(earlier.get(name))} there, {_short(value)} now"
        for name, value in settings.items()
        if name not in _NOT_COMPARED and earlier.get(name) != value
    ]
    if differences:
        raise ValueError(f"{what}: {'; '.join(differences)}. Choose another DEST, or delete it.")


def _short(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else json.dumps(value)


def _summary(meta: DataMeta) -> str:
    rows = ", ".join(f"{meta.rows[split]:,} {name}" for split, name in (("train", "training"), ("valid", "held-out")))
    left_out = sum(meta.left_out.values())
    return (
        f"{rows} rows of {meta.row_length}, {sum(meta.tokens.values()):,} tokens of {sum(meta.stories.values()):,} "
        f"stories; {left_out:,} left out"
    )


def _counts(read: Mapping[str, int], journal: Any) -> str:
    refused, empty = journal.left_out["refused"], journal.left_out["empty"]
    held_out = journal.stories["valid"]
    return f"{sum(read.values()):,} read, {refused:,} refused, {empty:,} empty, {held_out:,} held out"


def _upload_folder(dest: str) -> Path:
    """Return where the folder for an address is made before it is sent there."""
    return cache_folder() / "prepared" / hashlib.sha256(dest.encode()).hexdigest()[:16]


def _upload(folder: Path, dest: str) -> None:
    """Send a folder to an address, the description last, and remove it here."""
    from etils import epath

    remote = epath.Path(dest)
    remote.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == DESCRIPTION_FILE):
        with file.open("rb") as source, (remote / file.name).open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    shutil.rmtree(folder)

"""Prepare training data: `python -m train prepare SRC DEST` turns stories into a folder that `open_data` reads.

    python -m train prepare hub:noanabeshima/TinyStoriesV2 data/stories     # tokenizes 2.7 M stories
    python -m train prepare hub:noanabeshima/TinyModelTokIds data/published # the published rows of ids
    python -m train prepare 'stories/*.jsonl.gz' data/mine --limit 100000
    python -m train prepare storyworld data/mini --tokenizer mini --row-length 256   # the bundled generator's stories

About 9,000 stories/s on two CPU cores. Guarantees: the same source, tokenizer and options give the same bytes, with
any number of workers; DEST appears when it is complete, so an interruption leaves no DEST. The same command again
starts over, or reports that DEST is done. Tokenizers are not trained here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated, Any

import tyro
from rich.console import Console

from tinymodel_jax.bundled import storyworld
from tinymodel_jax.io.default_tokenizer import default_tokenizer, saved_tokenizer
from tinymodel_jax.io.hub.published import cache_folder
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
from train.encoding import Batch, Counts, Encoded, Encoder
from train.run_files import send
from train.run_lock import locked_folder
from train.sources import Source, open_source
from train.workers import encode_all

DEFAULT_VALID_FRACTION = 0.01
BATCH_STORIES = 2048
"""Stories that a worker encodes at a time."""
SECONDS_BETWEEN_LINES = 10.0

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
        dest: folder to make, or an address such as gs://bucket/folder.
        limit: maximum number of stories to read from each split of the source; by default 100,000 of storyworld, all of
            other sources.
        tokenizer: tiny_model, mini (the story world's), or a folder with a saved tokenizer or GPT-2's files.
        row_length: tokens per row.
        pack: cut one stream of all stories into rows, instead of one story per row.
        valid_fraction: share of stories to hold out; by default 0.01, unless the source has a validation split.
        seed: seed of the choice of held-out stories.
        workers: number of processes; by default one per CPU core.
    """
    workers = (os.cpu_count() or 1) if workers is None else workers
    _check_numbers(limit, row_length, valid_fraction, seed, workers)
    dest = os.path.expanduser(dest)
    _require_free(dest)
    source = open_source(src)  # before the tokenizer, which may have to be downloaded
    found = load_tokenizer(tokenizer)
    limit = source.default_limit if limit is None else limit
    if valid_fraction is None and "valid" not in source.splits:
        valid_fraction = DEFAULT_VALID_FRACTION
    if valid_fraction is not None:
        valid_fraction = float(valid_fraction)  # a whole number would be written differently in data.json
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
    if meta is None:
        encoder = Encoder(source.name, found, row_length, pack, valid_fraction, seed)
        with _locked_empty_folder(dest) as folder:
            meta = _finished(dest, settings)  # by another process, before this one had the lock
            if meta is None:
                meta = _build(folder, source, encoder, settings, workers)
                _publish(folder, dest)
                print(f"{dest}: {_summary(meta)}")
                return
    print(f"{dest} is already done: {_summary(meta)}")


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that the option `--tokenizer` names.

    Raises:
        FileNotFoundError: it does not exist.
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
            f"tokenizer {name!r} is neither tiny_model nor mini nor a folder with a saved tokenizer or GPT-2's files."
        )
    if found.vocab_size > MAX_VOCAB:
        raise ValueError(f"tokenizer {name!r} has {found.vocab_size} ids; prepared data holds at most {MAX_VOCAB}.")
    return found


@contextmanager
def _locked_empty_folder(dest: str) -> Iterator[Path]:
    """Yield an empty folder to make DEST in, locked for this process; what is left of it is removed at the end.

    Raises:
        ValueError: another process is preparing DEST.
    """
    work = partial_folder(_cached(dest) if is_remote(dest) else Path(dest))
    folder = work / "data"
    work.mkdir(parents=True, exist_ok=True)  # an error of locked_folder would mention a run's checkpoints
    try:
        with locked_folder(work):
            shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        with suppress(OSError):  # another process may have locked it by now
            work.rmdir()


def _publish(folder: Path, dest: str) -> None:
    """Send a finished folder to DEST, or rename it."""
    if is_remote(dest):
        _upload(folder, dest)
    else:
        folder.rename(dest)


def _cached(address: str) -> Path:
    """Return where the folder for an address is made."""
    return cache_folder() / "prepared" / hashlib.sha256(address.encode()).hexdigest()[:16]


def _upload(folder: Path, address: str) -> None:
    """Send a folder to an address, the description last."""
    from etils import epath

    remote = epath.Path(address)
    remote.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == DESCRIPTION_FILE):
        send(file, remote / file.name)


def _build(folder: Path, source: Source, encoder: Encoder, settings: dict[str, Any], workers: int) -> DataMeta:
    """Write all files of a prepared folder."""
    # Without a fraction to hold out, the source's own validation split is read, too.
    splits = SPLITS if encoder.valid_fraction is None else SPLITS[:1]
    batches = (batch for split in splits for batch in _batches(source, split, settings["limit"]))
    counts = Counts()
    with ExitStack() as stack:
        files = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS}
        for encoded in _with_progress(encode_all(batches, encoder, workers)):
            for split, file in files.items():
                file.write(encoded.ids[split])
            counts.add(encoded.counts)
        rows = {split: _complete_rows(file, encoder) for split, file in files.items()}
    if counts.stories["train"] == 0:
        raise ValueError(f"{source.name} has no story to train on: {_outcome(counts)}.")
    meta = DataMeta(
        rows=rows,
        tokens={split: counts.tokens[split] for split in SPLITS},
        stories={split: counts.stories[split] for split in SPLITS},
        left_out={reason: counts.left_out[reason] for reason in ("refused", "empty")},
        **settings,
    )
    encoder.tokenizer.save_pretrained(folder)
    (folder / DESCRIPTION_FILE).write_text(meta.to_json(), "utf-8")
    return meta


def _batches(source: Source, split: str, limit: int | None) -> Iterator[Batch]:
    rows, first = itertools.islice(source.splits.get(split, ()), limit), 1
    while batch := list(itertools.islice(rows, BATCH_STORIES)):
        yield Batch(split, first, batch)
        first += len(batch)


def _complete_rows(file: IO[bytes], encoder: Encoder) -> int:
    """Fill the last row of a file with `[PAD]`; return how many rows there are."""
    row_bytes = encoder.row_length * ID_DTYPE.itemsize
    missing = -file.tell() % row_bytes // ID_DTYPE.itemsize
    file.write(ID_DTYPE.type(encoder.tokenizer.pad_id).tobytes() * missing)
    return file.tell() // row_bytes


def _with_progress(results: Iterable[Encoded]) -> Iterator[Encoded]:
    """Yield the results; show progress on stderr: a status on a terminal, else a line every ten seconds."""
    started = line_at = time.monotonic()
    read = 0
    with Console(stderr=True).status("tokenizing") as status:
        for result in results:
            yield result
            read += result.counts.read
            now = time.monotonic()
            shown = f"tokenizing: {read:,} stories, {read / (now - started):,.0f}/s"
            status.update(shown)
            if not sys.stderr.isatty() and now - line_at > SECONDS_BETWEEN_LINES:
                line_at = now
                print(shown, file=sys.stderr, flush=True)


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
    """Refuse a destination that contains anything but prepared data."""
    if is_remote(dest):
        return
    path = Path(dest)
    if path.is_dir() and any(path.iterdir()) and not (path / DESCRIPTION_FILE).is_file():
        raise FileExistsError(f"{dest} contains something other than prepared data; choose another DEST.")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{dest} is a file; choose another DEST.")


def _finished(dest: str, settings: Mapping[str, Any]) -> DataMeta | None:
    """Return the description of a finished folder, if there is one; refuse one that was made with other settings."""
    from etils import epath

    file = epath.Path(dest) / DESCRIPTION_FILE
    if not file.exists():
        return None
    meta = DataMeta.from_json(file.read_text(), str(file))
    differences = [
        f"{name} {_short(getattr(meta, name))} there, {_short(value)} now"
        for name, value in settings.items()
        if name not in _NOT_COMPARED and getattr(meta, name) != value
    ]
    if differences:
        raise ValueError(
            f"{dest} was prepared with other settings: {'; '.join(differences)}. Choose another DEST, or delete it."
        )
    return meta


def _short(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else json.dumps(value)


def _summary(meta: DataMeta) -> str:
    rows = ", ".join(f"{meta.rows[split]:,} {name}" for split, name in (("train", "training"), ("valid", "held-out")))
    left_out = sum(meta.left_out.values())
    return (
        f"{rows} rows of {meta.row_length}, {sum(meta.tokens.values()):,} tokens of {sum(meta.stories.values()):,} "
        f"stories; {left_out:,} left out"
    )


def _outcome(counts: Counts) -> str:
    refused, empty = counts.left_out["refused"], counts.left_out["empty"]
    return f"{counts.read:,} read, {refused:,} refused, {empty:,} empty, {counts.stories['valid']:,} held out"

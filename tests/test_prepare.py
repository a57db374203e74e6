"""`python -m train prepare`: what rows hold, what may be read, held-out stories, interruptions, errors."""

import functools
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from fsspec.implementations.memory import MemoryFileSystem
from tokenizers import decoders, models, pre_tokenizers, trainers

from tinymodel_jax.bundled import storyworld
from tinymodel_jax.text.tokenizer import Tokenizer
from tinymodel_jax.training.data import open_data
from train import prepare as prepare_module
from train import sources
from train.__main__ import main
from train.draft import Draft
from train.encoding import Batch, Encoded, Encoder
from train.prepare import prepare
from train.workers import encode_all

ROW = 12
SECONDS = 60
"""Longer than any process here should take."""
FILES = {"data.json", "train.bin", "valid.bin", "tokenizer.json", "token_table.json"}
STORIES = [
    "Once upon a time.",
    "The cat sat on the mat, and the dog sat on the cat, and the bird sat on the dog.",
    "It cost €5.",
    "  \n",
    "Lily ran.\nTim ran, too.",
    "\U0001f600",
    "Tim said hi.",
]
KEPT = [STORIES[i] for i in (0, 1, 4, 6)]


def make_tokenizer(vocab_size: int) -> Tokenizer:
    bpe: Any = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(KEPT, trainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False))
    return Tokenizer(bpe)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer(300)


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(tokenizer_folder: str) -> Callable[..., None]:
    """`prepare` with short rows, the small tokenizer and one process, unless told otherwise."""

    def call(src: str | Path, dest: str | Path, **options: Any) -> None:
        prepare(str(src), str(dest), **{"tokenizer": tokenizer_folder, "row_length": ROW, "workers": 1, **options})

    return call


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "stories.jsonl", STORIES)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A source of 23 batches, when a batch has 100 stories."""
    return write_jsonl(tmp_path / "many.jsonl", [f"Tim ran {number} times. {KEPT[1]}" for number in range(2_250)])


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_STORIES", 100)


def write_jsonl(path: Path, stories: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def expected_row(tokenizer: Tokenizer, story: str) -> list[int]:
    ids = [tokenizer.begin_id, *tokenizer.encode(story, max_length=None), tokenizer.end_id]
    return (ids + [tokenizer.pad_id] * ROW)[:ROW]


# Rows


def test_a_row_is_begin_story_end_and_pads(
    run: Callable[..., None], source: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    run(source, tmp_path / "data", valid_fraction=0)
    data = open_data(tmp_path / "data")
    assert data.train.tolist() == [expected_row(tokenizer, story) for story in KEPT]
    assert tokenizer.end_id in data.train[0]
    assert tokenizer.end_id not in data.train[1], "a story that was cut has no [END]"


def test_the_description_counts_what_was_kept_and_left_out(
    run: Callable[..., None], source: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    run(source, tmp_path / "data", valid_fraction=0)
    meta = open_data(tmp_path / "data").meta
    tokens = sum(np.count_nonzero(np.array(expected_row(tokenizer, story)) != tokenizer.pad_id) for story in KEPT)
    assert meta.rows == meta.stories == {"train": 4, "valid": 0}
    assert meta.tokens == {"train": tokens, "valid": 0}
    assert meta.left_out == {"refused": 1, "empty": 2}
    assert (meta.vocab_size, meta.tokenizer_fingerprint) == (tokenizer.vocab_size, tokenizer.fingerprint)


def test_the_tokenizer_is_kept_with_the_ids(
    run: Callable[..., None], source: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    run(source, tmp_path / "data")
    assert {file.name for file in (tmp_path / "data").iterdir()} == FILES
    assert Tokenizer.from_pretrained(tmp_path / "data").fingerprint == tokenizer.fingerprint


def test_packed_rows_are_one_stream_whose_last_row_is_padded(
    run: Callable[..., None], source: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    run(source, tmp_path / "data", pack=True, valid_fraction=0)
    data = open_data(tmp_path / "data")
    stream = [
        id_
        for story in KEPT
        for id_ in (tokenizer.begin_id, *tokenizer.encode(story, max_length=None), tokenizer.end_id)
    ]
    padding = [tokenizer.pad_id] * (data.train.size - len(stream))
    assert len(padding) < ROW
    assert data.train.ravel().tolist() == stream + padding
    assert data.meta.tokens["train"] == len(stream)
    assert data.meta.packed


def test_the_limit_counts_stories_read(run: Callable[..., None], source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "data", limit=5, valid_fraction=0)
    assert open_data(tmp_path / "data").meta.stories["train"] == 3


def test_a_tokenizers_fingerprint_is_that_of_its_files(tokenizer: Tokenizer, tokenizer_folder: str) -> None:
    assert Tokenizer.from_pretrained(tokenizer_folder).fingerprint == tokenizer.fingerprint
    assert make_tokenizer(299).fingerprint != tokenizer.fingerprint


# Sources


def write_source(kind: str, folder: Path) -> str:
    """Write STORIES, newlines apart, in some form; return what names it."""
    folder.mkdir()
    stories = [story.replace("\n", " ") for story in STORIES]
    lines = "".join(json.dumps({"text": story, "n": 1}) + "\n" for story in stories)
    if kind == "jsonl":
        (folder / "a.jsonl").write_text(lines)
        return str(folder / "a.jsonl")
    if kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
        return str(folder / "a.jsonl.gz")
    if kind == "parquet":
        pq.write_table(pa.table({"n": range(len(stories)), "text": stories}), folder / "a.parquet")
        return str(folder / "a.parquet")
    if kind == "txt":
        (folder / "a.txt").write_text("\n".join(stories), "utf-8")
        return str(folder / "a.txt")
    if kind == "txt.gz":
        (folder / "a.txt.gz").write_bytes(gzip.compress("\n".join(stories).encode()))
        return str(folder / "a.txt.gz")
    assert kind == "glob"
    for number, part in enumerate((stories[:1], stories[1:5], stories[5:])):
        write_jsonl(folder / f"part{number}.jsonl", part)
    return str(folder / "part*.jsonl")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "txt", "txt.gz", "glob"])
def test_every_form_of_a_source_gives_the_same_rows(
    run: Callable[..., None], tmp_path: Path, tokenizer: Tokenizer, kind: str
) -> None:
    run(write_source(kind, tmp_path / "source"), tmp_path / "data", valid_fraction=0)
    rows = [expected_row(tokenizer, story.replace("\n", " ")) for story in KEPT]
    assert open_data(tmp_path / "data").train.tolist() == rows


@pytest.fixture
def with_own_split(tmp_path: Path) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    write_jsonl(folder / "Tiny-train.jsonl", STORIES)
    write_jsonl(folder / "Tiny-valid.jsonl", [KEPT[2], KEPT[0]])
    return folder


@pytest.mark.slow
def test_the_story_world_is_read_as_its_stories_are_told(
    run: Callable[..., None], tmp_path: Path, small_batches: None
) -> None:
    del small_batches
    run("storyworld", tmp_path / "data", tokenizer="mini", row_length=256, limit=120, valid_fraction=0)
    told = [story.text for story in storyworld.stories(sources.STORY_WORLD_SEED, 120)]
    ids, _ = storyworld.tokenizer()(told, add_end=True, padding="max_length")
    data = open_data(tmp_path / "data")
    np.testing.assert_array_equal(data.train, ids)
    assert Tokenizer.from_pretrained(data.folder).fingerprint == storyworld.tokenizer().fingerprint
    assert (data.train == storyworld.tokenizer().end_id).any(axis=1).all(), "a story was cut"


def test_the_story_world_goes_on_where_it_stopped(
    run: Callable[..., None], tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del small_batches
    run("storyworld", tmp_path / "whole", limit=120)
    add, added = Draft.add, []

    def add_one(draft: Draft, encoded: Encoded) -> None:
        if added:
            raise KeyboardInterrupt
        add(draft, encoded)
        added.append(encoded)

    monkeypatch.setattr(Draft, "add", add_one)
    with pytest.raises(KeyboardInterrupt):
        run("storyworld", tmp_path / "parts", limit=120)
    monkeypatch.setattr(Draft, "add", add)
    run("storyworld", tmp_path / "parts", limit=120)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_the_story_world_without_a_limit_is_read_to_a_fixed_one(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sources.StoryWorld("").default_limit == 100_000
    monkeypatch.setattr(sources, "StoryWorld", functools.partial(sources.StoryWorld, default_limit=30))
    run("storyworld", tmp_path / "data")
    meta = open_data(tmp_path / "data").meta
    assert (meta.limit, sum(meta.stories.values())) == (30, 30)


def test_a_validation_split_of_the_source_is_kept(
    run: Callable[..., None], with_own_split: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    run(with_own_split, tmp_path / "data")
    data = open_data(tmp_path / "data")
    assert data.train.tolist() == [expected_row(tokenizer, story) for story in KEPT]
    assert data.valid.tolist() == [expected_row(tokenizer, story) for story in (KEPT[2], KEPT[0])]
    assert data.meta.valid_fraction is None


def test_of_a_folder_only_files_that_say_train_or_valid_are_read(
    run: Callable[..., None], with_own_split: Path, tmp_path: Path
) -> None:
    run(with_own_split, tmp_path / "data")
    (with_own_split / "vocab.json").write_text('{"text": 0}')
    (with_own_split / "others.jsonl").write_text("no JSON")
    (with_own_split / "notes.txt").write_text("To do.")
    (with_own_split / "validation").mkdir()
    os.rename(with_own_split / "Tiny-valid.jsonl", with_own_split / "validation" / "000.jsonl")
    run(with_own_split, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "data")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("Tiny-train.jsonl", "train"),
        ("train-00000-of-00004.parquet", "train"),
        ("valid/train.jsonl", "train"),
        ("train/stories_val.txt", "valid"),
        ("Validation/01.txt", "valid"),
        ("training_2.txt", "train"),
        ("trainer.txt", None),
        ("constrain.txt", None),
        ("test.txt", None),
    ],
)
def test_a_file_belongs_to_the_split_that_its_path_names_last(path: str, split: str | None) -> None:
    assert sources._named_split(Path(path)) == split


def test_an_asked_fraction_is_taken_from_the_training_split(
    run: Callable[..., None], with_own_split: Path, tmp_path: Path
) -> None:
    run(with_own_split, tmp_path / "data", valid_fraction=0)
    assert open_data(tmp_path / "data").meta.stories == {"train": 4, "valid": 0}


def test_the_hub_is_read_at_one_commit(
    run: Callable[..., None], with_own_split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    class Info:
        sha = "c0ffee"

    asked = []
    load = datasets.load_dataset

    def load_local(name: str, **options: Any) -> Any:
        asked.append((name, options.pop("revision")))
        return load(str(with_own_split), **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, repository: Info)
    monkeypatch.setattr(datasets, "load_dataset", load_local)
    run("hub:someone/stories", tmp_path / "data")
    meta = open_data(tmp_path / "data").meta
    assert asked == [("someone/stories", "c0ffee")]
    assert (meta.source, meta.source_fingerprint) == ("hub:someone/stories", "c0ffee")
    assert meta.stories == {"train": 4, "valid": 2}


def test_an_unreachable_hub_is_one_line(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fail(self: object, repository: str) -> None:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(FileNotFoundError, match=r"hub:a/b cannot be opened: no route to host\. Check the name"):
        run("hub:a/b", tmp_path / "data")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_of_ids_are_cut_and_padded(
    run: Callable[..., None], tmp_path: Path, tokenizer: Tokenizer, ending: str
) -> None:
    pad = tokenizer.pad_id
    rows = [[5, 6, 7], list(range(20)), [], [pad, pad], [8, 9, pad, pad]]
    source = tmp_path / f"ids.{ending}"
    if ending == "jsonl":
        source.write_text("".join(json.dumps({"tok_ids": row}) + "\n" for row in rows))
    else:
        pq.write_table(pa.table({"tok_ids": rows}), source)
    run(source, tmp_path / "data", valid_fraction=0)
    data = open_data(tmp_path / "data")
    assert data.train.tolist() == [(row + [pad] * ROW)[:ROW] for row in ([5, 6, 7], list(range(20)), [8, 9])]
    assert data.meta.left_out == {"refused": 0, "empty": 2}
    run(source, tmp_path / "packed", valid_fraction=0, pack=True)
    stream = [5, 6, 7, *range(20), 8, 9]
    assert open_data(tmp_path / "packed").train.ravel()[: len(stream)].tolist() == stream


# Held-out stories


def test_stories_are_held_out_by_their_contents(run: Callable[..., None], tmp_path: Path) -> None:
    stories = [f"Tim has {number} cats." for number in range(400)]
    forwards = write_jsonl(tmp_path / "forwards.jsonl", stories)
    backwards_twice = write_jsonl(tmp_path / "backwards.jsonl", [*reversed(stories), *stories])
    run(forwards, tmp_path / "a", valid_fraction=0.25)
    run(backwards_twice, tmp_path / "b", valid_fraction=0.25)
    run(forwards, tmp_path / "c", valid_fraction=0.25, seed=1)
    held_out = [{tuple(row) for row in open_data(tmp_path / name).valid.tolist()} for name in "abc"]
    trained_on = [{tuple(row) for row in open_data(tmp_path / name).train.tolist()} for name in "abc"]
    assert held_out[0] == held_out[1] != held_out[2]
    assert all(
        not valid & train and len(valid | train) == 400 for valid, train in zip(held_out, trained_on, strict=True)
    )
    # Binomial, 100 expected, standard deviation 8.7.
    assert all(abs(len(valid) - 100) < 5 * 8.7 for valid in held_out)


# The same bytes, however the work went


def test_several_workers_give_the_same_bytes(
    run: Callable[..., None], many: Path, tmp_path: Path, small_batches: None
) -> None:
    del small_batches
    run(many, tmp_path / "one")
    run(many, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert open_data(tmp_path / "one").meta.stories["valid"] > 0


KILLED = """
import multiprocessing, os, signal, sys
from train import prepare

def killing(moment, number, before):
    original, calls = getattr(os, moment), 0
    def call(*arguments):
        nonlocal calls
        calls += 1
        if calls != number:
            return original(*arguments)
        if not before:
            original(*arguments)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(os, moment, call)

if __name__ == "__main__":
    src, dest, tokenizer, pack, workers, moment, number, before = sys.argv[1:]
    prepare.BATCH_STORIES = 100
    killing(moment, int(number), before == "before")
    prepare.prepare(src, dest, tokenizer=tokenizer, row_length=12, pack=pack == "pack", workers=int(workers))
"""


def killed(many: Path, dest: Path, tokenizer_folder: str, *arguments: str) -> str:
    """Prepare in a process that kills itself with -9 at a call of an `os` function; return what it printed."""
    script = dest.with_suffix(".py")
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(script), str(many), str(dest), tokenizer_folder, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("pack", "moment"),
    [
        ("rows", ("fsync", "9", "before")),  # after writing, before it is on disk
        ("rows", ("replace", "8", "before")),  # before the journal counts a batch
        ("pack", ("replace", "8", "after")),  # after it
        ("pack", ("rename", "1", "before")),  # all is done but the name
        ("rows", ("rename", "1", "after")),  # the draft is not yet removed
    ],
)
def test_a_killed_preparation_goes_on_to_the_same_bytes(
    run: Callable[..., None],
    many: Path,
    tmp_path: Path,
    tokenizer_folder: str,
    pack: str,
    moment: tuple[str, str, str],
    small_batches: None,
) -> None:
    del small_batches
    run(many, tmp_path / "whole", pack=pack == "pack")
    dest = tmp_path / "data"
    killed(many, dest, tokenizer_folder, pack, "1", *moment)
    assert dest.exists() == (moment == ("rename", "1", "after"))
    assert (tmp_path / "data.partial").exists()
    run(many, dest, pack=pack == "pack")
    assert contents(dest) == contents(tmp_path / "whole")
    assert not (tmp_path / "data.partial").exists()


def test_going_on_reads_only_what_is_left(
    run: Callable[..., None],
    many: Path,
    tmp_path: Path,
    tokenizer_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    small_batches: None,
) -> None:
    del small_batches
    killed(many, tmp_path / "data", tokenizer_folder, "rows", "1", "replace", "21", "after")
    encoded = []
    encode = prepare_module.Encoder.encode

    def counted(self: Any, batch: Any) -> Any:
        encoded.append(batch.first)
        return encode(self, batch)

    monkeypatch.setattr(prepare_module.Encoder, "encode", counted)
    run(many, tmp_path / "data")
    # The first replacement is that of the new, empty journal: 20 batches were done.
    assert encoded == [2000, 2100, 2200]


def test_no_worker_outlives_a_killed_parent(many: Path, tmp_path: Path, tokenizer_folder: str) -> None:
    printed = killed(many, tmp_path / "data", tokenizer_folder, "rows", "2", "replace", "4", "before")
    workers = [int(pid) for pid in printed.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + SECONDS
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if is_running(pid)]


class SignalEncoder(Encoder):
    def encode(self, batch: Batch) -> Encoded:
        held_back = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return Encoded(batch.split, int(held_back), {}, {}, {}, {})


def test_ctrl_c_does_not_reach_the_workers(tokenizer: Tokenizer) -> None:
    encoder = SignalEncoder("a", tokenizer, ROW, packed=False, valid_fraction=0.0, seed=0)
    batches = [Batch("train", 0, pa.array(STORIES))] * 4
    assert [encoded.read for encoded in encode_all(iter(batches), encoder, 2)] == [1] * 4
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_ctrl_c_ends_the_command_without_a_word(tmp_path: Path, tokenizer_folder: str) -> None:
    source = write_jsonl(tmp_path / "long.jsonl", [KEPT[1]] * 300_000)
    arguments = ["prepare", str(source), str(tmp_path / "data"), "--tokenizer", tokenizer_folder, "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *arguments],
        cwd=Path(__file__).parents[1],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "data.partial").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does; the workers are just starting
    _, error = process.communicate(timeout=SECONDS)
    assert (process.returncode, error) == (130, b"")
    assert not (tmp_path / "data").exists()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_two_processes_do_not_prepare_the_same_folder(run: Callable[..., None], source: Path, tmp_path: Path) -> None:
    with (
        Draft(tmp_path / "data", {}, lambda earlier: None),
        pytest.raises(ValueError, match=r"another process is preparing .*data; wait for it or end it"),
    ):
        run(source, tmp_path / "data")


@pytest.fixture
def interrupted(
    run: Callable[..., None], many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_batches: None
) -> Path:
    """A folder whose preparation stopped after three batches."""
    del small_batches
    add, calls = Draft.add, []

    def add_three(self: Draft, encoded: Any) -> None:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(encoded)
        add(self, encoded)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patched.setattr(Draft, "add", add_three)
        run(many, tmp_path / "data")
    return tmp_path / "data"


def test_what_was_written_after_the_last_count_is_cut_off(
    run: Callable[..., None], many: Path, interrupted: Path, tmp_path: Path
) -> None:
    with (tmp_path / "data.partial/data/train.bin").open("ab") as file:
        file.write(b"torn")
    run(many, interrupted)
    run(many, tmp_path / "whole")
    assert contents(interrupted) == contents(tmp_path / "whole")


def test_an_unfinished_folder_cannot_be_opened(interrupted: Path) -> None:
    with pytest.raises(FileNotFoundError, match="was not finished"):
        open_data(interrupted)


def test_lost_bytes_and_a_damaged_journal_are_noticed(
    run: Callable[..., None], many: Path, interrupted: Path, tmp_path: Path
) -> None:
    os.truncate(tmp_path / "data.partial/data/train.bin", 5)
    with pytest.raises(ValueError, match=r"train\.bin has 5 bytes, \d+ were written; delete"):
        run(many, interrupted)
    (tmp_path / "data.partial/journal.json").write_text("{")
    with pytest.raises(ValueError, match=r"journal\.json is damaged .*; delete .*data\.partial and start anew"):
        run(many, interrupted)


# The same command, and another, once more


def test_the_same_command_again_changes_nothing(
    run: Callable[..., None], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(source, tmp_path / "data", valid_fraction=0.5)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "data").iterdir()}
    source.rename(tmp_path / "renamed.jsonl")
    capsys.readouterr()
    run(tmp_path / "renamed.jsonl", tmp_path / "data", valid_fraction=0.5)
    assert "is already done" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "data").iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "differences"),
    [
        ({"row_length": 8, "seed": 3}, "row_length 12 there, 8 now; seed 0 there, 3 now"),
        ({"pack": True}, "packed false there, true now"),
        ({"limit": 900}, "limit null there, 900 now"),
        ({"valid_fraction": 0.5}, "valid_fraction 0.01 there, 0.5 now"),
    ],
)
def test_other_options_are_refused_with_what_differs(
    run: Callable[..., None], many: Path, interrupted: Path, changes: dict[str, Any], differences: str
) -> None:
    with pytest.raises(ValueError, match=f"is the beginning of another preparation: {differences}"):
        run(many, interrupted, **changes)
    run(many, interrupted)
    with pytest.raises(ValueError, match=f"was prepared otherwise: {differences}"):
        run(many, interrupted, **changes)


def test_another_source_or_tokenizer_is_refused(
    run: Callable[..., None], many: Path, interrupted: Path, tmp_path: Path
) -> None:
    make_tokenizer(299).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"tokenizer_fingerprint \w{12}… there, \w{12}… now; vocab_size"):
        run(many, interrupted, tokenizer=str(tmp_path / "other"))
    with many.open("a") as file:
        file.write('{"text": "More."}\n')
    with pytest.raises(ValueError, match=r"source_fingerprint \w{12}… there, \w{12}… now"):
        run(many, interrupted)


# Errors


def test_an_error_before_the_first_batch_leaves_nothing(run: Callable[..., None], tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not valid JSON .*; mend or remove it"):
        run(source, tmp_path / "data")
    assert sorted(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.txt", b"", r"a\.txt (is empty|has no story to train on: 0 read)"),
        ("a.txt", b"\n \n", r"has no story to train on: 2 read, 0 refused, 2 empty, 0 held out"),
        ("a.jsonl", b'{"text": "\xe2\x82\xac"}\n', r"no story to train on: 1 read, 1 refused"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b[END]c"}\n', r"a\.jsonl, story 2 'b\[END\]c' holds \[END\]"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"line 2: expected a JSON object, got list"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: not valid JSON .*surrogates not allowed"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a \xff"}\n', r"story 2 is not valid UTF-8"),
        ("a.jsonl", b'{"story": "a", "n": 1}\n', r"has the fields story, n; stories are in 'text', ids in 'tok_ids'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', r"a\.jsonl, row 2 has no text or ids"),
        ("a.jsonl", b'{"text": 7}\n', r"rows hold int64, expected 'text' as str or 'tok_ids' as list of int"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-9], r"after line \d+: Compressed file ended"),
        ("a.txt", b"One.\n<|endoftext|>\nTwo.\n", r"story 2 is '<\|endoftext\|>', which divides stories"),
        ("a.parquet", b"PAR1", r"a\.parquet cannot be opened: "),
        ("a.jsonl", b'{"tok_ids": [1]}\n{"tok_ids": [2, 304]}\n', r"row 2 holds the id 304; .* ids 0 to 303"),
        ("a.jsonl", b'{"tok_ids": []}\n{"tok_ids": [-1]}\n', r"row 2 holds the id -1"),
        ("a.jsonl", b'{"tok_ids": [1]}\n{"tok_ids": [302, 300, 1]}\n', r"row 2 has \[PAD\] \(id 302\) before a token"),
        ("a.jsonl", b'{"tok_ids": [1, null]}\n', r"an id among the rows from 1 on is null"),
        ("a.jsonl", b'{"tok_ids": [1.5]}\n', r"rows hold list<item: double>"),
        ("a.csv", b"text\na\n", r"a\.csv: files must have one of the endings \.jsonl"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line(
    run: Callable[..., None], tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path / name, tmp_path / "data")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


def test_the_vocabulary_in_the_message_is_the_tokenizers(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 304


def test_files_of_two_kinds_are_refused(run: Callable[..., None], source: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("More.")
    with pytest.raises(ValueError, match="all of one kind"):
        run(tmp_path / "*.*", tmp_path / "data")


def test_a_missing_source_says_what_there_may_be(run: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"there is no such file\. SRC may be storyworld, hub:OWNER/NAME, a file"
    ):
        run(tmp_path / "no*.jsonl", tmp_path / "data")
    with pytest.raises(ValueError, match=r"no file whose name says train; it has no file to read\. .*SRC may be"):
        run(tmp_path, tmp_path / "data")
    write_jsonl(tmp_path / "stories.jsonl", STORIES)
    write_jsonl(tmp_path / "valid.jsonl", STORIES)
    says = r"it has stories\.jsonl, valid\.jsonl\. Name files by a glob in quotes, such as '.*/\*\.jsonl'"
    with pytest.raises(ValueError, match=says):
        run(tmp_path, tmp_path / "data")


def test_an_error_in_a_worker_process_is_raised_here(run: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"tok_ids": [999]}\n')
    with pytest.raises(ValueError, match="row 1 holds the id 999"):
        run(tmp_path / "a.jsonl", tmp_path / "data", workers=2)


class FatalEncoder(Encoder):
    def encode(self, batch: Batch) -> Encoded:
        os._exit(1)


def test_a_worker_process_that_dies_is_one_line(tokenizer: Tokenizer) -> None:
    encoder = FatalEncoder("a", tokenizer, ROW, packed=False, valid_fraction=0.0, seed=0)
    with pytest.raises(ChildProcessError, match=r"a worker process died.*run the same command again"):
        list(encode_all(iter([Batch("train", 0, pa.array(STORIES))]), encoder, 2))


def test_a_destination_with_something_else_in_it_is_left_alone(
    run: Callable[..., None], source: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("42")
    for name in ("full", source.name):
        with pytest.raises(FileExistsError, match="choose another DEST"):
            run(source, tmp_path / name)
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_an_empty_destination_is_filled(run: Callable[..., None], source: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    run(source, tmp_path / "data")
    assert len(open_data(tmp_path / "data").train) == 4


def test_all_wrong_numbers_are_named_at_once(run: Callable[..., None], source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--limit .*0; --row-length .*1; --valid-fraction .*1\.5; --seed .*-1; --wor"):
        run(source, tmp_path / "data", limit=0, row_length=1, valid_fraction=1.5, seed=-1, workers=0)


def test_an_unknown_tokenizer_says_what_there_may_be(run: Callable[..., None], source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tokenizer 'nope': neither tiny_model nor mini nor a folder"):
        run(source, tmp_path / "data", tokenizer="nope")


def test_the_default_tokenizer_is_the_packages(
    run: Callable[..., None],
    source: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepare_module, "default_tokenizer", lambda: tokenizer)
    run(source, tmp_path / "data", tokenizer="tiny_model")
    assert open_data(tmp_path / "data").meta.tokenizer_fingerprint == tokenizer.fingerprint


# Elsewhere, and from the command line


def test_a_folder_in_a_bucket_is_written_and_read_through_the_cache(
    run: Callable[..., None],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bucket = MemoryFileSystem(skip_instance_cache=True)
    bucket.store, bucket.pseudo_dirs = {}, [""]  # the class's are shared by all
    filesystem = fsspec.filesystem
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **k: bucket if name == "gcs" else filesystem(name, **k))
    monkeypatch.setenv("TINYMODEL_CACHE", str(tmp_path / "cache"))
    run(source, tmp_path / "here")
    run(source, "gs://bucket/stories")
    assert {Path(name).name for name in bucket.store} == FILES
    assert contents(open_data("gs://bucket/stories").folder) == contents(tmp_path / "here")

    capsys.readouterr()
    run(source, "gs://bucket/stories")
    assert "gs://bucket/stories is already done" in capsys.readouterr().out
    bucket.store.clear()
    with pytest.raises(FileNotFoundError, match="is no prepared data"):
        open_data("gs://bucket/stories")


def test_the_command_prints_one_line_and_its_errors_are_one_line(
    source: Path, tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tokenizer", tokenizer_folder, "--workers", "1", "--limit", "3", "--row-length", "12"]
    assert main(["prepare", str(source), str(tmp_path / "data"), *options]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    assert "2 training, 0 held-out rows of 12" in printed.out
    assert printed.err == ""
    assert main(["prepare", str(source), str(tmp_path / "data"), *options, "--pack"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_long_preparation_says_now_and_then_how_far_it_is(
    run: Callable[..., None],
    many: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_batches: None,
) -> None:
    from train import workers

    del small_batches
    monkeypatch.setattr(workers, "SECONDS_BETWEEN_LINES", 0.0)
    run(many, tmp_path / "data")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 23
    assert lines[-1].startswith("tokenizing: 2,250 stories, ")

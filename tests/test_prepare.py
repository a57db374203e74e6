"""`python -m train prepare`: rows, sources, held-out stories, interruptions, errors."""

import gzip
import json
import multiprocessing
import os
import shutil
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
from train.encoding import Batch, Encoder
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
    """`prepare` with short rows, the small tokenizer and one process by default."""

    def call(src: str | Path, dest: str | Path, **options: Any) -> None:
        prepare(str(src), str(dest), **{"tokenizer": tokenizer_folder, "row_length": ROW, "workers": 1, **options})

    return call


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "stories.jsonl", STORIES)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A source of 23 batches of 10 stories."""
    return write_jsonl(tmp_path / "many.jsonl", [f"Tim ran {number} times. {KEPT[1]}" for number in range(225)])


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_STORIES", 10)


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


def test_the_story_world_is_read_as_its_stories_are_told(
    run: Callable[..., None], tmp_path: Path, small_batches: None
) -> None:
    del small_batches
    run("storyworld", tmp_path / "data", tokenizer="mini", row_length=256, limit=25, valid_fraction=0)
    told = [story.text for story in storyworld.stories(sources.STORY_WORLD_SEED, 25)]
    ids, _ = storyworld.tokenizer()(told, add_end=True, padding="max_length")
    data = open_data(tmp_path / "data")
    np.testing.assert_array_equal(data.train, ids)
    assert Tokenizer.from_pretrained(data.folder).fingerprint == storyworld.tokenizer().fingerprint
    assert (data.train == storyworld.tokenizer().end_id).any(axis=1).all(), "a story was cut"


def test_the_story_world_without_a_limit_is_read_to_a_fixed_one(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sources.STORY_WORLD_STORIES == 100_000
    monkeypatch.setattr(sources, "STORY_WORLD_STORIES", 30)
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


# The same bytes with any number of processes, and no incomplete files


def test_results_of_workers_come_in_order_until_an_error_which_is_raised_here(tokenizer: Tokenizer) -> None:
    encoder = Encoder("a", tokenizer, ROW, packed=False, valid_fraction=0.5, seed=0)
    batches = [Batch("train", 5 * i + 1, [f"Tim ran {number} times." for number in range(5)]) for i in range(8)]
    results = encode_all(iter([*batches, Batch("train", 41, [[999]])]), encoder, 2)
    found = [next(results)]
    assert len(multiprocessing.active_children()) == 2
    assert all(holds_back_ctrl_c(child.pid) for child in multiprocessing.active_children())
    with pytest.raises(ValueError, match="row 41 holds the id 999"):
        found += results
    assert found == [encoder.encode(batch) for batch in batches]
    assert not multiprocessing.active_children()


def holds_back_ctrl_c(pid: int | None) -> bool:
    blocked = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigBlk"))
    return bool(int(blocked.split()[1], 16) >> (signal.SIGINT - 1) & 1)


class Fatal:
    """A row that ends the process which receives it."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


def test_a_worker_process_that_dies_is_one_line(tokenizer: Tokenizer) -> None:
    encoder = Encoder("a", tokenizer, ROW, packed=False, valid_fraction=0.0, seed=0)
    with pytest.raises(ChildProcessError, match=r"a worker process died.*run the same command again"):
        list(encode_all(iter([Batch("train", 1, [Fatal()])]), encoder, 2))


KILLED = """
import multiprocessing, os, signal, sys
from train import prepare

def kill(*_):
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    src, dest, tokenizer = sys.argv[1:]
    prepare.BATCH_STORIES = 10
    prepare.Counts.add = kill
    prepare.prepare(src, dest, tokenizer=tokenizer, row_length=12, workers=2)
"""


def test_a_killed_preparation_leaves_no_data_and_no_worker_and_can_be_run_again(
    run: Callable[..., None], many: Path, tmp_path: Path, tokenizer_folder: str, small_batches: None
) -> None:
    del small_batches
    dest, script = tmp_path / "data", tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(many), str(dest), tokenizer_folder]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(FileNotFoundError, match="was not finished"):
        open_data(dest)
    workers = [int(pid) for pid in killed.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + SECONDS
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if is_running(pid)]
    run(many, dest)
    assert not (tmp_path / "data.partial").exists()
    run(many, tmp_path / "whole")
    assert contents(dest) == contents(tmp_path / "whole")


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_ctrl_c_ends_the_command_without_a_word_and_leaves_nothing(tmp_path: Path, tokenizer_folder: str) -> None:
    arguments = ["prepare", "storyworld", str(tmp_path / "data"), "--tokenizer", tokenizer_folder, "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *arguments],
        cwd=Path(__file__).parents[1],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "data.partial/data").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does; the workers are about to start
    _, error = process.communicate(timeout=SECONDS)
    assert (process.returncode, error) == (130, b"")
    assert not list(tmp_path.iterdir())


def test_a_second_process_is_refused_and_changes_nothing(
    run: Callable[..., None], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = prepare_module._complete_rows

    def with_a_second(*arguments: Any) -> int:
        with monkeypatch.context() as patched, pytest.raises(ValueError, match=r"data\.partial is in use by another"):  # noqa: PT012
            patched.setattr(prepare_module, "_complete_rows", complete)
            run(source, tmp_path / "data", pack=True)
        return complete(*arguments)

    run(source, tmp_path / "whole")
    monkeypatch.setattr(prepare_module, "_complete_rows", with_a_second)
    run(source, tmp_path / "data")
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


@pytest.mark.parametrize("pack", [False, True])
def test_data_that_another_process_finished_before_the_lock_was_free_is_kept(
    run: Callable[..., None],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pack: bool,
) -> None:
    run(source, tmp_path / "whole")
    locked = prepare_module.locked_folder

    def locked_late(folder: Path) -> Any:
        shutil.copytree(tmp_path / "whole", tmp_path / "data")
        return locked(folder)

    monkeypatch.setattr(prepare_module, "locked_folder", locked_late)
    monkeypatch.setattr(prepare_module, "encode_all", None)
    if pack:
        with pytest.raises(ValueError, match="was prepared with other settings: packed false there, true now"):
            run(source, tmp_path / "data", pack=True)
    else:
        run(source, tmp_path / "data")
        assert "is already done" in capsys.readouterr().out
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert not (tmp_path / "data.partial").exists()


# The same command again, then another one


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


def test_another_option_source_or_tokenizer_is_refused_with_what_differs(
    run: Callable[..., None], source: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "data")
    for changes, differences in (
        ({"row_length": 8, "seed": 3}, "row_length 12 there, 8 now; seed 0 there, 3 now"),
        ({"pack": True, "limit": 900}, "packed false there, true now; limit null there, 900 now"),
        ({"valid_fraction": 0.5}, "valid_fraction 0.01 there, 0.5 now"),
    ):
        with pytest.raises(ValueError, match=f"was prepared with other settings: {differences}"):
            run(source, tmp_path / "data", **changes)
    make_tokenizer(299).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"tokenizer_fingerprint \w{12}… there, \w{12}… now; vocab_size"):
        run(source, tmp_path / "data", tokenizer=str(tmp_path / "other"))
    with source.open("a") as file:
        file.write('{"text": "More."}\n')
    with pytest.raises(ValueError, match=r"source_fingerprint \w{12}… there, \w{12}… now"):
        run(source, tmp_path / "data")


# Errors


def test_an_error_leaves_nothing(run: Callable[..., None], tmp_path: Path, small_batches: None) -> None:
    del small_batches
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\n' * 50 + '{"text": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 51: not valid JSON .*; correct or remove it"):
        run(source, tmp_path / "data")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl has no story to train on: 0 read"),
        ("a.txt", b"\n \n", r"has no story to train on: 2 read, 0 refused, 2 empty, 0 held out"),
        ("a.jsonl", b'{"text": "\xe2\x82\xac"}\n', r"no story to train on: 1 read, 1 refused"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b[END]c"}\n', r"a\.jsonl, story 2 'b\[END\]c' holds \[END\]"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"line 2: expected a JSON object, got list"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"story 1 is not valid Unicode text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a \xff"}\n', r"story 2 is not valid Unicode text"),
        ("a.jsonl", b'{"story": "a", "n": 1}\n', r"has the fields story, n; stories are in 'text', ids in 'tok_ids'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', r"a\.jsonl, row 2 holds neither text nor ids"),
        ("a.jsonl", b'{"text": 7}\n', r"row 1 holds 7; 'text' must be a string, 'tok_ids' a list of integers"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-9],
            r"cannot be read after line \d+: Compressed file ended",
        ),
        ("a.txt", b"One.\n<|endoftext|>\nTwo.\n", r"story 2 is '<\|endoftext\|>', which divides stories"),
        ("a.parquet", b"PAR1", r"a\.parquet cannot be read after table 0: "),
        ("a.jsonl", b'{"tok_ids": [1]}\n{"tok_ids": [2, 304]}\n', r"row 2 holds the id 304; .* ids 0 to 303"),
        ("a.jsonl", b'{"tok_ids": []}\n{"tok_ids": [-1]}\n', r"row 2 holds the id -1"),
        ("a.jsonl", b'{"tok_ids": [1]}\n{"tok_ids": [302, 300, 1]}\n', r"row 2 has \[PAD\] \(id 302\) before a token"),
        ("a.jsonl", b'{"tok_ids": [1, null]}\n', r"row 1 holds \[1, None\]; "),
        ("a.jsonl", b'{"tok_ids": [1.5]}\n', r"row 1 holds \[1\.5\]; "),
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
    with pytest.raises(FileNotFoundError, match=r"does not exist\. SRC may be storyworld, hub:OWNER/NAME, a file"):
        run(tmp_path / "no*.jsonl", tmp_path / "data")
    with pytest.raises(
        ValueError, match=r"no file whose name says train; it has no file that can be read\. .*SRC may be"
    ):
        run(tmp_path, tmp_path / "data")
    write_jsonl(tmp_path / "stories.jsonl", STORIES)
    write_jsonl(tmp_path / "valid.jsonl", STORIES)
    says = r"it has stories\.jsonl, valid\.jsonl\. Name files by a glob in quotes, such as '.*/\*\.jsonl'"
    with pytest.raises(ValueError, match=says):
        run(tmp_path, tmp_path / "data")


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
    with pytest.raises(FileNotFoundError, match="tokenizer 'nope' is neither tiny_model nor mini nor a folder"):
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


# In another folder, and from the command line


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
    with pytest.raises(FileNotFoundError, match="is not prepared data"):
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
    del small_batches
    monkeypatch.setattr(prepare_module, "SECONDS_BETWEEN_LINES", 0.0)
    run(many, tmp_path / "data")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 23
    assert lines[-1].startswith("tokenizing: 225 stories, ")


def test_a_missing_source_is_named_before_a_tokenizer_is_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"stories\.txt does not exist\. SRC may be"):
        prepare(str(tmp_path / "stories.txt"), str(tmp_path / "data"), tokenizer=str(tmp_path / "no tokenizer"))

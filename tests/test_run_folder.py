"""A run's folder where writing goes wrong, on object stores, and where lines of metrics are missing."""

import gc
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax.numpy as jnp
import numpy as np
import pytest
from bucket_server import BucketServer
from etils import epath
from etils.epath import backend
from runs import ROOT, VOCAB, WITHOUT_PRIVILEGES, checkpoint_arrays, finish, start, train_here, write_counting_data

from tinymodel_jax.lm import TinyModel
from tinymodel_jax.training.data import batch_indices
from tinymodel_jax.training.dictionary_recipe import DictionaryRecipe
from train.checkpoints import Checkpoints
from train.run import Run, trained_seconds
from train.run_files import local_folder
from train.run_folder import MetricsLog, open_run_folder
from train.run_lock import held_folder

OPTIONS = ("--steps", "8", "--save-every", "2", "--eval-every", "4", "--batch-size", "4")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_counting_data(tmp_path_factory.mktemp("folder-data"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruptions."""
    out = tmp_path_factory.mktemp("folder") / "whole"
    assert train_here(*arguments(data, out)) == 0
    return out


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketServer]:
    """The objects in `gs://bucket`."""
    forget = backend.fsspec_backend._get_filesystem.cache_clear  # etils caches the file systems of fsspec
    forget()
    server = BucketServer(monkeypatch)
    yield server
    server.shutdown()
    server.server_close()
    forget()


def arguments(data: Path, out: str | Path) -> list[str]:
    return ["lm", "--preset", "smoke", "--data", str(data), "--out", str(out), *OPTIONS]


def assert_same_result(out: Path, expected: Path) -> None:
    assert (out / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    model = Path("model", "model.safetensors")
    assert (out / model).read_bytes() == (expected / model).read_bytes()
    got, wanted = (checkpoint_arrays(folder / "checkpoints" / "8") for folder in (out, expected))
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


# The configuration


def test_a_run_resumes_whose_recipe_lacks_a_field_of_today(tmp_path: Path) -> None:
    recipe = DictionaryRecipe("relu", 8, 10).to_dict()
    now = {"steps": 10, "recipes": {"M0": recipe}}
    before = {name: value for name, value in recipe.items() if name != "encoder_norm"}
    open_run_folder(tmp_path, {"steps": 10, "recipes": {"M0": before}})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"another configuration: recipes\.M0\.encoder_norm: 0\.1 -> 1\.0\. "):
        open_run_folder(tmp_path, {**now, "recipes": {"M0": {**recipe, "encoder_norm": 1.0}}})
    assert open_run_folder(tmp_path, now) is None
    assert json.loads((tmp_path / "config.json").read_text())["recipes"]["M0"]["encoder_norm"] == 0.1


# The log of metrics


def test_a_log_is_cut_after_the_step_that_a_run_goes_on_from(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.append([{"step": 1}, {"step": 2}])
    log.append([{"step": 3, "M1": {"loss": [1.5, 2.0]}}])
    log.close()
    with path.open("ab") as file:
        file.write(b'{"step": 4, "los')  # of a process that was killed
    log = MetricsLog(path, 2)
    log.append([{"step": 3}])
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize("content", [b'{"step": 1}\n', b'{"step": 1}\n{"step": 2}', b""])
def test_missing_lines_are_an_error_that_counts_them(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl has \d of the 2 lines that its checkpoint needs"):
        MetricsLog(path, 2)
    assert path.read_bytes() == content


# Checkpoints


# Orbax leaves the reads that it gives up to the garbage collector, which then complains about them
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["flipped byte", "cut short", "gone"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning_for_the_one_before(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = np.random.default_rng(0).normal(size=(2, 1000)).astype(np.float32)
    checkpoints = Checkpoints(tmp_path)
    for step, array in enumerate(saved, 1):
        checkpoints.save(step, {"a": jnp.asarray(array), "step": jnp.int32(step)})
    checkpoints.close()
    newest = tmp_path / "2" / "state"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    if damage == "flipped byte":
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif damage == "cut short":
        largest.write_bytes(content[: len(content) // 2])
    else:
        shutil.rmtree(newest)
    checkpoints = Checkpoints(tmp_path)
    state, step = checkpoints.restore({"a": jnp.zeros(1000), "step": jnp.int32(0)})
    checkpoints.close()
    assert step == 1
    assert state is not None
    np.testing.assert_array_equal(state["a"], saved[0])
    assert "checkpoint of step 2 is damaged" in capsys.readouterr().err
    gc.collect()


# Object stores


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_there_and_has_the_bits_of_one_on_disk(
    bucket: BucketServer, data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*arguments(data, "gs://bucket/runs/a")) == 0
    assert "the model is in gs://bucket/runs/a/model" in capsys.readouterr().out

    # as if killed while the last checkpoint was being written, then resumed
    for name in [name for name in bucket.objects if name.startswith("runs/a/model/")]:
        del bucket.objects[name]
    del bucket.objects["runs/a/checkpoints/8/commit_success.txt"]
    assert train_here(*arguments(data, "gs://bucket/runs/a")) == 0

    for name, content in bucket.objects.items():
        copy = tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
    assert_same_result(tmp_path / "runs" / "a", whole)
    assert TinyModel(tmp_path / "runs" / "a").config.d_vocab == VOCAB


@pytest.mark.slow
def test_in_a_bucket_the_metrics_of_a_step_are_there_before_its_checkpoint(bucket: BucketServer, data: Path) -> None:
    lines: dict[str, int] = {}
    write = bucket.write

    def watched(name: str, content: bytes) -> None:
        write(name, content)
        if name.startswith("checkpoints/"):
            lines.setdefault(name.split("/")[1], bucket.objects["metrics.jsonl"].count(b"\n"))

    bucket.write = watched  # type: ignore[method-assign]
    assert train_here(*arguments(data, "gs://bucket")) == 0
    assert set(lines) == {"2", "4", "6", "8"}
    assert all(count >= int(step) for step, count in lines.items())


@pytest.mark.slow
def test_a_bucket_that_is_full_is_one_line_and_the_run_goes_on_when_it_is_not(
    bucket: BucketServer, data: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write = bucket.write

    def filling(name: str, content: bytes) -> None:
        bucket.is_full = bucket.is_full or name.startswith("run/checkpoints/6/")
        write(name, content)

    bucket.write = filling  # type: ignore[method-assign]
    assert train_here(*arguments(data, "gs://bucket/run")) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("train: gs://bucket/run/checkpoints cannot be written: ")
    assert "quota" in error
    assert "Traceback" not in error

    bucket.write, bucket.is_full = write, False  # type: ignore[method-assign]
    assert train_here(*arguments(data, "gs://bucket/run")) == 0
    assert bucket.objects["run/metrics.jsonl"] == (whole / "metrics.jsonl").read_bytes()
    model = Path("model", "model.safetensors")
    assert bucket.objects[f"run/{model.as_posix()}"] == (whole / model).read_bytes()


def test_a_bucket_has_no_lock_and_says_so(bucket: BucketServer, capsys: pytest.CaptureFixture[str]) -> None:
    with held_folder("gs://bucket/run"):
        assert bucket.objects == {}
    assert "warning: gs://bucket/run is in an object store, which cannot be locked" in capsys.readouterr().err


def test_a_bucket_that_holds_something_else_is_left_alone(bucket: BucketServer) -> None:
    bucket.objects["letters/thesis.tex"] = b"dear"
    with pytest.raises(ValueError, match="not a training run"):
        open_run_folder("gs://bucket/letters", {"steps": 1})
    assert list(bucket.objects) == ["letters/thesis.tex"]


def test_a_folder_written_here_is_sent_whole(bucket: BucketServer) -> None:
    with local_folder("gs://bucket/there") as folder:
        (folder / "below").mkdir()
        (folder / "below" / "a.txt").write_text("a")
        (folder / "b.txt").write_text("b")
        assert bucket.objects == {}
    assert bucket.objects == {"there/below/a.txt": b"a", "there/b.txt": b"b"}
    assert not folder.exists()


# Disks


@pytest.mark.slow
def test_a_disk_that_fills_is_one_line_and_earlier_checkpoints_are_whole(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(*arguments(data, out))
    while not (out / "checkpoints" / "2").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    # From now on no file may grow: small ones still fit, a checkpoint's arrays do not.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (16_000, 16_000))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert f"{out}/checkpoints cannot be written: File too large. Finished checkpoints are intact" in err
    assert "Traceback" not in err
    assert "ERROR:" not in err
    assert (out / "checkpoints" / "2").exists()
    assert not (out / "checkpoints" / "8").exists()
    assert "damaged" not in finish(start(*arguments(data, out)))
    assert_same_result(out, whole)


@pytest.mark.parametrize("moment", ["before a save", "while it is saved"])
def test_a_save_that_fails_leaves_no_thread_that_waits(tmp_path: Path, moment: str) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints, state = Checkpoints(folder), {"a": np.ones(1000)}

    def take_away() -> None:
        folder.rename(tmp_path / "before")  # at once, even while something is being written in it
        folder.write_text("not a folder")

    checkpoints.save(1, state)
    while not (folder / "1").exists():
        time.sleep(0.002)
    failed = time.monotonic()
    if moment == "before a save":
        take_away()
        with pytest.raises(OSError, match="checkpoints cannot be written: "):
            checkpoints.save(2, state)
    else:
        checkpoints.save(2, {"a": np.ones(5_000_000)})  # which takes longer than to rename a folder
        take_away()
        with pytest.raises(OSError, match="checkpoints cannot be written: "):
            checkpoints.close()
    checkpoints.close()  # which has nothing to wait for
    waiting = [thread for thread in threading.enumerate() if not thread.daemon and "metadata_store" not in thread.name]
    for thread in waiting:  # the executor's thread, which ends with the process, is left out
        if thread is not threading.main_thread():
            thread.join(5)
    assert time.monotonic() - failed < 5


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a file takes its place", "it may not be written"])
def test_a_run_whose_checkpoints_cannot_be_saved_ends_within_seconds(data: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "run"
    options = ("--steps", "100000", "--save-every", "20", "--eval-every", "1000000")
    process = start(*arguments(data, out), *options, privileged=False)
    while not (out / "checkpoints" / "40").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    failed = time.monotonic()
    if how == "a file takes its place":
        (out / "checkpoints").rename(out / "before")
        (out / "checkpoints").write_text("not a folder")
    else:
        (out / "checkpoints").chmod(0o555)
    _, err = process.communicate(timeout=300)
    assert time.monotonic() - failed < 5
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith(f"train: {out}/checkpoints cannot be written: ")
    assert [line for line in err.splitlines() if not line.startswith(("compiling", "step "))] == err.splitlines()[-1:]


def run_without_privileges(*command: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m train` so that file permissions apply to it even for root."""
    whole = [*WITHOUT_PRIVILEGES, sys.executable, "-m", "train", *command]
    return subprocess.run(whole, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["new", "old"])
def test_a_folder_that_may_not_be_written_is_one_line(data: Path, whole: Path, tmp_path: Path, place: str) -> None:
    out = tmp_path / "locked" / "run"
    out.parent.mkdir()
    if place == "old":
        shutil.copytree(whole, out)
    locked = [out.parent, *(path for path in out.rglob("*") if path.is_dir()), *([out] if out.exists() else [])]
    before = sorted(out.parent.rglob("*"))
    for folder in locked:
        folder.chmod(0o555)
    try:
        done = run_without_privileges(*arguments(data, out))
    finally:
        for folder in locked:
            folder.chmod(0o755)
    assert done.returncode == 1
    assert "cannot be written: Permission denied" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(out.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"loss": np.float32(np.nan), "gradient_norm": np.float32(1)}, "the loss is nan at step 1"),
        ({"loss": np.float32(1), "gradient_norm": np.float32(np.inf)}, "the gradient norm is inf at step 1"),
        ({"M0": {"gradient_norm": np.array([1, np.nan])}}, "the gradient norm of M0 member 1 is nan at step 1"),
    ],
)
def test_what_is_not_finite_is_never_saved(tmp_path: Path, line: dict[str, Any], says: str) -> None:
    run, checkpoints = new_run(tmp_path, steps=1)
    for done, _ in run.steps(lambda number: number, 1.0, str):
        run.log(done, line)
        with pytest.raises(ValueError, match=says):
            run.save(done, None)
    checkpoints.save.assert_not_called()


def new_run(folder: Path, steps: int, done: int = 0, stop_requested: Callable[[], bool] = bool) -> tuple[Run, Mock]:
    """Return a run that resumes after `done` steps, and the replacement of its checkpoints."""
    checkpoints = Mock()
    checkpoints.restore.return_value = (None, done)
    (folder / "metrics.jsonl").write_text('{"step": 0}\n' * done)
    run = Run(epath.Path(folder), {"steps": steps, "save_every": 2}, checkpoints, stop_requested)
    run.restore(None)
    return run, checkpoints


@pytest.mark.parametrize(("rows", "batch"), [(30, 4), (32, 4), (5, 7)])
def test_a_run_says_once_at_which_step_its_data_repeats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: int, batch: int
) -> None:
    drawn = np.concatenate([batch_indices(rows, batch, 0, step) for step in range(20)])
    repeated = next(place for place in range(len(drawn)) if drawn[place] in drawn[:place])
    run, _ = new_run(tmp_path, steps=20)
    run.say_epochs(rows / batch, "the rows")
    times = f"and 20 steps read them {20 * batch / rows:.1f} times\n"
    assert capsys.readouterr().out == f"the rows repeat: epoch 2 begins at step {repeated // batch + 1}, {times}"
    resumed, _ = new_run(tmp_path, steps=20, done=17)
    resumed.say_epochs(rows / batch, "the rows")
    epoch = 17 * batch // rows + 1
    assert capsys.readouterr().out == f"the rows repeat: step 18 is in epoch {epoch}, {times}"


@pytest.mark.parametrize("done", [0, 7])
def test_a_run_that_reads_every_row_at_most_once_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], done: int
) -> None:
    run, _ = new_run(tmp_path, steps=10, done=done)
    run.say_epochs(10.0, "the rows")
    assert capsys.readouterr().out == ""


def test_a_loop_that_never_asks_whether_to_save_can_be_stopped(tmp_path: Path) -> None:
    run, _ = new_run(tmp_path, steps=6, stop_requested=lambda: run.done == 3)
    for done, _ in run.steps(lambda number: number, 1.0, lambda line: ""):
        run.log(done, {"loss": np.float32(1), "tokens": 1})
    assert run.done == 3
    assert run.must_save(3)


def test_the_time_of_a_run_is_that_of_its_steps_and_not_of_the_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def sit(first_step: int, stop_after: int) -> None:
        run, _ = new_run(tmp_path, 6, first_step, lambda: run.done == stop_after)
        for done, _ in run.steps(lambda number: number, 1.0, lambda line: ""):
            now[0] += 10
            run.log(done, {"loss": np.float32(1), "tokens": 1})
            if run.must_save(done):
                run.save(done, None)

    sit(4, stop_after=0)
    assert trained_seconds(tmp_path) is None  # without the file, the earlier time is unknown
    sit(0, stop_after=3)
    assert trained_seconds(tmp_path) == 30
    now[0] += 86_400  # it resumes the next day
    sit(3, stop_after=0)
    assert trained_seconds(tmp_path) == 60
    sit(0, stop_after=1)  # begun anew
    assert trained_seconds(tmp_path) == 10

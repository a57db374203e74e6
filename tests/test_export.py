"""`python -m train export`: what a run has trained so far, without touching the run."""

import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ROW, VOCAB, signal_at, train_here, write_counting_data

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.transformer import Transformer
from train.run_lock import locked_folder

LM = ("lm", "--preset", "smoke", "--batch-size", "4", "--save-every", "2", "--steps", "6")
DICTIONARIES = ("dictionaries", "--sites", "M0", "--architecture", "batch_topk", "--k", "3,4", "--n-features", "24")
NUMBERS = ("--steps", "8", "--batch-size", "64", "--save-every", "2", "--learning-rate", "1e-3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_counting_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model's folder."""
    config = ModelConfig(n_layers=1, d_model=16, n_heads=2, d_mlp=32, n_ctx=ROW, d_vocab=VOCAB)
    params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    folder = tmp_path_factory.mktemp("model")
    TinyModel.from_params(config, params).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two dictionaries."""
    out = tmp_path_factory.mktemp("runs") / "dictionaries"
    assert train_here(*DICTIONARIES, *NUMBERS, "--model", model, "--data", data, "--out", out) == 0
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def results_of(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(out).items() if not name.endswith(".png")}


def test_the_last_checkpoint_gives_what_the_finished_run_wrote_and_leaves_the_run_alone(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(finished)
    with locked_folder(finished):  # as if it was still going on
        held = files_of(finished)
        assert train_here("export", finished, "-o", tmp_path / "out") == 0
        assert files_of(finished) == held
    assert files_of(finished) == before
    shown = capsys.readouterr()
    assert "step 8 of 8; writing to" in shown.out
    assert shown.err == ""
    written = results_of(tmp_path / "out")
    assert written == {name: before[name] for name in written}
    files = {f"M0_k={k}/{name}" for k in (3, 4) for name in ("config.json", "training.json", "dictionary.safetensors")}
    assert {"sweep.json", *(f"dictionaries/{name}" for name in files)} == {*written}


def test_a_checkpoint_before_the_end_gives_the_dictionaries_of_its_step(finished: Path) -> None:
    assert train_here("export", finished, "--step", "6") == 0
    out = finished / "export" / "6"
    content = json.loads((out / "sweep.json").read_text())
    assert content["steps"] == 6
    for record in content["dictionaries"]:
        dictionary = Dictionary.from_pretrained(out / record["folder"])
        last = Dictionary.from_pretrained(finished / record["folder"])
        assert dictionary.config == last.config
        assert not np.array_equal(dictionary.params["W_enc"], last.params["W_enc"])
        assert record["results"]["l0"] == pytest.approx(record["settings"]["k"], rel=0.1)


@pytest.mark.slow
def test_a_run_that_was_stopped_gives_its_model_and_resumes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with signal_at(3, signal.SIGTERM):
        assert train_here(*LM, "--data", data, "--out", tmp_path / "run") == 0
    assert train_here("export", tmp_path / "run", "-o", tmp_path / "so far") == 0
    stopped = TinyModel(tmp_path / "so far")
    assert train_here(*LM, "--data", data, "--out", tmp_path / "run") == 0
    assert train_here("export", tmp_path / "run") == 0
    end, last = (TinyModel(tmp_path / "run" / folder).params["W_E"] for folder in ("model", "export/6"))
    np.testing.assert_array_equal(last, end)
    assert not np.array_equal(stopped.params["W_E"], end)
    capsys.readouterr()


def test_another_run_is_never_written_to(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished, tmp_path / "other")
    before = files_of(tmp_path / "other")
    for other in (tmp_path / "other", tmp_path / "other" / "dictionaries" / "M0_k=3"):
        assert train_here("export", finished, "-o", other) == 1
        error = capsys.readouterr().err
        assert f"--out {other} holds a run, a model or a dictionary" in error
        assert error.count("\n") == 1
    assert files_of(tmp_path / "other") == before


def test_a_run_of_an_earlier_version_resumes_with_other_evaluations_and_moved_data(
    finished: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(finished, run)
    shutil.copytree(data, moved)
    settings = json.loads((run / "config.json").read_text())
    del settings["eval_every"], settings["places"]["M0"]["exclude"]
    settings["source"]["data"] = "/gone"
    (run / "config.json").write_text(json.dumps(settings))
    again = (*DICTIONARIES, *NUMBERS, "--model", model, "--data", moved, "--eval-every", "3", "--out", run)
    assert train_here(*again) == 0
    settings = json.loads((run / "config.json").read_text())
    assert (settings["eval_every"], settings["source"]["data"]) == (3, str(moved))
    assert train_here("export", run) == 0
    before, now = (files_of(folder) for folder in (finished, run / "export" / "8"))
    assert now["sweep.json"] == before["sweep.json"]


def test_what_cannot_be_exported_is_one_line(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, says in (
        ((tmp_path / "empty",), "is not the folder of a training run"),
        ((finished, "--step", "1"), "has no checkpoint of step 1; it has 4, 6, 8"),
        ((finished, "-o", finished), "holds a run"),
    ):
        assert train_here("export", *arguments) == 1
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1

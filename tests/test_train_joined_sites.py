"""`python -m train dictionaries` on joined sites: a crosscoder and a cross-layer transcoder in one run."""

import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import finish, metrics_of, signal_at, start, train_here
from test_train_dictionaries import FEATURES, WIDTH, arguments, assert_same_bits, data, model

from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.layers import is_written
from tinymodel_jax.lm import TinyModel

__all__ = ["data", "model"]  # fixtures
TAGS = ("Ra0+Ra1+blocks.1.hook_resid_post", "M0+M1")
RUN = ("--sites", ",".join(TAGS), "--architecture", "batch_topk", "--k", "4", "--learning-rate", "1e-3")


@pytest.fixture(scope="module")
def run(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "joined"
    assert train_here(*arguments(model, data, out, *RUN)) == 0
    return out


def test_joined_sites_are_trained_and_measured(run: Path, model: Path) -> None:
    lm, lines = TinyModel(model), metrics_of(run)
    records = {record["site"]: record for record in json.loads((run / "sweep.json").read_text())["dictionaries"]}
    for tag in TAGS:
        assert list(records[tag]["sites"]) == tag.split("+")
        assert lines[-1][tag]["explained_variance"][0] > lines[0][tag]["explained_variance"][0] + 0.1
        assert lines[-1][tag]["held_out_explained_variance"] == pytest.approx(
            [records[tag]["results"]["explained_variance"]], abs=0.1
        )  # during the training, batch_topk has a running threshold
        lm.attach(tag, run / records[tag]["folder"])
        assert lm[tag](np.zeros((1, 3), np.int32)).shape == (1, 3, FEATURES)
    W_dec = np.asarray(lm["M0+M1"].dictionary.params["W_dec"])
    np.testing.assert_array_equal(W_dec != 0, is_written(FEATURES, 2 * WIDTH, 2))


def test_a_stopped_run_goes_on_to_the_same_bits(run: Path, model: Path, data: Path, tmp_path: Path) -> None:
    with signal_at(11, signal.SIGINT):
        assert train_here(*arguments(model, data, tmp_path, *RUN)) == 0
    assert train_here(*arguments(model, data, tmp_path, *RUN)) == 0
    assert_same_bits(tmp_path, run)
    assert train_here("export", tmp_path, "--step", "15", "-o", tmp_path / "out") == 0
    assert (tmp_path / "out" / "dictionaries" / "M0+M1" / "dictionary.safetensors").exists()


@pytest.mark.slow
def test_eight_devices_go_on_with_the_curves_of_one(run: Path, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "moved"
    shutil.copytree(run, out)
    for step in (15, 20):
        shutil.rmtree(out / "checkpoints" / str(step))
    finish(start(*arguments(model, data, out, *RUN), "--mesh", "data=4,model=2", devices=8))
    for tag in TAGS:
        moved, alone = ([line[tag]["loss"] for line in metrics_of(folder)] for folder in (out, run))
        np.testing.assert_allclose(moved, alone, rtol=1e-5)


def test_a_run_starts_from_a_finished_cross_layer_transcoder(
    run: Path, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = str(run / "dictionaries" / "M0+M1")
    options = [*RUN, "--steps", "1", "--learning-rate", "1e-20", "--init-from", finished]
    assert train_here(*arguments(model, data, tmp_path / "a", *options, "--sites", "M0+M1")) == 0
    wanted, found = (Dictionary.from_pretrained(f) for f in (finished, tmp_path / "a" / "dictionaries" / "M0+M1"))
    x = jax.random.normal(jax.random.key(0), (50, 2 * WIDTH))
    acts = wanted.decode(wanted.encode(x)) - found.decode(wanted.encode(x))
    assert np.abs(np.asarray(found.params["W_enc"]) - wanted.params["W_enc"]).max() < 1e-4
    assert np.abs(np.asarray(acts)).max() < 1e-3
    assert train_here(*arguments(model, data, tmp_path / "b", *options, "--sites", "Ra0+Ra1")) == 1
    assert "the number of layers is 2 there and 1 here" in capsys.readouterr().err
    mixed = ["--sites", "Ra0+blocks.0.mlp.hook_post"]
    assert train_here(*arguments(model, data, tmp_path / "c", *RUN, *mixed)) == 1
    assert "joined hook points must have the same width" in capsys.readouterr().err

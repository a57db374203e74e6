"""`python -m train dictionaries`, run as a user runs it: its files, sweeps, resuming bit-exactly, errors."""

import dataclasses
import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_server import TOKEN, HubServer
from runs import (
    ROW,
    VOCAB,
    checkpoint_arrays,
    finish,
    metrics_of,
    signal_at,
    start,
    train_here,
    write_counting_data,
)
from safetensors.numpy import load_file

from tinymodel_jax.config import TRAINED_ARCHITECTURES, ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.transformer import Transformer
from train.activations import Place
from train.dictionaries import Description
from train.progress import TrainingProgress
from train.sweep import SweepOptions, make_sweep

FEATURES, STEPS, WIDTH = 48, 20, 16
OPTIONS = ["--n-features", str(FEATURES), "--steps", str(STEPS), "--batch-size", "256", "--save-every", "5"]
OPTIONS += ["--eval-every", "10", "--dead-after", "512"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_counting_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model's folder."""
    config = ModelConfig(n_layers=2, d_model=WIDTH, n_heads=2, d_mlp=32, n_ctx=ROW, d_vocab=VOCAB)
    params: Any = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = {**params, "W_E": 50 * params["W_E"]}  # so that activations depend on the tokens, as a trained model's do
    folder = tmp_path_factory.mktemp("model")
    TinyModel.from_params(config, params).save_pretrained(folder)
    return folder


def arguments(model: Path, data: Path, out: Path, *options: str) -> list[str]:
    return ["dictionaries", "--model", str(model), "--data", str(data), "--out", str(out), *OPTIONS, *options]


# The recipe's learning rate is for thousands of features, not for 48.
SWEEP = (
    "--sites",
    "M0,blocks.1.attn.hook_z",
    "--architecture",
    "topk",
    "--k",
    "4",
    "--seed",
    "0,1",
    "--learning-rate",
    "1e-3",
)


@pytest.fixture(scope="module")
def sweep(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "sweep"
    assert train_here(*arguments(model, data, out, *SWEEP)) == 0
    return out


def final_bytes(out: Path) -> dict[str, bytes]:
    """Return the bytes that must not depend on interruptions."""
    names = ["metrics.jsonl", "sweep.json", *(f"dictionaries/{p.name}/dictionary.safetensors" for p in folders(out))]
    return {name: (out / name).read_bytes() for name in names}


def assert_same_bits(out: Path, expected: Path) -> None:
    assert final_bytes(out) == final_bytes(expected)
    got, wanted = (checkpoint_arrays(run / f"checkpoints/{STEPS}") for run in (out, expected))
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def folders(out: Path) -> list[Path]:
    return sorted((out / "dictionaries").iterdir())


def test_a_run_learns_and_logs_every_step_of_every_member_once(sweep: Path) -> None:
    lines = metrics_of(sweep)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for site in ("M0", "blocks.1.attn.hook_z"):
        assert lines[-1][site]["l0"] == pytest.approx([4, 4], abs=0.1)
        for member in range(2):
            explained = [line[site]["explained_variance"][member] for line in lines]
            assert explained[-1] > explained[0] + 0.1
    sites = ("M0", "blocks.1.attn.hook_z")
    assert [p.name for p in folders(sweep)] == [f"{site}_seed={seed}" for site in sites for seed in (0, 1)]


def test_the_held_out_numbers_of_a_step_are_those_that_a_dictionary_finished_then_would_have(sweep: Path) -> None:
    names = ("l0", "explained_variance", "ce_recovered")
    lines = metrics_of(sweep)
    evaluated = [line["step"] for line in lines if "held_out_l0" in line["M0"]]
    assert evaluated == [10, 20]
    records = json.loads((sweep / "sweep.json").read_text())["dictionaries"]
    for site in ("M0", "blocks.1.attn.hook_z"):
        of_site = [record["results"] for record in records if record["site"] == site]
        for name in names:
            assert lines[19][site][f"held_out_{name}"] == pytest.approx([one[name] for one in of_site], rel=1e-5)
    assert lines[9]["M0"]["held_out_explained_variance"] < lines[19]["M0"]["held_out_explained_variance"]


def test_the_progress_shows_the_last_held_out_numbers() -> None:
    describe, of_step = Description(), {"l0": [4.0, 5.0], "explained_variance": [0.5, 0.6]}
    held_out = {"held_out_l0": [3.96, 0], "held_out_explained_variance": [0.4, 0], "held_out_ce_recovered": [0.9, 0]}
    assert describe({"step": 1, "M0": of_step}) == "M0 L0 4.0 EV 0.500  (+1)"
    evaluated = "M0 L0 4.0 EV 0.500 (held out: L0 4.0 EV 0.400 CE recovered 0.900)  (+1)"
    assert describe({"step": 2, "M0": {**of_step, **held_out}}) == evaluated
    assert describe({"step": 3, "M0": of_step}) == evaluated


def test_held_out_numbers_are_shown_also_by_the_lines_of_later_steps(capsys: pytest.CaptureFixture[str]) -> None:
    progress, of_step = TrainingProgress(0, 3, 1.0, Description()), {"l0": [4.0], "explained_variance": [0.5]}
    for step in (1, 2, 3):  # only the last step has a line
        held_out = {"held_out_l0": [3.0], "held_out_explained_variance": [0.25]} if step == 2 else {}
        progress.update(step, {"tokens": 1, "M0": {**of_step, **held_out}})
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[:2] for line in lines[1:]] == [
        ["step 3/3", "M0 L0 4.0 EV 0.500 (held out: L0 3.0 EV 0.250)"]
    ]


@pytest.mark.slow
def test_the_numbers_of_a_dictionary_are_those_of_the_spliced_model(sweep: Path, model: Path, data: Path) -> None:
    rows = np.fromfile(data / "valid.bin", "<u2").reshape(-1, ROW).astype(np.int32)
    mask = (rows != VOCAB - 2).astype(np.float32)
    counted = (mask > 0) & (rows != VOCAB - 4)  # [BEGIN], the same vector in every story
    lm = TinyModel(model)
    records = json.loads((sweep / "sweep.json").read_text())["dictionaries"]
    assert len(records) == 4
    for record in records:
        dictionary = Dictionary.from_pretrained(sweep / record["folder"])
        assert record["settings"]["k"] == dictionary.config.k
        found, training = record["results"], json.loads((sweep / record["folder"] / "training.json").read_text())
        assert training["results"] == found
        assert training["recipe"]["k"] == dictionary.config.k
        lm.attach(record["site"], dictionary)
        assert found["ce_clean"] == pytest.approx(float(lm.loss(rows, mask)), rel=1e-5)
        assert found["ce_spliced"] == pytest.approx(float(lm.splice(record["site"]).loss(rows, mask)), rel=1e-5)
        lost, kept = found["ce_zero_ablated"] - found["ce_clean"], found["ce_zero_ablated"] - found["ce_spliced"]
        assert found["ce_recovered"] == pytest.approx(kept / lost)
        acts = np.asarray(lm[record["site"]](rows))[counted]
        assert found["l0"] == pytest.approx((acts > 0).sum(axis=1).mean(), rel=1e-4)
        assert found["dead_fraction"] == pytest.approx((acts == 0).all(axis=0).mean())
        assert found["tokens"] == counted.sum()


def test_the_plot_is_a_picture_with_something_drawn_on_it(sweep: Path) -> None:
    from matplotlib.image import imread

    pixels = np.asarray(imread(sweep / "pareto.png"))
    assert pixels.shape[0] > 300
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20


@pytest.mark.slow
def test_a_member_of_a_sweep_equals_its_solo_run(model: Path, data: Path, tmp_path: Path) -> None:
    options = ["--sites", "M0", "--steps", "100", "--architecture", "topk"]
    assert train_here(*arguments(model, data, tmp_path / "both", *options, "--k", "2,4", "--seed", "0,1")) == 0
    assert train_here(*arguments(model, data, tmp_path / "one", *options, "--k", "2", "--seed", "1")) == 0
    member = load_file(tmp_path / "both" / "dictionaries" / "M0_k=2_seed=1" / "dictionary.safetensors")
    solo = load_file(tmp_path / "one" / "dictionaries" / "M0" / "dictionary.safetensors")
    for name, array in solo.items():
        np.testing.assert_allclose(member[name], array, atol=1e-4, rtol=1e-4, err_msg=name)


def test_a_stopped_run_saves_and_goes_on_to_the_same_bits(
    sweep: Path, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with signal_at(11, signal.SIGINT):
        assert train_here(*arguments(model, data, tmp_path, *SWEEP)) == 0
    stopped = len(metrics_of(tmp_path))
    assert 11 < stopped < 15, "between two checkpoints, so that the stop has to save one"
    said = capsys.readouterr().out
    assert said.startswith("M0, blocks.1.attn.hook_z: topk, 48 features, k 4, learning rate 0.001, 20 steps of 256 v")
    assert f"stopped at step {stopped} of {STEPS}; the same command resumes" in said
    assert said.count("the prepared rows repeat: epoch 2 begins at step 10, ") == 1, "16 of 150 stories per step"
    assert not (tmp_path / "sweep.json").exists()
    assert train_here(*arguments(model, data, tmp_path, *SWEEP)) == 0
    assert f"the prepared rows repeat: step {stopped + 1} is in epoch 2, " in capsys.readouterr().out
    assert_same_bits(tmp_path, sweep)


@pytest.mark.slow
def test_a_run_lengthened_before_its_decay_ends_with_the_bits_of_a_long_one(
    sweep: Path, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with signal_at(5, signal.SIGINT):
        assert train_here(*arguments(model, data, tmp_path, *SWEEP), "--steps", "12") == 0
    assert len(metrics_of(tmp_path)) < 9, "the last fifth of 12 steps decays"
    capsys.readouterr()
    assert train_here(*arguments(model, data, tmp_path, *SWEEP)) == 0
    assert f"lengthened from 12 to {STEPS} steps; the learning rate's schedule now ends" in capsys.readouterr().out
    assert_same_bits(tmp_path, sweep)
    assert train_here(*arguments(model, data, tmp_path, *SWEEP), "--steps", "12") == 1
    assert f"another configuration: steps: {STEPS} -> 12. " in capsys.readouterr().err


def test_a_run_starts_from_a_finished_dictionary_of_another_site(
    sweep: Path, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = sweep / "dictionaries" / "M0_seed=1"
    options = ["--sites", "Rm1", "--architecture", "topk", "--k", "4,5", "--learning-rate", "1e-20", "--steps", "1"]
    assert train_here(*arguments(model, data, tmp_path / "a", *options), "--init-from", str(finished)) == 0
    wanted, x = Dictionary.from_pretrained(finished), jax.random.normal(jax.random.key(0), (50, WIDTH))
    for k in (4, 5):
        found = Dictionary.from_pretrained(tmp_path / "a" / "dictionaries" / f"Rm1_k={k}")
        assert found.config.hook_in != wanted.config.hook_in
        expected = Dictionary.from_params(dataclasses.replace(wanted.config, k=k), wanted.params)
        np.testing.assert_allclose(found(x), expected(x), rtol=1e-4, atol=1e-5)
    assert train_here(*arguments(model, data, tmp_path / "a", *options)) == 1
    assert "init_from: " in capsys.readouterr().err
    options[-1:] = ["1", "--n-features", "47"]
    assert train_here(*arguments(model, data, tmp_path / "b", *options), "--init-from", str(finished)) == 1
    error = capsys.readouterr().err
    assert f"--init-from {finished}, Rm1: the dictionary to start from does not fit: n_features is 48 there" in error
    assert error.count("\n") == 1
    assert train_here(*arguments(model, data, tmp_path / "b", *options), "--init-from", str(sweep)) == 1
    error = capsys.readouterr().err
    assert f"--init-from {sweep} is a folder of a run; name one of its dictionaries, such as {sweep}/dict" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_eight_devices_go_on_with_the_curves_of_one(sweep: Path, model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "moved"
    shutil.copytree(sweep, out)
    for step in (15, 20):
        shutil.rmtree(out / "checkpoints" / str(step))
    finish(start(*arguments(model, data, out, *SWEEP), "--mesh", "data=2,model=2,sweep=2", devices=8))
    for site in ("M0", "blocks.1.attn.hook_z"):
        moved, alone = ([line[site]["loss"] for line in metrics_of(run)] for run in (out, sweep))
        # float32 sums in another order, as in tests/test_dictionary_sharding.py
        np.testing.assert_allclose(moved, alone, rtol=1e-5)


@pytest.mark.slow
def test_killed_and_restarted_a_run_ends_with_the_same_bits(model: Path, data: Path, tmp_path: Path) -> None:
    out, moments, kills = tmp_path / "killed", random.Random(0), 0
    finish(start(*arguments(model, data, tmp_path / "whole", *SWEEP)))
    for _ in range(3):
        process = start(*arguments(model, data, out, *SWEEP))
        before = len(metrics_of(out)) if (out / "metrics.jsonl").exists() else 0
        wanted, begun = before + moments.randint(2, 6), time.monotonic()
        while process.poll() is None and time.monotonic() - begun < 200:
            lines = (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0
            if lines >= min(wanted, STEPS):
                break
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 2
    finish(start(*arguments(model, data, out, *SWEEP)))
    assert_same_bits(out, tmp_path / "whole")


def test_a_finished_run_measures_again_and_changes_nothing(
    sweep: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = final_bytes(sweep)
    assert train_here(*arguments(model, data, sweep, *SWEEP)) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert final_bytes(sweep) == before


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TRAINED_ARCHITECTURES)
def test_every_architecture_trains_as_transcoder_with_skip_and_loads(
    model: Path, data: Path, tmp_path: Path, architecture: str
) -> None:
    matryoshka = [] if architecture == "gated" else ["--matryoshka", f"12,{FEATURES}"]
    recipe = ["--recipe", "reference" if architecture == "relu" else "house"]
    options = ["--sites", "M1", "--architecture", architecture, "--skip", *matryoshka, *recipe, "--steps", "6"]
    assert train_here(*arguments(model, data, tmp_path / "out", *options)) == 0
    dictionary = Dictionary.from_pretrained(tmp_path / "out" / "dictionaries" / "M1")
    assert dictionary.config.architecture == architecture
    assert dictionary.config.skip
    lm = TinyModel(model)
    lm.attach("M1", dictionary)
    assert lm["M1"](np.zeros((1, 3), np.int32)).shape == (1, 3, FEATURES)


def test_arrays_are_evaluated_during_the_training_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((400, WIDTH)).astype(np.float32))
    options = [*OPTIONS, "--architecture", "topk", "--k", "4", "--steps", "2", "--eval-every", "1"]
    assert train_here("dictionaries", "--activations", tmp_path / "x.npy", "--out", tmp_path / "out", *options) == 0
    (record,) = json.loads((tmp_path / "out" / "sweep.json").read_text())["dictionaries"]
    lines = metrics_of(tmp_path / "out")
    for name in ("l0", "explained_variance"):
        assert lines[1]["activations"][f"held_out_{name}"] == pytest.approx([record["results"][name]], rel=1e-5)
    assert "held_out_ce_recovered" not in lines[1]["activations"], "that needs a language model"
    shown = capsys.readouterr().out
    assert "explained variance" in shown
    assert "CE" not in shown


def test_excluded_tokens_are_recorded_with_the_dictionary(model: Path, data: Path, tmp_path: Path) -> None:
    options = ["--sites", "M0", "--steps", "2", "--architecture", "topk", "--k", "4", "--exclude", "begin,7"]
    assert train_here(*arguments(model, data, tmp_path / "out", *options)) == 0
    (folder,) = folders(tmp_path / "out")
    dictionary = Dictionary.from_pretrained(folder)
    assert dictionary.config.exclude == (7, VOCAB - 4)
    rows = np.fromfile(data / "valid.bin", "<u2").reshape(-1, ROW).astype(np.int32)
    results = json.loads((folder / "training.json").read_text())["results"]
    assert results["tokens"] == np.isin(rows, (7, VOCAB - 4, VOCAB - 2), invert=True).sum()


@pytest.mark.slow
def test_activations_of_ones_own_train_sparse_codes_of_planted_features(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((20, WIDTH)) / WIDTH**0.5
    codes = rng.random((20_000, 20)) * (rng.random((20_000, 20)) < 0.1)
    np.save(tmp_path / "x.npy", (codes @ directions).astype(np.float16))
    np.save(tmp_path / "y.npy", (codes @ directions[:, ::-1]).astype(np.float32))
    files = ["--activations", str(tmp_path / "x.npy"), "--targets", str(tmp_path / "y.npy")]
    options = [*OPTIONS, "--architecture", "batch_topk", "--k", "4", "--steps", "300", "--learning-rate", "3e-3"]
    assert train_here("dictionaries", *files, "--out", tmp_path / "out", *options) == 0
    (record,) = json.loads((tmp_path / "out" / "sweep.json").read_text())["dictionaries"]
    assert record["results"]["explained_variance"] > 0.9
    assert record["results"]["l0"] == pytest.approx(4, rel=0.1)
    assert record["results"]["tokens"] == 1000, "the last twentieth is held out"
    config = Dictionary.from_pretrained(tmp_path / "out" / record["folder"]).config
    assert (config.hook_in, config.hook_out) == ("x", "y")


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["20", "80"])
def test_short_batch_topk_runs_have_their_l0_also_when_one_was_stopped(
    model: Path, data: Path, tmp_path: Path, steps: str
) -> None:
    options = ["--sites", "M0,Ra1", "--architecture", "batch_topk", "--k", "4,8", "--steps", steps]
    assert train_here(*arguments(model, data, tmp_path / "out", *options)) == 0
    records = json.loads((tmp_path / "out" / "sweep.json").read_text())["dictionaries"]
    l0 = [record["results"]["l0"] for record in records]
    assert l0 == pytest.approx([record["settings"]["k"] for record in records], rel=0.1)
    before = final_bytes(tmp_path / "out")
    for later in ("15", "20", steps):  # as if it had been stopped at step 10
        shutil.rmtree(tmp_path / "out" / "checkpoints" / later, ignore_errors=True)
    (tmp_path / "out" / "sweep.json").unlink()
    assert train_here(*arguments(model, data, tmp_path / "out", *options)) == 0
    assert final_bytes(tmp_path / "out") == before


@pytest.mark.parametrize("spoilt", ["x", "y"])
@pytest.mark.parametrize("row", [11, 39], ids=["trained on", "held out"])
def test_a_row_of_a_file_that_is_not_finite_is_named_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoilt: str, row: int
) -> None:
    for name in ("x", "y"):
        array = np.ones((40, 3), np.float32)
        array[row, 1] = np.nan if name == spoilt else 1
        np.save(tmp_path / f"{name}.npy", array)
    files = ["--activations", str(tmp_path / "x.npy"), "--targets", str(tmp_path / "y.npy")]
    assert train_here("dictionaries", *files, "--out", tmp_path / "out", *OPTIONS, "--k", "4") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"train: {tmp_path}/{spoilt}.npy: row {row} (the first is 0) contains nan; ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_whose_activations_are_not_finite_is_one_line(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = TinyModel(model)
    params = {**lm.params, "W_E": lm.params["W_E"] * 1e30}
    TinyModel.from_params(lm.config, params).save_pretrained(tmp_path / "loud")
    options = ["--sites", "M1", "--k", "4"]
    assert train_here(*arguments(tmp_path / "loud", data, tmp_path / "out", *options)) == 1
    assert "the activations at M1 are NaN or infinite" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sites", "M0"], "--data"),
        (["--sites", "Q0", "--data", "{data}"], "Q0"),
        (["--sites", "M0,M0", "--data", "{data}"], "twice"),
        (["--sites", "M7", "--data", "{data}"], "layers are 0..1"),
        (["--sites", "M0N3", "--data", "{data}"], "names a feature"),
        (["--sites", "M0", "--data", "{data}", "--k", "4,x"], "whole numbers"),
        (["--sites", "M0", "--data", "{data}", "--k", "4,4"], "twice"),
        (["--sites", "M0", "--data", "{data}", "--k", "400"], "k=400"),
        (["--sites", "M0", "--data", "{data}", "--l1", "1,2"], "takes no sparsity"),
        (["--sites", "Ra0", "--data", "{data}", "--skip"], "needs a transcoder"),
        (["--sites", "M0", "--data", "{data}", "--matryoshka", "9,10"], "n_features=48"),
        (["--sites", "M0", "--data", "{data}", "--recipe", "best"], "house or reference"),
        (["--sites", "M0", "--data", "{data}", "--recipe", "{tmp}/none.json"], "none.json"),
        (["--sites", "M0", "--data", "{data}", "--mesh", "model=3"], "model=3"),
        (["--sites", "M0", "--data", "{tmp}/none"], "none"),
        (["--sites", "M0", "--data", "{data}", "--stories", "0"], "--stories 0"),
        (["--sites", "M0", "--data", "{data}", "--data-seed", "-1"], "--data-seed -1"),
        (["--sites", "M0", "--data", "{data}", "--exclude", "start"], "'start'; give ids, 0..63, or 'begin'"),
        (["--activations", "{tmp}/x.npy", "--exclude", "begin"], "--exclude needs --sites"),
        (["--activations", "{tmp}/x.npy", "--stories", "8"], "--stories needs --sites"),
        (["--activations", "{tmp}/x.npy", "--sites", "M0"], "replaces --sites"),
        (["--activations", "{tmp}/none.npy"], "none.npy"),
        (["--activations", "{tmp}/ints.npy"], "int64"),
        (["--targets", "{tmp}/x.npy"], "needs --activations"),
        (["--activations", "{tmp}/x.npy", "--targets", "{tmp}/short.npy"], "needs its target"),
    ],
)
def test_bad_input_is_one_line(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((40, 3), np.float32))
    np.save(tmp_path / "short.npy", np.zeros((30, 3), np.float32))
    np.save(tmp_path / "ints.npy", np.zeros((40, 3), np.int64))
    given = [option.format(data=data, tmp=tmp_path) for option in options]
    assert train_here("dictionaries", "--model", model, "--out", tmp_path / "out", *OPTIONS, *given) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_the_recipe_sets_is_named_before_the_first_step() -> None:
    place = Place("x", "x", 768, 768)
    plain = make_sweep(SweepOptions(64), {"M0": place}, 100, 32)
    assert plain.describe().startswith("M0: batch_topk, 64 features, k 32, learning rate ")
    options = SweepOptions(64, "relu", l1="2,3", target_l0="5", learning_rate="1e-3")
    assert make_sweep(options, {"M0": place, "A0": place}, 100, 32).describe() == (
        "M0, A0: relu, 64 features, sparsity 2 | 3, target L0 5, learning rate 0.001, 100 steps of 32 vectors"
    )


def test_help_names_the_values_that_a_recipe_sets(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here("dictionaries", "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "active features per vector (topk and batch_topk) (default: 32)" in shown
    assert "largest learning rate (default: the recipe's; the run prints it)" in shown


def test_a_changed_option_is_an_error_that_prints_the_difference(
    sweep: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = final_bytes(sweep)
    assert train_here(*arguments(model, data, sweep, *SWEEP), "--data-seed", "5") == 1
    assert "data_seed: 0 -> 5" in capsys.readouterr().err
    assert final_bytes(sweep) == before


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's, of its httpx
def test_the_dictionaries_of_a_finished_run_are_uploaded_each_with_its_card(
    sweep: Path, model: Path, data: Path, hub_server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert train_here(*arguments(model, data, sweep, *SWEEP, "--push-to", "user/sweep@next")) == 0
    files = hub_server.branches["user/sweep", "next"]
    assert (len(hub_server.messages), hub_server.tree("user/sweep", "main")) == (1, {})
    assert {"README.md", "sweep.json", "pareto.png"} < files.keys()
    for folder in folders(sweep):
        uploaded = Dictionary.from_pretrained(f"hub:user/sweep/dictionaries/{folder.name}@next")
        np.testing.assert_array_equal(uploaded.params["W_dec"], Dictionary.from_pretrained(folder).params["W_dec"])
        numbers = json.loads((folder / "training.json").read_text())["results"]
        card = files[f"dictionaries/{folder.name}/README.md"].decode()
        assert f"| CE recovered | {numbers['ce_recovered']:.3f} |" in card
        assert "architecture topk" in card
        line = f"| [`dictionaries/{folder.name}`](dictionaries/{folder.name}/README.md) | {numbers['l0']:.1f} |"
        assert line in files["README.md"].decode()

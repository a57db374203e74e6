"""`python -m train lm`, run as a user runs it: resumed bit-exactly, on other meshes, killed; and its errors."""

import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import error_line
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

from tinymodel_jax.lm import TinyModel
from tinymodel_jax.training.lm_step import LMOptimizer, learning_rate_schedule

STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_counting_data(tmp_path_factory.mktemp("data"))


def arguments(data: Path, out: Path, steps: int = STEPS) -> list[str | Path]:
    numbers = ("--steps", str(steps), "--save-every", "4", "--eval-every", "6", "--batch-size", "8")
    return ["lm", "--preset", "smoke", "--data", data, "--out", out, *numbers]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruptions."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train_here(*arguments(data, out)) == 0
    return out


def assert_same_bits(out: Path, expected: Path, steps: int = STEPS) -> None:
    """Compare everything that a run leaves: metrics, published model, and the arrays of the last checkpoint."""
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    got, wanted = (checkpoint_arrays(run / "checkpoints" / str(steps)) for run in (out, expected))
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_a_run_learns_logs_every_step_once_and_its_folder_loads_as_a_model(whole: Path, data: Path) -> None:
    lines = metrics_of(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [6, 12]
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert held_out[1] < held_out[0]
    assert [line["step"] for line in lines if line.get("sample")] == [6, 12]
    rows = np.fromfile(data / "valid.bin", "<u2").reshape(-1, ROW).astype(np.int32)
    loss = TinyModel(whole).loss(rows, (rows != VOCAB - 2).astype(np.float32))
    assert float(loss) == pytest.approx(held_out[1], rel=1e-5)


def test_a_stopped_run_saves_and_goes_on_to_the_same_bits(
    whole: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with signal_at(5, signal.SIGTERM):
        assert train_here(*arguments(data, tmp_path)) == 0
    stopped = len(metrics_of(tmp_path))
    assert 5 < stopped < 8, "between two checkpoints, so that the stop has to save one"
    assert f"stopped at step {stopped} of {STEPS}; the same command resumes" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", str(stopped)}
    assert train_here(*arguments(data, tmp_path)) == 0
    assert_same_bits(tmp_path, whole)


@pytest.mark.slow
def test_a_run_lengthened_before_its_decay_ends_with_the_bits_of_a_long_one(
    whole: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with signal_at(4, signal.SIGTERM):
        assert train_here(*arguments(data, tmp_path, steps=11)) == 0
    assert len(metrics_of(tmp_path)) < 9, "the last fifth of 11 steps decays"
    capsys.readouterr()
    assert train_here(*arguments(data, tmp_path)) == 0
    assert f"lengthened from 11 to {STEPS} steps; the learning rate's schedule now ends at step {STEPS}: " in (
        capsys.readouterr().out
    )
    assert_same_bits(tmp_path, whole)
    assert train_here(*arguments(data, tmp_path, steps=11)) == 1
    assert f"steps: {STEPS} -> 11" in capsys.readouterr().err


def test_a_finished_run_is_lengthened_and_learns_on_at_the_rate_of_the_longer_schedule(
    whole: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "longer"
    shutil.copytree(whole, out)
    before = (out / "metrics.jsonl").read_bytes()
    longer = arguments(data, out, steps=20)
    assert train_here(*longer, "--batch-size", "16") == 1
    assert "another configuration: batch_size: 8 -> 16" in capsys.readouterr().err
    assert train_here(*longer) == 0
    assert (out / "metrics.jsonl").read_bytes().startswith(before)
    lines = metrics_of(out)
    assert [line["step"] for line in lines] == list(range(1, 21))
    rate = learning_rate_schedule(LMOptimizer(learning_rate=3e-3, warmup_steps=10), 20)
    np.testing.assert_allclose([line["learning_rate"] for line in lines[STEPS:]], [rate(n) for n in range(STEPS, 20)])
    assert lines[-1]["held_out_loss"] < lines[STEPS - 1]["held_out_loss"]
    assert "0.00" in capsys.readouterr().out
    assert train_here(*longer) == 0
    said = capsys.readouterr().out
    assert "nothing left to do" in said
    assert "lengthened" not in said


@pytest.mark.parametrize("option", ["--fsdp", pytest.param("--shard-optimizer", marks=pytest.mark.slow)])
def test_eight_devices_go_on_with_the_curve_of_one(option: str, whole: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "moved"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    for step in (8, 12):
        shutil.rmtree(out / "checkpoints" / str(step))
    finish(start(*arguments(data, out), "--mesh", "data=4,model=2", option, devices=8))
    moved, alone = metrics_of(out), metrics_of(whole)
    assert [line["step"] for line in moved] == list(range(1, STEPS + 1))
    # float32 sums in another order, as in tests/test_sharding.py
    np.testing.assert_allclose([m["loss"] for m in moved], [m["loss"] for m in alone], atol=1e-5, rtol=0)
    assert TinyModel(out).config.d_vocab == VOCAB


@pytest.mark.slow
def test_more_steps_than_the_data_has_rows_for_say_so_and_fewer_say_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*arguments(data, tmp_path / "a", steps=2), "--batch-size", "80") == 0
    assert "the prepared rows repeat: epoch 2 begins at step 2, and 2 steps read them 1.1 times" in (
        capsys.readouterr().out
    )
    assert train_here(*arguments(data, tmp_path / "b", steps=1), "--batch-size", "80") == 0
    assert "repeat" not in capsys.readouterr().out


def test_sizes_of_the_command_line_replace_those_of_the_preset(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"n_layers": 1, "d_model": 24, "n_heads": 2, "d_mlp": 40, "n_ctx": ROW}
    options = [word for name, size in sizes.items() for word in (f"--{name.replace('_', '-')}", str(size))]
    assert train_here(*arguments(data, tmp_path, steps=2), *options) == 0
    assert capsys.readouterr().out.startswith(f"1 layers, d_model 24, 2 heads, d_mlp 40, context {ROW}, {VOCAB} ids: ")
    found = TinyModel(tmp_path).config.to_dict()
    assert {name: found[name] for name in sizes} == sizes
    assert found["d_vocab"] == VOCAB


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    steps, out, moments, kills = 30, tmp_path / "killed", random.Random(0), 0
    finish(start(*arguments(data, tmp_path / "whole", steps)))
    for _ in range(6):
        process = start(*arguments(data, out, steps))
        begun = time.monotonic()
        # Kill after some checkpoints of this start, or shortly after a line of metrics appears.
        lines_before = len(metrics_of(out)) if (out / "metrics.jsonl").exists() else 0
        wanted = lines_before % steps + moments.randint(1, 4)
        while process.poll() is None and time.monotonic() - begun < 120:
            done = (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0
            if done >= wanted:
                break
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 3
    finish(start(*arguments(data, out, steps)))
    assert_same_bits(out, tmp_path / "whole", steps)


def test_a_changed_option_is_an_error_that_prints_the_difference(
    whole: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    assert train_here(*arguments(data, whole)[:-1], "16") == 1
    assert "batch_size: 8 -> 16" in capsys.readouterr().err
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_says_so_and_changes_nothing(
    whole: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = (whole / "model" / "model.safetensors").read_bytes()
    assert train_here(*arguments(data, whole)) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert len(metrics_of(whole)) == STEPS
    assert (whole / "model" / "model.safetensors").read_bytes() == model


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(*arguments(data, tmp_path), "--learning-rate", "1e30", "--warmup-steps", "0") == 1
    assert "at step" in capsys.readouterr().err
    assert all(np.isfinite(line["loss"]) for line in metrics_of(tmp_path))
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(saved, default=0) <= len(metrics_of(tmp_path))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "{tmp}/none", "--out", "{tmp}/out"], "none"),
        (["--data", "{data}", "--out", "{tmp}/taken"], "not a training run"),
        (["--data", "{data}", "--out", "{tmp}/file"], "is a file"),
        (["--data", "{data}", "--out", "{tmp}/out", "--batch-size", "0"], "--batch-size 0"),
        (["--data", "{data}", "--out", "{tmp}/out", "--steps", "0"], "--steps 0"),
        (["--data", "{data}", "--out", "{tmp}/out", "--seed", "-1"], "--seed -1"),
        (["--data", "{data}", "--out", "{tmp}/out", "--mesh", "data=7"], "data=7"),
        (["--data", "{data}", "--out", "{tmp}/out", "--learning-rate", "-1"], "learning_rate"),
        (
            ["--data", "{tmp}/none", "--out", "{tmp}/out", "--d-model", "30"],
            "--d-model 30: ModelConfig: n_heads=4 does not",
        ),
        (
            ["--data", "{tmp}/none", "--out", "{tmp}/out", "--n-heads", "3", "--d-model", "32"],
            "--d-model 32 --n-heads 3: ",
        ),
        (["--data", "{tmp}/none", "--out", "{tmp}/out", "--n-layers", "0"], "n_layers"),
        (
            ["--data", "{data}", "--out", "{tmp}/out", "--n-ctx", "23"],
            "rows of 24 tokens, but the model a context of 23",
        ),
    ],
)
def test_bad_input_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("dear")
    (tmp_path / "file").write_text("dear")
    given = (option.format(data=data, tmp=tmp_path) for option in options)
    assert train_here("lm", "--preset", "smoke", *given) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_preset_with_a_fixed_vocabulary_refuses_other_data(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here("lm", "--preset", "tiny_model", "--data", data, "--out", tmp_path / "out") == 1
    assert "10000 ids, the data 64" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's, of its httpx
def test_a_finished_model_is_uploaded_with_what_is_known_about_it(
    whole: Path,
    data: Path,
    hub_server: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    push = (*arguments(data, whole), "--push-to", "user/counting", "--license", "mit")
    assert train_here(*push) == 1
    assert "Log in with `hf auth login`" in error_line(capsys)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub_server.statuses["commit"] = 500
    assert train_here(*push) == 1
    error = capsys.readouterr().err
    assert f"{whole} is finished, but the upload to hub:user/counting failed, and left the new repository" in error
    hub_server.statuses.clear()
    assert train_here(*push) == 0
    assert f"{whole}: uploaded to hub:user/counting@{hub_server.commit('user/counting')}" in capsys.readouterr().out
    uploaded, loss = TinyModel("hub:user/counting"), metrics_of(whole)[-1]["held_out_loss"]
    np.testing.assert_array_equal(uploaded.W_E, TinyModel(whole).W_E)
    card = hub_server.files["user/counting/README.md"].decode()
    assert "license: mit" in card
    assert f"| held-out loss | {loss:.4f} nats per token |" in card
    assert "| data | `counting`, 150 rows of 24 tokens and 50 held-out ones" in card
    assert "preset `smoke`: 12 steps of 8 rows" in card


def test_options_of_an_upload_need_an_address(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_here(*arguments(data, tmp_path / "a"), "--license", "mit") == 1
    assert "give --push-to OWNER/NAME" in error_line(capsys)
    assert train_here(*arguments(data, tmp_path / "a"), "--push-to", "counting") == 1
    assert "'counting' is not an address on the hub" in error_line(capsys)
    assert not (tmp_path / "a").exists()

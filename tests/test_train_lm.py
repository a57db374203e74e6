"""`python -m train lm`, run as a user runs it: going on to the bit, damage, signals, errors."""

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import ROW, VOCAB, checkpoint_arrays, finish, metrics_of, start, wait_for_lines, write_counting_data

from tinymodel_jax.lm import TinyModel
from train.__main__ import main

OPTIONS = ["--steps", "30", "--save-every", "4", "--eval-every", "10", "--batch-size", "4"]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_counting_data(tmp_path_factory.mktemp("data"))


def train(data: Path, out: Path, *options: str, devices: int = 1) -> subprocess.Popen[str]:
    return start("lm", "--preset", "smoke", "--data", data, "--out", out, *OPTIONS, *options, devices=devices)


def final_state(out: Path) -> dict[str, Any]:
    """Return everything that a run leaves: metrics, published model, and the last checkpoint's arrays and checksum."""
    return {
        "metrics": (out / "metrics.jsonl").read_bytes(),
        "model": (out / "model" / "model.safetensors").read_bytes(),
        "state": checkpoint_arrays(out / "checkpoints" / "30"),
    }


def assert_same_bits(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got["metrics"] == expected["metrics"]
    assert got["model"] == expected["model"]
    assert got["state"].keys() == expected["state"].keys()
    for name, array in expected["state"].items():
        np.testing.assert_array_equal(got["state"][name], array, err_msg=name)


@pytest.fixture(scope="session")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    finish(train(data, out))
    return out


def test_a_run_learns_logs_every_step_once_and_its_folder_loads_as_a_model(uninterrupted: Path) -> None:
    lines = metrics_of(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["loss"] < lines[0]["loss"]
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert held_out == sorted(held_out, reverse=True)
    assert held_out[-1] < np.log(VOCAB)
    assert [line["step"] for line in lines if "held_out_loss" in line] == [10, 20, 30]
    assert all(line["sample"] for line in lines if line["step"] % 10 == 0)
    lm = TinyModel(uninterrupted)
    assert lm.config.d_vocab == VOCAB


def test_the_published_model_has_the_held_out_loss_of_the_last_line(uninterrupted: Path, data: Path) -> None:
    rows = np.fromfile(data / "valid.bin", "<u2").reshape(-1, ROW).astype(np.int32)
    loss = TinyModel(uninterrupted).loss(rows, (rows != VOCAB - 2).astype(np.float32))
    assert float(loss) == pytest.approx(metrics_of(uninterrupted)[-1]["held_out_loss"], rel=1e-5)


@pytest.mark.slow
def test_killed_at_ten_moments_a_run_ends_with_the_same_bits(uninterrupted: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    moments = random.Random(0)
    kills = 0
    for _ in range(10):
        process = train(data, out)
        begun = time.monotonic()
        # Kill after some checkpoints of this start, or shortly after a line of metrics appears.
        lines_before = len(metrics_of(out)) if (out / "metrics.jsonl").exists() else 0
        wanted = lines_before % 30 + moments.randint(1, 4)
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
    assert kills >= 5
    finish(train(data, out))
    assert_same_bits(final_state(out), final_state(uninterrupted))


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_0_and_the_run_goes_on_to_the_same_bits(
    uninterrupted: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    process = train(data, out)
    wait_for_lines(out, process, 1)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert time.monotonic() - asked < 10
    assert "the same command goes on" in shown
    finish(train(data, out))
    assert_same_bits(final_state(out), final_state(uninterrupted))


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_with_the_same_losses_up_to_rounding(
    uninterrupted: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "moved"
    shutil.copytree(uninterrupted, out)
    for step in (28, 30):
        shutil.rmtree(out / "checkpoints" / str(step))
    shutil.rmtree(out / "model")
    finish(train(data, out, "--mesh", "data=4,model=2", "--fsdp", devices=8))
    moved, whole = metrics_of(out), metrics_of(uninterrupted)
    assert [line["step"] for line in moved] == list(range(1, 31))
    # float32 sums in another order, as in tests/test_sharding.py
    np.testing.assert_allclose([m["loss"] for m in moved], [m["loss"] for m in whole], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped byte", "cut short", "metadata gone"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning_for_the_one_before(
    uninterrupted: Path, data: Path, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    shutil.rmtree(out / "model")
    newest = out / "checkpoints" / "30" / "state"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    if damage == "flipped byte":
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif damage == "cut short":
        largest.write_bytes(content[: len(content) // 2])
    else:
        shutil.rmtree(newest)
    assert "checkpoint of step 30 is damaged" in finish(train(data, out))
    assert_same_bits(final_state(out), final_state(uninterrupted))


def test_a_changed_option_is_an_error_that_prints_the_difference(
    uninterrupted: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["lm", "--preset", "smoke", "--data", str(data), "--out", str(uninterrupted), *OPTIONS]
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert main([*options[:-2], "--batch-size", "8"]) == 1
    assert "batch_size: 4 -> 8" in capsys.readouterr().err
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_says_so_and_changes_nothing(
    uninterrupted: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = final_state(uninterrupted)
    assert main(["lm", "--preset", "smoke", "--data", str(data), "--out", str(uninterrupted), *OPTIONS]) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert_same_bits(final_state(uninterrupted), before)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "diverged"
    process = train(data, out, "--learning-rate", "1e30", "--warmup-steps", "0")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "at step" in err
    assert "Traceback" not in err
    assert all(np.isfinite(line["loss"]) for line in metrics_of(out))
    saved = [int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved, default=0) <= len(metrics_of(out))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "{tmp}/none", "--out", "{tmp}/out"], "none"),
        (["--data", "{data}", "--out", "{tmp}/taken"], "no run of ours"),
        (["--data", "{data}", "--out", "{tmp}/file"], "is a file"),
        (["--data", "{data}", "--out", "{tmp}/out", "--batch-size", "0"], "--batch-size 0"),
        (["--data", "{data}", "--out", "{tmp}/out", "--steps", "0"], "--steps 0"),
        (["--data", "{data}", "--out", "{tmp}/out", "--seed", "-1"], "--seed -1"),
        (["--data", "{data}", "--out", "{tmp}/out", "--mesh", "data=7"], "data=7"),
        (["--data", "{data}", "--out", "{tmp}/out", "--learning-rate", "-1"], "learning_rate"),
    ],
)
def test_bad_input_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("dear")
    (tmp_path / "file").write_text("dear")
    assert main(["lm", "--preset", "smoke", *(option.format(data=data, tmp=tmp_path) for option in options)]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_preset_with_a_fixed_vocabulary_refuses_other_data(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lm", "--preset", "tiny_model", "--data", str(data), "--out", str(tmp_path / "out")]) == 1
    assert "10000 ids, the data 64" in capsys.readouterr().err
